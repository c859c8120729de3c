"""All that a training step needs from the one before it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jflow.train.ema import as_decay, start
from jflow.types import Array, Key, NumberOrFunction, Params, PyTree


class TrainState(NamedTuple):
    """All that a training step needs from the one before it.

    Attributes:
        step: int32 scalar, the updates made so far.
        params: What is trained.
        opt_state: The optimizer's state.
        ema: Averaged params, in float32 at least, or None.
        frozen: What the loss reads and never differentiates, or None.
        key: The run's jax.random.key, always the same.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params | None
    frozen: Mapping[str, PyTree] | None
    key: Key


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Key,
    *,
    ema: NumberOrFunction | None = None,
    frozen: Mapping[str, PyTree] | None = None,
) -> TrainState:
    """The state before the first step.

    Everything is copied: donating the state touches nobody else's arrays.

    Args:
        params: What is trained.
        optimizer: The optax optimizer that `make_step` is given.
        key: The run's jax.random.key.
        ema: As given to `make_step`; the average starts at the params, in float32 at least.
        frozen: A dict of what the loss reads and never differentiates, such as {'teacher': params}.

    Returns:
        The state.

    Raises:
        ValueError: For a bad decay.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jflow import train
        >>> params = {"w": jnp.ones(2)}
        >>> state = train.init_state(params, optax.sgd(0.1), jax.random.key(0), ema=0.99)
        >>> int(state.step), state.ema["w"].tolist()
        (0, [1.0, 1.0])
    """
    if not (
        isinstance(key, jax.Array)
        and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and key.ndim == 0
    ):
        raise TypeError(f"expected one jax.random.key, got {key!r}")
    if as_decay(ema) is not None and "ema" in (frozen or {}):
        raise ValueError(
            "frozen must not hold 'ema' with ema on: that is where the loss finds the average"
        )
    params, frozen, key = jax.tree.map(_copy, (params, frozen, key))
    average = None if ema is None else jax.tree.map(_copy, start(params))
    opt_state = jax.tree.map(_copy, optimizer.init(params))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, average, frozen, key)


def _copy(x) -> Array:
    """A buffer of its own, and no weak type: a checkpoint would lose it, and the step would compile
    a second time."""
    x = jnp.asarray(x)
    return (
        jnp.copy(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else jnp.array(x, dtype=x.dtype, copy=True)
    )


def warm_start(fresh: Params, teacher: Params) -> Params:
    """Params for a student with more parts than its teacher, started at the teacher's.

    A flow map that is started from a velocity of the same network starts as u(x, t, r) = v(x, t).

    Args:
        fresh: The student's own init, whose types stay.
        teacher: The teacher's params.

    Returns:
        `fresh`, with the teacher's leaves where it has them.

    Raises:
        ValueError: Where the teacher has a leaf that the student lacks or that has another shape,
            with its path.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import train
        >>> fresh = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
        >>> train.warm_start(fresh, {"a": jnp.ones(1)})["a"].tolist()
        [1.0]
    """
    have, room = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (teacher, fresh))
    for path, leaf in have.items():
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        there = room.get(path)
        if there is None or jnp.shape(there) != jnp.shape(leaf):
            found = "no such leaf" if there is None else f"the shape {list(jnp.shape(there))}"
            raise ValueError(
                f"warm_start: the teacher's {name!r} is {list(jnp.shape(leaf))}, the student has"
                f" {found}"
            )
    taken = {path: jnp.asarray(leaf, room[path].dtype) for path, leaf in have.items()}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: taken.get(path, leaf), fresh)
