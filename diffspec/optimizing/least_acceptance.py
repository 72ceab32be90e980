"""The acceptance below which drafting does not pay, at a batch: the root of residence_k(n; alpha) = residence_0(n),
the latter with the drafter loaded, as a running engine falls back to it.

Latency falls with acceptance whatever else the model holds, so the root is bracketed in [0, 1] and halved. At zero load
and without prompts it is where E_alpha(k) = step(k)/step(0); for k = 1 and a drafter that costs the share c of a
verification, whose own time does not grow with the drafted token, that is Leviathan's alpha > c (arXiv 2211.17192).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import ConstantAcceptance
from diffspec.configuration import Configuration
from diffspec.optimizing.batch_tables import idle_request
from diffspec.optimizing.relaxation import at_draft_length
from diffspec.programs import program
from diffspec.serving import ServingModel
from diffspec.workload import Workload

HALVINGS = 40


class BreakEven(NamedTuple):
    """``acceptance_rate`` [1] and ``tokens_per_step`` [tok] at which drafting takes exactly as long as not drafting;
    infinite where it takes longer even when every token is accepted. Arrays over the questions asked."""

    acceptance_rate: np.ndarray
    tokens_per_step: np.ndarray


@program()
def _break_even(serving: ServingModel, workload: Workload, config: Configuration, draft_lengths, batches):
    def one(length, batch):
        idle = serving.times_in_service(workload, idle_request(serving, workload, config), batch)[0]

        def gap(rate):
            chosen = eqx.tree_at(lambda c: c.acceptance, config, ConstantAcceptance(rate))
            request = serving.request_cost(workload, at_draft_length(chosen, length))
            return serving.times_in_service(workload, request, batch)[0] - idle

        def halve(_, bracket):
            low, high = bracket
            middle = 0.5 * (low + high)
            loses = gap(middle) > 0
            return jnp.where(loses, middle, low), jnp.where(loses, high, middle)

        low, high = jax.lax.fori_loop(0, HALVINGS, halve, (jnp.zeros(()), jnp.ones(())))
        rate = 0.5 * (low + high)
        emitted = ConstantAcceptance(rate).moments(length)[0]
        never = gap(jnp.ones(())) > 0
        return jnp.where(never, jnp.inf, rate), jnp.where(never, jnp.inf, emitted)

    return jax.vmap(one)(draft_lengths, batches)


def break_even(serving: ServingModel, workload: Workload, config: Configuration, draft_lengths, batches) -> BreakEven:
    """The break-even acceptance of each of ``draft_lengths`` [tok] at each of ``batches`` [req], both [n]; ``config``
    at any draft length, floats as leaves; its acceptance does not count."""
    config = eqx.tree_at(lambda c: c.acceptance, config, ConstantAcceptance(jnp.asarray(0.5)))
    asked = (jnp.asarray(values, dtype=float) for values in (draft_lengths, batches))
    found = _break_even(serving, workload, config, *asked)
    return BreakEven(*(np.asarray(part) for part in found))
