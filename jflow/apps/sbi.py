"""From a simulator to a posterior: simulation-based inference with flows.

A prior and a simulator go in, a posterior comes out, for one observation or for all of them:

    posterior = sbi.fit(key, prior, simulator, num_simulations=10_000)
    theta = posterior.sample(key, 1000, observation)

Parameters theta are vectors [n, d]; what is simulated, x [n, *event], has any shape. `calibration`
says whether the posterior can be trusted, before anything is observed.
"""

import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from jax.interpreters.partial_eval import dce_jaxpr
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist
from tqdm import tqdm

from jflow import data, distributions, flows, losses, metrics, nets, train
from jflow._core.checks import check_key, check_whole, described
from jflow._core.files import expand, write_atomically
from jflow.solvers import Method
from jflow.types import Array, Distribution, Flow, Key, Loss, Params

__all__ = [
    "Calibration",
    "Estimator",
    "Posterior",
    "Prior",
    "as_prior",
    "box_uniform",
    "calibration",
    "fit",
    "fit_simulations",
    "fmpe",
    "load",
    "npe",
    "pairplot",
    "plot_calibration",
    "save",
    "simulate",
    "to_arviz",
]

_CHUNK = 1000  # simulations of one call
_STATISTICS = 5000  # rows that medians are taken of
_NEIGHBORS = 1000  # simulations that an observation is compared with
_EPSILON = 1e-4  # the mass that a truncated proposal leaves out


# ---- priors


class Prior(NamedTuple):
    """A prior on vectors of parameters, with its support, a box.

    Attributes:
        sample: (key, n) -> numpy [n, d], float32.
        log_prob: (numpy theta [n, d]) -> numpy [n], nats; -inf outside of the support.
        low: The lower ends of the support [d], -inf where there is none.
        high: The upper ends of the support [d], inf where there is none.
    """

    sample: Callable[[Key, int], np.ndarray]
    log_prob: Callable[[np.ndarray], np.ndarray]
    low: np.ndarray
    high: np.ndarray


def box_uniform(low: ArrayLike, high: ArrayLike) -> Prior:
    """The uniform prior on a box.

    Args:
        low: The lower ends [d].
        high: The upper ends [d].

    Returns:
        The prior.

    Raises:
        ValueError: For ends of unequal or no length, and where low is not below high.

    Examples:
        >>> import jax
        >>> from jflow.apps import sbi
        >>> prior = sbi.box_uniform([0.0, -1.0], [10.0, 1.0])
        >>> prior.sample(jax.random.key(0), 3).shape
        (3, 2)
    """
    first, last = np.asarray(low, np.float32), np.asarray(high, np.float32)
    if first.ndim != 1 or first.shape != last.shape or not first.size or not (first < last).all():
        raise ValueError(
            f"box_uniform: expected low [d] and high [d] with low < high, got {first.tolist()} and"
            f" {last.tolist()}"
        )
    if not (np.isfinite(first).all() and np.isfinite(last).all()):
        raise ValueError("box_uniform: expected finite ends; a prior on the reals is a normal")
    density = -float(np.log(last - first).sum())

    def sample(key, n):
        return np.asarray(jax.random.uniform(key, (n, len(first)), minval=first, maxval=last))

    def log_prob(theta):
        inside = ((theta >= first) & (theta <= last)).all(-1)
        return np.where(inside, density, -np.inf)

    return Prior(sample, log_prob, first, last)


