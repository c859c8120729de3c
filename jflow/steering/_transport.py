"""Editing by inversion, guided along the optimal transport path to the data."""

import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import expand_to
from jflow._core.checks import check_noun
from jflow.solvers import Method
from jflow.steering._common import pull_of, safe_norm
from jflow.steering._condition import check_window
from jflow.steering._inversion import invert_and_sample, toward_data, toward_noise
from jflow.types import Array, Cond, Field, Key, NumberOrFunction, Params, Velocity

__all__ = ["otip", "transport_guided"]


def transport_guided(velocity: Velocity, strength: float = 0.1, *, phase: float = 0.3) -> Velocity:
    """A velocity guided along the optimal transport path from its state to given data.

    Also known as: transport-guided inversion.

        v + lambda(t) |v| / |d| (d - v),      d = (x1 - x) / (1 - t)
        lambda(t) = strength (1 + cos(pi t / phase)) / 2      for t < phase, else 0

    For the quadratic cost the optimal transport of x to x1 is the straight path, whose velocity is
    d. Unlike `toward_data`, the pull fades along a cosine and is as long as v, row by row, so that
    it leads early and leaves the details to the velocity. strength = 0 is the velocity itself.

    Args:
        velocity: the velocity, of the linear path.
        strength: lambda(0), in [0, 1].
        phase: the time at which the pull ends, in (0, 1].

    Returns:
        Velocity: its cond is a `SteeringCondition` of x1 [b, *event] and the cond of `velocity`,
            also in `init`; params are those of `velocity`. One evaluation.

    Raises:
        ValueError: strength is outside [0, 1] or phase outside (0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: x)
        >>> guided, x = steering.transport_guided(velocity, 0.5), jnp.ones((1, 1))
        >>> cond = steering.SteeringCondition(5 * x)
        >>> guided.apply({}, x, jnp.zeros(1), cond).tolist()  # 1 + (4 - 1) / 4 / 2
        [[1.375]]

    References:
        Lupascu, Stupariu, *Transport-Guided Rectified Flow Inversion: Improved Image Editing Using
            Optimal Transport Theory*, 2025, arXiv:2508.02363 (norms of rows, where the authors take
            those of tokens, and no ramp in the first steps).
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"transport_guided: expected strength in [0, 1], got {strength}")
    check_window("transport_guided", (0.0, phase))
    check_noun("transport_guided", velocity, Velocity, Field)
    strength, phase = float(strength), float(phase)

    def change(v, x, t, x1):
        active = t < phase
        d = (x1 - x) / expand_to(jnp.where(active, 1 - t, 1), x)
        much = jnp.where(active, strength * (1 + jnp.cos(jnp.pi * t / phase)) / 2, 0)
        length = safe_norm(d)
        ratio = safe_norm(v) / jnp.where(length > 0, length, 1)
        return v + expand_to(much * ratio, x) * (d - v)

    return pull_of("transport_guided", velocity, change)


def otip(
    velocity: Velocity,
    params: Params,
    x: Float[Array, "b *event"],
    cond: Cond,
    new_cond: Cond,
    key: Key,
    *,
    strength: float = 0.1,
    phase: float = 0.3,
    gamma: NumberOrFunction = 0.5,
    eta: NumberOrFunction = 0.9,
    window: tuple[float, float] = (0.0, 0.3),
    method: Method | int | None = None,
) -> Float[Array, "b *event"]:
    """OTIP: `rf_inversion` whose way forth is guided along the optimal transport path to x.

    Also known as: OTIP, optimal transport inversion pipeline.

        back    toward_noise(velocity, gamma), towards x0 ~ N(0, 1), under cond
        forth   toward_data(transport_guided(velocity, strength), eta), towards x, under new_cond

    With strength = 0 it is `rf_inversion`. It takes twice the evaluations of the method.

    Args:
        velocity: a conditional velocity of the linear path.
        params: its params.
        x: the data, [b, *event], of a floating type.
        cond: the condition of x, [b, ...] or one row for all.
        new_cond: the condition to edit to, as cond.
        key: a key, for x0.
        strength: of the transport, in [0, 1] (see `transport_guided`).
        phase: the time at which the transport ends, in (0, 1].
        gamma: as in `rf_inversion`.
        eta: as in `rf_inversion`.
        window: as in `rf_inversion`.
        method: as in `rf_inversion`.

    Returns:
        The edited data, [b, *event], in the type of x; the rows of a failed solve are NaN.

    Raises:
        ValueError: an option is outside its range, a condition or the key is missing.

    References:
        Lupascu, Stupariu, *Transport-Guided Rectified Flow Inversion: Improved Image Editing Using
            Optimal Transport Theory*, 2025, arXiv:2508.02363.
    """
    back = toward_noise(velocity, gamma)
    guided = transport_guided(velocity, strength, phase=phase)
    forth = toward_data(guided, eta, window=window)
    return invert_and_sample(
        "otip", velocity, back, forth, params, x, cond, new_cond, key, method, 2
    )
