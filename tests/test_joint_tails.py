"""The joint decision with percentiles, goodput and energy: against every whole point, predicted one by one."""

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SERVER_STEP

from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.before_traces import before_traces
from diffspec.architecture import read_architecture
from diffspec.cli import main
from diffspec.configuration import Configuration
from diffspec.first_principles import FirstPrinciples
from diffspec.fitting.deployment import FittedDeployment, FittedModel
from diffspec.hardware import accelerator
from diffspec.lengths import Lengths
from diffspec.optimizing.catalogue import RequestClass
from diffspec.optimizing.joint import optimize_jointly
from diffspec.optimizing.joint_question import read_joint_question
from diffspec.optimizing.joint_search import Ranges
from diffspec.optimizing.limits import parse_limit
from diffspec.optimizing.optimize import optimize_unmeasured
from diffspec.percentiles import class_laws
from diffspec.programs import FAST_COMPILE
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.workload import Workload

CHAT = RequestClass("chat", 0.7, 300.0, 200.0, acceptance=ConstantAcceptance(0.65))
CODE = RequestClass("code", 0.3, 800.0, 100.0, acceptance=ConstantAcceptance(0.9))
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
LONGEST, LOAD, CAP = 4, 12.0, 48.0
PERCENT = jnp.asarray([95.0])


@pytest.fixture(scope="module")
def deployment():
    serving = jax.tree.map(jnp.asarray, ServingModel(SERVER_STEP, first_token_steps=1.5))
    defaults = {"max_batch_size": CAP, "drafter_params": 1e9}
    measured = {"draft_lengths": [0, 1, 3, 5], "arrival_rate": [1.0, 20.0], "concurrency": None}
    measured |= {"prompt_length": [100.0, 2000.0], "output_length": [50.0, 400.0]}
    return FittedDeployment("synthetic", "roofline", serving, None, defaults, measured, {"rows": 1})


@pytest.fixture(scope="module")
def every(deployment):
    """Of every whole point (lengths, mean e2e, p95 of e2e of all, p95 of ttft of code, goodput): requests with a ttft
    below 0.05 and, of chat, a tpot below 0.006."""

    def point(lengths):
        workloads = [
            Workload(one.prompt_length, one.output_length, arrival_rate=LOAD * one.share) for one in (CHAT, CODE)
        ]
        configs = [Configuration(lengths[c], one.acceptance, max_batch_size=CAP) for c, one in enumerate((CHAT, CODE))]
        found = deployment.serving.predict_classes(workloads, configs)
        laws = class_laws(deployment.serving, workloads, configs, Lengths.stacked([0.0, 0.0]), states=64)
        laws = laws.at_means({"ttft": found.ttft, "e2e": found.e2e_latency})
        first = laws.probability("ttft", jnp.full(2, 0.05))
        after = laws.probability("tpot", jnp.full(2, 0.006))
        return (
            found.e2e_latency @ jnp.asarray([0.7, 0.3]),
            laws.percentiles_of_all("e2e", PERCENT)[0],
            laws.percentiles("ttft", PERCENT)[1, 0],
            LOAD * (0.7 * first[0] * after[0] + 0.3 * first[1]),
        )

    lengths = np.asarray(list(itertools.product(range(LONGEST + 1), repeat=2)), dtype=float)
    columns = jax.jit(lambda points: jax.lax.map(point, points), compiler_options=FAST_COMPILE)(lengths)
    return list(zip(map(tuple, lengths.astype(int).tolist()), *(np.asarray(column) for column in columns), strict=True))


def decide(deployment, bounds=(), load=LOAD, **asked):
    """The joint decision; ``bounds``: limits of chat and of code."""
    classes = [
        RequestClass(**{**vars(one), "limits": tuple(parse_limit(text, ALLOWED) for text in texts)})
        for one, texts in itertools.zip_longest((CHAT, CODE), bounds, fillvalue=())
    ]
    answer = optimize_jointly(deployment, loads=[load], classes=classes, max_draft_length=LONGEST, **asked)
    json.dumps(answer, allow_nan=False)
    return answer


ALLOWED = ("ttft_p95", "ttft", "tpot")


