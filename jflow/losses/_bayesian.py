"""Losses of Bayesian flow networks: what it costs to send data, and to reconstruct them."""

import math

import jax
import jax.numpy as jnp

from jflow import times
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import mean_of_tokens, read_tokens
from jflow._core.checks import check_noun, check_whole, need_key
from jflow.paths import BayesianFlow
from jflow.types import Field, Loss, Time, Velocity

__all__ = ["bayesian_flow", "bayesian_reconstruction"]

_UNIFORM = times.uniform()


def bayesian_flow(
    field: Field | Velocity,
    flow: BayesianFlow,
    *,
    steps: int | None = None,
    time: Time = _UNIFORM,
) -> Loss:
    """The loss of a Bayesian flow network: the nats that sending the data costs.

        continuous time    beta'(t) error(x, out),      out = field(theta_t, t, cond)
        n steps            n transmission(x, out, beta(t_i) - beta(t_(i-1)))    at t_(i-1), i of n

    with theta_t ~ flow.point(x, t), and error and transmission those of the kind of data
    (`paths.BayesianFlow`). The loss of n steps falls to that of continuous time as n grows. Its sum
    with `bayesian_reconstruction` is a bound on -log p(x); for tokens and levels p is a
    probability.

    Args:
        field: The network, (params, theta, t [b], cond) -> out: the prediction of the data, or
            logits, as `flow` reads it.
        flow: The kind of data and the accuracy, such as
            `paths.bayesian_discrete(paths.quadratic_accuracy(3.0), 2)`.
        steps: The number n of steps, or None for continuous time.
        time: The law of the times, (key, n) -> t [n], uniform or a stratified uniform one: another
            law makes the value no bound.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b], or like x}, in nats
        per row, summed over the event: with weights of single numbers or tokens (0 for padding),
        their weighted mean, sum(w l) / sum(w), times how many a row has. Its metrics are 'bits',
        the same in bits per row, and 'bits_per_dim', in bits for each number of the event.

    Raises:
        TypeError: At construction for what is no `Field` or `Velocity`.
        ValueError: At construction for steps < 1; at trace time for an output of another shape,
            data that the flow does not take, a batch without 'x' or with unknown keys, and a key
            that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, paths
        >>> from jflow.types import Field
        >>> flow = paths.bayesian_continuous(paths.geometric_accuracy(0.5))
        >>> zero = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> loss = losses.bayesian_flow(zero, flow, steps=1)  # one view, of accuracy 3
        >>> float(loss({}, jax.random.key(0), {"x": 2 * jnp.ones((1, 1))})[0])
        6.0

    References:
        Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
    """
    name = "bayesian_flow"
    check_noun(name, field, Field, Velocity)
    if steps is not None:
        check_whole(name, steps=steps)

    def loss(params, key, batch, frozen=None):
        need_key(name, key)
        x, cond, weight = read_tokens(name, batch, ("x", "cond", "weight"))
        time_key, point_key, send_key, dropout_key = jax.random.split(key, 4)
        t = time(time_key, x.shape[0]).astype(float_dtype(x))
        if steps is not None:
            t = jnp.minimum(jnp.floor(t * steps), steps - 1) / steps
        theta = flow.point(x, t, point_key)
        out = field.apply(params, theta, t, cond, key=dropout_key)
        if steps is None:
            slope = jax.jvp(flow.accuracy, (t,), (jnp.ones_like(t),))[1]
            nats = expand_to(slope, x) * flow.error(x, out)
        else:
            alpha = flow.accuracy(t + 1 / steps) - flow.accuracy(t)
            nats = steps * flow.transmission(send_key, x, out, alpha)
        return _with_bits(nats, x, weight)

    return loss


def bayesian_reconstruction(field: Field | Velocity, flow: BayesianFlow) -> Loss:
    """What is left to say at the end of a Bayesian flow: -log p(x) by the network at t=1.

        -log p(x | out),      out = field(theta_1, 1, cond),  theta_1 ~ flow.point(x, 1)

    It is not trained on in the paper: `bayesian_flow` plus this is the bound that is reported.

    Args:
        field: The network, as in `bayesian_flow`.
        flow: The kind of data and the accuracy.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b], or like x}, in nats
        per row, with weights and the metrics 'bits' and 'bits_per_dim' as in `bayesian_flow`.

    Raises:
        TypeError: At construction for what is no `Field` or `Velocity`.
        ValueError: At trace time for an output of another shape, data that the flow does not take,
            a batch without 'x' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, paths
        >>> from jflow.types import Field
        >>> flow = paths.bayesian_discrete(paths.quadratic_accuracy(3.0), 4)
        >>> flat = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> loss = losses.bayesian_reconstruction(flat, flow)
        >>> metrics = loss({}, jax.random.key(0), {"x": jnp.zeros((2, 3), jnp.int32)})[1]
        >>> round(float(metrics["bits_per_dim"]), 4)
        2.0

    References:
        Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
    """
    name = "bayesian_reconstruction"
    check_noun(name, field, Field, Velocity)

    def loss(params, key, batch, frozen=None):
        need_key(name, key)
        x, cond, weight = read_tokens(name, batch, ("x", "cond", "weight"))
        point_key, dropout_key = jax.random.split(key)
        t = jnp.ones_like(x, shape=x.shape[:1], dtype=float_dtype(x))
        out = field.apply(params, flow.point(x, t, point_key), t, cond, key=dropout_key)
        return _with_bits(flow.reconstruction(x, out), x, weight)

    return loss


def _with_bits(nats, x, weight):
    mean, count = mean_of_tokens(nats, weight), math.prod(x.shape[1:])
    bits_per_dim = jax.lax.stop_gradient(mean) / math.log(2)
    return count * mean, {"bits": count * bits_per_dim, "bits_per_dim": bits_per_dim}
