import jax
import numpy as np

from jflow import data


def test_place():
    rows = {"x": np.ones((4, 3)), "cond": np.arange(4)}
    placed = data.place(rows)
    assert isinstance(placed["x"], jax.Array) and placed["x"].dtype == np.float32
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    placed = data.place(rows, sharding)
    assert placed["x"].sharding == sharding and placed["cond"].sharding == sharding
