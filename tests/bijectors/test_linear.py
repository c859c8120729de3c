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
    np.testing.assert_array_equal(
        x[0], [[2, 0, 1], [5, 3, 4]]
    )  # x[..., i] = z[..., permutation[i]]
    np.testing.assert_array_equal(log_det, [0])
    np.testing.assert_array_equal(bj.permute([2, 0, 1]).inverse({}, x)[0], z)
    np.testing.assert_array_equal(bj.reverse().forward({}, z)[0][0], [[2, 1, 0], [5, 4, 3]])


@pytest.mark.parametrize("wrong", [[0, 0, 1], [1, 2, 3], [[0, 1]], [0.5, 1.0], [1.0, 0.0]])
def test_permute_wants_a_permutation(wrong):
    with pytest.raises(ValueError, match="expected a permutation of the whole numbers 0..d-1"):
        bj.permute(wrong)


def test_reshape_keeps_row_major_order_and_checks_the_event():
    bijector = bj.reshape((2, 3), (6,))
    z = jnp.arange(12.0).reshape(2, 2, 3)
    x, _ = bijector.forward({}, z)
    np.testing.assert_array_equal(x, np.arange(12.0).reshape(2, 6))
    np.testing.assert_array_equal(bijector.inverse({}, x)[0], z)
    for apply, wrong, expected in [
        (bijector.forward, x, r"\[b, 2, 3\], got \[2, 6\]"),
        (bijector.inverse, z, r"\[b, 6\], got \[2, 2, 3\]"),
        (bijector.inverse, x.reshape(4, 3), r"\[b, 6\], got \[4, 3\]"),
    ]:
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
    for apply, y, log_det in (
        (bijector.forward, "y", "log_det"),
        (bijector.inverse, "back", "back_log_det"),
    ):
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
    """An accelerator's default would round the products to fewer bits than the triangular solves of
    the inverse keep."""
    bijector, z = bj.lu(3), jnp.ones((2, 3))
    jaxpr = jax.make_jaxpr(lambda z: bijector.forward(bijector.init(jax.random.key(0), z), z))(z)
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert len(products) == 2
    for equation in products:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_lu_wants_its_features():
    with pytest.raises(ValueError, match=r"lu: expected x of shape \[b, ..., 3\], got \[2, 4\]"):
        bj.lu(3).init(jax.random.key(0), jnp.ones((2, 4)))


@pytest.fixture(scope="module")
def peers():
    with np.load(Path(__file__).parents[1] / "peers" / "transformers.npz") as arrays:
        return dict(arrays)


def test_householder_and_qr_are_nflows(peers, x64):
    """tests/peers/make_transformers_fixtures.py; nflows applies its first reflection first, here it
    is the leftmost."""
    x = jnp.asarray(peers["linear_x"])
    y, log_det = bj.householder(5, 4).forward({"vectors": peers["householder_vectors"][::-1]}, x)
    np.testing.assert_allclose(y, peers["householder_y"], atol=1e-12)
    np.testing.assert_array_equal(log_det, 0)
    upper = peers["qr_upper"]
    params = {
        "vectors": peers["qr_vectors"][::-1],
        "upper": upper,
        "log_diagonal": np.log(np.diag(upper)),
    }
    y, log_det = bj.qr(5, 4).forward({**params, "shift": peers["qr_shift"]}, x)
    np.testing.assert_allclose(y, peers["qr_y"], atol=1e-12)
    np.testing.assert_allclose(log_det, peers["qr_log_det"], atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_reflections_are_orthogonal_with_alternating_determinant(count, x64):
    bijector = bj.householder(5, count)
    params = bijector.init(jax.random.key(0), jnp.ones((1, 5)))
    matrix = np.asarray(bijector.forward(params, jnp.eye(5))[0]).T
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(matrix), (-1.0) ** count, atol=1e-12)
    scaled = bijector.forward({"vectors": 1e-3 * params["vectors"]}, jnp.eye(5))[0]
    np.testing.assert_allclose(scaled.T, matrix, atol=1e-12)  # only directions count


@pytest.mark.parametrize("make", [bj.linear, bj.qr, bj.householder])
def test_the_free_maps_start_at_a_rotation_of_their_own(make):
    """A rotation, up to a reflection, of the last axis of an image: a 1x1 convolution. Layers of a
    scan differ."""
    bijector, z = (
        make(3),
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5, 3)), jnp.float32),
    )
    params = bijector.init(jax.random.key(0), z)
    x, log_det = bijector.forward(params, z)
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), np.linalg.norm(z, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(log_det, 0, atol=1e-4)
    assert np.max(np.abs(x - z)) > 0.1
    stacked = bj.scan(bijector, 3).init(jax.random.key(0), z)["stacked"]
    leaf = stacked["matrix" if make is bj.linear else "vectors"]
    assert np.abs(leaf[0] - leaf[1]).max() > 0.1 and np.abs(leaf[1] - leaf[2]).max() > 0.1


def test_linear_is_its_matrix_and_a_singular_one_has_no_volume(x64):
    rng, bijector = np.random.default_rng(1), bj.linear(3)
    params, z = (
        {"matrix": rng.normal(size=(3, 3)), "shift": rng.normal(size=3)},
        rng.normal(size=(4, 2, 3)),
    )
    x, log_det = bijector.forward(params, jnp.asarray(z))
    np.testing.assert_allclose(
        x, np.einsum("ij,bpj->bpi", params["matrix"], z) + params["shift"], atol=1e-12
    )
    np.testing.assert_allclose(log_det, 2 * np.linalg.slogdet(params["matrix"])[1], atol=1e-12)
    singular = {**params, "matrix": np.ones((3, 3))}
    assert np.all(np.isneginf(bijector.forward(singular, jnp.asarray(z))[1]))


def test_the_free_maps_multiply_in_full_precision():
    for bijector in (bj.linear(3), bj.qr(3), bj.householder(3)):
        z = jnp.ones((2, 3))
        params = bijector.init(jax.random.key(0), z)
        for apply in (bijector.forward, bijector.inverse):
            text = str(jax.make_jaxpr(lambda z, apply=apply, params=params: apply(params, z))(z))
            assert text.count("dot_general[") == text.count(
                "precision=(Precision.HIGHEST, Precision.HIGHEST)"
            ) > 0 or ("dot_general[" not in text)


def test_an_empty_batch_is_one():
    z = jnp.ones((2, 2, 3))
    x, log_det = bj.lu(3).forward(bj.lu(3).init(jax.random.key(0), z), z[:0])
    assert x.shape == (0, 2, 3) and log_det.shape == (0,)


def test_bad_sizes_of_linear_maps():
    for make, message in [
        (
            lambda: bj.linear(0),
            "linear: expected features to be a whole number of at least 1, got 0",
        ),
        (lambda: bj.qr(3, 0), "qr: expected count to be a whole number of at least 1, got 0"),
        (
            lambda: bj.householder(3, 0),
            "householder: expected count to be a whole number of at least 1, got 0",
        ),
        (
            lambda: bj.householder(0),
            "householder: expected count to be a whole number of at least 1, got 0",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
