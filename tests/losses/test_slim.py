"""SlimFlow: noise annealed from random pairs to a teacher's, and distillation guided by two of its
steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_maps import silent_leaves

import jflow
from jflow import losses, nets, oracles, train
from jflow.losses import annealed_source, chain, flow_guided_distillation
from jflow.types import Velocity

KEY = jax.random.key(0)
GAUSSIAN = oracles.gaussian([1.0, -2.0], [0.25, 4.0])
MEAN, STD = np.asarray([1.0, -2.0]), np.asarray([0.5, 2.0])


def to_data(x):
    return GAUSSIAN.flow_map(x, 0.0, 1.0)


def at_step(step):
    return {"step": jnp.asarray(step, jnp.int32)}


def recorded():
    seen = {}

    def loss(params, key, batch, frozen=None):
        seen.update(batch, frozen=frozen)
        return jnp.sum(batch["x0"]), {"inner": 1.0}

    return loss, seen


def test_the_noise_goes_from_fresh_to_the_pairs_own():
    amount = optax.linear_schedule(1.0, 0.0, 10)
    n = 20_000
    x0 = jax.random.normal(KEY, (n, 1))
    batch = {"x0": x0, "x": x0, "weight": jnp.ones(n)}
    inner, seen = recorded()
    loss = chain(annealed_source(amount), inner)
    for step, c in ((0, 1.0), (4, 0.6), (10, 0.0), (99, 0.0)):
        _, metrics = loss({}, jax.random.key(1), batch, at_step(step))
        assert (
            metrics["inner"] == 1.0
            and seen["frozen"]["step"] == step
            and seen["weight"].shape == (n,)
        )
        together = np.corrcoef(seen["x0"][:, 0], x0[:, 0])[0, 1]
        # a correlation r of n rows has the standard error (1 - r^2) / sqrt(n)
        assert abs(together - np.sqrt(1 - c**2)) < 5 * (c**2 + 1e-4) / np.sqrt(n)
        assert abs(np.var(seen["x0"]) - 1) < 5 * np.sqrt(2 / n)  # the marginal stays
    np.testing.assert_allclose(seen["x0"], x0, atol=1e-6)


@pytest.mark.parametrize("c", [1.0, 0.7, 0.0])
def test_the_exact_velocity_has_zero_mean_gradient_at_every_amount(c):
    """Pairs x1 = m + s x0 of a Gaussian: mixed, noise and data are jointly Gaussian with covariance
    s sqrt(1 - c^2)."""
    shared = STD * np.sqrt(1 - c**2)

    def apply(params, x, t, cond=None, *, key=None):
        t = t[:, None]
        both = jnp.asarray(shared, x.dtype)[None]
        variance = (1 - t) ** 2 + (t * STD[None]) ** 2 + 2 * t * (1 - t) * both
        slope = (t * STD[None] ** 2 - (1 - t) + (1 - 2 * t) * both) / variance
        exact = MEAN[None] + slope * (x - t * MEAN[None])
        return (exact + params["a"] * x + params["b"] * t).astype(x.dtype)

    loss = chain(annealed_source(lambda step: c), losses.flow_matching(Velocity(None, apply)))
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}

    def slope(key):
        noise, run = jax.random.split(key)
        x0 = jax.random.normal(noise, (1000, 2))
        batch = {"x0": x0, "x": to_data(x0)}
        return jax.value_and_grad(lambda p: loss(p, run, batch, at_step(0))[0])(params)

    value, grads = jax.jit(jax.vmap(slope))(jax.random.split(KEY, 100))
    for g in jax.tree.leaves(grads):
        # with the pairs' own noise the target is determined and nothing is left but rounding
        assert abs(float(g.mean())) < 3 * float(g.std()) / 10 if c else np.max(np.abs(g)) < 1e-4
    assert float(value.mean()) < 1e-8 if c == 0 else float(value.mean()) > 0.1


def test_a_training_step_counts():
    velocity = Velocity(None, lambda params, x, t, cond=None, *, key=None: params["a"] * x)
    matching, n = losses.flow_matching(velocity), 10_000

    def spread(params, key, batch, frozen=None):
        return matching(params, key, batch)[0], {
            "amount": jnp.std(batch["x0"])
        }  # c, where x0 is zero

    loss = chain(annealed_source(optax.linear_schedule(1.0, 0.0, 2)), spread)
    step = jax.jit(train.make_step(loss, optax.sgd(0.1), refresh=losses.count_steps))
    state = train.init_state({"a": jnp.zeros(())}, optax.sgd(0.1), KEY, frozen=at_step(0))
    x0 = jnp.zeros((n, 2))
    amounts = []
    for _ in range(4):
        state, metrics = step(state, {"x0": x0, "x": to_data(x0)})
        amounts.append(float(metrics["amount"]))
    np.testing.assert_allclose(
        amounts, [1, 0.5, 0, 0], rtol=5 / np.sqrt(4 * n)
    )  # 5 standard errors
    assert state.frozen["step"] == 4


def straight():
    """The velocity of the lines from x0 to its x1."""

    def apply(params, x, t, cond=None, *, key=None):
        t = t[:, None]
        x0 = (x - t * MEAN[None]) / (1 - t + t * STD[None])
        return (MEAN[None] + (STD[None] - 1) * x0).astype(x.dtype) + params

    return Velocity(None, apply)


def test_both_terms_vanish_at_the_map_of_a_straight_teacher(x64):
    student = Velocity(None, lambda params, x, t, cond=None, *, key=None: to_data(x) - x + params)
    x0 = jax.random.normal(KEY, (32, 2), jnp.float64)
    batch = {"x0": x0, "x": to_data(x0)}
    loss = flow_guided_distillation(student, straight(), weight=3.0)
    value, metrics = loss(0.0, KEY, batch, {"teacher": 0.0})
    assert value < 1e-20 and metrics["residual"] < 1e-20 and metrics["two_step"] < 1e-20
    # a student off by d: d^2 from the pairs, 3 d^2 from the steps, means over an event of two
    # numbers
    value, metrics = loss(0.5, KEY, batch, {"teacher": 0.0})
    np.testing.assert_allclose(
        [value, metrics["residual"], metrics["two_step"]], [1.0, 0.25, 0.25], rtol=1e-9
    )


def test_both_terms_vanish_at_the_map_of_a_straight_mixture(x64):
    """In one dimension the flow from noise is the quantile map: the line through x at t is found by
    bisection."""
    weights, means, std = np.asarray([0.3, 0.7]), np.asarray([-2.0, 1.5]), 0.6
    normal = jax.scipy.stats.norm

    def to_noise(y):
        return normal.ppf(
            jnp.sum(weights[None] * normal.cdf((y - means[None]) / std), axis=1, keepdims=True)
        )

    def line(x, t):
        t = t[:, None]

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            above = (1 - t) * to_noise(middle) + t * middle > x
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        low, _ = jax.lax.fori_loop(0, 60, halve, (jnp.full_like(x, -5.0), jnp.full_like(x, 4.5)))
        return low - to_noise(low)

    teacher = Velocity(None, lambda params, x, t, cond=None, *, key=None: line(x, t))
    oracle = oracles.mixture(weights, means[:, None], std**2)
    x0 = jax.random.normal(KEY, (8, 1), jnp.float64)
    batch = {"x0": x0, "x": oracles.mixture_flow_map(oracle, x0, 0.0, 1.0)}
    value, metrics = jax.jit(flow_guided_distillation(teacher, teacher))(
        {}, KEY, batch, {"teacher": {}}
    )
    assert metrics["residual"] < 1e-6 and metrics["two_step"] < 1e-6 and value < 1e-6


def test_two_steps_of_a_curved_teacher():
    """v = 2 t, whatever x: from 0 a step of s stays, the step from s to 1 moves by 2 s (1 - s)."""
    teacher = Velocity(
        None, lambda params, x, t, cond=None, *, key=None: jnp.zeros_like(x) + 2 * t[:, None] + 1
    )
    student = Velocity(
        None, lambda params, x, t, cond=None, *, key=None: jnp.zeros_like(x) + 100 * t[:, None]
    )
    s = jnp.asarray([0.0, 0.25, 0.5])
    batch = {
        "x0": jnp.zeros((3, 2)),
        "x": jnp.zeros((3, 2)),
        "weight": jnp.asarray([1.0, 1.0, 2.0]),
    }
    loss = flow_guided_distillation(student, teacher, time=lambda key, n: s)
    wanted = (s * 1 + (1 - s) * (1 + 2 * s)) ** 2
    _, metrics = loss({}, KEY, batch, {"teacher": {}})
    np.testing.assert_allclose(
        metrics["two_step"], jnp.sum(wanted * batch["weight"]) / 4, rtol=1e-6
    )
    np.testing.assert_allclose(metrics["residual"], 0)


def test_tiling_leaves_it_unchanged():
    student = Velocity(None, lambda params, x, t, cond=None, *, key=None: jnp.sin(x))
    x0 = jax.random.normal(KEY, (16, 2))
    batch = {"x0": x0, "x": to_data(x0)}
    twice = {name: jnp.concatenate([value, value], axis=1) for name, value in batch.items()}
    teacher = Velocity(None, lambda params, x, t, cond=None, *, key=None: jnp.sin(x) + 0.5)

    def terms(rows):
        metrics = flow_guided_distillation(student, teacher, time=lambda key, n: jnp.zeros(n))(
            {}, KEY, rows, {"teacher": {}}
        )[1]
        return metrics["residual"], metrics["two_step"]

    # at s = 0 the two steps are one, and the student is off by 0.5 everywhere
    np.testing.assert_allclose(terms(batch), [terms(twice)[0], 0.25], rtol=1e-5)
    np.testing.assert_allclose(terms(twice)[1], 0.25, rtol=1e-5)


def networks():
    small, big = (
        jflow.velocity(nets.ResidualMLP(w, d, num_classes=2)) for w, d in ((8, 1), (12, 2))
    )
    x, cond = jax.random.normal(KEY, (16, 2)), jnp.arange(16) % 2
    rng = np.random.default_rng(0)
    params = []
    for net in (small, big):
        shapes = jax.eval_shape(net.init, KEY, x, jnp.zeros(16), cond)
        params.append(
            jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)
        )
    return small, big, *params, {"x0": x, "x": to_data(x), "cond": cond}


def test_a_small_student_learns_from_a_big_teacher():
    small, big, mine, theirs, batch = networks()
    loss = flow_guided_distillation(small, big)

    def both(params, frozen):
        return loss(params, KEY, batch, frozen)[0]

    grads, none = jax.jit(jax.grad(both, argnums=(0, 1)))(mine, {"teacher": theirs})
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in jax.tree.leaves(grads))
    assert all(np.all(g == 0) for g in jax.tree.leaves(none))
    with pytest.raises(ValueError, match="ResidualMLP"):
        loss(mine, KEY, batch, {"teacher": mine})  # the student's params are not the teacher's
    with pytest.raises(ValueError, match="the teacher's"):
        train.warm_start(mine, theirs)
    broken = Velocity(None, lambda params, x, t, cond=None, *, key=None: x[:, :1])
    for student, teacher, name in ((broken, big, "student"), (small, broken, "teacher")):
        with pytest.raises(ValueError, match=name):
            flow_guided_distillation(student, teacher)(mine, KEY, batch, {"teacher": theirs})


def test_annealing_reaches_every_param():
    small, _, params, _, batch = networks()
    loss = chain(
        annealed_source(optax.cosine_decay_schedule(1.0, 100)), losses.flow_matching(small)
    )
    assert not silent_leaves(loss, params, batch, at_step(30))


def test_bad_input():
    loss = losses.flow_matching(straight())
    pairs = {"x0": jnp.zeros((2, 2)), "x": jnp.zeros((2, 2))}
    with pytest.raises(ValueError, match="at step 0"):
        annealed_source(lambda step: 1.5)
    annealed = chain(annealed_source(lambda step: 0.5), loss)
    with pytest.raises(ValueError, match="'x0' beside 'x'"):
        annealed(0.0, KEY, {"x": jnp.zeros((2, 2))}, at_step(0))
    with pytest.raises(ValueError, match="'step'"):
        annealed(0.0, KEY, pairs)
    with pytest.raises(ValueError, match="key"):
        annealed(0.0, None, pairs, at_step(0))
    with pytest.raises(ValueError, match="weight >= 0"):
        flow_guided_distillation(straight(), straight(), weight=-1.0)
    guided = flow_guided_distillation(straight(), straight())
    with pytest.raises(ValueError, match="'x0' beside 'x'"):
        guided(0.0, KEY, {"x": jnp.zeros((2, 2))}, {"teacher": 0.0})
    with pytest.raises(ValueError, match="'teacher'"):
        guided(0.0, KEY, pairs)
    with pytest.raises(ValueError, match="key"):
        guided(0.0, None, pairs, {"teacher": 0.0})
