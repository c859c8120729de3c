"""Classifier-free guidance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._util import expand_to, like_rows
from jflow.fields import rows
from jflow.types import Array, PyTree, Velocity

__all__ = ["cfg"]


def cfg(velocity: Velocity, scale: float | Callable[[Array], Array], *, null: PyTree) -> Velocity:
    """Guided velocity v_null + scale (v_cond - v_null): scale 1 is the conditional one, 0 the unconditional.

    scale: a number, or t [b] -> [b]. null: one row of cond without the batch axis, as `losses.flow_matching(drop=,
    null=)` trained it. Both halves are one evaluation of 2b rows; `init` and params are the velocity's own. The
    papers' w is scale - 1 (Ho and Salimans) or scale (Imagen, diffusers).
    Errors: ValueError where cond is None or null is not a row of it.
    Source: Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022.
    """

    def apply(params, x, t, cond=None, *, key=None):
        if cond is None:
            raise ValueError("cfg: expected cond, what to guide towards, got None")
        cond = jax.tree.map(jnp.asarray, cond)
        n = jax.tree.leaves(x)[0].shape[0]
        t = rows(t, n)
        double = lambda a, b: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), a, b)  # noqa: E731
        both = velocity.apply(params, double(x, x), double(t, t), double(cond, like_rows("cfg", null, cond)), key=key)
        w = scale(t) if callable(scale) else jnp.full_like(t, scale)

        def guide(v):
            conditional, unconditional = v[:n], v[n:]
            return unconditional + expand_to(w, conditional).astype(v.dtype) * (conditional - unconditional)

        return jax.tree.map(guide, both)

    return Velocity(velocity.init, apply)
