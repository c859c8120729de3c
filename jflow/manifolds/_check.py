"""Checks of data, which see values, and the lift of a network to a manifold."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.checks import check_noun, like_state
from jflow.types import Field, Manifold, Velocity

__all__ = ["check", "tangent"]


def check(manifold: Manifold, x: ArrayLike, *, tolerance: float = 1e-4) -> None:
    """Raise unless all rows of x are points of a manifold.

    A row is off by |x - project(x)|, in the units of its coordinates. It is for loaders and other
    places that see values: inside jit nothing is checked.

    Args:
        manifold: the manifold.
        x: what should be points, [b, *shape].
        tolerance: by how much a row may be off, times the largest number of the row where that is
            above 1.

    Raises:
        ValueError: x has another shape, or rows that are off or not finite, of which the message
            names the first with their distances; for angles it says where they seem to be degrees.

    Examples:
        >>> import numpy as np
        >>> from jflow import manifolds
        >>> manifolds.check(manifolds.sphere(1), np.array([[0.6, 0.8], [1.0, 0.0]]))
        >>> manifolds.check(manifolds.sphere(1), np.array([[0.6, 0.8], [1.0, 1.0]]))
        Traceback (most recent call last):
            ...
        ValueError: manifolds.check: expected points of the manifold, got 1 of 2 rows that are off \
it, row 1 by 0.414; manifold.project(x) brings them to it
    """
    name = "manifolds.check"
    check_noun(name, manifold, Manifold)
    if isinstance(x, jax.core.Tracer):
        return
    x = np.asarray(x)
    shape = manifold.shape
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape:
        hint = ""
        if shape == (3,) and x.shape[1:] == (2,):
            hint = ": manifolds.from_latitude_longitude makes points of latitudes and longitudes"
        raise ValueError(
            f"{name}: expected x of shape [b, {', '.join(map(str, shape))}], got "
            f"{list(x.shape)}{hint}"
        )
    nearest = np.asarray(manifold.project(jnp.asarray(x)), np.float64)
    difference = (x - nearest).reshape(len(x), -1)
    off = np.sqrt((difference**2).sum(axis=1))
    scale = np.maximum(np.abs(x.reshape(len(x), -1)).max(axis=1, initial=0), 1)
    bad = np.flatnonzero(~(off <= tolerance * scale))
    if not bad.size:
        return
    shown = ", ".join(f"row {i} by {off[i]:.3g}" for i in bad[:3])
    hint = "manifold.project(x) brings them to it"
    turns = difference[bad] / (2 * np.pi)
    whole = np.all(np.isfinite(turns)) and np.all(np.abs(turns - turns.round()) < 1e-3)
    if whole and np.all(np.abs(turns).max(axis=1) > 0.5):
        hint = "its angles are radians in [-pi, pi], which manifold.project(x) wraps"
        if np.abs(x).max() > 4 * np.pi:
            hint = f"angles up to {np.abs(x).max():.4g} seem to be degrees: numpy.radians(x)"
    raise ValueError(
        f"{name}: expected points of the manifold, got {len(bad)} of {len(x)} rows that are off it,"
        f" {shown}; {hint}"
    )


def tangent(velocity: Velocity | Field, manifold: Manifold) -> Velocity:
    """A velocity on a manifold from a network on its coordinates.

        v(x, t) = to_tangent(x, D embed(x)' network(embed(x), t)),    x brought to the manifold

    The network is shown `manifold.embed(project(x))`, such as the cosines and sines of angles, and
    returns as many numbers; the transposed derivative of embed turns them into numbers of x, and
    what is not tangent is taken away. So the output is tangent, and for manifolds whose embedding
    keeps lengths (`sphere`, `so3`, `torus`, `euclidean`, and products of them) the Euclidean
    divergence of it is the one of the manifold. `solvers.riemannian_divergence` is for all.

    Args:
        velocity: the network, of points [b, *embedded] and t, that returns the shape of its points.
        manifold: where the velocity is to live.

    Returns:
        Velocity: of points [b, *shape], with the params of `velocity`. It raises a ValueError for a
            network whose output is not shaped like its input.

    Raises:
        TypeError: for what is no velocity, or no manifold.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds, velocity
        >>> from jflow.nets import TimeMLP
        >>> sphere = manifolds.sphere(2)
        >>> v = manifolds.tangent(velocity(TimeMLP((8,))), sphere)
        >>> x, t = sphere.random(jax.random.key(0), 4), jnp.zeros(4)
        >>> params = v.init(jax.random.key(1), x, t)
        >>> bool(jnp.all(jnp.abs(jnp.sum(x * v.apply(params, x, t), axis=-1)) < 1e-6))
        True

    References:
        Chen, Lipman, *Flow Matching on General Geometries*, 2024, arXiv:2302.03660.
    """
    check_noun("manifolds.tangent", velocity, Velocity, Field)
    check_noun("manifolds.tangent", manifold, Manifold)

    def init(key, x, t, cond=None):
        return velocity.init(key, manifold.embed(manifold.project(x)), t, cond)

    def apply(params, x, t, cond=None, *, key=None):
        x = manifold.project(x)
        shown, pull = jax.vjp(manifold.embed, x)
        v = velocity.apply(params, shown, t, cond, key=key)
        (v,) = pull(like_state("manifolds.tangent", v, shown))
        return manifold.to_tangent(x, v)

    return Velocity(init, apply)
