"""Align Your Flow: exact maps, its limits (flow matching, consistency), warm-up and what the
teacher may be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import (
    COSINE,
    GAUSSIAN,
    ORACLES,
    SINE_MAP,
    at,
    exact_map,
    near_map,
    random_params,
    same_when_repeated,
    silent_leaves,
    standard_scores,
)
from jax.random import clone

import jflow
from jflow import guidance, losses, nets, oracles, solvers, times
from jflow.losses import eulerian_map_distillation, lagrangian_map_distillation
from jflow.types import Velocity

KEY = jax.random.key(0)
LOSSES = {"eulerian": eulerian_map_distillation, "lagrangian": lagrangian_map_distillation}
plain = lambda g: g  # noqa: E731


@pytest.mark.parametrize("law", ORACLES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_exact_map_has_no_residual(name, law, x64):
    oracle = ORACLES[law]
    loss = LOSSES[name](near_map(exact_map(law)), oracles.as_velocity(oracle))
    batch = {"x": oracle.sample(KEY, 64).astype(jnp.float64)}
    run = jax.jit(lambda params: loss(params, KEY, batch, {"teacher": {}}))
    value, metrics = run(at())
    assert metrics["residual"] < 1e-6 and value < 1e-6
    assert run(at(a=0.1))[1]["residual"] > 1e-3 and run(at(b=0.1))[1]["residual"] > 1e-4


@pytest.mark.parametrize("law", ORACLES)
def test_from_scratch_the_mean_gradient_at_the_exact_map_is_zero(law):
    """10^5 draws; a normalized tangent is not linear in the noise and promises no such thing."""
    loss = eulerian_map_distillation(near_map(exact_map(law, 4)), tangent=plain)

    def gradient(key, params):
        data_key, loss_key = jax.random.split(key)
        return jax.grad(lambda p: loss(p, loss_key, {"x": ORACLES[law].sample(data_key, 1000)})[0])(
            params
        )

    scores = standard_scores(gradient)
    assert np.all(np.abs(scores(at())) < 3)
    assert np.max(np.abs(scores(at(0.1, 0.1)))) > 10


@pytest.mark.parametrize("teacher", [None, oracles.as_velocity(GAUSSIAN)])
def test_at_r_equal_t_it_is_flow_matching(teacher, x64):
    model, time = near_map(exact_map("gaussian")), times.uniform()
    loss = eulerian_map_distillation(
        model, teacher, times=lambda key, n: (time(key, n),) * 2, tangent=plain
    )
    batch = {"x": GAUSSIAN.sample(KEY, 32), "weight": jnp.arange(32.0)}
    ours = jax.jit(jax.value_and_grad(lambda p: loss(p, KEY, batch, {"teacher": {}})[0]))(
        at(0.3, -0.2)
    )
    if teacher is None:
        theirs = losses.flow_matching(solvers.instantaneous_velocity(model), time=time)
        theirs = jax.jit(jax.value_and_grad(lambda p, f=theirs: f(p, KEY, batch)[0]))(at(0.3, -0.2))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)
    else:  # the marginal velocity: what is left is the perturbation itself
        assert 0 < ours[0] < 1
        exact = jax.jit(jax.grad(lambda p: loss(p, KEY, batch, {"teacher": {}})[0]))(at())
        np.testing.assert_allclose(jax.tree.leaves(exact), 0, atol=1e-12)


def test_at_r_equal_1_it_is_continuous_consistency(x64):
    """The gradient of -2 / d <f, df/dt> / (1 - t), with df/dt by differentiating f itself."""
    model, oracle = near_map(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN)
    t, x0, x1 = jnp.linspace(0, 0.9, 16), jax.random.normal(KEY, (16, 2)), GAUSSIAN.sample(KEY, 16)
    loss = eulerian_map_distillation(
        model, oracle, times=lambda key, n: (jnp.resize(t, n), jnp.ones(n)), tangent=plain
    )
    params = at(0.3, -0.2)
    ours = jax.jit(jax.grad(lambda p: loss(p, KEY, {"x0": x0, "x": x1}, {"teacher": {}})[0]))(
        params
    )

    x_t = (1 - t[:, None]) * x0 + t[:, None] * x1

    def f(params, x, t):
        return solvers.apply_flow_map(model, params, x, t, 1.0)

    @jax.jit
    def theirs(params):
        _, slope = jax.jvp(
            lambda x, t: f(params, x, t), (x_t, t), (oracle.apply({}, x_t, t), jnp.ones_like(t))
        )
        return jax.grad(lambda p: -jnp.mean(jnp.sum(f(p, x_t, t) * slope, axis=1) / (1 - t)))(
            params
        )  # 2 / d is 1

    theirs = theirs(params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_the_lagrangian_gradient_is_that_of_the_paper(x64):
    """<f, d_r f - v(f, r)> / (r - t), no gradient through the second factor, times 2 / d = 1."""
    model, oracle = near_map(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN)
    t, r = jnp.linspace(0, 0.6, 16), jnp.linspace(0.5, 1, 16)
    x0, x1 = jax.random.normal(KEY, (16, 2)), GAUSSIAN.sample(KEY, 16)
    loss = lagrangian_map_distillation(
        model, oracle, times=lambda key, n: (jnp.resize(t, n), jnp.resize(r, n))
    )
    params = at(0.3, -0.2)
    ours = jax.jit(jax.grad(lambda p: loss(p, KEY, {"x0": x0, "x": x1}, {"teacher": {}})[0]))(
        params
    )
    x_t = (1 - t[:, None]) * x0 + t[:, None] * x1

    @jax.jit
    def theirs(params):
        end, moved = jax.jvp(
            lambda r: solvers.apply_flow_map(model, params, x_t, t, r), (r,), (jnp.ones_like(r),)
        )
        wrong = moved - oracle.apply({}, end, r)
        f = lambda p: solvers.apply_flow_map(model, p, x_t, t, r)  # noqa: E731
        return jax.grad(lambda p: jnp.mean(jnp.sum(f(p) * wrong, axis=1) / (r - t)))(params)

    theirs = theirs(params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_warm_up_follows_the_count_of_steps(name, x64):
    model, oracle = near_map(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN)
    batch = {"x": GAUSSIAN.sample(KEY, 16)}

    def value(step=None, **options):
        loss = LOSSES[name](model, oracle, tangent=plain, **options)
        frozen = {"teacher": {}} | ({} if step is None else {"step": step})
        return float(jax.jit(lambda: loss(at(0.3, 0.2), KEY, batch, frozen)[0])())

    assert value(jnp.int32(25), warmup=100) == pytest.approx(value(most=0.25), rel=1e-6)
    assert value(jnp.int32(500), warmup=100, most=0.99) == pytest.approx(value(most=0.99), rel=1e-6)
    assert value(most=0.25) != pytest.approx(value(), rel=1e-3)
    with pytest.raises(ValueError, match="'step'"):
        value(warmup=100)


def test_normalized_tangents_keep_the_direction_and_bound_the_loss(x64):
    model, oracle = near_map(exact_map("gaussian")), oracles.as_velocity(GAUSSIAN)
    row = {"x0": jnp.asarray([[0.3, -1.0]]), "x": jnp.asarray([[2.0, 0.5]])}
    frozen, params = {"teacher": {}}, at(3.0, 2.0)
    grads = [
        jax.jit(jax.grad(lambda p, loss=loss: loss(p, KEY, row, frozen)[0]))(params)
        for loss in (
            eulerian_map_distillation(model, oracle),
            eulerian_map_distillation(model, oracle, tangent=plain),
        )
    ]
    ratio = [a / b for a, b in zip(*map(jax.tree.leaves, grads), strict=True)]
    assert ratio[0] > 0 and ratio[0] == pytest.approx(
        float(ratio[1]), rel=1e-9
    )  # one row: one factor
    assert eulerian_map_distillation(model, oracle)(params, KEY, row, frozen)[0] < 1


@pytest.mark.parametrize("name", LOSSES)
def test_the_derivative_may_be_a_finite_difference(name, x64):
    batch, frozen = {"x": GAUSSIAN.sample(KEY, 16)}, {"teacher": {}}
    model = near_map(exact_map("gaussian"))
    options = ({}, *({"jvp": solvers.finite_difference(h)} for h in (1e-2, 5e-3)))
    made = [LOSSES[name](model, oracles.as_velocity(GAUSSIAN), tangent=plain, **o) for o in options]
    exact, *near = jax.jit(
        lambda: [loss(at(0.3, 0.2), clone(KEY), batch, frozen)[0] for loss in made]
    )()
    errors = [abs(float(value - exact)) for value in near]
    assert errors[1] < 1e-3 and 3.5 < errors[0] / errors[1] < 4.5  # second order


def test_an_autoguided_teacher():
    strong, weak = (
        Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: p["s"] * x)
        for _ in range(2)
    )
    teacher = guidance.autoguidance(strong, weak, guidance.scaled(2.0))
    params, batch = {"velocity": {"s": 1.0}, "weak": {"s": 0.25}}, {"x": GAUSSIAN.sample(KEY, 16)}
    by_hand = Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: (2 * 1.0 - 0.25) * x)
    for make in LOSSES.values():
        one = make(near_map(exact_map("gaussian")), teacher)
        other = make(near_map(exact_map("gaussian")), by_hand)
        values = jax.jit(
            lambda params, one=one, other=other: (
                one(at(), KEY, batch, {"teacher": params})[0],
                other(at(), clone(KEY), batch, {"teacher": {}})[0],
            )
        )(params)
        np.testing.assert_allclose(*values, rtol=1e-5)


@pytest.mark.parametrize("tangent", [plain, losses.normalized_tangent()])
@pytest.mark.parametrize("name", LOSSES)
def test_a_tiled_event_changes_nothing(name, tangent, x64):
    model, teacher = SINE_MAP, COSINE
    loss = LOSSES[name](model, teacher, tangent=tangent)
    x0, x1 = jax.random.normal(KEY, (8, 3)), 2 + jax.random.normal(KEY, (8, 3))
    same_when_repeated(loss, 0.7, x0, x1, {"teacher": {}}, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_every_param_and_stop_at_the_teacher(name):
    net = nets.ResidualMLP(8, 1, num_classes=2)
    model, velocity = jflow.flow_map(net), jflow.velocity(net)
    x, t, cond = GAUSSIAN.sample(KEY, 4), jnp.linspace(0, 0.9, 4), jnp.asarray([0, 1, 2, 2])
    params = random_params(model.init, x, t, t, cond)
    teacher = random_params(velocity.init, x, t, cond)
    loss = losses.chain(losses.drop_cond(0.5, null=2), LOSSES[name](model, velocity))
    batch = {"x": x, "cond": cond}
    assert not silent_leaves(loss, params, batch, {"teacher": teacher})


@pytest.mark.parametrize("name", LOSSES)
def test_bad_input(name):
    model, teacher = SINE_MAP, COSINE
    make, batch = LOSSES[name], {"x": jnp.zeros((2, 1))}
    with pytest.raises(ValueError, match="t <= r"):
        make(model, teacher, times=lambda key, n: (jnp.ones(n), jnp.zeros(n)))
    with pytest.raises(ValueError, match=r"most in \[0, 1\]"):
        make(model, teacher, most=1.5)
    with pytest.raises(ValueError, match="warmup"):
        make(model, teacher, warmup=-1)
    with pytest.raises(ValueError, match="'teacher' in frozen"):
        make(model, teacher)(1.0, KEY, batch)
    with pytest.raises(ValueError, match="tangent of shape"):
        make(model, teacher, tangent=jnp.sum)(1.0, KEY, batch, {"teacher": {}})
    wide = Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="shaped like x"):
        make(model, wide)(1.0, KEY, batch, {"teacher": {}})
