"""Stacks of layers of one form: traced once, and trained in memory that is flat in depth."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jflow._core.arrays import float_dtype, zero_log_det
from jflow._core.checks import check_rows, check_side, check_whole
from jflow._core.nouns import compiled
from jflow._core.pullback import with_pullback
from jflow.bijectors._combinators import kind_of, towards
from jflow.bijectors._pullbacks import add_cotangents, pullback_at, zero_cotangents
from jflow.types import Array, Bijector, Cond, Key, Params, PyTree, Transport

__all__ = ["rebuild_error", "scan"]


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
    """Stack `depth` layers of one form, which are traced once: compile time is flat in depth.

    `forward` goes through the layers in order, `inverse` back. A key is split, a part for each
    layer; every layer gets the same cond.

    With reversible=True the backward pass rebuilds the activations by inverting the layers, so
    their memory is flat in depth. At a kink (a ReLU's, or where the log-slope of a spline bends at
    a knot) a rebuilt activation may lie on the other side than that of plain automatic
    differentiation, which forward mode and second derivatives are.

    Also known as: stack of layers, reversible layers.

    Args:
        layer: a `Bijector` or `Transport`, or a function `xs_i -> Bijector` for layers that differ
            by constants (masks, permutations).
        depth: the number of layers.
        xs: arrays that lead with `depth`; constants, not differentiated.
        shared: names in the params of the layer that all layers share. A scan of scans shares them
            within groups: scan(scan(indicated(layer, 8), g, shared=("net",)), depth // g).
        remat: whether activations are computed again in the backward pass; memory then grows by one
            x a layer.
        reversible: whether activations are rebuilt in the backward pass by inverting the layers. An
            integer k >= 2 stores every k-th activation besides (depth is a multiple of k), which
            bounds the rebuild error; see `rebuild_error`. Not together with remat.
        unroll: as in jax.lax.scan.

    Returns:
        Bijector: the map, a `Transport` if the layer is one, with params {'stacked', 'shared'}; the
            leaves of 'stacked' lead with depth.

    Raises:
        ValueError: depth is below 1, xs does not lead with depth, reversible=k is 1, does not
            divide depth, or stands with remat or a `Transport`, or the layer has no params of a
            name in shared.
        TypeError: the layer is neither a `Bijector` nor a `Transport`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import bijectors
        >>> def layer(order):
        ...     return bijectors.chain(bijectors.permute(order), bijectors.affine((2,)))
        >>> stack = bijectors.scan(layer, 3, xs=np.array([[1, 0], [0, 1], [1, 0]]))
        >>> params = stack.init(jax.random.key(0), jnp.ones((4, 2)))
        >>> params["stacked"]["1"]["shift"].shape
        (3, 2)

    References:
        Gomez, Ren, Urtasun, Grosse,
            *The Reversible Residual Network: Backpropagation Without Storing Activations*, 2017,
            arXiv:1707.04585.
    """
    check_whole("scan", depth=depth)
    kept = not isinstance(reversible, bool | np.bool_)  # an integer k, though 1 == True
    segment = reversible if kept else depth
    if kept and reversible == 1:
        raise ValueError(
            "scan: reversible=1 would keep every activation, as remat=True does; True keeps none "
            "of them, and an integer "
            "k of at least 2 every k-th"
        )
    if segment < 1 or depth % segment:
        raise ValueError(f"scan: expected reversible=k to divide depth={depth}, got {reversible}")
    if remat and reversible:
        raise ValueError("scan: remat and reversible both save memory; choose one")
    for leaf in jax.tree.leaves(xs):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != depth:
            raise ValueError(
                f"scan: expected the leaves of xs to lead with depth={depth}, got "
                f"{list(np.shape(leaf))}"
            )
    make = layer if callable(layer) else lambda _: layer
    kind = kind_of("scan", [make(jax.tree.map(lambda leaf: leaf[0], xs))])
    if reversible and kind is Transport:
        raise ValueError("scan: a Transport cannot be inverted exactly; reversible needs bijectors")

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        backwards = side == "data"
        keys, common = jax.random.split(key, 2 * depth + 1), {}
        if shared:
            i = depth - 1 if backwards else 0
            params = make(jax.tree.map(lambda leaf: leaf[i], xs)).init(keys[-1], x, cond, side=side)
            if missing := sorted(set(shared) - set(params)):
                raise ValueError(
                    f"scan: the layer has no params {missing} to share; it has {sorted(params)}"
                )
            common = {name: params[name] for name in shared}

        def body(x, inputs):
            key_init, key_map, xs_i = inputs
            bijector = make(xs_i)
            params = {**bijector.init(key_init, x, cond, side=side), **common}
            y, _ = towards(side, bijector)(params, x, cond, key=key_map)
            return y.astype(x.dtype), {name: p for name, p in params.items() if name not in shared}

        _, stacked = jax.lax.scan(body, x, (keys[:depth], keys[depth:-1], xs), reverse=backwards)
        return {"shared": common, "stacked": stacked}

    def run(direction, params, x, cond=None, *, key=None):
        def apply(p, common, x, cond, inputs_i):
            xs_i, key_i = inputs_i
            y, log_det = getattr(make(xs_i), direction)({**p, **common}, x, cond, key=key_i)
            check_rows("scan", "log_det of a layer", log_det, x.shape[0])
            return y.astype(x.dtype), log_det.astype(float_dtype(x))

        def pullback(p, common, y, cotangents, cond, inputs_i):
            xs_i, key_i = inputs_i
            x, cotangents = pullback_at(
                make(xs_i), direction, {**p, **common}, y, cotangents, cond, key=key_i
            )
            params_bar, x_bar, cond_bar = cotangents
            own, of_common = ({name: params_bar[name] for name in names} for names in (p, common))
            return x.astype(y.dtype), own, of_common, x_bar.astype(y.dtype), cond_bar

        # As arrays: a jitted function that closes over numpy's integers does not lower once it was
        # used in 32 and in 64 bits.
        inputs = (
            jax.tree.map(jnp.asarray, xs),
            None if key is None else jax.random.split(key, depth),
        )
        args = (params["stacked"], params["shared"], x, cond, inputs)
        options = dict(reverse=direction == "inverse", unroll=unroll, length=depth)
        if not reversible:
            return _plain_scan(apply, *args, remat=remat, **options)
        return _reversible_scan(apply, pullback, *args, segment=segment, **options)

    return compiled(kind(init, partial(run, "forward"), partial(run, "inverse")))


def rebuild_error(
    bijector: Bijector,
    params: Params,
    z: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    key: Key | None = None,
) -> Float[Array, ""]:
    """Measure the error of the activations that a reversible stack rebuilds.

    It is max |inverse(forward(z)) - z|, what the backward pass of a reversible `scan` adds to the
    activations at which it differentiates.

    Args:
        bijector: the map, such as a `scan`.
        params: of the map.
        z: numbers on the source side, [b, *event].
        cond: as the map takes it.
        key: for maps that draw.

    Returns:
        The largest error, a scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> float(bijectors.rebuild_error(bijectors.reverse(), {}, jnp.ones((3, 2))))
        0.0
    """
    x, _ = bijector.forward(params, z, cond, key=key)
    return jnp.max(jnp.abs(bijector.inverse(params, x, cond, key=key)[0] - z))


def _plain_scan(apply, stacked, common, x, cond, inputs, *, reverse, unroll, length, remat=False):
    def body(carry, layer):
        x, log_det = carry
        p, inputs_i = layer
        x, contribution = apply(p, common, x, cond, inputs_i)
        return (x, log_det + contribution), None

    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    carry, _ = jax.lax.scan(
        body,
        (x, zero_log_det(x)),
        (stacked, inputs),
        reverse=reverse,
        unroll=min(unroll, length),
        length=length,
    )
    return carry


def _reversible_scan(
    apply, pullback, stacked, common, x, cond, inputs, *, reverse, unroll, segment, length
):
    """`_plain_scan` whose backward pass rebuilds the input of each layer from its output.

    It does so segment by segment.
    """

    def one_segment(stacked, common, x, cond, inputs):
        return _plain_scan(
            apply, stacked, common, x, cond, inputs, reverse=reverse, unroll=unroll, length=segment
        )

    def walk_back(args, outputs, cotangents):
        stacked, common, _, cond, inputs = args
        y, (y_bar, log_det_bar) = outputs[0], cotangents

        def body(carry, layer):
            y, y_bar, common_bar, cond_bar = carry
            p, inputs_i = layer
            x, p_bar, common_i, x_bar, cond_i = pullback(
                p, common, y, (y_bar, log_det_bar), cond, inputs_i
            )
            return (
                x,
                x_bar,
                add_cotangents(common_bar, common_i),
                add_cotangents(cond_bar, cond_i),
            ), p_bar

        carry = (y, y_bar, zero_cotangents(common), zero_cotangents(cond))
        carry, stacked_bar = jax.lax.scan(
            body, carry, (stacked, inputs), reverse=not reverse, length=segment
        )
        _, x_bar, common_bar, cond_bar = carry
        return stacked_bar, common_bar, x_bar, cond_bar, zero_cotangents(inputs)

    rebuild = with_pullback(one_segment, walk_back)
    cond = jax.tree.map(jnp.asarray, cond)
    if segment == length:
        return rebuild(stacked, common, x, cond, inputs)
    fold = partial(
        jax.tree.map, lambda leaf: leaf.reshape(length // segment, segment, *leaf.shape[1:])
    )

    def body(carry, layers):
        x, log_det = carry
        stacked, inputs = layers
        x, contribution = rebuild(stacked, common, x, cond, inputs)
        return (x, log_det + contribution), None

    carry, _ = jax.lax.scan(
        body, (x, zero_log_det(x)), (fold(stacked), fold(inputs)), reverse=reverse
    )
    return carry
