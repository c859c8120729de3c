"""Grids: times [n + 1] of n steps, from exactly 0 (source) to exactly 1 (data), rising strictly, as float64 numpy arrays.

For `solvers.on_grid`, read backwards (`grid[::-1]`) to encode, and for `solvers.sample_sde`. A grid that was learned
or searched for is an array like any other; `1 - grid[::-1]` puts the small steps of one end at the other.
"""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

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


def uniform(n: int) -> np.ndarray:
    """n equal steps."""
    return np.arange(_steps("uniform", n) + 1) / n


def power(n: int, exponent: float = 2.0) -> np.ndarray:
    """t = u^exponent for uniform u: above 1 the steps are small near noise, below 1 near data. 2 is the quadratic grid."""
    if not 0 < exponent < math.inf:
        raise ValueError(f"grids.power: expected a finite exponent > 0, got {exponent}")
    return uniform(n) ** exponent


def cosine(n: int) -> np.ndarray:
    """t = (1 - cos(pi u)) / 2 for uniform u: small steps at both ends (Chebyshev points)."""
    return np.sin(np.pi / 2 * uniform(n)) ** 2


def shifted(grid: ArrayLike, factor: float) -> np.ndarray:
    """Every time of a grid shifted by `times.shift`: factor > 1 brings small steps near noise, as SD3 and FLUX do.

    `shifted(uniform(n), 3.0)` has the noise levels 1 - t of diffusers' `shift=3.0`, applied once."""
    return _ends("shifted", times.shift(np.asarray(grid, np.float64), factor))


def edm(
    n: int,
    schedule: Schedule = LINEAR,
    *,
    rho: float = 7.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> np.ndarray:
    """EDM's noise levels sigma / alpha = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,
    i = 0 ... n - 1, and then 0, as times of a path. The first is moved to t=0, from sigma_max to pure noise.

    Source: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", 2022.
    """
    levels = schedules.edm(sigma_min, sigma_max, rho)
    return matched(np.append(np.arange(_steps("edm", n)) / max(n - 1, 1), 1.0), levels, schedule)


def log_snr(
    n: int, schedule: Schedule = LINEAR, *, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> np.ndarray:
    """Equal steps of log(alpha / sigma), from -log(sigma_max) to -log(sigma_min), as times of a path; the two ends are moved
    to t=0 and t=1."""
    return matched(uniform(n), schedules.ve(sigma_min, sigma_max), schedule)


def matched(grid: ArrayLike, levels: Schedule, schedule: Schedule = LINEAR) -> np.ndarray:
    """The times at which `schedule` has the ratios alpha / sigma that `levels` has at the times of `grid`; the ends are
    moved to 0 and 1. Errors: ValueError where that doesn't rise strictly, times outside of what `schedule` reaches."""
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


def windows(knots: int | Times, n: int) -> np.ndarray:
    """Times [n + 1] of n steps that meet the knots (as in `perflow`), equal within a window, shared out evenly: where n is
    not a multiple of the windows, the first ones, near noise, have one more. Errors: ValueError for n below their number."""
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
