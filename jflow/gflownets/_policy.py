"""Policies: a network over observations, with the masks of an environment."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jflow._core.arrays import flat_rows, float_dtype
from jflow._core.checks import check_noun, check_same_shape, count_rows
from jflow.gflownets._types import Environment, Policy, PolicyOutput
from jflow.nets import MLP, field
from jflow.types import Array, Cond, Field, Velocity

__all__ = ["Perceptron", "masked_log_softmax", "mlp_policy", "policy"]


def policy(
    environment: Environment, net: Field | Velocity, *, learned_backward: bool = True
) -> Policy:
    """The policy of a network that reads observations and gives logits.

    The network's output is [n, A + B + 1]: logits of the A forward actions, logits of the B
    backward actions, and the log of the flow through the state; without a learned backward policy
    it is [n, A + 1]. Its time is always 0.

    Args:
        environment: what the policy acts in, which has the masks.
        net: a network of observations, such as `jflow.field(module)`.
        learned_backward: whether the network has backward logits; where not, the backward actions
            that a mask allows are equally likely.

    Returns:
        Policy: params {'net', 'log_z'}. It raises a ValueError at trace time for an output or a
            mask of another shape.

    Raises:
        TypeError: `environment` or `net` is something else.

    References:
        Bengio, Lahlou, Deleu, Hu, Tiwari, Bengio, *GFlowNet Foundations*, 2021, arXiv:2111.09266.
    """
    check_noun("policy", environment, Environment)
    check_noun("policy", net, Field, Velocity)
    forward, backward = environment.num_actions, environment.num_backward_actions
    width = forward + (backward if learned_backward else 0) + 1

    def init(key, cond=None):
        n = 1 if cond is None else count_rows("policy", cond)
        x = environment.observe(environment.reset(n))
        params = net.init(key, x, jnp.zeros_like(x, shape=n), cond)
        return {"net": params, "log_z": jnp.zeros((), x.dtype)}

    def apply(params, state, cond=None, *, key=None):
        x = environment.observe(state)
        n = x.shape[0]
        raw = net.apply(params["net"], x, jnp.zeros_like(x, shape=n), cond, key=key)
        if raw.shape != (n, width):
            raise ValueError(
                f"policy: expected a network with an output of shape {[n, width]}, a logit for each"
                f" action and the log of the flow, got {list(raw.shape)}"
            )
        raw = raw.astype(float_dtype(raw))
        back = raw[:, forward:-1] if learned_backward else jnp.zeros_like(raw, shape=(n, backward))
        return PolicyOutput(
            masked_log_softmax(raw[:, :forward], environment.forward_mask(state)),
            masked_log_softmax(back, environment.backward_mask(state)),
            raw[:, -1],
        )

    return Policy(init, apply)


def mlp_policy(
    environment: Environment, hidden: Sequence[int] = (256, 256), *, learned_backward: bool = True
) -> Policy:
    """The policy of a perceptron, all actions equally likely at initialization.

    Args:
        environment: what the policy acts in.
        hidden: the widths, at least one.
        learned_backward: whether the backward policy is learned; where not, it is uniform.

    Returns:
        Policy: see `policy`. A condition is floats [n, ...], or a pytree of them.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import gflownets
        >>> grid = gflownets.hypergrid(2, 4)
        >>> policy = gflownets.mlp_policy(grid, (8,))
        >>> params = policy.init(jax.random.key(0))
        >>> output = policy.apply(params, grid.reset(1))
        >>> [round(p, 3) for p in jnp.exp(output.log_forward[0]).tolist()]
        [0.333, 0.333, 0.333]
    """
    check_noun("mlp_policy", environment, Environment)
    backward = environment.num_backward_actions if learned_backward else 0
    net = field(Perceptron(environment.num_actions + backward + 1, tuple(hidden)))
    return policy(environment, net, learned_backward=learned_backward)


def masked_log_softmax(
    logits: Float[Array, "n A"], mask: Bool[Array, "n A"]
) -> Float[Array, "n A"]:
    """Log-probabilities over the actions that a mask allows, with finite gradients.

    Args:
        logits: [n, A].
        mask: [n, A] bool.

    Returns:
        [n, A], nats, -inf where the mask is False; all -inf in a row without an action.

    Raises:
        ValueError: At trace time for a mask of another shape.
    """
    check_same_shape("masked_log_softmax", "a mask", mask, logits)
    empty = ~jnp.any(mask, axis=-1, keepdims=True)
    return jnp.where(
        mask, jax.nn.log_softmax(jnp.where(mask | empty, logits, -jnp.inf), axis=-1), -jnp.inf
    )


class Perceptron(nn.Module):
    """A perceptron of observations, zero at initialization.

    `module(x [n, *event], t [n], cond=None) -> [n, width]`; the time is not read. It is `nets.MLP`
    with what that lacks, an output layer and the arguments of a field.

    Attributes:
        width: of the output, such as a number for each action.
        hidden: the widths between, at least one.
    """

    width: int
    hidden: Sequence[int] = (256, 256)

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Float[Array, "n width"]:
        """Compute the output.

        Args:
            x: the observations, [n, *event].
            t: [n], not read.
            cond: None, floats [n, ...], or a pytree of them.

        Returns:
            [n, width].
        """
        h = MLP(self.hidden)(flat_rows(x), cond)
        return nn.Dense(self.width, kernel_init=nn.initializers.zeros)(h)
