"""Predictions before any trace, fits that start from first principles, their transfer to other hardware; in Python, and
from the command line (one file: they share compiled programs)."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import assert_close, predict
from test_architecture import LLAMA_1B, LLAMA_8B, LLAMA_70B, MIXTRAL_8X7B
from test_cli_main import REPOSITORY, TRACE, run

import diffspec
from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.before_traces import predict_before_traces, predict_transferred
from diffspec.architecture import read_architecture
from diffspec.first_principles import Efficiency, FirstPrinciples
from diffspec.fitting.deployment import FittedDeployment, FittedModel
from diffspec.fitting.fit import fit
from diffspec.fitting.forms import Scales, build_form
from diffspec.fitting.principles import (
    KEY,
    TRANSFER_SPREAD,
    prior_draws,
    remember,
    serving_model,
    started,
    transfer,
    unmeasured_deployment,
)
from diffspec.hardware import accelerator
from diffspec.parameters import get_parameters
from diffspec.report import tables
from diffspec.resources import memory_plan
from diffspec.results import InputError
from diffspec.workload import Workload

LLAMA, SMALL = read_architecture(LLAMA_8B), read_architecture(LLAMA_1B)
PAIR = FirstPrinciples(LLAMA, accelerator("h100"), SMALL, prompt_length=512.0, output_length=200.0)
TRUE = Efficiency(memory=0.62, kv=0.7, compute=0.36, step_overhead=2e-3, request_overhead=0.012)
LOAD = Workload(512.0, 200.0, arrival_rate=4.0)


def fake_rows(path, pair, efficiency):
    """Operating points of a server that is exactly first principles at some efficiency."""
    model = serving_model(pair, efficiency)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            (
                "deployment",
                "method",
                "draft_length",
                "acceptance_rate",
                "concurrency",
                "prompt_length",
                "output_length",
                "ttft_mean",
                "itl_mean",
            )
        )
        for length in (0, 2, 5):
            for users in (1, 4, 16, 64):
                for prompt in (128.0, 1024.0):
                    config = diffspec.Configuration(float(length), ConstantAcceptance(0.7))
                    told = predict(model, Workload(prompt, 200.0, concurrency=float(users)), config)
                    method = ("draft_model", 0.7) if length else ("none", "")
                    writer.writerow(
                        ("fake", method[0], length, method[1], users, prompt, 200, float(told.ttft), float(told.itl))
                    )
    return diffspec.read_trace(path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> FittedModel:
    """The one fit of these tests: the server reaches less of the data sheet than the priors think."""
    return fit(fake_rows(tmp_path_factory.mktemp("fake") / "rows.csv", PAIR, TRUE), start=PAIR)


def test_priors_are_centred_at_first_principles():
    form = started(build_form("roofline", Scales(0.02, 0.1, 600.0, 500.0)), PAIR)
    centre, told = get_parameters(form.model(np.zeros(len(form.paths)))), get_parameters(serving_model(PAIR))
    for path in ("weight_read", "kv_read", "token_compute", "prefill_token", "step_overhead", "draft.pass_base"):
        assert_close(centre[f"step_time.{path}"], told[f"step_time.{path}"], 1e-12)
    assert_close(centre["request_overhead"], told["request_overhead"], 1e-12)
    assert centre["step_time.draft.block_base"] == pytest.approx(0.05 * 0.02), "unknown to first principles: as before"


def test_a_fit_finds_the_efficiency(fitted):
    deployment = fitted.deployment()
    assert deployment.form == "roofline" and deployment.quality["metrics"]["itl_mean"]["mape"] < 0.01
    found = deployment.defaults[KEY]
    assert_close(found["efficiency"]["memory"], 0.62, 0.08)
    assert_close(found["efficiency"]["kv"], 0.7, 0.15)
    assert found["ratios"]["step_time.weight_read"] == pytest.approx(0.75 / found["efficiency"]["memory"])
    assert_close(
        get_parameters(deployment.serving)["step_time.prefill_token"],
        serving_model(PAIR, TRUE).step_time.prefill_token,
        0.1,
    )


def test_a_transferred_fit_predicts_the_other_hardware(fitted):
    """The same server on a GPU of 1.43 times the bandwidth, known exactly: the fit, moved, is closer than first
    principles at the priors' centre, and than the fit left as it is."""
    deployment = fitted.deployment()
    moved, _ = transfer(deployment, accelerator("h200"))
    other = replace(PAIR, hardware=accelerator("h200"))
    config = diffspec.Configuration(2.0, ConstantAcceptance(0.7))
    truth = float(predict(serving_model(other, TRUE), LOAD, config).itl)
    errors = {
        name: abs(float(predict(model, LOAD, config).itl) / truth - 1.0)
        for name, model in {
            "moved": moved.serving,
            "left": deployment.serving,
            "untouched": serving_model(other),
        }.items()
    }
    assert errors["moved"] < 0.03 and errors["moved"] < 0.5 * min(errors["left"], errors["untouched"]), errors


