"""Inversion of data to noise by the ODE of a velocity, and edits that sample back from there."""

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import expand_to
from jflow._core.checks import check_noun, count_rows, need_key
from jflow._core.numbers import check_number, number_at
from jflow.solvers import Method, as_method, fixed, reverse, sample
from jflow.steering._common import check_conditions, check_images, pull_of
from jflow.steering._condition import SteeringCondition, check_window
from jflow.types import Array, Cond, Field, Key, NumberOrFunction, Params, Velocity

__all__ = ["edit_by_inversion", "rf_inversion", "rf_solver", "toward_data", "toward_noise"]


def rf_solver() -> diffrax.AbstractSolver:
    """RF-Solver: the second-order Taylor step, which is the explicit midpoint method.

    Also known as: RF-Solver, midpoint method.

        x + h v + h^2 / 2 (v_mid - v) / (h / 2)  =  x + h v_mid,
        v_mid = v(x + h v / 2, t + h / 2)

    The derivative of v along the path is a difference over half a step, and the first-order terms
    cancel: two evaluations a step, of second order, from noise to data and back. `solvers.fireflow`
    reuses v_mid of the last step and takes one.

    Returns:
        `diffrax.Midpoint()`, for `solvers.fixed` and `solvers.on_grid`.

    Examples:
        >>> from jflow import steering
        >>> type(steering.rf_solver()).__name__
        'Midpoint'

    References:
        Wang, Pu, Qi, Guo, Ma, Huang, Chen, Li, Shan, *Taming Rectified Flow for Inversion and
            Editing*, 2024, arXiv:2411.04746 (that it is the midpoint is our remark; RF-Edit, which
            shares features of the network, is not this).
    """
    return diffrax.Midpoint()


_MIDPOINT = fixed(50, diffrax.Midpoint())
_EULER = fixed(50, diffrax.Euler())


def edit_by_inversion(
    velocity: Velocity,
    params: Params,
    x: Float[Array, "b *event"],
    cond: Cond,
    new_cond: Cond,
    *,
    start: float = 0.0,
    method: Method | int | None = None,
) -> Float[Array, "b *event"]:
    """Edit data: carry it back along the ODE under its own condition, and forth under another.

    Also known as: ODE inversion, DDIM inversion of flows, inversion and resampling.

        x_start from dx/dt = v(x, t, cond),      t from 1 to start
        x_new   from dx/dt = v(x, t, new_cond),  t from start to 1

    With equal conditions it gives x back, up to the error of the solver, whose order `rf_solver`
    and `solvers.fireflow` raise. It takes twice the evaluations of the method. A start above 0
    keeps more of x and edits less.

    Args:
        velocity: a conditional velocity.
        params: its params.
        x: the data, [b, *event], of a floating type.
        cond: the condition of x, [b, ...] or one row for all.
        new_cond: the condition to edit to, as cond.
        start: the time to go back to, in [0, 1).
        method: how to solve both ways, as in `solvers.sample`; the times of a grid rise, and start
            has then to be left out. The default is 50 steps of `rf_solver`.

    Returns:
        The edited data, [b, *event], in the type of x; the rows of a failed solve are NaN.

    Raises:
        ValueError: start is outside [0, 1) or given beside a grid, or a condition is missing.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):  # a shift of the noise by cond
        ...     return cond[:, None] + 0 * x
        >>> velocity, x = Velocity(lambda *_: {}, apply), jnp.ones((2, 1))
        >>> new = steering.edit_by_inversion(velocity, {}, x, jnp.zeros(1), jnp.ones(1), method=4)
        >>> new.tolist()
        [[2.0], [2.0]]

    References:
        Wang, Pu, Qi, Guo, Ma, Huang, Chen, Li, Shan, *Taming Rectified Flow for Inversion and
            Editing*, 2024, arXiv:2411.04746.
        Deng, He, Mei, Wang, Tang, *FireFlow: Fast Inversion of Rectified Flow for Image Semantic
            Editing*, 2025, arXiv:2412.07517.
    """
    name = "edit_by_inversion"
    if not 0 <= start < 1:
        raise ValueError(f"{name}: expected start in [0, 1), got {start}")
    how = as_method(name, method, _MIDPOINT, rising=True)
    if how.grid is not None and start != 0:
        raise ValueError(f"{name}: a grid carries its own start: give start={start} or the grid")
    state = check_images(name, velocity, x)
    cond, new_cond = check_conditions(name, cond, new_cond, count_rows(name, x))
    back, forth = ({}, {}) if how.grid is not None else ({"t0": 1.0, "t1": start}, {"t0": start})
    noise = sample(velocity, params, state, cond, method=reverse(how), **back)[0]
    return sample(velocity, params, noise, new_cond, method=how, **forth)[0].astype(x.dtype)


