"""Coupling flows on vectors."""

from collections.abc import Callable, Sequence

import flax.linen as nn

from jflow import bijectors, nets
from jflow.flows._stack import vector_flow
from jflow.types import Distribution, Flow


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

    return vector_flow(event_shape, layer, depth, embed, base, remat=remat, reversible=reversible)


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

    return vector_flow(event_shape, layer, depth, embed, base, remat=remat, reversible=reversible)
