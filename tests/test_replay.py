"""`diffspec simulate --schedule` and `--arrivals`: against the same runs told otherwise, by hand, and on bad files."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import numpy as np
import pytest
from test_cli_main import run, toy_deployment, toy_model

from diffspec.analysis.simulated import engine_of, request_table, simulate_answer
from diffspec.optimizing.schedule_files import parse_schedule
from diffspec.results import InputError, TraceError
from diffspec.simulating import simulate
from diffspec.traces.arrival_list import read_arrivals
from diffspec.workload import Workload

DATA = Path(__file__).resolve().parents[1] / "data"
LENGTHS = ("--prompt-length", "64", "--output-length", "64")
FEW = ("--requests", "150", "--replications", "2")
TIERS = [[1, 4, 4], [5, 12, 2], [13, 64, 0]]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return toy_model(tmp_path_factory.mktemp("toy") / "model.json")


def answer_of(*arguments, code: int = 0) -> dict:
    ran = run("simulate", *arguments, "--json")
    assert ran.code == code, ran.err
    return json.loads(ran.out)


def written(path: Path, data) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def arrivals_file(path: Path, times, **columns) -> Path:
    names = ["arrival_time", *columns]
    rows = zip(times, *columns.values(), strict=True)
    lines = [",".join(names), *(",".join(str(cell) for cell in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# --- schedules --------------------------------------------------------------------------------------------------------


def test_one_tier_is_one_draft_length(model, tmp_path):
    """The same seed, the same engine: every number agrees, and both answers have the documented keys and no more."""
    file = written(tmp_path / "one.json", {"schedule": [[1, 64, 2]]})
    same = answer_of(model, *LENGTHS, *FEW, "--arrival-rate", "5", "--draft-length", "2")
    told = answer_of(model, *LENGTHS, *FEW, "--arrival-rate", "5", "--schedule", file)
    assert told["metrics"] == same["metrics"] and told["throughput"] == same["throughput"]
    assert told["draft_length"] is None and same["draft_length"] == 2.0
    assert set(told) - set(same) == {"schedule"} and set(same) <= set(told)
    expected = {"file": str(file), "ranges": [[1, 64, 2]], "bands": [], "context_length": None, "switches": 0.0}
    assert told["schedule"] == expected
    for metric in ("ttft", "e2e", "tpot"):  # the chain against the mean batch
        assert told["predicted"][metric]["mean"] == pytest.approx(same["predicted"][metric]["mean"], rel=0.05)


def test_a_schedule_lies_between_its_draft_lengths_and_near_its_prediction(model, tmp_path):
    """Three tiers inside the batch's fluctuation: the engine switches, drafts as the tier of the batch says, and the
    chain of birth and death says the same mean."""
    file = written(tmp_path / "s.json", {"outcome": "successful", "schedule": TIERS})
    table = tmp_path / "requests.csv"
    load = ("--arrival-rate", "6", "--requests", "1200", "--replications", "4")
    told = answer_of(model, *LENGTHS, *load, "--schedule", file, "--table", table)
    assert told["schedule"]["ranges"] == TIERS and told["schedule"]["switches"] > 50
    assert told["metrics"]["e2e"]["mean"]["value"] == pytest.approx(told["predicted"]["e2e"]["mean"], rel=0.06)
    with table.open(newline="", encoding="utf-8") as file:
        drafted = [int(row["drafted_tokens"]) / int(row["steps"]) for row in csv.DictReader(file)]
    assert max(drafted) <= 4.0 and 0.0 < np.mean(drafted) < 4.0 and min(drafted) < 2.0


def test_policy_writes_what_simulate_reads(model, tmp_path):
    """What it writes with --out, with its bands only where they are asked for: fewer changes then."""
    asked = (*LENGTHS, "--acceptance-rate", "0.5")
    file = tmp_path / "policy.json"
    tiers = ("--max-draft-length", "4", "--hysteresis", "3", "--min-gain", "0.01")
    ran = run("policy", model, "--arrival-rate", "2,8", *asked, *tiers, "--out", file)
    assert ran.code == 0, ran.err
    (context,) = json.loads(file.read_text(encoding="utf-8"))["contexts"]
    assert len(context["schedule"]) > 1, "the test needs tiers"
    load = ("--arrival-rate", "8", *asked, "--requests", "600", "--replications", "2", "--schedule", file)
    plain, banded = answer_of(model, *load), answer_of(model, *load, "--bands")
    assert plain["schedule"]["ranges"] == banded["schedule"]["ranges"] == context["schedule"]
    assert plain["schedule"]["bands"] == []
    assert banded["schedule"]["bands"] == [[band["down"], band["up"]] for band in context["bands"]]
    assert banded["schedule"]["switches"] < 0.8 * plain["schedule"]["switches"]
    shown = run("simulate", model, *load, "--bands")
    assert "changes in a replication" in shown.out and "on above" in shown.out
    ran = run("simulate", model, *load[:-1], written(tmp_path / "bare.json", {"schedule": TIERS}), "--bands")
    assert ran.code == 2 and "has none" in ran.err


def test_no_drafts_at_any_batch_is_no_speculation(model, tmp_path):
    file = written(tmp_path / "off.json", {"schedule": [[1, 64, 0]]})
    same = answer_of(model, *LENGTHS, *FEW, "--arrival-rate", "5", "--draft-length", "0")
    told = answer_of(model, *LENGTHS, *FEW, "--arrival-rate", "5", "--schedule", file)
    assert told["metrics"] == same["metrics"] and told["predicted"] == same["predicted"]


def test_files_of_schedules_are_read_by_their_rules():
    """vLLM's gaps inherit and its lengths are clamped; of several context lengths the nearest in logarithms holds."""
    config = {"num_speculative_tokens": 3, "num_speculative_tokens_per_batch_size": [[1, 2, 5], [4, 5, 0]]}
    assert parse_schedule(json.dumps(config), "v.json", 1.0).ranges == [[1, 3, 3], [4, 5, 0]]
    assert parse_schedule(json.dumps({"num_speculative_tokens": 2}), "v.json", 1.0).ranges == [[1, 1, 2]]
    contexts = [
        {"context_length": length, "schedule": [[1, 8, k], [9, 64, 0]], "bands": [{"down": 7, "up": 11}]}
        for length, k in ((100.0, 1), (1000.0, 2), (10_000.0, 3))
    ]
    text = json.dumps({"contexts": contexts})
    for cached, context, k in ((10.0, 100.0, 1), (310.0, 100.0, 1), (320.0, 1000.0, 2), (1e6, 10_000.0, 3)):
        found = parse_schedule(text, "p.json", cached)
        assert (found.context_length, found.longest, found.bands) == (context, k, ((7, 11),))


