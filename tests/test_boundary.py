"""Maps of what speculation gains: contours against closed forms and scipy, points against the simulator, bad input."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, predict
from scipy.optimize import brentq
from test_cli_main import files_in, run, toy_deployment, toy_model

from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.before_traces import before_traces
from diffspec.architecture import Transformer
from diffspec.boundaries.axes import make_axis, parse_axis
from diffspec.boundaries.boundary import boundary
from diffspec.boundaries.tracing import contours, line_roots
from diffspec.drafters import DraftCost
from diffspec.first_principles import FirstPrinciples
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.hardware import accelerator
from diffspec.results import InputError, NoResultError
from diffspec.serving import ServingModel
from diffspec.simulating import Engine, simulate
from diffspec.step_time import AffineStepTime
from diffspec.workload import Workload

# --- tracing: functions with known contours ---------------------------------------------------------------------------

NODES = (np.linspace(0.0, 1.0, 8), np.linspace(0.0, 1.0, 11))


def traced(gap, nodes=NODES):
    roots = line_roots(gap, nodes)
    lines, worst, broken = contours(gap, nodes, roots)
    assert broken == 0
    return roots, lines, worst


def lengths(lines):
    return sorted(float(np.hypot(*np.diff(line, axis=0).T).sum()) for line in lines)


def test_a_circle_is_one_closed_line_of_exact_points():
    roots, lines, worst = traced(lambda u, v: 0.3**2 - (u - 0.45) ** 2 - (v - 0.52) ** 2)
    (line,) = lines
    assert np.array_equal(line[0], line[-1]) and worst < 1e-9
    assert_close(np.hypot(*(line - [0.45, 0.52]).T), 0.3, rtol=1e-9)
    assert lengths(lines)[0] == pytest.approx(2 * math.pi * 0.3, rel=0.01)
    assert roots.exact.all() and set(roots.along) == {0, 1}


def test_several_lines_are_told_apart():
    def gap(u, v):
        rings = (u - 0.25) ** 2 + (v - 0.3) ** 2 - 0.15**2, (u - 0.75) ** 2 + (v - 0.7) ** 2 - 0.2**2
        return rings[0] * rings[1]

    _, lines, worst = traced(gap)
    assert len(lines) == 2 and worst < 1e-9
    assert_close(lengths(lines), [2 * math.pi * 0.15, 2 * math.pi * 0.2], rtol=0.02)


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_a_saddle_is_joined_by_the_sign_in_its_middle(side):
    """(u-1/2)(v-1/2) = +-0.001: two hyperbolas, whose cell in the middle has four roots."""
    nodes = (np.linspace(0.0, 1.0, 6),) * 2
    _, lines, worst = traced(lambda u, v: (u - 0.5) * (v - 0.5) - side * 0.001, nodes)
    assert len(lines) == 2 and worst < 1e-9
    for line in lines:
        assert np.all(np.sign(line - 0.5) == np.sign(line[0] - 0.5)), "a line stays in its quadrant"
        assert_close((line[:, 0] - 0.5) * (line[:, 1] - 0.5), side * 0.001, rtol=1e-6)


def test_a_jump_is_no_contour_and_a_line_ends_where_there_is_no_value():
    roots, lines, _ = traced(lambda u, v: np.where(u > 0.437, 1.0, -1.0))
    assert not roots.exact.any() and lines == []
    assert_close(roots.points[:, 0], 0.437, rtol=1e-9)
    _, (line,), _ = traced(lambda u, v: np.where(u < 0.6, v - u, np.nan))
    assert line[:, 0].max() < 0.6 and line[:, 0].min() == 0.0
    assert_close(line[:, 0], line[:, 1], rtol=1e-9)


def test_a_side_with_two_roots_is_seen():
    """A band narrower than a cell, both of whose edges cross the same sides."""
    _, lines, _ = traced(lambda u, v: 0.08 - np.abs(u - 0.5), (np.linspace(0.0, 1.0, 4),) * 2)
    assert len(lines) == 2
    assert sorted(round(float(line[:, 0].mean()), 9) for line in lines) == [0.42, 0.58]


# --- closed forms -----------------------------------------------------------------------------------------------------

VERIFY, PASS = 0.02, 0.005
LONG = {"prompt_length": 10.0, "output_length": 1e6}


def deployment(step_time, **changes):
    """A toy deployment with a step time of ours: no caps, nothing outside the step."""
    serving = ServingModel(step_time)
    return dataclasses.replace(toy_deployment(), serving=serving, defaults={}, **changes)


SERIAL = deployment(AffineStepTime(verify_base=VERIFY, draft=DraftCost(pass_base=PASS)))


@pytest.fixture(scope="module")
def by_size():
    axes = {"drafter_scale": [0.25, 0.5, 1.0, 2.0, 3.0], "acceptance_rate": np.linspace(0.02, 0.98, 7)}
    return boundary(SERIAL, axes, concurrency=1, draft_length=1, quantity="tpot", **LONG)


def test_one_drafted_token_pays_above_the_cost_ratio(by_size):
    """Leviathan: k = 1 gains iff alpha > draft time over verify time; here to the renewal term of 1e6 tokens."""
    points = np.concatenate([np.asarray(line) for line in by_size["contours"]])
    assert len(points) > 10 and by_size["largest_residual"] < 1e-9
    assert_close(points[:, 1], points[:, 0] * PASS / VERIFY, rtol=3e-6)
    for entry in by_size["crossings"]:
        size, rate = (
            (entry["at"], entry["value"]) if entry["along"] == "acceptance_rate" else (entry["value"], entry["at"])
        )
        assert rate == pytest.approx(size * PASS / VERIFY, rel=3e-6)
        assert entry["gains"] == ("above" if entry["along"] == "acceptance_rate" else "below")
    assert {entry["along"] for entry in by_size["crossings"]} == {"acceptance_rate", "drafter_scale"}


def moments(alpha, k):
    survival = alpha ** np.arange(k + 1)
    return survival.sum(), ((2 * np.arange(k + 1) + 1) * survival).sum()


def test_break_even_acceptance_of_short_outputs_by_brentq():
    """The renewal count of 33 tokens counts: the judge is scipy on the formula, written again."""
    axes = {"output_length": [9.0, 33.0, 65.0], "acceptance_rate": [0.1, 0.4, 0.9]}
    found = boundary(SERIAL, axes, concurrency=1, draft_length=3, prompt_length=10.0, draws=0)

    def gap(alpha, output):
        m1, m2 = moments(alpha, 3)
        return (output - 1 + 0.5 * (m2 / m1 - 1)) / m1 * (VERIFY + 3 * PASS) - (output - 1) * VERIFY

    told = {entry["at"]: entry["value"] for entry in found["crossings"] if entry["along"] == "acceptance_rate"}
    assert sorted(told) == [9.0, 33.0, 65.0]
    for output, rate in told.items():
        assert rate == pytest.approx(brentq(gap, 0.1, 0.99, args=(output,), xtol=1e-14), rel=1e-9)


def test_draft_length_can_gain_between_two_break_evens():
    """A block drafter: too short a draft does not pay for the block, too long a one costs more than it earns."""
    block, token, alpha = 0.022, 0.006, 0.8
    step = AffineStepTime(verify_base=VERIFY, verify_query=token, draft=DraftCost(block_base=block))
    axes = {"draft_length": np.arange(1.0, 17.0, 3.0), "acceptance_rate": [0.5, alpha, 0.85]}
    found = boundary(deployment(step), axes, concurrency=1, quantity="tpot", **LONG, draws=0)
    told = [entry for entry in found["crossings"] if entry["along"] == "draft_length" and entry["at"] == alpha]
    assert [entry["gains"] for entry in told] == ["above", "below"]

    def gap(k):  # E(k) = (1 - alpha^(k+1))/(1 - alpha), also between whole k
        return (1 - alpha ** (k + 1)) / (1 - alpha) * (VERIFY + token) - (VERIFY + token * (k + 1) + block)

    judged = brentq(gap, 1.0, 5.0), brentq(gap, 5.0, 16.0)
    assert_close([entry["value"] for entry in told], judged, rtol=1e-5)
    assert found["draft_length"] is None and found["best_draft_length"] is None
    assert all(zone == "loss" for zone in found["zone"][0])


# --- under load: saturation, the simulator, brute force -------------------------------------------------------------

LOADED = AffineStepTime(verify_base=0.02, verify_query=5e-4, prefill_token=1e-5, draft=DraftCost(pass_base=2e-3))
CHAT = {"prompt_length": 100.0, "output_length": 101.0}
SERVER = dataclasses.replace(deployment(LOADED), defaults={"max_batch_size": 64.0})
RATES = [2.0, 4.0, 6.0, 8.0, 9.5, 11.0, 12.5, 13.5, 20.0]


@pytest.fixture(scope="module")
def loaded():
    axes = {"arrival_rate": RATES, "acceptance_rate": [0.3, 0.45, 0.6, 0.75, 0.9]}
    return boundary(SERVER, axes, draft_length=3, **CHAT, draws=0)


@jax.jit
def _latencies(rate, alpha, k):
    def one(length):
        config = SERVER.configuration(length, acceptance=ConstantAcceptance(alpha))
        found = SERVER.serving.predict(Workload(**CHAT, arrival_rate=rate), config)
        return found.e2e_latency, found.utilization

    return jax.vmap(one)(jnp.stack([k, jnp.zeros(())]))


def gain_of(rate, alpha, k=3):
    """Speedup by the model itself, one point at a time; 0 where speculation saturates."""
    (drafting, plain), (use, _) = _latencies(*(jnp.asarray(value, dtype=float) for value in (rate, alpha, k)))
    return 0.0 if use > 0.999 else float(plain / drafting)


def simulated_gain(rate, alpha, k=3):
    load = Workload(**CHAT, arrival_rate=rate)
    asked = {"n_requests": 1000, "replications": 4, "seed": 3}
    plain = simulate(LOADED, load, Engine(max_batch_size=64), **asked)
    drafting = simulate(LOADED, load, Engine(k, (alpha,) * k, max_batch_size=64), **asked)
    return plain.mean("e2e").value / drafting.mean("e2e").value


def test_zones_are_those_of_both_capacities(loaded):
    """A cap of 64 requests: a server saturates at 64/residence(64), here with scipy-free arithmetic."""

    def capacity(k, alpha):
        m1, m2 = moments(alpha, k)
        step = 0.02 + 64 * (k + 1) * 5e-4 + k * 2e-3
        others = 63.0
        steps = (100 + 0.5 * (m2 / m1 - 1)) / m1 + others / (1 + others)
        return 64 / (steps * step + 1e-5 * 100 * 64)

    kinds = set()
    for row, alpha in enumerate(loaded["axes"][1]["values"]):
        for column, rate in enumerate(RATES):
            plain, drafting = rate > 0.999 * capacity(0, alpha), rate > 0.999 * capacity(3, alpha)
            zone = loaded["zone"][row][column]
            expected = {(1, 1): "saturated", (1, 0): "gain_by_capacity", (0, 1): "loss_by_capacity"}
            assert zone == expected.get((plain, drafting), zone) and (plain or drafting) == (zone in expected.values())
            assert (loaded["gain"][row][column] is None) == (plain or drafting)
            kinds.add(zone)
    assert kinds == {"gain", "loss", "gain_by_capacity", "loss_by_capacity", "saturated"}
    assert sum(zone["share"] for zone in loaded["zones"].values()) == pytest.approx(1.0)
    ranges = loaded["zones"]["saturated"]["arrival_rate"]
    assert_close(ranges, [min(r for r, z in _points(loaded) if z == "saturated"), 20.0], rtol=1e-12)


def _points(answer):
    return [(rate, zone) for row in answer["zone"] for rate, zone in zip(RATES, row, strict=True)]


def test_the_crossings_are_where_brentq_finds_them(loaded):
    told = [
        entry for entry in loaded["crossings"] if entry["along"] == "arrival_rate" and entry["kind"] == "break_even"
    ]
    assert told
    for entry in told:

        def gap(rate, alpha=entry["at"]):
            return math.log(gain_of(rate, alpha))

        near = brentq(gap, 0.97 * entry["value"], 1.03 * entry["value"], xtol=1e-12)
        assert entry["value"] == pytest.approx(near, rel=1e-8)


def test_the_first_crossing_is_the_break_even_rate(loaded):
    told = [e["value"] for e in loaded["crossings"] if e["along"] == "arrival_rate" and e["at"] == 0.6]
    config = SERVER.configuration(3.0, acceptance=ConstantAcceptance(0.6))
    rate = jax.jit(lambda: SERVER.serving.breakeven_rate(Workload(**CHAT, arrival_rate=1.0), config))()
    assert min(told) == pytest.approx(float(rate), rel=1e-6)


def test_the_simulator_gains_and_loses_on_the_same_sides(loaded):
    """At points whose gain differs from 1 by 4 % or more, on both sides of the contour."""
    told = {
        (r, a): g
        for a, row in zip(loaded["axes"][1]["values"], loaded["gain"], strict=True)
        for r, g in zip(RATES, row, strict=True)
    }
    checked = [(4.0, 0.6), (4.0, 0.45), (9.5, 0.9), (6.0, 0.45)]
    signs = set()
    for rate, alpha in checked:
        gain = told[rate, alpha]
        assert gain is not None and abs(gain - 1) > 0.04
        assert simulated_gain(rate, alpha) == pytest.approx(gain, rel=0.05)
        signs.add(gain > 1)
    assert signs == {True, False}


def test_the_best_draft_length_is_that_of_brute_force():
    axes = {"arrival_rate": [2.0, 8.0, 11.0], "acceptance_rate": [0.3, 0.6, 0.9]}
    found = boundary(SERVER, axes, max_draft_length=4, **CHAT, draws=0)
    for row, alpha in enumerate([0.3, 0.6, 0.9]):
        for column, rate in enumerate([2.0, 8.0, 11.0]):
            gains = {k: gain_of(rate, alpha, k) for k in range(1, 5)}
            best = max(gains, key=lambda k: gains[k])
            assert found["best_draft_length"][row][column] == (best if gains[best] > 1 else 0)
            if gains[best] > 0:
                assert found["gain"][row][column] == pytest.approx(gains[best], rel=1e-9)
    assert {k for row in found["best_draft_length"] for k in row} >= {0, 1}


# --- before any trace: lengths, hardware, memory, energy ------------------------------------------------------------

VERIFIER = Transformer("8B", 32, 4096, 128256, 32, 8, 128, 14336)
DRAFTER = Transformer("1B", 16, 2048, 128256, 32, 8, 64, 8192, tied=True)
PAIR = FirstPrinciples(VERIFIER, accelerator("h100"), DRAFTER, prompt_length=1024.0, output_length=200.0)


def test_lengths_and_hardware_are_those_of_each_point():
    axes = {"hardware": ["h100", "rtx-5090"], "prompt_length": [512.0, 8192.0]}
    asked = {"concurrency": 4, "output_length": 200, "draft_length": 3, "acceptance": ConstantAcceptance(0.7)}
    found = boundary(before_traces(PAIR), axes, **asked, draws=0)
    assert found["deployment"] == "8B + 1B" and found["memory"] is None
    for column, name in enumerate(("h100", "rtx-5090")):
        for row, prompt in enumerate((512.0, 8192.0)):
            there = dataclasses.replace(PAIR, hardware=accelerator(name), prompt_length=prompt)
            load = Workload(prompt_length=prompt, output_length=200.0, concurrency=4)
            own = before_traces(there).deployment
            config = own.configuration(3.0, acceptance=ConstantAcceptance(0.7))
            drafting, plain = (predict(own.serving, load, c).e2e_latency for c in (config, config.plain()))
            assert found["gain"][row][column] == pytest.approx(float(plain / drafting), rel=1e-9)
    assert found["contours"] == [] and {entry["along"] for entry in found["crossings"]} <= {"prompt_length"}


def test_memory_and_energy_by_hand():
    axes = {"concurrency": [1.0, 8.0], "drafter_scale": [0.5, 2.0]}
    asked = {"prompt_length": 1024, "output_length": 200, "draft_length": 3, "acceptance": ConstantAcceptance(0.7)}
    found = boundary(before_traces(PAIR), axes, quantity="memory", **asked, draws=0)
    for column, n in enumerate((1.0, 8.0)):
        for row, scale in enumerate((0.5, 2.0)):
            tokens = n * (1024 + 100)
            plain = VERIFIER.weight_bytes + tokens * VERIFIER.kv_bytes_per_token()
            more = scale * DRAFTER.weight_bytes + tokens * DRAFTER.kv_bytes_per_token()
            assert found["gain"][row][column] == pytest.approx(plain / (plain + more), rel=1e-9)
    flat = dataclasses.replace(PAIR.hardware, idle_power=PAIR.hardware.power_limit)  # then energy is time
    subject = before_traces(dataclasses.replace(PAIR, hardware=flat))
    energy, served = (boundary(subject, axes, quantity=name, **asked, draws=0) for name in ("energy", "throughput"))
    energy, served = np.asarray(energy["gain"]), np.asarray(served["gain"])
    assert_close(energy[:, 0], served[:, 0], rtol=1e-9)
    assert_close(energy[:, 1], served[:, 1], rtol=5e-3)  # prompts of eight requests leave less than they decode
    assert np.ptp(energy) > 0.1


def test_a_drafter_that_does_not_fit_is_a_zone():
    pair = dataclasses.replace(PAIR, hardware=accelerator("l4"))
    axes = {"concurrency": [1.0, 2.0], "acceptance_rate": [0.5, 0.9]}
    asked = {"prompt_length": 100, "output_length": 100, "quantity": "memory", "max_draft_length": 3}
    found = boundary(before_traces(pair), axes, **asked, draws=0)
    assert any("best for memory alone" in line for line in found["warnings"])
    assert found["zones"]["does_not_fit"]["share"] == 1.0 and found["outcome"] == "does_not_fit"
    assert found["gain"] == [[None, None]] * 2 and found["crossings"] == []


# --- how sure ---------------------------------------------------------------------------------------------------------


def test_draws_tell_the_share_that_gains_and_the_interval_of_the_contour():
    """Draws of the draft pass alone: each one's break-even acceptance at k = 1 is its pass over the verification."""
    deviations = np.linspace(-0.5, 0.5, 21)[:, None]
    known = Uncertainty(
        method="randomised",
        paths=("step_time.draft.pass_base",),
        covariance=np.eye(1),
        prior=np.ones(1),
        misfit={},
        request_spread={},
        degrees_of_freedom=4.0,
        inflation={},
        draws=deviations,
    )
    axes = {"acceptance_rate": [0.02, 0.2, 0.28, 0.6], "drafter_scale": [0.8, 1.0]}
    subject = dataclasses.replace(SERIAL, uncertainty=known)
    found = boundary(subject, axes, concurrency=1, draft_length=1, quantity="tpot", **LONG, draws=21)["uncertainty"]
    ratios = np.exp(deviations[:, 0]) * PASS / VERIFY
    (told,) = [e for e in found["crossings"] if e["along"] == "acceptance_rate" and e["at"] == 1.0]
    assert found["draws"] == 21 and told["share"] == 1.0
    expected = np.quantile(ratios, [0.05, 0.5, 0.95], method="nearest")
    assert_close([told["low"], told["median"], told["high"]], expected, rtol=3e-6)
    assert_close(found["gaining_share"][1], [(rate > ratios).mean() for rate in (0.02, 0.2, 0.28, 0.6)], rtol=1e-12)
    assert boundary(SERIAL, axes, concurrency=1, draft_length=1, quantity="tpot", **LONG)["uncertainty"] is None


