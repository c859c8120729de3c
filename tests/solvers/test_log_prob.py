import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jflow import solvers, types
from jflow.solvers import hutchinson

MATRIX = np.asarray([[0.3, -0.8, 0.1], [0.5, -0.4, 0.2], [-0.3, 0.6, 0.5]])
TIGHT = {"method": solvers.adaptive(diffrax.Dopri5(), rtol=1e-9, atol=1e-9)}


def as_velocity(field):
    return types.Velocity(
        lambda *args: {}, lambda params, x, t, cond=None, *, key=None: field(params, x, t, cond)
    )


def linear(matrix, x, t, cond):
    return x @ matrix.T.astype(x.dtype)


def standard_normal(x):
    return -0.5 * jnp.sum(x**2 + jnp.log(2 * jnp.pi), axis=1)


def eight_gaussians(n_dtype=jnp.float64):
    """Means on a circle of radius 5, variance 0.1, equal weights."""
    angles = np.arange(8) * np.pi / 4
    return jnp.asarray(5 * np.stack([np.cos(angles), np.sin(angles)], axis=1), n_dtype), 0.1


def mixture_velocity(params, x, t, cond):
    """Exact velocity of the linear path from N(0, I) to the eight Gaussians."""
    means, s2 = eight_gaussians(x.dtype)
    t, variance = t[:, None], (1 - t[:, None]) ** 2 + s2 * t[:, None] ** 2
    centered = x[None] - t[None] * means[:, None]
    weights = jax.nn.softmax(
        -0.5 * jnp.sum(centered**2, axis=2, keepdims=True) / variance[None], axis=0
    )
    return jnp.sum(
        weights * (means[:, None] + ((s2 * t - (1 - t)) / variance)[None] * centered), axis=0
    )


def mixture_log_prob(x):
    means, s2 = eight_gaussians(x.dtype)
    squares = jnp.sum((x[None] - means[:, None]) ** 2, axis=2)
    return jax.nn.logsumexp(-0.5 * squares / s2, axis=0) - jnp.log(8 * 2 * jnp.pi * s2)


def test_linear_field_is_exact(x64):
    x1 = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    log_prob, info = solvers.log_prob(
        as_velocity(linear), jnp.asarray(MATRIX), x1, standard_normal, **TIGHT
    )
    x0 = x1 @ scipy.linalg.expm(-MATRIX).T
    np.testing.assert_allclose(
        log_prob, standard_normal(x0) - np.trace(MATRIX), atol=1e-7
    )  # a hundred tolerances
    assert info.status.tolist() == [0] * 5
    # the map itself, and its log-det, there and back
    x, up, _ = solvers.sample_with_log_det(as_velocity(linear), jnp.asarray(MATRIX), x0, **TIGHT)
    np.testing.assert_allclose(x, x1, atol=1e-7)
    np.testing.assert_allclose(up, np.trace(MATRIX), atol=1e-7)
    _, down, _ = solvers.sample_with_log_det(
        as_velocity(linear), jnp.asarray(MATRIX), x, t0=1.0, t1=0.0, **TIGHT
    )
    np.testing.assert_allclose(up + down, 0, atol=1e-7)


def test_eight_gaussians(x64):
    means, s2 = eight_gaussians()
    rng = np.random.default_rng(0)
    label = rng.integers(0, 8, 4000)
    x = means[label] + np.sqrt(s2) * rng.normal(size=(4000, 2))
    exact = mixture_log_prob(x)
    # the entropy is 2.6147 nats; -log p has a standard deviation of 1 (that of a chi-square of two,
    # halved)
    np.testing.assert_allclose(-exact.mean(), 2.6147, atol=4 / np.sqrt(4000))
    how = {"method": solvers.adaptive(diffrax.Dopri5(), rtol=1e-6, atol=1e-6)}
    log_prob, _ = solvers.log_prob(
        as_velocity(mixture_velocity), {}, x[:16], standard_normal, **how
    )
    np.testing.assert_allclose(log_prob, exact[:16], atol=1e-3)
    # float32 and the default tolerances of 1e-5 cost a digit
    single, _ = solvers.log_prob(
        as_velocity(mixture_velocity), {}, x[:16].astype(jnp.float32), standard_normal
    )
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact[:16], atol=1e-2)


def test_hutchinson_is_unbiased(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2))) * 3
    field = as_velocity(
        lambda params, x, t, cond: jnp.sin(x @ jnp.asarray([[0.3, 1.1], [-0.7, 0.4]]))
    )
    grid = np.linspace(0, 1, 9)
    exact, _ = solvers.log_prob(field, {}, x, standard_normal, method=solvers.on_grid(grid))
    many = jnp.repeat(x, 4000, axis=0)  # every row has probes of its own
    for noise in (jax.random.rademacher, jax.random.normal):
        estimate, _ = solvers.log_prob(
            field,
            {},
            many,
            standard_normal,
            key=jax.random.key(0),
            divergence=hutchinson(1, noise=noise),
            method=solvers.on_grid(grid),
        )
        estimate = estimate.reshape(2, 4000)
        error = estimate.std(axis=1) / np.sqrt(4000)
        assert np.all(error > 1e-4)  # it is an estimate, not the exact value
        assert np.all(np.abs(estimate.mean(axis=1) - exact) < 3 * error)


