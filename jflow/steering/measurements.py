"""Linear measurements y = A x + noise: what is seen of an image, or of a vector.

A `Measurement` is a tuple of pure functions of batches: A, its adjoint and its regularized
pseudo-inverse. Each constructor knows the singular values of its A, so that no linear system is
solved by iteration. One of your own is the tuple with your functions:

    Measurement(apply, adjoint, pseudo_inverse)

All of it is linear and differentiable, is computed in float32 or better, and keeps the type of what
it is given.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_event, check_whole, described
from jflow._core.names import explain_unknown
from jflow.types import Array

__all__ = ["blur", "downsample", "fourier", "mask", "matrix", "null_space"]

explain_unknown(__name__)


class Measurement(NamedTuple):
    """A linear measurement A, as three functions of batches.

    Also known as: forward operator, degradation, measurement operator, linear inverse problem.

    Attributes:
        apply: `apply(x) -> y`, A x: [b, *event] -> [b, *measured].
        adjoint: `adjoint(y) -> x`, the transpose of A: <A x, y> = <x, adjoint(y)>.
        pseudo_inverse: `pseudo_inverse(y, ridge=0.0) -> x`, A^T (A A^T + ridge I)^-1 y, the
            Tikhonov-regularized inverse; at ridge 0 it is the Moore-Penrose pseudo-inverse A^+ y.
            ridge is a number at least 0, or one for each row [b]. With x ~ N(m, v I) and noise of
            variance s^2, m + pseudo_inverse(y - A m, s^2 / v) is the posterior mean of x.
    """

    apply: Callable[..., Array]
    adjoint: Callable[..., Array]
    pseudo_inverse: Callable[..., Array]


def null_space(
    measurement: Measurement, x: Float[Array, "b *event"], y: Float[Array, "rows ..."] | None = None
) -> Float[Array, "b *event"]:
    """What a measurement does not see of x; with y, x made consistent with the measurement y.

        x - A^+ A x,   with y:  x - A^+ (A x - y)

    The first is the projection to the null space of A. The second is the point nearest to x whose
    measurement is y, where y is one of A (in its range).

    Args:
        measurement: the measurement A.
        x: states, [b, *event].
        y: a measurement without noise, [b, *measured], or [1, *measured] for all rows; None: 0.

    Returns:
        The projection, [b, *event].

    Raises:
        ValueError: the shapes do not fit.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.steering import measurements
        >>> mean = measurements.matrix([[0.5, 0.5]])
        >>> x = jnp.array([[1.0, 5.0]])
        >>> measurements.null_space(mean, x).round(4).tolist()
        [[-2.0, 2.0]]
        >>> measurements.null_space(mean, x, jnp.array([[1.0]])).round(4).tolist()  # its mean is 1
        [[-1.0, 3.0]]

    References:
        Wang, Yu, Zhang, *Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model*,
            2022, arXiv:2212.00490.
    """
    check_measurement("null_space", measurement)
    seen = measurement.apply(x)
    away = seen if y is None else seen - as_measured("null_space", y, seen)
    return x - measurement.pseudo_inverse(away).astype(x.dtype)


def check_measurement(name: str, measurement: Measurement) -> None:
    """Raise unless it is a Measurement."""
    if not isinstance(measurement, Measurement):
        raise TypeError(
            f"{name}: expected a Measurement, such as measurements.matrix(a), got"
            f" {described(measurement)}"
        )


def as_measured(name: str, y: ArrayLike, like: Array) -> Array:
    """y in the shape and type of the measurements `like`, a single row repeated."""
    y = jnp.asarray(y)
    if y.shape[1:] != like.shape[1:] or y.ndim == 0 or y.shape[0] not in (1, like.shape[0]):
        raise ValueError(
            f"{name}: expected a measurement of shape {list(like.shape)}, or one row for all, got"
            f" {list(y.shape)}"
        )
    return jnp.broadcast_to(y, like.shape).astype(like.dtype)


def matrix(a: ArrayLike | Sequence[Any], *, floor: float = 1e-6) -> Measurement:
    """The measurement by a matrix.

        y = A x

    Its singular value decomposition is made here, in float64.

    Args:
        a: A, [m, d], known outside jit.
        floor: singular values up to this part of the largest count as 0 in the pseudo-inverse.

    Returns:
        Measurement: of x [b, d], with y [b, m].

    Raises:
        ValueError: A is not a finite matrix, or floor is outside [0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.steering import measurements
        >>> total = measurements.matrix([[1.0, 1.0]])
        >>> y = total.apply(jnp.array([[1.0, 3.0]]))
        >>> y.tolist(), total.pseudo_inverse(y).round(4).tolist()
        ([[4.0]], [[2.0, 2.0]])
    """
    a = np.asarray(a, np.float64)
    if a.ndim != 2 or not a.size or not np.isfinite(a).all():
        raise ValueError(
            f"measurements.matrix: expected a finite matrix [m, d], got {list(a.shape)}"
        )
    _check_floor("matrix", floor)
    u, s, v = np.linalg.svd(a, full_matrices=False)
    kept = s > floor * max(s[0], np.finfo(np.float64).tiny)
    u, s, v = u[:, kept], s[kept], v[kept]

    def pseudo_inverse(y, ridge):
        scale = _like(s, y)[None]
        coordinates = _product(y, u) * (scale / (scale**2 + _expand(ridge, y)))
        return _product(coordinates, v)

    return _checked(
        "matrix",
        a.shape[1:],
        a.shape[:1],
        lambda x: _product(x, a.T),
        lambda y: _product(y, a),
        pseudo_inverse,
    )


def mask(known: ArrayLike | Sequence[Any]) -> Measurement:
    """The measurement of some of the numbers of x: inpainting.

        y = x where known, 0 elsewhere

    y keeps the shape of x, so that it can be looked at. What y holds where nothing is known enters
    neither the adjoint nor the pseudo-inverse, but a residual shows it: put 0 there.

    Args:
        known: which numbers are measured, truth values in the shape of an event, [*event].

    Returns:
        Measurement: of x [b, *event], with y [b, *event].

    Raises:
        ValueError: known holds something else than truth values, 0 and 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.steering import measurements
        >>> first = measurements.mask([True, False])
        >>> first.apply(jnp.array([[1.0, 3.0]])).tolist()
        [[1.0, 0.0]]
    """
    seen = np.asarray(known)
    if not seen.ndim or not np.isin(seen, (0, 1)).all():
        raise ValueError(
            f"measurements.mask: expected truth values in the shape of an event, got {known}"
        )
    seen = seen.astype(bool)

    def select(x):
        return jnp.where(jnp.asarray(seen)[None], x, jnp.zeros_like(x))

    return _checked(
        "mask",
        seen.shape,
        seen.shape,
        select,
        select,
        lambda y, ridge: select(y / (1 + _expand(ridge, y))),
    )


def fourier(known: ArrayLike | Sequence[Any]) -> Measurement:
    """The measurement of some Fourier coefficients: accelerated magnetic resonance imaging.

    Also known as: k-space subsampling, compressed sensing MRI.

        y = (Re, Im) of F x where known, 0 elsewhere      F the unitary discrete transform

    Of a real x, the coefficient at -k is the conjugate of that at k: where both are known, the
    noise of the two is averaged, and where one is, the other is too.

    Args:
        known: which coefficients are measured, truth values in the shape of an event and the order
            of `numpy.fft.fftfreq`: [n], [h, w], or [h, w, c] with a transform for each channel.

    Returns:
        Measurement: of real x [b, *event], with y [b, *event, 2].

    Raises:
        ValueError: known has another number of axes, or holds something else than truth values.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.steering import measurements
        >>> total = measurements.fourier([True, False, False, False])  # frequency 0
        >>> y = total.apply(jnp.array([[1.0, 2.0, 3.0, 2.0]]))
        >>> y[0, 0].tolist()  # the sum over sqrt(4)
        [4.0, 0.0]
        >>> total.pseudo_inverse(y).tolist()
        [[2.0, 2.0, 2.0, 2.0]]
    """
    seen = np.asarray(known)
    if seen.ndim not in (1, 2, 3) or not np.isin(seen, (0, 1)).all():
        raise ValueError(
            "measurements.fourier: expected truth values [n], [h, w] or [h, w, c], got shape"
            f" {list(seen.shape)}"
        )
    seen, axes = seen.astype(bool), tuple(range(min(seen.ndim, 2)))
    share = (1.0 * seen + _negated(seen, axes)) / 2  # the eigenvalues of A^T A
    axes = tuple(axis + 1 for axis in axes)

    def apply(x):
        f = jnp.fft.fftn(x, axes=axes, norm="ortho")
        return _select(seen, jnp.stack([f.real, f.imag], axis=-1))

    def back(y, weight):
        y = _select(seen, y)
        f = jax.lax.complex(y[..., 0], y[..., 1]) * weight.astype(y.dtype)
        return jnp.fft.ifftn(f, axes=axes, norm="ortho").real

    def pseudo_inverse(y, ridge):
        known_at = jnp.asarray(share > 0)[None]
        total = _like(share, y)[None] + _expand(ridge, y[..., 0])
        return back(y, jnp.where(known_at, 1 / jnp.where(known_at, total, 1), 0))

    return _checked(
        "fourier",
        seen.shape,
        (*seen.shape, 2),
        apply,
        lambda y: back(y, jnp.ones_like(y[..., 0])),
        pseudo_inverse,
    )


def blur(
    kernel: ArrayLike | Sequence[Any], event: tuple[int, ...], *, floor: float = 1e-3
) -> Measurement:
    """The measurement of a blurred image, by a circular convolution.

    Also known as: deblurring, deconvolution, Gaussian blur.

        y = kernel * x      with x continued periodically

    The middle of the kernel, at size // 2 of each axis, is where a pixel stays.

    Args:
        kernel: the kernel, [k] for vectors, [k, l] for images; no larger than the image.
        event: the shape of x: [n], [h, w] or [h, w, c], where all channels are blurred alike.
        floor: frequencies whose gain is up to this part of the largest count as not measured in the
            pseudo-inverse, with a ridge too: noise would be amplified by more than 1 / floor.

    Returns:
        Measurement: of x [b, *event], with y [b, *event].

    Raises:
        ValueError: the kernel does not fit the event, is not finite or is 0, or floor is outside
            [0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.steering import measurements
        >>> blurred = measurements.blur([0.25, 0.5, 0.25], (4,))
        >>> blurred.apply(jnp.array([[0.0, 4.0, 0.0, 0.0]])).tolist()
        [[1.0, 2.0, 1.0, 0.0]]
    """
    kernel, event = np.asarray(kernel, np.float64), tuple(event)
    wide = len(event) - 1 if len(event) == 3 else len(event)
    if (
        wide not in (1, 2)
        or kernel.ndim != wide
        or any(k > n for k, n in zip(kernel.shape, event, strict=False))
        or not np.isfinite(kernel).all()
        or not kernel.any()
    ):
        raise ValueError(
            "measurements.blur: expected a finite kernel [k] for an event [n], or [k, l] for [h, w]"
            f" or [h, w, c], no larger than it, got {list(kernel.shape)} for {list(event)}"
        )
    _check_floor("blur", floor)
    padded = np.zeros(event[:wide])
    padded[tuple(slice(k) for k in kernel.shape)] = kernel
    padded = np.roll(padded, [-(k // 2) for k in kernel.shape], axis=tuple(range(wide)))
    gain = np.fft.fftn(padded).reshape(*event[:wide], *(1,) * (len(event) - wide))
    power = np.abs(gain) ** 2
    seen = np.abs(gain) > floor * np.abs(gain).max()
    axes = tuple(range(1, wide + 1))

    def filtered(x, factor):
        return jnp.fft.ifftn(jnp.fft.fftn(x, axes=axes) * factor, axes=axes).real

    def of(x, value):
        dtype = jnp.complex128 if x.dtype == jnp.float64 else jnp.complex64
        return jnp.asarray(value, dtype)[None]

    def pseudo_inverse(y, ridge):
        total = _like(power, y)[None] + _expand(ridge, y)
        inside = jnp.asarray(seen)[None]
        weight = jnp.where(inside, 1 / jnp.where(inside, total, 1), 0)
        return filtered(y, of(y, gain.conj()) * weight)

    return _checked(
        "blur",
        event,
        event,
        lambda x: filtered(x, of(x, gain)),
        lambda y: filtered(y, of(y, gain.conj())),
        pseudo_inverse,
    )


def downsample(factor: int, event: tuple[int, ...]) -> Measurement:
    """The measurement of the means of blocks: super-resolution.

    Also known as: super-resolution, average pooling.

        y = the mean of every factor x factor pixels (of vectors, every factor numbers)

    Args:
        factor: the side of a block, at least 1.
        event: the shape of x: [n], [h, w] or [h, w, c]; factor divides n, h and w.

    Returns:
        Measurement: of x [b, *event], with y [b, n / factor], or [b, h / factor, w / factor, ...].

    Raises:
        ValueError: factor is not a whole number, or does not divide the event.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.steering import measurements
        >>> halved = measurements.downsample(2, (4,))
        >>> halved.apply(jnp.array([[1.0, 3.0, 5.0, 5.0]])).tolist()
        [[2.0, 5.0]]
    """
    check_whole("measurements.downsample", factor=factor)
    event = tuple(event)
    wide = len(event) - 1 if len(event) == 3 else len(event)
    if wide not in (1, 2) or any(n % factor for n in event[:wide]):
        raise ValueError(
            f"measurements.downsample: expected an event [n], [h, w] or [h, w, c] with sides that"
            f" {factor} divides, got {list(event)}"
        )
    small = (*(n // factor for n in event[:wide]), *event[wide:])
    blocks = [side for n in small[:wide] for side in (n, factor)] + list(event[wide:])
    size = factor**wide

    def apply(x):
        inside = tuple(range(2, 2 * wide + 1, 2))
        return jnp.mean(x.reshape(x.shape[0], *blocks), axis=inside)

    def spread(y):
        for axis in range(1, wide + 1):
            y = jnp.repeat(y, factor, axis=axis)
        return y

    return _checked(
        "downsample",
        event,
        small,
        apply,
        lambda y: spread(y) / size,
        lambda y, ridge: spread(y / (1 + size * _expand(ridge, y))),  # A A^T is I / size
    )


def _checked(name, event, measured, apply, adjoint, pseudo_inverse):
    """The three functions with their shapes checked, in float32 or better inside."""
    where = f"measurements.{name}"

    def inner(function, x, *more):
        x = jnp.asarray(x)
        out = function(x.astype(float_dtype(x)), *more)
        return out.astype(x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else out.dtype)

    def checked_apply(x):
        check_event(where, x, event)
        return inner(apply, x)

    def check_measured(y):
        if jnp.ndim(y) == 0 or jnp.shape(y)[1:] != measured:
            raise ValueError(
                f"{where}: expected a measurement of shape {_text(measured)}, got"
                f" {list(jnp.shape(y))}"
            )

    def checked_adjoint(y):
        check_measured(y)
        return inner(adjoint, y)

    def checked_inverse(y, ridge=0.0):
        check_measured(y)
        if jnp.shape(ridge) not in ((), jnp.shape(y)[:1]):
            raise ValueError(
                f"{where}: expected ridge to be a number or of shape {list(jnp.shape(y)[:1])}, got"
                f" {list(jnp.shape(ridge))}"
            )
        return inner(pseudo_inverse, y, ridge)

    return Measurement(checked_apply, checked_adjoint, checked_inverse)


def _text(shape):
    return f"[{', '.join(['b', *map(str, shape)])}]"


def _check_floor(name, floor):
    if not 0 <= floor < 1:
        raise ValueError(f"measurements.{name}: expected floor in [0, 1), got {floor}")


def _like(value, x):
    return jnp.asarray(value, x.dtype)


def _expand(ridge, y):
    """ridge, a number or [b], so that it broadcasts against y."""
    ridge = jnp.asarray(ridge).astype(y.dtype)
    return expand_to(ridge.reshape(-1), y)


def _product(x, a):
    # the accelerators' default precision of a product would not do for an inverse
    return jnp.matmul(x, _like(a, x), precision=jax.lax.Precision.HIGHEST)


def _select(seen, y):
    return jnp.where(jnp.asarray(seen)[None, ..., None], y, jnp.zeros_like(y))


def _negated(seen, axes):
    """The values at -k."""
    return np.roll(np.flip(seen, axes), [1] * len(axes), axis=axes)
