"""Manifolds of matrices: symmetric positive definite ones, and rotations of space."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.checks import check_whole
from jflow.manifolds import _smooth, _symmetric
from jflow.manifolds._checked import checked
from jflow.manifolds._symmetric import EXP, LOG, symmetric, transpose
from jflow.types import Array, Manifold

__all__ = ["from_quaternion", "so3", "spd", "spd_log_euclidean", "to_quaternion"]


def spd(n: int) -> Manifold:
    """Symmetric positive definite n x n matrices with the affine-invariant metric.

    Also known as: covariance matrices, SPD manifold.

        inner(X, U, V) = tr(X^-1 U X^-1 V)
        exp_X(V) = L expm(L^-1 V L^-T) L',    log_X(Y) = L logm(L^-1 Y L^-T) L',    X = L L'

    Distances do not change under X -> A X A'. `project` is the symmetric part with its eigenvalues
    brought above 4 machine epsilons of the largest. `random` draws expm(S), the wrapped normal law
    of deviation 1 around the identity. With m the eigenvalues of L^-1 V L^-T,

        det d exp_X(V) = prod over i < j of sinh((m_i - m_j) / 2) / ((m_i - m_j) / 2)

    and the volume of the metric is that of the coordinates times det(X)^(-(n + 1) / 2), of which
    `solvers.riemannian_divergence` takes account.

    Args:
        n: the number of rows, at least 1; the dimension is n (n + 1) / 2.

    Returns:
        Manifold: points [n, n].

    Raises:
        ValueError: n is not a whole number of at least 1.

    Examples:
        >>> import math
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> matrices = manifolds.spd(2)
        >>> y = math.e * jnp.eye(2)
        >>> round(float(matrices.dist(jnp.eye(2), y)), 4)  # sqrt(1 + 1)
        1.4142
        >>> round(float(matrices.dist(4 * jnp.eye(2), 4 * y)), 4)
        1.4142

    References:
        Pennec, Fillard, Ayache, *A Riemannian Framework for Tensor Computing*, 2006.
    """
    check_whole("manifolds.spd", n=n)
    dim = n * (n + 1) // 2

    def exp(x, v):
        factor = _factor(x)
        return _from(factor, EXP.of(_to(factor, v)))

    def log(x, y):
        factor = _factor(x)
        return _from(factor, LOG.of(_to(factor, y)))

    def log_det_exp(x, v):
        m = jnp.linalg.eigvalsh(_to(_factor(x), v))
        i, j = jnp.triu_indices(n, 1)
        return jnp.sum(_smooth.log_sinhc(jnp.square((m[..., i] - m[..., j]) / 2)), axis=-1)

    def inner(x, u, v):
        factor = _factor(x)
        return jnp.sum(_to(factor, u) * _to(factor, v), axis=(-1, -2))

    def random(key, k):
        s = jnp.tensordot(jax.random.normal(key, (k, dim)), _symmetric.basis(n, float), 1)
        return EXP.of(s)

    made = Manifold(
        shape=(n, n),
        dim=dim,
        exp=exp,
        log=log,
        dist=lambda x, y: _smooth.norm(LOG.of(_to(_factor(x), y)), 2),
        project=_nearest_positive,
        to_tangent=lambda x, v: symmetric(v) + jnp.zeros_like(x),
        inner=inner,
        tangent_basis=lambda x: _from(_factor(x)[..., None, :, :], _symmetric.basis(n, x.dtype)),
        random=random,
        log_volume=math.inf,
        log_det_exp=log_det_exp,
        log_volume_element=lambda x: -(n + 1) * _half_log_det(x),
        embed=lambda x: x,
        injective=((dim, math.inf),),
    )
    return checked("spd", made)


def spd_log_euclidean(n: int) -> Manifold:
    """Symmetric positive definite n x n matrices with the metric in which logm is an isometry.

        exp_X(V) = expm(logm X + Dlogm_X[V]),    dist(X, Y) = |logm X - logm Y|

    The space is flat. `project` and `random` are those of `spd`. The volume of the metric is that
    of the coordinates times the product over i <= j of the divided differences of the logarithm at
    the eigenvalues of X.

    Args:
        n: the number of rows, at least 1; the dimension is n (n + 1) / 2.

    Returns:
        Manifold: points [n, n].

    Raises:
        ValueError: n is not a whole number of at least 1.

    Examples:
        >>> import math
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> matrices = manifolds.spd_log_euclidean(2)
        >>> middle = matrices.exp(jnp.eye(2), matrices.log(jnp.eye(2), 9 * jnp.eye(2)) / 2)
        >>> round(float(middle[0, 0]), 4)
        3.0

    References:
        Arsigny, Fillard, Pennec, Ayache, *Geometric Means in a Novel Vector Space Structure on
            Symmetric Positive-Definite Matrices*, 2007.
    """
    check_whole("manifolds.spd_log_euclidean", n=n)
    dim = n * (n + 1) // 2
    affine = spd(n)

    def log_volume_element(x):
        values = jnp.linalg.eigvalsh(x)
        i, j = jnp.triu_indices(n)
        return jnp.sum(jnp.log(_symmetric.log_slope(values[..., i], values[..., j])), axis=-1)

    def basis(x):
        at = jnp.broadcast_to(LOG.of(x)[..., None, :, :], (*x.shape[:-2], dim, n, n))
        return EXP.along(at, jnp.broadcast_to(_symmetric.basis(n, x.dtype), at.shape))

    def log(x, y):
        at = LOG.of(x)
        return EXP.along(*jnp.broadcast_arrays(at, LOG.of(y) - at))

    made = affine._replace(
        exp=lambda x, v: EXP.of(LOG.of(x) + _along(x, v)),
        log=log,
        dist=lambda x, y: _smooth.norm(LOG.of(y) - LOG.of(x), 2),
        inner=lambda x, u, v: jnp.sum(_along(x, u) * _along(x, v), axis=(-1, -2)),
        tangent_basis=basis,
        log_det_exp=lambda x, v: jnp.zeros_like((x + v)[..., 0, 0]),
        log_volume_element=log_volume_element,
    )
    return checked("spd_log_euclidean", made)


def so3() -> Manifold:
    """Rotations of space as matrices R, with the angle of rotation as distance.

        inner(R, U, V) = tr(U'V) / 2,    exp_R(R [w]) = R expm([w]),    [w] x = w cross x

    exp is Rodrigues' formula, log goes through quaternions and is exact to rounding at every angle;
    for half a turn, where w and -w are both shortest, it is one of them. `project` is the nearest
    rotation, by singular values. `random` is uniform (Haar); the volume is 8 pi^2. det d exp =
    (sin(|w| / 2) / (|w| / 2))^2.

    Returns:
        Manifold: points [3, 3], of dimension 3.

    Examples:
        >>> import math
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> rotations = manifolds.so3()
        >>> quarter = jnp.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> round(float(rotations.dist(jnp.eye(3), quarter)) / math.pi, 4)
        0.5
    """

    def exp(x, v):
        w = _axial(transpose(x) @ v)
        return x @ _rotation(w)

    def log(x, y):
        return x @ _cross(_vector(transpose(x) @ y))

    def log_det_exp(x, v):
        s = _smooth.square(v, 2)[..., 0] / 8 + jnp.zeros_like(x[..., 0, :1])  # (|w| / 2)^2
        value = jnp.abs(_smooth.sinc(s))[..., 0]
        return 2 * jnp.log(jnp.maximum(value, jnp.finfo(value.dtype).tiny))

    def to_tangent(x, v):
        a = transpose(x) @ v
        return x @ ((a - transpose(a)) / 2)

    def random(key, n):
        return from_quaternion(jax.random.normal(key, (n, 4)))

    made = Manifold(
        shape=(3, 3),
        dim=3,
        exp=exp,
        log=log,
        dist=lambda x, y: _smooth.norm(_vector(transpose(x) @ y)),
        project=_nearest_rotation,
        to_tangent=to_tangent,
        inner=lambda x, u, v: jnp.sum(u * v, axis=(-1, -2)) / 2 + jnp.zeros_like(x[..., 0, 0]),
        tangent_basis=lambda x: x[..., None, :, :] @ _cross(jnp.eye(3, dtype=x.dtype)),
        random=random,
        log_volume=math.log(8 * math.pi**2),
        log_det_exp=log_det_exp,
        log_volume_element=lambda x: jnp.zeros_like(x[..., 0, 0]),
        embed=lambda x: x,
        injective=((3, math.pi),),
    )
    return checked("so3", made)


def from_quaternion(q: Float[Array, "*rest 4"]) -> Float[Array, "*rest 3 3"]:
    """The rotation matrix of a quaternion; q and -q are one rotation.

        R v = q v q^-1,    q = (w, x, y, z) = (cos(angle / 2), sin(angle / 2) axis)

    Args:
        q: quaternions [..., 4], the real part w first, of any length but 0.

    Returns:
        Rotation matrices [..., 3, 3].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> manifolds.from_quaternion(jnp.array([0.0, 0.0, 0.0, 1.0])).tolist()  # half a turn
        [[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    w, v = q[..., :1], q[..., 1:]
    s = (_smooth.square(q))[..., None]
    skew = _cross(v)
    return _smooth.unit(3, skew) + 2 / s * (w[..., None] * skew + skew @ skew)


def to_quaternion(r: Float[Array, "*rest 3 3"]) -> Float[Array, "*rest 4"]:
    """The unit quaternion of a rotation matrix with a real part of at least 0.

    It is read off the row of the products of its numbers whose square is the largest, which is
    exact to rounding at every angle.

    Args:
        r: rotation matrices [..., 3, 3].

    Returns:
        Quaternions (w, x, y, z), [..., 4], of length 1 and with w >= 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> manifolds.to_quaternion(jnp.diag(jnp.array([-1.0, -1.0, 1.0]))).tolist()  # half a turn
        [0.0, 0.0, 0.0, 1.0]
    """
    x, y, z = r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]
    squares = [1 + x + y + z, 1 + x - y - z, 1 - x + y - z, 1 - x - y + z]  # 4 q_i^2
    a = 2 * _axial(r)  # 4 w (x, y, z)
    xy, xz, yz = (r[..., i, j] + r[..., j, i] for i, j in ((0, 1), (0, 2), (1, 2)))  # 4 x y, ...
    grid = [
        [squares[0], a[..., 0], a[..., 1], a[..., 2]],
        [a[..., 0], squares[1], xy, xz],
        [a[..., 1], xy, squares[2], yz],
        [a[..., 2], xz, yz, squares[3]],
    ]
    rows = jnp.stack([jnp.stack(row, axis=-1) for row in grid], axis=-2)  # q_i q, times 4
    largest = jnp.argmax(jnp.stack(squares, axis=-1), axis=-1)
    q = jnp.take_along_axis(rows, largest[..., None, None], axis=-2)[..., 0, :]
    q = q / _smooth.norm(q)[..., None]
    return jnp.where(q[..., :1] < 0, -q, q)


def _factor(x):
    return jnp.linalg.cholesky(x, symmetrize_input=True)


def _to(factor, a):
    """L^-1 A L^-T of a symmetric A."""
    factor, a = jnp.broadcast_arrays(factor, symmetric(a))
    solve = lambda b: jax.scipy.linalg.solve_triangular(factor, b, lower=True)  # noqa: E731
    return symmetric(solve(transpose(solve(a))))


def _from(factor, a):
    """L A L'."""
    return symmetric(factor @ a @ transpose(factor))


def _half_log_det(x):
    return jnp.sum(jnp.log(jnp.diagonal(_factor(x), axis1=-1, axis2=-2)), axis=-1)


def _along(x, v):
    return LOG.along(*jnp.broadcast_arrays(x, symmetric(v)))


@jax.custom_jvp
def _nearest_positive(x):
    return _raised(x)[0]


@_nearest_positive.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    raised, values, floor, u = _raised(x)
    a, b = values[..., :, None], values[..., None, :]
    both = (a >= floor[..., None]) & (b >= floor[..., None])
    neither = (a < floor[..., None]) & (b < floor[..., None])
    gap = jnp.where(both | neither, 1.0, a - b)
    high = jnp.maximum(a, floor[..., None]) - jnp.maximum(b, floor[..., None])
    slope = jnp.where(both, 1.0, jnp.where(neither, 0.0, high / gap))
    return raised, _symmetric.from_basis(u, slope * _symmetric.in_basis(u, symmetric(dx)))


def _raised(x):
    """(the matrix with its eigenvalues raised, those before, what they are raised to, vectors)."""
    x = symmetric(x)
    values, u = jnp.linalg.eigh(x)
    info = jnp.finfo(x.dtype)
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    floor = jnp.maximum(4 * info.eps * largest, 1e4 * info.tiny)
    change = jnp.maximum(floor - values, 0.0)  # 0 for a point, which stays as it is to the bit
    return x + _symmetric.from_basis(u, _symmetric.diagonal(change)), values, floor, u


def _cross(w):
    """The matrix [w] of the cross product with w."""
    x, y, z = w[..., 0], w[..., 1], w[..., 2]
    zero = jnp.zeros_like(x)
    rows = [zero, -z, y, z, zero, -x, -y, x, zero]
    return jnp.stack(rows, axis=-1).reshape(*w.shape[:-1], 3, 3)


def _axial(a):
    """The w of the skew part [w] of a matrix."""
    parts = [a[..., 2, 1] - a[..., 1, 2], a[..., 0, 2] - a[..., 2, 0], a[..., 1, 0] - a[..., 0, 1]]
    return jnp.stack(parts, axis=-1) / 2


def _rotation(w):
    """expm([w]) = I + sin r / r [w] + (1 - cos r) / r^2 [w]^2."""
    s = _smooth.square(w)[..., None]
    skew = _cross(w)
    half = _smooth.sinc(s / 4)
    return _smooth.unit(3, skew) + _smooth.sinc(s) * skew + half * half / 2 * (skew @ skew)


def _vector(r):
    """The rotation vector w with expm([w]) = r and |w| <= pi."""
    q = to_quaternion(r)
    w, v = q[..., :1], q[..., 1:]
    s = _smooth.square(v)
    near = s < 0.5
    small = 2 * _smooth.arcsinc(jnp.where(near, s, 0.25))
    length = jnp.sqrt(jnp.where(near, 1.0, s))
    return jnp.where(near, small, 2 * jnp.arctan2(length, w) / length) * v


@jax.custom_jvp
def _nearest_rotation(a):
    u, _, vt = jnp.linalg.svd(a)
    sign = jnp.where(jnp.linalg.det(u) * jnp.linalg.det(vt) < 0, -1.0, 1.0).astype(a.dtype)
    u = u.at[..., 2].multiply(sign[..., None])
    return u @ vt


@_nearest_rotation.defjvp
def _(primals, tangents):
    """a = R S with S symmetric: dR = R [w] with (tr(S) I - S) w = axial(R'da - da'R)."""
    (a,), (da,) = primals, tangents
    r = _nearest_rotation(a)
    s = symmetric(transpose(r) @ a)
    turned = 2 * _axial(transpose(r) @ da)
    matrix = jnp.trace(s, axis1=-2, axis2=-1)[..., None, None] * _smooth.unit(3, s) - s
    w = jnp.linalg.solve(matrix, turned[..., None])[..., 0]
    return r, r @ _cross(w)
