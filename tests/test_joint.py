"""The joint decision: against brute force written out, SciPy's SLSQP, and differences of the optimum itself."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SERVER_STEP
from scipy.optimize import minimize

from diffspec.acceptance import ConstantAcceptance, MeasuredAcceptance
from diffspec.cli import main
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment, FittedModel
from diffspec.optimizing.catalogue import (
    CLASSES_EXAMPLE,
    DRAFTERS_EXAMPLE,
    DrafterChoice,
    RequestClass,
    parse_classes,
    parse_drafters,
)
from diffspec.optimizing.constrained import minimise_within
from diffspec.optimizing.joint import optimize_jointly
from diffspec.optimizing.joint_answer import caveats
from diffspec.optimizing.joint_problem import Drafted, cost_of, parse_objective, shapes_of
from diffspec.optimizing.joint_search import Arm
from diffspec.optimizing.limits import parse_limit
from diffspec.programs import FAST_COMPILE
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.workload import Workload

CHAT = RequestClass("chat", 0.7, 300.0, 200.0, acceptance=ConstantAcceptance(0.65))
CODE = RequestClass("code", 0.3, 800.0, 100.0, acceptance=ConstantAcceptance(0.9))
SMALL = DrafterChoice("small", 0.5e9, by_class={"chat": ConstantAcceptance(0.55), "code": ConstantAcceptance(0.8)})
LARGE = DrafterChoice("large", 2e9, by_class={"chat": ConstantAcceptance(0.7), "code": ConstantAcceptance(0.92)})
LONGEST, LOADS = 5, (2.0, 12.0)


@pytest.fixture(scope="module")
def deployment():
    serving = jax.tree.map(jnp.asarray, ServingModel(SERVER_STEP, first_token_steps=1.5))
    defaults = {"max_batch_size": 48.0, "drafter_params": 1e9}
    measured = {"draft_lengths": [0, 1, 3, 5], "arrival_rate": [1.0, 20.0], "concurrency": None}
    measured |= {"prompt_length": [100.0, 2000.0], "output_length": [50.0, 400.0]}
    return FittedDeployment("synthetic", "roofline", serving, None, defaults, measured, {"rows": 1})


@pytest.fixture(scope="module")
def decide(deployment):
    """The joint decision with a limit of code's first token; every call has one shape, and so one program."""

    def decide(bound=0.075, loads=LOADS, drafters=(SMALL, LARGE), **asked):
        limited = RequestClass(**{**vars(CODE), "limits": (parse_limit(f"ttft_mean<{bound!r}"),)})
        asked = {"max_draft_length": LONGEST, "batch_caps": (8.0, 48.0)} | asked
        return optimize_jointly(deployment, loads=loads, classes=(CHAT, limited), drafters=drafters, **asked)

    return decide


@pytest.fixture(scope="module")
def answer(decide):
    return decide()


@pytest.fixture(scope="module")
def brute(deployment):
    """load -> [(cost, ttft of code, drafter, lengths, cap, capacity)] of every whole point, written out."""

    @jax.jit
    def point(load, lengths, cap, rates, scale):
        workloads = [
            Workload(one.prompt_length, one.output_length, arrival_rate=load * one.share) for one in (CHAT, CODE)
        ]
        configs = [
            Configuration(lengths[c], ConstantAcceptance(rates[c]), max_batch_size=cap, drafter_scale=scale)
            for c in range(2)
        ]
        return deployment.serving.predict_classes(workloads, configs)

    many = jax.jit(jax.vmap(point, (None, 0, 0, None, None)), compiler_options=FAST_COMPILE)
    points = list(itertools.product(range(LONGEST + 1), range(LONGEST + 1), (8.0, 48.0)))
    columns = np.asarray(points, dtype=float)

    def at(load):
        found = []
        for choice in (SMALL, LARGE):
            rates = jnp.asarray([choice.by_class[name].acceptance_rate for name in ("chat", "code")])
            result = many(load, columns[:, :2], columns[:, 2], rates, choice.drafter_params / 1e9)
            cost = np.asarray(result.e2e_latency) @ [0.7, 0.3]
            cost = np.where(np.asarray(result.overload)[:, 0] > 0, np.inf, cost)
            columns_of = (cost, np.asarray(result.ttft)[:, 1], points, np.asarray(result.capacity).sum(axis=1))
            rows = zip(*columns_of, strict=True)
            found += [(cost, first, choice.name, at[:2], at[2], room) for cost, first, at, room in rows]
        return found

    return at


