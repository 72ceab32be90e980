"""The GPU measuring instrument of experiment 03: its loop against closed forms, its models against each other.

The loop, the grid, the tables and the vLLM driver are tested everywhere; models and parts where PyTorch is installed;
the GPU kernels in Triton's interpreter where Triton is. Nothing here measures a GPU.
"""

import csv
import importlib.util
import json
import math
import os
import shlex
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "03_measure_gpu"


def load(name, path, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


instrument = load(
    "instrument", FOLDER / "instrument" / "__init__.py", submodule_search_locations=[str(FOLDER / "instrument")]
)

from instrument import grid, loop, shapes, tables  # noqa: E402
from instrument.loop import Load, Settings, serve  # noqa: E402


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs PyTorch, which is not installed")


@pytest.fixture
def run_part(torch):
    """main(...) of run.py with tiny models, into a folder; returns its exit status."""
    module = load("experiment_03_run", FOLDER / "run.py")
    return lambda part, out, *more: module.main(["--tiny", "--quiet", "--part", str(part), "--out", str(out), *more])


# --- the loop, with an engine of known step times ---------------------------------------------------------------------


class VirtualClock:
    """Time that passes only when somebody says so."""

    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time

    def skip_to(self, moment):
        self.time = max(self.time, moment)

    @contextmanager
    def paused(self):
        before = self.time
        yield
        self.time = before


class StubEngine:
    """Takes step_time(decoding requests, prompt tokens) seconds a step, and 100 s to prepare, which must not count."""

    def __init__(self, step_time=lambda decoding, tokens: 1.0, chunk=256, max_lanes=64):
        self.clock, self.step_time, self.chunk, self.max_lanes = VirtualClock(), step_time, chunk, max_lanes
        self.steps, self.cached = [], {}

    def prepare(self, requests, lanes, draft_length):
        self.clock.time += 100.0

    def step(self, decoding, lanes, draft_length):
        slots = [slot for slot, _ in decoding]
        assert len(set(slots)) == len(slots), "a request decodes twice in a step"
        for lane in lanes:
            assert lane.slot not in slots and 0 < lane.tokens <= self.chunk
            assert lane.start == (self.cached[lane.slot] if lane.start else 0), "chunks of a prompt follow one another"
            self.cached[lane.slot] = lane.start + lane.tokens
        for slot, cached in decoding:
            assert self.cached[slot] <= cached <= self.cached[slot] + draft_length + 1
            self.cached[slot] = cached
        self.steps.append((len(decoding), [lane.tokens for lane in lanes]))
        self.clock.time += self.step_time(len(decoding), sum(lane.tokens for lane in lanes))

    def serve(self, load, settings, **options):
        return serve(self, self.clock, load, settings, **options)


def measured(run):
    return [each for each in run.requests if each.measured]


def mean(run, metric):
    return np.mean([metric(each) for each in measured(run)])


def e2e(request):
    return request.completion_time - request.arrival_time


@pytest.mark.parametrize(
    ("acceptance", "output", "steps"),
    [((), 10, 9), ((1.0,) * 3, 10, 3), ((1.0,) * 3, 11, 3), ((0.0,) * 2, 10, 9), ((), 1, 0)],
)
def test_a_lone_request_takes_its_steps(acceptance, output, steps):
    # constant arrivals, far apart: prefill is one step and every decode step another
    run = StubEngine().serve(Load(0.01, 1, 3, 64, output, process="constant"), Settings(4, 64, acceptance))
    for request in measured(run):
        assert e2e(request) == pytest.approx(1 + steps)
        assert request.first_token_time - request.arrival_time == pytest.approx(1)
        assert request.stream_events == 1 + steps
        assert request.emitted == output
        assert request.drafted_tokens == steps * len(acceptance)
    assert run.complete


def test_long_prompts_are_cut_into_chunks():
    engine = StubEngine(chunk=256, max_lanes=2)
    run = engine.serve(Load(0.01, 0, 1, 1000, 1, process="constant"), Settings(4, 4096))
    assert engine.steps == [(0, [256, 256]), (0, [256, 232])]
    assert e2e(measured(run)[0]) == pytest.approx(2)


def test_one_place_is_an_m_d_1_queue():
    rho = 0.7
    run = StubEngine().serve(Load(rho, 500, 20_000, 1, 1), Settings(1, 1), seed=3)
    wait = mean(run, lambda each: each.schedule_time - each.arrival_time)
    # Pollaczek-Khinchine; the mean of 20,000 correlated waits is good to about 4 %
    assert wait == pytest.approx(rho / (2 * (1 - rho)), rel=0.06)
    row = tables.operating_point(run, Load(rho, 500, 20_000, 1, 1), Settings(1, 1))
    assert row["waiting_mean"] == pytest.approx(row["throughput"] * wait, rel=0.02)
    assert row["effective_batch_size"] == pytest.approx(row["throughput"] * row["e2e_mean"], rel=0.02)


def test_a_busy_loop_without_limits():
    # steps of one second whatever they hold, never idle: half a step of waiting, then whole steps
    load, settings = Load(20.0, 500, 4000, 8, 12), Settings(2000, 8000)
    run = StubEngine().serve(load, settings, seed=1)
    assert mean(run, lambda each: each.first_token_time - each.arrival_time) == pytest.approx(1.5, rel=0.01)
    assert mean(run, e2e) == pytest.approx(12.5, rel=0.002)
    row = tables.operating_point(run, load, settings)
    assert row["effective_batch_size"] == pytest.approx(row["throughput"] * row["e2e_mean"], rel=0.05)
    assert row["itl_mean"] == row["itl_p99"] == pytest.approx(1.0)
    assert row["tpot_mean"] == pytest.approx(1.0)


def test_acceptance_is_as_imposed():
    rates, output = (0.9, 0.7, 0.4), 64
    load, settings = Load(1.0, 20, 500, 8, output), Settings(64, 512, rates)
    run = StubEngine(lambda decoding, tokens: 0.2).serve(load, settings, seed=5)
    for position, rate in enumerate(rates):
        sigma = math.sqrt(rate * (1 - rate) / run.reached[position])
        assert abs(run.accepted[position] / run.reached[position] - rate) < 4 * sigma
    row = tables.operating_point(run, load, settings)
    survival = np.cumprod(rates)
    assert row["tokens_per_step"] == pytest.approx(1 + survival.sum(), rel=0.02)
    assert [float(each) for each in row["position_acceptance"].split(";")] == pytest.approx(rates, abs=0.03)
    # each decode step drafts len(rates) tokens, and what is emitted is what was asked for
    drafts = sum(each.stream_events - 1 for each in run.requests if each.measured)
    assert sum(each.drafted_tokens for each in measured(run)) == drafts * len(rates)
    assert all(each.emitted == each.output_tokens == output for each in measured(run))
    # steps of a request: the renewal count with the moments of the tokens of one step
    pmf = np.append(1.0, survival) - np.append(survival, 0.0)
    m1, m2 = (pmf * np.arange(1, 5)).sum(), (pmf * np.arange(1, 5) ** 2).sum()
    assert mean(run, lambda each: each.stream_events - 1) == pytest.approx(
        (output - 1 + (m2 / m1 - 1) / 2) / m1, rel=0.01
    )


def test_limits_hold_and_requests_wait():
    engine = StubEngine(lambda decoding, tokens: 0.05 + 0.001 * (decoding + tokens), chunk=32, max_lanes=3)
    load, settings = Load(3.0, 50, 400, 100, 20, drawn=True), Settings(6, 48, (0.8, 0.8))
    run = engine.serve(load, settings, seed=2)
    for decoding, lanes in engine.steps:
        assert decoding <= 6 and len(lanes) <= 3
        assert 3 * decoding + sum(lanes) <= 48
    assert any(each.schedule_time - each.arrival_time > 1.0 for each in run.requests)
    assert (
        max(each.prompt_tokens for each in run.requests) > 200 > 100 > min(each.prompt_tokens for each in run.requests)
    )
    row = tables.operating_point(run, load, settings)
    assert row["prompt_scv"] == pytest.approx(1.0, abs=0.4) and row["output_scv"] == pytest.approx(1.0, abs=0.4)
    with pytest.raises(ValueError, match="max_batched_tokens"):
        Settings(64, 128, (0.8, 0.8))


def test_arrivals_are_poisson_and_repeatable():
    load = Load(5.0, 0, 10, 64, 32)
    stream = loop.arrivals(load, 7)
    times = np.array([next(stream).arrival_time for _ in range(20_000)])
    gaps = np.diff(times, prepend=0.0)
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1.0, abs=0.05)
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0.0, abs=0.03)
    assert np.mean(gaps > 0.2) == pytest.approx(math.exp(-1), abs=0.015)
    again = loop.arrivals(Load(10.0, 0, 10, 64, 32), 7)
    assert next(again).arrival_time == pytest.approx(times[0] / 2)


