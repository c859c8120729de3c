"""Linear bijectors on the last axis, and rearrangements of it."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow._util import check_event, check_side, float_dtype, no_params, zero_log_det
from jflow.types import Array, Bijector

__all__ = ["lu", "permute", "reshape", "reverse"]

_FULL = jax.lax.Precision.HIGHEST  # accelerators multiply float32 in fewer bits by default; the inverse would not match


def permute(permutation) -> Bijector:
    """x[..., i] = z[..., permutation[i]]. The permutation is fixed, not a parameter; it may be a scanned `xs_i`."""
    if not isinstance(permutation, jax.core.Tracer):
        permutation = np.asarray(permutation)
        if permutation.ndim != 1 or not np.array_equal(np.sort(permutation), np.arange(permutation.size)):
            raise ValueError(f"permute: expected a permutation of 0..d-1, got {permutation.tolist()}")

    def check(x):
        if x.ndim < 2 or x.shape[-1] != permutation.shape[0]:
            raise ValueError(f"permute: expected x of shape [b, ..., {permutation.shape[0]}], got {list(x.shape)}")

    def forward(params, z, cond=None, *, key=None):
        check(z)
        return jnp.take(z, permutation, axis=-1, unique_indices=True, mode="clip"), zero_log_det(z)

    def inverse(params, x, cond=None, *, key=None):
        check(x)
        return jnp.take(x, jnp.argsort(permutation), axis=-1, unique_indices=True, mode="clip"), zero_log_det(x)

    return Bijector(no_params, forward, inverse)


def reverse() -> Bijector:
    """x[..., i] = z[..., d-1-i]."""

    def flip(params, x, cond=None, *, key=None):
        return jnp.flip(x, axis=-1), zero_log_det(x)

    return Bijector(no_params, flip, flip)


def reshape(source_shape: tuple[int, ...], data_shape: tuple[int, ...]) -> Bijector:
    """Events of `source_shape` to events of `data_shape`, in row-major order."""
    source_shape, data_shape = tuple(source_shape), tuple(data_shape)
    if np.prod(source_shape, dtype=int) != np.prod(data_shape, dtype=int):
        raise ValueError(f"reshape: {list(source_shape)} and {list(data_shape)} differ in size")

    def to(given, wanted):
        def apply(params, x, cond=None, *, key=None):
            check_event("reshape", x, given)
            return x.reshape(x.shape[0], *wanted), zero_log_det(x)

        return apply

    return Bijector(no_params, to(source_shape, data_shape), to(data_shape, source_shape))


def lu(features: int) -> Bijector:
    """x = L U z + shift on the last axis, L unit lower and U upper triangular with a positive diagonal.

    Params 'lower' and 'upper' [d, d] (of which the strict triangles are used), 'log_diagonal' and 'shift' [d]; starts at
    the identity. log_det = positions * sum(log_diagonal). The inverse solves two triangular systems, O(d^2) a row.
    Oliva et al., *Transformation Autoregressive Networks* (2018); Kingma, Dhariwal, *Glow* (2018). A permutation, which a
    general PLU form also has, is a layer of its own here.
    """

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check(x)
        zeros = jnp.zeros_like(x, shape=(features, features), dtype=float_dtype(x))
        return {"lower": zeros, "upper": zeros, "log_diagonal": zeros[0], "shift": zeros[0]}

    def check(x):
        if x.ndim < 2 or x.shape[-1] != features:
            raise ValueError(f"lu: expected x of shape [b, ..., {features}], got {list(x.shape)}")

    def factors(params) -> tuple[Array, Array]:
        lower = jnp.tril(params["lower"], -1) + jnp.eye(features, dtype=params["lower"].dtype)
        upper = jnp.triu(params["upper"], 1) + jnp.diag(jnp.exp(params["log_diagonal"]))
        return lower, upper

    def log_det(params, x):
        positions = x.size // (x.shape[0] * features)
        return zero_log_det(x) + positions * jnp.sum(params["log_diagonal"], dtype=float_dtype(x))[None]

    def forward(params, z, cond=None, *, key=None):
        check(z)
        lower, upper = factors(params)
        matrix = jnp.matmul(lower, upper, precision=_FULL)
        x = jnp.matmul(z, matrix.T, precision=_FULL) + params["shift"].reshape((1,) * (z.ndim - 1) + (features,))
        return x.astype(z.dtype), log_det(params, z)

    def inverse(params, x, cond=None, *, key=None):
        check(x)
        lower, upper = factors(params)
        rows = (x - params["shift"].reshape((1,) * (x.ndim - 1) + (features,))).reshape(-1, features).T
        rows = jax.scipy.linalg.solve_triangular(lower, rows, lower=True, unit_diagonal=True)
        rows = jax.scipy.linalg.solve_triangular(upper, rows, lower=False)
        return rows.T.reshape(x.shape).astype(x.dtype), -log_det(params, x)

    return Bijector(init, forward, inverse)
