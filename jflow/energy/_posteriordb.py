"""Posteriors of posteriordb with their reference draws, read from its files."""

import io
import itertools
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaln, log_ndtr

from jflow._core.arrays import sum_event
from jflow._core.checks import check_event
from jflow.energy._target import Target, posterior
from jflow.types import Array, Key

__all__ = ["ReferencePosterior", "posteriordb"]

_LOG_2PI = math.log(2 * math.pi)
_LARGE = 20.0  # the log of a population beyond which it counts as this


class ReferencePosterior(NamedTuple):
    """A posterior on unconstrained numbers, with draws of a long run that are taken as the truth.

    Attributes:
        target: The target on [d].
        names: The names of the k quantities.
        constrain: x [n, d] -> the quantities [n, k], such as exp of a log-scale.
        unconstrain: The quantities [n, k] -> x [n, d], the inverse.
        draws: Reference draws of the quantities, numpy [10000, k], ten chains one after another.
    """

    target: Target
    names: tuple[str, ...]
    constrain: Callable[[Array], Array]
    unconstrain: Callable[[Array], Array]
    draws: np.ndarray


def posteriordb(name: str, data_dir: str | Path) -> ReferencePosterior:
    """A posterior of posteriordb: its model, its data, and its reference draws.

    Positive numbers are taken as logs, numbers in an interval as logits, and ordered ones as the
    logs of their gaps; the log-determinant of that is part of the prior.

    | name | d | the model |
    |---|---|---|
    | arK | 7 | an autoregression of order 5 |
    | eight_schools | 10 | a hierarchy of means, in its standardized effects |
    | eight_schools_centered | 10 | the same in the effects themselves: a funnel |
    | garch | 4 | a changing variance, under flat priors |
    | kidiq | 3 | a linear regression, under flat priors |
    | lynx_hare | 8 | a differential equation of predator and prey |
    | mixture | 5 | two normal distributions |

    Priors are normalized, half-normal and half-Cauchy ones with their factor of 2: with it log Z of
    the eight schools is -31.3113. Those of garch and kidiq are flat and no densities: their targets
    have no prior apart, and no evidence.

    Args:
        name: One of the names above.
        data_dir: The folder of the files <posterior>.zip, each with the folders data,
            reference_posteriors and so on of one posterior.

    Returns:
        The posterior. Both forms of the eight schools have the same reference draws.

    Raises:
        ValueError: For an unknown name.
        FileNotFoundError: Where the folder has no such file.

    References:
        Magnusson, Torgander, Buerkner, Zhang, Carpenter, Vehtari, *posteriordb: Testing,
            Benchmarking and Developing Bayesian Inference Algorithms*, 2024, arXiv:2407.04967.
        Carpenter, *Predator-Prey Population Dynamics: the Lotka-Volterra Model in Stan*, 2018,
            without an arXiv number: the model lynx_hare. Solving it for logs of populations, on a
            fixed grid, is ours.
    """
    if name not in _MODELS:
        raise ValueError(f"posteriordb: expected a name among {sorted(_MODELS)}, got {name!r}")
    stem, names, make = _MODELS[name]
    path = Path(data_dir) / f"{stem}.zip"
    if not path.exists():
        raise FileNotFoundError(f"posteriordb: expected the file {path}")
    with zipfile.ZipFile(path) as files:
        data = _read(files, f"data/data/{stem.rpartition('-')[0]}.json.zip")
        chains = _read(files, f"reference_posteriors/draws/draws/{stem}.json.zip")
    draws = np.concatenate(
        [np.stack([np.asarray(chain[k], np.float64) for k in names], -1) for chain in chains]
    )
    target, constrain, unconstrain = make(data)
    return ReferencePosterior(target, names, constrain, unconstrain, draws)


def _read(files: zipfile.ZipFile, name: str) -> Any:
    """The JSON within a zip within `files`."""
    with zipfile.ZipFile(io.BytesIO(files.read(name))) as inner:
        return json.loads(inner.read(inner.namelist()[0]))


def _normal(x, mean=0.0, std: Any = 1.0):
    return -0.5 * (jnp.square((x - mean) / std) + _LOG_2PI) - jnp.log(std)


def _half_cauchy(log_x, scale):
    """The log-density of log x, x half-Cauchy: 2 / (pi scale (1 + (x / scale)^2)) times x."""
    ratio = log_x - math.log(scale)
    return math.log(2 / math.pi) + ratio - jax.nn.softplus(2 * ratio)