def test_an_overloaded_run_is_cut_off_and_says_so():
    load, settings = Load(5.0, 5, 100, 8, 8), Settings(1, 8)
    run = StubEngine().serve(load, settings, most_seconds=60.0)
    row = tables.operating_point(run, load, settings)
    assert not run.complete and row["failed"] > 80 and row["n_requests"] + row["failed"] == 100
    assert sum(1 - each["ok"] for each in tables.request_rows(run, {})) >= row["failed"]


def test_the_wall_clock_skips_idle_time_and_set_up(monkeypatch):
    real = [1000.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: real[0])
    clock = loop.WallClock()
    real[0] += 2.0
    assert clock.now() == 2.0
    clock.skip_to(5.0)
    assert clock.now() == 5.0
    clock.skip_to(4.0)  # never back
    with clock.paused():
        real[0] += 100.0
    real[0] += 1.0
    assert clock.now() == 6.0


# --- shapes, grid, tables ---------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_models_they_stand_for():
    billions = {name: shape.params / 1e9 for name, shape in shapes.SHAPES.items()}
    assert billions["dense-8b"] == pytest.approx(8.03, abs=0.01)
    assert billions["moe-30b-a3b"] == pytest.approx(30.5, abs=0.05)
    assert billions["draft-0.5b"] == pytest.approx(0.494, abs=0.001)
    assert billions["draft-0.6b"] == pytest.approx(0.596, abs=0.001)
    assert billions["draft-1b"] == pytest.approx(1.236, abs=0.001)
    assert shapes.SHAPES["dense-8b"].kv_bytes_per_token(2) == 131_072


