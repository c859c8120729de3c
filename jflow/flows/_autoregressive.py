"""Autoregressive flows on vectors."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import numpy as np

from jflow import bijectors, nets
from jflow.flows._stack import vector_flow
from jflow.types import Distribution, Flow

__all__ = ["bnaf", "iaf", "maf", "neural_spline_autoregressive"]


def maf(
    event_shape: Sequence[int],
    *,
    depth: int = 5,
    hidden: Sequence[int] = (128, 128),
    max_log_scale: float = 3.0,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """Affine autoregressive layers with densities in one pass, the order reversed from layer to layer. Papamakarios,
    Pavlakou, Murray, *Masked Autoregressive Flow for Density Estimation* (2017), on the flattened event.

    Sampling takes up to as many passes a layer as the event has numbers; see `bijectors.jacobi`.

    Args:
        event_shape: of one x, such as (2,) or (8, 8, 1).
        depth: number of layers; each transforms all of the numbers.
        hidden: widths of each layer's MADE; at least the size of the event, better twice that.
        max_log_scale: bound on the log-scale of one layer.
        embed: Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a float cond needs none.
        activation: of the networks; a smooth one keeps the density smooth.
        remat: memory in the backward pass, see `bijectors.scan`.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers from init's batch.
            Density and samples are in the units of the data either way.
        base: defaults to the standard normal.
    """
    univariate = bijectors.univariate.affine(max_log_scale)

    def layer(features):
        return bijectors.autoregressive(
            univariate, nets.MADE(univariate.size, tuple(hidden), activation=activation)
        )

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, permutations=_reversals, remat=remat
    )


def iaf(
    event_shape: Sequence[int],
    *,
    depth: int = 5,
    hidden: Sequence[int] = (128, 128),
    max_log_scale: float = 3.0,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """`maf` with every layer inverted: samples and their density in one pass, densities of given data in up to as many
    passes a layer as the event has numbers. Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, *Improving
    Variational Inference with Inverse Autoregressive Flow* (2016). Arguments as in `maf`."""
    univariate = bijectors.univariate.affine(max_log_scale)

    def layer(features):
        made = nets.MADE(univariate.size, tuple(hidden), activation=activation)
        return bijectors.invert(bijectors.autoregressive(univariate, made))

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, permutations=_reversals, remat=remat
    )


def neural_spline_autoregressive(
    event_shape: Sequence[int],
    *,
    depth: int = 5,
    hidden: Sequence[int] = (128, 128),
    bins: int = 8,
    bound: float = 5.0,
    linear: bool = True,
    residual: bool = False,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """Rational-quadratic autoregressive layers, each behind a permutation and an LU linear map: RQ-NSF (AR) of Durkan,
    Bekasov, Murray, Papamakarios, *Neural Spline Flows* (2019), on the flattened event.

    Densities take one pass a layer, as in `maf`. Outside [-bound, bound] a layer's splines are the identity. Arguments as
    in `maf`, and
        bins: of each spline, which takes 3*bins - 1 raw numbers.
        bound: half the side of the box that the splines act on.
        linear: whether LU maps stand between the layers.
        residual: whether the networks are residual, of equal widths, as in the paper; see `nets.MADE`.
    """
    univariate = bijectors.univariate.rational_quadratic(bins, bound)

    def layer(features):
        made = nets.MADE(univariate.size, tuple(hidden), activation=activation, residual=residual)
        splines = bijectors.autoregressive(univariate, made)
        return bijectors.chain(bijectors.lu(features), splines) if linear else splines

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, permutations=_reversals, remat=remat
    )


def bnaf(
    event_shape: Sequence[int],
    *,
    depth: int = 2,
    hidden: int = 8,
    num_layers: int = 2,
    embed: nn.Module | None = None,
    remat: bool = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """Block neural autoregressive flow: `depth` maps, the order reversed between them, each a monotone masked network of
    `num_layers` hidden layers with `hidden` units for every number; see `bijectors.block_autoregressive`. De Cao, Titov, Aziz,
    *Block Neural Autoregressive Flow* (2019). Densities take one pass, samples a numerical inverse. Other arguments as in
    `maf`."""

    def layer(features):
        return bijectors.block_autoregressive(features, hidden, num_layers)

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, permutations=_reversals, remat=remat
    )


def _reversals(features: int, depth: int) -> np.ndarray:
    return np.tile(np.arange(features, dtype=np.int32)[::-1], (depth, 1))
