"""AdaptFormer, an adapter beside the layers of a network, which no weights can hold."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.attached import attach
from jflow._core.checks import check_whole
from jflow.adapters._forms import SCANNED, Where, choose_modules, flat, on_modules
from jflow.types import Adapter, Params

__all__ = ["adaptformer"]

MLPS = {"out": "in", "mlp_out": "mlp_in"}
"""How the second layer of an MLP is named in the networks of jflow, and the first one beside it."""


def adaptformer(
    rank: int,
    *,
    scale: float = 0.1,
    where: Where = "*",
    layers: Sequence[int] | None = None,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """AdaptFormer: a bottleneck with a ReLU beside the MLP of each block.

    Where a block has MLP(x), of what it was given by the norm before, the adapted one has

        MLP(x) + scale Up ReLU(Down x),   Down [width, rank], Up [rank, width], both with a bias

    Up is zero, so that the model is as it was at first. The gate of an adaLN block comes after the
    sum. No weights of the base can hold this function: `merge` refuses it.

    Args:
        rank: the width of the bottleneck.
        scale: a number.
        where: which MLPs, by the paths of their second layers, such as 'blocks/out' in `nets.DiT`
            and 'blocks/image/mlp_out' in `nets.MMDiT`; see `on_modules`. All by default.
        layers: which of the scanned layers, by their index; None: all.
        scanned: see `on_modules`.

    Returns:
        Adapter: params {'down', 'up'}, each a {'kernel', 'bias'}, at the paths of the second
        layers.

    Raises:
        ValueError: rank is below 1; when used, where a base has no such MLP, and as `on_modules`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> kernel = lambda *shape: {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[-1])}
        >>> base = {"mlp": {"in": kernel(4, 8), "out": kernel(8, 4)}, "head": kernel(4, 1)}
        >>> params = adapters.adaptformer(2).init(jax.random.key(0), base)
        >>> jax.tree.map(jnp.shape, params["mlp"]["out"]["up"])
        {'bias': (4,), 'kernel': (2, 4)}

    References:
        Chen, Ge, Tong, Wang, Song, Wang, Luo, *AdaptFormer: Adapting Vision Transformers for
            Scalable Visual Recognition*, 2022, arXiv:2205.13535.
    """
    check_whole("adaptformer", rank=rank)
    inputs: dict[Any, Any] = {}  # by the block that is being traced, from its first to its second

    def init_one(key, own):
        width, dtype = own["kernel"].shape[-1], float_dtype(own["kernel"])
        down = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return {
            "down": {"kernel": down(key, (width, rank), dtype), "bias": jnp.zeros(rank, dtype)},
            "up": {"kernel": jnp.zeros((rank, width), dtype), "bias": jnp.zeros(width, dtype)},
        }

    def enter(params, module, run, x):
        inputs[module.scope.parent] = x
        return run(x)

    def leave(params, module, run, x):
        x, y = inputs.pop(module.scope.parent), run(x)
        hidden = nn.relu(_dense(params["down"], x))
        return y + (scale * _dense(params["up"], hidden)).astype(y.dtype)

    def beside(base) -> Adapter:
        paths = [leaf.path for leaf in second_layers("adaptformer", base, where, scanned)]
        return on_modules(init_one, leave, where=paths, layers=layers, scanned=scanned)

    def init(key, base):
        return beside(base).init(key, base)

    def apply(base, params):
        adapted = beside(base).apply(base, params)
        for leaf in second_layers("adaptformer", base, where, scanned):
            *block, name = leaf.path.split("/")
            adapted = attach(adapted, (*block, MLPS[name]), enter, {})
        return adapted

    return Adapter(init, apply)


def second_layers(name: str, base: Params, where: Where, scanned):
    """The second layers of the MLPs of a base that `where` chooses; raise for none."""
    modules = {path.rpartition("/")[0] for path in flat(base)}

    def is_second(path):
        block, _, last = path.rpartition("/")
        return last in MLPS and f"{block}/{MLPS[last]}".removeprefix("/") in modules

    found = [leaf for leaf in choose_modules(base, where, scanned) if is_second(leaf.path)]
    if not found:
        raise ValueError(
            f"{name}: expected MLPs of two layers named 'in' and 'out', or 'mlp_in' and 'mlp_out',"
            f" in what `where` chooses, got none in {sorted(base)}"
        )
    return found


def _dense(own, x):
    if x.shape[-1] != own["kernel"].shape[0]:
        raise ValueError(
            f"an adapter for another base: expected tokens of {own['kernel'].shape[0]} numbers, got"
            f" {x.shape[-1]}"
        )
    bias = own["bias"].astype(x.dtype)
    return x @ own["kernel"].astype(x.dtype) + bias.reshape((1,) * (x.ndim - 1) + (-1,))