def test_work_counts_weights_cache_and_experts():
    dense, moe = shapes.SHAPES["dense-8b"], shapes.SHAPES["moe-30b-a3b"]
    one, many = shapes.work(dense, 1, 1, 0, 2), shapes.work(dense, 8, 4, 1000, 2)
    assert one.bytes == pytest.approx(2 * (dense.params - dense.vocabulary * dense.hidden), rel=1e-4)
    assert many.bytes - one.bytes == pytest.approx((8 * 1008 - 2) * 131_072)
    assert one.flops == pytest.approx(one.bytes, rel=1e-3)  # two operations for each weight of two bytes
    # a token of the mixture multiplies with 3.0 G parameters besides embedding and head, 8 of 128 experts in each layer
    assert shapes.work(moe, 1, 1, 0, 2, logit_rows=0).flops / 2 == pytest.approx(2.7e9, rel=0.05)
    assert shapes.work(moe, 64, 8, 0, 2).bytes / 2 == pytest.approx(moe.params - 151936 * 2048, rel=0.002)
    assert shapes.Work(10.0, 30.0).seconds(5.0, 10.0) == 3.0


def test_coarse_cells_come_first():
    cells = grid.step_cells(("dense-8b", "draft-1b"), grid.CONTEXTS, tiny=False)
    assert len(set(cells)) == len(cells) == 2 * 9 * 9 * 5
    head = cells[:18]
    assert {cell.model for cell in head} == {"dense-8b", "draft-1b"}
    assert {cell.batch for cell in head} == {1, 16, 64} and {cell.tokens for cell in head} == {1, 4, 8}
    runs = grid.trace_cells((0, 1, 3, 5, 7), 256, 128, tiny=False)
    assert len({cell.name for cell in runs}) == len(runs)
    assert [(cell.draft_length, cell.fraction) for cell in runs[:6]] == [
        (k, f) for k in (0, 3) for f in (0.1, 0.5, 0.85)
    ]
    assert {(cell.draft_length, cell.acceptance) for cell in runs[:27]} == {
        (0, 0.0), *((k, a) for k in (1, 3, 5, 7) for a in (0.8, 0.6))
    }  # fmt: skip


def test_capacity_agrees_with_the_loop():
    # step times linear in decoding requests and in prompt tokens
    def step_time(decoding, tokens):
        return 0.010 + 0.0002 * decoding + 0.00005 * tokens

    alone, full = {n: step_time(n, 0) for n in (1, 32)}, {n: step_time(32, 64 * n) for n in (0, 1, 2, 4)}
    acceptance = (0.8,) * 3
    pace = grid.Pace(alone, full, 64, 3, 0.8)
    capacity = pace.capacity(64, 48)
    settings = Settings(32, 512, acceptance)
    for fraction, complete in ((0.9, True), (1.3, False)):
        load = Load(fraction * capacity, 100, 600, 64, 48)
        engine = StubEngine(step_time, chunk=64, max_lanes=4)
        run = engine.serve(load, settings, most_seconds=1.15 * 700 / load.arrival_rate)
        assert run.complete == complete
    low = 0.3 * capacity
    run = StubEngine(step_time, chunk=64, max_lanes=4).serve(Load(low, 100, 600, 64, 48), settings)
    assert pace.latency(low, 64, 48) == pytest.approx(mean(run, e2e), rel=0.15)


def test_budget():
    now = [0.0]
    budget = grid.Budget(100.0, now=lambda: now[0])
    assert budget.allows(90.0)
    budget.learn(10.0, 40.0)
    assert not budget.allows(90.0) and budget.allows(60.0)
    now[0] = 70.0
    assert not budget.allows(20.0) and budget.left() == 30.0


def test_tables_keep_rows_and_drop_a_cut_line(tmp_path):
    path = tmp_path / "t.csv"
    table = tables.Table(path, ("name", "value"), ("name",))
    table.add({"name": "a", "value": 1 / 3}, {"name": "b", "value": math.nan})
    with path.open("a") as file:
        file.write("c,0.1")  # no end of line: cut off
    again = tables.Table(path, ("name", "value"), ("name",), resume=True)
    assert again.has(name="a") and again.has(name="b") and not again.has(name="c")
    assert path.read_text().splitlines() == ["name,value", "a,0.33333333", "b,"]
    again.keep(lambda row: row["name"] == "a")
    assert not again.has(name="b")
    with pytest.raises(ValueError, match="another version"):
        tables.Table(path, ("name", "other"), resume=True)
    with pytest.raises(ValueError, match="no column z"):
        again.add({"z": 1})
    assert tables.Table(path, ("name", "value"), ("name",)).rows == []


