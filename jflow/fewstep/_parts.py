"""What the losses and samplers of this room share: what frozen holds, the line between source and data, the teacher's ODE
between times of each row, means over events."""

import math
from collections.abc import Callable, Mapping

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow import solvers
from jflow._util import check_batch, check_params, expand_to, float_dtype
from jflow.fields import like_state
from jflow.solvers._integrate import SolveInfo, Status, check_grid, method, rising_times
from jflow.types import Array, Cond, FlowMap, Params, PyTree, Velocity


def needed(name: str, frozen: Mapping[str, PyTree] | None, entry: str = "teacher") -> PyTree:
    """frozen[entry] without gradient; ValueError, with the name of who needs it, where there is none."""
    if frozen is None or frozen.get(entry) is None:
        raise ValueError(f"{name}: expected {entry!r} in frozen, got the entries {sorted(frozen or {})}")
    return jax.lax.stop_gradient(frozen[entry])


def need_pairs(name: str, batch: Mapping[str, PyTree]) -> None:
    """ValueError, with the name of who needs them, where the batch has no 'x0' beside 'x'."""
    check_batch(name, batch)
    if batch.get("x0") is None:
        raise ValueError(f"{name}: expected pairs, 'x0' beside 'x', got the keys {sorted(batch)}")


def players(name: str, params: Params, *wanted: str) -> list[Params]:
    """The params of these parts; ValueError, which names them, where one is missing."""
    check_params(name, params, *wanted)
    return [params[who] for who in wanted]


def check_flow_map(name: str, flow_map: FlowMap) -> None:
    """TypeError for a velocity where a flow map is due."""
    if isinstance(flow_map, Velocity):
        raise TypeError(
            f"{name}: expected a FlowMap, got a Velocity: make one by jflow.flow_map(net), or fewstep.to_data"
        )


def checked(name: str, velocity: Velocity) -> Velocity:
    """velocity, whose output of another shape or type than x is an error in this name, or cast."""

    def apply(params, x, t, cond=None, *, key=None):
        return like_state(name, velocity.apply(params, x, t, cond, key=key), x)

    return Velocity(velocity.init, apply)


def joined(x: Array, y: Array) -> Array:
    """x and y side by side along the last axis of the event, [b, ..., 2 c]; scalar events become [b, 2]."""
    return jnp.stack([x, y], axis=1) if x.ndim == 1 else jnp.concatenate([x, y], axis=-1)


def halves(xy: Array, like: Array) -> tuple[Array, Array]:
    """What `joined` put together, each shaped like `like`."""
    first, second = jnp.split(xy, 2, axis=-1)
    return first.reshape(like.shape), second.reshape(like.shape)


def shaped(name: str, what: str, value: Array, like: Array) -> Array:
    """value; ValueError where its shape is not that of `like`: broadcasting would hide it."""
    if jnp.shape(value) != jnp.shape(like):
        raise ValueError(f"{name}: expected {what} of shape {list(jnp.shape(like))}, got {list(jnp.shape(value))}")
    return value


def warmed(name: str, frozen: Mapping[str, PyTree] | None, warmup: int, most: float = 1.0) -> Array | float:
    """min(most, frozen['step'] / warmup); most, and no 'step' needed, without warm-up."""
    return most if warmup == 0 else jnp.minimum(needed(name, frozen, "step") / warmup, most)


def unchanged(tangent: Array) -> Array:
    return tangent


def on_line(x0: Array, x1: Array, t: Array) -> Array:
    """(1 - t) x0 + t x1, in float32 or better."""
    x0, x1 = x0.astype(float_dtype(x1)), x1.astype(float_dtype(x1))
    return x0 + expand_to(t, x1) * (x1 - x0)


def line(x0: Array, x1: Array, t: Array) -> tuple[Array, Array]:
    """x_t = (1 - t) x0 + t x1 in the type of x1, and x1 - x0 in float32 or better."""
    v = x1.astype(float_dtype(x1)) - x0.astype(float_dtype(x1))
    return (x0 + expand_to(t, v) * v).astype(x1.dtype), v


def line_velocity(
    name: str, target_velocity: Velocity | None, frozen: Mapping[str, PyTree] | None, x0: Array, x1: Array, cond
) -> Callable[[Array, Array], Array]:
    """v(x, t) without gradient, in float32 or better: x1 - x0, or the target velocity with params frozen['teacher']."""
    dtype = float_dtype(x1)
    if target_velocity is None:
        slope = jax.lax.stop_gradient(x1.astype(dtype) - x0.astype(dtype))
        return lambda x, t: slope
    teacher = needed(name, frozen)

    def v(x, t):
        x = x.astype(x1.dtype)
        out = like_state(f"{name}: target_velocity", target_velocity.apply(teacher, x, t, cond), x)
        return jax.lax.stop_gradient(out).astype(dtype)

    return v


def predicted_data(velocity: Velocity, params: Params, x: Array, t: Array, cond, key, dtype) -> Array:
    """x + (1 - t) F(x, t) in x's precision; the network is given x in dtype."""
    v = like_state("velocity", velocity.apply(params, x.astype(dtype), t, cond, key=key), x)
    return x + expand_to(1 - t, x) * v


def average_velocity(
    velocity: Velocity,
    params: Params,
    x: Array,
    t: Array,
    r: Array,
    cond: Cond = None,
    *,
    solver: diffrax.AbstractSolver,
    steps: int,
) -> Array:
    """(x_r - x) / (r - t) of the velocity's own ODE from x at time t to time r ([b] each), without a gradient.

    What is integrated is the average velocity itself, y' = v(x + (r - t) y, t + s (r - t)) over s in [0, 1]: no division,
    and v(x, t) at r = t."""
    x, params, span = x.astype(float_dtype(x)), jax.lax.stop_gradient(params), r - t

    def apply(params, y, s, given, *, key=None):
        x, t, span, cond = given
        return velocity.apply(params, x + expand_to(span, y) * y, t + s * span, cond)

    given = jax.lax.stop_gradient((x, t, span, cond))
    y, _ = solvers.sample(Velocity(velocity.init, apply), params, jnp.zeros_like(x), given, solver=solver, steps=steps)
    return jax.lax.stop_gradient(y)


def check_fixed(name: str, solver: diffrax.AbstractSolver, steps: int) -> None:
    """Raise at construction for what `solvers.sample` refuses later: not a solver, or no whole number of steps."""
    method(name, solver=solver, steps=steps, grid=None, rtol=None, atol=None, adjoint=None, max_steps=1, default={})


def check_weights(name: str, **weights: float) -> None:
    """Raise for a weight that is negative or not finite."""
    for what, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite {what} >= 0, got {value}")


def sampling_times(name: str, steps: int | None, grid: ArrayLike | None, *, rising: bool = True) -> ArrayLike:
    """The times [n + 1] of a sampler: a grid, checked, or equal steps from 0 to 1, one where neither is given."""
    if grid is None:
        return rising_times(name, 1 if steps is None else steps)
    if steps is not None:
        raise ValueError(f"{name}: expected one of steps and grid, got both")
    check_grid(name, grid, rising)
    return grid


def finished(x: Array, evaluations: int, like: Array) -> tuple[Array, SolveInfo]:
    """What a sampler returns: x [b, *event] in the type of `like`, rows that are not finite as NaN, and their info."""
    n = x.shape[0]
    finite = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    status = jnp.where(finite, Status.OK, Status.NOT_FINITE).astype(jnp.int32)
    return jnp.where(expand_to(finite, x), x, jnp.nan).astype(like.dtype), SolveInfo(
        jnp.full((n,), evaluations, jnp.int32), status
    )
