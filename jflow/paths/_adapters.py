"""Another schedule or another time convention for a network that is trained already."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

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
    """The velocity of the path `new`, from one trained on the path `trained`; params and init are those of the latter.

    A state of one path is a state of the other, scaled: x_new(r) = c x_trained(t), with t and c of `matched_time`. So
        U(x, r) = (c' / c) x + c t' u(x / c, t)        primes for d/dr.
    With exact velocities both flows end in the same place: x0 at r=0 goes with x0 / c(0) at t=0. Where `new` has more
    noise or less than `trained` ever saw, t stays at that end, t' = 0, and x is only scaled. r is taken at most one
    machine epsilon from the ends, where t' or u may be infinite: everything is finite there. The score scales too, by 1 / c.
    Source: the scale-time change of Shaul et al., "Bespoke Solvers for Generative Flow Models", 2023.
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


def matched_time(trained: Schedule, new: Schedule, r: Array) -> tuple[Array, Array]:
    """(t, c), both [b]: alpha(t) / sigma(t) of `trained` is the ratio of `new` at r [b], and c the scale between the two,
    x_new(r) = c x_trained(t). t is in closed form for a schedule that has `time`, otherwise a root to the last digits
    (alpha / sigma has to grow with t); it stops at 0 and 1 where `trained` doesn't reach that ratio. Maps grids too."""
    a, s = new.alpha(r), new.sigma(r)
    time = trained.time
    t = jnp.clip(time(a, s) if time else _root(trained, jnp.arctan2(a, s)), 0, 1)
    return t, jnp.hypot(a, s) / jnp.hypot(trained.alpha(t), trained.sigma(t))


def _root(schedule, angle):
    """t where the angle of (alpha, sigma) is the given one: it is finite at both ends, as log(alpha / sigma) is not."""

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
    """A network of x and s = 1 - t (noise at s = 1) that predicts noise - data, as a velocity on the linear path:
    v(x, t) = -net(x, scale (1 - t)).

    The convention of SD3, FLUX, diffusers (scale 1000, the shifted sigma of its grid is 1 - t) and MeanFlow (scale 1).
    """
    scale = float(scale)  # a number of numpy's would bring float64 along

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, jax.tree.leaves(x)[0].shape[0])
        v = field.apply(params, x, scale * (1 - t), cond, key=key)
        return jax.tree.map(jnp.negative, check_state("from_noise_time", v, x))

    return Velocity(_later(field, lambda t: scale * (1 - t)), apply)


def from_trigonometric(field: Field, *, data_std: float = 1.0) -> Velocity:
    """A network F(x / data_std, tau) of x = cos(tau) x1 + data_std sin(tau) noise, tau in [0, pi/2] with data at 0, that
    predicts dx/dtau / data_std, as a velocity on `schedules.cosine(data_std)`, tau = pi (1 - t) / 2:
    v(x, t) = -(pi / 2) data_std F(x / data_std, tau). `reschedule` brings it to another path.

    Source: Lu, Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", 2024 (TrigFlow).
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
    """The other direction of `from_trigonometric`: F(x / data_std, tau) from a velocity on the path `trained`, params and
    init as they are. Nothing is lost: what both predict of the data is the same at every state.

    On the linear path, with s = data_std, n^2 = (s t)^2 + (1 - t)^2 and y = x / s, where tan(tau) = (1 - t) / (s t) and the
    velocity's state is n y: F(y, tau) = ((s^2 t - (1 - t)) y - n v(n y, t)) / s. `reschedule` does it for any path.
    Source: Chen et al., "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation", 2025 (linear).
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
    """A denoiser D(x, sigma) = E[x1 | x], x = x1 + sigma noise, as a velocity on a schedule with alpha = 1, such as
    `schedules.edm()` or `schedules.ve()`: v = sigma' / sigma (x - D(x, sigma)), finite at both ends as sigma_min > 0.

    `reschedule(from_edm(denoiser, edm), edm, LINEAR)` is the same model on the linear path, from standard normal noise.
    The flow on `schedule` itself starts from sigma_max noise. The denoiser is preconditioned already (see
    `paths.parameterizations.edm_denoiser` for a raw network).
    Source: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", 2022.
    """
    return _of_sigma("from_edm", denoiser, schedule, data_to_velocity)


def from_sigma(noise: Field, schedule: Schedule) -> Velocity:
    """As `from_edm` for a network eps(x, sigma) that predicts the noise: v = sigma' eps(x, sigma)."""
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
