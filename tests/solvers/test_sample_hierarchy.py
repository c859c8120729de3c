import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import oracles, solvers
from jflow.distributions import mixtures
from jflow.solvers._hierarchical import sample_hierarchy
from jflow.types import Velocity

WEIGHTS, MEANS, VARIANCE = (
    np.array([0.5, 0.2, 0.3]),
    np.array([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]]),
    0.3,
)
EXACT = mixtures.exact(WEIGHTS, MEANS, VARIANCE)


def inner(params, y, r, cond, *, key=None):
    """The exact velocity of velocities: the law of v at x_1, t_1 is a mixture, and the flow to a
    mixture is known."""
    return mixtures.flow_velocity(EXACT.apply({}, cond.states[0], cond.times[0]), y, r)


TWO = Velocity(lambda *args: {}, inner)


def run(net, x0, grids, cond=None, solver=None):
    options = {} if solver is None else {"solver": solver}
    return jax.jit(
        lambda x0, key: sample_hierarchy(net, {}, x0, key, cond, grids=grids, **options)
    )(x0, jax.random.key(7))


@pytest.mark.parametrize("outer", [1, 3])
def test_the_exact_hierarchy_draws_the_data(outer):
    # 2e4 rows: mean 0.01, shares 0.0035, second moments 0.02 of standard error. More than one step
    # of location ends in the data as well: (x_t, v) is distributed as in the pairs, so that x_t + h
    # v is too
    n = 20_000
    x, info = run(
        TWO, jax.random.normal(jax.random.key(0), (n, 2)), (outer, 40), solver=diffrax.Heun()
    )
    truth = np.asarray(oracles.mixture(WEIGHTS, MEANS, VARIANCE).sample(jax.random.key(5), n))
    near = lambda x: np.argmin(((np.asarray(x)[:, None] - MEANS[None]) ** 2).sum(-1), axis=1)  # noqa: E731
    shares, expected = (np.bincount(near(v), minlength=3) / n for v in (x, truth))
    np.testing.assert_allclose(shares, expected, atol=0.015)
    second = np.einsum("k,ki,kj->ij", WEIGHTS, MEANS, MEANS) + VARIANCE * np.eye(2)
    np.testing.assert_allclose(x.T @ x / n, second, atol=0.08)
    np.testing.assert_allclose(x.mean(0), WEIGHTS @ MEANS, atol=0.05)
    np.testing.assert_array_equal(info.evaluations, np.full(n, outer * 40 * 2))
    np.testing.assert_array_equal(info.status, np.zeros(n))


def test_depth_one_is_plain_sampling():
    oracle = oracles.as_velocity(oracles.mixture(WEIGHTS, MEANS, VARIANCE))
    x0 = jax.random.normal(jax.random.key(0), (8, 2))
    found, info = run(oracle, x0, (5,))
    expected, plain = solvers.sample(oracle, {}, x0, method=solvers.fixed(5, diffrax.Euler()))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(info.evaluations, plain.evaluations)


def test_evaluations_are_the_product_and_are_counted_calls():
    calls = []

    def net(params, y, r, cond, *, key=None):
        jax.debug.callback(
            lambda r, t: calls.append((float(t[0][0]), float(t[1][0]), float(r))), r[0], cond.times
        )
        assert len(cond.states) == 2 and cond.cond.shape == (4,)
        return -y

    x0 = jnp.ones((4, 2))
    _, info = run(Velocity(lambda *a: {}, net), x0, (2, 3, [0.0, 0.1, 1.0]), jnp.arange(4.0))
    jax.effects_barrier()
    assert len(calls) == 12 and np.all(info.evaluations == 12)
    outer = (
        sorted({c[0] for c in calls}),
        sorted({round(c[1], 4) for c in calls}),
        sorted({round(c[2], 4) for c in calls}),
    )
    assert outer == ([0.0, 0.5], [0.0, 0.3333, 0.6667], [0.0, 0.1])


def test_noise_is_fresh_at_every_step_and_row():
    # a field that stays where it starts: the velocity is the noise itself, so that one step adds it
    # to x0
    still = Velocity(lambda *a: {}, lambda params, y, r, cond, *, key=None: 0 * y)
    x, _ = run(still, jnp.zeros((20_000, 1)), (4, 1))
    np.testing.assert_allclose(
        x.var(), 4 / 4**2, rtol=0.04
    )  # four independent draws of a quarter; standard error 1%


def test_a_failed_row_is_nan_alone():
    def net(params, y, r, cond, *, key=None):
        return jnp.where(cond.cond[:, None] > 0, jnp.inf, y)

    x, info = run(
        Velocity(lambda *a: {}, net), jnp.ones((3, 2)), (2, 2), jnp.array([0.0, 1.0, 0.0])
    )
    np.testing.assert_array_equal(np.isnan(x).all(1), [False, True, False])
    assert list(info.status > 0) == [False, True, False]


def test_bad_input_says_so():
    x0, key = jnp.zeros((3, 2)), jax.random.key(0)
    with pytest.raises(ValueError, match="a grid for each level, got 4"):
        sample_hierarchy(TWO, {}, x0, key, grids=4)
    with pytest.raises(ValueError, match="at least 1, or times, got 0"):
        sample_hierarchy(TWO, {}, x0, key, grids=(1, 0))
    with pytest.raises(ValueError, match="rises strictly"):
        sample_hierarchy(TWO, {}, x0, key, grids=([1.0, 0.0], 2))
