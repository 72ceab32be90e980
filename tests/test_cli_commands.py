"""Every command end to end: the JSON contract, the tables, exit codes, and what is written where."""

import json
import os
import re
from pathlib import Path

import pytest
from fake_server import FakeServer, running
from test_cli_main import TRACE, files_in, run, toy_deployment, toy_model

from diffspec.fitting.deployment import FittedModel
from diffspec.prediction import STAGES

LOAD = ("--arrival-rate", "3", "--prompt-length", "64", "--output-length", "64")
SATURATING = ("--arrival-rate", "500", *LOAD[2:])


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    monkeypatch.setenv("COLUMNS", "120")  # tables wrap in narrower terminals


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return toy_model(tmp_path_factory.mktemp("toy") / "model.json")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The one real fit of these tests: the packaged trace with one bad row added, two rows held out."""
    folder = tmp_path_factory.mktemp("fit")
    lines = TRACE.read_text(encoding="utf-8").splitlines()
    spoilt = lines[1].replace("64,64,12,0", "64,-64,12,0")
    assert spoilt != lines[1]
    (folder / "runs.csv").write_text("\n".join([*lines, spoilt]) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSPEC_CACHE_DIR", "")
        ran = run(
            *("fit", folder / "runs.csv", "--out", folder / "model.json", "--step-time", "affine", "--json"),
            *("--holdout", "arrival_rate==3", "--skip-bad-rows", "--observables", "ttft,itl"),
        )
    assert ran.code == 0, ran.err
    return folder, json.loads(ran.out), ran.err


def documented_keys(command: str) -> list[str]:
    """Top-level JSON keys that README promises for a command."""
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{command}` | `")]
    return re.findall(r"`(\w+)`", row.split("|")[2])


def answer_of(*arguments) -> dict:
    ran = run(*arguments, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


# --- fit ----------------------------------------------------------------------


def test_fit_writes_model_plot_and_bad_rows(fitted):
    folder, answer, err = fitted
    assert files_in(folder) == {"runs.csv", "model.json", "model.png", "model.json.bad_rows.csv"}
    assert {Path(name).name for name in answer["files"]} == files_in(folder) - {"runs.csv"}
    assert (folder / "model.png").read_bytes().startswith(b"\x89PNG")
    assert "got -64.0" in (folder / "model.json.bad_rows.csv").read_text(encoding="utf-8")
    assert "1 bad rows left out" in err
    model = FittedModel.from_json((folder / "model.json").read_text(encoding="utf-8"))
    assert model.rows_sha256 == answer["rows_sha256"]


def test_fit_tells_errors_parameters_and_units(fitted):
    _, answer, _ = fitted
    (deployment,) = answer["deployments"]
    assert answer["rows"] == 27
    assert deployment["quality"]["rows"] == 24
    assert deployment["quality"]["holdout"]["rows"] == 3
    assert deployment["quality"]["metrics"]["e2e_mean"]["mape"] < 0.2
    assert all(entry["unit"] for entry in deployment["parameters"].values())
    assert any("not predicted yet" in warning for warning in deployment["warnings"])


def test_evaluate_keeps_the_contract(fitted, tmp_path):
    folder, _, _ = fitted
    ran = run(
        *("evaluate", folder / "model.json", TRACE, "--where", "arrival_rate==3", "--json"),
        *("--plot", tmp_path / "e.png", "--out", tmp_path / "e.json"),
    )
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    contract = {"rows", "deployments", "metrics", "set_aside", "saturated_rows", "not_predicted"}
    assert contract <= set(answer)
    assert answer["rows"] == 3 and answer["deployments"] == ["vllm-cpu/llama-29m"]
    for metric in ("ttft_mean", "itl_mean", "tpot_mean", "e2e_mean"):
        assert {"rows", "mape", "max_ape", "r2", "bias"} <= set(answer["metrics"][metric])
    assert "throughput" not in answer["metrics"]
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8")) == answer
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_repeats_the_scores_of_the_fit(fitted):
    folder, answer, _ = fitted
    scored = answer_of("evaluate", folder / "model.json", TRACE, "--where", "arrival_rate==3")
    told = answer["deployments"][0]["quality"]["holdout"]["metrics"]
    for name, score in scored["metrics"].items():
        assert score["mape"] == pytest.approx(told[name]["mape"], rel=1e-9)


def test_evaluate_prints_a_table(fitted):
    folder, _, _ = fitted
    ran = run("evaluate", folder / "model.json", TRACE)
    assert ran.code == 0
    assert all(word in ran.out for word in ("ttft_mean", "mean error", "worst", "R2", " %", "not predicted yet"))


@pytest.fixture
def quick_fit(monkeypatch):
    """A fit without the fitting, to look at what happens around it."""

    def fit(trace, **options):
        name = trace.frame["deployment"].iloc[0]
        return FittedModel({name: toy_deployment(name)}, trace.digest(), {"diffspec": "test"})

    monkeypatch.setattr("diffspec.fitting.fit.fit", fit)


def test_fit_prints_tables_and_says_where_files_went(quick_fit, tmp_path):
    ran = run("fit", TRACE, "--out", tmp_path / "model.json", "--no-plot")
    assert ran.code == 0, ran.err
    assert files_in(tmp_path) == {"model.json"}
    assert f"wrote: {tmp_path / 'model.json'}" in ran.err
    assert all(word in ran.out for word in ("verify_base", "ms/tok", "affine step time", "9 fitted rows"))


def test_fit_leaves_no_half_written_file(quick_fit, tmp_path, monkeypatch):
    (tmp_path / "model.json").write_text("the old one")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffspec.report.files.os.replace", full)
    ran = run("fit", TRACE, "--out", tmp_path / "model.json")
    assert ran.code == 2 and "No space left" in ran.err and ran.out == ""
    assert files_in(tmp_path) == {"model.json"}
    assert (tmp_path / "model.json").read_text() == "the old one"


def test_files_get_the_usual_permissions(quick_fit, tmp_path):
    if os.name == "nt":
        pytest.skip("POSIX permissions")
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert run("fit", TRACE, "--out", tmp_path / "model.json", "--no-plot").code == 0
    assert (tmp_path / "model.json").stat().st_mode == plain.stat().st_mode


def test_each_deployment_gets_its_plot(monkeypatch, tmp_path):
    rows = TRACE.read_text(encoding="utf-8").splitlines()
    other = [line.replace("vllm-cpu/llama-29m", "other/one") for line in rows[1:]]
    (tmp_path / "two.csv").write_text("\n".join([*rows, *other]), encoding="utf-8")

    def fit(trace, **options):
        names = list(trace.frame["deployment"].unique())
        return FittedModel({name: toy_deployment(name) for name in names}, trace.digest(), {})

    monkeypatch.setattr("diffspec.fitting.fit.fit", fit)
    ran = run("fit", tmp_path / "two.csv", "--out", tmp_path / "m.json", "--json")
    assert ran.code == 0, ran.err
    assert files_in(tmp_path) == {"two.csv", "m.json", "m-1-vllm-cpu-llama-29m.png", "m-2-other-one.png"}


def test_the_template_passes_check(tmp_path):
    ran = run("fit", "--template")
    assert ran.code == 0 and ran.err == ""
    (tmp_path / "trace.csv").write_text(ran.out, encoding="utf-8")
    assert run("check", tmp_path / "trace.csv").code == 0


# --- check ----------------------------------------------------------------------


def test_check(tmp_path):
    answer = answer_of("check", TRACE, "--out", tmp_path / "check.json")
    assert {"rows", "sources", "warnings", "stationary", "set_aside", "findings", "deployments"} <= set(answer)
    assert answer["rows"] == 27 and len(answer["stationary"]) == 27
    assert json.loads((tmp_path / "check.json").read_text(encoding="utf-8")) == answer
    told = run("check", TRACE).out
    assert all(word in told for word in ("vllm-cpu/llama-29m", "little's law", "WARNING", "0.5 to 4 req/s"))
    assert len(told.splitlines()) <= 40  # one screen


def test_unknown_columns_are_named(tmp_path):
    lines = TRACE.read_text(encoding="utf-8").splitlines()
    text = "\n".join([lines[0] + ",colour", *(line + ",red" for line in lines[1:])])
    (tmp_path / "runs.csv").write_text(text, encoding="utf-8")
    ran = run("check", tmp_path / "runs.csv", "--json")
    assert ran.code == 0 and "'colour'" in ran.err
    assert any("'colour'" in warning for warning in json.loads(ran.out)["warnings"])


# --- predict ----------------------------------------------------------------------


def test_predict_keeps_the_contract(model):
    answer = answer_of("predict", model, *LOAD, "--draft-length", "2")
    numbers = {"ttft", "itl", "tpot", "e2e_latency", "throughput", "effective_batch_size", "utilization", "capacity"}
    assert numbers | {"outcome", "tokens_per_step", "speedup", "speedup_reason", "decomposition"} <= set(answer)
    assert answer["outcome"] == "successful"
    assert set(answer["decomposition"]) == set(STAGES)
    parts = [part for stage in answer["decomposition"].values() for part in stage.values()]
    assert all(set(stage) == {"load_independent", "load_dependent"} for stage in answer["decomposition"].values())
    assert sum(parts) == pytest.approx(answer["e2e_latency"], rel=1e-9)
    assert answer["throughput"] == pytest.approx(3.0)


def test_predict_in_words(model):
    ran = run("predict", model, *LOAD, "--draft-length", "2")
    assert ran.code == 0 and ran.err == ""
    assert all(word in ran.out for word in ("ms", "where the time goes", "speedup over no speculation", "req/s"))
    assert "no intervals: the model does not tell how sure it is" in ran.out and "inside what was measured" in ran.out
    plain = run("predict", model, *LOAD, "--draft-length", "0")
    assert "there is no speculation to compare" in " ".join(re.sub("[│┃]", " ", plain.out).split())


def test_predict_says_saturated_with_exit_code_1(model):
    ran = run("predict", model, "--arrival-rate", "1e4", *LOAD[2:], "--draft-length", "2", "--json")
    answer = json.loads(ran.out)
    assert ran.code == 1 and answer["outcome"] == "saturated"
    assert answer["e2e_latency"] is None
    assert answer["shortfall"] == pytest.approx(1e4 - answer["capacity"])
    assert "outside the measured range" in ran.err
    told = run("predict", model, "--arrival-rate", "1e4", *LOAD[2:], "--draft-length", "2")
    assert told.code == 1 and "saturated" in told.out and "more than the capacity" in told.out


def test_lengths_default_to_the_measured_ones(model, tmp_path):
    ran = run("predict", model, "--concurrency", "4", "--draft-length", "2", "--json")
    assert ran.code == 0 and "--prompt-length not given: 64 tok" in ran.err
    given = answer_of("predict", model, "--concurrency", "4", *LOAD[2:], "--draft-length", "2")
    assert json.loads(ran.out) == given
    several = toy_model(tmp_path / "m.json", toy_deployment(prompt_length=[64.0, 128.0]))
    ran = run("predict", several, "--concurrency", "4", "--draft-length", "2")
    assert ran.code == 2 and "--prompt-length is needed" in ran.err and "64 to 128" in ran.err


@pytest.mark.parametrize(
    ("option", "value", "tokens"),
    [
        ("--acceptance-rate", "0.5", 1.75),
        ("--position-acceptance", "0.5;0.5", 1.75),
        ("--position-acceptance", "0.5,0.5", 1.75),
        ("--tokens-per-step", "1.75", 1.75),
        ("--acceptance-rate", "1", 3.0),
        ("--acceptance-rate", "0", 1.0),
    ],
)
def test_acceptance_can_be_given(model, option, value, tokens):
    answer = answer_of("predict", model, *LOAD, "--draft-length", "2", option, value)
    assert answer["tokens_per_step"] == pytest.approx(tokens)


def test_server_options_matter(model):
    base = ("predict", model, "--concurrency", "16", *LOAD[2:], "--draft-length", "2")
    free, capped = answer_of(*base), answer_of(*base, "--max-batch-size", "4")
    assert capped["effective_batch_size"] == pytest.approx(4.0) and free["effective_batch_size"] == pytest.approx(16.0)
    assert answer_of(*base, "--drafter-params", "4e6")["itl"] > free["itl"]


def test_a_model_with_several_deployments_needs_a_name(tmp_path):
    model = toy_model(tmp_path / "m.json", toy_deployment("one"), toy_deployment("two"))
    ran = run("predict", model, *LOAD, "--draft-length", "2")
    assert ran.code == 2 and "'one', 'two'" in ran.err
    assert answer_of("predict", model, *LOAD, "--draft-length", "2", "--deployment", "two")["deployment"] == "two"


# --- optimize ----------------------------------------------------------------------


def test_optimize_keeps_the_contract(model, tmp_path):
    ran = run(
        *("optimize", model, "--arrival-rate", "1:3:2", *LOAD[2:], "--max-draft-length", "4", "--json"),
        *("--slo", "ttft_mean<0.5", "--objective", "e2e_mean", "--plot", tmp_path / "p.png"),
    )
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert {"outcome", "policy", "schedule", "flags", "optimality_gap"} <= set(answer)
    assert answer["outcome"] == "successful"
    keys = {"load_from", "load_to", "draft_length", "metrics", "speedup", "headroom"}
    assert all(keys <= set(entry) for entry in answer["policy"])
    assert (answer["policy"][0]["load_from"], answer["policy"][-1]["load_to"]) == (1.0, 3.0)
    assert {"vllm_static", "vllm_dynamic"} == set(answer["flags"])
    assert answer["schedule"][0][0] == 1 and all(len(part) == 3 for part in answer["schedule"])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_policy_is_predicts_own_word(model):
    answer = answer_of(
        "optimize", model, "--arrival-rate", "1,3", *LOAD[2:], "--max-draft-length", "4", "--slo", "ttft_mean<0.5"
    )
    entry = answer["policy"][-1]
    told = [answer_of("predict", model, *LOAD, "--draft-length", k)["e2e_latency"] for k in range(5)]
    assert told.index(min(told)) == entry["draft_length"]
    assert entry["metrics"]["e2e_mean"] == pytest.approx(min(told), rel=1e-9)
    assert entry["speedup"] == pytest.approx(told[0] / min(told), rel=1e-9)


def test_optimize_in_words(model):
    ran = run("optimize", model, "--concurrency", "1,16", *LOAD[2:], "--max-draft-length", "4")
    assert ran.code == 0, ran.err
    assert "draft length by batch size: 1 to" in ran.out
    flags = [line for line in ran.out.splitlines() if "--speculative-config" in line]
    assert flags and all(line.endswith("}'") for line in flags)  # in one line, to be copied


@pytest.mark.parametrize(
    ("options", "outcome", "told"),
    [
        (("--arrival-rate", "1,3", "--slo", "ttft_mean<0.001"), "infeasible", "ttft_mean<0.001 fails"),
        (("--arrival-rate", "1e4,2e4"), "saturated", "capacity is"),
    ],
)
def test_no_feasible_draft_length_is_exit_code_1(model, options, outcome, told):
    base = ("optimize", model, *options, *LOAD[2:], "--max-draft-length", "4")
    ran = run(*base, "--json")
    assert ran.code == 1 and json.loads(ran.out)["outcome"] == outcome
    ran = run(*base)
    assert ran.code == 1 and told in ran.out


# --- sensitivity ----------------------------------------------------------------------


def test_sensitivity_keeps_the_contract(model, tmp_path):
    answer = answer_of("sensitivity", model, *LOAD, "--draft-length", "2", "--plot", tmp_path / "s.png")
    assert answer["metric"] == "e2e_mean" and answer["value"] > 0
    rows = answer["elasticities"]
    assert all({"name", "kind", "elasticity"} <= set(row) for row in rows)
    assert {row["kind"] for row in rows} == {"parameter", "workload", "configuration"}
    sizes = [abs(row["elasticity"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_sensitivity_is_the_slope_of_predict(model):
    answer = answer_of("sensitivity", model, *LOAD, "--draft-length", "2")
    slope = next(row["elasticity"] for row in answer["elasticities"] if row["name"] == "arrival_rate")
    ends = [
        answer_of("predict", model, "--arrival-rate", rate, *LOAD[2:], "--draft-length", "2")["e2e_latency"]
        for rate in (3 / 1.001, 3 * 1.001)
    ]
    assert (ends[1] / ends[0] - 1) / (1.001**2 - 1) == pytest.approx(slope, rel=1e-3)


def test_sensitivity_in_words(model):
    ran = run("sensitivity", model, *LOAD, "--draft-length", "2", "--metric", "ttft_mean")
    assert ran.code == 0 and "ttft_mean =" in ran.out and "elasticity" in ran.out


def test_an_elasticity_that_does_not_exist_is_none_and_says_why(model):
    """Requests of one token have no time per token; nothing moves it, and 0 would say that something could not."""
    load = ("--arrival-rate", "3", "--prompt-length", "64", "--output-length", "1", "--draft-length", "2")
    answer = answer_of("sensitivity", model, *load, "--metric", "tpot_mean")
    assert answer["elasticities"] and all(row["elasticity"] is None for row in answer["elasticities"])
    assert any("tpot_mean is 0 here" in line for line in answer["warnings"])
    ran = run("sensitivity", model, *load, "--metric", "tpot_mean")
    assert "+0.000" not in ran.out and "none" in ran.out and "tpot_mean is 0 here" in ran.err


def collected(folder) -> dict:
    """The answer of `diffspec collect` against a server that only streams."""
    plan = folder / "plan.yaml"
    plan.write_text(
        "limits: {max_rate: 1000, max_requests: 50}\nmeasure: {requests: 5, warmup_requests: 1}\n"
        "grid: {concurrency: 1, prompt_length: 4, output_length: 3}\n"
    )
    with running(FakeServer(first=0.005, gap=0.001)) as server:
        return answer_of("collect", plan, "--url", server.url, "--out", folder / "collected")


# --- simulate -----------------------------------------------------------------
def test_simulate_stands_beside_predict(model, tmp_path):
    """Both answer the same question of the same server; the requests are there to be read, and to be fitted."""
    load = (*LOAD, "--draft-length", "4", "--max-batch-size", "16")
    table = tmp_path / "requests.csv"
    simulated = answer_of("simulate", model, *load, "--requests", "400", "--table", table)
    predicted = answer_of("predict", model, *load)
    assert simulated["predicted"]["e2e"]["mean"] == predicted["e2e_latency"]
    assert simulated["predicted"]["e2e"]["p95"] == predicted["percentiles"]["e2e"]["p95"]
    assert simulated["metrics"]["e2e"]["p50"]["value"] < simulated["metrics"]["e2e"]["p99"]["value"]
    assert simulated["metrics"]["e2e"]["mean"]["value"] == pytest.approx(predicted["e2e_latency"], rel=0.25)
    assert predicted["percentiles"]["e2e"]["p50"] < predicted["percentiles"]["e2e"]["p99"]
    rows = table.read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + simulated["requests"] and rows[0].startswith("run,arrival_time,schedule_time")
    again = answer_of("simulate", model, *load, "--requests", "400")
    assert again["metrics"] == simulated["metrics"], "the same seed gives the same numbers"


def test_simulate_asks_the_model_and_the_engine_the_same(tmp_path):
    """The token budget of the measured server counts for both or for neither; which, and how to ask, is said."""
    deployment = toy_deployment()
    deployment.defaults["max_batched_tokens"] = 32
    model = toy_model(tmp_path / "m.json", deployment)
    few = ("--draft-length", "2", "--requests", "200", "--replications", "2")
    plain = answer_of("simulate", model, *LOAD, *few)
    asked = answer_of("simulate", model, *LOAD, *few, "--max-batched-tokens", "32")
    assert any("--max-batched-tokens 32 asks both" in line for line in plain["warnings"])
    assert not any("asks both" in line for line in asked["warnings"])
    for answer, budget in ((plain, ()), (asked, ("--max-batched-tokens", "32"))):
        predicted = answer_of("predict", model, *LOAD, "--draft-length", "2", *budget)
        assert answer["predicted"]["ttft"]["mean"] == predicted["ttft"]
    simulated = [answer["metrics"]["ttft"]["mean"]["value"] for answer in (plain, asked)]
    assert simulated[1] > 1.2 * simulated[0], "prompts of 64 tokens take several steps of 32"


def test_simulate_says_saturation_and_bad_input(model, tmp_path):
    ran = run("simulate", model, *SATURATING, "--draft-length", "0", "--max-batch-size", "4", "--requests", "100")
    assert ran.code == 1 and "saturated" in ran.out
    for wrong, said in (
        (("--draft-length", "1.5"), "whole number"),
        (("--draft-length", "0", "--output-law", "gaussian"), "fixed, geometric, lognormal"),
        (("--draft-length", "0", "--output-law", "lognormal"), "output_scv"),
    ):
        ran = run("simulate", model, *LOAD, *wrong)
        assert ran.code == 2 and said in ran.err, ran.err


def test_readme_names_every_json_key(fitted, model):
    folder, fit_answer, _ = fitted
    speculative = (*LOAD, "--draft-length", "4")
    answers = {
        "fit": fit_answer,
        "check": answer_of("check", TRACE),
        "import": answer_of("import", TRACE),
        "acceptance": answer_of("acceptance", TRACE),
        "collect": collected(folder),
        "evaluate": answer_of("evaluate", folder / "model.json", TRACE),
        "predict": answer_of("predict", model, *speculative),
        "simulate": answer_of("simulate", model, *speculative, "--requests", "20", "--replications", "2"),
        "optimize": answer_of("optimize", model, *LOAD, "--max-draft-length", "2"),
        "sensitivity": answer_of("sensitivity", model, *speculative),
        "policy": answer_of("policy", model, *LOAD, "--max-draft-length", "2"),
        "size": answer_of("size", model, "--target-rate", "4", "--max-draft-length", "2", "--slo", "ttft_mean<5"),
    }
    for command, answer in answers.items():
        assert sorted(documented_keys(command)) == sorted(answer), command
