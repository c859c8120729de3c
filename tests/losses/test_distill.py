import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import LINE_MIXTURE, same_when_repeated, straight_mixture
from exact_maps import at as params_at

from jflow import oracles
from jflow.losses import distillation
from jflow.times import fixed
from jflow.types import Velocity

GAUSSIAN = oracles.gaussian([2.0, -1.0], [0.25, 4.0])


def test_the_flow_map_is_what_one_step_learns():
    """At t = 0 the velocity flow_map(x0) - x0 has loss 0, and 1 when it is off by 1."""

    def apply(params, x, t, cond=None, *, key=None):
        return GAUSSIAN.flow_map(x, 0.0, 1.0) - x + params

    x0 = jax.random.normal(jax.random.key(0), (32, 2))
    batch = {"x0": x0, "x": GAUSSIAN.flow_map(x0, 0.0, 1.0)}
    loss = distillation(Velocity(lambda *args: {}, apply))
    np.testing.assert_allclose(loss(jnp.zeros(()), jax.random.key(1), batch)[0], 0, atol=1e-10)
    np.testing.assert_allclose(loss(jnp.ones(()), jax.random.key(1), batch)[0], 1, rtol=1e-5)


def test_the_straight_flow_of_a_mixture_has_no_residual_at_any_of_the_times(x64):
    x0 = jax.random.normal(jax.random.key(0), (32, 1))
    pairs = {"x0": x0, "x": oracles.mixture_flow_map(LINE_MIXTURE, x0, 0.0, 1.0)}
    for times in ((0.0,), (0.0, 0.25, 0.5)):
        loss = distillation(straight_mixture(), times=times)
        run = jax.jit(lambda p, loss=loss: loss(p, jax.random.key(1), pairs)[0])
        assert run(params_at()) < 1e-6 and run(params_at(a=0.1)) > 1e-3


def test_a_tiled_event_has_the_same_loss():
    bend = Velocity(
        lambda *args: {}, lambda params, x, t, cond=None, *, key=None: jnp.sin(x + t[:, None])
    )
    x0, x = jax.random.normal(jax.random.key(0), (2, 8, 3))
    loss = distillation(bend, times=(0, 0.5))
    same_when_repeated(loss, {}, x0, x, rtol=1e-6)


def test_a_few_times_on_the_line():
    seen = {}

    def apply(params, x, t, cond=None, *, key=None):
        seen.update(x=x, t=t)
        return jnp.zeros_like(x)

    x0, x1 = jnp.zeros((4000, 1)), jnp.ones((4000, 1))
    loss = distillation(Velocity(lambda *args: {}, apply), times=(0, 0.25, 0.5))
    loss({}, jax.random.key(0), {"x0": x0, "x": x1})
    times, counts = np.unique(seen["t"], return_counts=True)
    np.testing.assert_array_equal(times, [0, 0.25, 0.5])
    np.testing.assert_allclose(
        counts / 4000, 1 / 3, atol=4 * np.sqrt(2 / 9 / 4000)
    )  # 4 standard errors
    np.testing.assert_allclose(seen["x"][:, 0], seen["t"])


def test_refusals():
    velocity = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: x)
    with pytest.raises(ValueError, match="expected pairs, 'x0' beside 'x'"):
        distillation(velocity)({}, jax.random.key(0), {"x": jnp.zeros((2, 1))})
    with pytest.raises(ValueError, match=r"times in \[0, 1\)"):
        distillation(velocity, times=(0.0, 1.0))
    for times in ((), (-0.1,), (1.1,)):
        with pytest.raises(ValueError, match=r"times in \[0, 1\]"):
            fixed(times)
