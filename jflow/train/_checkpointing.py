"""The checkpoints that `fit` writes and resumes from, the best params, and its own counts."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow._core import processes
from jflow.train import checkpoint
from jflow.train._state import TrainState
from jflow.types import Array, Params


class Best(NamedTuple):
    """The evaluation where the monitored number was lowest.

    Attributes:
        step: How many updates had been made.
        value: The number.
        params: The params then.
        ema: Their average then, or None.
    """

    step: int
    value: float
    params: Params
    ema: Params | None


class Counts(NamedTuple):
    """What `fit` itself has to remember over a resume."""

    best: tuple[int, float] | None = None  # step and value
    failed: int = 0  # evaluations in a row without a new best
    skipped: int = 0
    seconds: float = 0.0


def judge_best(state: TrainState, n: int, scores, monitor: str, best: Best | None, counts: Counts):
    """The best evaluation so far, and the count of those since; NaN is never better."""
    if monitor not in scores:
        raise ValueError(
            f"monitor {monitor!r} is not among what evaluate returned: {sorted(scores)}"
        )
    value = scores[monitor]
    if not (value < (float("inf") if counts.best is None else counts.best[1])):
        return best, counts._replace(failed=counts.failed + 1)
    params, ema = jax.tree.map(
        jnp.copy, (state.params, state.ema)
    )  # the state is about to be donated
    return Best(n, value, params, ema), counts._replace(best=(n, value), failed=0)


def best_state(state: TrainState, step: int, params, ema) -> TrainState:
    """What WORKDIR/best keeps of a state."""
    return TrainState(jnp.full_like(state.step, step), params, (), ema, None, state.key)


def saved_part(state: TrainState, unsaved: Sequence[str]) -> TrainState:
    """What a checkpoint holds of a state: all but some names in frozen."""
    if not unsaved:
        return state
    frozen = state.frozen or {}
    if missing := [name for name in unsaved if name not in frozen]:
        raise ValueError(
            f"fit: expected unsaved to name parts of state.frozen, which has {sorted(frozen)}, got"
            f" {missing}"
        )
    kept = {name: tree for name, tree in frozen.items() if name not in unsaved}
    return state._replace(frozen=kept)


def fingerprints(state: TrainState, unsaved: Sequence[str]) -> dict[str, int]:
    """A number for the bits of each leaf that checkpoints leave out, by its path."""
    left_out = {name: (state.frozen or {})[name] for name in unsaved}
    leaves = jax.tree_util.tree_leaves_with_path(left_out)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    marks = jax.device_get(_hashes([leaf for _, leaf in leaves]))
    return {path: int(mark) for path, mark in zip(paths, marks, strict=True)}


@jax.jit
def _hashes(leaves: list[Array]) -> list[Array]:
    """The bytes of each leaf, mixed with their places and summed modulo 2^32: the order of a sum
    has no influence, so that every mesh has the same."""

    def total(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        octets = jax.lax.bitcast_convert_type(x, jnp.uint8).ravel().astype(jnp.uint32)
        places = jnp.arange(octets.size, dtype=jnp.uint32)
        return jnp.sum(_mixed(octets + _mixed(places)), dtype=jnp.uint32)

    return [total(leaf) for leaf in leaves]


def _mixed(x: Array) -> Array:
    """A map of uint32 onto themselves, by which near numbers come far from one another."""
    for factor in (0x9E3779B1, 0x85EBCA6B):
        x = (x ^ (x >> 16)) * jnp.uint32(factor)
    return x ^ (x >> 15)


def check_unsaved(found: dict[str, int], expected: dict[str, int], where: str, reason: str) -> None:
    """Raise, naming the first leaf that differs, unless what checkpoints leave out is as it was."""
    for path in [*expected, *found]:
        if found.get(path) != expected.get(path):
            raise ValueError(
                f"frozen leaf {path!r}, which checkpoints leave out, {where}: {reason}"
            )


def save_run(
    workdir: Path, n: int, state: TrainState, best: Best | None, position, extra, max_to_keep: int
) -> None:
    """The best params first: a checkpoint may then name them. They stay as long as a checkpoint
    that is kept might."""
    folder = workdir / "best"
    if best is not None and best.step not in checkpoint.steps(folder):
        checkpoint.save(
            folder,
            best.step,
            best_state(state, best.step, best.params, best.ema),
            None,
            extra,
            max_to_keep=None,
        )
    checkpoint.save(workdir, n, state, position, extra, max_to_keep=max_to_keep)
    if processes.is_main():
        oldest = checkpoint.steps(workdir)[0]
        for step in [s for s in checkpoint.steps(folder) if s <= oldest][:-1]:
            checkpoint.discard(folder, step)
    processes.wait_for_all("jflow: old best params deleted")


def resume_run(
    workdir: Path, state: TrainState, batches, marks: dict[str, int], unsaved: Sequence[str]
) -> tuple[TrainState, Best | None, Counts]:
    """The newest readable checkpoint, or the state as given where there is none.

    What checkpoints leave out is that of the state as given, which must be what they were trained
    with.
    """
    try:
        found = checkpoint.restore(workdir, saved_part(state, unsaved))
        check_unsaved(
            marks,
            found.extra.get("unsaved", {}),
            f"is another one than that of the checkpoint of step {found.step} in {workdir}",
            "go on with what it was trained with",
        )
        if unsaved:
            given = {name: (state.frozen or {})[name] for name in unsaved}
            state = found.state._replace(frozen={**(found.state.frozen or {}), **given})
        else:
            state = found.state
        counts, best = Counts(**found.extra.get("fit", {})), None
        if found.position is not None:
            batches.seek(found.position)
    except FileNotFoundError:
        counts, best = Counts(), None
    if processes.is_main():
        for step in checkpoint.steps(workdir / "best"):
            if step > int(state.step):  # this run is going to find it again
                checkpoint.discard(workdir / "best", step)
    processes.wait_for_all("jflow: resumed")
    if counts.best is not None:
        step, value = counts.best
        like = best_state(state, step, state.params, state.ema)
        try:
            there = checkpoint.restore(workdir / "best", like, step).state
            best = Best(step, value, there.params, there.ema)
        except (FileNotFoundError, ValueError) as error:
            if processes.is_main():
                warnings.warn(f"the best params so far are lost: {error}", stacklevel=2)
    return state, best, counts
