"""Many systems at once, a chunk at a time on every device: as much memory as a chunk needs, and the speed of a cache.

``jax.vmap`` writes each intermediate number of all systems to memory and reads it back; the dozens of small programs
that an equilibrium with gradients becomes then wait for memory, not for arithmetic. A chunk of a few thousand systems
stays in a core's own cache. Measured by experiments/09_speed/limit.py.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from diffspec.results import InputError

CHUNK = 2048
"""Systems of one chunk: an intermediate array of it takes 16 kB."""


def chunked_vmap(function: Callable, *, chunk: int = CHUNK, devices: Sequence[jax.Device] | None = None) -> Callable:
    """As ``jax.vmap(function)``: maps over the leading axis of all leaves of all positional arguments.

    Rows are laid over ``devices`` (default: all of them), the last one repeated to fill each; a device goes through its
    rows ``chunk`` at a time. Values and derivatives are those of ``jax.vmap``, to rounding. Use it under ``jax.jit``. A
    CPU is one device unless told otherwise before JAX starts: ``jax.config.update("jax_num_cpu_devices", cores)`` lets
    every core go through chunks of its own.

    Errors: :class:`InputError` where ``chunk`` is below 1, or leading axes are missing or differ.

    >>> import jax.numpy as jnp
    >>> square = chunked_vmap(lambda x: x["a"] ** 2, chunk=2)
    >>> square({"a": jnp.arange(5.0)}).tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    if chunk < 1:
        raise InputError(f"chunk: got {chunk}; allowed: a whole number from 1")
    found = list(jax.devices() if devices is None else devices)
    by_rows = PartitionSpec("rows")

    def on_one(arguments):
        return jax.lax.map(lambda row: function(*row), arguments, batch_size=chunk)

    def mapped(*arguments):
        rows = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(arguments)}
        if len(rows) != 1 or rows == {()}:
            raise InputError(f"leading axes: got {sorted(rows)}; allowed: one length, of all leaves")
        ((count,),) = rows
        missing = -count % len(found)
        if missing:
            arguments = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[-1:].repeat(missing, 0)]), arguments)
        if len(found) == 1:
            return on_one(arguments)
        mesh = Mesh(np.asarray(found), ("rows",))
        spread = jax.shard_map(on_one, mesh=mesh, in_specs=by_rows, out_specs=by_rows, check_vma=False)
        return jax.tree.map(lambda leaf: leaf[:count], spread(arguments))

    return mapped