# --- what is refused --------------------------------------------------------------------------------------------------

TWO = {"arrival_rate": [1.0, 2.0], "acceptance_rate": [0.5, 0.9]}
BAD = [
    ({"axes": {"arrival_rate": [1, 2]}}, "got 1"),
    ({"axes": {"speed": [1, 2], "acceptance_rate": [0.5, 0.9]}}, "'speed'"),
    ({"axes": {"arrival_rate": [1, 2], "concurrency": [1, 2]}}, "one load"),
    ({"axes": TWO | {"acceptance_rate": [0.5, 1.5]}}, "got 1.5"),
    ({"axes": TWO | {"arrival_rate": [2.0, 1.0]}}, "increasing"),
    ({"axes": TWO | {"arrival_rate": [2.0]}}, "got 1 values"),
    ({"concurrency": 4}, "one of arrival_rate and concurrency"),
    ({"acceptance": ConstantAcceptance(0.5)}, "an axis moves it"),
    ({"draft_length": 0}, "got 0"),
    ({"draft_length": "longest"}, "'best'"),
    ({"quantity": "beauty"}, "'beauty'"),
    ({"quantity": "energy"}, "architecture"),
    ({"prompt_length": -5.0}, "got -5.0"),
    ({"axes": {"acceptance_rate": [0.5, 0.9], "draft_length": [1, 4]}}, "got none"),
    (
        {"axes": {"hardware": ["h100", "a100"], "acceptance_rate": [0.5, 0.9]}, "arrival_rate": 1},
        "cannot be transferred",
    ),
]


