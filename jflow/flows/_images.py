"""Flows on images [H, W, C].

They are written from the image to the noise, so that densities take the forward maps, and inverted.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np

from jflow import bijectors as bj
from jflow import distributions, nets
from jflow._core.checks import check_whole, sizes
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
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Glow: a multi-scale flow on images, of actnorms, 1 x 1 convolutions and channel couplings.

    Also known as: Glow, multi-scale flow, Glow recipe, generative flow with invertible 1x1
    convolutions.

    Each scale squeezes, takes `depth` steps, says with one more coupling what the half of the
    channels that goes on predicts of the other half (the learned prior of a split in the paper),
    and goes on with the first half. The 1 x 1 convolution is P L U with P fixed. Both directions
    take one pass.

    It acts on real images of order one: for data in levels use elbo_flow(chain(sigmoid(0.05),
    uniform_dequantization(256)), glow(...)). Sampling at the temperature T is glow(...,
    base=distributions.scaled(distributions.normal(event_shape), T)), with the same params.

    Args:
        event_shape: [H, W, C], with H and W divisible by 2^scales.
        scales: the number of scales (L in the paper, its levels).
        depth: the number of steps at each scale (K in the paper).
        hidden: the channels of the default network, `nets.GlowNet(hidden)`.
        univariate: the elementwise map of the couplings; None is `bijectors.univariate.affine()`.
        net: another conditioner for images, `module(x, cond=None)`; None is `nets.GlowNet(hidden)`.
        mix: a function from a count of channels to the linear map of each step, towards the noise,
            behind a fixed permutation of the channels. Another than the 1 x 1 convolution is
            `bijectors.masked_conv`, whose window is larger.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; float
            vectors and images [b, H, W, k] need none, nor does `types.Condition(aligned=...)`, an
            image at the pixels of x whose weights start at zero.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        reversible: whether the backward pass rebuilds the activations by inverting the layers,
            which makes their memory flat in depth; an integer k keeps every k-th one. Not together
            with remat; see `bijectors.scan`.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers
            from the batch that `init` gets, or another bijector in its place: heavy tails want
            `bijectors.robust_standardize(event_shape)`. Density and samples are in the units of the
            data either way.
        base: the base distribution; None is the standard normal, and heavy tails want
            `distributions.student_t(event_shape)`.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: event_shape is not [H, W, C] with H and W divisible by 2^scales, or scales or
            depth is below 1.
        TypeError: base is not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.glow((4, 4, 1), scales=1, depth=2, hidden=4)
        >>> images = jnp.zeros((2, 4, 4, 1))
        >>> params = jax.eval_shape(flow.init, jax.random.key(0), images)
        >>> jax.eval_shape(flow.log_prob, params, images).shape  # nothing is computed
        (2,)

    References:
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018,
            arXiv:1807.03039.
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


def inverse_flow(event_shape: Sequence[int], *, size: int = 3, **options: Any) -> Flow:
    """Glow with inverses of convolutions in the place of its 1 x 1 ones.

    Densities take the wavefront of `bijectors.masked_conv`, sampling takes size x size
    convolutions. See `glow` for an example.

    Args:
        event_shape: [H, W, C], with H and W divisible by 2^scales.
        size: the side of the window of the convolutions.
        **options: those of `glow` but for mix.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: event_shape is not [H, W, C] with H and W divisible by 2^scales, or scales,
            depth or size is out of its range.

    References:
        Nagar, Varma, *Parallel Backpropagation for Inverse of a Convolution with Application to
            Normalizing Flows*, 2025, arXiv:2410.14634.
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
    """Flow++: mixture-of-logistics couplings with attention, below variational dequantization.

    It is a model of images in levels 0 .. levels-1, as floats: checkerboard couplings, a squeeze,
    couplings of channels, checkerboard couplings again; before each coupling an actnorm and a 1 x 1
    convolution of either half. The noise of the dequantization is a checkerboard flow given the
    image. The elbo is [b], nats of the levels.

    Args:
        event_shape: [H, W, C], with even H and W.
        levels: the number of levels of a pixel.
        depth: the numbers of couplings in the three stages; 0 leaves a stage out, and the third
            needs a W divisible by 4.
        dequantizer_depth: the number of couplings in the flow of the noise.
        width: the channels of each `nets.GatedAttentionNet`.
        num_blocks: the number of blocks of each `nets.GatedAttentionNet`.
        num_heads: the number of attention heads of each `nets.GatedAttentionNet`.
        dropout: the rate of each `nets.GatedAttentionNet`. The key that draws the noise switches
            dropout on: evaluate with the recipe at dropout=0, whose params are the same.
        univariate: the elementwise map of the couplings; None is
            `bijectors.univariate.logistic_mixture()`.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; float
            vectors and images [b, H, W, k] need none, nor does `types.Condition(aligned=...)`, an
            image at the pixels of x whose weights start at zero.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        base: the base distribution; None is the standard normal.

    Returns:
        ElboFlow: the model, with params {'bijector', 'base'}.

    Raises:
        ValueError: event_shape is not [H, W, C] with even H and W, there are not three depths of at
            least 0, or dequantizer_depth is below 1.
        TypeError: base is not a `Distribution` or a `Flow`.

    References:
        Ho, Chen, Srinivas, Duan, Abbeel, *Flow++: Improving Flow-Based Generative Models with
            Variational Dequantization and Architecture Design*, 2019, arXiv:1902.00275.
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
    """A flow of noise on (0, 1) given an image, for `bijectors.variational_dequantization`.

    The noise, [H, W, C], is a standard normal through `depth` checkerboard couplings and a sigmoid.
    Its cond is the image. Drawing it with its density is the forward, fast direction.

    Args:
        event_shape: [H, W, C], with an even W.
        depth: the number of couplings.
        net: a conditioner for images, `module(x, cond=None)`; None is `nets.GlowNet(32)`.
        univariate: the elementwise map of the couplings; None is `bijectors.univariate.affine()`.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: event_shape is not [H, W, C] with an even W, or depth is below 1.

    References:
        Ho, Chen, Srinivas, Duan, Abbeel, *Flow++: Improving Flow-Based Generative Models with
            Variational Dequantization and Architecture Design*, 2019, arXiv:1902.00275.
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
    """Couplings of two halves of the channels by turns.

    Each is behind an actnorm and a 1 x 1 convolution of either half.
    """
    mix = [
        bj.on_part(bj.invertible_conv_1x1(half), part)
        for part in (slice(0, half), slice(half, None))
        if half > 1
    ]  # else redundant
    swap = bj.permute(np.roll(np.arange(2 * half), half))
    step = bj.chain(bj.actnorm(2 * half), *mix, bj.coupling(univariate, net, split=half), swap)
    return bj.scan(step, depth, remat=remat)


def _image_shape(name: str, event_shape: Sequence[int], rows: int, columns: int) -> tuple[int, ...]:
    shape = sizes(event_shape)
    if len(shape) != 3 or min(shape) < 1 or shape[0] % rows or shape[1] % columns:
        raise ValueError(
            f"{name}: expected event_shape [H, W, C] with H divisible by {rows} and W by "
            f"{columns}, "
            f"got {list(shape)}"
        )
    return shape
