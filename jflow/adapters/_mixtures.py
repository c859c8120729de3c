"""Adapters made of adapters: the weights of one from a hypernetwork, several behind a router, and
several in one by optimal transport."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from jflow._core.arrays import float_dtype
from jflow._core.attached import ATTACHED, call_with
from jflow._core.checks import check_params, check_whole
from jflow.adapters._activations import second_layers
from jflow.adapters._adapter import check_adapter
from jflow.adapters._forms import SCANNED, Where, depth_of, flat, on_modules
from jflow.types import Adapter, Params

__all__ = ["hyper_adapter", "mera", "mixture_of_adapters"]


def mixture_of_adapters(
    adapters: Mapping[str, Adapter],
    *,
    where: Where,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """MoA: a sigmoid router that mixes adapters of several kinds, token by token.

    Where a module has f(x), the mixture has

        f(x) + sum_i g_i (f_i(x) - f(x)),   g = sigmoid(x R + c)   for each token

    with f_i the module with adapter i. It is the identity at first where the adapters are. Gates
    that are 1 for one adapter and 0 for the others give the model with that adapter. A token costs
    one call of the module for each adapter and one without. `merge` refuses the mixture: its
    weights depend on the token.

    Args:
        adapters: the adapters by name, for the params of one module, such as `lora(4)` for a Dense.
        where: which modules: those with a kernel, or blocks with an MLP, such as 'blocks' itself,
            for which `adaptformer(4)` and `lora(4, where='attention/*')` are then. Blocks that
            carry tokens of an image and of a text have each mixed by its own gates.
        scanned: see `on_modules`.

    Returns:
        Adapter: params {'router': {'kernel', 'bias'}, **params of the adapters by name} at the
        paths of the modules. R is drawn from N(0, 0.02^2); c is zero, so that gates begin near 1/2.

    Raises:
        ValueError: no adapters, or one named 'router'; when used, as `on_modules` and the adapters.
        TypeError: what is no Adapter.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> experts = {"narrow": adapters.lora(1), "wide": adapters.lora(2)}
        >>> mixed = adapters.mixture_of_adapters(experts, where="head")
        >>> base = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
        >>> params = mixed.init(jax.random.key(0), base)["head"]
        >>> params["router"]["kernel"].shape, params["wide"]["kernel"]["A"].shape
        ((3, 2), (3, 2))

    References:
        Cao, Lin, Yuan, Yan, He, Zhang, Li, Zhang, Tang, Zhuang, *MoA: Heterogeneous Mixture of
            Adapters for Parameter-Efficient Fine-Tuning of Large Language Models*, 2025,
            arXiv:2506.05928, for its soft form. Adapters of whole blocks are ours.
    """
    if not adapters or "router" in adapters:
        raise ValueError(
            "mixture_of_adapters: expected adapters by name, none of them 'router', got"
            f" {sorted(adapters)}"
        )
    for adapter in adapters.values():
        check_adapter("mixture_of_adapters", adapter)

    def init_one(key, own):
        router, *keys = jax.random.split(key, len(adapters) + 1)
        if "kernel" in own:
            width = own["kernel"].shape[-2]
        else:
            found = second_layers("mixture_of_adapters", own, "*", ())
            width = found[0].own["kernel"].shape[-1]
        dtype = float_dtype(*jax.tree.leaves(own))
        shape = (width, len(adapters))
        return {
            "router": {
                "kernel": 0.02 * jax.random.normal(router, shape, dtype),
                "bias": jnp.zeros(len(adapters), dtype),
            }
        } | {
            name: adapter.init(key, own)
            for key, (name, adapter) in zip(keys, adapters.items(), strict=True)
        }

    def call(params, module, run, x, *args, **kwargs):
        check_params("mixture_of_adapters", params, "router", *adapters)
        own = {name: leaf for name, leaf in module.variables["params"].items() if name != ATTACHED}
        plain, tree = jax.tree.flatten(run(x, *args, **kwargs))
        gates = [_gates(params["router"], tokens) for tokens in jax.tree.leaves(x)]
        out = plain
        for i, (name, adapter) in enumerate(adapters.items()):
            adapted = call_with(module, adapter.apply(own, params[name]), x, *args, **kwargs)
            out = [
                y + (g[..., i, None] * (new - old)).astype(y.dtype)
                for y, g, new, old in zip(out, gates, jax.tree.leaves(adapted), plain, strict=True)
            ]
        return tree.unflatten(out)

    return on_modules(init_one, call, where=where, scanned=scanned)


def _gates(router, tokens):
    kernel = router["kernel"]
    if tokens.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"mixture_of_adapters: an adapter for another base: expected tokens of"
            f" {kernel.shape[0]} numbers, got {tokens.shape[-1]}"
        )
    tokens = tokens.astype(kernel.dtype)
    bias = router["bias"].reshape((1,) * (tokens.ndim - 1) + (-1,))
    return nn.sigmoid(tokens @ kernel + bias)


def hyper_adapter(
    adapter: Adapter, size: int, *, scanned: str | Sequence[str] = SCANNED
) -> Adapter:
    """HyperAdapter: a hypernetwork writes the params of an adapter, and it alone is trained.

    Each leaf of the adapter's params becomes, in layer l,

        leaf_l = e_l G,   e_l [size],   G [size, *leaf of one layer]

    where e_l is the embedding of the layer, which all leaves of the layer share, and G the
    generator of the leaf, which all layers share: what one layer learns reaches the others. e is
    drawn from N(0, 1), and G so small that the leaves have the root mean square that the adapter's
    init gives them: zeros stay zeros, so that LoRA and AdaptFormer are the identity at first. The
    embeddings and the retriever of the paper's tasks are left out: a training is one task here.

    Args:
        adapter: of weights or of activations.
        size: the numbers of an embedding.
        scanned: glob patterns of the parts of a path that lead with an axis of depth.

    Returns:
        Adapter: params {'embeddings', 'generators'}: an embedding for each module at the top of the
        base, [size], or for each of its layers, [layers, size]; and the adapter's tree of
        generators. `merge` takes it where it takes the adapter.

    Raises:
        ValueError: size is below 1; when used, as the adapter, and for leaves of one group of
            layers that lead with other numbers of layers.
        TypeError: adapter is no Adapter.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> hyper = adapters.hyper_adapter(adapters.lora(1), 4)
        >>> base = {"blocks": {"kernel": jnp.ones((5, 3, 2))}}
        >>> params = jax.eval_shape(hyper.init, jax.random.key(0), base)
        >>> params["embeddings"]["blocks"].shape
        (5, 4)
        >>> params["generators"]["blocks"]["kernel"]["A"].shape
        (4, 3, 1)

    References:
        Zhao, Fu, He, *Prototype-based HyperAdapter for Sample-Efficient Multi-task Tuning*, 2023,
            arXiv:2310.11670, for a hypernetwork that the layers share.
    """
    check_adapter("hyper_adapter", adapter)
    check_whole("hyper_adapter", size=size)

    def group(path: str) -> tuple[str, int]:
        """(the name of the leaf's embeddings, its axes of depth)."""
        parts = path.split("/")
        depths = [depth_of("/".join(parts[: i + 1]), scanned) for i in range(len(parts))]
        return ".".join(parts[: 1 + depths.index(depths[-1])]), depths[-1]

    def init(key, base):
        own_key, embed_key, generate_key = jax.random.split(key, 3)
        own = adapter.init(own_key, base)
        shapes: dict[str, tuple[int, ...]] = {}
        for path, leaf in flat(own).items():
            name, depth = group(path)
            if shapes.setdefault(name, leaf.shape[:depth]) != leaf.shape[:depth]:
                raise ValueError(
                    f"hyper_adapter: expected all leaves of {name!r} to have"
                    f" {list(shapes[name])} layers, got {list(leaf.shape[:depth])} at {path!r}"
                )
        leaves, tree = jax.tree.flatten(own)
        dtype = float_dtype(*leaves)
        keys = jax.random.split(embed_key, len(shapes))
        embeddings = {
            name: jax.random.normal(key, (*shape, size), dtype)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        keys = jax.random.split(generate_key, len(leaves))
        generators = [
            jax.random.normal(key, (size, *leaf.shape[group(path)[1] :]), dtype)
            * jnp.sqrt(jnp.mean(leaf**2) / size)
            for key, (path, leaf) in zip(keys, flat(own).items(), strict=True)
        ]
        return {"embeddings": embeddings, "generators": tree.unflatten(generators)}

    def apply(base, params):
        check_params("hyper_adapter", params, "embeddings", "generators")
        embeddings = params["embeddings"]
        leaves = [
            jnp.tensordot(embeddings[group(path)[0]], generator, axes=1)
            for path, generator in flat(params["generators"]).items()
        ]
        tree = jax.tree.structure(params["generators"])
        return adapter.apply(base, tree.unflatten(leaves))

    return Adapter(init, apply)


def mera(params: Sequence[Params]) -> Params:
    """MerA: several trained adapters of one kind as one, by an average of aligned hidden units.

    The hidden units of a bottleneck (rows of 'up' in AdaptFormer, of 'B' in LoRA, with the columns
    of 'down' or 'A') stand in any order without a change of the function, so that a plain average
    mixes units that have nothing in common. Here the units of each adapter are brought into the
    order of the first one's by the optimal transport between them, which for units of equal weight
    is an assignment,

        min over permutations p of sum_i |unit_i - unit'_p(i)|^2,

    and then averaged; a unit is its weights on both sides, with its bias. What has no hidden units
    is averaged as it is. It runs on the host, in numpy.

    Args:
        params: of adapters of one form and rank, of the same base.

    Returns:
        The params of one adapter of this form.

    Raises:
        ValueError: no params, or params of several structures or shapes.

    Examples:
        >>> import numpy as np
        >>> from jflow import adapters
        >>> one = {"A": np.array([[1.0, 2.0]]), "B": np.array([[3.0], [4.0]])}
        >>> other = {"A": np.array([[2.0, 1.0]]), "B": np.array([[4.0], [3.0]])}
        >>> adapters.mera([one, other])["A"].tolist()  # the same function: the order is undone
        [[1.0, 2.0]]

    References:
        He, Fan, Ding, Shen, Zhou, Tao, *MerA: Merging Pretrained Adapters For Few-Shot Learning*,
            2023, arXiv:2308.15982, in its form that compares weights.
    """
    if not params:
        raise ValueError("mera: expected params of some adapters, got none")
    first, *rest = params
    shapes = [[(path, np.shape(x)) for path, x in flat(tree).items()] for tree in params]
    for given in shapes[1:]:
        if given != shapes[0]:
            differs = [pair for pair in given if pair not in shapes[0]]
            raise ValueError(
                f"mera: expected adapters of one form and rank, got others: {differs or given}"
            )
    aligned = [first, *(_aligned(first, tree) for tree in rest)]

    def mean(*leaves):
        total = sum(np.asarray(leaf, np.float64) for leaf in leaves)
        return jnp.asarray(total / len(leaves), leaves[0].dtype)

    return jax.tree.map(mean, *aligned)


SIDES = (
    ("down", "up"),
    ("A", "B"),
)  # units are the last axis of one, the last but one of the other


def _aligned(first, other):
    """`other` with the hidden units of each bottleneck in the order of those of `first`."""
    if not isinstance(other, Mapping):
        return other
    for enter, leave in SIDES:
        if set(other) == {enter, leave}:
            order = _order(_units(first, enter, leave), _units(other, enter, leave))
            sides = {enter: _taken(other[enter], order, -1), leave: _taken(other[leave], order, -2)}
            return {name: sides[name] for name in other}
    return {name: _aligned(first[name], inner) for name, inner in other.items()}


def _kernel_of(side):
    return np.asarray(side["kernel"] if isinstance(side, Mapping) else side)


def _units(bottleneck, enter: str, leave: str) -> np.ndarray:
    """The weights of each unit, [*depth, units, numbers]."""
    out = _kernel_of(bottleneck[leave])
    into = _kernel_of(bottleneck[enter])
    parts = [into.reshape(*out.shape[:-2], -1, into.shape[-1]).swapaxes(-1, -2), out]
    if isinstance(bottleneck[enter], Mapping) and "bias" in bottleneck[enter]:
        parts.append(np.asarray(bottleneck[enter]["bias"])[..., None])
    return np.concatenate(parts, axis=-1)


def _order(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[*depth, units]: which unit of `other` is next to each of `first`."""
    gain = np.einsum("...ik,...jk->...ij", first, other, dtype=np.float64)
    flat_gain = gain.reshape(-1, *gain.shape[-2:])
    orders = [linear_sum_assignment(g, maximize=True)[1] for g in flat_gain]
    return np.reshape(orders, gain.shape[:-1])


def _taken(side, order: np.ndarray, axis: int):
    """A side with its units in another order; the bias of the first side has them too."""
    if not isinstance(side, Mapping):
        own, after = (slice(None),), (None,) * (-1 - axis)
        between = (None,) * (np.ndim(side) - order.ndim - len(after))
        return np.take_along_axis(np.asarray(side), order[..., *between, *own, *after], axis)
    return {
        name: _taken(x, order, axis if name == "kernel" else -1)
        if name == "kernel" or axis == -1
        else x
        for name, x in side.items()
    }
