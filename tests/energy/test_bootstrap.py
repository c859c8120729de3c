"""Annealed draws to train on, and the buffer that keeps them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors, distributions, energy, flows

KEY = jax.random.key(0)
NORMAL = distributions.normal((1,))
FLOW = flows.flow(bijectors.affine((1,)), NORMAL)
TARGET = energy.as_target(NORMAL, {}, (1,))


def params(mean, std):
    leaf = {"shift": jnp.array([mean]), "log_scale": jnp.log(jnp.array([std]))}
    return {"bijector": leaf, "base": {}}


@pytest.mark.parametrize("power, variance", [(1.0, 1.0), (2.0, 4 / 7)])
def test_annealed_draws_go_to_the_tilted_density(power, variance):
    """p = N(0, 1) and q = N(0, 2^2): p^2 / q is a normal law of variance 1 / (2 - 1 / 4); the
    weighted mean square of 20,000 draws, 4 standard errors of their effective number; log_q is that
    of the flow."""
    draw = energy.annealed_draws(
        FLOW, TARGET, energy.metropolis_kernel(1.0), draws=20_000, levels=3, power=power
    )

    @jax.jit
    def run(key):
        found = draw(params(0.0, 2.0), key)
        mean = jnp.sum(jax.nn.softmax(found.log_weights) * jnp.square(found.x[:, 0]))
        size = energy.effective_sample_size(found.log_weights)
        return mean, size, found.log_q, FLOW.log_prob(params(0.0, 2.0), found.x)

    mean, size, log_q, expected = jax.device_get(run(KEY))
    assert abs(mean - variance) < 4 * variance * (2 / size) ** 0.5 < 0.1
    np.testing.assert_allclose(log_q, expected, rtol=1e-5)


def test_a_buffer_keeps_the_newest_and_draws_by_weight():
    """Three of five rows are there; a row with e^9 times the weight is always among one drawn; its
    weight follows the flow: q_old / q of a flow that moved."""
    x = jnp.arange(3.0)[:, None]
    log_q = FLOW.log_prob(params(0.0, 1.0), x)
    new = energy.Replay(x, jnp.array([0.0, 9.0, -9.0]), log_q)
    replay = energy.add_draws(energy.empty_replay((1,), 5), new)
    moved = params(0.5, 1.0)
    ratio = NORMAL.log_prob({}, jnp.ones((1, 1))) - FLOW.log_prob(moved, jnp.ones((1, 1)))

    @jax.jit
    def run(keys, key):
        one = jax.vmap(lambda k: energy.draw_replay(FLOW, replay, moved, k, 1)[1])(keys)
        after, batch = energy.draw_replay(FLOW, replay, moved, key, 5)
        return one, after, batch

    key, other = jax.random.split(KEY)
    one, after, batch = jax.device_get(run(jax.random.split(key, 200), other))
    assert np.mean(one["x"] == 1) > 0.99
    np.testing.assert_allclose(one["weight"][one["x"][:, 0, 0] == 1], np.exp(ratio)[0], rtol=1e-5)
    assert sorted(batch["weight"] > 0) == [False, False, True, True, True]
    np.testing.assert_allclose(after.log_weights[1], 9 + ratio[0], rtol=1e-5)
    assert np.all(after.log_weights[3:] == -np.inf)
    again = energy.add_draws(after, new)
    np.testing.assert_array_equal(again.x[:, 0], [0, 1, 2, 0, 1])


def test_bad_input_is_named():
    replay = energy.empty_replay((1,), 2)
    with pytest.raises(ValueError, match="n at most 2, the size of the buffer, got 3"):
        energy.draw_replay(FLOW, replay, params(0.0, 1.0), KEY, 3)
    with pytest.raises(ValueError, match="power >= 1, got 0.5"):
        energy.annealed_draws(FLOW, TARGET, energy.metropolis_kernel(), power=0.5)
    with pytest.raises(ValueError, match=r"events of draws of shape \[1\], got \[2\]"):
        energy.add_draws(replay, energy.empty_replay((2,), 2))
    with pytest.raises(TypeError, match="expected a Target"):
        energy.annealed_draws(FLOW, lambda x: x, energy.metropolis_kernel())
