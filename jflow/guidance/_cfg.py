"""Guidance by two evaluations of a velocity: classifier-free, negative conditions, autoguidance.

A `Combine` (`guidance.Combine`) says what becomes of the two; `cfg` is the plain one. Where x is a
dict of parts and t a dict of their times, each part is combined by itself.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to
from jflow._core.checks import check_cond, check_noun, like_rows, times_of
from jflow._core.keys import split_key
from jflow.guidance._combine import Combine, scaled
from jflow.types import Field, NumberOrFunction, PyTree, Velocity

__all__ = ["autoguidance", "cfg", "guided", "negative", "with_cond", "zero_init"]


def cfg(velocity: Velocity, scale: NumberOrFunction, *, null: PyTree) -> Velocity:
    """Classifier-free guidance of a velocity that was trained with dropped conditions.

    Also known as: CFG, guidance, classifier-free guidance, guidance scale.

        v_null + scale (v_cond - v_null)

    scale 1 is the conditional velocity, 0 the unconditional one. Both are one evaluation of 2b
    rows. scale is the w of Imagen and diffusers and the omega of Guided Flows; the w of Ho and
    Salimans is scale - 1.

    Args:
        velocity: a velocity trained with `losses.drop_cond(p, null=null)`.
        scale: a number, or t [b] -> [b].
        null: the condition that stands for none, one row of cond without the batch axis. Parts that
            are None in a `types.Condition` stay those of cond.

    Returns:
        Velocity: the guided velocity, with the params and the init of `velocity`. It raises a
            ValueError where cond is None or null is not a row of it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):
        ...     return cond[:, None] + 0 * x
        >>> guided = guidance.cfg(Velocity(lambda *_: {}, apply), 2.0, null=0.0)
        >>> guided.apply({}, jnp.zeros((2, 1)), jnp.zeros(2), jnp.array([1.0, 3.0])).tolist()
        [[2.0], [6.0]]

    References:
        Ho, Salimans, *Classifier-Free Diffusion Guidance*, 2022, arXiv:2207.12598.
        Zheng, Le, Shaul, Lipman, Grover, Chen, *Guided Flows for Generative Modeling and Decision
            Making*, 2023, arXiv:2311.13443 (in the velocity).
    """
    return _guided("cfg", velocity, scaled(scale), null)


def guided(velocity: Velocity, combine: Combine, *, null: PyTree) -> Velocity:
    """Guidance by a condition and by none, with any way to combine the two velocities.

        combine(v(x, t, cond), v(x, t, null), x, t)

    `cfg` is `guided` with `scaled(scale)`. A null that the samples shall keep away from, the same
    for every row, is a negative condition. Both velocities are one evaluation of 2b rows.

    Args:
        velocity: a velocity trained with `losses.drop_cond(p, null=null)`.
        combine: (v, other, x, t) -> v, such as `projected(3.0)`.
        null: the condition that stands for none, one row of cond without the batch axis. Parts that
            are None in a `types.Condition` stay those of cond.

    Returns:
        Velocity: the guided velocity, with the params and the init of `velocity`. It raises a
            ValueError where cond is None or null is not a row of it.
    """
    return _guided("guided", velocity, combine, null)


def negative(velocity: Velocity, combine: Combine) -> Velocity:
    """Guidance towards one condition and away from another, row by row.

        combine(v(x, t, towards), v(x, t, away), x, t)      for cond = (towards, away)

    Both are one evaluation of 2b rows. Where every row keeps away from the same condition, `guided`
    with that as its null does it. This is the negative prompt of image generators (no paper's own).

    Args:
        velocity: a conditional velocity.
        combine: (v, other, x, t) -> v, such as `scaled(3.0)`.

    Returns:
        Velocity: the guided velocity, whose cond is a pair (towards, away) of conditions of
            `velocity` of one structure and one shape, also in `init`; params are those of
            `velocity`. It raises a ValueError for a cond that is not such a pair.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Velocity
        >>> def apply(params, x, t, cond=None, *, key=None):
        ...     return cond[:, None] + 0 * x
        >>> guided = guidance.negative(Velocity(lambda *_: {}, apply), guidance.scaled(2.0))
        >>> cond = jnp.array([1.0, 3.0]), jnp.array([0.0, 1.0])
        >>> guided.apply({}, jnp.zeros((2, 1)), jnp.zeros(2), cond).tolist()
        [[2.0], [5.0]]
    """

    def pair(cond):
        if not (isinstance(cond, tuple | list) and len(cond) == 2):
            raise ValueError(
                f"negative: expected cond to be a pair (towards, away), got {type(cond).__name__}"
            )
        towards, away = (jax.tree.map(jnp.asarray, c) for c in cond)
        shapes = [jax.tree.map(jnp.shape, c) for c in (towards, away)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"negative: expected two conditions of one shape, got {shapes[0]} and {shapes[1]}"
            )
        return towards, away

    def init(key, x, t, cond=None):
        return velocity.init(key, x, t, pair(cond)[0])

    def apply(params, x, t, cond=None, *, key=None):
        pairs = (check_cond("negative", c, _count(x)) for c in pair(cond))
        return _twice(velocity, combine, params, x, t, *pairs, key)

    return Velocity(init, apply)


def autoguidance(velocity: Velocity, weak: Velocity, combine: Combine) -> Velocity:
    """Guidance away from a worse version of the model, rather than from no condition.

        combine(v, v_weak, x, t)

    The weak model is smaller, or trained less. `with_cond(weak, null)` makes it unconditional,
    where guidance is of both kinds. The w of the paper is the scale of `scaled`. x, t and cond go
    to both, b rows each, and the key of dropout is split.

    Args:
        velocity: the model.
        weak: the worse version of it.
        combine: (v, other, x, t) -> v, such as `scaled(2.0)`.

    Returns:
        Velocity: the guided velocity, params {'velocity', 'weak'}.

    References:
        Karras, Aittala, Kynkaanniemi, Lehtinen, Aila, Laine, *Guiding a Diffusion Model with a Bad
            Version of Itself*, 2024, arXiv:2406.02507.
    """

    def init(key, x, t, cond=None):
        strong_key, weak_key = jax.random.split(key)
        return {
            "velocity": velocity.init(strong_key, x, t, cond),
            "weak": weak.init(weak_key, x, t, cond),
        }

    def apply(params, x, t, cond=None, *, key=None):
        t = times_of("autoguidance", t, x)
        strong_key, weak_key = split_key(key, 2)
        strong = velocity.apply(params["velocity"], x, t, cond, key=strong_key)
        other = weak.apply(params["weak"], x, t, cond, key=weak_key)
        return _at_times(combine, t, strong, other, x)

    return Velocity(init, apply)


def with_cond(velocity: Velocity, null: PyTree = None) -> Velocity:
    """A velocity with its condition replaced.

    Args:
        velocity: a conditional velocity.
        null: one row of its cond without the batch axis, where parts that are None in a
            `types.Condition` stay those of cond; None: no condition at all.

    Returns:
        Velocity: the velocity that has `null` in the place of any cond, with the params of
            `velocity`.
    """

    def replaced(cond):
        return (
            None if null is None else like_rows("with_cond", null, jax.tree.map(jnp.asarray, cond))
        )

    return Velocity(
        lambda key, x, t, cond=None: velocity.init(key, x, t, replaced(cond)),
        lambda params, x, t, cond=None, *, key=None: velocity.apply(
            params, x, t, replaced(cond), key=key
        ),
    )


def zero_init(velocity: Velocity, until: float) -> Velocity:
    """A velocity that is 0 before a given time, so that the state stays where it is.

    Zeroing the first k Euler steps of a grid is until = grid[k], or a little less; keep k small.
    The reason of the paper: a trained velocity is at its worst near the source, worse than none.
    The state arrives at `until` without having moved.

    Args:
        velocity: any velocity.
        until: the time at which it starts, in [0, 1].

    Returns:
        Velocity: 0 for t < until, with the params and the init of `velocity`.

    Raises:
        ValueError: until is outside [0, 1].

    References:
        Fan, Zheng, Yeh, Liu, *CFG-Zero⋆: Improved Classifier-Free Guidance for Flow Matching
            Models*, 2025, arXiv:2503.18886.
    """
    if not 0 <= until <= 1:
        raise ValueError(f"zero_init: expected until in [0, 1], got {until}")

    def still(v, t):
        return jax.tree.map(lambda v: jnp.where(expand_to(t < until, v), jnp.zeros_like(v), v), v)

    def apply(params, x, t, cond=None, *, key=None):
        t = times_of("zero_init", t, x)
        return _at_times(still, t, velocity.apply(params, x, t, cond, key=key))

    return Velocity(velocity.init, apply)


def _guided(name, velocity, combine, null):
    check_noun(name, velocity, Velocity, Field)

    def apply(params, x, t, cond=None, *, key=None):
        if cond is None:
            raise ValueError(f"{name}: expected cond, what to guide towards, got None")
        if null is None:
            raise ValueError(
                f"{name}: expected null, the row of cond that stands for no condition, got None"
            )
        cond = jax.tree.map(jnp.asarray, check_cond(name, cond, _count(x)))
        return _twice(velocity, combine, params, x, t, cond, like_rows(name, null, cond), key)

    return Velocity(velocity.init, apply)


def _twice(velocity, combine, params, x, t, cond, other, key):
    """Both conditions in one evaluation."""
    n, t = _count(x), times_of("guidance", t, x)
    double = lambda a, b: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), a, b)  # noqa: E731
    both = velocity.apply(params, double(x, x), double(t, t), double(cond, other), key=key)
    first, second = jax.tree.map(lambda v: v[:n], both), jax.tree.map(lambda v: v[n:], both)
    return _at_times(combine, t, first, second, x)


def _at_times(f, t, *trees):
    """f(*trees, t); where each part has a time of its own, of each part by itself."""
    if not isinstance(t, Mapping):
        return f(*trees, t)
    return {part: f(*(tree[part] for tree in trees), t[part]) for part in t}


def _count(x):
    return jax.tree.leaves(x)[0].shape[0]
