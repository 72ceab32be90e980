"""Deployments help each other: what siblings have in common becomes the prior of one with few rows (empirical Bayes).

In unconstrained coordinates (log, logit) sibling j has theta_j ~ N(mu, T), T = diag(tau^2) between deployments, and its
own rows tell m_j with precision L_j: that of its posterior less that of its prior, over its squared inflation. With the
deployment's own weak prior N(c, S^2) for mu, expectation-maximisation gives mu and

    tau^2 <- (PSEUDO*(SHARE*S)^2 + sum_j E[(theta_j - mu)^2])/(PSEUDO + siblings),

so that few siblings leave tau at a share of the weak prior, and coordinates that no sibling can tell stay where they
were. The prior of the deployment is then centred at mu, with spread^2 = tau^2 + Var(mu), at most S^2.

Siblings on the same hardware with the same verifier are taken as they are. Others are first scaled: by first principles
where both know theirs (:mod:`diffspec.fitting.principles`), else all their times by the median of measured over what
the sibling's model says of the deployment's own rows: one number, that a few rows tell well.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffspec.first_principles import FirstPrinciples
from diffspec.fitting import principles
from diffspec.fitting.deployment import FittedDeployment, FittedModel
from diffspec.fitting.evaluate import predict_trace
from diffspec.fitting.forms import Form
from diffspec.fitting.select import candidate_forms
from diffspec.parameters import get_parameters, parameter_infos, set_parameters, to_constrained, to_unconstrained
from diffspec.results import InputError

POOLS = ("hardware", "verifier", "engine", "all")
ENOUGH_ROWS = 16
"""Usable rows from which a deployment is fitted on its own, and only helps others."""
SHARE, PSEUDO = 0.3, 2.0
"""Spread between siblings before any is seen, as a share of the form's weak prior, and how many siblings that counts
as. Judgement."""
ITERATIONS = 200
KEY = "pooled_with"
"""Where a deployment's ``quality`` keeps its siblings: {"by", "deployments", "rows"}."""


@dataclasses.dataclass(frozen=True)
class Siblings:
    """``deployments`` that share what is ``by``, all of one form."""

    by: str
    deployments: tuple[FittedDeployment, ...]

    @property
    def form(self) -> str:
        """The form of all of them."""
        return self.deployments[0].form

    def told(self) -> dict[str, Any]:
        """What the quality of a fit keeps."""
        names = [sibling.name for sibling in self.deployments]
        return {KEY: {"by": self.by, "deployments": names, "rows": sum(map(_rows, self.deployments))}}


def check_pool(pool: str | None) -> None:
    """Raise :class:`InputError` for a pool that does not exist."""
    if pool is not None and pool not in POOLS:
        raise InputError(f"pool: got {pool!r}; allowed: {', '.join(POOLS)}")


def fit_in_turn(
    groups: Sequence[tuple[Any, Any]],
    usable: dict[Any, int],
    fit_one: Callable[..., FittedDeployment],
    least: int,
    step_time: str,
    pool: str | None = None,
    prior: FittedModel | None = None,
) -> tuple[list[FittedDeployment], list[str]]:
    """Fit the deployments ``groups`` (name, frame) by ``fit_one(name, frame, siblings)``; returns those fitted, in
    their order, and the names of those left out for want of rows.

    Without ``pool`` and ``prior`` each is fitted alone if it has ``least`` ``usable`` rows. With a pool, those with
    fewer than ENOUGH_ROWS are fitted (again) with those of at least ``least`` rows that share its column as siblings;
    with a prior model, every deployment has that model's as siblings.
    """
    check_pool(pool)
    if pool not in (None, "all"):
        named = [frame[pool].map(lambda value: isinstance(value, str)).any() for _, frame in groups]
        if not any(named):
            raise InputError(
                f"pool: got {pool!r}, but no row names its {pool}; allowed: a column {pool} in the trace "
                f"(--set {pool}=NAME for every row), or --pool all"
            )
    most = max(usable.values())
    alone: dict[Any, FittedDeployment] = {}
    if prior is None:
        for name, frame in groups:
            if usable[name] >= least:
                alone[name] = fit_one(name, frame, None)
    elif pool is not None:
        alone = {name: fit_one(name, frame, None) for name, frame in groups if usable[name] >= ENOUGH_ROWS}
    fitted, left_out = [], []
    for name, frame in groups:
        known = [*(prior.deployments.values() if prior is not None else ())]
        if pool is not None:
            known += [other for key, other in alone.items() if key != name]
        wants = 0 < usable[name] < ENOUGH_ROWS if prior is None else usable[name] > 0
        siblings = siblings_of(frame, known, pool or "all", step_time) if known and wants else None
        if prior is not None and wants and siblings is None:
            raise InputError(
                f"prior: none of its deployments ({', '.join(map(repr, prior.deployments))}) can tell of {name!r}; "
                f"allowed: a model that this version of diffspec fitted, of a form of --step-time {step_time}"
                + ("" if pool in (None, "all") else f", on the same {pool} (--pool all: whatever it is)")
            )
        if siblings is not None:
            fitted.append(fit_one(name, frame, siblings))
        elif name in alone:
            fitted.append(alone[name])
        elif usable[name] >= least or most < least:
            fitted.append(fit_one(name, frame, None))  # or says that it has too few rows
        else:
            left_out.append(str(name))
    return fitted, left_out


