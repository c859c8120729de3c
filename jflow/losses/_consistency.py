"""Consistency models on the linear path: f(x, t) = x + (1 - t) F(x, t) is data, from every x, t.

More precisely it is the data at the end of the trajectory through x at time t. F is any `Velocity`;
f(x, 1) = x holds whatever F is. Neighbors on a trajectory must agree, f(x_t, t) = f(x_s, s) for t <
s, the right side without gradient. The papers' time runs from data to noise and their states are
x_t / t, with the noise level sigma = (1 - t) / t.

    velocity = jflow.velocity(nets.ResidualMLP(128))
    loss = losses.consistency_training(velocity, steps=losses.easy_steps(every=2_000))
    step = train.make_step(loss, optimizer, refresh=losses.count_steps)
    # state.frozen: {'step': jnp.int32(0)}
    ... fit ...
    student = solvers.consistency_map(velocity)
    x1, info = solvers.sample_flow_map(student, params, x0)  # steps=2, renoise=1.0, key=key
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jflow import times
from jflow._core.arrays import expand_to
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_same_shape, check_whole, frozen_entry
from jflow._core.keys import same_draws
from jflow._core.line import on_line, predicted_data
from jflow._core.times import check_grid, check_steps
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import draw_pairs
from jflow.losses._teacher import line_velocity
from jflow.types import Key, Loss, Params, PyTree, Time, Velocity

__all__ = [
    "averaged_target",
    "count_steps",
    "consistency_training",
    "easy_steps",
    "euler_step",
    "grid_steps",
    "heun_step",
    "online_target",
    "inverse_noise_step",
    "inverse_time_step",
]

Frozen = Mapping[str, PyTree]
Steps = Callable[[Key, int, Frozen], tuple[Array, Array]]
"""(key, n, frozen) -> (t, s), [n] both, 0 <= t < s <= 1: neighbors in time.

