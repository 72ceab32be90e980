"""The simulator against closed forms of queueing theory, and against what may not get lost: time and tokens."""

from itertools import pairwise

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from diffspec.analysis.before_traces import before_traces
from diffspec.analysis.simulated import engine_of
from diffspec.architecture import Transformer
from diffspec.first_principles import FirstPrinciples
from diffspec.hardware import accelerator
from diffspec.results import InputError
from diffspec.simulating import (
    DraftSchedule,
    Engine,
    Lane,
    Requests,
    draw_arrivals,
    draw_requests,
    from_arrivals,
    replay,
    run_lanes,
    simulate,
)
from diffspec.step_time import AffineStepTime, DraftCost, RooflineStepTime
from diffspec.trees import Tree, TreeAcceptance
from diffspec.workload import Workload

PROMPT_ONLY = AffineStepTime(verify_base=0.01, prefill_token=0.01)
"""Requests of one output token are served by prefill alone, 0.01 s a prompt token: an engine of cap 1 is M/G/1."""
FLAT = AffineStepTime(verify_base=0.01, prefill_token=1e-9)
"""A step lasts 0.01 s whatever the batch: an engine of cap c is a queue with c servers."""
SHARED = AffineStepTime(verify_base=1e-9, verify_sequence=0.002, prefill_token=1e-9)
"""A step lasts 0.002 s for each sequence: processor sharing."""
SERVER = RooflineStepTime(
    weight_read=6e-3, token_compute=4e-5, kv_read=6e-8, prefill_token=2e-5, draft=DraftCost(pass_base=5e-4)
)
SPECULATIVE = Engine(3, (0.9, 0.7, 0.4), max_batch_size=16, max_batched_tokens=512, kv_capacity_tokens=2500)


def within(estimate, expected, most=0.02):
    """The interval holds the closed form, and is small enough to say something."""
    assert estimate.relative < most, (estimate, "the test needs more requests")
    assert abs(estimate.value - expected) <= 1.5 * estimate.half_width + 1e-3 * expected, (estimate, expected)


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize("law", ["fixed", "geometric"])
def test_one_server_waits_as_pollaczek_and_khinchine_say(load, law):
    """M/G/1: mean wait = rate*E[S^2]/(2*(1-load)); S is 10 tokens of 0.01 s, fixed (M/D/1) or geometric."""
    second = 100.0 if law == "fixed" else (2 - 0.1) / 0.1**2
    workload = Workload(10.0, 1.0, arrival_rate=load / 0.1)
    found = simulate(PROMPT_ONLY, workload, Engine(max_batch_size=1), n_requests=40000, prompt_law=law)
    within(found.mean("waiting"), load / 0.1 * second * 1e-4 / (2 * (1 - load)), 0.05)
    within(found.mean("e2e"), load / 0.1 * second * 1e-4 / (2 * (1 - load)) + 0.1, 0.05)
    within(found.rate(lambda lane: lane.busy_time), load)


def erlang_c(servers: int, load: float) -> float:
    """P(wait) of M/M/c with ``load`` = rate*service: Erlang's recursion."""
    blocking = 1.0
    for n in range(1, servers + 1):
        blocking = load * blocking / (n + load * blocking)
    return servers * blocking / (servers - load * (1 - blocking))


@pytest.mark.parametrize(("servers", "use"), [pytest.param(4, 0.6, marks=pytest.mark.slow), (16, 0.8)])
def test_many_servers_wait_as_erlang_says(servers, use):
    """M/M/c: geometric outputs, 1 + 50 steps, as good as exponential service; a request joins when a step begins."""
    service = 0.01 * 51
    rate = use * servers / service
    found = simulate(
        FLAT,
        Workload(1.0, 51.0, arrival_rate=rate),
        Engine(max_batch_size=servers),
        n_requests=8000,
        replications=16,
        output_law="geometric",
    )
    wait = erlang_c(servers, rate * service) * service / (servers * (1 - use))
    within(found.mean("waiting"), wait + 0.5 * 0.01, 0.12)


@pytest.mark.parametrize(
    "law", ["fixed", *(pytest.param(law, marks=pytest.mark.slow) for law in ("geometric", "lognormal"))]
)
def test_sharing_does_not_care_for_the_law_of_lengths(law):
    """M/G/1 processor sharing: mean sojourn = work/(1-load) for any law of lengths with the same mean."""
    workload = Workload(1.0, 51.0, arrival_rate=5.0, output_scv=2.0)
    found = simulate(SHARED, workload, Engine(), n_requests=4000, replications=16, output_law=law)
    assert found.mean("e2e").relative < 0.05
    assert found.mean("e2e").value == pytest.approx(0.1 / (1 - 0.5), rel=0.04)  # steps are not quite infinitesimal


