"""What the methods of this package share: checks of their inputs, and Euler steps of a scan."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jflow._core.arrays import float_dtype, sum_event
from jflow._core.checks import (
    check_cond,
    check_noun,
    check_same_shape,
    count_rows,
    described,
    like_state,
    times_of,
)
from jflow._core.times import Times, rising_times, traced
from jflow.steering._condition import read_condition, steered_init
from jflow.types import Array, Cond, Field, Params, Velocity


def known_times(name: str, grid: int | Times | ArrayLike) -> np.ndarray:
    """Rising times [n + 1] in numpy: which steps a method takes is decided before it is traced."""
    if traced(grid):
        raise ValueError(
            f"{name}: expected a grid of known times, a number of steps or numbers, got traced ones"
        )
    return np.asarray(rising_times(name, grid), np.float64)


def check_images(name: str, velocity: Velocity, x: Array, what: str = "x") -> Array:
    """x [b, *event] in float32 or better."""
    check_noun(name, velocity, Velocity, Field)
    return floating(name, x, what)


def floating(name: str, x: Array, what: str = "x0") -> Array:
    """x [b, *event] of a floating type in float32 or better."""
    count_rows(name, x)
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"{name}: expected {what} of a floating type, got {jnp.result_type(x)}")
    return jnp.asarray(x, float_dtype(x))


def check_conditions(name: str, cond: Cond, new_cond: Cond, n: int) -> tuple[Cond, Cond]:
    """The condition of x and the one to edit towards, with n rows each; none may miss."""
    for what, given in (
        ("cond, the condition of x", cond),
        ("new_cond, what to edit to", new_cond),
    ):
        if given is None:
            raise ValueError(f"{name}: expected {what}, got None")
    return check_cond(name, cond, n), check_cond(name, new_cond, n)


def check_optimizer(name: str, optimizer: optax.GradientTransformation) -> None:
    """Raise unless it is an optimizer of optax."""
    if not callable(getattr(optimizer, "update", None)):
        raise TypeError(
            f"{name}: expected an optimizer of optax, such as optax.sgd(0.1), got"
            f" {described(optimizer)}"
        )


def raise_nan(name: str, rewards: Array) -> None:
    """Raise for a reward [steps, rows] of NaN where values are seen."""
    if traced(rewards):
        return
    wrong = np.argwhere(np.isnan(np.asarray(rewards)))
    if len(wrong):
        at, row = wrong[0]
        raise ValueError(
            f"{name}: expected rewards that are numbers, got nan at step {at} of row {row}"
        )


def velocity_at(
    name: str, velocity: Velocity, params: Params, x: Array, t: Array, cond: Cond
) -> Array:
    """v(x, t, cond) at one time for all rows, in the type of x."""
    t = jnp.broadcast_to(t, x.shape[:1])
    return like_state(name, velocity.apply(params, x, t, cond), x)


def euler(name: str, velocity: Velocity, params: Params, x: Array, ts: Array, cond: Cond) -> Array:
    """x after an Euler step between each two of the times ts [n + 1]."""

    def advance(x, at):
        t, t_next = at
        return x + (t_next - t) * velocity_at(name, velocity, params, x, t, cond), None

    return jax.lax.scan(advance, x, (ts[:-1], ts[1:]))[0]


def safe_norm(x: Array) -> Array:
    """The norm of each row [b, *event] -> [b], whose slope at 0 is 0; NaN for a row with NaN."""
    squares = sum_event(x**2)
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def pull_of(name: str, velocity: Velocity, change: Callable) -> Velocity:
    """The velocity change(v, x, t [b], point), computed in float32 or better, with cond = a
    `SteeringCondition` of the point [b, *event] and the cond of `velocity`."""

    def apply(params, x, t, cond=None, *, key=None):
        point, cond = read_condition(name, cond, count_rows(name, x))
        check_same_shape(name, "the target", point, x)
        t = times_of(name, t, x)
        v = like_state(name, velocity.apply(params, x, t, cond, key=key), x)
        wide = [a.astype(float_dtype(x)) for a in (v, x, t, point)]
        return change(*wide).astype(v.dtype)

    return Velocity(steered_init(name, velocity), apply)
