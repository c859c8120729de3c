"""The levels of a U-Net, for the networks and the loaders of their weights."""

from collections.abc import Sequence


def level_widths(channels: int, multipliers: Sequence[float]) -> list[int]:
    """The channels of each level."""
    return [round(channels * m) for m in multipliers]


def count_heads(width: int, num_heads: int, head_width: int | None) -> int:
    """How many attention heads a level of so many channels has: num_heads, or as many of head_width
    as there is room for."""
    return num_heads if head_width is None else width // head_width
