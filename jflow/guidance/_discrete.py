"""Guidance of discrete flows: of the law of the data's tokens, or of the rates of their jumps.

References:
    Nisonoff, Xiong, Allenspach, Listgarten, *Unlocking Guidance for Discrete State-Space Diffusion
        and Flow Models*, 2024, arXiv:2406.01572.
    Lin, Li, Ye, Yang, Ermon, Liang, Ma, *TFG-Flow: Training-free Guidance in Multimodal Generative
        Flow*, 2025, arXiv:2501.14216.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_cond, check_rows, check_whole, like_rows, need_key, rows
from jflow._core.keys import split_key
from jflow._core.numbers import check_number, number_at
from jflow._core.tokens import at_tokens, kappa, need_tokens, one_hot, token_log_probs
from jflow.paths import LINEAR, Schedule
from jflow.types import Array, Cond, Field, NumberOrFunction, PyTree, Step

__all__ = ["discrete_cfg", "predictor_rates", "reweighted_jump", "taylor_rates", "tempered"]


def tempered(field: Field, temperature: NumberOrFunction) -> Field:
    """The logits of a field divided by a temperature: below 1 its law is sharper.

        p(x1 | x_t)^(1 / temperature), normalized

    Args:
        field: a network of logits or log-probabilities [b, *event, V].
        temperature: a number above 0, or t [b] -> [b].

    Returns:
        Field: log-probabilities [b, *event, V], with the params and the init of `field`.

    Raises:
        ValueError: temperature is a number that is not above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Field
        >>> law = Field(lambda *_: {}, lambda *_, key=None: jnp.log(jnp.array([[[0.8, 0.2]]])))
        >>> cold = guidance.tempered(law, 0.5)
        >>> p = jnp.exp(cold.apply({}, jnp.array([[0]]), jnp.zeros(1)))
        >>> [round(float(v), 3) for v in p[0, 0]]
        [0.941, 0.059]
    """
    check_number("tempered", "temperature", temperature, "> 0", lambda value: value > 0)

    def apply(params, x, t, cond=None, *, key=None):
        x = need_tokens("tempered", "x", x)
        log_p = token_log_probs("tempered", field.apply(params, x, t, cond, key=key), x)
        t = rows(jnp.asarray(t, log_p.dtype), x.shape[0])
        value = number_at("tempered", "temperature(t)", temperature, t, like=t)
        return token_log_probs("tempered", log_p / expand_to(value.astype(log_p.dtype), log_p), x)

    return Field(field.init, apply)


def discrete_cfg(field: Field, scale: NumberOrFunction, *, null: PyTree) -> Field:
    """Classifier-free guidance of discrete flows, on log-probabilities.

    Also known as: CFG of masked models.

        log p(x1 | x_t, null) + scale [log p(x1 | x_t, cond) - log p(x1 | x_t, null)], normalized

    scale 1 is the conditional law, 0 the unconditional one. What the condition excludes, such as a
    mask or any other symbol at a known token, stays excluded. Both are one evaluation of 2b rows.

    Args:
        field: a network of logits [b, *event, V], trained with `losses.drop_cond(p, null=null)`.
        scale: a number, or t [b] -> [b].
        null: the condition that stands for none, one row of cond without the batch axis.

    Returns:
        Field: log-probabilities [b, *event, V], with the params and the init of `field`. It raises
            a ValueError where cond is None or null is not a row of it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Field
        >>> def apply(params, x, t, cond=None, *, key=None):
        ...     odds = jnp.where(cond[:, None] == 1, 2.0, 1.0)
        ...     return jnp.log(jnp.stack([odds, jnp.ones_like(odds)], -1))
        >>> guided = guidance.discrete_cfg(Field(lambda *_: {}, apply), 2.0, null=0)
        >>> p = jnp.exp(guided.apply({}, jnp.array([[0]]), jnp.zeros(1), jnp.array([1])))
        >>> [round(float(v), 3) for v in p[0, 0]]  # odds of 2, squared, over those of 1
        [0.8, 0.2]

    References:
        Hu, Ommer, *[MASK] is All You Need*, 2024, arXiv:2412.06787.
        Nisonoff, Xiong, Allenspach, Listgarten, *Unlocking Guidance for Discrete State-Space
            Diffusion and Flow Models*, 2024, arXiv:2406.01572 (there of the rates).
    """

    def apply(params, x, t, cond=None, *, key=None):
        if cond is None:
            raise ValueError("discrete_cfg: expected cond, what to guide towards, got None")
        x = need_tokens("discrete_cfg", "x", x)
        n = x.shape[0]
        t = rows(jnp.asarray(t, float_dtype(x)), n)
        cond = jax.tree.map(jnp.asarray, check_cond("discrete_cfg", cond, n))
        nulls = like_rows("discrete_cfg", null, cond)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (x, t, cond), (x, t, nulls))
        log_p = token_log_probs("discrete_cfg", field.apply(params, *both, key=key), both[0])
        given, free = log_p[:n], log_p[n:]
        value = number_at("discrete_cfg", "scale(t)", scale, t, like=t).astype(log_p.dtype)
        possible = (given > -jnp.inf) & (free > -jnp.inf)
        change = jnp.where(possible, given, 0.0) - jnp.where(possible, free, 0.0)
        base = jnp.where(possible, free, given)
        return token_log_probs("discrete_cfg", base + expand_to(value, change) * change, x)

    return Field(field.init, apply)


def predictor_rates(rates: Field, predictor: Field, scale: NumberOrFunction = 1.0) -> Field:
    """Rates guided by a predictor of the condition, exactly: every single jump is evaluated.

    Also known as: discrete guidance, predictor guidance of discrete flows.

        R(x, y) (p(cond | x with the token y) / p(cond | x))^scale      for y other than x

    From masks, with the exact rates and predictor, scale 1 is the flow of the data given cond,
    exactly. From other sources it is not quite: there p(cond | x_t) is that of the path, and not of
    where the jumps lead to. It takes n V evaluations of the predictor for a row of n tokens, V at a
    time; `taylor_rates` takes one and its gradient.

    Args:
        rates: (params, x, t, cond) -> generator rows [b, *event, V], from `paths.jump_rates`.
        predictor: (params, x [b, *event, V] the one-hot vectors of the tokens, floats, t [b], cond)
            -> log p(cond | x_t = x) [b], in nats.
        scale: a number, or t [b] -> [b].

    Returns:
        Field: generator rows [b, *event, V]; params {'rates', 'predictor'}. It raises a ValueError
            where cond is None, and for a predictor of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance, oracles, paths
        >>> from jflow.types import Field
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=[0.0, 0.0, 1.0])
        >>> def log_p(params, x, t, cond=None, *, key=None):  # the first token is 0
        ...     return jnp.log(x[:, 0] @ jnp.array([1.0, 0.0, 0.5]))
        >>> guided = guidance.predictor_rates(
        ...     paths.jump_rates(pairs.field), Field(lambda *_: {}, log_p)
        ... )
        >>> params = {"rates": {}, "predictor": {}}
        >>> r = guided.apply(params, jnp.array([[2, 2]]), jnp.array([0.0]), jnp.array([1]))
        >>> r[0, 0].tolist()  # half of 1 each without it
        [1.0, 0.0, -1.0]

    References:
        Nisonoff, Xiong, Allenspach, Listgarten, *Unlocking Guidance for Discrete State-Space
            Diffusion and Flow Models*, 2024, arXiv:2406.01572.
    """

    def ratios(log_prob, x, r):
        hot = one_hot(x, r).astype(r.dtype)
        n, size = math.prod(x.shape[1:]), r.shape[-1]
        flat = hot.reshape(x.shape[0], n, size)

        def changed(_, place):
            at = (jnp.arange(n) == place)[None, :, None]
            with_y = lambda y: log_prob(jnp.where(at, y[None, None], flat).reshape(hot.shape))  # noqa: E731
            return None, jax.vmap(with_y)(jnp.eye(size, dtype=r.dtype))

        found = jax.lax.scan(changed, None, jnp.arange(n))[1]  # [n, V, b]
        return jnp.moveaxis(found, -1, 0).reshape(r.shape) - expand_to(log_prob(hot), r)

    return _guided("predictor_rates", rates, predictor, scale, ratios)


def taylor_rates(rates: Field, predictor: Field, scale: NumberOrFunction = 1.0) -> Field:
    """Rates guided by a predictor of the condition, to first order: by one gradient.

    Also known as: Taylor-approximated guidance, TAG.

        log p(cond | x with the token y) - log p(cond | x) = g_y - g_x,      g the gradient by x

    x being one-hot vectors, that is exact where log p(cond | x) is linear in each token's.

    Args:
        rates: (params, x, t, cond) -> generator rows [b, *event, V], from `paths.jump_rates`.
        predictor: (params, x [b, *event, V] the one-hot vectors of the tokens, floats, t [b], cond)
            -> log p(cond | x_t = x) [b], in nats.
        scale: a number, or t [b] -> [b].

    Returns:
        Field: generator rows [b, *event, V]; params {'rates', 'predictor'}. It raises a ValueError
            where cond is None, and for a predictor of another shape.

    Examples:
        >>> from jflow import guidance, oracles, paths
        >>> from jflow.types import Field
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=[0.0, 0.0, 1.0])
        >>> def log_p(params, x, t, cond=None, *, key=None):
        ...     return x[:, 0, 0] * cond
        >>> guided = guidance.taylor_rates(
        ...     paths.jump_rates(pairs.field), Field(lambda *_: {}, log_p), 2.0
        ... )

    References:
        Nisonoff, Xiong, Allenspach, Listgarten, *Unlocking Guidance for Discrete State-Space
            Diffusion and Flow Models*, 2024, arXiv:2406.01572.
    """

    def ratios(log_prob, x, r):
        g = jax.grad(lambda hot: jnp.sum(log_prob(hot)))(one_hot(x, r).astype(r.dtype))
        return g - at_tokens(g, x)[..., None]

    return _guided("taylor_rates", rates, predictor, scale, ratios)


def reweighted_jump(
    field: Field,
    log_reward: Callable[[Array, Cond], Array],
    schedule: Schedule = LINEAR,
    *,
    draws: int = 16,
) -> Step:
    """The jumps of TFG-Flow: guidance by a reward of clean data, without training.

        x1^k from prod of p(x1 | x_t),  k = 1 ... draws,      w_k = reward(x1^k) / sum of rewards
        p(x_next = y) = (1 - q) 1{y = x} + q sum over k of w_k 1{x1^k = y}

    with q = (kappa' - kappa) / (1 - kappa) as in `solvers.jump`. The average is an estimate of the
    law of x1 given x_t and the reward by importance sampling of whole rows, so that the number of
    draws does not grow with that of the symbols; with many draws the jumps are those of the data
    tilted by the reward, as far as the tokens of x1 are independent given x_t.

    Args:
        field: a network of logits [b, *event, V], the law of x1; `paths.unmasking(net, mask)` for a
            path from masks.
        log_reward: (x1 [rows, *event], cond) -> [rows], such as the log-probability of a label by a
            classifier of clean data; it may be -inf.
        schedule: its alpha is kappa.
        draws: K, the number of rows x1 for each row.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), mean and std [b,
            *event, V], for `solvers.sample_sde`. cond goes to the field and, a row for each x1, to
            the reward. The mean is that of the draws made: it needs a key.

    Raises:
        ValueError: draws is no whole number of at least 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import guidance, oracles, solvers
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=[0.0, 0.0, 1.0])
        >>> step = guidance.reweighted_jump(
        ...     pairs.field, lambda x1, cond: jnp.where(x1[:, 0] == cond, 0.0, -jnp.inf), draws=32
        ... )
        >>> x0, cond, key = jnp.full((2, 2), 2), jnp.array([1, 0]), jax.random.key(0)
        >>> x, _ = solvers.sample_sde(step, {}, x0, key, solvers.grids.uniform(8), cond)
        >>> x[:, 0].tolist()
        [1, 0]

    References:
        Lin, Li, Ye, Yang, Ermon, Liang, Ma, *TFG-Flow: Training-free Guidance in Multimodal
            Generative Flow*, 2025, arXiv:2501.14216 (its discrete part; the equations are
            derived).
    """
    check_whole("reweighted_jump", draws=draws)
    draws = int(draws)

    def step(params, x, t, t_next, key, cond=None):
        draw_key, jump_key = jax.random.split(need_key("reweighted_jump", key))
        x = need_tokens("reweighted_jump", "x", x)
        n = x.shape[0]
        t, t_next = (rows(jnp.asarray(s, float_dtype(x)), n) for s in (t, t_next))
        log_p = token_log_probs("reweighted_jump", field.apply(params, x, t, cond), x)
        x1 = jax.random.categorical(draw_key, log_p, shape=(draws, *x.shape)).astype(x.dtype)
        told = jax.tree.map(lambda c: jnp.concatenate([jnp.asarray(c)] * draws), cond)
        value = log_reward(x1.reshape(draws * n, *x.shape[1:]), told)
        check_rows("reweighted_jump", "log_reward", value, draws * n)
        value = value.reshape(draws, n).astype(log_p.dtype)
        some = jnp.any(value > -jnp.inf, axis=0, keepdims=True)  # else no draw is better
        w = jax.nn.softmax(jnp.where(some, value, 0), axis=0)
        marks = one_hot(x1, log_p).astype(log_p.dtype)
        tilted = jnp.sum(w.reshape(draws, n, *(1,) * x.ndim) * marks, axis=0)
        share, later = (kappa(schedule, s, x)[0].astype(log_p.dtype) for s in (t, t_next))
        left = 1 - share
        q = jnp.where(left > 0, (later - share) / jnp.where(left > 0, left, 1), 1)[..., None]
        p = (1 - q) * one_hot(x, log_p) + q * tilted
        x_next = jax.random.categorical(jump_key, jnp.log(p)).astype(x.dtype)
        return x_next, p, jnp.sqrt(jnp.maximum(p * (1 - p), 0))

    return step


def _guided(name, rates, predictor, scale, ratios):
    """Rates times exp(scale ratio), of ratios(log_prob of one-hot x, x, rates)."""

    def init(key, x, t, cond=None):
        rates_key, predictor_key = jax.random.split(key)
        made = rates.init(rates_key, x, t, cond)
        r = jax.eval_shape(rates.apply, made, x, t, cond)
        hot = one_hot(jnp.asarray(x), r).astype(r.dtype)
        return {"rates": made, "predictor": predictor.init(predictor_key, hot, t, cond)}

    def apply(params, x, t, cond=None, *, key=None):
        if cond is None:
            raise ValueError(f"{name}: expected cond, what to guide towards, got None")
        x = need_tokens(name, "x", x)
        rates_key, predictor_key = split_key(key, 2)
        r = rates.apply(params["rates"], x, t, cond, key=rates_key)
        t, cond = rows(jnp.asarray(t, r.dtype), x.shape[0]), check_cond(name, cond, x.shape[0])

        def log_prob(hot):
            value = predictor.apply(params["predictor"], hot, t, cond, key=predictor_key)
            return check_rows(name, "log p(cond | x)", value, x.shape[0]).astype(r.dtype)

        value = expand_to(number_at(name, "scale(t)", scale, t, like=t).astype(r.dtype), r)
        here = one_hot(x, r)
        moved = jnp.where(here | (r == 0), 0, r * jnp.exp(value * ratios(log_prob, x, r)))
        return jnp.where(here, -jnp.sum(moved, axis=-1, keepdims=True), moved)

    return Field(init, apply)
