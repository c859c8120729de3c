"""Whether a posterior is calibrated, from ranks of true parameters among draws, in numpy."""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from jflow._core.checks import check_whole
from jflow._core.seeds import generator


def sbc_ranks(theta: ArrayLike, draws: ArrayLike) -> Int[np.ndarray, "n d"]:
    """Ranks of true parameters among posterior draws, for simulation-based calibration.

    Also known as: SBC, simulation-based calibration, rank statistics.

        rank[i, j] = number of k with draws[i, k, j] < theta[i, j]

    Where theta[i] was drawn from the prior, x[i] from the simulator at theta[i], and draws[i] from
    the exact posterior given x[i], each column is uniform on 0 .. L. `uniformity_test` tests that.
    A posterior that is too narrow has too many ranks near 0 and L, one that is too wide too few.

    Args:
        theta: The true parameters [n, d].
        draws: L draws for each of them [n, L, d].

    Returns:
        The ranks, 0 to L.

    Raises:
        ValueError: For shapes that do not fit each other, NaN or infinities.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> draws = np.array([[[1.0], [2.0], [3.0]]])
        >>> metrics.sbc_ranks(np.array([[2.5]]), draws)
        array([[2]])

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman, *Validating Bayesian Inference Algorithms with
            Simulation-Based Calibration*, 2018, arXiv:1804.06788.
    """
    theta, draws = _truth_and_draws("sbc_ranks", theta, draws)
    return (draws < theta[:, None]).sum(1)


def tarp_ranks(
    theta: ArrayLike, draws: ArrayLike, references: ArrayLike | None = None, *, seed: int = 0
) -> Int[np.ndarray, " n"]:
    """Ranks of the truth's distance to a random point among those of posterior draws (TARP).

    Also known as: TARP, tests of accuracy with random points.

        rank[i] = number of k with |draws[i, k] - r[i]| < |theta[i] - r[i]|

    For an exact posterior they are uniform on 0 .. L, whatever the points r. Unlike the ranks of
    single parameters they see wrong correlations. Distances are in standard deviations of theta.

    Args:
        theta: The true parameters [n, d].
        draws: L draws for each of them [n, L, d].
        references: The points r [n, d], chosen without looking at theta (they may depend on what
            was observed); None draws them uniformly from the box that holds all of theta.
        seed: Of those points.

    Returns:
        The ranks, 0 to L.

    Raises:
        ValueError: For shapes that do not fit each other, NaN or infinities.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> theta, draws = np.array([[2.0], [9.0]]), np.array([[[1.0], [4.0]], [[7.0], [8.0]]])
        >>> metrics.tarp_ranks(theta, draws, np.zeros((2, 1)))
        array([1, 2])

    References:
        Lemos, Coogan, Hezaveh, Perreault-Levasseur, *Sampling-Based Accuracy Testing of Posterior
            Estimators for General Inference*, 2023, arXiv:2302.03026.
    """
    theta, draws = _truth_and_draws("tarp_ranks", theta, draws)
    if references is None:
        references = generator("tarp", seed).uniform(theta.min(0), theta.max(0), theta.shape)
    references = np.asarray(references, np.float64)
    if references.shape != theta.shape:
        raise ValueError(
            f"tarp_ranks: expected references of the shape {list(theta.shape)} of theta, got"
            f" {list(references.shape)}"
        )
    spread = theta.std(0)
    scale = np.where(spread > 0, spread, 1.0)
    distance = (((theta - references) / scale) ** 2).sum(-1)
    of_draws = (((draws - references[:, None]) / scale) ** 2).sum(-1)
    return (of_draws < distance[:, None]).sum(1)