def test_the_joint_decision_is_the_best_of_all(answer, brute):
    json.dumps(answer, allow_nan=False)
    assert answer["outcome"] == "successful" and answer["limits"] == ["code: ttft_mean<0.075"]
    for entry in answer["table"]:
        every = brute(entry["load"])
        kept = [row for row in every if row[1] <= 0.075 and np.isfinite(row[0])]
        best = min(kept)
        assert entry["feasible"] and entry["exhaustive"]
        assert entry["objective"] == pytest.approx(best[0], rel=1e-9)
        chosen = (entry["drafter"], tuple(entry["draft_lengths"].values()), entry["max_batch_size"])
        same = [row for row in kept if row[2:5] == chosen]
        assert same and same[0][0] == pytest.approx(best[0], rel=1e-9)
        alike = min(row for row in kept if row[3][0] == row[3][1])
        assert entry["common"]["objective"] == pytest.approx(alike[0], rel=1e-9)
        assert entry["objective"] <= alike[0] * (1 + 1e-12)
        assert entry["metrics"]["code"]["ttft_mean"] == pytest.approx(same[0][1], rel=1e-9)
        assert 0.0 <= entry["optimality_gap"] < 0.01
        assert entry["evaluated"] > len(every)
    low, high = answer["table"]
    assert low["speedup"] > high["speedup"] > 1.0


def test_reals_are_no_worse_than_whole_lengths_and_keep_the_conditions(answer):
    for entry in answer["table"]:
        told = entry["relaxed"]
        if told["violation"] < 1e-3 and min(entry["draft_lengths"].values()) > 0:
            assert told["objective"] < entry["objective"] * 1.003
        assert told["complementarity"] < 1e-3
        assert entry["drafter_size"] is None  # acceptance by class tells no relation to size


def test_shadow_prices_are_derivatives_of_the_optimum(decide):
    """With a limit of ttft that binds: relaxing it by 1 % betters the relaxed objective by the price."""
    loads, drafters = [14.0], (LARGE,)
    (free,) = decide(9.0, loads, drafters)["table"]
    assert not free["shadow_prices"][0]["active"]
    bound = 0.97 * free["metrics"]["code"]["ttft_mean"]
    entries = [decide(bound * factor, loads, drafters)["table"][0] for factor in (0.995, 1.0, 1.005)]
    (price,) = entries[1]["shadow_prices"]
    low, middle, high = (entry["relaxed"]["objective"] for entry in entries)
    assert price["active"] and "relaxing code: ttft_mean" in price["words"]
    assert low > middle > high
    assert price["elasticity"] == pytest.approx(-math.log(high / low) / math.log(1.005 / 0.995), rel=0.1)
    residuals = [entries[1]["relaxed"][name] for name in ("stationarity", "complementarity", "violation")]
    assert max(residuals) < 1e-4 and entries[1]["relaxed"]["tied"] == [["chat", "code"]]


def test_what_cannot_be_kept_is_told_with_numbers(decide):
    never = decide(0.0001, [2.0], (SMALL,))
    (entry,) = never["table"]
    assert never["outcome"] == "infeasible" and not entry["feasible"] and entry["optimality_gap"] is None
    assert list(entry["violations"]) == ["code: ttft_mean<0.0001"]
    assert entry["violations"]["code: ttft_mean<0.0001"]["value"] > 1e-3
    assert entry["shadow_prices"] == []
    flood = decide(9.0, [500.0], (SMALL,))
    told = flood["infeasible"]["capacity"]
    assert flood["outcome"] == "saturated" and told["shortfall"] == pytest.approx(500.0 - told["value"])
    json.dumps([never, flood], allow_nan=False)


@pytest.mark.slow
def test_capacity_is_made_large(decide, brute):
    """The largest capacity of all whole points, where a load of half of it is served."""
    roomy = decide(9.0, [4.0], objective="capacity")["table"][0]
    assert roomy["objective"] == pytest.approx(max(row[5] for row in brute(4.0)), rel=1e-9)


