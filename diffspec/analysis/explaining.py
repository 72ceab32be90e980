"""All that `diffspec sensitivity` can tell: elasticities and, where asked, what lies behind and beyond them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffspec.analysis.before_traces import Unmeasured
from diffspec.analysis.bottleneck import explanation, halved, spider
from diffspec.analysis.second_order import second_order
from diffspec.analysis.sensitivity import explained, find_slopes, not_fitting
from diffspec.analysis.spread_of_metric import global_indices, linear_shares, overstated, unknown_of
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.uncertainty import DRAWS
from diffspec.results import InputError
from diffspec.workload import Workload


def explain(
    subject: FittedDeployment | Unmeasured,
    workload: Workload,
    config: Configuration,
    metric: str = "e2e_mean",
    *,
    in_words: bool = True,
    interactions: bool = False,
    indices: bool = False,
    spans: Mapping[str, float] | None = None,
    points: int | None = None,
    scaled: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Why a metric is what it is: :func:`diffspec.sensitivity`, and, where asked, what lies behind and beyond it.

    * ``in_words``: ``explanation`` (sentences) with the ``halved`` parameters behind it, over the draws, too
      (:mod:`diffspec.analysis.bottleneck`), and ``uncertainty``, the share of each parameter in what is not known of
      the metric (:func:`diffspec.analysis.spread_of_metric.linear_shares`; None where the model does not tell how sure
      it is)
    * ``interactions``: ``second_order`` (:func:`diffspec.analysis.second_order.second_order`)
    * ``indices``: ``global``, Sobol' indices over what the fit leaves open and fields known to ``spans`` percent, of
      ``points`` points (:func:`diffspec.analysis.spread_of_metric.global_indices`)
    * ``scaled``: ``spider``, the metric as one parameter is scaled (:func:`diffspec.analysis.bottleneck.spider`)

    ``subject``: a fit, or what :func:`diffspec.before_traces` makes of data sheets; ``progress`` is told what is done
    and the share of it from 0 to 1. Errors: :class:`InputError` as ``sensitivity``, for spans without ``indices``, and
    for unknown spans.

    >>> from diffspec import Configuration, ConstantAcceptance, FirstPrinciples, Transformer, Workload, accelerator
    >>> from diffspec import before_traces
    >>> verifier = Transformer("8B", 32, 4096, 128256, 32, 8, 128, 14336)
    >>> subject = before_traces(FirstPrinciples(verifier, accelerator("h100"), drafter_kind="head"))
    >>> asked = Workload(512, 128, arrival_rate=4.0), Configuration(3, ConstantAcceptance(0.8))
    >>> explain(subject, *asked)["explanation"][0]
    'at 4 req/s 52 % of end-to-end latency (501 ms) is load-independent verification; 7 % in all comes from load'
    """
    tell = progress or (lambda label, share: None)
    if (spans or points) and not indices:
        raise InputError(f"{'span' if spans else 'points'}: got one without global indices; allowed: with --global")
    unmeasured = subject if isinstance(subject, Unmeasured) else None
    deployment = subject.deployment if isinstance(subject, Unmeasured) else subject
    slopes = find_slopes(deployment.serving, workload, config, metric)
    unknown = unknown_of(slopes, deployment, spans) if indices else None
    fits = unmeasured is None or unmeasured.plan.fits
    models = unmeasured.models() if unmeasured is not None else None
    if models is None and deployment.uncertainty is not None:
        models = deployment.uncertainty.models(slopes.point.serving, DRAWS)
    answer = explained(slopes, deployment, draws=models, progress=partial(tell, "intervals"))
    if in_words:
        tell("halved costs", 0.0)
        answer["halved"] = halved(slopes, models)
        answer["explanation"] = explanation(slopes, answer["halved"]) if fits else []
        known = unknown_of(slopes, deployment) if deployment.uncertainty is not None else None
        told = answer["uncertainty"] = None if known is None else linear_shares(known)
        if told is not None:
            answer["warnings"] += overstated(told["deviation"], told["deviation_of_draws"], "the linear uncertainty")
    if interactions:
        tell("second order", 0.0)
        answer["second_order"] = second_order(slopes)
    if unknown is not None:
        found = answer["global"] = global_indices(unknown, points, partial(tell, "Sobol' indices"))
        if not spans:
            of_draws = found["linear"]["deviation_of_draws"]
            answer["warnings"] += overstated(found["deviation"], of_draws, "the law behind the Sobol' indices")
    if scaled:
        answer["spider"] = spider(slopes)
    return answer if unmeasured is None else answer | not_fitting(unmeasured)
