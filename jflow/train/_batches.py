"""The batches of the training loop: one for each update, or those of several updates stacked."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import leaves_by_position
from jflow.data import place
from jflow.data import prefetch as prefetched
from jflow.train._state import TrainState

NextBatch = Callable[[TrainState], Mapping[str, Any] | None]


def is_iterator(batches) -> bool:
    return hasattr(batches, "__next__")


def batch_source(batches, inner: int, prefetch: int, sharding) -> tuple[Any, NextBatch]:
    """What `fit` seeks, asks for its position and closes, and the function that gives the batch of
    the next call of
    `update_loop`.

    A call of `inner` > 1 updates gets batches of an iterator stacked: one transfer. Those that a
    callable makes are made inside the call: None.
    """
    if not is_iterator(batches):
        return batches, _drawn(batches, sharding) if inner == 1 else lambda state: None
    if inner > 1:
        batches = _Stacked(batches, inner)
        if sharding is not None:
            spec = jax.sharding.PartitionSpec(None, *sharding.spec)
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
    if prefetch:
        batches, sharding = prefetched(batches, prefetch, sharding), None

    def following(state):
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError(
                f"batches ended after step {int(state.step)}: `fit` needs an endless iterator"
            ) from None
        # jit takes numpy rows in faster than device_put
        return leaves_by_position(batch) if sharding is None else place(batch, sharding)

    return batches, following


def update_loop(update, batches, inner: int, sharding) -> Callable:
    """(state, check, batch) -> (state, check, metrics): `inner` updates in a row, whose metrics are
    [inner] each."""
    if inner == 1:
        return update
    draw = None if is_iterator(batches) else _drawn(batches, None)

    def one(carry, batch):
        state, check = carry
        if draw is not None:
            batch = draw(state)
            if sharding is not None:
                batch = jax.lax.with_sharding_constraint(batch, sharding)
        state, check, metrics = update(state, check, batch)
        return (state, check), metrics

    def run(state, check, stacked):
        (state, check), metrics = jax.lax.scan(one, (state, check), stacked, length=inner)
        return state, check, metrics

    return run


def rows_of(recent: list, inner: int) -> list:
    """The metrics of every update, in order."""
    if inner == 1:
        return recent
    return [
        {name: m[k] for name, m in part.items()}
        for part in jax.device_get(recent)
        for k in range(inner)
    ]


def _drawn(batches: Callable, sharding) -> NextBatch:
    """From a callable (state, key) -> batch; its key is of a stream of its own: no step count
    reaches the top bit, so no step's key is ever this one."""
    stream = np.uint32(1 << 31)

    def draw(state):
        batch = batches(
            state, jax.random.fold_in(jax.random.fold_in(state.key, stream), state.step)
        )
        return leaves_by_position(batch) if sharding is None else place(batch, sharding)

    return draw


class _Stacked:
    """Every n batches as one, with a new leading axis; it has their position and seek."""

    def __init__(self, batches, n: int):
        self._batches, self._n = batches, n

    def __next__(self):
        return jax.tree.map(_stack, *[next(self._batches) for _ in range(self._n)])

    def __getattr__(self, name):  # position and seek, where the batches have them
        return getattr(self._batches, name)


def _stack(*leaves):
    return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)
