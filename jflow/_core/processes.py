"""Several processes that train as one: how they start, agree, and say so when they do not."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jflow._core.environment import COORDINATOR, COUNT, INDEX


def initialize() -> None:
    """Joins the other processes of this job.

    To be called before anything else touches JAX's devices. Under `jflow launch` the launcher says
    who they are; on a TPU pod slice, under Slurm, Open MPI and in an indexed Kubernetes job,
    jax.distributed.initialize finds out by itself.

    An error that nobody catches then ends this process at once. Python's way out would wait for the
    others, which wait for this one.
    """
    if COORDINATOR in os.environ:
        jax.distributed.initialize(
            os.environ[COORDINATOR], int(os.environ[COUNT]), int(os.environ[INDEX])
        )
    else:
        jax.distributed.initialize()
    shown = sys.excepthook

    def hook(kind, error, trace):
        shown(kind, error, trace)
        leave(1)

    sys.excepthook = hook


def leave(status: int) -> NoReturn:
    """End this process, without waiting for others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launched() -> bool:
    """Whether `jflow launch` started this process."""
    return COORDINATOR in os.environ


def is_main() -> bool:
    """Whether this is the process that writes metrics and pictures: number 0."""
    return jax.process_index() == 0


def from_main(value: Any) -> Any:
    """Process 0's value, JSON, on all of them: for what the file system or a clock decides."""
    if jax.process_count() == 1:
        return value
    return json.loads(_gather(json.dumps(value) if is_main() else "")[0])


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return (
        flag
        if jax.process_count() == 1
        else bool(multihost_utils.process_allgather(np.asarray(flag)).any())
    )


def wait_for_all(name: str) -> None:
    """Go on when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise the same ValueError on every process where their facts (JSON) differ, naming the first
    that does.

    One hash is gathered; the facts themselves only when the hashes differ.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(dict(facts), default=str)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(
        digest
    )  # the same rows everywhere, and so the same decision
    if (digests == digests[:1]).all():
        return
    theirs = [json.loads(part) for part in _gather(text)]
    first = theirs[0]
    for i, other in enumerate(theirs[1:], 1):
        for name in {**first, **other}:
            a, b = (str(facts.get(name, "missing")) for facts in (first, other))
            if a != b:
                a, b = _differing_line(a, b)
                raise ValueError(
                    f"the processes disagree on {name}: {a} in process 0, {b} in process {i}"
                )


def _differing_line(a: str, b: str) -> tuple[str, str]:
    lines = [a.splitlines(), b.splitlines()]
    for left, right in zip(*lines, strict=False):
        if left != right:
            return left.strip()[:200], right.strip()[:200]
    return f"{len(lines[0])} lines", f"{len(lines[1])} lines"


def _gather(text: str) -> list[str]:
    """The text of every process."""
    raw = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(raw)))
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(raw)] = raw
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(np.asarray(rows), lengths, strict=True)]
