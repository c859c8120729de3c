"""Maximum likelihood of a velocity without a solve: matching weighted by the log-SNR."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow import times
from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_whole, need_key
from jflow._core.jacobian import columns_of, dot, over_unit_vectors
from jflow.losses._importance import Importance, draw_times, learn_importance, likelihood_importance
from jflow.paths import LINEAR, Schedule, coefficients
from jflow.types import Array, Loss, Time, Velocity

__all__ = ["diffusion_likelihood", "learned_times"]

_UNIFORM = times.uniform()


def diffusion_likelihood(
    velocity: Velocity,
    *,
    schedule: Schedule = LINEAR,
    importance: Importance | None = None,
    time: Time = _UNIFORM,
    trace: float = 0.0,
    jacobian: float = 0.0,
    probes: int | None = 1,
) -> Loss:
    """The bound of a diffusion on the negative log-likelihood of noised data, by matching.

    With x_t = alpha x1 + sigma x0, x0 ~ N(0, I), u = alpha' x1 + sigma' x0 and w of
    `likelihood_weight`, it bounds E -log p(x_t1) by

        int_t0^t1 w(t) E |v(x_t, t) - u|^2 dt
            + KL(N(alpha x1, sigma^2) | N(0, I)) at t0 + D/2 log(2 pi e sigma^2) at t1.

    The density is that of data with the noise of time t1 (of x_t1, not divided by alpha). The bound
    is one on the likelihood of this velocity's reverse *SDE*; its excess over the entropy of x_t1
    is int w E |v - v_exact|^2 dt (and the source's KL, 0 where alpha(t0) = 0). At the exact
    velocity it equals both likelihoods; for any other, the *ODE*'s comes from
    `flows.cnf(..., t1=t1)`. The factors `trace` and `jacobian` add second-order matching, for
    finetuning, within the same integral:

        trace       sigma^2 (div v - D sigma'/sigma - w |u - v|^2)^2 / D
        jacobian    sigma^2 |J e - sigma'/sigma e - w (u - v) (u - v).e|^2 / D

    where v in the targets is not differentiated, J = dv/dx, and e runs over Rademacher probes, by
    which div v is e.J e. Error-bounded: with v off by d, the targets are off by w |d|^2 and w d
    d^T.

    Args:
        velocity: The velocity that is trained.
        schedule: The path of x_t, a `paths.Schedule`.
        importance: The density of the times, by default `likelihood_importance(schedule)`, t0=0 to
            t1=0.999. The loss reads frozen['importance'] instead where there is one (see
            `learned_times`).
        time: The law of the quantiles in [0, 1]; stratified ones lower the variance further.
        trace: The factor of the matching of the trace, not negative; the paper's is 0.1.
        jacobian: The factor of the matching of the Jacobian, not negative; the paper's is 0.1.
        probes: The number of probes a row, or None for the unit vectors: exact, and D forward
            derivatives. An estimated trace adds its variance to the square.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b]}. Its metrics are
        'bound', and 'trace' and 'jacobian' where their factors are not 0, the integrals without
        factors.

    Raises:
        ValueError: At construction for negative factors and probes < 1; at trace time for a
            velocity of another shape, a batch without 'x' or with unknown keys, and a key that is
            None.

    Examples:
        At the exact velocity of data N(0, I) the bound is the entropy of a row at t1, on average.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, oracles
        >>> law = oracles.gaussian([0.0, 0.0], 1.0)
        >>> loss = losses.diffusion_likelihood(oracles.as_velocity(law))
        >>> value, metrics = loss({}, jax.random.key(0), {"x": jnp.ones((4, 2))})
        >>> sorted(metrics)
        ['bound']

    References:
        Zheng, Lu, Chen, Zhu, *Improved Techniques for Maximum Likelihood Estimation for Diffusion
            ODEs*, 2023, arXiv:2305.03935 (velocity, weight, importance, trace).
        Kingma, Salimans, Poole, Ho, *Variational Diffusion Models*, 2021, arXiv:2107.00630 (bound).
        Lu, Zheng, Bao, Chen, Li, Zhu, *Maximum Likelihood Training for Score-Based Diffusion ODEs
            by High-Order Denoising Score Matching*, 2022, arXiv:2206.08265 (jacobian). For any
            schedule: derived here.
    """
    name = "diffusion_likelihood"
    if not (trace >= 0 and jacobian >= 0):
        raise ValueError(f"{name}: expected trace, jacobian >= 0, got {trace}, {jacobian}")
    if probes is not None:
        check_whole(name, probes=probes)
    importance = likelihood_importance(schedule) if importance is None else importance

    def loss(params, key, batch, frozen=None):
        need_key(name, key)
        x1, cond, weight = read_batch(name, batch, ("x", "cond", "weight"))
        point_key, dropout_key, probe_key = jax.random.split(key, 3)
        density = (frozen or {}).get("importance", importance)
        at = _point(x1, schedule, density, time, point_key)

        def v(x):
            return velocity.apply(params, x, at.t, cond, key=dropout_key).astype(x.dtype)

        second = trace > 0 or jacobian > 0
        predicted, sums = _look(name, v, at, probes, probe_key) if second else (v(at.x), None)
        _check_shape(name, predicted, at.u)
        error = at.u - predicted
        rows = at.weight * sum_event(jnp.square(error)) + _ends(x1, schedule, density.edges)
        metrics = {"bound": mean_of_rows(rows, weight)}
        total = metrics["bound"]
        if second:
            both = _second_order(jax.lax.stop_gradient(error), *sums, at)
            for what, factor, rows in zip(
                ("trace", "jacobian"), (trace, jacobian), both, strict=True
            ):
                if factor > 0:
                    metrics[what] = mean_of_rows(at.weight * rows, weight)
                    total = total + factor * metrics[what]
        return total, metrics

    return loss


def learned_times(
    velocity: Velocity, *, schedule: Schedule = LINEAR, time: Time = _UNIFORM, decay: float = 0.99
) -> Callable[[Any, Mapping[str, Any], Array, Mapping[str, Any]], Mapping[str, Any]]:
    """A `refresh` for `train.make_step` that learns the times of `diffusion_likelihood`.

    Each update, the integrand w |v - u|^2 is evaluated for one more draw of times and noise,
    without gradients, and `learn_importance` takes it in, as frozen['importance']. Start from
    init_state(..., frozen={'importance': likelihood_importance(schedule)}).

    Args:
        velocity: The velocity that is trained.
        schedule: The path of x_t, a `paths.Schedule`.
        time: The law of the quantiles in [0, 1].
        decay: How much of the old density an update keeps, in (0, 1).

    Returns:
        The refresh (params, frozen, key, batch) -> frozen.

    Raises:
        ValueError: At trace time for a velocity of another shape, a batch without 'x' or with
            unknown keys, and a key that is None.
    """

    def refresh(
        params: Any, frozen: Mapping[str, Any], key: Array, batch: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        need_key("learned_times", key)
        x1, cond, weight = read_batch("learned_times", batch, ("x", "cond", "weight"))
        at = _point(x1, schedule, frozen["importance"], time, key)
        predicted = velocity.apply(params, at.x, at.t, cond)
        _check_shape("learned_times", predicted, at.u)
        values = at.likelihood_weight * sum_event(jnp.square(at.u - predicted))
        return {
            **frozen,
            "importance": learn_importance(frozen["importance"], at.t, values, weight, decay=decay),
        }

    return refresh


class _Point(NamedTuple):
    """A batch at its times: t, w(t) and w(t) over the density of t [b]; x_t, u, and, shaped to
    multiply x, sigma, its derivative and a / D, which is sigma w."""

    t: Array
    likelihood_weight: Array
    weight: Array
    x: Array
    u: Array
    s: Array
    ds: Array
    sw: Array


def _point(x1, schedule, importance, time, key) -> _Point:
    time_key, noise_key = jax.random.split(key)
    x1 = x1.astype(float_dtype(x1))
    t, share = (v.astype(x1.dtype) for v in draw_times(importance, time(time_key, x1.shape[0])))
    x0 = jax.random.normal(noise_key, x1.shape, x1.dtype)
    a, s, da, ds = coefficients(schedule, t)
    sw = a / (da * s - ds * a)
    w = sw / s
    a, da, s, ds, sw = (expand_to(v, x1) for v in (a, da, s, ds, sw))
    return _Point(t, w, w * share, a * x1 + s * x0, da * x1 + ds * x0, s, ds, sw)


def _ends(x1, schedule, edges):
    """What does not depend on the velocity, [b]: the source's KL at the first time, the noise's
    entropy at the last."""
    size = math.prod(x1.shape[1:])
    edges = edges.astype(float_dtype(x1))
    a, s = schedule.alpha(edges[:1]), schedule.sigma(edges[:1])
    last = schedule.sigma(edges[-1:])
    prior = 0.5 * (a**2 * sum_event(jnp.square(x1)) + size * (s**2 - 1 - 2 * jnp.log(s)))
    return prior + size * (0.5 * math.log(2 * math.pi * math.e) + jnp.log(last))


def _look(name, v, at: _Point, probes, key):
    """v(x), and of its Jacobian, [b] each, exact or estimated: the trace, and the sum of squares of
    sigma times its distance from what it should be."""

    def terms(value, e, columns):
        _check_shape(name, value, at.u)
        error = jax.lax.stop_gradient(at.u - value)
        along = dot(e, jnp.broadcast_to(error[None], e.shape))
        along = along.reshape(along.shape + (1,) * (error.ndim - 1))
        off = at.s[None] * columns - at.ds[None] * e - at.sw[None] * error[None] * along
        return dot(e, columns), dot(off, off)

    if probes is None:
        return over_unit_vectors(v, at.x, terms)
    e = jax.random.rademacher(key, (probes, *at.x.shape), at.x.dtype)
    value, columns = columns_of(v, at.x, e)
    return value, [jnp.mean(term, axis=0) for term in terms(value, e, columns)]


def _second_order(error, div, off, at: _Point):
    """The squared errors of trace and Jacobian times sigma^2 / D, [b] each.

    With sigma inside nothing diverges."""
    size = math.prod(error.shape[1:])
    s, ds, sw = (v.reshape(-1) for v in (at.s, at.ds, at.sw))
    trace = s * div - size * ds - sw * sum_event(jnp.square(error))
    return jnp.square(trace) / size, off / size


def _check_shape(name, v, target):
    if v.shape != target.shape:
        raise ValueError(
            f"{name}: expected a velocity of shape {list(target.shape)}, got {list(v.shape)}"
        )
