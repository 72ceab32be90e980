"""`diffspec collect` against a server of known timing: loads, windows, stop rules, caps, failures, going on."""

import asyncio
import itertools
import json
import math

import numpy as np
import pytest
from fake_server import FakeServer, running

from diffspec.analysis.acceptance_by_position import study
from diffspec.collecting import collect as collect_module
from diffspec.collecting.collect import check_url, collect
from diffspec.collecting.drive import relative_half_width
from diffspec.collecting.load import asks, gaps, lengths
from diffspec.collecting.plan_text import TEMPLATE, read_plan
from diffspec.results import InputError, NoResultError
from diffspec.traces import check, read_trace
from diffspec.traces.gather import gather

CAPS = "limits: {max_rate: 200, max_requests: 5000, max_concurrency: 64}\n"
QUICK = "measure: {requests: 40, warmup_requests: 5, scrape_seconds: 0.1, settle_seconds: 0, most_seconds: 60}\n"
IDENTITY = "identity: {deployment: fake, draft_length: 2, method: draft_model}\n"


def plan_of(grid: str, url: str = "http://127.0.0.1:1", measure: str = QUICK, rest: str = ""):
    return read_plan(CAPS + measure + IDENTITY + rest + f"grid: {grid}\n", url=url)


def test_open_loop_measures_what_the_server_does(tmp_path):
    with running(FakeServer(first=0.05, gap=0.01, per_chunk=2)) as server:
        plan = plan_of("[{arrival_rate: 40, prompt_length: 8, output_length: 21, requests: 60}]", server.url)
        done = collect(plan, tmp_path / "out")
    row = done.rows["p8_o21_r40"]
    assert row["n_requests"] == 60 and row["failed"] == 0 and row["arrival_rate"] == 40 and row["window"] == "steady"
    assert row["prompt_length"] == 8 and row["output_length"] == 21
    # one token after 50 ms, then ten chunks of two, 10 ms apart; timers and this machine only ever add
    assert 0.05 <= row["ttft_mean"] < 0.5
    assert 0.01 <= row["itl_mean"] < 0.1
    assert row["tpot_mean"] == pytest.approx(row["itl_mean"] / 2, rel=1e-3)
    assert row["e2e_mean"] == pytest.approx(row["ttft_mean"] + 20 * row["tpot_mean"], rel=1e-6)
    assert row["tokens_per_step"] == pytest.approx(2.0, rel=0.02)  # from /metrics
    assert row["effective_batch_size"] == pytest.approx(row["throughput"] * row["e2e_mean"], rel=0.25)
    assert all(len(body["prompt"]) == 8 and body["ignore_eos"] for body in server.received)


def test_the_trace_is_written_and_read_back_alike(tmp_path):
    grid = "[{arrival_rate: 50, output_length: 9}, {concurrency: 3, output_length: 9}]"
    with running(FakeServer()) as server:
        done = collect(plan_of(grid, server.url), tmp_path / "out")
    table = read_trace(tmp_path / "out" / "operating_points.csv").frame
    assert list(table["run"]) == ["p64_o9_r50", "p64_o9_c3"]
    assert list(table["n_requests"]) == [40, 40] and table["window"].tolist() == ["steady", "steady"]
    again = read_trace(tmp_path / "out" / "requests.csv").frame
    for name in ("ttft_mean", "tpot_mean", "e2e_mean", "e2e_p95"):
        # times are recorded to a microsecond
        assert again[name].to_numpy() == pytest.approx(table[name].to_numpy(), abs=2e-6), name
    folder = read_trace(tmp_path / "out").frame
    assert len(folder) == 2 and folder["e2e_mean"].tolist() == table["e2e_mean"].tolist()
    closed = table[table["concurrency"] == 3].iloc[0]
    assert closed["effective_batch_size"] == pytest.approx(3, rel=0.1)
    assert not [item for item in check(read_trace(tmp_path / "out")).warnings if item.check == "little"]
    assert done.client["send_lag_p99"] is not None


