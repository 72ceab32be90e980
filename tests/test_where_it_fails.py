"""Each figure of docs/where-it-fails.md, read from the results of its experiment: none is only copied."""

import json
import re
from statistics import mean

import pytest
from documents import REPOSITORY

PAGE = (REPOSITORY / "docs" / "where-it-fails.md").read_text(encoding="utf-8")
GIVEN = (
    *("p99", "caps above 1,024", "outputs of 8 tokens", "0.6 of capacity", "at 0.9", "above 512 tokens"),
    *("inside 90 %", "H200", "e2e"),
)
"""Numbers of the page that are no findings: names, settings and bounds of the model."""


def results(path: str):
    return json.loads((REPOSITORY / "experiments" / path).read_text(encoding="utf-8"))


def percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f}"


def between(values) -> str:
    return f"{percent(min(values))} to {percent(max(values))} %"


def percentiles() -> list[str]:
    statistics = [
        (row, name, found)
        for row in results("04_physics_against_simulator/results.json")
        for name, found in row["statistics"].items()
        if found["verdict"] != "reported"
    ]
    geometric, fixed = [entry for entry in statistics if entry[2]["verdict"] == "beyond"]
    assert [entry[0]["lengths"] for entry in (geometric, fixed)] == ["geometric", "fixed"]
    assert geometric[1] == fixed[1] == "tpot p99" and fixed[0]["load"] == 0.95
    low, high = percent(-geometric[2]["error"]), percent(fixed[2]["error"])
    return [
        f"p99 of tpot for geometric outputs read {low} % low in one of {len(statistics):,} comparisons",
        f"for fixed ones near capacity {high} % high in another",
    ]


def runs() -> list[str]:
    found = results("04_physics_against_simulator/runs_and_budgets.json")
    by_use: dict[float, list[float]] = {}
    for row in found["finite_runs"]:
        if row["cap"] is not None and row["lengths"] == "geometric" and 0.9 <= row["use"] <= 1.2:
            by_use.setdefault(row["use"], []).append(abs(row["error"]))
    most = percent(max(max(errors) for errors in by_use.values()))
    short = {row["use"]: row["e2e"] for row in found["meeting"] if row["output_length"] == 8.0}
    return [
        f"at a cap near capacity: {between([mean(errors) for errors in by_use.values()])} off, {most} % at most",
        f"outputs of 8 tokens reads {percent(-short[0.6])} % low at 0.6 of capacity, {percent(-short[0.9])} % at 0.9",
    ]


def before_traces() -> list[str]:
    found = results("03_measure_gpu/findings.json")
    servers = found["servers"]["vLLM 0.25.1, EAGLE head"]
    bias = [servers[f"{which} speculation"]["e2e_mean"]["bias"] for which in ("with", "without")]
    above = found["before any trace"]["dense-8b, verifying"]["by region"]["more"]
    elsewhere = results("05_transfer/results.json")
    ttft = [entry["first principles"]["ttft"]["error"] for entry in elsewhere["transfers"]]
    ttft += [entry["ttft"]["error"] for entry in elsewhere["apertus"].values()]
    moved = [e["transferred"]["tpot"]["error"] for e in elsewhere["transfers"] if e["from"] != e["to"]]
    return [
        f"e2e of vLLM on an H200 {between(bias)} too high; steps above 512 tokens {percent(above, 1)} % off",
        f"ttft on public GPUs {between(ttft)} off",
        f"tpot {between(moved)} off on public measurements",
    ]


def intervals() -> list[str]:
    found = results("06_fit/interval_coverage.json")["all"]
    rows = results("07_optimise/capacity.json")["measured"]["serving loop on an H200, 1B drafter"]
    metrics = {row["metric"] for row in rows}
    inside = [mean(bool(row["inside"]) for row in rows if row["metric"] == metric) for metric in metrics]
    return [
        f"{percent(found['coverage'])} % of {found['values']:,} held-out values lie inside 90 %",
        f"only {between(inside)} of rates that `size` names for one H200 trace",
    ]


def sentences() -> list[str]:
    return [*percentiles(), *runs(), *before_traces(), *intervals()]


@pytest.mark.parametrize("said", sentences())
def test_the_page_says_what_was_found(said):
    assert said in PAGE


def unread(page: str) -> list[str]:
    """Numbers of a page that are neither read from an experiment nor named as given."""
    for known in (*sentences(), *GIVEN):
        page = page.replace(known, "")
    return re.findall(r"\d[\d.,]*", page)


def test_no_other_number_is_on_the_page():
    assert unread(PAGE) == []
    assert unread(PAGE.replace("13 to 145", "12 to 145")) == ["12", "145"]
