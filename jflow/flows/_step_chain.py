"""A chain of maps over future steps: a density at every step, and its cheap update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import (
    check_cond,
    check_draws,
    check_key,
    check_noun,
    check_params,
    check_rows,
    check_whole,
)
from jflow._core.keys import split_key
from jflow.types import Array, Bijector, Distribution, Flow, Params, Transport

__all__ = ["StepChain", "StepTrace", "step_chain", "updated_log_prob"]


class StepTrace(NamedTuple):
    """Where points of a late step come from, and the log-dets on the way: what an update keeps.

    Attributes:
        points: [step + 1, b, *event], the point at each step from 0, the base, to `step`, where
            the points themselves are.
        log_dets: [step + 1, b], the logarithm of |det d points[k] / d points[step]|, in nats, or,
            over stochastic layers, the contribution to the bound.
    """

    points: Array
    log_dets: Array


class StepChain(NamedTuple):
    """The functions of `step_chain`.

    Attributes:
        init: `init(key, x, cond=None) -> params` with {'steps', 'base'}; x [b, T, *event].
        log_prob: `log_prob(params, x, cond=None, *, key=None) -> [b, T]`, nats: the density of
            each step by itself, at x[:, k].
        sample: `sample(params, key, n, cond=None) -> [n, T, *event]`, trajectories.
        trace: `trace(params, x, step, cond=None, *, key=None) -> StepTrace` of points x [b, *event]
            of one step, 1 to T; static.
    """

    init: Callable[..., Params]
    log_prob: Callable[..., Array]
    sample: Callable[..., Array]
    trace: Callable[..., StepTrace]


def step_chain(layer: Bijector | Transport, steps: int, base: Distribution | Flow) -> StepChain:
    """The density of a moving point at each of several future steps, by a chain of maps.

        y_0 ~ base,    y_k = F_k(y_{k-1}; cond),
        log p_k(y) = log p_base(y_0) + sum_{j <= k} log |det dy_{j-1} / dy_j|,

    in nats. Step k has a density by one pass back through k maps, which `log_prob` runs for all
    steps at once. These are the densities of single steps, and their sum over steps is none of a
    trajectory: with maps that draw nothing, a trajectory has only the randomness of y_0. With
    `bijectors.indexed` layers every step draws, and `log_prob` is a lower bound, by a key.

    When a point is observed at step k, `updated_log_prob` has the densities of the later steps for
    the cost of the base: the maps and their log-dets stay. The base is commonly narrow and around
    the newest observation, `distributions.around_previous`.

    Also known as: FlowChain, trajectory prediction, occupancy density.

    Args:
        layer: the map of one step, whose params differ from step to step; all take the same cond,
            such as features of the past.
        steps: T, the number of steps.
        base: the law of y_0 given cond.

    Returns:
        StepChain: init, log_prob, sample and trace.

    Raises:
        TypeError: layer is not a `Bijector` or a `Transport`, or base not a `Distribution` or a
            `Flow`.
        ValueError: steps is below 1; at the call, x does not hold T steps, or a step is none of 1
            to T.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows
        >>> chain = flows.step_chain(bijectors.affine((2,)), 3, distributions.normal((2,)))
        >>> params = chain.init(jax.random.key(0), jnp.zeros((4, 3, 2)))
        >>> chain.log_prob(params, jnp.zeros((4, 3, 2))).shape
        (4, 3)

    References:
        Maeda, Ukita, *Fast Inference and Update of Probabilistic Density Estimation on Trajectory
            Prediction*, 2023, arXiv:2308.08824. Ours: the log-dets are added up over the steps.
        Cornish, Caterini, Deligiannidis, Doucet, *Relaxing Bijectivity Constraints with
            Continuously Indexed Normalising Flows*, 2019, arXiv:1909.13833.
    """
    check_noun("step_chain", layer, Bijector, Transport)
    check_noun("step_chain", base, Distribution, Flow)
    check_whole("step_chain", steps=steps)

    def check(x):
        if x.ndim < 2 or x.shape[1] != steps:
            raise ValueError(
                f"step_chain: expected x of shape [b, {steps}, *event], got {list(x.shape)}"
            )
        return jnp.moveaxis(x, 1, 0)

    def init(key, x, cond=None):
        check_key("step_chain.init", key)
        x, cond = check(x), check_cond("step_chain.init", cond, x.shape[0])
        key_steps, key_base = jax.random.split(key)
        first = lambda key, x: layer.init(key, x, cond)  # noqa: E731
        made = jax.vmap(first)(jax.random.split(key_steps, steps), x)
        return {"steps": made, "base": base.init(key_base, x[0], cond)}

    def base_term(params, y, cond, key):
        value = base.log_prob(params["base"], y, cond, key=key)
        return check_rows("step_chain", "the base's log_prob", value, y.shape[0])

    def back(params, y, log_det, step, cond, key, leave=None):
        """Through the maps step, step - 1 ... 1; `leave` (index of a map) -> rows that stay."""
        own = jax.tree.map(lambda leaf: leaf[:step], params["steps"])
        keys = None if key is None else jax.random.split(key, step)

        def one(carry, at):
            y, log_det = carry
            i, params, key = at
            z, more = layer.inverse(params, y, cond, key=key)
            if leave is not None:
                stay = leave(i)
                z, more = jnp.where(expand_to(stay, z), y, z), jnp.where(stay, 0, more)
            carry = z, log_det + more
            return carry, carry

        return jax.lax.scan(one, (y, log_det), (jnp.arange(step), own, keys), reverse=True)

    def trace(params, x, step, cond=None, *, key=None):
        check_params("step_chain.trace", params, "steps", "base")
        check_whole("step_chain.trace", step=step)
        if step > steps:
            raise ValueError(f"step_chain.trace: expected a step of 1 to {steps}, got {step}")
        cond = check_cond("step_chain.trace", cond, x.shape[0])
        zero = jnp.zeros_like(x, shape=x.shape[:1], dtype=float_dtype(x))
        _, (points, log_dets) = back(params, x, zero, step, cond, key)
        return StepTrace(
            jnp.concatenate([points, x[None]]), jnp.concatenate([log_dets, zero[None]])
        )

    def log_prob(params, x, cond=None, *, key=None):
        """Rows are pairs of a step and a row of x; those of earlier steps wait."""
        check_params("step_chain.log_prob", params, "steps", "base")
        b, x = x.shape[0], check(x)
        cond = check_cond("step_chain.log_prob", cond, b)
        cond = jax.tree.map(lambda c: jnp.tile(c, (steps, *[1] * (c.ndim - 1))), cond)
        key_map, key_base = split_key(key, 2)
        y = x.reshape(steps * b, *x.shape[2:])
        arrives = jnp.repeat(jnp.arange(steps), b)
        zero = jnp.zeros_like(y, shape=y.shape[:1], dtype=float_dtype(y))
        (y, log_det), _ = back(params, y, zero, steps, cond, key_map, lambda i: i > arrives)
        return (base_term(params, y, cond, key_base) + log_det).reshape(steps, b).T

    def sample(params, key, n, cond=None):
        check_params("step_chain.sample", params, "steps", "base")
        n, cond = check_draws("step_chain.sample", key, n, cond)
        key_base, key_map = jax.random.split(key)

        def one(y, at):
            params, key = at
            y, _ = layer.forward(params, y, cond, key=key)
            return y, y

        start = base.sample(params["base"], key_base, n, cond)
        at = params["steps"], jax.random.split(key_map, steps)
        return jnp.moveaxis(jax.lax.scan(one, start, at)[1], 0, 1)

    return StepChain(init, log_prob, sample, trace)


def updated_log_prob(trace: StepTrace, step: int, log_density: Callable[[Array], Array]) -> Array:
    """The density of a later step after an observation at `step`, from what a trace has kept.

        log p(x | observed) = log_density(points[step]) + log |det d points[step] / dx|.

    The chain starts anew from what is known of step `step`, such as a narrow normal law around the
    point that was observed; no map is run.

    Args:
        trace: the `StepTrace` of points of a later step.
        step: the step that was observed, from 0 to that of the points.
        log_density: the law of the point at `step`, y [b, *event] -> [b], in nats.

    Returns:
        The log-density of the points of the trace [b], in nats.

    Raises:
        ValueError: step is none of the trace's, or log_density returns another shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows
        >>> law = distributions.normal((2,))
        >>> chain = flows.step_chain(bijectors.affine((2,)), 3, law)
        >>> params = chain.init(jax.random.key(0), jnp.zeros((4, 3, 2)))
        >>> kept = chain.trace(params, jnp.zeros((4, 2)), 3)  # points of step 3
        >>> flows.updated_log_prob(kept, 1, lambda y: law.log_prob({}, y)).shape
        (4,)

    References:
        Maeda, Ukita, *Fast Inference and Update of Probabilistic Density Estimation on Trajectory
            Prediction*, 2023, arXiv:2308.08824.
    """
    check_whole("updated_log_prob", least=0, step=step)
    if step >= len(trace.points):
        raise ValueError(
            f"updated_log_prob: expected a step of 0 to {len(trace.points) - 1}, got {step}"
        )
    y = trace.points[step]
    value = check_rows("updated_log_prob", "log_density", log_density(y), y.shape[0])
    return value + trace.log_dets[step]
