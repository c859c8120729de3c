"""Causal affine maps of tokens by a transformer (TarFlow), and the way from images to tokens."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype, patchify, sum_event, unpatchify, zero_log_det
from jflow._core.checks import check_cond, check_event, check_side
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow._core.nouns import compiled, no_params
from jflow.bijectors import decoding
from jflow.bijectors._guide import TokenGuide, second_rows
from jflow.types import Array, Bijector

__all__ = ["causal_block", "tokens"]

_CACHED = decoding.cached()


def causal_block(
    net: nn.Module,
    *,
    order: Sequence[int] | np.ndarray | Array | None = None,
    max_log_scale: float = 3.0,
    sampler: decoding.Sampler = _CACHED,
    guide: TokenGuide | None = None,
) -> Bijector:
    """TarFlow's layer: an affine map of each token, which a transformer reads off the earlier ones.

    For tokens x [b, n, d] the map is x_i = z_i exp(log_scale_i) + mean_i, where mean and log-scale
    are functions of x_<i and cond. `inverse`, z_i = (x_i - mean_i) exp(-log_scale_i), is one
    parallel pass; `forward` goes through the tokens as `sampler` says. log_scale = c tanh(raw / c)
    with c = max_log_scale, so that no input overflows; raw = 0 is the identity.

    Also known as: TarFlow block, transformer autoregressive flow.

    Args:
        net: a transformer like `nets.CausalTransformer(size=2)`, in both its forms.
        order: a permutation [n], the tokens in the order of generation; it may be a scanned `xs_i`.
            None leaves them as they stand.
        max_log_scale: the bound c on the log-scale, in nats; math.inf is none, as in the networks
            that TarFlow's authors published.
        sampler: `decoding.cached()`, `decoding.jacobi(block)` or `decoding.uncached()`.
        guide: guidance between two passes of the net; see `guidance.extrapolate` and
            `guidance.score_sum`. The guided map is as invertible as the plain one: both directions
            are of it, and so is log_det. Its params are those of the plain block, which is the one
            to train.

    Returns:
        Bijector: the map of tokens [b, n, d]; its params are those of the net.

    Raises:
        ValueError: max_log_scale is not positive, order is no permutation, x is not [b, n, d], or
            the net does not return 2 d numbers a token.
        TypeError: net is not a Linen module.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, nets
        >>> net = nets.CausalTransformer(width=4, num_layers=1, num_heads=1)
        >>> bijector = bijectors.causal_block(net, order=[1, 0])
        >>> x = jnp.ones((3, 2, 2))
        >>> z, log_det = bijector.inverse(bijector.init(jax.random.key(0), x), x)
        >>> z[0].tolist()  # it starts at the identity
        [[1.0, 1.0], [1.0, 1.0]]

    References:
        Zhai, Zhang, Nakkiran, et al., *Normalizing Flows are Capable Generative Models*, 2024,
            arXiv:2412.06329.
    """
    check_linen("causal_block", "net", net)
    if not max_log_scale > 0:
        raise ValueError(f"causal_block: expected max_log_scale > 0, got {max_log_scale}")
    if order is not None and not isinstance(order, jax.core.Tracer):
        order = np.asarray(order)
        if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(order.size)):
            raise ValueError(
                f"causal_block: expected order to be a permutation of 0..n-1, got {order.tolist()}"
            )

    def arranged(x, cond):
        cond = check_cond("causal_block", cond, x.shape[0])
        if x.ndim != 3 or (order is not None and x.shape[1] != order.shape[0]):
            raise ValueError(
                "causal_block: expected x of shape [b, "
                f"{'n' if order is None else order.shape[0]}, d], got {list(x.shape)}"
            )
        return (x if order is None else _take(x, order)), cond

    def restored(x):
        return x if order is None else _take(x, jnp.argsort(order))

    def predict(args, x, cache=None, first=0):
        """(mean, log_scale, cache), see `decoding`."""
        params, cond = args
        b, m, d = x.shape
        temperature = None
        if guide is not None:
            cond = jax.tree.map(lambda *c: jnp.concatenate(c), *second_rows(guide, cond))
            x = jnp.concatenate([x, x])
            temperature = jnp.where(jnp.arange(2 * b) < b, 1.0, guide.temperature)
        if cache is None:
            raw = apply_linen(net, params, x, cond, temperature)
        else:
            raw, cache = apply_linen(net, params, x, cond, temperature, cache, first)
        if raw.shape[-1] != 2 * d:
            raise ValueError(
                f"causal_block: expected {2 * d} numbers a token from the net (size=2), got "
                f"{raw.shape[-1]}"
            )
        mean, log_scale = jnp.split(raw, 2, axis=-1)
        if math.isfinite(max_log_scale):
            log_scale = max_log_scale * jnp.tanh(log_scale / max_log_scale)
        if guide is not None:
            both = ((mean[:b], log_scale[:b]), (mean[b:], log_scale[b:]))
            n = m if cache is None else cache[0].shape[2]
            mean, log_scale = guide.combine(*both, first + jnp.arange(m), n)
        return mean, log_scale, cache

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        return init_linen(net, key, *arranged(x, cond))

    def forward(params, z, cond=None, *, key=None):
        y, cond = arranged(z, cond)
        y = y.astype(float_dtype(z))
        cache = net.empty_cache(y, y.shape[0] * (1 if guide is None else 2))
        x, log_scale, *_ = sampler(predict, (params, cond), cache, y)
        return restored(x).astype(z.dtype), sum_event(log_scale)

    def inverse(params, x, cond=None, *, key=None):
        y, cond = arranged(x, cond)
        mean, log_scale, _ = predict((params, cond), y)
        return restored((y - mean) * jnp.exp(-log_scale)).astype(x.dtype), -sum_event(log_scale)

    return compiled(Bijector(init, forward, inverse))


def tokens(event_shape: Sequence[int], patch_size: int) -> Bijector:
    """Cut images into patches: images on the data side, tokens on the source side, both row by row.

    The map only rearranges numbers, so log_det is 0.

    Also known as: patchify.

    Args:
        event_shape: (H, W, C), the shape of an image.
        patch_size: p, the side of a patch, which divides H and W.

    Returns:
        Bijector: the map from tokens [b, n, p p C], n = H W / p^2, to images [b, H, W, C], without
            params.

    Raises:
        ValueError: patch_size does not divide H and W.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.tokens((4, 4, 3), 2).inverse({}, jnp.zeros((1, 4, 4, 3)))[0].shape
        (1, 4, 12)
    """
    p = patch_size
    height, width, channels = event_shape = tuple(event_shape)
    if p < 1 or height % p or width % p:
        raise ValueError(
            f"tokens: expected a patch_size that divides {height} and {width}, got {p}"
        )
    rows, columns = height // p, width // p

    def forward(params, z, cond=None, *, key=None):
        check_event("tokens", z, (rows * columns, p * p * channels))
        return unpatchify(z, rows, columns, p), zero_log_det(z)

    def inverse(params, x, cond=None, *, key=None):
        check_event("tokens", x, event_shape)
        return patchify(x, p), zero_log_det(x)

    return Bijector(no_params, forward, inverse)


def _take(x, order):
    return jnp.take(x, order, axis=1, unique_indices=True, mode="clip")
