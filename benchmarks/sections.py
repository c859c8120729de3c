"""Tables of several sections in one run within a budget of seconds: each in a process of its own, a
failure a cell.

A section is a function of the command's arguments that yields rows, (first cells, () -> the other
cells), and notes, strings, which are printed below its table. A cell is anything printable, or the
exception that stands for it. Rows are printed, and appended to args.out, as soon as they are
measured.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from clocks import interleaved, seconds


class Section(NamedTuple):
    rows: Callable
    share: float  # of the budget; what the sections before it left is added
    title: str
    header: str  # of the columns, with | between them


def run_all(sections, names, args, head):
    """Ends the command, with a status other than 0 if anything failed. sections: {name: Section};
    head(args): prints what stands above all, in the first process, so that this one never touches
    the device; args has budget and out."""
    context, start, failed, share = multiprocessing.get_context("spawn"), time.time(), [], 0.0
    whole = sum(sections[name].share for name in names)
    for i, name in enumerate(names):
        share += sections[name].share / whole
        deadline = (
            start + 0.9 * share * args.budget
        )  # no row is begun after it; the section is ended a tenth later
        if time.time() > start + 0.9 * args.budget:
            emit(args, f"\n{name}: not measured, the budget of {args.budget:g} s was used up.")
            continue
        child = context.Process(
            target=run_one, args=(name, sections[name], args, deadline, None if i else head)
        )
        child.start()
        child.join(max(0.0, deadline + 0.1 * args.budget - time.time()))
        if child.is_alive():
            child.kill()
            child.join()
            emit(args, row([name, TimeoutError("ended in a row that took too long")]))
        elif child.exitcode < 0:
            emit(args, row([name, RuntimeError(f"ended by signal {-child.exitcode}")]))
        failed += [name] * (child.exitcode != 0)
    emit(
        args,
        f"\n{time.time() - start:.0f} s"
        + (f", with failures: {', '.join(failed)}." if failed else "."),
    )
    sys.exit(bool(failed))


def run_one(name, section, args, deadline, head):
    """One section in this process, whose status is the number of failures."""
    if head:
        head(args)
    emit(
        args,
        f"\n### {section.title}\n\n| {section.header}"
        f" |\n|{'---|' * len(section.header.split('|'))}",
    )
    notes, failures = [], 0
    try:
        for item in section.rows(args):
            if isinstance(item, str):
                notes.append(item)
                continue
            label, measure = item
            if time.time() > deadline:
                notes.append(
                    f"From {', '.join(map(str, label))} on not measured: the time was used up."
                )
                break
            cells = attempt(measure)
            cells = [cells] if isinstance(cells, Exception) else cells
            failures += sum(isinstance(c, Exception) for c in cells)
            emit(args, row([*label, *cells]))
    except Exception as error:
        failures += 1
        emit(args, row([name, error]))
    for note in notes:
        emit(args, f"\n{note}")
    sys.exit(min(failures, 99))


def attempt(f, *args):
    """f(*args), or the exception that it ended with."""
    try:
        return f(*args)
    except Exception as error:
        return error.with_traceback(None)  # whose frames would hold arrays


def cell(f, *values):
    """f(*values), or the first of the values that is an exception."""
    return next((v for v in values if isinstance(v, Exception)), None) or f(*values)


def timed(calls, args):
    """{name: seconds of a call in every turn, or an exception}, of {name: call, or an exception}.

    After a first call, which compiles, all take turns; short ones are chained to args.turn seconds,
    so that launches overlap. There are args.repeats turns, or as many, at least 3, as fit into
    args.row seconds.
    """
    first = {name: cell(lambda call: attempt(seconds, call), call) for name, call in calls.items()}
    alive = [name for name in calls if not isinstance(first[name], Exception)]
    if not alive:
        return first
    second = {name: seconds(calls[name]) for name in alive}
    lengths = {name: int(np.clip(args.turn / second[name], 1, 100)) for name in alive}
    once = sum(lengths[name] * second[name] for name in alive)
    turns = int(np.clip(args.row / once, 3, args.repeats))
    times = interleaved(
        {name: partial(several, calls[name], lengths[name]) for name in alive}, turns
    )
    return {
        name: np.asarray(times[name]) / lengths[name] if name in times else first[name]
        for name in calls
    }


def several(call, n):
    return [call() for _ in range(n)]


def milliseconds(times):
    return cell(lambda s: f"{1e3 * np.median(s):.3g}", times)


def ratio(times, others):
    """The median over turns of times / others."""
    return cell(lambda a, b: f"{np.median(a / b):.2f}", times, others)


def mebibytes(program):
    """Temporary memory of a compiled program."""
    return f"{program.memory_analysis().temp_size_in_bytes / 2**20:.1f}"


def emit(args, line):
    print(line, flush=True)
    if args.out:
        with open(args.out, "a") as file:
            print(line, file=file)


def row(cells):
    """A line of a table; an exception by its type and the first line of its message."""

    def text(c):
        c = f"{type(c).__name__}: {c}".splitlines()[0][:160] if isinstance(c, Exception) else f"{c}"
        return c.replace("|", "/")

    return f"| {' | '.join(map(text, cells))} |"
