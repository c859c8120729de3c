import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import oracles, solvers
from jflow.distributions import mixtures
from jflow.distributions.mixtures import GaussianMixture
from jflow.solvers._mixture import gm_ode, gm_sde
from jflow.types import Field

WEIGHTS, MEANS, VARIANCE = (
    np.array([0.5, 0.2, 0.3]),
    np.array([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]]),
    0.3,
)
EXACT = mixtures.exact(WEIGHTS, MEANS, VARIANCE)
ORACLE = oracles.mixture(WEIGHTS, MEANS, VARIANCE)


def matched(params, x, t, cond=None, *, key=None):
    """One Gaussian with the exact mean and variance: a network with too few components."""
    m = EXACT.apply({}, x, t)
    return GaussianMixture(
        jnp.zeros((x.shape[0], 1)), mixtures.mean(m)[:, None], 0.5 * jnp.log(mixtures.variance(m))
    )


def solve(field, x0, **options):
    return jax.jit(lambda x0: gm_ode(field, {}, x0, **options))(x0)


MATCHED = Field(lambda *args: {}, matched)


def test_one_evaluation_of_the_exact_mixture_solves_the_ode(x64):
    # 64 steps of a method of order five leave less than 1e-6
    x0 = jax.random.normal(jax.random.key(0), (16, 2), jnp.float64)
    found, info = solve(EXACT, x0, steps=1, substeps=64, solver=diffrax.Dopri5())
    expected = oracles.mixture_flow_map(ORACLE, x0, 0.0, 1.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(info.evaluations, np.ones(16))
    np.testing.assert_array_equal(info.status, np.zeros(16))


@pytest.mark.parametrize("order", [1, 2])
def test_orders_with_too_few_components(order, x64):
    # global error of a field that is right at the start of each step: first order, or second with
    # the correction
    x0 = jax.random.normal(jax.random.key(1), (32, 2), jnp.float64)
    expected = oracles.mixture_flow_map(ORACLE, x0, 0.0, 0.9)
    errors, steps = [], (16, 32, 64)
    for n in steps:
        grid = np.linspace(0, 0.9, n + 1)
        found, info = solve(
            MATCHED, x0, grid=grid, substeps=2, order=order, floor=0.0, solver=diffrax.Heun()
        )
        assert np.all(info.evaluations == n)
        errors.append(np.median(np.abs(found - expected)))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.3 < slope < order + 0.6, (slope, errors)


def test_the_correction_is_nothing_for_the_exact_mixture(x64):
    x0 = jax.random.normal(jax.random.key(2), (8, 2), jnp.float64)
    first, second = (
        solve(EXACT, x0, steps=4, substeps=4, order=order, floor=0.0)[0] for order in (1, 2)
    )
    np.testing.assert_allclose(first, second, atol=1e-9)


def test_a_large_floor_switches_the_correction_off():
    x0 = jax.random.normal(jax.random.key(2), (8, 2))
    first = solve(MATCHED, x0, steps=4, order=1)[0]
    off = solve(MATCHED, x0, steps=4, order=2, floor=1e9)[0]
    on = solve(MATCHED, x0, steps=4, order=2, floor=0.0)[0]
    np.testing.assert_allclose(first, off, atol=1e-5)
    assert np.max(np.abs(first - on)) > 1e-3


def test_counted_evaluations_are_calls_of_the_field():
    calls = []

    def counting(params, x, t, cond=None, *, key=None):
        jax.debug.callback(lambda t: calls.append(float(t)), t[0])
        return EXACT.apply({}, x, t)

    x0 = jax.random.normal(jax.random.key(0), (4, 2))
    _, info = solve(
        Field(lambda *args: {}, counting), x0, grid=[0.0, 0.2, 0.7, 1.0], substeps=5, order=2
    )
    jax.effects_barrier()
    assert len(calls) == info.evaluations[0] == 3
    np.testing.assert_allclose(sorted(calls), [0.0, 0.2, 0.7], atol=1e-6)


@pytest.mark.parametrize("grid", [(0.0, 1.0), (0.0, 0.3, 0.8, 1.0)])
def test_gm_sde_draws_the_data_at_any_number_of_steps(grid):
    # 1e5 rows: shares of the components have standard error 0.0016, their variances 0.6%
    n = 100_000
    step = gm_sde(EXACT)
    start = jax.random.normal(jax.random.key(1), (n, 2))
    x, path = jax.jit(
        lambda x, key: solvers.sample_sde(step, {}, x, key, grid, return_trajectory=True)
    )(start, jax.random.key(0))
    mean, std = path.mean[-1], path.std[-1]
    nearest = np.argmin(((np.asarray(x)[:, None] - MEANS[None]) ** 2).sum(-1), axis=1)
    truth = np.argmin(
        ((np.asarray(ORACLE.sample(jax.random.key(9), n))[:, None] - MEANS[None]) ** 2).sum(-1),
        axis=1,
    )
    shares, expected = (np.bincount(k, minlength=3) / n for k in (nearest, truth))
    np.testing.assert_allclose(shares, expected, atol=0.008)
    np.testing.assert_allclose(x.mean(0), WEIGHTS @ MEANS, atol=0.03)
    second = np.einsum("k,ki,kj->ij", WEIGHTS, MEANS, MEANS) + VARIANCE * np.eye(2)
    np.testing.assert_allclose(x.T @ x / n, second, atol=0.05)
    np.testing.assert_allclose(jnp.std((x - mean) / std[:, None]), 1, rtol=0.01)


def test_jit_and_types():
    x0 = jax.random.normal(jax.random.key(0), (4, 2), jnp.bfloat16)
    traces = []

    @jax.jit
    def twice(x0):
        traces.append(1)
        return gm_ode(EXACT, {}, x0, steps=2)

    found, _ = twice(x0)
    twice(x0 + 1)
    assert found.dtype == jnp.bfloat16 and len(traces) == 1


def test_a_row_that_is_not_finite_is_nan_alone():
    x0 = jnp.array([[0.1, 0.2], [jnp.inf, 0.0], [0.3, -0.2]])
    found, info = solve(EXACT, x0, steps=3)
    np.testing.assert_array_equal(np.isnan(found).all(1), [False, True, False])
    assert list(info.status > 0) == [False, True, False]


def test_bad_input_says_so():
    x0 = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="one of steps, grid, got both"):
        gm_ode(EXACT, {}, x0, steps=2, grid=[0.0, 1.0])
    with pytest.raises(ValueError, match="order 1 or 2, got 3"):
        gm_ode(EXACT, {}, x0, order=3)
    with pytest.raises(ValueError, match="rises strictly"):
        gm_ode(EXACT, {}, x0, grid=[1.0, 0.0])
    with pytest.raises(ValueError, match="at least 1, or times, got 0"):
        gm_ode(EXACT, {}, x0, steps=0)
    with pytest.raises(ValueError, match="substeps to be a whole number of at least 1, got 0"):
        gm_ode(EXACT, {}, x0, substeps=0)
    with pytest.raises(ValueError, match="floor >= 0"):
        gm_ode(EXACT, {}, x0, floor=-1.0)