def as_prior(
    distribution: Any,
    *,
    params: Params | None = None,
    support: tuple[ArrayLike, ArrayLike] | None = None,
) -> Prior:
    """A prior from a distribution of this library or of another, or from two functions.

    `fit` does this by itself; call it for params or a support. Where the support is not said, it is
    found: along each parameter, through draws of the prior, log_prob is searched for where it
    becomes -inf, up to 10^6 standard deviations away.

    Args:
        distribution: A `Prior`; a `Distribution` or `Flow` of jflow on [d]; a distribution of
            NumPyro (of event shape [d], or of independent numbers in its batch shape [d]); a frozen
            distribution of scipy.stats; a pair of functions (sample(key, n) -> [n, d],
            log_prob(theta [n, d]) -> [n]); or a list of such, one a parameter or group, which are
            independent.
        params: Of a jflow distribution that has any.
        support: The ends (low [d], high [d]) of the box that holds theta, -inf and inf where there
            is none.

    Returns:
        The prior.

    Raises:
        TypeError: For what is none of these.
        ValueError: For draws that are not vectors, a log_prob of another shape, and a support that
            is not a box.

    Examples:
        >>> import scipy.stats
        >>> from jflow.apps import sbi
        >>> prior = sbi.as_prior([scipy.stats.uniform(2.0, 3.0), scipy.stats.norm()])
        >>> prior.low.tolist(), prior.high.tolist()
        ([2.0, -inf], [5.0, inf])
    """
    if isinstance(distribution, Prior):
        return distribution
    if isinstance(distribution, list):
        return _independent([as_prior(part) for part in distribution])
    sample, log_prob = _prior_functions(distribution, params)

    def draw(key, n):
        theta = np.asarray(sample(key, n), np.float32)
        return theta[:, None] if theta.ndim == 1 else theta

    draws = draw(jax.random.key(0), 256)
    if draws.ndim != 2 or len(draws) != 256:
        raise ValueError(
            f"the prior: expected draws of vectors, [256, d] for 256 of them, got"
            f" {list(draws.shape)}; flatten theta, and unflatten it in the simulator"
        )
    flat = np.ndim(sample(jax.random.key(0), 2)) == 1

    def density(theta):
        value = np.asarray(log_prob(theta[:, 0] if flat else theta), np.float64)
        value = value.sum(-1) if value.shape == theta.shape and not flat else value
        if value.shape != theta.shape[:1]:
            raise ValueError(
                f"the prior: expected log_prob [n] for theta [n, d], got {list(value.shape)} for"
                f" {list(theta.shape)}"
            )
        return np.where(np.isnan(value), -np.inf, value)

    if not (np.isfinite(draws).all() and np.isfinite(density(draws)).all()):
        raise ValueError(
            "the prior: some of its own draws are not finite or have no finite log_prob"
        )
    if support is None:
        low, high = _support_of(density, draws)
    else:
        low, high = (np.array(np.broadcast_to(e, draws.shape[1:]), np.float32) for e in support)
        if not ((low < high).all() and (draws >= low).all() and (draws <= high).all()):
            raise ValueError(
                f"the prior: its draws lie outside of the support from {low.tolist()} to"
                f" {high.tolist()}"
            )

    def within(theta):
        inside = ((theta >= low) & (theta <= high)).all(-1)
        return np.where(inside, density(theta), -np.inf)

    return Prior(draw, within, low, high)


def _prior_functions(distribution, params):
    """(sample(key, n), log_prob(theta)) of what people have."""
    if isinstance(distribution, Distribution | Flow):
        params = {} if params is None else params
        log_prob = jax.jit(distribution.log_prob)
        return (
            lambda key, n: distribution.sample(params, key, n),
            lambda theta: log_prob(params, jnp.asarray(theta, jnp.float32)),
        )
    if isinstance(distribution, tuple) and len(distribution) == 2:
        return distribution
    if hasattr(distribution, "rvs") and hasattr(distribution, "logpdf"):
        shape = () if hasattr(distribution, "dim") else np.shape(distribution.mean())

        def rvs(key, n):
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            return distribution.rvs(size=(n, *shape), random_state=rng)

        return rvs, distribution.logpdf
    if hasattr(distribution, "support") and hasattr(distribution, "event_shape"):

        def density(theta):
            theta = jnp.asarray(theta, jnp.float32)
            inside = jnp.reshape(distribution.support(theta), (len(theta), -1)).all(1)
            rows = jnp.reshape(inside, (-1,) + (1,) * (theta.ndim - 1))
            known = distribution.sample(jax.random.key(0), (1,))
            value = distribution.log_prob(jnp.where(rows, theta, known))
            return jnp.where(inside, jnp.reshape(value, (len(theta), -1)).sum(1), -jnp.inf)

        return (lambda key, n: distribution.sample(key, (n,))), density
    raise TypeError(
        "the prior: expected a distribution of jflow, NumPyro or scipy.stats, a pair (sample(key,"
        f" n), log_prob(theta)), or a list of them, got {described(distribution)}"
    )


def _independent(parts: list[Prior]) -> Prior:
    ends = np.cumsum([len(part.low) for part in parts])[:-1]

    def sample(key, n):
        keys = jax.random.split(key, len(parts))
        return np.concatenate([p.sample(k, n) for p, k in zip(parts, keys, strict=True)], axis=1)

    def log_prob(theta):
        columns = np.split(theta, ends, axis=1)
        return sum(part.log_prob(column) for part, column in zip(parts, columns, strict=True))

    low, high = (np.concatenate([getattr(p, end) for p in parts]) for end in ("low", "high"))
    return Prior(sample, log_prob, low, high)


