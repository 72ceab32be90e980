"""The latest event as Prometheus metrics, and a small server that says them at /metrics."""

import re
import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from diffspec.monitoring.monitor import Monitor
from diffspec.monitoring.watching import WATCHED
from diffspec.monitoring.windows import LATENCIES
from diffspec.results import InputError

METRICS = {
    "diffspec_up": ("gauge", "1 while the watched server answers, 0 where the last scrape failed"),
    "diffspec_scrapes_total": ("counter", "scrapes by what came of them"),
    "diffspec_windows_compared_total": ("counter", "windows compared with the model"),
    "diffspec_last_scrape_timestamp_seconds": ("gauge", "time of the last scrape [unix s]"),
    "diffspec_arrival_rate": ("gauge", "requests that came in the last window [req/s]"),
    "diffspec_measured_latency_seconds": ("gauge", "mean latency of the last window [s]"),
    "diffspec_predicted_latency_seconds": ("gauge", "what the model says of it [s]; bound low and high: 90 %"),
    "diffspec_residual_score": ("gauge", "log(measured/predicted) in standard deviations, as the sums take it"),
    "diffspec_effective_batch_size": ("gauge", "mean requests in service [req]"),
    "diffspec_stage_share": ("gauge", "share of the predicted end-to-end latency by stage [1]"),
    "diffspec_capacity": ("gauge", "largest sustainable arrival rate by the model [req/s]"),
    "diffspec_utilization": ("gauge", "arrival rate over capacity [1]"),
    "diffspec_headroom": ("gauge", "1 - utilization [1]"),
    "diffspec_saturated": ("gauge", "1 where the model says that this load saturates the server"),
    "diffspec_tokens_per_step": ("gauge", "tokens emitted a step: measured, and expected by acceptance as known"),
    "diffspec_draft_length": ("gauge", "drafted tokens a step: now, and the best at this load [tok]"),
    "diffspec_draft_length_gain": ("gauge", "end-to-end latency now over that at the best draft length, - 1 [1]"),
    "diffspec_anomalies_total": ("counter", "changes told, by what changed"),
    "diffspec_standing_change": ("gauge", "change against the model that lasts, as a fraction; 0 for none"),
}
"""Exported metric -> (type, help). All have the label ``deployment``."""


def exposition(monitor: Monitor) -> str:
    """Everything that ``monitor`` knows now, as the Prometheus text format; numbers that do not exist are left out."""
    samples: dict[str, list[tuple[dict[str, str], Any]]] = {name: [] for name in METRICS}
    last = monitor.events[-1] if monitor.events else None
    seen = next((event for event in reversed(monitor.events) if event["predicted"] is not None), None)
    for kind, count in monitor.counts.items():
        samples["diffspec_scrapes_total"].append(({"event": kind}, count))
    samples["diffspec_windows_compared_total"].append(({}, monitor.compared))
    told = [anomaly["what"] for anomaly in monitor.anomalies]
    lasting = {entry["what"]: entry["change"] for entry in (last["standing"] if last else ())}
    for what in dict.fromkeys((*WATCHED, *told)):
        samples["diffspec_anomalies_total"].append(({"what": what}, told.count(what)))
        samples["diffspec_standing_change"].append(({"what": what}, lasting.get(what, 0.0)))
    if last is not None:
        samples["diffspec_up"].append(({}, int(last["event"] != "unreachable")))
        samples["diffspec_last_scrape_timestamp_seconds"].append(({}, last["time"]))
        if last["event"] not in ("unreachable", "start") and seen is not None:
            _window(samples, seen)
    own = {"deployment": monitor.deployment.name}
    lines = []
    for name, (kind, text) in METRICS.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [_line(name, own | labels, value) for labels, value in samples[name] if value is not None]
    return "\n".join(lines) + "\n"


def _window(samples: dict[str, list], event: Mapping[str, Any]) -> None:
    measured, predicted = event["measured"], event["predicted"]
    for metric in LATENCIES:
        samples["diffspec_measured_latency_seconds"].append(({"metric": metric}, measured[metric]))
        for bound in ("value", "low", "high"):
            labels = {"metric": metric, "bound": bound}
            samples["diffspec_predicted_latency_seconds"].append((labels, predicted[metric][bound]))
    for metric, residual in (event["residuals"] or {}).items():
        samples["diffspec_residual_score"].append(({"metric": metric}, residual["score"]))
    for source, value in (
        ("measured", measured["effective_batch_size"]),
        ("predicted", predicted["effective_batch_size"]["value"]),
    ):
        samples["diffspec_effective_batch_size"].append(({"source": source}, value))
    for stage, share in (predicted["stages"] or {}).items():
        samples["diffspec_stage_share"].append(({"stage": stage}, share))
    acceptance, advice = event["acceptance"] or {}, predicted["draft_length"] or {}
    for source, key in (("measured", "tokens_per_step"), ("expected", "expected_tokens_per_step")):
        samples["diffspec_tokens_per_step"].append(({"source": source}, acceptance.get(key)))
    for which in ("now", "best"):
        samples["diffspec_draft_length"].append(({"which": which}, advice.get(which)))
    for name, value in (
        ("arrival_rate", measured["arrival_rate"]),
        ("capacity", predicted["capacity"]["value"]),
        ("utilization", predicted["utilization"]["value"]),
        ("headroom", predicted["headroom"]),
        ("saturated", int(predicted["outcome"] == "saturated")),
        ("draft_length_gain", advice.get("gain")),
    ):
        samples[f"diffspec_{name}"].append(({}, value))


def _line(name: str, labels: Mapping[str, str], value: Any) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    inside = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {float(value)!r}"


class Exporter:
    """A server of the last text given to :meth:`publish`, at http://HOST:PORT/metrics, in a thread of its own.

    ``address``: "PORT" (on 127.0.0.1) or "HOST:PORT"; port 0 takes a free one. Raises :class:`InputError` for what is
    no address, and for one that cannot be taken.
    """

    def __init__(self, address: str):
        host, _, port = address.rpartition(":")
        if not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise InputError(f"--export-port: got {address!r}; allowed: PORT or HOST:PORT, 0 to 65535")
        self.text = ""
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                found = self.path.split("?")[0].rstrip("/") in ("/metrics", "")
                body = (exporter.text if found else "see /metrics\n").encode()
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format, *args):
                pass

        try:
            self._server = ThreadingHTTPServer((host.strip("[]") or "127.0.0.1", int(port)), Handler)
        except OSError as error:
            raise InputError(f"--export-port: {address} cannot be taken: {error.strerror or error}") from None
        self._server.daemon_threads = True
        self.url = f"http://{host or '127.0.0.1'}:{self._server.server_address[1]}/metrics"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def publish(self, text: str) -> None:
        """Say ``text`` from now on."""
        self.text = text

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def names_in(expressions: Iterable[str]) -> set[str]:
    """Exported names that PromQL ``expressions`` speak of.

    >>> sorted(names_in(["rate(diffspec_anomalies_total[5m])", "diffspec_up"]))
    ['diffspec_anomalies_total', 'diffspec_up']
    """
    return {name for text in expressions for name in re.findall(r"\bdiffspec_\w+", text)}