def test_a_fitted_share_of_prompts_is_played():
    """Where others pay for 0.4 of a prompt, the simulated engine is busy with it for so long, and the model agrees;
    with all of it the engine is another one."""
    toy = toy_deployment()
    where = lambda m: (m.prefill_interference, m.step_time.prefill_token)  # noqa: E731
    toy = replace(toy, serving=eqx.tree_at(where, toy.serving, (np.asarray(0.4), np.asarray(1e-3))))
    load, config = Workload(64.0, 64.0, arrival_rate=4.0), toy.configuration(2.0)
    answer, _ = simulate_answer(toy, load, config, n_requests=500, replications=4)
    told, model = answer["metrics"]["e2e"]["mean"], answer["predicted"]["e2e"]["mean"]
    assert abs(told["value"] - model) < 0.02 * model + told["half_width"] and told["half_width"] < 0.02 * model
    unlike = simulate(toy.serving.step_time, load, engine_of(toy, load, config), n_requests=500, replications=4)
    assert unlike.mean("e2e").value > 1.2 * model


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2", "not JSON"),
        ("[1, 2]", "got list; allowed"),
        ('{"rows": 3}', "got keys rows; allowed"),
        ('{"schedule": null, "outcome": "infeasible"}', "no schedule, its outcome is 'infeasible'"),
        ('{"contexts": [], "outcome": "does_not_fit"}', "no schedule, its outcome is 'does_not_fit'"),
        ('{"contexts": [{"bands": []}]}', "damaged"),
        ('{"contexts": 3}', "damaged"),
        ('{"schedule": [["a", 2, 3]]}', "damaged"),
        ('{"schedule": [[1, 8, 2.7]]}', "whole numbers"),
        ('{"schedule": [[1, 8, true]]}', "whole numbers"),
        ('{"num_speculative_tokens": 0}', "num_speculative_tokens"),
    ],
)
def test_other_files_are_refused_by_name(text, told):
    with pytest.raises(InputError, match=told):
        parse_schedule(text, "file.json", 1.0)


# --- arrivals ---------------------------------------------------------------------------------------------------------


