"""What is special to planar, radial and Sylvester maps: their constraints, their peers and what
they start at."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.bijections import Planar

from jflow import bijectors as bj

SLOPE = 1 - np.exp(-1)


def raw_of(product):
    """The a with m(a) = product, where m(a) = 0.999 log(1 + (e^a - 1)(1 - 1/e)) as the docstrings
    say it."""
    return np.log1p(np.expm1(product / 0.999) / SLOPE)


def planar_params(u, w, b):
    """Ours, for a map x = z + u tanh(w . z + b) whose u obeys the constraint already."""
    product = np.sum(u * w)
    return {"u": u + (raw_of(product) - product) * w / np.sum(w * w), "w": w, "b": np.asarray(b)}


@pytest.fixture
def peer():
    with np.load(Path(__file__).parents[1] / "peers" / "residual.npz") as arrays:
        return dict(arrays)


def test_planar_is_normflows_planar(peer, x64):
    """tests/peers/make_residual_fixtures.py"""
    params = planar_params(peer["planar_u"], peer["planar_w"], peer["planar_b"])
    x, log_det = jax.jit(bj.planar(3).forward)(params, jnp.asarray(peer["z"]))
    np.testing.assert_allclose(x, peer["planar_x"], atol=1e-12)
    np.testing.assert_allclose(log_det, peer["planar_log_det"], atol=1e-12)


def test_planar_is_flowjax_planar(x64):
    theirs = Planar(jax.random.key(0), dim=3).get_planar()
    rng = np.random.default_rng(0)
    for name, value in (
        ("weight", rng.normal(size=3)),
        ("_act_scale", rng.normal(size=3)),
        ("bias", np.array(0.3)),
    ):
        object.__setattr__(theirs, name, jnp.asarray(value))
    params = planar_params(
        *(np.asarray(a) for a in (theirs.get_act_scale(), theirs.weight, theirs.bias))
    )
    z = jnp.asarray(rng.normal(size=(9, 3)))
    x, log_det = jax.jit(bj.planar(3).forward)(params, z)
    expected, expected_log_det = jax.vmap(theirs.transform_and_log_det)(z)
    np.testing.assert_allclose(x, expected, atol=1e-12)
    np.testing.assert_allclose(log_det, expected_log_det, atol=1e-12)


def test_radial_is_normflows_radial(peer, x64):
    """tests/peers/make_residual_fixtures.py"""
    ratio = peer["radial_beta"] / peer["radial_alpha"]
    params = {
        "center": peer["radial_center"],
        "log_alpha": np.log(peer["radial_alpha"]),
        "raw_beta": raw_of(ratio),
    }
    x, log_det = jax.jit(bj.radial(3).forward)(params, jnp.asarray(peer["z"]))
    np.testing.assert_allclose(x, peer["radial_x"], atol=1e-12)
    np.testing.assert_allclose(log_det, peer["radial_log_det"], atol=1e-12)


def test_sylvester_of_rank_one_is_planar(x64):
    """Q is the unit vector along w, S = |w|, R = u' . Q: the u of such a planar map lies along
    w."""
    rng = np.random.default_rng(0)
    z, v = jnp.asarray(rng.normal(size=(9, 3))), rng.normal(size=(1, 3))
    q = np.eye(3)[:, 0] - 2 * v[0] * v[0, 0] / np.sum(v * v)
    for r, s in ((1.3, 0.7), (-4.0, 2.0), (3.0, -2.0)):
        params = {
            "reflections": v,
            "r": np.array([[r]]),
            "s": np.array([[s]]),
            "b": np.array([0.2]),
        }
        got = jax.jit(bj.sylvester(3, 1).forward)(params, z)
        expected = jax.jit(bj.planar(3).forward)({"u": r * q, "w": s * q, "b": np.array(0.2)}, z)
        np.testing.assert_allclose(got[0], expected[0], atol=1e-12)
        np.testing.assert_allclose(got[1], expected[1], atol=1e-12)


@pytest.mark.parametrize("make", [bj.planar, bj.radial, bj.sylvester])
def test_they_start_at_the_identity_and_differ(make):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    first, second = (make(3).init(jax.random.key(i), z) for i in range(2))
    x, log_det = make(3).forward(first, z)
    np.testing.assert_allclose(x, z, atol=1e-6)
    np.testing.assert_allclose(log_det, 0, atol=1e-6)
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


@pytest.mark.parametrize("make", [bj.planar, bj.radial, bj.sylvester])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 5.0, 1e3])
def test_extreme_parameters_stay_invertible(make, scale):
    """No slope falls below 1e-3 (the bound of the docstring), up to its rounding; nothing overflows
    at w = 0 or beta -> -alpha.

    The round trip is held to the 1e-3 slope and float32: errors of |x| 1e-7 grow a thousandfold for
    each of 3 units.
    """
    bijector, rng = make(3), np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    initial = bijector.init(jax.random.key(0), z)

    @jax.jit
    def run(params, z):
        def objective(params, z):
            x, log_det = bijector.forward(params, z)
            return jnp.sum(jnp.sin(x)) + jnp.sum(log_det), (x, log_det)

        grads, (x, log_det) = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, z)
        return grads, x, log_det, *bijector.inverse(params, x)

    for _ in range(8):
        params = jax.tree.map(
            lambda p: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32), initial
        )
        if make is bj.radial:
            params["log_alpha"] = jnp.clip(params["log_alpha"], -5, 5)
        grads, x, log_det, again, inverse_log_det = run(params, z)
        for leaf in jax.tree.leaves((grads, x, log_det, again, inverse_log_det)):
            assert np.all(np.isfinite(leaf))
        assert np.all(log_det >= 3 * np.log(1e-3) - 1e-3)
        if scale <= 5:  # beyond, tanh jumps between neighboring floats
            assert np.max(np.abs(again - z)) < (1e-3 if make is not bj.sylvester else 0.1)


def test_planar_keeps_the_part_of_u_across_w_and_holds_the_product(x64):
    rng = np.random.default_rng(1)
    z = jnp.asarray(rng.normal(size=(1, 3)))
    for scale in (0.1, 1.0, 100.0):
        u, w = scale * rng.normal(size=(2, 3))
        # where tanh is saturated, x - z is u' itself
        params = {"u": jnp.asarray(u), "w": jnp.asarray(w), "b": jnp.asarray(1e6)}
        held = np.asarray(bj.planar(3).forward(params, z)[0] - z)[0]
        assert w @ held > -1 and np.sign(w @ held) == np.sign(w @ u)
        across = np.eye(3) - np.outer(w, w) / (w @ w)
        np.testing.assert_allclose(across @ held, across @ u, atol=1e-12 * scale)
        if scale <= 1:  # else m saturates
            np.testing.assert_allclose(raw_of(w @ held), w @ u, rtol=1e-9)


def test_radial_moves_along_rays_and_keeps_its_center():
    params = {
        "center": jnp.array([1.0, 2.0]),
        "log_alpha": jnp.array(0.2),
        "raw_beta": jnp.array(-3.0),
    }
    z = jnp.array([[1.0, 2.0], [4.0, 6.0]])
    x, log_det = bj.radial(2).forward(params, z)
    alpha = np.exp(0.2)
    beta = 0.999 * alpha * np.log1p(np.expm1(-3.0) * SLOPE)
    np.testing.assert_allclose(x[0], [1, 2])
    np.testing.assert_allclose(
        x[1] - z[0], (1 + beta / (alpha + 5)) * np.array([3.0, 4.0]), rtol=1e-6
    )
    np.testing.assert_allclose(log_det[0], 2 * np.log1p(beta / alpha), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bj.planar(0), "features to be a whole number of at least 1, got 0"),
        (lambda: bj.radial(0), "features to be a whole number of at least 1, got 0"),
        (lambda: bj.sylvester(0), "features to be a whole number of at least 1, got 0"),
        (lambda: bj.sylvester(3, 4), "rank from 1 to features=3, got 4"),
        (lambda: bj.sylvester(3, 0), "rank from 1 to features=3, got 0"),
        (lambda: bj.sylvester(3, reflections=-1), "reflections >= 0, got -1"),
    ],
)
def test_bad_options_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
