"""Guidance by two evaluations of a velocity: classifier-free, negative conditions, autoguidance.

A `Combine` (`guidance.Combine`) says what becomes of the two; `cfg` is the plain one.
"""

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to
from jflow._core.checks import check_cond, check_noun, like_rows, rows
from jflow._core.keys import split_key
from jflow.guidance._combine import Combine, scaled
from jflow.types import Field, NumberOrFunction, PyTree, Velocity

__all__ = ["autoguidance", "cfg", "guided", "negative", "with_cond", "zero_init"]


def cfg(velocity: Velocity, scale: NumberOrFunction, *, null: PyTree) -> Velocity:
    """Guided velocity v_null + scale (v_cond - v_null): scale 1 is the conditional one, 0 the unconditional.

    scale: a number, or t [b] -> [b]. null: one row of cond without the batch axis, as `losses.drop_cond(p, null=)`
    trained it. Both halves are one evaluation of 2b rows; `init` and params are the velocity's own. scale is
    the w of Imagen and diffusers and the omega of Guided Flows; the w of Ho and Salimans is scale - 1.
    Errors: ValueError where cond is None or null is not a row of it.
    Sources: Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022; in the velocity: Zheng, Le, Shaul, Lipman,
        Grover, Chen, "Guided Flows for Generative Modeling and Decision Making", 2023.
    """
    return _guided("cfg", velocity, scaled(scale), null)


def guided(velocity: Velocity, combine: Combine, *, null: PyTree) -> Velocity:
    """combine(v(x, t, cond), v(x, t, null), x, t), of which `cfg` is one; null, evaluations, params, errors as there.

    A null that is something to keep away from, the same for every row, is a negative condition.
    """
    return _guided("guided", velocity, combine, null)


def negative(velocity: Velocity, combine: Combine) -> Velocity:
    """combine(v(x, t, towards), v(x, t, away), x, t) for cond = (towards, away): what to keep away from, row by row.

    Both are conditions of the velocity, of one structure and one shape, and the evaluation is one of 2b rows; `init`
    takes the pair too. Where every row keeps away from the same, `guided` with that as its null will do. Errors:
    ValueError for a cond that is not such a pair. This is the negative prompt of image generators (no paper's own).
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
    """combine(v, v_weak, x, t): away from a worse version of the model (smaller, or trained less), not from no condition.

    params {'velocity', 'weak'}; x, t and cond go to both, b rows each, and dropout's key is split. `with_cond(weak,
    null)` makes the weak one unconditional, where guidance is of both kinds. The paper's w is the scale of `scaled`.
    Source: Karras, Aittala, Kynkaanniemi, Lehtinen, Aila, Laine, "Guiding a Diffusion Model with a Bad Version of
        Itself", 2024.
    """

    def init(key, x, t, cond=None):
        strong_key, weak_key = jax.random.split(key)
        return {
            "velocity": velocity.init(strong_key, x, t, cond),
            "weak": weak.init(weak_key, x, t, cond),
        }

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, _count(x))
        strong_key, weak_key = split_key(key, 2)
        strong = velocity.apply(params["velocity"], x, t, cond, key=strong_key)
        return combine(strong, weak.apply(params["weak"], x, t, cond, key=weak_key), x, t)

    return Velocity(init, apply)


def with_cond(velocity: Velocity, null: PyTree = None) -> Velocity:
    """The velocity with its condition replaced by `null`, one row of it; None: with no condition at all."""

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
    """The velocity, but 0 for t < until: the state stays where it is.

    Zeroing the first k Euler steps of a grid is until = grid[k], or a little less; keep k small. The paper's reason: a
    trained velocity is at its worst near the source, worse than none. The state arrives at `until` without having moved.
    Source: Fan, Zheng, Yeh, Liu, "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models", 2025.
    """
    if not 0 <= until <= 1:
        raise ValueError(f"zero_init: expected until in [0, 1], got {until}")

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, _count(x))
        v = velocity.apply(params, x, t, cond, key=key)
        return jax.tree.map(lambda v: jnp.where(expand_to(t < until, v), jnp.zeros_like(v), v), v)

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
    n = _count(x)
    t = rows(t, n)
    double = lambda a, b: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), a, b)  # noqa: E731
    both = velocity.apply(params, double(x, x), double(t, t), double(cond, other), key=key)
    first, second = jax.tree.map(lambda v: v[:n], both), jax.tree.map(lambda v: v[n:], both)
    return combine(first, second, x, t)


def _count(x):
    return jax.tree.leaves(x)[0].shape[0]
