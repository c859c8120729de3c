"""A control of a diffusion that knows the gradient of its target."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.checks import check_noun, like_state
from jflow._core.keys import split_key
from jflow._core.leapfrog import value_and_slope
from jflow.types import Array, Velocity

__all__ = ["langevin_drift"]


def langevin_drift(
    net: Velocity,
    gate: Velocity,
    log_density: Callable[[Array], Array],
    *,
    limit: float = 100.0,
) -> Velocity:
    """The drift of a diffusion sampler with the gradient of the target's log-density in it.

    Also known as: Langevin parametrization, score-informed drift.

        f(x, t) = net(x, t) + gate(0, t) clip(grad log p~(x), -limit, limit)

    The gate is a function of time alone, a factor for each number of x. Networks that are zero at
    initialization, such as `nets.TimeMLP`, start at f = 0, the free diffusion.

    Args:
        net: the free part.
        gate: the factor; it is evaluated at x = 0.
        log_density: the unnormalized log p~, x [n, *event] -> [n].
        limit: what each component of the gradient is clipped at; jnp.inf for not at all.

    Returns:
        Velocity: the drift, with params {'net', 'gate'}, for `solvers.diffusion_sampler` and
            `losses.diffusion_balance` and its relatives.

    Raises:
        TypeError: net or gate is not a `Velocity`.
        ValueError: limit is not positive, at construction; log_density is not [n], at the call.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jflow
        >>> from jflow import energy, nets
        >>> net = jflow.velocity(nets.TimeMLP((8,)))
        >>> drift = energy.langevin_drift(net, net, energy.double_well().log_density)
        >>> x, t = jnp.ones((3, 2)), jnp.zeros(3)
        >>> params = drift.init(jax.random.key(0), x, t)
        >>> float(jnp.max(jnp.abs(drift.apply(params, x, t))))
        0.0

    References:
        Zhang, Chen, *Path Integral Sampler: A Stochastic Control Approach for Sampling*, 2021,
            arXiv:2111.15141.
    """
    check_noun("langevin_drift", net, Velocity)
    check_noun("langevin_drift", gate, Velocity)
    if isinstance(limit, bool) or not limit > 0:
        raise ValueError(f"langevin_drift: expected limit > 0, got {limit!r}")

    def init(key, x, t, cond=None):
        key_net, key_gate = jax.random.split(key)
        zero = jnp.zeros_like(x)
        return {
            "net": net.init(key_net, x, t, cond),
            "gate": gate.init(key_gate, zero, t, cond),
        }

    def apply(params, x, t, cond=None, *, key=None):
        key_net, key_gate = split_key(key, 2)
        _, slope = value_and_slope("langevin_drift", log_density, x)
        factor = gate.apply(params["gate"], jnp.zeros_like(x), t, cond, key=key_gate)
        free = like_state("langevin_drift", net.apply(params["net"], x, t, cond, key=key_net), x)
        factor = like_state("langevin_drift", factor, x)
        return free + factor * jnp.clip(slope, -limit, limit)

    return Velocity(init, apply)
