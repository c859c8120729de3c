"""What causal networks share: slot i reads the token before it, and what cond says at slot i."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import expand_to
from jflow._core.checks import check_cond
from jflow._core.conditions import read_parts
from jflow.nets._attention import per_token
from jflow.nets._embed import need_part
from jflow.nets._vit import CondEmbed
from jflow.types import Array, Cond, Condition

_normal = nn.initializers.normal(0.02)


def read_slots(
    name: str, x: Array, cond: Cond, n: int, takes: tuple[str, ...]
) -> tuple[Cond, Condition]:
    """(what `CondEmbed` takes of cond, its other parts, checked for n tokens)."""
    if not isinstance(cond, Condition):
        return check_cond(name, cond, x.shape[0]), Condition()
    parts = read_parts(name, cond, np.zeros((x.shape[0], n, 0)), takes)
    return Condition(parts.label, parts.vector), parts._replace(label=None, vector=None)


def held(valid: Array | None) -> Array | None:
    """Which slots have something before them that counts, [b, n], from the valid tokens [b, n].

    The first slot has: its token of zeros, which begins every row.
    """
    return None if valid is None else jnp.pad(valid[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def preceding(x: Array, slots: Array, whole: bool, counts: Array | None) -> Array:
    """The token before each of the slots, zeros for the first and for padding.

    x is [b, m, *event], all tokens where `whole`, else the preceding tokens themselves, of which
    the first may be anything; counts [b, n] is that of `held`.
    """
    if whole:
        x = jnp.roll(x, 1, axis=1)
    used = (slots > 0)[None]
    if counts is not None:  # padding may hold anything, NaN too
        used = used & jnp.take(counts, slots, axis=1, mode="clip")
    return jnp.where(expand_to(used, x), x, jnp.zeros_like(x))


def at_slots(a: Array, first: Any, m: int) -> Array:
    """a [b, n, ...] at the m slots from `first` on."""
    return a if m == a.shape[1] else jax.lax.dynamic_slice_in_dim(a, first, m, axis=1)


def leave(h: Array, valid: Array | None, first: Any) -> Array:
    """h [b, m, k] of the slots from `first` on, 0 where the token of a slot does not exist."""
    if valid is None:
        return h
    return jnp.where(at_slots(valid, first, h.shape[1])[..., None], h, jnp.zeros_like(h))


def enter(module: Any, x: Array, cond: Cond, parts: Condition, slots: Array, cache, first) -> Array:
    """The tokens [b, m, width] that the layers of a causal network begin with.

    To be called inside a compact method of a module with the attributes width, vocabulary,
    num_classes and dtype.
    """
    m, whole = x.shape[1], cache is None
    dense = {"features": module.width, "dtype": module.dtype}
    x = preceding(x, slots, whole, held(parts.valid))
    if module.vocabulary is None:
        h = per_token(nn.Dense(**dense, name="tokens"), x)
    else:
        table = nn.Embed(
            module.vocabulary,
            module.width,
            embedding_init=_normal,
            dtype=module.dtype,
            name="tokens",
        )
        h = preceding(table(x.astype(jnp.int32)), slots, False, None)  # no token before the first
    if parts.aligned is not None:
        beside = nn.Dense(
            **dense, use_bias=False, kernel_init=nn.initializers.zeros, name="aligned"
        )
        h = h + per_token(beside, at_slots(parts.aligned, first, m).astype(h.dtype))
    else:
        need_part(module, "aligned", "aligned", module.variables.get("params", {}))
    embed = CondEmbed(module.width, module.num_classes, module.dtype, name="embed")
    if (c := embed(cond, x.shape[0])) is not None:
        h = h + c[:, None].astype(h.dtype)
    return h


def check_tokens(module: Any, x: Array) -> tuple[int, int]:
    """(b, m) of x; raise unless it is [b, m, d], or [b, m] where the tokens are of a vocabulary."""
    name, axes = type(module).__name__, "b, n, d" if module.vocabulary is None else "b, n"
    if x.ndim != len(axes.split()):
        raise ValueError(f"{name}: expected x of shape [{axes}], got {list(x.shape)}")
    return x.shape[0], x.shape[1]
