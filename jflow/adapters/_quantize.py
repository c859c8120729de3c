"""A base in int8."""

import jax
import jax.numpy as jnp

from jflow._core.attached import dequantize as of_leaf
from jflow._core.attached import is_leaf, is_quantized
from jflow.adapters._forms import SCANNED, Where, choose, replaced
from jflow.types import Params

__all__ = ["dequantize", "quantize"]


def quantize(params: Params, *, where: Where = "*kernel*") -> Params:
    """Kernels in int8, with a scale for each output.

    A kernel w [*in, out], of one layer, becomes {'int8': q, 'scale': s} with

        s = max |w| over its inputs / 127,   q = round(w / s),   |w - q s| <= s / 2.

    Networks that jflow lifted read them: each layer's kernel is made when the layer runs, and again
    in the backward pass, so that no copy in floats is held. Adapters are for such a base too. It is
    not trained.

    Args:
        params: the trained params.
        where: which kernels, see `on_weights`.

    Returns:
        The params; scales have the type of their kernel.

    Raises:
        ValueError: `where` meets nothing.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> small = adapters.quantize({"kernel": jnp.array([[1.0, 0.5], [-254.0, 127.0]])})
        >>> small["kernel"]["int8"].tolist(), small["kernel"]["scale"].tolist()
        ([[0, 0], [-127, 127]], [[2.0, 1.0]])
    """

    def rounded(kernel, depth):
        axes = tuple(range(depth, kernel.ndim - 1))
        largest = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True)
        scale = jnp.where(largest > 0, largest / 127, 1).astype(kernel.dtype)
        return {"int8": jnp.round(kernel / scale).astype(jnp.int8), "scale": scale}

    chosen = choose(params, where, SCANNED)
    return replaced(params, {leaf.path: rounded(leaf.own["kernel"], leaf.depth) for leaf in chosen})


def dequantize(params: Params) -> Params:
    """Params with what `quantize` rounded as floats again.

    Args:
        params: with int8 or without.

    Returns:
        The params, with a float array for every leaf.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> small = adapters.quantize({"kernel": jnp.array([[0.5, 0.5], [-254.0, 127.0]])})
        >>> adapters.dequantize(small)["kernel"].tolist()
        [[0.0, 0.0], [-254.0, 127.0]]
    """
    return jax.tree.map(lambda x: of_leaf(x) if is_quantized(x) else x, params, is_leaf=is_leaf)
