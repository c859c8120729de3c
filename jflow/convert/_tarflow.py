"""Published weights of TarFlow, as a flow."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import bijectors, distributions
from jflow.bijectors import TokenGuide
from jflow.bijectors.decoding import Sampler, cached
from jflow.convert._layouts import (
    Constant,
    Layout,
    Transform,
    Weight,
    count_blocks,
    dense,
    in_one_piece,
)
from jflow.convert._layouts import load as load_layout
from jflow.convert._parts import norm, shape_of
from jflow.convert._safetensors import tensors_of
from jflow.flows import flow
from jflow.nets import TarFlowTransformer
from jflow.types import Flow, Params

_CACHED = cached()


def tarflow(
    files: str | Path | Mapping[str, np.ndarray],
    event_shape: Sequence[int],
    *,
    head_size: int = 64,
    sampler: Sampler = _CACHED,
    guide: TokenGuide | None = None,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[Flow, Params]:
    """A flow of images and its params from the published weights of TarFlow.

    The sizes come from the shapes. Images are in [-1, 1], with the noise that the network was
    trained with; `guidance.denoise` takes it out of the samples. The published log-determinant is a
    mean over numbers and `log_prob` is in nats. No published file was opened when this was written:
    the names are those of the authors' code.

    Args:
        files: what `read_safetensors` takes, or the tensors that it returned.
        event_shape: (H, W, C) of the images.
        head_size: the width of an attention head.
        sampler: how a block is inverted; see `bijectors.decoding`.
        guide: what guides the sampling; see `guidance.extrapolate`.
        prefix: of the names; see `load`.
        dtype: of the params; see `load`.
        sharding: where the params go; see `load`.

    Returns:
        The flow, and its params {'bijector', 'base'}.

    Raises:
        ValueError: the weights are not those of a TarFlow on such images: what is missing, unknown
            or of another shape is named.

    Examples:
        >>> from jflow import convert
        >>> flow, params = convert.tarflow("afhq.safetensors", (256, 256, 3))  # doctest: +SKIP
        >>> flow.log_prob(params, images, labels)  # doctest: +SKIP

    References:
        Zhai et al., *Normalizing Flows are Capable Generative Models*, 2024, arXiv:2412.06329.
    """
    tensors = tensors_of(files)
    width, size = shape_of("tarflow", "TarFlow", tensors, f"{prefix}blocks.0.proj_in.weight", 2)
    classes = tensors.get(f"{prefix}blocks.0.class_embed")
    patch = math.isqrt(size // tuple(event_shape)[-1])
    net = TarFlowTransformer(
        width=width,
        num_layers=count_blocks(tensors, f"{prefix}blocks.0.attn_blocks."),
        num_heads=max(width // head_size, 1),
        num_classes=None if classes is None else classes.shape[0],
    )
    depth = count_blocks(tensors, f"{prefix}blocks.")
    made = _flow(net, event_shape, patch, depth, sampler, guide)
    image = jax.ShapeDtypeStruct((1, *event_shape), jnp.float32)
    label = None if classes is None else jax.ShapeDtypeStruct((1,), jnp.int32)
    like = jax.eval_shape(made.init, jax.random.key(0), image, label)
    layout = tarflow_layout(net, event_shape, patch_size=patch, depth=depth)
    return made, load_layout(tensors, layout, like, prefix=prefix, dtype=dtype, sharding=sharding)


def tarflow_layout(
    net: TarFlowTransformer, event_shape: Sequence[int], *, patch_size: int, depth: int
) -> Layout:
    """The names of the weights of TarFlow in the files of its authors.

    Args:
        net: the transformer of a block.
        event_shape: (H, W, C) of the images.
        patch_size: the side of a patch, in pixels.
        depth: the number of blocks.

    Returns:
        The layout of the params of the flow that `tarflow` returns, for `load` and `save`.

    Examples:
        >>> from jflow import convert, nets
        >>> net = nets.TarFlowTransformer()
        >>> layout = convert.tarflow_layout(net, (8, 8, 3), patch_size=2, depth=4)
        >>> layout.weights[0].path
        'bijector/1/stacked/tokens/kernel'

    References:
        Zhai et al., *Normalizing Flows are Capable Generative Models*, 2024, arXiv:2412.06329.
    """
    height, width, channels = event_shape
    p, rows, columns = patch_size, height // patch_size, width // patch_size
    tokens = rows * columns
    # The first published block is the one beside the data, jflow's last; every other is reversed.
    blocks = range(depth - 1, -1, -1)
    reverse = np.array([i % 2 == 1 for i in blocks])[:, None, None]
    both = (blocks, range(net.num_layers))
    stack = "bijector/1/stacked"

    def turned(x):
        return jnp.where(reverse, x[:, ::-1], x)

    def ours(x):  # the numbers of a patch, [..., C p p] -> [..., p p C]
        x = x.reshape(*x.shape[:-1], channels, p * p)
        return x.swapaxes(-1, -2).reshape(*x.shape[:-2], -1)

    def theirs(x):
        x = x.reshape(*x.shape[:-1], p * p, channels)
        return x.swapaxes(-1, -2).reshape(*x.shape[:-2], -1)

    def halves(x, of):  # (log-scale, mean) <-> (mean, log-scale)
        x = of(x.reshape(*x.shape[:-1], 2, -1))
        return x[..., ::-1, :].reshape(*x.shape[:-2], -1)

    def row(key, path, read, write, blocks=blocks):
        return Weight(key, path, Transform(read, write), blocks)

    def deviation(var):  # [tokens, C p p] -> [H, W, C]
        x = jnp.log(ours(var)).reshape(rows, columns, p, p, channels) / 2
        return x.swapaxes(1, 2).reshape(height, width, channels)

    def variance(log_std):
        x = log_std.reshape(rows, p, columns, p, channels).swapaxes(1, 2)
        return jnp.exp(2 * theirs(x.reshape(tokens, -1)))

    entry, head, inner = (f"blocks.{{}}.{name}" for name in ("proj_in", "proj_out", "attn_blocks"))
    inner += ".{}"
    classes = row(
        "blocks.{}.class_embed",
        f"{stack}/classes",
        lambda w: w.squeeze(-2),
        lambda x: x[..., None, :],
    )
    masks = tuple(
        Constant(
            f"blocks.{i}.attn_mask", lambda shape: in_one_piece(np.tri(tokens)), (tokens, tokens)
        )
        for i in blocks
    )
    return Layout(
        "TarFlow",
        (
            row(
                f"{entry}.weight",
                f"{stack}/tokens/kernel",
                lambda w: ours(w).swapaxes(-1, -2),
                lambda kernel: theirs(kernel.swapaxes(-1, -2)),
            ),
            Weight(f"{entry}.bias", f"{stack}/tokens/bias", blocks=blocks),
            row("blocks.{}.pos_embed", f"{stack}/positions", turned, turned),
            *(() if net.num_classes is None else (classes,)),
            *norm(f"{inner}.attention.norm", f"{stack}/layers/norm_attention", both),
            *dense(f"{inner}.attention.qkv", f"{stack}/layers/qkv", both),
            *dense(f"{inner}.attention.proj", f"{stack}/layers/out", both),
            *norm(f"{inner}.mlp.norm", f"{stack}/layers/norm_mlp", both),
            *dense(f"{inner}.mlp.main.0", f"{stack}/layers/mlp_in", both),
            *dense(f"{inner}.mlp.main.2", f"{stack}/layers/mlp_out", both),
            row(
                f"{head}.weight",
                f"{stack}/head/kernel",
                lambda w: halves(w.swapaxes(-1, -2), ours),
                lambda kernel: halves(kernel, theirs).swapaxes(-1, -2),
            ),
            row(
                f"{head}.bias",
                f"{stack}/head/bias",
                lambda w: halves(w, ours),
                lambda bias: halves(bias, theirs),
            ),
            row("var", "base/log_std", deviation, variance, None),
            Weight((), "base/mean"),
        ),
        masks,
    )


def _flow(net, event_shape, patch_size: int, depth: int, sampler, guide) -> Flow:
    event_shape = tuple(event_shape)
    tokens = bijectors.tokens(event_shape, patch_size)
    count = event_shape[0] * event_shape[1] // patch_size**2
    orders = np.stack([np.arange(count)[:: (-1) ** i] for i in range(depth - 1, -1, -1)])
    options = {"max_log_scale": math.inf, "sampler": sampler, "guide": guide}
    layer = partial(bijectors.causal_block, net, **options)
    stack = bijectors.scan(lambda order: layer(order=order), depth, xs=orders.astype(np.int32))
    bijector = bijectors.chain(bijectors.invert(tokens), stack, tokens)
    return flow(bijector, distributions.diagonal_normal(event_shape), event_shape=event_shape)
