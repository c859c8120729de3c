"""A number, or a function that gives one for each row: how it is checked and evaluated."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jflow._core.checks import check_same_shape
from jflow.types import Array, NumberOrFunction


def check_number(
    name: str,
    what: str,
    number: NumberOrFunction,
    allowed: str,
    within: Callable[[Any], bool],
    of: str = "t",
) -> None:
    """Raise ValueError unless it is a function, of `of`, or a number for which `within` holds."""
    if callable(number):
        return
    try:
        right = not isinstance(number, bool) and bool(within(number))
    except TypeError:
        right = False
    if not right:
        raise ValueError(f"{name}: expected a function of {of} or {what} {allowed}, got {number!r}")


def number_at(name: str, what: str, number: NumberOrFunction, *args, like: Array) -> Array:
    """number(*args), which has to be shaped like `like`, or the number in its shape."""
    value = number(*args) if callable(number) else jnp.full_like(like, number)
    return check_same_shape(name, what, value, like)
