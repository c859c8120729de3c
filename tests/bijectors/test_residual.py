"""Residual blocks: bounds, the log-det estimators and their gradient, memory, and the fixed-point
inverse."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jflow import bijectors as bj
from jflow import nets


def setup(d=3, b=2, coeff=0.65, dtype=jnp.float32, width=6, **options):
    """A block with a Jacobian near -coeff times the identity, so that late terms matter; depends on
    z and all params."""
    rng = np.random.default_rng(0)
    bijector = bj.residual(nets.LipschitzMLP((width,), coeff=coeff, activation=nn.tanh), **options)
    z = jnp.asarray(0.5 * rng.normal(size=(b, d)), dtype)
    shapes = jax.eval_shape(bijector.init, jax.random.key(0), z)
    params = {name: 0.2 * rng.normal(size=leaf.shape) for name, leaf in shapes.items()}
    frame = np.linalg.qr(rng.normal(size=(width, d)))[0]
    params["kernel_0"] += 3 * frame.T
    params["kernel_1"] -= 3 * frame
    return bijector, jax.tree.map(lambda p: jnp.asarray(p, dtype), params), z


def jacobians(net, params, z):
    return np.asarray(
        jax.jit(jax.vmap(jax.jacrev(lambda z: net.apply({"params": params}, z[None])[0])))(z),
        np.float64,
    )


def first_terms(jacobian, terms):
    """sum_k (-1)^(k+1) tr J^k / k over k = 1 .. terms."""
    return sum(
        (-1) ** (k + 1) * np.trace(np.linalg.matrix_power(jacobian, k)) / k
        for k in range(1, terms + 1)
    )


@pytest.mark.parametrize(
    ("estimator", "sure"),
    [
        (bj.log_dets.russian_roulette(), 3),
        (bj.log_dets.russian_roulette(0, 0.4), 1),
        (bj.log_dets.russian_roulette(1, per_row=True), 2),
    ],
    ids=["shared", "from the first term", "per row"],
)
def test_roulette_has_no_bias(estimator, sure):
    """1e5 draws within 3 standard errors of slogdet. The terms that are always there, alone, would
    be at 8 and more."""
    bijector, params, z = setup(log_det=estimator)
    draws = 100_000

    @jax.jit
    def run(keys):
        values = jax.vmap(lambda key: bijector.forward(params, z, key=key)[1])(keys)
        return jnp.mean(values, 0), jnp.std(values, 0) / draws**0.5

    mean, error = run(jax.random.split(jax.random.key(1), draws))
    jacobian = jacobians(nets.LipschitzMLP((6,), coeff=0.65, activation=nn.tanh), params, z)
    exact = np.linalg.slogdet(np.eye(3) + jacobian)[1]
    truncated = np.array([first_terms(m, sure) for m in jacobian])
    assert np.all(np.abs(mean - exact) < 3 * error)
    assert np.max(np.abs(truncated - exact) / error) > 8


def test_the_power_series_has_the_bias_of_its_missing_terms():
    """Two terms: on average tr J - tr J^2 / 2, which is not the log-det."""
    bijector, params, z = setup(log_det=bj.log_dets.neumann(2))
    values = jax.jit(jax.vmap(lambda key: bijector.forward(params, z, key=key)[1]))(
        jax.random.split(jax.random.key(0), 4000)
    )
    mean, error = np.mean(values, 0), np.std(values, 0) / len(values) ** 0.5
    jacobian = jacobians(nets.LipschitzMLP((6,), coeff=0.65, activation=nn.tanh), params, z)
    exact = np.linalg.slogdet(np.eye(3) + jacobian)[1]
    assert np.all(np.abs(mean - np.array([first_terms(m, 2) for m in jacobian])) < 3 * error)
    assert np.any(np.abs(mean - exact) > 8 * error)
    np.testing.assert_allclose(bijector.forward(params, z)[1], exact, atol=1e-6)  # without a key


def test_the_gradient_has_no_bias():
    """In params and in z, 4e4 draws: the mean of the squared z-scores is that of a chi-squared,
    within 4 deviations."""
    bijector, params, z = setup()
    draws = 40_000
    weights = jnp.array([1.0, -0.7])

    def objective(params, z, key):
        return jnp.sum(weights * bijector.forward(params, z, key=key)[1])

    @jax.jit
    def run(keys):
        grad = jax.grad(objective, argnums=(0, 1))
        samples = jax.vmap(lambda key: grad(params, z, key))(keys)
        mean = jax.tree.map(lambda g: jnp.mean(g, 0), samples)
        return (
            mean,
            jax.tree.map(lambda g: jnp.std(g, 0) / draws**0.5, samples),
            grad(params, z, None),
        )

    mean, error, exact = run(jax.random.split(jax.random.key(2), draws))
    mean, error, exact = (
        np.concatenate([np.ravel(g) for g in jax.tree.leaves(t)]) for t in (mean, error, exact)
    )
    used = error > 1e-6  # the last bias has no part in the Jacobian
    np.testing.assert_allclose(mean[~used], 0, atol=1e-6)
    score = (mean - exact)[used] / error[used]
    assert used.sum() > 30 and np.max(np.abs(exact[used]) / error[used]) > 50
    assert np.max(np.abs(score)) < 4.5 and np.mean(score**2) < 1 + 4 * np.sqrt(2 / used.sum())


def test_the_exact_gradient_is_that_of_slogdet(x64):
    """Against autodiff of slogdet through Jacobians taken a row at a time."""
    bijector, params, z = setup(dtype=jnp.float64)
    net = nets.LipschitzMLP((6,), coeff=0.65, activation=nn.tanh)

    def by_hand(params, z):
        rows = jax.vmap(jax.jacrev(lambda z: z + net.apply({"params": params}, z[None])[0]))(z)
        return jnp.sum(jnp.linalg.slogdet(rows)[1])

    ours = jax.jit(jax.grad(lambda p, z: jnp.sum(bijector.forward(p, z)[1]), argnums=(0, 1)))(
        params, z
    )
    expected = jax.jit(jax.grad(by_hand, argnums=(0, 1)))(params, z)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, expected)


def test_a_long_series_has_the_exact_gradient_in_one_dimension(x64):
    """There a probe of signs makes no noise: value and gradient are the series' own limits, to
    0.65^200."""
    bijector, params, z = setup(d=1, dtype=jnp.float64)
    series = bj.residual(
        nets.LipschitzMLP((6,), coeff=0.65, activation=nn.tanh), log_det=bj.log_dets.neumann(200)
    )

    def value_and_grad(bijector, key):
        def objective(params, z):
            return jnp.sum(jnp.array([1.0, -0.7]) * bijector.forward(params, z, key=key)[1])

        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))(params, z)

    ours, exact = value_and_grad(series, jax.random.key(0)), value_and_grad(bijector, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, exact)


def test_memory_does_not_grow_with_the_terms():
    """Temporary memory of value and gradient as compiled; through the terms it would be one
    activation a term."""
    _, params, z = setup(d=8, b=64, width=64)

    def memory(terms):
        series = bj.residual(
            nets.LipschitzMLP((64,), coeff=0.6, activation=nn.tanh),
            log_det=bj.log_dets.neumann(terms),
        )

        def objective(params, z, key):
            x, log_det = series.forward(params, z, key=key)
            return jnp.sum(jnp.square(x)) - jnp.sum(log_det)

        compiled = (
            jax.jit(jax.value_and_grad(objective)).lower(params, z, jax.random.key(0)).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = memory(3), memory(300)
    assert many <= few + 1024 and few > 0


def test_bounds_are_computed_once_a_pass():
    """The Gram iterations stand outside the loops: as many scans in the whole pass as there are
    kernels."""
    bijector, params, z = setup()

    def scans(jaxpr, inside):
        count = 0
        for equation in jaxpr.eqns:
            loop = equation.primitive.name in ("while", "scan")
            count += equation.primitive.name == "scan" and not inside
            assert not (inside and equation.primitive.name == "scan")
            for sub in jaxprs_in_params(equation.params):
                count += scans(sub, inside or loop)
        return count

    jaxpr = jax.make_jaxpr(lambda p, z, key: bijector.inverse(p, z, key=key))(
        params, z, jax.random.key(0)
    )
    assert scans(jaxpr.jaxpr, False) == 2


def test_the_inverse_is_the_fixed_point_and_says_when_it_was_not_reached():
    bijector, params, z = setup(coeff=0.95, b=4)
    x, log_det = bijector.forward(params, z)
    again, inverse_log_det = jax.jit(bijector.inverse)(params, x)
    np.testing.assert_allclose(again, z, atol=1e-4)
    np.testing.assert_allclose(log_det, -inverse_log_det, atol=1e-4)
    hasty = bj.residual(nets.LipschitzMLP((6,), coeff=0.95, activation=nn.tanh), max_evaluations=2)
    z_hasty, log_det_hasty = hasty.inverse(params, x)
    assert np.all(np.isnan(z_hasty)) and np.all(np.isnan(log_det_hasty))
    one_bad = x.at[1].set(jnp.nan)
    found, _ = bijector.inverse(params, one_bad)
    np.testing.assert_array_equal(np.isnan(found).any(1), [False, True, False, False])
    np.testing.assert_allclose(found[0], again[0], atol=1e-5)


def test_estimates_of_the_inverse_are_minus_those_of_the_map():
    bijector, params, z = setup()
    key = jax.random.key(3)
    x, log_det = bijector.forward(params, z, key=key)
    np.testing.assert_allclose(bijector.inverse(params, x, key=key)[1], -log_det, atol=1e-5)


def test_bad_options_are_errors():
    for coeff in (1.0, 1.5, 0.0, -0.5):
        with pytest.raises(
            ValueError, match=rf"coeff in \(0, 1\) for an invertible map, got {coeff}"
        ):
            nets.LipschitzMLP((6,), coeff=coeff)
        with pytest.raises(ValueError, match=r"coeff in \(0, 1\)"):
            nets.LipschitzConv((6,), (3, 3), coeff=coeff)

    class Unbound(nn.Module):
        coeff: float = 1.0

        def weights(self, x, cond=None):
            return {}

        def run(self, weights, x):
            return x

    with pytest.raises(ValueError, match=r"net.coeff in \(0, 1\), got 1.0"):
        bj.residual(Unbound())
    with pytest.raises(TypeError, match="coeff, weights and run .* got MLP"):
        bj.residual(nets.MLP((6,)))
    for make, message in (
        (lambda: bj.log_dets.neumann(0), "terms to be a whole number of at least 1, got 0"),
        (lambda: bj.log_dets.russian_roulette(-1), "exact_terms >= 0, got -1"),
        (lambda: bj.log_dets.russian_roulette(2, 1.0), r"p in \(0, 1\), got 1.0"),
        (lambda: bj.log_dets.russian_roulette(2, 0.0), r"p in \(0, 1\), got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="roulette is stochastic: it needs a key"):
        bj.log_dets.russian_roulette()(lambda args, x: x, {}, jnp.ones((2, 2)), None)