def test_tables_are_diffspecs_own(tmp_path):
    from diffspec.traces import read_trace, schema

    own = {"imposed_acceptance", "load_fraction", "seed", "device_seconds"}
    assert set(tables.POINT_COLUMNS) - set(schema.NAMES) == own
    load, settings = Load(3.0, 40, 300, 64, 32), Settings(16, 256, (0.8, 0.8))
    run = StubEngine(lambda decoding, tokens: 0.02 + 0.002 * decoding + 0.0002 * tokens).serve(load, settings, seed=4)
    identity = {"deployment": "d", "run": "r", "engine": "diffspec instrument", "verifier": "v", "drafter": "w"}
    row = identity | tables.operating_point(run, load, settings)
    points = tables.Table(tmp_path / "points.csv", tables.POINT_COLUMNS)
    points.add(row)
    frame = read_trace(str(points.path)).frame
    assert float(frame["e2e_mean"][0]) == pytest.approx(row["e2e_mean"])
    assert row["n_requests"] == 300 and row["failed"] == 0 and row["tokens_per_step"] > 2
    # the request table, summarised by diffspec, gives the same point
    pytest.importorskip("diffspec.traces.requests", reason="this diffspec reads no request tables")
    requests = tables.Table(tmp_path / "requests.csv", tables.REQUEST_COLUMNS)
    requests.add(*tables.request_rows(run, row))
    summary = read_trace(str(requests.path)).frame.iloc[0]
    for name in (
        "e2e_mean",
        "ttft_mean",
        "tpot_mean",
        "itl_mean",
        "effective_batch_size",
        "offered_rate",
        "throughput",
        "waiting_mean",
    ):
        assert float(summary[name]) == pytest.approx(row[name], rel=0.01), name
    for name in ("e2e_p90", "ttft_p99", "tokens_per_step", "n_requests"):
        assert float(summary[name]) == pytest.approx(row[name], rel=0.03), name


# --- the models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(torch):
    """A tiny model and its cache, float32 on the CPU."""
    from instrument.model import Cache, Model
    from instrument.ops import Ops

    def build(name, grouped=False, rows=400):
        model = Model(shapes.TINY[name], torch.device("cpu"), torch.float32, Ops(grouped=grouped), 512)
        return model, Cache(model.shape, rows, model.device, model.dtype)

    return build


def feed(torch, model, cache, tokens, bases, starts, hidden=None):
    """Logits [requests, tokens, vocabulary] of `tokens` [requests, tokens] on what is cached."""
    from instrument.ops import Segment

    segment = Segment(torch.tensor(bases), torch.tensor(starts), tokens.shape[1])
    states = None if hidden is None else hidden.flatten(0, 1)
    logits, _ = model.forward(tokens.flatten(), [segment], cache, None, states)
    return logits.view(*tokens.shape, -1)


