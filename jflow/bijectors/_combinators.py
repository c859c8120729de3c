"""Combinators: bijectors from bijectors."""

from functools import partial
from typing import TypeVar, overload

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype, zero_log_det
from jflow._core.checks import check_noun, check_rows, check_side, check_whole
from jflow._core.keys import split_key
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow.bijectors._pullbacks import add_cotangents, opposite, pullback_at, zero_cotangents
from jflow.types import Bijector, Transport

__all__ = ["chain", "conditioned", "indicated", "invert", "on_part"]


_Map = TypeVar("_Map", Bijector, Transport, Bijector | Transport)


@overload
def chain(*layers: Bijector) -> Bijector: ...  # type: ignore[overload-overlap]  # the other has a Transport among its layers
@overload
def chain(*layers: Bijector | Transport) -> Transport: ...
def chain(*layers: Bijector | Transport) -> Bijector | Transport:
    """Apply one map after another, the source side first.

    `forward` applies layers[0], then layers[1] and so on; `inverse` goes back. The log-dets add up.
    A key is split, a part for each layer; every layer gets the same cond.

    Also known as: composition, compose, sequence of layers.

    Args:
        *layers: the maps, `Bijector` or `Transport`.

    Returns:
        Bijector: the map, a `Transport` if one of the layers is one, with params
            {'0': those of layers[0], '1': ...}.

    Raises:
        TypeError: a layer is not a `Bijector` or a `Transport`.
        ValueError: a layer returns a log_det that is not [b].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijector = bijectors.chain(bijectors.reverse(), bijectors.tanh())
        >>> params = bijector.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> bijector.forward(params, jnp.array([[0.0, 100.0]]))[0].tolist()
        [[1.0, 0.0]]
    """
    kind = kind_of("chain", layers)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        params, n = {}, len(layers)
        order = range(n) if side == "source" else reversed(range(n))
        keys = split_key(key, 2 * n)
        for i, key_init, key_map in zip(order, keys[:n], keys[n:], strict=True):
            params[str(i)] = layers[i].init(key_init, x, cond, side=side)
            x, _ = towards(side, layers[i])(params[str(i)], x, cond, key=key_map)
        return {str(i): params[str(i)] for i in range(len(layers))}

    def forward(params, z, cond=None, *, key=None):
        x, log_det, keys = z, zero_log_det(z), split_key(key, len(layers))
        for i, layer in enumerate(layers):
            x, contribution = layer.forward(params[str(i)], x, cond, key=keys[i])
            log_det += check_rows("chain", f"log_det of layer {i}", contribution, z.shape[0])
        return x, log_det

    def inverse(params, x, cond=None, *, key=None):
        z, log_det, keys = x, zero_log_det(x), split_key(key, len(layers))
        for i, layer in reversed(list(enumerate(layers))):
            z, contribution = layer.inverse(params[str(i)], z, cond, key=keys[i])
            log_det += check_rows("chain", f"log_det of layer {i}", contribution, x.shape[0])
        return z, log_det

    def pullback(direction, params, y, cotangents, cond=None, *, key=None):
        """Layer by layer: to rebuild the input of the whole would run every layer once more."""
        y_bar, log_det_bar = cotangents
        keys, params_bar, cond_bar = split_key(key, len(layers)), {}, zero_cotangents(cond)
        order = range(len(layers)) if direction == "inverse" else reversed(range(len(layers)))
        for i in order:
            y, (params_bar[str(i)], y_bar, cond_i) = pullback_at(
                layers[i], direction, params[str(i)], y, (y_bar, log_det_bar), cond, key=keys[i]
            )
            cond_bar = add_cotangents(cond_bar, cond_i)
        return y, (params_bar, y_bar, cond_bar)

    return _make(kind, init, forward, inverse, pullback)


