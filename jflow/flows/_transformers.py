"""Transformer flows on images [H, W, C] or on the latents of an autoencoder."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from jflow import bijectors, distributions, nets
from jflow._core.checks import check_whole
from jflow.bijectors import TokenGuide
from jflow.bijectors.decoding import Sampler, cached
from jflow.flows._flow import flow
from jflow.flows._stack import recipe
from jflow.types import Bijector, Distribution, Elementwise, Flow

_CACHED = cached()


def tarflow(
    event_shape: Sequence[int],
    *,
    patch_size: int = 4,
    width: int = 256,
    depth: int = 8,
    num_layers: int = 4,
    num_heads: int = 4,
    num_classes: int | None = None,
    max_log_scale: float = 3.0,
    sampler: Sampler = _CACHED,
    guide: TokenGuide | None = None,
    remat: bool = False,
    dtype: Any = None,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """TarFlow: causal affine blocks over the patches of an image, the direction alternating.

    Also known as: TarFlow, transformer autoregressive flow.

    A block maps token x_i to (x_i - mean_i) exp(-log_scale_i), where both are functions, by a
    causal transformer, of the tokens before it. The density is one parallel pass a block, sampling
    goes token after token. `losses.noised` augments the data with noise as the paper does,
    `guidance.denoise` takes it out of the samples. The params do not depend on sampler and guide:
    build the flow twice, train the plain one and sample the guided one with its params.

    Args:
        event_shape: (H, W, C).
        patch_size: p, which divides H and W; a token has p p C numbers.
        width: the width of the transformer of each block.
        depth: the number of blocks.
        num_layers: the number of layers of the transformer of each block.
        num_heads: the number of attention heads, which divides the width.
        num_classes: the number of classes for a cond of labels [b], where index num_classes is the
            null label. A float cond needs none.
        max_log_scale: the bound on the log-scale of one block.
        sampler: how a block is inverted; see `bijectors.decoding`.
        guide: what guides the sampling; see `guidance.extrapolate`.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation of the network, such as jnp.bfloat16; scales and
            log-determinants stay float32.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers
            from the batch that `init` gets, or another bijector in its place: heavy tails want
            `bijectors.robust_standardize(event_shape)`. Density and samples are in the units of the
            data either way.
        base: the base distribution; None is the standard normal, and heavy tails want
            `distributions.student_t(event_shape)`.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: event_shape is not (H, W, C) with H and W divisible by patch_size, num_heads
            does not divide the width, or depth or num_layers is below 1.
        TypeError: base is not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.tarflow(
        ...     (4, 4, 1), patch_size=2, width=8, depth=2, num_layers=1, num_heads=1
        ... )
        >>> images = jnp.zeros((2, 4, 4, 1))
        >>> params = jax.eval_shape(flow.init, jax.random.key(0), images)
        >>> jax.eval_shape(flow.log_prob, params, images).shape  # nothing is computed
        (2,)

    References:
        Zhai et al., *Normalizing Flows are Capable Generative Models*, 2024, arXiv:2412.06329.
    """
    check_whole("tarflow", depth=depth)
    net = nets.CausalTransformer(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_classes=num_classes,
        dtype=dtype,
    )
    options = {"max_log_scale": max_log_scale, "sampler": sampler, "guide": guide}

    def stack(rows, columns, size):
        orders = _alternating(rows * columns, depth)
        return bijectors.scan(
            lambda order: bijectors.causal_block(net, order=order, **options),
            depth,
            xs=orders,
            remat=remat,
        )

    return _patch_flow(event_shape, patch_size, stack, standardize, base)


def starflow(
    event_shape: Sequence[int],
    *,
    patch_size: int = 1,
    width: int = 256,
    num_layers: int = 12,
    shallow_depth: int = 3,
    num_shallow_layers: int = 2,
    num_heads: int = 4,
    num_classes: int | None = None,
    max_log_scale: float = 3.0,
    sampler: Sampler = _CACHED,
    guide: TokenGuide | None = None,
    remat: bool = False,
    dtype: Any = None,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """STARFlow: TarFlow in deep-shallow form, on the latents of an autoencoder.

    One deep block of `num_layers` layers stands next to the noise; it alone sees cond and is alone
    guided. Then `shallow_depth` blocks of `num_shallow_layers` layers shape local detail. Any
    arrays [H, W, C] may be the latents. The guide of the paper is `guidance.score_sum`. See
    `tarflow` for an example.

    Args:
        event_shape: (H, W, C).
        patch_size: p, which divides H and W; a token has p p C numbers.
        width: the width of the transformers.
        num_layers: the number of layers of the deep block.
        shallow_depth: the number of shallow blocks; it may be 0.
        num_shallow_layers: the number of layers of each shallow block.
        num_heads: the number of attention heads, which divides the width.
        num_classes: the number of classes for a cond of labels [b], where index num_classes is the
            null label. A float cond needs none.
        max_log_scale: the bound on the log-scale of one block.
        sampler: how a block is inverted; see `bijectors.decoding`.
        guide: what guides the sampling of the deep block; see `guidance.score_sum`.
        remat: whether each layer of the deep block, and each shallow block, is computed again in
            the backward pass, which saves memory.
        dtype: the type of the computation of the networks, such as jnp.bfloat16; scales and
            log-determinants stay float32.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers
            from the batch that `init` gets, or another bijector in its place: heavy tails want
            `bijectors.robust_standardize(event_shape)`. Density and samples are in the units of the
            data either way.
        base: the base distribution; None is the standard normal, and heavy tails want
            `distributions.student_t(event_shape)`.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: event_shape is not (H, W, C) with H and W divisible by patch_size, num_heads
            does not divide the width, shallow_depth is below 0, or a number of layers is below 1.
        TypeError: base is not a `Distribution` or a `Flow`.

    References:
        Gu et al., *STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis*,
            2025, arXiv:2506.06276.
    """
    check_whole("starflow", 0, shallow_depth=shallow_depth)
    sizes = {"width": width, "num_heads": num_heads, "dtype": dtype}
    deep = nets.CausalTransformer(
        num_layers=num_layers, num_classes=num_classes, remat=remat, **sizes
    )
    shallow = nets.CausalTransformer(num_layers=num_shallow_layers, **sizes)
    options = {"max_log_scale": max_log_scale, "sampler": sampler}

    def stack(rows, columns, size):
        orders = _alternating(rows * columns, shallow_depth + 1)
        first = bijectors.causal_block(deep, order=orders[0], guide=guide, **options)
        rest = bijectors.scan(
            lambda order: bijectors.causal_block(shallow, order=order, **options),
            shallow_depth,
            xs=orders[1:],
            remat=remat,
        )
        return bijectors.chain(first, _unconditional(rest))

    return _patch_flow(event_shape, patch_size, stack, standardize, base)


def jet(
    event_shape: Sequence[int],
    *,
    patch_size: int = 4,
    width: int = 256,
    depth: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_classes: int | None = None,
    univariate: Elementwise | None = None,
    remat: bool = False,
    reversible: bool | int = False,
    dtype: Any = None,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Jet: affine couplings of the patches of an image by vision transformers.

    Both directions are one pass. As published, four couplings that split the channels of all
    patches alike, at random, are followed by one that splits the patches themselves: checkerboard,
    columns and rows in turn, each with its complement. Width 512, 8 heads and 32 couplings of 2
    layers are the smaller published network for 64 x 64 pixels, 64 couplings of 5 layers the
    larger one. Give it dequantized pixels, `data.dequantize`.

    Args:
        event_shape: (H, W, C).
        patch_size: p, which divides H and W; a token has p p C numbers, an even count.
        width: the width of the ViT of each coupling.
        depth: the number of couplings.
        num_layers: the number of layers of the ViT of each coupling.
        num_heads: the number of attention heads, which divides the width.
        num_classes: the number of classes for a cond of labels [b], where index num_classes is the
            null label. A float cond needs none.
        univariate: the elementwise map of the couplings, from data to noise; None is
            `bijectors.univariate.shift_then_scale()`, as published, whose scale is below 2.
            `bijectors.univariate.affine()` has a scale that is bounded both ways.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        reversible: whether the backward pass rebuilds the activations by inverting the layers,
            which makes their memory flat in depth; an integer k keeps every k-th one. Not together
            with remat; see `bijectors.scan`.
        dtype: the type of the computation of the networks, such as jnp.bfloat16; scales and
            log-determinants stay float32.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers
            from the batch that `init` gets, or another bijector in its place: heavy tails want
            `bijectors.robust_standardize(event_shape)`. Density and samples are in the units of the
            data either way.
        base: the base distribution; None is the standard normal, and heavy tails want
            `distributions.student_t(event_shape)`.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: event_shape is not (H, W, C) with H and W divisible by patch_size, a token has
            an odd count of numbers, num_heads does not divide the width, or depth or num_layers is
            below 1.
        TypeError: base is not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.jet((4, 4, 1), patch_size=2, width=8, depth=2, num_layers=1, num_heads=1)
        >>> images = jnp.zeros((2, 4, 4, 1))
        >>> params = jax.eval_shape(flow.init, jax.random.key(0), images)
        >>> jax.eval_shape(flow.log_prob, params, images).shape  # nothing is computed
        (2,)

    References:
        Kolesnikov, Pinto, Tschannen, *Jet: A Modern Transformer-Based Normalizing Flow*, 2024,
            arXiv:2412.15129.
    """
    net = nets.ViT(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_classes=num_classes,
        dtype=dtype,
    )
    stack = _jet_stack(net, univariate, depth, remat=remat, reversible=reversible)
    return _patch_flow(event_shape, patch_size, stack, standardize, base)


