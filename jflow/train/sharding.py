"""Where states and batches lie: over a mesh (jit), or stacked for pmap."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow.types import PyTree


def data_mesh(devices=None) -> jax.sharding.Mesh:
    """All devices, or those given, along one axis named 'data'."""
    return jax.sharding.Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def data_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Rows of a batch spread over every axis of the mesh: for `fit(sharding=...)`, `data.place` or jax.device_put."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The same on every device: jax.device_put(state, replicated(mesh))."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def stack_for_pmap(state: PyTree, n: int) -> PyTree:
    """Every leaf n times along a new leading axis, typed keys too: what jax.pmap over n devices expects."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), state)


def shardings_of(state: PyTree) -> PyTree:
    """The sharding of every leaf. Where one lies on a mesh, leaves made on a single device (the step count, the key)
    are to be replicated over that mesh."""
    found = jax.tree.map(lambda x: x.sharding, state)
    meshes = [s.mesh for s in jax.tree.leaves(found) if isinstance(s, jax.sharding.NamedSharding)]
    if not meshes:
        return found
    single = jax.sharding.SingleDeviceSharding
    return jax.tree.map(lambda s: replicated(meshes[0]) if isinstance(s, single) else s, found)
