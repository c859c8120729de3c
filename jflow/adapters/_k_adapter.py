"""K-Adapter: a small network beside the base, which reads what some of its blocks return."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype
from jflow._core.attached import HIDDEN, attach
from jflow._core.checks import check_params, check_whole
from jflow.adapters._forms import SCANNED, Leaf, choose_modules
from jflow.nets import SelfAttention
from jflow.types import Adapter, Array, Params

__all__ = ["k_adapter"]


def k_adapter(
    rank: int,
    *,
    after: Sequence[int] | None = None,
    num_blocks: int = 2,
    num_heads: int = 1,
    blocks: str | Sequence[str] = "blocks",
    head: str = "head",
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """K-Adapter: a small network beside the base, which reads the tokens after some of its blocks.

    With h_i the tokens that the i-th chosen block returns, a_0 = 0, and y what the base's last
    layer reads,

        a_i = x + Up T(Down x),   x = h_i + a_(i-1),   Down [width, rank], Up [rank, width]
        head(y) + a_K Z

    where T is `num_blocks` transformer blocks of width rank. That is the last layer of the base on
    y and a_K side by side, with the weights Z for a_K; Z is zero, so that the model is as it was at
    first. Nothing of the adapter goes into the base: training runs no backward pass through its
    blocks. No weights of the base can hold this function: `merge` refuses it.

    It acts inside networks that jflow lifted, whose blocks return tokens of the width that the last
    layer reads: `nets.DiT`, `nets.ResidualMLP` and others with 'blocks' and 'head', or what
    `blocks` and `head` name. A scan over blocks of your own needs variable_axes={'params': 0,
    'hidden': 0}.

    Args:
        rank: the width of the small network.
        after: the blocks that it reads, by their index in the order in which they run; None: the
            first, the one in the middle, and the last.
        num_blocks: how many transformer blocks each of its layers has.
        num_heads: of their attention; it divides rank.
        blocks: the path of the blocks, or several in the order in which they run, such as
            ('dual_blocks', 'blocks', 'last_block') in `nets.MMDiT`; glob patterns.
        head: the path of the last layer, a Dense.
        scanned: see `on_modules`.

    Returns:
        Adapter: params {'layers', 'out'} at the path of the last layer; 'layers' lead with K.

    Raises:
        ValueError: a number is below 1, or num_heads does not divide rank; when used: where
            `blocks` or `head` meets nothing, for a block in `after` that is not there, for blocks
            whose tokens have other shapes than what the last layer reads, and for params of another
            base.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters, nets
        >>> velocity = nets.velocity(nets.ResidualMLP(width=8, num_blocks=4))
        >>> base = velocity.init(jax.random.key(0), jnp.ones((1, 2)), 0.0)
        >>> params = adapters.k_adapter(4, after=(1, 3)).init(jax.random.key(1), base)
        >>> params["head"]["out"]["kernel"].shape, params["head"]["layers"]["up"]["kernel"].shape
        ((8, 2), (2, 4, 8))

    References:
        Wang, Tang, Duan, Wei, Huang, Ji, Cao, Jiang, Zhou, *K-Adapter: Infusing Knowledge into
            Pre-Trained Models with Adapters*, 2020, arXiv:2002.01808. Norms before the attention
            and the MLP in place of those after them, and Z that starts at zero, are ours.
    """
    check_whole("k_adapter", rank=rank, num_blocks=num_blocks, num_heads=num_heads)
    if rank % num_heads:
        raise ValueError(
            f"k_adapter: expected num_heads to divide rank={rank}, got num_heads={num_heads}"
        )
    patterns = [blocks] if isinstance(blocks, str) else list(blocks)

    def chosen(base) -> list[Leaf]:
        """The blocks, in the order in which they run."""
        found = [leaf for pattern in patterns for leaf in choose_modules(base, pattern, scanned)]
        return list({leaf.path: leaf for leaf in found}.values())

    def the_head(base) -> Leaf:
        found = choose_modules(base, head, scanned)
        if len(found) > 1 or found[0].depth or len(_shape_of(found[0])) != 2:
            raise ValueError(
                f"k_adapter: expected head={head!r} to name one Dense, got"
                f" {', '.join(leaf.path for leaf in found)}"
            )
        return found[0]

    def init(key, base):
        n = sum(leaf.length if leaf.depth else 1 for leaf in chosen(base))
        leaf = the_head(base)
        kernel = leaf.own["kernel"]
        width, out = kernel.shape
        layer, like = SideLayer(rank, num_blocks, num_heads), jnp.zeros((1, 1, width))
        keys = jax.random.split(key, len(indices(after, n)))
        layers = jax.vmap(lambda key: layer.init(key, like)["params"])(keys)
        dtype = float_dtype(kernel)
        params = {
            "layers": jax.tree.map(lambda x: x.astype(dtype), layers),
            "out": {"kernel": jnp.zeros((width, out), dtype)},
        }
        for part in reversed(leaf.path.split("/")):
            params = {part: params}
        return params

    def join(params, module, run, y):
        check_params("k_adapter", params, "layers", "out")
        tokens = tokens_of(module, patterns, scanned)
        width, out = params["out"]["kernel"].shape
        if tokens.shape[-1] != width or y.shape[-1] != width or y.size != tokens[0].size:
            raise ValueError(
                f"k_adapter: expected blocks and {head!r} to have the same tokens of {width}"
                f" numbers, got {list(tokens.shape[1:])} and {list(y.shape)}; an adapter for"
                " another base, or `blocks` and `head` that do not go together"
            )
        layer = SideLayer(rank, num_blocks, num_heads)

        def step(a, own):
            params, h = own
            return layer.apply({"params": params}, h.astype(a.dtype) + a), None

        read = tokens[jnp.array(indices(after, len(tokens)))]
        rows = read.reshape(len(read), read.shape[1], -1, width)  # [K, b, n, width]
        zero = jnp.zeros_like(rows[0], float_dtype(params["out"]["kernel"], rows))
        a, _ = jax.lax.scan(step, zero, (params["layers"], rows))
        left = run(y)
        side = a.reshape(*y.shape[:-1], width) @ params["out"]["kernel"]
        return left + side.astype(left.dtype)

    def apply(base, params):
        path = the_head(base).path.split("/")
        own: Params = params
        for part in path:
            check_params("k_adapter", own, part)
            own = own[part]
        for leaf in chosen(base):
            base = attach(base, tuple(leaf.path.split("/")), keep, {})
        return attach(base, tuple(path), join, own)

    return Adapter(init, apply)


class SideLayer(nn.Module):
    """x + Up T(Down x) of tokens x [b, n, width]; T is transformer blocks of width rank."""

    rank: int
    num_blocks: int
    num_heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = lambda: nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)  # noqa: E731
        h = nn.Dense(self.rank, name="down")(x)
        for _ in range(self.num_blocks):
            h = h + SelfAttention(self.num_heads)(norm()(h))
            y = nn.gelu(nn.Dense(4 * self.rank)(norm()(h)))
            h = h + nn.Dense(self.rank)(y)
        small = nn.initializers.normal(2e-4)
        return x + nn.Dense(x.shape[-1], kernel_init=small, name="up")(h)


def _shape_of(leaf: Leaf) -> tuple[int, ...]:
    """The shape of a module's kernel; () where it has none."""
    return np.shape(leaf.own.get("kernel", 0))