def _draw_half_cauchy(key, n, scale):
    """Logs of draws: the tangent of an angle uniform in (0, pi / 2)."""
    angle = jax.random.uniform(key, (n,), minval=1e-6, maxval=1.0) * math.pi / 2
    return math.log(scale) + jnp.log(jnp.tan(angle))


def _row(numbers) -> Array:
    """Data [1, ...], to be broadcast over draws."""
    return jnp.asarray(numbers, float)[None]


def _checked(name: str, d: int, function):
    def apply(x):
        check_event(name, x, (d,))
        return function(x)

    return apply


_Model = tuple[Target, Callable, Callable]


def _ark(data: Mapping) -> _Model:
    """y_t ~ N(alpha + sum_k beta_k y_(t - k), sigma); x = alpha, beta [5], log sigma."""
    order, y = data["K"], np.asarray(data["y"])
    lags = np.stack([y[order - k : len(y) - k] for k in range(1, order + 1)])  # [5, T - 5]

    def log_prior(x):
        return sum_event(_normal(x[:, :6], 0.0, 10.0)) + _half_cauchy(x[:, 6], 2.5)

    def log_likelihood(x):
        mean = x[:, :1] + x[:, 1:6] @ jnp.asarray(lags, x.dtype)
        return sum_event(_normal(_row(y[order:]), mean, jnp.exp(x[:, 6:])))

    def sample(key, n):
        key_normal, key_scale = jax.random.split(key)
        normals = 10 * jax.random.normal(key_normal, (n, 6))
        return jnp.concatenate([normals, _draw_half_cauchy(key_scale, n, 2.5)[:, None]], -1)

    target = _apart("arK", 7, log_prior, log_likelihood, sample)
    return target, *_logs_of(slice(6, 7))


def _eight_schools(data: Mapping, centered: bool = False) -> _Model:
    """y_j ~ N(theta_j, s_j), theta_j = mu + tau e_j; x = e [8], mu, log tau, or theta for e."""
    y, s = _row(data["y"]), _row(data["sigma"])

    def parts(x):
        return x[:, :8], x[:, 8:9], x[:, 9:]

    def log_prior(x):
        effects, mu, log_tau = parts(x)
        law = _normal(effects, mu, jnp.exp(log_tau)) if centered else _normal(effects)
        return sum_event(law) + _normal(x[:, 8], 0.0, 5.0) + _half_cauchy(x[:, 9], 5.0)

    def log_likelihood(x):
        effects, mu, log_tau = parts(x)
        theta = effects if centered else mu + jnp.exp(log_tau) * effects
        return sum_event(_normal(y, theta, s))

    def sample(key, n):
        key_normal, key_scale = jax.random.split(key)
        normals = jax.random.normal(key_normal, (n, 9))
        mu, log_tau = 5 * normals[:, 8:], _draw_half_cauchy(key_scale, n, 5.0)[:, None]
        effects = normals[:, :8]
        effects = mu + jnp.exp(log_tau) * effects if centered else effects
        return jnp.concatenate([effects, mu, log_tau], -1)

    def constrain(x):
        effects, mu, log_tau = parts(x)
        tau = jnp.exp(log_tau)
        return jnp.concatenate([effects if centered else mu + tau * effects, mu, tau], -1)

    def unconstrain(values):
        theta, mu, tau = parts(values)
        return jnp.concatenate([theta if centered else (theta - mu) / tau, mu, jnp.log(tau)], -1)

    target = _apart("eight_schools", 10, log_prior, log_likelihood, sample)
    return target._replace(log_z=-31.3113), constrain, unconstrain


