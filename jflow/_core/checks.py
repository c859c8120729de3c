"""Checks of what users give: they raise with what was expected and what came, or return it in its
final form."""

import inspect
import math
import operator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.arrays import float_dtype
from jflow.types import (
    Array,
    Bijector,
    Cond,
    Condition,
    ElboFlow,
    Flow,
    FlowMap,
    Key,
    Params,
    PyTree,
    Transport,
    Velocity,
)


def sizes(event_shape: Any) -> tuple[int, ...]:
    """An event_shape in its final form; TypeError for what has no sizes, such as 3 for (3,)."""
    try:
        return tuple(operator.index(size) for size in event_shape)
    except TypeError as error:
        raise TypeError(f"expected an event_shape such as (3,), got {event_shape!r}") from error


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
        raise ValueError(
            f"{name}: expected x of shape [b, ..., {channels}], got {list(shape)}{hint}"
        )


def check_side(side: str) -> None:
    """Raise unless `side` names a side of a bijector."""
    if side not in ("data", "source"):
        raise ValueError(f"init: expected side 'data' or 'source', got {side!r}")


def check_cond(name: str, cond: Cond, n: int) -> Cond:
    """cond with n rows in every leaf, a single row repeated; raise where a leaf has another number
    of them."""

    def repeated(path, leaf):
        shape = jnp.shape(leaf)
        if shape[:1] == (n,):
            return leaf
        if shape[:1] == (1,):
            return jnp.broadcast_to(leaf, (n, *shape[1:]))
        hint = (
            "a row for each x, or a single one for all"
            if shape
            else f"one label for all is jnp.full(({n},), label)"
        )
        where = "cond" + jax.tree_util.keystr(path)
        raise ValueError(
            f"{name}: expected {where} to lead with {n} rows, got shape {list(shape)}: {hint}"
        )

    return jax.tree_util.tree_map_with_path(repeated, cond)


def check_draws(name: str, key, n: int, cond: Cond) -> tuple[int, Cond]:
    """n as a Python int and cond with n rows, a single one repeated; raise for n < 1, another
    number of rows, no key."""
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
    """`value`, a number for each of n rows; raise where its shape is another, which would broadcast
    in silence."""
    if jnp.shape(value) != (n,):
        raise ValueError(
            f"{name}: expected {what} of shape [{n}], got {list(jnp.shape(value))}: a number for"
            " each row, summed over the event"
        )
    return value


def check_key(name: str, key) -> None:
    """Raise unless key is a jax.random.key, or one of the old kind, jax.random.PRNGKey."""
    shape: Any = getattr(key, "shape", None)
    dtype: Any = getattr(key, "dtype", None)
    if (
        shape == ()
        and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        or dtype == jnp.uint32
        and len(shape) == 1
    ):
        return
    raise TypeError(f"{name}: expected key to be one jax.random.key(seed), got {described(key)}")


def check_params(name: str, params, *parts: str) -> None:
    """Raise unless params is a dict with these parts."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"{name}: expected params, a dict with {list(parts)}, got {described(params)}"
        )
    if missing := [part for part in parts if part not in params]:
        raise ValueError(
            f"{name}: expected params with {list(parts)}, got {sorted(params)} without {missing}"
        )


def check_batch(name: str, batch) -> None:
    """Raise unless the batch is a dict."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"{name}: expected the batch to be a dict such as {{'x': data}}, got {described(batch)}"
        )


def need_x(name: str, batch) -> None:
    """Raise unless the batch is a dict that has an 'x'."""
    check_batch(name, batch)
    if batch.get("x") is None:
        raise ValueError(
            f"{name}: expected the data under 'x' in batch, got the keys {sorted(batch)}"
        )


def check_x(name: str, batch) -> None:
    """Raise unless the batch is a dict with data [b, *event] under 'x'."""
    need_x(name, batch)
    if isinstance(batch["x"], Mapping):
        raise ValueError(
            f"{name}: expected 'x' to be an array [b, *event], got the parts {sorted(batch['x'])}:"
            " losses.flow_matching and losses.joint_matching take parts"
        )
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