frozen['step'] says how far training is."""
Advance = Callable[[Callable[[Array, Array], Array], Array, Array, Array], Array]
"""(v, x, t, s) -> x at time s, where v(x, t) is a velocity: one step of a solver."""

_EASY_TIMES = times.logit_normal(1.1, 2.0)
_SHORTEST = 1e-4  # differences over shorter times drown in the rounding of float32


def inverse_time_step(t: Float[Array, " b"], s: Float[Array, " b"]) -> Float[Array, " b"]:
    """The weight 1 / (s - t): with a squared error, gradients keep their size as steps shrink.

    Args:
        t: The earlier times [b].
        s: The later times [b].

    Returns:
        The weight of each row [b].
    """
    return 1 / (s - t)


def inverse_noise_step(t: Float[Array, " b"], s: Float[Array, " b"]) -> Float[Array, " b"]:
    """The weight 1 / (sigma(t) - sigma(s)) with sigma = (1 - t) / t, which is t s / (s - t).

    It is the weight of iCT and ECT, and vanishes at t = 0.

    Args:
        t: The earlier times [b].
        s: The later times [b].

    Returns:
        The weight of each row [b].

    References:
        Song, Dhariwal, *Improved Techniques for Training Consistency Models*, 2023,
            arXiv:2310.14189.
    """
    return t * s / (s - t)


def euler_step(
    v: Callable[[Array, Array], Array],
    x: Float[Array, "b *event"],
    t: Float[Array, " b"],
    s: Float[Array, " b"],
) -> Float[Array, "b *event"]:
    """One Euler step from time t to s: x + (s - t) v(x, t).

    Args:
        v: The velocity, a function of (x, t).
        x: The states [b, *event] at the times t.
        t: The times [b].
        s: The times [b] to go to.

    Returns:
        The states [b, *event] at the times s.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> x, t, s = jnp.ones((1, 2)), jnp.array([0.0]), jnp.array([0.5])
        >>> losses.euler_step(lambda x, t: x, x, t, s).tolist()
        [[1.5, 1.5]]
    """
    return x + expand_to(s - t, x) * v(x, t)


def heun_step(
    v: Callable[[Array, Array], Array],
    x: Float[Array, "b *event"],
    t: Float[Array, " b"],
    s: Float[Array, " b"],
) -> Float[Array, "b *event"]:
    """One step of Heun's method from time t to s, along the mean of the slopes at both ends.

    v is evaluated twice, the second time at s, which may be 1.

    Args:
        v: The velocity, a function of (x, t).
        x: The states [b, *event] at the times t.
        t: The times [b].
        s: The times [b] to go to.

    Returns:
        The states [b, *event] at the times s.
    """
    h, first = expand_to(s - t, x), v(x, t)
    return x + h * (first + v(x + h * first, s)) / 2


def online_target(params: Params, frozen: Frozen) -> Params:
    """The student's own params: what iCT and ECT compare with.

    Args:
        params: The student's params.
        frozen: What the loss gets as `frozen`; it is not read.

    Returns:
        The params.
    """
    return params


def averaged_target(params: Params, frozen: Frozen) -> Params:
    """The averaged student, frozen['ema']: what the first consistency models compare with.

    `make_step(ema=...)` keeps it.

    Args:
        params: The student's params; they are not read.
        frozen: A dict with 'ema'.

    Returns:
        The averaged params, without a gradient.

    Raises:
        ValueError: For a frozen without 'ema'.
    """
    return frozen_entry("averaged_target", frozen, "ema")


def consistency_training(
    velocity: Velocity,
    *,
    steps: Steps,
    teacher: Velocity | None = None,
    advance: Advance = euler_step,
    target: Callable[[Params, Frozen], Params] = online_target,
    metric: Metric = mean_squared_error,
    weight: Callable[[Array, Array], Array] = inverse_time_step,
) -> Loss:
    """Consistency training at finite steps t < s, and distillation where a teacher is given.

    Also known as: consistency training, consistency models, consistency distillation, CT, iCT, ECT.

    The loss is the mean over rows of

        weight(t, s) metric(f(x_t, t), sg(f'(x_s, s)), x_t, t),      f(x, t) = x + (1 - t) F(x, t),

    with x_t = (1 - t) x0 + t x1; f' has the params of `target` and the student's dropout. At the
    exact f the two sides differ by O((s - t)^2), with Heun's step by O((s - t)^3). From scratch
    that holds for their means given x_t, so that the mean gradient of the squared error vanishes as
    s - t goes to 0.

    Args:
        velocity: The student F.
        steps: The law of the neighbors, (key, n, frozen) -> (t, s): `easy_steps` (ECT) or
            `grid_steps` (a grid, a growing one if wanted).
        teacher: None trains from scratch, x_s = (1 - s) x0 + s x1 on the same line; otherwise the
            teacher, with params frozen['teacher'], and x_s = advance(teacher, x_t, t, s).
        advance: One step of a solver, (v, x, t, s) -> x at time s: `euler_step` or `heun_step`.
        target: The params of f', (params, frozen) -> params: `online_target` or `averaged_target`.
        metric: The error of predicted data, (prediction, target, x_t, t) -> [b], a mean over the
            event if it is one of `losses`: `pseudo_huber(c)` is what iCT and ECT use. Only the
            squared error has its minimum at the mean.
        weight: The weight of a row, (t, s) -> [b]: `inverse_time_step`, or `inverse_noise_step` as
            in iCT and ECT.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. Its metrics are {'residual'}, the mean over event and rows of ((f - f') / (s
        - t))^2.

    Raises:
        ValueError: At construction for steps that draw other times; at trace time for what is
            missing in frozen ('teacher', 'ema', 'step'), a velocity or a metric of another shape, a
            batch without 'x' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, oracles, solvers
        >>> law = oracles.gaussian([0.0, 1.0], 0.25)
        >>> steps = losses.grid_steps(solvers.grids.uniform, 200)
        >>> teacher = oracles.as_velocity(law)
        >>> loss = losses.consistency_training(teacher, steps=steps, teacher=teacher)
        >>> value, metrics = loss({}, jax.random.key(0), {"x": jnp.ones((4, 2))}, {"teacher": {}})
        >>> sorted(metrics)
        ['residual']

    References:
        Song, Dhariwal, Chen, Sutskever, *Consistency Models*, 2023, arXiv:2303.01469.
        Song, Dhariwal, *Improved Techniques for Training Consistency Models*, 2023,
            arXiv:2310.14189.
        Geng, Pokle, Luo, Lin, Kolter, *Consistency Models Made Easy*, 2024, arXiv:2406.14548. The
            EDM preconditioning of the papers is replaced by the linear path's x + (1 - t) F.
    """
    name = "consistency_training"
    check_steps(name, steps)

    def loss(params, key, batch, frozen=None):
        frozen = frozen or {}
        pairs = draw_pairs(name, key, batch, lambda key, n: steps(key, n, frozen))
        x0, x1, cond, row_weight, (t, s), _, dropout_key = pairs
        v = line_velocity(name, teacher, frozen, x0, x1, cond)
        x_t = on_line(x0, x1, t)
        x_s = jax.lax.stop_gradient(advance(v, x_t, t, s))
        f = predicted_data(velocity, params, x_t, t, cond, dropout_key, x1.dtype)
        other = jax.lax.stop_gradient(target(params, frozen))
        f_s = jax.lax.stop_gradient(
            predicted_data(velocity, other, x_s, s, cond, same_draws(dropout_key), x1.dtype)
        )
        error = check_same_shape(name, "a metric", metric(f, f_s, x_t, t), t)
        residual = mean_squared_error(f, f_s, x_t, t) / (s - t) ** 2
        return mean_of_rows(weight(t, s) * error, row_weight), {
            "residual": mean_of_rows(residual, row_weight)
        }

    return loss


def easy_steps(
    every: int,
    *,
    stages: int = 8,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
    time: Time = _EASY_TIMES,
) -> Steps:
    """The neighbors of ECT: steps towards data that shrink by a factor with each stage of training.

    t is drawn from `time`, and s is at the noise level

        sigma(s) = max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-b sigma(t)))) sigma(t),
        sigma = (1 - t) / t.

    At first s is mostly 1, data (plain denoising); the steps shrink by q with each stage. No step
    is shorter than 1e-4 (ours: below, float32 is left with rounding).

    Args:
        every: The number of updates of a stage: stage = step // every, of the updates counted in
            frozen['step'] (see `count_steps`).
        stages: The number of stages; the last one stays. A cap is ours.
        q: The factor between stages, above 1.
        k: The size of the adjustment by noise level, not negative.
        b: The steepness of that adjustment, not negative.
        time: The law of t, (key, n) -> t [n]. The paper's log-normal sigma of location -1.1 and
            scale 2 is logit_normal(1.1, 2.0).

    Returns:
        The law (key, n, frozen) -> (t [n], s [n]).

    Raises:
        ValueError: For every or stages < 1, q <= 1, k < 0 or b < 0; when called, for a frozen
            without 'step'.

    References:
        Geng, Pokle, Luo, Lin, Kolter, *Consistency Models Made Easy*, 2024, arXiv:2406.14548.
    """
    check_whole("easy_steps", every=every, stages=stages)
    if not (1 < q < math.inf and 0 <= k < math.inf and 0 <= b < math.inf):
        raise ValueError(f"easy_steps: expected q > 1, k >= 0 and b >= 0, got q={q}, k={k}, b={b}")

    def draw(key, n, frozen):
        stage = jnp.minimum(frozen_entry("easy_steps", frozen, "step") // every, stages - 1)
        t = jnp.clip(time(key, n), 0, 1 - _SHORTEST)
        sigma = (1 - t) / jnp.maximum(t, 1e-6)
        ratio = jnp.maximum(1 - (1 + k * jax.nn.sigmoid(-b * sigma)) * q ** -(stage + 1.0), 0)
        s = 1 / (1 + ratio * sigma)
        return t, jnp.clip(s, t + _SHORTEST, 1).astype(t.dtype)

    return draw


def grid_steps(
    grid: Callable[[int], Any], counts: int | Sequence[int], every: int | None = None
) -> Steps:
    """Neighbors on a grid of n steps, each step as often: t = grid(n)[i], s = grid(n)[i + 1].

    Args:
        grid: The grid n -> times [n + 1] from 0 to 1: `solvers.grids.uniform`, or
            `solvers.grids.edm` for the papers' noise levels.
        counts: The number n of steps, or a growing sequence of them, one for every `every` updates
            (frozen['step'], see `count_steps`); the last stays. iCT's are 10, 20, ..., 1280.
        every: The number of updates for each of the counts; None where there is one.

    Returns:
        The law (key, n, frozen) -> (t [n], s [n]).

    Raises:
        ValueError: For counts without every, and grids that do not rise from 0 to 1; when called,
            for a frozen without 'step' where there are several counts.

    Examples:
        >>> import jax
        >>> from jflow import losses, solvers
        >>> t, s = losses.grid_steps(solvers.grids.uniform, 4)(jax.random.key(0), 3, {})
        >>> (s - t).tolist()
        [0.25, 0.25, 0.25]

    References:
        Song, Dhariwal, *Improved Techniques for Training Consistency Models*, 2023,
            arXiv:2310.14189 (its curriculum; the indices are drawn evenly here, and another law of
            them is a matter of the grid).
    """
    counts = (counts,) if isinstance(counts, int) else tuple(counts)
    if not counts or any(isinstance(n, bool) or int(n) != n or n < 1 for n in counts):
        raise ValueError(f"grid_steps: expected counts of at least 1, got {counts}")
    if len(counts) > 1 and (every is None or every < 1):
        raise ValueError(
            f"grid_steps: {len(counts)} counts need every >= 1, the updates for each, got {every}"
        )
    table = np.ones((len(counts), max(counts) + 1))
    for row, n in zip(table, counts, strict=True):
        times = np.asarray(grid(n), np.float64)
        check_grid("grid_steps", times, rising=True)
        if len(times) != n + 1 or times[-1] != 1:
            raise ValueError(
                f"grid_steps: expected grid({n}) to be {n + 1} times that end at 1, got {times}"
            )
        row[: n + 1] = times

    def draw(key, n, frozen):
        stage = 0
        if len(counts) > 1:
            stage = jnp.minimum(
                frozen_entry("grid_steps", frozen, "step") // every, len(counts) - 1
            )
        i = jax.random.randint(key, (n,), 0, jnp.asarray(counts)[stage])
        row = jnp.asarray(table, float)[stage]
        return row[i], row[i + 1]

    return draw


def count_steps(
    params: Params, frozen: Frozen, key: Key | None, batch: Mapping[str, PyTree]
) -> Frozen:
    """A refresh for `make_step` that counts updates in frozen['step'], an int32 that starts at 0.

    Args:
        params: The params; they are not read.
        frozen: A dict with 'step'.
        key: A key; it is not used.
        batch: The batch; it is not read.

    Returns:
        frozen with a 'step' that is one more.

    Raises:
        ValueError: For a frozen without 'step'.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> int(losses.count_steps({}, {"step": jnp.int32(4)}, None, {})["step"])
        5
    """
    return {**frozen, "step": frozen_entry("count_steps", frozen, "step") + 1}
