"""Annealing between two densities: weighted draws of the second, and the constant of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jflow._core.checks import check_noun, check_rows, check_whole, need_key
from jflow.energy._kernels import Kernel
from jflow.energy._target import Target
from jflow.types import Distribution, Flow, Key, Params

__all__ = ["Annealed", "annealed_importance_sampling", "as_target"]


class Annealed(NamedTuple):
    """Weighted draws from a target.

    Attributes:
        x: The draws [n, *event].
        log_weights: [n], nats. The mean of exp(log_weights) estimates Z without bias
            (`estimate_log_z`), and weighted means are those of the target.
        acceptance: The share of accepted transitions at each level, [levels].
    """

    x: Float[Array, "n *event"]
    log_weights: Float[Array, " n"]
    acceptance: Float[Array, " levels"]


def as_target(flow: Flow | Distribution, params: Params, event_shape: tuple[int, ...]) -> Target:
    """A flow with its params as a target: what annealing starts at.

    Args:
        flow: The flow or the distribution.
        params: Its params, which may be traced.
        event_shape: The shape of one x.

    Returns:
        The target, normalized, with draws.

    Raises:
        TypeError: For what is neither a `Flow` nor a `Distribution`.

    Examples:
        >>> import jax
        >>> from jflow import distributions, energy
        >>> start = energy.as_target(distributions.normal((2,)), {}, (2,))
        >>> start.sample(jax.random.key(0), 3).shape
        (3, 2)
    """
    check_noun("as_target", flow, Flow, Distribution)
    return Target(
        lambda x: flow.log_prob(params, x),
        tuple(event_shape),
        0.0,
        lambda key, n: flow.sample(params, key, n),
    )


def annealed_importance_sampling(
    key: Key,
    target: Target,
    start: Target,
    kernel: Kernel,
    *,
    draws: int = 256,
    levels: int | Sequence[float] = 64,
    repeats: int = 1,
) -> Annealed:
    """Draws from a tractable density that are led to a target, with exact weights.

    Also known as: AIS, thermodynamic integration by non-equilibrium paths, Jarzynski's equality.

    With powers 0 = b_0 < b_1 < ... < b_K = 1 and densities p_b = start^(1 - b) target^b,

        x_0 ~ start,    x_k from x_{k-1} by the kernel of p_{b_k},
        log w = log Z_start + sum over k of (b_k - b_{k-1}) (log target - log start)(x_{k-1}),

    so that E[w] = Z for any kernel and any number of levels; more levels make the variance small.
    All draws move at once, the levels are scanned, and it runs under jit.

    Args:
        key: The key.
        target: The target.
        start: A target with a log Z and draws, such as `target.prior` of a posterior, or
            `as_target(flow, params, event_shape)`. It covers the support of the target.
        kernel: The transitions, `metropolis_kernel` or `hamiltonian_kernel`.
        draws: The number n of draws.
        levels: The number K of equal steps of the power, or the rising powers b_1 ... b_K = 1.
        repeats: The transitions at each level.

    Returns:
        The draws with their weights; the weight of one that leaves the support is 0.

    Raises:
        TypeError: For a target or a start that is no `Target`, and a key that is none.
        ValueError: For a start without log Z or draws, powers that do not rise to 1, and counts
            below 1; while it is traced, for a log-density that is not [n].

    Examples:
        >>> import jax
        >>> from jflow import distributions, energy
        >>> target = energy.double_well()
        >>> start = energy.as_target(distributions.normal((2,)), {}, (2,))
        >>> kernel = energy.metropolis_kernel(0.5)
        >>> found = energy.annealed_importance_sampling(
        ...     jax.random.key(0), target, start, kernel, draws=4, levels=8
        ... )
        >>> found.x.shape, found.log_weights.shape, found.acceptance.shape
        ((4, 2), (4,), (8,))

    References:
        Neal, *Annealed Importance Sampling*, 1998, arXiv:physics/9803008.
    """
    name = "annealed_importance_sampling"
    need_key(name, key)
    check_noun(name, target, Target)
    check_noun(name, start, Target)
    if start.sample is None or start.log_z is None:
        raise ValueError(
            f"{name}: expected a start with sample and log_z, got None for one of them"
        )
    check_whole(name, draws=draws, repeats=repeats)
    powers = _powers(name, levels)
    key_start, key_levels = jax.random.split(key)

    def density(which, x):
        return check_rows(name, "log_density", which.log_density(x), draws)

    def level(carry, step):
        x, log_weights = carry
        keys, before, power = step
        # a draw without density keeps the weight 0 that it has, where inf - inf would be NaN
        change = (power - before) * (density(target, x) - density(start, x))
        change = change.astype(log_weights.dtype)
        log_weights = jnp.where(log_weights == -jnp.inf, -jnp.inf, log_weights + change)

        def tempered(x):
            rest = jnp.where(power < 1, (1 - power) * density(start, x), 0)  # not 0 times -inf
            return rest + power * density(target, x)

        def move(x, key):
            return kernel(key, tempered, x, power)

        x, accepted = jax.lax.scan(move, x, keys)
        return (x, log_weights), jnp.mean(accepted)

    x = start.sample(key_start, draws)
    log_z = jnp.full_like(density(start, x), start.log_z)
    keys = jax.random.split(key_levels, (len(powers), repeats))
    before = jnp.asarray(np.concatenate([[0.0], powers[:-1]]), log_z.dtype)
    steps = keys, before, jnp.asarray(powers, log_z.dtype)
    (x, log_weights), acceptance = jax.lax.scan(level, (x, log_z), steps)
    return Annealed(x, log_weights, acceptance)


def _powers(name: str, levels: Any) -> np.ndarray:
    """The powers b_1 ... b_K in numpy."""
    if np.ndim(levels) == 0:
        check_whole(name, levels=levels)
        return np.linspace(0, 1, int(levels) + 1)[1:]
    powers = np.asarray(levels, np.float64)
    if powers.size == 0 or powers[-1] != 1 or np.any(np.diff(powers, prepend=0) <= 0):
        raise ValueError(f"{name}: expected levels that rise from above 0 to 1, got {levels}")
    return powers