def test_probes_are_drawn_once_and_averaged(x64):
    """On a linear field the estimate is known: the mean of e.Ae over the probes of this key."""
    x, key = jnp.ones((4, 3)), jax.random.key(3)
    for how in (TIGHT, {"method": 8}):
        _, log_det, info = solvers.sample_with_log_det(
            as_velocity(linear),
            jnp.asarray(MATRIX),
            x,
            key=key,
            divergence=hutchinson(5, noise=jax.random.normal),
            **how,
        )
        e = jax.random.normal(key, (4, 5, 3), jnp.float64)
        np.testing.assert_allclose(
            log_det, np.mean(np.sum(e * (e @ MATRIX.T), axis=2), axis=1), rtol=1e-7
        )
        assert np.all(
            info.evaluations < 500
        )  # fresh noise at every step would have no smooth solution


def test_rademacher_is_exact_for_diagonal_jacobians():
    field = as_velocity(lambda params, x, t, cond: jnp.sin(3 * x) * t[:, None])
    x = jax.random.normal(jax.random.key(0), (6, 4))
    exact, _ = solvers.log_prob(field, {}, x, standard_normal, method=8)
    one, _ = solvers.log_prob(
        field, {}, x, standard_normal, key=jax.random.key(1), divergence=hutchinson(1), method=8
    )
    np.testing.assert_allclose(one, exact, rtol=1e-5)


def test_images_and_conditions():
    """The divergence sums over the whole event; v = cond x has log_det = D cond."""
    x, rate = jnp.ones((3, 2, 2, 1)), jnp.asarray([-0.5, 0.0, 1.0])
    field = as_velocity(lambda params, x, t, cond: x * cond[:, None, None, None])
    for key, divergence in (
        (None, solvers.exact_divergence()),
        (jax.random.key(0), hutchinson(2)),
        (jax.random.key(0), solvers.hutch_plus_plus(4)),  # a sketch of the whole event: exact
    ):
        y, log_det, _ = solvers.sample_with_log_det(
            field, {}, x, rate, key=key, divergence=divergence, method=8
        )
        np.testing.assert_allclose(log_det, 4 * rate, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(y[:, 0, 0, 0], np.exp(rate), rtol=1e-4)


def test_a_grid_serves_sampling_and_likelihood():
    x, grid = jnp.ones((2, 3)), np.asarray([0.0, 0.1, 0.4, 1.0])
    for times in (grid, jnp.asarray(grid)):
        log_prob, info = solvers.log_prob(
            as_velocity(linear),
            jnp.asarray(MATRIX),
            x,
            standard_normal,
            method=solvers.on_grid(times),
        )
        x0, log_det, _ = solvers.sample_with_log_det(
            as_velocity(linear), jnp.asarray(MATRIX), x, method=solvers.on_grid(grid[::-1])
        )
        np.testing.assert_allclose(log_prob, standard_normal(x0) + log_det, rtol=1e-6)
        assert info.evaluations.tolist() == [7 + 6 + 6] * 2


def test_log_dets_are_float32_at_least():
    x = jnp.ones((2, 3), jnp.bfloat16)
    y, log_det, _ = solvers.sample_with_log_det(
        as_velocity(linear), jnp.asarray(MATRIX), x, method=4
    )
    assert y.dtype == jnp.bfloat16 and log_det.dtype == jnp.float32
    np.testing.assert_allclose(log_det, np.trace(MATRIX), rtol=1e-4)


def test_failed_rows_are_nan():
    """x' = x^2 walked back from beyond: -1 blows up on its way to t=0, 1 arrives at 1/2."""
    field = as_velocity(lambda params, x, t, cond: x**2)
    log_prob, info = solvers.log_prob(field, {}, jnp.asarray([[1.0], [-2.0]]), standard_normal)
    expected = standard_normal(jnp.asarray([[0.5]]))[0] - 2 * np.log(
        2
    )  # dx1/dx0 = 1 / (1 - x0)^2 = 4
    np.testing.assert_allclose(log_prob[0], expected, rtol=1e-4)
    assert np.isnan(log_prob[1]) and info.status.tolist() == [0, solvers.Status.STEP_TOO_SMALL]


def test_errors():
    x, v = jnp.ones((2, 3)), as_velocity(linear)
    for how, message in [
        ({"divergence": hutchinson(2)}, "needs a key"),
        ({"method": solvers.on_grid([0.0, 0.9]), "t1": 0.9}, "own ends"),
        ({"method": solvers.on_grid([1.0, 0.0])}, "rises strictly"),
    ]:
        with pytest.raises(ValueError, match=message):
            solvers.log_prob(v, jnp.asarray(MATRIX), x, standard_normal, **how)
    with pytest.raises(ValueError, match="own ends"):
        solvers.sample_with_log_det(
            v, jnp.asarray(MATRIX), x, method=solvers.on_grid([0.0, 1.0]), t0=1.0, t1=0.0
        )
    with pytest.raises(ValueError, match="lead with 2 rows"):
        solvers.log_prob(v, jnp.asarray(MATRIX), x, standard_normal, jnp.ones((3,)))
