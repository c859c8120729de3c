"""What a steered velocity is told: the wish, beside the condition of the velocity itself."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow._core.checks import check_cond, count_rows, described
from jflow._core.numbers import check_number, number_at
from jflow.types import Array, Cond, NumberOrFunction, Velocity

__all__ = ["SteeringCondition"]


class SteeringCondition(NamedTuple):
    """What the samples of a steered velocity shall answer, beside its condition.

    It is data and not a part of the velocity, so that a jitted sampler takes other measurements
    without being compiled anew. All leaves lead with the rows of x, or with 1 for all rows.

    Attributes:
        target: the measurement y, or whatever else the loss compares with: an image, a label.
        cond: the condition that the velocity takes.
    """

    target: Any
    cond: Any = None


def read_condition(name: str, cond: Cond, n: int) -> tuple[Any, Cond]:
    """(target, cond), each with n rows."""
    if not isinstance(cond, SteeringCondition):
        raise ValueError(
            f"{name}: expected cond to be a steering.SteeringCondition(target, cond), got"
            f" {described(cond)}"
        )
    return jax.tree.map(jnp.asarray, check_cond(name, cond, n))


def check_window(name: str, window: tuple[float, float]) -> tuple[float, float]:
    """Raise unless window is (first, last) with 0 <= first < last <= 1."""
    try:
        first, last = map(float, window)
        right = 0 <= first < last <= 1
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(
            f"{name}: expected a window (first, last) of times with 0 <= first < last <= 1, got"
            f" {window!r}"
        )
    return first, last


def check_scale(name: str, scale: NumberOrFunction) -> None:
    """Raise for a number that is negative or not finite."""
    check_number(name, "scale", scale, ">= 0 and finite", lambda s: 0 <= s < math.inf)


def scale_at(name: str, scale: NumberOrFunction, window: tuple[float, float], t: Array) -> Array:
    """The scale of each row [b], 0 outside the window."""
    value = number_at(name, "scale(t)", scale, t, like=t)
    return jnp.where((t >= window[0]) & (t <= window[1]), value, jnp.zeros_like(value))


def steered_init(name: str, velocity: Velocity) -> Callable:
    """The init of a velocity that is told a `SteeringCondition`."""

    def init(key, x, t, cond=None):
        return velocity.init(key, x, t, read_condition(name, cond, count_rows(name, x))[1])

    return init