def indices(after: Sequence[int] | None, n: int) -> list[int]:
    """Which of n blocks are read; raise for one that is not there."""
    chosen = sorted({0, (n - 1) // 2, n - 1}) if after is None else list(after)
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= i < n for i in chosen):
        raise ValueError(
            f"k_adapter: expected `after` to hold blocks from 0 to {n - 1}, each once, got {chosen}"
        )
    return chosen


def keep(params, module, run, *args, **kwargs):
    """The call of a block, which leaves its tokens (the first of several streams) for `join`."""
    out = run(*args, **kwargs)
    tokens = jax.tree.leaves(out)[0]
    last = lambda _, new: new  # noqa: E731
    if not module.sow(HIDDEN, "tokens", tokens, reduce_fn=last, init_fn=lambda: None):
        raise ValueError(
            f"k_adapter: what {'/'.join(module.path)!r} returns does not leave its scan: expected"
            f" nn.scan with variable_axes={{'params': 0, {HIDDEN!r}: 0}}"
        )
    return out


def tokens_of(module: nn.Module, patterns: Sequence[str], scanned) -> Array:
    """What the blocks of the network around a module have left, [blocks, b, ..., width]."""
    assert module.scope is not None  # it is called
    left = module.scope.root.variables().get(HIDDEN, {})
    found = []
    for pattern in patterns:
        for leaf in choose_modules(left, pattern, scanned):
            x = leaf.own["tokens"]
            found.append(x.reshape(-1, *x.shape[leaf.depth :]))
    shapes = [list(x.shape[1:]) for x in found]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "k_adapter: expected blocks whose tokens have one shape, got"
            f" {dict(zip(patterns, shapes, strict=False))}"
        )
    return jnp.concatenate(found)