def expected_coverage(
    ranks: ArrayLike, num_draws: int, levels: ArrayLike
) -> Float[np.ndarray, " levels"]:
    """The share of truths inside credible regions, for regions that are ordered by ranks.

        coverage(a) = share of truths with (rank + 1/2) / (L + 1) <= a

    With ranks of the density, the number of draws at which log q(draw | x) > log q(theta | x), the
    region of level a is the one of highest density; with `tarp_ranks` it is a ball about a random
    point. For an exact posterior the coverage is a, up to the noise of n truths, a standard
    deviation of sqrt(a (1 - a) / n), and up to 1 / (2 (L + 1)). A coverage below a is
    overconfidence: the regions are too small.

    Args:
        ranks: [n], 0 to num_draws.
        num_draws: L, the number of draws for each truth.
        levels: The credible levels, in [0, 1].

    Returns:
        The coverage at each level.

    Raises:
        ValueError: For ranks outside of 0 .. num_draws or levels outside of [0, 1].

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> metrics.expected_coverage(np.arange(10), 9, [0.2, 0.5, 0.9]).tolist()
        [0.2, 0.5, 0.9]

    References:
        Hermans, Delaunoy, Rozet, Wehenkel, Begy, Louppe, *A Trust Crisis in Simulation-Based
            Inference? Your Posterior Approximations Can Be Unfaithful*, 2022, arXiv:2110.06581.
    """
    ranks, levels = _ranks("expected_coverage", ranks, num_draws), np.asarray(levels, np.float64)
    if levels.ndim != 1 or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"expected_coverage: expected levels [k] in [0, 1], got {levels.tolist()}")
    return ((ranks[:, None] + 0.5) / (num_draws + 1) <= levels).mean(0)


def uniformity_test(
    ranks: ArrayLike,
    num_draws: int,
    *,
    bins: int = 10,
    permutations: int = 4999,
    seed: int = 0,
) -> tuple[float, float]:
    """Test of whether ranks are uniform on 0 .. L.

    The statistic is Pearson's, sum over bins (count - expected)^2 / expected. It is compared with
    that of so many sets of uniform ranks rather than with its chi-square limit:

        p = (1 + the simulated statistics that reach the found one) / (1 + permutations),

    so that P(p <= a) <= a exactly for independent uniform ranks: rejecting at p <= 0.01 is a false
    alarm in 1 case of 100.

    Args:
        ranks: [n], 0 to num_draws.
        num_draws: L, the number of draws for each truth.
        bins: Of the ranks, at most num_draws + 1.
        permutations: How many sets of uniform ranks are simulated.
        seed: Of these.

    Returns:
        (statistic, p).

    Raises:
        ValueError: For ranks outside of 0 .. num_draws and for more bins than ranks.

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> metrics.uniformity_test(np.tile(np.arange(100), 3), 99)  # as uniform as can be
        (0.0, 1.0)
        >>> metrics.uniformity_test(np.arange(300) % 50, 99)[1]  # never in the upper half
        0.0002
    """
    ranks = _ranks("uniformity_test", ranks, num_draws)
    check_whole("uniformity_test", bins=bins, permutations=permutations)
    if not 2 <= bins <= num_draws + 1:
        raise ValueError(
            f"uniformity_test: expected 2 to {num_draws + 1} bins for ranks 0 .. {num_draws}, got"
            f" {bins}"
        )
    share = np.bincount(np.arange(num_draws + 1) * bins // (num_draws + 1)) / (num_draws + 1)
    expected = len(ranks) * share

    def statistic(counts):
        return ((counts - expected) ** 2 / expected).sum(-1)

    found = statistic(np.bincount(ranks * bins // (num_draws + 1), minlength=bins))
    rng = generator("uniformity test", seed)
    simulated = statistic(rng.multinomial(len(ranks), share, permutations))
    reached = int((simulated >= found).sum())
    return float(found), (1 + reached) / (1 + permutations)


def _truth_and_draws(name: str, theta, draws) -> tuple[np.ndarray, np.ndarray]:
    theta, draws = np.asarray(theta, np.float64), np.asarray(draws, np.float64)
    fits = theta.ndim == 2 and draws.ndim == 3 and theta.shape == draws[:, 0].shape
    if not fits or theta.size == 0:
        raise ValueError(
            f"{name}: expected theta [n, d] and draws [n, L, d], got {list(theta.shape)} and"
            f" {list(draws.shape)}"
        )
    if not (np.isfinite(theta).all() and np.isfinite(draws).all()):
        raise ValueError(f"{name}: theta or draws hold NaN or infinities; leave those rows out")
    return theta, draws


def _ranks(name: str, ranks, num_draws: int) -> np.ndarray:
    ranks = np.asarray(ranks)
    whole = ranks.ndim == 1 and ranks.size > 0 and np.issubdtype(ranks.dtype, np.integer)
    if not whole or ranks.min() < 0 or ranks.max() > num_draws:
        raise ValueError(
            f"{name}: expected whole ranks [n] from 0 to num_draws={num_draws}, got"
            f" {ranks.dtype} {list(ranks.shape)}"
            + (f" from {ranks.min()} to {ranks.max()}" if ranks.size else "")
        )
    return ranks
