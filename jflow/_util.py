"""Helpers that every room of the library shares."""

import inspect
import math
import operator
from collections.abc import Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow.types import Array, Bijector, Cond, ElboFlow, Flow, PyTree, Transport, Velocity


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
    """The type in which log-dets and densities accumulate: that of the arrays, float32 at least. Types are joined here on
    purpose, which JAX's strict promotion of types leaves to the caller."""
    with jax.numpy_dtype_promotion("standard"):
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
    """Along `axis`, in float32 at least; std is 1 where x does not vary by more than its rounding. Sums and squares neither
    overflow nor vanish: they are taken of x over a power of two near its largest number, which is exact."""
    x = x.astype(float_dtype(x))
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    power = jnp.where(largest > 0, largest / (4 * jnp.frexp(largest)[0]), 1.0)  # 4: 1 / power is not subnormal either
    power = jnp.maximum(power, jnp.finfo(x.dtype).tiny)
    scaled, power = x / power, jnp.squeeze(power, axis)
    varies = jnp.ptp(scaled, axis=axis) > 1e-6 * jnp.max(jnp.abs(scaled), axis=axis)
    return power * jnp.mean(scaled, axis=axis), jnp.where(varies, power * jnp.std(scaled, axis=axis), 1.0)


def numpy_mean_and_std(x: np.ndarray, axis) -> tuple[np.ndarray, np.ndarray]:
    """Along `axis`, which is kept with length 1, in numpy's float64. Sums and squares neither overflow nor vanish: they are
    taken of x over the power of two above its largest number, which is exact."""
    x = np.asarray(x, np.float64)
    power = np.frexp(np.abs(x).max(axis, keepdims=True))[1]
    scaled = np.ldexp(x, -power)
    mean, std = scaled.mean(axis, keepdims=True), scaled.std(axis, keepdims=True)
    return np.ldexp(mean, power), np.ldexp(std, power)


def zero_log_det(x: Array) -> Array:
    """[b] zeros made from x, so that they vary over a mesh axis whenever x does."""
    return jnp.zeros_like(x, shape=x.shape[:1], dtype=float_dtype(x))


def check_event(name: str, x: Array, event_shape: tuple[int, ...]) -> None:
    """Raise unless x is [b, *event_shape]."""
    shape = jnp.shape(x)
    if not shape or shape[1:] != tuple(event_shape):
        expected = ", ".join(["b", *map(str, event_shape)])
        hint = ": one x wants a batch axis too, x[None]" if shape == tuple(event_shape) else ""
        raise ValueError(f"{name}: expected x of shape [{expected}], got {list(shape)}{hint}")


def check_channels(name: str, x: Array, channels: int) -> None:
    """Raise unless x is [b, ..., channels]."""
    shape = jnp.shape(x)
    if len(shape) < 2 or shape[-1] != channels:
        hint = ": one x wants a batch axis too, x[None]" if shape == (channels,) else ""
        raise ValueError(f"{name}: expected x of shape [b, ..., {channels}], got {list(shape)}{hint}")


def check_side(side: str) -> None:
    """Raise unless `side` names a side of a bijector."""
    if side not in ("data", "source"):
        raise ValueError(f"init: expected side 'data' or 'source', got {side!r}")


def no_params(key, x: Array, cond: Cond = None, *, side: str = "data") -> dict:
    """The `init` of a bijector without parameters."""
    check_side(side)
    return {}


def check_cond(name: str, cond: Cond, n: int) -> Cond:
    """cond with n rows in every leaf, a single row repeated; raise where a leaf has another number of them."""

    def repeated(path, leaf):
        shape = jnp.shape(leaf)
        if shape[:1] == (n,):
            return leaf
        if shape[:1] == (1,):
            return jnp.broadcast_to(leaf, (n, *shape[1:]))
        hint = "a row for each x, or a single one for all" if shape else f"one label for all is jnp.full(({n},), label)"
        where = "cond" + jax.tree_util.keystr(path)
        raise ValueError(f"{name}: expected {where} to lead with {n} rows, got shape {list(shape)}: {hint}")

    return jax.tree_util.tree_map_with_path(repeated, cond)


def check_draws(name: str, key, n: int, cond: Cond) -> tuple[int, Cond]:
    """n as a Python int and cond with n rows, a single one repeated; raise for n < 1, another number of rows, no key."""
    check_key(name, key)
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"{name}: expected n to be a static int, got {described(n)}") from None
    if n < 1:
        raise ValueError(f"{name}: expected n >= 1, got {n}")
    return n, check_cond(name, cond, n)


