"""One self-contained HTML page of a fitted deployment: text and tables from here, curves by its own script.

The script holds the model itself, translated from the JAX one (:mod:`diffspec.browser.serving`); the page loads nothing
from anywhere, and says so to the browser. A page of several deployments holds each as a template and as a script that
waits: the one that is chosen is put in place and run when the page loads.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from diffspec.browser.serving import browser_functions
from diffspec.fitting.deployment import FittedDeployment
from diffspec.report.files import json_text
from diffspec.report.numbers import NONE, percent, quantity, span

SCRIPTS = ("charts.js", "ask.js", "page.js")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
STAGES = ("overhead", "prefill", "draft", "verify", "waiting")
"""Stages from the bottom of the picture up."""
METRICS = {
    "e2e_latency": "end-to-end latency",
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "gap between stream events",
    "throughput": "throughput",
}
ANSWERS = {
    "e2e_latency": "end-to-end latency",
    "ttft": "time to first token",
    "tpot": "time per output token",
    "speedup": "speedup over no speculation",
    "throughput": "throughput",
    "effective_batch_size": "effective batch size",
    "tokens_per_step": "tokens per step",
    "utilization": "utilization",
    "capacity": "capacity",
}
SLIDERS = {
    "arrival_rate": ("Arrival rate", "req/s"),
    "concurrency": ("Requests in flight", ""),
    "draft_length": ("Draft length", "tok"),
    "acceptance_rate": ("Acceptance rate", ""),
    "prompt_length": ("Prompt length", "tok"),
    "output_length": ("Output length", "tok"),
    "max_batch_size": ("Batch cap", "req"),
}
ZONES = (
    "below 0.67×",
    "to 0.85×",
    "to 0.97×",
    "about 1×",
    "to 1.3×",
    "to 1.8×",
    "to 2.5×",
    "above, or only speculation",
)


def page_html(data: dict[str, Any], deployment: FittedDeployment) -> str:
    """The page of :func:`diffspec.report.page_data.page_data`'s data."""
    script = "\n".join(['"use strict";', _own_script(data, deployment), *map(_asset, SCRIPTS)])
    title = f"{data['deployment']}: latency of speculative decoding"
    return _document(title, f"{_body(data)}\n<script>\n{script}\n</script>")


def pages_html(pages: Sequence[tuple[dict[str, Any], FittedDeployment]]) -> str:
    """One page of several deployments, with a chooser; ``#deployment=NAME`` in its address opens it at one of them."""
    names = [data["deployment"] for data, _ in pages]
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names)
    parts = [
        f"<template>\n{_body(data)}\n</template>\n"
        f'<script type="text/plain" class="own">\n{_own_script(data, deployment)}\n</script>'
        for data, deployment in pages
    ]
    shared = "\n".join(map(_asset, SCRIPTS))
    return _document(
        f"{len(names)} deployments: latency of speculative decoding",
        f"""<nav class="chooser" aria-label="Deployments"><label for="deployment">Deployment</label>
<select id="deployment">{options}</select></nav>
<noscript><p>This page computes what it shows: it needs JavaScript.</p></noscript>
{"".join(parts)}
<script type="text/plain" id="shared">
{shared}
</script>
<script>
{_asset("chooser.js")}</script>""",
    )


def _asset(name: str) -> str:
    return files("diffspec.report").joinpath("page").joinpath(name).read_text(encoding="utf-8")


def _own_script(data: dict[str, Any], deployment: FittedDeployment) -> str:
    """The data of a deployment and its model as functions."""
    cap = data["sliders"].get("max_batch_size")
    functions = browser_functions(deployment, None if cap is None else cap["max"])
    shown = json.dumps(json.loads(json_text(data)), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"const DATA={shown};\n{functions}"


def _body(data: dict[str, Any]) -> str:
    return f"""<a class="skip" href="#controls">Skip to the controls</a>
{_header(data)}
<main>
{_ask(data)}
{_where_time_goes()}
{_policy(data)}
{_quality(data)}
{_knowledge(data)}
</main>
{_footer(data)}"""


def _document(title: str, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_asset("page.css")}</style>
</head>
<body data-busy="true">
{body}
</body>
</html>
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, body: str = "", kind: str = "") -> str:
    cells = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>\n" for row in rows)
    named = f' id="{body}"' if body else ""
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(", ".join(head))}"><table class="{kind}">'
        f"<thead><tr>{cells}</tr></thead><tbody{named}>\n{lines}</tbody></table></div>"
    )


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>"


def _header(data: dict[str, Any]) -> str:
    facts = "".join(
        f"<li><span class=quiet>{escape(name)}</span> {escape(value)}</li>" for name, value in data["facts"].items()
    )
    quality = data["quality"]
    error = quality.get("metrics", {}).get("e2e_mean") or next(iter(quality.get("metrics", {}).values()), None)
    told = f"; mean error on them {percent(error['mape'])}" if error else ""
    return f"""<header>
<h1>{escape(data["deployment"])}</h1>
<p>What this server's latency is at any load, where speculative decoding pays, and which draft length to use: the
{escape(data["form"])} latency model, fitted to {quality.get("rows", 0)} measured operating points{told}. Everything on
this page is computed here, by the fitted model.</p>
<ul class="facts">{facts}</ul>
</header>"""


