"""What is special to the residual recipe: images, training on the estimator, and what its bits per
dimension mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import bijectors as bj
from jflow import data, distributions, flows, losses


def test_images_take_convolutions():
    """Sampling and its density agree with the density of the samples, in the image's own shape."""
    flow = flows.residual_flow((4, 4, 2), depth=2, hidden=(6, 6), coeff=0.7)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 4, 2)), jnp.float32)

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 3)
        params, moved = flow.init(keys[0], x), np.random.default_rng(1)
        params = jax.tree.map(lambda p: p + 0.3 * moved.normal(size=p.shape), params)
        sample, log_prob = flow.sample_and_log_prob(params, keys[1], 3)
        return (
            params,
            sample,
            log_prob,
            flow.log_prob(params, sample),
            flow.log_prob(params, sample, key=keys[2]),
        )

    params, sample, log_prob, again, estimate = run(jax.random.key(0))
    assert params["bijector"]["0"]["stacked"]["1"]["kernel_1"].shape == (2, 1, 1, 6, 6)
    assert sample.shape == (3, 4, 4, 2)
    np.testing.assert_allclose(log_prob, again, atol=1e-3)
    assert np.all(np.isfinite(estimate)) and np.all(estimate != again)


@pytest.mark.parametrize("event", [(), (5,), (3, 2)], ids=str)
@pytest.mark.parametrize("make", [flows.planar, flows.radial, flows.sylvester, flows.residual_flow])
def test_they_take_any_event(make, event):
    flow = make(event, depth=2, hidden=(4,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, *event)), jnp.float32)
    sample, log_prob = jax.jit(lambda a, b: flow.sample_and_log_prob(flow.init(a, x), b, 3))(
        jax.random.key(0), jax.random.key(1)
    )
    assert sample.shape == (3, *event) and log_prob.shape == (3,)


def test_variational_recipes_start_at_the_base():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    for make in (flows.planar, flows.radial, flows.sylvester):
        flow = make((3,), depth=3, standardize=False)
        log_prob = jax.jit(lambda x, flow=flow: flow.log_prob(flow.init(jax.random.key(0), x), x))(
            x
        )
        np.testing.assert_allclose(log_prob, distributions.normal((3,)).log_prob({}, x), atol=1e-5)


def test_training_on_the_estimator_lowers_the_exact_value_and_reports_it():
    """Two moons, 150 steps: the mean loss as logged is the exact one, within 4 standard errors,
    before and after."""
    flow = flows.residual_flow((2,), depth=2, hidden=(16, 16), coeff=0.8)
    x = jnp.asarray(data.moons(512, 0)["x"])
    loss = losses.nll(flow)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 150))

    @jax.jit
    def run(key):
        init_key, train_key, *keys = jax.random.split(key, 4)
        params = flow.init(init_key, x)

        def estimates(params, key):
            values = jax.vmap(lambda key: loss(params, key, {"x": x})[0])(
                jax.random.split(key, 100)
            )
            return loss(params, None, {"x": x})[0], jnp.mean(values), jnp.std(values) / 10

        def step(carry, key):
            params, state = carry
            grads = jax.grad(lambda p: loss(p, key, {"x": x})[0])(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        (after, _), _ = jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(train_key, 150)
        )
        return estimates(params, keys[0]), estimates(after, keys[1])

    before, after = run(jax.random.key(0))
    for exact, mean, error in (before, after):
        assert abs(mean - exact) < 4 * error + 1e-5  # at the start g = 0 and nothing is random
    assert after[0] < before[0] - 0.1 and after[2] > 0


def test_bad_options_are_errors():
    for make, message in (
        (lambda: flows.residual_flow((2,), coeff=1.0), r"coeff in \(0, 1\)"),
        (lambda: flows.residual_flow((2,), depth=0), "depth >= 1, got 0"),
        (lambda: flows.residual_flow((0,)), r"positive sizes, got \[0\]"),
        (lambda: flows.planar((2,), depth=-1), "depth >= 0, got -1"),
        (lambda: flows.sylvester((2,), rank=3), "rank from 1 to features=2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError):
        flows.residual_flow((2,), net=bj.planar(2))