def test_a_weighted_objective_is_the_weighted_mean():
    shapes = shapes_of((CHAT, RequestClass(**{**vars(CODE), "weight": 2.0})))
    metrics = {"e2e_mean": np.asarray([[1.0, 2.0]]), "ttft_mean": np.asarray([[0.1, 0.4]])}
    found = np.exp(cost_of(parse_objective("0.5*e2e_mean+2*ttft_mean"), metrics, shapes))
    assert found[0] == pytest.approx((0.7 * (0.5 + 0.2) + 0.6 * (1.0 + 0.8)) / 1.3, rel=1e-12)


@pytest.mark.slow
def test_the_best_size_lies_between_the_catalogues(decide):
    """Along logit(acceptance) = a + b*log(size) the real size is at least as good as the sizes it is drawn through."""
    known = ((0.25e9, 0.45), (1e9, 0.7), (4e9, 0.87))
    family = [DrafterChoice(f"{size:g}", size, ConstantAcceptance(rate)) for size, rate in known]
    found = decide(9.0, [4.0], family)
    size = found["table"][0]["drafter_size"]
    assert 0.25e9 < size["drafter_params"] < 4e9 and 0.45 < size["acceptance_rate"] < 0.87
    assert size["objective"] < found["table"][0]["objective"] * 1.01


def test_what_was_measured_otherwise_is_told(deployment):
    """A blended curve, another batch cap, no row without drafts: one sentence each."""
    curves = MeasuredAcceptance((1, 3), jnp.tile(jnp.asarray([[0.5], [0.9]]), (1, 32)))
    measured = deployment.measured | {"draft_lengths": [1, 3]}
    other = replace(deployment, acceptance=curves, measured=measured, defaults={"max_batch_size": 8.0})
    drafted = Drafted(other.serving, (curves,), None, 1.0, 1.0, None, None)
    told = caveats(deployment, [Arm("eagle", other, 1.0, drafted, False)], (CHAT,), [2.0], 3, (8.0, 2048.0))
    for sentence in ("is blended", "batch cap of 8.0", "it always drafts", "caps above 1024"):
        assert sum(sentence in note for note in told) == 1, sentence
    assert (
        caveats(
            deployment, [Arm("own", deployment, 1.0, drafted._replace(acceptances=()), True)], (CHAT,), [2.0], 3, (8.0,)
        )
        == []
    )


def test_the_solver_agrees_with_slsqp():
    def problem(x, shift, _=None):
        y = 3.0 * x - 1.5
        value = jnp.sum((y - shift) ** 2) + 0.3 * jnp.sum(y[1:] * y[:-1])
        return value, jnp.stack([jnp.sum(y**2) - 2.0, y[0] + y[1] - 0.4])

    shifts = np.asarray([0.2, 0.9, 1.4])
    found = minimise_within(problem, np.full((3, 5), 0.4), shifts)
    for lane, shift in enumerate(shifts):
        peer = minimize(
            lambda x, shift=shift: float(problem(jnp.asarray(x), shift)[0]),
            np.full(5, 0.4),
            bounds=[(0, 1)] * 5,
            constraints=[
                {"type": "ineq", "fun": lambda x, shift=shift: -np.asarray(problem(jnp.asarray(x), shift)[1])}
            ],
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        assert found.value[lane] == pytest.approx(peer.fun, rel=1e-4, abs=1e-6)
        assert found.violation[lane] < 1e-5 and found.complementarity[lane] < 1e-4
        assert found.stationarity[lane] < 1e-3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("classes:\n- name: a\n  share: 1\n  prompt_length: 10\n", "output_length is missing"),
        ("classes:\n- {name: a, prompt_length: 10, output_length: 0}", "output_length: got 0"),
        ("classes:\n- {name: a, prompt_length: ten, output_length: 5}", "prompt_length: got 'ten'"),
        ("classes:\n- {name: a, prompt: 10}", "got prompt; allowed: name"),
        ("[1, 2", "not YAML"),
        ("classes: 3", "got no list"),
        (
            "- {name: a, prompt_length: 1, output_length: 2}\n- {name: a, prompt_length: 1, output_length: 2}",
            "two entries",
        ),
        ("- {name: a, prompt_length: 1, output_length: 2, acceptance_rate: 70}", "acceptance_rate: got 70"),
        ("- {name: a, prompt_length: 1, output_length: 2, slo: ['ttft_p97<1']}", "unknown metric"),
    ],
)
def test_classes_that_cannot_be_read_are_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_classes(text)