def test_a_closed_loop_keeps_its_requests_in_flight(tmp_path):
    with running(FakeServer(first=0.03, gap=0.0, places=4)) as server:
        grid = "[{concurrency: 8, prompt_length: 4, output_length: 3, requests: 80}]"
        row = collect(plan_of(grid, server.url), tmp_path / "out").rows["p4_o3_c8"]
    # four places of 30 ms: 133 req/s at most, and eight in flight wait their turn: e2e = 8/throughput
    assert row["throughput"] == pytest.approx(8 / row["e2e_mean"], rel=0.1)
    assert row["throughput"] < 4 / 0.03
    assert row["ttft_mean"] > 0.055


def test_a_collection_goes_on_where_it_stopped(tmp_path):
    grid = "[{arrival_rate: [100, 120], prompt_length: 4, output_length: 3}]"
    out = tmp_path / "out"
    with running(FakeServer(first=0.005, gap=0.001)) as server:
        plan = plan_of(grid, server.url)
        first = collect(plan, out)
        assert first.measured == ["p4_o3_r100", "p4_o3_r120"]
        sent = len(server.received)
        again = collect(plan, out)
        assert (again.measured, again.kept, len(server.received)) == ([], first.measured, sent)
        assert again.rows == json.loads(json.dumps(first.rows))
        # a cell without its closing line was interrupted: kept aside, measured again
        raw = out / "raw" / "p4_o3_r120.jsonl"
        raw.write_text("\n".join(raw.read_text().splitlines()[:-1]) + "\n")
        third = collect(plan, out)
        assert (third.measured, third.kept) == (["p4_o3_r120"], ["p4_o3_r100"])
        assert (out / "raw" / "p4_o3_r120.partial.jsonl").exists()
        with pytest.raises(InputError, match="another plan"):
            collect(plan_of(grid, server.url, measure=QUICK.replace("40", "41")), out)


