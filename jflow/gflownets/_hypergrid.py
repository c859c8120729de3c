"""The hypergrid: a walk from the origin with modes near the corners."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jflow._core.checks import check_whole
from jflow.gflownets._types import Environment
from jflow.types import Array

__all__ = ["hypergrid", "hypergrid_log_reward"]


def hypergrid(
    dimension: int, side: int, log_reward: Callable[[Array], Array] | None = None
) -> Environment:
    """A grid that is walked from the origin, one coordinate up at a time, until it is stopped.

    A state is {'position' [n, d], whole numbers from 0 to side - 1; 'stopped' [n]}; action i < d
    is a step along coordinate i, action d stops. Every position can be stopped at.

    Args:
        dimension: d, at least 1.
        side: positions of a coordinate, at least 2.
        log_reward: position [n, d] -> [n], nats; None: `hypergrid_log_reward(side)`.

    Returns:
        Environment: with side^d objects, and observations [n, d, side], one-hot.

    Raises:
        ValueError: a number is too small.

    References:
        Bengio, Jain, Korablyov, Precup, Bengio, *Flow Network based Generative Models for
            Non-Iterative Diverse Candidate Generation*, 2021, arXiv:2106.04399.
    """
    check_whole("hypergrid", dimension=dimension)
    check_whole("hypergrid", 2, side=side)
    of_position = hypergrid_log_reward(side) if log_reward is None else log_reward

    def reset(n):
        return {
            "position": jnp.zeros((n, dimension), jnp.int32),
            "stopped": jnp.zeros(n, jnp.bool_),
        }

    def move(state, action, by):
        along = jax.nn.one_hot(action, dimension, dtype=jnp.int32)  # of the stop: 0
        return state["position"] + by * along

    def step(state, action):
        return {"position": move(state, action, 1), "stopped": action == dimension}

    def back(state, action):
        return {"position": move(state, action, -1), "stopped": jnp.zeros_like(state["stopped"])}

    def forward_mask(state):
        moves = state["position"] < side - 1
        stop = jnp.ones_like(state["stopped"])[:, None]
        return jnp.concatenate([moves, stop], axis=1) & ~state["stopped"][:, None]

    def backward_mask(state):
        stopped = state["stopped"][:, None]
        return jnp.concatenate([(state["position"] > 0) & ~stopped, stopped], axis=1)

    return Environment(
        num_actions=dimension + 1,
        num_backward_actions=dimension + 1,
        horizon=dimension * (side - 1) + 1,
        reset=reset,
        step=step,
        back=back,
        forward_mask=forward_mask,
        backward_mask=backward_mask,
        forward_action=lambda state, action: action,
        backward_action=lambda state, action: action,
        observe=lambda state: jax.nn.one_hot(state["position"], side, dtype=jnp.float32),
        log_reward=lambda state: of_position(state["position"]),
        stop=dimension,
    )


def hypergrid_log_reward(
    side: int, *, r0: float = 0.1, r1: float = 0.5, r2: float = 2.0
) -> Callable[[Int[Array, "n d"]], Float[Array, " n"]]:
    """The published reward of the hypergrid, 2^d modes near the corners.

        R(x) = r0 + r1 prod_i [0.25 < |u_i|] + r2 prod_i [0.3 < |u_i| < 0.4]
        u = x / (side - 1) - 1/2

    Smaller r0 makes it harder to find the modes: the paper has 0.1, 0.01 and 0.001.

    Args:
        side: positions of a coordinate, at least 2.
        r0: the reward everywhere, above 0.
        r1: what the corners have more, at least 0.
        r2: what the modes have more, at least 0.

    Returns:
        position [n, d] -> [n], nats.

    Raises:
        ValueError: a reward is negative, r0 is 0, or the side is too small.

    References:
        Bengio, Jain, Korablyov, Precup, Bengio, *Flow Network based Generative Models for
            Non-Iterative Diverse Candidate Generation*, 2021, arXiv:2106.04399.
    """
    check_whole("hypergrid_log_reward", 2, side=side)
    if not (r0 > 0 and r1 >= 0 and r2 >= 0):
        raise ValueError(
            f"hypergrid_log_reward: expected r0 > 0, r1 >= 0 and r2 >= 0, got {r0}, {r1} and {r2}"
        )

    def log_reward(position):
        u = jnp.abs(position.astype(jnp.float32) / (side - 1) - 0.5)
        corner = jnp.all(u > 0.25, axis=-1)
        mode = jnp.all((u > 0.3) & (u < 0.4), axis=-1)
        return jnp.log(r0 + r1 * corner.astype(jnp.float32) + r2 * mode.astype(jnp.float32))

    return log_reward