def signature(function) -> inspect.Signature | None:
    """The arguments of a function; None where Python does not know them."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def accepts(function, n: int) -> bool:
    """Whether a call with n arguments by position fits, as far as is known."""
    known = signature(function)
    if known is None:
        return True
    try:
        known.bind(*range(n))
    except TypeError:
        return False
    return True


def check_whole(name: str, least: int = 1, **values: int) -> None:
    """Raise for a value, by its name, that is not a whole number of at least `least`."""
    for what, value in values.items():
        try:
            whole = not isinstance(value, bool) and operator.index(value) >= least
        except TypeError:
            whole = False
        if not whole:
            raise ValueError(
                f"{name}: expected {what} to be a whole number of at least {least}, got"
                f" {described(value)}"
            )


def check_raw(name: str, x: Array, raw: Array, size: int) -> tuple[Array, Array]:
    """x [...] and raw [..., size] in float32 at least; raise unless the shapes fit."""
    if jnp.shape(raw) != (*jnp.shape(x), size):
        raise ValueError(
            f"{name}: expected raw of shape {[*jnp.shape(x), size]}, got {list(jnp.shape(raw))}"
        )
    dtype = float_dtype(x, raw)
    return jnp.asarray(x, dtype), jnp.asarray(raw, dtype)


def need_key(name: str, key: Key | None) -> Key:
    """key; raise when a stochastic function was called without a key, or with something else."""
    if key is None:
        raise ValueError(f"{name} is stochastic: it needs a key (jax.random.key), got None")
    check_key(name, key)
    return key


def like_rows(name: str, row: PyTree, cond: Cond) -> Cond:
    """`row`, one row of cond without the batch axis, repeated into the shapes and types of cond.

    Where both are a `Condition`, a part that the row does not have stays that of cond.
    """
    if isinstance(row, Condition) and isinstance(cond, Condition):
        parts = [part for part, value in row._asdict().items() if value is not None]
        have = [part for part, value in cond._asdict().items() if value is not None]
        if not parts or not set(parts) <= set(have):
            raise ValueError(
                f"{name}: expected null to have parts of cond, among {have}, got {parts}"
            )
        rows_of = [{part: getattr(c, part) for part in parts} for c in (row, cond)]
        return cond._replace(**like_rows(name, *rows_of))
    if isinstance(cond, Condition):
        raise ValueError(
            f"{name}: expected null to be a Condition as cond is, such as Condition(label=10), got"
            f" {described(row)}"
        )
    structures: list[Any] = [jax.tree.structure(tree) for tree in (row, cond)]
    given, expected = structures
    if given != expected:
        raise ValueError(f"{name}: expected null to be one row of cond, {expected}, got {given}")
    row = jax.tree.map(lambda r, c: _as_type(name, r, c.dtype), row, cond)
    try:
        return jax.tree.map(lambda r, c: jnp.broadcast_to(r, c.shape), row, cond)
    except ValueError as error:
        shapes = [jax.tree.map(jnp.shape, row), jax.tree.map(lambda c: jnp.shape(c)[1:], cond)]
        raise ValueError(
            f"{name}: expected null of shape {shapes[1]}, one row of cond, got {shapes[0]}"
        ) from error


def _as_type(name: str, null, dtype) -> Array:
    """`null` in the type of cond; ValueError where that is labels or truth values and `null` is
    none of them."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(null, dtype)
    truth = jnp.issubdtype(dtype, jnp.bool_)
    if isinstance(null, jax.core.Tracer):  # its values are not known
        same = jnp.issubdtype(null.dtype, jnp.bool_ if truth else jnp.integer)
    else:
        null = np.asarray(null)
        same = (
            null.dtype.kind == "b"
            if truth
            else null.dtype.kind not in "bOSU" and bool(np.all(null == np.round(null)))
        )
        same = same and (truth or bool(np.all((null >= 0) & (null <= jnp.iinfo(dtype).max))))
    if not same:
        kind = "truth values" if truth else f"labels ({dtype}, 0 or more)"
        given = (
            repr(null.tolist())
            if isinstance(null, np.ndarray) and null.size < 9
            else described(null)
        )
        raise ValueError(
            f"{name}: expected null to be a row of cond, which holds {kind}, got {given}"
        )
    return jnp.asarray(null.astype(dtype))


def check_state(name: str, v: PyTree, x: PyTree) -> PyTree:
    """v, after a check that it has x's structure and shapes."""
    given, expected = jax.tree.map(jnp.shape, v), jax.tree.map(jnp.shape, x)
    if given != expected:
        raise ValueError(
            f"{name}: expected a velocity shaped like x, {_text(expected)}, got {_text(given)}"
        )
    return v


def like_state(name: str, v: PyTree, x: PyTree) -> PyTree:
    """v in the types of x, after a check that it has x's structure and shapes."""
    v = check_state(name, v, x)
    return jax.tree.map(lambda v, x: v.astype(jnp.result_type(x)), v, x)


def times_of(name: str, t: PyTree, x: PyTree) -> PyTree:
    """t [n] from t [n] or a scalar; t [n, m], a time for each of m > 1 tokens, as it is; of parts
    of x, a dict, a dict of such times."""
    if not isinstance(t, Mapping):
        return rows_or_tokens(t, count_rows(name, x))
    n = count_rows(name, x)
    check_parts(name, "t", t, x)
    return {part: rows_or_tokens(t[part], n, f"t[{part!r}]") for part in x}


