"""Schedules of pipelines: their bubbles against the published formulas."""

import pytest

from jflow.train import schedules
from jflow.train.schedules import Op

COUNTS = [(2, 2), (4, 4), (4, 16), (8, 8), (8, 32)]


@pytest.mark.parametrize(("p", "m"), COUNTS)
def test_bubbles_are_the_published_ones(p, m):
    ways = {
        "gpipe": (schedules.gpipe(p, m), (p - 1) / (m + p - 1)),
        "1f1b": (schedules.one_forward_one_backward(p, m), (p - 1) / (m + p - 1)),
        "circular": (schedules.interleaved(p, m, 3), (p - 1) / (3 * m + p - 1)),
        "2bp of gpipe": (
            schedules.split_backward(schedules.gpipe(p, m)),
            2 * (p - 1) / (3 * m + 2 * (p - 1)),
        ),
        "2bp of 1f1b": (
            schedules.split_backward(schedules.one_forward_one_backward(p, m)),
            (p - 1) / (3 * m + p - 1),
        ),
    }
    for name, (schedule, formula) in ways.items():
        assert schedules.play(schedule).idle == pytest.approx(formula, abs=1e-12), name
    # Forward and backward passes of any length: the formulas of whole backward passes do not move.
    long = schedules.play(ways["1f1b"][0], {"backward": 3.5})
    assert long.idle == pytest.approx(ways["1f1b"][1], abs=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.interleaved(4, 6, 2),
        schedules.split_backward(schedules.one_forward_one_backward(4, 6)),
    ],
    ids=["circular", "2bp"],
)
def test_what_an_op_reads_is_there_and_a_device_does_one_thing_at_a_time(schedule):
    timeline = schedules.play(schedule)
    ends = {op: end for device in timeline.busy for _, end, op in device}
    groups = 1 + max(op.group for op in ends)
    for device in timeline.busy:
        for (_, end, _), (begin, _, _) in zip(device, device[1:], strict=False):
            assert begin >= end
        for begin, _, op in device:
            reads = []
            if op.kind == "forward" and op.group:
                reads = [op._replace(group=op.group - 1)]
            elif op.kind in ("backward", "inputs"):
                reads = [op._replace(kind="forward")]
                reads += [op._replace(group=op.group + 1)] if op.group + 1 < groups else []
            elif op.kind == "weights":
                reads = [op._replace(kind="inputs")]
            assert all(ends[read] <= begin for read in reads), op


def test_activations_held():
    assert schedules.play(schedules.gpipe(4, 16)).held == [16] * 4
    assert schedules.play(schedules.one_forward_one_backward(4, 16)).held == [4, 3, 2, 1]
    # 2BP holds what its weights still need: that is its price.
    split = schedules.split_backward(schedules.one_forward_one_backward(4, 16))
    assert schedules.play(split).held[-1] == 16


def test_frozen_work_fills_the_bubbles():
    timeline = schedules.play(schedules.gpipe(4, 4))  # 84 ticks, 36 of which idle, 9 a device
    full = schedules.fill_bubbles(timeline, [1.0] * 36)
    assert (full.ticks, full.idle) == (timeline.ticks, 0)
    more = schedules.fill_bubbles(timeline, [1.0] * 37)  # one too many
    assert more.ticks == timeline.ticks + 1
    # None is so long; the last device is done first, after 3 + 12 ticks.
    assert schedules.fill_bubbles(timeline, [10.0]).ticks == 15 + 10
    for device in full.busy:
        for (_, end, _), (begin, _, _) in zip(device, device[1:], strict=False):
            assert begin >= end


def test_errors():
    with pytest.raises(ValueError, match="at least as many microbatches as stages, 4, got 2"):
        schedules.interleaved(4, 2, rounds=2)
    with pytest.raises(ValueError, match="device 0 waits for ever for Op"):
        schedules.play([[Op("forward", 0, 1)], [Op("backward", 0, 0)]])
    with pytest.raises(ValueError, match="among .*'backward'.* got .'sideways'"):
        schedules.play([[Op("sideways", 0, 0)]])
    with pytest.raises(ValueError, match="each op once"):
        schedules.play([[Op("forward", 0, 0)] * 2])
    with pytest.raises(ValueError, match="gpipe"):
        schedules.gpipe(0, 1)
