"""Base densities on manifolds: they integrate to one in the volume of the metric, by quadrature in
coordinates of their own, and their samples have the moments of the density."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keys import KEYS, keys_consumed_twice

from jflow import distributions, manifolds
from jflow.types import Distribution


def legendre(n, low, high):
    x, w = np.polynomial.legendre.leggauss(n)
    return low + (high - low) * (x + 1) / 2, (high - low) / 2 * w


def grid(*axes):
    """The coordinates, [n] each, and the weights [n] of a product of rules (x, w)."""
    x, w = (np.meshgrid(*parts, indexing="ij") for parts in zip(*axes, strict=True))
    return [a.ravel() for a in x], np.prod([a.ravel() for a in w], axis=0)


def periodic(n):
    return np.arange(n) * 2 * np.pi / n, np.full(n, 2 * np.pi / n)


def on_sphere():
    """By the angle from the north pole and around it."""
    (angle, turn), w = grid(legendre(80, 0, np.pi), periodic(48))
    x = [np.sin(angle) * np.cos(turn), np.sin(angle) * np.sin(turn), np.cos(angle)]
    return np.stack(x, 1), w * np.sin(angle)


def on_torus():
    x, w = grid(legendre(80, -np.pi, np.pi), legendre(80, -np.pi, np.pi))
    return np.stack(x, 1), w


def on_hyperboloid():
    """By the distance from the origin, where the circle of radius r is 2 pi sinh r long."""
    (r, turn), w = grid(legendre(120, 0, 12), periodic(64))
    x = [np.cosh(r), np.sinh(r) * np.cos(turn), np.sinh(r) * np.sin(turn)]
    return np.stack(x, 1), w * np.sinh(r)


def on_spd():
    """By the logarithms of eigenvalues, a = log l1 + log l2 and b = log l1 - log l2 > 0, and the
    angle of the vectors: |dX|^2 = dl1^2 + dl2^2 + 2 (l1 - l2)^2 dangle^2, times det^(-3/2)."""
    turn, w = periodic(24)
    half = turn / 2, w / 2  # a turn of the vectors by pi changes nothing
    (a, b, angle), w = grid(legendre(48, -16, 16), legendre(40, 0, 14), half)
    l1, l2 = np.exp((a + b) / 2), np.exp((a - b) / 2)
    c, s = np.cos(angle), np.sin(angle)
    x = [c * c * l1 + s * s * l2, c * s * (l1 - l2), c * s * (l1 - l2), s * s * l1 + c * c * l2]
    volume = math.sqrt(2) * (l1 - l2) * (l1 * l2 / 2) / (l1 * l2) ** 1.5
    return np.stack(x, 1).reshape(-1, 2, 2), w * volume


def on_so3():
    """By the axis and the angle r of a rotation: 4 sin^2(r / 2) dr for each axis of the sphere."""
    (r, z, turn), w = grid(legendre(48, 0, np.pi), legendre(24, -1, 1), periodic(24))
    flat = np.sqrt(1 - z * z)
    axis = np.stack([flat * np.cos(turn), flat * np.sin(turn), z], 1)
    skew = np.cross(np.eye(3)[None], axis[:, None])
    x = np.eye(3) + np.sin(r)[:, None, None] * skew + (1 - np.cos(r))[:, None, None] * skew @ skew
    return x, w * 4 * np.sin(r / 2) ** 2


class Row(NamedTuple):
    manifold: Any
    rule: Any  # () -> points, weights
    center: Any  # the mean around which the rule is made
    beside: Any  # another mean


ROTATED = np.array([[np.cos(0.5), -np.sin(0.5), 0], [np.sin(0.5), np.cos(0.5), 0], [0, 0, 1]])
TABLE = {
    "sphere": Row(manifolds.sphere(2), on_sphere, [0.0, 0.0, 1.0], [0.6, 0.0, 0.8]),
    "torus": Row(manifolds.torus(2), on_torus, [0.0, 0.0], [2.5, -0.3]),
    "hyperboloid": Row(
        manifolds.hyperboloid(2), on_hyperboloid, [1.0, 0.0, 0.0], [1.25, 0.75, 0.0]
    ),
    "spd": Row(manifolds.spd(2), on_spd, np.eye(2), [[1.5, 0.3], [0.3, 0.8]]),
    "so3": Row(manifolds.so3(), on_so3, np.eye(3), ROTATED),
}
LAWS = {  # wide ones reach the cut locus, where they end
    f"{name}, {kind}": (name, mean, std)
    for name, row in TABLE.items()
    for kind, mean, std in (("wide", row.center, 1.8), ("beside", row.beside, 0.5))
}
LAWS["hyperboloid, wide"] = ("hyperboloid", [1.0, 0.0, 0.0], 1.2)


@pytest.mark.parametrize("name", LAWS)
def test_wrapped_normal(name, x64):
    """The density integrates to 1 (1e-3), and the means of functions of 4000 samples are those of
    the density, within 4 standard errors."""
    space, mean, std = LAWS[name]
    row = TABLE[space]
    law = distributions.wrapped_normal(row.manifold, mean, std)
    assert isinstance(law, Distribution)
    x, volume = row.rule()

    @jax.jit
    def run(x, key):
        return law.log_prob({}, x), law.sample({}, key, 4000)

    log_prob, sample = jax.device_get(run(x, KEYS[0]))
    weight = volume * np.exp(log_prob)
    np.testing.assert_allclose(weight.sum(), 1, atol=1e-3)
    manifolds.check(row.manifold, sample, tolerance=1e-8)
    for function in (np.sin, np.tanh, lambda x: np.tanh(x) ** 2):
        draws = function(sample).reshape(len(sample), -1)
        expected = weight @ function(x).reshape(len(x), -1)
        error = 4 * draws.std(axis=0) / np.sqrt(len(sample)) + 1e-3
        assert np.all(np.abs(draws.mean(axis=0) - expected) < error), name


@pytest.mark.parametrize("name", ["sphere", "torus", "so3"])
def test_uniform_on(name, x64):
    """Its density times the volume is 1, and samples have the moments of quadrature."""
    row = TABLE[name]
    law = distributions.uniform_on(row.manifold)
    x, volume = row.rule()
    np.testing.assert_allclose(volume @ np.exp(law.log_prob({}, x)), 1, atol=1e-3)
    sample = np.asarray(law.sample({}, KEYS[1], 4000))
    for function in (np.sin, lambda x: x**2):
        draws = function(sample).reshape(len(sample), -1)
        expected = volume @ function(x).reshape(len(x), -1) / volume.sum()
        error = 4 * draws.std(axis=0) / np.sqrt(len(sample)) + 1e-3
        assert np.all(np.abs(draws.mean(axis=0) - expected) < error)


def test_on_a_simplex_and_a_product():
    """The uniform law of the Fisher metric is that of Dirichlet(1/2, ...), and the product of
    manifolds has the product of laws."""
    simplex = manifolds.simplex(2)
    p = np.asarray(distributions.uniform_on(simplex).sample({}, KEYS[0], 4000))
    angle = 2 * np.arcsin(np.sqrt(p[:, 0])) / np.pi  # of an arcsine law: uniform
    assert np.max(np.abs(np.sort(angle) - (np.arange(4000) + 0.5) / 4000)) < 1.95 / np.sqrt(4000)
    pair = manifolds.product(manifolds.sphere(2), manifolds.torus(1))
    x = pair.random(KEYS[1], 5)
    law = distributions.wrapped_normal(pair, [0.0, 0.6, 0.8, 1.0], 0.7)
    parts = (
        distributions.wrapped_normal(manifolds.sphere(2), [0.0, 0.6, 0.8], 0.7),
        distributions.wrapped_normal(manifolds.torus(1), [1.0], 0.7),
    )
    expected = parts[0].log_prob({}, x[:, :3]) + parts[1].log_prob({}, x[:, 3:])
    np.testing.assert_allclose(law.log_prob({}, x), expected, rtol=1e-5)


def test_types_keys_and_missing_numbers():
    base = distributions.uniform_on(manifolds.torus(2))
    normal = distributions.wrapped_normal(manifolds.torus(2), np.zeros(2), np.float64(0.5))
    for law in (base, normal):
        x = law.sample({}, KEYS[0], 3)
        assert x.shape == (3, 2) and x.dtype == jnp.float32 and law.init(KEYS[0], x) == {}
        half = law.log_prob({}, x.astype(jnp.bfloat16))
        assert half.dtype == jnp.float32 and half.shape == (3,)
        assert np.isnan(law.log_prob({}, x.at[1].set(jnp.nan))).tolist() == [False, True, False]
        assert not keys_consumed_twice(lambda key, law=law: law.sample({}, key, 2), KEYS[0])


def test_bad_options_fail_at_construction():
    sphere = manifolds.sphere(2)
    with pytest.raises(ValueError, match="uniform_on: expected a manifold of finite volume"):
        distributions.uniform_on(manifolds.hyperboloid(2))
    with pytest.raises(ValueError, match=r"wrapped_normal: expected a mean of shape \[3\]"):
        distributions.wrapped_normal(sphere, [1.0, 0.0], 1.0)
    with pytest.raises(ValueError, match="wrapped_normal: expected a mean on the manifold"):
        distributions.wrapped_normal(sphere, [1.0, 1.0, 0.0], 1.0)
    with pytest.raises(ValueError, match="wrapped_normal: expected a finite std > 0, got 0"):
        distributions.wrapped_normal(sphere, [1.0, 0.0, 0.0], 0.0)
    with pytest.raises(ValueError, match="wrapped_normal: .* exponential map is one to one"):
        distributions.wrapped_normal(manifolds.simplex(2), [0.5, 0.5], 1.0)
    with pytest.raises(TypeError, match="uniform_on: expected a Manifold"):
        distributions.uniform_on(2)