def _garch(data: Mapping) -> _Model:
    """y_t ~ N(mu, s_t), s_t^2 = alpha0 + alpha1 (y_(t - 1) - mu)^2 + beta1 s_(t - 1)^2; x = mu,
    log alpha0, logit alpha1, logit(beta1 / (1 - alpha1))."""
    y, first = np.asarray(data["y"]), data["sigma1"]

    def constrain(x):
        alpha1 = jax.nn.sigmoid(x[:, 2])
        beta1 = jax.nn.sigmoid(x[:, 3]) * jax.nn.sigmoid(-x[:, 2])
        return jnp.stack([x[:, 0], jnp.exp(x[:, 1]), alpha1, beta1], -1)

    def unconstrain(values):
        mu, alpha0, alpha1, beta1 = values.T
        share = beta1 / (1 - alpha1)
        return jnp.stack([mu, jnp.log(alpha0), _logit(alpha1), _logit(share)], -1)

    def log_density(x):
        mu, alpha0, alpha1, beta1 = constrain(x).T

        def advance(variance, seen):
            before, now = seen
            variance = alpha0 + alpha1 * jnp.square(before - mu) + beta1 * variance
            return variance, _normal(now, mu, jnp.sqrt(variance))

        start = jnp.full_like(mu, first**2)
        pairs = jnp.asarray(y[:-1], x.dtype), jnp.asarray(y[1:], x.dtype)
        _, terms = jax.lax.scan(advance, start, pairs)
        log_det = x[:, 1] + _log_slope(x[:, 2]) + _log_slope(x[:, 3]) + jax.nn.log_sigmoid(-x[:, 2])
        return jnp.sum(terms, 0) + _normal(y[0], mu, first) + log_det

    return Target(_checked("garch", 4, log_density), (4,)), constrain, unconstrain


def _kidiq(data: Mapping) -> _Model:
    """score ~ N(beta1 + beta2 iq, sigma), flat on beta; x = beta [2], log sigma."""
    score, iq = _row(data["kid_score"]), _row(data["mom_iq"])

    def log_density(x):
        mean = x[:, :1] + x[:, 1:2] * iq
        fit = sum_event(_normal(score, mean, jnp.exp(x[:, 2:])))
        return fit + _half_cauchy(x[:, 2], 2.5)

    return Target(_checked("kidiq", 3, log_density), (3,)), *_logs_of(slice(2, 3))


def _mixture(data: Mapping) -> _Model:
    """y ~ theta N(mu1, sigma1) + (1 - theta) N(mu2, sigma2), mu1 < mu2; x = mu1, log(mu2 - mu1),
    log sigma [2], logit theta."""
    y = _row(data["y"])

    def constrain(x):
        mu2 = x[:, :1] + jnp.exp(x[:, 1:2])
        return jnp.concatenate([x[:, :1], mu2, jnp.exp(x[:, 2:4]), jax.nn.sigmoid(x[:, 4:])], -1)

    def unconstrain(values):
        gap = values[:, 1:2] - values[:, :1]
        logs = jnp.log(jnp.concatenate([gap, values[:, 2:4]], -1))
        return jnp.concatenate([values[:, :1], logs, _logit(values[:, 4:])], -1)

    def log_prior(x):
        values = constrain(x)
        means_and_scales = math.log(2) + 2 * math.log(2) + sum_event(_normal(values[:, :4], 0, 2.0))
        weight = 5 * (jax.nn.log_sigmoid(x[:, 4]) + jax.nn.log_sigmoid(-x[:, 4])) - betaln(5, 5)
        return means_and_scales + weight + sum_event(x[:, 1:4])

    def log_likelihood(x):
        mu1, mu2, sigma1, sigma2, _ = jnp.split(constrain(x), 5, axis=1)
        first = jax.nn.log_sigmoid(x[:, 4:]) + _normal(y, mu1, sigma1)
        second = jax.nn.log_sigmoid(-x[:, 4:]) + _normal(y, mu2, sigma2)
        return sum_event(jnp.logaddexp(first, second))

    def sample(key, n):
        key_normal, key_beta = jax.random.split(key)
        normals = 2 * jax.random.normal(key_normal, (n, 4))
        means, scales = jnp.sort(normals[:, :2], 1), jnp.abs(normals[:, 2:])
        weight = jax.random.beta(key_beta, 5.0, 5.0, (n, 1))
        return unconstrain(jnp.concatenate([means, scales, weight], -1))

    return _apart("mixture", 5, log_prior, log_likelihood, sample), constrain, unconstrain


