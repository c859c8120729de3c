"""A very large number of tiny experts, found by product keys."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow.nets._vit import layer_norm
from jflow.types import Array

__all__ = ["ProductKeyExperts"]


class ProductKeyExperts(nn.Module):
    """A mixture of m^2 experts of one neuron each, of which every token retrieves a few.

    Also known as: PEER, parameter efficient expert retrieval, mixture of a million experts.

        module(y) = sum over heads, sum_i softmax(s)_i gelu(u_i . y) w_i,   i in top-k of s

    The key of expert i = (a, c) is a pair of half keys, and its score the sum of two:
    s_i = q_1 . k_a + q_2 . k'_c for a query (q_1, q_2) of the token. The k best sums are among
    those of the k best of each half, so that 2 m + k^2 scores take the place of m^2. Scores are in
    float32 or better. As `mlp=` of `DiT` and its relatives it takes the place of the MLP.

    Attributes:
        num_keys: m, the number of half keys; there are m^2 experts.
        k: how many experts a head retrieves for a token.
        num_heads: the number of queries of a token, whose experts are the same.
        key_size: the size of a half key.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is that of the network that it is part of.

    Raises:
        ValueError: a size is below 1, or k above num_keys.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net, y = nets.ProductKeyExperts(num_keys=8, k=2, num_heads=1), jnp.ones((1, 3, 4))
        >>> params = jax.eval_shape(net.init, jax.random.key(0), y)["params"]
        >>> params["down"].shape
        (64, 4)

    References:
        He, *Mixture of A Million Experts*, 2024, arXiv:2407.04153. A batch norm of the queries is
            there a part of it, which would couple the rows of a batch; a norm of each query is
            ours.
        Lample, Sablayrolles, Ranzato, Denoyer, Jégou, *Large Memory Layers with Product Keys*,
            2019, arXiv:1907.05242.
    """

    num_keys: int = 32
    k: int = 8
    num_heads: int = 4
    key_size: int = 32
    dtype: Any = None

    def __post_init__(self):
        sizes = {"num_keys": self.num_keys, "num_heads": self.num_heads, "key_size": self.key_size}
        check_whole("ProductKeyExperts", k=self.k, **sizes)
        if self.k > self.num_keys:
            raise ValueError(
                f"ProductKeyExperts: expected k of at most num_keys={self.num_keys}, got {self.k}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, y: Float[Array, "b n width"]) -> Float[Array, "b n width"]:
        """Apply the experts that the tokens retrieve.

        Args:
            y: the tokens, [b, n, width].

        Returns:
            The weighted outputs of their experts, [b, n, width].
        """
        width, precise = y.shape[-1], float_dtype(y)
        q = nn.Dense(self.num_heads * 2 * self.key_size, dtype=self.dtype, name="queries")(y)
        q = layer_norm(precise, "norm")(q.reshape(*y.shape[:2], self.num_heads, 2, self.key_size))
        normal = nn.initializers.normal(self.key_size**-0.5)
        keys = self.param("keys", normal, (2, self.num_keys, self.key_size)).astype(precise)
        scores, experts = best_pairs(jnp.einsum("bnhps,pms->pbnhm", q, keys), self.k)

        pool = (self.num_keys**2, width)
        down = self.param("down", nn.initializers.normal(width**-0.5), pool)
        up = self.param("up", nn.initializers.normal(self.num_heads**-0.5), pool)
        u, w = (jnp.take(table, experts, axis=0).astype(y.dtype) for table in (down, up))
        hidden = nn.gelu(jnp.einsum("bnd,bnhkd->bnhk", y, u))
        weights = jax.nn.softmax(scores).astype(y.dtype)
        return jnp.einsum("bnhk,bnhkd->bnd", weights * hidden, w)


def best_pairs(scores: Array, k: int) -> tuple[Array, Array]:
    """The k largest sums [..., k] of one number of each half of scores [2, ..., m], and the pairs
    a m + c that they are of."""
    m = scores.shape[-1]
    (first, second), (a, c) = jax.lax.top_k(scores, k)
    sums = (first[..., :, None] + second[..., None, :]).reshape(*first.shape[:-1], k * k)
    pairs = (a[..., :, None] * m + c[..., None, :]).reshape(sums.shape)
    best, at = jax.lax.top_k(sums, k)
    return best, jnp.take_along_axis(pairs, at, axis=-1)