def test_a_simulation_replayed_is_itself(model, tmp_path):
    """The requests of one finite run, written and read back: the same arrivals, lengths and seed give the same run."""
    table = tmp_path / "requests.csv"
    once = ("--requests", "300", "--replications", "1", "--draft-length", "2")
    toy, load = toy_deployment(), Workload(64.0, 64.0, arrival_rate=5.0, output_scv=0.5)
    engine = engine_of(toy, load, toy.configuration(2.0))
    drawn = simulate(
        toy.serving.step_time, load, engine, n_requests=300, replications=1, output_law="lognormal", finite=True
    )
    table.write_text(request_table(drawn), encoding="utf-8")
    again = answer_of(model, *once, "--arrivals", table)
    for metric in ("ttft", "tpot", "e2e", "waiting"):
        for name, entry in drawn.summary()["metrics"][metric].items():
            assert again["metrics"][metric][name]["value"] == pytest.approx(entry["value"], rel=1e-9), (metric, name)
    told = again["arrivals"]
    assert (told["format"], told["run"], told["n_requests"], told["time_scale"]) == ("request table", "0", 300, 1.0)
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lengths = np.asarray([float(row["output_tokens"]) for row in rows])
    assert told["output_length"] == pytest.approx(lengths.mean())
    assert told["output_scv"] == pytest.approx(lengths.var() / lengths.mean() ** 2)
    shown = run("simulate", model, *once, "--arrivals", table)
    assert "300 arrivals in" in shown.out and "steady load like it" in shown.out


def test_a_lone_request_takes_its_steps(model, tmp_path):
    """Requests far apart meet nobody: each lasts as long as alone, whatever the file's units and start of time."""
    spaced = 1000.0 + 100.0 * np.arange(8)
    table = arrivals_file(tmp_path / "a.csv", spaced, prompt_tokens=[64] * 8, output_tokens=[1, 2, 3, 4] * 2)
    alone = answer_of(model, "--draft-length", "0", "--arrivals", table, "--table", tmp_path / "out.csv")
    assert alone["requests"] == 64 and alone["metrics"]["waiting"]["mean"]["value"] == 0.0
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    latency: dict[int, set[float]] = {}
    for row in rows:
        taken = round(float(row["completion_time"]) - float(row["arrival_time"]), 9)
        latency.setdefault(int(row["output_tokens"]), set()).add(taken)
    assert sorted(latency) == [1, 2, 3, 4] and all(len(times) == 1 for times in latency.values())
    first, second, third, last = (times.pop() for _, times in sorted(latency.items()))
    assert third - second == pytest.approx(last - third, rel=1e-2) and first < second < third
    micro = arrivals_file(tmp_path / "b.csv", spaced * 1e6, input_tokens=[64] * 8, output_tokens=[1, 2, 3, 4] * 2)
    micro.write_text(micro.read_text(encoding="utf-8").replace("arrival_time", "arrival_time_us"), encoding="utf-8")
    other = answer_of(model, "--draft-length", "0", "--arrivals", micro)
    assert other["arrivals"]["format"] == "BLIS TraceV2"
    assert other["metrics"]["e2e"]["mean"]["value"] == pytest.approx(alone["metrics"]["e2e"]["mean"]["value"], rel=1e-9)


def test_rates_and_lengths_can_be_asked_for(model, tmp_path):
    """--arrival-rate rescales the times; lengths asked for stand in for the file's, the measured ones for none."""
    times = np.cumsum(np.random.default_rng(0).exponential(0.5, 200))
    table = arrivals_file(tmp_path / "a.csv", times, prompt_tokens=[100] * 200)
    once = ("--draft-length", "2", "--replications", "1", "--arrivals", table)
    answer = answer_of(model, *once)
    told = answer["arrivals"]
    assert "schedule" not in answer and answer["draft_length"] == 2.0 and answer["seed"] == 0
    assert told["arrival_rate"] == pytest.approx(199 / (times[-1] - times[0])) and told["output_length"] is None
    faster = answer_of(model, *once, "--arrival-rate", "6", "--requests", "100", "--table", tmp_path / "out.csv")
    rate = 99 / (times[99] - times[0])
    scaled = faster["arrivals"]
    assert (scaled["arrival_rate"], scaled["n_requests"], faster["requests"]) == (6.0, 100, 100)
    assert scaled["time_scale"] == pytest.approx(rate / 6.0) and scaled["duration"] == pytest.approx(99 / 6.0)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["arrival_time"]) for row in rows] == pytest.approx((times[:100] - times[0]) * rate / 6.0)
    assert {row["prompt_tokens"] for row in rows} == {"100"} and {row["output_tokens"] for row in rows} == {"64"}
    ran = run("simulate", model, *once, "--prompt-length", "32", "--output-length", "8", "--table", tmp_path / "c.csv")
    assert ran.code == 0 and "as in every measured row" not in ran.err
    assert ",32,8," in (tmp_path / "c.csv").read_text(encoding="utf-8").splitlines()[1]


def test_too_many_arrivals_are_said(model, tmp_path):
    """A burst in the middle is no saturation; a load that never ends is, with exit code 1."""
    times = np.concatenate([np.linspace(0, 40, 80), np.full(200, 40.0), np.linspace(40.5, 200, 300)])
    burst = arrivals_file(tmp_path / "burst.csv", times)
    load = ("--draft-length", "0", "--replications", "1", *LENGTHS)
    assert answer_of(model, *load, "--arrivals", burst)["outcome"] == "successful"
    ran = run("simulate", model, *load, "--arrivals", burst, "--arrival-rate", "500")
    assert ran.code == 1 and "saturated" in ran.out


