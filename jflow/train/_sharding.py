"""Where states and batches lie: over a mesh (jit), or stacked for pmap."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jflow.types import PyTree


def data_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of all devices along one axis named 'data'.

    Args:
        devices: Those to take; all by default.

    Returns:
        The mesh.
    """
    return jax.sharding.Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def make_mesh(
    axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """A mesh of all devices along named axes.

    Neighbors along the last axis are the closest devices: put there what talks most (tensor
    sharding).

    Args:
        axes: The size of each, such as {'data': -1, 'model': 4}; one size may be -1: what is left.
        devices: Those to take; all by default.

    Returns:
        The mesh.

    Raises:
        ValueError: For sizes that do not make up the number of devices.

    Examples:
        >>> import jax
        >>> from jflow import train
        >>> dict(train.make_mesh({"data": -1, "model": 1}, jax.devices()[:1]).shape)
        {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(axes.values())
    known = math.prod(size for size in sizes if size != -1)
    if not sizes or any(size < 1 for size in sizes if size != -1) or sizes.count(-1) > 1:
        raise ValueError(f"expected axes of sizes >= 1, or one of them -1, got {dict(axes)}")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(f"a mesh of {dict(axes)} does not take {len(devices)} devices")
    # Auto: XLA places what the shardings of the arguments leave open (diffrax needs it, too).
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes), tuple(axes), axis_types=auto, devices=devices)


def data_sharding(
    mesh: jax.sharding.Mesh, axes: str | Sequence[str] | None = None
) -> jax.sharding.NamedSharding:
    """Rows of a batch spread over a mesh, for `fit(sharding=...)`, `data.place`, device_put.

    Args:
        mesh: Where the rows are to lie.
        axes: Of the mesh, all by default. Where an axis splits the model itself (tensor sharding),
            name the others.

    Returns:
        The sharding.

    Raises:
        ValueError: For an axis that the mesh lacks.
    """
    axes = mesh.axis_names if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes))


def replicated(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> jax.sharding.NamedSharding:
    """The same on every device: jax.device_put(state, replicated(mesh)).

    Args:
        mesh: Of the devices.

    Returns:
        The sharding.
    """
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def put(tree: PyTree, where: PyTree) -> PyTree:
    """jax.device_put, also onto a mesh over several processes, each of which has the whole (typed
    keys too)."""
    return (
        jax.device_put(tree, where) if jax.process_count() == 1 else jax.tree.map(_put, tree, where)
    )


def _put(x, sharding):
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
        )
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x)[index])


def stack_for_pmap(state: PyTree, n: int) -> PyTree:
    """A state as jax.pmap expects it: every leaf n times along a new leading axis.

    Args:
        state: From `init_state`; typed keys are stacked too.
        n: The number of devices.

    Returns:
        The stacked state.
    """
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), state)


def shardings_of(state: PyTree) -> PyTree:
    """The sharding of every leaf. Where one lies on a mesh, leaves made on a single device (the
    step count, the key) are to be replicated over that mesh."""
    found = jax.tree.map(lambda x: x.sharding, state)
    meshes = [s.mesh for s in jax.tree.leaves(found) if isinstance(s, jax.sharding.NamedSharding)]
    if not meshes:
        return found
    single = jax.sharding.SingleDeviceSharding
    return jax.tree.map(lambda s: replicated(meshes[0]) if isinstance(s, single) else s, found)
