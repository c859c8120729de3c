"""The training loop: everything around the step."""

import contextlib
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from tqdm import tqdm

from jflow._core import processes
from jflow._core.checks import check_whole, described
from jflow._core.files import expand
from jflow._core.lock import hold
from jflow.train._batches import batch_source, is_iterator, rows_of, update_loop
from jflow.train._checkpointing import (
    Best,
    Counts,
    check_unsaved,
    fingerprints,
    judge_best,
    resume_run,
    save_run,
    saved_part,
)
from jflow.train._interruptions import (
    as_floats,
    check_finite,
    init_finite_check,
    signals,
    with_finite_check,
)
from jflow.train._record import Recorder, Row
from jflow.train._rules import forms
from jflow.train._sharding import put, shardings_of
from jflow.train._state import TrainState
from jflow.train._step import Step
from jflow.types import Metrics


class Fit(NamedTuple):
    """What `fit` returns.

    Attributes:
        state: The last state.
        best: The best evaluation; None without `monitor`.
        history: The rows of metrics, one a logged step.
    """

    state: TrainState
    best: Best | None
    history: list[Row]


def fit(
    state: TrainState,
    step: Step,
    batches: Iterator[Mapping[str, Any]] | Callable,
    *,
    steps: int,
    workdir: str | Path | None = None,
    log_every: int = 50,
    save_every: int = 500,
    eval_every: int | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    picture: Callable[[TrainState], Any] | None = None,
    monitor: str | None = None,
    patience: int | None = None,
    skip_nonfinite: bool = False,
    max_to_keep: int = 3,
    unsaved: Sequence[str] = (),
    inner: int = 1,
    prefetch: int = 0,
    progress: bool = True,
    preprocess: Mapping[str, Any] | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Fit:
    """Trains until state.step == steps: the loop around a step, with checkpoints and metrics.

    The state is donated: use the one that comes back. Metrics are fetched every `log_every` steps;
    in between nothing waits for the device. SIGTERM and SIGINT finish the step, save, say so on
    stderr, and then raise SystemExit(143) or KeyboardInterrupt.

    Several processes (`train.initialize`) run the same call, with the state on a mesh of all their
    devices and each its own share of the rows. `evaluate` and `picture` run on all; the numbers of
    process 0 count, and it alone writes metrics and pictures. Signals are heeded at the next logged
    step.

    Args:
        state: From `init_state`.
        step: From `make_step`, not jitted.
        batches: An iterator of dicts with `position` and `seek(position)` (`data.batches`), or, for
            rollouts, a callable (state, key) -> batch that gets a new key every step.
        steps: Updates in all, counted from the first.
        workdir: Gets metrics.jsonl, pictures and checkpoints. A workdir with checkpoints is resumed
            from its newest readable one, and ends with the params of a run that never stopped, bit
            for bit.
        log_every: Updates between two lines of metrics.
        save_every: Updates between two checkpoints; the end is saved too.
        eval_every: Updates between two evaluations; None evaluates at the end alone.
        evaluate: (state) -> {name: number}.
        picture: (state) -> image, drawn when `evaluate` runs.
        monitor: The name of an evaluated number; the params where it was lowest are kept, in
            WORKDIR/best too.
        patience: Stops after so many evaluations in a row without a new lowest.
        skip_nonfinite: Whether an update that is not finite is left out (params, optimizer, average
            and frozen stay, the metric 'skipped' counts) instead of stopping.
        max_to_keep: How many of the newest checkpoints stay.
        unsaved: Names in state.frozen that checkpoints leave out, such as 'base' of
            `adapters.adapter_loss`, whose checkpoints then hold the adapter alone. A run that goes
            on takes them from `state`; `refresh` must leave them as they are.
        inner: So many updates run on the device between two visits of the host, which small
            networks would else wait for. Batches of an iterator are stacked and sent at once; a
            callable must be one that jax can trace. steps, log_every, eval_every and, with a
            workdir, save_every are multiples of inner. The updates are those of inner=1, up to
            rounding.
        prefetch: So many batches (of a visit) are made and sent ahead by a thread, see
            `data.prefetch`; at the end `batches` stands where the run stopped.
        progress: Whether to show a progress bar.
        preprocess: JSON that the checkpoints hold too.
        sharding: Where batches go, such as data_sharding(mesh); the state stays where it is
            (`train.shard`).

    Returns:
        The last state, the best evaluation and the metrics.

    Raises:
        NonFiniteError: That names the step, its metrics and the last good checkpoint: none is saved
            after it.
        ValueError: Where another run is in the workdir; where options do not fit one another; on
            every process and naming what differs, where processes disagree on options, state, batch
            or step; where what `unsaved` names is not what the checkpoints were trained with.

    Examples:
        >>> import jax, jax.numpy as jnp, numpy as np, optax
        >>> from jflow import data, train
        >>> def loss(params, key, batch, frozen=None):
        ...     return jnp.mean((batch["x"] - params["m"]) ** 2), {}
        >>> state = train.init_state({"m": jnp.zeros(())}, optax.sgd(0.5), jax.random.key(0))
        >>> step, rows = train.make_step(loss, optax.sgd(0.5)), {"x": np.full(8, 3.0)}
        >>> done = train.fit(state, step, data.batches(rows, 4), steps=3, progress=False)
        >>> float(done.state.params["m"])
        3.0
    """
    _check(
        batches,
        steps,
        workdir,
        log_every,
        save_every,
        eval_every,
        evaluate,
        picture,
        monitor,
        patience,
        max_to_keep,
        inner,
        prefetch,
    )
    several, main = jax.process_count() > 1, processes.is_main()
    options = dict(
        steps=steps,
        log_every=log_every,
        save_every=save_every,
        eval_every=eval_every,
        monitor=monitor,
        patience=patience,
        skip_nonfinite=skip_nonfinite,
        inner=inner,
        unsaved=tuple(unsaved),
    )
    saved_part(state, unsaved)  # names that are not there are an error before anything is written
    processes.check_agreement({"the state": forms(state), **options})
    # One placement for fresh and restored states, so that the same program runs after a resume.
    shardings = shardings_of(state)
    if several and len(shardings.step.device_set) < jax.device_count():
        raise ValueError(
            "several processes train as one on a mesh of all their devices: train.shard(state,"
            " mesh)"
        )
    folder = None if workdir is None else expand(workdir)
    with contextlib.nullcontext() if folder is None else hold(folder):
        state, best, counts = put(state, shardings), None, Counts()
        source, next_batch = batch_source(batches, inner, prefetch, sharding)
        marks: dict[str, int] = {}
        if folder is not None:
            marks = fingerprints(state, unsaved)
            state, best, counts = resume_run(folder, state, source, marks, unsaved)
        n = saved = int(state.step)
        if n % inner:
            raise ValueError(f"expected a state whose step inner={inner} divides, got step {n}")
        record = Recorder(folder, n, writes=main)
        started = time.monotonic() - counts.seconds
        scalar = state.step.sharding
        fresh = init_finite_check(counts.skipped)
        check = put(fresh, jax.tree.map(lambda _: scalar, fresh))
        out = (shardings, scalar, scalar)
        update = update_loop(with_finite_check(step, skip_nonfinite), batches, inner, sharding)
        advance = jax.jit(update, donate_argnums=(0, 1), out_shardings=out)
        # Metrics since the last look at them, still on the device; with inner > 1 each of inner
        # updates.
        recent: list[Metrics] = []

        def look():
            last = (
                f"last good checkpoint: step {saved} in {folder}"
                if saved
                else "no checkpoint was saved before it"
            )
            rows = rows_of(recent, inner)
            check_finite(check, n, rows, last)
            return rows[-1] if rows else None

        def save():
            look()
            extra = counts._replace(
                skipped=int(check.skipped), seconds=time.monotonic() - started
            )._asdict()
            position = getattr(source, "position", None)
            found = fingerprints(state, unsaved)
            check_unsaved(found, marks, f"has changed before step {n}", "do not refresh it")
            save_run(
                folder,
                n,
                saved_part(state, unsaved),
                best,
                position,
                {"fit": extra, "preprocess": preprocess} | ({"unsaved": marks} if marks else {}),
                max_to_keep,
            )

        bar = tqdm(
            desc="compiling",
            total=steps,
            initial=n,
            unit="step",
            disable=not (progress and main),
            file=sys.stderr,
        )
        closed = (
            contextlib.closing(source)
            if prefetch and is_iterator(batches)
            else contextlib.nullcontext()
        )
        with signals() as caught, contextlib.closing(record), closed, bar:
            stop, unchecked = False, several
            while n < steps and not stop and (patience is None or counts.failed < patience):
                batch = next_batch(state)
                if unchecked:
                    advance, unchecked = _agreed_on(advance, state, check, batch), False
                state, check, metrics = advance(state, check, batch)
                n += inner
                recent.append(metrics)
                bar.set_description(refresh=False)  # the first step has been compiled
                bar.update(inner)
                ends = n == steps
                log, judge = (
                    ends or n % log_every == 0,
                    ends or bool(eval_every and n % eval_every == 0),
                )
                if log or judge:
                    values = as_floats("metric", look())
                    row = {
                        "step": n,
                        "time": round(time.monotonic() - started, 3),
                        "loss": values["loss"],
                    } | values
                    if skip_nonfinite:
                        row["skipped"] = int(check.skipped)
                    bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                    if judge and evaluate is not None:
                        scores = processes.from_main(as_floats("evaluate's", evaluate(state)))
                        row |= {f"eval/{name}": score for name, score in scores.items()}
                        if monitor is not None:
                            best, counts = judge_best(state, n, scores, monitor, best, counts)
                    if judge and picture is not None:
                        record.picture(n, picture(state))
                    record.write(row)
                    recent.clear()
                stop = bool(caught) if not several else log and processes.any_of(bool(caught))
                if folder is not None and n % save_every == 0:
                    save()
                    saved = n
            if folder is not None and saved < n:
                save()
    if stop:
        _stopped(caught, n, folder)
    return Fit(state, best, record.rows)


def _stopped(caught: list[int], n: int, workdir: Path | None) -> NoReturn:
    """Say what a signal left, and raise what it would have raised."""
    name = signal.Signals(caught[0]).name if caught else "a signal to another process"
    saved = f"step {n} is saved in {workdir}; the same call goes on from there"
    if workdir is None:
        saved = f"step {n} is not saved, since there is no workdir"
    if processes.is_main():
        print(f"jflow: {name}: {saved}", file=sys.stderr, flush=True)
    raise KeyboardInterrupt if caught and caught[0] == signal.SIGINT else SystemExit(143)


def _agreed_on(advance, state, check, batch):
    """The program, compiled, if all processes have the same: each would else wait for another
    collective, forever."""
    lowered = advance.lower(state, check, batch)
    digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    processes.check_agreement({"the batch": forms(batch), "the program of the step": digest})
    return lowered.compile()


def _check(
    batches,
    steps,
    workdir,
    log_every,
    save_every,
    eval_every,
    evaluate,
    picture,
    monitor,
    patience,
    max_to_keep,
    inner,
    prefetch,
):
    counts = {
        "steps": steps,
        "log_every": log_every,
        "save_every": save_every,
        "max_to_keep": max_to_keep,
        "inner": inner,
    }
    optional = {"eval_every": eval_every, "patience": patience}
    check_whole(
        "fit", **counts, **{name: count for name, count in optional.items() if count is not None}
    )
    for name in ("steps", "log_every", "eval_every") + (() if workdir is None else ("save_every",)):
        if (count := (counts | optional)[name]) and count % inner:
            raise ValueError(f"expected {name} to be a multiple of inner={inner}, got {count}")
    if not (is_iterator(batches) or callable(batches)):
        raise TypeError(
            "fit: expected batches to be an iterator or a callable (state, key) -> batch, got "
            f"{described(batches)}; data.batches makes one of a dict of arrays"
        )
    seekable = hasattr(batches, "position") and hasattr(batches, "seek")
    check_whole("fit", 0, prefetch=prefetch)
    if workdir is not None and not callable(batches) and not seekable:
        raise TypeError(
            "with a workdir, batches need `position` and `seek(position)` (jflow.data.batches has"
            " them)"
        )
    if monitor is not None and evaluate is None:
        raise ValueError(f"monitor={monitor!r} names a number of `evaluate`, which is None")
    if patience is not None and monitor is None:
        raise ValueError("patience counts evaluations of `monitor`, which is None")
    if picture is not None and workdir is None:
        raise ValueError("pictures are saved to the workdir, which is None")