def check_parts(name: str, what: str, given: Mapping, x: PyTree) -> None:
    """Raise unless the dict `given` has the parts of x, which is one too."""
    if not isinstance(x, Mapping):
        raise ValueError(
            f"{name}: expected an array as {what}, as x is one, got the parts {sorted(given)}"
        )
    if set(given) != set(x):
        raise ValueError(
            f"{name}: expected {what} with the parts of x, {sorted(x)}, got {sorted(given)}"
        )


def rows_or_tokens(t: ArrayLike, n: int, what: str = "t") -> Array:
    """t [n] from t [n] or a scalar; t [n, m], a time for each of m > 1 tokens, as it is."""
    shape = jnp.shape(t)
    if len(shape) == 2 and shape[0] == n and shape[1] > 1:
        return jnp.asarray(t)
    return rows(t, n, what)


def rows(t: ArrayLike, n: int, what: str = "t") -> Array:
    """t [n] from t [n] or a scalar."""
    t = jnp.asarray(t)
    if t.shape not in ((), (n,)):
        raise ValueError(
            f"expected {what} of shape [{n}], one time a row of x, got {list(t.shape)}"
        )
    return jnp.broadcast_to(t, (n,))


def _text(shapes) -> str:
    """Shapes as lists, in their tree."""
    return str(jax.tree.map(list, shapes, is_leaf=lambda s: isinstance(s, tuple)))


def frozen_entry(name: str, frozen: Mapping[str, PyTree] | None, entry: str = "teacher") -> PyTree:
    """An entry of `frozen`, such as the params of a teacher, without a gradient.

    Args:
        name: The name of the loss, with which messages of errors begin.
        frozen: What a loss gets as `frozen`, a dict or None.
        entry: The key of the entry.

    Returns:
        frozen[entry], through which no gradient goes.

    Raises:
        ValueError: Where frozen has no such entry.

    Examples:
        >>> from jflow import losses
        >>> float(losses.frozen_entry("own", {"step": 3.0}, "step"))
        3.0
    """
    if frozen is None or frozen.get(entry) is None:
        got = "None" if frozen and entry in frozen else f"the entries {sorted(frozen or {})}"
        raise ValueError(f"{name}: expected {entry!r} in frozen, got {got}")
    return jax.lax.stop_gradient(frozen[entry])


def need_pairs(name: str, batch: Mapping[str, PyTree]) -> None:
    """ValueError, with the name of who needs them, where the batch has no 'x0' beside 'x'."""
    check_batch(name, batch)
    if batch.get("x0") is None:
        raise ValueError(f"{name}: expected pairs, 'x0' beside 'x', got the keys {sorted(batch)}")


def take_parts(name: str, params: Params, *wanted: str) -> list[Any]:
    """The params of these parts; ValueError, which names them, where one is missing."""
    check_params(name, params, *wanted)
    return [params[who] for who in wanted]


def check_flow_map(name: str, flow_map: FlowMap) -> None:
    """TypeError for a velocity where a flow map is due."""
    if isinstance(flow_map, Velocity):
        raise TypeError(
            f"{name}: expected a FlowMap, got a Velocity: make one by jflow.flow_map(net), or"
            " solvers.consistency_map"
        )


def with_checked_output(name: str, velocity: Velocity) -> Velocity:
    """velocity, whose output of another shape or type than x is an error in this name, or cast."""

    def apply(params, x, t, cond=None, *, key=None):
        return like_state(name, velocity.apply(params, x, t, cond, key=key), x)

    return Velocity(velocity.init, apply)


def check_same_shape(name: str, what: str, value: Array, like: Array) -> Array:
    """value; ValueError where its shape is not that of `like`: broadcasting would hide it."""
    if jnp.shape(value) != jnp.shape(like):
        raise ValueError(
            f"{name}: expected {what} of shape {list(jnp.shape(like))}, got"
            f" {list(jnp.shape(value))}"
        )
    return value


def check_weights(name: str, **weights: float) -> None:
    """Raise for a weight that is negative or not finite."""
    for what, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite {what} >= 0, got {value}")


def encode_noise(name, encoder, params, x, cond, key):
    """(mean, std) in float32 or better."""
    mean, std = encoder.apply(
        params, x, jnp.ones_like(x, shape=x.shape[:1], dtype=float_dtype(x)), cond, key=key
    )
    if mean.shape != x.shape or std.shape != x.shape:
        raise ValueError(
            f"{name}: expected an encoder that returns (mean, std) of shape {list(x.shape)}, "
            f"got {list(mean.shape)} and {list(std.shape)}"
        )
    return mean.astype(float_dtype(x)), std.astype(float_dtype(x))
