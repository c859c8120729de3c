"""Perceptrons: a conditioner for couplings, and two velocity networks for vectors."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.checks import check_whole
from jflow._core.conditions import read_parts
from jflow._core.linen import check_linen, flatten_cond, flatten_event
from jflow.nets._embed import TimeCondEmbed, check_time, need_part, time_features
from jflow.nets._scanned import scanned
from jflow.types import Array, Cond, Condition


class MLP(nn.Module):
    """A perceptron as a conditioner for couplings, with no output head.

    `module(x [b, ..., d], cond=None) -> features [b, ..., hidden[-1]]`. cond is flattened to [b, k]
    and concatenated to x. d may be 0: then cond alone, or a constant, goes in.

    Attributes:
        hidden: the widths, at least one.
        activation: after each layer.
        dropout: the rate; a key, or a 'dropout' stream, switches it on.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: there is no hidden width; or cond has labels, which must be embedded first, at
            the call.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.MLP(hidden=(8, 4))
        >>> features, variables = net.init_with_output(jax.random.key(0), jnp.zeros((1, 2)))
        >>> features.shape
        (1, 4)
    """

    hidden: Sequence[int] = (128, 128)
    activation: Callable[[Array], Array] = nn.relu
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        if not self.hidden:
            raise ValueError("MLP: expected at least one hidden width, got hidden=()")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *rest d"], cond: Cond = None
    ) -> Float[Array, "b *rest features"]:
        """Compute the features.

        Args:
            x: the inputs, [b, ..., d].
            cond: None, floats [b, ...], a pytree of them, or the vector of a `types.Condition`;
                labels are to be embedded first.

        Returns:
            The features [b, ..., hidden[-1]].
        """
        c = flatten_cond("MLP", cond, x.shape[0])
        parts = [x] if x.shape[-1] else []
        if c is not None and c.shape[-1]:
            c = c.reshape(c.shape[0], *(1,) * (x.ndim - 2), c.shape[-1])
            parts.append(jnp.broadcast_to(c, (*x.shape[:-1], c.shape[-1])))
        h = jnp.concatenate(parts, axis=-1) if parts else jnp.ones_like(x, shape=(*x.shape[:-1], 1))
        for width in self.hidden:
            h = self.activation(nn.Dense(width, dtype=self.dtype)(h))
            h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
        return h


class TimeMLP(nn.Module):
    """A perceptron as a velocity network, zero at initialization.

    `module(x [b, *event], t [b], cond=None) -> shaped like x`. x, sinusoidal features of t and cond
    are flattened, concatenated and passed through an `MLP`. See `velocity` for an example.

    Attributes:
        hidden: the widths, at least one.
        activation: between the layers.
        time_features: the number of sinusoidal features of t.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        embed: a Linen module that is applied to cond first; labels need it, e.g.
            `embed=nn.Embed(num_classes + 1, 16)`, with one row for a null label.
        dropout: the rate; a key, or a 'dropout' stream, switches it on.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.
    """

    hidden: Sequence[int] = (128, 128)
    activation: Callable[[Array], Array] = nn.silu
    time_features: int = 64
    time_scale: float = 100.0
    embed: nn.Module | None = None
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        if self.embed is not None:
            check_linen("TimeMLP", "embed", self.embed)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *event"], t: Array, cond: Cond = None
    ) -> Float[Array, "b *event"]:
        """Predict the velocity.

        Args:
            x: the points, [b, *event].
            t: the times, [b].
            cond: None, floats [b, ...], or a pytree of them; with `embed`, what that takes. Of a
                `types.Condition` it takes the vector, what is aligned with x, and, with `embed`,
                the label.

        Returns:
            The velocity, with the shape and type of x.
        """
        check_time("TimeMLP", x, t)
        if isinstance(cond, Condition):
            embed = self.embed
            label = () if embed is None else ("label",)
            parts = read_parts("TimeMLP", cond, x, (*label, "vector", "aligned"))
            embedded = None if embed is None or parts.label is None else embed(parts.label)
            cond = [embedded, parts.vector, parts.aligned]
        elif self.embed is not None and cond is not None:
            cond = self.embed(cond)
        flat = flatten_event(x)
        time = time_features(t, self.time_features, scale=self.time_scale).astype(flat.dtype)
        h = jnp.concatenate([flat, time], axis=-1)
        h = MLP(self.hidden, self.activation, self.dropout, self.dtype)(h, cond)
        return output_head(h, flat.shape[-1]).reshape(x.shape).astype(x.dtype)


class ResidualMLP(nn.Module):
    """A residual perceptron as a velocity network, zero at initialization.

    It is the one to start from for vectors and tiny images.
    `module(x [b, *event], t [b], cond=None, r=None) -> shaped like x`: pre-norm residual blocks of
    one width, scanned, each modulated by time and cond (adaLN-zero). x should be of order one. See
    `flow_map` for an example.

    Attributes:
        width: of the residual stream.
        num_blocks: the number of blocks, at least 1.
        expansion: the hidden width of a block, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        activation: between the layers.
        time_features: the number of sinusoidal features of t.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        dropout: the rate; a key, or a 'dropout' stream, switches it on.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    References:
        Peebles, Xie, *Scalable Diffusion Models with Transformers*, 2023, arXiv:2212.09748, for the
            modulation.
    """

    width: int = 128
    num_blocks: int = 3
    expansion: int = 2
    num_classes: int | None = None
    activation: Callable[[Array], Array] = nn.silu
    time_features: int = 64
    time_scale: float = 100.0
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        check_whole("ResidualMLP", num_blocks=self.num_blocks)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *event"], t: Array, cond: Cond = None, r: Array | None = None
    ) -> Float[Array, "b *event"]:
        """Predict the velocity.

        Args:
            x: the points, [b, *event].
            t: the times, [b].
            cond: None, integer labels [b], floats [b, ...], a pytree of them, or the label, the
                vector and what is aligned with x of a `types.Condition`; see `TimeCondEmbed`. What
                is aligned goes in beside x, through weights that start at zero.
            r: the times that a flow map goes to, [b]; None for a velocity. The network reads r - t.

        Returns:
            The velocity, with the shape and type of x.
        """
        check_time("ResidualMLP", x, t, r)
        flat, aligned = flatten_event(x), None
        if isinstance(cond, Condition):
            cond = read_parts("ResidualMLP", cond, x, ("label", "vector", "aligned"))
            cond, aligned = cond._replace(aligned=None), cond.aligned
        # Biases of order one: without them the norms divide the magnitude of x away (eight
        # Gaussians of radius 5, seen once: error 0.30 without, 0.04 with; no difference on
        # standardized data).
        h = nn.Dense(
            self.width, bias_init=nn.initializers.normal(1.0), dtype=self.dtype, name="stem"
        )(flat)
        if aligned is not None:
            beside = nn.Dense(
                self.width,
                use_bias=False,
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
                name="aligned",
            )
            h = h + beside(flatten_event(aligned).astype(x.dtype)).astype(h.dtype)
        else:
            need_part(self, "aligned", "aligned", self.variables.get("params", {}))
        embed = TimeCondEmbed(
            self.width,
            self.num_classes,
            self.time_features,
            self.time_scale,
            self.dtype,
            name="embed",
        )
        c = nn.silu(embed(t, cond, r)).astype(h.dtype)  # the scan's carry keeps one type
        blocks = scanned(ResidualBlock, self.num_blocks)
        h, _ = blocks(self.expansion, self.activation, self.dropout, self.dtype, name="blocks")(
            h, c
        )
        h = nn.LayerNorm(dtype=self.dtype, name="norm")(h)
        return output_head(h, flat.shape[-1]).reshape(x.shape).astype(x.dtype)


class ResidualBlock(nn.Module):
    """h + gate * MLP(norm(h) * (1 + scale) + shift).

    gate, scale and shift are linear in c and start at zero.
    """

    expansion: int
    activation: Callable[[Array], Array]
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, c: Array) -> tuple[Array, None]:
        width = h.shape[-1]
        modulation = nn.Dense(
            3 * width, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="modulation"
        )(c)
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        y = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(h) * (1 + scale) + shift
        y = self.activation(nn.Dense(self.expansion * width, dtype=self.dtype, name="in")(y))
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        return h + gate * nn.Dense(width, dtype=self.dtype, name="out")(y), None


def output_head(h: Array, size: int) -> Array:
    """[..., F] -> [..., size], zero at first, in the precision of the params.

    To be called inside a compact method, whose module it becomes a layer of.
    """
    return nn.Dense(size, kernel_init=nn.initializers.zeros, name="head")(h)