def test_transfer_multiplies_by_ratios_of_the_data_sheets(fitted):
    deployment = fitted.deployment()
    moved, spread = transfer(deployment, accelerator("a100"))
    before, after = get_parameters(deployment.serving), get_parameters(moved.serving)
    for path, ratio in {
        "step_time.weight_read": 3350 / 2039,
        "step_time.kv_read": 3350 / 2039,
        "step_time.token_compute": 989.4 / 312,
        "step_time.prefill_token": 989.4 / 312,
        "step_time.draft.pass_kv": 3350 / 2039,
        "step_time.step_overhead": 1.0,
        "step_time.sequence_overhead": 1.0,
        "closed_loop_sync": 1.0,
        "step_time.sharpness": 1.0,
    }.items():
        assert_close(after[path] / before[path], ratio, 1e-12)
    assert set(spread.values()) == set(TRANSFER_SPREAD.values())
    assert moved.defaults["hardware"] == moved.defaults[KEY]["hardware"] == "a100"
    assert_close(
        moved.defaults["kv_capacity_tokens"],
        memory_plan(replace(PAIR, hardware=accelerator("a100"))).kv_capacity_tokens,
        0.01,
    )
    assert "h100 was measured" in moved.warnings[-1]


def test_transfer_to_the_same_hardware_changes_nothing(fitted):
    same, _ = transfer(fitted.deployment(), accelerator("h100"))
    there, back = get_parameters(same.serving), get_parameters(fitted.deployment().serving)
    assert all(np.array_equal(there[path], back[path]) for path in back)


def test_there_and_back_again(fitted):
    there, _ = transfer(fitted.deployment(), accelerator("b200"), 2)
    back, _ = transfer(there, accelerator("h100"), 1)
    for path, value in get_parameters(fitted.deployment().serving).items():
        assert_close(get_parameters(back.serving)[path], value, 1e-9)


def test_models_keep_what_a_transfer_needs(fitted):
    again = FittedModel.from_json(fitted.to_json()).deployment()
    moved, moved_again = (transfer(d, accelerator("h200"))[0] for d in (fitted.deployment(), again))
    for path, value in get_parameters(moved.serving).items():
        assert_close(get_parameters(moved_again.serving)[path], value, 1e-12)
    assert json.loads(fitted.to_json())["deployments"][0]["defaults"][KEY]["verifier"]["hidden"] == 4096


def test_what_cannot_be_transferred_is_said(fitted):
    plain = fitted.deployment()
    plain = FittedDeployment(**{**plain.__dict__, "defaults": {}})
    with pytest.raises(InputError, match="fit again with --verifier"):
        transfer(plain, accelerator("h200"))
    trace = diffspec.read_trace(TRACE)
    with pytest.raises(InputError, match="step_time: got 'affine' with first principles"):
        fit(trace, step_time="affine", start=PAIR)


@pytest.fixture(scope="module")
def answer() -> dict:
    return predict_before_traces(PAIR, LOAD, 2, acceptance=ConstantAcceptance(0.7))


