"""Combinators: bijectors from bijectors."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow._util import apply_linen, check_side, float_dtype, init_linen, split_key, zero_log_det
from jflow.types import Array, Bijector, Cond, Key, Params, PyTree, Transport

__all__ = ["chain", "conditioned", "indicated", "invert", "on_part", "rebuild_error", "scan"]


def chain(*layers: Bijector) -> Bijector:
    """One map after another, the source side first: forward applies layers[0], then layers[1] ... Params {'0', '1', ...}."""
    kind = _kind(layers)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        params = {}
        order = range(len(layers)) if side == "source" else reversed(range(len(layers)))
        for i, key_i in zip(order, jax.random.split(key, len(layers) or 1), strict=False):
            params[str(i)] = layers[i].init(key_i, x, cond, side=side)
            x, _ = _towards(side, layers[i])(params[str(i)], x, cond, key=jax.random.fold_in(key_i, 1))
        return {str(i): params[str(i)] for i in range(len(layers))}

    def forward(params, z, cond=None, *, key=None):
        x, log_det, keys = z, zero_log_det(z), split_key(key, len(layers))
        for i, layer in enumerate(layers):
            x, contribution = layer.forward(params[str(i)], x, cond, key=keys[i])
            log_det += contribution
        return x, log_det

    def inverse(params, x, cond=None, *, key=None):
        z, log_det, keys = x, zero_log_det(x), split_key(key, len(layers))
        for i, layer in reversed(list(enumerate(layers))):
            z, contribution = layer.inverse(params[str(i)], z, cond, key=keys[i])
            log_det += contribution
        return z, log_det

    return kind(init, forward, inverse)


def invert(bijector: Bijector) -> Bijector:
    """Forward and inverse exchanged, and with them the side from which `init` looks."""

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        return bijector.init(key, x, cond, side="source" if side == "data" else "data")

    return type(bijector)(init, bijector.inverse, bijector.forward)


def on_part(bijector: Bijector, part: slice) -> Bijector:
    """`bijector` on x[..., part], a contiguous slice of the last axis; the rest passes. Params are the bijector's own.

    The bijector must keep the shape of its part. Multi-scale flows are made of it: on_part(chain(squeeze(), ...,
    invert(squeeze())), slice(0, kept)) goes on with the first channels and leaves the others as they are, in arrays of
    one shape throughout (instead of factoring them out; Dinh, Sohl-Dickstein, Bengio, *Real NVP* (2016)).
    """
    if not isinstance(part, slice) or part.step not in (None, 1):
        raise TypeError(f"on_part: expected part to be a slice without a step, got {part!r}")

    def bounds(x):
        start, stop, _ = part.indices(x.shape[-1])
        given = [0 if part.start is None else part.start, stop if part.stop is None else part.stop]
        if x.ndim < 2 or not start < stop or max(given) > x.shape[-1] or min(given) < -x.shape[-1]:
            raise ValueError(f"on_part: expected x [b, ..., d] whose last axis holds {part}, got {list(x.shape)}")
        return start, stop

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        start, stop = bounds(x)
        return bijector.init(key, x[..., start:stop], cond, side=side)

    def apply(inner, params, x, cond=None, *, key=None):
        start, stop = bounds(x)
        y, log_det = inner(params, x[..., start:stop], cond, key=key)
        if y.shape != (*x.shape[:-1], stop - start):
            raise ValueError(
                f"on_part: expected the map to keep the shape {[*x.shape[:-1], stop - start]}, got {list(y.shape)}"
            )
        return jnp.concatenate([x[..., :start], y.astype(x.dtype), x[..., stop:]], axis=-1), log_det

    return type(bijector)(init, partial(apply, bijector.forward), partial(apply, bijector.inverse))


def conditioned(bijector: Bijector, embed: nn.Module) -> Bijector:
    """`bijector` conditioned on embed(cond): a Linen module, such as nn.Embed(10, 16) for labels. Params {'embed',
    'bijector'}. The embedding is computed once, outside any scan in `bijector`."""

    def check(cond):
        if cond is None:
            raise ValueError(f"conditioned: expected cond for {type(embed).__name__}, got None")

    def init(key, x, cond=None, *, side="data"):
        check(cond)
        key_embed, key_bijector = jax.random.split(key)
        params = jax.tree.map(lambda p: p.astype(float_dtype(x)), init_linen(embed, key_embed, cond))
        inner = bijector.init(key_bijector, x, apply_linen(embed, params, cond), side=side)
        return {"embed": params, "bijector": inner}

    def apply(inner, params, x, cond=None, *, key=None):
        check(cond)
        key_embed, key_inner = split_key(key, 2)
        return inner(params["bijector"], x, apply_linen(embed, params["embed"], cond, key=key_embed), key=key_inner)

    return type(bijector)(init, partial(apply, bijector.forward), partial(apply, bijector.inverse))


def indicated(bijector: Bijector, size: int) -> Bijector:
    """`bijector` told which layer it is, by an embedding [size] of its own beside cond: cond becomes the embedding, or the
    pair (cond, embedding).

    Params are the bijector's own and 'indicator', side by side, so that a scan can share the others:
    scan(indicated(coupling(...), 8), depth, shared=('net',)) has one network for all layers, and for each an embedding
    and a head. Lee, Kim, Yoon, *NanoFlow* (2020).
    """
    if size < 1:
        raise ValueError(f"indicated: expected size >= 1, got {size}")

    def tell(indicator, x, cond):
        row = jnp.broadcast_to(indicator.astype(float_dtype(x))[None], (x.shape[0], size))
        return row if cond is None else (cond, row)

    def init(key, x, cond=None, *, side="data"):
        key_indicator, key_bijector = jax.random.split(key)
        indicator = jax.random.normal(key_indicator, (size,), float_dtype(x))
        params = bijector.init(key_bijector, x, tell(indicator, x, cond), side=side)
        if "indicator" in params:
            raise ValueError("indicated: the bijector has params of the name 'indicator' already")
        return {**params, "indicator": indicator}

    def apply(inner, params, x, cond=None, *, key=None):
        return inner(params, x, tell(params["indicator"], x, cond), key=key)

    return type(bijector)(init, partial(apply, bijector.forward), partial(apply, bijector.inverse))


def scan(
    layer: Bijector | Callable[[PyTree], Bijector],
    depth: int,
    *,
    xs: PyTree = None,
    shared: Sequence[str] = (),
    remat: bool = False,
    reversible: bool | int = False,
    unroll: int = 1,
) -> Bijector:
    """`depth` layers of one form, traced once: compile time is flat in depth.

    Args:
        layer: a bijector, or `xs_i -> bijector` for layers that differ by constants (masks, permutations).
        xs: arrays that lead with `depth`; constants, not differentiated.
        shared: names in the layer's params that all layers share.
        remat: recompute activations in the backward pass (memory grows by one x per layer).
        reversible: rebuild activations in the backward pass by inverting the layers: activation memory is flat in depth.
            An integer k keeps every k-th activation besides (depth must be a multiple of k), which bounds the rebuild
            error; see `rebuild_error`. At a kink (a ReLU's, or where the log-slope of a spline bends at a knot) a rebuilt
            activation may lie on the other side than plain autodiff's. Reverse-mode differentiation only. Gomez et al.,
            *The Reversible Residual Network* (2017).
        unroll: as in jax.lax.scan.

    Params {'stacked': leaves lead with depth, 'shared'}.
    """
    if depth < 1:
        raise ValueError(f"scan: expected depth >= 1, got {depth}")
    segment = depth if isinstance(reversible, bool) else reversible
    if segment < 1 or depth % segment:
        raise ValueError(f"scan: expected reversible=k to divide depth={depth}, got {reversible}")
    if remat and reversible:
        raise ValueError("scan: remat and reversible both save memory; choose one")
    for leaf in jax.tree.leaves(xs):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != depth:
            raise ValueError(f"scan: expected the leaves of xs to lead with depth={depth}, got {list(np.shape(leaf))}")
    make = layer if callable(layer) else lambda _: layer
    kind = _kind([make(jax.tree.map(lambda leaf: leaf[0], xs))])
    if reversible and kind is Transport:
        raise ValueError("scan: a Transport cannot be inverted exactly; reversible needs bijectors")

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        backwards = side == "data"
        keys = jax.random.split(key, depth)
        common = {}
        if shared:
            i = depth - 1 if backwards else 0
            params = make(jax.tree.map(lambda leaf: leaf[i], xs)).init(keys[i], x, cond, side=side)
            if missing := sorted(set(shared) - set(params)):
                raise ValueError(f"scan: the layer has no params {missing} to share; it has {sorted(params)}")
            common = {name: params[name] for name in shared}

        def body(x, inputs):
            key_i, xs_i = inputs
            bijector = make(xs_i)
            params = {**bijector.init(key_i, x, cond, side=side), **common}
            y, _ = _towards(side, bijector)(params, x, cond, key=jax.random.fold_in(key_i, 1))
            return y.astype(x.dtype), {name: p for name, p in params.items() if name not in shared}

        _, stacked = jax.lax.scan(body, x, (keys, xs), reverse=backwards)
        return {"shared": common, "stacked": stacked}

    def run(direction, params, x, cond=None, *, key=None):
        back = "inverse" if direction == "forward" else "forward"

        def layer_in(direction, p, common, x, cond, inputs):
            xs_i, key_i = inputs
            y, log_det = getattr(make(xs_i), direction)({**p, **common}, x, cond, key=key_i)
            return y.astype(x.dtype), log_det.astype(float_dtype(x))

        apply, undo = partial(layer_in, direction), partial(layer_in, back)
        inputs = (xs, None if key is None else jax.random.split(key, depth))
        args = (params["stacked"], params["shared"], x, cond, inputs)
        backwards = direction == "inverse"
        if not reversible:
            return _plain_scan(apply, *args, reverse=backwards, unroll=unroll, remat=remat, length=depth)
        return _reversible_scan(apply, undo, *args, reverse=backwards, unroll=unroll, segment=segment, length=depth)

    return kind(init, partial(run, "forward"), partial(run, "inverse"))


def rebuild_error(bijector: Bijector, params: Params, z: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
    """max |inverse(forward(z)) - z|: what a reversible scan's backward pass adds to the activations it differentiates at."""
    x, _ = bijector.forward(params, z, cond, key=key)
    return jnp.max(jnp.abs(bijector.inverse(params, x, cond, key=key)[0] - z))


def _kind(layers) -> type:
    return Transport if any(isinstance(layer, Transport) for layer in layers) else Bijector


def _towards(side: str, layer: Bijector):
    """The map that leads away from `side`."""
    return layer.inverse if side == "data" else layer.forward


def _plain_scan(apply, stacked, common, x, cond, inputs, *, reverse, unroll, length, remat=False):
    def body(carry, layer):
        x, log_det = carry
        p, inputs_i = layer
        x, contribution = apply(p, common, x, cond, inputs_i)
        return (x, log_det + contribution), None

    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    carry, _ = jax.lax.scan(
        body, (x, zero_log_det(x)), (stacked, inputs), reverse=reverse, unroll=min(unroll, length), length=length
    )
    return carry


def _reversible_scan(apply, undo, stacked, common, x, cond, inputs, *, reverse, unroll, segment, length):
    """`_plain_scan` whose backward pass rebuilds each layer's input from its output, segment by segment."""

    def one_segment(stacked, common, x, cond, inputs):
        return _plain_scan(apply, stacked, common, x, cond, inputs, reverse=reverse, unroll=unroll, length=segment)

    def save(stacked, common, x, cond, inputs):
        y, log_det = one_segment(stacked, common, x, cond, inputs)
        return (y, log_det), (stacked, common, y, cond, inputs)

    def walk_back(saved, cotangents):
        stacked, common, y, cond, inputs = saved
        y_bar, log_det_bar = cotangents
        cond_leaves, cond_tree = jax.tree.flatten(cond)
        smooth = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in cond_leaves]
        cond_float = [leaf for leaf, s in zip(cond_leaves, smooth, strict=True) if s]

        def with_floats(floats):
            floats = iter(floats)
            return cond_tree.unflatten(next(floats) if s else leaf for leaf, s in zip(cond_leaves, smooth, strict=True))

        def body(carry, layer):
            y, y_bar, common_bar, cond_bar = carry
            p, inputs_i = layer
            x, _ = undo(p, common, y, cond, inputs_i)
            _, pull = jax.vjp(lambda p, c, x, f: apply(p, c, x, with_floats(f), inputs_i), p, common, x, cond_float)
            p_bar, common_i, x_bar, cond_i = pull((y_bar, log_det_bar))
            add = partial(jax.tree.map, jnp.add)
            return (x, x_bar, add(common_bar, common_i), add(cond_bar, cond_i)), p_bar

        zeros = partial(jax.tree.map, jnp.zeros_like)
        carry = (y, y_bar, zeros(common), zeros(cond_float))
        carry, stacked_bar = jax.lax.scan(body, carry, (stacked, inputs), reverse=not reverse, length=segment)
        _, x_bar, common_bar, cond_bar = carry
        cond_bar = iter(cond_bar)
        cond_bar = cond_tree.unflatten(
            next(cond_bar) if s else _no_cotangent(leaf) for leaf, s in zip(cond_leaves, smooth, strict=True)
        )
        return stacked_bar, common_bar, x_bar, cond_bar, jax.tree.map(_no_cotangent, inputs)

    rebuild = jax.custom_vjp(one_segment)
    rebuild.defvjp(save, walk_back)
    cond = jax.tree.map(jnp.asarray, cond)
    inputs = jax.tree.map(jnp.asarray, inputs)
    if segment == length:
        return rebuild(stacked, common, x, cond, inputs)
    fold = partial(jax.tree.map, lambda leaf: leaf.reshape(length // segment, segment, *leaf.shape[1:]))

    def body(carry, layers):
        x, log_det = carry
        stacked, inputs = layers
        x, contribution = rebuild(stacked, common, x, cond, inputs)
        return (x, log_det + contribution), None

    carry, _ = jax.lax.scan(body, (x, zero_log_det(x)), (fold(stacked), fold(inputs)), reverse=reverse)
    return carry


def _no_cotangent(leaf: Array):
    """Constants (masks, permutations, keys, labels) are not differentiated."""
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)