def invert(bijector: _Map) -> _Map:
    """Exchange forward and inverse, and with them the side from which `init` looks.

    Args:
        bijector: the `Bijector` or `Transport` to turn round.

    Returns:
        Bijector: a map of the same type; its params are those of `bijector`.

    Raises:
        TypeError: bijector is not a `Bijector` or a `Transport`.
        ValueError: the map returns a log_det that is not [b].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> logit = bijectors.invert(bijectors.sigmoid())
        >>> logit.forward({}, jnp.array([[0.5]]))[0].tolist()
        [[0.0]]
    """
    check_noun("invert", bijector, Bijector, Transport)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        return bijector.init(key, x, cond, side="source" if side == "data" else "data")

    def pullback(direction, params, y, cotangents, cond=None, *, key=None):
        return pullback_at(bijector, opposite(direction), params, y, cotangents, cond, key=key)

    return _make(
        type(bijector),
        init,
        _of_rows("invert", bijector.inverse),
        _of_rows("invert", bijector.forward),
        pullback,
    )


def on_part(bijector: _Map, part: slice) -> _Map:
    """Apply a map to x[..., part], a contiguous slice of the last axis; the rest passes.

    The output of the bijector has the shape of its part. Multi-scale flows are made of it:
    on_part(chain(squeeze(), ..., invert(squeeze())), slice(0, kept)) goes on with the first
    channels and leaves the others as they are. Ours: the arrays have one shape throughout, where
    the paper factors channels out.

    Args:
        bijector: the `Bijector` or `Transport` for the part.
        part: a slice of the last axis, without a step.

    Returns:
        Bijector: a map of the type of `bijector`; its params are those of `bijector`.

    Raises:
        TypeError: part is not a slice without a step, or bijector is not a `Bijector` or a
            `Transport`.
        ValueError: the last axis of x does not hold the part, or the map changes its shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijector = bijectors.on_part(bijectors.reverse(), slice(0, 2))
        >>> bijector.forward({}, jnp.array([[1.0, 2.0, 3.0]]))[0].tolist()
        [[2.0, 1.0, 3.0]]

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density Estimation Using Real NVP*, 2016, arXiv:1605.08803.
    """
    check_noun("on_part", bijector, Bijector, Transport)
    if not isinstance(part, slice) or part.step not in (None, 1):
        raise TypeError(f"on_part: expected part to be a slice without a step, got {part!r}")

    def bounds(x):
        start, stop, _ = part.indices(x.shape[-1])
        given = [0 if part.start is None else part.start, stop if part.stop is None else part.stop]
        if x.ndim < 2 or not start < stop or max(given) > x.shape[-1] or min(given) < -x.shape[-1]:
            raise ValueError(
                f"on_part: expected x [b, ..., d] whose last axis holds {part}, got {list(x.shape)}"
            )
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
                f"on_part: expected the map to keep the shape {[*x.shape[:-1], stop - start]}, got "
                f"{list(y.shape)}"
            )
        check_rows("on_part", "log_det", log_det, x.shape[0])
        return jnp.concatenate([x[..., :start], y.astype(x.dtype), x[..., stop:]], axis=-1), log_det

    return type(bijector)(init, partial(apply, bijector.forward), partial(apply, bijector.inverse))


def conditioned(bijector: _Map, embed: nn.Module) -> _Map:
    """Condition a map on embed(cond), where embed is a trained network.

    The embedding is computed once, outside any scan in `bijector`, and takes the place of cond.

    Args:
        bijector: the `Bijector` or `Transport` that takes the embedding as its cond.
        embed: a Linen module of cond, such as nn.Embed(10, 16) for labels.

    Returns:
        Bijector: a map of the type of `bijector`, with params {'embed', 'bijector'}.

    Raises:
        TypeError: embed is not a Linen module, or bijector is not a `Bijector` or a `Transport`.
        ValueError: there is no cond.

    Examples:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> inner = bijectors.amortized(bijectors.affine((2,)))
        >>> bijector = bijectors.conditioned(inner, nn.Embed(10, 4))
        >>> params = bijector.init(jax.random.key(0), jnp.ones((3, 2)), jnp.array([0, 1, 2]))
        >>> params["embed"]["embedding"].shape
        (10, 4)
    """
    check_noun("conditioned", bijector, Bijector, Transport)
    check_linen("conditioned", "embed", embed)

    def check(cond):
        if cond is None:
            raise ValueError(f"conditioned: expected cond for {type(embed).__name__}, got None")

    def init(key, x, cond=None, *, side="data"):
        check(cond)
        key_embed, key_bijector = jax.random.split(key)
        params = jax.tree.map(
            lambda p: p.astype(float_dtype(x)), init_linen(embed, key_embed, cond)
        )
        inner = bijector.init(key_bijector, x, apply_linen(embed, params, cond), side=side)
        return {"embed": params, "bijector": inner}

    def prepare(params, x, cond, key):
        check(cond)
        key_embed, key_inner = split_key(key, 2)
        return (
            params["bijector"],
            apply_linen(embed, params["embed"], cond, key=key_embed),
        ), key_inner

    return _prepared(bijector, init, prepare)


