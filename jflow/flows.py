"""Flows: a map and a base distribution, and the named recipes."""

import operator
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow import bijectors, distributions, nets
from jflow._util import check_cond, check_draws, split_key
from jflow.cnf import cnf
from jflow.types import Bijector, Distribution, Flow

__all__ = ["cnf", "flow", "neural_spline", "real_nvp"]


def flow(bijector: Bijector, base: Distribution) -> Flow:
    """The distribution of x = forward(z), z ~ base: log p(x) = log p_base(inverse(x)) + log |det d inverse / dx|.

    Params {'bijector', 'base'}. `init` wants a batch x [b, *event] of data (data-dependent layers look at it); zeros of
    that shape do where no layer looks. `log_prob` is [b], in nats; -inf outside the support.
    """
    if not isinstance(bijector, Bijector):
        raise TypeError(f"flow: expected a Bijector, got {type(bijector).__name__}")

    def init(key, x, cond=None):
        x = _check_batch(x, cond)
        key_bijector, key_base = jax.random.split(key)
        params = bijector.init(key_bijector, x, cond, side="data")
        z, _ = bijector.inverse(params, x, cond)
        return {"bijector": params, "base": base.init(key_base, z, cond)}

    def forward(params, z, cond=None, *, key=None):
        return bijector.forward(params["bijector"], _check_batch(z, cond), cond, key=key)

    def inverse(params, x, cond=None, *, key=None):
        return bijector.inverse(params["bijector"], _check_batch(x, cond), cond, key=key)

    def log_prob(params, x, cond=None, *, key=None):
        key_bijector, key_base = split_key(key, 2)
        z, log_det = inverse(params, x, cond, key=key_bijector)
        return base.log_prob(params["base"], z, cond, key=key_base) + log_det

    def sample_source(params, key, n, cond):
        n = check_draws("sample", n, cond)
        z = base.sample(params["base"], key, n, cond)
        leaves = jax.tree.leaves(params)
        return z.astype(jnp.result_type(*leaves)) if leaves else z

    def sample(params, key, n, cond=None):
        return forward(params, sample_source(params, key, n, cond), cond)[0]

    def sample_and_log_prob(params, key, n, cond=None):
        z = sample_source(params, key, n, cond)
        x, log_det = forward(params, z, cond)
        return x, base.log_prob(params["base"], z, cond) - log_det

    return Flow(init, log_prob, sample, sample_and_log_prob, forward, inverse)


def real_nvp(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    max_log_scale: float = 3.0,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    reversible: bool | int = False,
    base: Distribution | None = None,
) -> Flow:
    """Affine coupling layers between fixed permutations. Dinh, Sohl-Dickstein, Bengio (2016); here on the flattened event.

    Args:
        event_shape: of one x, such as (2,) or (8, 8, 1).
        depth: number of coupling layers; each transforms half of the numbers.
        hidden: widths of each layer's MLP.
        activation: of the MLPs; a smooth one keeps the gradients of reversible=True those of plain autodiff.
        max_log_scale: bound on the log-scale of one layer.
        embed: Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a float cond needs none.
        remat, reversible: memory in the backward pass, see `bijectors.scan`.
        base: defaults to the standard normal.
    """
    transformer = bijectors.transformers.affine(max_log_scale)

    def layer(features):
        return bijectors.coupling(transformer, nets.MLP(tuple(hidden), activation), split=features // 2)

    return _coupling_flow(event_shape, layer, depth, embed, base, remat=remat, reversible=reversible)


def neural_spline(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    bins: int = 8,
    bound: float = 5.0,
    linear: bool = True,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    reversible: bool | int = False,
    base: Distribution | None = None,
) -> Flow:
    """Rational-quadratic coupling layers, each behind a permutation and an LU linear map: RQ-NSF (C) of Durkan, Bekasov,
    Murray, Papamakarios, *Neural Spline Flows* (2019), on the flattened event.

    The density pass evaluates the splines themselves, sampling their closed-form inverse. Standardise the data: outside
    [-bound, bound] a layer's splines are the identity. Arguments as in `real_nvp`, and
        bins: of each spline, which takes 3*bins - 1 raw numbers.
        bound: half the side of the box that the splines act on.
        linear: whether LU maps stand between the couplings.
    """
    transformer = bijectors.transformers.rational_quadratic(bins, bound)

    def layer(features):
        coupling = bijectors.coupling(transformer, nets.MLP(tuple(hidden), activation), split=features // 2)
        return bijectors.chain(bijectors.lu(features), coupling) if linear else coupling

    return _coupling_flow(event_shape, layer, depth, embed, base, remat=remat, reversible=reversible)


def _coupling_flow(event_shape, layer, depth, embed, base, **scan_options) -> Flow:
    """Scanned layers behind fixed permutations, in the direction data -> source, so that densities take the forward maps."""
    event_shape = tuple(operator.index(size) for size in event_shape)
    features = int(np.prod(event_shape))
    if depth < 1:
        raise ValueError(f"expected depth >= 1, got {depth}")
    if features < 1:
        raise ValueError(f"expected an event_shape of positive sizes, got {list(event_shape)}")
    steps = layer(features)
    bijector = bijectors.scan(
        lambda permutation: bijectors.chain(bijectors.permute(permutation), steps),
        depth,
        xs=alternating_permutations(features, depth),
        **scan_options,
    )
    if embed is not None:
        bijector = bijectors.conditioned(bijector, embed)
    if len(event_shape) != 1:
        flatten = bijectors.reshape(event_shape, (features,))
        bijector = bijectors.chain(flatten, bijector, bijectors.invert(flatten))
    return flow(bijectors.invert(bijector), distributions.normal(event_shape) if base is None else base)


def alternating_permutations(features: int, depth: int, seed: int = 0) -> np.ndarray:
    """[depth, features]: every second one swaps the halves of a coupling, so that two layers transform every number; the
    others are drawn at random, from a fixed seed because permutations are no part of a checkpoint."""
    rng = np.random.default_rng(seed)
    swap = np.roll(np.arange(features), -(features // 2))
    drawn = [swap if i % 2 or features <= 2 else rng.permutation(features) for i in range(depth)]
    return np.stack(drawn).astype(np.int32)


def _check_batch(x, cond):
    x = jnp.asarray(x)
    if x.ndim == 0:
        raise ValueError("flow: expected x of shape [b, *event], got a scalar")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"flow: expected x in floats (integers want dequantizing first), got {x.dtype}")
    check_cond("flow", cond, x.shape[0])
    return x
