"""Simulations: parameters from a prior, and what a simulator makes of them."""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from tqdm import tqdm

from jflow._core.checks import check_key, check_whole
from jflow.apps.sbi._priors import as_prior
from jflow.types import Key

_CHUNK = 1000  # simulations of one call


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
    prior_key, simulator_key = split(key, 2)
    check_whole("simulate", num_simulations=num_simulations)
    theta = as_prior(prior).sample(prior_key, num_simulations)
    return run_simulator(simulator_key, theta, simulator, max_invalid, progress)


def split(key: Key, n: int):
    check_key("sbi", key)
    return jax.random.split(key, n)


def run_simulator(key, theta, simulator, max_invalid, progress) -> tuple[np.ndarray, np.ndarray]:
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
            some = "" if bad == n else f", or raise max_invalid={max_invalid}"
            raise ValueError(
                f"{said}, as at theta = {example}: mend the simulator, narrow the prior to where it"
                f" runs{some}"
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