def test_interrupted_in_the_middle_nothing_measured_is_lost(tmp_path, monkeypatch):
    grid = "[{arrival_rate: [100, 120], prompt_length: 4, output_length: 3}]"
    original = collect_module.drive
    calls = itertools.count()

    async def interrupted(*arguments, **options):
        if next(calls) == 1:
            task = asyncio.ensure_future(original(*arguments, **options))
            await asyncio.sleep(0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise KeyboardInterrupt
        return await original(*arguments, **options)

    monkeypatch.setattr(collect_module, "drive", interrupted)
    with running(FakeServer(first=0.005, gap=0.001)) as server:
        plan = plan_of(grid, server.url)
        with pytest.raises(KeyboardInterrupt):
            collect(plan, tmp_path / "out")
        assert len(read_trace(tmp_path / "out" / "operating_points.csv")) == 1
        assert len((tmp_path / "out" / "raw" / "p4_o3_r120.jsonl").read_text().splitlines()) > 5
        assert collect(plan, tmp_path / "out").kept == ["p4_o3_r100"]


def test_it_stops_when_the_mean_is_known(tmp_path):
    measure = "measure: {requests: 36, warmup_requests: 2, until: 0.5, most_requests: 2000, settle_seconds: 0}\n"
    with running(FakeServer(first=0.02, gap=0.001)) as server:
        plan = plan_of("[{arrival_rate: 100, prompt_length: 4, output_length: 3}]", server.url, measure)
        row = collect(plan, tmp_path / "out").rows["p4_o3_r100"]
    assert 36 <= row["n_requests"] < 1500  # not the most it might take


def test_the_time_limit_ends_a_cell(tmp_path):
    """What was complete is kept where latencies had settled; an overloaded server is told, with its throughput."""
    measure = "measure: {requests: 1000, warmup_requests: 2, most_seconds: 3, settle_seconds: 0}\n"
    with running(FakeServer(first=0.02, gap=0.0)) as server:
        plan = plan_of("[{arrival_rate: 50, output_length: 3}]", server.url, measure)
        done = collect(plan, tmp_path / "a")
    assert 20 < done.rows["p64_o3_r50"]["n_requests"] < 160
    assert any("most_seconds" in line for line in done.warnings)
    with running(FakeServer(first=0.1, gap=0.0, places=1)) as server:
        plan = plan_of("[{arrival_rate: 100, output_length: 3}]", server.url, measure)
        with pytest.raises(NoResultError, match=r"had not settled.*completed per second: overloaded"):
            collect(plan, tmp_path / "b")


def test_the_engines_own_account_of_requests_is_kept(tmp_path):
    """The raw file tells acceptance by position and by the task that the prompts name."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b", "task": "code"}\n{"prompt": "c d", "task": "chat"}\n')
    plan = "[{concurrency: 2, output_length: 9}]"
    with running(FakeServer(per_chunk=3, tells_metrics=True)) as server:
        read = plan_of(plan, server.url, rest="server: {metrics: false}\nprompts: {kind: file, file: prompts.jsonl}\n")
        collect(read, tmp_path / "out", beside=tmp_path)
    answer, _ = study(gather([tmp_path / "out" / "raw" / "p64_o9_c2.jsonl"]), ["task"])
    whole, *tasks = answer["groups"]
    assert [entry["acceptance"] for entry in whole["positions"]] == [1.0, 1.0]
    assert {group["group"]["task"] for group in tasks} == {"code", "chat"}
    requests = (tmp_path / "out" / "requests.csv").read_text().splitlines()[1]
    assert ",6,6," in requests  # drafted and accepted


def test_the_caps_hold_while_running(tmp_path):
    """A warm-up that grows (it lasts three mean latencies) may not pass the cap on requests, nor a fast server that on
    the rate."""
    caps = "limits: {max_rate: 100, max_requests: 60}\n"
    measure = "measure: {requests: 40, warmup_requests: 2, settle_seconds: 0}\n"
    with running(FakeServer(first=0.4, gap=0.0)) as server:
        plan = read_plan(caps + measure + "grid: {arrival_rate: 100, output_length: 2}\n", url=server.url)
        with pytest.raises(NoResultError, match="max_requests 60"):
            collect(plan, tmp_path / "a")
    assert 0 < len(server.received) <= 60
    with running(FakeServer(first=0.0, gap=0.0)) as server:  # held back it would not be eight in flight
        plan = read_plan(
            caps.replace("100", "20") + measure + "grid: {concurrency: 8, output_length: 2}\n", url=server.url
        )
        with pytest.raises(NoResultError, match="max_rate 20"):
            collect(plan, tmp_path / "b")
    assert len(server.received) <= 60


@pytest.mark.parametrize("loop", ["arrival_rate: 40, arrival_process: constant", "concurrency: 10"])
def test_a_cell_that_ends_early_counts_what_it_saw(tmp_path, loop):
    """Cut off by its confidence, the window ends where counting ends: the load in it is the load that was sent."""
    measure = "measure: {requests: 30, warmup_requests: 4, until: 0.5, most_requests: 500, settle_seconds: 0}\n"
    with running(FakeServer(first=0.25, gap=0.0)) as server:
        row = next(
            iter(collect(plan_of(f"[{{{loop}, output_length: 2}}]", server.url, measure), tmp_path).rows.values())
        )
    assert row["n_requests"] >= 30
    # ten in flight go in waves: the window may hold one launch of each place more or less
    wave = 10 / row["n_requests"]
    assert row["throughput"] * row["e2e_mean"] == pytest.approx(row["effective_batch_size"], rel=0.1 + wave)
    if "offered_rate" in row:
        assert row["offered_rate"] == pytest.approx(40, rel=0.1)
    else:
        assert row["effective_batch_size"] == pytest.approx(10, rel=0.15)


def test_a_server_that_breaks_down_leaves_no_row(tmp_path):
    class Breaking(FakeServer):
        async def completions(self, request):
            self.fail = 503 if len(self.received) >= 22 else None
            return await super().completions(request)

    with running(Breaking(first=0.005)) as server:
        plan = plan_of("[{concurrency: 2, output_length: 3}]", server.url)
        with pytest.raises(NoResultError, match="measured requests failed: HTTP 503"):
            collect(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "operating_points.csv").exists()


def test_the_engine_contradicts_the_plan(tmp_path):
    with running(FakeServer(per_chunk=3)) as server, pytest.raises(NoResultError, match="the engine's counters 3"):
        collect(plan_of("[{concurrency: 2, output_length: 9}]", server.url), tmp_path / "out")


def test_what_is_not_streamed_has_no_time_per_token(tmp_path):
    with running(FakeServer(gap=0.0, per_chunk=2)) as server:
        plan = plan_of("[{concurrency: 1, output_length: 3, requests: 5}]", server.url)
        row = collect(plan, tmp_path / "out").rows["p64_o3_c1"]
    assert "tpot_mean" not in row or row["tpot_mean"] > 0
    assert len(read_trace(tmp_path / "out")) == 1


def test_each_cell_has_its_temperature(tmp_path):
    with running(FakeServer()) as server:
        plan = plan_of("[{concurrency: 1, output_length: 3, requests: 4, temperature: [0, 0.7]}]", server.url)
        rows = collect(plan, tmp_path / "out").rows
    assert [row["temperature"] for row in rows.values()] == [0, 0.7]
    assert {body["temperature"] for body in server.received} == {0, 0.7}


def test_nothing_to_measure_needs_no_server(tmp_path):
    with running(FakeServer()) as server:
        plan = plan_of("[{concurrency: 1, output_length: 3, requests: 4}]", server.url)
        collect(plan, tmp_path / "out")
    (tmp_path / "out" / "operating_points.csv").unlink()
    assert collect(plan, tmp_path / "out").kept == ["p64_o3_c1"]
    assert len(read_trace(tmp_path / "out")) == 1
    other = plan_of("[{concurrency: 1, output_length: 3, requests: 5}]", server.url)
    with pytest.raises(InputError, match="was measured as another plan asked"):
        collect(other, tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "requests.csv").write_text("mine\n")
    with pytest.raises(InputError, match="no collection"):
        collect(plan, tmp_path / "foreign")


def test_a_replay_may_not_pass_the_rate(tmp_path):
    (tmp_path / "at_once.csv").write_text("arrival_time\n" + "5.0\n" * 50)
    plan = plan_of("[{replay: at_once.csv}]")
    with pytest.raises(InputError, match="peaks at nan"):
        next(asks(plan, plan.cells()[0], "m", tmp_path))
    (tmp_path / "log.csv").write_text("arrival_time\n" + "".join(f"{0.001 * i}\n" for i in range(500)))
    plan = plan_of("[{replay: log.csv}]")
    with pytest.raises(InputError, match="peaks at 1e"):
        next(asks(plan, plan.cells()[0], "m", tmp_path))


def test_cells_that_differ_in_a_column_have_names_of_their_own():
    plan = plan_of("[{concurrency: 2, task: [code, small talk]}]")
    assert [cell.name for cell in plan.cells()] == ["p64_o64_c2_code", "p64_o64_c2_small-talk"]


def test_a_failing_server_is_told_apart(tmp_path):
    grid = "[{concurrency: 2, prompt_length: 4, output_length: 3}]"
    with running(FakeServer(fail=503)) as server, pytest.raises(NoResultError, match="HTTP 503"):
        collect(plan_of(grid, server.url), tmp_path / "a")
    assert len(server.received) < 40  # it gave up
    with running(FakeServer(broken_after=2)) as server, pytest.raises(NoResultError, match="all failed"):
        collect(plan_of(grid, server.url), tmp_path / "b")
    with pytest.raises(NoResultError, match="does not answer"):
        collect(plan_of(grid), tmp_path / "c")


def test_redirects_are_not_followed(tmp_path):
    from aiohttp import web

    with running(FakeServer()) as other:

        class Redirecting(FakeServer):
            async def completions(self, request):
                self.received.append({})
                raise web.HTTPTemporaryRedirect(other.url + "/v1/completions")

        with running(Redirecting()) as server, pytest.raises(NoResultError, match="HTTP 307"):
            collect(plan_of("[{concurrency: 2}]", server.url), tmp_path / "out")
        assert server.received and not other.received


def test_chat_and_texts(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "tell me a story", "output_length": 5}\n{"prompt": "why", "output_length": 5}\n')
    rest = f"server: {{endpoint: chat}}\nprompts: {{kind: file, file: {prompts}}}\n"
    with running(FakeServer()) as server:
        plan = plan_of("[{concurrency: 2, output_length: 9}]", server.url, rest=rest)
        row = collect(plan, tmp_path / "out").rows["p64_o9_c2"]
    assert row["output_length"] == 5 and row["prompt_length"] == pytest.approx(2.5, abs=0.1)
    assert server.received[0]["messages"] == [{"role": "user", "content": "tell me a story"}]


@pytest.mark.parametrize(
    ("process", "scv", "expected"), [("poisson", None, 1.0), ("constant", None, 0.0), ("gamma", 4.0, 4.0)]
)
def test_gaps_have_the_stated_mean_and_variability(process, scv, expected):
    drawn = np.array(list(itertools.islice(gaps(process, 5.0, scv, np.random.default_rng(1)), 40_000)))
    assert drawn.mean() == pytest.approx(0.2, rel=0.03)
    assert drawn.var() / drawn.mean() ** 2 == pytest.approx(expected, rel=0.06, abs=1e-12)


def test_lengths_have_the_stated_mean_and_variability():
    drawn = np.array(list(itertools.islice(lengths(200.0, 0.5, np.random.default_rng(2)), 40_000)))
    assert drawn.mean() == pytest.approx(200, rel=0.02) and drawn.var() / drawn.mean() ** 2 == pytest.approx(
        0.5, rel=0.05
    )


def test_matched_arms_see_the_same_arrivals(tmp_path):
    one, other = (plan_of("[{arrival_rate: 3}]"), plan_of("[{arrival_rate: 3, task: code}]"))
    first, second = (
        [(ask.at, ask.body["prompt"]) for ask in itertools.islice(asks(plan, plan.cells()[0], "m", tmp_path), 20)]
        for plan in (one, other)
    )
    assert first == second


def test_replay_takes_times_and_lengths_from_a_file(tmp_path):
    (tmp_path / "log.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.0000000,10,3\n2023-11-16 18:15:46.5000000,20,4\n2023-11-16 18:15:48.0000000,30,5\n"
    )
    plan = plan_of("[{replay: log.csv, speedup: 2}]")
    sent = list(asks(plan, plan.cells()[0], "m", tmp_path))
    assert [(ask.at, len(ask.body["prompt"]), ask.output_length) for ask in sent] == [
        (0, 10, 3),
        (0.25, 20, 4),
        (1, 30, 5),
    ]


def test_half_width_is_that_of_batch_means():
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        noise, values, state = random.normal(size=240), [], 0.0
        for shock in noise:  # autocorrelated latencies with mean 10
            state = 0.5 * state + shock
            values.append(10 + state)
        covered += abs(np.mean(values) - 10) <= relative_half_width(values) * np.mean(values)
    assert 0.88 <= covered / 400 <= 0.98  # a plain interval of single values would cover 0.74
    assert math.isinf(relative_half_width([1.0] * 23))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: [{arrival_rate: 1}]", "max_rate is missing"),
        ("limits: {max_rate: 1}\ngrid: [{arrival_rate: 1}]", "max_requests is missing"),
        (CAPS + "grid: [{arrival_rate: 201}]", "above limits: max_rate 200"),
        (CAPS + "grid: [{concurrency: 65}]", "above max_concurrency 64"),
        (CAPS + "grid: [{arrival_rate: 1, requests: 5000}]", "max_requests 5000 is below the 5010"),
        (CAPS + "grid: [{arrival_rate: 1, concurrency: 1}]", "one of arrival_rate, concurrency"),
        (CAPS + "grid: [{prompt_length: 3}]", "no load"),
        (CAPS + "grid: [{arival_rate: 3}]", "did you mean 'arrival_rate'"),
        (CAPS + "grid: [{arrival_rate: fast}]", "a number above 0"),
        (CAPS + "grid: [{arrival_rate: .nan}]", "a number above 0"),
        (CAPS + "grid: [{arrival_rate: 1, arrival_process: gamma}]", "arrival_scv"),
        (CAPS + "grid: [{arrival_rate: 1, arrival_process: bursty}]", "bursty"),
        (CAPS + "grid: [{concurrency: 1.5}]", "a whole number"),
        (CAPS + "grid: [{arrival_rate: [1, 1]}]", "appears twice"),
        (CAPS + "grid: []", "a list of mappings"),
        (CAPS + "identity: {drafft_length: 3}\ngrid: [{concurrency: 1}]", "did you mean 'draft_length'"),
        (CAPS + "measure: {requests: many}\ngrid: [{concurrency: 1}]", "a number"),
        (CAPS + "measure: {until: 3}\ngrid: [{concurrency: 1}]", "until"),
        (CAPS + "measure: {seed: -3}\ngrid: [{concurrency: 1}]", "seed"),
        (CAPS + "measure: {seed: 1.5}\ngrid: [{concurrency: 1}]", "whole number"),
        (CAPS + "measure: {warmup_requests: -500}\ngrid: [{concurrency: 1}]", "warmup_requests"),
        (CAPS + "measure: {scrape_seconds: 0.0001}\ngrid: [{concurrency: 1}]", "scrape_seconds"),
        (CAPS + "prompts: {vocabulary: 0}\ngrid: [{concurrency: 1}]", "vocabulary"),
        (CAPS + "prompts: {words: []}\ngrid: [{concurrency: 1}]", "words"),
        (CAPS + "prompts: {words: 5}\ngrid: [{concurrency: 1}]", "a list"),
        (CAPS + "server: {extra: 5}\ngrid: [{concurrency: 1}]", "a mapping"),
        (CAPS + "server: {extra: {n: 2}}\ngrid: [{concurrency: 1}]", "the plan itself decides"),
        (CAPS + "server: {timeout: -1}\ngrid: [{concurrency: 1}]", "timeout"),
        (CAPS + "grid: [{concurrency: 1, prompt_length: []}]", "empty list"),
        (CAPS + "grid: [{concurrency: 1, draft_length: [0, 4]}]", "draft_length"),
        (CAPS + "grid: [{arrival_rate: 1, arrival_process: [poisson, gamma], arrival_scv: 4}]", "entry of its own"),
        (CAPS + "identity: {deployment: 2026-01-01}\ngrid: [{concurrency: 1}]", "deployment"),
        (CAPS + "identity: {draft_length: four}\ngrid: [{concurrency: 1}]", "draft_length"),
        (CAPS + "server: {metrics: 3}\ngrid: [{concurrency: 1}]", "true or false"),
        (CAPS + "server: {endpoint: chat}\ngrid: [{concurrency: 1}]", "token_ids needs the completions"),
        ("[" * 5000, "not valid YAML"),
        ("- 1", "a mapping"),
        ("grid: {a: *x}", "not valid YAML"),
    ],
)
def test_bad_plans_are_refused_before_anything_is_sent(text, message):
    with pytest.raises(InputError, match=message):
        read_plan(text)


@pytest.mark.parametrize(
    "url", [None, "", "localhost:8000", "ftp://x", "http://", "file:///etc/passwd", "http://h:99999"]
)
def test_bad_addresses(url):
    with pytest.raises(InputError, match="url"):
        check_url(url)


def test_the_template_is_a_plan():
    assert len(read_plan(TEMPLATE).cells()) == 6
    assert check_url("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("identity", "message"),
    [("tokens_per_step: 1.5", "tokens_per_step, which the engine counts"), ("method: none", "method none")],
)
def test_a_plan_may_not_replace_what_was_counted(tmp_path, identity, message):
    with running(FakeServer(first=0.005, gap=0.001, per_chunk=2)) as server:
        text = CAPS + QUICK + f"identity: {{deployment: fake, {identity}}}\n"
        plan = read_plan(text + "grid: [{concurrency: 2, prompt_length: 8, output_length: 9}]\n", url=server.url)
        with pytest.raises(NoResultError, match=message):
            collect(plan, tmp_path / "out")
