"""Batch normalization on Lie groups: where the mean goes, and how far the points spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import manifolds

GROUPS = {
    "rotations": manifolds.rotation_group(),
    "affine-invariant": manifolds.spd_group(3),
    "log-Euclidean": manifolds.log_euclidean_group(3),
}


def skew(w):
    x, y, z = np.moveaxis(w, -1, 0)
    zero = np.zeros_like(x)
    rows = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1)
    return rows.reshape(*w.shape[:-1], 3, 3)


def points(name, n, seed=0, size=0.4):
    """Expm of small matrices, in float64 by their eigenvalues, away from the identity."""
    rng = np.random.default_rng(seed)
    if name == "rotations":
        a = skew(size * rng.normal(size=(n, 3)) + np.array([0.5, -0.3, 0.2]))
    else:
        a = size * rng.normal(size=(n, 3, 3))
        a = a + a.swapaxes(-1, -2) + np.diag([0.5, -0.3, 0.2])
    values, vectors = np.linalg.eig(a)
    return np.real(vectors * np.exp(values)[..., None, :] @ np.linalg.inv(vectors))


def logm(a):
    values, u = np.linalg.eigh(a)
    return (u * np.log(values)[..., None, :]) @ u.swapaxes(-1, -2)


@pytest.mark.parametrize("name", GROUPS)
def test_mean_and_variance_move_to_the_bias_and_the_scale(name):
    """In float64. The mean of the result is found by the library's own descent, and by the
    definition: the logarithms at the bias sum to zero."""
    group = GROUPS[name]
    with jax.enable_x64(True):
        x, bias = jnp.asarray(points(name, 8)), jnp.asarray(points(name, 1, seed=1)[0])
        move = jnp.asarray(points(name, 1, seed=2)[0])

        @jax.jit
        def run(x, bias):
            y, statistics = manifolds.lie_batch_norm(group, x, bias, 0.6, epsilon=1e-3, steps=40)
            at = jnp.broadcast_to(bias, y.shape)
            logs, squares = group.manifold.log(at, y), group.manifold.dist(at, y) ** 2
            again, _ = manifolds.lie_batch_norm(group, x, bias, 0.6, statistics, epsilon=1e-3)
            alone, _ = manifolds.lie_batch_norm(group, x[:2], bias, 0.6, statistics, epsilon=1e-3)
            moved = group.multiply(jnp.broadcast_to(move, x.shape), x)
            moved, _ = manifolds.lie_batch_norm(group, moved, bias, 0.6, epsilon=1e-3, steps=40)
            again_of = lambda b: manifolds.lie_batch_norm(group, x, b, 0.6, statistics)[0]  # noqa: E731
            slope = jax.grad(lambda b: jnp.sum(again_of(b) ** 2))(bias)
            inverse = group.multiply(group.inverse(move), move)
            apart = (
                group.manifold.dist(at, x),
                group.manifold.dist(
                    *(group.multiply(jnp.broadcast_to(move, x.shape), a) for a in (at, x))
                ),
            )
            return y, statistics, logs, squares, (again, alone, moved, slope), inverse, apart

        found = jax.device_get(run(x, bias))
    y, statistics, logs, squares, (again, alone, moved, slope), inverse, apart = found
    v = statistics["variance"]
    np.testing.assert_allclose(logs.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(squares.mean(), 0.36 * v / (v + 1e-3), rtol=1e-9)
    np.testing.assert_allclose(again, y, atol=1e-12)
    np.testing.assert_allclose(alone, y[:2], atol=1e-12)  # rows don't depend on each other
    assert np.isfinite(slope).all() and np.abs(y - np.asarray(x)).max() > 0.1
    np.testing.assert_allclose(moved, y, atol=1e-8)  # where the points lay has no influence
    np.testing.assert_allclose(inverse, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(apart[1], apart[0], rtol=1e-9)  # products keep distances
    if name == "log-Euclidean":  # it is batch normalization of logarithms
        logs = logm(np.asarray(x))
        spread = ((logs - logs.mean(0)) ** 2).sum((-1, -2)).mean()
        expected = logm(np.asarray(bias)) + 0.6 * (logs - logs.mean(0)) / np.sqrt(spread + 1e-3)
        np.testing.assert_allclose(logm(y), expected, atol=1e-9)


def test_running_statistics_go_along_the_geodesic():
    group = GROUPS["rotations"]
    a, b = (jnp.asarray(p, jnp.float32) for p in points("rotations", 2))
    of = lambda m, v: {"mean": m, "variance": jnp.asarray(v)}  # noqa: E731

    @jax.jit
    def run(a, b):
        moved = manifolds.running_mean(group, of(a, 1.0), of(b, 2.0), decay=0.75)
        ends, dist = jnp.stack([a, b]), group.manifold.dist
        return dist(a, b), dist(ends, jnp.stack([moved["mean"]] * 2)), moved["variance"]

    whole, parts, variance = jax.device_get(run(a, b))
    np.testing.assert_allclose(parts, np.array([0.25, 0.75]) * whole, rtol=1e-4)
    assert variance == 1.25


def test_bad_options_are_named():
    x = jnp.eye(3)[None]
    with pytest.raises(TypeError, match="expected a LieGroup, such as manifolds.rotation_group"):
        manifolds.lie_batch_norm(manifolds.so3(), x)
    with pytest.raises(ValueError, match="epsilon to be finite and positive, got 0"):
        manifolds.lie_batch_norm(GROUPS["rotations"], x, epsilon=0)
    with pytest.raises(ValueError, match="steps to be a whole number"):
        manifolds.frechet_mean(manifolds.so3(), x, steps=0)
    with pytest.raises(ValueError, match=r"a decay in \(0, 1\)"):
        manifolds.running_mean(GROUPS["rotations"], {}, {}, decay=1)
