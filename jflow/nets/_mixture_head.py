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
    """A Gaussian mixture of velocities from any velocity network, a mixture at each site.

    `module(x [b, *sites, d], t [b], cond=None) -> GaussianMixture`. x is lifted to `features`
    channels, the network maps them to as many, and the mixture is read off those. The last axis of
    x is what a component is a Gaussian over: a vector [b, d] has one mixture, an image [b, H, W, C]
    one a pixel, a scalar [b] one. log_std [b] is read off the mean over sites.

    At first all components have equal weights and standard deviation 1, with means drawn apart by
    `spread`. `jflow.field` lifts the module; `losses.mixture_matching` trains it.

    Attributes:
        network: any velocity network, `network(x, t)` or `network(x, t, cond)`.
        components: the number of components of a mixture.
        features: the number of channels that the network sees.
        spread: the standard deviation that the means are drawn with at first.
        dtype: the type of the computation of the lift; the heads compute in the precision of the
            params.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.MixtureHead(nets.TimeMLP(hidden=(8,)), components=3, features=4)
        >>> x, t = jnp.zeros((1, 2)), jnp.zeros(1)
        >>> m = jax.eval_shape(lambda key: net.init_with_output(key, x, t)[0], jax.random.key(0))
        >>> m.logits.shape, m.means.shape, m.log_std.shape
        ((1, 3), (1, 3, 2), (1,))

    References:
        Chen, Zhang, Tan, Xu, Luan, Guibas, Wetzstein, Bi, *Gaussian Mixture Flow Matching Models*,
            2025, arXiv:2504.05304.
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
        """Predict the mixture of velocities.

        Args:
            x: the points, [b, *sites, d], or [b].
            t: the times, [b].
            cond: as the network takes it.

        Returns:
            GaussianMixture: logits [b, *sites, K], means [b, *sites, K, d] and log_std [b], in
                float32 or better.
        """
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