def one_lane(engine=SPECULATIVE, n=600, rate=30.0, **more):
    requests = draw_requests(
        Workload(200.0, 60.0, arrival_rate=rate, output_scv=0.5),
        n,
        np.random.default_rng(1),
        output_law="lognormal",
        prompt_law="geometric",
    )
    return run_lanes(SERVER, [Lane(requests, engine, **more)])[0]


def test_time_and_tokens_are_conserved():
    """Little's law holds exactly on a whole run, every token comes out once, and memory pressure loses nothing."""
    found = one_lane()
    assert found.drained and len(found.e2e) == 600
    assert found.request_seconds == pytest.approx(found.e2e.sum(), rel=1e-9)
    assert found.seconds_at.sum() == pytest.approx(found.window, rel=1e-9)
    assert found.seconds_at @ np.arange(len(found.seconds_at)) == pytest.approx(found.request_seconds, rel=1e-9)
    assert found.emitted_tokens == found.events["output_tokens"].sum()
    assert found.events["preemptions"].sum() > 0, "the memory cap must bind for this test to say something"
    recomputed = found.prefilled_tokens - found.events["prompt_tokens"].sum()
    assert recomputed > 0
    assert found.sequence_steps == found.events["steps"].sum()
    first = 1 + found.events["preemptions"]  # every prefill, also of a recomputation, emits a token
    emitted = found.events["steps"] + found.events["accepted_tokens"] + first
    beyond = emitted - found.events["output_tokens"]  # the last step may emit more than is asked for
    assert np.all(beyond >= 0) and np.all(beyond[found.events["preemptions"] == 0] <= 3)


def test_events_come_in_order():
    found = one_lane()
    order = [found.events[f"{name}_time"] for name in ("arrival", "schedule", "first_token", "completion")]
    for early, late in pairwise(order):
        assert np.all(late >= early)
    assert np.all(np.diff(order[1]) >= 0), "first come, first served"


def test_the_caps_hold():
    """Never more running than the cap, never more tokens a step than the budget, never more cache than the memory."""
    requests = draw_requests(Workload(100.0, 40.0, concurrency=32), 200, np.random.default_rng(0))
    engine = Engine(2, (0.8,), max_batch_size=8, max_batched_tokens=64, kv_capacity_tokens=900)
    from diffspec.simulating import engine as compiled
    from diffspec.simulating import run

    data = run._allocate([Lane(requests, engine, concurrency=32)])
    duration, seen = np.full(1, 0.01), set()
    while compiled.advance(data, duration):
        whole, state = data.whole[0], data.state[0]
        assert whole[compiled.RUNNING] <= 8
        assert state[1] + state[3] <= 64
        assert whole[compiled.KV_USED] <= 900
        running = data.running[0, : whole[compiled.RUNNING]]
        held = data.tokens[0, running][:, [compiled.CONTEXT, compiled.PLANNED]].sum()
        assert held == whole[compiled.KV_USED]
        seen.add(state[1] > 0 and state[3] > 0)
    assert seen == {True, False}


def test_tokens_per_step_are_those_of_the_acceptance():
    """Accepted per drafted position follows the survival 0.9, 0.63, 0.252: E = 2.782; easier texts accept more."""
    found = simulate(SERVER, Workload(50.0, 400.0, arrival_rate=2.0), Engine(3, (0.9, 0.7, 0.4)), n_requests=200)
    steps = sum(lane.events["steps"].sum() for lane in found.lanes)
    accepted = sum(lane.events["accepted_tokens"].sum() for lane in found.lanes)
    assert accepted / steps == pytest.approx(0.9 + 0.63 + 0.252, rel=5e-3)
    abstaining = simulate(
        SERVER, Workload(50.0, 400.0, arrival_rate=2.0), Engine(3, (0.9, 0.7, 0.4), 0.25), n_requests=200
    )
    drafted = sum(lane.events["drafted_tokens"].sum() for lane in abstaining.lanes)
    assert drafted / sum(lane.events["steps"].sum() for lane in abstaining.lanes) == pytest.approx(0.75, rel=0.01)


