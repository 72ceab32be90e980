"""data/README.md against the files it describes: checksums, rows, columns, and the noise floor it states."""

import csv
import hashlib
import re
from pathlib import Path

import pyarrow.parquet
import pytest

from diffspec.traces import read_trace, set_aside_reasons

DATA = Path(__file__).resolve().parents[1] / "data"
README = (DATA / "README.md").read_text(encoding="utf-8")
# | `file.csv` | rows | sha256 |
FILES = {
    name: (int(rows), digest)
    for name, rows, digest in re.findall(r"^\| `([\w.]+)` \| (\d+) \| `([0-9a-f]{64})` \|$", README, re.MULTILINE)
}


TABLES = [name for name in FILES if name.endswith(".csv")]
MEASURED = "vllm_cpu_steady.csv"
WINDOWED = (MEASURED, "vllm_h200.csv", "instrument_h200.csv")


def read(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_file_is_described():
    assert set(FILES) == {path.name for path in DATA.iterdir()} - {"README.md", "configs"}


@pytest.mark.parametrize("name", FILES)
def test_checksum_and_rows(name):
    rows, digest = FILES[name]
    assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest
    assert rows == (len(read(name)) if name in TABLES else pyarrow.parquet.read_metadata(DATA / name).num_rows)


@pytest.mark.parametrize("name", TABLES)
def test_every_column_is_described(name):
    described = set(re.findall(r"`(\w+)`", README))
    for stem in re.findall(r"`(\w+)_\*`", README):
        described |= {f"{stem}_{statistic}" for statistic in ("mean", "p50", "p90", "p95", "p99")}
    assert set(read(name)[0]) <= described


@pytest.mark.parametrize("name", TABLES)
def test_what_the_readme_says_of_the_rows(name):
    for row in read(name):
        assert bool(row["arrival_rate"]) != bool(row.get("concurrency")), row["run"]
        assert row["failed"] == "0", row["run"]
        if name in WINDOWED:
            continue
        # The batch size is derived, so Little's law holds here by construction and checks nothing.
        derived = float(row["throughput"]) * float(row["e2e_mean"])
        assert float(row["effective_batch_size"]) == pytest.approx(derived, rel=2e-6), row["run"]


def test_overloaded_rows():
    def overloaded(name: str) -> list[str]:
        return [row["run"] for row in read(name) if float(row["throughput"]) < 0.9 * float(row["arrival_rate"] or 0)]

    assert overloaded("vllm_cpu_quiet.csv") == []
    load = "__p64_o64_r"
    expected = [f"k0{load}5", f"k0_rep{load}5", f"k2_a60{load}5", f"k6_a60{load}4", f"k6_a60{load}5"]
    assert overloaded("vllm_cpu_noisy.csv") == expected


def test_spread_of_repeated_cells():
    e2e = {row["run"]: float(row["e2e_mean"]) for row in read("vllm_cpu_noisy.csv")}
    measured = {}
    for run, second in e2e.items():
        if run.startswith("k0_rep__"):
            first = e2e[run.replace("k0_rep__", "k0__")]
            measured[run.removeprefix("k0_rep__p64_o64_")] = (
                f"{first:.3f}",
                f"{second:.3f}",
                f"{second / first - 1:+.1%}",
            )
    stated = re.findall(r"^\| `([cr][\d.]+)` \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+) % \|$", README, re.MULTILINE)
    assert {cell: (first, second, f"{change}%") for cell, first, second, change in stated} == measured
    assert len(measured) == 7


def test_the_steady_table_obeys_littles_law():
    """The mean number in the system is integrated from the events, so it can contradict throughput and latency."""
    rows = [row for row in read(MEASURED) if float(row["n_requests"]) >= 30]
    ratio = [float(row["effective_batch_size"]) / (float(row["throughput"]) * float(row["e2e_mean"])) for row in rows]
    assert sum(0.85 < value < 1.15 for value in ratio) >= 0.9 * len(rows)
    closed = [row for row in read(MEASURED) if row["concurrency"]]
    for row in closed:
        # a place is empty while the client, which shares a core with the engine, sends its next request
        assert 0.96 <= float(row["effective_batch_size"]) / float(row["concurrency"]) <= 1.0001, row["run"]


@pytest.mark.parametrize("name", WINDOWED)
def test_the_requests_are_those_of_the_table(name):
    table = read_trace(DATA / name).frame.set_index("run")
    again = read_trace(DATA / name.replace(".csv", "_requests.parquet")).frame.set_index("run")
    assert set(again.index) == set(table.index)
    again = again.loc[table.index]
    for name in ("ttft_mean", "tpot_mean", "e2e_mean", "e2e_p95"):
        # times are recorded to a microsecond
        assert again[name].to_numpy() == pytest.approx(table[name].to_numpy(), abs=2e-6), name
    assert again["n_requests"].tolist() == table["n_requests"].tolist()


def test_the_imposed_acceptance_was_met():
    """Conditional acceptance per position against what was imposed, to four standard errors of independent steps."""
    imposed = {"synthetic": (0.95, 0.85, 0.75, 0.65, 0.55, 0.45), "low": (0.6,) * 6}
    checked = 0
    for row in read(MEASURED):
        if row["rejection"] != "synthetic":
            continue
        wanted = imposed["low" if row["run"].startswith("k4_low") else "synthetic"]
        steps = float(row["n_requests"]) * (float(row["output_length"]) - 1) / float(row["tokens_per_step"])
        for measured, true in zip(map(float, row["position_acceptance"].split(";")), wanted, strict=False):
            assert abs(measured - true) < 4 * (true * (1 - true) / steps) ** 0.5 + 1e-9, row["run"]
            steps *= true
            checked += 1
    assert checked > 100


def aside(name: str) -> set[str]:
    frame = read_trace(DATA / name).frame
    return {run for run, reason in zip(frame["run"], set_aside_reasons(frame), strict=True) if reason is not None}


@pytest.mark.parametrize(
    ("name", "words"), [(MEASURED, "the steady table"), ("instrument_h200.csv", "the serving loop's table")]
)
def test_rows_that_are_set_aside(name, words):
    stated = re.search(r"Set aside[^:]*: ([^.]*)\.", README[README.index(f"**Set aside in {words}") :])
    assert stated is not None
    assert aside(name) == set(re.findall(r"`([\w.]+)`", stated.group(1)))


def test_the_h200_tables_obey_littles_law_and_met_their_acceptance():
    """The integrated batch against throughput*e2e; acceptance to four standard errors of independent steps."""
    assert aside("vllm_h200.csv") == set()
    for name in ("vllm_h200.csv", "instrument_h200.csv"):
        for row in read(name):
            if row["run"] not in aside(name):
                derived = float(row["throughput"]) * float(row["e2e_mean"])
                assert float(row["effective_batch_size"]) == pytest.approx(derived, rel=0.2, abs=1.0), row["run"]
            if row["draft_length"] == "0":
                assert row["position_acceptance"] == ""
                continue
            steps = float(row["n_requests"]) * (float(row["output_length"]) - 1) / float(row["tokens_per_step"])
            wanted = int(re.findall(r"_a(\d+)_", row["run"])[0]) / 100
            for measured in map(float, row["position_acceptance"].split(";")):
                assert abs(measured - wanted) < 4 * (wanted * (1 - wanted) / steps) ** 0.5, row["run"]
                steps *= wanted


def test_spread_of_the_repeats_of_the_steady_table():
    """Largest spread over the mean, of three repeats of the closed loop of eight."""
    rows = {row["run"]: float(row["e2e_mean"]) for row in read(MEASURED)}
    for arm in ("k0", "k4"):
        values = [rows[f"{arm}__p64_o64_c8{suffix}"] for suffix in ("", "_rep2", "_rep3")]
        spread = (max(values) - min(values)) / (sum(values) / 3)
        assert f"| `{arm}` | {' | '.join(f'{value:.3f}' for value in values)} | {spread:.1%} |" in README
