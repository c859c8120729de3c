"""The velocity of a flow that is conditioned on time: densities that conserve mass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_noun, count_rows, like_state, rows
from jflow._core.keys import same_draws
from jflow.types import Array, Cond, Flow, Velocity

__all__ = ["lagrangian_velocity"]


def time_cond(t: Array, cond: Cond) -> Any:
    """t [b] as the cond [b, 1] of a flow, or {'t', 'cond'} where there is another cond."""
    return t[:, None] if cond is None else {"t": t[:, None], "cond": cond}


def lagrangian_velocity(flow: Flow, *, time: Callable[[Array, Cond], Any] = time_cond) -> Velocity:
    """The velocity with which the mass of a flow moves, where time is (a part of) its condition.

    Also known as: Lagrangian flow network, LFlow, continuity equation, mass conservation.

        v(x, t) = dF/dt (z, t) at z = F^-1(x, t),    x = F(z, t) the map of the flow at time t,

    by one inverse and one product with the derivative of `forward`, without a linear system. The
    density p(x | t) = `flow.log_prob` and this velocity satisfy the continuity equation, dp/dt +
    div(p v) = 0, whatever the params: to rounding, with nothing to penalize. A fluid of total mass
    M has the density M p and the same velocity. Train p by `losses.nll` with the time as cond;
    the choice among the velocities of one p is made by `losses.kinetic_energy`, or by observed
    velocities.

    Args:
        flow: any conditional flow, such as `real_nvp` with a float cond.
        time: how the flow is told the time, (t [b], cond) -> its cond; by default t[:, None], or
            {'t': t[:, None], 'cond': cond} where there is another cond.

    Returns:
        Velocity: x [b, *event], t [b] -> [b, *event], with the params of the flow. Where t has
            units, so has the velocity: those of x over those of t.

    Raises:
        TypeError: flow is not a `Flow`.
        ValueError: at the call, x and t have different rows.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows
        >>> moving = bijectors.amortized(bijectors.affine((2,)))  # x = z + 3 t
        >>> flow = flows.flow(moving, distributions.normal((2,)))
        >>> velocity = flows.lagrangian_velocity(flow)
        >>> x, t = jnp.zeros((1, 2)), jnp.array([0.5])
        >>> params = velocity.init(jax.random.key(0), x, t)
        >>> params["bijector"]["kernel"]["shift"] += 3
        >>> velocity.apply(params, x, t).tolist()
        [[3.0, 3.0]]

    References:
        Arend Torres, Negri, Inversi, Aellen, Roth, *Lagrangian Flow Networks for Conservation
            Laws*, 2023, arXiv:2305.16846; the product without a linear system is ours.
    """
    check_noun("lagrangian_velocity", flow, Flow)

    def at(x, t):
        n = count_rows("lagrangian_velocity", x)
        return rows(t, n).astype(float_dtype(x))

    def init(key, x, t, cond=None):
        return flow.init(key, x, time(at(x, t), cond))

    def apply(params, x, t, cond=None, *, key=None):
        t = at(x, t)
        z, _ = flow.inverse(params, x, time(t, cond), key=key)

        def forward(t):
            return flow.forward(params, z, time(t, cond), key=same_draws(key))[0]

        _, v = jax.jvp(forward, (t,), (jnp.ones_like(t),))
        return like_state("lagrangian_velocity", v, x)

    return Velocity(init, apply)