def test_requests_differ_in_how_easily_they_are_drafted():
    rates = {}
    for spread in (0.0, 0.3):
        found = simulate(
            SERVER,
            Workload(50.0, 800.0, arrival_rate=1.0),
            Engine(1, (0.5,)),
            n_requests=100,
            replications=2,
            leniency_scv=spread,
        )
        rates[spread] = np.concatenate([lane.events["accepted_tokens"] / lane.events["steps"] for lane in found.lanes])
    assert np.std(rates[0.0]) < 0.03 < 0.15 < np.std(rates[0.3])
    assert rates[0.3].max() <= 1.0


def test_a_closed_loop_keeps_its_number_in_flight():
    found = simulate(SERVER, Workload(100.0, 50.0, concurrency=12), Engine(max_batch_size=8), n_requests=2000)
    assert found.requests_in_system.value == pytest.approx(12.0, rel=1e-3)
    assert found.effective_batch_size.value == pytest.approx(8.0, rel=0.02)
    assert found.throughput.value * found.mean("e2e").value == pytest.approx(12.0, rel=0.02)


def test_prefix_cache_and_chunks():
    """What is cached is not computed; a chunked prompt needs as many iterations as it has chunks."""
    alone = Requests(np.array([1000]), np.array([2]), np.array([0.0]))
    whole = run_lanes(SERVER, [Lane(alone, Engine(max_batched_tokens=100))])[0]
    assert (whole.iterations, whole.prefilled_tokens) == (11, 1000)
    half = run_lanes(SERVER, [Lane(alone, Engine(max_batched_tokens=100, prefix_hit_rate=0.5))])[0]
    assert (half.iterations, half.prefilled_tokens) == (6, 500)
    assert whole.ttft[0] == pytest.approx(2 * half.ttft[0])


def test_a_long_prompt_delays_the_others_tokens():
    """The gap of a decoding request holds the whole prompt of another one, or only a chunk of it."""
    requests = Requests(np.array([10, 2000]), np.array([200, 2]), np.array([0.0, 0.1]))
    longest = {}
    for budget in (None, 100):
        lane = run_lanes(SERVER, [Lane(requests, Engine(max_batched_tokens=budget))])[0]
        longest[budget] = lane.gap_edges[np.flatnonzero(lane.gaps)[-1]]
    assert longest[None] > 0.04 > 0.01 > longest[100]


def test_the_same_seed_gives_the_same_run_and_lanes_do_not_touch_each_other():
    workload = Workload(100.0, 50.0, arrival_rate=20.0)
    once = simulate(SERVER, workload, SPECULATIVE, n_requests=200, replications=3, seed=5)
    again = simulate(SERVER, workload, SPECULATIVE, n_requests=200, replications=3, seed=5)
    other = simulate(SERVER, workload, SPECULATIVE, n_requests=200, replications=3, seed=6)
    assert [list(lane.e2e) for lane in once.lanes] == [list(lane.e2e) for lane in again.lanes]
    assert once.mean("e2e") != other.mean("e2e")
    lane = Lane(draw_requests(workload, 100, np.random.default_rng(0)), Engine())
    alone, beside = run_lanes(SERVER, [lane])[0], run_lanes(SERVER, [lane, lane])[1]
    assert np.array_equal(alone.e2e, beside.e2e)


def test_overload_is_told():
    fast = simulate(SERVER, Workload(100.0, 50.0, arrival_rate=30.0), Engine(max_batch_size=4), n_requests=500)
    calm = simulate(SERVER, Workload(100.0, 50.0, arrival_rate=3.0), Engine(max_batch_size=4), n_requests=500)
    assert fast.saturated and not calm.saturated
    assert fast.summary()["metrics"]["waiting"]["mean"]["value"] > 1.0
    assert np.isfinite(fast.mean("e2e").value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Engine(2), "position_acceptance"),
        (lambda: Engine(1, (1.2,)), "0 to 1"),
        (lambda: Engine(max_batch_size=0), "max_batch_size"),
        (lambda: simulate_a_tree(), "a chain, not a tree"),
        (lambda: Requests(np.array([1]), np.array([0])), "output_tokens"),
        (lambda: Requests(np.array([1, 1]), np.array([1, 1]), np.array([1.0, 0.5])), "arrival_time"),
        (lambda: one_lane(Engine(kv_capacity_tokens=100)), "kv_capacity_tokens"),
        (lambda: simulate(SERVER, Workload(1.0, 1.0, arrival_rate=1.0), Engine(), n_requests=0), "n_requests"),
        (lambda: run_lanes(SERVER, [Lane(Requests(np.array([1]), np.array([1])), Engine())]), "concurrency"),
        (lambda: run_lanes(eqx.tree_at(lambda s: s.weight_read, SERVER, jnp.nan), [_lane()]), "step time"),
    ],
)
def test_bad_input_is_told(make, message):
    with pytest.raises(InputError, match=message):
        make()