def test_before_any_trace_the_truth_is_inside(answer):
    """A server that is first principles at another efficiency lies inside the intervals, and they are wide."""
    truth = predict(serving_model(PAIR, TRUE), LOAD, diffspec.Configuration(2.0, ConstantAcceptance(0.7)))
    for name in ("ttft", "itl", "tpot", "e2e_latency"):
        edges = answer["intervals"]["metrics"][name]
        assert edges["low"] < float(getattr(truth, name)) < edges["high"]
        assert edges["low"] < answer[name] < edges["high"] and edges["high"] > 1.4 * edges["low"]
    assert answer["intervals"]["level"] == 0.9 and answer["intervals"]["saturated_share"] == 0.0
    assert answer["warnings"] == []
    assert 75.0 < answer["energy_per_token"]["power"] < 700.0
    # the joules: power over the tokens that a step makes, and the prompt's share
    step = answer["itl"] / answer["energy_per_token"]["sequences"] / answer["tokens_per_step"]
    assert 0.3 < answer["energy_per_token"]["joules"] / (answer["energy_per_token"]["power"] * step) < 3.0


def test_the_central_answer_is_the_models_own(answer):
    central = predict(serving_model(PAIR), LOAD, diffspec.Configuration(2.0, ConstantAcceptance(0.7)))
    assert_close(answer["e2e_latency"], central.e2e_latency, 1e-9)
    assert answer["capacity"] < float(central.capacity), "the KV cache caps the batch"


def test_a_saturated_draw_leaves_the_interval_open():
    acceptance = ConstantAcceptance(0.7)
    told = predict_before_traces(PAIR, Workload(512.0, 200.0, arrival_rate=60.0), 2, acceptance=acceptance)["intervals"]
    assert 0.05 < told["saturated_share"] <= 1.0
    assert told["metrics"]["ttft"]["high"] is None and told["metrics"]["capacity"]["high"] is not None


def test_a_pair_that_does_not_fit_is_an_answer(answer):
    pair = replace(PAIR, hardware=accelerator("l4"), verifier=read_architecture(LLAMA_70B))
    told = predict_before_traces(pair, LOAD, 2, acceptance=ConstantAcceptance(0.7))
    assert told["outcome"] == "does_not_fit" and told["ttft"] is None and told["intervals"] is None
    assert told["percentiles"] is None
    assert told["memory"]["missing_bytes"] > 120e9
    assert sorted(told) == sorted(answer)


@pytest.mark.parametrize(
    ("pair", "acceptance", "told"),
    [(PAIR, None, "needs an acceptance"), (replace(PAIR, drafter=None, drafter_kind=""), 0.7, "needs a drafter")],
)
def test_drafting_needs_a_drafter_and_an_acceptance(pair, acceptance, told):
    with pytest.raises(InputError, match=told):
        predict_before_traces(pair, LOAD, 2, acceptance=None if acceptance is None else ConstantAcceptance(acceptance))


def test_a_transferred_prediction_has_the_same_keys(fitted, answer):
    acceptance = ConstantAcceptance(0.7)
    moved = predict_transferred(fitted.deployment(), LOAD, 2, accelerator("h200"), acceptance=acceptance)
    assert sorted(moved) == sorted(answer)
    widths = [
        np.log(a["intervals"]["metrics"]["itl"]["high"] / a["intervals"]["metrics"]["itl"]["low"])
        for a in (moved, answer)
    ]
    assert 0.1 < widths[0] < widths[1], "a measurement, moved, knows more than none"


def test_draws_hold_the_serving_parameters_too():
    models = prior_draws(PAIR, 16)
    for path in ("closed_loop_sync", "prefill_interference", "step_time.weight_read", "request_overhead"):
        assert np.unique(np.asarray(get_parameters(models)[path])).size == 16


def test_a_mixture_of_experts_remembers_its_experts():
    pair = FirstPrinciples(read_architecture(MIXTRAL_8X7B), accelerator("h200"))
    deployment = unmeasured_deployment(pair, memory_plan(pair))
    again = FittedDeployment.from_dict(json.loads(json.dumps(deployment.to_dict())))
    assert again.form == "roofline-moe" and again.defaults["experts"] == [8.0, 2.0, 1.0]
    ratios = remember(pair, again.serving)["ratios"]
    assert_close(ratios["step_time.experts.weight_read"], 1.0, 1e-12)


