"""The diffusion's bound and its second order at exact velocities, where their values and gradients
are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from jflow import losses, oracles, solvers, times, types
from jflow.paths._affine import LINEAR, Schedule

TRIG = Schedule(alpha=lambda t: jnp.sin(jnp.pi / 2 * t), sigma=lambda t: jnp.cos(jnp.pi / 2 * t))
MEAN, COV = np.asarray([1.0, -2.0]), np.asarray([[1.5, 0.6], [0.6, 0.5]])
T1 = 0.95
STRATIFIED = times.low_discrepancy()


def perturbed(oracle, change):
    """The exact velocity plus change(params, x, t)."""
    exact = oracles.as_velocity(oracle)
    return types.Velocity(
        exact.init,
        lambda params, x, t, cond=None, *, key=None: exact.apply({}, x, t) + change(params, x, t),
    )


def bounds(loss, params, sample, batches=40, n=1000, metric="bound"):
    """The metric over batches of fresh data: [batches]."""

    def one(key):
        data_key, loss_key = jax.random.split(key)
        return loss(params, loss_key, {"x": sample(data_key, n)})[1][metric]

    return np.asarray(
        jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), batches))
    )


def within(values, expected, errors=4):
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean() - expected) < errors * error, (values.mean(), expected, error)
    return error


@pytest.mark.parametrize("schedule", [LINEAR, TRIG], ids=["linear", "trigonometric"])
def test_at_the_exact_velocity_of_a_gaussian_it_is_the_entropy(schedule, x64):
    """Of x_t1 ~ N(., alpha^2 cov + sigma^2), under the designed times and under uniform ones, which
    vary more."""
    oracle = oracles.gaussian(MEAN, COV, schedule)
    a, s = float(schedule.alpha(jnp.asarray(T1))), float(schedule.sigma(jnp.asarray(T1)))
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * (a**2 * COV + s**2 * np.eye(2)))[1]
    spread = []
    for importance in (
        losses.likelihood_importance(schedule, t1=T1),
        losses.Importance(jnp.asarray([0.0, T1]), jnp.ones(1)),
    ):
        loss = losses.diffusion_likelihood(
            oracles.as_velocity(oracle), schedule=schedule, importance=importance
        )
        spread.append(within(bounds(loss, {}, oracle.sample), entropy))
    assert spread[0] < 0.04 and spread[0] < 0.7 * spread[1]


def test_at_the_exact_velocity_of_a_mixture_it_is_both_likelihoods(x64):
    """The eight Gaussians with the noise of t1: bound, mean of -log p_t1 and of the ODE's -log
    p_t1; stratified times vary less than independent ones."""
    oracle = oracles.eight_gaussians()
    velocity, importance = oracles.as_velocity(oracle), losses.likelihood_importance(t1=T1)
    loss = losses.diffusion_likelihood(velocity, importance=importance, time=STRATIFIED)
    x1, x0 = (
        oracle.sample(jax.random.key(1), 100_000),
        jax.random.normal(jax.random.key(2), (100_000, 2)),
    )
    x = T1 * x1 + (1 - T1) * x0
    exact = -np.asarray(oracle.log_density(x, T1))
    values = bounds(loss, {}, oracle.sample, n=6000)
    # beside it, the standard error of the mean of `exact`, 1 / sqrt(100,000), is small
    assert within(values, exact.mean()) < 0.03
    ode, _ = solvers.log_prob(velocity, {}, x[:32], standard_normal, t1=T1, method=64)
    np.testing.assert_allclose(-ode, exact[:32], atol=1e-3)
    free = losses.diffusion_likelihood(velocity, importance=importance)
    assert values.std() < 0.9 * bounds(free, {}, oracle.sample, n=6000).std()


def standard_normal(x):
    return -0.5 * jnp.sum(x**2 + jnp.log(2 * jnp.pi), axis=1)


def test_the_excess_of_another_velocity_is_the_weighted_square(x64):
    """v off by a constant c: int t / (1 - t) |c|^2 dt = |c|^2 (-log(1 - t1) - t1)."""
    oracle = oracles.gaussian(MEAN, COV)
    velocity = perturbed(oracle, lambda c, x, t: jnp.broadcast_to(c[None], x.shape))
    loss = losses.diffusion_likelihood(
        velocity, importance=losses.likelihood_importance(t1=T1), time=STRATIFIED
    )
    c = jnp.asarray([0.8, -0.6])
    difference = bounds(loss, c, oracle.sample) - bounds(
        loss, 0 * c, oracle.sample
    )  # under the same keys
    error = within(difference, -np.log(1 - T1) - T1)
    assert error < 0.05


@pytest.mark.parametrize("probes", [None, 2])
@pytest.mark.parametrize("schedule", [LINEAR, TRIG], ids=["linear", "trigonometric"])
def test_second_order_has_no_gradient_at_the_exact_velocity(schedule, probes, x64):
    """Of a mixture: the mean gradient along directions that change trace and Jacobian is 0, within
    4 standard errors, from the Jacobian's squares, and, with an exact trace, from the trace's; off
    the exact velocity it is not."""
    oracle = oracles.mixture([0.4, 0.6], [[1.0, 0.5], [-1.0, 0.0]], [0.3, 0.5], schedule)

    def change(p, x, t):
        return (
            p[0] * x + p[1] * jnp.stack([jnp.sin(x[:, 0] + x[:, 1]), x[:, 0]], axis=1) + p[2] * x**2
        )

    importance = losses.likelihood_importance(schedule, t1=T1)
    for what in ("trace", "jacobian") if probes is None else ("jacobian",):
        how = {"importance": importance, "probes": probes, "time": STRATIFIED, what: 1.0}
        loss = losses.diffusion_likelihood(perturbed(oracle, change), schedule=schedule, **how)

        def second(p, key):
            data_key, loss_key = jax.random.split(key)
            return loss(p, loss_key, {"x": oracle.sample(data_key, 200)})[1][what]  # noqa: B023

        run = jax.jit(lambda p, keys: jax.lax.map(lambda key: jax.grad(second)(p, key), keys))
        keys = jax.random.split(jax.random.key(0), 200)
        exact, off = (np.asarray(run(jnp.full(3, p), keys)) for p in (0.0, 0.3))
        errors = [g.std(axis=0) / np.sqrt(len(keys)) for g in (exact, off)]
        assert np.all(np.abs(exact.mean(axis=0)) < 4 * errors[0]), (exact.mean(axis=0), errors[0])
        assert np.any(np.abs(off.mean(axis=0)) > 8 * errors[1])


def test_second_order_is_bounded_by_the_first_order_error(x64):
    """v off by c, of no divergence: the trace's target is off by w |c|^2, so the gradient along p x
    is -2 int w s^2 w |c|^2 dt, D / D of them. Linear: s^2 w^2 = t^2."""
    oracle = oracles.gaussian(MEAN, COV)
    velocity = perturbed(oracle, lambda p, x, t: p["c"][None] + p["rate"] * x)
    importance = losses.likelihood_importance(t1=T1)
    loss = losses.diffusion_likelihood(
        velocity, importance=importance, trace=1.0, probes=None, time=STRATIFIED
    )
    c = jnp.asarray([0.8, -0.6])

    def second(rate, key):
        data_key, loss_key = jax.random.split(key)
        return loss({"c": c, "rate": rate}, loss_key, {"x": oracle.sample(data_key, 500)})[1][
            "trace"
        ]

    run = jax.jit(
        lambda keys: jax.lax.map(lambda key: jax.grad(second)(jnp.asarray(0.0), key), keys)
    )
    # the trace's derivative along rate is D: 2 w s (target off by -s w |c|^2) D / D
    expected = -2 * scipy.integrate.quad(lambda t: t / (1 - t) * (1 - t) * t, 0, T1)[0]
    error = within(np.asarray(run(jax.random.split(jax.random.key(0), 200))), expected)
    assert error < 0.2 * abs(expected)


def test_weights_conditions_and_totals():
    """The loss is bound plus factors times the second order; rows of weight 0 don't count; keys
    reach cond."""
    velocity = types.Velocity(
        None, lambda p, x, t, cond=None, *, key=None: p * x * t[:, None] + cond[:, None]
    )
    loss = losses.diffusion_likelihood(velocity, trace=0.1, jacobian=0.2)
    x, cond = jax.random.normal(jax.random.key(0), (8, 3)), jnp.arange(8.0)
    weight = (jnp.arange(8) < 4).astype(jnp.float32)
    key, p = jax.random.key(1), jnp.asarray(0.5)
    value, metrics = loss(p, key, {"x": x, "cond": cond, "weight": weight})
    np.testing.assert_allclose(
        value, metrics["bound"] + 0.1 * metrics["trace"] + 0.2 * metrics["jacobian"], rtol=1e-6
    )
    other, _ = loss(p, key, {"x": x, "cond": cond.at[5].set(100.0), "weight": weight})
    np.testing.assert_allclose(other, value, rtol=1e-6)
    first, only = losses.diffusion_likelihood(velocity)(
        p, key, {"x": x, "cond": cond, "weight": weight}
    )
    assert set(only) == {"bound"} and first == only["bound"]


def test_learned_times():
    """Noise in the data of every time alike but for a velocity that errs late: the learned density
    goes there, and the loss reads it from frozen, without bias."""
    oracle = oracles.gaussian(MEAN, COV)
    velocity = perturbed(
        oracle, lambda p, x, t: 30 * p * jnp.where(t > 0.8, 0.0, 1.0)[:, None] * jnp.ones_like(x)
    )
    loss = losses.diffusion_likelihood(
        velocity, importance=losses.likelihood_importance(t1=T1, cells=16)
    )
    refresh = losses.learned_times(velocity, decay=0.9)
    frozen, p = (
        {"importance": losses.likelihood_importance(t1=T1, cells=16), "other": jnp.ones(2)},
        jnp.asarray(1.0),
    )

    @jax.jit
    def run(frozen, key):
        drawn, key = jax.random.split(key)
        return refresh(p, frozen, key, {"x": oracle.sample(drawn, 256)})

    learned = frozen
    for key in jax.random.split(jax.random.key(0), 40):
        learned = run(learned, key)
    assert jax.tree.structure(learned) == jax.tree.structure(frozen)
    np.testing.assert_array_equal(learned["other"], 1)

    @jax.jit
    def values(frozen):
        keys = jax.random.split(jax.random.key(1), (200, 2))
        return jax.lax.map(
            lambda keys: loss(p, keys[0], {"x": oracle.sample(keys[1], 100)}, frozen)[0], keys
        )

    before, after = np.asarray(values(frozen)), np.asarray(values(learned))
    error = np.hypot(before.std(), after.std()) / np.sqrt(200)
    assert abs(before.mean() - after.mean()) < 4 * error
    assert after.std() < 0.8 * before.std()


def test_errors():
    velocity = types.Velocity(None, lambda p, x, t, cond=None, *, key=None: x)
    for how, message in [
        ({"trace": -1}, "trace, jacobian >= 0, got -1"),
        ({"probes": 0}, "at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            losses.diffusion_likelihood(velocity, **how)
