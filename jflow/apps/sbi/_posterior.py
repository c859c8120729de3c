"""Posteriors: what a fit returns, and its file."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from scipy.spatial.distance import cdist

from jflow._core.checks import check_key, check_whole
from jflow._core.files import expand, write_atomically
from jflow.apps.sbi._coordinates import encode_x, from_real, middle_of, to_real
from jflow.apps.sbi._estimators import Estimator, npe
from jflow.apps.sbi._priors import Prior, as_prior
from jflow.types import Array, Distribution, Params


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


def make_posterior(prior, flow, params, simulated, observation, rounds, history) -> Posterior:
    params = jax.tree.map(jnp.asarray, params)
    low, high = prior.low, prior.high
    d, event = len(low), params["x"]["location"].shape

    def log_prob_rows(params, theta, x):
        """theta [n, d], x [n, *event] or [1, *event] -> [n]."""
        inside = ((theta >= low[None]) & (theta <= high[None])).all(-1)
        middle = middle_of(low, high)[None]
        u, log_slope = to_real(low, high, jnp.where(inside[:, None], theta, middle))
        location, scale = (params["theta"][name][None] for name in ("location", "scale"))
        z = (u - location) / scale
        value = flow.log_prob(params["flow"], z, encode_x(params["x"], x))
        return jnp.where(inside, value + log_slope - jnp.log(scale).sum(), -jnp.inf)

    def sample_rows(params, key, n, x):
        cond = encode_x(params["x"], x)
        z = flow.sample(params["flow"], key, n, cond)
        location, scale = (params["theta"][name][None] for name in ("location", "scale"))
        return from_real(low, high, z * scale + location)

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
        start = to_real(low, high, best)[0]
        optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 200))
        scale = params["theta"]["scale"][None]

        def density(w):
            return log_prob_rows(params, from_real(low, high, w * scale), x)

        def step(carry, _):
            w, opt = carry
            value, slope = density(w), jax.grad(lambda w: -density(w).sum())(w)
            slope = jnp.where(jnp.isfinite(slope), slope, 0.0)
            updates, opt = optimizer.update(slope, opt)
            return (optax.apply_updates(w, updates), opt), (w, value)

        w = start / scale
        _, (path, values) = jax.lax.scan(step, (w, optimizer.init(w)), length=200)
        values = jnp.where(jnp.isnan(values), -jnp.inf, values).ravel()
        return from_real(low, high, path.reshape(-1, d)[values.argmax()][None] * scale)[0]

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
            warn_if_far(encode_x(scaling, x, np))
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
    return make_posterior(prior, flow, params, simulated, observation, rounds, [])
