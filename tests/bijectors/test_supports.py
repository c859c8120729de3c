"""Maps onto supports: closed forms, edges, the simplex, whole numbers, columns, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.scipy.special import ndtr

from jflow import bijectors, distributions, flows
from jflow.bijectors import supports
from jflow.types import Bijector, Distribution, Transport

KEY = jax.random.key(0)


def test_flows_onto_supports_have_the_densities_of_scipy(x64):
    """Logit-normal, lognormal and shifted lognormal densities, in units of their own."""
    rng = np.random.default_rng(0)
    z, normal = rng.normal(size=(50, 1)), distributions.normal((1,))
    cases = [
        (supports.positive(), np.exp(z), scipy.stats.lognorm(1).logpdf),
        (supports.greater_than(18), 18 + np.exp(z), scipy.stats.lognorm(1, 18).logpdf),
        (
            supports.less_than(-2),
            -2 - np.exp(-z),
            lambda x: scipy.stats.lognorm(1).logpdf(-2 - x),
        ),
        (
            supports.interval(10, 30),
            10 + 20 * scipy.special.expit(z),
            lambda x: (
                scipy.stats.norm.logpdf(np.log((x - 10) / (30 - x)))
                + np.log(20 / ((x - 10) * (30 - x)))
            ),
        ),
    ]
    for onto, x, log_density in cases:
        found = flows.flow(onto, normal).log_prob({"bijector": {}, "base": {}}, jnp.asarray(x))
        np.testing.assert_allclose(found, log_density(x)[:, 0], atol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_samples_never_leave_the_support(dtype):
    """Where the map rounds to an end, or overflows, the sample is the number next to the end."""
    z = jnp.asarray([[-1e6, -100.0, -20.0, 0.0, 20.0, 100.0, 1e6]], dtype)
    for onto, low, high in (
        (supports.interval(0, 1), 0, 1),
        (supports.interval(-3, 0), -3, 0),
        (supports.interval(1000, 1008), 1000, 1008),
        (supports.positive(), 0, np.inf),
        (supports.greater_than(-5), -5, np.inf),
        (supports.less_than(7), -np.inf, 7),
    ):
        x, _ = onto.forward({}, z)
        wide = np.asarray(x, np.float64)
        assert x.dtype == dtype and np.all((wide > low) & (wide < high)), (onto, wide)
        assert np.all(np.diff(wide) >= 0) and np.all(np.isfinite(onto.inverse({}, x)[1]))


def test_an_interval_keeps_its_digits_near_both_ends():
    """1e-30 away from 0, which is either end."""
    for onto, sign in ((supports.interval(0, 1), 1), (supports.interval(-1, 0), -1)):
        z = jnp.full((1, 1), sign * -np.log(1e30), jnp.float32)
        x, log_det = onto.forward({}, z)
        again, back = onto.inverse({}, x)
        assert float(x[0, 0]) == pytest.approx(sign * 1e-30, rel=1e-4)
        np.testing.assert_allclose(again, z, rtol=1e-6)
        np.testing.assert_allclose(log_det, -back, rtol=1e-6)


def test_the_simplex_has_the_jacobian_of_its_first_shares(x64):
    """And of two shares it is the interval (0, 1)."""
    onto, z = supports.simplex(4), jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    x, log_det = onto.forward({}, z)
    again, back = onto.inverse({}, x)
    np.testing.assert_allclose(np.sum(x, axis=-1), 1, atol=1e-12)
    np.testing.assert_allclose(again, z, atol=1e-10)
    np.testing.assert_allclose(back, -log_det, atol=1e-10)
    jacobian = jax.vmap(jax.jacobian(lambda z: onto.forward({}, z[None])[0][0, :-1]))(z)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-10)
    two, one = supports.simplex(2).forward({}, z[:, :1]), supports.interval(0, 1)
    share, slope = one.forward({}, z[:, :1])
    np.testing.assert_allclose(two[0][:, :1], share, atol=1e-12)
    np.testing.assert_allclose(two[1], slope, atol=1e-12)
    rows = jnp.asarray([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]])
    z, log_det = onto.inverse({}, rows)
    assert np.all(np.isfinite(z)) and np.isneginf(log_det[:2]).all() and np.isfinite(log_det[2])
    gradient = jax.grad(lambda x: jnp.sum(onto.inverse({}, x)[0]))(rows)
    assert np.all(np.isfinite(gradient))
    assert np.isnan(onto.inverse({}, rows.at[2, 0].set(jnp.nan))[1][2])


def logistic():
    """The density that is uniform on (0, L) behind `interval(0, L)`."""

    def log_prob(params, x, cond=None, *, key=None):
        return jnp.sum(jax.scipy.stats.logistic.logpdf(x), axis=-1)

    def sample(params, key, n, cond=None):
        return jax.random.logistic(key, (n, 2))

    return Distribution(lambda key, x, cond=None: {}, log_prob, sample)


def test_a_uniform_density_gives_every_whole_number_its_mass():
    """-log 6 nats for each die, whatever the noise; samples are dice of equal frequencies (the
    chi-squared test fails in 1 of 1000 seeds)."""
    model = flows.elbo_flow(supports.integers(1, 6), logistic())
    x = jnp.asarray(np.random.default_rng(0).integers(1, 7, size=(200, 2)), jnp.float32)
    params = model.init(KEY, x)
    elbo = model.elbo(params, x, key=jax.random.key(1))
    np.testing.assert_allclose(elbo, -2 * np.log(6), atol=1e-4)
    values, counts = np.unique(model.sample(params, jax.random.key(2), 3000), return_counts=True)
    assert values.tolist() == [1, 2, 3, 4, 5, 6]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_noise_from_the_posterior_makes_the_bound_exact(x64):
    """A normal density of the reals: P(x) is the mass of its cell, and the noise is that normal law
    within the cell. The cond of the noise is arcsinh(x)."""

    def cell(cond):
        return jnp.round(jnp.sinh(cond))

    def log_prob(params, u, cond=None, *, key=None):
        x = cell(cond)
        mass = jnp.log(ndtr(x + 1) - ndtr(x))
        return jnp.sum(jax.scipy.stats.norm.logpdf(x + u) - mass, axis=-1)

    def sample(params, key, n, cond=None):
        x = cell(cond)
        return jax.random.truncated_normal(key, x, x + 1, dtype=x.dtype) - x

    noise = Distribution(lambda key, x, cond=None: {}, log_prob, sample)
    model = flows.elbo_flow(supports.integers(noise=noise), distributions.normal((1,)))
    x = jnp.asarray([[-3.0], [-1.0], [0.0], [2.0]])
    params = model.init(KEY, x)
    mass = scipy.stats.norm.cdf(x + 1) - scipy.stats.norm.cdf(x)
    elbo = model.elbo(params, x, key=jax.random.key(1))
    np.testing.assert_allclose(elbo, np.log(mass)[:, 0], atol=1e-8)


@pytest.mark.parametrize("bounds", [(), (0,), (-5, 300_000)])
def test_every_whole_number_comes_back_from_its_cell(bounds):
    """Whatever the draw, in float32."""
    layer = supports.integers(*bounds)
    x = jnp.tile(jnp.asarray([0, 1, 2, 17, 1000, 100_000], jnp.float32), (5000, 1))
    params = layer.init(KEY, x)
    y, contribution = layer.inverse(params, x, key=jax.random.key(1))
    np.testing.assert_array_equal(layer.forward(params, y)[0], x)
    assert np.all(np.isfinite(contribution))


def test_columns_are_mapped_each_by_its_own_and_alike_ones_together():
    positive, share = supports.positive(), supports.interval(0, 1)
    onto = supports.columns(positive, None, share, positive)
    assert isinstance(onto, Bijector)
    params = {"0": {}, "1": {}}
    x = jnp.asarray([[2.0, -7.0, 0.25, 5.0]])
    z, log_det = onto.inverse(params, x)
    np.testing.assert_allclose(z, [[np.log(2), -7, -np.log(3), np.log(5)]], rtol=1e-6)
    np.testing.assert_allclose(log_det, -np.log(10) - np.log(0.25 * 0.75), rtol=1e-6)
    np.testing.assert_allclose(onto.forward(params, z)[0], x, rtol=1e-6)
    mixed = supports.columns(None, supports.integers(0, 3))
    assert isinstance(mixed, Transport)
    params = mixed.init(KEY, x[:, :2].at[:, 1].set(3.0))
    assert np.isneginf(mixed.inverse(params, x[:, :2].at[:, 1].set(2.5), key=KEY)[1][0])
    assert supports.columns(None, None).inverse({}, x[:, :2])[0].tolist() == [[2, -7]]


def test_data_outside_are_refused_in_one_sentence_where_they_are_seen():
    """The number, the row and the remedy; under jit log_det is -inf."""
    for onto, x, message in (
        (
            supports.interval(0, 1),
            [0.5, 1.0],
            "interval.0, 1.*the ends.*1 of 2.*1.0 in row 1: w",
        ),
        (supports.positive(), [0.0, -1.0], "positive.*above 0, got 2 of 2.*greater_than.-0.01"),
        (supports.greater_than(18), [18.0, 20.0], "greater_than.18.*above 18.*greater_than.17.8"),
        (supports.less_than(0), [-1.0, 3.0], "less_than.0.*below 0.*3.0 in row 1.*less_than.0.01"),
        (supports.integers(0), [1.5, 2.0], "integers.0.*whole numbers.*1.5 in row 0: round"),
        (supports.integers(0, 9), [10.0, 2.0], "integers.0, 9.*10.0 in row 0.*move the bounds"),
    ):
        x = jnp.asarray(x)[:, None]
        with pytest.raises(ValueError, match=message):
            onto.init(KEY, x)
        params = jax.jit(onto.init)(KEY, x)
        assert np.isneginf(onto.inverse(params, x, key=KEY)[1]).any()
    with pytest.raises(ValueError, match="simplex.3.*sum to 1, got 1 of 1.*divide each row"):
        supports.simplex(3).init(KEY, jnp.full((1, 3), 0.5))
    supports.positive().init(KEY, jnp.full((1, 1), jnp.nan))  # missing is not outside


def test_bad_options_and_shapes_name_what_was_given():
    for make, message in (
        (lambda: supports.interval(1, 1), "low < high, got low=1, high=1"),
        (lambda: supports.interval(0, np.inf), "a finite high, got inf"),
        (lambda: supports.greater_than(np.nan), "a finite low, got nan"),
        (lambda: supports.simplex(1), "parts to be a whole number of at least 2"),
        (lambda: supports.integers(0.5), "low to be a whole number, got 0.5"),
        (lambda: supports.integers(3, 3), "low < high, got low=3, high=3"),
        (lambda: supports.integers(high=3), "turn the sign"),
        (lambda: supports.columns(), "a support or None for each column, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="one by one"):
        supports.columns([supports.positive(), None])
    with pytest.raises(TypeError, match="give what a call of it returns"):
        supports.columns(supports.positive)
    with pytest.raises(ValueError, match=r"expected x \[b, ..., 2\], a support for each"):
        supports.columns(supports.positive(), None).init(KEY, jnp.ones((3, 3)))
    with pytest.raises(ValueError, match=r"expected an array \[b, ..., 3\], got \[2, 2\]"):
        supports.simplex(3).inverse({}, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="keep the shape"):
        supports.columns(bijectors.reshape((1,), (1, 1)), None).forward({"0": {}}, jnp.ones((2, 2)))
