"""LoRA: a matrix of low rank beside a kernel."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.attached import attach, call_with
from jflow._core.checks import check_whole
from jflow.adapters._forms import (
    SCANNED,
    Where,
    check_rank,
    fitting,
    matrix,
    meet,
    on_weights,
    spread,
    uniform_down,
)
from jflow.types import Adapter

__all__ = ["lora", "lora_activations"]


def lora(
    rank: int,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    where: Where = "*kernel*",
    layers: Sequence[int] | None = None,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """Low-rank adaptation (LoRA): a trained kernel W plus a product of two thin matrices.

        W + s A B,   A [*in, rank],   B [rank, out],   s = alpha / rank

    A is drawn uniformly in +-1 / sqrt(in) and B is zero, so that the model is as it was at first.
    The kernel of a convolution [rows, columns, in, out] has A [rows, columns, in, rank].

    The changed kernels are a second copy of those that are chosen, in memory from the forward to
    the backward pass. `lora_activations` has the same params and holds none; `layerwise` holds one
    layer's. A base in bfloat16 is widened to the type of A: W would round small changes away.

    Also known as: low-rank adaptation, rsLoRA.

    Args:
        rank: of the product, at most that of the kernel.
        alpha: the size of the scale s; None: s = 1.
        rank_stabilized: whether s = alpha / sqrt(rank), by which ranks may be large.
        where: which kernels, see `on_weights`.
        layers: which of the scanned layers, by their index; None: all.
        scanned: see `on_weights`.

    Returns:
        Adapter: params {'A', 'B'} in the place of each kernel. In `apply` the rank is that of A.

    Raises:
        ValueError: rank is below 1; when used, for a rank above that of a kernel, which is named,
            and as `on_weights`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> base = {"blocks": {"out": {"kernel": jnp.ones((3, 4, 2)), "bias": jnp.ones((3, 2))}}}
        >>> params = adapters.lora(1).init(jax.random.key(0), base)
        >>> jax.tree.map(jnp.shape, params["blocks"]["out"])
        {'kernel': {'A': (3, 4, 1), 'B': (3, 1, 2)}}

    References:
        Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, *LoRA: Low-Rank Adaptation of Large
            Language Models*, 2021, arXiv:2106.09685.
        Kalajdzievski, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, 2023,
            arXiv:2312.03732.
    """
    scale = _scale("lora", rank, alpha, rank_stabilized)

    def apply(own, params):
        kernel, a, b = own["kernel"], params["A"], params["B"]
        change = matrix(a) @ b * scale(a.shape[-1])
        return {"kernel": kernel + change.reshape(kernel.shape)}

    return on_weights(_init(rank), apply, where=where, layers=layers, scanned=scanned)


def lora_activations(
    rank: int,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    where: Where = "*kernel*",
    layers: Sequence[int] | None = None,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """LoRA beside the layers instead of in their kernels: x W + s (x A) B.

    The function and the params are those of `lora`, which merges what this has trained. It holds no
    second kernel, costs rank (in + out) products a row in the place of in out, and leaves a base in
    bfloat16 or int8 as it is. It acts on the modules Dense and Conv of Flax, inside networks that
    jflow lifted.

    Args:
        rank: of the product, at most that of the kernel.
        alpha: the size of the scale s; None: s = 1.
        rank_stabilized: whether s = alpha / sqrt(rank).
        where: which kernels, see `on_weights`.
        layers: which of the scanned layers, by their index; None: all.
        scanned: see `on_weights`.

    Returns:
        Adapter: params {'A', 'B'} in the place of each kernel.

    Raises:
        ValueError: as `lora`, and at the call for modules that are no Dense and no Conv, or a Conv
            in groups.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters, nets
        >>> velocity, x = nets.velocity(nets.TimeMLP(hidden=(8,))), jnp.ones((1, 2))
        >>> base = velocity.init(jax.random.key(0), x, 0.0)
        >>> beside = adapters.lora_activations(1, where="head*")
        >>> params = {"head": {"kernel": {"A": jnp.zeros((8, 1)), "B": jnp.ones((1, 2))}}}
        >>> velocity.apply(beside.apply(base, params), x, 0.0)
        Array([[0., 0.]], dtype=float32)

    References:
        Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, *LoRA: Low-Rank Adaptation of Large
            Language Models*, 2021, arXiv:2106.09685.
    """
    scale = _scale("lora_activations", rank, alpha, rank_stabilized)

    def call(params, module, run, x):
        a, b = params["A"], params["B"]
        groups = getattr(module, "feature_group_count", 1)
        if not isinstance(module, nn.Dense | nn.Conv) or groups != 1:
            raise ValueError(
                "lora_activations: expected modules of Flax's Dense, or Conv in one group, got"
                f" {type(module).__name__} at {'/'.join(module.path)!r}: `lora`, or `layerwise` of"
                " it, takes any kernel"
            )
        y = run(x)
        low = call_with(module.clone(features=a.shape[-1], use_bias=False), {"kernel": a}, x)
        return y + (low @ b.astype(low.dtype) * scale(a.shape[-1])).astype(y.dtype)

    def apply(base, params):
        for leaf, own in meet(base, params, scanned):
            fitting(leaf, own, layers)
            module = leaf.path.split("/")[:-1]
            base = attach(base, tuple(module), call, spread(leaf, own, layers))
        return base

    return Adapter(lora(rank, where=where, layers=layers, scanned=scanned).init, apply)


def _scale(name: str, rank, alpha, rank_stabilized):
    check_whole(name, rank=rank)
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"{name}: expected alpha above 0, got {alpha}")
    power = 0.5 if rank_stabilized else 1.0
    return lambda rank: 1.0 if alpha is None else alpha / rank**power


def _init(rank: int):
    def init(key, own):
        kernel = own["kernel"]
        check_rank(rank, kernel)
        *inputs, out = kernel.shape
        dtype = float_dtype(kernel)
        return {
            "A": uniform_down(key, inputs, rank, dtype),
            "B": jnp.zeros((rank, out), dtype),
        }

    return init
