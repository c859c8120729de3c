"""What guides causal blocks of tokens."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow._core.checks import like_rows
from jflow.types import Cond, PyTree


class TokenGuide(NamedTuple):
    """What `bijectors.causal_block(guide=...)` takes.

    combine((mean, log_scale), (mean_u, log_scale_u), slots [m], n) -> (mean, log_scale), arrays [b, m, d]; the second pass
    has cond replaced by `null`, one row of it (None: keeps it), and its attention scores divided by `temperature`.
    """

    combine: Callable
    null: PyTree
    temperature: float


def second_rows(guide: TokenGuide, cond: Cond) -> tuple[Cond, Cond]:
    """cond of the two passes."""
    if guide.null is None:
        return cond, cond
    if cond is None:
        raise ValueError("guidance with a null: expected cond, what to guide towards, got None")
    cond = jax.tree.map(jnp.asarray, cond)
    return cond, like_rows("guidance", guide.null, cond)
