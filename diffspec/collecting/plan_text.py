"""A plan file (YAML) becomes a `Plan`; everything is checked before a single request is sent.

A plan is a mapping with the keys of `Plan`; `grid` is a list of mappings whose list-valued entries are multiplied out.

>>> plan = read_plan('''
... limits: {max_rate: 5, max_requests: 1000}
... measure: {requests: 40}
... grid:
...   - {arrival_rate: [1, 2], prompt_length: 64, output_length: 32}
...   - {concurrency: 4, prompt_length: 64, output_length: 32, repeats: 2}
... ''')
>>> [cell.name for cell in plan.cells()]
['p64_o32_r1', 'p64_o32_r2', 'p64_o32_c4', 'p64_o32_c4_rep2']
"""

import difflib
import math
from dataclasses import MISSING, fields
from typing import Any

import yaml

from ..results import InputError
from ..traces.sheet import check_identity
from .plan import (
    ENDPOINTS,
    PROCESSES,
    PROMPT_KINDS,
    Limits,
    Measure,
    Plan,
    Prompts,
    Server,
    axes,
    cell_fields,
)

MOST_CELLS = 10_000
LABELS = ("workload", "task", "temperature")
"""Columns that a cell may set; the others belong to the server, and stand in the plan's identity."""
OWN_FIELDS = ("model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options", "n", "best_of")
"""Fields of a request that the plan itself decides; `server: extra` may not."""
_POSITIVE = ("arrival_rate", "concurrency", "prompt_length", "output_length", "requests", "speedup", "arrival_scv")