@pytest.fixture(scope="module")
def limited(deployment, every):
    """A limit on a percentile that the best point without it breaks, and the answer under it."""
    best = min(every, key=lambda row: row[1])
    kept = sorted(row[3] for row in every if row[3] < best[3])
    bound = 1.0001 * float(kept[len(kept) // 2])
    return bound, decide(deployment, bounds=[(), [f"ttft_p95<{bound!r}"]])


def test_a_limit_on_a_percentile_of_a_class_is_kept_by_the_best_of_all(limited, every):
    bound, answer = limited
    (entry,) = answer["table"]
    best = min((row for row in every if row[3] <= bound), key=lambda row: row[1])
    assert entry["feasible"] and entry["exhaustive"] and tuple(entry["draft_lengths"].values()) == best[0]
    assert entry["objective"] == pytest.approx(best[1], rel=1e-9)
    assert entry["metrics"]["code"]["ttft_p95"] == pytest.approx(best[3], rel=1e-9)
    assert entry["metrics"]["all"]["ttft_p95"] < entry["metrics"]["code"]["ttft_p95"]
    assert entry["headroom"] == pytest.approx(
        min(1 - best[3] / bound, 1 - entry["metrics"]["all"]["utilization"]), abs=1e-9
    )


@pytest.mark.slow
def test_the_shadow_price_of_a_percentile_is_the_derivative_of_the_optimum(deployment, limited):
    bound, answer = limited
    (entry,) = answer["table"]
    (price,) = entry["shadow_prices"]
    assert price["active"] and entry["relaxed"]["violation"] < 1e-4
    ends = [
        decide(deployment, bounds=[(), [f"ttft_p95<{bound * factor!r}"]])["table"][0]["relaxed"]["objective"]
        for factor in (0.995, 1.005)
    ]
    assert price["elasticity"] == pytest.approx((ends[0] - ends[1]) / ends[0] / 0.01, rel=0.05)


@pytest.mark.slow
def test_a_percentile_of_all_requests_is_made_small(deployment, every):
    (entry,) = decide(deployment, objective="e2e_p95")["table"]
    best = min(every, key=lambda row: row[2])
    assert tuple(entry["draft_lengths"].values()) == best[0]
    assert entry["objective"] == pytest.approx(best[2], rel=1e-9)
    assert entry["metrics"]["all"]["e2e_p95"] == pytest.approx(best[2], rel=1e-9)
    assert entry["relaxed"]["objective"] <= best[2] * (1 + 1e-9)


@pytest.mark.slow
def test_goodput_counts_requests_that_keep_the_limits_of_all_and_of_their_class(deployment, every):
    (entry,) = decide(deployment, bounds=[["tpot<0.006"]], objective="goodput", slo=["ttft<0.05"])["table"]
    most = max(row[4] for row in every)
    level = [row for row in every if row[4] >= most * (1 - 2e-3)]
    chosen = next(row for row in level if row[0] == tuple(entry["draft_lengths"].values()))
    assert entry["objective"] == pytest.approx(chosen[4], rel=1e-6)
    assert entry["metrics"]["all"]["goodput"] == pytest.approx(chosen[4], rel=1e-6)
    assert entry["metrics"]["chat"]["goodput"] + entry["metrics"]["code"]["goodput"] == pytest.approx(
        chosen[4], rel=1e-6
    )


def test_what_cannot_be_kept_is_nearest_by_its_percentile(deployment, every):
    """By brute force over all whole points."""
    answer = decide(deployment, bounds=[(), ["ttft_p95<0.001"]])
    (entry,) = answer["table"]
    (broken,) = entry["violations"].items()
    least = min(every, key=lambda row: row[3])
    assert answer["outcome"] == "infeasible" and broken[0] == "code: ttft_p95<0.001"
    assert tuple(entry["draft_lengths"].values()) == least[0]
    assert broken[1]["bound"] == 0.001 and broken[1]["value"] == pytest.approx(least[3], rel=1e-9)
    assert broken[1]["excess"] == pytest.approx(least[3] / 0.001 - 1.0, rel=1e-9)


@pytest.mark.slow
def test_the_nearest_by_a_percentile_is_not_that_of_the_smallest_tail(deployment, every):
    """Nearly every request takes longer than 0.3 s, and the share of those that do tells another point."""
    (entry,) = decide(deployment, slo=["e2e_p95<0.3"])["table"]
    least = min(every, key=lambda row: row[2])
    assert tuple(entry["draft_lengths"].values()) == least[0]
    assert entry["violations"]["e2e_p95<0.3"]["value"] == pytest.approx(least[2], rel=1e-9)


@pytest.mark.slow
def test_goodput_that_nobody_keeps_is_no_answer(deployment):
    answer = decide(deployment, bounds=[["tpot<0.006"]], objective="goodput", slo=["ttft<0.000001"])
    assert answer["outcome"] == "infeasible" and answer["table"][0]["violations"]["goodput"]["value"] < 1e-6


@pytest.mark.slow
def test_a_chain_as_long_as_the_cap_knows_any_batch(deployment):
    """A cap of 64 fills to 0.9 and its percentiles are known."""
    entry = decide(deployment, objective="e2e_p95", batch_caps=[64.0], load=36.0)["table"][0]
    batch = 36.0 * (entry["metrics"]["all"]["e2e_mean"])
    assert entry["feasible"] and batch > 0.9 * 64 and entry["objective"] > entry["metrics"]["all"]["e2e_mean"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"objective": "goodput"}, "goodput: got no limit that a request must keep"),
        ({"slo": ["ttft<0.5"]}, "which only goodput counts"),
        ({"objective": "e2e_p97"}, "did you mean 'e2e_p9"),
        ({"objective": "energy"}, "energy: neither the fit"),
        ({"objective": "goodput+e2e_mean"}, "objective: got 'goodput'"),
        ({"objective": "goodput", "slo": ["ttft>0.5"]}, "allowed: an upper limit"),
        ({"slo": ["e2e_p95>0.5"]}, "a percentile is limited from above"),
        ({"slo": ["memory<72"]}, "memory: neither the fit nor the question"),
        ({"slo": ["memory>72"]}, "memory is limited from above, in GB"),
    ],
)
def test_what_means_nothing_is_refused(deployment, asked, sentence):
    with pytest.raises(InputError, match=sentence):
        optimize_jointly(deployment, loads=[LOAD], classes=(CHAT, CODE), **asked)


