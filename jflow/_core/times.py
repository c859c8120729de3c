"""Times between the source and data: grids of [0, 1], and laws that are tried once."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jflow.types import TimePair

Times = Sequence[float] | np.ndarray
"""Times in [0, 1], one after another."""


def check_grid(name, grid, rising):
    """Raise unless grid is [n + 1] strictly monotone (rising) times; a traced grid has its shape
    checked only."""
    if len(np.shape(grid)) != 1 or np.shape(grid)[0] < 2:
        raise ValueError(
            f"{name}: expected a grid of at least 2 times, [n + 1], got shape"
            f" {list(np.shape(grid))}"
        )
    if not isinstance(grid, jax.core.Tracer):
        times = np.asarray(grid, np.float64)
        steps = np.diff(times)
        if not (np.all(steps > 0) or (np.all(steps < 0) and not rising)):
            kind = "rises strictly, from the source to data" if rising else "is strictly monotone"
            raise ValueError(f"{name}: expected a finite grid that {kind}, got {np.asarray(grid)}")
        if not (0 <= times.min() and times.max() <= 1):
            raise ValueError(
                f"{name}: expected times in [0, 1], from source to data, got {np.asarray(grid)}"
            )


def check_unit_grid(name, grid):
    """As `check_grid` of rising times, which go from 0 to 1."""
    check_grid(name, grid, rising=True)
    if not traced(grid):
        first, last = float(grid[0]), float(grid[-1])
        if (first, last) != (0, 1):
            raise ValueError(f"{name}: expected times from 0 to 1, got {first:g} to {last:g}")


def traced(*values) -> bool:
    """Whether any of them has no value yet."""
    return any(isinstance(value, jax.core.Tracer) for value in values)


def rising_times(name, grid):
    """Times [n + 1] from a number of equal steps from 0 to 1, or the rising times themselves,
    checked."""
    if np.ndim(grid) > 0:
        check_grid(name, grid, rising=True)
        return grid
    if isinstance(grid, bool) or int(grid) != grid or grid < 1:
        raise ValueError(
            f"{name}: expected a whole number of steps of at least 1, or times, got {grid}"
        )
    return np.linspace(0.0, 1.0, int(grid) + 1)


def unit_times(name, grid):
    """As `rising_times`, of times that go from 0 to 1."""
    times = rising_times(name, grid)
    if times[0] != 0 or times[-1] != 1:
        raise ValueError(f"{name}: expected times from 0 to 1, got {times[0]} to {times[-1]}")
    return times


def check_pairs(name: str, times: TimePair) -> None:
    """Raise unless a first draw of times is (t, r) with 0 <= t <= r <= 1; unchecked where it
    depends on traced values."""
    with jax.ensure_compile_time_eval():
        drawn = times(jax.random.key(0), 64)
    if any(isinstance(time, jax.core.Tracer) for time in drawn):
        return
    t, r = (np.asarray(time) for time in drawn)
    wrong = ~((t >= 0) & (t <= r) & (r <= 1))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: expected times (t, r) with 0 <= t <= r <= 1, from the source to data; a draw"
            f" has t={t[at]}, r={r[at]}"
        )


def check_steps(name: str, steps: Callable) -> None:
    """Raise unless a first draw of steps is (t, s) with 0 <= t < s <= 1; unchecked where it depends
    on traced values."""
    with jax.ensure_compile_time_eval():
        drawn = steps(jax.random.key(0), 64, {"step": jnp.zeros((), jnp.int32)})
    if any(isinstance(time, jax.core.Tracer) for time in drawn):
        return
    t, s = (np.asarray(time) for time in drawn)
    wrong = ~((t >= 0) & (t < s) & (s <= 1))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: expected steps (t, s) with 0 <= t < s <= 1; a draw has t={t[at]}, s={s[at]}"
        )


def partition(name: str, knots) -> np.ndarray:
    """Times [K + 1] that rise from 0 to 1: the knots themselves, or the ends of so many equal
    parts."""
    times = np.asarray(rising_times(name, knots) if np.ndim(knots) == 0 else knots, np.float64)
    if (
        times.ndim != 1
        or len(times) < 2
        or (times[0], times[-1]) != (0, 1)
        or not np.all(np.diff(times) > 0)
    ):
        raise ValueError(f"{name}: expected knots that rise strictly from 0 to 1, got {knots}")
    return times


def window_index(knots: np.ndarray, t):
    """The window of each t [b]: k where knots[k] <= t < knots[k + 1]."""
    return jnp.clip(
        jnp.searchsorted(jnp.asarray(knots, t.dtype), t, side="right") - 1, 0, len(knots) - 2
    )


def linear_between(f: Callable, knots: np.ndarray) -> Callable:
    """t [b] -> what runs linearly between the values of f at the knots (`partition`); at a knot
    with the slope after it."""

    def value(t):
        at = jnp.asarray(knots, t.dtype)
        values, k = f(at), window_index(knots, t)
        slope = (values[k + 1] - values[k]) / (at[k + 1] - at[k])
        return values[k] + (t - at[k]) * slope

    return value