# --- the command line ----------------------------------------------------------------------

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CONFIGS = REPOSITORY / "data" / "configs"
CLI_PAIR = ("--verifier", CONFIGS / "llama-3.1-8b.json", "--drafter", CONFIGS / "llama-3.2-1b.json")
CLI_LOAD = ("--arrival-rate", "8", "--prompt-length", "512", "--output-length", "200")
CLI_DRAFT = ("--draft-length", "4", "--acceptance-rate", "0.8")
NEW_KEYS = ("memory", "energy_per_token", "assumptions")
# the measured server's verifier: 8 layers of width 512, 29 M parameters, float32 (data/README.md)
TINY = LLAMA_8B | {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "torch_dtype": "float32",
    "vocab_size": 4096,
}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(folder with model.json and the answer of one real fit that starts from first principles)"""
    folder = tmp_path_factory.mktemp("start")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "draft.json").write_text(json.dumps(TINY | {"hidden_size": 256, "num_hidden_layers": 2}))
    start = ("--verifier", folder / "tiny.json", "--drafter", folder / "draft.json", "--hardware", "cpu")
    ran = run("fit", TRACE, "--out", folder / "model.json", *start, "--no-plot", "--json")
    assert ran.code == 0, ran.err
    return folder, json.loads(ran.out)


def test_a_prediction_before_any_trace_keeps_the_contract():
    ran = run("predict", *CLI_PAIR, "--hardware", "H200", *CLI_LOAD, *CLI_DRAFT, "--json")
    assert ran.code == 0 and ran.err == "", ran.err
    answer = json.loads(ran.out)
    documented = next(line for line in README.splitlines() if line.startswith("| `predict` |"))
    assert sorted(answer) == sorted([*documented.split("|")[2].replace("`", "").replace(" ", "").split(","), *NEW_KEYS])
    assert all(f"`{key}`" in README for key in (*NEW_KEYS, "does_not_fit"))
    assert answer["deployment"] == "Llama-3.1-8B + Llama-3.2-1B on h200"
    told = answer["intervals"]["metrics"]
    assert all(told[name]["low"] <= told[name]["median"] <= told[name]["high"] for name in ("ttft", "tpot", "speedup"))
    assert told["tpot"]["low"] < answer["tpot"] < told["tpot"]["high"]
    assert answer["memory"]["fits"] and answer["memory"]["verifier_bytes"] == 2 * 8_030_261_248
    assert any("NVIDIA H200" in line for line in answer["assumptions"])
    assert answer["energy_per_token"]["joules"] > 0


def test_in_words():
    ran = run("predict", *CLI_PAIR, "--hardware", "h200", *CLI_LOAD, *CLI_DRAFT)
    assert ran.code == 0
    for words in (
        "90% interval",
        "KV cache",
        "energy per output token",
        "memory of each device",
        "where the time goes",
    ):
        assert words in ran.out, words


def test_a_pair_that_does_not_fit_ends_with_1(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    question = ("predict", "--verifier", tmp_path, *CLI_PAIR[2:], "--hardware", "h100", *CLI_LOAD, *CLI_DRAFT)
    ran = run(*question)
    assert ran.code == 1 and "does not fit: missing" in ran.out and "75.8 GB" in ran.out
    answer = json.loads(run(*question, "--json").out)
    assert answer["outcome"] == "does_not_fit" and answer["e2e_latency"] is None
    assert answer["memory"]["missing_bytes"] == pytest.approx(75.8e9, rel=0.01)


@pytest.mark.slow
def test_a_fit_starts_from_first_principles_and_moves(measured):
    folder, answer = measured
    deployment = answer["deployments"][0]
    assert deployment["step_time"] == "roofline"
    assert any("of the data sheet (cpu) the fit reaches: memory" in str(part) for part in tables.fit_summary(answer))
    kept = deployment["defaults"]["first_principles"]
    assert (kept["hardware"], kept["verifier"]["hidden"], kept["verifier"]["weight_bits"]) == ("cpu", 512, 32.0)
    parameters = deployment["parameters"]
    ratio = kept["ratios"]["step_time.weight_read"]
    read = 4 * (8 * (4 * 512**2 + 3 * 512 * 1376) + 17 * 512 + 4096 * 512)
    assert parameters["step_time.weight_read"]["value"] == pytest.approx(ratio * read / (307.2e9 * 0.75))
    assert deployment["quality"]["metrics"]["itl_mean"]["mape"] < 0.08, "as good as a fit without first principles"
    question = ("predict", folder / "model.json", "--arrival-rate", "3", "--draft-length", "4")
    here = json.loads(run(*question, "--json").out)
    ran = run(*question, "--hardware", "l4", "--json")
    there = json.loads(ran.out)
    assert ran.code == 0 and set(there) == set(here) | set(NEW_KEYS)
    assert there["tpot"] < here["tpot"] and "cpu was measured" in there["assumptions"][0]
    same = json.loads(run(*question, "--hardware", "cpu", "--json").out)
    assert same["e2e_latency"] == pytest.approx(here["e2e_latency"], rel=1e-9)


def documented(command: str) -> list[str]:
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{command}` | `")]
    return row.split("|")[2].replace("`", "").replace(" ", "").split(",")


def answer_of(*arguments, code: int = 0) -> dict:
    ran = run(*arguments, "--json")
    assert ran.code == code, ran.err
    return json.loads(ran.out)


BUDGET = ("--max-batched-tokens", "256")


@pytest.mark.slow
def test_a_token_budget_and_prefix_hits_are_used_before_any_trace():
    question = ("predict", *CLI_PAIR, "--hardware", "h200", *CLI_LOAD, *CLI_DRAFT)
    plain, split, cached = (answer_of(*question, *extra) for extra in ((), BUDGET, ("--prefix-hit-rate", "0.9")))
    assert cached["ttft"] < plain["ttft"] < split["ttft"]
    assert split["capacity"] < plain["capacity"]
    assert split["intervals"]["metrics"]["ttft"]["median"] > plain["intervals"]["metrics"]["ttft"]["median"]
    assert any("activations of 256 tokens" in line for line in split["assumptions"])
    assert split["memory"]["kv_capacity_tokens"] > plain["memory"]["kv_capacity_tokens"]


@pytest.mark.slow
def test_a_token_budget_is_used_on_other_hardware(measured):
    question = ("predict", measured[0] / "model.json", "--arrival-rate", "3", "--draft-length", "4")
    here, there = (
        [answer_of(*question, *where, *extra)["ttft"] for extra in ((), ("--max-batched-tokens", "32"))]
        for where in ((), ("--hardware", "cpu"))
    )
    assert here[1] > here[0] and there == pytest.approx(here, rel=1e-9)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("optimize", ("--acceptance-rate", "0.8", "--max-draft-length", "4")),
        ("sensitivity", CLI_DRAFT),
        ("simulate", (*CLI_DRAFT, "--requests", "30", "--replications", "2")),
    ],
)
def test_every_question_can_be_asked_before_any_trace(command, options, tmp_path):
    """The keys are those of a fitted model and what first principles add, also where the pair does not fit."""
    question = (command, *CLI_PAIR, *CLI_LOAD, *options)
    answer = answer_of(*question, "--hardware", "h200")
    assert sorted(answer) == sorted([*documented(command), "memory", "assumptions"])
    if command != "simulate":
        assert [entry["field"] for entry in answer["outside_measured"]] == ["deployment"] and not answer[
            "inside_measured"
        ]
    assert answer["memory"]["fits"] and any("NVIDIA H200" in line for line in answer["assumptions"])
    if command == "optimize":
        central = answer_of("predict", *CLI_PAIR, *CLI_LOAD, *CLI_DRAFT, "--hardware", "h200")
        (entry,) = answer["table"]
        assert entry["draft_length"] == 4 and entry["metrics"]["e2e_mean"] == pytest.approx(central["e2e_latency"])
        (varied,) = answer["intervals"]["loads"]
        edges = varied["draft_length"]
        assert edges["low"] <= edges["median"] <= edges["high"] and varied["feasible_share"] > 0.9
        assert '"method":"draft_model"' in answer["flags"]["vllm_static"]
    if command == "sensitivity":
        for row in answer["elasticities"]:
            edges = answer["intervals"]["elasticities"][row["name"]]
            assert edges["low"] <= edges["median"] <= edges["high"]
        widths = answer["intervals"]["elasticities"]["weight_read"]
        assert widths["high"] - widths["low"] > 0.05, "honest: what is not known shows"
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    large = (command, "--verifier", tmp_path, *CLI_PAIR[2:], "--hardware", "h100", *CLI_LOAD, *options)
    if command == "simulate":
        ran = run(*large)
        assert ran.code == 1 and "do not fit" in ran.err and ran.err.count("\n") == 1
    else:
        nothing = answer_of(*large, code=1)
        assert nothing["outcome"] == "does_not_fit" and sorted(nothing) == sorted(answer)
        assert "does not fit: missing" in run(*large).out


@pytest.mark.slow
def test_every_question_can_be_asked_of_other_hardware(measured):
    """On the hardware of the fit the answer is the fit's own; on another one it is not, and says what it assumes."""
    model, load = measured[0] / "model.json", ("--arrival-rate", "3")
    optimized, explained = (
        [answer_of(*question, *where) for where in ((), ("--hardware", "cpu"), ("--hardware", "l4"))]
        for question in (
            ("optimize", model, *load, "--max-draft-length", "4"),
            ("sensitivity", model, *load, "--draft-length", "4"),
        )
    )
    costs = [answer["table"][0]["metrics"]["e2e_mean"] for answer in optimized]
    assert costs[1] == pytest.approx(costs[0], rel=1e-9) and costs[2] < costs[0]
    assert optimized[1]["schedule"] == optimized[0]["schedule"]
    values = [answer["value"] for answer in explained]
    assert values[1] == pytest.approx(values[0], rel=1e-9) and values[2] < values[0]
    there = {"field": "hardware", "asked": "1 x l4", "measured": "1 x cpu"}
    for answers in (optimized, explained):
        assert there in answers[2]["outside_measured"] and not answers[2]["inside_measured"]
        assert all("hardware" not in [entry["field"] for entry in a["outside_measured"]] for a in answers[:2])
    assert "cpu was measured" in explained[2]["assumptions"][0] and "assumptions" not in explained[0]


