"""Helpers that every room of the library shares."""

import inspect
import math
import operator

import flax
import jax
import jax.numpy as jnp

from jflow.types import Array, Cond, PyTree


def compiled(noun):
    """`noun`, a tuple of functions, each of them behind jax.jit, which inside another jit is inlined.

    For functions that may hold a loop: outside jit it would be compiled anew at every call. Leaves of params and cond have to
    be arrays or numbers; `jax.disable_jit` shows values instead of tracers."""

    def jitted(function):
        if not callable(function):
            return function
        return jax.jit(function, static_argnames="side" if "side" in inspect.signature(function).parameters else None)

    return type(noun)(*map(jitted, noun))


def expand_to(t: Array, x: Array) -> Array:
    """Reshape t [b] (or [b, ...] along x's leading axes) so that it broadcasts against x [b, *event]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def float_dtype(*arrays: Array) -> jnp.dtype:
    """The type in which log-dets and densities accumulate: that of the arrays, float32 at least."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def sum_event(x: Array) -> Array:
    """[b, *event] -> [b]: the sum over the event, in float32 or better."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)), dtype=float_dtype(x))


def flat_rows(x: Array) -> Array:
    """[b, *event] -> [b, D]; with b = 0 too, where a reshape to [b, -1] does not know D."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def mean_event(x: Array) -> Array:
    """[b, *event] -> [b]: the mean over the event, in float32 or better."""
    return sum_event(x) / math.prod(x.shape[1:])


def filled(used: Array | None, tree: PyTree) -> PyTree:
    """`tree` with the rows that are not `used` [b] replaced by the first that is; as it is where used is None.

    What such rows hold (padding, infinity, a point outside the support) then enters neither a loss nor its gradient, into
    which 0 times infinity would come even from a row that counts nothing.
    """
    if used is None or used.shape[0] == 0:
        return tree
    at = jnp.arange(used.shape[0]) == jnp.argmax(used)

    def leaf(a):
        # a masked sum, since over a mesh an index would gather the rows of all devices
        first = jnp.sum(jnp.where(expand_to(at, a), a, jnp.zeros_like(a)), axis=0, keepdims=True, dtype=a.dtype)
        return jnp.where(expand_to(used, a), a, first)

    return jax.tree.map(leaf, tree)


def mean_and_std(x: Array, axis) -> tuple[Array, Array]:
    """Along `axis`, in float32 at least; std is 1 where x does not vary by more than its rounding."""
    x = x.astype(float_dtype(x))
    varies = jnp.ptp(x, axis=axis) > 1e-6 * jnp.max(jnp.abs(x), axis=axis)
    return jnp.mean(x, axis=axis), jnp.where(varies, jnp.std(x, axis=axis), 1.0)


def zero_log_det(x: Array) -> Array:
    """[b] zeros made from x, so that they vary over a mesh axis whenever x does."""
    return jnp.zeros_like(x, shape=x.shape[:1], dtype=float_dtype(x))


def check_event(name: str, x: Array, event_shape: tuple[int, ...]) -> None:
    """Raise unless x is [b, *event_shape]."""
    if jnp.ndim(x) != len(event_shape) + 1 or tuple(jnp.shape(x)[1:]) != tuple(event_shape):
        expected = ", ".join(["b", *map(str, event_shape)])
        raise ValueError(f"{name}: expected x of shape [{expected}], got {list(jnp.shape(x))}")


def check_side(side: str) -> None:
    """Raise unless `side` names a side of a bijector."""
    if side not in ("data", "source"):
        raise ValueError(f"init: expected side 'data' or 'source', got {side!r}")


def no_params(key, x: Array, cond: Cond = None, *, side: str = "data") -> dict:
    """The `init` of a bijector without parameters."""
    check_side(side)
    return {}