def textbook(torch, model, tokens, hidden=None):
    """The same model without cache, batches or fused matrices, written out in float64 for one sequence."""
    shape, count = model.shape, len(tokens)
    wide = lambda weight: weight.double()  # noqa: E731

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def rotated(x):  # [heads, tokens, size]
        half = shape.head_size // 2
        angle = torch.arange(count, dtype=torch.float64)[:, None] * 500_000.0 ** (
            -torch.arange(half, dtype=torch.float64) / half
        )
        spun = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((spun.real, spun.imag), -1)

    def swiglu(z, inward, outward):
        first, second = (z @ inward.T).chunk(2, -1)
        return (first * first.sigmoid() * second) @ outward.T

    x = wide(model.embedding)[tokens]
    if hidden is not None:
        x = torch.cat((x, hidden.double()), -1) @ wide(model.merge).T
    for layer in model.layers:
        heads = (norm(x) @ wide(layer.qkv).T).view(count, -1, shape.head_size).transpose(0, 1)
        query, key, value = heads.split((shape.heads, shape.kv_heads, shape.kv_heads))
        query, key = rotated(query), rotated(key)
        key, value = (each.repeat_interleave(shape.heads // shape.kv_heads, 0) for each in (key, value))
        score = query @ key.transpose(1, 2) / math.sqrt(shape.head_size)
        score = score.masked_fill(torch.ones(count, count).triu(1).bool(), -math.inf)
        x = x + (score.softmax(-1) @ value).transpose(0, 1).reshape(count, -1) @ wide(layer.out).T
        y = norm(x)
        if layer.router is None:
            x = x + swiglu(y, wide(layer.inward), wide(layer.outward))
            continue
        chosen, ids = (y @ wide(layer.router).T).topk(shape.experts_per_token)
        for token, rank in np.ndindex(*ids.shape):
            expert = ids[token, rank]
            out = swiglu(y[token], wide(layer.inward[expert]), wide(layer.outward[expert]))
            x[token] += chosen[token].softmax(-1)[rank] * out
    return norm(x) @ wide(model.head).T


@pytest.mark.parametrize("name", ["dense-8b", "moe-30b-a3b", "draft-0.5b", "eagle-8b"])
def test_decoding_equals_a_full_pass(torch, make, name):
    model, cache = make(name)
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(1, 12, 64) if model.shape.reads_hidden else None
    part = lambda low, high: None if hidden is None else hidden[:, low:high]  # noqa: E731
    full = feed(torch, model, cache, tokens, [100], [0], hidden)[0]
    expected = textbook(torch, model, tokens[0], None if hidden is None else hidden[0])
    np.testing.assert_allclose(full.double(), expected, rtol=1e-3, atol=2e-4)
    # token by token on the cache, elsewhere in it
    single = [feed(torch, model, cache, tokens[:, i : i + 1], [200], [i], part(i, i + 1))[0, 0] for i in range(12)]
    np.testing.assert_allclose(torch.stack(single), full, rtol=1e-3, atol=2e-4)
    # a verify pass of five tokens equals five single steps
    verify = feed(torch, model, cache, tokens[:, 7:12], [200], [7], part(7, 12))[0]
    np.testing.assert_allclose(verify, full[7:12], rtol=1e-3, atol=2e-4)


def test_requests_do_not_see_each_other(torch, make):
    from instrument.ops import Segment

    model, cache = make("dense-8b")
    prompts = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(1))
    alone = [feed(torch, model, cache, prompts[i : i + 1], [50 * i], [0])[0] for i in range(2)]
    # one has 6 tokens cached and the other 4; each feeds three more
    mixed = torch.stack((prompts[0, 6:9], prompts[1, 4:7]))
    together = feed(torch, model, cache, mixed, [0, 50], [6, 4])
    np.testing.assert_allclose(together[0], alone[0][6:9], rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(together[1], alone[1][4:7], rtol=1e-3, atol=2e-4)
    # a pass that decodes one request and reads two chunks of another's prompt; chosen rows of logits only
    decode = Segment(torch.tensor([0]), torch.tensor([8]), 1)
    lanes = Segment(torch.tensor([150, 150]), torch.tensor([0, 4]), 4)
    fed = torch.cat((prompts[0, 8:9], prompts[1, :8]))
    logits, _ = model.forward(fed, [decode, lanes], cache, torch.tensor([0, 8]))
    np.testing.assert_allclose(logits[0], alone[0][8], rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(logits[1], alone[1][7], rtol=1e-3, atol=2e-4)


def test_grouped_experts_equal_the_loop(torch, make):
    from instrument.experts import experts_grouped, experts_loop, route
    from instrument.ops import gate

    generator = torch.Generator().manual_seed(2)
    x, logits = torch.randn(20, 32, generator=generator), torch.randn(20, 8, generator=generator)
    ids, weights = route(logits, 2)
    assert torch.equal(ids, logits.argsort(dim=1, descending=True)[:, :2])
    np.testing.assert_allclose(weights.sum(dim=1), 1.0, rtol=1e-6)
    inward, outward = torch.randn(8, 48, 32, generator=generator), torch.randn(8, 32, 24, generator=generator)
    for chosen in (ids, torch.tensor([[3, 5]]).expand(20, 2)):  # the second leaves six experts without a token
        try:
            grouped = experts_grouped(x, chosen, weights, inward, outward, gate)
        except (AttributeError, RuntimeError) as problem:
            pytest.skip(f"no grouped product here: {problem}")
        np.testing.assert_allclose(
            grouped, experts_loop(x, chosen, weights, inward, outward, gate), rtol=1e-4, atol=1e-4
        )
    model, cache = make("moe-30b-a3b", grouped=True)
    other, _ = make("moe-30b-a3b")
    tokens = torch.randint(256, (3, 4), generator=generator)
    first, second = (feed(torch, each, cache, tokens, [0, 50, 100], [5, 0, 9]) for each in (model, other))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_coverage_of_skewed_routing(torch):
    from instrument.experts import draw_experts, expected_coverage, popularity

    generator = torch.Generator().manual_seed(3)
    for skew in (0.0, 1.0):
        share = popularity(16, skew)
        ids = draw_experts(40_000, 4, share, generator)
        assert (ids.sort(dim=1).values.diff(dim=1) > 0).all(), "an expert twice for one token"
        hit = torch.bincount(ids.flatten(), minlength=16).double() / 40_000
        assert float(hit.sum()) == pytest.approx(4.0)
        # the most popular of the first draws in proportion to its share
        assert float((ids[:, 0] == 0).double().mean()) == pytest.approx(float(share[0]), abs=0.01)
        covered = np.mean([group.unique().numel() / 16 for group in ids.split(8)])
        assert covered == pytest.approx(expected_coverage(hit, 8), abs=0.005)
    uniform = shapes.uniform_coverage(16, 4, 8)
    assert covered < uniform - 0.05  # skew leaves experts out
    assert expected_coverage(torch.full((16,), 0.25), 8) == pytest.approx(uniform)


def test_the_engine_writes_where_it_should(torch, make):
    from instrument.engine import Limits, TorchEngine
    from instrument.loop import Lane
    from instrument.timing import Recorder

    verifier, drafter = make("dense-8b")[0], make("draft-1b")[0]
    engine = TorchEngine(verifier, drafter, Limits(4, 8, 24, 2), Recorder(torch.device("cpu")))
    rows = engine.limits.rows
    before = [cache.keys[0].clone() for cache in engine.caches]
    engine.prepare(2, 1, 2)
    engine.step([(0, 10), (3, 17)], [Lane(1, 8, 5)], 2)
    spare = set(range(4 * rows, 5 * rows))
    changed = [
        set((cache.keys[0] != old).any(dim=(1, 2)).nonzero().flatten().tolist()) - spare
        for cache, old in zip(engine.caches, before, strict=True)
    ]
    prompt = set(range(rows + 8, rows + 16))
    assert changed[0] == {10, 11, 12, 3 * rows + 17, 3 * rows + 18, 3 * rows + 19} | prompt
    # the drafter re-reads the last three tokens and then one draft
    assert changed[1] == {8, 9, 10, 11, *(3 * rows + i for i in (15, 16, 17, 18))} | prompt
    assert engine.drafts[:2, :2].max() < 256
    engine.prepare(0, 2, 2)
    engine.step([], [Lane(0, 0, 8), Lane(0, 8, 3)], 2)


# --- the parts, tiny --------------------------------------------------------------------------------------------------


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_step_costs_and_routing(run_part, tmp_path, monkeypatch, capsys):
    assert run_part(1, tmp_path, "--budget-seconds", "60") == 0
    costs = rows_of(tmp_path / "part1_step_cost.csv")
    assert {row["model"] for row in costs} == {"tiny-dense", "tiny-draft-a", "tiny-draft-c", "tiny-eagle"}
    assert len(costs) == 4 * 8
    for row in costs:
        assert float(row["p10"]) <= float(row["step_time_s"]) <= float(row["p90"])
        assert float(row["ratio"]) == pytest.approx(float(row["step_time_s"]) / float(row["roofline_time_s"]), rel=1e-5)
    assert {(row["role"], row["model"]) for row in costs} >= {("verifier", "tiny-dense"), ("drafter", "tiny-eagle")}
    assert "all cells done" in capsys.readouterr().out
    assert run_part(1, tmp_path) == 2, "tables in the way, and no --resume"
    # resume measures nothing again
    before = (tmp_path / "part1_step_cost.csv").read_bytes()
    assert run_part(1, tmp_path, "--resume") == 0
    assert (tmp_path / "part1_step_cost.csv").read_bytes() == before
    assert len(rows_of(tmp_path / "part1_device.csv")) == 2

    assert run_part(3, tmp_path, "--budget-seconds", "60") == 0
    routing = rows_of(tmp_path / "part3_routing.csv")
    assert len(routing) == 8 and len(rows_of(tmp_path / "part3_step_cost.csv")) == 8
    for row in routing:
        assert float(row["coverage_formula"]) <= float(row["coverage_uniform"]) + 0.01
        assert float(row["coverage_measured"]) == pytest.approx(float(row["coverage_formula"]), abs=0.15)
    skewed = [row for row in routing if row["skew"] == "1.5" and row["tokens"] == "12"]
    assert float(skewed[0]["load_imbalance"]) > 1.5


def test_a_failing_cell_is_recorded_and_tried_again(run_part, tmp_path, monkeypatch):
    from instrument import step_cost

    calls, real = [], step_cost.time_runs

    def sometimes(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("made to fail")
        return real(*arguments, **options)

    monkeypatch.setattr(step_cost, "time_runs", sometimes)
    assert run_part(1, tmp_path) == 0
    skipped = rows_of(tmp_path / "part1_skipped.csv")
    assert [(row["reason"], row["detail"]) for row in skipped] == [("error", "RuntimeError: made to fail")]
    assert len(rows_of(tmp_path / "part1_step_cost.csv")) == 31
    assert run_part(1, tmp_path, "--resume") == 0
    assert rows_of(tmp_path / "part1_skipped.csv") == []
    assert len(rows_of(tmp_path / "part1_step_cost.csv")) == 32


def test_no_budget_is_no_measurement(run_part, tmp_path):
    for part, name, cells in ((1, "step_cost", 32 + 4), (2, "operating_points", 4)):  # four models to check
        assert run_part(part, tmp_path, "--budget-seconds", "0") == 0
        assert rows_of(tmp_path / f"part{part}_{name}.csv") == []
        assert [row["reason"] for row in rows_of(tmp_path / f"part{part}_skipped.csv")] == ["budget"] * cells


def test_open_loop_traces(run_part, tmp_path):
    assert run_part(2, tmp_path, "--budget-seconds", "90") == 0
    points, skipped = (rows_of(tmp_path / f"part2_{name}.csv") for name in ("operating_points", "skipped"))
    assert {row["reason"] for row in skipped} <= {"budget"}
    assert points and len(points) + len(skipped) == 4
    requests = rows_of(tmp_path / "part2_requests.csv")
    for point in points:
        mine = [row for row in requests if row["run"] == point["run"] and row["measured"] == "1"]
        assert len(mine) == int(point["n_requests"]) + int(point["failed"])
        done = [row for row in mine if row["ok"] == "1"]
        events = np.array([[float(row[f"{name}_time"]) for name in ("arrival", "schedule", "first_token", "completion")]
                           for row in done])  # fmt: skip
        assert (np.diff(events, axis=1) >= 0).all()
        assert float(point["e2e_mean"]) == pytest.approx((events[:, 3] - events[:, 0]).mean(), rel=1e-4)
        assert all(row["output_tokens"] == "12" for row in done)
        k = int(point["draft_length"])
        if k:
            rate = sum(int(row["accepted_tokens"]) for row in mine) / sum(int(row["drafted_tokens"]) for row in mine)
            assert rate == pytest.approx((0.8 + 0.64) / 2, abs=0.14)  # five standard deviations
    # a run whose point was never written is measured again, without rows left over
    with (tmp_path / "part2_requests.csv").open("a") as file:
        file.write(",".join(["d", "k9", *requests[0].values()][: len(requests[0])]) + "\n")
    assert run_part(2, tmp_path, "--resume", "--budget-seconds", "90") == 0
    assert {row["run"] for row in rows_of(tmp_path / "part2_requests.csv")} >= {row["run"] for row in points}
    assert "k9" not in {row["run"] for row in rows_of(tmp_path / "part2_requests.csv")}


def test_open_loop_traces_of_a_mixture(run_part, tmp_path):
    assert run_part(4, tmp_path, "--budget-seconds", "60") == 0
    points = rows_of(tmp_path / "part4_operating_points.csv")
    assert points and all(row["num_experts"] == "8" and row["experts_per_token"] == "2" for row in points)


INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from instrument import kernels, ops
generator = torch.Generator().manual_seed(0)
def random(*size):
    return torch.randn(size, generator=generator)
def close(got, expected, tolerance):
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    assert error < tolerance, error
full, half = torch.float32, torch.float16  # the interpreter has no products of bfloat16
cases = [(1, 1, 4, 2, full), (3, 5, 4, 2, full), (None, 1, 7, 1, half), (3, 17, 4, 2, half), (1, 17, 7, 1, full)]
for splits, tokens, heads, kv_heads, dtype in cases:
    starts = torch.tensor([0, 3, 64, 150])
    longest = 150 + tokens
    keys, values = (random(4 * longest, kv_heads, 16).to(dtype) for _ in "kv")
    query = random(4, tokens, heads, 16).to(dtype)
    segment = ops.Segment(torch.tensor([2, 0, 3, 1]) * longest, starts, tokens)
    expected = ops.attend(query.float(), segment, keys.float(), values.float())
    close(kernels.attend(query, segment, keys, values, splits), expected, 1e-5 if dtype == full else 1e-3)
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
    x, update, weight = (random(*size).to(dtype) for size in ((3, 48), (3, 48), (48,)))
    close(kernels.gate(x), ops.gate(x.float()), tolerance)
    for given in (update, None):
        first, second = x.clone(), x.clone()
        close(kernels.add_norm(first, given, weight), ops.add_norm(second, given, weight), tolerance)
        close(first, second, tolerance)
    mixed, rotary = random(6, 8 * 16).to(dtype), ops.Rotary.make(64, 16, x.device)
    segment = ops.Segment(torch.tensor([40, 0]), torch.tensor([5, 30]), 3)
    stored = []
    for module in (kernels, ops):
        keys, values = (torch.zeros(100, 2, 16, dtype=dtype) for _ in "kv")
        query = module.rotate_store(mixed, segment, rotary, keys, values)
        stored.append(torch.cat([each.flatten() for each in (query, keys, values)]))
    close(*stored, tolerance)
# a whole model: one request decodes while a chunk of another's prompt is read
from instrument.model import Cache, Model
from instrument.shapes import TINY
fast = ops.Ops(kernels.add_norm, kernels.rotate_store, kernels.attend, kernels.gate)
model = Model(TINY["dense-8b"], x.device, torch.float32, ops.Ops(), 128)
cache, tokens = Cache(model.shape, 60, x.device, torch.float32), torch.arange(10)
segments = [ops.Segment(torch.tensor([20, 0]), torch.tensor([11, 3]), 3)]
segments += [ops.Segment(torch.tensor([40]), torch.tensor([2]), 4)]
expected = model.forward(tokens, segments, cache)[0]
model.ops = fast
close(model.forward(tokens, segments, cache)[0], expected, 1e-5)
print("kernels agree")
"""


def test_gpu_kernels_in_the_interpreter(torch):
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(FOLDER)], env=environment, capture_output=True, text=True, timeout=500
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert done.stdout.strip().endswith("kernels agree"), done.stderr[-2000:]


# --- the driver of a real vLLM ----------------------------------------------------------------------------------------


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports of this machine that are free now."""
    for first in range(20_000, 60_000, 97):
        try:
            with ExitStack() as stack:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


@pytest.fixture
def vllm_driver():
    path = list(sys.path)
    yield load("experiment_03_vllm_run", FOLDER / "vllm" / "run.py")
    sys.path[:] = path


def test_vllm_dry_run(vllm_driver, tmp_path, capsys):
    assert vllm_driver.main(["--out", str(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("# 22 servers, about ")
    serves, collects = lines[0:-1:2], lines[1:-1:2]
    assert len(serves) == len(collects) == 22
    assert "--speculative-config" not in serves[0] and all("--speculative-config" in line for line in serves[1:])
    assert all("--load-format dummy" in line for line in serves)
    verifier, drafter = (
        json.loads((tmp_path / "models" / n / "config.json").read_text()) for n in ("verifier", "drafter")
    )
    assert verifier["vocab_size"] == drafter["vocab_size"]
    tokens = json.loads((tmp_path / "models" / "verifier" / "tokenizer.json").read_text())
    assert sorted(tokens["model"]["vocab"].values()) == list(range(verifier["vocab_size"]))
    make_models = sys.modules["make_models"]
    assert make_models.parameters(verifier) == shapes.SHAPES["dense-8b"].params
    assert make_models.parameters(drafter) == shapes.SHAPES["draft-1b"].params
    assert make_models.kv_bytes_per_token(verifier) == shapes.SHAPES["dense-8b"].kv_bytes_per_token(2)


def test_vllm_imposes_marginal_acceptance(vllm_driver, tmp_path):
    options = vllm_driver.parse(["--out", str(tmp_path)])
    server = vllm_driver.Server(3, 0.8)
    command = vllm_driver.serve_command(server, tmp_path, options, 8011)
    speculation = json.loads(command[command.index("--speculative-config") + 1])
    assert speculation["synthetic_acceptance_rates"] == pytest.approx([0.8, 0.64, 0.512])
    assert speculation["num_speculative_tokens"] == 3 and speculation["rejection_sample_method"] == "synthetic"


def test_vllm_heads_draft_on_the_verifiers_hidden_state(vllm_driver, tmp_path):
    options = vllm_driver.parse(["--out", str(tmp_path), "--servers", "none", "eagle:3:0.8", "--together"])
    plain, head = vllm_driver.servers(options)
    commands = [vllm_driver.serve_command(server, tmp_path, options, 8011) for server in (plain, head)]
    assert plain.name == "k0" and head.name == "eagle_k3_a80"
    speculation = json.loads(commands[1][commands[1].index("--speculative-config") + 1])
    assert speculation["method"] == "eagle" and speculation["model"].endswith("eagle")
    # a layer and the projection in front of it: 218.1 + 33.6 million
    assert vllm_driver.plan(head, options, 8011)["identity"]["drafter_params"] == 251_658_240
    caches = [int(command[command.index("--kv-cache-memory-bytes") + 1]) for command in commands]
    assert caches[1] / caches[0] == pytest.approx(33 / 32)  # one more layer has a cache


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_vllm_driver_measures_every_server_once(vllm_driver, tmp_path, together):
    """The whole way with a server of known timing in vLLM's place; what is done is not measured again."""
    python = f"{shlex.quote(sys.executable)}"
    scripts = {
        "vllm": f"{python} {shlex.quote(str(Path(__file__).parent / 'fake_server.py'))}",
        "diffspec": f"{python} -c 'import sys; from diffspec.cli import main; sys.exit(main())'",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {text} "$@"\n')
        (tmp_path / name).chmod(0o755)
    arguments = ["--out", str(tmp_path / "out"), "--servers", "eagle:2:0.8", "draft_model:2:0.8", "--rates", "60"]
    arguments += ["--seconds", "0.1", "--least-requests", "30", "--prompt", "8", "--output", "9"]
    arguments += ["--max-batch-size", "8", "--port", str(free_ports(2))]
    arguments += ["--vllm", str(tmp_path / "vllm"), "--diffspec", str(tmp_path / "diffspec")]
    arguments += ["--together"] if together else []
    assert vllm_driver.main(arguments) == 0
    tables = sorted((tmp_path / "out").glob("*/trace/operating_points.csv"))
    assert [table.parts[-3] for table in tables] == ["draft_model_k2_a80", "eagle_k2_a80"]
    written = [table.stat().st_mtime_ns for table in tables]
    assert vllm_driver.main(arguments) == 0
    assert [table.stat().st_mtime_ns for table in tables] == written


def test_vllm_driver_goes_on_after_a_server_that_does_not_start(vllm_driver, tmp_path, capsys):
    (tmp_path / "vllm").write_text("#!/bin/sh\necho no device; exit 3\n")
    (tmp_path / "vllm").chmod(0o755)
    arguments = ["--out", str(tmp_path / "out"), "--servers", "none", "eagle:1:0.8", "--vllm", str(tmp_path / "vllm")]
    assert vllm_driver.main(arguments) == 1
    told = capsys.readouterr().err
    assert "k0 failed" in told and "eagle_k1_a80 failed" in told and "status 3" in told and "no device" in told


def test_vllm_plans_are_what_collect_takes(vllm_driver, tmp_path):
    plan_text = pytest.importorskip("diffspec.collecting.plan_text", reason="this diffspec does not collect")
    assert vllm_driver.main(["--out", str(tmp_path), "--dry-run", "--draft-lengths", "0,5", "--rates", "2,9"]) == 0
    plans = sorted(tmp_path.glob("*/plan.yaml"))
    assert len(plans) == 4
    for path in plans:
        plan = plan_text.read_plan(path.read_text(), str(path), url="http://127.0.0.1:8011", max_rate=9.0)
        assert [cell.arrival_rate for cell in plan.cells()] == [2.0, 9.0]
        assert plan.identity["draft_length"] in (0, 5)


# --- what was measured ------------------------------------------------------------------------------------------------


def test_the_data_sheet_tells_a_step_of_the_h200(monkeypatch):
    """192 measured steps of an 8B verifier against dimensions and data sheet, nothing fitted to them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import findings

    told = findings.before_any_trace()["dense-8b, verifying"]
    assert told["cells"] == 192
    assert told["error"] < 0.06  # findings.md: 4.6 %
    assert told["inside 90 %"] >= 0.9
    assert told["by region"]["at most 64 tokens in the step"] < told["by region"]["more"]


@pytest.mark.parametrize("chunk", [256, 512])
def test_decoding_requests_pay_what_the_roofline_leaves_of_a_prompt(chunk, monkeypatch):
    """Steps with and without prompt tokens in the serving loop's run, at 20 to 30 decoding requests, against the share
    that first principles give; without that share the chunk would cost 1.5 times as much or more."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import findings

    from diffspec.fitting.principles import serving_model

    with (FOLDER / "results" / "part2_steps.csv").open(newline="", encoding="utf-8") as file:
        rows = [
            row for row in csv.DictReader(file) if row["run"].startswith("k0_") and 20 <= int(row["decoding"]) <= 30
        ]

    def mean(prompt_tokens):
        chosen = [row for row in rows if int(row["prompt_tokens"]) == prompt_tokens]
        steps = [int(row["steps"]) for row in chosen]
        assert sum(steps) >= 10
        return np.average([float(row["step_time_mean_s"]) for row in chosen], weights=steps)

    pair = findings.FirstPrinciples(findings.LLAMA_8B, findings.accelerator("h200"), prompt_length=float(chunk))
    model = serving_model(pair)
    alone = float(model.step_time.prefill_token) * chunk
    paid = mean(chunk) - mean(0)
    assert float(model.prefill_interference) * alone == pytest.approx(paid, rel=0.2)
    assert alone > 1.4 * paid