def simulate_a_tree():
    """Its nodes beside the accepted path would be verified for nothing: it is refused, not taken for a chain."""
    tree = TreeAcceptance(Tree.regular(2, 3), jnp.array([[0.6, 0.2]]))
    pair = FirstPrinciples(Transformer("x", 2, 8, 32, 2, 1, 4, 16), accelerator("l4"), drafter_kind="head")
    deployment = before_traces(pair).deployment
    chain = TreeAcceptance(Tree.regular(1, 3), jnp.array([[0.6]]))
    engine = engine_of(deployment, Workload(8.0, 8.0, concurrency=1.0), deployment.configuration(3.0, acceptance=chain))
    assert engine.position_acceptance == pytest.approx((0.6, 0.6, 0.6))
    engine_of(deployment, Workload(8.0, 8.0, concurrency=1.0), deployment.configuration(3.0, acceptance=tree))


def _lane():
    return Lane(Requests(np.array([1]), np.array([5]), np.array([0.0])), Engine())


def test_a_trace_can_be_replayed():
    """A recorded run of two bursts: the second burst is as long as the first, whatever came before."""
    times = np.repeat([0.0, 100.0], 50)
    found = replay(SERVER, [Requests(np.full(100, 80), np.full(100, 20), times)], Engine(max_batch_size=16))
    assert found.lanes[0].e2e[:50] == pytest.approx(found.lanes[0].e2e[50:], rel=1e-9)
    assert found.mean("waiting").value > 0


# --- a draft length that follows the batch, and loads that change -----------------------------------------------------


@pytest.mark.parametrize("length", [0, 3])
def test_a_schedule_of_one_draft_length_is_that_draft_length(length):
    """The same requests and random numbers: every event at the same time."""
    rates = (0.9, 0.7, 0.4)[:length]
    plain = one_lane(Engine(length, rates, max_batch_size=16))
    told = one_lane(Engine(0, rates, max_batch_size=16, schedule=DraftSchedule([[1, 5, length], [6, 16, length]])))
    for name, values in plain.events.items():
        assert np.array_equal(values, told.events[name]), name


def test_the_draft_length_follows_the_decoding_sequences():
    """Played by hand: at every iteration the drafted tokens are those of the range, and of the band's memory."""
    from diffspec.simulating import engine as compiled
    from diffspec.simulating import run

    ranges, bands = [[1, 3, 3], [4, 8, 1], [9, 64, 0]], [(3, 5), (8, 10)]
    requests = draw_requests(Workload(20.0, 40.0, arrival_rate=30.0), 150, np.random.default_rng(3))
    for used in ((), bands):
        schedule = DraftSchedule(ranges, used)
        data = run._allocate([Lane(requests, Engine(0, (0.8,), max_batch_size=16, schedule=schedule))])
        duration, tier, seen, switches = np.full(1, 0.02), 0, set(), 0
        while compiled.advance(data, duration):
            decoding = int(data.state[0, 0])
            down, up = schedule.thresholds()
            before = tier
            while decoding > up[tier]:
                tier += 1
            while decoding < down[tier]:
                tier -= 1
            switches += tier != before
            if decoding:
                assert data.state[0, 5] == decoding * ranges[tier][2]
                assert data.state[0, 1] == decoding * (1 + ranges[tier][2])
                seen.add((decoding, tier))
        assert {tier for _, tier in seen} == {0, 1, 2}
        assert ({(4, 0), (3, 1)} <= seen) == bool(used), "only a band has a memory"
        assert data.whole[0, compiled.SWITCHES] == switches


def test_acceptance_may_depend_on_the_draft_length():
    """A lone request is always in the first range, with its own rates; beside it all are in the second."""
    own = {2: (0.9, 0.9), 4: (0.5,)}
    schedule = DraftSchedule([[1, 1, 2], [2, 64, 4]], position_acceptance=own)
    for concurrency, expected in ((1, 0.9 + 0.81), (8, 0.5 + 0.25 + 0.125 + 0.0625)):
        found = simulate(
            SERVER,
            Workload(50.0, 400.0, concurrency=concurrency),
            Engine(schedule=schedule),
            n_requests=100 * concurrency,
            replications=2,
        )
        lanes = [lane.events for lane in found.lanes]
        accepted, steps = (sum(events[name].sum() for events in lanes) for name in ("accepted_tokens", "steps"))
        assert accepted / steps == pytest.approx(expected, rel=0.02)