def read_plan(
    text: str,
    source: str = "plan",
    *,
    url: str | None = None,
    max_rate: float | None = None,
    max_requests: int | None = None,
) -> Plan:
    """A plan from YAML text; the address and caps given beside it replace its own. Raises `InputError` that names the
    key, what was got and what is allowed."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: got {type(value).__name__}; allowed: a mapping with grid, limits, measure, ...")
    for section, name, given in (
        ("server", "url", url),
        ("limits", "max_rate", max_rate),
        ("limits", "max_requests", max_requests),
    ):
        if given is not None and isinstance(value.get(section) or {}, dict):
            value[section] = {**(value.get(section) or {}), name: given}
    _known(value, [item.name for item in fields(Plan)], source)
    grid = value.get("grid")
    if isinstance(grid, dict):
        grid = [grid]
    if not isinstance(grid, list) or not grid or not all(isinstance(entry, dict) for entry in grid):
        raise InputError(f"{source}: grid: got {grid!r:.60}; allowed: a list of mappings, each a load and lengths")
    for number, entry in enumerate(grid, start=1):
        _check_entry(entry, f"{source}: grid entry {number}")
    identity = value.get("identity") or {}
    if not isinstance(identity, dict):
        raise InputError(f"{source}: identity: got {identity!r:.60}; allowed: a mapping of columns")
    check_identity(identity)
    plan = Plan(
        tuple(grid),
        identity,
        _section(Server, value.get("server"), f"{source}: server"),
        _section(Limits, value.get("limits"), f"{source}: limits"),
        _section(Measure, value.get("measure"), f"{source}: measure"),
        _section(Prompts, value.get("prompts"), f"{source}: prompts"),
    )
    check_plan(plan)
    return plan


def check_plan(plan: Plan) -> None:
    """Raise `InputError` unless every cell is complete and within the caps, and the caps are given."""
    limits, measure = plan.limits, plan.measure
    for name in ("max_rate", "max_requests"):
        value = getattr(limits, name)
        if value is None:
            raise InputError(f"limits: {name} is missing; a cap on rate and count is needed before load is sent")
        _above(value, 0, f"limits: {name}")
    for name, low in (("requests", 0), ("most_seconds", 0), ("scrape_seconds", 0.05), ("settle_seconds", -1e-9)):
        _above(getattr(measure, name), low, f"measure: {name}")
    for name in ("warmup_requests", "seed"):
        _above(getattr(measure, name), -1, f"measure: {name}")
    _above(plan.server.timeout, 0, "server: timeout")
    _above(plan.prompts.vocabulary, 1, "prompts: vocabulary")
    _above(plan.prompts.temperature, -1e-9, "prompts: temperature")
    if not plan.prompts.words or not all(isinstance(word, str) for word in plan.prompts.words):
        raise InputError("prompts: words: allowed: a list of at least one text")
    for name in plan.server.extra:
        if name in OWN_FIELDS:
            raise InputError(f"server: extra: got {name!r}, which the plan itself decides; allowed: other fields")
    if measure.until is not None and not 0.001 <= measure.until <= 1:
        raise InputError(f"measure: until: got {measure.until}; allowed: 0.001 to 1, a share of the mean")
    for name, value, allowed in (
        ("server: endpoint", plan.server.endpoint, ENDPOINTS),
        ("prompts: kind", plan.prompts.kind, PROMPT_KINDS),
    ):
        if value not in allowed:
            raise InputError(f"{name}: got {value!r}; allowed: {', '.join(allowed)}")
    if plan.server.endpoint == "chat" and plan.prompts.kind == "token_ids":
        raise InputError("prompts: kind token_ids needs the completions endpoint; take text or file for chat")
    if plan.prompts.kind == "file" and not plan.prompts.file:
        raise InputError("prompts: file is missing for kind file")
    cells = plan.cells()
    total = 0
    for cell in cells:
        if cell.arrival_rate is not None and cell.arrival_rate > (limits.max_rate or 0):
            raise InputError(
                f"cell {cell.name}: {cell.arrival_rate:g} req/s is above limits: max_rate {limits.max_rate:g}"
            )
        if cell.concurrency is not None and cell.concurrency > limits.max_concurrency:
            raise InputError(f"cell {cell.name}: {cell.concurrency} is above max_concurrency {limits.max_concurrency}")
        total += plan.requests(cell) + measure.warmup_requests
    if total > (limits.max_requests or 0):
        raise InputError(
            f"limits: max_requests {limits.max_requests} is below the {total} requests of {len(cells)} cells; warm-ups "
            f"grow with latency, and load goes on to a cell's end: give about {round(1.5 * total)}, or measure fewer"
        )


def _check_entry(entry: dict[str, Any], where: str) -> None:
    """One entry of the grid: known keys, values of the right kind, one load."""
    _known(entry, [*cell_fields(), "repeats", *LABELS], where)
    repeats = entry.get("repeats", 1)
    if not isinstance(repeats, int) or isinstance(repeats, bool) or not 1 <= repeats <= 1000:
        raise InputError(f"{where}: repeats: got {repeats!r}; allowed: a whole number, 1 to 1000")
    lists = axes(entry)
    for name, values in lists.items():
        if not values:
            raise InputError(f"{where}: {name}: got an empty list; allowed: at least one value")
    for process in lists.get("arrival_process", ()):
        if process not in PROCESSES:
            raise InputError(f"{where}: arrival_process: got {process!r:.60}; allowed: {', '.join(PROCESSES)}")
    for value in lists.get("temperature", ()):
        _above(value, -1e-9, f"{where}: temperature")
    if math.prod(len(values) for values in lists.values()) * repeats > MOST_CELLS:
        raise InputError(f"{where}: more than {MOST_CELLS} cells")
    for name in (*_POSITIVE, "prompt_scv", "output_scv"):
        for value in lists.get(name, ()):
            if name in _POSITIVE:
                _above(value, 0, f"{where}: {name}")
            elif not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 100:
                raise InputError(f"{where}: {name}: got {value!r}; allowed: 0 to 100")
            if name in ("concurrency", "requests") and not isinstance(value, int):
                raise InputError(f"{where}: {name}: got {value!r}; allowed: a whole number")
    loads = [name for name in ("arrival_rate", "concurrency", "replay") if lists.get(name)]
    if len(loads) != 1:
        got = " and ".join(loads) or "no load"
        raise InputError(f"{where}: got {got}; allowed: one of arrival_rate, concurrency, replay")
    if not all(isinstance(value, str) for value in lists.get("replay", ())):
        raise InputError(f"{where}: replay: allowed: the name of a file of arrivals")
    if "gamma" in lists.get("arrival_process", ()) and len(lists["arrival_process"]) > 1:
        raise InputError(f"{where}: arrival_process gamma needs an entry of its own, with its arrival_scv")
    if (lists.get("arrival_process") == ["gamma"]) != ("arrival_scv" in lists):
        raise InputError(f"{where}: arrival_scv belongs to arrival_process gamma, and only there")


def _section(kind: type, value: Any, where: str) -> Any:
    if value is None:
        return kind()
    if not isinstance(value, dict):
        raise InputError(f"{where}: got {value!r:.60}; allowed: a mapping")
    _known(value, [item.name for item in fields(kind)], where)
    for item in fields(kind):
        if item.name not in value or value[item.name] is None:
            continue
        default = item.default if item.default is not MISSING else {}
        got = value[item.name]
        number = isinstance(got, (int, float)) and not isinstance(got, bool) and math.isfinite(got)
        wanted = item.type if isinstance(item.type, str) else str(item.type)
        if ("float" in wanted or "int" in wanted) and not isinstance(default, (bool, dict)) and not number:
            raise InputError(f"{where}: {item.name}: got {got!r:.60}; allowed: a number")
        if "int" in wanted and "float" not in wanted and number and not isinstance(got, int):
            raise InputError(f"{where}: {item.name}: got {got!r}; allowed: a whole number")
        if isinstance(default, (dict, tuple)) and not isinstance(got, dict if isinstance(default, dict) else list):
            raise InputError(
                f"{where}: {item.name}: got {got!r:.60}; allowed: a {'mapping' if default == {} else 'list'}"
            )
        if isinstance(default, bool) and not isinstance(got, bool):
            raise InputError(f"{where}: {item.name}: got {got!r:.60}; allowed: true or false")
        if ("str |" in wanted or wanted == "<class 'str'>") and not isinstance(got, str):
            raise InputError(f"{where}: {item.name}: got {got!r:.60}; allowed: text")
    return kind(
        **{
            name: tuple(entry) if isinstance(entry, list) else entry
            for name, entry in value.items()
            if entry is not None
        }
    )


def _above(value: Any, low: float, where: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= low:
        raise InputError(f"{where}: got {value!r:.60}; allowed: a number above {low:g}")


def _known(value: dict[Any, Any], allowed: list[str], where: str) -> None:
    for name in value:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed[:12])}"
            raise InputError(f"{where}: unknown key {name!r}; {hint}")


TEMPLATE = """\
# diffspec collect plan.yaml --url http://127.0.0.1:8000 --out trace
identity:                  # columns of the operating-point table that are the same in every cell
  deployment: my-deployment
  hardware: 1 my accelerator
  drafter: my-drafter
  method: draft_model      # none, draft_model, eagle, eagle3, mtp, block, ngram, suffix, tree
  draft_length: 4          # as the server was started
  max_batch_size: 64
limits:                    # needed: no load is sent above them
  max_rate: 8              # req/s
  max_requests: 3000       # over the whole plan
measure:
  requests: 200            # a cell, in a steady window after a warm-up
  warmup_requests: 20
  until: 0.05              # go on until the mean latency is known to 5 % (95 % interval) ...
  most_requests: 400       # ... or this many requests
prompts:
  kind: token_ids          # token_ids, text, or file
  vocabulary: 1000
grid:                      # lists are multiplied out
  - arrival_rate: [0.5, 1, 2, 4]
    prompt_length: 256
    output_length: 128
  - concurrency: [1, 8]
    prompt_length: 256
    output_length: 128
"""
