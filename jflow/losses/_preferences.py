"""Tuning by preferences and by rewards of given samples: DPO, rewards of noisy data, weights."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow import paths
from jflow import times as time_laws
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows, read_batch, used_rows
from jflow._core.checks import (
    check_noun,
    check_rows,
    check_same_shape,
    count_rows,
    frozen_entry,
    like_state,
    need_x,
)
from jflow._core.keys import same_draws
from jflow._core.times import traced
from jflow.losses._pairs import draw_pairs
from jflow.types import Array, BatchTransform, Field, Loss, Params, Path, PyTree, Time, Velocity

__all__ = ["dpo", "preference_reward", "reward_weights"]

_LINEAR, _UNIFORM = paths.linear(), time_laws.uniform()


def dpo(velocity: Velocity, beta: float, *, path: Path = _LINEAR, time: Time = _UNIFORM) -> Loss:
    """Flow-DPO: a velocity learns from pairs of a better and a worse sample, without a reward.

    Also known as: Flow-DPO, direct preference optimization, Diffusion-DPO for flows.

        -log sigmoid(-beta / 2 [(e(better) - e_ref(better)) - (e(worse) - e_ref(worse))])
        e(x1) = mean over the event of  (v(x_t, t) - target)^2

    x_t and the target are those of one source x0 and one time t for both samples of a pair; e_ref
    is the error of the reference, whose params are frozen['reference']. Where the two velocities
    are the same the loss is log 2, and its gradient beta / 4 that of e(better) - e(worse). The
    papers' error is the sum over the event: their beta is this one divided by its size.

    Args:
        velocity: The velocity that is trained, from the params of the reference.
        beta: The weight of staying near the reference, above 0 and finite.
        path: The path.
        time: The law of the times.

    Returns:
        A loss of the batch {'x' [b, *event] the better samples, 'worse' like it, optionally 'x0'
        (standard normal when absent), 'cond', 'weight' [b]}. Its metrics are {'accuracy', the share
        of pairs whose better sample has gained more on the reference, where a tie counts 1/2, and
        'margin', what stands inside of the sigmoid}.

    Raises:
        TypeError: At construction for what is no velocity.
        ValueError: At construction for beta <= 0 or infinite; at trace time for a frozen without
            'reference', or with one of another form or other shapes than params, a batch without
            'x' or 'worse' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> constant = lambda params, x, t, cond=None, *, key=None: params["v"] + 0 * x
        >>> loss = losses.dpo(Velocity(lambda *args: {}, constant), beta=1.0)
        >>> batch = {"x": jnp.ones((4, 1)), "worse": jnp.zeros((4, 1))}
        >>> params = {"v": jnp.zeros(())}
        >>> value, _ = loss(params, jax.random.key(0), batch, {"reference": params})
        >>> round(float(value), 4)  # log 2
        0.6931

    References:
        Liu et al., *Improving Video Generation with Human Feedback*, 2025, arXiv:2501.13918
            (Flow-DPO; beta is constant in time).
        Wallace et al., *Diffusion Model Alignment Using Direct Preference Optimization*, 2023,
            arXiv:2311.12908.
    """
    check_noun("dpo", velocity, Velocity, Field)
    _check_beta("dpo", beta)
    beta = float(beta)

    def loss(params, key, batch, frozen=None):
        reference = reference_of("dpo", params, frozen)
        x_t, target, t, cond, weight, key = _noisy_pairs("dpo", key, batch, path, time)

        def gained(params, key):  # e(better) - e(worse)
            v = like_state("dpo", velocity.apply(params, x_t, t, cond, key=key), x_t)
            better, worse = jnp.split(mean_event((v.astype(target.dtype) - target) ** 2), 2)
            return better - worse

        margin = -0.5 * beta * (gained(params, key) - gained(reference, None))
        value = mean_of_rows(-jax.nn.log_sigmoid(margin), weight)
        accuracy = mean_of_rows(_won(margin), weight)
        return value, {"accuracy": accuracy, "margin": mean_of_rows(margin, weight)}

    return loss


def preference_reward(reward: Field, *, path: Path = _LINEAR, time: Time = _UNIFORM) -> Loss:
    """A reward of noisy data is learned from pairs of a better and a worse sample.

    Also known as: Bradley-Terry loss, reward modeling, the reward of Flow-NRG.

        -log sigmoid(r(x_t of the better, t) - r(x_t of the worse, t))

    with one source x0 and one time t for both. `guidance.reward_guidance` follows its gradient.

    Args:
        reward: A field of (x, t, cond) -> [b].
        path: The path on which the samples are noised.
        time: The law of the times.

    Returns:
        A loss of the batch {'x' [b, *event] the better samples, 'worse' like it, optionally 'x0'
        (standard normal when absent), 'cond', 'weight' [b]}. Its metric is {'accuracy'}, the share
        of pairs with the greater reward for the better sample, where a tie counts 1/2.

    Raises:
        TypeError: At construction for what is no `Field`.
        ValueError: At trace time for a reward of another shape, a batch without 'x' or 'worse' or
            with unknown keys, and a key that is None.

    References:
        Liu et al., *Improving Video Generation with Human Feedback*, 2025, arXiv:2501.13918.
    """
    check_noun("preference_reward", reward, Field)

    def loss(params, key, batch, frozen=None):
        name = "preference_reward"
        x_t, _, t, cond, weight, key = _noisy_pairs(name, key, batch, path, time)
        r = check_rows(name, "a reward", reward.apply(params, x_t, t, cond, key=key), t.shape[0])
        better, worse = jnp.split(r.astype(float_dtype(r)), 2)
        margin = better - worse
        accuracy = mean_of_rows(_won(margin), weight)
        return mean_of_rows(-jax.nn.log_sigmoid(margin), weight), {"accuracy": accuracy}

    return loss


def reward_weights(beta: float) -> BatchTransform:
    """Flow-RWR: rows count by the exponential of their reward, in any loss with weights.

    Also known as: Flow-RWR, reward-weighted regression, advantage-weighted regression, exponential
    tilting.

        weight = exp((reward - the largest of the batch) / beta)

    For samples of the base model the minimum is the law  p(x) exp(reward / beta) / Z, that of the
    largest expected reward minus beta KL(law | p). Losses divide by the sum of the weights of the
    batch, so that the largest reward drops out, and a bias of order 1/b stays; where few rows of a
    batch have most of its weight, beta is too small for its size. Of several rounds on samples of
    one's own, the k-th has the law of beta / k.

        losses.chain(losses.reward_weights(0.1), losses.flow_matching(velocity))

    A reward of -inf is a weight of 0, also where all are -inf: then the batch counts nothing. NaN
    or inf is an error that names the row where rewards are seen, outside jit; inside it their
    weight is NaN, and so is the loss, at which `train.fit` stops.

    Args:
        beta: The temperature, in the unit of the reward, above 0 and finite.

    Returns:
        A batch transform that replaces 'reward' [b] by 'weight' [b], times the weight that was
        there.

    Raises:
        ValueError: At construction for beta <= 0 or infinite; at trace time for a batch without 'x'
            or 'reward', or with a reward of another shape; outside jit for one of NaN or inf in a
            row that has a weight.

    Examples:
        >>> import jax
        >>> import numpy as np
        >>> from jflow import losses
        >>> batch = {"x": np.zeros((2, 1)), "reward": np.log([2.0, 4.0])}
        >>> losses.reward_weights(1.0)(jax.random.key(0), batch)["weight"].round(3).tolist()
        [0.5, 1.0]

    References:
        Liu et al., *Improving Video Generation with Human Feedback*, 2025, arXiv:2501.13918
            (Flow-RWR, with beta = 1).
        Peters, Schaal, *Reinforcement Learning by Reward-Weighted Regression for Operational Space
            Control*, 2007.
    """
    _check_beta("reward_weights", beta)
    beta = float(beta)

    def transform(key, batch, frozen=None):
        need_x("reward_weights", batch)
        if batch.get("reward") is None:
            raise ValueError(
                f"reward_weights: expected 'reward' [b] in batch, got the keys {sorted(batch)}"
            )
        n = count_rows("reward_weights", batch["x"])
        reward = check_rows("reward_weights", "'reward'", jnp.asarray(batch["reward"]), n)
        reward = reward.astype(float_dtype(reward))
        before = batch.get("weight")
        before = jnp.ones_like(reward) if before is None else jnp.asarray(before)
        row = first_row(used_rows(before) & ~(reward < jnp.inf))
        if row is not None:
            raise ValueError(
                "reward_weights: expected rewards that are numbers or -inf, got"
                f" {np.asarray(reward)[row]} in row {row}"
            )
        reward = expand_to(reward, before)
        used = (before != 0) & (reward != -jnp.inf)
        largest = jnp.max(jnp.where(used, reward, -jnp.inf), initial=-jnp.inf)
        weight = before * jnp.exp(jnp.where(used, reward - largest, -jnp.inf) / beta)
        return {k: v for k, v in batch.items() if k != "reward"} | {"weight": weight}

    return transform


def reference_of(name: str, params: Params, frozen: Mapping[str, PyTree] | None) -> Params:
    """frozen['reference'], without a gradient; ValueError where it has not the form of params, or
    other shapes."""
    if frozen is not None and "reference" in frozen and frozen["reference"] is None:
        raise ValueError(f"{name}: expected params as 'reference' in frozen, got None")
    reference = frozen_entry(name, frozen, "reference")
    structures: list[Any] = [jax.tree.structure(tree) for tree in (reference, params)]
    given, expected = structures
    if given != expected:
        raise ValueError(
            f"{name}: expected a reference of the form of params, {expected}, got {given}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(reference)
    for (path, leaf), own in zip(leaves, jax.tree.leaves(params), strict=True):
        where = "frozen['reference']" + jax.tree_util.keystr(path)
        check_same_shape(name, where, leaf, own)
    return reference


def first_row(wrong: Array) -> int | None:
    """The first row of [b] that is wrong; None where there is none, or values are not seen."""
    if traced(wrong) or not wrong.is_fully_addressable:
        return None
    rows = np.flatnonzero(np.asarray(wrong))
    return int(rows[0]) if rows.size else None


def _check_beta(name, beta) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"{name}: expected a finite beta > 0, got {beta}")


def _won(margin):
    """1 where the margin is above 0, 1/2 where it is 0, else 0."""
    return 0.5 + 0.5 * jnp.sign(margin)


def _noisy_pairs(name, key, batch, path, time):
    """(x_t, target, t, cond, weight, key): the better samples first, then the worse ones, on one
    source at one time for both of a pair; the weight is that of the pairs."""
    better, worse = read_batch(name, batch, ("x", "worse", "x0", "cond", "weight"))[:2]
    if worse is None:
        raise ValueError(
            f"{name}: expected pairs, 'worse' beside 'x', got the keys {sorted(batch)}"
        )
    check_same_shape(name, "'worse'", worse, better)
    pairs = draw_pairs(name, key, {k: v for k, v in batch.items() if k != "worse"}, time)
    first = pairs.path_key
    ends = ((better, first), (worse, same_draws(first)))  # what is random on the path is the same
    x_t = [path.point(pairs.x0, x, pairs.t, key=key) for x, key in ends]
    target = [path.target(pairs.x0, x, pairs.t, key=same_draws(key)) for x, key in ends]
    both = lambda a: jnp.concatenate([a, a])  # noqa: E731
    return (
        jnp.concatenate(x_t).astype(better.dtype),
        jnp.concatenate(target).astype(float_dtype(better)),
        both(pairs.t),
        jax.tree.map(both, pairs.cond),
        pairs.weight,
        pairs.dropout_key,
    )
