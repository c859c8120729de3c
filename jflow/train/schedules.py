"""Schedules of pipelines, played tick by tick: who works when, and who waits.

They compare schedules before one is run, and those that one program for all devices cannot express:
`train.pipelined` runs `interleaved`, which is `gpipe` for one round.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jflow._core.checks import check_whole

__all__ = [
    "Op",
    "Timeline",
    "fill_bubbles",
    "gpipe",
    "interleaved",
    "one_forward_one_backward",
    "play",
    "split_backward",
]


class Op(NamedTuple):
    """What a device does in a schedule: a pass of one microbatch through one group of layers.

    Attributes:
        kind: 'forward', 'backward' (both gradients at once), where the backward pass is split
            'inputs' and 'weights', or 'frozen'.
        microbatch: Its number; for 'frozen' ops (`fill_bubbles`) the number of the task.
        group: Of the layers, in the order of the network.
    """

    kind: str
    microbatch: int
    group: int


class Timeline(NamedTuple):
    """A schedule that was played.

    Attributes:
        busy: For each device (start, end, op), in ticks.
        ticks: When the last op ends.
        idle: The share of the devices' time in which nothing runs: the bubble.
        held: For each device, the most passes whose activations it held at once.
    """

    busy: list[list[tuple[float, float, Op]]]
    ticks: float
    idle: float
    held: list[int]


def gpipe(stages: int, microbatches: int) -> list[list[Op]]:
    """The schedule of GPipe: all forward passes, then all backward passes.

    The bubble is (p - 1) / (m + p - 1); a device holds the activations of m microbatches.

    Args:
        stages: The number p of devices, with one group of layers each.
        microbatches: Their number m.

    Returns:
        For each device its ops in order, for `play`.

    Raises:
        ValueError: A count is not a whole number of at least 1.

    References:
        Huang et al., *GPipe: Efficient Training of Giant Neural Networks using Pipeline
            Parallelism*, 2019, arXiv:1811.06965.
    """
    check_whole("gpipe", stages=stages, microbatches=microbatches)
    turns = range(microbatches)
    return [
        [Op("forward", i, s) for i in turns] + [Op("backward", i, s) for i in reversed(turns)]
        for s in range(stages)
    ]


def one_forward_one_backward(stages: int, microbatches: int) -> list[list[Op]]:
    """The schedule 1F1B: a device turns back as soon as it can.

    The bubble is that of `gpipe`, (p - 1) / (m + p - 1), but a device holds the activations of at
    most p microbatches.

    Args:
        stages: The number p of devices, with one group of layers each.
        microbatches: Their number m.

    Returns:
        For each device its ops in order, for `play`.

    Raises:
        ValueError: A count is not a whole number of at least 1.

    References:
        Narayanan, Phanishayee, Shi, Chen, Zaharia, *Memory-Efficient Pipeline-Parallel DNN
            Training*, 2021, arXiv:2006.09503, where it is PipeDream-Flush.
    """
    check_whole("one_forward_one_backward", stages=stages, microbatches=microbatches)
    schedule = []
    for s in range(stages):
        ahead = min(stages - s, microbatches)  # forward passes before the first way back
        ops = [Op("forward", i, s) for i in range(ahead)]
        for i in range(microbatches):
            ops.append(Op("backward", i, s))
            if ahead + i < microbatches:
                ops.append(Op("forward", ahead + i, s))
        schedule.append(ops)
    return schedule


def interleaved(stages: int, microbatches: int, rounds: int) -> list[list[Op]]:
    """The circular schedule of `pipelined`: device s holds the groups s, s + p, s + 2 p, ...

    Also known as: circular pipeline, looping.

    All forward passes, then all backward passes; the bubble is (p - 1) / (v m + p - 1).

    Args:
        stages: The number p of devices.
        microbatches: Their number m, at least p.
        rounds: The number v of groups of layers a device.

    Returns:
        For each device its ops in order, for `play`.

    Raises:
        ValueError: A count is not a whole number of at least 1, or m is below p.

    References:
        Narayanan et al., *Efficient Large-Scale Language Model Training on GPU Clusters Using
            Megatron-LM*, 2021, arXiv:2104.04473, for groups that are not neighbors. The order here
            is that of one program for all devices.
    """
    check_whole("interleaved", stages=stages, microbatches=microbatches, rounds=rounds)
    if microbatches < stages:
        raise ValueError(
            f"interleaved: expected at least as many microbatches as stages, {stages}, got"
            f" {microbatches}"
        )
    schedule = []
    for s in range(stages):
        turns = [(r * stages + s, i) for r in range(rounds) for i in range(microbatches)]
        ops = [Op("forward", i, group) for group, i in turns]
        schedule.append(ops + [Op("backward", i, group) for group, i in reversed(turns)])
    return schedule


def split_backward(schedule: Sequence[Sequence[Op]]) -> list[list[Op]]:
    """A schedule whose backward passes are split in two: 2BP.

    The gradients of the inputs, for which the device before waits, come at once; those of the
    weights, for which none waits, come last, or earlier where the device would wait. With passes of
    one tick each the bubbles are

        2 (p - 1) / (3 m + 2 (p - 1)) for `gpipe`,
        (p - 1) / (3 m + p - 1)       for 1F1B, from m = p on.

    Args:
        schedule: With backward passes in one.

    Returns:
        For each device its ops in order, for `play`, those of kind 'weights' at the end.

    References:
        Rae, Lee, Richings, *2BP: 2-Stage Backpropagation*, 2024, arXiv:2405.18047.
    """
    split = []
    for ops in schedule:
        now = [op._replace(kind="inputs") if op.kind == "backward" else op for op in ops]
        split.append(now + [op._replace(kind="weights") for op in ops if op.kind == "backward"])
    return split


def play(schedule: Sequence[Sequence[Op]], ticks: Mapping[str, float] | None = None) -> Timeline:
    """Play a schedule: each op starts when its device is free and what it reads is there.

    A forward pass reads that of the group before, a backward pass its own forward pass and the
    backward pass of the group after. Sending takes no time. Gradients of weights step in where a
    device would wait.

    Args:
        schedule: For each device its ops in order.
        ticks: How long a pass of each kind takes; by default forward, inputs, and weights 1,
            backward 2.

    Returns:
        Who worked when.

    Raises:
        ValueError: A device would wait for ever, a kind has no ticks, or an op stands twice.

    Examples:
        >>> from jflow.train import schedules
        >>> timeline = schedules.play(schedules.gpipe(stages=4, microbatches=4))
        >>> timeline.ticks, round(timeline.idle, 3), timeline.held[0]  # (p - 1) / (m + p - 1)
        (21.0, 0.429, 4)
        >>> timeline = schedules.play(schedules.one_forward_one_backward(4, 16))
        >>> timeline.held  # activations: at most p
        [4, 3, 2, 1]
    """
    ticks = {"forward": 1, "backward": 2, "inputs": 1, "weights": 1, **(ticks or {})}
    ops = [op for device in schedule for op in device]
    if unknown := {op.kind for op in ops} - set(ticks):
        raise ValueError(
            f"play: expected kinds of ops among {sorted(ticks)}, got {sorted(unknown)}"
        )
    if len(set(ops)) != len(ops):
        raise ValueError("play: expected each op once in a schedule, got one twice")
    last = max(op.group for op in ops)
    ordered = [[op for op in device if op.kind != "weights"][::-1] for device in schedule]
    loose = [[op for op in device if op.kind == "weights"][::-1] for device in schedule]
    free: list[float] = [0.0] * len(schedule)
    ends: dict[Op, float] = {}
    busy: list[list[tuple[float, float, Op]]] = [[] for _ in schedule]

    def start(device, op):
        """When it can start, inf while something that it reads has no end yet."""
        return max([free[device], *(ends.get(read, math.inf) for read in _reads(op, last))])

    for _ in ops:
        # The earliest first: what reads something without an end can only start later.
        ready = [
            (start(device, left[-1]), left is loose[device], device)
            for device in range(len(schedule))
            for left in (ordered[device], loose[device])
            if left
        ]
        begin, is_loose, device = min(ready)
        if begin == math.inf:
            raise ValueError(f"play: device {device} waits for ever for {ordered[device][-1]}")
        op = (loose if is_loose else ordered)[device].pop()
        free[device] = ends[op] = begin + ticks[op.kind]
        busy[device].append((begin, ends[op], op))
    return _timeline(busy)


def fill_bubbles(timeline: Timeline, tasks: Sequence[float]) -> Timeline:
    """Put work that no pass waits for, such as frozen encoders on the next batch, into the waits.

    The longest task comes first, each into the earliest wait that holds it whole; what fits none
    is done at the end, by the device that is done first.

    Args:
        timeline: A schedule that was played.
        tasks: How many ticks each takes; any device can do it.

    Returns:
        The timeline with ops of kind 'frozen'.

    Examples:
        >>> from jflow.train import schedules
        >>> timeline = schedules.play(schedules.gpipe(stages=4, microbatches=4))
        >>> filled = schedules.fill_bubbles(timeline, [1.0] * 30)
        >>> filled.ticks, round(filled.idle, 3)
        (21.0, 0.071)

    References:
        Tian, Jia, Luo, Wang, Wu, *DiffusionPipe: Training Large Diffusion Models with Efficient
            Pipelines*, 2024, arXiv:2405.01248. The order of the tasks is ours.
    """
    busy = [list(device) for device in timeline.busy]
    for number, task in sorted(enumerate(tasks), key=lambda pair: -pair[1]):
        waits = []
        for device, worked in enumerate(busy):
            begin = 0.0
            for next_begin, end, _ in [*worked, (timeline.ticks, 0.0, None)]:
                if next_begin - begin >= task:
                    waits.append((begin, device))
                    break
                begin = max(begin, end)
        done = min((worked[-1][1], device) for device, worked in enumerate(busy))
        begin, device = min(waits, default=done)
        busy[device].append((begin, begin + task, Op("frozen", number, -1)))
        busy[device].sort()
    return _timeline(busy)


def _reads(op: Op, last: int) -> list[Op]:
    """The ops that it waits for."""
    if op.kind == "forward":
        return [op._replace(group=op.group - 1)] if op.group else []
    if op.kind == "weights":
        return [op._replace(kind="inputs")]
    after = [op._replace(group=op.group + 1)] if op.group < last else []
    return [op._replace(kind="forward"), *after]


def _timeline(busy) -> Timeline:
    ticks = max(worked[-1][1] for worked in busy)
    worked = sum(end - begin for device in busy for begin, end, _ in device)
    return Timeline(busy, ticks, 1 - worked / (ticks * len(busy)), [_held(d) for d in busy])


def _held(worked) -> int:
    """The most passes between the start of a forward pass and the end of its last backward pass."""
    last = "weights" if any(op.kind == "weights" for *_, op in worked) else "backward"
    starts = [(begin, 1) for begin, _, op in worked if op.kind == "forward"]
    ends = [(end, -1) for _, end, op in worked if op.kind == last]
    now = most = 0
    for _, change in sorted(starts + ends):  # an end before a start at the same time
        now += change
        most = max(most, now)
    return most
