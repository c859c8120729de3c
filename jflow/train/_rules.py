"""Which leaf of a state lies where on a mesh, by rules on its path."""

import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jflow._core.processes import check_agreement
from jflow.train._sharding import put
from jflow.types import PyTree

Match = str | Callable[[str], bool]
Spec = PartitionSpec | Callable[[tuple[int, ...], Mesh], PartitionSpec]
Rule = tuple[Match, Spec]


def fsdp(axis: str = "data", *, min_size: int = 1024) -> Spec:
    """The rule of full sharding: a leaf's largest axis is split over an axis of the mesh.

    Of the axes that `axis` divides, the largest is split, the later one of two equals. Only the
    last two axes of a leaf are candidates, because scanned leaves carry depth in front of them, and
    a scan over a split axis would gather the whole stack at every layer. As a rule: `(".*",
    fsdp())`.

    Args:
        axis: Of the mesh.
        min_size: Leaves of fewer numbers stay whole: to gather them costs more than they take.

    Returns:
        (shape, mesh) -> PartitionSpec.

    References:
        Rajbhandari, Rasley, Ruwase, He, *ZeRO: Memory Optimizations Toward Training Trillion
        Parameter Models*, 2019, arXiv:1910.02054.
    """

    def spec(shape, mesh):
        size = _axis_size(mesh, axis, f"fsdp(axis={axis!r})")
        fit = [
            i
            for i in range(max(0, len(shape) - 2), len(shape))
            if shape[i] and shape[i] % size == 0
        ]
        if not fit or math.prod(shape) < min_size:
            return PartitionSpec()
        chosen = max(fit, key=lambda i: (shape[i], i))
        return PartitionSpec(axis, *[None] * (len(shape) - 1 - chosen))

    return spec


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Sequence[Rule] = ()) -> PyTree:
    """The sharding of every leaf of a state, by rules on its path.

    Rules say how a state is stored; the results of a jitted step are the same up to the order of
    its sums.

    Args:
        tree: A state, params, or their shapes (jax.eval_shape).
        mesh: Where they are to lie.
        rules: (match, spec) pairs, of which the first that matches a leaf's path decides; a leaf
            that none matches is whole on every device, as scalars always are. match is a regular
            expression, searched in the path, or a function of the path. Names are joined by '/':
            'params/blocks/in/kernel', 'opt_state/0/mu/blocks/in/kernel', 'ema/blocks/in/kernel',
            'frozen/teacher/...'; 'in/kernel$' therefore places a kernel, its moments and its
            average alike. spec is a PartitionSpec for the last axes of the leaf (right-aligned:
            scanned leaves lead with depth), or a function (shape, mesh) -> PartitionSpec such as
            `fsdp()`.

    Returns:
        A sharding for each leaf.

    Raises:
        ValueError: For a rule that matches no leaf, an axis that the mesh lacks, a spec longer than
            the leaf's shape, and a size that does not divide, naming path, shape and sizes.
    """
    paths = _paths(tree)
    for i, (match, _) in enumerate(rules):
        if not any(_matches(match, path) for path in paths):
            raise ValueError(
                f"rule {i}, {match!r}, matches no leaf; there are"
                f" {', '.join(paths[:8]) or 'none'} ..."
            )
    return jax.tree.unflatten(jax.tree.structure(tree), leaf_shardings(tree, mesh, rules))


def leaf_shardings(
    tree: PyTree, mesh: Mesh | AbstractMesh, rules: Sequence[Rule]
) -> list[NamedSharding]:
    """As `shardings`, leaf after leaf; rules that match nothing are none of its business."""
    found = []
    for path, leaf in zip(_paths(tree), jax.tree.leaves(tree), strict=True):
        spec = next((spec for match, spec in rules if _matches(match, path)), PartitionSpec())
        spec = PartitionSpec() if leaf.ndim == 0 else _aligned(path, leaf.shape, mesh, spec)
        found.append(NamedSharding(mesh, spec))
    return found


def shard(tree: PyTree, mesh: Mesh, rules: Sequence[Rule] = ()) -> PyTree:
    """Lays a state, or params, out over a mesh by rules.

    Under several processes each gives the same values.

    Args:
        tree: A state or params.
        mesh: Where to.
        rules: As in `shardings`.

    Returns:
        The tree, on the mesh.

    Raises:
        ValueError: As `shardings`.
    """
    check_agreement({"the state": forms(tree), "the mesh": str(dict(mesh.shape))})
    return put(tree, shardings(tree, mesh, rules))


def init_sharded(make: Callable[[], PyTree], mesh: Mesh, rules: Sequence[Rule] = ()) -> PyTree:
    """Makes a state shard by shard: no device ever holds the whole.

    Its values are those of jax.jit(make)().

    Args:
        make: () -> state, such as `lambda: init_state(velocity.init(...), optimizer, key)`; it is
            traced.
        mesh: Where the state is to lie.
        rules: As in `shardings`.

    Returns:
        The state, on the mesh.

    Raises:
        ValueError: As `shardings`.
    """
    shapes = jax.eval_shape(make)
    check_agreement({"the state": forms(shapes), "the mesh": str(dict(mesh.shape))})
    return jax.jit(make, out_shardings=shardings(shapes, mesh, rules))()


def bytes_per_device(tree: PyTree, placed: PyTree | None = None) -> int:
    """How many bytes one device keeps of a tree.

    Args:
        tree: Arrays or shapes.
        placed: The shardings of its leaves; None: as its arrays lie.

    Returns:
        Bytes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import train
        >>> train.bytes_per_device({"w": jnp.zeros((4, 8))})
        128
    """
    placed = jax.tree.map(lambda x: x.sharding, tree) if placed is None else placed
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * _itemsize(x), tree, placed
    )
    return sum(jax.tree.leaves(sizes))


def _itemsize(x) -> int:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, x)
        return math.prod(data.shape[x.ndim :]) * data.dtype.itemsize
    return x.dtype.itemsize


def _paths(tree: PyTree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _matches(match: Match, path: str) -> bool:
    return bool(match(path) if callable(match) else re.search(match, path))


def _aligned(path: str, shape: tuple[int, ...], mesh, spec: Spec) -> PartitionSpec:
    spec = spec(shape, mesh) if callable(spec) else spec
    if len(spec) > len(shape):
        raise ValueError(
            f"{path}: {spec} names {len(spec)} axes, but the leaf has the shape {list(shape)}"
        )
    spec = PartitionSpec(*[None] * (len(shape) - len(spec)), *spec)
    for size, names in zip(shape, spec, strict=True):
        names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        parts = math.prod(_axis_size(mesh, name, f"{path}: {spec}") for name in names)
        if size % parts:
            raise ValueError(
                f"{path}: {spec} does not divide the shape {list(shape)}: {size} over mesh axis "
                f"{' x '.join(names)} of size {parts}"
            )
    return spec


def _axis_size(mesh, name: str, who: str) -> int:
    if name not in mesh.shape:
        raise ValueError(f"{who}: the mesh has no axis {name!r}, only {dict(mesh.shape)}")
    return mesh.shape[name]


def forms(tree: PyTree) -> str:
    """Path, type, shape and, where it lies on a mesh, spec of every leaf, a line each."""
    leaves = zip(_paths(tree), jax.tree.leaves(tree), strict=True)
    specs = (getattr(getattr(leaf, "sharding", None), "spec", "") for leaf in jax.tree.leaves(tree))
    return "\n".join(
        f"{p} {x.dtype}{list(x.shape)} {spec}" for (p, x), spec in zip(leaves, specs, strict=True)
    )
