"""data/README.md against the files it describes: checksums, rows, columns, and the noise floor it states."""

import csv
import hashlib
import re
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
README = (DATA / "README.md").read_text(encoding="utf-8")
# | `file.csv` | rows | sha256 |
FILES = {
    name: (int(rows), digest)
    for name, rows, digest in re.findall(r"^\| `([\w.]+)` \| (\d+) \| `([0-9a-f]{64})` \|$", README, re.MULTILINE)
}


def read(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_file_is_described():
    assert set(FILES) == {path.name for path in DATA.iterdir()} - {"README.md"}


@pytest.mark.parametrize("name", FILES)
def test_checksum_and_rows(name):
    rows, digest = FILES[name]
    assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest
    assert len(read(name)) == rows


@pytest.mark.parametrize("name", FILES)
def test_every_column_is_described(name):
    described = set(re.findall(r"`(\w+)`", README))
    for stem in re.findall(r"`(\w+)_\*`", README):
        described |= {f"{stem}_{statistic}" for statistic in ("mean", "p50", "p90", "p99")}
    assert set(read(name)[0]) <= described


@pytest.mark.parametrize("name", FILES)
def test_what_the_readme_says_of_the_rows(name):
    for row in read(name):
        assert bool(row["arrival_rate"]) != bool(row["concurrency"]), row["run"]
        assert row["failed"] == "0", row["run"]
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
