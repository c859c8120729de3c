"""Arrays [b, *event]: shapes, types, sums over the event, rows that count."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jflow.types import Array, PyTree


def expand_to(t: Array, x: Array) -> Array:
    """Reshape t [b] (or [b, ...] along x's leading axes) so that it broadcasts against x [b,
    *event]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def float_dtype(*arrays: Array) -> jnp.dtype:
    """The type in which log-dets and densities accumulate: that of the arrays, float32 at least.
    Types are joined here on purpose, which JAX's strict promotion of types leaves to the caller."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def sum_event(x: Array) -> Array:
    """[b, *event] -> [b]: the sum over the event, in float32 or better."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)), dtype=float_dtype(x))


def flat_rows(x: Array) -> Array:
    """[b, *event] -> [b, D]; with b = 0 too, where a reshape to [b, -1] does not know D."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def mean_event(x: Array) -> Array:
    """The mean over the event: [b, *event] -> [b], in float32 or better.

    Args:
        x: Numbers of each row [b, *event].

    Returns:
        The mean of each row [b].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> losses.mean_event(jnp.arange(8.0).reshape(2, 2, 2)).tolist()
        [1.5, 5.5]
    """
    return sum_event(x) / math.prod(x.shape[1:])


def filled(used: Array | None, tree: PyTree) -> PyTree:
    """`tree` with the rows that are not `used` [b] replaced by the first that is; as it is where
    used is None.

    What such rows hold (padding, infinity, a point outside the support) then enters neither a loss
    nor its gradient, into which 0 times infinity would come even from a row that counts nothing.
    """
    if used is None or used.shape[0] == 0:
        return tree
    at = jnp.arange(used.shape[0]) == jnp.argmax(used)

    def leaf(a):
        # a masked sum, since over a mesh an index would gather the rows of all devices
        first = jnp.sum(
            jnp.where(expand_to(at, a), a, jnp.zeros_like(a)), axis=0, keepdims=True, dtype=a.dtype
        )
        return jnp.where(expand_to(used, a), a, first)

    return jax.tree.map(leaf, tree)


def mean_and_std(x: Array, axis) -> tuple[Array, Array]:
    """Along `axis`, in float32 at least; std is 1 where x does not vary by more than its rounding.
    Sums and squares neither overflow nor vanish: they are taken of x over a power of two near its
    largest number, which is exact."""
    x = x.astype(float_dtype(x))
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    power = jnp.where(
        largest > 0, largest / (4 * jnp.frexp(largest)[0]), 1.0
    )  # 4: 1 / power is not subnormal either
    power = jnp.maximum(power, jnp.finfo(x.dtype).tiny)
    scaled, power = x / power, jnp.squeeze(power, axis)
    varies = jnp.ptp(scaled, axis=axis) > 1e-6 * jnp.max(jnp.abs(scaled), axis=axis)
    return power * jnp.mean(scaled, axis=axis), jnp.where(
        varies, power * jnp.std(scaled, axis=axis), 1.0
    )


def numpy_mean_and_std(x: np.ndarray, axis) -> tuple[np.ndarray, np.ndarray]:
    """Along `axis`, which is kept with length 1, in numpy's float64. Sums and squares neither
    overflow nor vanish: they are taken of x over the power of two above its largest number, which
    is exact."""
    x = np.asarray(x, np.float64)
    power = np.frexp(np.abs(x).max(axis, keepdims=True))[1]
    scaled = np.ldexp(x, -power)
    mean, std = scaled.mean(axis, keepdims=True), scaled.std(axis, keepdims=True)
    return np.ldexp(mean, power), np.ldexp(std, power)


def zero_log_det(x: Array) -> Array:
    """[b] zeros made from x, so that they vary over a mesh axis whenever x does."""
    return jnp.zeros_like(x, shape=x.shape[:1], dtype=float_dtype(x))


def space_to_depth(name: str, x: Array, rows: int, columns: int) -> Array:
    """[b, H, W, C] -> [b, H / rows, W / columns, rows columns C], blocks of pixels as channels;
    ValueError, in the name of the caller, where they don't divide."""
    if x.ndim != 4 or x.shape[1] % rows or x.shape[2] % columns:
        raise ValueError(
            f"{name}: expected an image [b, H, W, C] with H divisible by {rows} and W by {columns},"
            f" got x of shape {list(x.shape)}"
        )
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // rows, rows, w // columns, columns, c)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(
        b, h // rows, w // columns, rows * columns * c
    )


def patchify(x: Array, p: int) -> Array:
    """[b, H, W, C] -> [b, (H/p) (W/p), p p C], rows first."""
    b, height, width, channels = x.shape
    x = x.reshape(b, height // p, p, width // p, p, channels).swapaxes(2, 3)
    return x.reshape(b, (height // p) * (width // p), p * p * channels)


def unpatchify(h: Array, rows: int, columns: int, p: int) -> Array:
    """The inverse of `patchify`: [b, rows columns, p p C] -> [b, rows p, columns p, C]."""
    b, _, size = h.shape
    h = h.reshape(b, rows, columns, p, p, size // (p * p)).swapaxes(2, 3)
    return h.reshape(b, rows * p, columns * p, size // (p * p))


def joined(x: Array, y: Array) -> Array:
    """x and y side by side along the last axis of the event, [b, ..., 2 c]; scalar events become
    [b, 2]."""
    return jnp.stack([x, y], axis=1) if x.ndim == 1 else jnp.concatenate([x, y], axis=-1)


def halves(xy: Array, like: Array) -> tuple[Array, Array]:
    """What `joined` put together, each shaped like `like`."""
    first, second = jnp.split(xy, 2, axis=-1)
    return first.reshape(like.shape), second.reshape(like.shape)


def leaves_by_position(batch: PyTree) -> PyTree:
    """`batch` with leaves that jax does not know and that numpy can read (a pandas Series) as numpy
    arrays, in order."""
    known = jax.Array | np.ndarray | np.generic
    return jax.tree.map(
        lambda x: np.asarray(x) if hasattr(x, "__array__") and not isinstance(x, known) else x,
        batch,
    )
