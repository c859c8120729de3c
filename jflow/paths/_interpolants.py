"""Stochastic interpolants x_t = source(t) x0 + data(t) x1 + noise(t) z, z standard normal.

They join two arbitrary distributions. The papers call the three functions alpha, beta and gamma;
here they are named by what they multiply (a `Schedule` calls the factor of the data alpha). x0 and
x1 may be coupled in any way, by optimal transport or by a corruption of x1: z is independent of
both, so with

    velocity  v(x, t) = E[source' x0 + data' x1 + noise' z | x_t = x]
    denoiser  eta(x, t) = E[z | x_t = x]

the score of p_t is -eta / noise(t) whatever the source is. One network of both
(`losses.interpolant_matching`) samples by the ODE dx = v dt and by every SDE dx = (v + w score) dt
+ sqrt(2 w) dW.

References:
    Albergo, Boffi, Vanden-Eijnden, *Stochastic Interpolants: A Unifying Framework for Flows and
        Diffusions*, 2023, arXiv:2303.08797.
    Albergo, Goldstein, Boffi, Ranganath, Vanden-Eijnden, *Stochastic Interpolants with
        Data-Dependent Couplings*, 2024, arXiv:2310.03725.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to
from jflow._core.checks import like_state, need_key, rows
from jflow.paths._affine import LINEAR, Schedule, check_times
from jflow.paths.schedules import inside
from jflow.types import Array, Field, Key, Path, Velocity

__all__ = [
    "Interpolant",
    "denoiser_to_score",
    "interpolant",
    "interpolant_score",
    "interpolant_velocity",
    "schroedinger_bridge",
    "with_noise",
]


class Interpolant(NamedTuple):
    """The three factors of a stochastic interpolant, as functions of time, t [b] -> [b].

    The state is x_t = source(t) x0 + data(t) x1 + noise(t) z with z standard normal. Any functions
    with these ends do: derivatives are taken by jvp.

    Attributes:
        source: the factor of x0, from 1 to 0.
        data: the factor of x1, from 0 to 1.
        noise: the factor of z, 0 at both ends and positive between.
    """

    source: Callable[[Array], Array]
    data: Callable[[Array], Array]
    noise: Callable[[Array], Array]


def with_noise(schedule: Schedule, noise: Callable[[Array], Array]) -> Interpolant:
    """The interpolant of the two functions of a schedule and a noise.

    Args:
        schedule: sigma is the factor of the source, alpha that of the data.
        noise: the factor of z, t [b] -> [b], 0 at both ends.

    Returns:
        Interpolant: for `interpolant`, which makes a path of it.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import paths
        >>> factors = paths.with_noise(paths.LINEAR, lambda t: 0.5 * jnp.sin(jnp.pi * t) ** 2)
        >>> x0, x1, t = jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.array([0.0, 1.0])
        >>> x = paths.interpolant(factors).point(x0, x1, t, key=jax.random.key(0))
        >>> print(np.asarray(x).round(3))  # no noise at the ends
        [[0. 0. 0.]
         [1. 1. 1.]]
    """
    return Interpolant(schedule.sigma, schedule.alpha, noise)


def schroedinger_bridge(sigma: float = 1.0) -> Interpolant:
    """The interpolant of Brownian bridges.

        x_t = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) z

    With pairs of the entropic optimal transport of cost |x1 - x0|^2 and regularization 2 sigma^2
    the marginals are those of the Schroedinger bridge of sigma dW; with other pairs only the two
    ends are.

    The slope of the noise is infinite at both ends, where t is taken one machine epsilon inside.
    The variance of the regression grows like 1 / t and 1 / (1 - t): train with `times.uniform(eps,
    1 - eps)`.

    Args:
        sigma: the scale of the Brownian motion, above 0.

    Returns:
        Interpolant: for `interpolant`, which makes a path of it.

    Raises:
        ValueError: sigma is not finite and above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> paths.schroedinger_bridge(2.0).noise(jnp.array([0.5])).tolist()
        [1.0]

    References:
        Tong, Malkin, Fatras, Atanackovic, Zhang, Huguet, Wolf, Bengio, *Simulation-Free
            Schroedinger Bridges via Score and Flow Matching*, 2024, arXiv:2307.03672.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"schroedinger_bridge: expected a finite sigma > 0, got {sigma}")
    sigma = float(sigma)  # a number of numpy's would bring float64 along

    def noise(t):
        t = inside(t, start=True, end=True)
        return sigma * jnp.sqrt(t * (1 - t))

    return with_noise(LINEAR, noise)


