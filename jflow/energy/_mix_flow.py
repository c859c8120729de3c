"""A map that preserves a target and its momenta, and the mixture of its powers."""

import math

import jax
import jax.numpy as jnp

from jflow import distributions, flows
from jflow._core.arrays import zero_log_det
from jflow._core.checks import check_channels, check_noun, check_whole
from jflow._core.leapfrog import value_and_slope
from jflow._core.nouns import no_params
from jflow.energy._target import Target
from jflow.flows import MixFlow
from jflow.types import Array, Bijector, Distribution

__all__ = ["hamiltonian_mix_flow", "hamiltonian_shift"]

_SHIFT = math.pi / 16  # of the pseudo-time, irrational


def hamiltonian_shift(target: Target, *, step_size: float, steps: int = 10) -> Bijector:
    """A deterministic map that nearly preserves a target, its momenta and a pseudo-time.

    On rows (position [d], momentum [d], time [1]), of density p(position) Laplace(momentum) on
    times in [0, 1), it is

        `steps` leapfrog steps of step_size:    half a kick by grad log p, a drift by the sign of
            the momentum (minus the score of Laplace(0, 1)), half a kick;
        time' = time + pi / 16 mod 1;
        momentum' = F^-1(F(momentum) + sin(2 position + time') / 2 + 1/2 mod 1),

    with F the distribution function of the Laplace law. The shift of time is irrational and ergodic
    on the circle, and the last line is a new momentum without a draw; both are one choice of many.
    Leapfrog preserves volume, and the density up to an error that nothing corrects, of step_size^2
    and, where a momentum changes its sign, of step_size. The other two preserve the density
    exactly: log_det, that of the last line, is the sum of |momentum'| - |momentum|.

    In float32 F holds momenta up to about 15; orbits of many turns want float64.

    Args:
        target: the density p, of vectors: event_shape (d,).
        step_size: of the leapfrog steps, in units of the position over those of the momentum.
        steps: the number of leapfrog steps of one turn.

    Returns:
        Bijector: the map of rows [2 d + 1], without params.

    Raises:
        TypeError: target is not a `Target`.
        ValueError: its event_shape is not (d,), step_size is not positive, or steps is below 1; or
            the last axis of x has another size.

    References:
        Xu, Chen, Campbell, *MixFlows: Principled Variational Inference via Mixed Flows*, 2023,
            arXiv:2205.07475.
    """
    check_noun("hamiltonian_shift", target, Target)
    check_whole("hamiltonian_shift", steps=steps)
    if len(target.event_shape) != 1:
        raise ValueError(
            f"hamiltonian_shift: expected a target of vectors, got event_shape {target.event_shape}"
        )
    if not step_size > 0:
        raise ValueError(f"hamiltonian_shift: expected step_size > 0, got {step_size}")
    (d,) = target.event_shape

    def score(x):
        return value_and_slope("hamiltonian_shift", target.log_density, x)[1]

    def leapfrog(x, momentum, size):
        def step(carry, _):
            x, momentum, slope = carry
            momentum = momentum + size / 2 * slope
            x = x + size * jnp.sign(momentum)
            slope = score(x)
            return (x, momentum + size / 2 * slope, slope), None

        return jax.lax.scan(step, (x, momentum, score(x)), length=steps)[0][:2]

    def refresh(momentum, x, time, sign):
        moved = _to_unit(momentum) + sign * (jnp.sin(2 * x + time) / 2 + 0.5)
        new = _from_unit(moved - jnp.floor(moved))
        return new, jnp.sum(jnp.abs(new) - jnp.abs(momentum), axis=-1)

    def parts(x):
        check_channels("hamiltonian_shift", x, 2 * d + 1)
        return x[:, :d], x[:, d : 2 * d], x[:, 2 * d :]

    def forward(params, z, cond=None, *, key=None):
        x, momentum, time = parts(z)
        x, momentum = leapfrog(x, momentum, step_size)
        time = jnp.mod(time + _SHIFT, 1)
        momentum, log_det = refresh(momentum, x, time, 1)
        return jnp.concatenate([x, momentum, time], axis=1), zero_log_det(z) + log_det

    def inverse(params, x, cond=None, *, key=None):
        position, momentum, time = parts(x)
        momentum, log_det = refresh(momentum, position, time, -1)
        position, momentum = leapfrog(position, momentum, -step_size)
        time = jnp.mod(time - _SHIFT, 1)
        return jnp.concatenate([position, momentum, time], axis=1), zero_log_det(x) + log_det

    return Bijector(no_params, forward, inverse)