def test_limits_on_single_requests_of_a_class_and_of_all_are_the_stricter_one():
    limited = [RequestClass(**{**vars(CHAT), "limits": (parse_limit("ttft<0.3", ALLOWED),)}), CODE]
    asked = {"ranges": Ranges(4, (CAP,)), "loads": [LOAD], "replicas": [1], "risk": None, "objective": "goodput"}
    tails = read_joint_question(limited, slo=["ttft<0.5", "ttft<0.7"], **asked).tails(1.0)
    assert tails.within == ("ttft",) and np.asarray(tails.within_bounds).tolist() == [[0.3, 0.5]]
    short = RequestClass("one", 0.3, 50.0, 1.0)  # a class of one token each may be there
    chat = RequestClass(**{**vars(CHAT), "limits": (parse_limit("tpot<0.1", ALLOWED),)})
    mixed = read_joint_question([chat, short], slo=[], **asked).tails(1.0)
    assert np.asarray(mixed.within_bounds).tolist() == [[0.1, np.inf]]
    timed = RequestClass(**{**vars(short), "limits": (parse_limit("tpot<0.1", ALLOWED),)})
    with pytest.raises(InputError, match="output_length 1 of class 'one'"):
        read_joint_question([CHAT, timed], slo=[], **asked)


def test_no_speculation_and_drafts_share_a_server_in_percentiles():
    workloads = [Workload(300, 50, arrival_rate=2.0), Workload(300, 50, arrival_rate=2.0)]
    configs = [Configuration(), Configuration(3.0, ConstantAcceptance(0.7))]

    def share(model):
        laws = class_laws(model, workloads, configs, Lengths.stacked([0.0, 0.0]), states=64)
        return laws.probability("e2e", jnp.full(2, 0.3))

    plain, drafted = jax.jit(share, compiler_options=FAST_COMPILE)(ServingModel(SERVER_STEP, first_token_steps=1.5))
    assert 0.0 <= plain < drafted <= 1.0


