"""Condition encoders: what turns an image or a set into a vector, for `bijectors.conditioned`; angles as inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype
from jflow.nets._mlp import MLP
from jflow.types import Array, Cond


class ImageEncoder(nn.Module):
    """module(cond [b, H, W, C]) -> [b, features]: 3x3 convolutions that halve the sides, one a width, then the mean over
    positions and a dense layer. Pixels should be of order one."""

    features: int = 32
    widths: Sequence[int] = (16, 32)
    activation: Callable[[Array], Array] = nn.silu
    dtype: Any = None

    @nn.compact
    def __call__(self, cond: Array) -> Array:
        if jnp.ndim(cond) != 4:
            raise ValueError(
                f"ImageEncoder: expected cond of shape [b, H, W, C], got {list(jnp.shape(cond))}"
            )
        h = cond
        for width in self.widths:
            h = self.activation(nn.Conv(width, (3, 3), strides=2, dtype=self.dtype)(h))
        return nn.Dense(self.features, dtype=self.dtype)(jnp.mean(h, axis=(1, 2)))


class SetEncoder(nn.Module):
    """module(cond) -> [b, features] for a set of vectors, whatever their order: rho(mean of phi(x_i), log(1 + n)).

    cond is x [b, n, d] or a dict {'x': [b, n, d], 'mask': [b, n]}; entries whose mask is false or zero are padding and
    change nothing, and a set may be empty. The mean keeps the scale for any n; the count goes in beside it, so that sums
    can be told. Zaheer et al., *Deep Sets* (2017).
    """

    features: int = 32
    hidden: Sequence[int] = (64, 64)  # of phi and of rho
    activation: Callable[[Array], Array] = nn.silu
    dtype: Any = None

    @nn.compact
    def __call__(self, cond: Cond) -> Array:
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
    """A conditioner of angles: net(x with every angle replaced by its cosine and sine, cond) -> features.

    x [b, ..., d] has the period 2 * bound where `mask` [d] is true (everywhere by default); the other entries pass. A
    coupling with circular transformers needs it to be continuous on the torus.
    """

    net: nn.Module
    bound: float = np.pi
    mask: Sequence[bool] | None = None

    @nn.compact
    def __call__(self, x: Array, cond: Cond = None) -> Array:
        mask = np.ones(x.shape[-1], bool) if self.mask is None else np.asarray(self.mask)
        if mask.dtype != bool or mask.shape != x.shape[-1:]:
            raise ValueError(
                f"Periodic: expected a boolean mask of shape {[x.shape[-1]]}, got {list(mask.shape)}"
            )
        angles = x[..., mask] * (np.pi / self.bound)
        return self.net(
            jnp.concatenate([jnp.cos(angles), jnp.sin(angles), x[..., ~mask]], axis=-1), cond
        )
