"""Answers as HTML, for notebooks: what a cell shows when a fitted model, a prediction or a policy is its last line."""

from collections.abc import Sequence
from html import escape
from typing import Any

from diffspec.fitting.deployment import FittedDeployment, FittedModel
from diffspec.prediction import STAGES, Prediction
from diffspec.report.numbers import NONE, milliseconds, percent, quantity, significant, span
from diffspec.results import outcome_name


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table with everything in it escaped.

    >>> table("a < b", ["name"], [["1 & 2"]])
    '<table><caption>a &lt; b</caption><tr><th>name</th></tr><tr><td>1 &amp; 2</td></tr></table>'
    """
    lines = ["<tr>" + "".join(f"<th>{escape(text)}</th>" for text in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows]
    return f"<table><caption>{escape(title)}</caption>{''.join(lines)}</table>"


def deployment_html(deployment: FittedDeployment) -> str:
    """Parameters with their 90 % intervals, errors of the fit, and what the trace cannot tell."""
    plain = deployment.to_dict()
    parameters = [
        (
            path.removeprefix("step_time."),
            entry["meaning"],
            quantity(entry["value"], entry["unit"]),
            f"{quantity(entry['low'], entry['unit'])} to {quantity(entry['high'], entry['unit'])}"
            if "told" in entry
            else NONE,
        )
        for path, entry in plain["parameters"].items()
    ]
    errors = [
        (name, str(entry["rows"]), percent(entry["mape"]), percent(entry["bias"]), percent(entry.get("coverage")))
        for name, entry in deployment.quality.get("metrics", {}).items()
    ]
    measured = deployment.measured
    ranges = (
        f"draft lengths {', '.join(map(str, measured['draft_lengths']))}; {span(measured['arrival_rate'], 'req/s')}"
    )
    parts = [
        table(
            f"{deployment.name}: {deployment.form}, fitted to {ranges}",
            ("parameter", "meaning", "value", "90 %"),
            parameters,
        )
    ]
    if errors:
        parts.append(table("errors", ("observable", "rows", "mean error", "bias", "inside 90 %"), errors))
    untold = [entry["words"] for entry in deployment.quality.get("untold", ())]
    if untold:
        parts.append("<ul>" + "".join(f"<li>{escape(words)}</li>" for words in untold) + "</ul>")
    return "".join(parts)


def model_html(model: FittedModel) -> str:
    """:func:`deployment_html` of all deployments."""
    return "".join(deployment_html(deployment) for deployment in model.deployments.values())


def prediction_html(prediction: Prediction) -> str:
    """Outcome, metrics and stages of one operating point; arrays of many are told by their shape alone."""
    if getattr(prediction.e2e_latency, "ndim", 0):
        return f"<p>predictions of shape {escape(str(prediction.e2e_latency.shape))}</p>"
    outcome = outcome_name(prediction.result)
    ends = outcome != "saturated"
    metrics = [
        (name, milliseconds(float(getattr(prediction, name))) if ends else NONE)
        for name in ("ttft", "itl", "tpot", "e2e_latency", "waiting_time")
    ]
    metrics += [("effective_batch_size", significant(float(prediction.effective_batch_size)) if ends else NONE)]
    metrics += [(name, f"{significant(float(getattr(prediction, name)))} req/s") for name in ("throughput", "capacity")]
    metrics += [("utilization", percent(float(prediction.utilization)))]
    stages = [
        (
            stage,
            *(milliseconds(float(value)) if ends else NONE for value in (part.load_independent, part.load_dependent)),
        )
        for stage in STAGES
        for part in (prediction.decomposition[stage],)
    ]
    head = ("stage", "alone", "added by load")
    return table(f"prediction: {outcome}", ("metric", "value"), metrics) + table("where the time goes", head, stages)


def policy_html(answer: dict[str, Any]) -> str:
    """An answer of :func:`diffspec.policy`, by context: tiers of the schedule, and the advice in words."""
    parts = []
    for context in answer["contexts"]:
        rows = [
            (f"{tier['first_batch']} to {tier['last_batch']}", str(tier["draft_length"]), significant(tier["speedup"]))
            for tier in context["tiers"]
        ]
        title = f"{answer['deployment']}: draft length by batch, prompts of {context['prompt_length']:g} tokens"
        parts.append(table(title, ("batch", "draft length", "speedup"), rows))
        parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in context["advice"]) + "</ul>")
    return "".join(parts)
