"""TFG-Flow: a reward guides a flow of numbers and tokens together, without training."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow._core.arrays import expand_to
from jflow._core.checks import (
    check_cond,
    check_noun,
    check_rows,
    check_same_shape,
    check_whole,
    count_rows,
    need_key,
)
from jflow._core.numbers import check_number, number_at
from jflow._core.times import Times, check_unit_grid
from jflow._core.tokens import need_tokens, one_hot, token_log_probs
from jflow.steering._common import floating, raise_nan
from jflow.types import Array, Cond, Field, Key, NumberOrFunction, Params, Velocity

__all__ = ["tfg_flow"]


def tfg_flow(
    model: Field,
    params: Params,
    x0: dict[str, Array],
    key: Key,
    grid: Times | ArrayLike,
    log_reward: Callable[[dict[str, Array], Cond], Array],
    cond: Cond = None,
    *,
    draws: int = 16,
    scale: NumberOrFunction = 1.0,
    data_scale: NumberOrFunction = 0.0,
) -> dict[str, Array]:
    """Sample numbers and tokens that flow together, guided by a reward of clean data.

    Also known as: training-free guidance, multimodal guidance.

    x has two parts, 'numbers' on the linear path and 'tokens', of which each is already that of the
    data with probability t. At each step, with x1 = x + (1 - t) v of the numbers and p the law of
    the tokens,

        a_k from prod of p,  k = 1 ... draws,      w_k = reward(x1, a_k) / sum of rewards
        a from the a_k with weights w_k
        x1 <- x1 + scale (1 - t)^2 / t grad_x log reward(x1(x), a)      through the network
        x1 <- x1 + data_scale grad_x1 log reward(x1, a)

    The numbers go on to x + h (x1 - x) / (1 - t), each token becomes that of one a_k with
    probability h / (1 - t) (`guidance.reweighted_jump`). With scale 1 and numbers that are Gaussian
    given x_t with a covariance that x_t does not change, and a reward that is exponential in them,
    the guided velocity is exact; the tokens are, with many draws, as far as they are independent
    given x_t. A step takes one evaluation with one backward pass, and draws + 2 rewards; the
    backward pass is left out where scale is the number 0, and draws=1 guides the numbers alone.
    Where x_t leaves open which of several modes a row is in, an error stays that more steps and
    draws do not remove; unguided rows, kept by their rewards, have none but cost more.

    Args:
        model: apply(params, x, t [b], cond) -> {'numbers': the velocity, shaped like those of x,
            'tokens': logits [b, *event, V] of the data's tokens}. They are those of the law that is
            jumped to: a token that is known is itself, and a mask, or a value that a column of a
            table does not have, is -inf.
        params: those of the model.
        x0: {'numbers': noise [b, *event], 'tokens': tokens of the source [b, *event], such as
            masks}.
        key: a key.
        grid: rising times [n + 1] from 0 to 1.
        log_reward: (x1 {'numbers', 'tokens'}, cond) -> [rows], differentiable in the numbers.
        cond: the condition, [b, ...] or one row; the reward gets a row for each of its rows.
        draws: how many rows of tokens are tried for each row.
        scale: of the gradient through the network, a number or t [b] -> [b].
        data_scale: of the gradient at the prediction, a number or t [b] -> [b], in squared units of
            the numbers.

    Returns:
        {'numbers', 'tokens'} at the last time. The numbers of a row are NaN where its reward was.

    Raises:
        ValueError: x0 does not have these parts, draws is below 1, the grid does not rise from 0 to
            1; the reward returns another shape than [rows], or, where values are seen, outside jit,
            NaN, with the step and the row.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import solvers, steering
        >>> from jflow.types import Field
        >>> def apply(params, x, t, cond=None, *, key=None):  # N(0, 1), and a fair coin
        ...     t, z = t[:, None], x["numbers"]
        ...     v = (2 * t - 1) / (t**2 + (1 - t) ** 2) * z
        ...     fair = jnp.broadcast_to(jnp.array([0.0, 0.0, -jnp.inf]), (*x["tokens"].shape, 3))
        ...     known = jnp.log(jax.nn.one_hot(x["tokens"], 3))
        ...     return {"numbers": v, "tokens": jnp.where(x["tokens"][..., None] < 2, known, fair)}
        >>> x0 = {"numbers": jax.random.normal(jax.random.key(0), (4096, 1))}
        >>> x0["tokens"] = jnp.full((4096, 1), 2)  # masks
        >>> reward = lambda x, cond: x["numbers"][:, 0] + jnp.log(9.0) * (x["tokens"][:, 0] == 1)
        >>> grid = solvers.grids.uniform(32)
        >>> model = Field(lambda *_: {}, apply)
        >>> x = steering.tfg_flow(model, {}, x0, jax.random.key(1), grid, reward)
        >>> abs(float(x["numbers"].mean()) - 1) < 0.1, abs(float(x["tokens"].mean()) - 0.9) < 0.03
        (True, True)

    References:
        Lin, Li, Ye, Yang, Ermon, Liang, Ma, *TFG-Flow: Training-free Guidance in Multimodal
            Generative Flow*, 2025, arXiv:2501.14216. The paper moves x itself by its first
            gradient, several times, with a rate to be tuned; the factor (1 - t)^2 / t, which makes
            a Gaussian exact, is ours. In a step from t=0 there is no first gradient.
    """
    name = "steering.tfg_flow"
    check_noun(name, model, Field, Velocity)
    check_whole(name, draws=draws)
    for what, value in (("scale", scale), ("data_scale", data_scale)):
        check_number(name, what, value, "that is finite", lambda value: abs(value) < math.inf)
    if not isinstance(x0, dict) or set(x0) != {"numbers", "tokens"}:
        given = sorted(x0) if isinstance(x0, dict) else type(x0).__name__
        raise ValueError(f"{name}: expected x0 with 'numbers' and 'tokens', got {given}")
    tokens = need_tokens(name, "the tokens of x0", x0["tokens"])
    n = count_rows(name, x0)
    need_key(name, key)
    check_unit_grid(name, grid)
    cond = check_cond(name, cond, n)
    start = floating(name, x0["numbers"], "the numbers of x0")
    ts = jnp.asarray(grid, start.dtype)

    def reward(x, times=1):
        told = jax.tree.map(lambda c: c if len(c) == 1 else jnp.concatenate([c] * times), cond)
        return check_rows(name, "log_reward(x1)", log_reward(x, told), times * n)

    def step(x, at):
        t, t_next, key = at
        draw_key, pick_key, jump_key = jax.random.split(key, 3)
        z, a, when = x["numbers"], x["tokens"], jnp.broadcast_to(t, (n,))

        def predict(z):
            out: Any = model.apply(params, {"numbers": z, "tokens": a}, when, cond)
            v = check_same_shape(name, "the velocity of the numbers", out["numbers"], z)
            return z + (1 - t) * v.astype(z.dtype), out["tokens"]

        x1, back, logits = jax.vjp(predict, z, has_aux=True)
        log_p = token_log_probs(name, logits, a).astype(z.dtype)
        tried = jax.random.categorical(draw_key, log_p, shape=(draws, *a.shape)).astype(a.dtype)
        many = jnp.concatenate([x1] * draws)
        rows = {"numbers": many, "tokens": tried.reshape(draws * n, *a.shape[1:])}
        value = reward(rows, draws).reshape(draws, n).astype(z.dtype)
        some = jnp.any(value > -jnp.inf, axis=0, keepdims=True)  # else no draw is better
        w = jax.nn.softmax(jnp.where(some, value, 0), axis=0)
        chosen = jax.random.categorical(pick_key, jnp.log(w), axis=0)
        best = tried[chosen, jnp.arange(n)]

        def slope(x1):
            total = lambda z: jnp.sum(reward({"numbers": z, "tokens": best}))  # noqa: E731
            return jax.grad(total)(x1)

        if callable(scale) or scale != 0:
            through = (1 - t) ** 2 / jnp.where(t > 0, t, 1) * (t > 0)
            rate = through * number_at(name, "scale(t)", scale, when, like=when)
            x1 = x1 + expand_to(rate, z) * back(slope(x1))[0]
        if callable(data_scale) or data_scale != 0:
            near = number_at(name, "data_scale(t)", data_scale, when, like=when)
            x1 = x1 + expand_to(near, z) * slope(x1)

        share = (t_next - t) / (1 - t)
        law = jnp.sum(w.reshape(draws, n, *(1,) * a.ndim) * one_hot(tried, log_p), axis=0)
        p = (1 - share) * one_hot(a, log_p) + share * law
        moved = jax.random.categorical(jump_key, jnp.log(p)).astype(a.dtype)
        z = z + share * (x1 - z)
        nan = jnp.sum(jnp.where(jnp.isnan(value), value, 0), axis=0)
        return {"numbers": z + expand_to(nan, z), "tokens": moved}, nan

    keys = jax.random.split(key, len(ts) - 1)
    x, nans = jax.lax.scan(step, {"numbers": start, "tokens": tokens}, (ts[:-1], ts[1:], keys))
    raise_nan(name, nans)
    return {"numbers": x["numbers"].astype(x0["numbers"].dtype), "tokens": x["tokens"]}
