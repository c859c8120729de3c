"""Encoders of conditions, and angles as inputs.

An encoder turns an image or a set into a vector, for `bijectors.conditioned`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype
from jflow._core.conditions import refuse_parts
from jflow.nets._mlp import MLP
from jflow.types import Array, Cond, Condition


class ImageEncoder(nn.Module):
    """An encoder of images as conditions: `module(cond [b, H, W, C]) -> [b, features]`.

    3 x 3 convolutions that halve the sides, one a width, then the mean over positions and a dense
    layer. Pixels should be of order one.

    Attributes:
        features: the size of the output.
        widths: the channels of the convolutions.
        activation: after each convolution.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: cond is not [b, H, W, C], at the call.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> encoder = nets.ImageEncoder(features=3, widths=(4,))
        >>> out, variables = encoder.init_with_output(jax.random.key(0), jnp.zeros((2, 4, 4, 1)))
        >>> out.shape
        (2, 3)
    """

    features: int = 32
    widths: Sequence[int] = (16, 32)
    activation: Callable[[Array], Array] = nn.silu
    dtype: Any = None

    @nn.compact
    def __call__(self, cond: Array) -> Array:
        """Encode.

        Args:
            cond: the images, [b, H, W, C].

        Returns:
            The vectors [b, features].
        """
        if jnp.ndim(cond) != 4:
            raise ValueError(
                f"ImageEncoder: expected cond of shape [b, H, W, C], got {list(jnp.shape(cond))}"
            )
        h = cond
        for width in self.widths:
            h = self.activation(nn.Conv(width, (3, 3), strides=2, dtype=self.dtype)(h))
        return nn.Dense(self.features, dtype=self.dtype)(jnp.mean(h, axis=(1, 2)))


class SetEncoder(nn.Module):
    """An encoder of sets of vectors as conditions, whatever their order.

    `module(cond) -> [b, features]`, rho(mean of phi(x_i), log(1 + n)) with two perceptrons phi and
    rho. The mean keeps the scale for any n; the count goes in beside it, so that sums can be
    computed. A set may be empty.

    Attributes:
        features: the size of the output.
        hidden: the widths of phi and of rho.
        activation: between the layers.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: cond has other keys or other shapes, at the call.

    References:
        Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov, Smola, *Deep Sets*, 2017,
            arXiv:1703.06114.
    """

    features: int = 32
    hidden: Sequence[int] = (64, 64)
    activation: Callable[[Array], Array] = nn.silu
    dtype: Any = None

    @nn.compact
    def __call__(self, cond: Cond) -> Array:
        """Encode.

        Args:
            cond: the vectors [b, n, d], a dict {'x': [b, n, d], 'mask': [b, n]}, or the context and
                the mask of a `types.Condition`; entries whose mask is false or zero are padding and
                change nothing.

        Returns:
            The vectors [b, features].
        """
        if isinstance(cond, Condition):
            refuse_parts("SetEncoder", cond, ("context", "mask"))
            cond = cond.context if cond.mask is None else {"x": cond.context, "mask": cond.mask}
        if isinstance(cond, dict) and set(cond) != {"x", "mask"}:
            raise ValueError(
                f"SetEncoder: expected cond with the keys 'x' and 'mask', got {sorted(cond)}"
            )
        x, mask = (cond["x"], cond["mask"]) if isinstance(cond, dict) else (cond, None)
        if jnp.ndim(x) != 3 or (mask is not None and jnp.shape(mask) != jnp.shape(x)[:2]):
            shapes = [list(jnp.shape(a)) for a in (x, mask) if a is not None]
            raise ValueError(
                f"SetEncoder: expected x of shape [b, n, d] and a mask [b, n], got {shapes}"
            )
        dtype = float_dtype(x)
        present = (
            jnp.ones_like(x, shape=x.shape[:2], dtype=dtype)
            if mask is None
            else (mask != 0).astype(dtype)
        )
        present = present[..., None]
        h = MLP(self.hidden, self.activation, dtype=self.dtype, name="phi")(
            jnp.where(present > 0, x, 0)
        )
        count = jnp.sum(present, axis=1)
        mean = jnp.sum(h.astype(dtype) * present, axis=1) / jnp.maximum(count, 1)
        h = MLP(self.hidden, self.activation, dtype=self.dtype, name="rho")(
            jnp.concatenate([mean, jnp.log1p(count)], axis=-1)
        )
        return nn.Dense(self.features, dtype=self.dtype)(h)


class Periodic(nn.Module):
    """A conditioner of angles: a network of their cosines and sines, periodic in them.

    `module(x [b, ..., d], cond=None) -> features`, net(x with every angle replaced by its cosine
    and sine, cond). x has the period 2 * bound where the mask is true; the other entries pass. A
    coupling with circular transformers needs it to be continuous on the torus.

    Attributes:
        net: a conditioner, `net(x, cond)`.
        bound: half the period.
        mask: [d] booleans, which entries are angles; None is all of them.

    Raises:
        ValueError: the mask has another shape or type, at the call.
    """

    net: nn.Module
    bound: float = np.pi
    mask: Sequence[bool] | None = None

    @nn.compact
    def __call__(self, x: Array, cond: Cond = None) -> Array:
        """Compute the features.

        Args:
            x: the inputs, [b, ..., d].
            cond: as the net takes it.

        Returns:
            The features of the net.
        """
        mask = np.ones(x.shape[-1], bool) if self.mask is None else np.asarray(self.mask)
        if mask.dtype != bool or mask.shape != x.shape[-1:]:
            raise ValueError(
                f"Periodic: expected a boolean mask of shape {[x.shape[-1]]}, got "
                f"{list(mask.shape)}"
            )
        angles = x[..., mask] * (np.pi / self.bound)
        return self.net(
            jnp.concatenate([jnp.cos(angles), jnp.sin(angles), x[..., ~mask]], axis=-1), cond
        )
