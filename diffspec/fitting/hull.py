"""The hull of a fit: the ranges of what was measured, and what of a question lies outside of them.

Ranges are taken field by field (draft length, load of either loop, prompt and output length) and once more for the rows
of each draft length: a rate that was measured at draft length 4 alone is outside at draft length 0. Between two
measured draft lengths both must hold it. No draft (0) is measured by rows without speculation only, and these say
nothing of drafting. Other combinations (long prompts at high rates, say) are not looked at, nor is acceptance, which is
an input of its own.
"""

from collections.abc import Mapping
from typing import Any

FIELDS = ("arrival_rate", "concurrency", "prompt_length", "output_length")
BY_DRAFT_LENGTH = "by_draft_length"


def ranges(frame, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Ranges of the fitted rows of ``frame``, and of those behind ``before``: [smallest, largest] by column, None where
    no row has it; ``draft_lengths`` listed; and ``by_draft_length`` the ranges of :data:`FIELDS` at each.

    An older ``before`` without the last has none after it either: what its rows were is not known.
    """
    old = {} if before is None else before
    spans: dict[str, Any] = dict(old)
    spans["draft_lengths"] = sorted({*old.get("draft_lengths", ()), *(int(k) for k in frame["draft_length"])})
    spans |= {name: _span(frame[name], old.get(name)) for name in (*FIELDS, "tokens_per_step")}
    if before is None or BY_DRAFT_LENGTH in before:
        known = old.get(BY_DRAFT_LENGTH, {})
        groups = {str(int(k)): rows for k, rows in frame.groupby("draft_length")}
        fresh = {k: {n: _span(rows[n], known.get(k, {}).get(n)) for n in FIELDS} for k, rows in groups.items()}
        spans[BY_DRAFT_LENGTH] = dict(sorted((known | fresh).items(), key=lambda item: int(item[0])))
    return spans


def _span(column, before: list[float] | None) -> list[float] | None:
    edges = [*(before or ()), *map(float, column.dropna())]
    return [min(edges), max(edges)] if edges else None


def outside(measured: Mapping[str, Any], draft_length: float, fields: Mapping[str, float | None]) -> list[dict]:
    """What of a question was not measured: ``field``, ``asked`` and the ``measured`` range (None: in no row at all),
    and ``at_draft_length`` where only the rows of a draft length lack it. Empty inside the hull.

    >>> spans = {"draft_lengths": [0, 4], "arrival_rate": [1.0, 8.0], "by_draft_length": {
    ...     "0": {"arrival_rate": [1.0, 3.0]}, "4": {"arrival_rate": [1.0, 8.0]}}}
    >>> outside(spans, 4, {"arrival_rate": 5.0})
    []
    >>> outside(spans, 0, {"arrival_rate": 5.0})
    [{'field': 'arrival_rate', 'asked': 5.0, 'measured': [1.0, 3.0], 'at_draft_length': 0}]
    >>> [in_words(entry) for entry in outside(spans, 2, {"arrival_rate": 2.0})]
    ['draft_length 2 is below the shortest measured one, 4']
    """
    known = measured["draft_lengths"]
    alike = [k for k in known if (k > 0) == (draft_length > 0)]
    within = bool(alike) and min(alike) <= draft_length <= max(alike)
    found: list[dict] = []
    if not within:
        span = alike or known
        found.append({"field": "draft_length", "asked": draft_length, "measured": [min(span), max(span)]})
    by_length = measured.get(BY_DRAFT_LENGTH) or {}
    around = {max(k for k in alike if k <= draft_length), min(k for k in alike if k >= draft_length)} if within else ()
    for name in FIELDS:
        asked = fields.get(name)
        if asked is None:
            continue
        if not _holds(measured.get(name), asked):
            found.append({"field": name, "asked": asked, "measured": measured.get(name)})
            continue
        for k in sorted(around):
            span = by_length.get(str(k), measured)[name]
            if not _holds(span, asked):
                found.append({"field": name, "asked": asked, "measured": span, "at_draft_length": k})
    return found


def _holds(span: list[float] | None, value: float) -> bool:
    return span is not None and span[0] * (1 - 1e-9) <= value <= span[1] * (1 + 1e-9)


def in_words(entry: Mapping[str, Any]) -> str:
    """An entry of :func:`outside` as a sentence."""
    name, asked, span = entry["field"], entry["asked"], entry["measured"]
    if name == "draft_length":
        if span[1] == 0:
            return "no speculative row was fitted: drafting cost is a guess (its prior), not knowledge"
        if asked == 0:
            return "no row without speculation (draft_length 0) was fitted"
        side, edge = ("beyond the longest", span[1]) if asked > span[1] else ("below the shortest", span[0])
        return f"draft_length {asked:g} is {side} measured one, {edge}"
    if "at_draft_length" in entry:
        where = f" with draft_length {entry['at_draft_length']}"
        if span is None:
            return f"no row with {name}{where} was fitted"
        return f"{name} {asked:g} is outside the range measured{where}, {span[0]:g} to {span[1]:g}"
    if span is None:
        return f"no row with {name} was fitted (the other loop kind was)"
    return f"{name} {asked:g} is outside the measured range {span[0]:g} to {span[1]:g}"
