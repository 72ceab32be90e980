"""Measures a GPU for diffspec: step costs, open-loop traces and routing, with PyTorch and random weights alone.

    python run.py --part 1 --budget-seconds 480 --out results

Part 1: peaks, and the step cost of a dense 8B verifier and its drafters. Part 2: open-loop traces of that verifier with
and without speculation. Part 3: step cost of a 30B-A3B mixture of experts, and routing skew. Part 4: its open-loop
traces. `--resume` continues where a run stopped; `--tiny` runs everything in seconds on a CPU. See README.md.
"""

import argparse
import gc
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from instrument import routing, step_cost, traces  # noqa: E402
from instrument.engine import Limits, TorchEngine  # noqa: E402
from instrument.grid import CONTEXTS, MOE_CONTEXTS, Budget, routing_cells, step_cells, trace_cells  # noqa: E402
from instrument.model import Model  # noqa: E402
from instrument.session import DeviceLost, Session  # noqa: E402

DENSE, MIXTURE = "dense-8b", "moe-30b-a3b"
DENSE_DRAFTERS, MIXTURE_DRAFTER = ("draft-1b", "eagle-8b", "draft-0.5b"), "draft-0.6b"
CACHE_ROWS = {1: 530_000, 3: 270_000}  # tokens: 69 GB of the 8B model's cache, 27 GB of the mixture's
PROMPT, OUTPUT, CHUNK = 256, 128, 256
DRAFT_LENGTHS = {2: (0, 1, 3, 5, 7), 4: (0, 1, 3, 5)}


def step_part(session: Session, arguments: argparse.Namespace, budget: Budget) -> list[str]:
    """Parts 1 and 3."""
    names = (DENSE, *DENSE_DRAFTERS) if session.part == 1 else (MIXTURE,)
    shapes = {name: session.shape(name) for name in names}
    ops = session.choose_ops(list(shapes.values()))
    cells = step_cells(names, CONTEXTS if session.part == 1 else MOE_CONTEXTS, session.tiny)
    routes = routing_cells(session.tiny) if session.part == 3 else []
    fed = [(cell.batch, cell.tokens) for cell in [*cells, *routes]]
    most_batch, most_tokens = (max(values) for values in zip(*fed, strict=True))
    rows = 1_000 if session.tiny else CACHE_ROWS[session.part]
    benches = {}
    for name, shape in shapes.items():
        model = Model(shape, session.device, session.dtype, ops)
        benches[name] = make_bench(session, model, rows, most_batch, most_tokens)
        session.attempt(f"check of {shape.name}", budget, 3.0, partial(step_cost.check, session, benches[name]))
        session.tell(f"{shape.name}: {shape.params / 1e9:.2f} G parameters, {benches[name].cache.rows} cache rows")
    roles = {name: "verifier" if name in (DENSE, MIXTURE) else "drafter" for name in names}
    seconds = 0.01 if session.tiny else 0.15
    costs = session.table("step_cost", step_cost.COLUMNS, step_cost.KEY)
    skews = session.table("routing", routing.COLUMNS, routing.KEY) if routes else None
    # the routing study comes after the coarse step costs, so that neither starves the other
    coarse = len(cells) if skews is None else len(cells) // 4
    step_cost.measure(session, benches, roles, cells[:coarse], costs, budget, seconds)
    if skews is not None:
        routing.measure(session, benches[MIXTURE], routes, skews, budget, 2 * seconds)
        step_cost.measure(session, benches, roles, cells[coarse:], costs, budget, seconds)
    return step_cost.summary(costs) + (routing.summary(skews) if skews is not None else [])


def make_bench(session: Session, model: Model, rows: int, most_batch: int, most_tokens: int) -> step_cost.Bench:
    """A bench with as many cache rows as fit, halved until they do."""
    while True:
        try:
            return step_cost.Bench(model, rows, most_batch, most_tokens, session.recorder)
        except torch.cuda.OutOfMemoryError:
            if rows < 10_000:
                raise
        torch.cuda.empty_cache()
        rows //= 2


def trace_part(session: Session, arguments: argparse.Namespace, budget: Budget) -> list[str]:
    """Parts 2 and 4."""
    verifier_name = DENSE if session.part == 2 else MIXTURE
    drafter_name = arguments.drafter or (DENSE_DRAFTERS[0] if session.part == 2 else MIXTURE_DRAFTER)
    shapes = [session.shape(verifier_name), session.shape(drafter_name)]
    if shapes[1].vocabulary > shapes[0].vocabulary or (shapes[1].reads_hidden and shapes[1].hidden != shapes[0].hidden):
        raise SystemExit(f"{drafter_name} cannot draft for {verifier_name}")
    ops = session.choose_ops(shapes)
    verifier, drafter = (Model(shape, session.device, session.dtype, ops, 8192) for shape in shapes)
    prompt, output, chunk = (24, 12, 16) if session.tiny else (PROMPT, OUTPUT, CHUNK)
    requests = 8 if session.tiny else arguments.max_batch_size
    limits = Limits(requests, chunk, 4 * (prompt + output), 2 if session.tiny else 7)
    engine = TorchEngine(verifier, drafter, limits, session.recorder)
    session.tell(f"{shapes[0].name} + {shapes[1].name}: {engine.caches[0].rows} cache rows")
    batched = 128 if session.tiny else arguments.max_batched_tokens
    window = 0.2 if session.tiny else arguments.window
    campaign = traces.Campaign(session, engine, f"1 {session.name}", batched, window)
    campaign.run(trace_cells(DRAFT_LENGTHS[session.part], prompt, output, session.tiny), budget)
    if not engine.all_graphs and session.recorder.enabled:
        session.tell("some passes run without a CUDA graph: see graph_problem in the device table")
    return traces.summary(campaign.points)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2, 3, 4), required=True)
    parser.add_argument("--budget-seconds", type=float, default=480.0, help="stop starting cells after this [s]")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the tables")
    parser.add_argument("--resume", action="store_true", help="keep the tables' rows and measure what is missing")
    parser.add_argument("--tiny", action="store_true", help="tiny models and grids, for a CPU")
    parser.add_argument("--device", default=None, help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--drafter", default=None, help="drafter of parts 2 and 4, such as eagle-8b")
    parser.add_argument("--max-batch-size", type=int, default=128, help="requests in the batch, parts 2 and 4")
    parser.add_argument("--max-batched-tokens", type=int, default=2048, help="tokens in a step, parts 2 and 4")
    parser.add_argument("--window", type=float, default=6.0, help="seconds of arrivals measured in each run")
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    budget = Budget(arguments.budget_seconds)
    present = sorted(arguments.out.glob(f"part{arguments.part}_*.csv"))
    if present and not arguments.resume:
        print(f"{arguments.out} has tables of part {arguments.part}: pass --resume, or another --out", file=sys.stderr)
        return 2
    name = arguments.device or ("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    if name == "cpu" and not arguments.tiny:
        print("no GPU here: only --tiny runs on a CPU", file=sys.stderr)
        return 2
    if name == "cpu":
        torch.set_num_threads(1)  # tiny products are slower on several
    session = Session(
        arguments.part, arguments.out, torch.device(name), arguments.tiny, arguments.resume, arguments.quiet
    )
    try:
        lines = (step_part if arguments.part in (1, 3) else trace_part)(session, arguments, budget)
    except DeviceLost as lost:
        print(lost, file=sys.stderr)
        return 3
    finally:
        gc.collect()
    session.finish()
    skipped = len(session.skipped.rows)
    print(
        "\n".join(
            [*lines, f"{skipped} cells skipped (see {session.skipped.path.name})" if skipped else "all cells done"]
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