def indicated(bijector: _Map, size: int) -> _Map:
    """Give a map an embedding of its own beside cond, so that layers that share a network differ.

    cond becomes the embedding [b, size], or the pair (cond, embedding). The params are those of the
    bijector and 'indicator', side by side, so that a scan can share the others:
    scan(indicated(coupling(...), 8), depth, shared=('net',)) has one network for all layers, and
    for each layer an embedding and a head.

    Args:
        bijector: the `Bijector` or `Transport` that takes the embedding in its cond.
        size: the numbers of the embedding, drawn from a standard normal at first.

    Returns:
        Bijector: a map of the type of `bijector`, with params {'indicator': [size], ...}, the
            others being those of `bijector`.

    Raises:
        TypeError: bijector is not a `Bijector` or a `Transport`.
        ValueError: size is below 1, or the bijector has params of the name 'indicator' already.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijector = bijectors.indicated(bijectors.amortized(bijectors.affine((2,))), 4)
        >>> sorted(bijector.init(jax.random.key(0), jnp.ones((3, 2))))
        ['bias', 'indicator', 'kernel', 'net']

    References:
        Lee, Kim, Yoon, *NanoFlow: Scalable Normalizing Flows with Sublinear Parameter Complexity*,
            2020, arXiv:2006.06280.
    """
    check_noun("indicated", bijector, Bijector, Transport)
    check_whole("indicated", size=size)

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

    def prepare(params, x, cond, key):
        inner = {name: p for name, p in params.items() if name != "indicator"}
        return (inner, tell(params["indicator"], x, cond)), key

    return _prepared(bijector, init, prepare)


def _prepared(bijector: _Map, init, prepare) -> _Map:
    """`bijector` on what `prepare` makes of its arguments.

    prepare(params, x, cond, key) -> ((params, cond), key), in which x lends its shape alone.
    """

    def apply(inner, params, x, cond=None, *, key=None):
        (params, cond), key = prepare(params, x, cond, key)
        return inner(params, x, cond, key=key)

    def pullback(direction, params, y, cotangents, cond=None, *, key=None):
        inner, back, inner_key = jax.vjp(
            lambda p, c: prepare(p, y, c, key), params, cond, has_aux=True
        )
        x, (params_bar, x_bar, cond_bar) = pullback_at(
            bijector, direction, inner[0], y, cotangents, inner[1], key=inner_key
        )
        params_bar, cond_bar = back((params_bar, cond_bar))
        return x, (params_bar, x_bar, cond_bar)

    return _make(
        type(bijector),
        init,
        partial(apply, bijector.forward),
        partial(apply, bijector.inverse),
        pullback,
    )


def _of_rows(name: str, direction):
    """`direction`, whose log_det has to be [b]."""

    def apply(params, x, cond=None, *, key=None):
        y, log_det = direction(params, x, cond, key=key)
        return y, check_rows(name, "log_det", log_det, x.shape[0])

    return apply


def _make(kind: type, init, forward, inverse, pullback):
    return (
        Bijector(init, forward, inverse, pullback)
        if kind is Bijector
        else kind(init, forward, inverse)
    )


def kind_of(name: str, layers) -> type:
    for layer in layers:
        check_noun(name, layer, Bijector, Transport)
    return Transport if any(isinstance(layer, Transport) for layer in layers) else Bijector


def towards(side: str, layer: Bijector | Transport):
    """The map that leads away from `side`."""
    return layer.inverse if side == "data" else layer.forward