def count_rows(name: str, x: PyTree) -> int:
    """b of the arrays [b, *event] in x; raise where one has no batch axis, or another b."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        given = " and ".join(str(list(shape)) for shape in shapes) or "no array"
        raise ValueError(f"{name}: expected x of shape [b, *event], got {given}")
    return shapes[0][0]


def check_rows(name: str, what: str, value: Array, n: int) -> Array:
    """`value`, a number for each of n rows; raise where its shape is another, which would broadcast in silence."""
    if jnp.shape(value) != (n,):
        raise ValueError(
            f"{name}: expected {what} of shape [{n}], got {list(jnp.shape(value))}: a number for each row, summed over the "
            "event"
        )
    return value


def check_key(name: str, key) -> None:
    """Raise unless key is a jax.random.key, or one of the old kind, jax.random.PRNGKey."""
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    if shape == () and jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32 and len(shape) == 1:
        return
    raise TypeError(f"{name}: expected key to be one jax.random.key(seed), got {described(key)}")


def check_params(name: str, params, *parts: str) -> None:
    """Raise unless params is a dict with these parts."""
    if not isinstance(params, Mapping):
        raise TypeError(f"{name}: expected params, a dict with {list(parts)}, got {described(params)}")
    if missing := [part for part in parts if part not in params]:
        raise ValueError(f"{name}: expected params with {list(parts)}, got {sorted(params)} without {missing}")


def check_batch(name: str, batch) -> None:
    """Raise unless the batch is a dict."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"{name}: expected the batch to be a dict such as {{'x': data}}, got {described(batch)}")


def check_x(name: str, batch) -> None:
    """Raise unless the batch is a dict with data [b, *event] under 'x'."""
    check_batch(name, batch)
    if batch.get("x") is None:
        raise ValueError(f"{name}: expected the data under 'x' in batch, got the keys {sorted(batch)}")
    if jnp.ndim(batch["x"]) == 0:
        raise ValueError(f"{name}: expected 'x' of shape [b, *event], got a scalar")


def check_noun(name: str, value, *nouns: type) -> None:
    """Raise unless `value` is one of these nouns, saying what makes one where that is known."""
    if isinstance(value, nouns):
        return
    hint = ""
    if isinstance(value, nn.Module) and Velocity in nouns:
        hint = ": jflow.velocity(module) makes one"
    elif isinstance(value, type) or inspect.isfunction(value):
        hint = ": give what a call of it returns"
    elif isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        hint = ": give them one by one, *layers"
    elif isinstance(value, Flow) and Bijector in nouns:
        hint = ": give the map that it was made of, without the base"
    elif isinstance(value, Bijector) and Flow in nouns:
        hint = ": flows.flow(bijector, base) makes a Flow"
    elif isinstance(value, Transport) and Bijector in nouns:
        hint = ": elbo_flow takes one"
    elif isinstance(value, ElboFlow) and Flow in nouns:
        hint = ", which has a bound for log_prob: see losses.negative_elbo"
    allowed = " or ".join(_article(noun.__name__) for noun in nouns)
    raise TypeError(f"{name}: expected {allowed}, got {described(value)}{hint}")


def check_linen(name: str, what: str, module) -> None:
    """Raise unless `module` is an instance of flax.linen.Module."""
    if isinstance(module, nn.Module):
        return
    kind = module if isinstance(module, type) else type(module)
    if kind is module and issubclass(kind, nn.Module):
        hint = f"make an instance, {kind.__name__}(...)"
    elif kind.__module__.startswith("flax.nnx") or any(c.__module__.startswith("flax.nnx") for c in kind.__mro__):
        hint = "it is a flax.nnx module, whose params live inside: write it as a flax.linen.Module"
    elif what == "module":
        hint = "what is no network is made of its two functions: jflow.types.Velocity(init, apply)"
    else:
        hint = "functions without params and modules of other libraries go inside one"
    raise TypeError(f"{name}: expected {what} to be an instance of flax.linen.Module, got {described(module)}: {hint}")


