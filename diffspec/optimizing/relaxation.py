"""Draft length as a real number: projected Adam on the relaxed problem, gradients through the equilibrium.

For each load, minimise cost(k) over k in [1, K] subject to excess_j(k) <= 0 and no overload, by an augmented
Lagrangian with one multiplier per constraint c:

    cost(k) + sum_c ( max(0, multiplier_c + weight*c(k))^2 - multiplier_c^2 ) / (2*weight)

k = K-coordinate of a bounded variable moved by Optax's Adam and projected to [1, K]; multipliers rise between rounds.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from diffspec.analysis.answers import METRICS
from diffspec.analysis.plain import FAST_COMPILE
from diffspec.configuration import Configuration
from diffspec.optimizing.limits import Limit, cost
from diffspec.serving import ServingModel
from diffspec.workload import Workload

ROUNDS, STEPS, WEIGHT = 4, 40, 10.0


def at_draft_length(config: Configuration, draft_length) -> Configuration:
    """The configuration at another draft length."""
    return eqx.tree_at(lambda c: c.draft_length, config, draft_length)


@partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=FAST_COMPILE)
def relaxed_draft_lengths(
    objective: str,
    limits: tuple[Limit, ...],
    longest: int,
    serving: ServingModel,
    workloads: Workload,
    config: Configuration,
    starts,
):
    """Best real draft length in [1, longest] per load, the best of all ``starts``. ``workloads`` has a leading axis."""

    def constraints(prediction):
        broken = [limit.excess(getattr(prediction, METRICS[limit.metric])) for limit in limits]
        return jnp.stack([*broken, prediction.overload])

    def lagrangian(length, multipliers, workload):
        prediction = serving.predict(workload, at_draft_length(config, length))
        excess, value = constraints(prediction), cost(prediction, objective)
        penalty = (jnp.maximum(multipliers + WEIGHT * excess, 0.0) ** 2 - multipliers**2) / (2.0 * WEIGHT)
        return value + jnp.sum(penalty), (excess, value + 1e3 * jnp.sum(jnp.maximum(excess, 0.0)))

    optimiser = optax.adam(optax.cosine_decay_schedule(0.35, ROUNDS * STEPS, 0.02))

    def solve(start, workload):
        def step(index, carry):
            length, state, multipliers, _ = carry
            (_, (excess, merit)), slope = jax.value_and_grad(lagrangian, has_aux=True)(length, multipliers, workload)
            with jax.numpy_dtype_promotion("standard"):
                update, state = optimiser.update(slope, state)
            moved = jnp.clip(length + update, 1.0, float(longest))
            last_of_round = (index + 1) % STEPS == 0
            raised = jnp.maximum(multipliers + WEIGHT * excess, 0.0)
            still = index == ROUNDS * STEPS  # one more evaluation for the merit, rather than one more program
            return jnp.where(still, length, moved), state, jnp.where(last_of_round, raised, multipliers), merit

        zeros = jnp.zeros(len(limits) + 1, dtype=start.dtype)
        carry = (start, optimiser.init(start), zeros, jnp.zeros_like(start))
        length, _, _, merit = jax.lax.fori_loop(0, ROUNDS * STEPS + 1, step, carry)
        return length, merit

    def best_start(workload):
        lengths, merits = jax.vmap(solve, in_axes=(0, None))(starts, workload)
        return lengths[jnp.argmin(merits)]

    return jax.vmap(best_start)(workloads)