def test_one_run_of_a_measured_table_is_replayed(tmp_path):
    """The requests that the table marks as measured count, and only they; which run is meant must be said."""
    path = DATA / "vllm_h200_requests.parquet"
    with pytest.raises(InputError, match=r"12 runs; allowed: one of .*, \.\.\."):
        read_arrivals(path)
    with pytest.raises(InputError, match="got 'no'"):
        read_arrivals(path, "no")
    import pyarrow.parquet

    rows = [row for row in pyarrow.parquet.read_table(path).to_pylist() if row["run"] is not None]
    name = rows[0]["run"]
    rows = sorted((row for row in rows if row["run"] == name), key=lambda row: row["arrival_time"])
    found = read_arrivals(path, name)
    assert len(found) == len(rows) and found.run == name and found.arrival_time[0] == 0.0
    expected = [row["arrival_time"] - rows[0]["arrival_time"] for row in rows]
    assert found.arrival_time == pytest.approx(np.asarray(expected), abs=1e-6)
    marked = [bool(row["measured"]) for row in rows]
    assert 0 < sum(marked) < len(rows), "the test needs a warm-up"
    first, last = marked.index(True), len(marked) - marked[::-1].index(True)
    assert (found.first_measured, found.end_measured) == (first, last)
    short = found.first(first + 5)
    assert (len(short), short.first_measured, short.end_measured) == (first + 5, first, first + 5)
    assert (found.first(first).first_measured, len(found.first(10**6))) == (0, len(rows))


def test_bad_questions_are_refused(model, tmp_path):
    schedule = written(tmp_path / "s.json", {"schedule": TIERS})
    table = arrivals_file(tmp_path / "a.csv", [0.0, 1.0, 2.0], output_tokens=[4, 5, 6])
    lone = arrivals_file(tmp_path / "lone.csv", [3.0, 3.0])
    gaps = written(tmp_path / "gaps.json", {"schedule": [[1, 4, 2], [6, 64, 0]]})
    rate, k = ("--arrival-rate", "3", *LENGTHS), ("--draft-length", "2")
    for arguments, said in (
        (rate, "exactly one"),
        ((*rate, *k, "--schedule", schedule), "both"),
        ((*rate, *k, "--bands"), "--bands goes with --schedule"),
        ((*rate, *k, "--arrivals-run", "x"), "--arrivals-run goes with --arrivals"),
        ((*rate, "--schedule", schedule, "--tokens-per-step", "2"), "compares several"),
        ((*rate, "--schedule", tmp_path / "none.json"), "none.json: cannot be read"),
        ((*rate, "--schedule", gaps), "without gaps"),
        ((*k, "--concurrency", "3", "--arrivals", table), "--concurrency"),
        ((*k, "--finite", "--arrivals", table), "--finite"),
        ((*k, "--arrivals", table, "--output-law", "geometric"), "tells the output lengths"),
        ((*k, "--arrivals", table, "--output-scv", "1"), "tells the output lengths"),
        ((*k, "--arrivals", lone), "at least two"),
        ((*k, "--arrivals", table, "--arrivals-run", "x"), "without runs"),
        ((*k, "--arrivals", table, "--arrival-rate", "1,2"), "one number"),
        ((*k, "--arrivals", schedule), "no format that is read"),
        ((*k, "--arrivals", tmp_path / "none.csv"), "none.csv"),
    ):
        ran = run("simulate", model, *arguments, "--requests", "20")
        assert ran.code == 2 and said in ran.err, (arguments, ran.err)
    broken = arrivals_file(tmp_path / "broken.csv", [0.0, "soon", 2.0])
    with pytest.raises(TraceError, match="soon"):
        read_arrivals(broken)


def test_lengths_that_are_missing_are_filled_and_said(model, tmp_path):
    times = np.arange(6.0) * 50
    table = arrivals_file(tmp_path / "a.csv", times, prompt_tokens=[64] * 6, output_tokens=[10, 20, "", 30, "", 20])
    ran = run("simulate", model, "--draft-length", "0", "--arrivals", table, "--table", tmp_path / "out.csv")
    assert ran.code == 0 and "2 of 6 requests have no output_tokens: the mean of the others" in ran.err
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        lengths = [int(row["output_tokens"]) for row in csv.DictReader(file) if row["run"] == "0"]
    assert lengths == [10, 20, 20, 30, 20, 20]
    assert math.isclose(read_arrivals(table).summary()["output_length"], 20.0)