def check_cond(name: str, cond: Cond, n: int) -> None:
    """Raise unless every leaf of cond leads with n rows."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(cond):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != n:
            where = "cond" + jax.tree_util.keystr(path)
            raise ValueError(f"{name}: expected {where} to lead with {n} rows, got shape {list(jnp.shape(leaf))}")


def check_draws(name: str, n: int, cond: Cond) -> int:
    """n as a Python int; raise unless it is at least 1 and every leaf of cond leads with n rows."""
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"{name}: expected n to be a static int, got {n!r}") from None
    if n < 1:
        raise ValueError(f"{name}: expected n >= 1, got {n}")
    check_cond(name, cond, n)
    return n


def check_whole(name: str, least: int = 1, **values: int) -> None:
    """Raise for a value, by its name, that is not a whole number of at least `least`."""
    for what, value in values.items():
        if isinstance(value, bool) or int(value) != value or value < least:
            raise ValueError(f"{name}: expected {what} to be a whole number of at least {least}, got {value}")


def check_raw(name: str, x: Array, raw: Array, size: int) -> tuple[Array, Array]:
    """x [...] and raw [..., size] in float32 at least; raise unless the shapes fit."""
    if jnp.shape(raw) != (*jnp.shape(x), size):
        raise ValueError(f"{name}: expected raw of shape {[*jnp.shape(x), size]}, got {list(jnp.shape(raw))}")
    dtype = float_dtype(x, raw)
    return jnp.asarray(x, dtype), jnp.asarray(raw, dtype)


def need_key(name: str, key) -> None:
    """Raise when a stochastic function was called without a key."""
    if key is None:
        raise ValueError(f"{name} is stochastic: it needs a key (jax.random.key), got None")


def like_rows(name: str, row: PyTree, cond: Cond) -> Cond:
    """`row`, one row of cond without the batch axis, repeated into the shapes and types of cond."""
    given, expected = jax.tree.structure(row), jax.tree.structure(cond)
    if given != expected:
        raise ValueError(f"{name}: expected null to be one row of cond, {expected}, got {given}")
    try:
        return jax.tree.map(lambda r, c: jnp.broadcast_to(jnp.asarray(r, c.dtype), c.shape), row, cond)
    except ValueError as error:
        shapes = [jax.tree.map(jnp.shape, row), jax.tree.map(lambda c: jnp.shape(c)[1:], cond)]
        raise ValueError(f"{name}: expected null of shape {shapes[1]}, one row of cond, got {shapes[0]}") from error


def sample_source(base, params, key, n: int, cond: Cond) -> Array:
    """n draws of a flow's base, in the type of the flow's params: those of a base without params have JAX's default type."""
    z = base.sample(params["base"], key, n, cond)
    leaves = jax.tree.leaves(params)
    return z.astype(jnp.result_type(*leaves)) if leaves else z


def split_key(key, n: int):
    """n keys, or n times None: deterministic stays deterministic."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def space_to_depth(name: str, x: Array, rows: int, columns: int) -> Array:
    """[b, H, W, C] -> [b, H / rows, W / columns, rows columns C], blocks of pixels as channels; ValueError, in the name
    of the caller, where they don't divide."""
    if x.ndim != 4 or x.shape[1] % rows or x.shape[2] % columns:
        raise ValueError(
            f"{name}: expected an image [b, H, W, C] with H divisible by {rows} and W by {columns}, "
            f"got x of shape {list(x.shape)}"
        )
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // rows, rows, w // columns, columns, c)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // rows, w // columns, rows * columns * c)


def init_linen(module, key, x: PyTree, *args) -> PyTree:
    """The 'params' of a Linen module as a plain dict, in x's precision (float32 at least)."""
    variables = dict(module.init(key, x, *args))
    params = variables.pop("params", {})
    if variables:
        raise ValueError(
            f"{type(module).__name__} keeps the collections {sorted(variables)}; jflow networks have 'params' alone: "
            "running statistics go into frozen['buffers'] with an explicit update"
        )
    dtype = float_dtype(*jax.tree.leaves(x))
    return jax.tree.map(lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)


def apply_linen(module, params, *args, key=None, method=None):
    """Apply a Linen module (or one of its methods); a key becomes its 'dropout' stream, without one it runs
    deterministically."""
    try:
        return module.apply({"params": params}, *args, rngs=None if key is None else {"dropout": key}, method=method)
    except (flax.errors.ScopeParamShapeError, flax.errors.ScopeParamNotFoundError) as error:
        shapes = [list(jnp.shape(leaf)) for leaf in jax.tree.leaves(args)]
        raise ValueError(
            f"{type(module).__name__}: inputs of shapes {shapes} do not fit its params: {str(error).split(' (https')[0]}"
        ) from None
