"""Coupling flows on vectors."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import numpy as np

from jflow import bijectors, nets
from jflow.flows._stack import flattened_flow, vector_flow
from jflow.types import Distribution, Flow


def nice(
    event_shape: Sequence[int],
    *,
    depth: int = 4,
    hidden: Sequence[int] = (128, 128),
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    reversible: bool | int = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """Additive coupling layers, volume preserving, and one diagonal scaling before the base. Dinh, Krueger, Bengio, *NICE*
    (2014), here with a shift in the scaling. Arguments as in `real_nvp`."""

    def layer(features):
        net = nets.MLP(tuple(hidden), activation)
        return bijectors.coupling(bijectors.univariate.shift(), net, split=features // 2)

    def scaling(features):
        return bijectors.affine((features,))

    return vector_flow(
        event_shape,
        layer,
        depth,
        embed,
        standardize,
        base,
        last=scaling,
        remat=remat,
        reversible=reversible,
    )


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
    standardize: bool = True,
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
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers from init's batch.
            Density and samples are in the units of the data either way.
        base: defaults to the standard normal.
    """
    univariate = bijectors.univariate.affine(max_log_scale)

    def layer(features):
        return bijectors.coupling(
            univariate, nets.MLP(tuple(hidden), activation), split=features // 2
        )

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, remat=remat, reversible=reversible
    )


def nanoflow(
    event_shape: Sequence[int],
    *,
    depth: int = 16,
    hidden: Sequence[int] = (128, 128),
    indicator: int = 16,
    max_log_scale: float = 3.0,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    reversible: bool | int = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """Affine couplings on random masks that share one network: a layer owns an embedding, which tells the network where
    it is, and a head. Lee, Kim, Yoon, *NanoFlow: Scalable Normalizing Flows with Sublinear Parameter Complexity* (2020),
    whose flows are of audio and images; here on the flattened event.

    Parameters: those of one network, and for each layer indicator + (hidden[-1] + 1) * 2 * features. Arguments as in
    `real_nvp`, and
        indicator: size of a layer's embedding.
    """
    univariate, net = (
        bijectors.univariate.affine(max_log_scale),
        nets.MLP(tuple(hidden), activation),
    )

    def stack(features):
        return bijectors.scan(
            lambda mask: bijectors.indicated(
                bijectors.masked_coupling(univariate, net, mask), indicator
            ),
            depth,
            xs=_random_masks(features, depth),
            shared=("net",),
            remat=remat,
            reversible=reversible,
        )

    return flattened_flow(event_shape, stack, embed, standardize, base)


def _random_masks(features: int, depth: int) -> np.ndarray:
    """[depth, features]: a random half, its complement, another half ..."""
    if depth < 1:
        raise ValueError(f"expected depth >= 1, got {depth}")
    halves = [bijectors.masks.random((features,), seed=i) for i in range((depth + 1) // 2)]
    return np.concatenate([bijectors.masks.alternating(half, 2) for half in halves])[:depth]


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
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """Rational-quadratic coupling layers, each behind a permutation and an LU linear map: RQ-NSF (C) of Durkan, Bekasov,
    Murray, Papamakarios, *Neural Spline Flows* (2019), on the flattened event.

    The density pass evaluates the splines themselves, sampling their closed-form inverse. Outside [-bound, bound] a
    layer's splines are the identity. Arguments as in `real_nvp`, and
        bins: of each spline, which takes 3*bins - 1 raw numbers.
        bound: half the side of the box that the splines act on.
        linear: whether LU maps stand between the couplings.
    """
    univariate = bijectors.univariate.rational_quadratic(bins, bound)

    def layer(features):
        coupling = bijectors.coupling(
            univariate, nets.MLP(tuple(hidden), activation), split=features // 2
        )
        return bijectors.chain(bijectors.lu(features), coupling) if linear else coupling

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, remat=remat, reversible=reversible
    )
