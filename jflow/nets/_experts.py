"""Mixtures of experts in the place of the MLP of a transformer, and what their routers did."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.attached import REPORT
from jflow._core.checks import check_whole, like_state
from jflow._core.linen import apply_linen, check_linen
from jflow.nets._fields import inputs_of, velocity
from jflow.nets.routers import Router, top_k
from jflow.types import Array, Field

__all__ = ["MixtureOfExperts", "routed"]


class MixtureOfExperts(nn.Module):
    """A sparse mixture of MLPs, of which each token uses a few: `module(y) -> shaped like y`.

    Also known as: MoE, sparsely-gated mixture of experts.

        p = softmax(y W),     module(y) = sum_e w_e(p) MLP_e(y)

    As `mlp=` of `DiT` and its relatives it takes the place of the MLP of every block. The router
    gives the weights w, with as few not 0 as it says. It is in float32 or better. Experts are along
    the first axis of their params, behind the depth of scanned blocks: the rule
    `("experts/.*kernel$", PartitionSpec("expert", None, None))` of `train.shard` spreads them over
    an axis of a mesh.

    `routed` gives the loads, with which `losses.balanced_matching` keeps all experts in use.

    Attributes:
        num_experts: the number of MLPs.
        router: which of them a token goes to; see `routers`. The default drops no token, and
            computes all experts for all tokens; those with a capacity cost less.
        ratio: the hidden width of an expert, in widths.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is that of the network that it is part of.

    Raises:
        ValueError: a size is below 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.DiT(width=8, num_layers=1, num_heads=1, mlp=nets.MixtureOfExperts(4))
        >>> x, t = jnp.ones((1, 4, 4, 1)), jnp.zeros(1)
        >>> params = jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]
        >>> params["blocks"]["mlp"]["experts"]["in"]["kernel"].shape  # depth, experts, ...
        (1, 4, 8, 32)

    References:
        Shazeer, Mirhoseini, Maziarz, Davis, Le, Hinton, Dean, *Outrageously Large Neural Networks:
            The Sparsely-Gated Mixture-of-Experts Layer*, 2017, arXiv:1701.06538.
    """

    num_experts: int = 8
    router: Router = top_k(2)
    ratio: int = 4
    dtype: Any = None

    def __post_init__(self):
        check_whole("MixtureOfExperts", num_experts=self.num_experts, ratio=self.ratio)
        super().__post_init__()

    @nn.compact
    def __call__(self, y: Float[Array, "b n width"]) -> Float[Array, "b n width"]:
        """Apply the experts.

        Args:
            y: the tokens, [b, n, width].

        Returns:
            The weighted outputs of the experts of each token, [b, n, width].
        """
        logits = nn.Dense(self.num_experts, use_bias=False, dtype=float_dtype(y), name="router")
        probabilities = jax.nn.softmax(logits(y.astype(float_dtype(y))))
        weights, slots = self.router(probabilities)
        first = jax.nn.one_hot(jnp.argmax(probabilities, -1), self.num_experts)
        self.sow(REPORT, "first", jnp.mean(first, axis=1, dtype=weights.dtype))
        self.sow(REPORT, "load", jnp.mean(weights > 0, axis=1, dtype=weights.dtype))
        self.sow(REPORT, "probability", jnp.mean(probabilities, axis=1))

        all_tokens = slots == y.shape[1]
        experts = nn.vmap(
            FeedForward,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None if all_tokens else 0,
            axis_size=self.num_experts,
        )(self.ratio, self.dtype, name="experts")
        if all_tokens:
            return jnp.einsum("ebnd,bne->bnd", experts(y), weights.astype(y.dtype))
        weights, tokens = jax.lax.top_k(weights.transpose(2, 0, 1), slots)  # [experts, b, slots]
        taken = jax.vmap(lambda at: jnp.take_along_axis(y, at[..., None], axis=1))(tokens)
        out = experts(taken) * weights[..., None].astype(y.dtype)
        row = jnp.arange(y.shape[0])[None, :, None]
        return jnp.zeros_like(y, out.dtype).at[row, tokens].add(out)


class FeedForward(nn.Module):
    """Two dense layers with a GELU between: [..., width] -> [..., width]."""

    ratio: int
    dtype: Any

    @nn.compact
    def __call__(self, y: Array) -> Array:
        width, init = y.shape[-1], nn.initializers.xavier_uniform()
        enter = nn.Dense(self.ratio * width, kernel_init=init, dtype=self.dtype, name="in")
        leave = nn.Dense(width, kernel_init=init, dtype=self.dtype, name="out")
        return leave(nn.gelu(enter(y)))


def routed(module: nn.Module) -> Field:
    """A network with mixtures of experts as a velocity that also says where its tokens went.

    The params are those of `jflow.velocity(module)`, so that training by
    `losses.balanced_matching(routed(module))` and sampling with `jflow.velocity(module)` share
    them.

    Args:
        module: a Linen module (x, t, cond=None) with a `MixtureOfExperts` inside.

    Returns:
        Field: its apply returns a dict: 'velocity', shaped like x; 'load' [b, layers, experts], the
            fraction of the tokens of a row that go to an expert, k in all where none is dropped;
            'first' [b, layers, experts], the fraction whose first choice it is, whatever room it
            has; and 'probability' [b, layers, experts], the mean of what its router gave the
            expert.

    Raises:
        TypeError: module is not an instance of a Linen module.
        ValueError: at the call, there is no mixture in the module, or there are several sizes.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.routed(nets.DiT(width=8, num_layers=3, num_heads=1,
        ...     mlp=nets.MixtureOfExperts(4)))
        >>> x, t = jnp.ones((2, 4, 4, 1)), jnp.zeros(2)
        >>> run = lambda key: net.apply(net.init(key, x, t), x, t)
        >>> jax.eval_shape(run, jax.random.key(0))["load"].shape
        (2, 3, 4)
    """
    check_linen("routed", "module", module)
    name = type(module).__name__

    def apply(params, x, t, cond=None, *, key=None):
        inputs = inputs_of(name, x, t, cond)
        v, said = apply_linen(module, params, *inputs, key=key, mutable=[REPORT])
        reports = {what: _reported(said, what) for what in ("load", "first", "probability")}
        return {"velocity": like_state(name, v, x), **reports}

    return Field(velocity(module).init, apply)


def _reported(said, what: str) -> Array:
    """[b, layers, experts] of one kind of report, [..., b, experts] each."""
    found = [
        jnp.moveaxis(leaf.reshape(-1, *leaf.shape[-2:]), 0, 1)
        for path, leaf in jax.tree_util.tree_leaves_with_path(said)
        if any(getattr(key, "key", None) == what for key in path)
    ]
    if not found or len({leaf.shape[-1] for leaf in found}) > 1:
        sizes = sorted({leaf.shape[-1] for leaf in found})
        raise ValueError(
            "routed: expected a module with mixtures of one number of experts, such as"
            f" DiT(mlp=MixtureOfExperts(8)), got mixtures of {sizes or 'none'}"
        )
    return jnp.concatenate(found, axis=1)
