"""Balance of continuous GFlowNets: of whole trajectories, and edge by edge, in densities."""

import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_noun, check_rows, take_parts
from jflow.gflownets import ContinuousPolicy
from jflow.types import Loss

__all__ = ["continuous_detailed_balance", "continuous_trajectory_balance"]

_ENTRIES = ("x", "length", "log_reward", "weight")


def continuous_trajectory_balance(policy: ContinuousPolicy) -> Loss:
    """Trajectory balance in densities: a GFlowNet of points on the line or the torus.

        mean over rows of  (log Z + sum_k log p_F - log R(x) - sum_k log p_B)^2

    over the moves and the stop of a trajectory. It is 0 on all trajectories if and only if objects
    are drawn in proportion to R, and then Z is its integral. Any trajectories will do: those of the
    policy, or backward ones from given points (`gflownets.continuous_rollouts`).

    Also known as: trajectory balance on continuous spaces.

    Args:
        policy: The policy, of `gflownets.continuous_policy`.

    Returns:
        A loss of the batch {'x' [b, N, d], 'length' [b], 'log_reward' [b], optionally 'weight'
        [b]}. It needs no key. Its metrics are {'log_z'}, nats.

    Raises:
        TypeError: At construction for what is no `ContinuousPolicy`.
        ValueError: At trace time for entries of the batch that are missing or do not fit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, gflownets, losses, manifolds, nets
        >>> circle = manifolds.torus(1)
        >>> law, net = distributions.von_mises_mixture((1,), 2), nets.MLP((8,))
        >>> move = gflownets.transition(law, net, circle, steps=2)
        >>> back = gflownets.uniform_transition(circle)
        >>> policy = gflownets.continuous_policy(circle, move, back, steps=2)
        >>> params = policy.init(jax.random.key(0))
        >>> x, length = policy.sample(params, jax.random.key(1), 8)
        >>> batch = {"x": x, "length": length, "log_reward": jnp.cos(x[:, -1, 0])}
        >>> value, metrics = losses.continuous_trajectory_balance(policy)(params, None, batch)
        >>> bool(value > 0), float(metrics["log_z"])
        (True, 0.0)

    References:
        Lahlou et al., *A Theory of Continuous Generative Flow Networks*, 2023, arXiv:2301.12594.
        Malkin, Jain, Bengio, Sun, Bengio, *Trajectory Balance: Improved Credit Assignment in
            GFlowNets*, 2022, arXiv:2201.13259.
    """
    name = "continuous_trajectory_balance"
    check_noun(name, policy, ContinuousPolicy)

    def loss(params, key, batch, frozen=None):
        (log_z,) = take_parts(name, params, "log_z")
        scores, log_reward, weight = _read(name, policy, params, batch)
        balance = jnp.sum(scores.log_forward - scores.log_backward, axis=1) - log_reward
        return mean_of_rows(jnp.square(log_z + balance), weight), {"log_z": log_z}

    return loss


def continuous_detailed_balance(policy: ContinuousPolicy) -> Loss:
    """Detailed balance in densities: every move of a continuous GFlowNet by itself.

        mean over rows, then edges, of  (log F(s) + log p_F(s' | s) - log F(s') - log p_B(s | s'))^2

    where the flow through the start is Z and that through an object is its reward. The flow is a
    density, learned by the policy's `flow`.

    Also known as: detailed balance on continuous spaces.

    Args:
        policy: The policy, of `gflownets.continuous_policy` with a `flow`.

    Returns:
        A loss of the batch {'x' [b, N, d], 'length' [b], 'log_reward' [b], optionally 'weight'
        [b]}. It needs no key. Its metrics are {'log_z'}, nats.

    Raises:
        TypeError: At construction for what is no `ContinuousPolicy`.
        ValueError: At trace time for a policy without a flow, and for entries of the batch that are
            missing or do not fit.

    References:
        Lahlou et al., *A Theory of Continuous Generative Flow Networks*, 2023, arXiv:2301.12594.
    """
    name = "continuous_detailed_balance"
    check_noun(name, policy, ContinuousPolicy)

    def loss(params, key, batch, frozen=None):
        (log_z,) = take_parts(name, params, "log_z")
        scores, log_reward, weight = _read(name, policy, params, batch)
        if scores.log_flow is None:
            raise ValueError(
                f"{name}: expected a policy with a flow, got one of continuous_policy(flow=None)"
            )
        valid = scores.valid
        here, later = scores.log_flow, jnp.pad(valid[:, 1:], ((0, 0), (0, 1)))
        after = jnp.where(later, jnp.roll(here, -1, axis=1), log_reward[:, None])
        residual = here + scores.log_forward - after - scores.log_backward
        squares = jnp.sum(jnp.where(valid, jnp.square(residual), 0), axis=1)
        return mean_of_rows(squares / jnp.sum(valid, axis=1), weight), {"log_z": log_z}

    return loss


def _read(name, policy, params, batch):
    """(scores, log_reward, weight)."""
    x, length, log_reward, weight = read_batch(name, batch, _ENTRIES)
    for entry, value in (("length", length), ("log_reward", log_reward)):
        if value is None:
            raise ValueError(
                f"{name}: expected {entry!r} in the batch, as continuous_rollouts make"
            )
        check_rows(name, f"{entry!r}", value, x.shape[0])
    return policy.score(params, x, length), log_reward.astype(float_dtype(x)), weight
