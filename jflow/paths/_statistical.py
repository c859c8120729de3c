"""Bridges on the statistical manifold of tokens: the sphere of square roots of probabilities.

A probability p of K classes is the unit vector sqrt(p); class k is the corner e_k. Given the token,
a bridge walks from a start to its corner,

    dX = sigma^2 / V log_X(e_k) dt + sigma dB,      V(t) = int_t^1 sigma^2

and given nothing the drift is the mean over the posterior of the token. The start is the corner of
a mask, one more class, or the middle of all classes. By symmetry the law of the bridge at t depends
on two numbers, which are simulated once in three dimensions, whatever K is: training draws X_t from
a normal on the sphere with these moments, and simulates nothing.

References:
    Jo, Hwang, *Continuous Diffusion Model for Language Modeling*, 2025, arXiv:2502.11564.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jflow._core.arrays import expand_to
from jflow._core.checks import check_whole, need_key
from jflow._core.keys import same_draws
from jflow._core.numbers import check_number, number_at
from jflow._core.seeds import generator
from jflow._core.simplex import sphere_exp, to_tangent
from jflow.types import Array, Key, NumberOrFunction, Path

__all__ = ["StatisticalBridge", "corner_log", "radial_moments", "statistical_bridge"]


class StatisticalBridge(NamedTuple):
    """A bridge from a mask or the middle to the corners of tokens, as `statistical_bridge` makes.

    Attributes:
        path: the path of training. point (x0, x1, t, *, key) -> X_t [b, *sites, D] reads of x0
            nothing and of x1 [b, *sites, K] the one-hot tokens; target is the drift given the
            token, which diverges at t=1.
        start: (key, shape) -> the states [*shape, D] at t=0.
        noise: sigma, t -> sigma(t).
        remaining: V, t -> int_t^1 sigma^2.
        num_classes: the number K of tokens.
        size: the number D of coordinates, K, or K + 1 where there is a mask.
    """

    path: Path
    start: Callable[[Key, tuple[int, ...]], Array]
    noise: Callable[[Array], Array]
    remaining: Callable[[Array], Array]
    num_classes: int
    size: int


def statistical_bridge(
    num_classes: int,
    *,
    noise: tuple[float, float] = (1.0, 1.0),
    mask: NumberOrFunction = 1.0,
    steps: int = 256,
    draws: int = 4096,
) -> StatisticalBridge:
    """The bridge of the language model on the statistical manifold.

        sigma(t) = noise[0]^(1 - t) noise[1]^t
        X_t ~ exp_m(rho(t) e),  m at the angle theta(t) from the corner on the way to the start

    with e standard normal in the tangent space at m, and theta, rho of `radial_moments`. The mean
    of X_t is exact up to their simulation; that X_t is normal around it is an approximation, which
    is best for little noise and at both ends.

    Args:
        num_classes: the number K of tokens, at least 2.
        noise: sigma at t=0 and at t=1, above 0. The noise has K dimensions, and passes around the
            sphere where sigma sqrt(K) is well above 2.
        mask: the share of tokens whose start is the mask, the others start in the middle: a number
            in [0, 1], or t [b] -> [b], at t the share of the states that training draws there, at 0
            that of samples. 0 is the uniform start alone, without a coordinate for the mask. A
            share that changes in time is the paper's mixture; a constant one is the law of one
            process.
        steps: of the simulation of the moments.
        draws: of the simulation of the moments, from a fixed seed.

    Returns:
        StatisticalBridge: the path, the start, and what `solvers.bridge_step` and
            `losses.bridge_drift` need.

    Raises:
        ValueError: an argument is outside its range.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> bridge = paths.statistical_bridge(3, steps=16, draws=64)
        >>> bridge.start(jax.random.key(0), (1,)).tolist()  # the mask
        [[0.0, 0.0, 0.0, 1.0]]
        >>> x1 = jax.nn.one_hot(jnp.array([[0, 2]]), 3)
        >>> x = bridge.path.point(None, x1, jnp.ones(1), key=jax.random.key(0))
        >>> jnp.argmax(x, axis=-1).tolist(), x.shape
        ([[0, 2]], (1, 2, 4))

    References:
        Jo, Hwang, *Continuous Diffusion Model for Language Modeling*, 2025, arXiv:2502.11564.
    """
    name = "statistical_bridge"
    check_whole(name, 2, num_classes=num_classes)
    check_whole(name, steps=steps, draws=draws)
    first, last = (float(sigma) for sigma in noise)
    if not (0 < first < math.inf and 0 < last < math.inf):
        raise ValueError(f"{name}: expected noise of two numbers above 0, got {noise}")
    check_number(name, "mask", mask, "in [0, 1]", lambda share: 0 <= share <= 1)
    masked = callable(mask) or bool(np.asarray(mask) > 0)
    size = num_classes + 1 if masked else num_classes

    def sigma(t):
        return first * jnp.exp(math.log(last / first) * t)

    def remaining(t):
        rate = 2 * math.log(last / first)
        grown = 1 - t if rate == 0 else jnp.expm1(rate * (1 - t)) / rate
        return sigma(t) ** 2 * grown

    middle = np.append(np.full(num_classes, num_classes**-0.5), np.zeros(size - num_classes))
    starts, tables = [middle], []
    if masked:
        starts.append(np.eye(size)[-1])
    for at in starts:
        angle = math.acos(float(at[0]))
        tables.append(radial_moments(size - 1, angle, noise=noise, steps=steps, draws=draws))
    times = np.linspace(0.0, 1.0, steps + 1)

    def choose(key, t, shape, dtype):
        """1 where a token starts at the mask, [*shape]."""
        share = number_at(name, "mask(t)", mask, t, like=t)
        drawn = jax.random.uniform(key, shape, dtype)
        return (drawn < expand_to(share.astype(dtype), drawn)).astype(jnp.int32)

    def start(key, shape):
        need_key(name, key)
        first_share = jnp.zeros(shape[:1], jnp.float32)
        chosen = choose(key, first_share, shape, first_share.dtype) if masked else 0
        return jnp.asarray(np.stack(starts), first_share.dtype)[
            jnp.broadcast_to(jnp.asarray(chosen), shape)
        ]

    def point(x0, x1, t, *, key=None):
        need_key(name, key)
        choose_key, noise_key = jax.random.split(key)
        shape, dtype = x1.shape[:-1], x1.dtype
        corner = _padded(x1, size)
        chosen = choose(choose_key, t, shape, dtype) if masked else jnp.zeros(shape, jnp.int32)
        read = [
            jnp.stack([jnp.interp(t, times, table[i]).astype(dtype) for table in tables], axis=-1)
            for i in (0, 1)
        ]
        theta, rho = (
            jnp.take_along_axis(
                jnp.broadcast_to(
                    moment.reshape(t.shape + (1,) * (len(shape) - 1) + moment.shape[-1:]),
                    (*shape, len(tables)),
                ),
                chosen[..., None],
                axis=-1,
            )
            for moment in read
        )
        away = jnp.asarray(np.stack(starts), dtype)[chosen]
        away = away - jnp.sum(away * corner, axis=-1, keepdims=True) * corner
        away = away / jnp.linalg.norm(away, axis=-1, keepdims=True)
        mean = jnp.cos(theta) * corner + jnp.sin(theta) * away
        e = jax.random.normal(noise_key, mean.shape, dtype)
        return sphere_exp(mean, rho * to_tangent(mean, e))

    def target(x0, x1, t, *, key=None):
        x = point(x0, x1, t, key=same_draws(key))
        return expand_to(sigma(t) ** 2 / remaining(t), x) * corner_log(x, x1)

    return StatisticalBridge(Path(point, target), start, sigma, remaining, num_classes, size)


def corner_log(x: Float[Array, "*sites D"], p: Float[Array, "*sites K"]) -> Float[Array, "..."]:
    """The mean over classes of the logarithm map from a point of the sphere to the corners.

        sum_k p_k log_x(e_k) = w - <w, x> x,      w_k = p_k arccos(x_k) / sqrt(1 - x_k^2)

    Args:
        x: unit vectors, [*sites, D].
        p: weights of the first K corners, [*sites, K] with K <= D.

    Returns:
        Tangent vectors at x, [*sites, D].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> paths.corner_log(jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])).round(4)
        Array([1.5708, 0.    ], dtype=float32)
    """
    w = _padded(p.astype(x.dtype) * _stretch(x[..., : p.shape[-1]]), x.shape[-1])
    return to_tangent(x, w)


def _stretch(c):
    """arccos(c) / sqrt(1 - c^2), by its series near c = 1."""
    near = c > 1 - 1e-3
    gap = 1 - c
    series = 1 + gap / 3 + 2 * gap**2 / 15 + 2 * gap**3 / 35
    safe = jnp.clip(jnp.where(near, 0.0, c), -1 + 1e-6, 1.0)
    return jnp.where(near, series, jnp.arccos(safe) / jnp.sqrt((1 - safe) * (1 + safe)))


def _padded(x, size):
    """x [..., k] with zeros up to `size` numbers."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def radial_moments(
    dim: int,
    angle: float,
    *,
    noise: tuple[float, float] = (1.0, 1.0),
    steps: int = 256,
    draws: int = 4096,
) -> Float[np.ndarray, "2 times"]:
    """The moments of a bridge on the sphere, as its law is radially symmetric about the geodesic.

        E X_t = R (cos(theta) e + sin(theta) u),      E cos(rho |normal of dim numbers|) = R

    with e the end of the bridge and u the tangent there towards its start. X is simulated as its
    coordinates along e, along u, and the length of the rest, which is a Markov process of three
    numbers in any dimension. A step is that of the flat bridge, along a geodesic.

    Args:
        dim: the dimension of the sphere, at least 1.
        angle: the distance of the start from the end, in (0, pi), in radians.
        noise: sigma at t=0 and at t=1; in between its logarithm is linear.
        steps: the number of equal steps.
        draws: the number of simulated bridges, from a fixed seed.

    Returns:
        (theta, rho), [2, steps + 1], in radians, at times that are equally spaced from 0 to 1.

    Raises:
        ValueError: an argument is outside its range.

    Examples:
        >>> import math
        >>> from jflow import paths
        >>> theta, rho = paths.radial_moments(3, math.pi / 2, steps=8, draws=64)
        >>> theta[[0, -1]].round(4).tolist(), rho[[0, -1]].round(4).tolist()
        ([1.5708, 0.0], [0.0, 0.0])

    References:
        Jo, Hwang, *Continuous Diffusion Model for Language Modeling*, 2025, arXiv:2502.11564. The
            process of three numbers is ours.
    """
    check_whole("radial_moments", dim=dim, steps=steps, draws=draws)
    if not 0 < angle < math.pi:
        raise ValueError(f"radial_moments: expected an angle in (0, pi), got {angle}")
    rng = generator("radial moments", dim)
    rate = 2 * math.log(noise[1] / noise[0])
    times = np.linspace(0, 1, steps + 1)
    grown = 1 - times if rate == 0 else np.expm1(rate * (1 - times)) / rate
    left = noise[0] ** 2 * np.exp(rate * times) * grown
    x = np.tile([[math.cos(angle)], [math.sin(angle)], [0.0]], (1, draws))
    means = [x.mean(1)]
    for before, after in zip(left[:-1], left[1:], strict=True):
        e = rng.normal(size=(3, draws))
        if dim == 1:
            e[2] = 0
        rest = np.sqrt(rng.chisquare(dim - 2, draws)) if dim > 2 else np.zeros(draws)
        std = math.sqrt(max((before - after) * after / before, 0.0))
        c = np.clip(x[0], -1 + 1e-9, 1 - 1e-9)
        pull = np.arccos(c) / np.sqrt(1 - c**2) * (1 - after / before)
        v = -pull * c * x + std * (e - (e * x).sum(0) * x)
        v[0] += pull
        length = np.sqrt((v**2).sum(0) + (std * rest) ** 2)
        along = np.sinc(length / np.pi)
        x = np.cos(length) * x + along * v
        x[2] = np.hypot(x[2], along * std * rest)
        x /= np.sqrt((x**2).sum(0))
        means.append(x.mean(1))
    along, aside, _ = np.stack(means, 1)
    along[-1], aside[-1] = 1.0, 0.0
    lengths = np.sqrt(rng.chisquare(dim, 4096))
    spreads = np.linspace(0, 4 / math.sqrt(dim), 2001)
    cosines = np.array([np.cos(spread * lengths).mean() for spread in spreads])
    falling = slice(0, int(np.argmin(cosines)) + 1)
    radius = np.clip(np.hypot(along, aside), 0, 1)
    rho = np.interp(-radius, -cosines[falling], spreads[falling])
    return np.stack([np.arctan2(aside, along), rho])
