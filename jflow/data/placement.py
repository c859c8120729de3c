"""Where rows of numpy meet devices: the only file that knows about placement."""

import jax

from jflow.types import PyTree


def place(batch: PyTree, sharding: jax.sharding.Sharding | None = None) -> PyTree:
    """Numpy rows to device arrays: on the default device, or laid out by `sharding`.

    Under several processes `batch` is this process's share of the rows, and the result is the global array. float64 is
    narrowed to float32 unless jax_enable_x64 is set.
    """
    if sharding is None or jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
