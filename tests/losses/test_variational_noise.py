"""Variational noise coupling: an encoder that says nothing changes nothing, one that couples has a
closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import ELEMENTS, ELEMENTWISE, mean_gradient, random_params, silent_leaves

import jflow
from jflow import losses, nets, oracles, paths, solvers
from jflow.losses import noise_encoder, variational_noise
from jflow.solvers import sample_variational
from jflow.types import Field, Velocity

PULL = 0.6  # of the encoder below


def gaps(h):
    def draw(key, n, frozen):
        t = jax.random.uniform(key, (n,), maxval=0.9)
        return t, t + h

    return draw


def affine(params, x, t, cond=None, *, key=None):
    return params["pull"] * x, jnp.broadcast_to(jnp.asarray(params["std"], x.dtype), x.shape)


AFFINE = Field(lambda key, x, t, cond=None: {"pull": 0.0, "std": 1.0}, affine)
INNER = losses.consistency_training(ELEMENTWISE, steps=gaps(0.1))


def exact(params, x, t, cond=None, *, key=None):
    """Standard normal data, x0 = PULL x1 + sqrt(1 - PULL^2) eps: x_t is normal, and so carried to
    data by its scale."""
    t = t[:, None]
    scale = jnp.sqrt((1 - t) ** 2 + t**2 + 2 * PULL * t * (1 - t))
    # (x / scale - x) / (1 - t), scale^2 - 1 = -2 (1 - PULL) t (1 - t)
    return 2 * (1 - PULL) * t / (scale * (1 + scale)) * x + params["a"] * x + params["b"] * t


EXACT = Velocity(lambda key, x, t, cond=None: {"a": 0.0, "b": 0.0}, exact)
COUPLED = {"pull": PULL, "std": float(np.sqrt(1 - PULL**2))}


def test_an_encoder_that_says_nothing_is_the_independent_coupling():
    x = jax.random.normal(jax.random.key(0), (16, 3))
    loss = variational_noise(INNER, AFFINE, kl=1.0)
    value, metrics = loss(
        {"model": ELEMENTS, "encoder": {"pull": 0.0, "std": 1.0}}, jax.random.key(1), {"x": x}
    )
    noise_key, _, loss_key = jax.random.split(jax.random.key(1), 3)
    plain, _ = INNER(ELEMENTS, loss_key, {"x": x, "x0": jax.random.normal(noise_key, x.shape)})
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-7)


def test_noise_encoder_starts_there():
    encoder = noise_encoder(jflow.velocity(nets.ResidualMLP(8, 1)))
    x = jax.random.normal(jax.random.key(0), (4, 3))
    params = jax.jit(encoder.init)(jax.random.key(1), x, jnp.ones(4))
    mean, std = encoder.apply(params, x, jnp.ones(4))
    np.testing.assert_allclose(mean, 0, atol=1e-7)
    np.testing.assert_allclose(std, 1, atol=1e-6)


def test_the_divergence_in_nats_per_number():
    x = jnp.asarray([[1.0, -1.0], [3.0, 1.0]])
    loss = variational_noise(INNER, AFFINE, kl=2.0)
    params = {"model": ELEMENTS, "encoder": {"pull": 0.5, "std": 2.0}}
    value, metrics = loss(params, jax.random.key(0), {"x": x, "weight": jnp.asarray([1.0, 0.0])})
    kl = (0.25 + 4 - 1) / 2 - np.log(2)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-6)
    free, _ = variational_noise(INNER, AFFINE, kl=0.0)(
        params, jax.random.key(0), {"x": x, "weight": jnp.asarray([1.0, 0.0])}
    )
    np.testing.assert_allclose(value - free, 2 * kl, rtol=1e-5)


@pytest.mark.parametrize("law", ["gaussian", "mixture"])
def test_the_exact_map_of_the_coupled_pairs_is_left_alone_to_first_order(law, x64):
    """x_t = (PULL + (1 - PULL) t) x1 + sqrt(1 - PULL^2) (1 - t) eps: an affine path, whose marginal
    velocity is the teacher."""
    path = paths.Schedule(lambda t: PULL + (1 - PULL) * t, lambda t: COUPLED["std"] * (1 - t))
    if law == "gaussian":
        oracle = oracles.gaussian([1.0, -0.5], [[0.5, 0.2], [0.2, 0.3]], path)
        carry = oracle.flow_map
    else:
        oracle = oracles.mixture([0.4, 0.6], [[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.2], path)
        carry = lambda x, t, r: oracles.mixture_flow_map(oracle, x, t, r)  # noqa: E731

    def apply(params, x, t, cond=None, *, key=None):
        return (carry(x, t, jnp.ones_like(t)) - x) / (1 - t)[:, None] + params["a"] * x

    def residual(h, a=0.0):
        inner = losses.consistency_training(
            Velocity(None, apply), steps=gaps(h), teacher=oracles.as_velocity(oracle)
        )
        params = {"model": {"a": a}, "encoder": COUPLED}
        batch = {"x": jnp.asarray(oracle.sample(jax.random.key(0), 16), jnp.float64)}
        loss = variational_noise(inner, AFFINE, kl=1.0)
        return loss(params, jax.random.key(1), batch, {"teacher": {}})[1]["residual"]

    run, lengths = jax.jit(residual), np.asarray([2e-2, 1e-2, 5e-3])
    found = np.asarray([float(run(h)) for h in lengths])
    assert abs(np.polyfit(np.log(lengths), np.log(found), 1)[0] - 2) < 0.1  # of a square
    assert found[-1] * (2e-4 / 5e-3) ** 2 < 1e-6 and run(5e-3, 0.1) > 1e-3


def test_the_mean_gradient_vanishes_at_the_exact_map_of_the_coupled_pairs():
    loss = variational_noise(losses.consistency_training(EXACT, steps=gaps(1e-3)), AFFINE, kl=0.0)
    of_model = lambda model, *rest: loss({"model": model, "encoder": COUPLED}, *rest)  # noqa: E731
    draw = lambda key, n: jax.random.normal(key, (n, 1))  # noqa: E731
    gradient = mean_gradient(of_model, draw)
    mean, error = gradient({"a": 0.0, "b": 0.0})
    assert np.all(np.abs(mean) < 3 * error)
    moved, _ = gradient({"a": 0.1, "b": 0.0})
    assert abs(moved[0]) > 10 * error[0]
    independent = lambda model, *rest: loss(  # noqa: E731
        {"model": model, "encoder": {"pull": 0.0, "std": 1.0}}, *rest
    )
    other, _ = mean_gradient(independent, draw)({"a": 0.0, "b": 0.0})
    assert abs(other[0]) > 10 * error[0]  # another coupling has another map


def test_the_encoder_learns_through_the_noise(x64):
    """Of flow matching, whose target is not held fixed: the gradient is that of finite
    differences."""
    x = jax.random.normal(jax.random.key(0), (16, 3), jnp.float64)
    loss = variational_noise(losses.flow_matching(ELEMENTWISE), AFFINE, kl=0.3)

    def value(encoder):
        return loss({"model": ELEMENTS, "encoder": encoder}, jax.random.key(1), {"x": x})[0]

    at, h = {"pull": 0.3, "std": 0.8}, 1e-5
    grads = jax.grad(value)(at)
    for name in at:
        up, down = (value({**at, name: at[name] + s * h}) for s in (1, -1))
        np.testing.assert_allclose(grads[name], (up - down) / (2 * h), rtol=1e-6)


def test_a_consistency_loss_moves_the_encoder_by_its_left_side_alone(x64):
    """The target holds still: the derivative with respect to the noise is that of f(x_t, t)."""
    x = jax.random.normal(jax.random.key(0), (16, 3), jnp.float64)

    def steps(key, n, frozen):
        return jnp.linspace(0.1, 0.8, n), jnp.linspace(0.2, 0.9, n)

    loss = variational_noise(losses.consistency_training(ELEMENTWISE, steps=steps), AFFINE, kl=0.0)
    at = {"pull": 0.3, "std": 0.8}
    grads = jax.grad(
        lambda e: loss({"model": ELEMENTS, "encoder": e}, jax.random.key(1), {"x": x})[0]
    )(at)
    eps = jax.random.normal(jax.random.split(jax.random.key(1), 3)[0], x.shape, x.dtype)
    t, s = steps(None, 16, None)

    def f(x0, t):
        line = x0 + t[:, None] * (x - x0)
        return line + (1 - t)[:, None] * ELEMENTWISE.apply(ELEMENTS, line, t)

    held = f(at["pull"] * x + at["std"] * eps, s)
    by_hand = lambda e: jnp.mean(  # noqa: E731
        (f(e["pull"] * x + e["std"] * eps, t) - held) ** 2 / (s - t)[:, None]
    )
    expected = jax.grad(by_hand)(at)
    for name in at:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-9)


def test_the_multistep_sampler_keeps_the_marginal_where_plain_noise_does_not():
    n, params = 100_000, {"model": {"a": 0.0, "b": 0.0}, "encoder": COUPLED}
    x0 = jax.random.normal(jax.random.key(0), (n, 1))
    one, info = sample_variational(EXACT, AFFINE, params, x0)
    np.testing.assert_allclose(
        one,
        solvers.sample_flow_map(solvers.consistency_map(EXACT), params["model"], x0)[0],
        atol=1e-6,
    )
    np.testing.assert_allclose(one, x0, atol=1e-6)  # the flow from N(0, 1) to N(0, 1)
    np.testing.assert_array_equal(info.evaluations, 1)
    x, info = sample_variational(
        EXACT, AFFINE, params, x0, grid=[0.0, 0.3, 0.6, 1.0], key=jax.random.key(1)
    )
    np.testing.assert_array_equal(info.evaluations, 3)
    assert np.all(info.status == solvers.Status.OK)
    spread = 4 * np.sqrt(2 / n)  # four standard errors of a variance of 1
    assert abs(np.var(x) - 1) < spread and np.abs(x - x0).max() > 0.1
    plain, _ = solvers.sample_flow_map(
        solvers.consistency_map(EXACT),
        params["model"],
        x0,
        grid=[0.0, 0.5, 1.0],
        renoise=1.0,
        key=jax.random.key(1),
    )
    assert abs(np.var(plain) - 0.5 / (0.5 + PULL / 2)) < spread  # too narrow


def test_what_is_frozen_has_no_gradient_and_every_param_learns():
    velocity = jflow.velocity(nets.ResidualMLP(8, 2, num_classes=3))
    encoder = noise_encoder(jflow.velocity(nets.ResidualMLP(8, 1, num_classes=3)))
    x, cond = jax.random.normal(jax.random.key(0), (8, 2)), jnp.arange(8) % 4
    params = {
        "model": random_params(velocity.init, x, jnp.zeros(8), cond),
        "encoder": random_params(encoder.init, x, jnp.ones(8), cond),
    }
    inner = losses.consistency_training(velocity, steps=losses.easy_steps(10))
    loss = variational_noise(inner, encoder, kl=0.1)
    batch = {"x": x, "cond": cond}
    # t is always 1, so that nothing but times are silent: none are
    assert silent_leaves(loss, params, batch, {"step": jnp.int32(50)}) == []
    with pytest.raises(ValueError, match="'step' in frozen"):
        loss(params, jax.random.key(0), batch)


def test_bad_input():
    params = {"model": ELEMENTS, "encoder": {"pull": 0.0, "std": 1.0}}
    loss, x = variational_noise(INNER, AFFINE, kl=1.0), jnp.ones((4, 2))
    with pytest.raises(ValueError, match="kl >= 0"):
        variational_noise(INNER, AFFINE, kl=-1.0)
    with pytest.raises(ValueError, match="needs a key"):
        loss(params, None, {"x": x})
    with pytest.raises(ValueError, match="unknown keys in batch: \\['x0'\\]"):
        loss(params, jax.random.key(0), {"x": x, "x0": x})
    with pytest.raises(ValueError, match=r"expected params with \['model', 'encoder'\]"):
        loss(ELEMENTS, jax.random.key(0), {"x": x})
    narrow = Field(AFFINE.init, lambda params, x, t, cond=None, *, key=None: (x[:, :1], x))
    with pytest.raises(ValueError, match="\\(mean, std\\) of shape"):
        variational_noise(INNER, narrow, kl=1.0)(params, jax.random.key(0), {"x": x})
    with pytest.raises(ValueError, match="needs a key"):
        sample_variational(EXACT, AFFINE, params, x, steps=2)
    with pytest.raises(ValueError, match="at least 1"):
        sample_variational(EXACT, AFFINE, params, x, steps=0)
