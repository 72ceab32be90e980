"""Experiment 09, the benchmark suite: what is stored is whole, its tables are those of its numbers, and its clocks and
peers count what they say."""

import importlib
import json
import math
import sys

import numpy as np
import pytest
from helpers import EXPERIMENTS

FOLDER = EXPERIMENTS / "09_speed"


@pytest.fixture(scope="module")
def module():
    """A script of the folder, as its neighbours import it."""
    sys.path[:0] = [str(FOLDER), str(FOLDER / "peers")]
    yield importlib.import_module
    for path in (FOLDER, FOLDER / "peers"):
        sys.path.remove(str(path))


@pytest.fixture(scope="module")
def suite():
    def refuse(name):
        raise AssertionError(f"{name} in suite.json")

    return json.loads((FOLDER / "suite.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_every_part_is_stored(module, suite):
    run = module("run")
    assert list(suite["parts"]) == list(run.PARTS) and not suite["quick"]
    for name, part in suite["parts"].items():
        assert part["seconds"] > 0 and len(part["load_average"]) == 2, name
        assert len(part) > 4, f"{name} has its origin alone"


def test_the_tables_are_those_of_the_numbers(module, suite):
    assert (FOLDER / "suite.md").read_text(encoding="utf-8") == module("suite_report").report(suite)


def test_times_are_told_apart_and_add_up(suite):
    rows = [row for name in ("configuration", "fit", "joint", "policy", "log") for row in suite["parts"][name]["rows"]]
    for row in rows:
        assert 0 < row["min_s"] <= row["median_s"] and row["repeats"] >= 1 and row["compile_s"] >= 0
        if "programs" in row:
            assert row["compile_s"] < row["first_call_s"] and row["programs_later"] == 0, (
                "compiled again on later calls"
            )
    batches = {(row["of"], row["batch"]) for row in suite["parts"]["configuration"]["rows"]}
    assert {("equilibrium", 10**n) for n in (0, 2, 4, 6, 7)} <= batches
    assert {("prediction", 10**n) for n in (0, 2, 4, 6)} <= batches
    for row in suite["parts"]["log"]["rows"]:
        assert abs(row["e2e_error"]) < 2e-3 and abs(row["batch_error"]) < 5e-3, "means of synthetic requests are known"


def test_exponents_have_errors_and_follow_from_their_points(suite):
    curves = suite["parts"]["scaling"]["curves"]
    units = {curve["unit"] for curve in curves}
    assert units == {"rows", "configurations", "deployments", "variables", "loads"}
    for curve in curves:
        upper = curve["points"][-curve["points_fitted"] :]
        x, y = (np.log([point[name] for point in upper]) for name in ("size", "min_s"))
        (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
        assert curve["exponent"] == pytest.approx(slope, rel=1e-6)
        assert curve["standard_error"] == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-6)
        assert curve["at_most_linear"] in ("yes", "no", "undecided")


def test_a_fitted_exponent_is_the_planted_one(module):
    """Powers of 0.5, 1 and 2, scattered by 1 %; a constant below is left out by the upper points."""
    random, sizes = np.random.default_rng(0), np.asarray([1, 3, 10, 30, 100, 300])
    for power, linear in ((0.5, "yes"), (1.0, "yes"), (2.0, "no")):
        seconds = sizes**power * np.exp(0.01 * random.standard_normal(6)) + (sizes < 10)
        found = module("measure").exponent(sizes, seconds, 4)
        assert abs(found["exponent"] - power) < 0.016, "four standard deviations of the planted scatter"
        assert found["at_most_linear"] == linear
    noisy = module("measure").exponent(sizes, sizes * np.exp([0, 0, 0.5, -0.5, 0.5, -0.5]), 4)
    assert noisy["at_most_linear"] == "undecided"


def test_imports_are_added_by_package(module):
    text = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       200 |        200 |     numpy.linalg\n"
        "import time:      1000 |       1200 |   numpy\n"
        "a warning\n"
        "import time:        50 |         50 | json.decoder\n"
        "import time:        25 |       1275 | _io\n"
    )
    found = module("commands").profile(text)
    assert found == pytest.approx({"numpy": 1.2e-3, "Python's own": 75e-6})


def test_commands_of_the_suite_are_all_there_are(suite):
    from typer.main import get_command

    from diffspec.cli.app import app

    rows = suite["parts"]["commands"]["rows"]
    told = {row["command"] for row in rows} | {"fit", "demo"}  # those of command_times.json
    assert told == {"--help", *get_command(app).commands}
    for row in rows:
        assert row["warm_s"] > 0 and row["cold_s"] > 0 and 0 < row["imports_share"] <= 1
        assert sum(row["top_imports_s"].values()) <= row["imports_s"] * (1 + 1e-9) < row["warm_s"]


def test_every_peer_has_a_row(module, suite):
    runs, parts = module("peer_runs"), suite["parts"]
    assert list(parts["peers_latency"]["peers"]) == list(runs.LATENCY)
    assert list(parts["peers_queues"]["peers"]) == list(runs.QUEUES)
    for told in (*parts["peers_latency"]["peers"].values(), *parts["peers_queues"]["peers"].values()):
        assert told.get("error") or told["version"], "neither an answer nor a reason"


def test_a_peer_that_does_not_answer_says_why(module):
    runs = module("peer_runs")
    told = runs.answer(runs.Peer("no_such_peer.py"), {"python": sys.executable})
    assert "no_such_peer.py" in told["error"]
    assert runs.answer(runs.Peer("x.py"), {"error": "not installed: no"}) == {"error": "not installed: no"}


def test_the_same_question_was_asked(suite):
    """At every peak reached, diffspec's decode step is that of a plain roofline, operator by operator, to 2 %: it has
    no rooflines of single operators, and a smooth corner."""
    peers = suite["parts"]["peers_latency"]["peers"]
    plain = next(told for name, told in peers.items() if name.startswith("roofline"))
    assert peers["diffspec"]["decode_s"] == pytest.approx(plain["decode_s"], rel=0.02)


def test_simulators_agree(suite):
    """M/M/4 at load 0.9: the mean wait is Erlang's; one run of 20,000 customers is known to about a tenth."""
    parts = suite["parts"]
    load, servers, service = 0.9, 4, 0.51
    offered = load * servers
    busy = offered**servers / math.factorial(servers) / (1 - load)
    waits = busy / (sum(offered**n / math.factorial(n) for n in range(servers)) + busy)
    exact = waits * service / (servers * (1 - load))
    found = {"diffspec": parts["simulation"]} | parts["peers_queues"]["peers"]
    for name, told in found.items():
        if "error" not in told:
            assert told["mm4"]["mean"] == pytest.approx(exact, rel=0.15), name
    ours, simpy = parts["simulation"]["batch_server"], parts["peers_queues"]["peers"]["simpy"]
    if "error" not in simpy:
        assert simpy["batch_server"]["mean"] == pytest.approx(ours["mean"], rel=0.03)


def test_solvers_of_one_process_find_one_root(suite):
    told = suite["parts"]["peers_inprocess"]
    assert "error" not in told, told.get("error")
    own = told["equilibrium"]["solvers"]["diffspec"]
    assert own["unsuccessful"] == 0 and own["largest_error"] < 1e-10
    assert min(row["above_best"] for row in told["decision"]["solvers"].values()) == 0.0
