"""Coupling layers: a part of the event steers an elementwise map of the rest."""

from contextlib import suppress

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype, sum_event
from jflow._core.checks import check_cond, check_noun, check_side
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow.types import Array, Bijector, Elementwise

__all__ = ["coupling", "masked_coupling"]


def coupling(univariate: Elementwise, net: nn.Module, *, split: int, axis: int = -1) -> Bijector:
    """Transform one part of the event by numbers that a network reads off the other part.

    The first `split` entries along `axis` pass; the rest go through `univariate`:

        x_a = z_a,    x_b = univariate.forward(z_b, head(net(z_a, cond))).

    Both directions are one pass of the net. A linear head, zero at initialization so that the layer
    starts at the identity, makes raw numbers [b, ..., channels of x_b, univariate.size] of the
    features. With split=0 the whole event is transformed, by numbers from cond alone.

    Also known as: coupling layer, affine coupling, RealNVP layer, spline coupling.

    Args:
        univariate: the scalar map, such as `univariate.affine()` or
            `univariate.rational_quadratic()`.
        net: a Linen module (x_a, cond=None) -> features [b, ..., F], whose axes between batch and F
            are those of x_b without its last; such as `nets.MLP` or `nets.GlowNet`.
        split: how many entries along `axis` pass.
        axis: the axis of x [b, *event] that is split, not the batch axis.

    Returns:
        Bijector: the map, with params {'net', 'head': {'kernel', 'bias'}}.

    Raises:
        TypeError: univariate is not an `Elementwise`, or net not a Linen module.
        ValueError: split is negative or the axis too short for it, or the features have other
            shapes.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, nets
        >>> bijector = bijectors.coupling(bijectors.univariate.affine(), nets.MLP((8,)), split=1)
        >>> z = jnp.ones((3, 2))
        >>> params = bijector.init(jax.random.key(0), z)
        >>> params["head"]["bias"] = jnp.array([0.0, 5.0])  # log-scale 0, shift 5
        >>> bijector.forward(params, z)[0][0].tolist()
        [1.0, 6.0]

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density Estimation Using Real NVP*, 2016, arXiv:1605.08803.
    """
    check_noun("coupling", univariate, Elementwise)
    check_linen("coupling", "net", net)
    if split < 0:
        raise ValueError(f"coupling: expected split >= 0, got {split}")

    def parts(x):
        is_event_axis = -x.ndim < axis < x.ndim and axis != 0
        size = x.shape[axis] if is_event_axis else 0
        if not split < size:
            raise ValueError(
                f"coupling: expected axis {axis} of x to be an event axis longer than "
                f"split={split}, "
                f"got x of shape {list(x.shape)}"
            )
        return jnp.split(x, [split], axis=axis)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        x_a, x_b = parts(x)
        return _init_conditioner(net, key, x_a, cond, outputs=x_b.shape[-1] * univariate.size)

    def apply(direction, params, x, cond, key):
        x_a, x_b = parts(x)
        features = _features(net, params, x_a, cond, key, like=x_b, size=univariate.size)
        if univariate.columns is None:
            raw = _raw(params["head"], features, x_b, univariate.size)
            y_b, log_slope = getattr(univariate, direction)(x_b, raw)
            log_det = sum_event(log_slope)
        else:
            y_b, log_det = _in_columns(univariate, direction, params["head"], features, x_b)
        return jnp.concatenate([x_a, y_b.astype(x.dtype)], axis=axis), log_det

    return _bijector(init, apply)


def masked_coupling(univariate: Elementwise, net: nn.Module, mask: np.ndarray | Array) -> Bijector:
    """Transform the entries where a mask is false by numbers that a network reads off the others.

    Entries where `mask` is true pass; the others go through `univariate` with raw numbers from
    `net` of the masked x. The net sees x * mask, whole, so its features carry all the axes of x but
    the last. The univariate map is evaluated on every entry: for a split in two halves `coupling`
    evaluates it on half of them. A linear head, zero at initialization, makes the raw numbers of
    the features, so that the layer starts at the identity.

    Also known as: checkerboard coupling, masked RealNVP layer.

    Args:
        univariate: the scalar map, such as `univariate.affine()` or
            `univariate.rational_quadratic()`.
        net: a Linen module (masked x, cond=None) -> features [b, ..., F], with the axes of x but
            the last.
        mask: a boolean array that broadcasts over the event: a checkerboard, a random mask, or a
            scanned `xs_i`; see `masks`.

    Returns:
        Bijector: the map, with params {'net', 'head': {'kernel', 'bias'}}.

    Raises:
        TypeError: mask is not boolean, univariate is not an `Elementwise`, or net not a Linen
            module.
        ValueError: the mask does not broadcast to the events of x, or the features have other
            shapes.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, nets
        >>> affine, mask = bijectors.univariate.affine(), bijectors.masks.channels(2)
        >>> bijector = bijectors.masked_coupling(affine, nets.MLP((8,)), mask)
        >>> z = jnp.ones((3, 2))
        >>> x, log_det = bijector.forward(bijector.init(jax.random.key(0), z), z)
        >>> x[0].tolist()  # it starts at the identity
        [1.0, 1.0]

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density Estimation Using Real NVP*, 2016, arXiv:1605.08803.
    """
    check_noun("masked_coupling", univariate, Elementwise)
    check_linen("masked_coupling", "net", net)
    if not isinstance(mask, jax.core.Tracer):
        mask = np.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(f"masked_coupling: expected a boolean mask, got {mask.dtype}")

    def keep(x):
        if mask.ndim < x.ndim:  # one axis is the batch's
            with suppress(ValueError, TypeError):
                return jnp.broadcast_to(
                    mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape), x.shape
                )
        raise ValueError(
            "masked_coupling: expected a mask that broadcasts to the events of x; mask of shape "
            f"{list(mask.shape)} does "
            f"not broadcast to those of x of shape {list(x.shape)}"
        )

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        return _init_conditioner(
            net, key, jnp.where(keep(x), x, 0), cond, outputs=x.shape[-1] * univariate.size
        )

    def apply(direction, params, x, cond, key):
        passes = keep(x)
        features = _features(
            net, params, jnp.where(passes, x, 0), cond, key, like=x, size=univariate.size
        )
        y, log_slope = getattr(univariate, direction)(
            x, _raw(params["head"], features, x, univariate.size)
        )
        return jnp.where(passes, x, y.astype(x.dtype)), sum_event(jnp.where(passes, 0, log_slope))

    return _bijector(init, apply)


