"""The identity of the average velocity as one residual: what it says by itself, and that the losses
which are presets of it are what their docstrings say, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses, solvers, times
from jflow.losses import flow_map_residual
from jflow.types import FlowMap, Velocity

KEY = jax.random.key(0)
MAP = FlowMap(
    lambda *args: 0.7,
    lambda p, x, t, r, cond=None, *, key=None: p * jnp.sin(2 * x) * (1 + r - t * t)[:, None],
)
NET = Velocity(
    lambda *args: 0.7,
    lambda p, x, t, cond=None, *, key=None: p * jnp.sin(2 * x) * (1 + t)[:, None],
)
TEACHER = Velocity(lambda *args: 0.5, lambda p, x, t, cond=None, *, key=None: p * x - t[:, None])
BATCH = {
    "x": np.linspace(-1, 2, 8, dtype=np.float32).reshape(4, 2),
    "weight": np.array([1, 2, 0, 0.5], np.float32),
}
FROZEN, PAIRS = {"teacher": 0.5}, times.pairs(equal=0.25)
NORMALIZED = losses.normalized_tangent()


def by_hand(flow_map, law, error, *, along=None, end=None, shorter=None, **options):
    """A preset written out: error(g, t) -> [b], shorter(g, t) -> g for the tangent."""

    def loss(params, key, batch, frozen):
        pairs = losses.draw_pairs("by_hand", key, batch, law)
        t, r = pairs.t if end is None else (pairs.t, jnp.full_like(pairs.t, end))
        x = (1 - t)[:, None] * pairs.x0 + t[:, None] * pairs.x1
        v = TEACHER.apply(frozen["teacher"], x, t)
        direction = None if along is None else along(params, x, t)
        more = {} if shorter is None else {"tangent": lambda g: shorter(g, t)}
        g, _ = flow_map_residual(
            "by_hand", flow_map, params, x, t, r, v, direction=direction, **options, **more
        )
        return losses.mean_of_rows(error(g, t), pairs.weight), {}

    return loss


def square(g, t):
    return losses.mean_event(jnp.square(g))


def weighed(g, t):
    return losses.adaptive_weight(square(g, t), 0.75, 0.1) * square(g, t)


UNIFORM, ONE = times.uniform(), solvers.consistency_map(NET)
PRESETS = {
    "mean_flow": (
        losses.mean_flow(MAP, times=PAIRS, teacher=TEACHER, power=0.75, c=0.1),
        by_hand(MAP, PAIRS, weighed),
    ),
    "improved_mean_flow": (
        losses.improved_mean_flow(MAP, times=PAIRS, teacher=TEACHER, power=0.75, c=0.1),
        by_hand(
            MAP,
            PAIRS,
            weighed,
            along=lambda p, x, t: solvers.instantaneous_velocity(MAP).apply(p, x, t),
        ),
    ),
    "eulerian_map_distillation": (
        losses.eulerian_map_distillation(MAP, TEACHER, times=PAIRS, most=0.9),
        by_hand(MAP, PAIRS, square, derivative=lambda d: 0.9 * d, tangent=NORMALIZED),
    ),
    "velocity_matching": (
        losses.velocity_matching(NET, TEACHER, tangent=NORMALIZED),
        by_hand(ONE, UNIFORM, square, end=1.0, derivative=NORMALIZED),
    ),
    "anchored_consistency": (
        losses.anchored_consistency(
            ONE,
            teacher=TEACHER,
            time=UNIFORM,
            relax=1.0,
            clip=np.inf,
            power=0.0,
            anchor=lambda v, target, x, t: jnp.zeros_like(t),
        ),
        by_hand(
            ONE,
            UNIFORM,
            lambda g, t: jnp.cos(jnp.pi / 2 * t) * square(g, t),
            end=1.0,
            shorter=lambda g, t: (1 - t)[:, None] * g,
        ),
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    preset, hand = (
        jax.jit(
            lambda p, loss=loss: jax.value_and_grad(lambda p: loss(p, KEY, BATCH, FROZEN)[0])(p)
        )(0.7)
        for loss in PRESETS[name]
    )
    assert preset[0] > 0 and preset[1] != 0
    np.testing.assert_allclose(preset, hand, rtol=1e-5)


def test_value_and_gradient():
    """Of u = p x at v = c x, along d x: u - v - (r - t) p d x in value, x in gradient, whatever the
    tangent; the residual has no gradient."""
    model = FlowMap(lambda *args: 1.0, lambda p, x, t, r, cond=None, *, key=None: p * x)
    x, t, r = jnp.asarray([[1.0, -2.0]]), jnp.asarray([0.25]), jnp.asarray([0.75])

    def both(p, **options):
        return flow_map_residual("own", model, p, x, t, r, 3 * x, **options)

    run = jax.jit(lambda p: jax.jvp(lambda p: both(p, direction=2 * x), (p,), (1.0,)))
    (g, residual), (dg, dresidual) = run(5.0)
    np.testing.assert_allclose(g, (5 - 3 - 0.5 * 5 * 2) * x)
    np.testing.assert_allclose(residual, g)
    np.testing.assert_allclose(dg, x)
    assert not np.any(dresidual)

    options = {"derivative": lambda d: 0.0 * d, "tangent": losses.clipped_tangent(1.0)}
    run = jax.jit(lambda p: jax.jvp(lambda p: both(p, **options), (p,), (1.0,)))
    (g, residual), (dg, _) = run(5.0)
    np.testing.assert_allclose(g, [[1.0, -1.0]])  # 2 x, clipped
    np.testing.assert_allclose(residual, (5 - 3 - 0.5 * 5 * 3) * x)
    np.testing.assert_allclose(dg, x)


def test_bad_input():
    x, t = jnp.ones((2, 3)), jnp.zeros(2)
    with pytest.raises(ValueError, match="own: expected a tangent of shape"):
        flow_map_residual("own", MAP, 0.7, x, t, t, x, tangent=jnp.sum)
    with pytest.raises(ValueError, match="own: expected a derivative of shape"):
        flow_map_residual("own", MAP, 0.7, x, t, t, x, derivative=jnp.sum)
    narrow = FlowMap(MAP.init, lambda p, x, t, r, cond=None, *, key=None: x[:, :1])
    with pytest.raises(ValueError, match="own: expected a velocity shaped like x"):
        flow_map_residual("own", narrow, 0.7, x, t, t, x)
