"""A kernel machine as a conditioner for couplings."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow._core.linen import flatten_cond
from jflow.types import Array, Cond

__all__ = ["KernelFeatures"]


def squared_exponential(r: Array) -> Array:
    """The Gaussian kernel of squared distances r in length scales: exp(-r / 2)."""
    return jnp.exp(-r / 2)


class KernelFeatures(nn.Module):
    """Kernels at learned points, as a conditioner for couplings: a kernel machine with their head.

    `module(x [b, ..., d], cond=None) -> features [b, ..., points]`, with

        features_j = kernel(|x - w_j|^2 / length^2)    at points w_j.

    What a linear head makes of them, such as that of `bijectors.coupling`, is a function
    sum_j a_j k(x, w_j) of the kernel's space and a constant: far from all points, and at the start,
    the coupling does nothing. The points start at rows of the batch that `init` gets, drawn at
    random without repetition, and the length at the median distance of its first 256 rows. Few
    parameters make it a network for small data.

    Also known as: inducing points, radial basis functions, sparse kernel regression.

    Attributes:
        points: the number of points, at most the number of rows at `init`.
        kernel: a function of squared distances in length scales, elementwise; the Gaussian one,
            exp(-r / 2), by default.

    Raises:
        ValueError: points is below 1, or above the number of rows at `init`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> x = jnp.array([[0.0], [1.0], [3.0]])
        >>> features, variables = nets.KernelFeatures(2).init_with_output(jax.random.key(0), x)
        >>> features.shape, variables["params"]["points"].shape
        ((3, 2), (2, 1))

    References:
        English, Kirchler, Lippert, *Kernelised Normalising Flows*, 2023, arXiv:2307.14839. Ours:
            where the points and the length start.
    """

    points: int = 32
    kernel: Callable[[Array], Array] = squared_exponential

    def __post_init__(self):
        check_whole("KernelFeatures", points=self.points)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *rest d"], cond: Cond = None
    ) -> Float[Array, "b *rest points"]:
        """Compute the features.

        Args:
            x: the inputs, [b, ..., d].
            cond: None, floats [b, ...], or a pytree of them, which stand beside the columns of x.

        Returns:
            The features [b, ..., points], in float32 or better.
        """
        c = flatten_cond("KernelFeatures", cond, x.shape[0])
        x = x.astype(float_dtype(x))
        if c is not None:
            c = c.reshape(c.shape[0], *(1,) * (x.ndim - 2), c.shape[-1]).astype(x.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(c, (*x.shape[:-1], c.shape[-1]))], axis=-1)
        rows = x.reshape(-1, x.shape[-1])

        def start(key):
            if not self.is_initializing():  # a shape alone, which Flax compares
                return jnp.zeros_like(rows, shape=(self.points, rows.shape[-1]))
            if len(rows) < self.points:
                raise ValueError(
                    f"KernelFeatures: expected a batch of at least points={self.points} rows at"
                    f" init, got {len(rows)}"
                )
            return rows[jax.random.permutation(key, len(rows))[: self.points]]

        def typical(key):
            if len(rows) < 2 or not self.is_initializing():
                return jnp.zeros_like(rows, shape=())
            first = rows[:256]
            distances = jnp.sqrt(_squared_distances(first, first))
            typical = jnp.median(distances[jnp.triu_indices(len(first), 1)])
            return jnp.log(jnp.where(typical > 0, typical, 1))  # of rows that are all alike too

        points = self.param("points", start)
        log_length = self.param("log_length", typical)
        return self.kernel(_squared_distances(x, points) * jnp.exp(-2 * log_length))


def _squared_distances(x: Array, points: Array) -> Array:
    """[..., d], [m, d] -> [..., m], as a sum of squares: a difference of them would lose digits."""
    points = points.reshape((1,) * (x.ndim - 1) + points.shape)
    return jnp.sum(jnp.square(x[..., None, :] - points), axis=-1)