def _lynx_hare(data: Mapping) -> _Model:
    """Prey u and predators v with du/dt = (alpha - beta v) u and dv/dt = (delta u - gamma) v, seen
    with log-normal errors; x = the logs of alpha, beta, gamma, delta, of u and v at the start, and
    of the two errors."""
    first, seen = np.log(data["y_init"]), np.log(data["y"])  # [2], [N, 2]
    times = np.concatenate([[0.0], data["ts"]])
    centers, widths = _row([1.0, 0.05, 1.0, 0.05]), _row([0.5, 0.05, 0.5, 0.05])
    grid = np.unique(np.concatenate([np.linspace(a, b, 11) for a, b in itertools.pairwise(times)]))

    def log_prior(x):
        above = 2 * log_ndtr(1.0 / 0.5) + 2 * log_ndtr(1.0)  # of normal laws cut at 0
        rates = sum_event(_normal(jnp.exp(x[:, :4]), centers, widths) + x[:, :4]) - above
        start = sum_event(_normal(x[:, 4:6], math.log(10.0), 1.0))
        return rates + start + sum_event(_normal(x[:, 6:], -1.0, 1.0))

    def populations(x):
        """Their logs [N, n, 2], in steps of the fifth order; what is too large for exp is cut."""

        def slope(t, z, rates):
            size = jnp.exp(jnp.minimum(z, _LARGE))
            alpha, beta, gamma, delta = rates.T
            return jnp.stack([alpha - beta * size[:, 1], delta * size[:, 0] - gamma], -1)

        return diffrax.diffeqsolve(
            diffrax.ODETerm(slope),
            diffrax.Tsit5(),
            grid[0],
            grid[-1],
            None,
            x[:, 4:6],
            jnp.exp(x[:, :4]),
            saveat=diffrax.SaveAt(ts=jnp.asarray(times[1:], x.dtype)),
            # equal steps that add up in float32 end beside the times, where the derivative of what
            # is interpolated is wrong by a fifth
            stepsize_controller=diffrax.StepTo(ts=jnp.asarray(grid, x.dtype)),
            max_steps=len(grid),
            throw=False,
        ).ys

    def log_likelihood(x):
        errors, rows = jnp.exp(x[:, 6:]), jnp.asarray(seen, x.dtype)[:, None]
        logs = jnp.asarray(first, x.dtype)[None]
        fit = _normal(rows, populations(x), errors[None]) - rows
        return jnp.sum(fit, (0, 2)) + sum_event(_normal(logs, x[:, 4:6], errors) - logs)

    def sample(key, n):
        key_rates, key_rest = jax.random.split(key)
        rates = centers + widths * jax.random.truncated_normal(
            key_rates, -centers / widths, jnp.inf, (n, 4)
        )
        rest = jax.random.normal(key_rest, (n, 4)) + _row([math.log(10.0)] * 2 + [-1.0] * 2)
        return jnp.concatenate([jnp.log(rates), rest], -1)

    target = _apart("lynx_hare", 8, log_prior, log_likelihood, sample)
    return target, *_logs_of(slice(0, 8))


def _apart(name: str, d: int, log_prior, log_likelihood, sample: Callable[[Key, int], Array]):
    return posterior(
        _checked(name, d, log_prior), _checked(name, d, log_likelihood), (d,), sample=sample
    )


def _logs_of(positive: slice) -> tuple[Callable, Callable]:
    """constrain and unconstrain where these numbers are logs."""
    return (
        lambda x: jnp.asarray(x).at[:, positive].set(jnp.exp(x[:, positive])),
        lambda values: jnp.asarray(values).at[:, positive].set(jnp.log(values[:, positive])),
    )


def _logit(p):
    return jnp.log(p) - jnp.log1p(-p)


def _log_slope(x):
    """log of the derivative of the sigmoid."""
    return jax.nn.log_sigmoid(x) + jax.nn.log_sigmoid(-x)


_THETAS = tuple(f"theta[{j}]" for j in range(1, 9))
_SCHOOLS = (*_THETAS, "mu", "tau")
_BETAS = tuple(f"beta[{k}]" for k in range(1, 6))
_LYNX = (*_THETAS[:4], "z_init[1]", "z_init[2]", "sigma[1]", "sigma[2]")
_PAIRS = ("mu[1]", "mu[2]", "sigma[1]", "sigma[2]", "theta")
_STEM = "eight_schools-eight_schools_noncentered"
_MODELS: dict[str, tuple[str, tuple[str, ...], Callable[..., _Model]]] = {
    "arK": ("arK-arK", ("alpha", *_BETAS, "sigma"), _ark),
    "eight_schools": (_STEM, _SCHOOLS, _eight_schools),
    "eight_schools_centered": (_STEM, _SCHOOLS, lambda data: _eight_schools(data, True)),
    "garch": ("garch-garch11", ("mu", "alpha0", "alpha1", "beta1"), _garch),
    "kidiq": ("kidiq-kidscore_momiq", ("beta[1]", "beta[2]", "sigma"), _kidiq),
    "lynx_hare": ("hudson_lynx_hare-lotka_volterra", _LYNX, _lynx_hare),
    "mixture": ("low_dim_gauss_mix-low_dim_gauss_mix", _PAIRS, _mixture),
}