def _slider(name: str, slider: dict[str, float]) -> str:
    label, unit = SLIDERS[name]
    numbers = " ".join(f'{key}="{slider[key]:g}"' for key in ("min", "max", "step", "value"))
    return (
        f'<div class="row" id="{name}-row"><label for="{name}">{label}'
        f'<output for="{name}" data-of="{name}" data-unit="{unit}">{slider["value"]:g} {unit}</output></label>'
        f'<input type="range" id="{name}" name="{name}" {numbers}></div>'
    )


def _ask(data: dict[str, Any]) -> str:
    sliders, measured = data["sliders"], data["measured"]
    is_open = measured.get("arrival_rate") is not None or measured.get("concurrency") is None
    loops = "".join(
        f'<label class="choice"><input type="radio" name="loop" value="{name}"{" checked" if chosen else ""}>{text}'
        "</label>"
        for name, text, chosen in (
            ("arrival_rate", "open loop", is_open),
            ("concurrency", "closed loop", not is_open),
        )
    )
    own = (
        '<label class="choice"><input type="checkbox" id="own" checked>acceptance as measured</label>'
        if data["acceptance"] is not None
        else ""
    )
    first = ("arrival_rate", "concurrency", "draft_length")
    rest = [name for name in SLIDERS if name in sliders and name not in first]
    answers = "".join(
        f'<div><dt>{text}</dt><dd><span id="answer-{name}">{NONE}</span>{_small(name)}</dd></div>'
        for name, text in ANSWERS.items()
    )
    choices = "".join(f'<option value="{name}">{text}</option>' for name, text in METRICS.items())
    band = (
        "; shaded: where 90 % of long benchmarks would lie" if data["draws"] else "; no intervals: the model has none"
    )
    return f"""<div class="ask">
<form id="controls" aria-label="What is asked" onsubmit="return false">
<fieldset><legend>Load</legend>{loops}</fieldset>
{"".join(_slider(name, sliders[name]) for name in first)}
{own}
{"".join(_slider(name, sliders[name]) for name in rest)}
</form>
<section aria-labelledby="head-ask">
<h2 id="head-ask">At this load</h2>
<p id="answer-words" role="status" aria-live="polite"></p>
<dl class="answers">{answers}</dl>
<div class="box" id="hull-box" data-inside="true" aria-live="polite"><p id="hull-head"></p><ul id="hull"></ul></div>
<h3><label for="metric">Over load:</label> <select id="metric">{choices}</select></h3>
<figure><svg id="curves" role="img" aria-label="Latency over load"></svg>
<ul class="key"><li><i class="line spec"></i>with this draft length</li>
<li><i class="line plain"></i>no speculation</li></ul>
<figcaption>Dots: rows measured at these lengths (ring: held out of the fit){band}.</figcaption></figure>
<details><summary>The curves as numbers</summary>
<p class="quiet" id="curve-unit"></p>
{_table(("load", "with this draft length", "no speculation"), (), body="curve-values")}
</details>
</section>
</div>"""


def _small(name: str) -> str:
    return f'<small id="interval-{name}"></small>' if name in ("e2e_latency", "ttft", "tpot") else ""


def _where_time_goes() -> str:
    key = "".join(f'<li><i class="{stage}"></i>{stage}</li>' for stage in STAGES)
    head = ("stage", "alone on the server", "added by load", "share")
    return f"""<section aria-labelledby="head-stages">
<h2 id="head-stages">Where the time goes</h2>
<p id="stage-words" aria-live="polite"></p>
<div class="pair"><figure><svg id="stages" role="img" aria-label="Latency by stage over load"></svg>
<ul class="key">{key}</ul>
<figcaption>Below, in full colour, what a request takes alone; above, paler, what the load adds.</figcaption></figure>
{_table(head, (), body="stage-values")}</div>
</section>"""


def _policy(data: dict[str, Any]) -> str:
    policy = f"""<section aria-labelledby="head-policy">
<h2 id="head-policy">Which draft length</h2>
<p>The draft length with the smallest end-to-end latency at each load, at this acceptance and these lengths.</p>
<figure><svg id="policy" role="img" aria-label="Best draft length over load"></svg></figure>
{_table(("load", "draft length", "speedup"), (), body="policy-values")}
</section>"""
    if not data["plain_measured"]:
        reason = "No row without speculation was fitted: what speculation gains is not known."
        return f'<div class="pair">{policy}<section><h2>Where speculation pays</h2><p>{reason}</p></section></div>'
    zones = "".join(f'<li><i class="z{index}"></i>{text}</li>' for index, text in enumerate(ZONES))
    return f"""<div class="pair">{policy}
<section aria-labelledby="head-map">
<h2 id="head-map">Where speculation pays</h2>
<p id="map-words" aria-live="polite"></p>
<figure><svg id="map" role="img" aria-label="Speedup over load and acceptance"></svg>
<ul class="key"><li><i class="line contour"></i>break-even</li>{zones}<li><i class="none"></i>both saturate</li></ul>
<figcaption>Speedup of the draft length over no speculation, if every draft token is accepted at the same
rate.</figcaption></figure>
</section></div>"""


