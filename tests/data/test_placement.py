import jax
import numpy as np
import pytest

from jflow import data


def test_place():
    rows = {"x": np.ones((4, 3)), "cond": np.arange(4)}
    placed = data.place(rows)
    assert isinstance(placed["x"], jax.Array) and placed["x"].dtype == np.float32
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    placed = data.place(rows, sharding)
    assert placed["x"].sharding == sharding and placed["cond"].sharding == sharding


def test_rows_that_do_not_divide_name_both_numbers():
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    said = (
        r"batch 'x' of shape \[10, 3\] does not divide over the mesh \{'data': 8\} as"
        r" P.*\('data',\)"
    )
    with pytest.raises(ValueError, match=said):
        data.place({"x": np.ones((10, 3))}, sharding)


def test_what_lies_there_already_stays():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    placed = data.place({"x": np.ones((4, 3))}, sharding)
    assert data.place(placed, sharding)["x"] is placed["x"]


def test_one_process_has_all_the_rows():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    assert data.share(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))) == (
        0,
        1,
    )
