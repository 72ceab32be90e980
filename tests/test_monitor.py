"""A server watched: windows from scrapes, residuals against the model, sums that tell changes, and what is exported.

The scrapes are of simulated servers (synthetic, experiments/10_monitoring/planted.py) whose faults are known, of small
hand-made servers, and of a real vLLM.
"""

import csv
import dataclasses
import json
import math
import threading
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import equinox as eqx
import numpy as np
import pytest
from helpers import assert_close, experiment, predict
from prometheus_client.parser import text_string_to_metric_families
from test_cli_main import run, toy_deployment, toy_model

from diffspec.fitting.drift import threshold
from diffspec.monitoring.asking import padded
from diffspec.monitoring.dashboard import dashboard, expressions
from diffspec.monitoring.exporting import METRICS, Exporter, exposition, names_in
from diffspec.monitoring.monitor import EVENTS, Monitor
from diffspec.monitoring.scrapes import Scrape, as_recording, fetch, live, metrics_url, recorded
from diffspec.monitoring.watching import SUMS, AcceptanceMemory, Watchman
from diffspec.monitoring.windows import window
from diffspec.results import InputError
from diffspec.traces.readers.prometheus import parse
from diffspec.workload import Workload

planted = experiment("10_monitoring", "planted")
FIXTURES = Path(__file__).parent / "fixtures" / "vllm"
QUIET, LONG = 20.0, 200.0
RUN_LENGTH = 1000.0


@pytest.fixture(scope="module")
def server():
    return planted.server()


@pytest.fixture(scope="module")
def lived(server):
    """The requests of simulated servers by what happens half-way."""
    segment = planted.Segment
    scenarios = {
        "steady": [segment(2 * LONG)],
        "slower": [segment(LONG), segment(LONG, slow=1.3)],
        "worse drafts": [segment(LONG), segment(LONG, acceptance=0.5), segment(LONG)],
    }
    lives = planted.lives(server, list(scenarios.values()), seed=1)
    seconds = {name: sum(part.seconds for part in parts) for name, parts in scenarios.items()}
    return {name: (events, seconds[name]) for name, events in zip(scenarios, lives, strict=True)}


@pytest.fixture(scope="module")
def texts(lived):
    """Recordings of these servers."""
    return {name: planted.recording(events, QUIET, seconds) for name, (events, seconds) in lived.items()}


def monitored(deployment, text: str, **asked) -> Monitor:
    monitor = Monitor(deployment, average_run_length=RUN_LENGTH, **asked)
    for snapshot in parse(text):
        monitor.take(Scrape(snapshot.time, snapshot=snapshot))
    return monitor


@pytest.fixture(scope="module")
def watched(server, texts):
    return {name: monitored(server, text) for name, text in texts.items()}


def within(anomaly, monitor) -> float:
    """Windows from the fault, half-way, to the event that told the anomaly."""
    told = next(event["time"] for event in monitor.events if anomaly in event["anomalies"])
    return (told - planted.START - LONG) / QUIET


# --- the sums ----------------------------------------------------------------------


def plain_sums(scores: np.ndarray, limit: float) -> np.ndarray:
    """Windows until the first alarm of two-sided sums over ``scores`` [windows, runs, watched], for each run."""
    up = down = np.zeros(scores.shape[1:])
    first = np.full(scores.shape[1], len(scores) + 1)
    for number, row in enumerate(scores, start=1):
        up, down = np.maximum(0.0, up + row - 1.0), np.maximum(0.0, down - row - 1.0)
        alarm = (np.maximum(up, down) > limit).any(axis=1)
        first = np.where(alarm & (first > number), number, first)
    return first


