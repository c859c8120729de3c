"""Which experts of a mixture a token goes to.

A router is a function from probabilities [b, n, experts], each positive and of sum 1, to (weights,
slots): the weights [b, n, experts] of the experts of each token, 0 for those that it does not go
to, and the largest number of tokens of one row that an expert then has. A router sees the tokens of
a row, never those of another: the velocity of a row does not depend on its neighbors in the batch.
Tokens that are padding count as tokens: where an expert has limited room, they take some of it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.checks import check_whole
from jflow.types import Array

__all__ = ["Router", "limited", "rectified", "top_k"]

Router = Callable[[Float[Array, "b n experts"]], tuple[Float[Array, "b n experts"], int]]


def top_k(k: int = 2) -> Router:
    """Each token goes to its k most probable experts, and none is dropped.

    Also known as: dropless routing, token-choice routing.

    The weights are the probabilities of the chosen, divided by their sum where k > 1. One alone
    keeps its probability, through which the router learns.

    Args:
        k: the number of experts of a token.

    Returns:
        A router, whose slots are all n tokens of a row.

    Raises:
        ValueError: k is below 1; or at the call above the number of experts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> probabilities = jnp.array([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]])
        >>> weights, slots = nets.routers.top_k(1)(probabilities)
        >>> weights.tolist(), slots
        ([[[0.5, 0.0, 0.0], [0.0, 0.0, 0.699999988079071]]], 2)

    References:
        Shazeer, Mirhoseini, Maziarz, Davis, Le, Hinton, Dean, *Outrageously Large Neural Networks:
            The Sparsely-Gated Mixture-of-Experts Layer*, 2017, arXiv:1701.06538.
    """
    check_whole("routers.top_k", k=k)

    def route(probabilities):
        chosen = sum(_choices("routers.top_k", probabilities, k))
        return _weighted(probabilities, chosen, k), probabilities.shape[1]

    return route


def limited(k: int = 2, *, capacity: float = 1.25) -> Router:
    """As `top_k`, but an expert has room for a limited number of tokens of a row.

    Also known as: expert capacity, capacity factor.

        slots = min(n, ceil(capacity k n / experts))

    All first choices come before all second ones, and tokens in their order. A choice that finds
    its expert full is dropped; a token without any expert gets zeros. The cost of the experts is
    `capacity` times that of k networks on all tokens, where that of `top_k` is that of all experts
    on all tokens.

    Args:
        k: the number of experts of a token.
        capacity: the room of an expert, in units of the mean number of tokens an expert has.

    Returns:
        A router.

    Raises:
        ValueError: k is below 1, or capacity is not positive and finite; or at the call, k is above
            the number of experts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> probabilities = jnp.array([[[0.75, 0.25], [0.75, 0.25]]])
        >>> weights, slots = nets.routers.limited(1, capacity=1.0)(probabilities)
        >>> weights.tolist(), slots  # the second token finds its expert full
        ([[[0.75, 0.0], [0.0, 0.0]]], 1)

    References:
        Hwang, Cui, Xiong, et al., *Tutel: Adaptive Mixture-of-Experts at Scale*, 2022,
            arXiv:2206.03382, whose capacity follows the load from step to step. A compiled program
            has one size, so that a limit is fixed here, or absent (`top_k`); and it holds for each
            row, which is ours.
    """
    check_whole("routers.limited", k=k)
    _check_capacity("routers.limited", capacity, "positive and finite", 0 < capacity < math.inf)

    def route(probabilities):
        slots = _slots(probabilities, k, capacity)
        taken = jnp.zeros_like(probabilities)
        for choice in _choices("routers.limited", probabilities, k):
            taken = taken + _admitted(choice, taken, slots)
        return _weighted(probabilities, taken, k), slots

    return route


def rectified(k: int = 2, *, capacity: float = 1.0) -> Router:
    """As `limited`, but no token is dropped and no slot of an expert stays empty.

    Also known as: Rectify-Router.

    A choice that finds its expert full goes to the most probable expert that has room and is not
    yet one of its token; slots that are then left take the most probable tokens that did not choose
    their expert. Every expert has exactly `slots` tokens of a row, and every token an expert.

    Args:
        k: the number of experts of a token.
        capacity: the room of an expert, at least 1, in units of the mean number of tokens it has.

    Returns:
        A router.

    Raises:
        ValueError: k is below 1, or capacity is below 1 or not finite; or at the call, k is above
            the number of experts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> probabilities = jnp.array([[[0.75, 0.25], [0.75, 0.25]]])
        >>> nets.routers.rectified(1)(probabilities)[0].tolist()  # the second goes elsewhere
        [[[0.75, 0.0], [0.0, 0.25]]]

    References:
        Zeng, Guo, Fei, Yin, Zhou, Li, Sun, Yan, Lin, Qiu, *Turn Waste into Worth: Rectifying Top-k
            Router of MoE*, 2024, arXiv:2402.12399. There a dropped token goes to the best expert of
            its own device, whatever room that has, which depends on where a row lies; the best one
            with room is ours.
    """
    check_whole("routers.rectified", k=k)
    _check_capacity("routers.rectified", capacity, "finite and >= 1", 1 <= capacity < math.inf)

    def route(probabilities):
        slots, experts = _slots(probabilities, k, capacity), probabilities.shape[2]

        def propose(carry, _):  # an expert that refuses is full: so many rounds are enough
            taken, left = carry
            open_ = (jnp.sum(taken, axis=1, keepdims=True) < slots) & (taken == 0)
            best = jnp.argmax(jnp.where(open_, probabilities, -1), axis=-1)
            choice = jax.nn.one_hot(best, experts, dtype=taken.dtype) * (open_ & left)
            admitted = _admitted(choice, taken, slots)
            return (taken + admitted, left & ~jnp.any(admitted > 0, -1, keepdims=True)), None

        taken, refused = jnp.zeros_like(probabilities), []
        for choice in _choices("routers.rectified", probabilities, k):
            admitted = _admitted(choice, taken, slots)
            taken = taken + admitted
            refused.append(~jnp.any(admitted > 0, axis=-1, keepdims=True))
        for left in refused:
            (taken, _), _ = jax.lax.scan(propose, (taken, left), length=experts)
        # Those that an expert has come before all others, which come by their probability.
        filled = jax.lax.top_k((probabilities + 2 * taken).swapaxes(1, 2), slots)[1]
        filled = jnp.sum(jax.nn.one_hot(filled, taken.shape[1], dtype=taken.dtype), axis=2)
        return _weighted(probabilities, filled.swapaxes(1, 2), k), slots

    return route


def _choices(name: str, probabilities: Array, k: int) -> list[Array]:
    """The first, second ... choice of each token, as k arrays of zeros and ones."""
    experts = probabilities.shape[-1]
    if k > experts:
        raise ValueError(f"{name}: expected k of at most {experts} experts, got {k}")
    best = jax.lax.top_k(probabilities, k)[1]
    return [jax.nn.one_hot(best[..., i], experts, dtype=probabilities.dtype) for i in range(k)]


def _admitted(choice: Array, taken: Array, slots: int) -> Array:
    """Those choices, in the order of the tokens, that find room beside what is taken."""
    before = jnp.sum(taken, axis=1, keepdims=True) + jnp.cumsum(choice, axis=1) - choice
    return choice * (before < slots)


def _weighted(probabilities: Array, chosen: Array, k: int) -> Array:
    """The probabilities of the chosen experts, of sum 1 for each token where k > 1."""
    weights = probabilities * chosen
    if k == 1:
        return weights
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def _slots(probabilities: Array, k: int, capacity: float) -> int:
    n, experts = probabilities.shape[1:]
    return min(n, math.ceil(capacity * k * n / experts))


def _check_capacity(name: str, capacity: float, allowed: str, right: bool) -> None:
    if not right:
        raise ValueError(f"{name}: expected a capacity that is {allowed}, got {capacity}")