@pytest.mark.parametrize("command", ["optimize", "sensitivity", "simulate"])
def test_the_others_refuse_what_predict_refuses(command):
    options = ("--acceptance-rate", "0.8") if command == "optimize" else CLI_DRAFT
    for arguments, told in (
        ((*CLI_LOAD, *options), "MODEL.JSON or --verifier: got neither"),
        ((*CLI_PAIR, *CLI_LOAD, *options), "--hardware is missing; allowed: a100"),
        ((*CLI_PAIR[:2], "--hardware", "h200", *CLI_LOAD, *options), "needs a drafter"),
        ((*CLI_PAIR, "--hardware", "h200", *CLI_LOAD[:4], *options), "--output-length is needed: no trace tells it"),
    ):
        ran = run(command, *arguments)
        assert ran.code == 2 and told in ran.err and ran.out == "", ran.err


def test_how_the_drafter_runs_is_asked_before_any_trace(measured):
    load = ("--hardware", "h200", *CLI_LOAD, *CLI_DRAFT)
    plain = answer_of("predict", *CLI_PAIR, *load)
    aside = ("--drafter-hardware", "h200", "--transfer-latency", "5e-4", "--draft-overlap", "0.9")
    hidden = answer_of("predict", *CLI_PAIR, *load, *aside, "--drafter-window", "256")
    assert hidden["itl"] < plain["itl"] and hidden["memory"]["drafter_bytes"] == 0
    told = " ".join(hidden["assumptions"])
    assert "the drafter runs on h200, 0.5 ms there" in told and "256 tok" in told and "verifies: 0.9" in told
    seldom = answer_of("predict", *CLI_PAIR[:2], *load, "--drafter-kind", "suffix", "--draft-probability", "0.5")
    assert_close(seldom["tokens_per_step"], 1 + 0.5 * (plain["tokens_per_step"] - 1), 1e-9)
    asked = ("predict", measured[0] / "model.json", "--arrival-rate", "3", "--draft-length", "4")
    fitted = [answer_of(*asked, *more) for more in ((), ("--draft-probability", "0.5"))]
    assert_close(fitted[1]["tokens_per_step"], 1 + 0.5 * (fitted[0]["tokens_per_step"] - 1), 1e-9)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*CLI_PAIR, *CLI_LOAD, *CLI_DRAFT), "--hardware is missing; allowed: a100"),
        ((*CLI_PAIR, "--hardware", "?", *CLI_LOAD, *CLI_DRAFT), "hardware: got '?'; allowed: a100, a100-40gb, h100"),
        ((*CLI_PAIR, "--hardware", "h20", *CLI_LOAD, *CLI_DRAFT), "did you mean h200?"),
        (("--hardware", "h200", *CLI_LOAD, *CLI_DRAFT), "MODEL.JSON or --verifier: got neither"),
        ((TRACE, *CLI_LOAD, *CLI_DRAFT, "--draft-overlap", "0.5"), "--draft-overlap goes with --verifier"),
        ((TRACE, *CLI_LOAD, *CLI_DRAFT, "--drafter-hardware", "l4"), "--drafter-hardware goes with --verifier"),
        ((*CLI_PAIR, "--hardware", "h200", *CLI_LOAD, *CLI_DRAFT, "--draft-overlap", "2"), "draft_overlap: got 2"),
        ((TRACE, *CLI_PAIR, "--hardware", "h200", *CLI_LOAD, *CLI_DRAFT), "MODEL.JSON or --verifier: got both"),
        (
            (TRACE, *CLI_PAIR[2:], "--hardware", "h200", *CLI_LOAD, *CLI_DRAFT),
            "--drafter and --drafter-kind go with --verifier",
        ),
        ((TRACE, "--tensor-parallel", "2", *CLI_LOAD, *CLI_DRAFT), "--tensor-parallel needs --hardware"),
        ((*CLI_PAIR, "--hardware", "h200", *CLI_LOAD[:4], *CLI_DRAFT), "--output-length is needed: no trace tells it"),
        ((*CLI_PAIR, "--hardware", "h200", *CLI_LOAD, "--draft-length", "2"), "needs an acceptance"),
        ((*CLI_PAIR[:2], "--hardware", "h200", *CLI_LOAD, *CLI_DRAFT), "needs a drafter: give --drafter config.json"),
        (
            (*CLI_PAIR, "--hardware", "h200", "--drafter-kind", "oracle", *CLI_LOAD, *CLI_DRAFT),
            "got 'oracle'; allowed: model",
        ),
        ((*CLI_PAIR, "--hardware", "h200", "--tensor-parallel", "0", *CLI_LOAD, *CLI_DRAFT), "tensor_parallel: got 0"),
        (
            (*CLI_PAIR, "--hardware", "h200", "--deployment", "d", *CLI_LOAD, *CLI_DRAFT),
            "--deployment goes with a fitted model",
        ),
        (("--verifier", TRACE, "--hardware", "h200", *CLI_LOAD, *CLI_DRAFT), "not a Hugging Face config.json"),
        (("--verifier", "none.json", "--hardware", "h200", *CLI_LOAD, *CLI_DRAFT), "none.json: no such file"),
    ],
)
def test_bad_questions_are_refused(arguments, told):
    ran = run("predict", *arguments)
    assert ran.code == 2 and told in ran.err and ran.out == "", ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--hardware", "cpu"), "need --verifier CONFIG.JSON"),
        ((*CLI_PAIR, "--step-time", "affine", "--hardware", "h200"), "got 'affine' with first principles"),
        (CLI_PAIR, "--hardware is missing"),
    ],
)
def test_bad_starts_of_a_fit_are_refused(tmp_path, options, told):
    ran = run("fit", TRACE, "--out", tmp_path / "m.json", *options)
    assert ran.code == 2 and told in ran.err and not (tmp_path / "m.json").exists()
