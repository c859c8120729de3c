"""Several residual streams in the place of one, with learned maps between them and the branches, or
with the fixed ones of the ladder."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow.nets._vit import layer_norm
from jflow.types import Array

__all__ = ["HyperConnections", "LadderResidual"]


class HyperConnections(nn.Module):
    """Several residual streams in the place of one, and how each branch reads and writes them.

    Also known as: HC, static and dynamic hyper-connections.

        x = sum_i a_i h_i,      h_j <- sum_i A_ij h_i + b_j branch(x)

    As `residual=` of `DiT` or `TokenDiT` it takes the place of `h + branch(h)`: the tokens enter as
    copies in all streams and leave as the mean of the streams. At first a reads one stream, drawn
    for each branch, A is the identity and b is 1, so that the network is that with plain residual
    connections, whatever its other params are. In the dynamic form a, A and b depend on the token:

        a_i + s tanh(norm(h_i) w),   A_ij + s tanh(norm(h_i) W)_j,   b_j + s' tanh(norm(h_j) w')

    where w, W and w' start at zero.

    Attributes:
        streams: the number of streams.
        dynamic: the start of s and s'; None is the static form.

    Raises:
        ValueError: streams is below 1, or dynamic is not positive.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> connections = nets.HyperConnections(streams=2)
        >>> net = nets.DiT(width=8, num_layers=1, num_heads=1, residual=connections)
        >>> x, t = jnp.ones((1, 4, 4, 1)), jnp.zeros(1)
        >>> jax.eval_shape(lambda key: net.init_with_output(key, x, t)[0], jax.random.key(0)).shape
        (1, 4, 4, 1)

    References:
        Zhu, Huang, Huang, Zeng, Mao, Wu, Min, Zhou, *Hyper-Connections*, 2024, arXiv:2409.19606.
            There branch k reads stream k mod streams at first, and the streams leave as their sum;
            a drawn stream and the mean are ours.
    """

    streams: int = 4
    dynamic: float | None = 0.01

    def __post_init__(self):
        check_whole("HyperConnections", streams=self.streams)
        if self.dynamic is not None and not self.dynamic > 0:
            raise ValueError(
                "HyperConnections: expected dynamic > 0, or None for the static form, got"
                f" {self.dynamic}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, h: Float[Array, "b n streams width"]
    ) -> tuple[Float[Array, "b n width"], Callable[[Array], Array]]:
        """What a branch reads, and what becomes of its output.

        Args:
            h: the tokens in all streams, [b, n, streams, width].

        Returns:
            (x, add): the input of the branch, [b, n, width], and a function from its output [b, n,
            width] to the streams after it, [b, n, streams, width].
        """
        s = self.streams
        if h.ndim != 4 or h.shape[2] != s:
            raise ValueError(
                f"HyperConnections: expected h of shape [b, n, {s}, width], got {list(h.shape)}"
            )
        identity = lambda key, shape, dtype=jnp.float32: jnp.eye(s, dtype=dtype)  # noqa: E731
        read = self.param("read", _one_of, (s,))[None, None]
        mix = self.param("mix", identity, (s, s))[None, None]
        write = self.param("write", nn.initializers.ones, (s,))[None, None]
        if self.dynamic is not None:
            y = layer_norm(float_dtype(h), "norm")(h)
            zeros = nn.initializers.zeros
            dense = nn.Dense(s + 2, use_bias=False, kernel_init=zeros, name="change")
            start: Any = nn.initializers.constant(self.dynamic)
            change = jnp.tanh(dense(y))  # of each stream
            reading = self.param("reading", start, ())
            read = read + reading * change[..., 0]
            mix = mix + reading * change[..., 1 : s + 1]
            write = write + self.param("writing", start, ()) * change[..., s + 1]
        read, mix, write = (a.astype(h.dtype) for a in (read, mix, write))
        x = jnp.einsum("...i,...id->...d", read, h)
        kept = jnp.einsum("...ij,...id->...jd", mix, h)
        return x, lambda out: kept + (write[..., None] * out[..., None, :]).astype(h.dtype)


class LadderResidual(nn.Module):
    """Each branch reads the tokens as they were before the branch in front of it.

    Also known as: ladder transformer.

        h_{i+1} = branch_{i+1}(x_{i-1}),      x_{i+1} = x_i + h_{i+1}

    As `residual=` of `DiT` or `TokenDiT`. Nothing waits for the sum that tensor sharding takes over
    devices behind each branch, so that the next branch runs while it is sent. It is another
    network, not a schedule: params of plain residual connections fit, and mean something else.
    There are no params. The two streams are 2 x_i - x_{i-1} and x_{i-1}, whose mean is x_i.

    Examples:
        >>> from jflow import nets
        >>> net = nets.DiT(residual=nets.LadderResidual())

    References:
        Zhang, Mishra, Zhou, Brandon, Wang, Kim, Ragan-Kelley, Song, Athiwaratkun, Dao,
            *Ladder-residual: parallelism-aware architecture for accelerating large model inference
            with communication overlapping*, 2025, arXiv:2501.06589. The form in two streams is
            ours.
    """

    streams = 2

    @nn.compact
    def __call__(
        self, h: Float[Array, "b n 2 width"]
    ) -> tuple[Float[Array, "b n width"], Callable[[Array], Array]]:
        """What a branch reads, and what becomes of its output.

        Args:
            h: the two streams, [b, n, 2, width].

        Returns:
            (x, add): the input of the branch, [b, n, width], and a function from its output [b, n,
            width] to the streams after it, [b, n, 2, width].
        """
        now = jnp.mean(h, axis=2)
        return h[:, :, 1], lambda out: jnp.stack([now + 2 * out.astype(h.dtype), now], axis=2)


Residual = HyperConnections | LadderResidual


def _one_of(key, shape, dtype=jnp.float32):
    """1 for one of so many, 0 for the others."""
    return jax.nn.one_hot(jax.random.randint(key, (), 0, shape[0]), shape[0], dtype=dtype)


def branch(residual: Residual | None, parent: nn.Module, name: str, h: Array):
    """(what a branch of a block reads of h, the function that adds its output to h).

    To be called inside a compact method of the block.
    """
    if residual is None:
        return h, lambda y: h + y
    return residual.clone(parent=parent, name=name)(h)
