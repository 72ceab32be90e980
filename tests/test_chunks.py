"""Many systems a chunk at a time: the numbers of `jax.vmap`, on one device and on several."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXPERIMENTS

from diffspec.chunks import chunked_vmap
from diffspec.results import InputError
from diffspec.steady_state import solve_open_loop

ON_TWO = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
from diffspec.chunks import chunked_vmap
x = jnp.linspace(0.1, 2.0, 11)
value, slope = jax.jit(chunked_vmap(jax.value_and_grad(lambda x, y: jnp.exp(x["a"]) * y), chunk=2))({"a": x}, x)
hlo = jax.jit(chunked_vmap(lambda x: x * x, chunk=2)).lower(x).compile().as_text()
assert "num_partitions=2" in hlo, "not laid over both devices"
assert bool(jnp.all(jnp.abs(value / (jnp.exp(x) * x) - 1) < 1e-15)), value
assert bool(jnp.all(jnp.abs(slope["a"] / (jnp.exp(x) * x) - 1) < 1e-15)), slope
"""


def latency(loop):
    """Of an affine residence time (c1, c2) at a rate: (c1 + c2)/(1 - rate*c2)."""
    return solve_open_loop(lambda n: loop["c"][0] + loop["c"][1] * n, loop["rate"]).residence_time


@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_values_and_gradients_are_those_of_vmap(rows):
    """Less than a chunk, one, several, and several with some left: 13 systems by the closed form, too."""
    random = np.random.default_rng(rows)
    c, rate = random.uniform(0.01, 0.05, (rows, 2)), random.uniform(1.0, 10.0, rows)
    loops = {"c": jnp.asarray(c), "rate": jnp.asarray(rate)}
    value, slope = jax.jit(chunked_vmap(jax.value_and_grad(latency), chunk=4))(loops)
    expected = c.sum(1) / (1 - rate * c[:, 1])
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    np.testing.assert_allclose(slope["rate"], expected * c[:, 1] / (1 - rate * c[:, 1]), rtol=1e-12)
    np.testing.assert_allclose(slope["c"][:, 0], 1 / (1 - rate * c[:, 1]), rtol=1e-12)


def test_rows_are_laid_over_all_devices():
    """In a process with two CPU devices: eleven rows, so that one is repeated, in chunks of two."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "PYTHONPATH": str(EXPERIMENTS.parent)
    }
    ran = subprocess.run([sys.executable, "-c", ON_TWO], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_what_cannot_be_mapped_is_told():
    with pytest.raises(InputError, match="chunk: got 0; allowed"):
        chunked_vmap(jnp.exp, chunk=0)
    with pytest.raises(InputError, match="leading axes"):
        chunked_vmap(jnp.add)(jnp.ones(3), jnp.ones(4))
    with pytest.raises(InputError, match="leading axes"):
        chunked_vmap(jnp.exp)(1.0)
