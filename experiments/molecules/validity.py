"""Which strings are molecules, how many of them differ, and how many are new."""

import re
from collections import Counter
from collections.abc import Callable

Forms = Callable[[list[str]], list[str]]


def closed(text: str) -> str:
    """The text where its brackets match and every ring is closed, else ""."""
    depth = 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if depth < 0:
            return ""
    rings = Counter(re.sub(r"\[[^\]]*\]", "", text))
    fine = depth == 0 and text.count("[") == text.count("]") and "()" not in text
    return text if fine and all(rings[str(d)] % 2 == 0 for d in range(10)) else ""


def readable() -> Forms | None:
    """What rdkit reads, each in one form for all and "" for what is no molecule; None where it is
    not installed."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        return None
    RDLogger.DisableLog("rdApp.*")

    def forms(texts: list[str]) -> list[str]:
        found = [Chem.MolFromSmiles(text) if text else None for text in texts]
        return ["" if molecule is None else Chem.MolToSmiles(molecule) for molecule in found]

    return forms


def counts(texts: list[str], known: set[str], forms: Forms) -> tuple[float, float, float]:
    """The shares of valid ones, of different ones among these, of new ones among those."""
    valid = [text for text in forms(texts) if text]
    unique = set(valid)
    new = unique - known
    return (
        len(valid) / len(texts),
        len(unique) / max(1, len(valid)),
        len(new) / max(1, len(unique)),
    )
