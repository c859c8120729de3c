"""Mixtures over orbits: on the circle and of normals in closed form, and the bound of one orbit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jflow import bijectors, distributions, flows
from jflow.types import Bijector, Distribution

TURNS = 7


def rotation(fraction):
    """The circle [0, 1) turned by a fraction of it."""

    def turn(sign):
        return lambda params, x, cond=None, *, key=None: (
            jnp.mod(x + sign * fraction, 1),
            jnp.zeros_like(x[:, 0]),
        )

    return Bijector(lambda *args, **options: {}, turn(1), turn(-1))


def test_the_orbit_of_a_rational_rotation_is_uniform(x64):
    """By 3/7 of the circle: the seven images of 1 + 0.9 cos(2 pi x) sum to 7 (roots of unity), six
    of them do not; and those of an arc of a seventh cover the circle, samples too
    (Kolmogorov-Smirnov, false alarm 1 in 1000, fixed seed)."""

    def wave(params, x, cond=None, *, key=None):
        return jnp.log1p(0.9 * jnp.cos(2 * jnp.pi * x[:, 0]))

    init = lambda *args: {}  # noqa: E731
    arc = distributions.uniform((1,), 0.0, 1 / TURNS)
    x = np.random.default_rng(0).random((50, 1))
    params = {"bijector": {}, "base": {}}

    @jax.jit
    def run(key):
        mixtures = [
            flows.mix_flow(rotation(3 / TURNS), base, length)
            for base, length in (
                (Distribution(init, wave, None), TURNS),
                (arc, TURNS),
                (Distribution(init, wave, None), TURNS - 1),
            )
        ]
        found = [mixture.log_prob(params, x) for mixture in mixtures]
        return found, mixtures[1].sample(params, key, 2000)

    (waves, arcs, missing), samples = jax.device_get(run(jax.random.key(0)))
    np.testing.assert_allclose(waves, 0, atol=1e-12)
    np.testing.assert_allclose(arcs, 0, atol=1e-12)
    assert np.abs(missing).max() > 0.05
    assert scipy.stats.kstest(samples[:, 0], "uniform").pvalue > 1e-3


def test_powers_of_an_affine_map_are_a_mixture_of_normals_and_the_bound_is_one_orbits(x64):
    """x -> x / 2 + 1 over N(0, 1): component n is N(2 - 2^(1 - n), 4^-n). The bound of each draw is
    the mean of log p~ - log q over its orbit, with q from log_prob, and the mean of 2000 is that
    over samples of the mixture within 4 standard errors of the difference."""
    length, n = 5, 2000
    mixture = flows.mix_flow(bijectors.affine((1,)), distributions.normal((1,)), length)
    params = {"bijector": {"log_scale": np.log([0.5]), "shift": np.ones(1)}, "base": {}}
    log_density = lambda x: -0.25 * jnp.sum(x**2, axis=1)  # noqa: E731
    key, x = jax.random.key(0), np.linspace(-3, 3, 41)[:, None]

    @jax.jit
    def run():
        z = distributions.normal((1,)).sample({}, key, n)
        point, direct = z, 0
        for _ in range(length):
            direct += (log_density(point) - mixture.log_prob(params, point)) / length
            point = point / 2 + 1
        samples = mixture.sample(params, jax.random.key(1), n)
        plain = log_density(samples) - mixture.log_prob(params, samples)
        bounds = mixture.elbo(params, jax.random.clone(key), n, log_density)
        return mixture.log_prob(params, x), direct, bounds, plain

    log_prob, direct, bounds, plain = jax.device_get(run())
    scales = 0.5 ** np.arange(length)
    expected = scipy.stats.norm.pdf(x, 2 - 2 * scales, scales).mean(axis=1)
    np.testing.assert_allclose(log_prob, np.log(expected), rtol=1e-10)
    np.testing.assert_allclose(bounds, direct, rtol=1e-10)
    error = np.sqrt((np.var(bounds) + np.var(plain)) / n)
    assert abs(bounds.mean() - plain.mean()) < 4 * error
    assert bounds.mean() < np.log(np.sqrt(4 * np.pi))


def test_the_bound_costs_a_number_of_maps_that_is_linear_in_the_length():
    """Its loops over the orbit: five of at most `length` turns, none inside another."""
    mixture = flows.mix_flow(bijectors.affine((1,)), distributions.normal((1,)), 50)
    params = {"bijector": {"log_scale": np.zeros(1), "shift": np.ones(1)}, "base": {}}
    run = lambda key: mixture.elbo(params, key, 2, lambda x: x[:, 0])  # noqa: E731

    def loops(jaxpr, inside):
        found = []
        for equation in jaxpr.eqns:
            is_loop = equation.primitive.name in ("scan", "while")
            assert not (is_loop and inside)
            found += [equation.params["length"]] if equation.primitive.name == "scan" else []
            inner = [value for value in equation.params.values() if hasattr(value, "jaxpr")]
            for value in inner:
                found += loops(value.jaxpr, inside or is_loop)
        return found

    assert loops(jax.make_jaxpr(run)(jax.random.key(0)).jaxpr, False) == [50] * 5


def test_options_are_checked():
    base = distributions.normal((1,))
    with pytest.raises(ValueError, match="mix_flow: expected length"):
        flows.mix_flow(bijectors.affine((1,)), base, 0)
    with pytest.raises(TypeError, match="mix_flow: expected"):
        flows.mix_flow(base, base, 2)
