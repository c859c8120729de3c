"""Calibration: whether a posterior can be trusted, before anything is observed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jflow import metrics
from jflow.apps.sbi._posterior import Posterior
from jflow.apps.sbi._simulations import simulate, split
from jflow.types import Key


class Calibration(NamedTuple):
    """How well a posterior is calibrated, over fresh simulations.

    Attributes:
        ranks: [n, d], of each true parameter among L draws: `metrics.sbc_ranks`.
        density_ranks: [n], of log q(theta | x) among that of the draws, from the highest.
        tarp_ranks: [n], of distances to random points: `metrics.tarp_ranks`.
        num_draws: L.
        p_values: Of `metrics.uniformity_test` for each set of ranks: 'theta 1' ... 'theta d',
            'density', 'tarp'.
        false_alarm: The chance that an exact posterior has anything in `rejected`, at most.
        rejected: The names whose p is at most false_alarm / (d + 2).
    """

    ranks: np.ndarray
    density_ranks: np.ndarray
    tarp_ranks: np.ndarray
    num_draws: int
    p_values: dict[str, float]
    false_alarm: float
    rejected: tuple[str, ...]


def calibration(
    key: Key,
    posterior: Posterior,
    simulator: Callable[[Key, Any], Any],
    *,
    num_simulations: int = 300,
    num_draws: int = 99,
    false_alarm: float = 0.01,
    progress: bool = True,
) -> Calibration:
    """Tests of whether a posterior is calibrated, on fresh simulations.

    Parameters are drawn from the prior and simulated, and the posterior of each simulation is asked
    where the truth lies: among the draws of each parameter (simulation-based calibration), by the
    posterior's own density (expected coverage) and by distances to random points (TARP). For an
    exact posterior all ranks are uniform. `plot_calibration` draws it.

    Args:
        key: Of simulations and draws.
        posterior: An amortized one, from a single round.
        simulator: See `simulate`.
        num_simulations: How many.
        num_draws: L, the draws of each posterior.
        false_alarm: The chance that an exact posterior is rejected, at most.
        progress: Whether to show a progress bar.

    Returns:
        Ranks, p-values, and what is rejected.

    Raises:
        ValueError: For a posterior whose rounds were aimed at one observation, and a false_alarm
            outside of (0, 1).

    Examples:
        >>> import jax
        >>> from jflow.apps import sbi
        >>> def simulator(key, theta):
        ...     return theta + 0.1 * jax.random.normal(key, theta.shape)
        >>> quick = {"steps": 2, "progress": False, "num_simulations": 100}
        >>> posterior = sbi.fit(jax.random.key(0), sbi.box_uniform([0], [1]), simulator, **quick)
        >>> quick = {"num_simulations": 50, "num_draws": 19, "progress": False}
        >>> found = sbi.calibration(jax.random.key(1), posterior, simulator, **quick)
        >>> found.ranks.shape, sorted(found.p_values)
        ((50, 1), ['density', 'tarp', 'theta 1'])
    """
    if not 0 < false_alarm < 1:
        raise ValueError(f"calibration: expected false_alarm in (0, 1), got {false_alarm}")
    if posterior.rounds > 1:
        raise ValueError(
            f"calibration: the posterior's {posterior.rounds} rounds were aimed at one observation,"
            " and fresh simulations are of others: fit with rounds=1"
        )
    simulate_key, draw_key = split(key, 2)
    theta, x = simulate(
        simulate_key, posterior.prior, simulator, num_simulations, progress=progress
    )
    draws = posterior.sample(draw_key, num_draws, x)
    at_draws, at_truth = posterior.log_prob(draws, x), posterior.log_prob(theta, x)
    ranks = metrics.sbc_ranks(theta, draws)
    density = np.asarray((at_draws > at_truth[:, None]).sum(1))
    tarp = metrics.tarp_ranks(theta, draws)
    named = {f"theta {j + 1}": ranks[:, j] for j in range(ranks.shape[1])}
    named |= {"density": density, "tarp": tarp}
    p = {name: metrics.uniformity_test(r, num_draws)[1] for name, r in named.items()}
    rejected = tuple(name for name, value in p.items() if value <= false_alarm / len(p))
    return Calibration(ranks, density, tarp, num_draws, p, false_alarm, rejected)
