"""What all few-step models share: a network u(x, t, r) that says where x goes from time t to time r, its sampler, its
derivative along a trajectory, and what a student takes over from its teacher.

u is the average velocity: the flow map is f(x, t, r) = x + (r - t) u(x, t, r), and u(x, t, t) = v(x, t) is the velocity. A
consistency model is the map with r = 1 alone: any `Velocity`, read by `consistency_map`. Losses that learn u say in
their docstring which r they train; `sample_flow_map` may ask for no others.

    net = nets.ResidualMLP(width=128)
    model = jflow.flow_map(net)                       # u(x, t, r): the network is told r - t
    loss = losses.mean_flow(model)                   # or any other loss of a flow map
    ... make_step, fit ...
    x1, info = solvers.sample_flow_map(model, params, x0, steps=2)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_cond, check_flow_map, like_state, need_key, rows
from jflow._core.keys import same_draws
from jflow.solvers._integrate import SolveInfo
from jflow.solvers._parts import sampler_result, sampling_times
from jflow.types import Array, Cond, FlowMap, Key, Params, Velocity

__all__ = [
    "instantaneous_velocity",
    "apply_flow_map",
    "finite_difference",
    "sample_flow_map",
    "consistency_map",
    "total_derivative",
]

JVP = Callable[[Callable, Sequence, Sequence], tuple[Any, Any]]
"""(f, primals, tangents) -> (f(primals), its derivative along the tangents): `jax.jvp`, or a `finite_difference`."""


def apply_flow_map(
    flow_map: FlowMap,
    params: Params,
    x: Array,
    t: ArrayLike,
    r: ArrayLike,
    cond: Cond = None,
    *,
    key: Key | None = None,
) -> Array:
    """f(x, t, r) = x + (r - t) u(x, t, r): x [b, *event] carried from time t to time r (both [b], or scalars)."""
    x = _floating("apply_flow_map", x)
    t, r = (rows(time, x.shape[0]).astype(float_dtype(x)) for time in (t, r))
    u = like_state("apply_flow_map", flow_map.apply(params, x, t, r, cond, key=key), x)
    return (x + expand_to(r - t, x) * u).astype(x.dtype)


def instantaneous_velocity(flow_map: FlowMap) -> Velocity:
    """The velocity that an average velocity contains, v(x, t) = u(x, t, t), with the same params."""

    def init(key, x, t, cond=None):
        return flow_map.init(key, x, t, t, cond)

    def apply(params, x, t, cond=None, *, key=None):
        t = rows(t, x.shape[0])
        return flow_map.apply(params, x, t, t, cond, key=key)

    return Velocity(init, apply)


def consistency_map(velocity: Velocity) -> FlowMap:
    """A consistency model F(x, t), whose f(x, t) = x + (1 - t) F(x, t) is data, as a flow map: r is ignored and means 1.

    f(x, 1) = x holds whatever F is. `sample_flow_map` asks it for r = 1 alone when given one step, or renoise=1."""

    def init(key, x, t, r, cond=None):
        return velocity.init(key, x, t, cond)

    def apply(params, x, t, r, cond=None, *, key=None):
        return velocity.apply(params, x, t, cond, key=key)

    return FlowMap(init, apply)


def total_derivative(
    flow_map: FlowMap,
    params: Params,
    x: Array,
    t: Array,
    r: Array,
    v: Array,
    cond: Cond = None,
    *,
    key: Key | None = None,
    jvp: JVP = jax.jvp,
) -> tuple[Array, Array]:
    """(u, du/dt) at (x, t, r), du/dt = (d_x u) v + d_t u with r fixed: along the trajectory that has velocity v at x, t.

    One forward-mode pass with tangents (v, 1, 0). jvp: `finite_difference(h)` for networks with an operation that has no
    forward-mode derivative (a custom_vjp kernel)."""
    t, r = rows(t, x.shape[0]), rows(r, x.shape[0])
    return jvp(
        lambda x, t, r: flow_map.apply(params, x, t, r, cond, key=same_draws(key)),
        (x, t, r),
        (v.astype(x.dtype), jnp.ones_like(t), jnp.zeros_like(r)),
    )


def finite_difference(h: float = 1e-3) -> JVP:
    """A stand-in for `jax.jvp`: (f(p + h d) - f(p - h d)) / (2 h), error O(h^2), and f(p) itself. Three evaluations.

    In float32 rounding adds about 1e-7 / h of f; times may leave [0, 1] by h. Errors: ValueError unless 0 < h <= 0.1."""
    if not 0 < h <= 0.1:
        raise ValueError(f"finite_difference: expected 0 < h <= 0.1, got {h}")

    def jvp(f, primals, tangents):
        def at(s):
            return f(
                *jax.tree.map(
                    lambda p, d: (p + s * d).astype(p.dtype), tuple(primals), tuple(tangents)
                )
            )

        return f(*primals), jax.tree.map(lambda a, b: (a - b) / (2 * h), at(h), at(-h))

    return jvp


def sample_flow_map(
    flow_map: FlowMap,
    params: Params,
    x0: Array,
    cond: Cond = None,
    *,
    steps: int | None = None,
    grid: ArrayLike | None = None,
    renoise: float = 0.0,
    key: Key | None = None,
) -> tuple[Array, SolveInfo]:
    """Carry x0 [b, *event] from t=0 to t=1 by one evaluation a step, x <- f(x, t, t_next); returns (x1, info).

    steps: equal ones, 1 where nothing is given; or grid, rising times [n + 1] in [0, 1].
    renoise: g in [0, 1]; a step goes beyond t_next, to r = t_next + g (1 - t_next), and back to t_next by fresh noise z:
            x <- (t_next / r) x_r + sqrt((1 - t_next)^2 - (t_next / r)^2 (1 - r)^2) z
        on the linear path from standard normal noise. 0 is deterministic; 1 goes to data every time, the multistep sampler
        of consistency models (and the only one for maps that know r = 1 alone). The last step adds none.
    info: evaluations [b] = steps, status [b] (`solvers.Status`); rows that are not finite are NaN.
    Errors: ValueError for steps < 1, a grid that does not rise within [0, 1], both at once, renoise outside [0, 1], without a
        key or with a grid that ends before 1, and for x0 that is not a floating array [b, *event].
    Sources: Boffi, Albergo, Vanden-Eijnden, "Flow Map Matching", 2024; Song, Dhariwal, Chen, Sutskever, "Consistency
        Models", 2023 (renoise=1); Sabour, Fidler, Kreis, "Align Your Flow", 2025 (between).
    """
    if not 0 <= renoise <= 1:
        raise ValueError(f"solvers.sample_flow_map: expected renoise in [0, 1], got {renoise}")
    check_flow_map("sample_flow_map", flow_map)
    x0 = _floating("sample_flow_map", x0)
    times = sampling_times("sample_flow_map", steps, grid)
    if renoise > 0 and not isinstance(times, jax.core.Tracer) and np.asarray(times)[-1] != 1:
        raise ValueError(
            f"solvers.sample_flow_map: renoise goes by way of data: expected a grid that ends at 1, got {times}"
        )
    n = x0.shape[0]
    cond = check_cond("sample_flow_map", cond, n)
    count = np.shape(times)[0] - 1
    if renoise > 0 and count > 1:
        need_key("solvers.sample_flow_map with renoise", key)
    times = jnp.asarray(times, float_dtype(x0))

    def step(x, now):
        t, t_next, key = now
        r = t_next + renoise * (1 - t_next)
        x = apply_flow_map(flow_map, params, x, t, r, cond)
        if key is not None:
            keep = t_next / r
            std = jnp.sqrt(jnp.maximum((1 - t_next) ** 2 - (keep * (1 - r)) ** 2, 0))
            x = keep * x + std * jax.random.normal(key, x.shape, x.dtype)
        return x, None

    keys = jax.random.split(key, count) if renoise > 0 and key is not None else None
    x, _ = jax.lax.scan(step, jnp.asarray(x0, float_dtype(x0)), (times[:-1], times[1:], keys))
    return sampler_result(x, count, x0)


def _floating(name: str, x: Array) -> Array:
    """x as an array; ValueError unless it is [b, *event] of a floating type."""
    x = jnp.asarray(x)
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected rows [b, *event] of a floating type, got {x.dtype}{list(x.shape)}"
        )
    return x


def expanded_time(velocity: Velocity) -> FlowMap:
    """A velocity network as a flow map of two kinds of questions, told apart by its time: F(x, t) where r > t, read as
    r = 1, and F(x, 2 - t) where r = t. Same params; the network must take times up to 2. At t = 1 both are one."""

    def asked(x, t, r):
        t, r = rows(t, x.shape[0]), rows(r, x.shape[0])
        return jnp.where(r > t, t, 2 - t)

    def init(key, x, t, r, cond=None):
        return velocity.init(key, x, asked(x, t, r), cond)

    def apply(params, x, t, r, cond=None, *, key=None):
        return velocity.apply(params, x, asked(x, t, r), cond, key=key)

    return FlowMap(init, apply)
