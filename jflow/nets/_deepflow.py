"""DeepFlow: a DiT cut into branches, each of which predicts a velocity, with refiners in between.

What is known here of the paper (Shin, Yang, Chen, *Deeply Supervised Flow-Based Generative Models*)
comes from the abstract and from published notes; the authors' code (non-commercial) was not read.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import float_dtype, patchify, unpatchify
from jflow._core.attached import HIDDEN
from jflow._core.checks import check_cond
from jflow._core.linen import apply_linen, init_linen
from jflow.nets._attention import per_token
from jflow.nets._dit import DiTBlock, modulation, sincos_positions
from jflow.nets._embed import TimeCondEmbed, read_cond
from jflow.nets._normalization import LayerNorm
from jflow.nets._scanned import scanned
from jflow.types import Array, Cond, Field, Velocity

__all__ = ["Branches", "DeepFlow", "branch_field", "last_velocity"]

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros


class Branches(NamedTuple):
    """What a `DeepFlow` returns: the velocities of its branches, and the accelerations in between.

    Attributes:
        velocity: [b, k, H, W, C], one of each of the k branches.
        acceleration: [b, k - 1, H, W, C], one before each branch but the first.
    """

    velocity: Float[Array, "b branches H W C"]
    acceleration: Float[Array, "b gaps H W C"]


class DeepFlow(nn.Module):
    """DeepFlow: a DiT cut into branches, each of which predicts a velocity.

    `module(x, t, cond=None) -> Branches`, zero at initialization, where every refiner is the
    identity too. x is [b, H, W, C] and t [b], the same for every branch (sampling), or x [b, k, H,
    W, C] and t [b, k], a point and a time for each of the k branches (training). The blocks are
    scanned, and so are the branches after the first. Lift it with `branch_field` and
    `last_velocity`.

    Between two branches stands a refiner (VeRA): an acceleration MLP, a modulation of the features
    of velocity and acceleration by the gap of time, zero at first, and attention from those to the
    patches of the image. What the paper's abstract and published notes leave open, and is our
    reading: the width and depth of the MLP, that the attention of the refiner looks at the patches
    of the *next* branch's x_t, that each branch reads its own time, and that the output of the
    refiner is added to the features.

    Attributes:
        patch_size: the side of a patch, in pixels.
        width: of the tokens.
        num_layers: the number of blocks in all, an equal count a branch.
        branches: k, at least 2.
        num_heads: the number of attention heads, which divides the width.
        mlp_ratio: the hidden width of the MLP of a block, in widths.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        dropout: the rate; a key, or a 'dropout' stream, switches it on.
        remat: whether each block is computed again in the backward pass, which saves memory.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: the branches do not divide num_layers, patch_size H and W, num_heads the width,
            or 4 the width.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.DeepFlow(width=8, num_layers=2, num_heads=1)
        >>> x, t = jnp.zeros((1, 4, 4, 1)), jnp.zeros(1)
        >>> out = jax.eval_shape(lambda key: net.init_with_output(key, x, t)[0], jax.random.key(0))
        >>> out.velocity.shape, out.acceleration.shape
        ((1, 2, 4, 4, 1), (1, 1, 4, 4, 1))

    References:
        Shin, Yang, Chen, *Deeply Supervised Flow-Based Generative Models*, 2025, arXiv:2503.14494.
    """

    patch_size: int = 2
    width: int = 128
    num_layers: int = 4
    branches: int = 2
    num_heads: int = 4
    mlp_ratio: int = 4
    num_classes: int | None = None
    time_scale: float = 100.0
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None

    def __post_init__(self):
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(
                f"DeepFlow: expected a width divisible by 4 and by num_heads={self.num_heads}, got "
                f"{self.width}"
            )
        if self.branches < 2 or self.num_layers < self.branches or self.num_layers % self.branches:
            raise ValueError(
                f"DeepFlow: expected at least 2 branches that divide num_layers={self.num_layers}, "
                f"got branches={self.branches}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Branches:
        """Predict the velocity and the acceleration of every branch.

        Args:
            x: the images, [b, H, W, C], or [b, k, H, W, C], a point for each branch.
            t: the times, [b], or [b, k].
            cond: None, integer labels [b], floats [b, k], a pytree of them, or the label and the
                vector of a `types.Condition`; see `TimeCondEmbed`.

        Returns:
            Branches: velocities and accelerations in the type of x.
        """
        p, k = self.patch_size, self.branches
        if x.ndim == 4 and t.ndim == 1:
            x, t = (jnp.broadcast_to(v[:, None], (v.shape[0], k, *v.shape[1:])) for v in (x, t))
        if (
            x.ndim != 5
            or t.shape != x.shape[:2]
            or x.shape[1] != k
            or x.shape[2] % p
            or x.shape[3] % p
        ):
            raise ValueError(
                f"DeepFlow: expected x [b, H, W, C] and t [b], or x [b, {k}, H, W, C] and t [b, "
                f"{k}], H and W divisible "
                f"by {p}, got {list(x.shape)} and {list(t.shape)}"
            )
        b, _, height, width, channels = x.shape
        rows, columns = height // p, width // p
        cond, _ = read_cond("DeepFlow", cond, x, ("label", "vector"))

        # branch first: [k, b, ...]
        flat = patchify(x.reshape(b * k, height, width, channels), p)
        patches = per_token(
            nn.Dense(self.width, kernel_init=_xavier, dtype=self.dtype, name="patches"), flat
        )
        patches = (
            patches + jnp.asarray(sincos_positions(rows, columns, self.width), patches.dtype)[None]
        )
        patches = patches.reshape(b, k, *patches.shape[1:]).swapaxes(0, 1)
        many = jax.tree.map(lambda c: jnp.repeat(jnp.asarray(c), k, axis=0), cond)
        embed = TimeCondEmbed(
            self.width, self.num_classes, time_scale=self.time_scale, dtype=self.dtype, name="embed"
        )
        c = (
            nn.silu(embed(t.reshape(-1), many))
            .astype(patches.dtype)
            .reshape(b, k, -1)
            .swapaxes(0, 1)
        )
        gap = TimeCondEmbed(self.width, time_scale=self.time_scale, dtype=self.dtype, name="gap")
        gaps = (
            nn.silu(gap((t[:, 1:] - t[:, :-1]).reshape(-1)))
            .astype(c.dtype)
            .reshape(b, k - 1, -1)
            .swapaxes(0, 1)
        )

        branch: dict[str, Any] = dict(
            num_layers=self.num_layers // k,
            block=(self.num_heads, self.mlp_ratio, self.dropout, self.dtype),
            out=p * p * channels,
            remat=self.remat,
        )
        h, first = Branch(**branch, name="first")(patches[0], c[0])
        scanned = nn.scan(
            Refined,
            variable_axes={"params": 0, HIDDEN: 0},
            split_rngs={"params": True, "dropout": True},
            length=k - 1,
        )
        _, (accelerations, velocities) = scanned(**branch, name="rest")(
            h, (patches[1:], c[1:], gaps)
        )

        def images(tokens):  # [k, b, n, p p C] -> [b, k, H, W, C]
            made = unpatchify(tokens.reshape(-1, *tokens.shape[2:]), rows, columns, p)
            return made.reshape(-1, b, *made.shape[1:]).swapaxes(0, 1).astype(x.dtype)

        return Branches(images(jnp.concatenate([first[None], velocities])), images(accelerations))


class Branch(nn.Module):
    """Blocks on tokens h [b, n, width] under c [b, width], and a velocity: (h, [b, n, out])."""

    num_layers: int
    block: tuple
    out: int
    remat: bool

    @nn.compact
    def __call__(self, h: Array, c: Array) -> tuple[Array, Array]:
        blocks = scanned(DiTBlock, self.num_layers, self.remat)
        h, _ = blocks(*self.block, name="blocks")(h, c)
        shift, scale = modulation(c, 2, self.block[-1])
        y = LayerNorm(affine=False, dtype=self.block[-1])(h) * (1 + scale) + shift
        return h, per_token(
            nn.Dense(self.out, kernel_init=_zeros, name="head"), y
        )  # in the params' precision


class Refined(nn.Module):
    """A refiner and the branch after it, on tokens h of the branch before.

    Returns (h, (acceleration, velocity)).
    """

    num_layers: int
    block: tuple
    out: int
    remat: bool

    @nn.compact
    def __call__(self, h: Array, inputs) -> tuple[Array, tuple[Array, Array]]:
        patches, c, gap = inputs
        h, acceleration = Refiner(self.block[0], self.out, self.block[-1], name="refiner")(
            h, patches, gap
        )
        h, velocity = Branch(self.num_layers, self.block, self.out, self.remat, name="branch")(h, c)
        return h, (acceleration, velocity)


class Refiner(nn.Module):
    """VeRA: h [b, n, width] refined by an acceleration, the time gap and the next patches.

    The gap is [b, width], the patches are [b, n, width]. Returns (h + gate attention, acceleration
    [b, n, out]); the gate is linear in the gap and zero at first.
    """

    num_heads: int
    out: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, patches: Array, gap: Array) -> tuple[Array, Array]:
        b, n, width = h.shape
        dense = lambda size, name: nn.Dense(size, kernel_init=_xavier, dtype=self.dtype, name=name)  # noqa: E731
        a = LayerNorm(affine=False, dtype=self.dtype)(h)
        a = per_token(
            lambda a: dense(width, "acceleration_out")(nn.gelu(dense(width, "acceleration_in")(a))),
            a,
        )
        acceleration = per_token(nn.Dense(self.out, kernel_init=_zeros, name="head"), a)

        shift, scale, gate = modulation(gap, 3, self.dtype)
        joint = LayerNorm(affine=False, dtype=self.dtype)(
            per_token(dense(width, "join"), jnp.concatenate([h, a], axis=-1))
        )
        q = per_token(dense(width, "q"), joint * (1 + scale) + shift)
        kv = per_token(dense(2 * width, "kv"), LayerNorm(affine=False, dtype=self.dtype)(patches))
        q = q.reshape(b, n, self.num_heads, -1)
        key, value = jnp.moveaxis(
            kv.reshape(b, n, 2, self.num_heads, width // self.num_heads), 2, 0
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, key, preferred_element_type=float_dtype(q))
        weights = jax.nn.softmax(scores * (width // self.num_heads) ** -0.5).astype(value.dtype)
        seen = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(b, n, width)
        return (h + gate * per_token(dense(width, "o"), seen)).astype(h.dtype), acceleration


def branch_field(module: nn.Module) -> Field:
    """Lift a `DeepFlow` into a `Field` of `Branches`.

    Args:
        module: the network.

    Returns:
        Field: it takes x [b, H, W, C] with t [b], or x [b, k, H, W, C] with t [b, k]; params are
            those of the module.
    """

    def init(key, x, t, cond=None):
        cond = check_cond("branch_field", cond, x.shape[0])
        return init_linen(module, key, x, t, cond)

    def apply(params, x, t, cond=None, *, key=None):
        cond = check_cond("branch_field", cond, x.shape[0])
        return apply_linen(module, params, x, t, cond, key=key)

    return Field(init, apply)


def last_velocity(field: Field) -> Velocity:
    """What samplers take of a `DeepFlow`: the velocity of the last branch.

    All branches are at one x [b, H, W, C] and t [b].

    Args:
        field: what `branch_field` returned.

    Returns:
        Velocity: with the params of `field`.
    """

    def apply(params, x, t, cond=None, *, key=None):
        t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
        return field.apply(params, x, t, cond, key=key).velocity[:, -1]

    return Velocity(field.init, apply)