def described(value) -> str:
    """What a value is, in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isfunction(value):
        return f"the function {value.__name__}"
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"a key of shape {list(value.shape)}" if value.ndim else "a key"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return _article(type(value).__name__)


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'AEIOaeio' else 'a'} {word}"


def check_whole(name: str, least: int = 1, **values: int) -> None:
    """Raise for a value, by its name, that is not a whole number of at least `least`."""
    for what, value in values.items():
        try:
            whole = not isinstance(value, bool) and operator.index(value) >= least
        except TypeError:
            whole = False
        if not whole:
            raise ValueError(
                f"{name}: expected {what} to be a whole number of at least {least}, got {described(value)}"
            )


def check_raw(name: str, x: Array, raw: Array, size: int) -> tuple[Array, Array]:
    """x [...] and raw [..., size] in float32 at least; raise unless the shapes fit."""
    if jnp.shape(raw) != (*jnp.shape(x), size):
        raise ValueError(f"{name}: expected raw of shape {[*jnp.shape(x), size]}, got {list(jnp.shape(raw))}")
    dtype = float_dtype(x, raw)
    return jnp.asarray(x, dtype), jnp.asarray(raw, dtype)


def need_key(name: str, key) -> None:
    """Raise when a stochastic function was called without a key, or with something else."""
    if key is None:
        raise ValueError(f"{name} is stochastic: it needs a key (jax.random.key), got None")
    check_key(name, key)


def like_rows(name: str, row: PyTree, cond: Cond) -> Cond:
    """`row`, one row of cond without the batch axis, repeated into the shapes and types of cond."""
    given, expected = jax.tree.structure(row), jax.tree.structure(cond)
    if given != expected:
        raise ValueError(f"{name}: expected null to be one row of cond, {expected}, got {given}")
    row = jax.tree.map(lambda r, c: _as_type(name, r, c.dtype), row, cond)
    try:
        return jax.tree.map(lambda r, c: jnp.broadcast_to(r, c.shape), row, cond)
    except ValueError as error:
        shapes = [jax.tree.map(jnp.shape, row), jax.tree.map(lambda c: jnp.shape(c)[1:], cond)]
        raise ValueError(f"{name}: expected null of shape {shapes[1]}, one row of cond, got {shapes[0]}") from error


def _as_type(name: str, null, dtype) -> Array:
    """`null` in the type of cond; ValueError where that is labels or truth values and `null` is none of them."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(null, dtype)
    truth = jnp.issubdtype(dtype, jnp.bool_)
    if isinstance(null, jax.core.Tracer):  # its values are not known
        same = jnp.issubdtype(null.dtype, jnp.bool_ if truth else jnp.integer)
    else:
        null = np.asarray(null)
        same = null.dtype.kind == "b" if truth else null.dtype.kind not in "bOSU" and np.all(null == np.round(null))
        same = same and (truth or np.all((null >= 0) & (null <= jnp.iinfo(dtype).max)))
    if not same:
        kind = "truth values" if truth else f"labels ({dtype}, 0 or more)"
        given = repr(null.tolist()) if isinstance(null, np.ndarray) and null.size < 9 else described(null)
        raise ValueError(f"{name}: expected null to be a row of cond, which holds {kind}, got {given}")
    return jnp.asarray(null.astype(dtype))


def sample_source(base, params, key, n: int, cond: Cond) -> Array:
    """n draws of a flow's base, in the type of the flow's params: those of a base without params have JAX's default type."""
    z = base.sample(params["base"], key, n, cond)
    leaves = jax.tree.leaves(params)
    return z.astype(jnp.result_type(*leaves)) if leaves else z


def base_log_prob(name: str, base, params, z: Array, cond: Cond, key) -> Array:
    """[b] nats: the log-density of a flow's base at z; raise where the params have none, or it is not a number a row."""
    check_params(name, params, "base")
    log_prob = base.log_prob(params["base"], z, cond, key=key)
    return check_rows(name, "the base's log_prob", log_prob, z.shape[0])


def split_key(key, n: int):
    """n keys, or n times None: deterministic stays deterministic."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def same_draws(key):
    """The key for one more use that is meant to draw the same numbers: a network evaluated again under the same dropout.
    None stays None."""
    return None if key is None else jax.random.clone(key)


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
    check_key(f"init of {type(module).__name__}", key)
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
    except flax.errors.ApplyScopeInvalidVariablesStructureError:
        raise ValueError(
            f"{type(module).__name__}: expected params, got a dict that holds them under 'params': give what is inside"
        ) from None
    except (flax.errors.ScopeParamShapeError, flax.errors.ScopeParamNotFoundError) as error:
        shapes = [list(jnp.shape(leaf)) for leaf in jax.tree.leaves(args)]
        raise ValueError(
            f"{type(module).__name__}: inputs of shapes {shapes} do not fit its params: "
            f"{str(error).split(' (https')[0].rstrip('.')}{_likely_cause(module, args)}"
        ) from None


def _likely_cause(module, args) -> str:
    """What to look at where a module's params are for other inputs: its cond, and the batch axis of x."""
    names = list(inspect.signature(type(module).__call__).parameters)[1:]
    if "cond" not in names:
        return ""
    given = dict(zip(names, args, strict=False)).get("cond") is not None
    return f"; is x [b, *event] as at `init`, and {'had that such a cond' if given else 'should there be a cond'}?"