def test_false_alarms_come_as_seldom_as_promised():
    asked, random = 200.0, np.random.default_rng(0)
    lengths = plain_sums(random.standard_normal((4000, 400, SUMS // 2)), threshold(SUMS, asked))
    assert lengths.max() <= 4000  # every run ended
    error = lengths.std() / math.sqrt(lengths.size)
    assert error < 0.06 * asked and abs(lengths.mean() - asked) < 3.0 * error + 0.1 * asked  # an approximation


def test_the_watchman_never_rings_before_the_plain_sums():
    """Scores are clipped and their scale is learned, at least 1: both only lengthen runs."""
    names, random = ("ttft", "itl", "e2e_latency", "tokens_per_step"), np.random.default_rng(1)
    watchman = Watchman(10.0)
    scores = random.standard_normal((300, 8, 4))
    plain, found = plain_sums(scores, watchman.limit), []
    for run_scores in scores.transpose(1, 0, 2):
        watchman = Watchman(10.0)
        zero, one = dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0)
        for number, row in enumerate(run_scores, start=1):
            if watchman.take(float(number), dict(zip(names, row.tolist(), strict=True)), zero, one, 1e9)[0]:
                found.append(number)
                break
    assert len(found) == 8 and (np.asarray(found) >= plain).all() and np.mean(np.asarray(found) == plain) >= 0.5


def test_threshold_is_siegmunds():
    b = Watchman(RUN_LENGTH).limit + 1.166
    assert_close((math.exp(2 * b) - 2 * b - 1) / 2, RUN_LENGTH * SUMS, rtol=1e-6)
    assert Watchman(1e4).limit == threshold(SUMS, 1e4) > Watchman(1e3).limit


def test_a_change_is_told_once_lasts_and_goes_back():
    watchman, random, told = Watchman(RUN_LENGTH), np.random.default_rng(3), []
    for number, shift in enumerate([0.0] * 30 + [0.3] * 30 + [0.0] * 30):
        error = shift + 0.05 * float(random.standard_normal())
        anomalies, _ = watchman.take(float(number), {"itl": error}, {"itl": 0.0}, {"itl": 0.05}, 1e9)
        told += [(number, anomaly) for anomaly in anomalies]
        if number == 59:
            assert_close(watchman.standing["itl"].size, 0.3, rtol=0.15)
    (first, up), (second, back) = told
    delay = math.ceil(watchman.limit / 2.0)  # scores count 3 at most, less the reference of 1
    assert 30 <= first < 30 + delay and 60 <= second < 60 + 2 * delay
    assert not up["back"] and 28 <= up["since"] <= 31 and back["back"] and watchman.standing == {}
    assert "% higher than the model expected" in up["text"] and "back to what the model expects" in back["text"]


def test_acceptance_that_no_fit_told_is_learned_first():
    memory = AcceptanceMemory(2)
    assert memory.error((0.8, 0.8), 30.0, 64.0) is None
    for _ in range(3):
        memory.add((0.8, 0.7), 30.0)
    error, scale = memory.error((0.8, 0.7), 30.0, 64.0)
    assert abs(error) < 1e-12 and 0.0 < scale < 0.1
    assert_close(memory.rates, (0.8, 0.7), rtol=1e-12)
    fitted = AcceptanceMemory(2, fitted=(0.9, 0.9))
    for _ in range(100):  # however long it lasts, the fit stays what it is compared with
        fitted.add((0.8, 0.7), 30.0)
    assert_close(fitted.error((0.8, 0.7), 30.0, 64.0)[0], math.log((1 + 0.8 + 0.56) / (1 + 0.9 + 0.81)), rtol=1e-9)


# --- windows ----------------------------------------------------------------------


def test_a_window_is_what_the_requests_lived(lived):
    """Sums over the simulated requests themselves, against what is read off two scrapes."""
    events, _ = lived["steady"]
    one, two = (parse(planted.scrape_text(events, moment))[0] for moment in (40.0, 90.0))
    seen = window(one, 40.0, two, 90.0)
    done = (events["completion_time"] > 40.0) & (events["completion_time"] <= 90.0)
    began = (events["first_token_time"] > 40.0) & (events["first_token_time"] <= 90.0)
    come = (events["arrival_time"] > 40.0) & (events["arrival_time"] <= 90.0)
    e2e, ttft = (events[name] - events["arrival_time"] for name in ("completion_time", "first_token_time"))
    assert seen.requests == done.sum() and seen.draft_length == planted.K
    assert_close(seen.row["arrival_rate"], come.sum() / 50.0, rtol=1e-12)
    assert_close(seen.row["e2e_mean"], e2e[done].mean(), rtol=1e-9)
    assert_close(seen.row["ttft_mean"], ttft[began].mean(), rtol=1e-9)
    assert_close(seen.row["effective_batch_size"], e2e[done].sum() / 50.0, rtol=1e-9)
    tokens = 1.0 + events["accepted_tokens"][done].sum() / events["steps"][done].sum()
    assert_close(seen.row["tokens_per_step"], tokens, rtol=1e-9)
    assert_close(1.0 + np.cumprod(seen.acceptance(4.0)).sum(), tokens, rtol=1e-6)


def small(requests: int, seconds: float, running: int = 1, **labels: str) -> str:
    names = {"engine": "0", "model_name": "small"} | labels
    label = ",".join(f'{key}="{value}"' for key, value in names.items())
    sums = {"e2e_request_latency_seconds": seconds, "time_to_first_token_seconds": 0.1 * seconds}
    sums |= {"request_prompt_tokens": 64.0 * requests, "request_generation_tokens": 64.0 * requests}
    sums |= {"request_time_per_output_token_seconds": 0.9 * seconds / 63.0}
    lines = [f"vllm:num_requests_running{{{label}}} {running}", f"vllm:request_success_total{{{label}}} {requests}"]
    for name, total in sums.items():
        lines += [f"vllm:{name}_sum{{{label}}} {total}", f"vllm:{name}_count{{{label}}} {requests}"]
    return "\n".join(lines) + "\n"


def scrape(time: float, *args, **kwargs) -> Scrape:
    text = small(*args, **kwargs)
    return Scrape(time, snapshot=parse(text)[0], text=text)


def test_every_kind_of_event(server):
    monitor = Monitor(server)
    story = [
        scrape(0.0, 10, 20.0),
        scrape(10.0, 30, 50.0),
        scrape(20.0, 30, 50.0),
        Scrape(30.0, failure="Connection refused"),
        scrape(40.0, 50, 80.0),
        scrape(50.0, 2, 3.0),  # started anew
        scrape(60.0, 22, 33.0),
        scrape(60.0, 23, 35.0),  # the clock stands still
        scrape(160.0, 42, 63.0),
        scrape(170.0, 44, 66.0),
    ]
    events = [monitor.take(one) for one in story]
    kinds = [event["event"] for event in events]
    assert kinds == [
        *("start", "window", "idle", "unreachable", "window", "restart", "window", "disorder", "window", "window")
    ]
    assert set(kinds) == set(EVENTS) and monitor.counts == dict(Counter(kinds))
    assert all(event.keys() == events[0].keys() for event in events)
    first = events[1]["measured"]
    assert (first["arrival_rate"], first["e2e_latency"], first["effective_batch_size"]) == (2.0, 1.5, 3.0)
    assert events[4]["notes"] == ["1 scrapes before this one failed"] and events[4]["duration"] == 20.0
    assert "a gap" in events[8]["notes"][0] and "too few to be watched" in events[9]["notes"][0]
    assert "restarted" in events[5]["notes"][0]
    summary = monitor.summary()
    assert summary["scrapes"] == 10 and summary["compared"] == 5
    json.dumps([*events, summary], allow_nan=False)


def test_saturation_is_told_with_numbers(server):
    monitor = Monitor(server)
    monitor.take(scrape(0.0, 0, 0.0))
    event = monitor.take(scrape(1.0, 5000, 9000.0))
    predicted = event["predicted"]
    assert predicted["outcome"] == "saturated" and predicted["e2e_latency"]["value"] is None
    assert predicted["headroom"] < 0.0 < predicted["capacity"]["value"] < 5000.0
    assert predicted["stages"] is None and predicted["draft_length"]["best"] is None and event["anomalies"] == []
    json.dumps(event, allow_nan=False)


def test_a_closed_loop_is_asked_at_its_concurrency():
    monitor = Monitor(toy_deployment(), closed_loop=True)
    monitor.take(scrape(0.0, 0, 0.0))
    event = monitor.take(scrape(60.0, 240, 480.0))
    assert event["measured"]["effective_batch_size"] == 8.0 == event["predicted"]["effective_batch_size"]["value"]
    assert event["predicted"]["outcome"] == "successful" and event["predicted"]["inside_measured"]


def test_sglang_needs_to_be_told_its_draft_length(server):
    def text(n: int) -> str:
        lines = [f"sglang:num_requests_total {n}", f"sglang:generation_tokens_total {64 * n}"]
        lines += [f"sglang:prompt_tokens_total {64 * n}", f"sglang:spec_verify_calls_total {21 * n}"]
        for name, mean in (("time_to_first_token", 0.1), ("e2e_request_latency", 1.0)):
            lines += [f"sglang:{name}_seconds_sum {mean * n}", f"sglang:{name}_seconds_count {n}"]
        return "\n".join(lines) + "\n"

    seen = [Scrape(10.0 * i, snapshot=parse(text(20 * i))[0]) for i in (1, 2)]
    monitor = Monitor(server)
    assert "give --draft-length" in [monitor.take(one) for one in seen][1]["notes"][0]
    monitor = Monitor(server, draft_length=4.0)
    event = [monitor.take(one) for one in seen][1]
    assert event["acceptance"]["tokens_per_step"] == 3.0 and event["predicted"]["outcome"] == "successful"


# --- simulated servers ----------------------------------------------------------------------


def test_a_steady_server_agrees_and_raises_no_alarm(watched):
    monitor = watched["steady"]
    summary = monitor.summary()
    assert summary["compared"] == 20 and summary["anomalies"] == [] and summary["standing"] == []
    for metric, most in (("itl", 0.03), ("e2e_latency", 0.02), ("ttft", 0.08), ("tokens_per_step", 0.01)):
        assert abs(summary["bias"][metric]) < most, metric
    for event in monitor.events[1:]:
        predicted = event["predicted"]
        assert_close(sum(predicted["stages"].values()), 1.0, rtol=1e-9)
        assert_close(predicted["headroom"], 1.0 - predicted["utilization"]["value"], rtol=1e-9)
        rate = event["measured"]["arrival_rate"]
        assert_close(predicted["utilization"]["value"], rate / predicted["capacity"]["value"], rtol=1e-6)
        assert predicted["e2e_latency"]["low"] < event["measured"]["e2e_latency"] < predicted["e2e_latency"]["high"]


def test_a_slowdown_is_told_within_the_promised_windows(watched):
    monitor = watched["slower"]
    promised = math.ceil(threshold(SUMS, RUN_LENGTH) / 2.0) + 1  # one window may hold requests from before
    first = {anomaly["what"]: anomaly for anomaly in reversed(monitor.anomalies)}
    for metric in ("itl", "e2e_latency"):
        assert 0.0 < within(first[metric], monitor) <= promised, metric
        assert_close(first[metric]["change"], 0.3, rtol=0.25)
        assert abs(first[metric]["since"] - planted.START - LONG) <= 2 * QUIET
    assert "tokens_per_step" not in first
    assert {entry["what"] for entry in monitor.summary()["standing"]} >= {"itl", "e2e_latency"}


def test_worse_drafts_are_told_as_acceptance_not_as_time(watched):
    monitor = watched["worse drafts"]
    assert {anomaly["what"] for anomaly in monitor.anomalies} == {"tokens_per_step"}
    drop, back = monitor.anomalies
    assert 0.0 < within(drop, monitor) <= 4 and back["back"] and monitor.summary()["standing"] == []
    wanted = (1 - 0.5**5) / 0.5 / ((1 - 0.75**5) / 0.25)
    assert_close(1.0 + drop["change"], wanted, rtol=0.05)
    lost = next(event for event in monitor.events if event["time"] == planted.START + 2 * LONG - QUIET)
    advice = lost["predicted"]["draft_length"]
    assert advice["now"] == 4.0 and advice["best"] < 4 and advice["gain"] > 0.02


def test_the_advised_draft_length_is_the_best_of_all(server, watched):
    """Brute force: every draft length one by one, by the serving model alone."""
    event = watched["worse drafts"].events[-1]
    seen = event["measured"]
    lengths = [float(seen[name]) for name in ("prompt_length", "output_length")]
    load = Workload(*lengths, arrival_rate=float(seen["arrival_rate"]))
    serving = dataclasses.replace(server.serving, waiting_states=64)
    drafting = server.configuration(1.0, acceptance=padded(tuple(event["acceptance"]["known"])))
    configs = [eqx.tree_at(lambda c: c.draft_length, drafting, float(k)) for k in range(9)]
    latency = [float(predict(serving, load, config).e2e_latency) for config in configs]
    advice = event["predicted"]["draft_length"]
    assert advice["best"] == int(np.argmin(latency))
    assert_close(advice["gain"], latency[4] / min(latency) - 1.0, rtol=1e-6, atol=1e-9)


# --- a real vLLM ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "k"), [("k0", 0), ("eagle_k1_a80", 1), ("eagle_k3_a80", 3)])
def test_real_scrapes_say_what_the_client_measured(name, k):
    """Two windows of a real vLLM on an H200 against what the client of the same run measured in its own window."""
    with (Path(__file__).parents[1] / "data" / "vllm_h200.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["run"] == f"{name}__p512_o128_r14"]
    first, *_, last = recorded([FIXTURES / f"h200_{name}_r14_scrapes.txt"])
    seen = window(first.snapshot, first.time, last.snapshot, last.time)
    assert seen.kind == "window" and seen.draft_length == k
    assert (seen.row["prompt_length"], seen.row["output_length"]) == (512.0, 128.0)
    assert_close(seen.row["throughput"], float(row["throughput"]), rtol=0.2)
    for metric in ("ttft_mean", "itl_mean", "tpot_mean", "e2e_mean"):
        assert_close(seen.row[metric], float(row[metric]), rtol=0.25)
    if k:
        assert_close(seen.row["tokens_per_step"], float(row["tokens_per_step"]), rtol=0.02)


def test_an_idle_and_a_loaded_vllm(shared, server, tmp_path):
    folder = shared / "fixtures" / "prometheus"
    texts = [(folder / f"metrics_vllm_0.25.1_{state}__er0080.txt").read_text() for state in ("idle", "loaded")]
    (tmp_path / "recorded.txt").write_text("".join(f"# scrape {100 * i}\n{text}" for i, text in enumerate(texts)))
    model = toy_model(tmp_path / "model.json", server)
    ran = run("monitor", model, "--replay", tmp_path / "recorded.txt", "--json")
    event = json.loads(ran.out.splitlines()[1])
    assert ran.code == 0 and event["measured"]["requests"] == 600.0
    assert_close(event["measured"]["e2e_latency"], 999.2306158542633 / 600.0, rtol=1e-9)
    assert event["predicted"]["inside_measured"] is False


# --- exports ----------------------------------------------------------------------


def exported(text: str) -> dict[tuple, float]:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_exposition_says_what_the_event_says(watched):
    monitor = watched["slower"]
    event, text = monitor.events[-1], exposition(monitor)
    told = exported(text)
    own = ("deployment", "planted")
    assert told["diffspec_headroom", own] == event["predicted"]["headroom"]
    assert told["diffspec_up", own] == 1.0
    edges = event["predicted"]["itl"]
    for bound in ("low", "value", "high"):
        key = ("diffspec_predicted_latency_seconds", ("bound", bound), own, ("metric", "itl"))
        assert told[key] == edges[bound]
    counts = Counter(anomaly["what"] for anomaly in monitor.anomalies)
    assert told["diffspec_anomalies_total", own, ("what", "itl")] == counts["itl"] >= 1
    assert told["diffspec_standing_change", own, ("what", "tokens_per_step")] == 0.0
    assert {name for name, *_ in told} == set(METRICS)
    types = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert types == set(METRICS)
    assert all(kind == ("counter" if name.endswith("_total") else "gauge") for name, (kind, _) in METRICS.items())


def test_nothing_stale_is_exported_while_the_server_is_away(server):
    monitor = Monitor(dataclasses.replace(server, name='a "b"\\c'))
    assert exported(exposition(monitor))  # before any scrape
    for one in (scrape(0.0, 10, 20.0), scrape(10.0, 30, 50.0)):
        monitor.take(one)
    own = ("deployment", 'a "b"\\c')
    assert ("diffspec_headroom", own) in exported(exposition(monitor))
    monitor.take(Scrape(20.0, failure="gone"))
    told = exported(exposition(monitor))
    assert told["diffspec_up", own] == 0.0 and ("diffspec_headroom", own) not in told


def test_the_exporter_serves_and_ends():
    exporter = Exporter("0")
    exporter.publish("diffspec_up 1\n")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(exporter.url, timeout=5) as answer:
        assert answer.read() == b"diffspec_up 1\n" and answer.headers["Content-Type"].startswith("text/plain")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        opener.open(exporter.url.replace("/metrics", "/else"), timeout=5)
    port = exporter.url.rsplit(":", 1)[1].split("/")[0]
    with pytest.raises(InputError, match="cannot be taken"):
        Exporter(port)
    exporter.close()
    assert fetch(exporter.url).failure


def test_the_dashboard_is_whole():
    made = dashboard()
    ids = [panel["id"] for panel in made["panels"]]
    assert len(ids) == len(set(ids)) and json.loads(json.dumps(made)) == made
    asked = expressions(made)
    assert all(names_in([text]) and names_in([text]) <= set(METRICS) for text in asked), asked
    for panel in made["panels"]:
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters)) and panel["type"] in ("timeseries", "stat", "gauge")
        assert panel["targets"] and panel["title"] and panel["datasource"]["uid"] == "${datasource}"
    cells = Counter()
    for panel in made["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells.update((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))
    assert max(cells.values()) == 1, "panels overlap"
    assert all(text.count("{") == text.count("}") and text.count("(") == text.count(")") for text in asked)


# --- the command ----------------------------------------------------------------------


@pytest.fixture
def endpoint():
    """A server of /metrics that says one text after another, the last one for good; "" is an HTTP error."""
    said = {"texts": [], "asked": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            text = said["texts"][min(said["asked"], len(said["texts"]) - 1)]
            said["asked"] += 1
            self.send_response(200 if text else 503)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    said["url"] = f"http://127.0.0.1:{server.server_address[1]}"
    yield said
    server.shutdown()
    server.server_close()


def test_a_live_server_is_watched_recorded_and_replayed(endpoint, server, texts, tmp_path):
    blocks = texts["steady"].split("# scrape ")[1:6]
    blocks = [block.split("\n", 1)[1] for block in blocks]
    endpoint["texts"] = [blocks[0], blocks[1], "", "<html>no metrics</html>\n", blocks[2], blocks[0], blocks[3]]
    model = toy_model(tmp_path / "model.json", server)
    files = {name: tmp_path / name for name in ("recorded.txt", "grafana.json", "out.json")}
    options = ("--interval", "0.05", "--count", "7", "--record", files["recorded.txt"], "--export-port", "0")
    options += ("--grafana", files["grafana.json"], "--out", files["out.json"], "--json")
    ran = run("monitor", model, "--metrics-url", endpoint["url"], *options)
    assert ran.code == 0 and endpoint["asked"] == 7, ran.err
    assert "metrics at http://127.0.0.1:" in ran.err
    *events, summary = map(json.loads, ran.out.splitlines())
    kinds = ["start", "window", "unreachable", "unreachable", "window", "restart", "window"]
    assert [event["event"] for event in events] == kinds
    assert events[2]["notes"] == ["HTTP 503 Service Unavailable"] and "no counter" in events[3]["notes"][0]
    assert summary["event"] == "summary" and summary["compared"] == 3
    assert json.loads(files["out.json"].read_text()) == summary | {"windows": events}
    assert json.loads(files["grafana.json"].read_text()) == dashboard()

    again = run("monitor", model, "--replay", files["recorded.txt"], "--json")
    *replayed, told = map(json.loads, again.out.splitlines())
    assert again.code == 0 and [event["event"] for event in replayed] == kinds and told["compared"] == 3
    for one, other in zip(events, replayed, strict=True):
        assert abs(one["time"] - other["time"]) < 0.001
        assert (one["measured"] or {}).get("e2e_latency") == (other["measured"] or {}).get("e2e_latency")


def test_a_watch_is_shown(server, texts, tmp_path):
    model = toy_model(tmp_path / "model.json", server)
    lost = as_recording(Scrape(planted.START + 2 * LONG + 1.0, failure="Connection refused"))
    (tmp_path / "recorded.txt").write_text(texts["slower"] + lost)
    ran = run("monitor", model, "--replay", tmp_path / "recorded.txt")
    wanted = ("stages: waiting", "headroom", "draft length", "unreachable: Connection refused", "still: itl")
    assert ran.code == 0 and [text for text in wanted if text not in ran.out] == []
    assert "itl is " in ran.out and "% higher than the model expected" in ran.out and "nan" not in ran.out


def test_a_server_that_is_not_there_is_told(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
    model = toy_model(tmp_path / "model.json")
    ran = run("monitor", model, "--metrics-url", f"http://127.0.0.1:{port}", "--interval", "0.01", "--count", "2")
    assert ran.code == 1 and ran.out.count("unreachable: Connection refused") == 2
    assert "no window could be compared" in ran.out


def test_scrapes_keep_their_beat():
    waits = []
    assert len(list(live("http://127.0.0.1:9", 5.0, 3, wait=waits.append))) == 3
    assert len(waits) == 2 and all(4.0 < wait <= 5.0 for wait in waits)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/metrics", "http://", "http://host:x/", "http://a b/"]
)
def test_bad_addresses(url):
    with pytest.raises(InputError, match=r"--metrics-url: got .*; allowed: http"):
        metrics_url(url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--metrics-url or --replay: got neither"),
        (("--metrics-url", "http://a", "--replay", "b"), "got both"),
        (("--replay", "missing.txt"), "cannot be read"),
        (("--replay", "untimed.txt"), "a scrape without its time"),
        (("--replay", "empty.txt"), "no counter of vLLM or SGLang"),
        (("--replay", "good.txt", "--record", "x.txt"), "--record goes with --metrics-url"),
        (("--replay", "good.txt", "--interval", "0"), "--interval: got 0.0; allowed"),
        (("--replay", "good.txt", "--count", "0"), "--count: got 0; allowed"),
        (("--replay", "good.txt", "--draft-length", "2.5"), "draft_length: got 2.5; allowed: a whole number"),
        (("--replay", "good.txt", "--max-draft-length", "99"), "max_draft_length: got 99; allowed"),
        (("--replay", "good.txt", "--average-run-length", "1"), "average_run_length: got 1.0; allowed"),
        (("--replay", "good.txt", "--export-port", "http"), "--export-port: got 'http'; allowed"),
        (("--replay", "good.txt", "--grafana", "good.txt"), "would be overwritten"),
        (("--replay", "good.txt", "--deployment", "other"), "other"),
    ],
)
def test_bad_input_is_2_in_one_line(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_model(tmp_path / "model.json")
    Path("untimed.txt").write_text(small(1, 1.0) + "# scrape\n" + small(2, 2.0))
    Path("empty.txt").write_text("nothing\n")
    Path("good.txt").write_text(as_recording(scrape(10.0, 1, 1.0)))
    ran = run("monitor", "model.json", *options)
    assert ran.code == 2 and message in ran.err and ran.err.count("\n") == 1, ran


def test_scrapes_with_their_time_in_the_name(tmp_path):
    for moment, requests in ((1790000010, 30), (1790000000, 10)):
        (tmp_path / f"metrics_{moment}.txt").write_text(small(requests, 2.0 * requests))
    found = recorded(sorted(tmp_path.iterdir(), reverse=True))
    assert [one.time for one in found] == [1790000000.0, 1790000010.0]
