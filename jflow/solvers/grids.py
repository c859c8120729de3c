"""Grids: times [n + 1] of n steps, from exactly 0 (source) to exactly 1 (data), rising strictly.

They are float64 numpy arrays, for `solvers.on_grid`, read backwards (`grid[::-1]`) to encode, and
for `solvers.sample_sde`. A grid that was learned or searched for is an array like any other; `1 -
grid[::-1]` puts the small steps of one end at the other.
"""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow import times
from jflow._core.times import Times, check_grid, partition
from jflow.paths import LINEAR, Schedule, matched_time, schedules

__all__ = [
    "cosine",
    "edm",
    "log_snr",
    "matched",
    "power",
    "shifted",
    "uniform",
    "windows",
]


def uniform(n: int) -> Float[np.ndarray, " times"]:
    """Equal steps.

    Args:
        n: the number of steps, at least 1.

    Returns:
        The times, [n + 1].

    Raises:
        ValueError: n is below 1.
        TypeError: n is not an integer.

    Examples:
        >>> from jflow import solvers
        >>> solvers.grids.uniform(4).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return np.arange(_steps("uniform", n) + 1) / n


def power(n: int, exponent: float = 2.0) -> Float[np.ndarray, " times"]:
    """A power of equal steps: t = u^exponent for uniform u.

    Above 1 the steps are small near noise, below 1 near data. 2 is the quadratic grid.

    Args:
        n: the number of steps, at least 1.
        exponent: above 0.

    Returns:
        The times, [n + 1].

    Raises:
        ValueError: n is below 1, or exponent is not finite and above 0.
        TypeError: n is not an integer.
    """
    if not 0 < exponent < math.inf:
        raise ValueError(f"grids.power: expected a finite exponent > 0, got {exponent}")
    return uniform(n) ** exponent


def cosine(n: int) -> Float[np.ndarray, " times"]:
    """Small steps at both ends: t = (1 - cos(pi u)) / 2 for uniform u (Chebyshev points).

    Args:
        n: the number of steps, at least 1.

    Returns:
        The times, [n + 1].

    Raises:
        ValueError: n is below 1.
        TypeError: n is not an integer.
    """
    return np.sin(np.pi / 2 * uniform(n)) ** 2


def shifted(grid: Times | ArrayLike, factor: float) -> Float[np.ndarray, " times"]:
    """A grid whose times are shifted by `times.shift`, as SD3 and FLUX do.

    factor > 1 brings small steps near noise. `shifted(uniform(n), 3.0)` has the noise levels 1 - t
    of diffusers' `shift=3.0`, applied once.

    Args:
        grid: rising times [n + 1] from 0 to 1.
        factor: above 0.

    Returns:
        The times, [n + 1].

    Raises:
        ValueError: factor is not finite and above 0, or the times do not rise.

    Examples:
        >>> from jflow import solvers
        >>> solvers.grids.shifted(solvers.grids.uniform(2), 3.0).tolist()
        [0.0, 0.25, 1.0]

    References:
        Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*,
            2024, arXiv:2403.03206.
    """
    return _ends("shifted", times.shift(np.asarray(grid, np.float64), factor))


def edm(
    n: int,
    schedule: Schedule = LINEAR,
    *,
    rho: float = 7.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Float[np.ndarray, " times"]:
    """The noise levels of EDM, as times of a path.

        sigma / alpha = (high + i / (n - 1) (low - high))^rho
        high = sigma_max^(1/rho),      low = sigma_min^(1/rho)

    for i = 0 ... n - 1, and then 0. The first is moved to t=0, from sigma_max to pure noise.

    Args:
        n: the number of steps, at least 1.
        schedule: the path; the default is the linear one.
        rho: the exponent; the larger, the smaller the steps near data.
        sigma_min: the lowest noise level before 0.
        sigma_max: the highest noise level.

    Returns:
        The times, [n + 1].

    Raises:
        ValueError: n is below 1, or unless 0 < sigma_min < sigma_max and rho > 0.
        TypeError: n is not an integer.

    References:
        Karras, Aittala, Aila, Laine, *Elucidating the Design Space of Diffusion-Based Generative
            Models*, 2022, arXiv:2206.00364.
    """
    levels = schedules.edm(sigma_min, sigma_max, rho)
    return matched(np.append(np.arange(_steps("edm", n)) / max(n - 1, 1), 1.0), levels, schedule)


def log_snr(
    n: int, schedule: Schedule = LINEAR, *, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Float[np.ndarray, " times"]:
    """Equal steps of log(alpha / sigma), as times of a path.

    They go from -log(sigma_max) to -log(sigma_min); the two ends are moved to t=0 and t=1.

    Args:
        n: the number of steps, at least 1.
        schedule: the path; the default is the linear one.
        sigma_min: the noise level sigma / alpha at the end.
        sigma_max: the noise level sigma / alpha at the start.

    Returns:
        The times, [n + 1].

    Raises:
        ValueError: n is below 1, or unless 0 < sigma_min < sigma_max.
        TypeError: n is not an integer.

    Examples:
        >>> from jflow import solvers
        >>> grid = solvers.grids.log_snr(2, sigma_min=0.01, sigma_max=100.0)
        >>> grid.round(6).tolist()  # alpha = sigma in the middle
        [0.0, 0.5, 1.0]
    """
    return matched(uniform(n), schedules.ve(sigma_min, sigma_max), schedule)


def matched(
    grid: Times | ArrayLike, levels: Schedule, schedule: Schedule = LINEAR
) -> Float[np.ndarray, " times"]:
    """The times at which one path has the noise levels that another has on a grid.

    They are the times at which `schedule` has the ratios alpha / sigma that `levels` has at the
    times of `grid`; the ends are moved to 0 and 1.

    Args:
        grid: rising times [n + 1] of `levels`.
        levels: the schedule of the noise levels, such as `paths.schedules.edm()`.
        schedule: the path whose times are wanted; the default is the linear one.

    Returns:
        The times, [n + 1].

    Raises:
        ValueError: the result does not rise strictly, where `schedule` does not reach the ratios.
    """
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        t, _ = matched_time(schedule, levels, jnp.asarray(grid, jnp.float64))
        return _ends("matched", np.array(t))


def _ends(name, grid):
    """The grid with its ends at 0 and 1, checked."""
    grid = np.array(grid, np.float64)
    if grid.ndim == 1 and grid.size:
        grid[[0, -1]] = 0, 1
    check_grid(f"grids.{name}", grid, rising=True)
    return grid


def _steps(name, n):
    try:
        steps = operator.index(n)
    except TypeError:
        raise TypeError(f"grids.{name}: expected n to be an integer, got {n!r}") from None
    if isinstance(n, bool) or steps < 1:
        raise ValueError(f"grids.{name}: expected at least 1 step, got {n}")
    return steps


def windows(knots: int | Times, n: int) -> Float[np.ndarray, " times"]:
    """Steps that meet given knots, equal within a window and shared out evenly among windows.

    Where n is not a multiple of the windows, the first ones, near noise, have one more.

    Args:
        knots: times [K + 1] that rise strictly from 0 to 1, or the number K of equal windows, as in
            `losses.perflow`.
        n: the number of steps, at least K.

    Returns:
        The times, [n + 1].

    Raises:
        ValueError: n is below the number of windows, or knots do not rise strictly from 0 to 1.

    Examples:
        >>> from jflow import solvers
        >>> solvers.grids.windows([0.0, 0.5, 1.0], 3).tolist()
        [0.0, 0.25, 0.5, 1.0]
    """
    times = partition("windows", knots)
    windows = len(times) - 1
    if isinstance(n, bool) or int(n) != n or n < windows:
        raise ValueError(
            f"windows: expected n to be at least {windows}, one step a window, got {n}"
        )
    counts = [n // windows + (k < n % windows) for k in range(windows)]
    parts = [
        np.linspace(a, b, m, endpoint=False)
        for a, b, m in zip(times[:-1], times[1:], counts, strict=True)
    ]
    return np.concatenate([*parts, [1.0]])
