"""Training a flow on its own draws, annealed to where it is poor, and keeping them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jflow._core.checks import check_noun, check_same_shape, check_whole
from jflow.energy._annealing import annealed_importance_sampling, as_target
from jflow.energy._kernels import Kernel
from jflow.energy._target import Target
from jflow.types import Flow, Key, Params

__all__ = ["Replay", "add_draws", "annealed_draws", "draw_replay", "empty_replay"]


class Replay(NamedTuple):
    """Weighted draws that are kept from step to step, the newest first: a pytree of arrays.

    Attributes:
        x: The draws [m, *event].
        log_weights: [m], nats; -inf where there is none yet.
        log_q: The log-density [m] under the flow that log_weights are of.
    """

    x: Float[Array, "m *event"]
    log_weights: Float[Array, " m"]
    log_q: Float[Array, " m"]


def annealed_draws(
    flow: Flow,
    target: Target,
    kernel: Kernel,
    *,
    draws: int = 256,
    levels: int | Sequence[float] = 4,
    repeats: int = 1,
    power: float = 2.0,
) -> Callable[[Params, Key], Replay]:
    """Draws of a flow that are annealed to p^power q^(1 - power), to train the flow on.

    Also known as: FAB, flow annealed importance sampling bootstrap, alpha-divergence with alpha 2.

    With power 2 they go to p^2 / q, where the weights of importance sampling from q to p vary most:
    `losses.nll` of them, weighted, has the gradient of the alpha-2 divergence, the variance of
    those weights. With power 1 they go to p, and it is the forward KL divergence of
    `losses.forward_kl` by annealed draws.

    A step is `draw(state.params, key)`, and `make_step(losses.nll(flow), ...)` on the batch {'x':
    found.x, 'weight': jax.nn.softmax(found.log_weights)}; or the draws go through a `Replay`.

    Args:
        flow: The flow q.
        target: The target p.
        kernel: The transitions.
        draws: The number of draws at a time.
        levels: Those of `annealed_importance_sampling`.
        repeats: The transitions at each level.
        power: The power of p, at least 1.

    Returns:
        The function draw(params, key) -> the draws with their weights, stopped.

    Raises:
        TypeError: At construction for what is no `Flow` or no `Target`.
        ValueError: At construction for counts and powers that are too small.

    Examples:
        >>> import jax
        >>> from jflow import energy, flows
        >>> flow, target = flows.real_nvp((2,), depth=2, hidden=(8,)), energy.double_well()
        >>> draw = energy.annealed_draws(flow, target, energy.metropolis_kernel(0.3), draws=4)
        >>> params = flow.init(jax.random.key(0), jax.numpy.zeros((4, 2)))
        >>> found = draw(params, jax.random.key(1))
        >>> found.x.shape, found.log_weights.shape
        ((4, 2), (4,))

    References:
        Midgley, Stimper, Simm, Schoelkopf, Hernandez-Lobato, *Flow Annealed Importance Sampling
            Bootstrap*, 2023, arXiv:2208.01893.
    """
    check_noun("annealed_draws", flow, Flow)
    check_noun("annealed_draws", target, Target)
    check_whole("annealed_draws", draws=draws, repeats=repeats)
    if not power >= 1:
        raise ValueError(f"annealed_draws: expected power >= 1, got {power}")

    def draw(params, key):
        params = jax.lax.stop_gradient(params)
        start = as_target(flow, params, target.event_shape)

        def tilted(x):
            return power * target.log_density(x) - (power - 1) * start.log_density(x)

        x, log_weights, _ = annealed_importance_sampling(
            key,
            Target(tilted, target.event_shape),
            start,
            kernel,
            draws=draws,
            levels=levels,
            repeats=repeats,
        )
        # a chain that ends where the densities are no numbers weighs nothing
        log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
        return jax.lax.stop_gradient(Replay(x, log_weights, start.log_density(x)))

    return draw


def empty_replay(event_shape: tuple[int, ...], size: int) -> Replay:
    """A replay buffer with no draws.

    Args:
        event_shape: The shape of one x.
        size: The number m of draws that it keeps.

    Returns:
        The buffer.

    Raises:
        ValueError: For a size below 1.

    Examples:
        >>> from jflow import energy
        >>> energy.empty_replay((2,), 8).x.shape
        (8, 2)
    """
    check_whole("empty_replay", size=size)
    return Replay(jnp.zeros((size, *event_shape)), jnp.full((size,), -jnp.inf), jnp.zeros((size,)))


def add_draws(replay: Replay, draws: Replay) -> Replay:
    """The buffer with new draws, which push out the oldest.

    Args:
        replay: The buffer, of m draws.
        draws: The new ones, such as those of `annealed_draws`.

    Returns:
        The buffer, of m draws.

    Raises:
        ValueError: For draws of another event.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import energy
        >>> new = energy.Replay(jnp.ones((2, 1)), jnp.zeros(2), jnp.zeros(2))
        >>> energy.add_draws(energy.empty_replay((1,), 3), new).log_weights.tolist()
        [0.0, 0.0, -inf]
    """
    check_same_shape("add_draws", "the events of draws", draws.x[0], replay.x[0])
    size = replay.x.shape[0]

    def join(new, old):
        return jnp.concatenate([new.astype(old.dtype), old])[:size]

    return Replay(*map(join, draws, replay))


def draw_replay(
    flow: Flow,
    replay: Replay,
    params: Params,
    key: Key,
    n: int,
    *,
    power: float = 2.0,
    cap: float = 10.0,
) -> tuple[Replay, dict[str, Array]]:
    """Rows of a buffer in proportion to their weights, each once, as a batch for `losses.nll`.

    Also known as: prioritized replay buffer.

    The flow has moved since the rows were drawn: they are weighted by (q_old / q)^(power - 1), and
    their weights in the buffer are brought up to date. Rows that are not there weigh nothing.

    Args:
        flow: The flow q.
        replay: The buffer.
        params: The params of the flow as they are.
        key: The key.
        n: The number of rows, at most those of the buffer.
        power: That of `annealed_draws`.
        cap: The largest weight of a row.

    Returns:
        The pair (buffer, batch), the batch {'x' [n, *event], 'weight' [n]}, both stopped.

    Raises:
        ValueError: For an n that is not between 1 and the size of the buffer.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, energy, flows
        >>> flow = flows.flow(bijectors.affine((1,)), distributions.normal((1,)))
        >>> params = flow.init(jax.random.key(0), jnp.zeros((1, 1)))
        >>> log_q = flow.log_prob(params, jnp.ones((2, 1)))
        >>> replay = energy.Replay(jnp.ones((2, 1)), jnp.zeros(2), log_q)
        >>> _, batch = energy.draw_replay(flow, replay, params, jax.random.key(1), 2)
        >>> batch["weight"].tolist()  # the flow is as it was
        [1.0, 1.0]

    References:
        Midgley, Stimper, Simm, Schoelkopf, Hernandez-Lobato, *Flow Annealed Importance Sampling
            Bootstrap*, 2023, arXiv:2208.01893. Weights that add up to one in the loss are ours.
    """
    check_whole("draw_replay", n=n)
    size = replay.x.shape[0]
    if n > size:
        raise ValueError(f"draw_replay: expected n at most {size}, the size of the buffer, got {n}")
    # the largest of log-weights with Gumbel noise: draws in proportion, without replacement
    noise = jax.random.gumbel(key, replay.log_weights.shape, replay.log_weights.dtype)
    _, rows = jax.lax.top_k(replay.log_weights + noise, n)
    x, log_weights, log_q_old = (leaf[rows] for leaf in replay)
    log_q = jax.lax.stop_gradient(flow.log_prob(params, x))
    change = (power - 1) * (log_q_old - log_q)
    there = log_weights > -jnp.inf
    weight = jnp.where(there, jnp.exp(jnp.minimum(change, np.log(cap))), 0)
    replay = replay._replace(
        log_weights=replay.log_weights.at[rows].add(jnp.where(there, change, 0)),
        log_q=replay.log_q.at[rows].set(log_q),
    )
    return replay, {"x": x, "weight": weight}
