"""Flows on images [H, W, C]. Written from the image to the noise, so that densities take the forward maps, and inverted."""

import operator
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import numpy as np

from jflow import bijectors as bj
from jflow import distributions, nets
from jflow._core.checks import check_whole
from jflow.flows._flow import elbo_flow, flow
from jflow.flows._stack import alternating_permutations, recipe, with_inverses
from jflow.types import Bijector, Distribution, ElboFlow, Elementwise, Flow

__all__ = ["dequantization_noise", "flow_plus_plus", "glow", "inverse_flow"]


def glow(
    event_shape: Sequence[int],
    *,
    scales: int = 2,
    depth: int = 8,
    hidden: int = 128,
    univariate: Elementwise | None = None,
    net: nn.Module | None = None,
    mix: Callable[[int], Bijector] = bj.invertible_conv_1x1,
    embed: nn.Module | None = None,
    remat: bool = False,
    reversible: bool | int = False,
    standardize: bool = True,
    base: Distribution | None = None,
) -> Flow:
    """Multi-scale flow of actnorms, 1 x 1 convolutions and couplings of channels. Kingma, Dhariwal, *Glow* (2018).

    Each scale squeezes, takes `depth` steps, says with one more coupling what the kept half of the channels predicts of
    the other half (the paper's learned prior of a split), and goes on with the kept half. The 1 x 1 convolution is P L U
    with P fixed. Acts on real images of order one: for data in levels use
    elbo_flow(chain(sigmoid(0.05), uniform_dequantization(256)), glow(...)).

    Sampling at temperature T: glow(..., base=distributions.scaled(distributions.normal(event_shape), T)), same params.

    Args:
        event_shape: [H, W, C], H and W divisible by 2^scales.
        scales, depth: number of scales (the paper's levels L), and of steps at each (K).
        hidden: channels of the default network, `nets.GlowNet(hidden)`.
        univariate: of the couplings; defaults to `bijectors.univariate.affine()`.
        net: another conditioner for images, `module(x, cond=None)`.
        mix: of a count of channels, the linear map of each step, towards the noise, behind a fixed permutation of channels.
            Another than the 1 x 1 convolution: `bijectors.masked_conv`, whose window is larger.
        embed: Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; float vectors and images
            [b, H, W, k] need none.
        remat, reversible: memory in the backward pass, see `bijectors.scan`.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers from init's batch.
            Density and samples are in the units of the data either way.
        base: defaults to the standard normal.
    """
    event_shape = _image_shape("glow", event_shape, *[2 ** max(scales, 0)] * 2)
    check_whole("glow", scales=scales, depth=depth)
    univariate = bj.univariate.affine() if univariate is None else univariate
    net = nets.GlowNet(hidden) if net is None else net

    def level(i: int, channels: int) -> Bijector:
        half = channels // 2
        step = bj.chain(
            bj.actnorm(channels), mix(channels), bj.coupling(univariate, net, split=half)
        )
        steps = bj.scan(
            lambda order: bj.chain(bj.permute(*order), step),
            depth,
            xs=with_inverses(alternating_permutations(channels, depth)),
            remat=remat,
            reversible=reversible,
        )
        layers = [bj.squeeze(), steps]
        if i < scales:
            layers += [
                bj.coupling(univariate, net, split=half),
                bj.on_part(level(i + 1, 4 * half), slice(0, half)),
            ]
        return bj.chain(*layers, bj.invert(bj.squeeze()))

    to_noise = level(1, 4 * event_shape[-1])
    if embed is not None:
        to_noise = bj.conditioned(to_noise, embed)
    return recipe(event_shape, bj.invert(to_noise), standardize, base)


def inverse_flow(event_shape: Sequence[int], *, size: int = 3, **options) -> Flow:
    """`glow` with the inverse of a size x size convolution in place of the 1 x 1 one, so that densities take the wavefront
    of `bijectors.masked_conv` and sampling takes convolutions. `options` are glow's.

    Nagar, Varma, *Parallel Backpropagation for Inverse of a Convolution with Application to Normalizing Flows* (2025).
    """
    return glow(
        event_shape, mix=lambda channels: bj.invert(bj.masked_conv(channels, size)), **options
    )