def toward_data(
    velocity: Velocity, eta: NumberOrFunction, *, window: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """A velocity that is pulled towards given data, as RF-Inversion samples.

    Also known as: controlled ODE, controlled SDE, LQR guidance.

        v + eta ((x1 - x) / (1 - t) - v)      where first <= t < last, else v

    (x1 - x) / (1 - t) is the optimal control of a linear quadratic regulator: of all paths from x
    that arrive at x1 the one of least energy. eta = 0 is the velocity itself; with eta = 1 up to
    t = 1, Euler's steps and those of `solvers.ancestral` end in x1, up to rounding. It is a
    velocity as any other: `solvers.sample` takes it along the controlled ODE, and
    `solvers.euler_maruyama` and `solvers.ancestral` along the controlled SDE, whose score is that
    of the velocity and of x1 in the same proportion.

    Args:
        velocity: the velocity, of the linear path.
        eta: how much of the pull, in [0, 1], a number or t [b] -> [b].
        window: the times (first, last) within which it pulls, the last one excluded.

    Returns:
        Velocity: its cond is a `SteeringCondition` of x1 [b, *event] and the cond of `velocity`,
            also in `init`; params are those of `velocity`. One evaluation.

    Raises:
        ValueError: eta is a number outside [0, 1], or the window is not in [0, 1].

    Examples:
        >>> import diffrax
        >>> import jax.numpy as jnp
        >>> from jflow import solvers, steering
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: x)
        >>> pulled, x1 = steering.toward_data(velocity, 1.0), jnp.full((1, 2), 3.0)
        >>> method, cond = solvers.fixed(4, diffrax.Euler()), steering.SteeringCondition(x1)
        >>> solvers.sample(pulled, {}, jnp.zeros((1, 2)), cond, method=method)[0].tolist()
        [[3.0, 3.0]]

    References:
        Rout, Chen, Ruiz, Caramanis, Shakkottai, Chu, *Semantic Image Inversion and Editing using
            Rectified Stochastic Differential Equations*, 2024, arXiv:2410.10792 (the SDE by the
            steps of `jflow.solvers` is ours).
    """
    check_number("toward_data", "eta", eta, "in [0, 1]", lambda e: 0 <= e <= 1)
    first, last = check_window("toward_data", window)
    check_noun("toward_data", velocity, Velocity, Field)

    def change(v, x, t, x1):
        active = (first <= t) & (t < last)
        much = jnp.where(active, number_at("toward_data", "eta(t)", eta, t, like=t), 0)
        pull = (x1 - x) / expand_to(jnp.where(active, 1 - t, 1), x)
        return v + expand_to(much, x) * (pull - v)

    return pull_of("toward_data", velocity, change)


def toward_noise(
    velocity: Velocity, gamma: NumberOrFunction, *, window: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """A velocity that is pulled towards given noise on the way back, as RF-Inversion inverts.

    Also known as: controlled inversion, controlled forward ODE.

        v + gamma ((x - x0) / t - v)      where first < t <= last, else v

    to be solved from t = 1 to 0. With gamma = 0 it is the velocity itself, with 1 Euler's steps end
    in x0; between, the noise is closer to a draw of the source than that of the exact inversion,
    and the data that comes back from it is easier to edit.

    Args:
        velocity: the velocity, of the linear path.
        gamma: how much of the pull, in [0, 1], a number or t [b] -> [b].
        window: the times (first, last) within which it pulls, the first one excluded.

    Returns:
        Velocity: its cond is a `SteeringCondition` of x0 [b, *event] and the cond of `velocity`,
            also in `init`; params are those of `velocity`. One evaluation.

    Raises:
        ValueError: gamma is a number outside [0, 1], or the window is not in [0, 1].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> pulled, x = steering.toward_noise(velocity, 0.5), jnp.ones((1, 2))
        >>> cond = steering.SteeringCondition(3 * x)
        >>> pulled.apply({}, x, jnp.full(1, 0.5), cond).tolist()  # (1 - 3) / 0.5 / 2
        [[-2.0, -2.0]]

    References:
        Rout, Chen, Ruiz, Caramanis, Shakkottai, Chu, *Semantic Image Inversion and Editing using
            Rectified Stochastic Differential Equations*, 2024, arXiv:2410.10792.
    """
    check_number("toward_noise", "gamma", gamma, "in [0, 1]", lambda g: 0 <= g <= 1)
    first, last = check_window("toward_noise", window)
    check_noun("toward_noise", velocity, Velocity, Field)

    def change(v, x, t, x0):
        active = (first < t) & (t <= last)
        much = jnp.where(active, number_at("toward_noise", "gamma(t)", gamma, t, like=t), 0)
        pull = (x - x0) / expand_to(jnp.where(active, t, 1), x)
        return v + expand_to(much, x) * (pull - v)

    return pull_of("toward_noise", velocity, change)


def rf_inversion(
    velocity: Velocity,
    params: Params,
    x: Float[Array, "b *event"],
    cond: Cond,
    new_cond: Cond,
    key: Key,
    *,
    gamma: NumberOrFunction = 0.5,
    eta: NumberOrFunction = 0.9,
    window: tuple[float, float] = (0.0, 0.3),
    method: Method | int | None = None,
) -> Float[Array, "b *event"]:
    """RF-Inversion: edit data by a controlled ODE back to noise and another one forth.

    Also known as: RF-Inversion, rectified SDE editing.

        back    toward_noise(velocity, gamma), towards x0 ~ N(0, 1), under cond
        forth   toward_data(velocity, eta, window), towards x, under new_cond

    Both on one grid (the grids of a widely used implementation differ by a shift, and one of its
    steps is missing). With gamma = eta = 0 it is `edit_by_inversion`; with eta = 1 up to t = 1
    it gives x back, up to rounding. It takes twice the evaluations of the method.

    Args:
        velocity: a conditional velocity of the linear path.
        params: its params.
        x: the data, [b, *event], of a floating type.
        cond: the condition of x, [b, ...] or one row for all; the paper inverts without a text.
        new_cond: the condition to edit to, as cond.
        key: a key, for x0.
        gamma: the pull towards the noise, in [0, 1], a number or t [b] -> [b].
        eta: the pull towards x, in [0, 1], a number or t [b] -> [b].
        window: the times (first, last) within which x pulls: the later it ends, the closer to x.
        method: how to solve both ways, as in `solvers.sample`. The default is 50 steps of Euler's
            method, which is exact on the pull; methods of higher order are not, in its last step.

    Returns:
        The edited data, [b, *event], in the type of x; the rows of a failed solve are NaN.

    Raises:
        ValueError: gamma or eta is a number outside [0, 1], the window is not in [0, 1], a
            condition or the key is missing.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):  # a shift of the noise by cond
        ...     return cond[:, None] + 0 * x
        >>> velocity, x, key = Velocity(lambda *_: {}, apply), jnp.ones((1, 2)), jax.random.key(0)
        >>> old, new, pulls = jnp.zeros(1), jnp.ones(1), {"gamma": 0.0, "eta": 0.5}
        >>> x = steering.rf_inversion(
        ...     velocity, {}, x, old, new, key, **pulls, window=(0.0, 0.5), method=2
        ... )
        >>> x.tolist()  # 1 + (1 + 0) / 2 / 2 + 1 / 2
        [[1.75, 1.75]]

    References:
        Rout, Chen, Ruiz, Caramanis, Shakkottai, Chu, *Semantic Image Inversion and Editing using
            Rectified Stochastic Differential Equations*, 2024, arXiv:2410.10792.
    """
    back = toward_noise(velocity, gamma)
    forth = toward_data(velocity, eta, window=window)
    return invert_and_sample(
        "rf_inversion", velocity, back, forth, params, x, cond, new_cond, key, method
    )


def invert_and_sample(
    name, velocity, back, forth, params, x, cond, new_cond, key, method, repeat=1
):
    """x carried back along one controlled velocity and forth along another, whose cond has x
    beside the condition, `repeat` times."""
    how = as_method(name, method, _EULER, rising=True)
    state = check_images(name, velocity, x)
    cond, new_cond = check_conditions(name, cond, new_cond, count_rows(name, x))
    x0 = jax.random.normal(need_key(name, key), state.shape, state.dtype)
    ends = {} if how.grid is not None else {"t0": 1.0, "t1": 0.0}
    noise = sample(back, params, state, SteeringCondition(x0, cond), method=reverse(how), **ends)[0]
    for _ in range(repeat):
        new_cond = SteeringCondition(state, new_cond)
    return sample(forth, params, noise, new_cond, method=how)[0].astype(x.dtype)
