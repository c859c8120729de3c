"""Losses of discrete flow matching: what the data's tokens are, given tokens of data and source."""

import math

import jax
import jax.numpy as jnp

from jflow import paths, times
from jflow._core.arrays import float_dtype
from jflow._core.batch import mean_of_tokens, read_tokens
from jflow._core.checks import check_noun, need_key, need_pairs
from jflow._core.tokens import at_tokens, kappa, kl_terms, token_log_probs
from jflow.types import Field, Loss, Path, Time

__all__ = ["discrete_kl", "discrete_matching"]

_PATH, _UNIFORM = paths.discrete(), times.uniform()


def discrete_matching(field: Field, *, path: Path = _PATH, time: Time = _UNIFORM) -> Loss:
    """Cross-entropy of the data's tokens given a point of the path, for discrete flow matching.

    Also known as: discrete flow matching, masked language modeling, masked generative model.

        loss = -mean over tokens of log p(x1 | x_t)        in nats per token

    Its minimum is the law of each token of x1 given x_t, of which `paths.jump_rates` and
    `solvers.jump` make a flow. Under `paths.unmasking` known tokens have no error. The weight of
    time is that of `time`; `discrete_kl` has the one of the likelihood.

    Args:
        field: A network of logits [b, *event, V].
        path: The path, such as `paths.discrete(schedule)`.
        time: The law of the times, (key, n) -> t [n], or [n, tokens] (`times.tokens`) for a network
            that reads the time of each token.

    Returns:
        A loss of the batch {'x' [b, *event] tokens, 'x0' [b, *event] those of the source,
        optionally 'cond', 'weight' [b], or like x, of each token}. The mean is weighted, sum(w l) /
        sum(w): a token of weight 0, such as padding, counts nothing, though the network sees it.
        `couplings.from_distribution(source)` in `couplings.with_source` writes 'x0'. It has no
        metrics. A token of x outside the vocabulary makes it NaN, and a mask in x, under
        `paths.unmasking`, infinite: `data.check_tokens` names them.

    Raises:
        TypeError: At construction for what is no `Field`.
        ValueError: At trace time for logits of another shape, tokens that are not integers, a batch
            without 'x' or 'x0', with unknown keys or rows that don't match, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Field
        >>> even = Field(lambda *_: {}, lambda params, x, *_, key=None: jnp.zeros((*x.shape, 4)))
        >>> batch = {"x": jnp.array([[0, 3]]), "x0": jnp.array([[1, 2]])}
        >>> value, _ = losses.discrete_matching(even)({}, jax.random.key(0), batch)
        >>> round(float(value), 3)  # log 4
        1.386

    References:
        Gat, Remez, Shaul, Kreuk, Chen, Synnaeve, Adi, Lipman, *Discrete Flow Matching*, 2024,
            arXiv:2407.15595.
        Hu, Ommer, *[MASK] is All You Need*, 2024, arXiv:2412.06787.
    """
    check_noun("discrete_matching", field, Field)

    def loss(params, key, batch, frozen=None):
        log_p, _, x1, _, weight = _at_a_point("discrete_matching", field, path, time)(
            params, key, batch
        )
        return mean_of_tokens(-at_tokens(log_p, x1), weight), {}

    return loss


def discrete_kl(
    field: Field, *, schedule: paths.Schedule = paths.LINEAR, time: Time = _UNIFORM
) -> Loss:
    """Generalized Kullback-Leibler divergence of discrete flow matching: a bound of the likelihood.

    Also known as: discrete flow matching ELBO, masked diffusion ELBO.

        loss = mean over tokens of kappa' / (1 - kappa) [1{x_t != x1} (-log p(x1 | x_t)) + 1{x_t =
            x1} - p(x1 = x_t | x_t)]        in nats per token

    At uniform times its expectation is at least -log p_1(x1) / n, the nats per token of the flow's
    own samples; from masks, with the exact law, it is the entropy of the data for every schedule.
    There it is the cross-entropy of the masked tokens with weight kappa' / (1 - kappa), which by t
    = 1 - (1 - u)^2 has less variance (`solvers.discrete_bound`).

    Args:
        field: A network of logits [b, *event, V], `paths.unmasking(net, mask)` for a path from
            masks.
        schedule: Its alpha is kappa.
        time: The law of the times; the bound is that of uniform ones.

    Returns:
        A loss of the batch {'x' [b, *event] tokens, 'x0' [b, *event] those of the source,
        optionally 'cond', 'weight' [b], or like x, of each token}, weighted as in
        `discrete_matching`. Its metrics have 'bits_per_token', the loss in bits. A token of x
        outside the vocabulary makes it NaN, and a mask in x infinite.

    Raises:
        TypeError: At construction for what is no `Field`.
        ValueError: At construction for a kappa that does not run from 0 to 1; at trace time for
            logits of another shape, tokens that are not integers, a batch without 'x' or 'x0', with
            unknown keys or rows that don't match, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, paths, times
        >>> from jflow.types import Field
        >>> even = Field(lambda *_: {}, lambda params, x, *_, key=None: jnp.zeros((*x.shape, 3)))
        >>> loss = losses.discrete_kl(paths.unmasking(even, mask=2), time=times.fixed([0.0]))
        >>> batch = {"x": jnp.array([[0, 1]]), "x0": jnp.array([[2, 2]])}
        >>> value, metrics = loss({}, jax.random.key(0), batch)  # all masked at t = 0
        >>> round(float(value), 3), round(float(metrics["bits_per_token"]), 3)
        (0.693, 1.0)

    References:
        Shaul, Gat, Havasi, Severo, Sriram, Holderrieth, Karrer, Lipman, Chen, *Flow Matching with
            General Discrete Paths: A Kinetic-Optimal Perspective*, 2024, arXiv:2412.03487.
        Hu, Ommer, *[MASK] is All You Need*, 2024, arXiv:2412.06787.
    """
    check_noun("discrete_kl", field, Field)
    path = paths.discrete(schedule)

    def loss(params, key, batch, frozen=None):
        log_p, x_t, x1, t, weight = _at_a_point("discrete_kl", field, path, time)(
            params, key, batch
        )
        terms = kl_terms(log_p, x_t, x1, *kappa(schedule, t, x1))
        value = mean_of_tokens(terms, weight)
        return value, {"bits_per_token": value / math.log(2)}

    return loss


def _at_a_point(name, field, path, time):
    """(params, key, batch) -> (log p(x1 | x_t), x_t, x1, t, weight)."""

    def at(params, key, batch):
        need_key(name, key)
        need_pairs(name, batch)
        keys = ("x", "x0", "cond", "weight")
        x1, x0, cond, weight = read_tokens(name, batch, keys, jnp.integer)
        time_key, path_key, dropout_key = jax.random.split(key, 3)
        t = time(time_key, x1.shape[0])
        t = t.astype(float_dtype(x1))
        if t.shape != x1.shape[: t.ndim]:
            raise ValueError(
                f"{name}: expected times of shape {[x1.shape[0]]}, or along the leading axes of x,"
                f" {list(x1.shape)}, got {list(t.shape)}"
            )
        x_t = path.point(x0, x1, t, key=path_key)
        logits = field.apply(params, x_t, t, cond, key=dropout_key)
        return token_log_probs(name, logits, x_t), x_t, x1, t, weight

    return at
