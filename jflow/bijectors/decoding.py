"""How a causal block of tokens is inverted: x_i = z_i exp(log_scale_i) + mean_i.

Mean and log-scale are functions of x_<i. A sampler is a function (predict, args, cache, z
[b, n, d]) -> Decoded. predict(args, x, cache, first) gives (mean, log_scale, cache): with
cache=None of the whole x in parallel, else of the slots from `first` on whose *preceding* tokens
are x [b, m, d]; args is all that is differentiated beside z.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_whole
from jflow._core.implicit import fixed_point
from jflow.types import Array, PyTree

__all__ = ["Decoded", "Sampler", "cached", "jacobi", "uncached"]


class Decoded(NamedTuple):
    """The tokens that a sampler found, and how it went. Rows that did not converge are NaN.

    Attributes:
        x: the tokens, [b, n, d].
        log_scale: their log-scales, [b, n, d], whose sum over a row is the log-det in nats.
        passes: how many times the network ran (on one token, a block or all of them, as the sampler
            goes), a scalar.
        residual: [b], the largest |x - (z exp(log_scale) + mean)| / (1 + |x|); it is not measured
            but 0 where it vanishes by construction.
        converged: [b], whether a row converged.
    """

    x: Float[Array, "b n d"]
    log_scale: Float[Array, "b n d"]
    passes: Int[Array, ""]
    residual: Float[Array, " b"]
    converged: Bool[Array, " b"]


Sampler = Callable[[Callable, PyTree, Any, Array], Decoded]


def cached() -> Sampler:
    """Decode token after token, with the keys and values of earlier tokens in a cache.

    It takes n steps of one token each; the cache is allocated once. It is the default of
    `bijectors.causal_block`.

    Returns:
        Sampler: the sampler, for `bijectors.causal_block(sampler=...)`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, nets
        >>> net = nets.CausalTransformer(width=4, num_layers=1, num_heads=1)
        >>> bijector = bijectors.causal_block(net, sampler=bijectors.decoding.cached())
        >>> z = jnp.ones((1, 2, 2))
        >>> x, log_det = bijector.forward(bijector.init(jax.random.key(0), z), z)
        >>> x.tolist()  # it starts at the identity
        [[[1.0, 1.0], [1.0, 1.0]]]
    """

    def sample(predict, args, cache, z):
        def step(carry, inputs):
            previous, cache = carry
            z_i, i = inputs
            mean, log_scale, cache = predict(args, previous[:, None], cache, i)
            x = z_i * jnp.exp(log_scale[:, 0]) + mean[:, 0]
            return (x, cache), (x, log_scale[:, 0])

        slots = jnp.arange(z.shape[1])
        _, (x, log_scale) = jax.lax.scan(
            step, (jnp.zeros_like(z[:, 0]), cache), (z.swapaxes(0, 1), slots)
        )
        return _exact(x.swapaxes(0, 1), log_scale.swapaxes(0, 1))

    return sample


def uncached() -> Sampler:
    """Decode token after token by n passes over the whole event.

    It is the definition, to compare the other samplers with. See `cached` for an example.

    Returns:
        Sampler: the sampler, for `bijectors.causal_block(sampler=...)`.
    """

    def sample(predict, args, cache, z):
        slots = jnp.arange(z.shape[1])

        def step(x, i):
            mean, log_scale, _ = predict(args, x, None, 0)
            return jnp.where((slots == i)[None, :, None], z * jnp.exp(log_scale) + mean, x), None

        x, _ = jax.lax.scan(step, jnp.zeros_like(z), slots)
        return _exact(x, predict(args, x, None, 0)[1])

    return sample


def jacobi(block: int = 16, *, tol: float = 1e-5) -> Sampler:
    """Decode blocks of tokens one after another, all tokens of a block at once.

    It is Gauss-Seidel over blocks of `block` tokens and Jacobi inside one: x = z exp(log_scale(x))
    + mean(x) is repeated until no number changes by more than tol (1 + |x|); `block` passes are
    always enough. The earlier blocks stand in the cache. At the end parallel passes over all
    tokens, one as a rule, bring the residual of the whole below tol (or the resolution of the
    type); a row that stays above it is NaN. Derivatives are implicit, by the same kind of iteration
    over all tokens: their memory does not grow with the passes. See `cached` for an example.

    Args:
        block: the number of tokens in a block.
        tol: the tolerance, relative to 1 + |x|.

    Returns:
        Sampler: the sampler, for `bijectors.causal_block(sampler=...)`.

    Raises:
        ValueError: block is below 1, or tol is not positive.

    References:
        Song, Meng, Liao, Ermon,
            *Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving*, 2021,
            arXiv:2002.03629.
        Gu, Chen, Berthelot, et al.,
            *STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis*, 2025,
            arXiv:2506.06276.
    """
    check_whole("jacobi", block=block)
    if not tol > 0:
        raise ValueError(f"jacobi: expected tol > 0, got {tol}")

    def sample(predict, args, cache, z):
        n, m = z.shape[1], min(block, z.shape[1])
        none = jnp.zeros_like(z, shape=(), dtype=jnp.int32)
        frozen, z0 = jax.lax.stop_gradient((args, z))
        # The last block starts early enough to be whole; what it shares with the one before is
        # solved twice.
        starts = jnp.minimum(m * jnp.arange(-(-n // m)), n - m)

        def solve_block(carry, first):
            x, cache, passes = carry
            z_block = jax.lax.dynamic_slice_in_dim(z0, first, m, axis=1)
            last = jax.lax.dynamic_slice_in_dim(x, jnp.maximum(first - 1, 0), 1, axis=1)

            def unsolved(state):
                _, _, change, i = state
                return (i < m) & jnp.any(change > tol)

            def again(state):
                x_block, cache, _, i = state
                mean, log_scale, cache = predict(
                    frozen, jnp.concatenate([last, x_block[:, :-1]], 1), cache, first
                )
                new = z_block * jnp.exp(log_scale) + mean
                return new, cache, _largest(new - x_block, new), i + 1

            never = jnp.full_like(z, jnp.inf, shape=z.shape[:1])
            x_block, cache, _, i = jax.lax.while_loop(
                unsolved, again, (z_block, cache, never, none)
            )
            return (
                jax.lax.dynamic_update_slice_in_dim(x, x_block, first, axis=1),
                cache,
                passes + i,
            ), None

        (x, _, passes), _ = jax.lax.scan(solve_block, (jnp.zeros_like(z0), cache, none), starts)

        def once(x, args_and_z):
            args, z = args_and_z
            mean, log_scale, _ = predict(args, x, None, 0)
            return z * jnp.exp(log_scale) + mean

        enough = max(tol, 64 * float(jnp.finfo(z.dtype).eps))
        x, more, residual = fixed_point(once, x, (args, z), tol=enough, max_evaluations=n + 1)
        converged = residual <= enough
        x = jnp.where(expand_to(converged, x), x, jnp.nan)
        return Decoded(x, predict(args, x, None, 0)[1], passes + more, residual, converged)

    return sample


def _exact(x, log_scale) -> Decoded:
    n, zeros = x.shape[1], jnp.zeros_like(x, shape=x.shape[:1])
    return Decoded(x, log_scale, jnp.asarray(n), zeros, zeros == 0)


def _largest(change, x) -> Array:
    """[b]: the largest |change| / (1 + |x|) in a row."""
    return jnp.max((jnp.abs(change) / (1 + jnp.abs(x))).astype(float_dtype(x)), axis=(1, 2))
