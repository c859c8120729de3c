"""Flow matching of the next token: a flow head on a causal network, trained without a solve."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow import paths, times
from jflow._core.arrays import expand_to, filled, float_dtype
from jflow._core.batch import mean_of_rows, read_parts
from jflow._core.checks import check_noun, check_params, check_whole, need_key
from jflow._core.keys import same_draws
from jflow._core.linen import apply_linen, check_linen
from jflow.losses._errors import Metric, mean_squared_error
from jflow.types import (
    Array,
    Condition,
    Distribution,
    Field,
    Flow,
    Loss,
    Path,
    PyTree,
    Time,
    Velocity,
)

__all__ = ["causal_matching"]

_LINEAR, _UNIFORM = paths.linear(), times.uniform()


def causal_matching(
    net: nn.Module,
    velocity: Velocity,
    base: Distribution | Flow,
    *,
    path: Path = _LINEAR,
    time: Time = _UNIFORM,
    metric: Metric = mean_squared_error,
    draws: int = 1,
) -> Loss:
    """Flow matching of each token given what a causal network says of the tokens before it.

    With h = net(x, cond), which at token i is a function of x_<i and cond, the loss is that of
    `flow_matching` with the tokens for rows, h_i for their condition and base for the source:

        mean over tokens and draws of |velocity(x_t, t, h_i) - target|^2 / d,
        x_t, target on the path from x_0 ~ base(. | h_i) to x_i.

    The network runs once for all the draws. The params are those of `distributions.causal(net,
    flows.cnf(velocity, base))`, which makes them and has the exact density and the samples.

    Also known as: TimeFlow loss, flow head, next-token flow matching.

    Args:
        net: A causal network, as `distributions.causal` takes it, such as
            `nets.CausalTransformer(features=k)`.
        velocity: The velocity of a token x [rows, d], given h [rows, k].
        base: The source of a token, such as `distributions.normal((d,))`; given
            `nets.WithPrevious(net)` it may be `distributions.around_previous(d, std)`.
        path: The path from the source to the token.
        time: The law of the times, (key, n) -> t [n], of which each token and draw has its own.
        metric: The error of a token, (v, target, x_t, t) -> [rows].
        draws: How many times and sources each token is trained on at once.

    Returns:
        A loss of params {'net', 'token': {'velocity', 'base'}} and the batch {'x' [b, n, d],
        optionally 'cond', of which `Condition.valid` [b, n] says which tokens exist, and 'weight'
        [b] or [b, n]}. The mean is weighted, sum(w l) / sum(w), over the tokens that exist. A token
        of weight 0, such as one of a prompt, is not learned, and stays the past of the others. It
        has no metrics.

    Raises:
        TypeError: At construction for what is no network, velocity or distribution.
        ValueError: At construction for draws below 1; at trace time for a velocity of another
            shape, an x that is not [b, n, d], a batch with unknown keys or rows that don't match,
            and a key that is None.

    Examples:
        >>> import jax
        >>> from jflow import distributions, flows, losses, nets, velocity
        >>> net, head = nets.CausalLSTM(width=8), velocity(nets.TimeMLP((8,)))
        >>> base = distributions.normal((2,))
        >>> law = distributions.causal(net, flows.cnf(head, base, method=4), (5, 2))
        >>> x = jax.random.normal(jax.random.key(0), (3, 5, 2))
        >>> params = law.init(jax.random.key(1), x)
        >>> loss = losses.causal_matching(net, head, base, draws=4)
        >>> value, _ = loss(params, jax.random.key(2), {"x": x})
        >>> value.shape, law.log_prob(params, x).shape
        ((), (3,))

    References:
        Liu, Qin, Shi, et al., *Sundial: A Family of Highly Capable Time Series Foundation Models*,
            2025, arXiv:2502.00816, whose TimeFlow this is on patches of a series.
        Wang, Liu, Meng, et al., *FELLE: Autoregressive Speech Synthesis with Token-Wise
            Coarse-to-Fine Flow Matching*, 2025, arXiv:2502.11128, for a source around the preceding
            token.
        Shaul, Singer, Gat, Lipman, *Transition Matching: Scalable and Flexible Generative
            Modeling*, 2025, arXiv:2506.23589, for flow heads over several draws.
    """
    name = "causal_matching"
    check_linen(name, "net", net)
    check_noun(name, velocity, Velocity, Field)
    check_noun(name, base, Distribution, Flow)
    check_whole(name, draws=draws)

    def loss(params, key, batch, frozen=None):
        need_key(name, key)
        check_params(name, params, "net", "token")
        check_params(name, params["token"], "velocity", "base")
        net_key, source_key, time_key, path_key, dropout_key = jax.random.split(key, 5)
        x, cond, weight, used = _read(name, batch)
        h = apply_linen(net, params["net"], x, cond, key=net_key)
        if h.ndim != 3 or h.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"{name}: expected the network to give h of shape {[*x.shape[:2], 'k']}, got"
                f" {list(h.shape)}"
            )
        count = x.shape[0] * x.shape[1]
        rows = x.reshape(count, x.shape[2]), h.reshape(count, h.shape[2])
        rows = filled(None if used is None else used.reshape(count), rows)
        x1, h = (jnp.repeat(row, draws, axis=0) for row in rows)
        base_params = jax.lax.stop_gradient((params["token"]["base"], h))
        x0 = jax.lax.stop_gradient(
            base.sample(base_params[0], source_key, count * draws, base_params[1])
        ).astype(x1.dtype)
        t = time(time_key, count * draws).astype(float_dtype(x1))
        x_t = path.point(x0, x1, t, key=path_key).astype(x1.dtype)
        target = path.target(x0, x1, t, key=same_draws(path_key))
        v = velocity.apply(params["token"]["velocity"], x_t, t, h, key=dropout_key)
        if v.shape != target.shape:
            raise ValueError(
                f"{name}: expected a velocity of shape {list(target.shape)}, got {list(v.shape)}"
            )
        error = metric(v.astype(float_dtype(x1)), target.astype(float_dtype(x1)), x_t, t)
        if error.shape != t.shape:
            raise ValueError(
                f"{name}: expected a metric of shape {list(t.shape)}, got {list(error.shape)}"
            )
        error = jnp.mean(error.reshape(count, draws), axis=1)
        return mean_of_rows(error, None if weight is None else weight.reshape(count)), {}

    return loss


def _read(
    name: str, batch: Mapping[str, PyTree]
) -> tuple[Array, PyTree, Array | None, Array | None]:
    """(x [b, n, d], cond, weights of the tokens [b, n], which of them count [b, n]), the last two
    None where all are equal.

    A token of weight 0 stays the past of others, unless it is not finite: then it is zero."""
    if isinstance(batch, Mapping) and batch.get("x0") is not None:
        raise ValueError(f"{name}: unknown keys in batch: ['x0']; the base is the source")
    x, _, cond, weight = read_parts(name, batch)
    if isinstance(x, dict) or x.ndim != 3:
        given = "a dict" if isinstance(x, dict) else list(x.shape)
        raise ValueError(f"{name}: expected x of shape [b, n, d], got {given}")
    shape = x.shape[:2]
    if weight is not None and weight.ndim == 1:
        weight = jnp.broadcast_to(weight[:, None], shape)
    if isinstance(cond, Condition) and cond.valid is not None:
        if cond.valid.shape != shape:
            raise ValueError(
                f"{name}: expected cond.valid of shape {list(shape)}, got {list(cond.valid.shape)}"
            )
        weight = cond.valid if weight is None else jnp.where(cond.valid, weight, 0)
    if weight is None:
        return x, cond, None, None
    used = weight != 0
    x, cond = filled(jnp.any(used, axis=1), (x, cond))  # rows that do not count at all
    kept = expand_to(used, x) | jnp.isfinite(x)
    if isinstance(cond, Condition) and cond.valid is not None:
        kept = kept & expand_to(cond.valid, x)
    x = jnp.where(kept, x, jnp.zeros_like(x))
    return x, cond, weight, used
