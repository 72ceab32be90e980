"""What a trace cannot tell, in words: directions of the parameters that its rows inform less than their priors do.

In standardised coordinates, whose priors are N(0, 1), the expected information F of the rows has eigenvalues e; along
its eigenvector the posterior is 1/sqrt(1+e) as wide as the prior. Below e = LEAST the trace tells less than half of
what is known there: such a direction is held by the prior and is no knowledge. A parameter of which the rows say
nothing has e = 0 by itself; what they tell only together with another shows as a direction that mixes both.
"""

from typing import Any

import numpy as np

from diffspec.fitting.forms import Form
from diffspec.parameters import parameter_infos

LEAST = 1.0
"""Information (prior = 1) below which a direction counts as untold."""
LOADING = 0.45
"""Share (of 1) of a direction's length that names a parameter."""


def untold_directions(form: Form, information: np.ndarray, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the rows do not tell: ``parameters`` (by path, with their loading in a direction), ``width`` (posterior over
    prior), and ``words``. First parameters of which the rows say nothing themselves, then combinations of those of
    which they do.

    ``information`` [paths, paths] without priors; ``facts``: :func:`trace_facts`.
    """
    infos, alone = parameter_infos(form.template), np.diag(information)

    def meaning(path: str) -> str:
        return f"{path.removeprefix('step_time.')} ({infos[path].meaning})"

    def entry(loadings: dict[str, float], value: float, words: str) -> dict[str, Any]:
        reason = ", ".join(dict.fromkeys(why for path in loadings if (why := _reason(path, facts))))
        width = float(1.0 / np.sqrt(1.0 + max(value, 0.0)))
        return {"parameters": loadings, "width": width, "words": words + (f": {reason}" if reason else "")}

    silent = alone < LEAST
    found = [
        entry({path: 1.0}, value, f"the trace does not tell {meaning(path)}")
        for path, value, quiet in sorted(zip(form.paths, alone, silent, strict=True), key=lambda item: item[1])
        if quiet
    ]
    heard = [path for path, quiet in zip(form.paths, silent, strict=True) if not quiet]
    values, vectors = np.linalg.eigh(information[np.ix_(~silent, ~silent)])
    for value, vector in zip(values, vectors.T, strict=True):
        if value >= LEAST:
            break
        order = [index for index in np.argsort(-np.abs(vector)) if abs(vector[index]) >= LOADING]
        loadings = {heard[index]: float(vector[index]) for index in order or [int(np.argmax(np.abs(vector)))]}
        if any(set(loadings) == set(known["parameters"]) for known in found):
            continue
        told = [meaning(path) for path in loadings]
        apart = f"the trace cannot separate {', '.join(told[:-1])} from {told[-1]}"
        found.append(entry(loadings, value, apart if len(told) > 1 else f"the trace hardly tells {told[0]}"))
    return found


def trace_facts(frame) -> dict[str, Any]:
    """How far the fitted rows vary, as :func:`untold_directions` gives reasons by."""
    lengths = sorted({int(k) for k in frame["draft_length"]})
    return {
        "draft_lengths": [k for k in lengths if k > 0],
        "prompts": sorted(set(frame["prompt_length"].dropna())),
        "outputs": sorted(set(frame["output_length"].dropna())),
        "closed": sorted(set(frame["concurrency"].dropna())),
        "open": bool(frame["arrival_rate"].notna().any()),
    }


def _reason(path: str, facts: dict[str, Any]) -> str:
    """Why a trace with these facts says little about a parameter; empty where nothing is obvious."""
    name, drafted = path.removeprefix("step_time."), facts["draft_lengths"]
    if name.startswith("draft.") and len(drafted) <= 1:
        return f"only k={drafted[0]} was measured" if drafted else "no speculative row was measured"
    if "sync" in name and len(facts["closed"]) <= 1:
        return "only one concurrency was measured" if facts["closed"] else "no closed loop was measured"
    if "prefill" in name and len(facts["prompts"]) <= 1:
        return f"only prompts of {facts['prompts'][0]:g} tokens were measured"
    if "kv" in name:
        context = [prompt + output for prompt in facts["prompts"] for output in facts["outputs"]]
        if context and max(context) < 4 * min(context):
            return f"contexts reach only from {min(context):g} to {max(context):g} tokens"
    if name == "request_overhead" and len(facts["prompts"]) <= 1:
        return "one prompt length cannot tell a request's overhead from its prefill"
    return ""
