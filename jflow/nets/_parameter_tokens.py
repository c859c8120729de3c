"""TokenFormer: layers whose weights are tokens that the input attends to, and which can grow."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_key, check_whole
from jflow.types import Array, Key, Params

__all__ = ["ParameterAttention", "add_parameter_tokens"]


class ParameterAttention(nn.Module):
    """Attention of tokens to tokens that are parameters: `module(y) -> shaped like y`.

    Also known as: Pattention, TokenFormer, token-parameter attention.

        s = y K^T,      module(y) = gelu(sqrt(scale) s / |s|) V

    K and V are `num_tokens` pairs of a key and a value. As `mlp=` of `DiT` and its relatives it
    takes the place of the MLP. Pairs whose key is zero change nothing, so that a trained network
    grows by `add_parameter_tokens`; `scale` stays what it was at first then.

    Attributes:
        num_tokens: the number of pairs; that of the params counts once there are any.
        scale: the squared length of the scores; None is num_tokens.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is that of the network that it is part of.

    Raises:
        ValueError: num_tokens is below 1, or scale is not positive.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net, y = nets.ParameterAttention(16), jnp.ones((1, 3, 4))
        >>> params = net.init(jax.random.key(0), y)["params"]
        >>> larger = nets.add_parameter_tokens(params, jax.random.key(1), 8)
        >>> larger["keys"].shape, bool(jnp.allclose(
        ...     net.apply({"params": larger}, y), net.apply({"params": params}, y)))
        ((24, 4), True)

    References:
        Wang, Fan, Naeem, Xian, Lenssen, Wang, Tombari, Schiele, *TokenFormer: Rethinking
            Transformer Scaling with Tokenized Model Parameters*, 2024, arXiv:2410.23168. There the
            scale follows the number of pairs, with which growth is not exact; and the projections
            of attention have this form too, which are linear here.
    """

    num_tokens: int = 512
    scale: float | None = None
    dtype: Any = None

    def __post_init__(self):
        check_whole("ParameterAttention", num_tokens=self.num_tokens)
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"ParameterAttention: expected scale > 0, got {self.scale}")
        super().__post_init__()

    @nn.compact
    def __call__(self, y: Float[Array, "b n width"]) -> Float[Array, "b n width"]:
        """Attend to the parameters.

        Args:
            y: the tokens, [b, n, width].

        Returns:
            The sums of values, [b, n, width].
        """
        made = self.variables.get("params", {}).get("keys")
        shape = (self.num_tokens, y.shape[-1]) if made is None else made.shape
        keys = self.param("keys", nn.initializers.normal(y.shape[-1] ** -0.5), shape)
        values = self.param("values", nn.initializers.normal(self.num_tokens**-0.5), shape)
        dtype = self.dtype or jnp.result_type(y, keys)
        y, keys, values = (a.astype(dtype) for a in (y, keys, values))
        s = (y @ keys.T).astype(float_dtype(y))
        square = jnp.sum(s**2, axis=-1, keepdims=True)
        scale = self.num_tokens if self.scale is None else self.scale
        s = s * jnp.sqrt(scale / jnp.maximum(square, jnp.finfo(s.dtype).eps ** 2))
        return nn.gelu(s).astype(dtype) @ values


def add_parameter_tokens(params: Params, key: Key, num_tokens: int) -> Params:
    """params with more pairs in every `ParameterAttention`, which computes what it did before.

    Keys of zero have the score 0, whatever the token, and gelu(0) = 0. The new values are drawn
    like those of a new network, so that the keys have a gradient.

    Args:
        params: of a network, scanned or not.
        key: for the new values.
        num_tokens: how many pairs are added to each.

    Returns:
        The params. The network itself stays as it is.

    Raises:
        ValueError: num_tokens is below 1, or params have no `ParameterAttention`.

    References:
        Wang, Fan, Naeem, Xian, Lenssen, Wang, Tombari, Schiele, *TokenFormer: Rethinking
            Transformer Scaling with Tokenized Model Parameters*, 2024, arXiv:2410.23168.
    """
    check_whole("add_parameter_tokens", num_tokens=num_tokens)
    check_key("add_parameter_tokens", key)
    is_pair = lambda p: isinstance(p, dict) and set(p) == {"keys", "values"}  # noqa: E731
    count = sum(map(is_pair, jax.tree.leaves(params, is_leaf=is_pair)))
    if not count:
        raise ValueError(
            "add_parameter_tokens: expected params of a network with a ParameterAttention, got"
            f" {sorted(params)}"
        )
    draws = iter(jax.random.split(key, count))

    def grown(p):
        if not is_pair(p):
            return p
        *front, n, width = p["keys"].shape
        more = (*front, num_tokens, width)
        values = n**-0.5 * jax.random.normal(next(draws), more, p["values"].dtype)
        return {
            "keys": jnp.concatenate([p["keys"], jnp.zeros(more, p["keys"].dtype)], axis=-2),
            "values": jnp.concatenate([p["values"], values], axis=-2),
        }

    return jax.tree.map(grown, params, is_leaf=is_pair)
