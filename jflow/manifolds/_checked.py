"""What all constructors share: shapes are checked by name, and numbers are float32 at least."""

import functools
import inspect

import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow.types import Manifold

_POINTS = ("exp", "log", "project", "to_tangent", "tangent_basis", "embed")  # in the type of x
_NUMBERS = ("dist", "inner", "log_det_exp", "log_volume_element")  # float32 at least


def checked(name: str, manifold: Manifold) -> Manifold:
    """`manifold` with functions that compute in float32 at least, and raise, in the name of its
    constructor, for arrays that are not [..., *shape]."""
    shape = manifold.shape

    def guarded(what, function):
        where = f"{name}.{what}"
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def guard(*arrays):
            if len(arrays) != len(names):
                raise TypeError(f"{where}: expected {', '.join(names)}, got {len(arrays)} arrays")
            arrays = tuple(map(jnp.asarray, arrays))
            for of, array in zip(names, arrays, strict=True):
                if array.ndim < len(shape) or array.shape[array.ndim - len(shape) :] != shape:
                    expected = ", ".join(["...", *map(str, shape)])
                    raise ValueError(
                        f"{where}: expected {of} of shape [{expected}], got {list(array.shape)}"
                    )
            ranks = {array.ndim for array in arrays}
            if len(ranks) > 1:  # broadcast on purpose: one point for all rows
                rank = max(ranks)
                arrays = tuple(a.reshape((1,) * (rank - a.ndim) + a.shape) for a in arrays)
            wide = float_dtype(*arrays)
            out = function(*(array.astype(wide) for array in arrays))
            own = arrays[0].dtype
            return out.astype(own) if what in _POINTS and jnp.issubdtype(own, jnp.floating) else out

        return guard

    changed = {what: guarded(what, getattr(manifold, what)) for what in (*_POINTS, *_NUMBERS)}
    return manifold._replace(**changed)