@pytest.mark.slow
def test_energy_of_classes_that_are_alike_is_that_of_one_workload():
    """As `optimize` tells it of one workload, whose batch while the server works differs by a rounding of means."""
    verifier, drafter = (read_architecture(CONFIGS / f"llama-3.{name}.json") for name in ("1-8b", "2-1b"))
    subject = before_traces(FirstPrinciples(verifier, accelerator("h100"), drafter))
    asked = {"loads": [2.0], "objective": "energy", "max_draft_length": 3}
    lengths = {"prompt_length": subject.pair.prompt_length, "output_length": subject.pair.output_length}
    alone = optimize_unmeasured(subject, acceptance=ConstantAcceptance(0.7), **asked, **lengths)
    halves = [RequestClass(name, 0.5, *lengths.values(), acceptance=ConstantAcceptance(0.7)) for name in ("a", "b")]
    (entry,), (expected,) = optimize_jointly(subject.deployment, classes=halves, **asked)["table"], alone["table"]
    assert entry["common"]["draft_length"] == expected["draft_length"]
    assert entry["common"]["objective"] == pytest.approx(expected["metrics"]["energy"], rel=1e-3)


@pytest.mark.slow
def test_memory_bounds_the_batch_cap_and_has_a_price():
    """Two classes whose requests hold 400 tokens each: memory by hand, the largest cap that keeps it, its shadow price
    by differences of the relaxed optimum, and how far the nearest point is from an impossible limit."""
    verifier, drafter = (read_architecture(CONFIGS / f"llama-3.{name}.json") for name in ("1-8b", "2-1b"))
    subject = before_traces(FirstPrinciples(verifier, accelerator("h100"), drafter))
    rate, plan = ConstantAcceptance(0.8), subject.plan
    classes = (
        RequestClass("a", 0.7, 300.0, 200.0, acceptance=rate),
        RequestClass("b", 0.3, 350.0, 100.0, acceptance=rate),
    )

    def decided(bound):
        asked = {"loads": [20.0], "batch_caps": (8.0, 16.0, 32.0, 64.0), "max_draft_length": 3}
        return optimize_jointly(subject.deployment, classes=classes, slo=[f"memory<{bound!r}"], **asked)["table"][0]

    def gigabytes(cap):
        weights = plan.verifier_bytes + plan.drafter_bytes + plan.activation_bytes + plan.reserve_bytes
        return (weights + cap * 400.0 * (plan.kv_bytes_per_token + plan.drafter_kv_bytes_per_token)) / 1e9

    bound = gigabytes(36.5)  # at a whole cap waiting has a kink
    entry, free = decided(bound), decided(80.0)
    assert entry["max_batch_size"] == 32.0 < free["max_batch_size"] and entry["objective"] > free["objective"]
    assert entry["metrics"]["all"]["memory"] == pytest.approx(gigabytes(32.0), rel=1e-9)
    assert entry["relaxed"]["max_batch_size"] == pytest.approx(36.5, rel=1e-3)
    low, high = (decided(bound * factor)["relaxed"]["objective"] for factor in (0.999, 1.001))
    (price,) = entry["shadow_prices"]
    assert price["active"] and price["elasticity"] == pytest.approx(math.log(low / high) / 0.002, rel=0.1)
    broken = decided(15.0)["violations"]["memory<15"]
    assert broken["value"] > gigabytes(8.0) - (plan.drafter_bytes + 1e9) / 1e9 > 15.0
    assert broken["excess"] == pytest.approx(broken["value"] / 15.0 - 1.0, rel=1e-9)


def test_on_the_command_line(deployment, limited, tmp_path, capsys):
    bound, answer = limited
    (tmp_path / "model.json").write_text(FittedModel({deployment.name: deployment}, "0" * 64, {}).to_json())
    text = f"""classes:
- {{name: chat, share: 0.7, prompt_length: 300, output_length: 200, acceptance_rate: 0.65}}
- {{name: code, share: 0.3, prompt_length: 800, output_length: 100, acceptance_rate: 0.9, slo: [ttft_p95<{bound!r}]}}
"""
    (tmp_path / "classes.yaml").write_text(text)
    asked = ["optimize", str(tmp_path / "model.json"), "--classes", str(tmp_path / "classes.yaml")]
    assert main([*asked, "--arrival-rate", str(LOAD), "--max-draft-length", str(LONGEST), "--json"]) == 0
    entry, expected = json.loads(capsys.readouterr().out)["table"][0], answer["table"][0]
    assert entry["draft_lengths"] == expected["draft_lengths"]
    assert entry["metrics"]["code"]["ttft_p95"] == pytest.approx(expected["metrics"]["code"]["ttft_p95"], rel=1e-9)
