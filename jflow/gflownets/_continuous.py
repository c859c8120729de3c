"""GFlowNets on the line, in space and on the torus: moves with densities, and stops."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from jflow._core.checks import check_event, check_noun, check_rows, check_whole
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow.gflownets._rollout import check_rewards
from jflow.gflownets._transitions import Transition, features, flat_space
from jflow.types import Array, Key, Manifold, Params

__all__ = [
    "ContinuousPolicy",
    "ContinuousScores",
    "continuous_log_prob",
    "continuous_policy",
    "continuous_rollouts",
    "terminal_log_density",
]


class ContinuousScores(NamedTuple):
    """The densities of trajectories, edge by edge: the moves of a row, then its stop.

    Attributes:
        log_forward: [n, N + 1], the log-density of each move and of going on, then the
            log-probability of the stop, nats; 0 after it.
        log_backward: [n, N + 1], the log-density of each move undone, 0 for the first, which comes
            from the start; then the log-probability that an object was finished at this number of
            moves.
        log_flow: [n, N + 1], the log of the flow through the point that each edge leaves, the
            first of which is log Z; None for a policy without a flow.
        valid: [n, N + 1], which edges exist.
    """

    log_forward: Float[Array, "n edges"]
    log_backward: Float[Array, "n edges"]
    log_flow: Float[Array, "n edges"] | None
    valid: Bool[Array, "n edges"]


class ContinuousPolicy(NamedTuple):
    """What a continuous GFlowNet trains; `continuous_policy` makes one.

    Attributes:
        init: (key) -> params.
        sample: (params, key, n) -> (x [n, N, d], length [n]), the points after 1, 2, ... moves and
            how many there are; a row that stops early repeats its last point. n is static.
        sample_backward: (params, key, x [n, d]) -> (x [n, N, d], length [n]), trajectories to given
            objects.
        score: (params, x [n, N, d], length [n]) -> ContinuousScores.
        stop: (params, x [n, d], step [n]) -> ([n], [n]), the log-probabilities to stop at a point
            and to go on.
        forward: the law of the moves, whose params have this name.
        backward: that of the moves back.
        steps: N, the largest number of moves.
        start: where all trajectories begin, [d].
    """

    init: Callable[[Array], Params]
    sample: Callable[[Params, Array, int], tuple[Array, Array]]
    sample_backward: Callable[[Params, Array, Array], tuple[Array, Array]]
    score: Callable[[Params, Array, Array], ContinuousScores]
    stop: Callable[[Params, Array, Array], tuple[Array, Array]]
    forward: Transition
    backward: Transition
    steps: int
    start: tuple[float, ...]


def continuous_policy(
    manifold: Manifold,
    forward: Transition,
    backward: Transition,
    *,
    steps: int,
    start: ArrayLike | None = None,
    stop: nn.Module | None = None,
    flow: nn.Module | None = None,
) -> ContinuousPolicy:
    """A GFlowNet of points: moves with densities from one start, and a stop.

        s_0 = start,    x_(k+1) ~ forward(x_k, k),    stop at k = N, or, with `stop`, with a
        probability that a network gives, at any k >= 1

    Without `stop` the object is x_N. With it states are hybrid, a point and a choice to go on or to
    end there, and the object is the point where it ended; the number of moves is part of the state,
    and its backward law is uniform, 1 / N for each number (ours), so that the points alone follow
    the reward. The theory asks that trajectories end after a bounded number of moves, which N is,
    and that forward and backward densities are positive in the same places: a forward transition
    that cannot reach where the reward is has a loss of 0 on its own trajectories and an infinite
    one on those of `sample_backward`.

    Args:
        manifold: `manifolds.euclidean(d)` or `manifolds.torus(d)`.
        forward: the law of the next point.
        backward: the law of the point before, learned or fixed (`bridge_transition`,
            `uniform_transition`). It is not asked at the first move, which comes from the start.
        steps: N, the most moves of a trajectory.
        start: where all trajectories begin, [d]; zeros where it is None.
        stop: a Linen module of features, such as `nets.MLP((64, 64))`, on top of which the stop is
            a logit; it starts at the hazard of the uniform law. None: all make N moves.
        flow: a Linen module of features for the log of the flow, which detailed balance needs. The
            heads of stop and flow see squares of the coordinates too (ours): far out on a line the
            log of the flow has to fall as that of the reward does, or trajectories of the policy
            that is trained go ever farther.

    Returns:
        ContinuousPolicy: the policy, params {'forward', 'backward', 'log_z'} and {'stop', 'flow'}
            where they are networks; log_z [] starts at 0 and learns best at a rate of its own.

    Raises:
        TypeError: a law of moves is no `Transition`, a network no Linen module, or manifold no
            `Manifold`.
        ValueError: the manifold is not flat, steps is below 1, or start has another shape.

    Examples:
        >>> import jax
        >>> from jflow import distributions, gflownets, manifolds, nets
        >>> line = manifolds.euclidean(1)
        >>> move = gflownets.transition(
        ...     distributions.conditional_mixture((1,), 2), nets.MLP((16,)), line, steps=3
        ... )
        >>> back = gflownets.bridge_transition(1.0, start=(0.0,))
        >>> policy = gflownets.continuous_policy(line, move, back, steps=3)
        >>> params = policy.init(jax.random.key(0))
        >>> x, length = policy.sample(params, jax.random.key(1), 5)
        >>> x.shape, length.tolist()
        ((5, 3, 1), [3, 3, 3, 3, 3])

    References:
        Lahlou, Deleu, Lemos, Zhang, Volokhova, Hernandez-Garcia, Ezzine, Bengio, Malkin, *A Theory
            of Continuous Generative Flow Networks*, 2023, arXiv:2301.12594.
    """
    name = "continuous_policy"
    flat_space(name, manifold)
    check_noun(name, forward, Transition)
    check_noun(name, backward, Transition)
    check_whole(name, steps=steps)
    begin = np.zeros(manifold.shape) if start is None else np.asarray(start, np.float64)
    if begin.shape != manifold.shape:
        raise ValueError(
            f"{name}: expected start of shape {list(manifold.shape)}, got {list(begin.shape)}"
        )
    networks = {"stop": stop, "flow": flow}
    for what, net in networks.items():
        if net is not None:
            check_linen(name, what, net)
    hazard = -np.log(np.maximum(steps - np.arange(steps + 1.0), 0.5))  # logit of 1 / (N - k + 1)

    def init(key):
        draw_key, *keys = jax.random.split(key, 5)
        x, step = manifold.random(draw_key, 16), jnp.ones(16, jnp.int32)
        params = {
            "forward": forward.init(keys[0], x, step),
            "backward": backward.init(keys[1], x, step),
            "log_z": jnp.zeros_like(x, shape=()),
        }
        for (what, net), own in zip(networks.items(), keys[2:], strict=True):
            if net is not None:
                seen = features(manifold, steps, x, step)
                made = init_linen(net, own, seen)
                width = top(what, made, seen).shape[-1]
                params[what] = {"net": made, "kernel": jnp.zeros_like(x, shape=(width,))}
        return params

    def head(what, params, x, step):
        """A number a row, 0 at first."""
        seen = features(manifold, steps, x, step)
        return top(what, params[what]["net"], seen) @ params[what]["kernel"]

    def top(what, net_params, seen):
        """What the head is on top of: the features, and squares of the point."""
        squares = jnp.square(seen[..., : -(steps + 1)])
        h = apply_linen(networks[what], net_params, seen)
        return jnp.concatenate([h, squares.astype(h.dtype)], axis=-1)

    def log_stop(params, x, step):
        last = step >= steps
        if stop is None:
            never = jnp.where(last, 0.0, -jnp.inf).astype(x.dtype)
            return never, jnp.where(last, -jnp.inf, 0.0).astype(x.dtype)
        logit = head("stop", params, x, step) + jnp.asarray(hazard, x.dtype)[step]
        first = step == 0
        stops = jnp.where(last, 0.0, jnp.where(first, -jnp.inf, jax.nn.log_sigmoid(logit)))
        goes = jnp.where(last, -jnp.inf, jnp.where(first, 0.0, jax.nn.log_sigmoid(-logit)))
        return stops, goes

    def starts(n, like):
        return jnp.broadcast_to(jnp.asarray(begin, like.dtype)[None], (n, *begin.shape))

    def sample(params, key, n):
        def move(carry, inputs):
            x, ended, length = carry
            k, own = inputs
            move_key, stop_key = jax.random.split(own)
            step = jnp.full((n,), k)
            moved = forward.sample(params["forward"], move_key, x, step)
            x = jnp.where(ended[:, None], x, moved)
            length = length + ~ended
            stops, _ = log_stop(params, x, step + 1)
            now = jnp.log(jax.random.uniform(stop_key, (n,), x.dtype)) < stops
            return (x, ended | now, length), x

        x = starts(n, params["log_z"])
        carry = x, jnp.zeros(n, bool), jnp.zeros(n, jnp.int32)
        inputs = jnp.arange(steps), jax.random.split(key, steps)
        (_, _, length), path = jax.lax.scan(move, carry, inputs)
        return jnp.swapaxes(path, 0, 1), length

    def sample_backward(params, key, x):
        check_event(name, x, manifold.shape)
        n = x.shape[0]
        length_key, walk_key = jax.random.split(key)
        length = jnp.full((n,), steps, jnp.int32)
        if stop is not None:
            length = jax.random.randint(length_key, (n,), 1, steps + 1)

        def undo(x, inputs):
            k, own = inputs  # from x_k to x_(k-1), where the row is as long
            back = backward.sample(params["backward"], own, x, jnp.full((n,), k))
            return jnp.where((k <= length)[:, None], back, x), x

        numbers = jnp.arange(steps, 0, -1)
        _, path = jax.lax.scan(undo, x, (numbers, jax.random.split(walk_key, steps)))
        return jnp.swapaxes(path[::-1], 0, 1), length

    def score(params, x, length):
        if x.ndim != 3 or x.shape[1:] != (steps, *manifold.shape):
            raise ValueError(
                f"{name}: expected x of shape [n, {steps}, {manifold.dim}], got {list(x.shape)}"
            )
        n = x.shape[0]
        check_rows(name, "length", length, n)
        points = jnp.concatenate([starts(n, x)[:, None], x], axis=1)
        number = jnp.broadcast_to(jnp.arange(steps + 1)[None], (n, steps + 1))
        flat = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
        here, after = flat(points[:, :-1]), flat(points[:, 1:])
        k = flat(number[:, :-1])
        go = forward.log_prob(params["forward"], after, here, k).reshape(n, steps)
        back = backward.log_prob(params["backward"], here, after, k + 1).reshape(n, steps)
        stops, goes = (
            part.reshape(n, steps + 1) for part in log_stop(params, flat(points), flat(number))
        )
        at, before = number == length[:, None], number < length[:, None]
        add = lambda a: jnp.pad(a, ((0, 0), (0, 1)))  # noqa: E731
        log_forward = jnp.where(before, add(go) + jnp.where(before, goes, 0), 0)
        log_forward = jnp.where(at, stops, log_forward)
        ends = 0.0 if stop is None else -math.log(steps)
        log_backward = jnp.where(before & (number > 0), add(back), jnp.where(at, ends, 0.0))
        log_flow = None
        if flow is not None:
            log_flow = head("flow", params, flat(points), flat(number)).reshape(n, steps + 1)
            log_flow = jnp.where(number == 0, params["log_z"], log_flow)
        return ContinuousScores(log_forward, log_backward.astype(go.dtype), log_flow, at | before)

    return ContinuousPolicy(
        init,
        sample,
        sample_backward,
        score,
        log_stop,
        forward,
        backward,
        steps,
        tuple(begin.tolist()),
    )


def continuous_rollouts(
    policy: ContinuousPolicy,
    log_reward: Callable[[Array], Array],
    rows: int,
    *,
    backward: Callable[[Key, int], Array] | None = None,
) -> Callable:
    """Trajectories of the policy that is trained, with their rewards, as the batches of `fit`.

    Args:
        policy: the policy.
        log_reward: the log of the reward of points [n, d] -> [n], nats, such as the `log_density`
            of an `energy.Target`.
        rows: how many trajectories there are in a batch.
        backward: where given, trajectories are not drawn forwards but led backwards from the points
            that it draws, (key, rows) -> [rows, d]: data, or points all over the space, which the
            policy might never find. The objectives hold on any trajectories.

    Returns:
        (state, key) -> {'x' [rows, N, d], 'length' [rows], 'log_reward' [rows]}, which
            `train.fit` takes for its batches.

    Raises:
        TypeError: policy is no `ContinuousPolicy`.
        ValueError: rows is below 1.
    """
    check_noun("continuous_rollouts", policy, ContinuousPolicy)
    check_whole("continuous_rollouts", rows=rows)

    @jax.jit
    def walk(params, key):
        if backward is None:
            x, length = policy.sample(params, key, rows)
        else:
            end_key, walk_key = jax.random.split(key)
            x, length = policy.sample_backward(params, walk_key, backward(end_key, rows))
        end = x[:, -1]
        reward = check_rows("continuous_rollouts", "a log-reward", log_reward(end), rows)
        return {"x": x, "length": length, "log_reward": reward}

    return lambda state, key: check_rewards("continuous_rollouts", walk(state.params, key), state)


def terminal_log_density(
    policy: ContinuousPolicy,
    params: Params,
    nodes: Float[Array, "m d"],
    log_weight: float | Float[Array, " m"],
) -> Float[Array, " m"]:
    """The log-density of the objects that a policy makes, by quadrature over the points between.

        a_1(y) = p(y | start),    a_(k+1)(y) = sum_x w(x) a_k(x) (1 - stop_k(x)) p_k(y | x),
        p(y) = sum_k a_k(y) stop_k(y)

    It is as exact as the rule: on the torus equal weights converge faster than any power, as long
    as the spacing resolves the narrowest transition. The cost is N m^2 evaluations of the forward
    transition, which few dimensions allow; `continuous_log_prob` estimates by draws.

    Args:
        policy: the policy.
        params: its params.
        nodes: the points of the rule, [m, d].
        log_weight: the logs of their weights, nats, [m] or one for all.

    Returns:
        The log-density at the nodes [m], nats.
    """
    m = nodes.shape[0]
    start = jnp.broadcast_to(jnp.asarray(policy.start, nodes.dtype)[None], nodes.shape)
    log_prob = lambda y, x, step: policy.forward.log_prob(params["forward"], y, x, step)  # noqa: E731
    numbers = lambda k: jnp.full((m,), k)  # noqa: E731

    def move(log_a, k):
        stops, goes = policy.stop(params, nodes, numbers(k))
        leaving = log_a + goes + log_weight
        arriving = jax.lax.map(
            lambda y: jax.nn.logsumexp(
                leaving + log_prob(jnp.broadcast_to(y[None], nodes.shape), nodes, numbers(k))
            ),
            nodes,
        )
        return arriving, log_a + stops

    first = log_prob(nodes, start, numbers(0))
    last, ended = jax.lax.scan(move, first, jnp.arange(1, policy.steps))
    return jax.nn.logsumexp(jnp.concatenate([ended, last[None]]), axis=0)


def continuous_log_prob(
    policy: ContinuousPolicy, params: Params, key: Key, x: Float[Array, "n d"], draws: int
) -> Float[Array, " n"]:
    """An estimate of the log-density of objects, by importance sampling with backward trajectories.

        p(x) = E[ product of forward / product of backward ],    trajectories drawn backwards from x

    The mean under the logarithm is unbiased, its logarithm too low on average and consistent as
    draws grow; at a solution of trajectory balance every draw gives R(x) / Z.

    Args:
        policy: the policy.
        params: its params.
        key: what trajectories are drawn with.
        x: the objects, [n, d].
        draws: how many trajectories for each.

    Returns:
        The estimates [n], nats.

    Raises:
        ValueError: draws is below 1, or x has another shape.
    """
    check_whole("continuous_log_prob", draws=draws)
    path, length = policy.sample_backward(params, key, jnp.repeat(x, draws, axis=0))
    scores = policy.score(params, path, length)
    ratio = jnp.sum(scores.log_forward - scores.log_backward, axis=1).reshape(-1, draws)
    return jax.nn.logsumexp(ratio, axis=1) - math.log(draws)
