"""Adapters: another schedule or another time convention for a network that is trained already."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_state, rows
from jflow._core.implicit import monotone_root
from jflow.paths._affine import LINEAR, Schedule, coefficients, data_to_velocity, noise_to_velocity
from jflow.paths.schedules import cosine, inside
from jflow.types import Array, Field, Velocity

__all__ = [
    "from_edm",
    "from_noise_time",
    "from_sigma",
    "from_trigonometric",
    "matched_time",
    "reschedule",
    "to_trigonometric",
]


def reschedule(velocity: Velocity, trained: Schedule, new: Schedule) -> Velocity:
    """The velocity on another path, from one that was trained on a given path.

    A state of one path is a state of the other, scaled: x_new(r) = c x_trained(t), with t and c of
    `matched_time`. So, with primes for d/dr,

        U(x, r) = (c' / c) x + c t' u(x / c, t).

    With exact velocities both flows end in the same place: x0 at r=0 goes with x0 / c(0) at t=0.
    Where `new` has more noise or less than `trained` ever saw, t stays at that end, t' = 0, and x
    is only scaled. r is taken at most one machine epsilon from the ends, where t' or u may be
    infinite: everything is finite there. The score scales too, by 1 / c.

    Args:
        velocity: a velocity on the path of `trained`; its states may be pytrees.
        trained: the schedule it was trained on.
        new: the schedule of the path to sample along.

    Returns:
        Velocity: the velocity on the path of `new`, with the params and the init of `velocity`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> cosine = paths.reschedule(velocity, paths.LINEAR, paths.schedules.cosine())
        >>> x, t = jnp.array([[1.0]]), jnp.array([0.5])  # x / c is at rest and c = 2 sin(pi / 4)
        >>> round(abs(float(cosine.apply({}, x, t)[0, 0])), 4)  # c' = 0 in the middle
        0.0

    References:
        Shaul et al., *Bespoke Solvers for Generative Flow Models*, 2023, arXiv:2310.19075 (the
            scale-time change).
    """

    def apply(params, x, r, cond=None, *, key=None):
        leaves = jax.tree.leaves(x)
        r = inside(rows(r, leaves[0].shape[0]).astype(float_dtype(*leaves)), start=True, end=True)
        t, c = matched_time(trained, new, r)
        turn, growth = _rates(new, r)
        trained_turn, trained_growth = _rates(trained, t)
        speed = jnp.where((t > 0) & (t < 1), turn / trained_turn, 0)
        rate = growth - speed * trained_growth

        def change(x, u):
            return (expand_to(rate, x) * x + expand_to(c * speed, x) * u).astype(x.dtype)

        u = velocity.apply(
            params,
            jax.tree.map(lambda x: (x / expand_to(c, x)).astype(x.dtype), x),
            t,
            cond,
            key=key,
        )
        return jax.tree.map(change, x, check_state("reschedule", u, x))

    return Velocity(velocity.init, apply)


def matched_time(
    trained: Schedule, new: Schedule, r: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The times and scales at which two paths have the same states.

    alpha(t) / sigma(t) of `trained` is the ratio of `new` at r, and c is the scale between the two,
    x_new(r) = c x_trained(t). t is in closed form for a schedule that has `time`; otherwise it is a
    root to the last digits, for which alpha / sigma has to grow with t. It stops at 0 and 1 where
    `trained` does not reach that ratio. It maps grids too.

    Args:
        trained: the schedule whose times are wanted.
        new: the schedule whose times are given.
        r: times of `new` in [0, 1], of any shape.

    Returns:
        t: times of `trained`, shaped like r.
        c: the scale, shaped like r.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import paths
        >>> r = jnp.array([0.0, 0.5, 1.0])
        >>> t, c = paths.matched_time(paths.LINEAR, paths.schedules.cosine(), r)
        >>> print(np.asarray(t).round(4), np.asarray(c).round(4))
        [0.  0.5 1. ] [1.     1.4142 1.    ]
    """
    a, s = new.alpha(r), new.sigma(r)
    time = trained.time
    t = jnp.clip(time(a, s) if time else _root(trained, jnp.arctan2(a, s)), 0, 1)
    return t, jnp.hypot(a, s) / jnp.hypot(trained.alpha(t), trained.sigma(t))


def _root(schedule, angle):
    """t where the angle of (alpha, sigma) is the given one: it is finite at both ends, as
    log(alpha / sigma) is not.
    """

    def of_time(t, _):
        held = jnp.clip(
            t, 0, 1
        )  # beyond [0, 1] the angle goes on at slope 1, since a root must be somewhere
        slope = jnp.where(t == held, _rates(schedule, held)[0], 1)
        tiny, huge = jnp.finfo(t.dtype).tiny, jnp.finfo(t.dtype).max
        return jnp.arctan2(schedule.alpha(held), schedule.sigma(held)) + (t - held), jnp.log(
            jnp.clip(slope, tiny, huge)
        )

    return monotone_root(of_time, angle, ())


def _rates(schedule, t):
    """d/dt of the angle of (alpha, sigma), D / (a^2 + s^2), and of the log of its length."""
    a, s, da, ds = coefficients(schedule, t)
    square = a**2 + s**2
    return (da * s - ds * a) / square, (a * da + s * ds) / square


def from_noise_time(field: Field, *, scale: float = 1.0) -> Velocity:
    """A network in the convention of SD3, FLUX and MeanFlow, as a velocity on the linear path.

    The network takes x and s = 1 - t, with noise at s = 1, and predicts noise - data:

        v(x, t) = -net(x, scale (1 - t)).

    It is the convention of SD3, FLUX, diffusers (scale 1000; the shifted sigma of its grid is 1 -
    t) and MeanFlow (scale 1).

    Args:
        field: the network; its states may be pytrees.
        scale: what the network's time is multiplied by.

    Returns:
        Velocity: the velocity on the linear path, with the params of `field`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> from jflow.types import Field
        >>> field = Field(lambda *_: {}, lambda params, x, s, cond=None, *, key=None: s[:, None])
        >>> velocity = paths.from_noise_time(field, scale=1000.0)
        >>> velocity.apply({}, jnp.array([[2.0]]), jnp.array([0.75])).tolist()
        [[-250.0]]
    """
    scale = float(scale)  # a number of numpy's would bring float64 along

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, jax.tree.leaves(x)[0].shape[0])
        v = field.apply(params, x, scale * (1 - t), cond, key=key)
        return jax.tree.map(jnp.negative, check_state("from_noise_time", v, x))

    return Velocity(_later(field, lambda t: scale * (1 - t)), apply)