def flow_plus_plus(
    event_shape: Sequence[int],
    *,
    levels: int = 256,
    depth: Sequence[int] = (4, 2, 3),
    dequantizer_depth: int = 2,
    width: int = 64,
    num_blocks: int = 2,
    num_heads: int = 4,
    dropout: float = 0.0,
    univariate: Elementwise | None = None,
    embed: nn.Module | None = None,
    remat: bool = False,
    base: Distribution | None = None,
) -> ElboFlow:
    """Mixture-of-logistics couplings with attention, below variational dequantization. Ho, Chen, Srinivas, Duan, Abbeel,
    *Flow++* (2019). On images in levels 0 .. levels-1, as floats.

    Checkerboard couplings, a squeeze, couplings of channels, checkerboard couplings again; before each coupling an
    actnorm and a 1 x 1 convolution of either half. The dequantization noise is a checkerboard flow given the image.

    Args:
        event_shape: [H, W, C], even H and W.
        depth: couplings in the three stages; 0 leaves one out (the third needs a W divisible by 4).
        dequantizer_depth: couplings in the flow of the noise.
        width, num_blocks, num_heads, dropout: of each `nets.GatedAttentionNet`. The key that draws the noise switches dropout
            on: evaluate with the recipe at dropout=0, whose params are the same.
        univariate: of the couplings; defaults to `bijectors.univariate.logistic_mixture()`.
        embed, remat, base: as in `glow`.
    """
    event_shape = _image_shape("flow_plus_plus", event_shape, 2, 2)
    if len(depth) != 3 or min(depth) < 0 or dequantizer_depth < 1:
        raise ValueError(
            "flow_plus_plus: expected three depths >= 0 and dequantizer_depth >= 1, "
            f"got depth={tuple(depth)}, dequantizer_depth={dequantizer_depth}"
        )
    univariate = bj.univariate.logistic_mixture() if univariate is None else univariate
    net = nets.GatedAttentionNet(width, num_blocks, num_heads, dropout)
    channels = event_shape[-1]

    def checkered(channels: int, depth: int) -> list[Bijector]:
        return (
            [bj.checkerboard(), stage(channels, depth), bj.invert(bj.checkerboard())]
            if depth
            else []
        )

    stage = partial(_stage, univariate, net, remat)
    to_noise = bj.chain(
        bj.logit(0.05),
        *checkered(channels, depth[0]),
        bj.squeeze(),
        *([stage(2 * channels, depth[1])] if depth[1] else []),
        *checkered(4 * channels, depth[2]),
        bj.invert(bj.squeeze()),
    )
    noise = dequantization_noise(
        event_shape, depth=dequantizer_depth, net=net, univariate=univariate, remat=remat
    )
    transport = bj.chain(bj.invert(to_noise), bj.variational_dequantization(noise, levels))
    if embed is not None:
        transport = bj.conditioned(transport, embed)
    return elbo_flow(transport, distributions.normal(event_shape) if base is None else base)


def dequantization_noise(
    event_shape: Sequence[int],
    *,
    depth: int = 2,
    net: nn.Module | None = None,
    univariate: Elementwise | None = None,
    remat: bool = False,
) -> Flow:
    """Noise on (0, 1)^[H, W, C] for `bijectors.variational_dequantization`: `depth` checkerboard couplings of a normal, then
    a sigmoid. Its cond is the image; drawing it with its density is the forward, fast direction.

    W must be even. Defaults: `nets.GlowNet(32)`, `bijectors.univariate.affine()`. Ho et al., *Flow++* (2019).
    """
    event_shape = _image_shape("dequantization_noise", event_shape, 1, 2)
    check_whole("dequantization_noise", depth=depth)
    univariate = bj.univariate.affine() if univariate is None else univariate
    couplings = _stage(
        univariate, nets.GlowNet(32) if net is None else net, remat, event_shape[-1], depth
    )
    layers = bj.checkerboard(), couplings, bj.invert(bj.checkerboard()), bj.sigmoid()
    return flow(bj.chain(*layers), distributions.normal(event_shape), event_shape=event_shape)


def _stage(univariate: Elementwise, net: nn.Module, remat: bool, half: int, depth: int) -> Bijector:
    """Couplings of two halves of the channels by turns, each behind an actnorm and a 1 x 1 convolution of either half."""
    mix = [
        bj.on_part(bj.invertible_conv_1x1(half), part)
        for part in (slice(0, half), slice(half, None))
        if half > 1
    ]  # else redundant
    swap = bj.permute(np.roll(np.arange(2 * half), half))
    step = bj.chain(bj.actnorm(2 * half), *mix, bj.coupling(univariate, net, split=half), swap)
    return bj.scan(step, depth, remat=remat)


def _image_shape(name: str, event_shape: Sequence[int], rows: int, columns: int) -> tuple[int, ...]:
    shape = tuple(operator.index(size) for size in event_shape)
    if len(shape) != 3 or min(shape) < 1 or shape[0] % rows or shape[1] % columns:
        raise ValueError(
            f"{name}: expected event_shape [H, W, C] with H divisible by {rows} and W by {columns}, got {list(shape)}"
        )
    return shape