def _errors(data: dict[str, Any]) -> str:
    quality, rows = data["quality"], []
    kinds = [("fitted", quality.get("metrics", {})), ("held out", quality.get("holdout", {}).get("metrics", {}))]
    for label, metrics in kinds:
        for name, entry in metrics.items():
            numbers = (percent(entry[key]) for key in ("mape", "max_ape", "bias"))
            r2 = NONE if entry["r2"] is None else f"{entry['r2']:.3f}"
            rows.append((name, label, str(entry["rows"]), *numbers, r2, percent(entry.get("coverage"))))
    head = ("observable", "rows are", "rows", "mean error", "worst", "bias", "R²", "inside 90 %")
    return _table(head, rows, kind="numbers") if rows else "<p>The model file holds no errors.</p>"


def _quality(data: dict[str, Any]) -> str:
    holdout, chosen = data["quality"].get("holdout"), data["quality"].get("chosen", "")
    apart = f"{holdout['rows']} rows were held out ({holdout['expression']}). " if holdout else ""
    names = list(dict.fromkeys(name for row in data["rows"] for name in row["metrics"]))
    first = "e2e_mean" if "e2e_mean" in names else names[0] if names else ""
    options = "".join(
        f'<option value="{escape(name)}"{" selected" if name == first else ""}>{escape(name)}</option>'
        for name in names
    )
    picture = (
        f"""<figure><label for="parity-metric">Predicted against measured:</label>
<select id="parity-metric">{options}</select>
<svg id="parity" role="img" aria-label="Predicted against measured"></svg>
<figcaption><span id="parity-words"></span> Bars: 90 % intervals; rings: held out.</figcaption></figure>"""
        if names
        else "<p>No measured rows were given: name the trace beside the model (diffspec report model.json trace.csv) "
        "to see them here.</p>"
    )
    return f"""<section aria-labelledby="head-quality">
<h2 id="head-quality">How good the fit is</h2>
<p>{escape(apart)}{escape(chosen[:1].upper() + chosen[1:])}</p>
<div class="pair">{_errors(data)}{picture}</div>
</section>"""


def _knowledge(data: dict[str, Any]) -> str:
    rows = []
    for path, entry in data["parameters"].items():
        told = entry.get("told")
        edges = (
            f"{quantity(entry['low'], entry['unit'])} to {quantity(entry['high'], entry['unit'])}"
            if told is not None
            else NONE
        )
        value = quantity(entry["value"], entry["unit"])
        rows.append((path.removeprefix("step_time."), entry["meaning"], value, edges, percent(told)))
    head = ("parameter", "meaning", "value", "90 %", "told by the trace")
    measured = data["measured"]
    ranges = [
        ("draft lengths", ", ".join(str(k) for k in measured["draft_lengths"])),
        ("arrival rate", span(measured.get("arrival_rate"), "req/s")),
        ("requests in flight", span(measured.get("concurrency"))),
        ("prompt length", span(measured.get("prompt_length"), "tok")),
        ("output length", span(measured.get("output_length"), "tok")),
        ("tokens per step", span(measured.get("tokens_per_step"))),
    ]
    untold = _list(data["untold"]) if data["untold"] else "<p>Nothing that the fit has found.</p>"
    warned = f'<h3>Warnings</h3><div class="box">{_list(data["warnings"])}</div>' if data["warnings"] else ""
    return f"""<section aria-labelledby="head-untold">
<h2 id="head-untold">What the trace cannot tell</h2>
<p>These stay near a weak prior, and are no knowledge:</p>
{untold}
{warned}
<h3>Measured ranges</h3>
{_table(("what", "from and to"), ranges)}
<details><summary>The fitted parameters</summary>{_table(head, rows)}</details>
</section>"""


def _footer(data: dict[str, Any]) -> str:
    made = data["provenance"]

    def versions(found: dict[str, str]) -> str:
        return ", ".join(f"{name} {version}" for name, version in found.items())

    lines = [
        ("command", made["command"]),
        ("model file", made["model_file"]),
        ("sha256 of the model", made["model_sha256"]),
        ("sha256 of the fitted rows", made["rows_sha256"]),
        ("hardware measured", data["facts"].get("hardware", "")),
        ("fitted with", versions(made["fitted_with"])),
        ("page made with", versions(made["made_with"])),
    ]
    return f"""<footer>
<h2>To reproduce this page</h2>
{_table(("what", "value"), [line for line in lines if line[1]])}
<p class="quiet">The curves are computed in this page by code translated from the fitted model; it loads nothing from
the network.</p>
</footer>"""
