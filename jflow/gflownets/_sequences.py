"""Sequences of tokens, built from the left, from both ends, or in any order."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jflow._core.checks import check_whole
from jflow.gflownets._types import Environment
from jflow.types import Array

__all__ = [
    "any_order_sequences",
    "bit_modes",
    "bit_sequences",
    "reward_table",
    "sequences",
    "two_ended_sequences",
]

TokenReward = Callable[[Int[Array, "n length"]], Float[Array, " n"]]


def sequences(log_reward: TokenReward, length: int, num_tokens: int) -> Environment:
    """Sequences that are built from left to right.

    A state is the tokens [n, length], -1 where there is none yet; action v appends the token v.
    There is one way to build a sequence, so that the backward policy has nothing to choose.

    Args:
        log_reward: tokens [n, length] -> [n], nats, such as `reward_table(table)`.
        length: tokens of a finished sequence.
        num_tokens: how many different tokens there are.

    Returns:
        Environment: with num_tokens^length objects, and observations [n, length, num_tokens + 1],
            one-hot, the last for none.

    Raises:
        ValueError: a number is too small.
    """
    _check("sequences", length, num_tokens)
    return Environment(
        num_actions=num_tokens,
        num_backward_actions=1,
        step=lambda tokens, action: _append(tokens, action),
        back=lambda tokens, action: _without_last(tokens),
        forward_mask=lambda tokens: jnp.repeat(_open(tokens)[:, None], num_tokens, axis=1),
        backward_mask=lambda tokens: _count(tokens)[:, None] > 0,
        forward_action=lambda tokens, action: _last(tokens),
        backward_action=lambda tokens, action: jnp.zeros_like(action),
        **_common(log_reward, length, num_tokens),
    )


def two_ended_sequences(log_reward: TokenReward, length: int, num_tokens: int) -> Environment:
    """Sequences that grow at both ends, as those of TFBind8 and QM9 in the literature.

    A state is the tokens [n, length], those that there are on the left, then -1. Action v prepends
    the token v, action num_tokens + v appends it; backward action 0 takes the first token away,
    1 the last. Where both lead to the same sequence they are two edges all the same.

    Args:
        log_reward: tokens [n, length] -> [n], nats, such as `reward_table(table)`.
        length: tokens of a finished sequence.
        num_tokens: how many different tokens there are.

    Returns:
        Environment: with the objects and observations of `sequences`.

    Raises:
        ValueError: a number is too small.

    References:
        Shen, Bengio, Hajiramezanali, Loukas, Cho, Biancalani, *Towards Understanding and Improving
            GFlowNet Training*, 2023, arXiv:2305.07170.
    """
    _check("two_ended_sequences", length, num_tokens)

    def step(tokens, action):
        token = action % num_tokens
        prepended = jnp.roll(tokens, 1, axis=1).at[:, 0].set(token.astype(tokens.dtype))
        return jnp.where((action < num_tokens)[:, None], prepended, _append(tokens, token))

    def back(tokens, action):
        without_first = jnp.roll(tokens.at[:, 0].set(-1), -1, axis=1)
        return jnp.where((action == 0)[:, None], without_first, _without_last(tokens))

    return Environment(
        num_actions=2 * num_tokens,
        num_backward_actions=2,
        step=step,
        back=back,
        forward_mask=lambda tokens: jnp.repeat(_open(tokens)[:, None], 2 * num_tokens, axis=1),
        backward_mask=lambda tokens: jnp.repeat(_count(tokens)[:, None] > 0, 2, axis=1),
        forward_action=lambda tokens, action: jnp.where(
            action == 0, tokens[:, 0], num_tokens + _last(tokens)
        ),
        backward_action=lambda tokens, action: (action >= num_tokens).astype(action.dtype),
        **_common(log_reward, length, num_tokens),
    )


def any_order_sequences(log_reward: TokenReward, length: int, num_tokens: int) -> Environment:
    """Sequences whose places are filled in any order.

    A state is the tokens [n, length], -1 where there is none yet; action i num_tokens + v writes
    the token v at the empty place i, backward action i empties it.

    Args:
        log_reward: tokens [n, length] -> [n], nats.
        length: tokens of a finished sequence.
        num_tokens: how many different tokens there are.

    Returns:
        Environment: with the objects and observations of `sequences`.

    Raises:
        ValueError: a number is too small.

    References:
        Tiapkin, Morozov, Naumov, Vetrov, *Generative Flow Networks as Entropy-Regularized RL*,
            2023, arXiv:2310.12934.
    """
    _check("any_order_sequences", length, num_tokens)

    def put(tokens, at, token):
        here = jnp.arange(length)[None] == at[:, None]
        return jnp.where(here, jnp.asarray(token, tokens.dtype), tokens)

    def forward_action(tokens, action):
        token = jnp.take_along_axis(tokens, action[:, None], axis=1)[:, 0]
        return action * num_tokens + token

    return Environment(
        num_actions=length * num_tokens,
        num_backward_actions=length,
        step=lambda tokens, action: put(
            tokens, action // num_tokens, (action % num_tokens)[:, None]
        ),
        back=lambda tokens, action: put(tokens, action, -1),
        forward_mask=lambda tokens: jnp.repeat(tokens < 0, num_tokens, axis=1),
        backward_mask=lambda tokens: tokens >= 0,
        forward_action=forward_action,
        backward_action=lambda tokens, action: action // num_tokens,
        **_common(log_reward, length, num_tokens),
    )


def bit_sequences(modes: ArrayLike, word_size: int = 1, *, sharpness: float = 1.0) -> Environment:
    """Strings of bits, with a reward that falls with the distance to the nearest of some modes.

        log R(x) = -sharpness min_m #{bits in which x and m differ}

    The string is filled word by word in any order (`any_order_sequences` of 2^word_size tokens, the
    first bit of a word the most significant). Bits that are not there yet count as no difference,
    so that the reward of a part is a bound, which `losses.forward_looking` can use. The first paper
    has the edit distance and goes from left to right; the Hamming distance and any order are those
    of the second.

    Args:
        modes: [m, bits] of 0 and 1, such as `bit_modes(60, 120)`.
        word_size: bits of a word; it divides the number of bits.
        sharpness: nats for each bit, above 0.

    Returns:
        Environment: with 2^bits objects.

    Raises:
        ValueError: the modes are not [m, bits] of 0 and 1, or a number is out of range.

    References:
        Malkin, Jain, Bengio, Sun, Bengio, *Trajectory Balance: Improved Credit Assignment in
            GFlowNets*, 2022, arXiv:2201.13259.
        Tiapkin, Morozov, Naumov, Vetrov, *Generative Flow Networks as Entropy-Regularized RL*,
            2023, arXiv:2310.12934.
    """
    values = np.asarray(modes)
    check_whole("bit_sequences", word_size=word_size)
    if values.ndim != 2 or not values.size or not np.isin(values, (0, 1)).all():
        raise ValueError(
            f"bit_sequences: expected modes [m, bits] of 0 and 1, got {list(values.shape)}"
        )
    if values.shape[1] % word_size:
        raise ValueError(
            f"bit_sequences: expected word_size to divide the {values.shape[1]} bits, got"
            f" {word_size}"
        )
    if not 0 < sharpness < np.inf:
        raise ValueError(f"bit_sequences: expected a finite sharpness > 0, got {sharpness}")
    values = values.astype(np.int32)

    def log_reward(words):
        shifts = np.arange(word_size)[None, None, ::-1]
        bits = (words[..., None] >> shifts & 1).reshape(words.shape[0], -1)
        known = jnp.repeat(words >= 0, word_size, axis=1)
        differ = (bits[:, None] != values[None]) & known[:, None]
        return -sharpness * jnp.min(jnp.sum(differ, axis=-1), axis=-1).astype(jnp.float32)

    return any_order_sequences(log_reward, values.shape[1] // word_size, 2**word_size)


def bit_modes(num_modes: int, length: int, *, seed: int = 0) -> np.ndarray:
    """Modes for `bit_sequences`, each put together of the five published blocks of 8 bits.

    Args:
        num_modes: m.
        length: bits, a multiple of 8.
        seed: of numpy.

    Returns:
        [m, length] of 0 and 1.

    Raises:
        ValueError: the length is not a multiple of 8, or there are no modes.

    References:
        Malkin, Jain, Bengio, Sun, Bengio, *Trajectory Balance: Improved Credit Assignment in
            GFlowNets*, 2022, arXiv:2201.13259.
    """
    check_whole("bit_modes", num_modes=num_modes, length=length)
    if length % 8:
        raise ValueError(f"bit_modes: expected length to be a multiple of 8, got {length}")
    blocks = [0b00000000, 0b11111111, 0b11110000, 0b00001111, 0b00111100]
    chosen = np.random.default_rng(seed).choice(blocks, (num_modes, length // 8))
    return np.unpackbits(chosen.astype(np.uint8), axis=1).astype(np.int32)


def reward_table(rewards: ArrayLike | Sequence[Any], *, exponent: float = 1.0) -> TokenReward:
    """The log-reward of sequences whose rewards stand in a table.

        log R(x) = exponent log rewards[x_1, ..., x_L]

    Args:
        rewards: [num_tokens] * length, at least 0 and finite, a reward for every sequence.
        exponent: above 1 it sharpens the distribution.

    Returns:
        tokens [n, length] -> [n], nats; NaN for a sequence that is not finished.

    Raises:
        ValueError: a reward is negative or not finite, all are 0, the axes differ in length, or the
            exponent is not a finite number above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import gflownets
        >>> log_reward = gflownets.reward_table([[1.0, 2.0], [4.0, 8.0]], exponent=2.0)
        >>> jnp.exp(log_reward(jnp.array([[1, 0]]))).round(3).tolist()
        [16.0]
    """
    table = np.asarray(rewards, np.float64)
    if table.ndim < 1 or len(set(table.shape)) != 1:
        raise ValueError(
            f"reward_table: expected rewards of shape [num_tokens] * length, got"
            f" {list(table.shape)}"
        )
    bad = np.argwhere(~(np.isfinite(table) & (table >= 0)))
    if bad.size:
        raise ValueError(
            f"reward_table: expected finite rewards >= 0, got {table[tuple(bad[0])]} for the"
            f" sequence {bad[0].tolist()}"
        )
    if not table.any():
        raise ValueError("reward_table: expected a reward above 0, got 0 for every sequence")
    if not 0 < exponent < np.inf:
        raise ValueError(f"reward_table: expected a finite exponent > 0, got {exponent}")
    with np.errstate(divide="ignore"):
        logs = (exponent * np.log(table)).astype(np.float32)

    def log_reward(tokens):
        finished = jnp.all(tokens >= 0, axis=1)
        return jnp.where(finished, jnp.asarray(logs)[tuple(jnp.maximum(tokens.T, 0))], jnp.nan)

    return log_reward


def _check(name, length, num_tokens) -> None:
    check_whole(name, length=length, num_tokens=num_tokens)


def _common(log_reward, length, num_tokens):
    """The fields that all sequences share."""

    def observe(tokens):
        with_none = jnp.where(tokens < 0, num_tokens, tokens)
        return jax.nn.one_hot(with_none, num_tokens + 1, dtype=jnp.float32)

    return {
        "horizon": length,
        "reset": lambda n: jnp.full((n, length), -1, jnp.int32),
        "observe": observe,
        "log_reward": log_reward,
    }


def _count(tokens):
    return jnp.sum(tokens >= 0, axis=1)


def _open(tokens):
    """Whether a place is free."""
    return tokens[:, -1] < 0


def _append(tokens, token):
    places = jnp.arange(tokens.shape[1])[None]
    return jnp.where(places == _count(tokens)[:, None], token[:, None].astype(tokens.dtype), tokens)


def _without_last(tokens):
    return jnp.where(jnp.arange(tokens.shape[1])[None] == _count(tokens)[:, None] - 1, -1, tokens)


def _last(tokens):
    at = jnp.maximum(_count(tokens) - 1, 0)
    return jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0]