def test_drafters_and_objectives_that_cannot_be_read_are_refused(deployment):
    for text, sentence in (
        ("- {name: a, model: m.json, drafter_params: 1}", "model and drafter_params"),
        ("- {name: a, acceptance_rate: 0.5, position_acceptance: 0.5}", "one of them"),
        ("- {name: a, model: m.json}", "path of a fitted model"),
    ):
        with pytest.raises(InputError, match=sentence):
            parse_drafters(text)
    for text in ("e2e", "2*", "0*e2e_mean", "throughput", "e*e2e_mean", "1-2*e2e_mean"):
        with pytest.raises(InputError):
            parse_objective(text)
    stranger = DrafterChoice("x", by_class={"poetry": ConstantAcceptance(0.5)})
    with pytest.raises(InputError, match="allowed classes: chat, code"):
        optimize_jointly(deployment, loads=[1.0], classes=(CHAT, CODE), drafters=(stranger,))
    for classes, sentence in (((CHAT, CHAT), "each once"), ((CODE,), "shares that sum to 0.3")):
        with pytest.raises(InputError, match=sentence):
            optimize_jointly(deployment, loads=[1.0], classes=classes)
    with pytest.raises(InputError, match="increasing"):
        optimize_jointly(deployment, loads=[2.0, 1.0], classes=(CHAT,))


def test_the_command_decides_jointly(deployment, tmp_path, capsys):
    assert main(["optimize", "--template"]) == 0
    first, second = capsys.readouterr().out.split("---\n")
    assert CLASSES_EXAMPLE in first and DRAFTERS_EXAMPLE in second
    assert [one.name for one in parse_classes(first)] == ["chat", "code"]
    (tmp_path / "classes.yaml").write_text(
        "- {name: chat, share: 7, prompt_length: 300, output_length: 200}\n"
        "- {name: code, share: 3, prompt_length: 800, output_length: 100, slo: ttft_mean<0.075}\n"
    )
    (tmp_path / "drafters.yaml").write_text(second.split("- name: eagle trees")[0])
    model = FittedModel({deployment.name: deployment}, "0" * 64, {})
    for name in ("model.json", "eagle.json"):
        (tmp_path / name).write_text(model.to_json())
    command = ["optimize", str(tmp_path / "model.json"), "--arrival-rate", "2,12", "--max-draft-length", "5"]
    command += ["--classes", str(tmp_path / "classes.yaml"), "--drafters", str(tmp_path / "drafters.yaml")]
    command += ["--batch-caps", "8,48", "--acceptance-rate", "0.8"]
    assert main([*command, "--out", str(tmp_path / "answer.json"), "--plot", str(tmp_path / "a.svg")]) == 0
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    assert "joint decision by load" in shown and "what each class gets" in shown
    told = json.loads((tmp_path / "answer.json").read_text())
    assert told["drafters"] == ["small", "large", "eagle"] and [entry["load"] for entry in told["table"]] == [2.0, 12.0]
    assert set(told["table"][0]["draft_lengths"]) == {"chat", "code"}
    assert main([*command, "--prompt-length", "10"]) == 2
    assert main([*command, "--risk", "0.9"]) == 2 and "does not tell how sure" in capsys.readouterr().err
    assert main(["optimize", str(tmp_path / "model.json"), "--concurrency", "4", "--batch-caps", "8,16"]) == 2
    assert "closed loop" in capsys.readouterr().err
    configs = Path(__file__).parents[1] / "data" / "configs"
    before = ["optimize", "--verifier", str(configs / "llama-3.1-8b.json"), "--hardware", "h200", *command[2:8]]
    before += ["--drafter", str(configs / "llama-3.2-1b.json"), "--acceptance-rate", "0.8", "--json"]
    assert main(before) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["outcome"] == "successful" and told["memory"]["fits"] and told["assumptions"]
    assert main([*command, "--capture-sizes", "1,2"]) == 2
    assert "got --capture-sizes" in capsys.readouterr().err
