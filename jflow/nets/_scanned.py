"""Blocks in a row, as one module whose params lead with the depth."""

from typing import Any

import flax.linen as nn

from jflow._core.attached import HIDDEN, REPORT


def scanned(
    block: type[nn.Module], length: int, remat: bool = False, in_axes: Any = nn.broadcast
) -> type[nn.Module]:
    """The module of `length` such blocks in a row, scanned: compile time is flat in depth.

    Also known as: stacked layers, nn.scan over layers.

    A block is a module whose call, given (tokens, *others), returns (tokens, None); the others are
    the same for all layers. The params of the layers are stacked along a leading axis, which is
    what `train.stages` splits and `train.pipelined` runs as a pipeline, and dropout draws for each
    layer.

    Args:
        block: The class of the block.
        length: The number of layers.
        remat: Whether each layer is computed again in the backward pass, which saves memory.
        in_axes: Of the others, where some differ from layer to layer, as in `flax.linen.scan`.

    Returns:
        A class: `scanned(Block, 4)(*options, name="blocks")` is a module.

    Examples:
        >>> import flax.linen as nn
        >>> import jax, jax.numpy as jnp
        >>> from jflow import nets
        >>> class Block(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, h, c):
        ...         return h + nn.Dense(h.shape[-1])(nn.silu(h + c)), None
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, h, c):
        ...         return nets.scanned(Block, length=5)(name="blocks")(h, c)[0]
        >>> shapes = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((2, 3)), jnp.ones(3))
        >>> shapes["params"]["blocks"]["Dense_0"]["kernel"].shape
        (5, 3, 3)
    """
    layers: Any = nn.scan(
        nn.remat(block, prevent_cse=False) if remat else block,
        variable_axes={"params": 0, HIDDEN: 0, REPORT: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
    )

    class Scanned(layers):  # what flax makes is invisible to nn.intercept_methods, this is not
        one_layer = layers.__bases__[0]

        def __call__(self, *args):
            return super().__call__(*args)

    return Scanned