def jetformer(
    event_shape: Sequence[int],
    prior: nn.Module,
    *,
    kept: int,
    components: int = 16,
    patch_size: int = 4,
    width: int = 256,
    depth: int = 8,
    num_layers: int = 2,
    num_heads: int = 4,
    univariate: Elementwise | None = None,
    guide: Callable[[Distribution], Distribution] | None = None,
    min_std: float = 1e-3,
    remat: bool = False,
    reversible: bool | int = False,
    dtype: Any = None,
    standardize: bool | Bijector = True,
) -> Flow:
    """JetFormer: a Jet whose tokens have a causal law, of Gaussian mixtures, given a text.

        log p(image | text) = sum_i log p_mixture(z_i[:kept] | h_i) + log N(z_i[kept:]) + log_det,
        z = the tokens of Jet's inverse of the image,    h = prior(z, text)

    The first `kept` numbers of each token have a mixture of `components` normals whose numbers are
    read off the causal network; the others are factored out, standard normal, and their likelihood
    counts. Jet does not see the text. With `nets.WithText` for the network the text and the image
    are one sequence, and `distributions.causal(nets.OfText(prior), distributions.categorical(K))`
    is the law of the text with the same params: the sum of both log-densities is that of the pair
    (docs, "Captions and images"). With another causal network cond is what that one takes.

    `losses.noised` with a schedule is the noise curriculum of the paper, and `losses.drop_cond`
    trains for guidance. Bits per dimension are those of the data only where the noise has ended.

    Args:
        event_shape: (H, W, C).
        prior: the causal network of the tokens, module(z [b, n, p p C], cond) -> h [b, n, k], such
            as `nets.WithText(nets.CausalTransformer(features=k), ...)`.
        kept: how many numbers of a token the network models, at least 1 and below p p C.
        components: the number of normals of the mixture of a token.
        patch_size: p, which divides H and W; a token has p p C numbers, an even count.
        width: the width of the ViT of each coupling of Jet.
        depth: the number of couplings of Jet.
        num_layers: the number of layers of the ViT of each coupling.
        num_heads: the number of attention heads of each ViT, which divides the width.
        univariate: the elementwise map of the couplings; see `jet`.
        guide: what the law of the kept numbers becomes when samples are drawn, such as `lambda law:
            distributions.contrasted(law, 2.0)` beside `nets.Contrasted(prior, null)`; None leaves
            it. The params are the same: build the flow twice and train the plain one.
        min_std: the least standard deviation of a component, which bounds the density.
        remat: whether each layer of Jet is computed again in the backward pass.
        reversible: whether the backward pass through Jet inverts its layers; see `jet`.
        dtype: the type of the computation of Jet's networks; see `jet`.
        standardize: whether the data first meet `bijectors.standardize`, or another bijector in its
            place; see `jet`.

    Returns:
        Flow: the flow of images [b, H, W, C] given cond, with params {'bijector', 'base'}; those
            of the causal law are under 'base' of the base.

    Raises:
        ValueError: what `jet` refuses; kept is below 1 or no less than the numbers of a token; or
            at init, prior is not causal.
        TypeError: prior is not a Linen module.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows, nets
        >>> sizes = {"width": 8, "num_layers": 1, "num_heads": 1}
        >>> prior = nets.WithText(nets.CausalTransformer(features=8, **sizes), 5, length=3, width=8)
        >>> flow = flows.jetformer((4, 4, 1), prior, kept=2, patch_size=2, depth=2, **sizes)
        >>> images, text = jnp.zeros((2, 4, 4, 1)), jnp.zeros((2, 3), int)
        >>> params = jax.eval_shape(flow.init, jax.random.key(0), images, text)
        >>> jax.eval_shape(flow.log_prob, params, images, text).shape  # nothing is computed
        (2,)

    References:
        Tschannen, Pinto, Kolesnikov, *JetFormer: An Autoregressive Generative Model of Raw Images
            and Text*, 2024, arXiv:2411.19722.
    """
    net = nets.ViT(width=width, num_layers=num_layers, num_heads=num_heads, dtype=dtype)
    stack = _jet_stack(net, univariate, depth, remat=remat, reversible=reversible)
    tokens = bijectors.tokens(event_shape, patch_size)
    height, across, channels = event_shape
    count, size = height // patch_size * (across // patch_size), patch_size**2 * channels
    if not 1 <= kept < size:
        raise ValueError(f"jetformer: expected kept in 1 .. {size - 1}, got {kept}")
    law = distributions.conditional_mixture((kept,), components, min_std=min_std)
    law = law if guide is None else guide(law)
    token = distributions.split(law, distributions.normal((size - kept,)), kept)
    base = flow(tokens, distributions.causal(prior, token, (count, size)))
    unconditional = lambda *sizes: _unconditional(stack(*sizes))  # noqa: E731
    return _patch_flow(event_shape, patch_size, unconditional, standardize, base)


