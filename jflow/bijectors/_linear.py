"""Linear bijectors on the last axis, and rearrangements of it."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype, zero_log_det
from jflow._core.checks import check_channels, check_event, check_side, check_whole
from jflow._core.nouns import compiled, no_params
from jflow.types import Array, Bijector

__all__ = [
    "householder",
    "invertible_conv_1x1",
    "linear",
    "lu",
    "permute",
    "qr",
    "reshape",
    "reverse",
]

_FULL = (
    jax.lax.Precision.HIGHEST
)  # accelerators multiply float32 in fewer bits by default; the inverse would not match


def permute(
    permutation: Sequence[int] | np.ndarray | Array,
    inverse_permutation: Sequence[int] | np.ndarray | Array | None = None,
) -> Bijector:
    """Permute the last axis: x[..., i] = z[..., permutation[i]].

    The permutation is fixed, not a parameter; it may be a scanned `xs_i`. log_det = 0.

    Args:
        permutation: the whole numbers 0 .. d-1 in some order, [d].
        inverse_permutation: argsort(permutation), which beside a scanned one saves a sort in every
            layer. None computes it.

    Returns:
        Bijector: the map, without params.

    Raises:
        ValueError: permutation is none, inverse_permutation is not its inverse, or the last axis of
            x has another size.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.permute([2, 0, 1]).forward({}, jnp.array([[1.0, 2.0, 3.0]]))[0].tolist()
        [[3.0, 1.0, 2.0]]
    """
    if not isinstance(permutation, jax.core.Tracer):
        permutation = np.asarray(permutation)
        whole = np.issubdtype(permutation.dtype, np.integer)
        if (
            permutation.ndim != 1
            or not whole
            or not np.array_equal(np.sort(permutation), np.arange(permutation.size))
        ):
            raise ValueError(
                "permute: expected a permutation of the whole numbers 0..d-1, got "
                f"{permutation.tolist()}"
            )
        if inverse_permutation is not None and not np.array_equal(
            inverse_permutation, np.argsort(permutation)
        ):
            raise ValueError(
                f"permute: expected inverse_permutation to be argsort of {permutation.tolist()}"
            )
        inverse_permutation = np.argsort(permutation)
    elif inverse_permutation is None:
        inverse_permutation = jnp.argsort(permutation)

    def apply(order, params, x, cond=None, *, key=None):
        check_channels("permute", x, permutation.shape[0])
        return jnp.take(x, order, axis=-1, unique_indices=True, mode="clip"), zero_log_det(x)

    return Bijector(no_params, partial(apply, permutation), partial(apply, inverse_permutation))


def reverse() -> Bijector:
    """Reverse the last axis: x[..., i] = z[..., d-1-i].

    log_det = 0.

    Returns:
        Bijector: the map, without params.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.reverse().forward({}, jnp.array([[1.0, 2.0, 3.0]]))[0].tolist()
        [[3.0, 2.0, 1.0]]
    """

    def flip(params, x, cond=None, *, key=None):
        return jnp.flip(x, axis=-1), zero_log_det(x)

    return Bijector(no_params, flip, flip)


def reshape(source_shape: tuple[int, ...], data_shape: tuple[int, ...]) -> Bijector:
    """Reshape the events, in row-major order.

    log_det = 0.

    Args:
        source_shape: the shape of an event on the source side, such as (12,).
        data_shape: the shape of an event on the data side, such as (2, 2, 3), of the same size.

    Returns:
        Bijector: the map, without params.

    Raises:
        ValueError: the two shapes differ in size, or the events of x have another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.reshape((12,), (2, 2, 3)).forward({}, jnp.zeros((5, 12)))[0].shape
        (5, 2, 2, 3)
    """
    source_shape, data_shape = tuple(source_shape), tuple(data_shape)
    if np.prod(source_shape, dtype=int) != np.prod(data_shape, dtype=int):
        raise ValueError(f"reshape: {list(source_shape)} and {list(data_shape)} differ in size")

    def to(given, wanted):
        def apply(params, x, cond=None, *, key=None):
            check_event("reshape", x, given)
            return x.reshape(x.shape[0], *wanted), zero_log_det(x)

        return apply

    return Bijector(no_params, to(source_shape, data_shape), to(data_shape, source_shape))


def linear(features: int) -> Bijector:
    """Multiply the last axis by a free matrix and add a shift: x = W z + shift.

    W starts at a random rotation. log_det = positions * log |det W|, by an LU decomposition, O(d^3)
    once a call, as is the inverse. On images [b, H, W, C] this is an invertible 1x1 convolution in
    its plain form; `invertible_conv_1x1` is in the LU form. Nothing keeps W regular: where training
    drives it towards a singular matrix the log-det falls to -inf; `lu` and `qr` cannot become
    singular.

    Args:
        features: d, the size of the last axis.

    Returns:
        Bijector: the map, with params {'matrix': [d, d], 'shift': [d]}.

    Raises:
        ValueError: features is below 1, or the last axis of x has another size.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> params = {"matrix": jnp.array([[2.0, 0.0], [1.0, 1.0]]), "shift": jnp.array([0.0, 5.0])}
        >>> x, log_det = bijectors.linear(2).forward(params, jnp.ones((1, 2)))
        >>> x.tolist(), round(float(log_det[0]), 3)  # log 2
        ([[2.0, 7.0]], 0.693)

    References:
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018,
            arXiv:1807.03039.
    """

    def init(key, zeros):
        return {"matrix": jax.random.orthogonal(key, features, dtype=zeros.dtype)}

    def matrix(params):
        return params["matrix"]

    def inverse_matrix(params):
        return jnp.linalg.inv(params["matrix"])

    def log_det(params):
        return jnp.linalg.slogdet(params["matrix"])[1]

    return _linear("linear", features, init, matrix, inverse_matrix, log_det)


def householder(features: int, count: int | None = None) -> Bijector:
    """Rotate the last axis by a product of Householder reflections.

    x = Q z with Q = H_1 ... H_count, H = I - 2 v v^T / v^T v, so log_det = 0.

    Args:
        features: d, the size of the last axis.
        count: the number of reflections. None is d, which reaches every orthogonal matrix of
            determinant (-1)^d.

    Returns:
        Bijector: the map, with params {'vectors': [count, d]}, random at first; only their
            directions count.

    Raises:
        ValueError: features or count is below 1, or the last axis of x has another size.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> params = {"vectors": jnp.array([[1.0, 0.0]])}
        >>> bijectors.householder(2, 1).forward(params, jnp.array([[3.0, 4.0]]))[0].tolist()
        [[-3.0, 4.0]]

    References:
        Tomczak, Welling, *Improving Variational Auto-Encoders using Householder Flow*, 2016,
            arXiv:1611.09630.
    """
    count = features if count is None else count
    check_whole("householder", count=count)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check(x)
        return {"vectors": jax.random.normal(key, (count, features), float_dtype(x))}

    def check(x):
        check_channels("householder", x, features)

    def turn(x, matrix):
        check(x)
        return jnp.matmul(x, matrix, precision=_FULL).astype(x.dtype), zero_log_det(x)

    def forward(params, z, cond=None, *, key=None):
        return turn(z, _reflections(params["vectors"]).T)

    def inverse(params, x, cond=None, *, key=None):
        return turn(x, _reflections(params["vectors"]))

    check_whole("householder", features=features)
    return compiled(Bijector(init, forward, inverse))


def qr(features: int, count: int | None = None) -> Bijector:
    """Multiply the last axis by a matrix in its QR form and add a shift: x = Q R z + shift.

    Q is a product of `count` reflections as in `householder`, R upper triangular with a positive
    diagonal. The map starts at a random orthogonal matrix, and no params make it singular. log_det
    = positions * sum(log_diagonal).

    Args:
        features: d, the size of the last axis.
        count: the number of reflections; None is d.

    Returns:
        Bijector: the map, with params {'vectors': [count, d], 'upper': [d, d], 'log_diagonal': [d],
            'shift': [d]}; of 'upper' the strict triangle is used.

    Raises:
        ValueError: features or count is below 1, or the last axis of x has another size.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> params = bijectors.qr(2, 1).init(jax.random.key(0), jnp.ones((1, 2)))
        >>> params["vectors"].shape, params["upper"].shape
        ((1, 2), (2, 2))

    References:
        Hoogeboom, van den Berg, Welling, *Emerging Convolutions for Generative Normalizing Flows*,
            2019, arXiv:1901.11137.
    """
    count = features if count is None else count
    check_whole("qr", count=count)

    def init(key, zeros):
        vectors = jax.random.normal(key, (count, features), zeros.dtype)
        return {"vectors": vectors, "upper": zeros, "log_diagonal": zeros[0]}

    def matrix(params):
        return jnp.matmul(_reflections(params["vectors"]), _upper(params), precision=_FULL)

    def inverse_matrix(params):
        return jnp.matmul(
            _inverse(_upper(params).T).T, _reflections(params["vectors"]).T, precision=_FULL
        )

    return compiled(_linear("qr", features, init, matrix, inverse_matrix, _sum_log_diagonal))


def lu(features: int) -> Bijector:
    """Multiply the last axis by a matrix in its LU form and add a shift: x = L U z + shift.

    L is unit lower and U upper triangular with a positive diagonal. The map starts at the identity,
    and no params make it singular. log_det = positions * sum(log_diagonal), in nats. Both
    directions are one matrix product. A permutation, which a general PLU form also has, is a layer
    of its own: `permute`. On images see `invertible_conv_1x1`.

    Also known as: LU linear layer, invertible linear layer.

    Args:
        features: d, the size of the last axis.

    Returns:
        Bijector: the map, with params {'lower': [d, d], 'upper': [d, d], 'log_diagonal': [d],
            'shift': [d]}; of 'lower' and 'upper' the strict triangles are used.

    Raises:
        ValueError: features is below 1, or the last axis of x has another size.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijector, z = bijectors.lu(2), jnp.ones((1, 2))
        >>> params = bijector.init(jax.random.key(0), z)
        >>> params["upper"] = jnp.array([[0.0, 3.0], [0.0, 0.0]])
        >>> bijector.forward(params, z)[0].tolist()
        [[4.0, 1.0]]

    References:
        Oliva, Dubey, Zaheer, et al., *Transformation Autoregressive Networks*, 2018,
            arXiv:1801.09819.
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018,
            arXiv:1807.03039.
    """

    def init(key, zeros):
        return {"lower": zeros, "upper": zeros, "log_diagonal": zeros[0]}

    def lower(params):
        below = np.tri(features, k=-1, dtype=bool)
        return jnp.where(below, params["lower"], np.eye(features, dtype=params["lower"].dtype))

    def matrix(params):
        return jnp.matmul(lower(params), _upper(params), precision=_FULL)

    def inverse_matrix(params):
        both = _inverse(jnp.stack([_upper(params).T, lower(params)]))
        return jnp.matmul(both[0].T, both[1], precision=_FULL)

    return _linear("lu", features, init, matrix, inverse_matrix, _sum_log_diagonal)


def invertible_conv_1x1(channels: int) -> Bijector:
    """Glow's invertible 1x1 convolution: one matrix for the channels of all pixels, in its LU form.

    At every pixel of z [b, H, W, C] the map is x = L U z + shift, L unit lower and U upper
    triangular with a positive diagonal: `lu` over the last axis of images. log_det = H W
    sum(log_diagonal), in nats. Both directions are one matrix product, and no params make it
    singular. Ours: it starts at the identity, where the paper starts at a random rotation; a
    permutation of the channels, which the PLU form of the paper also has, is a layer of its own
    (`permute`); and there is a shift. `linear` and `qr` are the free and the QR form.

    Also known as: 1x1 convolution, conv1x1, invertible convolution, Glow convolution.

    Args:
        channels: C.

    Returns:
        Bijector: the map, with params {'lower': [C, C], 'upper': [C, C], 'log_diagonal': [C],
            'shift': [C]}; of 'lower' and 'upper' the strict triangles are used.

    Raises:
        ValueError: channels is below 1, or x is not [b, H, W, C].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijector, z = bijectors.invertible_conv_1x1(2), jnp.ones((1, 4, 4, 2))
        >>> params = bijector.init(jax.random.key(0), z)
        >>> params["log_diagonal"] += 0.5
        >>> x, log_det = bijector.forward(params, z)
        >>> x.shape, float(log_det[0])  # 16 pixels, 2 channels
        ((1, 4, 4, 2), 16.0)

    References:
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018,
            arXiv:1807.03039.
    """
    check_whole("invertible_conv_1x1", channels=channels)
    bijector = lu(channels)

    def check(x):
        if x.ndim != 4 or x.shape[-1] != channels:
            raise ValueError(
                f"invertible_conv_1x1: expected x of shape [b, H, W, {channels}], "
                f"got {list(x.shape)}"
            )

    def init(key, x, cond=None, *, side="data"):
        check(x)
        return bijector.init(key, x, side=side)

    def forward(params, z, cond=None, *, key=None):
        check(z)
        return bijector.forward(params, z)

    def inverse(params, x, cond=None, *, key=None):
        check(x)
        return bijector.inverse(params, x)

    return Bijector(init, forward, inverse)


def _linear(name, features, init_factors, matrix, inverse_matrix, log_abs_det) -> Bijector:
    """x = matrix(params) z + params['shift'] on the last axis."""
    check_whole(name, features=features)

    def check(x):
        check_channels(name, x, features)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check(x)
        zeros = jnp.zeros_like(x, shape=(features, features), dtype=float_dtype(x))
        return {**init_factors(key, zeros), "shift": zeros[0]}

    def log_det(params, x):
        positions = math.prod(x.shape[1:-1])
        return zero_log_det(x) + positions * log_abs_det(params).astype(float_dtype(x))[None]

    def shift(params, x):
        return params["shift"].reshape((1,) * (x.ndim - 1) + (features,))

    def forward(params, z, cond=None, *, key=None):
        check(z)
        x = jnp.matmul(z, matrix(params).T, precision=_FULL) + shift(params, z)
        return x.astype(z.dtype), log_det(params, z)

    def inverse(params, x, cond=None, *, key=None):
        check(x)
        z = jnp.matmul(x - shift(params, x), inverse_matrix(params).T, precision=_FULL)
        return z.astype(x.dtype), -log_det(params, x)

    return Bijector(init, forward, inverse)


def _upper(params) -> Array:
    features = params["upper"].shape[-1]
    diagonal = jnp.where(np.eye(features, dtype=bool), jnp.exp(params["log_diagonal"])[None], 0)
    return jnp.where(np.tri(features, dtype=bool), diagonal, params["upper"])


def _inverse(lower: Array) -> Array:
    """The inverses of lower triangular matrices [..., d, d], in 2 log2(d) products.

    Blocks of s rows, of which the inverses stand on the diagonal of x, join to blocks of 2 s by
    [[a, 0], [c, b]]^-1 = [[a^-1, 0], [-b^-1 c a^-1, b^-1]]. XLA's CPU backend takes a hundred times
    longer to solve for the rows of a batch.
    """
    d = lower.shape[-1]
    block = np.arange(d)
    eye = np.broadcast_to(np.eye(d, dtype=bool), lower.shape)
    x = jnp.where(eye, 1 / jnp.where(eye, lower, 1), 0)
    for level in range(math.ceil(math.log2(d))):
        half, whole = block >> level, block >> (level + 1)
        joins = (whole[:, None] == whole[None, :]) & (half[:, None] > half[None, :])
        c = jnp.where(np.broadcast_to(joins, lower.shape), lower, 0)
        x = x - jnp.matmul(x, jnp.matmul(c, x, precision=_FULL), precision=_FULL)
    return x


def _sum_log_diagonal(params) -> Array:
    return jnp.sum(params["log_diagonal"], dtype=float_dtype(params["log_diagonal"]))


def _reflections(vectors: Array) -> Array:
    """H_1 H_2 ... [d, d] for vectors [count, d]."""

    def reflect(matrix, v):
        v = v / jnp.sqrt(jnp.maximum(jnp.sum(v * v), jnp.finfo(v.dtype).tiny))
        along = jnp.matmul(matrix, v, precision=_FULL)
        return matrix - 2 * along[:, None] * v[None, :], None

    start = jnp.zeros_like(vectors, shape=vectors.shape[1:] * 2) + jnp.eye(
        vectors.shape[1], dtype=vectors.dtype
    )
    return jax.lax.scan(reflect, start, vectors)[0]
