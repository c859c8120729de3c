"""Independent tokens with given probabilities: the sources of discrete flows."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jflow._core.arrays import sum_event
from jflow._core.checks import check_event
from jflow._core.tokens import at_tokens, check_probabilities, need_tokens
from jflow.types import Distribution

__all__ = ["tokens"]


def tokens(event_shape: tuple[int, ...], probabilities: ArrayLike) -> Distribution:
    """Independent tokens of a vocabulary with given probabilities, without parameters.

        log p(x) = sum_i log probabilities[i, x_i],    and -inf outside the vocabulary

    As the source of a discrete flow: all masks with `jnp.eye(V)[mask]`, uniform ones with
    `jnp.ones(V) / V`, or the shares of the symbols in the data.

    Args:
        event_shape: the shape of one x, such as (128,) for a text or (8, 8) for an image.
        probabilities: [V] for every token, or [*event, V].

    Returns:
        Distribution: the law of x [b, *event], integers; params {}.

    Raises:
        ValueError: probabilities are not nonnegative with the sum 1, or of another shape; or, at
            the call, x is not integers [b, *event].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> source = distributions.tokens((3,), [0.0, 0.0, 1.0])  # all masks
        >>> source.sample({}, jax.random.key(0), 1).tolist()
        [[2, 2, 2]]
        >>> coins = distributions.tokens((2,), [0.5, 0.5])
        >>> round(float(coins.log_prob({}, jnp.array([[0, 1]]))[0]), 3)  # -2 log 2
        -1.386
    """
    event_shape, p = tuple(event_shape), check_probabilities("tokens", probabilities)
    if p.shape[:-1] not in ((), event_shape):
        raise ValueError(
            f"tokens: expected probabilities [V] or {[*event_shape, 'V']}, got {list(p.shape)}"
        )
    p = np.broadcast_to(p, (*event_shape, p.shape[-1]))
    with np.errstate(divide="ignore"):
        log_p = np.log(p)

    def checked(x):
        check_event("tokens", x, event_shape)
        return need_tokens("tokens", "x", x)

    def init(key, x, cond=None):
        checked(x)
        return {}

    def log_prob(params, x, cond=None, *, key=None):
        x = checked(x)
        found = at_tokens(jnp.broadcast_to(jnp.asarray(log_p, float), (*x.shape, p.shape[-1])), x)
        return sum_event(jnp.where(jnp.isnan(found), -jnp.inf, found))

    def sample(params, key, n, cond=None):
        return jax.random.categorical(key, jnp.asarray(log_p, float)[None], shape=(n, *event_shape))

    return Distribution(init, log_prob, sample)