def _jet_stack(net: nets.ViT, univariate: Elementwise | None, depth: int, **scan_options):
    """Jet's couplings, for `_patch_flow`."""
    univariate = bijectors.univariate.shift_then_scale() if univariate is None else univariate

    def stack(rows, columns, size):
        flat = bijectors.reshape((rows * columns, size), (rows * columns * size,))

        def layer(split):
            arrange = bijectors.chain(flat, bijectors.permute(split), bijectors.invert(flat))
            coupling = bijectors.coupling(univariate, net, split=size // 2)
            return bijectors.chain(arrange, bijectors.invert(coupling), bijectors.invert(arrange))

        # A split is a permutation of the n d numbers that puts those that pass first, so that one
        # scanned body serves all of them. As published, the data meet the first one first.
        splits = jet_splits(rows, columns, size, depth)[::-1]
        return bijectors.scan(layer, depth, xs=splits, **scan_options)

    return stack


def jet_splits(rows: int, columns: int, size: int, depth: int, seed: int = 0) -> np.ndarray:
    """Permutations [depth, n size], n = rows columns, that arrange tokens [n, size] for couplings.

    The first half of each row passes and the second is transformed. Every fifth layer splits the
    patches: checkerboard, columns, rows, each before its complement. The others split the channels
    at random, from a fixed seed: permutations are no part of a checkpoint. Where the patches are
    odd in number, the channels of one of them go to both sides.
    """
    if size % 2:
        raise ValueError(f"jet: expected an even count of numbers in a patch, got {size}")
    check_whole("jet", depth=depth)
    rng = np.random.default_rng(seed)
    row, column = np.divmod(np.arange(rows * columns), columns)
    patterns = [(row + column) % 2, column % 2, row % 2]
    splits = []
    for i in range(depth):
        if i % 5 == 4:
            pattern, complement = divmod(i // 5, 2)
            side = np.repeat(patterns[pattern % 3][:, None] ^ complement, size, axis=1)
        else:
            side = np.repeat(rng.permutation(size)[None] % 2, rows * columns, axis=0)
        order = np.argsort(side.reshape(-1), kind="stable")
        splits.append(
            np.concatenate(order.reshape(2, rows * columns, size // 2), axis=1).reshape(-1)
        )
    return np.stack(splits).astype(np.int32)


def _alternating(n: int, depth: int) -> np.ndarray:
    """[depth, n]: the tokens forwards and backwards in turn."""
    return np.stack([np.arange(n)[:: (-1) ** i] for i in range(depth)]).astype(np.int32)


def _patch_flow(
    event_shape,
    patch_size: int,
    stack,
    standardize: bool | Bijector,
    base: Distribution | Flow | None,
) -> Flow:
    """Maps of tokens, from stack(rows, columns, numbers a token), between images on both sides."""
    event_shape = tuple(event_shape)
    if len(event_shape) != 3:
        raise ValueError(f"expected an event_shape (H, W, C), got {list(event_shape)}")
    height, width, channels = event_shape
    tokens = bijectors.tokens(event_shape, patch_size)
    inner = stack(height // patch_size, width // patch_size, patch_size**2 * channels)
    bijector = bijectors.chain(bijectors.invert(tokens), inner, tokens)
    return recipe(event_shape, bijector, standardize, base)


def _unconditional(bijector: Bijector) -> Bijector:
    """`bijector` without cond."""

    def init(key, x, cond=None, *, side="data"):
        return bijector.init(key, x, None, side=side)

    def forward(params, z, cond=None, *, key=None):
        return bijector.forward(params, z, None, key=key)

    def inverse(params, x, cond=None, *, key=None):
        return bijector.inverse(params, x, None, key=key)

    return Bijector(init, forward, inverse)
