"""DREAM against its formula in numpy, its limits, and the pull to the mean by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses, paths
from jflow.types import Velocity

rng = np.random.default_rng(0)
X0, X1, W = rng.normal(size=(4, 3)), rng.normal(size=(4, 3)), np.array([1.0, 2.0, 0.5, 0.0])
T = np.array([0.1, 0.4, 0.7, 0.95])
COSINE = paths.Schedule(lambda t: jnp.sin(jnp.pi * t / 2), lambda t: jnp.cos(jnp.pi * t / 2))


def fixed(key, n):
    return jnp.asarray(T)[:n]


def apply(params, x, t, cond=None, *, key=None):
    return jnp.tanh(params["w"] * x + t[:, None])


NET = Velocity(lambda key, x, t, cond=None: {"w": jnp.ones(())}, apply)


def by_hand(w, a, s, da, ds, lam):
    """The loss of the four rows; v predicts the noise e with a e = ... by x = a x1 + s e and v = da
    x1 + ds e."""
    a, s, da, ds, lam = (np.broadcast_to(c, 4)[:, None] for c in (a, s, da, ds, lam))
    x = a * X1 + s * X0
    e = (da * x - a * np.tanh(w * x + T[:, None])) / (da * s - ds * a)
    moved = X0 + lam * (X0 - e)
    x = a * X1 + s * moved
    error = ((np.tanh(w * x + T[:, None]) - da * X1 - ds * moved) ** 2).mean(axis=1)
    return (W * error).sum() / W.sum()


def test_the_formula(x64):
    batch = {"x0": X0, "x": X1, "weight": W}
    params, key = {"w": jnp.asarray(0.75)}, jax.random.key(0)

    @jax.jit
    def run(params, batch):
        options = [
            {},
            {"adaptation": 0.5},
            {"adaptation": lambda t: t**2},
            {"schedule": COSINE},
        ]
        made = [losses.dream(NET, time=fixed, **o) for o in options]
        return [loss(params, jax.random.clone(key), batch)[0] for loss in made]

    found = jax.device_get(run(params, batch))
    angle = np.pi / 2 * T
    slopes = np.pi / 2 * np.cos(angle), -np.pi / 2 * np.sin(angle)
    want = [
        by_hand(0.75, T, 1 - T, 1.0, -1.0, 1 - T),
        by_hand(0.75, T, 1 - T, 1.0, -1.0, 0.5),
        by_hand(0.75, T, 1 - T, 1.0, -1.0, T**2),
        by_hand(0.75, np.sin(angle), np.cos(angle), *slopes, np.cos(angle)),
    ]
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_limits():
    """Without adaptation it is flow matching under the same key, to the last digit; an exact
    prediction of data that are known makes its states of the path's."""
    batch = {"x": jnp.asarray(X1, jnp.float32)}
    known = Velocity(
        lambda *_: {},
        lambda params, x, t, cond=None, *, key=None: (3 - x) / (1 - t[:, None]),
    )

    @jax.jit
    def run(batch):
        key = jax.random.key(1)
        plain = losses.flow_matching(NET)({"w": 0.5}, key, batch)[0]
        none = losses.dream(NET, adaptation=0)({"w": 0.5}, jax.random.clone(key), batch)[0]
        one = {"x": jnp.full((4, 3), 3.0)}
        exact = losses.dream(known, adaptation=1.0, time=fixed)({}, jax.random.key(2), one)[0]
        return plain, none, exact

    plain, none, exact = jax.device_get(run(batch))
    assert plain == none
    assert exact < 1e-9  # rounding of 1 / (1 - 0.95), squared


def test_the_pull_to_the_mean_by_hand():
    """x0 and x1 are -1 or 1, t = 1/2 and v = k x: at k = 0, the optimum of flow matching, x' = x +
    (x0 - x1) / 4 and the target is 3/2 (x1 - x0), so that the slope in k is -2 E[x' target] = 3/4
    E(x1 - x0)^2 = 3/2: it goes on to a k below 0, which contracts. A gradient through the first
    prediction would add to it."""
    line = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: params["k"] * x)
    pairs = np.array([[-1.0, -1], [-1, 1], [1, -1], [1, 1]], np.float32)
    loss = losses.dream(line, adaptation=1.0, time=lambda key, n: jnp.full(n, 0.5))
    batch = {"x0": pairs[:, :1], "x": pairs[:, 1:]}
    slope = jax.grad(lambda k: loss({"k": k}, jax.random.key(0), batch)[0])(0.0)
    np.testing.assert_allclose(slope, 1.5, rtol=1e-6)


def test_the_optimum_of_full_adaptation():
    """x0 and x1 have mean 0 and variance 1, v predicts the data as d x. By hand, for adaptation 1:
    the best prediction for the states that d makes is t^2 d / (t^4 d^2 + (1 - t)^2 (1 + t d)^2), so
    that d stays as it is at 0, the mean, which nothing leaves below t = 1/2, and above that at the
    root of the denominator less t^2. Samples along it have half the standard deviation."""
    line = Velocity(
        lambda *_: {},
        lambda params, x, t, cond=None, *, key=None: (params["d"] - 1) * x / (1 - t[:, None]),
    )
    pairs = np.array([[-1.0, -1], [-1, 1], [1, -1], [1, 1]], np.float32)
    batch = {"x0": pairs[:, :1], "x": pairs[:, 1:]}

    @jax.jit
    @jax.vmap
    def slope(t, d):
        loss = losses.dream(line, adaptation=1.0, time=lambda key, n: jnp.full(n, t))
        return jax.grad(lambda d: loss({"d": d}, jax.random.key(0), batch)[0])(d)

    t = (np.arange(200) + 0.5) / 200
    s = 1 - t
    a, b, c = t**2 * (t**2 + s**2), 2 * t * s**2, s**2 - t**2
    d = np.where(t < 0.5, 0.0, (-b + np.sqrt(b**2 - 4 * a * c)) / (2 * a))
    at = np.stack([d, np.maximum(d - 0.05, 0.01), d + 0.05]).astype(np.float32)
    found = jax.device_get(slope(jnp.tile(t.astype(np.float32), 3), at.ravel())).reshape(3, -1)
    found = found * s**2  # of the prediction rather than of the velocity
    np.testing.assert_allclose(found[0], 0, atol=2e-5)  # 1 - t is off by 6e-8 in 0.0025
    assert (found[1, t > 0.51] < 0).all() and (found[1, t < 0.49] > 0).all()
    assert (found[2] > 0).all()
    np.testing.assert_allclose(np.exp(np.mean((d - 1) / s)), 0.5, rtol=1e-3)  # midpoints


def test_bad_input():
    with pytest.raises(ValueError, match=r"dream: expected .*adaptation in \[0, 1\], got 1.5"):
        losses.dream(NET, adaptation=1.5)
    with pytest.raises(TypeError, match="dream: expected a Velocity"):
        losses.dream(apply)
    batch = {"x": jnp.ones((4, 3))}
    short = losses.dream(NET, adaptation=lambda t: t[0])
    with pytest.raises(ValueError, match=r"adaptation\(t\) of shape \[4\], got \[\]"):
        short({"w": 1.0}, jax.random.key(0), batch)
    metric = losses.dream(NET, metric=lambda v, target, x, t: jnp.mean((v - target) ** 2))
    with pytest.raises(ValueError, match=r"a metric of shape \[4\], got \[\]"):
        metric({"w": 1.0}, jax.random.key(0), batch)
