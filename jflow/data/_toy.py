"""Distributions in the plane to look at."""

import numpy as np

from jflow._core.seeds import generator


def moons(n: int, seed: int, *, noise: float = 0.05) -> dict[str, np.ndarray]:
    """Two half circles of radius 1 that face each other.

    The upper is centered at (0, 0), the lower at (1, 0.5).

    Args:
        n: How many rows.
        seed: Of the draw.
        noise: The standard deviation of the normal noise on both.

    Returns:
        {'x': float32 [n, 2], 'cond': int32 [n], which moon}.

    Examples:
        >>> from jflow import data
        >>> data.moons(100, seed=0)["x"].shape
        (100, 2)
    """
    rng = generator("moons", seed)
    moon = rng.integers(0, 2, n)
    angle = rng.uniform(0, np.pi, n)
    x = np.where(
        moon[:, None] == 0,
        np.stack([np.cos(angle), np.sin(angle)], 1),
        np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], 1),
    )
    return {
        "x": (x + noise * rng.standard_normal((n, 2))).astype(np.float32),
        "cond": moon.astype(np.int32),
    }


def eight_gaussians(
    n: int, seed: int, *, radius: float = 5.0, variance: float = 0.1
) -> dict[str, np.ndarray]:
    """Eight isotropic Gaussians at equal angles on a circle.

    Args:
        n: How many rows.
        seed: Of the draw.
        radius: Of the circle.
        variance: Of each Gaussian, in each coordinate.

    Returns:
        {'x': float32 [n, 2], 'cond': int32 [n], which one}.
    """
    rng = generator("eight_gaussians", seed)
    mode = rng.integers(0, 8, n)
    angle = mode * (np.pi / 4)
    center = radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    x = center + np.sqrt(variance) * rng.standard_normal((n, 2))
    return {"x": x.astype(np.float32), "cond": mode.astype(np.int32)}


def checkerboard(n: int, seed: int) -> dict[str, np.ndarray]:
    """Uniform on the 8 dark squares of a 4 x 4 board over [-4, 4]^2, of density 1/32 there.

    Args:
        n: How many rows.
        seed: Of the draw.

    Returns:
        {'x': float32 [n, 2]}.
    """
    rng = generator("checkerboard", seed)
    column = rng.integers(0, 4, n)
    row = 2 * rng.integers(0, 2, n) + column % 2
    corner = 2.0 * np.stack([column, row], 1) - 4
    return {"x": (corner + rng.uniform(0, 2, (n, 2))).astype(np.float32)}
