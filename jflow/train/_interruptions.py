"""What interrupts a run: numbers that are not finite, and signals."""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jflow._core.keys import is_key
from jflow.train._state import TrainState
from jflow.train._step import Step
from jflow.types import Array, Metrics


class NonFiniteError(FloatingPointError):
    """The loss, its gradient or the updated params ceased to be finite."""


class FiniteCheck(NamedTuple):
    """On the device, so that no step waits for the host: the first update that was not finite (0:
    none so far), and how many were left out."""

    bad: Array
    skipped: Array


def init_finite_check(skipped: int = 0) -> FiniteCheck:
    return FiniteCheck(jnp.int32(0), jnp.int32(skipped))


def with_finite_check(
    step: Step, skip: bool
) -> Callable[..., tuple[TrainState, FiniteCheck, Metrics]]:
    """(state, check, batch) -> (state, check, metrics). skip: a bad update leaves all but the step
    count as it was."""

    def run(state: TrainState, check: FiniteCheck, batch):
        new, metrics = step(state, batch)
        values = jnp.stack([metrics["loss"], metrics["grad_norm"], optax.tree.norm(new.params)])
        fine = jnp.isfinite(values).all()
        if not skip:
            return (
                new,
                check._replace(bad=jnp.where((check.bad == 0) & ~fine, new.step, check.bad)),
                metrics,
            )
        chosen = jax.tree.map(lambda a, b: a if is_key(a) else jnp.where(fine, a, b), new, state)
        chosen = chosen._replace(step=new.step)
        return chosen, check._replace(skipped=check.skipped + ~fine), metrics

    return run


def check_finite(check: FiniteCheck, n: int, recent: Sequence[Metrics], last_good: str) -> None:
    """Raise NonFiniteError if an update was bad. recent: the metrics of the steps up to n since the
    last check."""
    bad = int(check.bad)
    if bad:
        metrics = as_floats("metric", recent[bad - n - 1])
        said = ", ".join(f"{name}={value:.6g}" for name, value in metrics.items())
        what = (
            "the params are"
            if math.isfinite(metrics["loss"] + metrics["grad_norm"])
            else "the loss or its gradient is"
        )
        raise NonFiniteError(f"{what} not finite at step {bad}: {said}; {last_good}")


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Within, SIGTERM and SIGINT only add to the list that is given; a second one acts as it did
    before.

    Outside the main thread, where Python allows no handlers, the list stays empty. A signal that
    the process was started to ignore (nohup) stays ignored.
    """
    caught: list[int] = []
    before: dict[int, object] = {}

    def restore():
        while before:
            signal.signal(*before.popitem())

    def catch(number, frame):
        caught.append(number)
        restore()

    for number in (
        (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is threading.main_thread()
        else ()
    ):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def as_floats(what: str, metrics: Mapping[str, object]) -> dict[str, float]:
    """Scalars off the device, in one transfer; an error names one that is not a scalar."""
    values = jax.device_get(dict(metrics))
    for name, value in values.items():
        if jnp.ndim(value):
            raise ValueError(
                f"{what} {name!r}: expected a scalar, got shape {list(jnp.shape(value))}"
            )
    return {name: float(value) for name, value in values.items()}
