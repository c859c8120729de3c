"""Normalizations of the kernels of a network in the place of its activations, and its first params.

`weight_norm`, `spectral_norm` and `standardized_kernels` take a network's noun, a tuple with `init`
and `apply`, to one of the same functions whose params hold a direction and a gain for each kernel.
`fixup` rescales the first params of a network without normalizations.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from jflow._core.checks import check_noun, check_whole
from jflow.nets.norms import spectral_bound
from jflow.types import Array, Field, FlowMap, Params, Velocity

Net = TypeVar("Net", Field, Velocity, FlowMap)
_PARTS = {"direction", "gain"}


def weight_norm(net: Net) -> Net:
    """A network whose kernels are a direction and a length for each output.

        kernel[:, j] = gain_j direction[:, j] / |direction[:, j]|

    The gradient in a direction is orthogonal to it. At first the network is the one given; where a
    kernel is zero its gain is, and its direction random.

    Args:
        net: a `Velocity`, `Field` or `FlowMap`, whose kernels end in the axes [inputs, outputs].

    Returns:
        The same noun, whose params have {'direction', 'gain'} in the place of each kernel.

    Raises:
        TypeError: net is no such tuple.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jflow
        >>> from jflow import nets
        >>> velocity = nets.weight_norm(jflow.velocity(nets.TimeMLP(hidden=(8,))))
        >>> params = velocity.init(jax.random.key(0), jnp.ones((1, 2)), 0.0)
        >>> velocity.apply(params, jnp.ones((1, 2)), 0.0)
        Array([[0., 0.]], dtype=float32)

    References:
        Salimans, Kingma, *Weight Normalization: A Simple Reparameterization to Accelerate Training
            of Deep Neural Networks*, 2016, arXiv:1602.07868.
    """
    return _reparameterized("weight_norm", net, _length)


def spectral_norm(net: Net) -> Net:
    """A network whose kernels are a direction and a largest singular value.

        kernel = gain direction / |direction|_2

    The norm is the certified bound `norms.spectral_bound`, at most 1% too large, so that |gain| is
    a Lipschitz constant of a dense layer, and of a convolution times the root of its height times
    width; nothing runs along from step to step, as a power iteration does. At first the network is
    the one given.

    Args:
        net: a `Velocity`, `Field` or `FlowMap`, whose kernels end in the axes [inputs, outputs].

    Returns:
        The same noun, whose params have {'direction', 'gain'} in the place of each kernel.

    Raises:
        TypeError: net is no such tuple.

    References:
        Miyato, Kataoka, Koyama, Yoshida, *Spectral Normalization for Generative Adversarial
            Networks*, 2018, arXiv:1802.05957. The learned gain and the bound are ours.
    """
    return _reparameterized("spectral_norm", net, lambda w: spectral_bound(w)[..., None, None])


def standardized_kernels(net: Net) -> Net:
    """A network whose kernels have mean zero and a learned standard deviation for each output.

    Also known as: weight standardization.

        kernel[:, j] = gain_j (direction[:, j] - mean) / std,    over the inputs

    The kernel is the same for a direction + b and for a times it, a > 0. At first it is the one
    given, less its mean.

    Args:
        net: a `Velocity`, `Field` or `FlowMap`, whose kernels end in the axes [inputs, outputs].

    Returns:
        The same noun, whose params have {'direction', 'gain'} in the place of each kernel.

    Raises:
        TypeError: net is no such tuple.

    References:
        Qiao, Wang, Liu, Shen, Yuille, *Micro-Batch Training with Batch-Channel Normalization and
            Weight Standardization*, 2019, arXiv:1903.10520. The learned gain is ours.
    """
    centered = lambda w: w - jnp.mean(w, axis=-2, keepdims=True)  # noqa: E731
    deviation = lambda w: _length(w) * w.shape[-2] ** -0.5  # noqa: E731
    return _reparameterized("standardized_kernels", net, deviation, centered)


def fixup(
    params: Params,
    num_layers: int,
    *,
    branch_layers: int = 2,
    inner: tuple[str, ...] = ("qkv", "in"),
    last: tuple[str, ...] = ("out", "leave"),
) -> dict[str, Any]:
    """The first params of a residual network that trains without normalizations.

        inner kernels <- L^(-1 / (2 m - 2)) kernel,    last layers of branches <- 0

    with L branches of m layers each. The network is the identity between its first and its last
    layer then, and an update of the kernels changes its function by as much at any depth. The head,
    zero in the networks here, stays, and `NoNorm` has the paper's scalar biases. Under adaLN-zero,
    which holds a branch back by its gate, the last layers have to stay: last=().

    Args:
        params: of a network made with norm=NoNorm.
        num_layers: the number of branches, two for each block of a transformer.
        branch_layers: m, the number of layers of a branch, at least 2.
        inner: the names of the modules inside branches that are scaled.
        last: the names of the last modules of branches.

    Returns:
        The params.

    Raises:
        ValueError: num_layers is below 1, branch_layers below 2, or no module has a name given.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> params = {"in": {"kernel": jnp.ones((1, 1))}, "leave": {"kernel": jnp.ones((1, 1))}}
        >>> made = nets.fixup(params, num_layers=4, last=("leave",), inner=("in",))
        >>> float(made["in"]["kernel"][0, 0]), float(made["leave"]["kernel"][0, 0])
        (0.5, 0.0)

    References:
        Zhang, Dauphin, Ma, *Fixup Initialization: Residual Learning Without Normalization*, 2019,
            arXiv:1901.09321. The multipliers of branches are left out.
    """
    check_whole("fixup", num_layers=num_layers)
    check_whole("fixup", 2, branch_layers=branch_layers)
    scales = {name: num_layers ** (-1 / (2 * branch_layers - 2)) for name in inner}
    scales |= {name: 0.0 for name in last}
    found = set()

    def scaled(tree, name):
        if not isinstance(tree, Mapping):
            return tree
        made = {key: scaled(value, key) for key, value in tree.items()}
        if name in scales and "kernel" in made:
            found.add(name)
            for leaf in made if name in last else ("kernel",):
                made[leaf] = made[leaf] * scales[name]
        return made

    made = scaled(params, "")
    if missing := sorted(scales.keys() - found):
        raise ValueError(f"fixup: expected modules named {missing} among the params, got none")
    return made


def unit_kernels(
    readers: tuple[str, ...] = ("qkv", "in"), writers: tuple[str, ...] = ("out", "leave")
) -> optax.GradientTransformation:
    """The last part of an optimizer that keeps kernels at rows of length 1, as nGPT does.

        optimizer = optax.chain(optax.adam(1e-3), nets.unit_kernels())

    The rows go along the width of the tokens: the inputs of what reads them, the outputs of what
    writes to them. After the first update all of them have length 1. Weight decay is not needed.

    Args:
        readers: the names of modules that read tokens.
        writers: the names of modules that write to them.

    Returns:
        The transformation, whose `update` needs the params.

    Raises:
        ValueError: `update` is called without params.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from jflow import nets
        >>> params = {"in": {"kernel": jnp.array([[3.0], [4.0]])}}
        >>> optimizer = optax.chain(optax.sgd(0.0), nets.unit_kernels())
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> moved = optax.apply_updates(params, updates)["in"]["kernel"]
        >>> [round(float(number), 4) for number in moved.ravel()]
        [0.6, 0.8]

    References:
        Loshchilov, Hsieh, Sun, Ginsburg, *nGPT: Normalized Transformer with Representation Learning
            on the Hypersphere*, 2024, arXiv:2410.01131.
    """
    axes = {**dict.fromkeys(readers, -2), **dict.fromkeys(writers, -1)}

    def kept(path, update, leaf):
        names = [getattr(step, "key", None) for step in path[-2:]]
        if len(names) < 2 or names[1] != "kernel" or names[0] not in axes:
            return update
        moved = leaf + update
        square = jnp.sum(moved**2, axis=axes[names[0]], keepdims=True)
        return moved * jax.lax.rsqrt(square + jnp.finfo(square.dtype).tiny) - leaf

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("unit_kernels: expected update to be called with params, got None")
        return jax.tree.map_with_path(kept, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _reparameterized(
    name: str,
    net: Any,
    size: Callable[[Array], Array],
    project: Callable[[Array], Array] = lambda w: w,
) -> Any:
    """The noun with kernel = gain project(direction) / size(project(direction))."""
    check_noun(name, net, Velocity, Field, FlowMap)

    def split(path, leaf, key):
        if not _is_kernel(path, leaf):
            return leaf
        experts = any(getattr(key, "key", None) == "experts" for key in path)
        w = _matrix(leaf, leaf.ndim - (4 if leaf.ndim >= 4 and not experts else 2))
        gain = size(project(w))
        over = tuple(axis for axis in (-2, -1) if gain.shape[axis] == 1)
        some = jnp.any(w != 0, axis=over, keepdims=True)
        drawn = jax.random.normal(key, w.shape, w.dtype) * w.shape[-2] ** -0.5
        direction = jnp.where(some, w, drawn).reshape(leaf.shape)
        return {"direction": direction, "gain": jnp.where(some, gain, 0)}

    def init(key, *args, **kwargs):
        key, draws = jax.random.split(key)
        leaves, form = jax.tree.flatten_with_path(net.init(key, *args, **kwargs))
        keys = jax.random.split(draws, len(leaves))
        made = [split(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(form, made)

    def join(leaf):
        if not _is_split(leaf):
            return leaf
        w = project(_matrix(leaf["direction"], leaf["gain"].ndim - 2))
        norm = size(w)
        scale = leaf["gain"] / jnp.where(norm > 0, norm, 1)
        return (w * scale).reshape(leaf["direction"].shape)

    def apply(params, *args, **kwargs):
        return net.apply(jax.tree.map(join, params, is_leaf=_is_split), *args, **kwargs)

    return net._replace(init=init, apply=apply)


def _is_kernel(path, leaf) -> bool:
    return getattr(path[-1], "key", None) == "kernel" and leaf.ndim >= 2


def _is_split(x: Any) -> bool:
    return isinstance(x, Mapping) and set(x) == _PARTS


def _matrix(w: Array, lead: int) -> Array:
    """A kernel [inputs, outputs], behind `lead` axes of depth and experts; of a convolution
    [height, width, inputs, outputs], the first three as one."""
    return w.reshape(*w.shape[:lead], -1, w.shape[-1])


def _length(w: Array) -> Array:
    square = jnp.sum(w**2, axis=-2, keepdims=True)
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
