"""Fits: the posterior from a simulator, in rounds, or from simulations that are there already."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from jflow import data, train
from jflow._core.checks import check_whole
from jflow.apps.sbi._coordinates import encode_x, location_and_scale, to_real
from jflow.apps.sbi._estimators import Estimator, npe
from jflow.apps.sbi._posterior import Posterior, make_posterior
from jflow.apps.sbi._priors import Prior, as_prior
from jflow.apps.sbi._simulations import run_simulator, split
from jflow.types import Key

_NEIGHBORS = 1000  # simulations that an observation is compared with
_EPSILON = 1e-4  # the mass that a truncated proposal leaves out


def fit(
    key: Key,
    prior: Any,
    simulator: Callable[[Key, Any], Any],
    *,
    num_simulations: int = 10_000,
    observation: Any = None,
    rounds: int = 1,
    estimator: Callable[[int, nn.Module | None], Estimator] | None = None,
    embed: nn.Module | None = None,
    max_invalid: float = 0.5,
    progress: bool = True,
    **training: Any,
) -> Posterior:
    """The posterior of a simulator's parameters, from a prior and the simulator alone.

    Also known as: simulation-based inference, likelihood-free inference, SBI, TSNPE, SNPE.

    Parameters are drawn from the prior and simulated, and a conditional density q(theta | x) is
    trained on the pairs. With one round the posterior is amortized: good for every observation that
    the prior makes likely. With more, simulations are spent on one observation: every further round
    draws from the prior cut to where the last posterior at the observation has its mass, all but
    1e-4 of it, and trains anew on all pairs. A cut prior is the prior up to a constant there, so
    that no correction is needed.

    Args:
        key: Of everything that is random: the same key gives the same posterior.
        prior: What `as_prior` takes.
        simulator: (key, theta [n, d]) -> x [n, *event], see `simulate`.
        num_simulations: In all rounds together.
        observation: What was observed, [*event]; needed for more than one round.
        rounds: How many.
        estimator: `npe()`, the default, `fmpe()`, or a function (d, embed) -> `Estimator`.
        embed: A Linen module x [b, *event] -> [b, k] in front of the estimator, trained with it,
            such as `nets.ImageEncoder` for images or `nets.SetEncoder` for exchangeable rows. None
            takes x as it is.
        max_invalid: The share of simulations with NaN above which it is an error.
        progress: Whether to show progress bars.
        **training: Options of `fit_simulations`: steps, batch, learning_rate, patience.

    Returns:
        The posterior.

    Raises:
        ValueError: For rounds without an observation, an observation of another shape, and what
            `simulate` and `as_prior` raise.

    Examples:
        >>> import jax
        >>> from jflow.apps import sbi
        >>> def simulator(key, theta):
        ...     return theta + 0.1 * jax.random.normal(key, theta.shape)
        >>> prior = sbi.box_uniform([0.0], [1.0])
        >>> small = {"num_simulations": 200, "steps": 5, "progress": False}
        >>> estimator = sbi.npe(depth=1, hidden=(8,))
        >>> key = jax.random.key(0)
        >>> posterior = sbi.fit(key, prior, simulator, estimator=estimator, **small)
        >>> posterior.sample(jax.random.key(1), 100, [0.5]).shape
        (100, 1)

    References:
        Papamakarios, Murray, *Fast epsilon-free Inference of Simulation Models with Bayesian
            Conditional Density Estimation*, 2016, arXiv:1605.06376.
        Deistler, Goncalves, Macke, *Truncated Proposals for Scalable and Hassle-Free
            Simulation-Based Inference*, 2022, arXiv:2210.04815.
    """
    prior = as_prior(prior)
    check_whole("fit", num_simulations=num_simulations, rounds=rounds)
    if rounds > 1 and observation is None:
        raise ValueError(
            f"fit: rounds={rounds} aim at one observation, and none was given: pass observation=,"
            " or leave rounds at 1 for an amortized posterior"
        )
    per_round = -(-num_simulations // rounds)
    theta: list[np.ndarray] = []
    x: list[np.ndarray] = []
    posterior = None
    for round_key in split(key, rounds):
        propose_key, simulator_key, fit_key = jax.random.split(round_key, 3)
        if posterior is None:
            proposed = prior.sample(propose_key, per_round)
        else:
            proposed = _truncated(propose_key, prior, posterior, per_round)
        pairs = run_simulator(simulator_key, proposed, simulator, max_invalid, progress)
        theta, x = [*theta, pairs[0]], [*x, pairs[1]]
        posterior = fit_simulations(
            fit_key,
            prior,
            np.concatenate(theta),
            np.concatenate(x),
            observation=observation,
            estimator=estimator,
            embed=embed,
            progress=progress,
            **training,
        )
    assert posterior is not None  # rounds >= 1
    return posterior._replace(rounds=rounds)


def _truncated(key, prior: Prior, posterior: Posterior, n: int) -> np.ndarray:
    """n draws of the prior, where the posterior's density is above that of 1 - 1e-4 of its draws.

    By rejection; where less than 1 draw in 100 passes, by resampling draws of the posterior itself
    with weights prior / posterior, n of 50 n.
    """
    level_key, first_key, more_key, draw_key, choose_key = jax.random.split(key, 5)
    draws = posterior.sample(level_key, 10_000)
    level = np.quantile(np.asarray(posterior.log_prob(draws)), _EPSILON)

    def passed(key):
        theta = prior.sample(key, 10_000)
        return theta[np.asarray(posterior.log_prob(theta)) >= level]

    kept = passed(first_key)
    if len(kept) >= 100:
        while len(kept) < n:
            more_key, next_key = jax.random.split(more_key)
            kept = np.concatenate([kept, passed(next_key)])
        return kept[:n]
    candidates = np.asarray(posterior.sample(draw_key, 50 * n))
    log_q = np.asarray(posterior.log_prob(candidates))
    log_weight = np.where(log_q >= level, prior.log_prob(candidates) - log_q, -np.inf)
    # one of each 50, so that no candidate is taken for two groups
    noise = np.asarray(jax.random.gumbel(choose_key, (n, 50)))
    best = (log_weight.reshape(n, 50) + noise).argmax(1)
    return candidates.reshape(n, 50, -1)[np.arange(n), best]


def fit_simulations(
    key: Key,
    prior: Any,
    theta: Any,
    x: Any,
    *,
    observation: Any = None,
    estimator: Callable[[int, nn.Module | None], Estimator] | None = None,
    embed: nn.Module | None = None,
    steps: int = 4000,
    batch: int = 256,
    learning_rate: float = 2e-3,
    patience: int = 20,
    progress: bool = True,
) -> Posterior:
    """The posterior from simulations that are there already.

    A tenth of the pairs is held out. The loss on them is looked at 80 times; the params where it
    was lowest are kept, and training ends where it has not fallen for `patience` looks.

    Args:
        key: Of the network, the split, the batches and the loss.
        prior: What theta was drawn from; see `as_prior`.
        theta: The parameters [n, d].
        x: What was simulated [n, *event], finite.
        observation: The default observation of the posterior, [*event].
        estimator: See `fit`.
        embed: See `fit`.
        steps: Updates at most.
        batch: Pairs of an update.
        learning_rate: Of Adam at first; it falls to 0 by a cosine.
        patience: Looks without a lower loss until training ends.
        progress: Whether to show a progress bar.

    Returns:
        The posterior.

    Raises:
        ValueError: For arrays that do not fit each other or the prior, fewer than 20 pairs, NaN, x
            that never varies, and an observation of another shape.

    Examples:
        >>> import jax
        >>> from jflow.apps import sbi
        >>> theta = jax.random.uniform(jax.random.key(0), (200, 1))
        >>> options = {"steps": 5, "progress": False}
        >>> prior = sbi.box_uniform([0.0], [1.0])
        >>> posterior = sbi.fit_simulations(jax.random.key(1), prior, theta, theta**2, **options)
        >>> float(posterior.log_prob([2.0], [0.25]))  # outside of the prior's support
        -inf
    """
    prior = as_prior(prior)
    theta, x = np.asarray(theta, np.float32), np.asarray(x, np.float32)
    x = x[:, None] if x.ndim == 1 else x
    d = len(prior.low)
    if theta.ndim != 2 or theta.shape[1] != d or x.ndim == 0 or len(x) != len(theta):
        raise ValueError(
            f"fit_simulations: expected theta [n, {d}], as the prior is, and x [n, ...], got"
            f" {list(theta.shape)} and {list(x.shape)}"
        )
    if len(theta) < 20:
        raise ValueError(f"fit_simulations: expected at least 20 pairs, got {len(theta)}")
    if not (np.isfinite(theta).all() and np.isfinite(x).all()):
        raise ValueError("fit_simulations: theta or x hold NaN or infinities; leave those rows out")
    if (x == x[:1]).all():
        raise ValueError(
            f"fit_simulations: all {len(x)} simulations are the same, and say nothing of theta:"
            " does the simulator read it?"
        )
    outside = ((theta < prior.low) | (theta > prior.high)).any(1)
    if outside.any():
        raise ValueError(
            f"fit_simulations: {int(outside.sum())} of {len(theta)} rows of theta lie outside of"
            f" the prior's support, such as {theta[outside][0].tolist()}"
        )
    flow, loss = (npe() if estimator is None else estimator)(d, embed)
    split_key, init_key, state_key, eval_key, seed_key = split(key, 5)

    u = np.asarray(jax.jit(functools.partial(to_real, prior.low, prior.high))(theta)[0])
    of_theta, of_x = location_and_scale(u), location_and_scale(x)
    z = (u - of_theta["location"]) / of_theta["scale"]
    c = encode_x(of_x, x, np)
    order = np.asarray(jax.random.permutation(split_key, len(z)))
    held = max(len(z) // 10, 1)
    rows = {"x": z[order[held:]], "cond": c[order[held:]]}
    valid = {"x": z[order[:held]][:5000], "cond": c[order[:held]][:5000]}

    batch = min(batch, len(rows["x"]))
    params = jax.jit(flow.init)(init_key, *(rows[name][:1000] for name in ("x", "cond")))
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule))
    state = train.init_state(params, optimizer, state_key, ema=0.99)
    judge = jax.jit(lambda params, key, batch: loss(params, key, batch)[0])
    done = train.fit(
        state,
        train.make_step(loss, optimizer, ema=0.99),
        data.batches(rows, batch, seed=int(jax.random.randint(seed_key, (), 0, 2**31 - 1))),
        steps=steps,
        evaluate=lambda state: {
            "held_out": float(judge(state.ema, jax.random.clone(eval_key), valid))
        },
        eval_every=max(1, steps // 80),
        log_every=max(1, steps // 80),
        monitor="held_out",
        patience=patience,
        skip_nonfinite=True,
        progress=progress,
    )
    if done.best is None:
        raise ValueError(
            "fit_simulations: the loss on held-out simulations was never finite: lower"
            f" learning_rate={learning_rate}"
        )
    params = {"flow": done.best.ema, "theta": of_theta, "x": of_x}
    some = rows["cond"][: 2 * _NEIGHBORS]
    return make_posterior(prior, flow, params, some, observation, 1, done.history)
