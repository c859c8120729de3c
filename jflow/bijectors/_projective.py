"""Maps of directions: a projective linear map, a map of a part given the rest, and rotations."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jflow import manifolds
from jflow._core.arrays import float_dtype, zero_log_det
from jflow._core.checks import check_event, check_side
from jflow.bijectors._combinators import on_part
from jflow.bijectors._linear import lu
from jflow.types import Array, Bijector, Transport

__all__ = ["given_rest", "pair_products", "projective", "rotation_matrix"]

_Map = TypeVar("_Map", Bijector, Transport, Bijector | Transport)


def projective(features: int) -> Bijector:
    """Turn unit vectors by a linear map, x = A z / |A z|, with the same map for z and -z.

    Also known as: double Moebius map, projective linear map, angular central Gaussian.

        x = |z| A z / |A z|,    log_det = log |det A| - d log(|A z| / |z|),

    on the last axis, in nats, added up over the positions before it. The map keeps lengths and
    scales with them, so that log_det is at once the one of space and, for unit vectors, the one of
    the surface of the sphere: a flow over `distributions.uniform_on(manifolds.sphere(d - 1))` has
    densities with respect to the surface. It is odd, f(-z) = -f(z), and so a map of quaternions
    that is one of rotations, which are quaternions up to the sign. A of the paper's double Moebius
    map is (1 + |r|^2) I - 2 r r^T; any A will do, and it is the LU form of `lu` here, whose params
    `amortized` makes a function of other bodies. Two such maps with constant A are one such map: a
    stack needs conditions in between, see `given_rest`.

    Args:
        features: d, the size of the last axis; 4 for quaternions.

    Returns:
        Bijector: the map, with params {'lower': [d, d], 'upper': [d, d], 'log_diagonal': [d]}; of
            'lower' and 'upper' the strict triangles are used. It starts at the identity.

    Raises:
        ValueError: features is below 1, or the last axis of x has another size.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijector, z = bijectors.projective(2), jnp.array([[0.6, 0.8], [-0.6, -0.8]])
        >>> params = bijector.init(jax.random.key(0), z)
        >>> params["upper"] = jnp.array([[0.0, -0.75], [0.0, 0.0]])  # A z = (0, 0.8)
        >>> bijector.forward(params, z)[0].round(3).tolist()
        [[0.0, 1.0], [0.0, -1.0]]

    References:
        Köhler, Invernizzi, de Haan, Noé, *Rigid Body Flows for Sampling Molecular Crystal
            Structures*, 2023, arXiv:2301.11355; the form as a linear map is ours.
        Tyler, *Statistical Analysis for the Angular Central Gaussian Distribution on the Sphere*,
            1987, the law of x for uniform z.
    """
    linear = lu(features)

    def init(key, x, cond=None, *, side="data"):
        params = linear.init(key, x, side=side)
        return {name: params[name] for name in ("lower", "upper", "log_diagonal")}

    def along(direction):
        def apply(params, x, cond=None, *, key=None):
            wide = x.astype(float_dtype(x))
            shift = jnp.zeros_like(params["log_diagonal"])
            y, log_det = direction({**params, "shift": shift}, wide)
            squares = [jnp.sum(jnp.square(v), axis=-1, keepdims=True) for v in (wide, y)]
            before, after = (jnp.where(s == 0, 1, s) for s in squares)  # of the zero vector: 1
            log_ratio = (jnp.log(after) - jnp.log(before)) / 2
            total = jnp.sum(log_ratio, axis=tuple(range(1, x.ndim)))
            return (y * jnp.exp(-log_ratio)).astype(x.dtype), log_det - features * total

        return apply

    return Bijector(init, along(linear.forward), along(linear.inverse))


def pair_products(x: Float[Array, "b *rest d"]) -> Float[Array, "b *rest pairs"]:
    """The products x_i x_j of the numbers of the last axis, i <= j: the same for x and -x.

    What a network may see of a quaternion, where q and -q are one rotation.

    Args:
        x: numbers [b, ..., d].

    Returns:
        The products [b, ..., d (d + 1) / 2].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijectors.pair_products(jnp.array([[2.0, 3.0], [-2.0, -3.0]])).tolist()
        [[4.0, 6.0, 9.0], [4.0, 6.0, 9.0]]
    """
    i, j = np.triu_indices(x.shape[-1])
    return x[..., i] * x[..., j]


def given_rest(
    bijector: _Map, part: slice, features: Callable[[Array], Array] | None = None
) -> _Map:
    """Apply a map to x[..., part], told the rest of x, which passes: a coupling of any bijector.

    Also known as: conditional coupling, coupling of any bijector.

    As `on_part`, and the cond of the bijector is features(rest), or {'rest': features(rest),
    'cond': cond} where there is a cond. With `amortized` inside, every map of this package is a
    coupling layer. On a sphere, given_rest(amortized(projective(2), net), slice(0, 2),
    pair_products) is a map of quaternions that is one of rotations.

    Args:
        bijector: the `Bijector` or `Transport` for the part, which takes the cond.
        part: a slice of the last axis, without a step.
        features: what the bijector is told, a function of the rest [b, ..., d - len(part)]; None is
            the rest itself.

    Returns:
        Bijector: a map of the type of `bijector`; its params are those of `bijector`.

    Raises:
        TypeError: part is not a slice without a step, or bijector is not a `Bijector` or a
            `Transport`.
        ValueError: the last axis of x does not hold the part, or the map changes its shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> shift = bijectors.given_rest(bijectors.amortized(bijectors.affine((1,))), slice(0, 1))
        >>> z = jnp.array([[1.0, 2.0], [1.0, 3.0]])
        >>> params = shift.init(jax.random.key(0), z)
        >>> params["kernel"]["shift"] = jnp.ones((1, 1))  # x_0 = z_0 + z_1
        >>> shift.forward(params, z)[0].tolist()
        [[3.0, 2.0], [4.0, 3.0]]

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density Estimation Using Real NVP*, 2016, arXiv:1605.08803.
    """
    plain = on_part(bijector, part)  # its checks, and the two ends of the part

    def told(x, cond):
        start, stop, _ = part.indices(x.shape[-1])
        rest = jnp.concatenate([x[..., :start], x[..., stop:]], axis=-1)
        rest = rest if features is None else features(rest)
        return rest if cond is None else {"rest": rest, "cond": cond}

    def init(key, x, cond=None, *, side="data"):
        return plain.init(key, x, told(x, cond), side=side)

    def forward(params, z, cond=None, *, key=None):
        return plain.forward(params, z, told(z, cond), key=key)

    def inverse(params, x, cond=None, *, key=None):
        return plain.inverse(params, x, told(x, cond), key=key)

    return type(bijector)(init, forward, inverse)


def rotation_matrix() -> Bijector:
    """From unit quaternions (w, x, y, z) to rotation matrices, two quaternions to one.

        log_det = log 4 = log 8 - log 2,

    the volume of `manifolds.so3`, 8 pi^2, over the surface of the sphere of quaternions, 2 pi^2:
    angles are doubled, and two points meet in one. So a flow of quaternions whose density is even,
    p(q) = p(-q), becomes one of rotations, and log_prob is with respect to the volume of
    `manifolds.so3`; with respect to the uniform (Haar) law it is log(8 pi^2) more. The inverse is
    one of the two quaternions, the one with w >= 0.

    Also known as: quaternion to matrix, double cover.

    Returns:
        Bijector: the map [b, 4] -> [b, 3, 3], without params; it wants an even density, as
            stacks of `projective` and `given_rest` with `pair_products` over the uniform law have.

    Raises:
        ValueError: z is not [b, 4], or x not [b, 3, 3].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> quarter = jnp.array([[1.0, 0.0, 0.0, 1.0]]) / jnp.sqrt(2.0)
        >>> bijectors.rotation_matrix().forward({}, quarter)[0].round(3).tolist()
        [[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]

    References:
        Köhler, Invernizzi, de Haan, Noé, *Rigid Body Flows for Sampling Molecular Crystal
            Structures*, 2023, arXiv:2301.11355.
    """

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check_event("rotation_matrix", x, (3, 3) if side == "data" else (4,))
        return {}

    def forward(params, z, cond=None, *, key=None):
        check_event("rotation_matrix", z, (4,))
        return manifolds.from_quaternion(z), zero_log_det(z) + math.log(4)

    def inverse(params, x, cond=None, *, key=None):
        check_event("rotation_matrix", x, (3, 3))
        return manifolds.to_quaternion(x), zero_log_det(x) - math.log(4)

    return Bijector(init, forward, inverse)
