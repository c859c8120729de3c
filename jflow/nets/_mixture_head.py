"""A Gaussian mixture of velocities from any velocity network."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow.distributions.mixtures import GaussianMixture
from jflow.types import Array, Cond

__all__ = ["MixtureHead"]


class MixtureHead(nn.Module):
    """module(x [b, *sites, d], t [b], cond=None) -> `GaussianMixture` of the velocity, a mixture at each site.

    `network` is any velocity network: x is lifted to `features` channels, the network maps them to as many, and the
    mixture is read off those. The last axis of x is what a component is a Gaussian over: a vector [b, d] has one mixture,
    an image [b, H, W, C] one a pixel, a scalar [b] one. log_std [b] is read off the mean over sites.

    At first all components have equal weights and standard deviation 1, with means drawn apart by `spread`.
    """

    network: nn.Module
    components: int = 8
    features: int = 32
    spread: float = 1.0
    dtype: Any = None

    def __post_init__(self):
        check_whole("MixtureHead", components=self.components, features=self.features)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> GaussianMixture:
        numbers = x[:, None] if x.ndim == 1 else x  # a scalar is a vector of one number
        k, d = self.components, numbers.shape[-1]
        lifted = nn.Dense(self.features, dtype=self.dtype, name="lift")(numbers)
        args = (lifted, t) if cond is None else (lifted, t, cond)
        h = self.network(
            *args
        )  # no norm here: the network starts at zero, where a norm's slope explodes
        # the heads compute in the params' precision
        means = nn.Dense(k * d, bias_init=nn.initializers.normal(self.spread), name="means")(h)
        logits = nn.Dense(k, name="logits")(h)
        pooled = jnp.mean(h, axis=tuple(range(1, h.ndim - 1)))
        log_std = nn.Dense(1, kernel_init=nn.initializers.zeros, name="log_std")(pooled)[:, 0]
        found = GaussianMixture(
            logits, means.reshape(*logits.shape, *x.shape[max(1, x.ndim - 1) :]), log_std
        )
        return jax.tree.map(lambda v: v.astype(float_dtype(x)), found)
