"""What guides causal blocks of tokens."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow._core.checks import like_rows
from jflow.types import Cond, PyTree


class TokenGuide(NamedTuple):
    """How two passes of a causal block are combined; `bijectors.causal_block(guide=...)` takes it.

    The first pass is the plain one. The second has cond replaced by `null`, and its attention
    scores divided by `temperature`. `guidance.extrapolate` and `guidance.score_sum` make guides.

    Attributes:
        combine: the function ((mean, log_scale), (mean_u, log_scale_u), slots [m], n) ->
            (mean, log_scale) of two passes, arrays [b, m, d] for the tokens at `slots` out of n.
        null: one row of cond for the second pass; None keeps cond.
        temperature: what the attention scores of the second pass are divided by.
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
