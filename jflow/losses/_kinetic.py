"""The kinetic energy of a flow that is conditioned on time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jflow import flows, times
from jflow._core.arrays import sum_event
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_noun, check_weights, check_whole, need_key
from jflow.types import Array, Flow, Loss, Time

__all__ = ["kinetic_energy"]

_UNIFORM = times.uniform()


def kinetic_energy(
    flow: Flow,
    scale: float = 1.0,
    *,
    draws: int = 256,
    time: Time = _UNIFORM,
    time_cond: Callable[[Array], Any] = lambda t: t[:, None],
) -> Loss:
    """The kinetic energy of the mass that a time-conditioned flow moves, as a penalty.

        scale E_t E_{x ~ p(x | t)} |v(x, t)|^2,    v of `flows.lagrangian_velocity`,

    squared lengths, summed over the event. Beside the likelihood of data at several times it
    chooses, among all motions through these laws, one that moves little: with laws at two times
    alone the smallest is the optimal transport between them (Benamou and Brenier).

        losses.sum_losses({"nll": losses.nll(flow), "energy": losses.kinetic_energy(flow, 0.1)})

    Also known as: dynamic optimal transport penalty, action.

    Args:
        flow: a flow whose cond is the time.
        scale: what the energy is multiplied with.
        draws: how many pairs of a time and a sample.
        time: the law of the times.
        time_cond: how the flow is told the times, t [n] -> its cond.

    Returns:
        A loss of the batch {'x', optionally 'cond', 'weight'}, at which it does not look, so that
        it can stand beside `nll`. It needs a key. Its metric is 'energy', before scale.

    Raises:
        TypeError: At construction for what is no `Flow`.
        ValueError: At construction for a scale below 0 or draws below 1; at trace time for a batch
            without 'x' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows, losses
        >>> moving = bijectors.amortized(bijectors.affine((2,)))  # x = z + 3 t
        >>> flow = flows.flow(moving, distributions.normal((2,)))
        >>> params = flow.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros((1, 1)))
        >>> params["bijector"]["kernel"]["shift"] += 3
        >>> loss = losses.kinetic_energy(flow, draws=8)
        >>> round(float(loss(params, jax.random.key(0), {"x": jnp.zeros((1, 2))})[0]), 3)
        18.0

    References:
        Arend Torres, Negri, Inversi, Aellen, Roth, *Lagrangian Flow Networks for Conservation
            Laws*, 2023, arXiv:2305.16846.
        Benamou, Brenier, *A computational fluid mechanics solution to the Monge-Kantorovich mass
            transfer problem*, 2000.
    """
    check_noun("kinetic_energy", flow, Flow)
    check_weights("kinetic_energy", scale=scale)
    check_whole("kinetic_energy", draws=draws)
    velocity = flows.lagrangian_velocity(flow, time=lambda t, cond: time_cond(t))

    def loss(params, key, batch, frozen=None):
        key_time, key_draw = jax.random.split(need_key("kinetic_energy", key))
        x, _, _ = read_batch("kinetic_energy", batch, ("x", "cond", "weight"))
        t = time(key_time, draws).astype(x.dtype)
        at = flow.sample(params, key_draw, draws, time_cond(t)).astype(x.dtype)
        v = velocity.apply(params, at, t)
        energy = mean_of_rows(sum_event(jnp.square(v)), None)
        return scale * energy, {"energy": energy}

    return loss