def siblings_of(frame, known: Sequence[FittedDeployment], pool: str, step_time: str) -> Siblings | None:
    """Those of ``known`` that share the ``pool`` column with the rows, that tell how sure they are, and have the form
    that most of their rows have among the forms asked for; None where there are none."""
    has_experts = all(frame[column].notna().any() for column in ("num_experts", "experts_per_token"))
    allowed = candidate_forms(step_time, has_experts)
    value = None if pool == "all" else _most_frequent(frame[pool])
    kept = [
        sibling
        for sibling in known
        if sibling.uncertainty is not None
        and sibling.form in allowed
        and (pool == "all" or (value is not None and sibling.defaults.get(pool) == value))
    ]
    if not kept:
        return None
    votes = Counter()
    for sibling in kept:
        votes[sibling.form] += _rows(sibling)
    form = votes.most_common(1)[0][0]
    return Siblings(pool, tuple(sibling for sibling in kept if sibling.form == form))


def informed(form: Form, siblings: Siblings | None, frame, start: FirstPrinciples | None = None) -> Form:
    """``form`` with its priors from the siblings; the frame's rows scale siblings of other sizes."""
    if siblings is None:
        return form
    infos, values = parameter_infos(form.template), get_parameters(form.template)
    centre = np.asarray([float(to_unconstrained(values[path], infos[path])) for path in form.paths])
    spread = np.asarray(form.spread)
    means, precisions = [], []
    for sibling in siblings.deployments:
        known = sibling.uncertainty
        if known is None or set(known.paths) != set(form.paths):
            continue
        order = [known.paths.index(path) for path in form.paths]
        told = get_parameters(sibling.serving)
        mean = np.asarray([float(to_unconstrained(told[path], infos[path])) for path in form.paths])
        times = np.asarray([infos[path].unit.startswith("s") for path in form.paths])
        means.append(mean + _scaled(sibling, form.paths, times, frame, start))
        covariance = known.covariance[np.ix_(order, order)]
        own = np.linalg.inv(covariance) - np.diag(known.prior[order] ** -2.0)
        eigenvalues, vectors = np.linalg.eigh(0.5 * (own + own.T))
        precisions.append((vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T / known.parameter_inflation**2)
    if not means:
        return form
    common, deviation = common_prior(np.stack(means), np.stack(precisions), centre, spread)
    centres = {
        path: jnp.asarray(float(to_constrained(common[index], infos[path]))) for index, path in enumerate(form.paths)
    }
    return dataclasses.replace(
        form, template=set_parameters(form.template, centres), spread=jnp.asarray(np.minimum(deviation, spread))
    )


def common_prior(
    means: np.ndarray, precisions: np.ndarray, centre: np.ndarray, spread: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(centre [p], spread [p]) of the prior that siblings with ``means`` [j, p] and ``precisions`` [j, p, p] give one
    more deployment, whose weak prior is N(centre, spread^2); see the module.

    >>> told = common_prior(np.array([[1.0], [1.0]]), np.full((2, 1, 1), 1e9), np.zeros(1), np.ones(1))
    >>> [round(float(part[0]), 2) for part in told]
    [0.98, 0.26]
    """
    count, between = len(means), (SHARE * spread) ** 2
    weak, mean = np.diag(spread**-2.0), centre.copy()
    known = np.einsum("jpq,jq->jp", precisions, means)
    for _ in range(ITERATIONS):
        share = np.diag(1.0 / between)
        covariances = np.linalg.inv(precisions + share)
        each = np.einsum("jpq,jq->jp", covariances, known + mean / between)
        mean = np.linalg.solve(weak + count * share, centre / spread**2 + each.sum(axis=0) / between)
        squares = (each - mean) ** 2 + np.einsum("jpp->jp", covariances)
        between = (PSEUDO * (SHARE * spread) ** 2 + squares.sum(axis=0)) / (PSEUDO + count)
    marginal = precisions - precisions @ np.linalg.inv(precisions + np.diag(1.0 / between)) @ precisions
    variance = np.diag(np.linalg.inv(weak + marginal.sum(axis=0)))
    return mean, np.sqrt(between + variance)


def _scaled(sibling: FittedDeployment, paths, times: np.ndarray, frame, start: FirstPrinciples | None) -> np.ndarray:
    """What to add [paths] to a sibling's coordinates to have it at the deployment's size; see the module."""
    kept = sibling.defaults.get(principles.KEY)
    if start is not None and kept is not None:
        before, after = (principles.known_costs(pair) for pair in (FirstPrinciples.from_dict(kept), start))
        ratios = [after[path] / before[path] if path in before and path in after else 1.0 for path in paths]
        return np.log(ratios)
    alike = all(
        sibling.defaults.get(column) is not None and sibling.defaults.get(column) == _most_frequent(frame[column])
        for column in ("verifier", "hardware")
    )
    if alike:
        return np.zeros(len(paths))
    try:
        scored = predict_trace(sibling, frame, with_intervals=False)
    except InputError:  # rows without acceptance, where the sibling has none either
        return np.zeros(len(paths))
    for column in ("itl_mean", "tpot_mean", "itl_p50", "tpot_p50", "e2e_mean", "e2e_p50", "ttft_mean"):
        if column in scored.measured:
            with np.errstate(all="ignore"):
                ratios = np.log(scored.measured[column] / scored.predicted[column])
            ratios = ratios[np.isfinite(ratios)]
            if len(ratios):
                return times * float(np.median(ratios))
    return np.zeros(len(paths))


def _rows(sibling: FittedDeployment) -> int:
    return int(sibling.quality.get("rows", 0))


def _most_frequent(values) -> str | None:
    named = [value for value in values if isinstance(value, str) and value]
    return Counter(named).most_common(1)[0][0] if named else None
