"""The published forms of experiment 01 against their own equations, and its tables."""

import json
import sys

import numpy as np
import pytest
from helpers import EXPERIMENTS, experiment

FOLDER = EXPERIMENTS / "01_reproduce_published_form"
baselines, tables = (experiment(FOLDER.name, name) for name in ("baselines", "tables"))

RATES, USERS = (0.5, 1.0, 2.0, 3.0), (1.0, 4.0, 16.0)


def grid(points, share=np.nan):
    """Rows of the full grid of loads over (draft length, tokens per step, prompt, output), latency still missing."""
    loads = [(rate, np.nan) for rate in RATES] + [(np.nan, users) for users in USERS]
    lines = [(*load, *point) for point in points for load in loads]
    rate, users, k, emitted, prompt, output = (np.asarray(column, float) for column in zip(*lines, strict=True))
    group = np.asarray([f"E{value:g}" for value in emitted])
    return baselines.Rows(
        rate, users, k, emitted, prompt, output, np.full(len(rate), share), group, np.full(len(rate), np.nan)
    )


def with_latency(rows, intercept, slope):
    """Eq 1 in an open loop, L = C1 + N*C2 in a closed one, written out."""
    latency = np.where(
        np.isnan(rows.users), intercept / (1 - rows.arrival_rate * slope), intercept + rows.users * slope
    )
    return baselines.Rows(**{**vars(rows), "latency": latency})


POINTS = [(0, 1.0, 64, 64), (2, 1.9, 64, 64), (4, 4.1, 64, 64)]


def test_eq1_recovers_its_coefficients():
    rows = grid(POINTS)
    exact = {0: (1.2, 0.11), 2: (0.9, 0.13), 4: (0.6, 0.05)}
    one, two = (np.asarray([exact[int(k)][i] for k in rows.draft_length]) for i in (0, 1))
    fitted = baselines.fit_form("Eq 1", with_latency(rows, one, two))
    assert fitted.unknowns == pytest.approx([1.2, 0.9, 0.6, 0.11, 0.13, 0.05], rel=1e-6)


def test_eq3_recovers_its_six_coefficients():
    rows = grid([*POINTS, (6, 2.4, 64, 64), (2, 1.9, 64, 32)])
    c = [0.05, 0.018, 0.003, 0.01, 0.0012, 0.0004]
    steps = rows.output_length / rows.tokens_per_step
    one = c[0] + steps * (c[1] + rows.draft_length * c[2])
    two = c[3] + steps * (c[4] + rows.draft_length * c[5])
    rows = with_latency(rows, one, two)
    fitted = baselines.fit_form("Eq 3", rows)
    assert fitted.unknowns == pytest.approx(c, rel=1e-5)
    latency, saturated = fitted.predict(rows)
    assert latency == pytest.approx(rows.latency, rel=1e-8)
    assert not saturated.any()


def test_eq4_recovers_latencies_of_its_fixed_point():
    """Latencies made by plain iteration of Eq 4, which converges far from saturation."""
    rows = grid(POINTS, share=2 / 16)
    steps = rows.output_length / rows.tokens_per_step
    latency = np.ones(len(rows))
    for _ in range(2000):
        batch = np.where(np.isnan(rows.users), rows.arrival_rate * latency, rows.users)
        phi = 1 - (1 - 2 / 16) ** (batch * (rows.draft_length + 1))
        one = 0.05 + steps * (0.006 + phi * 0.004 + rows.draft_length * 0.001)
        two = 0.004 + steps * (0.0003 + phi * 0.0005 + rows.draft_length * 0.0001)
        latency = one + batch * two
    rows = baselines.Rows(**{**vars(rows), "latency": latency})
    assert baselines.fit_form("Eq 4", rows).predict(rows)[0] == pytest.approx(latency, rel=1e-3)


def test_eq4_without_coverage_is_eq3():
    """With all experts active the two forms agree, save below one token a step."""
    rows = grid(POINTS, share=1.0)
    eq3, eq4 = baselines.eq3(rows, rows), baselines.eq4(rows, rows)
    c3 = np.asarray([0.05, 0.010, 0.003, 0.01, 0.0012, 0.0004])
    c4 = np.asarray([0.05, 0.004, 0.006, 0.003, 0.01, 0.0008, 0.0004, 0.0004])
    assert baselines.latencies(eq4, c4, rows)[0] == pytest.approx(baselines.latencies(eq3, c3, rows)[0], rel=1e-4)


def test_overload_is_told_and_finite():
    rows = grid([(0, 1.0, 64, 64)])
    fitted = baselines.Fitted("Eq 1", np.asarray([1.0, 0.4]), with_latency(rows, 1.0, 0.1))
    latency, saturated = fitted.predict(rows)
    assert saturated.tolist() == [False, False, False, True, False, False, False]  # 3 req/s * 0.4 s > 1
    assert np.isfinite(latency).all()
    assert latency[2] == pytest.approx(1.0 / (1 - 2.0 * 0.4))


def test_eq1_says_nothing_about_configurations_it_has_not_seen_at_two_loads():
    rows = with_latency(grid(POINTS), 1.0, 0.1)
    seen = rows.take((rows.draft_length == 0) | ((rows.draft_length == 2) & (rows.arrival_rate == 1.0)))
    latency, _ = baselines.fit_form("Eq 1", seen).predict(rows)
    assert np.isfinite(latency).tolist() == (rows.draft_length == 0).tolist()


def test_table_of_errors():
    entries = [
        {
            "split": "in sample",
            "rows": 4,
            "scores": {"Eq 1": {"rows": 2, "mape": 0.01}, "Eq 3": {"rows": 4, "mape": 0.0312}, "affine": None},
        },
        {"split": "rate", "rows": 4, "scores": {"Eq 3": {"rows": 4, "mape": 0.2}, "affine": {"rows": 4, "mape": 0.1}}},
    ]
    assert tables.error_table(entries, ["Eq 1", "Eq 3", "affine"]) == [
        "| split | rows | Eq 1 | Eq 3 | affine |",
        "|---|---|---|---|---|",
        "| in sample | 4 | 1.0 (2) | **3.1** | – |",
        "| rate | 4 | – | 20.0 | **10.0** |",
    ]


def test_pooled_errors_are_weighted_by_rows():
    folds = [{"rows": 0}, {"rows": 1, "mape": 0.1, "max_ape": 0.1}, {"rows": 3, "mape": 0.3, "max_ape": 0.5}]
    assert tables.pool(folds) == pytest.approx({"rows": 4, "mape": 0.25, "max_ape": 0.5})
    assert tables.pool([{"rows": 0}]) is None


def test_rewriting_keeps_the_text_around_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.rewrite(readme, ["new"])
    tables.rewrite(readme, ["newer"])
    assert readme.read_text() == f"before\n{tables.BEGIN}\n\nnewer\n\n{tables.END}\nafter\n"


@pytest.mark.slow
def test_quick_run_writes_results_and_readme(tmp_path):
    """The quick part in a process of its own, as a user starts it."""
    import subprocess

    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    results = json.loads((tmp_path / "results.json").read_text())
    in_sample = results["studies"]["vllm_cpu_quiet"][0]
    assert in_sample["rows"] == 27
    assert 0 < in_sample["scores"]["affine"]["mape"] < 0.1
    assert "| in sample | 27 |" in (tmp_path / "README.md").read_text()
