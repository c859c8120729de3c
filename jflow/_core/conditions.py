"""Conditions of several parts: what a network reads of them, and what it refuses."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.checks import check_cond, described
from jflow.types import Array, Cond, Condition


def as_condition(name: str, cond: Cond) -> Condition:
    """cond as the tuple: None is empty, integers [b] are the label, other arrays the vector [b, k].

    Raises ValueError for a pytree of another kind, and for arrays of more axes.
    """
    if isinstance(cond, Condition):
        return cond
    if cond is None:
        return Condition()
    if not hasattr(cond, "shape") or not hasattr(cond, "dtype") or jnp.ndim(cond) not in (1, 2):
        raise ValueError(
            f"{name}: expected cond to be None, labels [b], floats [b, k] or a"
            f" jflow.types.Condition, got {described(cond)}"
        )
    if jnp.issubdtype(cond.dtype, jnp.integer):
        return Condition(label=cond)
    return Condition(vector=jnp.reshape(cond, (cond.shape[0], -1)))


def with_label(name: str, cond: Cond, n: int, num_classes: int | None) -> Cond:
    """cond with n rows, for a network that embeds it as one vector a row; the null label of its
    num_classes, where there are such, in the place of no cond and of no label."""
    if isinstance(cond, Condition):
        cond = read_parts(name, cond, np.zeros((n, 0)), ("label", "vector"))
    if num_classes is not None and (cond is None or label_of(cond) is None):
        label = jnp.full((n,), num_classes, jnp.int32)
        cond = label if cond is None else cond._replace(label=label)
    return check_cond(name, cond, n)


def label_of(cond: Cond) -> Cond:
    """The label of a `Condition`, and any other cond as it is."""
    return cond.label if isinstance(cond, Condition) else cond


def vector_of(cond: Cond) -> Cond:
    """The vector of a `Condition`, and any other cond as it is."""
    return cond.vector if isinstance(cond, Condition) else cond


def refuse_parts(name: str, cond: Cond, takes: Sequence[str]) -> None:
    """Raise where a `Condition` has a part that is not among those that are taken."""
    if not isinstance(cond, Condition):
        return
    for part, value in cond._asdict().items():
        if value is not None and part not in takes:
            raise ValueError(
                f"{name}: takes no cond.{part}, got one of shape {list(jnp.shape(value))}; the"
                f" parts that it takes: {', '.join(takes)}"
            )


def read_parts(
    name: str, cond: Condition, x: Array | np.ndarray, takes: Sequence[str]
) -> Condition:
    """The parts of a condition of x [b, *sites, c], checked, a single row repeated for all."""
    refuse_parts(name, cond, takes)
    sites = jnp.shape(x)[1:-1]
    cond = jax.tree.map(jnp.asarray, check_cond(name, cond, jnp.shape(x)[0]))
    label, vector, aligned, context, mask, valid = cond
    _check_part(name, "label", label, jnp.integer, ("b",))
    _check_part(name, "vector", vector, jnp.floating, ("b", "k"))
    _check_part(name, "context", context, jnp.floating, ("b", "n", "k"))
    if aligned is not None and (aligned.ndim < 2 or aligned.shape[1:-1] != sites):
        expected = ", ".join(map(str, ["b", *sites, "k"]))
        raise ValueError(
            f"{name}: expected cond.aligned of shape [{expected}], at the sites of x, which is"
            f" {list(jnp.shape(x))}, got {list(aligned.shape)}: resize it to x first"
        )
    _check_part(name, "aligned", aligned, jnp.floating, ("b", *map(str, sites), "k"))
    if context is not None and context.shape[1] == 0:
        raise ValueError(
            f"{name}: expected a token in cond.context, got {list(context.shape)}: no context is a"
            " mask of False"
        )
    if mask is not None:
        if context is None:
            raise ValueError(
                f"{name}: cond.mask says which tokens of cond.context are valid, got no context"
            )
        _check_part(name, "mask", mask, jnp.bool_, ("b", "n"))
        if mask.shape != context.shape[:2]:
            raise ValueError(
                f"{name}: expected cond.mask of shape {list(context.shape[:2])}, a truth value for"
                f" each token of cond.context {list(context.shape)}, got {list(mask.shape)}"
            )
    _check_part(name, "valid", valid, jnp.bool_, ("b", *map(str, sites)))
    if valid is not None and valid.shape[1:] != sites:
        raise ValueError(
            f"{name}: expected cond.valid of shape {list(jnp.shape(x)[:-1])}, a truth value for"
            f" each token of x {list(jnp.shape(x))}, got {list(valid.shape)}"
        )
    return cond


def _check_part(name, part, value, kind, axes) -> None:
    """Raise for a part of another kind of numbers, or another number of axes."""
    if value is None or (jnp.issubdtype(value.dtype, kind) and value.ndim == len(axes)):
        return
    words = {jnp.integer: "integers", jnp.floating: "floats", jnp.bool_: "truth values"}
    raise ValueError(
        f"{name}: expected cond.{part} to be {words[kind]} [{', '.join(axes)}], got"
        f" {described(value)}"
    )
