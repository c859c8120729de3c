"""Flows of maps z + g(z): contractions for densities, maps of low rank for variational inference."""

import math
import operator
from collections.abc import Callable, Sequence

import flax.linen as nn

from jflow import bijectors, nets
from jflow.flows._stack import recipe
from jflow.types import Bijector, Distribution, Flow

__all__ = ["planar", "radial", "residual_flow", "sylvester"]

_ROULETTE = bijectors.log_dets.russian_roulette()


def residual_flow(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    coeff: float = 0.9,
    log_det: bijectors.log_dets.LogDet = _ROULETTE,
    net: nn.Module | None = None,
    embed: nn.Module | None = None,
    activation: Callable | None = None,
    remat: bool = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """Actnorms and residual blocks x + g(x). Chen, Behrmann, Duvenaud, Jacobsen, *Residual Flows for Invertible Generative
    Modeling* (2019); with log_det=bijectors.log_dets.neumann(n) Behrmann et al., *Invertible Residual Networks* (2019).

    Densities take the blocks themselves: log_prob with a key has an unbiased estimate of the log-det (losses.nll trains
    on it, by gradients of constant memory), without a key the exact one at d products a block. Sampling inverts each
    block by fixed-point iterations, about log(1e-6) / log(coeff) of them at worst.

    Args:
        event_shape: of one x. Images [H, W, C] get convolutions at their own resolution, other shapes are flattened.
        depth: number of blocks.
        hidden: widths (channels) of each block's hidden layers.
        coeff: bound on the Lipschitz constant of g, in (0, 1). Closer to 1 is more expressive, slower to invert and, under
            the roulette, noisier.
        log_det: estimator for calls with a key, from `bijectors.log_dets`.
        net: another network with a bound, in place of hidden, coeff and activation.
        embed: Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a float cond needs none.
        activation: of Lipschitz constant at most 1; by default LipSwish with a learned slope.
        remat: memory in the backward pass, see `bijectors.scan`.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers from init's batch.
            Density and samples are in the units of the data either way.
        base: defaults to the standard normal.
    """
    event_shape = _shape(event_shape, depth, least=1)
    image = len(event_shape) == 3
    if net is None and image:
        kernels = (3, *(1,) * (len(hidden) - 1), 3)
        net = nets.LipschitzConv(tuple(hidden), kernels, coeff=coeff, activation=activation)
    elif net is None:
        net = nets.LipschitzMLP(tuple(hidden), coeff=coeff, activation=activation)
    channels = event_shape[-1] if image else math.prod(event_shape)
    block = bijectors.chain(bijectors.actnorm(channels), bijectors.residual(net, log_det=log_det))
    bijector = bijectors.scan(block, depth, remat=remat)
    if embed is not None:
        bijector = bijectors.conditioned(bijector, embed)
    if not image:
        bijector = _on_vectors(event_shape, bijector)
    return recipe(event_shape, bijectors.invert(bijector), standardize, base)


def planar(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """Planar maps after a free scale and shift: samples with their density in O(d) a map, for variational inference;
    densities of given data by numerical inverses. Rezende, Mohamed, *Variational Inference with Normalizing Flows* (2015).

    With cond every parameter becomes a function of it, the posterior of an amortised inference; see `bijectors.amortized`.

    Args:
        event_shape: of one x, flattened inside.
        depth: number of maps; 0 leaves the Gaussian of free mean and scales (mean field).
        hidden: widths of the MLP that reads the parameters off cond; unused without a cond.
        embed: Linen module applied to cond first, such as an encoder or nn.Embed(10, 16) for labels; a float cond needs
            none.
        activation: of that MLP.
        remat: memory in the backward pass, see `bijectors.scan`.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers from init's batch.
            Density and samples are in the units of the data either way.
        base: defaults to the standard normal.
    """
    return _posterior(
        bijectors.planar, event_shape, depth, hidden, embed, activation, remat, standardize, base
    )


def radial(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """`planar` with radial maps, which have a closed inverse. Rezende, Mohamed (2015). Arguments as in `planar`."""
    return _posterior(
        bijectors.radial, event_shape, depth, hidden, embed, activation, remat, standardize, base
    )


def sylvester(
    event_shape: Sequence[int],
    *,
    depth: int = 4,
    rank: int | None = None,
    reflections: int | None = None,
    hidden: Sequence[int] = (128, 128),
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """`planar` with Sylvester maps of `rank` units (None: as many as dimensions) behind Householder reflections. van den
    Berg, Hasenclever, Tomczak, Welling, *Sylvester Normalizing Flows for Variational Inference* (2018). Other arguments as
    in `planar` and `bijectors.sylvester`."""

    def layer(features):
        return bijectors.sylvester(features, rank, reflections=reflections)

    return _posterior(
        layer, event_shape, depth, hidden, embed, activation, remat, standardize, base
    )


def _posterior(
    layer, event_shape, depth, hidden, embed, activation, remat, standardize, base
) -> Flow:
    event_shape = _shape(event_shape, depth, least=0)
    features = math.prod(event_shape)
    maps = [bijectors.affine((features,))]
    if depth:
        maps.append(bijectors.scan(layer(features), depth, remat=remat))
    bijector = bijectors.amortized(bijectors.chain(*maps), nets.MLP(tuple(hidden), activation))
    if embed is not None:
        bijector = bijectors.conditioned(bijector, embed)
    bijector = _on_vectors(event_shape, bijector)
    return recipe(event_shape, bijector, standardize, base)


def _shape(event_shape, depth: int, least: int) -> tuple[int, ...]:
    event_shape = tuple(operator.index(size) for size in event_shape)
    if depth < least:
        raise ValueError(f"expected depth >= {least}, got {depth}")
    if math.prod(event_shape) < 1:
        raise ValueError(f"expected an event_shape of positive sizes, got {list(event_shape)}")
    return event_shape


def _on_vectors(event_shape: tuple[int, ...], bijector: Bijector) -> Bijector:
    if len(event_shape) == 1:
        return bijector
    flatten = bijectors.reshape(event_shape, (math.prod(event_shape),))
    return bijectors.chain(flatten, bijector, bijectors.invert(flatten))
