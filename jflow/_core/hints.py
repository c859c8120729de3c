"""What a misspelled name was meant to be."""

import difflib
from collections.abc import Sequence


def hint(name: str, names: Sequence[str]) -> str:
    """A question after the nearest name, whatever its case; empty if none is near."""
    lower = {other.lower(): other for other in reversed(names)}
    near = difflib.get_close_matches(name, names, n=1)
    near = near or difflib.get_close_matches(name.lower(), lower, n=1)
    return f"did you mean {lower.get(near[0], near[0])!r}? " if near else ""
