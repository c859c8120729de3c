"""Balance along the paths of a diffusion sampler: training on any paths, whole or in parts."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jflow._core.arrays import sum_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import (
    check_noun,
    check_rows,
    check_weights,
    check_whole,
    take_parts,
)
from jflow._core.times import Times, rising_times, unit_times
from jflow.losses._path_gradient import need_empty_batch
from jflow.solvers import control_log_ratio, sample_controlled
from jflow.types import Array, Field, Loss, Velocity

__all__ = ["diffusion_balance", "diffusion_log_variance", "diffusion_partial_balance"]


def diffusion_balance(
    drift: Velocity,
    log_density: Callable[[Array], Array],
    event_shape: tuple[int, ...],
    *,
    noise: float = 1.0,
    grid: Times | ArrayLike | int = 100,
    draws: int = 256,
    exploration: float = 0.0,
) -> Loss:
    """Trajectory balance of a diffusion sampler, with a learned log Z.

    Also known as: trajectory balance of diffusion samplers, second-moment loss.

        mean over paths of (log Z - log w)^2,
        log w = log p~(x(1)) - log N(x(1); 0, noise^2) - sum of l,

    with the log-ratios l of `solvers.control_log_ratio`. The paths are drawn by the control and
    held fixed, so that no gradient goes through their steps, and they may be drawn with more noise.
    The loss is 0 on all paths at the exact control alone, and then log Z is exact.

    Args:
        drift: The control f, x [b, *event] and t [b] -> [b, *event].
        log_density: The unnormalized log p~, x [n, *event] -> [n].
        event_shape: The shape of one x.
        noise: The standard deviation of the free diffusion at t=1.
        grid: The number of equal steps, or rising times [n + 1] from 0 to 1.
        draws: The number of paths.
        exploration: The standard deviation of noise that is added to the paths, over a time of 1.

    Returns:
        A loss of the batch {} that needs a key; its params are {'drift', 'log_z' []}. Its metrics
        are 'elbo', the mean of log w, and 'log_z'. log Z wants a rate of its own, about 0.1.

    Raises:
        TypeError: At construction for a drift that is no `Velocity`.
        ValueError: At construction for an option out of its range; at trace time for a batch with
            keys, a log_density of another shape, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> drift = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 2 + 0 * x)
        >>> log_density = lambda x: -0.5 * jnp.sum((x - 2) ** 2, -1)
        >>> loss = losses.diffusion_balance(drift, log_density, (1,), grid=4)
        >>> params = {"drift": {}, "log_z": 0.5 * jnp.log(2 * jnp.pi)}  # both exact
        >>> bool(loss(params, jax.random.key(0), {})[0] < 1e-10)
        True

    References:
        Malkin, Jain, Bengio, Sun, Bengio, *Trajectory Balance: Improved Credit Assignment in
            GFlowNets*, 2022, arXiv:2201.13259.
        Sendera et al., *Improved off-policy training of diffusion samplers*, 2024,
            arXiv:2402.05098 (of diffusions).
    """
    paths = _paths(
        "diffusion_balance", drift, log_density, event_shape, noise, grid, draws, exploration
    )

    def loss(params, key, batch, frozen=None):
        control, log_z = take_parts("diffusion_balance", params, "drift", "log_z")
        _, log_w, _ = paths(control, key, batch)
        return mean_of_rows(jnp.square(log_z - log_w), None), {
            "elbo": mean_of_rows(log_w, None),
            "log_z": log_z,
        }

    return loss


def diffusion_log_variance(
    drift: Velocity,
    log_density: Callable[[Array], Array],
    event_shape: tuple[int, ...],
    *,
    noise: float = 1.0,
    grid: Times | ArrayLike | int = 100,
    draws: int = 256,
    exploration: float = 0.0,
) -> Loss:
    """The variance of the log-weights of a diffusion sampler's paths.

    Also known as: log-variance divergence, variance loss.

        mean over paths of (log w - mean log w)^2

    It is `diffusion_balance` with the mean log-weight of the batch in the place of log Z.

    Args:
        drift: The control f, x [b, *event] and t [b] -> [b, *event].
        log_density: The unnormalized log p~, x [n, *event] -> [n].
        event_shape: The shape of one x.
        noise: The standard deviation of the free diffusion at t=1.
        grid: The number of equal steps, or rising times [n + 1] from 0 to 1.
        draws: The number of paths, at least 2.
        exploration: The standard deviation of noise that is added to the paths, over a time of 1.

    Returns:
        A loss of the batch {} that needs a key; its params are those of the drift. Its metric is
        'elbo', the mean of log w.

    Raises:
        TypeError: At construction for a drift that is no `Velocity`.
        ValueError: At construction for an option out of its range; at trace time for a batch with
            keys, a log_density of another shape, and a key that is None.

    References:
        Richter, Boustati, Nüsken, Ruiz, Akyildiz, *VarGrad: A Low-Variance Gradient Estimator for
            Variational Inference*, 2020, arXiv:2010.10436.
        Richter, Berner, *Improved sampling via learned diffusions*, 2023, arXiv:2307.01198 (of
            diffusions).
    """
    check_whole("diffusion_log_variance", 2, draws=draws)
    paths = _paths(
        "diffusion_log_variance", drift, log_density, event_shape, noise, grid, draws, exploration
    )

    def loss(params, key, batch, frozen=None):
        _, log_w, _ = paths(params, key, batch)
        mean = mean_of_rows(log_w, None)
        return mean_of_rows(jnp.square(log_w - mean), None), {"elbo": mean}

    return loss


def diffusion_partial_balance(
    drift: Velocity,
    flow: Field,
    log_density: Callable[[Array], Array],
    event_shape: tuple[int, ...],
    *,
    noise: float = 1.0,
    grid: Times | ArrayLike | int = 100,
    draws: int = 256,
    exploration: float = 0.0,
    decay: float = 1.0,
) -> Loss:
    """Balance of every part of a diffusion sampler's paths, by a learned flow function.

    Also known as: DGFS, diffusion generative flow sampler.

        sum over i < j of decay^(j - i) (G_j - G_i - sum of l from i to j)^2 / sum of decay^(j - i)

    with the log-ratios l of `solvers.control_log_ratio`, and log F(x, t) - log N(x; 0, noise^2 t),
    the log of the flow function over the free marginal,

        G(x, t) = t (log p~(x) - log N(x; 0, noise^2 t)) + flow(x, t),    G(x, 1) without the flow.

    Parts of a path give a signal before its end. At the exact control and flow all parts are 0, and
    log Z = G(0, 0) = flow(0, 0). The paths are drawn by the control and held fixed.

    Args:
        drift: The control f, x [b, *event] and t [b] -> [b, *event].
        flow: What is learned of the flow function, x [b, *event] and t [b] -> [b].
        log_density: The unnormalized log p~, x [n, *event] -> [n], finite everywhere.
        event_shape: The shape of one x.
        noise: The standard deviation of the free diffusion at t=1.
        grid: The number of equal steps, or rising times [n + 1] from 0 to 1.
        draws: The number of paths.
        exploration: The standard deviation of noise that is added to the paths, over a time of 1.
        decay: The weight of a part of one more step; below 1 short parts count more. The default,
            all parts alike, is ours.

    Returns:
        A loss of the batch {} that needs a key; its params are {'drift', 'flow'}. Its metrics are
        'elbo', the mean of log w, and 'log_z'.

    Raises:
        TypeError: At construction for a drift that is no `Velocity` or a flow that is no `Field`.
        ValueError: At construction for an option out of its range; at trace time for a batch with
            keys, a log_density or a flow of another shape, and a key that is None.

    References:
        Zhang, Chen, Liu, Courville, Bengio, *Diffusion Generative Flow Samplers: Improving learning
            signals through partial trajectory optimization*, 2023, arXiv:2310.02679.
    """
    name = "diffusion_partial_balance"
    paths = _paths(name, drift, log_density, event_shape, noise, grid, draws, exploration)
    check_noun(name, flow, Field)
    if not 0 < decay < math.inf:
        raise ValueError(f"{name}: expected a finite decay > 0, got {decay}")
    times = rising_times(name, grid)
    n = len(times) - 1
    gap = jnp.arange(n + 1)[None] - jnp.arange(n + 1)[:, None]

    def loss(params, key, batch, frozen=None):
        control, learned = take_parts(name, params, "drift", "flow")
        xs, log_w, log_ratio = paths(control, key, batch)
        inner = xs[1:-1].reshape(-1, *xs.shape[2:])
        t = jnp.repeat(jnp.asarray(times[1:-1], xs.dtype), draws)
        value = check_rows(name, "log_density", log_density(inner), len(inner))
        ahead = t * (value - _log_free(inner, noise, t))
        start = xs[0], jnp.zeros_like(xs, shape=(draws,))
        points = [jnp.concatenate(parts) for parts in zip(start, (inner, t), strict=True)]
        flows = check_rows(name, "flow", flow.apply(learned, *points), n * draws)
        known = jnp.concatenate([jnp.zeros_like(ahead, shape=(draws,)), ahead])
        before = (known + flows).reshape(n, draws)
        total = jnp.cumsum(log_ratio, axis=0)
        # what is left of the weight at each time: all of them are log Z in the end
        left = jnp.concatenate([before[:1], before[1:] - total[:-1], log_w[None]])
        weight = jnp.where(gap > 0, decay ** jnp.abs(gap).astype(xs.dtype), 0)
        parts = jnp.einsum("ij,ijb->b", weight, jnp.square(left[None] - left[:, None]))
        metrics = {"elbo": mean_of_rows(log_w, None), "log_z": mean_of_rows(before[0], None)}
        return mean_of_rows(parts / jnp.sum(weight), None), metrics

    return loss


def _paths(name, drift, log_density, event_shape, noise, grid, draws, exploration):
    """(params, key, batch) -> (paths [n + 1, draws, *event] without a gradient, their log-weights,
    and the log-ratios [n, draws])."""
    check_noun(name, drift, Velocity)
    check_whole(name, draws=draws)
    check_weights(name, exploration=exploration)
    times, event_shape = unit_times(name, grid), tuple(event_shape)
    if isinstance(noise, bool) or not noise > 0:
        raise ValueError(f"{name}: expected noise > 0, got {noise!r}")
    behavior = math.hypot(noise, exploration)

    def paths(params, key, batch):
        need_empty_batch(name, key, batch)
        held = jax.lax.stop_gradient(params)
        leaves = jax.tree.leaves(params)
        start = jnp.zeros((draws, *event_shape), jnp.result_type(*leaves) if leaves else float)
        xs, _ = sample_controlled(drift, held, start, key, times, noise=noise, behavior=behavior)
        xs = jax.lax.stop_gradient(xs)
        log_ratio = control_log_ratio(drift, params, xs, times, noise=noise)
        end = check_rows(name, "log_density", log_density(xs[-1]), draws)
        log_w = end - _log_free(xs[-1], noise, jnp.ones_like(end)) - jnp.sum(log_ratio, axis=0)
        return xs, log_w, log_ratio

    return paths


def _log_free(x, noise, t):
    """log N(x; 0, noise^2 t), [b], for t [b] above 0."""
    size = math.prod(x.shape[1:])
    return -0.5 * sum_event(jnp.square(x)) / (noise**2 * t) - 0.5 * size * jnp.log(
        2 * math.pi * noise**2 * t
    )
