"""Regression of a velocity on the path between source and data."""

import jax
import jax.numpy as jnp

from jflow import couplings, paths, times
from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_batch, check_noun, need_key
from jflow._core.keys import same_draws
from jflow.losses._errors import Metric, mean_squared_error
from jflow.losses._pairs import check_drop, draw_pairs
from jflow.types import Coupling, Field, Loss, Path, PyTree, Time, Velocity

__all__ = ["flow_matching", "fresh_source"]

_LINEAR, _UNIFORM, _INDEPENDENT = paths.linear(), times.uniform(), couplings.independent()


def flow_matching(
    velocity: Velocity,
    *,
    path: Path = _LINEAR,
    time: Time = _UNIFORM,
    coupling: Coupling = _INDEPENDENT,
    metric: Metric = mean_squared_error,
    drop: float = 0.0,
    null: PyTree = None,
) -> Loss:
    """Conditional flow matching: the mean over the event of (velocity(x_t, t, cond) - target)^2, then over rows.

    batch: 'x' [b, *event] data; optionally 'x0' [b, *event] the source (standard normal when absent), 'cond', and
    'weight' [b] (weighted mean over rows, sum(w l) / sum(w)). The coupling's indices (i, j) pick x0[i], and x[j] with
    its cond and weight. The loss is a mean over event dimensions: it doesn't grow with the size of the event.

    metric: another error of a row, (v, target, x_t, t) -> [b] (`pseudo_huber`, `perceptual_huber`, or your own).
    drop: the probability, for each row by itself, of replacing cond by `null`, one row of cond without the batch axis
        (an integer label, a vector, a pytree of those). `guidance.cfg` with the same null then guides the trained
        velocity.
    Errors: ValueError at construction for a drop outside [0, 1] or without null; at trace time for a batch without
        'x', with unknown keys or rows that don't match, for a drop without 'cond', and for key=None.
    Sources: Lipman et al., "Flow Matching for Generative Modeling", 2023; Ho, Salimans, "Classifier-Free Diffusion
        Guidance", 2022 (drop).
    """
    check_drop("flow_matching", drop, null)
    check_noun("flow_matching", velocity, Velocity, Field)

    def loss(params, key, batch, frozen=None):
        pairs = draw_pairs("flow_matching", key, batch, time, coupling, drop, null)
        x0, x1, cond, weight, t, path_key, dropout_key = pairs
        x_t = path.point(x0, x1, t, key=path_key).astype(x1.dtype)
        target = path.target(x0, x1, t, key=same_draws(path_key))
        v = velocity.apply(params, x_t, t, cond, key=dropout_key)
        if v.shape != target.shape:
            raise ValueError(f"flow_matching: expected a velocity of shape {list(target.shape)}, got {list(v.shape)}")
        error = metric(v.astype(float_dtype(x1)), target.astype(float_dtype(x1)), x_t, t)
        if error.shape != t.shape:
            raise ValueError(f"flow_matching: expected a metric of shape {list(t.shape)}, got {list(error.shape)}")
        return mean_of_rows(error, weight), {}

    return loss


def fresh_source(loss: Loss) -> Loss:
    """`loss` of a batch of synthetic and real rows: where 'paired' [b], a boolean of the batch, is False, 'x0' is replaced
    by standard normal noise, drawn anew each time.

    Synthetic rows of x carry the x0 that a model made them from; real rows have no partner, and what stands in their x0
    is ignored (zeros, say). Real rows inverted along a model's ODE (`solvers.sample` from t0=1 to t1=0) do have one.
    Source: Lee, Lin, Fanti, "Improving the Training of Rectified Flows", 2024 (synthetic and real pairs together).
    """

    def refreshed(params, key, batch, frozen=None):
        need_key("fresh_source", key)
        check_batch("fresh_source", batch)
        if batch.get("x0") is None or batch.get("paired") is None:
            raise ValueError(f"fresh_source: expected 'x0' and 'paired' in batch, got the keys {sorted(batch)}")
        rest = {name: value for name, value in batch.items() if name != "paired"}
        x0, paired = jnp.asarray(batch["x0"]), jnp.asarray(batch["paired"])
        if paired.shape != x0.shape[:1] or paired.dtype != bool:
            raise ValueError(
                f"fresh_source: expected 'paired' of shape {[x0.shape[0]]} and type bool, "
                f"got {list(paired.shape)} and {paired.dtype}"
            )
        noise_key, loss_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
        return loss(params, loss_key, {**rest, "x0": jnp.where(expand_to(paired, x0), x0, noise)}, frozen)

    return refreshed