def _bijector(init, apply) -> Bijector:
    def forward(params, z, cond=None, *, key=None):
        return apply("forward", params, z, cond, key)

    def inverse(params, x, cond=None, *, key=None):
        return apply("inverse", params, x, cond, key)

    return Bijector(init, forward, inverse)


def _init_conditioner(net, key, x: Array, cond, *, outputs: int) -> dict:
    cond = check_cond("coupling", cond, x.shape[0])
    params = init_linen(net, key, x, cond)
    features = jax.eval_shape(lambda p: apply_linen(net, p, x, cond), params)
    # Zero, but not to the compiler: XLA's products of sums with a matrix that it knows to be
    # constant read memory that nobody wrote (YNNPACK, on CPUs, jax 0.10 to 0.12).
    shape, dtype = (features.shape[-1], outputs), float_dtype(x)
    zeros = jnp.zeros_like(x, shape=shape, dtype=dtype) * jax.random.uniform(
        jax.random.fold_in(key, 1), shape, dtype
    )
    return {"net": params, "head": {"kernel": zeros, "bias": zeros[0]}}


def _features(net, params, x: Array, cond, key, *, like: Array, size: int) -> Array:
    """What the head turns into raw numbers [*like.shape, size].

    In float32 at least, whatever the network computes in.
    """
    cond = check_cond("coupling", cond, x.shape[0])
    features = apply_linen(net, params["net"], x, cond, key=key)
    if features.shape[:-1] != like.shape[:-1]:
        raise ValueError(
            f"coupling: expected {type(net).__name__} to return features of shape "
            f"{[*like.shape[:-1], 'F']}, got {list(features.shape)}"
        )
    channels = params["head"]["bias"].shape[-1] // size
    if like.shape[-1] != channels:
        raise ValueError(
            f"coupling: expected {channels} channels to transform, as at init, got a part of shape "
            f"{list(like.shape)}"
        )
    return features.astype(float_dtype(like))


def _raw(head, features: Array, x: Array, size: int) -> Array:
    """[*x.shape, size]"""
    raw = features @ head["kernel"]
    return (raw + head["bias"].reshape((1,) * (raw.ndim - 1) + (-1,))).reshape(*x.shape, size)


def _in_columns(univariate, direction: str, head, features: Array, x: Array) -> tuple[Array, Array]:
    """y like x and log_det [b].

    The head writes raw numbers as kernels want them, [size, channels, rows].
    """
    channels, size = x.shape[-1], univariate.size
    transform = univariate.columns[direction == "inverse"]

    def apply(head, features, columns):
        # The bias as one more input: a slice of a scanned bias, added afterwards, keeps XLA's CPU
        # compiler from vectors.
        kernel = jnp.concatenate([head["kernel"], head["bias"][None]]).reshape(-1, channels, size)
        features = jnp.concatenate([features, jnp.ones_like(features[:, :1])], axis=1)
        kernel = kernel.T.reshape(size * channels, -1)
        raw = jax.lax.dot_general(
            kernel, features, (((1,), (1,)), ((), ()))
        )  # in this order, the rows come last
        return transform(columns, raw.reshape(size, channels, -1))

    # Raw numbers are many more than features, of which they are a matrix product away: the backward
    # pass makes them anew.
    apply = jax.checkpoint(apply, prevent_cse=False)
    y, log_det = apply(
        head,
        features.reshape(-1, features.shape[-1]),
        x.reshape(-1, channels).T.astype(features.dtype),
    )
    return y.T.reshape(x.shape), sum_event(log_det.reshape(x.shape[:-1]))
