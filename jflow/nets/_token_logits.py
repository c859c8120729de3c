"""Logits of tokens from any velocity network."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow._core.linen import check_linen
from jflow._core.tokens import need_tokens
from jflow.nets._attention import per_token
from jflow.types import Array, Cond

__all__ = ["TokenLogits"]


class TokenLogits(nn.Module):
    """Logits for each token of a vocabulary, from any velocity network.

    `module(x [b, *event], t [b], cond=None) -> logits [b, *event, vocabulary]`. A table makes
    `width` numbers of each token, the network maps them to as many, and a linear map to logits. So
    a text [b, n] takes a network of [b, n, width], such as `TokenDiT`, and a grid [b, H, W] one of
    images [b, H, W, width], such as `UNet` or `DiT`. The logits are 0 at initialization where the
    network is. `jflow.field` lifts the module, for `losses.discrete_matching`.

    Values cannot be seen while tracing: the logits of a row with a token outside of the vocabulary
    are NaN.

    Attributes:
        network: any velocity network, `network(x, t)` or `network(x, t, cond)`.
        vocabulary: the number of symbols, the mask among them.
        width: the count of numbers of a token, where the network meets it.
        dtype: the type of the computation of the network, such as jnp.bfloat16; the logits are
            float32 or better. None is the type of the params.

    Raises:
        TypeError: network is not a Linen module.
        ValueError: a size is below 1; or at the call, x is not integers.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.TokenLogits(nets.TokenDiT(width=8, num_layers=1, num_heads=1), 5, width=8)
        >>> x, t = jnp.array([[0, 4, 2]]), jnp.zeros(1)
        >>> jax.eval_shape(lambda key: net.init_with_output(key, x, t)[0], jax.random.key(0)).shape
        (1, 3, 5)

    References:
        Gat, Remez, Shaul, Kreuk, Chen, Synnaeve, Adi, Lipman, *Discrete Flow Matching*, 2024,
            arXiv:2407.15595.
    """

    network: nn.Module
    vocabulary: int
    width: int = 128
    dtype: Any = None

    def __post_init__(self):
        check_linen("TokenLogits", "network", self.network)
        check_whole("TokenLogits", vocabulary=self.vocabulary, width=self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        """Predict the logits.

        Args:
            x: the tokens, [b, *event].
            t: the times, [b], or [b, n] for a network that reads those of each token.
            cond: as the network takes it.

        Returns:
            The logits, [b, *event, vocabulary], in float32 or better.
        """
        x = need_tokens("TokenLogits", "x", x)
        table = nn.Embed(
            self.vocabulary,
            self.width,
            embedding_init=nn.initializers.normal(1.0),
            dtype=self.dtype,
            name="symbols",
        )
        inside = (x >= 0) & (x < self.vocabulary)
        h = table(jnp.where(inside, x, jnp.zeros_like(x)))
        args = (h, t) if cond is None else (h, t, cond)
        h = self.network(*args)
        h = h.astype(float_dtype(h))
        logits = per_token(nn.Dense(self.vocabulary, name="logits"), h)
        all_inside = jnp.all(inside, axis=tuple(range(1, x.ndim)), keepdims=True)
        return jnp.where(all_inside[..., None], logits, jnp.nan)
