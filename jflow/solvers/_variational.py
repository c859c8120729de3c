"""Samples of a consistency model that was trained with an encoder of its noise."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_cond, count_rows, encode_noise, need_key, rows, take_parts
from jflow._core.line import on_line, predicted_data
from jflow._core.times import Times
from jflow.solvers._integrate import SolveInfo
from jflow.solvers._parts import sampler_result, sampling_times
from jflow.types import Array, Cond, Field, Key, Params, Velocity


def sample_variational(
    velocity: Velocity,
    encoder: Field,
    params: Params,
    x0: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    steps: int | None = None,
    grid: Times | ArrayLike | None = None,
    key: Key | None = None,
) -> tuple[Float[Array, "b *event"], SolveInfo]:
    """The multistep sampler of a consistency model that was trained with an encoder of its noise.

    Each step goes to data, x1 = x + (1 - t) F(x, t), and back to t_next on the line to the noise
    that the encoder draws for that x1: where plain consistency models add noise of their own, which
    the trained pairs are not.

    Args:
        velocity: the consistency model F.
        encoder: the encoder of the noise, a field that returns (mean, std).
        params: {'model', 'encoder'}.
        x0: standard normal noise, [b, *event].
        cond: the condition, [b, ...] or one row for all.
        steps: the number of equal steps; 1 where neither steps nor grid is given.
        grid: rising times [n + 1] in [0, 1] instead.
        key: a key, for more than one step.

    Returns:
        x1: the samples, [b, *event], in the type of x0; rows that are not finite are NaN.
        info: evaluations [b] of the velocity (the encoder is run once less) and status [b]
            (`solvers.Status`).

    Raises:
        ValueError: steps is below 1, grid does not rise within [0, 1], both are given, there is
            more than one step without a key, or params has not both parts.

    References:
        Silvestri, Ambrogioni, Lai, Takida, Mitsufuji, *Training Consistency Models with Variational
            Noise Coupling*, 2025, arXiv:2502.18197.
    """
    name = "sample_variational"
    times = sampling_times(name, steps, grid)
    n, count = count_rows(name, x0), np.shape(times)[0] - 1
    cond = check_cond(name, cond, n)
    model, encoding = take_parts(name, params, "model", "encoder")
    keys = (
        jax.random.split(need_key(f"{name} with more than one step", key), count - 1)
        if count > 1
        else None
    )
    dtype = float_dtype(x0)
    times = jnp.asarray(times, dtype)

    def data(x, t):
        return predicted_data(velocity, model, x, rows(t, n), cond, None, x0.dtype)

    def step(x, now):
        t, t_next, key = now
        x1 = data(x, t)
        mean, std = encode_noise(name, encoder, encoding, x1.astype(x0.dtype), cond, None)
        noise = mean + std * jax.random.normal(key, x.shape, dtype)
        return on_line(noise, x1, rows(t_next, n)), None

    x = jnp.asarray(x0, dtype)
    if count > 1:
        x, _ = jax.lax.scan(step, x, (times[:-2], times[1:-1], keys))
    x = data(x, times[-2])
    return sampler_result(x, count, x0)
