"""Policy gradients: the stochastic steps of a sampler as actions, and a reward for what they make.

A rollout keeps, of every step, the state, the times, what was drawn, and the mean and the standard
deviation that it was drawn from. The losses take the same `Step` at the same states and times, so
that their ratio of densities is 1, up to rounding, as long as the params are those of the rollout:
grid, noise and its limits cannot differ, since there is one place that says them.

    step = solvers.euler_maruyama(velocity, noises.grpo(0.7))
    batches = losses.group_rollouts(step, reward, source=..., grid=grids.uniform(10), ...)
    state = train.init_state(params, optimizer, key, frozen={"reference": params})
    train.fit(state, train.make_step(losses.grpo(step, kl=0.04), optimizer), batches, steps=1000)

A batch of a policy is a dict of

    'x', 'x_next', 'mean' [b, k, *event]    the states at t and t_next of k steps, and the means
    'std' [b, k] or [b, k, *event]          the standard deviations that x_next was drawn with
    't', 't_next' [b, k]
    'advantage' [b] or [b, k]               how much better than expected the outcome was
    'cond', 'weight' [b], 'reward' [b], 'future_kl' [b, k]      optional

Several updates on one rollout are `jax.lax.scan(step, state, parts)` over parts of its rows: there
the ratios leave 1 and are clipped.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype, mean_event, sum_event
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import (
    accepts,
    check_cond,
    check_rows,
    check_weights,
    check_whole,
    described,
    need_key,
)
from jflow._core.times import Times, check_grid
from jflow.losses._preferences import first_row, reference_of
from jflow.solvers import Trajectory, sample_sde
from jflow.types import Array, Cond, Key, Loss, Step

__all__ = ["group_advantages", "group_rollouts", "grpo", "policy_batch", "ppo"]

_STEPS = ("x", "x_next", "mean", "std", "t", "t_next")
_ENTRIES = (*_STEPS, "advantage", "cond", "weight", "reward", "future_kl")


def group_advantages(
    reward: Float[ArrayLike, " b"] | Sequence[float],
    group_size: int,
    *,
    divide_by: Literal["group", "all"] | None = None,
) -> Float[Array, " b"]:
    """How much better a sample is than others of its group, for policy gradients without a critic.

    Also known as: group-relative advantages, GRPO advantages, leave-one-out baseline (RLOO),
    Dr.GRPO.

        divide_by=None:   G / (G - 1) (r - mean of the group)
        'group', 'all':   (r - mean of the group) / (std + 1e-4)

    The first is r minus the mean of the other G - 1 rewards, with which the gradient of the
    expected reward has no bias. A division by the standard deviation of the group, as in
    Flow-GRPO, or of all rewards, as an option of its code, makes the learning rate independent of
    the unit of the reward, and changes the optimum where a KL is weighed against it.

    Args:
        reward: The rewards [b], the rows of a group one after the other.
        group_size: The rows G of a group, at least 2; b is a multiple of it.
        divide_by: What they are divided by: None, 'group' or 'all'.

    Returns:
        The advantages [b], in float32 or better.

    Raises:
        ValueError: For a group of fewer than 2, another `divide_by`, and rewards that are not [b]
            with b a multiple of group_size.

    Examples:
        >>> from jflow import losses
        >>> losses.group_advantages([1.0, 2.0, 3.0, 5.0, 5.0, 5.0], 3).tolist()
        [-1.5, 0.0, 1.5, 0.0, 0.0, 0.0]

    References:
        Shao et al., *DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language
            Models*, 2024, arXiv:2402.03300 (GRPO).
        Liu et al., *Understanding R1-Zero-Like Training: A Critical Perspective*, 2025,
            arXiv:2503.20783 (Dr.GRPO: without the division).
        Kool, van Hoof, Welling, *Buy 4 REINFORCE Samples, Get a Baseline for Free!*, 2019 (the
            others' mean).
    """
    _check_groups("group_advantages", group_size, divide_by)
    r = jnp.asarray(reward)
    r = r.astype(float_dtype(r))
    if r.ndim != 1 or r.shape[0] % group_size:
        raise ValueError(
            f"group_advantages: expected rewards [b] with b a multiple of {group_size}, got"
            f" {list(r.shape)}"
        )
    groups = r.reshape(-1, group_size)
    centered = groups - jnp.mean(groups, axis=1, keepdims=True)
    if divide_by is None:
        return (centered * (group_size / (group_size - 1))).reshape(r.shape)
    std = jnp.std(groups, axis=1, keepdims=True) if divide_by == "group" else jnp.std(r)
    return (centered / (std + 1e-4)).reshape(r.shape)


def policy_batch(trajectory: Trajectory, advantage: Array, cond: Cond = None) -> dict[str, Any]:
    """The steps of a trajectory as the batch of a policy, rows first.

    Args:
        trajectory: What `solvers.sample_sde(..., return_trajectory=True)` returned, of n steps.
        advantage: How much better than expected the outcome was, [b], or of each step [b, n].
        cond: The condition that the sampler was given.

    Returns:
        {'x', 'x_next', 'mean', 'std', 't', 't_next', 'advantage'}, and 'cond' where there is one.
    """
    rows = lambda a: jnp.swapaxes(a, 0, 1)  # noqa: E731
    b, n = trajectory.x.shape[1], trajectory.t.shape[0] - 1
    times = lambda t: jnp.broadcast_to(t, (b, n))  # noqa: E731
    batch = {
        "x": rows(trajectory.x[:-1]),
        "x_next": rows(trajectory.x[1:]),
        "mean": rows(trajectory.mean),
        "std": rows(trajectory.std),
        "t": times(trajectory.t[:-1]),
        "t_next": times(trajectory.t[1:]),
        "advantage": advantage,
    }
    return batch if cond is None else {**batch, "cond": cond}


def group_rollouts(
    step: Step,
    reward: Callable[[Array, Cond], ArrayLike],
    *,
    source: Callable[[Key, int], Array],
    grid: Times | ArrayLike,
    groups: int,
    group_size: int,
    conds: Callable[[Key, int], Cond] | None = None,
    divide_by: Literal["group", "all"] | None = None,
    keep: int | None = None,
    future_kl: bool = False,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Callable:
    """Samples of the model that is trained, with rewards and advantages, as the batches of `fit`.

    Also known as: on-policy rollouts, denoising reduction (few steps in the grid, fewer kept).

    Each call draws `groups` conditions, walks `group_size` samples for each, asks for their rewards
    and compares each sample with its group. It depends on the state and the key alone: a run of
    `train.fit` that was resumed ends as one that never stopped. The state's params are the policy;
    those in state.frozen['reference'] are the reference of `future_kl`.

    The reward may be a function of numpy, or of a model elsewhere: it is called between two
    programs. Where `fit` has inner > 1 it is traced, and must be JAX; a reward that is not finite
    is then found by `fit`, in the loss.

    Args:
        step: The stochastic step, that of the loss as well.
        reward: (x [b, *event], cond) -> [b], of the samples at the last time.
        source: (key, n) -> x0 [n, *event], such as standard normal noise.
        grid: Rising times [n + 1]. The paper trains on 10 steps where it samples by 40.
        groups: How many conditions a batch has.
        group_size: Samples of each, at least 2. The batch has groups x group_size rows.
        conds: (key, groups) -> a condition of so many rows; None: no condition.
        divide_by: As of `group_advantages`.
        keep: How many of the steps, drawn for each row without replacement, the batch keeps; None:
            all. The gradient of `grpo` is the same on average, and the advantage is [b, keep], that
            of each step; `ppo` needs whole walks.
        future_kl: Whether the batch tells `grpo` what KL to the reference each row has still to
            pay after each step, for which the reference is evaluated along the rollout.
        sharding: Where the rows lie during the walk, such as train.data_sharding(mesh), also to be
            given to `fit`; None: where the params lie.

    Returns:
        A callable (state, key) -> batch for `train.fit`, the batch as the module says.

    Raises:
        TypeError: At construction for a step, reward, source or conds that cannot be called so.
        ValueError: At construction for a group of fewer than 2, no groups, keep outside 1 ... n, or
            a grid that does not rise; when it is called, for a source or conds of other rows, a
            source that is not of floats, a reward of another shape, for one that is not finite,
            with its step and row, for future_kl without a reference, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from jflow import losses, oracles, solvers, train
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0], 1.0))
        >>> batches = losses.group_rollouts(
        ...     solvers.euler_maruyama(velocity, 0.5),
        ...     lambda x, cond: -jnp.sum(x**2, axis=1),
        ...     source=lambda key, n: jax.random.normal(key, (n, 1)),
        ...     grid=solvers.grids.uniform(5),
        ...     groups=2,
        ...     group_size=3,
        ... )
        >>> state = train.init_state({"w": jnp.ones(())}, optax.sgd(0.1), jax.random.key(0))
        >>> batch = batches(state, jax.random.key(1))
        >>> batch["x"].shape, batch["advantage"].shape
        ((6, 5, 1), (6,))

    References:
        Liu et al., *Flow-GRPO: Training Flow Matching Models via Online RL*, 2025,
            arXiv:2505.05470. `future_kl` and the default of `divide_by` are ours.
    """
    name = "group_rollouts"
    _check_step(name, step)
    _check_function(name, "reward", reward, "x, cond")
    _check_function(name, "source", source, "key, n")
    if conds is not None:
        _check_function(name, "conds", conds, "key, n")
    _check_groups(name, group_size, divide_by)
    check_whole(name, groups=groups)
    check_grid(name, grid, rising=True)
    steps = int(np.shape(grid)[0]) - 1
    if keep is not None:
        check_whole(name, keep=keep)
        if keep > steps:
            raise ValueError(f"{name}: expected keep in 1 ... {steps}, got {keep}")
    rows = groups * group_size

    def placed(tree):
        if sharding is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, sharding)

    @jax.jit
    def walk(params, reference, key):
        cond_key, source_key, walk_key, keep_key = jax.random.split(key, 4)
        cond = None if conds is None else check_cond(name, conds(cond_key, groups), groups)
        cond = placed(jax.tree.map(lambda c: jnp.repeat(c, group_size, axis=0), cond))
        x0 = jnp.asarray(source(source_key, rows))
        if x0.shape[:1] != (rows,) or not jnp.issubdtype(x0.dtype, jnp.floating):
            raise ValueError(
                f"{name}: expected a source of floats [{rows}, *event], got {described(x0)}"
            )
        x0 = placed(x0)
        x, path = sample_sde(step, params, x0, walk_key, grid, cond, return_trajectory=True)
        batch = policy_batch(path, jnp.zeros(rows), cond)
        if future_kl:
            batch["future_kl"] = _centered(_future_kl(step, reference, path, cond), group_size)
        if keep is not None:
            order = jnp.argsort(jax.random.uniform(keep_key, (rows, steps)), axis=1)[:, :keep]
            batch = {k: _pick(v, order) if k in _PICKED else v for k, v in batch.items()}
        return x, batch

    def rollouts(state, key):
        need_key(name, key)
        reference = None
        if future_kl:
            reference = reference_of(name, state.params, state.frozen)
        x, batch = walk(state.params, reference, key)
        given = reward(x, batch.get("cond"))
        given = jnp.asarray(check_rows(name, "a reward", jnp.asarray(given), rows))
        given = given.astype(float_dtype(given))
        row = first_row(~jnp.isfinite(given))
        if row is not None:
            raise ValueError(
                f"{name}: expected finite rewards, got {np.asarray(given)[row]} at step"
                f" {int(state.step)}, row {row}"
            )
        advantage = group_advantages(given, group_size, divide_by=divide_by)
        if keep is not None:  # of steps: they are no walk, as ppo needs it
            advantage = jnp.broadcast_to(advantage[:, None], (rows, keep))
        return {**batch, "advantage": advantage, "reward": given}

    return rollouts


def grpo(step: Step, *, clip: float = 1e-4, kl: float = 0.0) -> Loss:
    """Flow-GRPO: a clipped policy gradient for every step of a stochastic sampler.

    Also known as: Flow-GRPO, group relative policy optimization, online RL of flow matching.

        mean over rows and steps of  -min(q A, clip(q, 1 - c, 1 + c) A) + kl KL
        log q = mean over the event of  log N(x'; m, s^2) - log N(x'; m_old, s_old^2)
        KL = mean over the event of  (((m - m_ref)^2 + s^2) / s_ref^2 - 1) / 2 - log(s / s_ref)

    s is the standard deviation of the step itself, with the length of the step in it. Log-ratios
    are means over the D numbers of an event, as in the code of the paper, and so is the KL: of the
    sums the loss is, to first order, 1/D, whatever D. The range of the clip belongs to that mean:
    1e-4 is the paper's for images of 65536 numbers; a range c of PPO for the sum is about c / D
    here, 3e-3 for D = 64. Clipped ratios have no gradient. With batches of `group_rollouts` under
    `fit`, one update each, every ratio is 1.

    The gradient of the KL is taken at the states of the rollout, as in the paper; that earlier
    steps lead to these states is left out, and its fixed point is not the optimum of the reward
    minus the KL. With `group_rollouts(..., future_kl=True)` it is: from the advantage of a step is
    subtracted kl times the KL, summed over the event, that the row has still to pay (ours). The
    optimum is then that of  E[reward] - kl KL(paths of the policy | paths of the reference),  where
    the data follow the reference's law times exp(reward / kl), if the noise is memoryless, as of
    `noises.sbdm` or `ancestral`.

    Args:
        step: The stochastic step of the rollout. Dimensions without noise count nothing.
        clip: The range c of the ratio around 1, above 0; math.inf: no clip.
        kl: The weight of the KL to the reference, whose params are frozen['reference'].

    Returns:
        A loss of the batch of a policy. It needs no key: dropout is off, as in the rollout. Its
        metrics are {'log_ratio', the largest |log-ratio| of one number of an event; 'clipped', the
        share of steps without a gradient}, {'kl'} where it has a weight, and {'reward'} where the
        batch has it.

    Raises:
        TypeError: At construction for what is no step, such as a velocity.
        ValueError: At construction for clip <= 0 or a negative kl; at trace time for entries of the
            batch that are missing or do not fit, and, where kl > 0, for a frozen without
            'reference', or with one of another form or other shapes than params.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, oracles, solvers
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0], 1.0))
        >>> step, key = solvers.euler_maruyama(velocity, 0.5), jax.random.key(0)
        >>> grid, x0 = solvers.grids.uniform(4), jnp.ones((2, 1))
        >>> _, path = solvers.sample_sde(step, {}, x0, key, grid, return_trajectory=True)
        >>> batch = losses.policy_batch(path, jnp.array([1.0, 3.0]))
        >>> value, metrics = losses.grpo(step)({}, None, batch)
        >>> round(float(value), 4), float(metrics["log_ratio"]) < 1e-5  # minus the mean advantage
        (-2.0, True)

    References:
        Liu et al., *Flow-GRPO: Training Flow Matching Models via Online RL*, 2025,
            arXiv:2505.05470 (the KL of its code leaves the length of the step out).
        Domingo-Enrich, Drozdzal, Karrer, Chen, *Adjoint Matching: Fine-tuning Flow and Diffusion
            Generative Models with Memoryless Stochastic Optimal Control*, 2024, arXiv:2409.08861
            (why the noise has to be memoryless).
    """
    _check_step("grpo", step)
    _check_clip("grpo", clip)
    check_weights("grpo", kl=kl)
    kl = float(kl)

    def loss(params, key, batch, frozen=None):
        rows, advantage, cond, weight, reward, future = _read("grpo", batch)
        reference = reference_of("grpo", params, frozen) if kl > 0 else None
        if future is not None:
            advantage = advantage - kl * future

        def one(_, at):
            (x, x_next, *old, t, t_next), advantage = at
            new = step(params, x, t, t_next, None, cond)[1:]
            ratio = _log_ratio(x_next, _Normal(*new), _Normal(*old))
            gain, clipped = _surrogate(mean_event(ratio), advantage, clip)
            made = {"gain": gain, "clipped": clipped, "log_ratio": _max_event(ratio)}
            if kl > 0:
                law = _Normal(*step(reference, x, t, t_next, None, cond)[1:])
                made["kl"] = mean_event(_kl(_Normal(*new), law))
            return None, made

        made = jax.lax.scan(one, None, _steps_first((rows, advantage)))[1]
        means = {k: mean_of_rows(jnp.mean(v, axis=0), weight) for k, v in made.items()}
        metrics = {"clipped": means["clipped"], "log_ratio": _largest(made["log_ratio"], weight)}
        value = -means["gain"]
        if kl > 0:
            value, metrics["kl"] = value + kl * means["kl"], means["kl"]
        return value, _with_reward(metrics, reward, weight)

    return loss


def ppo(step: Step, *, clip: float = 0.2, entropy: float = 0.0) -> Loss:
    """PPO of few-step policies: one clipped ratio for all steps that made an action.

    Also known as: ReinFlow, proximal policy optimization of flow policies.

        mean over rows of  -min(q A, clip(q, 1 - c, 1 + c) A) - entropy H
        log q = sum over steps and the event of  log N(x'; m, s^2) - log N(x'; m_old, s_old^2)
        H = mean over steps and the event of  log s + log(2 pi e) / 2

    The source of the walk is the same under both policies and cancels. The ratio is the exact one
    of the densities of the walks, a sum, not a mean: clip is that of PPO. Nothing else is clipped:
    states, noise and actions are as drawn, and a world that clips an action does so outside of the
    density.

    Args:
        step: The stochastic step of the rollout, such as `solvers.noise_injection`. Dimensions
            without noise count nothing.
        clip: The range c of the ratio around 1, above 0; math.inf: no clip.
        entropy: The weight of the entropy of a step, in nats for each number of the event.

    Returns:
        A loss of the batch of a policy, all steps of a walk in its k, with 'advantage' [b] and
        without 'future_kl': there is no KL. It needs no key. Its metrics are {'log_ratio', the
        largest |log-ratio| of one number of an event; 'clipped', the share of rows without a
        gradient; 'entropy'}, and {'reward'} where the batch has it.

    Raises:
        TypeError: At construction for what is no step, such as a velocity.
        ValueError: At construction for clip <= 0 or a negative entropy; at trace time for entries
            of the batch that are missing or do not fit, such as those of `group_rollouts` with
            `keep` or `future_kl`.

    References:
        Zhang, Yu, Su, Wang, *ReinFlow: Fine-tuning Flow Matching Policy with Online Reinforcement
            Learning*, 2025, arXiv:2505.22094 (whose code clips states, noise and the last action
            as well, with the density of what is not clipped).
        Schulman, Wolski, Dhariwal, Radford, Klimov, *Proximal Policy Optimization Algorithms*,
            2017, arXiv:1707.06347.
    """
    _check_step("ppo", step)
    _check_clip("ppo", clip)
    check_weights("ppo", entropy=entropy)
    entropy = float(entropy)

    def loss(params, key, batch, frozen=None):
        rows, advantage, cond, weight, reward, _ = _read("ppo", batch, of_rows=True)

        def one(_, at):
            x, x_next, *old, t, t_next = at
            new = _Normal(*step(params, x, t, t_next, None, cond)[1:])
            ratio = _log_ratio(x_next, new, _Normal(*old))
            return None, (sum_event(ratio), _max_event(ratio), mean_event(_entropy(new)))

        ratio, largest, entropies = jax.lax.scan(one, None, _steps_first(rows))[1]
        gain, clipped = _surrogate(jnp.sum(ratio, axis=0), advantage, clip)
        mean = mean_of_rows(jnp.mean(entropies, axis=0), weight)
        value = -mean_of_rows(gain, weight) - entropy * mean
        metrics = {
            "log_ratio": _largest(largest, weight),
            "clipped": mean_of_rows(clipped, weight),
            "entropy": mean,
        }
        return value, _with_reward(metrics, reward, weight)

    return loss


class _Normal(NamedTuple):
    mean: Array
    std: Array


_PICKED = (*_STEPS, "future_kl")


def _pick(values, order):
    """values [b, n, ...] at the steps order [b, k]."""
    return jnp.take_along_axis(values, expand_to(order, values), axis=1)


def _steps_first(tree):
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tree)


def _broadcast(law: _Normal) -> tuple[Array, Array, Array]:
    """(mean, std, whether there is noise), shaped like the mean; std is 1 where there is none."""
    dtype = float_dtype(law.mean, law.std)
    mean = law.mean.astype(dtype)
    std = jnp.broadcast_to(expand_to(law.std.astype(dtype), mean), mean.shape)
    return mean, jnp.where(std > 0, std, 1), std > 0


def _log_ratio(x_next, new: _Normal, old: _Normal) -> Array:
    """log N(x_next; new) - log N(x_next; old), [b, *event], without a difference of large numbers:
    exactly 0 where the two are the same."""
    (m, s, drawn), (m_old, s_old, drawn_old) = _broadcast(new), _broadcast(old)
    x = x_next.astype(m.dtype)
    z, z_old = (x - m) / s, (x - m_old) / s_old
    ratio = 0.5 * (z_old - z) * (z_old + z) - jnp.log(s / s_old)
    return jnp.where(drawn & drawn_old, ratio, 0)


def _kl(new: _Normal, reference: _Normal) -> Array:
    """KL(new | reference) of normal laws, [b, *event], in nats; 0 where one has no noise."""
    (m, s, drawn), (m_ref, s_ref, drawn_ref) = _broadcast(new), _broadcast(reference)
    ratio = s / s_ref
    kl = 0.5 * (((m - m_ref) / s_ref) ** 2 + (ratio - 1) * (ratio + 1)) - jnp.log(ratio)
    return jnp.where(drawn & drawn_ref, kl, 0)


def _entropy(law: _Normal) -> Array:
    _, s, drawn = _broadcast(law)
    return jnp.where(drawn, jnp.log(s) + 0.5 * math.log(2 * math.pi * math.e), 0)


def _surrogate(log_ratio, advantage, clip):
    """(min(q A, clip(q) A), 1 where the second was less and the gradient is none), [b] each."""
    ratio = jnp.exp(log_ratio)
    gain, clipped = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
    return jnp.minimum(gain, clipped), (clipped < gain).astype(gain.dtype)


def _future_kl(step, reference, path: Trajectory, cond) -> Array:
    """The KL to the reference that each row pays after each step, [b, n], in nats."""

    def one(_, at):
        t, t_next, x, mean, std = at
        law = _Normal(*step(reference, x, t, t_next, None, cond)[1:])
        return None, sum_event(_kl(_Normal(mean, std), law))

    at = (path.t[:-1], path.t[1:], path.x[:-1], path.mean, path.std)
    paid = jax.lax.scan(one, None, at)[1]
    return jnp.swapaxes(jnp.cumsum(paid[::-1], axis=0)[::-1] - paid, 0, 1)


def _centered(values, group_size):
    """values [b, n] minus the mean of the others of the group."""
    groups = values.reshape(-1, group_size, *values.shape[1:])
    centered = groups - jnp.mean(groups, axis=1, keepdims=True)
    return (centered * (group_size / (group_size - 1))).reshape(values.shape)


def _read(name, batch, of_rows=False):
    """((the entries of the steps), advantage, cond, weight, reward, future_kl) of a batch; the
    advantage is [b] with `of_rows`, else [b, k]."""
    values = read_batch(name, batch, _ENTRIES)
    (x, x_next, mean, std, t, t_next), (advantage, cond, weight, reward, future) = (
        values[:6],
        values[6:],
    )
    b, k = x.shape[0], x.shape[1] if x.ndim > 1 else 0
    expected = {"x_next": x.shape, "mean": x.shape, "t": (b, k), "t_next": (b, k)}
    given = {"x_next": x_next, "mean": mean, "std": std, "t": t, "t_next": t_next}
    given["advantage"] = advantage
    if missing := [entry for entry, value in given.items() if value is None]:
        raise ValueError(
            f"{name}: expected the batch of a policy, as losses.group_rollouts and"
            f" losses.policy_batch make it, got one without {missing}"
        )
    for entry, shape in expected.items():
        if given[entry].shape != shape:
            raise ValueError(
                f"{name}: expected {entry!r} of shape {list(shape)}, got {list(given[entry].shape)}"
            )
    if std.shape[:2] != (b, k) or std.shape not in ((b, k), x.shape):
        raise ValueError(
            f"{name}: expected 'std' of shape {[b, k]} or {list(x.shape)}, got {list(std.shape)}"
        )
    allowed = [(b,)] if of_rows else [(b,), (b, k)]
    if advantage.shape not in allowed:
        hint = ": one for a whole walk, without group_rollouts(keep=...)" if of_rows else ""
        raise ValueError(
            f"{name}: expected 'advantage' of shape {' or '.join(str(list(a)) for a in allowed)},"
            f" got {list(advantage.shape)}{hint}"
        )
    if of_rows and future is not None:
        raise ValueError(f"{name}: expected no 'future_kl' in batch: losses.grpo takes it")
    if future is not None and future.shape != (b, k):
        raise ValueError(
            f"{name}: expected 'future_kl' of shape {[b, k]}, got {list(future.shape)}"
        )
    if not of_rows and advantage.ndim == 1:
        advantage = jnp.broadcast_to(advantage[:, None], (b, k))
    return (x, x_next, mean, std, t, t_next), advantage, cond, weight, reward, future


def _max_event(values):
    """The largest |value| of each row, without a gradient."""
    values = jax.lax.stop_gradient(jnp.abs(values))
    return jnp.max(values, axis=tuple(range(1, values.ndim)), initial=0)


def _largest(values, weight):
    """The largest of [k, b] over steps and the rows that count."""
    if weight is not None:
        values = jnp.where(weight != 0, values, 0)
    return jnp.max(values, initial=0)


def _with_reward(metrics, reward, weight):
    return metrics if reward is None else {**metrics, "reward": mean_of_rows(reward, weight)}


def _check_groups(name, group_size, divide_by) -> None:
    check_whole(name, 2, group_size=group_size)
    if divide_by not in (None, "group", "all"):
        raise ValueError(f"{name}: expected divide_by None, 'group' or 'all', got {divide_by!r}")


def _check_step(name, step) -> None:
    what = "a step such as solvers.euler_maruyama(velocity, noise)"
    _check_function(name, what, step, "params, x, t, t_next, key, cond")


def _check_function(name, what, value, arguments: str) -> None:
    if not callable(value) or not accepts(value, arguments.count(",") + 1):
        raise TypeError(
            f"{name}: expected {what}, a function of ({arguments}), got {described(value)}"
        )


def _check_clip(name, clip) -> None:
    if not 0 < clip <= math.inf:
        raise ValueError(f"{name}: expected clip > 0, got {clip}")
