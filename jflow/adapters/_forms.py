"""Adapters from a function of one layer: which leaves it is for, and the axis of depth of scanned
ones."""

import difflib
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jflow._core.attached import ATTACHED, attach, call_with, dequantize, is_leaf, is_quantized
from jflow._core.checks import described
from jflow.adapters._adapter import check_adapter
from jflow.types import Adapter, Array, Key, Params, PyTree

__all__ = ["layerwise", "on_modules", "on_weights"]

Where = str | Sequence[str] | Callable[[str], bool]

SCANNED = ("*blocks", "layers", "stacked", "rest")
"""How parts of a path are named whose leaves lead with the depth, in the networks of jflow: a leaf
leads with as many axes of depth as its path has such parts."""


def on_weights(
    init: Callable[[Key, Params], Params],
    apply: Callable[[Params, Params], Params],
    *,
    where: Where = "*kernel*",
    layers: Sequence[int] | None = None,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """An adapter of weights, from what it does with one layer.

    The two functions see the own params of one layer: 'kernel', of shape [*in, out], and 'bias'
    where there is one. Scanned layers are mapped over their axes of depth, each with a key of its
    own.

    Args:
        init: (key, own) -> params for this layer; raise a ValueError where it cannot be.
        apply: (own, params) -> a dict with what has changed, 'kernel', or 'kernel' and 'bias'.
        where: which kernels: a glob pattern of paths such as 'blocks/attention/qkv/kernel' (where
            '*' stands for '/' too), several of them, or a function of the path. Leaves of one axis
            (biases, gains) are never chosen.
        layers: which of the scanned layers, by their index; None: all.
        scanned: glob patterns of the parts of a path that lead with an axis of depth.

    Returns:
        Adapter: its params have the paths of the base, with the dict of `init` in the place of the
        kernel.

    Raises:
        ValueError: when used: where nothing is met, the message names near paths; for kernels of
            more axes than a Dense or an image convolution has; for a layer that is not there; for
            params that do not fit the base, with the first path that differs.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> scale = adapters.on_weights(
        ...     lambda key, own: {"log_scale": jnp.zeros(own["kernel"].shape[-1])},
        ...     lambda own, params: {"kernel": own["kernel"] * jnp.exp(params["log_scale"])},
        ... )
        >>> base = {"blocks": {"out": {"kernel": jnp.ones((3, 4, 2))}}}
        >>> scale.init(jax.random.key(0), base)["blocks"]["out"]["kernel"]["log_scale"].shape
        (3, 2)
    """

    def init_all(key, base):
        chosen = choose(base, where, scanned)
        keys = jax.random.split(key, len(chosen))
        return unflatten_dict(
            {
                leaf.path: _named(leaf, _over_depth(init, leaf.depth, keyed=True), k, own)
                for k, leaf in zip(keys, chosen, strict=True)
                for own in [_layers(leaf, layers, leaf.own)]
            },
            sep="/",
        )

    def apply_all(base, params):
        changed = {}
        for leaf, own in meet(base, params, scanned):
            some = _layers(leaf, layers, leaf.own)
            new = _named(leaf, _over_depth(apply, leaf.depth), some, own)
            for name, value in new.items():
                old = leaf.own[name]
                if value.shape != some[name].shape:
                    raise ValueError(_misfit(leaf, own))
                if layers is not None and leaf.depth:
                    whole = jnp.asarray(old, value.dtype)
                    value = whole.at[jnp.array(layers)].set(value)
                changed[leaf.path if name == "kernel" else leaf.bias] = value
        return replaced(base, changed)

    return Adapter(init_all, apply_all)


def on_modules(
    init: Callable[[Key, Params], Params],
    call: Callable[..., Any],
    *,
    where: Where,
    layers: Sequence[int] | None = None,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """An adapter of activations, from what it does around the call of one Linen module.

    Args:
        init: (key, own) -> params for one module, whose params are own. Where `layers` are chosen,
            zeros have to stand for no change.
        call: (params, module, run, *args) -> what the module returns; `run(*args)` is the module
            without the adapter. `module` is the bound Linen module, for its attributes.
        where: which modules: a glob pattern of paths such as 'blocks/attention' (where '*' stands
            for '/' too), several of them, or a function of the path. 'blocks' itself means each of
            the scanned blocks, as a whole; the scan over them is no call that is heeded.
        layers: which of the scanned layers, by their index; None: all.
        scanned: glob patterns of the parts of a path that lead with an axis of depth.

    Returns:
        Adapter: its params have the paths of the modules. `apply` gives the base with the functions
        beside the modules' params: a network that jflow lifted runs them.

    Raises:
        ValueError: when used: where nothing is met, the message names near paths; for a layer that
            is not there; for params of another base.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters, nets
        >>> shift = adapters.on_modules(
        ...     lambda key, own: {"by": jnp.zeros(own["bias"].shape)},
        ...     lambda params, module, run, x: run(x) + params["by"],
        ...     where="head",
        ... )
        >>> velocity, x = nets.velocity(nets.TimeMLP(hidden=(8,))), jnp.ones((1, 2))
        >>> base = velocity.init(jax.random.key(0), x, 0.0)
        >>> velocity.apply(shift.apply(base, {"head": {"by": jnp.ones(2)}}), x, 0.0)
        Array([[1., 1.]], dtype=float32)
    """

    def init_all(key, base):
        chosen = choose_modules(base, where, scanned)
        keys = jax.random.split(key, len(chosen))
        return unflatten_dict(
            {
                leaf.path: _named(
                    leaf, _over_depth(init, leaf.depth, keyed=True), k, _layers(leaf, layers)
                )
                for k, leaf in zip(keys, chosen, strict=True)
            },
            sep="/",
        )

    def apply_all(base, params):
        chosen = choose_modules(base, where, scanned)
        for leaf in chosen:
            own = params
            for part in leaf.path.split("/"):
                if not isinstance(own, Mapping) or part not in own:
                    raise ValueError(
                        f"an adapter for another base: it has no params for {leaf.path!r}"
                    )
                own = own[part]
            base = attach(base, tuple(leaf.path.split("/")), call, spread(leaf, own, layers))
        return base

    return Adapter(init_all, apply_all)


def layerwise(adapter: Adapter, *, layers: Sequence[int] | None = None) -> Adapter:
    """An adapter of weights that changes the weights of a layer when the layer runs.

    What an adapter of weights makes of the base is a second copy of the kernels that it changes,
    which lives until the backward pass. Layer by layer one layer's kernel is held at a time, and
    made anew in the backward pass; a base in int8 is read in the same way. That takes the changed
    kernels once more in time, and it acts inside Linen networks only, on modules that own their
    kernel.

    Args:
        adapter: an adapter of weights made by `on_weights`, such as `lora` or `ether_plus`.
        layers: what the adapter was given as `layers`; the kernels of other layers are computed
            too, and not used.

    Returns:
        Adapter: with the same params; `merge` takes the original.

    Raises:
        ValueError: when used, for other layers than those of the adapter, and as `on_weights`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters, nets
        >>> velocity, x = nets.velocity(nets.TimeMLP(hidden=(8,))), jnp.ones((1, 2))
        >>> base = velocity.init(jax.random.key(0), x, 0.0)
        >>> lean = adapters.layerwise(adapters.lora(1, where="head*"))
        >>> params = {"head": {"kernel": {"A": jnp.zeros((8, 1)), "B": jnp.ones((1, 2))}}}
        >>> velocity.apply(lean.apply(base, params), x, 0.0)
        Array([[0., 0.]], dtype=float32)
    """
    check_adapter("layerwise", adapter)

    def call(params, module, run, *args, **kwargs):
        own = {name: leaf for name, leaf in module.variables["params"].items() if name != ATTACHED}

        def changed(own, params, *args):
            own = {name: dequantize(leaf) for name, leaf in own.items()}
            new = adapter.apply(own, params["own"])
            if "chosen" in params:
                new = jax.tree.map(partial(jnp.where, params["chosen"]), new, own)
            return call_with(module, new, *args, **kwargs)

        return jax.checkpoint(changed)(own, params, *args)

    def apply(base, params):
        modules: dict[str, dict[str, Any]] = {}
        for leaf, own in meet(base, params, SCANNED):
            module, _, name = leaf.path.rpartition("/")
            found = modules.setdefault(module, {"own": {}})
            if leaf.depth:
                found["own"][name] = _repeated(leaf, own, layers)
                if layers is not None:
                    lead = leaf.own["kernel"].shape[: leaf.depth]
                    index = np.arange(leaf.length).reshape(-1, *[1] * (leaf.depth - 1))
                    found["chosen"] = np.broadcast_to(np.isin(index, layers), lead)
            else:
                found["own"][name] = own
        for path, own in modules.items():
            base = attach(base, tuple(path.split("/")) if path else (), call, own)
        return base

    return Adapter(adapter.init, apply)


def _repeated(leaf: "Leaf", own: Params, layers: Sequence[int] | None) -> Params:
    """What the chosen layers have, with that of the first of them for the others too: zeros would
    not do, where an adapter divides by a length."""
    _layers(leaf, layers)
    count = leaf.length if layers is None else len(layers)
    for x in jax.tree.leaves(own):
        if jnp.shape(x)[:1] != (count,):
            raise ValueError(
                f"layerwise: expected params of {count} layers of {leaf.path!r}, got"
                f" {list(jnp.shape(x))}: give layerwise the `layers` of its adapter, which are now"
                f" {None if layers is None else list(layers)}"
            )
    if layers is None:
        return own
    index = np.zeros(leaf.length, int)
    index[list(layers)] = np.arange(count)
    return jax.tree.map(lambda x: x[index], own)


class Leaf(NamedTuple):
    """A kernel of a base, or a module, and how many axes of depth it leads with."""

    path: str
    own: dict[str, Any]  # 'kernel', and 'bias' where there is one; of a module its params
    depth: int
    bias: str  # the path of the bias, where there is one

    @property
    def length(self) -> int:
        """The number of layers along the first axis of depth."""
        return jax.tree.leaves(self.own)[0].shape[0]


def flat(base: PyTree) -> dict[str, Any]:
    """The leaves of a base by path; a quantized leaf is one."""
    pairs = jax.tree_util.tree_flatten_with_path(base, is_leaf=is_leaf)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def replaced(base: PyTree, changed: Mapping[str, Any]) -> PyTree:
    """The base with other leaves at some paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: changed.get(
            jax.tree_util.keystr(path, simple=True, separator="/"), leaf
        ),
        base,
        is_leaf=is_leaf,
    )


def choose(base: PyTree, where: Where, scanned: str | Sequence[str] = SCANNED) -> list[Leaf]:
    """The kernels of a base that `where` chooses; raise for none, and for shapes of no layer."""
    leaves = flat(base)
    shapes = {path: _shape(leaf) for path, leaf in leaves.items() if not callable(leaf)}
    axes = {path: len(shape) - depth_of(path, scanned) for path, shape in shapes.items()}
    matrices = [path for path, n in axes.items() if n >= 2]
    found = [path for path in matrices if path in _chosen(matrices, where)]
    for path in found:
        if axes[path] not in (2, 4):
            raise ValueError(
                f"expected {path!r} to be the kernel of a Dense [in, out] or of an image"
                " convolution [rows, columns, in, out], after"
                f" {depth_of(path, scanned)} axes of depth, got {list(shapes[path])}: leave it out"
                " by `where`; for a scanned layer under another name give `scanned`, which is"
                f" {list(SCANNED)} by default"
            )
    return [_kernel(leaves, path, scanned) for path in found]


def choose_modules(
    base: PyTree, where: Where, scanned: str | Sequence[str] = SCANNED
) -> list[Leaf]:
    """The modules of a base that `where` chooses; raise for none."""
    modules: dict[str, None] = {}
    for path, leaf in flat(base).items():
        parts = path.split("/")[:-1]
        if not callable(leaf):
            modules |= {"/".join(parts[: i + 1]): None for i in range(len(parts))}
    chosen = _chosen(list(modules), where)
    return [
        Leaf(path, _plain(_at(base, path)), depth_of(path, scanned), "")
        for path in modules
        if path in chosen
    ]


def meet(base: PyTree, params: Params, scanned: str | Sequence[str]):
    """Yield (Leaf, params) for each kernel that params have something for; raise for another
    base."""
    leaves = flat(base)

    def walk(params, path):
        if path in leaves:
            yield _kernel(leaves, path, scanned), params
            return
        inside = not path or any(name.startswith(f"{path}/") for name in leaves)
        if not (isinstance(params, Mapping) and inside):
            raise ValueError(
                f"an adapter for another base: the base has no {path!r}; near it are"
                f" {', '.join(_near(path, list(leaves)))}"
            )
        for name, inner in params.items():
            yield from walk(inner, f"{path}/{name}" if path else name)

    yield from walk(params, "")


def _kernel(leaves, path: str, scanned) -> Leaf:
    bias = f"{path.rpartition('/')[0]}/bias".removeprefix("/")
    has_bias = path.rpartition("/")[2] == "kernel" and bias in leaves
    own = {"kernel": _floats(leaves[path])} | ({"bias": leaves[bias]} if has_bias else {})
    return Leaf(path, own, depth_of(path, scanned), bias)


def _shape(leaf) -> tuple[int, ...]:
    return jnp.shape(leaf["int8"] if is_quantized(leaf) else leaf)


def _floats(leaf):
    """A leaf as floats; of shapes alone, shapes."""
    if not is_quantized(leaf):
        return leaf
    shapes = all(isinstance(x, jax.ShapeDtypeStruct) for x in leaf.values())
    return jax.eval_shape(dequantize, leaf) if shapes else dequantize(leaf)


def _plain(tree):
    """The params of a module without what is attached to it, as floats."""
    if is_quantized(tree) or not isinstance(tree, Mapping):
        return _floats(tree)
    return {name: _plain(inner) for name, inner in tree.items() if name != ATTACHED}


def _at(tree, path: str):
    for part in path.split("/"):
        tree = tree[part] if isinstance(tree, Mapping) else tree[int(part)]
    return tree


def depth_of(path: str, scanned) -> int:
    """How many axes of depth a leaf of this path leads with."""
    patterns = [scanned] if isinstance(scanned, str) else scanned
    return sum(any(fnmatch.fnmatchcase(p, s) for s in patterns) for p in path.split("/"))


def _chosen(paths: list[str], where: Where) -> set[str]:
    if callable(where):
        matches = where
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"where: expected a glob pattern or a function of the path, got"
                    f" {described(pattern)}"
                )
            if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                raise ValueError(_met_nothing(repr(pattern), pattern, paths))

        def matches(path):
            return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

    found = {path for path in paths if matches(path)}
    if not found:
        raise ValueError(_met_nothing("the function", "", paths))
    return found


def _met_nothing(what: str, pattern: str, paths: list[str]) -> str:
    near = ", ".join(_near(pattern.replace("*", ""), paths)) or "none"
    return f"where: expected {what} to meet some leaf of the base; near it are {near}"


def _near(word: str, paths: list[str]) -> list[str]:
    """A few of the paths, those most like `word` first."""
    ratio = lambda path: difflib.SequenceMatcher(None, word, path).ratio()  # noqa: E731
    return sorted(paths, key=ratio, reverse=True)[:4]


def _over_depth(function, depth: int, keyed: bool = False):
    """`function` of one layer, over `depth` leading axes; a key is split over the layers."""
    for _ in range(depth):
        function = _mapped(function, keyed)
    return function


def _mapped(function, keyed):
    if not keyed:
        return jax.vmap(function)

    def run(key, own):
        keys = jax.random.split(key, jax.tree.leaves(own)[0].shape[0])
        return jax.vmap(function)(keys, own)

    return run


def _named(leaf: Leaf, function, *args):
    """`function(*args)`; an error says which leaf it is about."""
    try:
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args)):
            return jax.eval_shape(function, *args)
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{leaf.path!r}: {error}") from error
    except TypeError as error:
        if len(args) == 2 and isinstance(args[1], Mapping):
            raise ValueError(_misfit(leaf, args[1])) from error
        raise


def _misfit(leaf: Leaf, own) -> str:
    shapes = {name: list(jnp.shape(x)) for name, x in flat(own).items()}
    return (
        f"an adapter for another base: params of shapes {shapes} do not fit {leaf.path!r} of shape"
        f" {list(leaf.own['kernel'].shape)}"
    )


def _layers(leaf: Leaf, layers, own=None):
    """The chosen layers of what is scanned; the rest is taken whole."""
    own = leaf.own if own is None else own
    if layers is None or not leaf.depth:
        return own
    if not all(0 <= i < leaf.length for i in layers) or len(set(layers)) != len(layers):
        raise ValueError(
            f"{leaf.path!r}: expected layers from 0 to {leaf.length - 1}, each once, got"
            f" {list(layers)}"
        )

    def taken(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(layers), *x.shape[1:]), x.dtype)
        return x[np.array(layers)]

    return jax.tree.map(taken, own)


def spread(leaf: Leaf, own: Params, layers: Sequence[int] | None) -> Params:
    """What the chosen layers have, among zeros for the others."""
    if layers is None or not leaf.depth:
        return own
    _layers(leaf, layers)
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, shape=(leaf.length, *x.shape[1:])).at[jnp.array(layers)].set(x),
        own,
    )


def fitting(leaf: Leaf, own: Params, layers: Sequence[int] | None) -> None:
    """Raise unless {'A', 'B'} are the two sides of a product shaped like a kernel."""
    *lead, out = leaf.own["kernel"].shape
    if layers is not None and leaf.depth:
        lead[0] = len(layers)
    depth, shapes = lead[: leaf.depth], {name: jnp.shape(x) for name, x in own.items()}
    rank = shapes.get("A", (0,))[-1]
    if shapes != {"A": (*lead, rank), "B": (*depth, rank, out)}:
        raise ValueError(_misfit(leaf, own))


def uniform_down(key: Key, inputs: Sequence[int], rank: int, dtype: Any) -> Array:
    """The first side of a product of low rank, [*inputs, rank], uniform in +-1 / sqrt(in)."""
    width = 1 / math.sqrt(math.prod(inputs))
    return jax.random.uniform(key, (*inputs, rank), dtype, -width, width)


def check_rank(rank: int, kernel: Array) -> None:
    """Raise for a rank above that of a kernel [*in, out]."""
    *inputs, out = kernel.shape
    limit = min(math.prod(inputs), out)
    if rank > limit:
        raise ValueError(
            f"expected a rank of at most {limit}, that of a kernel {list(kernel.shape)}, got"
            f" rank={rank}: leave the layer out by `where`, or take a smaller rank"
        )


def matrix(kernel: Array) -> Array:
    """A kernel [*in, out] as a matrix [in, out]."""
    return kernel.reshape(math.prod(kernel.shape[:-1]), kernel.shape[-1])