def interpolant(coefficients: Interpolant, *, tolerance: float = 1e-2) -> Path:
    """The path of a stochastic interpolant.

        point   source x0 + data x1 + noise z        target   source' x0 + data' x1 + noise' z

    z is drawn from the key, which both need; the same key gives both the same z (`draw_noise`).

    Args:
        coefficients: source, data and noise, such as `schroedinger_bridge()`.
        tolerance: how far the functions may be from their ends (unchecked inside jit).

    Returns:
        Path: point and target, (x0 [b, *event], x1 [b, *event], t [b], *, key) -> [b, *event]. They
            raise a ValueError without a key, and for times outside [0, 1] where these are known.

    Raises:
        ValueError: the functions do not meet their ends to within tolerance, or do not map [b] to
            [b].

    References:
        Albergo, Boffi, Vanden-Eijnden, *Stochastic Interpolants: A Unifying Framework for Flows and
            Diffusions*, 2023, arXiv:2303.08797.
    """
    _check_ends(coefficients, tolerance)

    def point(x0, x1, t, *, key=None):
        return _sum(x0, x1, draw_noise(key, x1), *_values(coefficients, t, x1)[0])

    def target(x0, x1, t, *, key=None):
        return _sum(x0, x1, draw_noise(key, x1), *_values(coefficients, t, x1)[1])

    return Path(point, target)


def draw_noise(key: Key, x1: Float[Array, "b *event"]) -> Float[Array, "b *event"]:
    """The noise z that the point and the target of an interpolant draw under a key.

    Args:
        key: a key.
        x1: the data, [b, *event], for their shape and type.

    Returns:
        z, standard normal, [b, *event].

    Raises:
        ValueError: the key is None.
    """
    need_key("interpolant", key)
    return jax.random.normal(key, x1.shape, x1.dtype)


def denoiser_to_score(
    z: Float[Array, "b *event"], t: ArrayLike, coefficients: Interpolant
) -> Float[Array, "b *event"]:
    """The score of a stochastic interpolant, from the denoiser.

        grad log p_t(x) = -E[z | x_t = x] / noise(t)

    It diverges at the ends, where noise = 0.

    Args:
        z: the prediction of z, [b, *event].
        t: times in [0, 1], [b] or a scalar.
        coefficients: the interpolant.

    Returns:
        The score, [b, *event].
    """
    return -z / expand_to(coefficients.noise(rows(t, z.shape[0])), z).astype(z.dtype)


def interpolant_velocity(field: Field) -> Velocity:
    """The velocity of a field that returns {'velocity', 'noise'}.

    Args:
        field: a field trained by `losses.interpolant_matching`.

    Returns:
        Velocity: its 'velocity', with the params and the init of `field`.
    """

    def apply(params, x, t, cond=None, *, key=None):
        return like_state(
            "interpolant_velocity", field.apply(params, x, t, cond, key=key)["velocity"], x
        )

    return Velocity(field.init, apply)


def interpolant_score(field: Field, coefficients: Interpolant, *, margin: float = 1e-3) -> Field:
    """The score of a field that returns {'velocity', 'noise'}: -noise / noise(t).

    At the ends that is 0 / 0: field and noise are taken at t in [margin, 1 - margin]. A sampler is
    `solvers.euler_maruyama(velocity, w, score=interpolant_score(field, coefficients).apply)`.

    Args:
        field: a field trained by `losses.interpolant_matching`.
        coefficients: the interpolant that it was trained on.
        margin: how far from the ends the field is evaluated, in [0, 0.5).

    Returns:
        Field: the score, [b, *event], with the params and the init of `field`.

    Raises:
        ValueError: margin is outside [0, 0.5).
    """
    if not 0 <= margin < 0.5:
        raise ValueError(f"interpolant_score: expected 0 <= margin < 0.5, got {margin}")
    margin = float(margin)

    def apply(params, x, t, cond=None, *, key=None):
        t = jnp.clip(rows(t, x.shape[0]), margin, 1 - margin)
        z = like_state("interpolant_score", field.apply(params, x, t, cond, key=key)["noise"], x)
        return denoiser_to_score(z, t, coefficients)

    return Field(field.init, apply)


def _values(coefficients, t, x):
    """The three functions and their derivatives at t, shaped to multiply x."""
    check_times(t)
    t = jnp.asarray(t, jnp.result_type(x)) if jnp.ndim(t) == 0 else t
    pairs = [jax.jvp(f, (t,), (jnp.ones_like(t),)) for f in coefficients]
    return [expand_to(value, x) for value, _ in pairs], [expand_to(slope, x) for _, slope in pairs]


def _sum(x0, x1, z, source, data, noise):
    return source * x0 + data * x1 + noise * z


def _check_ends(coefficients, tolerance):
    ends = {"source": (1, 0), "data": (0, 1), "noise": (0, 0)}
    for (name, expected), f in zip(ends.items(), coefficients, strict=True):
        given = jnp.asarray(f(jnp.asarray([0.0, 1.0])))
        if given.shape != (2,):
            raise ValueError(
                f"interpolant: expected {name} to map t [b] to [b], got shape "
                f"{list(given.shape)} for [2]"
            )
        if not isinstance(given, jax.core.Tracer) and not np.allclose(
            given, expected, rtol=0, atol=tolerance
        ):
            raise ValueError(
                f"interpolant: expected {name}(0), {name}(1) = {expected[0]}, "
                f"{expected[1]} to within {tolerance}, "
                f"got {float(given[0]):.4g}, {float(given[1]):.4g}"
            )