def hamiltonian_mix_flow(
    target: Target, base: Distribution, length: int, *, step_size: float, steps: int = 10
) -> tuple[MixFlow, Target]:
    """MixFlows: samples and a density near a target, without training.

    The mixture of a base and its images under 1 .. length - 1 turns of `hamiltonian_shift`. The
    base of the momenta is Laplace's, that of the time uniform, so that their parts of the target
    are met from the start. The first d numbers of a sample are near the target.

    Also known as: MixFlows, Hamiltonian flow.

    Args:
        target: the density p, of vectors: event_shape (d,).
        base: a distribution of positions [d], such as `distributions.diagonal_normal` with params
            near the target.
        length: the number of components.
        step_size: of the leapfrog steps; the bound is largest for the best one.
        steps: the number of leapfrog steps between two components.

    Returns:
        A pair: the mixture over rows (position, momentum, time) [2 d + 1], a `flows.MixFlow` with
        params {'bijector': {}, 'base': {'first': those of base, 'rest': {}}}, and the target of
        these rows, for its `elbo`, with the same log Z.

    Raises:
        TypeError: target is not a `Target`, or base not a `Distribution`.
        ValueError: as `hamiltonian_shift` and `flows.mix_flow` raise.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, energy
        >>> target = energy.Target(lambda x: -2 * jnp.sum(jnp.square(x), axis=1), (1,))
        >>> mixture, joint = energy.hamiltonian_mix_flow(
        ...     target, distributions.normal((1,)), 20, step_size=0.1
        ... )
        >>> params = {"bijector": {}, "base": {"first": {}, "rest": {}}}
        >>> mixture.sample(params, jax.random.key(0), 4)[:, :1].shape
        (4, 1)
        >>> mixture.elbo(params, jax.random.key(1), 4, joint.log_density).shape
        (4,)

    References:
        Xu, Chen, Campbell, *MixFlows: Principled Variational Inference via Mixed Flows*, 2023,
            arXiv:2205.07475.
    """
    bijector = hamiltonian_shift(target, step_size=step_size, steps=steps)
    (d,) = target.event_shape
    momenta = _momentum_and_time(d)

    def log_density(x: Array) -> Array:
        return target.log_density(x[:, :d]) + momenta.log_prob({}, x[:, d:])

    whole = distributions.split(base, momenta, d)
    joint = Target(log_density, (2 * d + 1,), target.log_z)
    return flows.mix_flow(bijector, whole, length), joint


def _momentum_and_time(d: int) -> Distribution:
    """Laplace(0, 1) for d numbers, and a uniform one in [0, 1)."""

    def log_prob(params, x, cond=None, *, key=None):
        value = -jnp.sum(jnp.abs(x[:, :d]), axis=1) - d * math.log(2)
        return jnp.where((x[:, d] >= 0) & (x[:, d] <= 1), value, -jnp.inf)

    def sample(params, key, n, cond=None):
        momentum_key, time_key = jax.random.split(key)
        momentum = jax.random.laplace(momentum_key, (n, d))
        return jnp.concatenate([momentum, jax.random.uniform(time_key, (n, 1))], axis=1)

    return Distribution(no_params, log_prob, sample)


def _to_unit(momentum: Array) -> Array:
    """The distribution function of Laplace(0, 1)."""
    tail = jnp.exp(-jnp.abs(momentum)) / 2
    return jnp.where(momentum < 0, tail, 1 - tail)


def _from_unit(u: Array) -> Array:
    """Its inverse, with a u of 0 or 1 taken to the nearest number inside."""
    tail = jnp.maximum(jnp.minimum(u, 1 - u), jnp.finfo(u.dtype).tiny)
    return jnp.where(u < 0.5, 1, -1) * jnp.log(2 * tail)