def from_trigonometric(field: Field, *, data_std: float = 1.0) -> Velocity:
    """A TrigFlow network as a velocity on the cosine schedule.

    The network F(x / data_std, tau) takes states x = cos(tau) x1 + data_std sin(tau) noise, tau in
    [0, pi/2] with data at 0, and predicts dx/dtau / data_std. On `schedules.cosine(data_std)`, with
    tau = pi (1 - t) / 2,

        v(x, t) = -(pi / 2) data_std F(x / data_std, tau).

    `reschedule` brings it to another path.

    Args:
        field: the network F.
        data_std: the standard deviation of the data, above 0.

    Returns:
        Velocity: the velocity on `schedules.cosine(data_std)`, with the params of `field`.

    Raises:
        ValueError: data_std is not above 0.

    References:
        Lu, Song, *Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models*, 2024,
            arXiv:2410.11081 (TrigFlow).
    """
    if not data_std > 0:
        raise ValueError(f"from_trigonometric: expected data_std > 0, got {data_std}")
    data_std = float(data_std)  # a number of numpy's would bring float64 along
    quarter = jnp.pi / 2

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, x.shape[0])
        slope = field.apply(params, x / data_std, quarter * (1 - t), cond, key=key)
        slope = check_state("from_trigonometric", slope, x)
        return (-quarter * data_std * slope).astype(x.dtype)

    return Velocity(_later(field, lambda t: quarter * (1 - t)), apply)


