"""What is special to permutations, reshapes and the LU map."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj


def test_permute_and_reverse_rearrange_the_last_axis():
    z = jnp.arange(6.0).reshape(1, 2, 3)
    x, log_det = bj.permute([2, 0, 1]).forward({}, z)
    np.testing.assert_array_equal(x[0], [[2, 0, 1], [5, 3, 4]])  # x[..., i] = z[..., permutation[i]]
    np.testing.assert_array_equal(log_det, [0])
    np.testing.assert_array_equal(bj.permute([2, 0, 1]).inverse({}, x)[0], z)
    np.testing.assert_array_equal(bj.reverse().forward({}, z)[0][0], [[2, 1, 0], [5, 4, 3]])


@pytest.mark.parametrize("wrong", [[0, 0, 1], [1, 2, 3], [[0, 1]], [0.5, 1.0]])
def test_permute_wants_a_permutation(wrong):
    with pytest.raises(ValueError, match="expected a permutation of 0..d-1"):
        bj.permute(wrong)


def test_reshape_keeps_row_major_order_and_checks_the_event():
    bijector = bj.reshape((2, 3), (6,))
    z = jnp.arange(12.0).reshape(2, 2, 3)
    x, _ = bijector.forward({}, z)
    np.testing.assert_array_equal(x, np.arange(12.0).reshape(2, 6))
    np.testing.assert_array_equal(bijector.inverse({}, x)[0], z)
    for apply, wrong, expected in [(bijector.forward, x, r"\[b, 2, 3\], got \[2, 6\]"),
                                   (bijector.inverse, z, r"\[b, 6\], got \[2, 2, 3\]"),
                                   (bijector.inverse, x.reshape(4, 3), r"\[b, 6\], got \[4, 3\]")]:  # fmt: skip
        with pytest.raises(ValueError, match=expected):
            apply({}, wrong)
    with pytest.raises(ValueError, match="differ in size"):
        bj.reshape((2, 3), (5,))


def test_lu_is_nflows_lu(x64):
    """tests/peers/make_fixtures.py"""
    with np.load(Path(__file__).parents[1] / "peers" / "lu.npz") as arrays:
        peer = dict(arrays)
    params = {name: peer[name] for name in ("lower", "upper", "shift")}
    params["log_diagonal"] = np.log(np.diag(peer["upper"]))
    bijector = bj.lu(5)
    for apply, y, log_det in ((bijector.forward, "y", "log_det"), (bijector.inverse, "back", "back_log_det")):
        got = apply(params, jnp.asarray(peer["x"]))
        np.testing.assert_allclose(got[0], peer[y], atol=1e-12)
        np.testing.assert_allclose(got[1], peer[log_det], atol=1e-12)


def test_lu_starts_at_the_identity_and_counts_positions():
    bijector = bj.lu(2)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5, 2)), jnp.float32)
    params = bijector.init(jax.random.key(0), z)
    np.testing.assert_array_equal(bijector.forward(params, z)[0], z)
    params["log_diagonal"] = jnp.array([0.5, -0.2])
    np.testing.assert_allclose(bijector.forward(params, z)[1], 20 * 0.3 * np.ones(3), rtol=1e-6)


def test_lu_multiplies_in_full_precision_on_every_platform():
    """An accelerator's default would round the products to fewer bits than the triangular solves of the inverse keep."""
    bijector, z = bj.lu(3), jnp.ones((2, 3))
    jaxpr = jax.make_jaxpr(lambda z: bijector.forward(bijector.init(jax.random.key(0), z), z))(z)
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert len(products) == 2
    for equation in products:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_lu_wants_its_features():
    with pytest.raises(ValueError, match=r"lu: expected x of shape \[b, ..., 3\], got \[2, 4\]"):
        bj.lu(3).init(jax.random.key(0), jnp.ones((2, 4)))