def _support_of(log_prob, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the box where log_prob is above -inf, by bisection from four of the draws."""
    n, d = 4, draws.shape[1]
    spread = np.maximum(draws.std(0), 1e-6 * (1 + np.abs(draws).max(0))).astype(np.float64)
    start = np.broadcast_to(draws[:n, None, None].astype(np.float64), (n, d, 2, d))
    own = np.arange(d)
    inside = np.repeat(draws[:n, :, None].astype(np.float64), 2, axis=2)  # [n, d, side]
    outside = inside + 1e6 * spread[:, None] * np.array([-1.0, 1.0])

    def finite(values):
        theta = start.copy()
        theta[:, own, :, own] = np.moveaxis(values, 1, 0)
        return np.isfinite(log_prob(theta.reshape(-1, d))).reshape(values.shape)

    endless = finite(outside)
    for _ in range(100):
        middle = (inside + outside) / 2
        fine = finite(middle)
        inside, outside = np.where(fine, middle, inside), np.where(fine, outside, middle)
    rounded = inside.astype(np.float32)
    inward = np.nextafter(rounded, draws[:n, :, None])
    ends = np.where(finite(rounded.astype(np.float64)), rounded, inward)
    ends = np.where(endless, np.array([-np.inf, np.inf], np.float32), ends)
    same = np.isclose(ends, ends[:1], rtol=1e-4, atol=1e-4 * spread[:, None]).all()
    if not same:
        raise ValueError(
            "the prior: its support is not a box, since the ends of a parameter differ from draw to"
            " draw; give as_prior(..., support=(low, high)) a box that holds it, or let the"
            " simulator map from a box"
        )
    return ends[..., 0].max(0), ends[..., 1].min(0)


# ---- coordinates: from the support to the reals, and numbers of order one


def _to_real(low, high, theta) -> tuple[Array, Array]:
    """(u [b, d], log |du / dtheta| [b]) of theta inside the support.

    On an interval u is the normal quantile of where theta lies in it, so that a uniform prior
    becomes a standard normal; on a half line u is a log.
    """
    low, high = low[None], high[None]
    box, below, above = _kinds(low, high)
    width = np.where(box, high - low, 1.0).astype(np.float32)
    from_low = jnp.where(box | below, theta - np.where(box | below, low, 0), 1.0)
    from_high = jnp.where(box | above, np.where(box | above, high, 0) - theta, 1.0)
    share = jnp.clip(jnp.minimum(from_low, from_high) / width, 1e-30, 0.5)
    side = jnp.where(from_low < from_high, 1.0, -1.0)
    quantile = jax.scipy.special.ndtri(share)
    near = jnp.maximum(jnp.where(below, from_low, from_high), 1e-30)
    u = jnp.where(below, jnp.log(near), jnp.where(above, -jnp.log(near), theta))
    u = jnp.where(box, side * quantile, u)
    log_slope = jnp.where(below | above, -jnp.log(near), 0.0)
    log_slope = jnp.where(
        box, -jnp.log(width) + 0.5 * (quantile**2 + math.log(2 * math.pi)), log_slope
    )
    return u, log_slope.sum(-1)


def _from_real(low, high, u) -> Array:
    """theta of u, the inverse of `_to_real`."""
    low, high = low[None], high[None]
    box, below, above = _kinds(low, high)
    width = np.where(box, high - low, 1.0).astype(np.float32)
    first, last = np.where(box | below, low, 0.0), np.where(box | above, high, 0.0)
    share = width * jax.scipy.special.ndtr(-jnp.abs(u))
    theta = jnp.where(u < 0, first + share, last - share)
    apart = jnp.exp(jnp.where(below, u, jnp.where(above, -u, 0.0)))
    half = jnp.where(below, first + apart, last - apart)
    theta = jnp.where(box, theta, jnp.where(below | above, half, u))
    return jnp.clip(theta, low, high)


def _kinds(low, high):
    finite = np.isfinite(low), np.isfinite(high)
    return finite[0] & finite[1], finite[0] & ~finite[1], finite[1] & ~finite[0]


def _location_and_scale(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Median, and interquartile range over that of a normal, of each number; rows [n, *event].

    Where the middle half does not vary the standard deviation counts, and 1 where nothing varies.
    """
    rows = rows[:_STATISTICS].astype(np.float64)
    first, middle, last = np.quantile(rows, [0.25, 0.5, 0.75], axis=0)
    scale, spread = (last - first) / 1.349, rows.std(0)
    scale = np.where(scale > 1e-6 * spread, scale, spread)
    return {
        "location": middle.astype(np.float32),
        "scale": np.where(scale > 0, scale, 1.0).astype(np.float32),
    }


def _encode_x(scaling, x, numpy=jnp) -> Any:
    """x in robust standard deviations, and in their logs beyond a few of them."""
    return numpy.arcsinh((x - scaling["location"][None]) / scaling["scale"][None])


# ---- estimators


class Estimator(NamedTuple):
    """What learns a posterior: a conditional flow and the loss that trains it.

    A function (d, embed) -> Estimator is what `fit` takes: d is the number of parameters, embed
    what was passed to `fit`. Parameters reach the flow as numbers of order one on the reals, and
    the condition is what was simulated, in robust standard deviations, [b, *event].

    Attributes:
        flow: A conditional flow on [d].
        loss: The loss of its params, on batches {'x': parameters, 'cond': what was simulated}.
    """

    flow: Flow
    loss: Loss


def npe(
    *,
    depth: int = 5,
    hidden: Sequence[int] = (128, 128),
    bins: int = 8,
) -> Callable[[int, nn.Module | None], Estimator]:
    """Neural posterior estimation: a neural spline flow of the parameters, by maximum likelihood.

    Also known as: NPE, SNPE, neural posterior estimation, amortized posterior.

        minimize the mean of -log q(theta | x) over simulated pairs,

    whose minimum over all q is the posterior. Splines of each parameter are conditioned on the
    parameters before it and on x (`flows.neural_spline_autoregressive`).

    Args:
        depth: The number of layers.
        hidden: The widths of the network of each layer.
        bins: Of the splines.

    Returns:
        A function (d, embed) -> `Estimator`.

    Examples:
        >>> from jflow.apps import sbi
        >>> estimator = sbi.npe(depth=2, hidden=(16,))(3, None)
        >>> type(estimator.flow).__name__
        'Flow'

    References:
        Papamakarios, Murray, *Fast epsilon-free Inference of Simulation Models with Bayesian
            Conditional Density Estimation*, 2016, arXiv:1605.06376.
    """

    def make(d, embed):
        flow = flows.neural_spline_autoregressive(
            (d,),
            depth=depth,
            hidden=tuple(hidden),
            bins=bins,
            embed=_Flat() if embed is None else embed,
            standardize=False,
        )
        return Estimator(flow, losses.nll(flow))

    return make


def fmpe(
    *,
    hidden: Sequence[int] = (128, 128, 128),
    method: Method | int | None = None,
) -> Callable[[int, nn.Module | None], Estimator]:
    """Flow matching posterior estimation: a continuous flow of the parameters, by flow matching.

    Also known as: FMPE, flow matching posterior estimation.

    A velocity network of (theta_t, t, x) regresses on the straight line from noise to parameters
    (`losses.flow_matching`); draws and densities are solutions of its ODE (`flows.cnf`). Training
    steps are cheap and the network is free in its form; draws and densities are slower than those
    of `npe`.

    Args:
        hidden: The widths of the velocity network.
        method: How the ODE is solved: a `solvers.Method` or a number of steps; None is adaptive.

    Returns:
        A function (d, embed) -> `Estimator`.

    Examples:
        >>> from jflow.apps import sbi
        >>> estimator = sbi.fmpe(hidden=(16,), method=10)(3, None)
        >>> type(estimator.flow).__name__
        'Flow'

    References:
        Wildberger, Dax, Buchholz, Green, Macke, Schoelkopf, *Flow Matching for Scalable
            Simulation-Based Inference*, 2023, arXiv:2305.17161.
    """

    def make(d, embed):
        net = nets.TimeMLP(
            hidden=tuple(hidden), time_scale=10.0, embed=_Flat() if embed is None else embed
        )
        velocity = nets.velocity(net)
        flow = flows.cnf(velocity, distributions.normal((d,)), method=method)
        matching = losses.flow_matching(velocity)

        def loss(params, key, batch, frozen=None):
            return matching(params["velocity"], key, batch, frozen)

        return Estimator(flow, loss)

    return make


class _Flat(nn.Module):
    """A condition [b, *event] as vectors [b, k]."""

    @nn.compact
    def __call__(self, x):
        return x.reshape(x.shape[0], -1)


# ---- simulations


def simulate(
    key: Key,
    prior: Any,
    simulator: Callable[[Key, Any], Any],
    num_simulations: int,
    *,
    max_invalid: float = 0.5,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Parameters from the prior, and what the simulator makes of them.

    A simulator that JAX can trace and that reads its key is compiled; any other is called with
    numpy arrays, `np.random.default_rng(np.asarray(jax.random.key_data(key)))` makes a generator of
    numpy's there. Rows of x that hold NaN or infinities are left out with a warning; the posterior
    given a valid observation is the same without them.

    Args:
        key: Of the draws.
        prior: What `as_prior` takes.
        simulator: (key, theta [n, d]) -> x [n, *event].
        num_simulations: How many.
        max_invalid: The share of invalid rows above which it is an error.
        progress: Whether to show a progress bar.

    Returns:
        (theta [m, d], x [m, *event]) in float32, m the number of valid rows.

    Raises:
        ValueError: For a simulator that fails on draws of the prior or returns other shapes, and
            for too many invalid rows, with the theta of one.

    Examples:
        >>> import jax
        >>> from jflow.apps import sbi
        >>> def simulator(key, theta):
        ...     return theta + 0.1 * jax.random.normal(key, theta.shape)
        >>> prior = sbi.box_uniform([0.0, 0.0], [1.0, 1.0])
        >>> theta, x = sbi.simulate(jax.random.key(0), prior, simulator, 100, progress=False)
        >>> theta.shape, x.shape
        ((100, 2), (100, 2))
    """
    prior_key, simulator_key = _split(key, 2)
    check_whole("simulate", num_simulations=num_simulations)
    theta = as_prior(prior).sample(prior_key, num_simulations)
    return _simulate(simulator_key, theta, simulator, max_invalid, progress)


def _split(key: Key, n: int):
    check_key("sbi", key)
    return jax.random.split(key, n)


def _simulate(key, theta, simulator, max_invalid, progress) -> tuple[np.ndarray, np.ndarray]:
    n = len(theta)
    size = min(n, _CHUNK)
    run = _traced(simulator, theta[:size])
    starts = range(0, n, size)
    bar = tqdm(
        total=n, unit="simulation", file=sys.stderr, disable=not progress, desc="simulations"
    )
    parts = []
    with bar:
        for part_key, start in zip(jax.random.split(key, len(starts)), starts, strict=True):
            rows = theta[start : start + size]
            padded = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
            parts.append(_called(run, part_key, padded)[: len(rows)])
            bar.update(len(rows))
    x = np.concatenate(parts)
    x = x[:, None] if x.ndim == 1 else x
    valid = np.isfinite(x.reshape(n, -1)).all(1)
    bad = n - int(valid.sum())
    if bad:
        said = f"{bad} of {n} simulations ({bad / n:.1%}) hold NaN or infinities"
        example = theta[~valid][0].tolist()
        if bad > max_invalid * n:
            raise ValueError(
                f"{said}, as at theta = {example}: narrow the prior to where the simulator runs,"
                f" mend the simulator, or raise max_invalid={max_invalid}"
            )
        warnings.warn(f"{said}, as at theta = {example}; they are left out", stacklevel=3)
    return theta[valid], x[valid].astype(np.float32)


def _traced(simulator, theta):
    """The simulator, compiled where JAX can trace it and its result depends on the key.

    A simulator with numpy's random numbers traces too, but would give the same noise at each call.
    """
    try:
        jaxpr = jax.make_jaxpr(simulator)(jax.random.key(0), jnp.asarray(theta)).jaxpr
    except Exception:  # whatever a simulator of somebody's does with a tracer
        return simulator
    reads = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]
    return jax.jit(simulator) if reads[0] else simulator


def _called(simulator, key, theta: np.ndarray) -> np.ndarray:
    form = f"theta [{len(theta)}, {theta.shape[1]}]"
    try:
        x = simulator(key, theta)
    except Exception as error:
        raise ValueError(
            f"the simulator failed on draws of the prior, {form}: {type(error).__name__}: {error};"
            " it is called as simulator(key, theta), with a parameter vector in each row"
        ) from error
    x = np.asarray(x)
    if x.ndim == 0 or len(x) != len(theta) or not np.issubdtype(x.dtype, np.number):
        raise ValueError(
            f"the simulator: expected numbers [{len(theta)}, ...], a row for each of {form}, got"
            f" {x.dtype} {list(x.shape)}; jax.vmap makes a simulator of rows from one of one theta"
        )
    return x


# ---- posteriors


class Posterior(NamedTuple):
    """A posterior of a simulator's parameters, for any observation or for one.

    Its functions check the observation and warn where it lies outside of everything simulated,
    which an observation of the model does in 1 case of 1000. As functions of theta they may be
    called under jit.

    Attributes:
        sample: (key, n, observation=None) -> theta [n, d], inside the support of the prior; for
            observations [m, *event] theta [m, n, d].
        log_prob: (theta, observation=None) -> nats; theta [d] gives one number, [n, d] gives [n].
            It is normalized on the support, and -inf outside. With observations [m, *event] the
            first axis of theta is m.
        map: (observation=None) -> theta [d] of the highest density, by gradient ascent from the
            best of 1000 draws of a fixed key.
        at: (observation=None) -> a `Distribution` whose params are `params`: what NumPyro's adapter
            (`convert.to_numpyro`) and the functions of this library take.
        params: The flow's params, and what scales parameters and simulations.
        prior: The prior.
        simulated: Some of what was simulated, as the flow sees it, which observations are compared
            with.
        observation: The default of the functions above, or None.
        rounds: How many there were; with more than 1 the posterior holds at `observation` alone.
        history: Rows of metrics of the last training.
    """

    sample: Callable[..., Array]
    log_prob: Callable[..., Array]
    map: Callable[..., Array]
    at: Callable[..., Distribution]
    params: Params
    prior: Prior
    simulated: np.ndarray
    observation: np.ndarray | None
    rounds: int
    history: list


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
    for round_key in _split(key, rounds):
        propose_key, simulator_key, fit_key = jax.random.split(round_key, 3)
        if posterior is None:
            proposed = prior.sample(propose_key, per_round)
        else:
            proposed = _truncated(propose_key, prior, posterior, per_round)
        pairs = _simulate(simulator_key, proposed, simulator, max_invalid, progress)
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
        ValueError: For arrays that do not fit each other or the prior, fewer than 20 pairs, NaN,
            and an observation of another shape.

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
    outside = ((theta < prior.low) | (theta > prior.high)).any(1)
    if outside.any():
        raise ValueError(
            f"fit_simulations: {int(outside.sum())} of {len(theta)} rows of theta lie outside of"
            f" the prior's support, such as {theta[outside][0].tolist()}"
        )
    flow, loss = (npe() if estimator is None else estimator)(d, embed)
    split_key, init_key, state_key, eval_key, seed_key = _split(key, 5)

    u = np.asarray(jax.jit(functools.partial(_to_real, prior.low, prior.high))(theta)[0])
    of_theta, of_x = _location_and_scale(u), _location_and_scale(x)
    z = (u - of_theta["location"]) / of_theta["scale"]
    c = _encode_x(of_x, x, np)
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
    return _posterior(prior, flow, params, some, observation, 1, done.history)


def _posterior(prior, flow, params, simulated, observation, rounds, history) -> Posterior:
    params = jax.tree.map(jnp.asarray, params)
    low, high = prior.low, prior.high
    d, event = len(low), params["x"]["location"].shape

    def log_prob_rows(params, theta, x):
        """theta [n, d], x [n, *event] or [1, *event] -> [n]."""
        inside = ((theta >= low[None]) & (theta <= high[None])).all(-1)
        middle = _middle(low, high)[None]
        u, log_slope = _to_real(low, high, jnp.where(inside[:, None], theta, middle))
        location, scale = (params["theta"][name][None] for name in ("location", "scale"))
        z = (u - location) / scale
        value = flow.log_prob(params["flow"], z, _encode_x(params["x"], x))
        return jnp.where(inside, value + log_slope - jnp.log(scale).sum(), -jnp.inf)

    def sample_rows(params, key, n, x):
        cond = _encode_x(params["x"], x)
        z = flow.sample(params["flow"], key, n, cond)
        location, scale = (params["theta"][name][None] for name in ("location", "scale"))
        return _from_real(low, high, z * scale + location)

    @functools.partial(jax.jit, static_argnums=2)
    def sample_all(params, key, n, x):
        keys = jax.random.split(key, len(x))
        return jax.lax.map(lambda a: sample_rows(params, a[0], n, a[1][None]), (keys, x))

    @jax.jit
    def log_prob_all(params, theta, x):
        return jax.lax.map(lambda a: log_prob_rows(params, a[0], a[1][None]), (theta, x))

    log_prob_paired = jax.jit(log_prob_rows)

    @jax.jit
    def ascend(params, x):
        """theta [d] of the highest density, from the 10 best of 1000 draws by Adam in the reals."""
        draws = sample_rows(params, jax.random.key(0), 1000, x)
        values = log_prob_rows(params, draws, x)
        best = draws[jax.lax.top_k(values, 10)[1]]
        start = _to_real(low, high, best)[0]
        optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 200))
        scale = params["theta"]["scale"][None]

        def density(w):
            return log_prob_rows(params, _from_real(low, high, w * scale), x)

        def step(carry, _):
            w, opt = carry
            value, slope = density(w), jax.grad(lambda w: -density(w).sum())(w)
            slope = jnp.where(jnp.isfinite(slope), slope, 0.0)
            updates, opt = optimizer.update(slope, opt)
            return (optax.apply_updates(w, updates), opt), (w, value)

        w = start / scale
        _, (path, values) = jax.lax.scan(step, (w, optimizer.init(w)), length=200)
        values = jnp.where(jnp.isnan(values), -jnp.inf, values).ravel()
        return _from_real(low, high, path.reshape(-1, d)[values.argmax()][None] * scale)[0]

    scaling = jax.tree.map(np.asarray, params["x"])
    warn_if_far = _compared(simulated)

    def observed(given):
        """(observations [m, *event], whether one was given alone)."""
        given = observation if given is None else given
        if given is None:
            raise ValueError("the posterior is amortized: pass the observation")
        x = np.asarray(given, np.float32)
        x = x[..., None] if x.ndim < len(event) and event == (1,) else x
        if x.shape[-len(event) :] != event or x.ndim > len(event) + 1:
            raise ValueError(
                f"expected an observation of the shape {list(event)} that was simulated, or several"
                f" [m, {', '.join(map(str, event))}], got {list(x.shape)}"
            )
        if not np.isfinite(x).all():
            raise ValueError("the observation holds NaN or infinities")
        alone = x.ndim == len(event)
        x = x[None] if alone else x
        if alone:
            warn_if_far(_encode_x(scaling, x, np))
        return x, alone

    def sample(key, n, observation=None):
        check_key("posterior.sample", key)
        check_whole("posterior.sample", n=n)
        x, alone = observed(observation)
        theta = sample_all(params, key, n, x)
        return theta[0] if alone else theta

    def log_prob(theta, observation=None):
        x, alone = observed(observation)
        theta = jnp.asarray(theta, jnp.float32)
        lead = theta.shape[:-1]
        m = len(x)
        if theta.ndim == 0 or theta.shape[-1] != d or not (alone or lead[:1] == (m,)):
            expected = f"[..., {d}]" if alone else f"[{m}, ..., {d}], an axis of observations first"
            raise ValueError(f"log_prob: expected theta {expected}, got {list(theta.shape)}")
        if alone or len(lead) == 1:
            return log_prob_paired(params, theta.reshape(-1, d), x).reshape(lead)
        return log_prob_all(params, theta.reshape(m, -1, d), x).reshape(lead)

    def highest(observation=None):
        x, alone = observed(observation)
        theta = jnp.stack([ascend(params, row[None]) for row in x])
        return theta[0] if alone else theta

    def at(observation=None):
        x, alone = observed(observation)
        if not alone:
            raise ValueError(f"at: expected one observation {list(event)}, got {len(x)}")

        def init(key, theta, cond=None):
            return params

        def density(params, theta, cond=None, *, key=None):
            return log_prob_rows(params, theta, x)

        def draw(params, key, n, cond=None):
            return sample_rows(params, key, n, x)

        return Distribution(init, density, draw)

    if observation is not None:
        observation = observed(observation)[0][0]
    return Posterior(
        sample, log_prob, highest, at, params, prior, simulated, observation, rounds, list(history)
    )


def _middle(low, high) -> np.ndarray:
    """A theta inside the support."""
    box, below, above = _kinds(low, high)
    ends = np.where(np.isfinite(low), low, 0), np.where(np.isfinite(high), high, 0)
    middle = np.where(box, (ends[0] + ends[1]) / 2, np.where(below, ends[0] + 1, ends[1] - 1))
    return np.where(box | below | above, middle, 0.0).astype(np.float32)


def _compared(simulated) -> Callable[[np.ndarray], None]:
    """Warns of an observation farther from its nearest simulation than other simulations are."""
    rows = np.asarray(simulated).reshape(len(simulated), -1)
    half = len(rows) // 2
    known, others = rows[:half], rows[half:]

    reach = cdist(others, known).min(1).max()

    def warn(x):
        distance = cdist(x.reshape(1, -1), known).min()
        if distance > reach:
            warnings.warn(
                "the observation lies outside of everything simulated, at a distance of"
                f" {distance:.3g} from the nearest simulation, where the farthest of"
                f" {len(others)} other simulations is at {reach:.3g} (in robust standard"
                " deviations, logs beyond a few): the posterior is an extrapolation; look for a"
                " fault in the simulator or the prior",
                stacklevel=4,
            )

    return warn


def save(path: str | Path, posterior: Posterior) -> None:
    """Writes a posterior to one file, which `load` reads.

    Args:
        path: Of the file, which is replaced whole or not at all.
        posterior: What `fit` returned. Functions are not saved: prior, estimator and embedding are
            given to `load` again.

    Examples:
        See `load`.
    """
    content = {
        "params": jax.tree.map(np.asarray, dict(posterior.params)),
        "simulated": posterior.simulated,
        "support": {"low": posterior.prior.low, "high": posterior.prior.high},
        "observation": posterior.observation,
        "rounds": posterior.rounds,
    }
    write_atomically(expand(path), serialization.msgpack_serialize(content))


def load(
    path: str | Path,
    prior: Any,
    *,
    estimator: Callable[[int, nn.Module | None], Estimator] | None = None,
    embed: nn.Module | None = None,
) -> Posterior:
    """A posterior that `save` wrote.

    Functions are not in the file: give the prior, the estimator and the embedding that were fitted.

    Args:
        path: Of the file.
        prior: See `fit`.
        estimator: See `fit`.
        embed: See `fit`.

    Returns:
        The posterior, without its history.

    Raises:
        ValueError: For a file of another form, and a prior, an estimator or an embedding other than
            what was saved.

    Examples:
        >>> import tempfile
        >>> import jax
        >>> from jflow.apps import sbi
        >>> theta, prior = jax.random.uniform(jax.random.key(0), (99, 1)), sbi.box_uniform([0], [1])
        >>> options = {"steps": 1, "progress": False}
        >>> posterior = sbi.fit_simulations(jax.random.key(1), prior, theta, theta, **options)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sbi.save(f"{folder}/posterior", posterior)
        ...     again = sbi.load(f"{folder}/posterior", prior)
        >>> again.log_prob([0.5], [0.5]) == posterior.log_prob([0.5], [0.5])
        Array(True, dtype=bool)
    """
    prior, path = as_prior(prior), expand(path)
    try:
        content = serialization.msgpack_restore(path.read_bytes())
        params, simulated = content["params"], content["simulated"]
        low, high = content["support"]["low"], content["support"]["high"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no posterior that jflow saved") from error
    if not (np.array_equal(low, prior.low) and np.array_equal(high, prior.high)):
        raise ValueError(
            f"{path}: expected the prior that was fitted, with the support {low.tolist()} to"
            f" {high.tolist()}, got {prior.low.tolist()} to {prior.high.tolist()}"
        )
    flow, _ = (npe() if estimator is None else estimator)(len(low), embed)
    z = jax.ShapeDtypeStruct((2, len(low)), jnp.float32)
    x = jax.ShapeDtypeStruct((2, *params["x"]["location"].shape), jnp.float32)
    expected = jax.eval_shape(flow.init, jax.random.key(0), z, x)
    forms = [
        {jax.tree_util.keystr(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(t)}
        for t in (expected, params["flow"])
    ]
    if forms[0] != forms[1]:
        differ = sorted(forms[0].items() ^ forms[1].items())[0][0]
        raise ValueError(
            f"{path} was fitted with another estimator or embedding: params{differ} differ; pass"
            " load the estimator= and embed= that fit was given"
        )
    observation, rounds = content["observation"], content["rounds"]
    return _posterior(prior, flow, params, simulated, observation, rounds, [])


# ---- what people look at


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
    simulate_key, draw_key = _split(key, 2)
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