def to_trigonometric(
    velocity: Velocity, trained: Schedule = LINEAR, *, data_std: float = 1.0
) -> Field:
    """A velocity as a TrigFlow network, the inverse of `from_trigonometric`.

    It gives F(x / data_std, tau) from a velocity on the path `trained`. Nothing is lost: what both
    predict of the data is the same at every state. On the linear path, with s = data_std, n^2 = (s
    t)^2 + (1 - t)^2 and y = x / s, where tan(tau) = (1 - t) / (s t) and the state of the velocity
    is n y,

        F(y, tau) = ((s^2 t - (1 - t)) y - n v(n y, t)) / s.

    `reschedule` does it for any path.

    Args:
        velocity: a velocity on the path of `trained`.
        trained: the schedule it was trained on; the default is the linear one.
        data_std: the standard deviation of the data, above 0.

    Returns:
        Field: F of (x / data_std, tau), with the params and the init of `velocity`.

    Raises:
        ValueError: data_std is not above 0.

    References:
        Chen et al., *SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency
            Distillation*, 2025, arXiv:2503.09641 (the linear path).
    """
    if not data_std > 0:
        raise ValueError(f"to_trigonometric: expected data_std > 0, got {data_std}")
    data_std = float(data_std)
    quarter = jnp.pi / 2
    turned = reschedule(velocity, trained, cosine(data_std))

    def apply(params, x, tau, cond=None, *, key=None):
        tau = rows(tau, x.shape[0])
        slope = turned.apply(params, x * data_std, 1 - tau / quarter, cond, key=key)
        return (-slope / (quarter * data_std)).astype(x.dtype)

    return Field(velocity.init, apply)


def from_edm(denoiser: Field, schedule: Schedule) -> Velocity:
    """An EDM denoiser as a velocity on a variance exploding schedule.

    The denoiser D(x, sigma) = E[x1 | x] takes x = x1 + sigma noise:

        v = sigma' / sigma (x - D(x, sigma)),

    which is finite at both ends, as sigma_min > 0. The flow on `schedule` itself starts from
    sigma_max noise; `reschedule(from_edm(denoiser, edm), edm, LINEAR)` is the same model on the
    linear path, from standard normal noise.

    Args:
        denoiser: D, preconditioned already; for a raw network see
            `paths.parameterizations.edm_denoiser`.
        schedule: one with alpha = 1, such as `schedules.edm()` or `schedules.ve()`.

    Returns:
        Velocity: the velocity on `schedule`, with the params of `denoiser`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> from jflow.types import Field
        >>> denoiser = Field(lambda *_: {}, lambda params, x, sigma, cond=None, *, key=None: 0 * x)
        >>> velocity = paths.from_edm(denoiser, paths.schedules.ve(0.1, 10.0))
        >>> v = velocity.apply({}, jnp.array([[1.0]]), jnp.array([0.5]))
        >>> round(float(v[0, 0]), 3)  # -log 100
        -4.605

    References:
        Karras, Aittala, Aila, Laine, *Elucidating the Design Space of Diffusion-Based Generative
            Models*, 2022, arXiv:2206.00364.
    """
    return _of_sigma("from_edm", denoiser, schedule, data_to_velocity)


def from_sigma(noise: Field, schedule: Schedule) -> Velocity:
    """A network of (x, sigma) that predicts the noise, as a velocity.

    The network eps(x, sigma) takes x = x1 + sigma noise; on a variance exploding schedule

        v = sigma' eps(x, sigma).

    Args:
        noise: the network eps.
        schedule: one with alpha = 1, such as `schedules.edm()` or `schedules.ve()`.

    Returns:
        Velocity: the velocity on `schedule`, with the params of `noise`.
    """
    return _of_sigma("from_sigma", noise, schedule, noise_to_velocity)


def _of_sigma(name, field, schedule, convert):
    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, x.shape[0])
        prediction = field.apply(params, x, schedule.sigma(t), cond, key=key)
        return convert(check_state(name, prediction, x), x, t, schedule).astype(x.dtype)

    return Velocity(_later(field, schedule.sigma), apply)


def _later(field: Field, time: Callable):
    """The init of a field that is given time(t) instead of t."""
    return lambda key, x, t, cond=None: field.init(
        key, x, time(rows(t, jax.tree.leaves(x)[0].shape[0])), cond
    )
