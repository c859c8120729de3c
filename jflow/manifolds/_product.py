"""Products of manifolds."""

import math

import jax
import jax.numpy as jnp

from jflow._core.checks import check_noun
from jflow.manifolds import _smooth
from jflow.manifolds._checked import checked
from jflow.types import Manifold

__all__ = ["product"]


def product(*manifolds: Manifold) -> Manifold:
    """The product of manifolds, whose points are those of the factors side by side.

    A point is [n], the numbers of each factor's point in a row; `jnp.split(x, sizes, axis=-1)`
    takes it apart. The squared distance is the sum of those of the factors. `random` draws the
    factors independently.

    Args:
        *manifolds: the factors, at least one.

    Returns:
        Manifold: points [n], n the sum of the sizes of the factors' points.

    Raises:
        TypeError: what is no manifold.
        ValueError: there is no factor.

    Examples:
        >>> import jax
        >>> from jflow import manifolds
        >>> pose = manifolds.product(manifolds.so3(), manifolds.euclidean(3))
        >>> pose.shape, pose.dim, pose.random(jax.random.key(0), 5).shape
        ((12,), 6, (5, 12))
    """
    if not manifolds:
        raise ValueError("manifolds.product: expected at least one manifold, got none")
    for factor in manifolds:
        check_noun("manifolds.product", factor, Manifold)
    sizes = [math.prod(factor.shape) for factor in manifolds]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    dim = sum(factor.dim for factor in manifolds)

    def apart(x):
        parts = jnp.split(x, ends[:-1], axis=-1)
        return [
            part.reshape(*part.shape[:-1], *factor.shape)
            for part, factor in zip(parts, manifolds, strict=True)
        ]

    def together(parts, rank):  # each [*leading of this rank, *its own]
        flat = [part.reshape(*part.shape[:rank], -1) for part in parts]
        return jnp.concatenate(flat, axis=-1)

    def each(name):
        def run(*arrays):
            split = map(apart, arrays)
            return [
                getattr(factor, name)(*own) for factor, *own in zip(manifolds, *split, strict=True)
            ]

        return run

    def points(name):
        run = each(name)
        return lambda x: together(run(x), x.ndim - 1)

    def vectors(name):
        run = each(name)
        return lambda x, v: together(run(x, v), max(x.ndim, v.ndim) - 1)

    def basis(x):
        rows = []
        for part, factor, end, size in zip(
            each("tangent_basis")(x), manifolds, ends, sizes, strict=True
        ):
            flat = part.reshape(*x.shape[:-1], factor.dim, size)
            before, after = end - size, ends[-1] - end
            rows.append(jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(before, after)]))
        return jnp.concatenate(rows, axis=-2)

    def random(key, n):
        keys = jax.random.split(key, len(manifolds))
        draws = [factor.random(own, n) for factor, own in zip(manifolds, keys, strict=True)]
        return together(draws, 1)

    one, two, three = each("log_volume_element"), each("log_det_exp"), each("inner")
    apart_by = each("dist")
    made = Manifold(
        shape=(ends[-1],),
        dim=dim,
        exp=vectors("exp"),
        log=vectors("log"),
        dist=lambda x, y: _smooth.norm(jnp.stack(apart_by(x, y), axis=-1)),
        project=points("project"),
        to_tangent=vectors("to_tangent"),
        inner=lambda x, u, v: sum(three(x, u, v)),
        tangent_basis=basis,
        random=random,
        log_volume=sum(factor.log_volume for factor in manifolds),
        log_det_exp=lambda x, v: sum(two(x, v)),
        log_volume_element=lambda x: sum(one(x)),
        embed=points("embed"),
        injective=sum((factor.injective for factor in manifolds), ())
        if all(factor.injective for factor in manifolds)
        else (),
    )
    return checked("product", made)