def test_a_loaded_drafter_reads_every_prompt():
    """At draft length 0 inside a schedule a prompt takes the drafter's time too; without a drafter it does not."""
    drafter = DraftCost(pass_base=5e-4, prefill_token=1e-5)
    server = eqx.tree_at(lambda s: s.draft, SERVER, drafter)
    alone = Requests(np.array([1000]), np.array([1]), np.array([0.0]))
    times = [
        float(run_lanes(server, [Lane(alone, Engine(0, (0.5,), schedule=DraftSchedule(ranges)))])[0].ttft[0])
        for ranges in ([[1, 64, 0]], [[1, 8, 0], [9, 64, 2]], [[1, 64, 2]])
    ]
    assert times == pytest.approx([0.02, 0.03, 0.03])


def test_arrivals_follow_a_changing_rate():
    """Counts in windows are Poisson with the integral of the rate: a ramp, a burst, and silence."""
    rates = [(0.0, 0.0), (10.0, 20.0), (10.0, 80.0), (12.0, 80.0), (12.0, 0.0), (15.0, 0.0), (20.0, 10.0)]
    runs = [draw_arrivals(rates, np.random.default_rng(seed)) for seed in range(200)]
    edges = [0.0, 5.0, 10.0, 12.0, 15.0, 20.0]
    counts = np.stack([np.histogram(run, edges)[0] for run in runs])
    expected = np.array([25.0, 75.0, 160.0, 0.0, 25.0])
    deviation = np.sqrt(np.maximum(expected, 1e-9) / len(runs))
    assert np.all(np.abs(counts.mean(axis=0) - expected) <= 4.0 * deviation)
    assert counts.var(axis=0)[:3] == pytest.approx(expected[:3], rel=0.35)
    assert all(np.all(np.diff(run) >= 0) and run[-1] <= 20.0 for run in runs)
    first = np.concatenate([run[run < 10.0] for run in runs])
    assert np.median(first) == pytest.approx(10.0 / np.sqrt(2.0), rel=0.02)  # density 2t/100 on the ramp
    even = draw_arrivals([(0.0, 5.0), (10.0, 5.0)], np.random.default_rng(0), scv=0.0)
    assert even == pytest.approx(0.2 * np.arange(1, len(even) + 1)) and len(even) in (49, 50)


def test_requests_from_recorded_arrivals():
    made = from_arrivals(np.array([0.0, 0.5, 2.0]), np.array([10, 20, 30]), 5)
    assert made.prompt_tokens.tolist() == [10, 20, 30] and made.output_tokens.tolist() == [5, 5, 5]
    found = run_lanes(SERVER, [Lane(made, Engine())])[0]
    assert found.events["arrival_time"].tolist() == [0.0, 0.5, 2.0] and found.drained


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DraftSchedule([]), "draft schedule"),
        (lambda: DraftSchedule([[2, 4, 1]]), "draft schedule"),
        (lambda: DraftSchedule([[1, 4, 1], [6, 9, 0]]), "without gaps"),
        (lambda: DraftSchedule([[1, 4, -1]]), "draft schedule"),
        (lambda: DraftSchedule([[1, 4, 1], [5, 9, 0]], [(3, 5), (1, 2)]), "bands: got 2"),
        (lambda: DraftSchedule([[1, 4, 1], [5, 9, 0]], [(6, 4)]), "down 6"),
        (lambda: DraftSchedule([[1, 4, 2]], position_acceptance={1: (0.5,)}), r"none for draft lengths \[2\]"),
        (lambda: DraftSchedule([[1, 4, 1]], position_acceptance={1: (1.5,)}), "0 to 1"),
        (lambda: Engine(schedule=DraftSchedule([[1, 4, 2]])), "no position_acceptance"),
        (lambda: Engine(2, (0.5,), schedule=DraftSchedule([[1, 4, 2]])), "beside a schedule"),
        (lambda: draw_arrivals([(0.0, 1.0)], np.random.default_rng(0)), "rates"),
        (lambda: draw_arrivals([(0.0, 0.0), (1.0, 0.0)], np.random.default_rng(0)), "rates"),
        (lambda: draw_arrivals([(0.0, 1.0), (-1.0, 1.0)], np.random.default_rng(0)), "rates"),
    ],
)
def test_bad_schedules_and_rates_are_told(make, message):
    with pytest.raises(InputError, match=message):
        make()
