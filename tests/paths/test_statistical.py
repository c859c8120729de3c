"""Bridges on the sphere of square roots of probabilities: their moments against simulation in all
dimensions, their ends, the law of samples, and the loss of the drift."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses, manifolds, paths, solvers
from jflow.types import Field

KEY = jax.random.key(0)
P = np.array([0.5, 0.3, 0.2])


def simulated(size, start, noise, draws, steps):
    """Bridges to the first corner by Euler's method in all coordinates, back on the sphere by
    division, at t = 1/4, 1/2, 3/4: [3, draws, size]."""
    rng, kept = np.random.default_rng(0), []
    x = np.tile(start, (draws, 1))
    rate, h = 2 * math.log(noise[1] / noise[0]), 1 / steps
    for i in range(3 * steps // 4):
        t = i * h
        sigma = noise[0] * math.exp(rate / 2 * t)
        left = sigma**2 * (1 - t if rate == 0 else np.expm1(rate * (1 - t)) / rate)
        c = np.clip(x[:, :1], -1 + 1e-9, 1 - 1e-9)
        pull = np.arccos(c) / np.sqrt(1 - c**2) * (np.eye(size)[:1] - c * x)
        e = rng.normal(size=x.shape)
        e -= (e * x).sum(1, keepdims=True) * x
        x = x + sigma**2 / left * h * pull + sigma * math.sqrt(h) * e
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        if (i + 1) % (steps // 4) == 0:
            kept.append(x)
    return np.stack(kept)


@pytest.mark.parametrize("mask, noise", [(1.0, (0.8, 0.8)), (0.0, (1.0, 0.4))])
def test_moments_are_those_of_the_bridge(mask, noise):
    """The mean of the training law, along the corner and along the start, against bridges in five
    or six dimensions, within four standard errors of both and 0.01 for Euler's steps."""
    k = 5
    bridge = paths.statistical_bridge(k, noise=noise, mask=mask, draws=16384, steps=128)
    start = np.asarray(bridge.start(KEY, (1,)), np.float64)[0]
    walked = simulated(bridge.size, start, noise, 8000, 400)
    away = start - start[0] * np.eye(bridge.size)[0]
    away /= np.linalg.norm(away)
    x1 = jnp.tile(jax.nn.one_hot(jnp.array([0]), k), (8000, 1))
    draw = jax.jit(lambda t: bridge.path.point(None, x1, jnp.full(8000, t), key=KEY))
    for t, exact in zip((0.25, 0.5, 0.75), walked, strict=True):
        x = np.asarray(draw(t))
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
        for direction in (np.eye(bridge.size)[0], away):
            found, wanted = x @ direction, exact @ direction
            error = math.hypot(found.std(), wanted.std()) / math.sqrt(8000)
            assert abs(found.mean() - wanted.mean()) < 4 * error + 0.01
        others = [np.abs(np.delete(a, [0], 1)).mean() for a in (x, exact)]
        np.testing.assert_allclose(others[0], others[1], rtol=0.1)  # the spread is alike


def test_ends_of_the_path_and_mixtures_of_starts():
    """At t=0 the start, at t=1 the corner; a share that changes in time starts as it says."""
    bridge = paths.statistical_bridge(4, mask=lambda t: 0.25 + 0.5 * t, steps=16, draws=64)
    x1 = jax.nn.one_hot(jnp.arange(4000).reshape(1000, 4) % 4, 4)
    run = jax.jit(lambda t: bridge.path.point(x1, x1, t, key=KEY))
    first, last = np.asarray(run(jnp.zeros(1000))), np.asarray(run(jnp.ones(1000)))
    np.testing.assert_allclose(last[..., :4], x1, atol=1e-5)
    masked = np.abs(first - np.eye(5)[-1]).max(-1) < 1e-5
    middle = np.abs(first - np.array([0.5] * 4 + [0.0])).max(-1) < 1e-5
    assert np.all(masked | middle)
    for share in (masked.mean(), (np.asarray(bridge.start(KEY, (1000, 4)))[..., -1] == 1).mean()):
        assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    target = jax.jit(lambda t: bridge.path.target(x1, x1, t, key=KEY))(jnp.full(1000, 0.5))
    x = run(jnp.full(1000, 0.5))
    np.testing.assert_allclose(np.sum(x * target, -1), 0, atol=1e-5)  # tangent


def test_the_logarithm_of_corners_is_that_of_the_sphere(x64):
    x = np.random.default_rng(0).normal(size=(6, 5))
    x[0] = [1, 1e-6, 0, 0, 0]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    p = np.random.default_rng(1).dirichlet(np.ones(4), 6)
    log = manifolds.sphere(4).log
    expected = sum(
        p[:, k : k + 1] * np.asarray(log(x, np.tile(np.eye(5)[k], (6, 1)))) for k in range(4)
    )
    np.testing.assert_allclose(paths.corner_log(x, p), expected, atol=1e-9)
    slope = jax.grad(lambda x: jnp.sum(paths.corner_log(x, p) ** 2))(np.eye(5)[[0, 0, 1, 2, 3, 4]])
    assert np.all(np.isfinite(slope))