def test_the_time_per_token_of_one_token_is_refused():
    axes = {"output_length": [1.0, 8.0], "acceptance_rate": [0.2, 0.8]}
    with pytest.raises(InputError, match="no time per token after the first"):
        boundary(toy_deployment(), axes, quantity="tpot", arrival_rate=1.0, draft_length=2, draws=0)


@pytest.mark.parametrize(("changed", "sentence"), BAD)
def test_bad_questions_are_refused(changed, sentence):
    asked = {"axes": TWO} | changed
    with pytest.raises(InputError, match=sentence):
        boundary(toy_deployment(), asked.pop("axes"), **asked)


def test_without_plain_rows_there_is_no_gain():
    with pytest.raises(NoResultError, match="k = 0"):
        boundary(toy_deployment(draft_lengths=[2, 4]), TWO)


@pytest.mark.parametrize(
    "text", ["arrival_rate=1:0", "arrival_rate=a:b", "arrival_rate=1:2:-1", "hardware=abacus", "x=1:2"]
)
def test_bad_axes_are_refused(text):
    with pytest.raises(InputError):
        parse_axis(text)


def test_axes_as_they_are_written():
    assert parse_axis("arrival-rate=1:4:1")[1].values == (1.0, 2.0, 3.0, 4.0)
    assert parse_axis("prompt_length=128:2048", points=5)[1].values == (128.0, 256.0, 512.0, 1024.0, 2048.0)
    assert parse_axis("arrival_rate") == ("arrival_rate", None)
    axis = make_axis("max_batch_size", [1, 16, 256])
    assert_close(axis.value(axis.nodes), [1.0, 16.0, 256.0], rtol=1e-12)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_draws_and_tells(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    monkeypatch.setenv("COLUMNS", "140")
    model = toy_model(tmp_path / "m.json")
    asked = ("boundary", model, "--y", "acceptance_rate=0.3:0.9", "--points", "4", "--max-draft-length", "4")
    ran = run(*asked, "--out", tmp_path / "a.json", "--plot", tmp_path / "a.svg")
    assert ran.code == 0, ran.err
    assert all(word in ran.out for word in ("break-even acceptance_rate", "speculation is better", "k4", "zones"))
    assert files_in(tmp_path) == {"m.json", "a.json", "a.svg"} and b"<svg" in (tmp_path / "a.svg").read_bytes()
    answer = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    keys = {
        *("outcome", "deployment", "quantity", "draft_length", "max_draft_length", "axes", "fixed", "gain", "zone"),
        *(
            "best_draft_length",
            "zones",
            "crossings",
            "contours",
            "broken_joins",
            "tolerance",
            "largest_residual",
            "uncertainty",
        ),
        *("uncertainty_reason", "inside_measured_share", "outside_measured_fields", "warnings"),
    }
    assert set(answer) == keys and answer["uncertainty"] is None and answer["draft_length"] == "best"
    assert [axis["name"] for axis in answer["axes"]] == ["arrival_rate", "acceptance_rate"]
    assert len(answer["gain"]) == 4 and len(answer["gain"][0]) == 4
    ran = run(*asked, "--x", "arrival_rate=500,900", "--json", "--plot", tmp_path / "b.png")
    told = json.loads(ran.out)
    assert ran.code == 1 and told["outcome"] == "saturated" and set(told["zones"]) == {"saturated"}
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    for wrong in (
        ("--x", "arrival_rate=2:1"),
        ("--x", "acceptance_rate"),
        ("--hardware", "h100", "--x", "hardware=l4,a100"),
    ):
        ran = run(*asked, *wrong)
        assert ran.code == 2 and ran.out == "" and ran.err.startswith("error:"), wrong
