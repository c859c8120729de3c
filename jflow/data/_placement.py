"""Where rows of numpy meet devices: the only file that knows about placement."""

from collections.abc import Mapping
from typing import Any

import jax

from jflow._core.arrays import leaves_by_position
from jflow.types import PyTree


def place(batch: PyTree, sharding: jax.sharding.Sharding | None = None) -> PyTree:
    """Numpy rows to device arrays, on the default device or laid out over a mesh.

    float64 is narrowed to float32 unless jax_enable_x64 is set.

    Args:
        batch: A pytree of arrays that lead with one length; under several processes this process's
            share of the rows (see `share`).
        sharding: How the rows are laid out, such as train.data_sharding(mesh).

    Returns:
        The batch as device arrays; under several processes the global ones.

    Raises:
        ValueError: For rows that the mesh does not divide.
    """
    batch = leaves_by_position(batch)
    if sharding is None:
        return jax.device_put(batch)
    return jax.tree_util.tree_map_with_path(lambda path, x: _place(path, x, sharding), batch)


def share(sharding: jax.sharding.NamedSharding) -> tuple[int, int]:
    """Which part of every batch this process reads, for `data.batches(share=...)`.

    Args:
        sharding: How a batch is laid out over the mesh.

    Returns:
        (i, n): this process holds the i-th of n equal parts. n is the number of processes, unless
        the mesh gives some of them the same rows (tensor sharding across processes).
    """
    blocks = sharding.num_devices  # so many rows divide, whatever the mesh
    rows = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    owned: dict[int, set[int]] = {}
    laid: Mapping[Any, Any] = rows.devices_indices_map((blocks,))
    for device, index in laid.items():
        owned.setdefault(device.process_index, set()).update(range(blocks)[index[0]])
    parts = sorted({tuple(sorted(rows)) for rows in owned.values()})
    if [row for part in parts for row in part] != list(range(blocks)) or len(
        {len(part) for part in parts}
    ) > 1:
        raise ValueError(
            f"{sharding}: expected processes to hold equal parts of the rows in order, got {owned}"
        )
    return parts.index(tuple(sorted(owned[jax.process_index()]))), len(parts)


def _place(path, x, sharding):
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    try:
        if jax.process_count() > 1 and getattr(x, "is_fully_addressable", True):
            return jax.make_array_from_process_local_data(sharding, x)
        sharding.shard_shape(x.shape)
    except ValueError as error:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        given = f"batch {where!r} of shape {list(x.shape)}" + (
            " here" if jax.process_count() > 1 else ""
        )
        over = (
            f"{dict(sharding.mesh.shape)} as {sharding.spec}"
            if hasattr(sharding, "mesh")
            else sharding
        )
        raise ValueError(f"{given} does not divide over the mesh {over}") from error
    return jax.device_put(x, sharding)
