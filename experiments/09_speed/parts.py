# ruff: noqa: E402
"""The parts of the suite that are diffspec's own. Each runs in a process of its own:

    python experiments/09_speed/parts.py NAME FOLDER [--quick]

prints one JSON object on standard output; FOLDER is for what parts share (a fitted model). `run.py` calls them all.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np
from measure import Compiles, exponent, first_and_later, in_turns, peak_memory_gb, say

from diffspec.chunks import chunked_vmap

TABLE = HERE.parents[1] / "data" / "vllm_cpu_quiet.csv"
LENGTHS = {"prompt_length": 64.0, "output_length": 64.0}
COMPILES = Compiles()


def fitted_model(folder: Path):
    """The model of `data/vllm_cpu_quiet.csv`, fitted once for all parts."""
    from diffspec.fitting.deployment import FittedModel
    from diffspec.fitting.fit import fit
    from diffspec.traces import read_trace

    path = folder / "model.json"
    if not path.exists():
        path.write_text(fit(read_trace(TABLE)).to_json(), encoding="utf-8")
    return FittedModel.from_json(path.read_text(encoding="utf-8"))


# --- one configuration, and many side by side -------------------------------------------------------------------------


def predictions(count: int, seed: int = 0) -> np.ndarray:
    """Columns: four costs of the step, two of drafting, acceptance, prompt, output [tok] and a share of capacity."""
    random = np.random.default_rng(seed)
    spread = np.exp(random.uniform(-0.5, 0.5, (count, 6))) * [6e-3, 4e-5, 6e-8, 2e-5, 8e-4, 1e-5]
    rest = [random.uniform(0.4, 0.95, count), random.uniform(100, 2000, count), random.uniform(50, 400, count)]
    return np.column_stack([spread, *rest, random.uniform(0.05, 0.95, count)])


def predicted(x, places: float = 64.0):
    """log mean e2e latency of a server with speculation (draft length 4, 64 places): equilibrium, wait and all."""
    from diffspec.acceptance import ConstantAcceptance
    from diffspec.configuration import Configuration
    from diffspec.drafters import DraftCost
    from diffspec.serving import ServingModel
    from diffspec.step_time import RooflineStepTime
    from diffspec.workload import Workload

    step = RooflineStepTime(x[0], x[1], x[2], prefill_token=x[3], draft=DraftCost(x[4], x[5]), step_overhead=1e-3)
    serving = ServingModel(step, waiting_states=int(places))
    config = Configuration(4.0, ConstantAcceptance(x[6]), max_batch_size=places)
    load = Workload(x[7], x[8], arrival_rate=1.0)
    capacity = jax.lax.stop_gradient(places / serving.residence_time(load, config, places))
    load = Workload(x[7], x[8], arrival_rate=x[9] * capacity)
    return jnp.log(serving.predict(load, config).e2e_latency)


def compiled(function: Callable, arguments) -> tuple[Any, dict[str, Any]]:
    """A program ahead of time, with the seconds that took (tracing and lowering too), and its memory."""
    start = time.perf_counter()
    program = jax.jit(function).lower(arguments).compile()
    told: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    sizes = program.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    told["program_memory_gb"] = sum(getattr(sizes, name) for name in names) / 1e9
    return program, told


def configuration(folder: Path, quick: bool) -> dict[str, Any]:
    """Value, and value with gradient by all inputs: the equilibrium alone and the whole prediction, by batch."""
    from steady_state import random_systems, solve

    programs = {"prediction": (predicted, predictions), "equilibrium": (lambda x: solve(x)[0], random_systems)}
    sizes = {"prediction": (1, 100, 10_000, 1_000_000), "equilibrium": (1, 100, 10_000, 1_000_000, 10_000_000)}
    if quick:
        sizes = {name: (1, 100, 10_000) for name in sizes}
    rows = []
    for number, (name, (one, draw)) in enumerate(programs.items()):
        kinds = {"value": one, "value and gradient": jax.value_and_grad(one)}
        for count in sizes[name]:
            say(f"{name}, {count} configurations", 0.5 * number + 0.5 * sizes[name].index(count) / len(sizes[name]))
            arguments = jnp.asarray(draw(count) if count > 1 else draw(1)[0])
            calls, told = {}, {}
            for kind, function in kinds.items():
                many = chunked_vmap if name == "prediction" and count > 100_000 else jax.vmap
                batched = function if count == 1 else many(function)
                program, told[kind] = compiled(batched, arguments)
                calls[kind] = lambda program=program, arguments=arguments: jax.block_until_ready(program(arguments))
                start = time.perf_counter()
                calls[kind]()
                told[kind]["first_call_s"] = time.perf_counter() - start
            times = in_turns(calls, 1.5, 1 if count > 1_000_000 else 3)
            for kind in kinds:
                row = {"of": name, "kind": kind, "batch": count} | told[kind] | times[kind]
                rows.append(row | {"s_per_configuration": times[kind]["min_s"] / count})
            rows[-1]["gradient_over_value"] = times["value and gradient"]["min_s"] / times["value"]["min_s"]
            if count >= 1_000_000:
                rows[-1]["peak_memory_gb"] = peak_memory_gb()
    return {"rows": rows}


# --- the verbs --------------------------------------------------------------------------------------------------------


def fit(folder: Path, quick: bool) -> dict[str, Any]:
    """The whole fit of a measured table: both step times, held-out rows, uncertainty."""
    from diffspec.fitting.deployment import FittedModel
    from diffspec.fitting.fit import fit as verb
    from diffspec.traces import read_trace

    trace = read_trace(TABLE)
    made: list[FittedModel] = []
    told = first_and_later(lambda: made.append(verb(trace)), COMPILES, 0.0, 1 if quick else 3)
    (folder / "model.json").write_text(made[-1].to_json(), encoding="utf-8")
    return {"rows": [{"of": "fit", "what": f"{len(trace.frame)} rows of data/{TABLE.name}"} | told]}


def joint(folder: Path, quick: bool) -> dict[str, Any]:
    """Two classes, two drafters, two batch caps, two loads, a limit: drafter, lengths and cap together."""
    from problems import CAPS, LARGE, SMALL, classes, deployment

    from diffspec.optimizing.joint import optimize_jointly

    own = deployment()
    asked = {"classes": classes(2), "drafters": (SMALL, LARGE), "max_draft_length": 5, "batch_caps": CAPS}
    answers: list[dict] = []
    verb = partial(optimize_jointly, own, loads=(2.0, 12.0), slo=("ttft_mean<0.5",), **asked)
    told = first_and_later(lambda: answers.append(verb()), COMPILES, 0.0, 2 if quick else 3)
    points = sum(entry["evaluated"] for entry in answers[-1]["table"])
    what = "2 classes, 2 drafters, 2 batch caps, draft length 0 to 5, 2 loads, one limit"
    return {"rows": [{"of": "optimize_jointly", "what": what, "whole_points": points} | told]}


def policy(folder: Path, quick: bool) -> dict[str, Any]:
    """`policy` and `optimize` at 50 loads, over the draws of what the fit leaves open."""
    from diffspec.acceptance import ConstantAcceptance
    from diffspec.optimizing.load_policy import policy as verb
    from diffspec.optimizing.optimize import optimize

    own = fitted_model(folder).deployment()
    asked = LENGTHS | {"loads": np.linspace(0.2, 4.0, 50).tolist(), "acceptance": ConstantAcceptance(0.8)}
    rows = []
    for name, call in (
        ("policy", partial(verb, own, **asked)),
        ("policy, risk point", partial(verb, own, risk="point", **asked)),
        ("optimize", partial(optimize, own, **asked)),
    ):
        say(name, len(rows) / 3)
        told = first_and_later(call, COMPILES, 2.0, 2 if quick else 3)
        rows.append({"of": name, "what": "50 loads, draft length 0 to 8"} | told)
    return {"rows": rows}


def simulation(folder: Path, quick: bool) -> dict[str, Any]:
    """Sequence-steps per second of CPU time at 20 req/s (../simulator.json has 4 req/s too), and what the peers' queues
    are asked: M/M/4, and the mean latency of the batch server."""
    import simulator

    from diffspec import Workload
    from diffspec.simulating import Engine, simulate

    simulator.REPEATS = 1 if quick else 2
    start = time.perf_counter()
    found = simulator.sequence_steps(20.0)
    row = {"of": "sequence steps", "wall_s": time.perf_counter() - start} | found
    say("M/M/4", 0.6)
    simulator.ours()
    turns = [simulator.ours() for _ in range(3)]
    engine = Engine(4, (0.8,) * 4, max_batch_size=256, max_batched_tokens=8192)
    load = Workload(500.0, 200.0, arrival_rate=20.0)
    e2e = simulate(simulator.SERVER, load, engine, n_requests=2000, replications=8).mean("e2e")
    return {
        "rows": [row],
        "mm4": {"s_each": min(turn[0] for turn in turns), "mean": turns[0][1]},
        "batch_server": {
            "s_each": 1.0 / found["sequence_steps_per_second"],
            "mean": e2e.value,
            "half_width": e2e.half_width,
        },
    }


def log(folder: Path, quick: bool) -> dict[str, Any]:
    """A million requests in Parquet: as one run with a stated load, and as a log that is cut into windows."""
    from request_table import RATE, SERVICE, write_requests

    from diffspec.traces import read_trace

    count, rows = 100_000 if quick else 1_000_000, []
    for kind, stated in (("one run", True), ("log", False)):
        path = folder / f"{kind}.parquet"
        write_requests(path, count, stated)
        say(kind, 0.5 * len(rows) + 0.2)
        found: list[Any] = []
        told = first_and_later(lambda path=path, found=found: found.append(read_trace(path).frame), COMPILES, 2.0)
        frame = found[-1]
        told |= {"rows": count, "rows_per_s": count / told["min_s"], "operating_points": len(frame)}
        told["e2e_error"] = float(np.average(frame["e2e_mean"], weights=frame["n_requests"])) / SERVICE - 1.0
        told["batch_error"] = float(frame["effective_batch_size"].mean()) / (RATE * SERVICE) - 1.0
        rows.append({"of": "read and summarise", "what": kind} | told)
    return {"rows": rows, "peak_memory_gb": peak_memory_gb()}


# --- scaling ----------------------------------------------------------------------------------------------------------


def scaled(what: str, unit: str, calls: dict[int, Callable[[], Any]], seconds: float, upper: int, **more) -> dict:
    """Seconds by size, sizes in turns after a first call of each, and the exponent."""
    for call in calls.values():
        call()
    times = in_turns(calls, seconds)
    least = [times[size]["min_s"] for size in calls]
    points = [{"size": size, "min_s": times[size]["min_s"], "median_s": times[size]["median_s"]} for size in calls]
    return {"what": what, "unit": unit, "points": points} | exponent(calls, least, upper) | more


def scaling_log(folder: Path, quick: bool) -> dict:
    from request_table import write_requests

    from diffspec.traces import read_trace

    sizes = (10_000, 30_000, 100_000, 300_000) + (() if quick else (1_000_000,))
    paths = {size: folder / f"rows{size}.parquet" for size in sizes}
    for size, path in paths.items():
        write_requests(path, size, False)
    calls = {size: lambda path=path: read_trace(path) for size, path in paths.items()}
    return scaled("reading and summarising a log", "rows", calls, 8.0, 4)


def scaling_batch(folder: Path, quick: bool) -> dict:
    sizes = (1000, 10_000, 30_000, 100_000) + (() if quick else (300_000, 1_000_000))
    calls = {}
    for size in sizes:
        arguments = jnp.asarray(predictions(size))
        program = jax.jit(chunked_vmap(jax.value_and_grad(predicted)))
        program = program.lower(arguments).compile()
        calls[size] = lambda program=program, arguments=arguments: jax.block_until_ready(program(arguments))
    return scaled("predict with gradient, side by side", "configurations", calls, 5.0, 4)


def scaling_fleet(folder: Path, quick: bool) -> dict:
    from diffspec.optimizing.fleet import optimize_fleet

    own = fitted_model(folder).deployment()
    asked = LENGTHS | {"loads": [1.0, 2.0, 4.0], "max_draft_length": 4}
    calls = {}
    for size in (16, 64, 128, 256, 512, 1024):
        fleet = {str(number): own for number in range(size)}
        calls[size] = lambda fleet=fleet: optimize_fleet(fleet, **asked)
    return scaled("the draft length of every deployment of a fleet", "deployments", calls, 4.0, 4)


def scaling_joint(folder: Path, quick: bool) -> list[dict]:
    """One evaluation of the relaxed joint problem with its gradient, and the whole solve, by its variables: twelve
    lanes, four loads from three starts each, in one program as `optimize_jointly` has them."""
    from problems import lanes, relaxed_problem

    from diffspec.optimizing import constrained

    evaluations, solves, counts, compiling = {}, {}, {}, {}
    for count in (1, 2, 4, 8, 16)[: 4 if quick else 5]:
        problem = relaxed_problem(count)
        data = lanes(problem.data, 12) | {"load": np.repeat([2.0, 4.0, 6.0, 8.0], 3)}
        starts = np.tile(np.asarray([0.1, 0.45, 0.9])[:, None], (4, problem.variables))
        at = (starts, data, np.zeros((12, 1)), np.full(12, constrained.WEIGHT), problem.shared)

        def evaluate(problem=problem, at=at):
            jax.block_until_ready(constrained._evaluate(problem.function, *at))

        def solve(problem=problem, starts=starts, data=data, count=count):
            alike = [range(count)] if count > 1 else ()
            found = constrained.minimise_within(problem.function, starts, data, problem.shared, alike=alike)
            counts[problem.variables] = found.evaluations

        evaluations[problem.variables], solves[problem.variables] = evaluate, solve
        start = time.perf_counter()
        evaluate()
        compiling[problem.variables] = time.perf_counter() - start
        say(f"relaxed problem of {count} classes", 0.5)
    one = "one value and gradient of the relaxed joint problem"
    found = [scaled(one, "variables", evaluations, 2.0, 4), scaled("its whole solve", "variables", solves, 0.0, 4)]
    for evaluation, whole in zip(found[0]["points"], found[1]["points"], strict=True):
        evaluation["first_call_s"], whole["evaluations"] = compiling[evaluation["size"]], counts[whole["size"]]
    return found


def scaling_policy(folder: Path, quick: bool) -> list[dict]:
    from diffspec.acceptance import ConstantAcceptance
    from diffspec.optimizing.load_policy import policy as verb
    from diffspec.optimizing.optimize import optimize

    own = fitted_model(folder).deployment()
    asked = LENGTHS | {"acceptance": ConstantAcceptance(0.8)}
    found = []
    for name, call in (("policy", verb), ("optimize", optimize)):
        calls = {}
        for size in (10, 25, 50, 100, 200)[: 4 if quick else 5]:
            loads = np.linspace(0.2, 4.0, size).tolist()
            calls[size] = partial(call, own, loads=loads, **asked)
        found.append(scaled(f"loads of `{name}`", "loads", calls, 4.0, 4))
    return found


def scaling(folder: Path, quick: bool) -> dict[str, Any]:
    """Seconds by size: log rows, batch, deployments, variables, loads."""
    curves: list[dict] = []
    parts = (scaling_log, scaling_batch, scaling_fleet, scaling_joint, scaling_policy)
    for number, part in enumerate(parts):
        say(part.__name__.replace("_", " of "), number / len(parts))
        found = part(folder, quick)
        curves += found if isinstance(found, list) else [found]
    return {"curves": curves}


PARTS = {part.__name__: part for part in (configuration, fit, joint, policy, simulation, log, scaling)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    print(json.dumps(PARTS[asked.name](asked.folder, asked.quick)))


if __name__ == "__main__":
    main()