def test_samples_of_the_posterior_reach_the_law_of_the_tokens():
    """The posterior of the normal laws on the sphere that the path draws from; all states are unit
    vectors. The total variation is that of 4000 draws and of the approximation."""
    noise, n = (0.6, 0.6), 4000
    bridge = paths.statistical_bridge(3, noise=noise)
    theta, rho = paths.radial_moments(3, math.pi / 2, noise=noise)
    sphere, grid = manifolds.sphere(3), np.linspace(0, 1, theta.shape[0])

    def posterior(params, x, t, cond=None, *, key=None):
        angle, spread = (jnp.interp(t, grid, table)[:, None, None] for table in (theta, rho))
        corners = jnp.eye(4)[None, :3]
        mean = jnp.cos(angle) * corners + jnp.sin(angle) * jnp.eye(4)[None, 3:]
        far = sphere.dist(mean, jnp.broadcast_to(x[:, None], (x.shape[0], 3, 4)))
        log = -(far**2) / (2 * jnp.maximum(spread[..., 0], 1e-3) ** 2)
        log = log + 2 * jnp.log(jnp.maximum(far, 1e-6) / jnp.maximum(jnp.sin(far), 1e-6))
        return log + jnp.log(jnp.asarray(P, x.dtype))[None]

    step = solvers.bridge_step(Field(None, posterior), bridge)

    @jax.jit
    def run(key):
        x0 = bridge.start(KEY, (n,))
        return solvers.sample_sde(
            step, {}, x0, key, solvers.grids.uniform(60), return_trajectory=True
        )

    x, path = jax.device_get(run(jax.random.key(1)))
    np.testing.assert_allclose(np.linalg.norm(path.x, axis=-1), 1, atol=1e-5)
    assert np.all(path.std[-1] == 0) and np.all(path.std[:-1] > 0)
    shares = np.bincount(x[:, :3].argmax(1), minlength=3) / n
    assert 0.5 * np.abs(shares - P).sum() < 0.03
    assert (x.max(1) > 0.98).mean() > 0.99  # the last states are corners
    alone = step({}, path.x[1], 0.5, 0.6, None)
    np.testing.assert_array_equal(alone[0], alone[1])


def test_the_drift_error_is_in_units_of_the_noise():
    """0 where the token is known; for flat logits |mean of the logarithms - that of the token|^2
    sigma^2 / (2 V^2)."""
    bridge = paths.statistical_bridge(4, noise=(1.0, 0.5), steps=16, draws=64)
    tokens, t = np.array([[0, 2], [3, 1]], np.int32), 0.4
    time = lambda key, n: jnp.full(n, t)  # noqa: E731
    known = Field(
        None, lambda params, x, t, cond=None, *, key=None: 500.0 * jax.nn.one_hot(tokens, 4)
    )
    flat = Field(None, lambda params, x, t, cond=None, *, key=None: 0 * x)
    run = lambda field: losses.bridge_drift(field, bridge, time=time)({}, KEY, {"x": tokens})[0]  # noqa: E731
    assert abs(run(known)) < 1e-9
    seen = []
    keep = Field(None, lambda params, x, t, cond=None, *, key=None: seen.append(x) or 0 * x)
    value = run(keep)
    x, log = seen[0], manifolds.sphere(4).log
    logs = jnp.stack([log(x, jnp.broadcast_to(jnp.eye(5)[k], x.shape)) for k in range(4)], axis=2)
    mine = jnp.take_along_axis(logs, tokens[..., None, None], axis=2)[:, :, 0]
    square = jnp.sum(jnp.square(jnp.mean(logs, axis=2) - mine), axis=(1, 2))
    rate = (bridge.noise(t) / bridge.remaining(t)) ** 2 / 2
    np.testing.assert_allclose(value, np.mean(rate * square), rtol=1e-4)
    np.testing.assert_allclose(run(flat), value, rtol=1e-6)
    s = np.linspace(t, 1, 2001)
    left = np.trapezoid(np.asarray(bridge.noise(s)) ** 2, s)
    np.testing.assert_allclose(bridge.remaining(t), left, rtol=1e-4)


def test_bad_options():
    bridge = paths.statistical_bridge(3, steps=4, draws=8)
    flat = Field(None, lambda params, x, t, cond=None, *, key=None: 0 * x[..., :2])
    for call, said in [
        (lambda: paths.statistical_bridge(1), "num_classes"),
        (lambda: paths.statistical_bridge(3, noise=(0.0, 1.0)), "noise of two numbers above 0"),
        (lambda: paths.statistical_bridge(3, mask=1.5), r"mask in \[0, 1\], got 1.5"),
        (lambda: paths.radial_moments(3, 4.0), r"an angle in \(0, pi\), got 4.0"),
        (lambda: bridge.start(None, (2,)), "statistical_bridge is stochastic: it needs a key"),
        (
            lambda: losses.bridge_drift(flat, bridge)({}, KEY, {"x": np.array([[7]])}),
            r"bridge_drift: expected tokens in 0 ... 2, got 7 at \[0, 0\]",
        ),
        (
            lambda: solvers.bridge_step(flat, bridge)({}, bridge.start(KEY, (2,)), 0.0, 1.0, KEY),
            r"bridge_step: expected logits of shape \[2, 3\], .*got \[2, 2\]",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
