"""Jumps of tokens from a source to data, as `Step`s over a grid, for discrete flow matching.

`sample_sde` scans them over a grid, from tokens x0 [b, *event] of the source:

    step = solvers.jump(paths.unmasking(net, mask))
    x, _ = solvers.sample_sde(step, params, x0, key, solvers.grids.uniform(64))

All tokens of a row jump at once and independently, from what the network says at the begin of the
step: the error falls with the steps. The mean and the standard deviation that a step returns are
those of the one-hot vector of each token, [b, *event, V]: the mean holds the probabilities that the
token was drawn from, p, and the standard deviation is sqrt(p (1 - p)). With key=None x_next is the
most probable token. `step_log_prob` and `trajectory_log_prob` are those of the tokens.

References:
    Campbell, Yim, Barzilay, Rainforth, Jaakkola, *Generative Flows on Discrete State-Spaces:
        Enabling Multimodal Flows with Applications to Protein Co-Design*, 2024, arXiv:2402.04997.
    Gat, Remez, Shaul, Kreuk, Chen, Synnaeve, Adi, Lipman, *Discrete Flow Matching*, 2024,
        arXiv:2407.15595.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_weights, check_whole, need_key, rows
from jflow._core.tokens import at_tokens, kappa, need_tokens, one_hot, token_log_probs
from jflow.paths import LINEAR, Schedule
from jflow.types import Array, Field, Step

__all__ = [
    "adaptive_jump",
    "confident_jump",
    "ending",
    "euler_jump",
    "exponential_jump",
    "jump",
]


def jump(field: Field, schedule: Schedule = LINEAR) -> Step:
    """The step to tokens of data: each token is drawn from the network with the share of the path.

    Also known as: ancestral sampling of masked diffusion, discrete flow matching sampler.

        p(x_next = y) = (1 - q) 1{y = x} + q p(x1 = y | x_t),  q = (kappa' - kappa) / (1 - kappa)

    kappa is at t, kappa' at t_next. It is exact for one token, and for many but for what is drawn
    in one step; the last step, where q = 1, draws all from the network. On the linear path it is
    `euler_jump` without a corrector.

    Args:
        field: a network of logits [b, *event, V], the law of x1; `paths.unmasking(net, mask)` for a
            path from masks.
        schedule: its alpha is kappa.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), mean and std [b,
            *event, V], for `sample_sde`. With key=None x_next is the most probable token.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, paths, solvers
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=[0.0, 0.0, 1.0])
        >>> step, x0 = solvers.jump(pairs.field), jnp.full((3, 2), 2)  # from masks
        >>> x, _ = solvers.sample_sde(step, {}, x0, jax.random.key(0), [0.0, 0.01, 1.0])
        >>> (x < 2).all().tolist()
        True

    References:
        Sahoo, Arriola, Schiff, Gokaslan, Marroquin, Chiu, Rush, Kuleshov, *Simple and Effective
            Masked Diffusion Language Models*, 2024, arXiv:2406.07524.
    """

    def law(params, x, t, t_next, cond):
        log_p = token_log_probs("jump", field.apply(params, x, t, cond), x)
        share, later = (kappa(schedule, s, x)[0].astype(log_p.dtype) for s in (t, t_next))
        left = 1 - share
        q = jnp.where(left > 0, (later - share) / jnp.where(left > 0, left, 1), 1)[..., None]
        return (1 - q) * one_hot(x, log_p) + q * jnp.exp(log_p)

    return _step("jump", law)


def euler_jump(rates: Field) -> Step:
    """Euler's step of the jumps: each happens with probability h times its rate.

        p(x_next = y) = 1{y = x} + h R(x, y),      h = t_next - t

    Where h times the sum of the rates is above 1, the token jumps for certain. It is of first
    order. On the linear path without a corrector the last step draws all tokens from the network;
    elsewhere `ending` does that.

    Args:
        rates: (params, x, t, cond) -> generator rows [b, *event, V], from `paths.jump_rates`.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), mean and std [b,
            *event, V], for `sample_sde`. With key=None x_next is the most probable token.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, paths, solvers
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=[0.0, 0.0, 1.0])
        >>> step = solvers.euler_jump(paths.jump_rates(pairs.field))
        >>> x_next, mean, std = step({}, jnp.array([[2, 2]]), 0.5, 0.75, None)
        >>> mean[0, 0].tolist()
        [0.25, 0.25, 0.5]

    References:
        Campbell, Yim, Barzilay, Rainforth, Jaakkola, *Generative Flows on Discrete State-Spaces:
            Enabling Multimodal Flows with Applications to Protein Co-Design*, 2024,
            arXiv:2402.04997.
    """

    def law(params, x, t, t_next, cond):
        return _euler("euler_jump", rates.apply(params, x, t, cond), x, t_next - t)

    return _step("euler_jump", law)


def exponential_jump(rates: Field) -> Step:
    """The step of jumps with rates that are held: a token jumps with probability 1 - exp(-h L).

        p(x_next = y) = (1 - exp(-h L)) R(x, y) / L     for y other than x,     L = -R(x, x)

    At most one jump of a token is taken in a step. It never overshoots, is of first order, and does
    not finish at t=1: `ending` draws all tokens there.

    Args:
        rates: (params, x, t, cond) -> generator rows [b, *event, V], from `paths.jump_rates`.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), mean and std [b,
            *event, V], for `sample_sde`. With key=None x_next is the most probable token.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, paths, solvers
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=[0.0, 0.0, 1.0])
        >>> step = solvers.exponential_jump(paths.jump_rates(pairs.field))
        >>> x_next, mean, std = step({}, jnp.array([[2, 2]]), 0.5, 0.75, None)
        >>> [round(float(p), 3) for p in mean[0, 0]]  # 1 - exp(-1/2) is 0.393
        [0.197, 0.197, 0.607]

    References:
        Gat, Remez, Shaul, Kreuk, Chen, Synnaeve, Adi, Lipman, *Discrete Flow Matching*, 2024,
            arXiv:2407.15595.
    """

    def law(params, x, t, t_next, cond):
        r = _check_rates("exponential_jump", rates.apply(params, x, t, cond), x)
        here = one_hot(x, r)
        total = -at_tokens(r, x)[..., None]
        leave = -jnp.expm1(-expand_to((t_next - t).astype(r.dtype), total) * total)
        to = jnp.where(total > 0, r / jnp.where(total > 0, total, 1), 0)
        return jnp.where(here, 1 - leave, leave * to)

    return _step("exponential_jump", law)


def adaptive_jump(rates: Field, limit: float = 0.1, most: int = 100) -> Step:
    """Euler's jumps in as many smaller steps as the rates ask for.

        h = min(t_next - s, limit / largest sum of rates of a token of the row)

    from s = t until t_next is reached, each row at its own pace; after `most` of them the rest is
    one step. One evaluation of the rates is for all rows, until the last of them is there.

    Args:
        rates: (params, x, t, cond) -> generator rows [b, *event, V], from `paths.jump_rates`; the
            network is given a time for each row.
        limit: the largest probability that a token jumps in one of the smaller steps, in (0, 1].
        most: the most smaller steps in one step, at least 1.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), for `sample_sde`. The
            law of several jumps is not known: mean is the one-hot vector of x_next, [b, *event, V],
            and std is 0. It needs a key.

    Raises:
        ValueError: limit is outside (0, 1], or most is no whole number of at least 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, paths, solvers
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=[0.0, 0.0, 1.0])
        >>> step, x0 = solvers.adaptive_jump(paths.jump_rates(pairs.field)), jnp.full((3, 2), 2)
        >>> x, _ = solvers.sample_sde(step, {}, x0, jax.random.key(0), [0.0, 1.0])
        >>> bool((x < 2).all())
        True

    References:
        Gat, Remez, Shaul, Kreuk, Chen, Synnaeve, Adi, Lipman, *Discrete Flow Matching*, 2024,
            arXiv:2407.15595 (steps that the rates limit; the pace of each row is ours).
    """
    if not 0 < limit <= 1:
        raise ValueError(f"adaptive_jump: expected limit in (0, 1], got {limit}")
    check_whole("adaptive_jump", most=most)
    limit, most = float(limit), operator.index(most)

    def step(params, x, t, t_next, key, cond=None):
        need_key("adaptive_jump", key)
        x = need_tokens("adaptive_jump", "x", x)
        start, end = (_times(s, x) for s in (t, t_next))

        def going(carry):
            return jnp.any(carry[1] < end)

        def advance(carry):
            x, s, key, taken = carry
            key, draw_key = jax.random.split(key)
            r = rates.apply(params, x, jnp.where(s < end, s, start), cond)
            r = _check_rates("adaptive_jump", r, x)
            largest = jnp.max(-at_tokens(r, x), axis=tuple(range(1, x.ndim)))
            h = (limit / jnp.where(largest > 0, largest, limit)).astype(s.dtype)
            finish = (h >= end - s) | (taken + 1 >= most)
            p = _euler("adaptive_jump", r, x, jnp.where(finish, end - s, h))
            return _draw(draw_key, p, x), jnp.where(finish, end, s + h), key, taken + 1

        carry = x, start, key, jnp.zeros_like(x, shape=(), dtype=jnp.int32)
        x_next = jax.lax.while_loop(going, advance, carry)[0]
        return _known(x_next, jax.eval_shape(rates.apply, params, x, start, cond))

    return step


def confident_jump(
    field: Field, mask: int, schedule: Schedule = LINEAR, *, noise: float = 4.5
) -> Step:
    """The step of MaskGIT: masks are filled where the network is most certain.

    Also known as: MaskGIT, confidence-based unmasking.

    Of N tokens the step leaves ceil(kappa(t_next) N) known: of the masks, each filled by a draw
    from the network, those with the largest

        log p(x1 | x_t) + noise (1 - kappa(t_next)) g,      g from the standard Gumbel law

    stay. It is greedy: the law of its samples is sharper than the data's, and with noise 0 texts
    repeat themselves. The number of known tokens, unlike that of `jump`, is not random.

    Args:
        field: a network of logits [b, *event, V], from `paths.unmasking`.
        mask: the symbol that masks.
        schedule: its alpha is kappa; that of the first paper is 1 - cos(pi t / 2).
        noise: how random the order is, at least 0.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), for `sample_sde`.
            Tokens are not independent: mean is the one-hot vector of x_next, [b, *event, V], and
            std is 0. It needs a key.

    Raises:
        ValueError: noise is negative, or mask is not a whole number of at least 0.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, solvers
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=[0.0, 0.0, 1.0])
        >>> step, x0 = solvers.confident_jump(pairs.field, mask=2), jnp.full((3, 2), 2)
        >>> x, _ = solvers.sample_sde(step, {}, x0, jax.random.key(0), [0.0, 0.5])
        >>> (x < 2).sum(1).tolist()  # one of two
        [1, 1, 1]

    References:
        Chang, Zhang, Jiang, Liu, Freeman, *MaskGIT: Masked Generative Image Transformer*, 2022,
            arXiv:2202.04200.
        Hu, Ommer, *[MASK] is All You Need*, 2024, arXiv:2412.06787.
    """
    check_weights("confident_jump", noise=noise)
    check_whole("confident_jump", 0, mask=mask)
    noise = float(noise)

    def step(params, x, t, t_next, key, cond=None):
        draw_key, order_key = jax.random.split(need_key("confident_jump", key))
        x = need_tokens("confident_jump", "x", x)
        t, t_next = (_times(s, x) for s in (t, t_next))
        log_p = token_log_probs("confident_jump", field.apply(params, x, t, cond), x)
        filled = jax.random.categorical(draw_key, log_p).astype(x.dtype)
        later = kappa(schedule, t_next, x)[0].astype(log_p.dtype)
        g = jax.random.gumbel(order_key, x.shape, log_p.dtype)
        certain = at_tokens(log_p, filled) + noise * (1 - later) * g
        certain = jnp.where(x == mask, certain, jnp.inf).reshape(x.shape[0], -1)
        place = jnp.argsort(jnp.argsort(-certain, axis=1), axis=1)
        n = math.prod(x.shape[1:])
        count = jnp.ceil(later.reshape(x.shape[0], -1)[:, :1] * n - 1e-4)
        known = (place < count).reshape(x.shape)
        return _known(jnp.where((x == mask) & known, filled, x), log_p)

    return step


def ending(step: Step, last: Step) -> Step:
    """A step that leaves what ends at t=1 to another one.

    The last step of a corrector would put noise into the samples, and that of `exponential_jump`
    leaves some tokens of the source: `ending(step, jump(field))` draws all tokens from the network
    there.

    Args:
        step: the step elsewhere.
        last: the step to t_next = 1, of the same params.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), as the steps return
            them, for `sample_sde`. Only one of the two is run.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, paths, solvers
        >>> pairs = oracles.tokens([[0, 0], [1, 1]], [0.5, 0.5], source=[0.0, 0.0, 1.0])
        >>> noisy = paths.jump_rates(pairs.field, corrector=paths.remasking(9.0, mask=2))
        >>> step = solvers.ending(solvers.euler_jump(noisy), solvers.jump(pairs.field))
        >>> x_next, mean, std = step({}, jnp.array([[0, 0]]), 0.9, 1.0, None)
        >>> mean[0, 0].tolist()  # no mask
        [1.0, 0.0, 0.0]
    """

    def choose(params, x, t, t_next, key, cond=None):
        at_end = jnp.all(jnp.asarray(t_next) >= 1)
        run = lambda one: lambda: one(params, x, t, t_next, key, cond)  # noqa: E731
        return jax.lax.cond(at_end, run(last), run(step))

    return choose


def _times(t, x: Array) -> Array:
    """t [b] of a time for all, or for each row."""
    return rows(jnp.asarray(t, float_dtype(x)), x.shape[0])


def _check_rates(name: str, r: Array, x: Array) -> Array:
    if r.shape[:-1] != x.shape:
        raise ValueError(
            f"{name}: expected rates of shape {[*x.shape, 'V']}, rows of a generator, got"
            f" {list(r.shape)}: paths.jump_rates makes them of logits"
        )
    return r


def _euler(name: str, r: Array, x: Array, h: Array) -> Array:
    """1 + h R, where a token jumps at most for certain."""
    r = _check_rates(name, r, x)
    moved = expand_to(jnp.asarray(h, r.dtype), r) * jnp.where(one_hot(x, r), 0, r)
    total = jnp.sum(moved, axis=-1, keepdims=True)
    moved = moved / jnp.maximum(total, 1)
    return jnp.where(one_hot(x, r), 1 - jnp.minimum(total, 1), moved)


def _draw(key, p: Array, x: Array) -> Array:
    return jax.random.categorical(key, jnp.log(p)).astype(x.dtype)


def _known(x_next: Array, like: Any) -> tuple[Array, Array, Array]:
    """x_next with the mean and std of what is known."""
    mean = one_hot(x_next, like).astype(like.dtype)
    return x_next, mean, jnp.zeros_like(mean)


def _step(name: str, law) -> Step:
    """A `Step` from (params, x, t, t_next, cond) -> p [b, *event, V]."""

    def step(params, x, t, t_next, key, cond=None):
        x = need_tokens(name, "x", x)
        p = law(params, x, *(_times(s, x) for s in (t, t_next)), cond)
        x_next = jnp.argmax(p, axis=-1).astype(x.dtype) if key is None else _draw(key, p, x)
        return x_next, p, jnp.sqrt(jnp.maximum(p * (1 - p), 0))

    return step
