"""No compilation on second use: a public verb asked again with other numbers of the same shape compiles nothing.

Counted by the events of jax itself, each of one program handed to XLA, the small ones of single operations too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
import pytest
from test_cli_main import TRACE, toy_deployment

import diffspec
from diffspec.acceptance import ConstantAcceptance
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.optimizing.catalogue import RequestClass
from diffspec.optimizing.limits import parse_limit
from diffspec.workload import Workload

COMPILED = "/jax/core/compile/backend_compile_duration"
NAMES: list[str] = []


def _count(event: str, seconds: float, **about) -> None:
    if event == COMPILED:
        NAMES.append(str(about.get("fun_name", "unknown")))


jax.monitoring.register_event_duration_secs_listener(_count)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of programs that are compiled inside, complete at its end."""
    before, found = len(NAMES), []
    yield found
    found.extend(NAMES[before:])


class Numbers(NamedTuple):
    """One set of numbers to ask with."""

    cost: float
    covariance: float
    lengths: tuple[float, float]
    loads: tuple[float, ...]
    bound: float
    rate: float

    @property
    def deployment(self) -> FittedDeployment:
        """The toy deployment at other costs, known to within some percent."""
        made, noise = toy_deployment(), {"ttft_mean": 0.05, "itl_mean": 0.02}
        paths = ("step_time.verify_base", "step_time.verify_query")
        spread = np.diag([self.covariance] * 2)
        known = Uncertainty("laplace", paths, spread, np.ones(2), noise, dict.fromkeys(noise, 0.0), 5.0, {})
        return replace(made, serving=jax.tree.map(lambda leaf: leaf * self.cost, made.serving), uncertainty=known)

    @property
    def certain(self) -> FittedDeployment:
        """The same without draws."""
        return replace(self.deployment, uncertainty=None)

    @property
    def request(self) -> dict[str, float]:
        return {"prompt_length": self.lengths[0], "output_length": self.lengths[1]}

    @property
    def workload(self) -> Workload:
        return Workload(*self.lengths, arrival_rate=self.loads[0])

    @property
    def acceptance(self) -> ConstantAcceptance:
        return ConstantAcceptance(self.rate)


ONE = Numbers(1.0, 0.03, (64.0, 64.0), (1.0, 2.0, 5.0), 0.5, 0.8)
OTHER = Numbers(1.1, 0.02, (80.0, 50.0), (1.5, 3.0, 4.0), 0.3, 0.7)
LONGEST = {"max_draft_length": 4}


def predict(at: Numbers, **asked):
    return diffspec.predict_answer(at.deployment, at.workload, at.deployment.configuration(4.0 * at.rate), **asked)


def optimize(at: Numbers, metric: str = "ttft_mean", **asked):
    asked = {"loads": at.loads} | asked
    deployment = at.certain if metric.endswith("p95") else at.deployment
    return diffspec.optimize(deployment, slo=(f"{metric}<{at.bound}", "e2e_mean<9"), **asked, **at.request, **LONGEST)


def policy(at: Numbers):
    return diffspec.policy(at.deployment, loads=at.loads, slo=(f"ttft_mean<{at.bound}",), **at.request, **LONGEST)


def fleet(at: Numbers):
    deployments = {"a": at.certain, "b": toy_deployment()}
    return diffspec.optimize_fleet(deployments, loads=at.loads, slo=(f"ttft_mean<{at.bound}",), **at.request)


def size(at: Numbers):
    slo = (f"ttft_p95<{at.bound}", f"tpot_mean<{at.bound / 10}")
    target = 100.0 * at.rate
    return diffspec.size(at.certain, target_rate=target, slo=slo, acceptance=at.acceptance, **at.request, **LONGEST)


def sensitivity(at: Numbers):
    return diffspec.sensitivity(at.deployment, at.workload, at.deployment.configuration(4.0 * at.rate))


def boundary(at: Numbers):
    axes = {"arrival_rate": (at.cost, 20.0), "acceptance_rate": (0.2, at.rate)}
    return diffspec.boundary(at.certain, axes, **at.request, **LONGEST)


def jointly(at: Numbers, loads: tuple[float, ...] = ()):
    limit = parse_limit(f"ttft_mean<{at.bound}")
    chat = RequestClass("chat", at.rate, 300.0, 200.0, acceptance=at.acceptance)
    code = RequestClass("code", 1.0 - at.rate, *at.lengths, acceptance=at.acceptance, limits=(limit,))
    asked = {"classes": (chat, code), "batch_caps": (8.0, 48.0)}
    return diffspec.optimize_jointly(at.certain, loads=loads or at.loads, **asked, **LONGEST)


def test_the_counter_counts():
    def fresh(x):
        return 3.0 * x

    program = jax.jit(fresh)
    with compilations() as first:
        program(np.ones(3))
    with compilations() as again:
        program(np.zeros(3))
    with compilations() as longer:
        program(np.ones(4))
    assert (len(first), len(again), len(longer)) == (1, 0, 1)
    assert "fresh" in first[0]


def compiles_once(verb: Callable, *others: Callable) -> None:
    """``verb`` of some numbers compiles, of others nothing; nor do ``others``."""
    first = verb(ONE)
    with compilations() as found:
        second = verb(OTHER)
        for other in others:
            other()
    assert found == []
    assert first != second  # other numbers, other answer: nothing was remembered


def test_predict():
    compiles_once(predict)


def test_optimize_whatever_the_number_of_loads():
    four = (0.5, 1.0, 2.0, 6.0)
    compiles_once(optimize, lambda: optimize(OTHER, loads=four), lambda: optimize(ONE, loads=four))


@pytest.mark.slow
@pytest.mark.parametrize("verb", [policy, fleet, size, sensitivity, boundary])
def test_the_other_verbs(verb):
    compiles_once(verb)


@pytest.mark.slow
def test_a_joint_decision_whatever_the_number_of_loads():
    compiles_once(jointly, lambda: jointly(OTHER, (1.0, 2.0, 3.0, 4.0)))


@pytest.mark.slow
def test_percentiles():
    compiles_once(lambda at: predict(at, percentile_intervals=True))
    optimize(OTHER, "ttft_p95", loads=(1.0, 2.0, 4.0, 6.0))  # so that L-BFGS has moved once
    compiles_once(lambda at: optimize(at, "ttft_p95"))


@pytest.mark.slow
def test_fit_and_evaluate(tmp_path):
    def fitted(scale: float):
        rows = pd.read_csv(TRACE)
        times = [name for name in rows.columns if name.startswith(("ttft_", "tpot_", "itl_", "e2e_"))]
        rows[times] *= scale
        rows.to_csv(tmp_path / "rows.csv", index=False)
        trace = diffspec.read_trace(tmp_path / "rows.csv")
        model = diffspec.fit(trace, step_time="affine")
        return model.to_json(), diffspec.evaluate(model, trace)

    first = fitted(1.0)
    with compilations() as found:
        second = fitted(1.05)
    assert found == []
    assert first != second
