"""The checkpoints that `fit` writes and resumes from, the best params, and its own counts."""

import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow._core import processes
from jflow.train import checkpoint
from jflow.train._state import TrainState
from jflow.types import Params


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


def resume_run(workdir: Path, state: TrainState, batches) -> tuple[TrainState, Best | None, Counts]:
    """The newest readable checkpoint, or the state as given where there is none."""
    try:
        found = checkpoint.restore(workdir, state)
        state, counts, best = found.state, Counts(**found.extra.get("fit", {})), None
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
