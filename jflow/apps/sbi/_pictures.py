"""What people look at: pictures of draws and of calibrations, and draws for ArviZ."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jflow import metrics
from jflow.apps.sbi._calibration import Calibration


def plot_calibration(found: Calibration) -> Any:
    """A picture of a calibration: histograms of ranks, and coverage over credible levels.

    Args:
        found: What `calibration` returned.

    Returns:
        A matplotlib figure. The gray bands hold 99 of 100 bars, and 99 of 100 points, of an exact
        posterior.

    Raises:
        ImportError: Where matplotlib is not installed.

    Examples:
        >>> import numpy as np
        >>> from jflow.apps import sbi
        >>> ranks = np.arange(100)
        >>> found = sbi.Calibration(ranks[:, None], ranks, ranks, 99, {"theta 1": 1.0}, 0.01, ())
        >>> len(sbi.plot_calibration(found).axes)
        2
    """
    import scipy.stats

    n, d = found.ranks.shape
    figure, axes = _pyplot().subplots(
        1, d + 1, figsize=(2.6 * (d + 1), 2.6), squeeze=False, layout="constrained"
    )
    bins = min(10, found.num_draws + 1)
    band = scipy.stats.binom.ppf([0.005, 0.995], n, 1 / bins)
    for j, axis in enumerate(axes[0, :-1]):
        axis.axhspan(*band, color="0.85")
        axis.hist(found.ranks[:, j], bins=bins, range=(-0.5, found.num_draws + 0.5))
        p = found.p_values.get(f"theta {j + 1}")
        axis.set(title=f"theta {j + 1}" + ("" if p is None else f", p = {p:.2g}"), xlabel="rank")
    levels, axis = np.linspace(0, 1, 51), axes[0, -1]
    band = scipy.stats.binom.ppf([[0.005], [0.995]], n, levels) / n
    axis.fill_between(levels, *band, color="0.85")
    for name, ranks in (("density", found.density_ranks), ("tarp", found.tarp_ranks)):
        axis.plot(levels, metrics.expected_coverage(ranks, found.num_draws, levels), label=name)
    axis.set(title="coverage", xlabel="credible level")
    axis.legend()
    return figure


def pairplot(
    draws: Any, truth: Any = None, *, names: Sequence[str] | None = None, bins: int = 50
) -> Any:
    """Histograms of each parameter and of each pair, with the truth where it is known.

    Also known as: corner plot.

    Args:
        draws: theta [n, d].
        truth: The parameters [d] that are marked, or None.
        names: Of the parameters.
        bins: Along each axis.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: For shapes that do not fit each other.
        ImportError: Where matplotlib is not installed.

    Examples:
        >>> import numpy as np
        >>> from jflow.apps import sbi
        >>> draws = np.random.default_rng(0).normal(size=(500, 2))
        >>> len(sbi.pairplot(draws, truth=[0.0, 0.0], names=["mass", "charge"]).axes)
        4
    """
    draws = np.asarray(draws)
    names = _names("pairplot", draws, names)
    d = len(names)
    if truth is not None and np.shape(truth) != (d,):
        raise ValueError(f"pairplot: expected a truth [{d}], got {list(np.shape(truth))}")
    figure, axes = _pyplot().subplots(
        d, d, figsize=(2.2 * d, 2.2 * d), squeeze=False, sharex="col", layout="constrained"
    )
    for i in range(d):
        for j in range(d):
            axis = axes[i, j]
            if j > i:
                axis.set_axis_off()
            elif i == j:
                axis.hist(draws[:, i], bins=bins)
                axis.set_yticks([])
            else:
                axis.hist2d(draws[:, j], draws[:, i], bins=bins, cmap="Blues")
            if truth is not None and j <= i:
                axis.axvline(truth[j], color="tab:red", linewidth=1)
            if truth is not None and j < i:
                axis.axhline(truth[i], color="tab:red", linewidth=1)
            if i == d - 1:
                axis.set_xlabel(names[j])
            if j == 0 and i > 0:
                axis.set_ylabel(names[i])
    return figure


def to_arviz(draws: Any, *, names: Sequence[str] | None = None, observation: Any = None) -> Any:
    """Draws of a posterior as ArviZ's data, for its summaries and plots.

    Args:
        draws: theta [n, d], or [chains, n, d].
        names: Of the parameters; None has one variable 'theta' of d numbers.
        observation: What was observed, kept beside the draws.

    Returns:
        What `arviz.from_dict` returns.

    Raises:
        ValueError: For shapes that do not fit each other.
        ImportError: Where ArviZ is not installed.

    Examples:
        >>> import numpy as np
        >>> from jflow.apps import sbi
        >>> draws = np.random.default_rng(0).normal(size=(500, 2))
        >>> data = sbi.to_arviz(draws, names=["mass", "charge"])  # doctest: +SKIP
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install arviz") from error
    draws = np.asarray(draws)
    draws = draws[None] if draws.ndim == 2 else draws
    if names is None:
        named = {"theta": draws}
    else:
        named = dict(
            zip(_names("to_arviz", draws[0], names), np.moveaxis(draws, -1, 0), strict=True)
        )
    groups: dict[str, Any] = {"posterior": named}
    if observation is not None:
        groups["observed_data"] = {"x": np.asarray(observation)}
    if int(arviz.__version__.split(".")[0]) >= 1:  # one dict of groups
        return arviz.from_dict(groups)
    return arviz.from_dict(**groups)


def _names(name: str, draws: np.ndarray, names) -> list[str]:
    if draws.ndim != 2 or names is not None and len(names) != draws.shape[1]:
        raise ValueError(
            f"{name}: expected draws [n, d] and d names, got {list(draws.shape)} and"
            f" {names if names is None else list(names)}"
        )
    return [f"theta {j + 1}" for j in range(draws.shape[1])] if names is None else list(names)


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    return pyplot
