"""The drift error of a bridge on the statistical manifold: a bound on the likelihood of tokens."""

import math

import jax
import jax.numpy as jnp

from jflow import times
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import mean_of_tokens, read_tokens
from jflow._core.checks import check_noun, need_key
from jflow._core.tokens import check_logits, check_tokens, corners
from jflow.paths import StatisticalBridge, corner_log
from jflow.types import Field, Loss, Time

__all__ = ["bridge_drift"]

_UNIFORM = times.uniform(0.0, 0.99)


def bridge_drift(field: Field, bridge: StatisticalBridge, *, time: Time = _UNIFORM) -> Loss:
    """The error of the drift of a bridge to tokens, in units of the noise.

        |sum_k p_k log_x(e_k) - log_x(e_token)|^2 sigma^2 / (2 V^2),      p = softmax(field(x, t))

    At uniform times its mean is the divergence of the two processes by Girsanov's theorem, and with
    the tokens' cross-entropy at the last time it bounds -log p(tokens), in nats per row. Its
    minimum is that of `token_cross_entropy`, which has a smaller variance.

    Args:
        field: The classifier, (params, x [b, *sites, D], t [b], cond) -> logits [b, *sites, K or
            more].
        bridge: The bridge, of `paths.statistical_bridge`.
        time: The law of the times; they end before t=1, where V is 0.

    Returns:
        A loss of the batch {'x' integer tokens [b, *sites], optionally 'cond', 'weight' [b] or [b,
        *sites]}, summed over the tokens: with weights of tokens, the weighted mean of a token times
        their number. It is NaN where a token is outside 0 ... K - 1. It has no metrics.

    Raises:
        TypeError: At construction for what is no `Field`.
        ValueError: At trace time for tokens that are no integers or, where they are known, outside,
            logits of another shape, a batch without 'x' or with unknown keys, and a key that is
            None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, paths
        >>> from jflow.types import Field
        >>> field = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> loss = losses.bridge_drift(field, paths.statistical_bridge(4, steps=16, draws=64))
        >>> value, _ = loss({}, jax.random.key(0), {"x": jnp.zeros((2, 5), jnp.int32)})
        >>> bool(value > 0)
        True

    References:
        Jo, Hwang, *Continuous Diffusion Model for Language Modeling*, 2025, arXiv:2502.11564.
    """
    name, k = "bridge_drift", bridge.num_classes
    check_noun(name, field, Field)

    def loss(params, key, batch, frozen=None):
        need_key(name, key)
        x, cond, weight = read_tokens(name, batch, ("x", "cond", "weight"))
        check_tokens(name, x, k)
        time_key, point_key, dropout_key = jax.random.split(key, 3)
        t = time(time_key, x.shape[0]).astype(float_dtype(x))
        x1 = corners(x, k, t.dtype)
        x_t = bridge.path.point(x1, x1, t, key=point_key)
        logits = field.apply(params, x_t, t, cond, key=dropout_key)
        p = jax.nn.softmax(check_logits(name, logits, x.shape, k), axis=-1)
        off = jnp.sum(jnp.square(corner_log(x_t, p - x1)), axis=-1)
        rate = jnp.square(bridge.noise(t) / bridge.remaining(t)) / 2
        return math.prod(x.shape[1:]) * mean_of_tokens(expand_to(rate, off) * off, weight), {}

    return loss
