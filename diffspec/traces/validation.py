"""Turn a table as it was found into the canonical frame, and say everything that is wrong with it."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from . import consistency
from .problems import Problem, near, repeated, shorten
from .schema import COLUMNS, DEFAULT_DEPLOYMENT, NAMES, NUMBER_NAMES, OBSERVABLES, RESERVED, TEXT_NAMES
from .sheet import Sheet, is_missing, parse_number


def validate(frame: pd.DataFrame, file: str | None = None) -> tuple[pd.DataFrame, list[str], list[Problem]]:
    """The canonical frame of a table, with warnings and problems; raises nothing.

    `frame` is what `read_table` returns, or any frame with columns of the operating-point table; `file` names it in
    messages. In the canonical frame every column of `COLUMNS` is present: numbers are float64 with NaN where missing,
    texts are str or None, `position_acceptance` holds tuples or None; unknown columns follow, then `source_file` and
    `source_row`. A missing `deployment` becomes "default", `failed` 0, `draft_length` 0 where nothing speaks of
    speculation, `method` "none" or "draft_model" by the draft length. Rows with a problem are still in the frame, with
    NaN in bad cells: take them out by their `source_row`. A problem whose row is None is one of the whole table.

    >>> import pandas as pd
    >>> row = dict(arrival_rate=2, prompt_length=64, output_length=64, e2e_mean=1.2, ttft_mean=-1)
    >>> frame, warnings, problems = validate(pd.DataFrame([row]), "runs.csv")
    >>> problems[0].line()
    "runs.csv, row 2, column 'ttft_mean': got -1.0; allowed: above 0, up to 3600 s"
    """
    names = [str(name) for name in frame.columns]
    twice = repeated(names)
    if twice:
        problem = Problem("duplicate column names", file, 1, twice[0], ", ".join(twice), "each name once")
        return _empty(), [], [problem]
    problems: list[Problem] = list(frame.attrs.get("problems", ()))
    warnings: list[str] = list(frame.attrs.get("warnings", ()))
    frame = frame.set_axis(names, axis=1).reset_index(drop=True)
    frame.attrs = {}  # pandas copies them with every column that is taken
    if not len(frame):
        return _empty(), warnings, problems or [Problem("the table has no rows", file, allowed="at least one row")]
    sheet = Sheet(frame, file, _live(frame, file, problems))
    unknown = [name for name in names if name not in NAMES and name not in RESERVED]
    if unknown:
        warnings.append(_name_unknown(unknown, file))
    if sheet.live.any():
        absent = _absent(sheet, names, file)
        if absent:
            return _canonical(sheet, frame, unknown), warnings, problems + absent
        warnings += _complete(sheet, file)
        consistency.check_rows(sheet)
        in_milliseconds = consistency.check_units_of_table(sheet, file)
        if in_milliseconds:  # says it once for the whole table
            problems += in_milliseconds
            sheet.problems = [item for item in sheet.problems if item.advice != consistency.MILLISECONDS]
    problems = sorted(problems + sheet.problems, key=lambda item: item.row or 0)
    return _canonical(sheet, frame, unknown), warnings, problems


def _empty() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=float if name in NUMBER_NAMES else object) for name in NAMES})


def _live(frame: pd.DataFrame, file: str | None, problems: list[Problem]) -> np.ndarray:
    spoilt = {(problem.file, problem.row) for problem in problems}
    if not spoilt or "source_row" not in frame.columns:
        return np.ones(len(frame), bool)
    files = frame["source_file"] if "source_file" in frame.columns else [file] * len(frame)
    return np.array([place not in spoilt for place in zip(files, frame["source_row"], strict=True)], bool)


def _name_unknown(unknown: list[str], file: str | None) -> str:
    named = []
    for name in unknown[:12]:
        hint = near(name, NAMES)
        named.append(f"'{shorten(name)}'" + (f" ({hint})" if hint else ""))
    more = f" and {len(unknown) - 12} more" if len(unknown) > 12 else ""
    return f"{_of(file)}unknown columns are kept and not used: {', '.join(named)}{more}"


def _of(file: str | None) -> str:
    return f"{file}: " if file else ""


def _absent(sheet: Sheet, names: list[str], file: str | None) -> list[Problem]:
    """Columns without which no row is an operating point."""

    def empty(*group: str) -> bool:
        return not any(sheet.given[name][sheet.live].any() for name in group)

    problems = []
    for name in ("prompt_length", "output_length"):
        if empty(name):
            hint = next(iter(difflib.get_close_matches(name, [n for n in names if n not in NAMES], 1, 0.75)), None)
            advice = f"perhaps it is called '{hint}'" if hint else f"give it by 'diffspec import --set {name}=N'"
            problems.append(Problem("the column is missing or empty", file, None, name, advice=advice))
    if empty("arrival_rate", "concurrency"):
        message = "neither arrival_rate nor concurrency is in the table"
        problems.append(
            Problem(
                message,
                file,
                allowed="arrival_rate [req/s] for open loops, concurrency [req] for closed ones",
                advice="give it by 'diffspec import --set arrival_rate=R' or '--set concurrency=N'",
            )
        )
    if empty(*OBSERVABLES):
        message = "nothing observed is in the table"
        problems.append(Problem(message, file, allowed="one of ttft_*, itl_*, tpot_*, e2e_* [s] or throughput [req/s]"))
    return problems


def _complete(sheet: Sheet, file: str | None) -> list[str]:
    """Fill what a missing cell means, and say so where it is an assumption."""
    numbers, texts, live = sheet.numbers, sheet.texts, sheet.live
    texts["deployment"] = [text or DEFAULT_DEPLOYMENT for text in texts["deployment"]]
    numbers["failed"][~sheet.given["failed"]] = 0.0
    warnings = []

    def assumed(mask: np.ndarray, text: str) -> None:
        count = int((mask & live).sum())
        if count:
            warnings.append(f"{_of(file)}{text} ({count} row{'s' if count > 1 else ''})")

    method = np.array([text or "" for text in texts["method"]], dtype=object)
    no_length = ~sheet.given["draft_length"]
    lists = sheet.lists["position_acceptance"]
    from_positions = no_length & np.array([value is not None for value in lists]) & (method != "none")
    for index in np.flatnonzero(from_positions):
        numbers["draft_length"][index] = len(lists[index] or ())
    assumed(from_positions, "draft_length taken from the number of positions in position_acceptance")
    speculating = np.zeros(sheet.size, bool)
    for name in ("tokens_per_step", "acceptance_rate", "position_acceptance", "draft_acceptance_rate"):
        speculating |= sheet.given[name]
    speculating &= ~((numbers["tokens_per_step"] == 1) & ~sheet.given["acceptance_rate"])
    plain = no_length & ~from_positions & np.isin(method, ("", "none")) & ~speculating & ~sheet.bad["method"]
    numbers["draft_length"][plain] = 0.0
    sheet.given["draft_length"] = sheet.given["draft_length"] | from_positions | plain
    unnamed = (method == "") & ~sheet.bad["method"] & sheet.given["draft_length"]
    drafting = unnamed & (numbers["draft_length"] > 0)
    for index in np.flatnonzero(unnamed):
        texts["method"][index] = "draft_model" if drafting[index] else "none"
    assumed(drafting, "method is missing where tokens are drafted: taken as draft_model")
    rated = sheet.usable("draft_acceptance_rate", "draft_length") & ~sheet.given["tokens_per_step"]
    rated &= numbers["draft_length"] > 0
    numbers["tokens_per_step"][rated] = (1 + numbers["draft_acceptance_rate"] * numbers["draft_length"])[rated]
    sheet.given["tokens_per_step"] |= rated
    assumed(rated, "tokens_per_step computed as 1 + draft_acceptance_rate*draft_length")
    _complete_arrivals(sheet, assumed)
    return warnings


def _complete_arrivals(sheet: Sheet, assumed) -> None:
    process, scv = sheet.texts["arrival_process"], sheet.numbers["arrival_scv"]
    open_loop = sheet.usable("arrival_rate") & ~sheet.bad["arrival_process"] & ~sheet.bad["arrival_scv"]
    guessed = np.zeros(sheet.size, bool)
    for index in np.flatnonzero(open_loop):
        if process[index] is None:
            guessed[index] = math.isnan(scv[index])
            process[index] = "poisson" if guessed[index] else {1.0: "poisson", 0.0: "constant"}.get(scv[index], "gamma")
        if math.isnan(scv[index]):
            scv[index] = {"poisson": 1.0, "constant": 0.0}.get(process[index] or "", math.nan)
    assumed(guessed, "arrival_process is missing in open loops: taken as poisson")


def _canonical(sheet: Sheet, frame: pd.DataFrame, unknown: list[str]) -> pd.DataFrame:
    data = {}
    for item in COLUMNS:
        if item.name in sheet.numbers:
            data[item.name] = np.where(sheet.bad[item.name], math.nan, sheet.numbers[item.name])
        else:
            store = sheet.texts if item.name in TEXT_NAMES else sheet.lists
            data[item.name] = pd.Series(store[item.name], dtype=object)
    for name in unknown:
        data[name] = _tidy(frame[name])
    data["source_file"] = pd.Series(sheet.files, dtype=object)
    data["source_row"] = pd.Series(sheet.rows, dtype="int64")
    return pd.DataFrame(data)


def _tidy(cells: Iterable) -> pd.Series:
    """An unknown column: numbers where every given cell is one, else plain values or text, None for empty."""
    try:
        values = [parse_number(cell) for cell in cells]
        return pd.Series([math.nan if value is None else value for value in values], dtype=float)
    except ValueError:
        return pd.Series([None if is_missing(cell) else _plain(cell) for cell in cells], dtype=object)


def _plain(cell: Any) -> Any:
    """A cell as text, number or truth value: dates, lists and bytes of a Parquet file as text."""
    return cell if isinstance(cell, (str, bool, int, float)) else str(cell)
