"""How straight a flow runs, how far it carries, and what few steps miss of it."""

from collections.abc import Callable, Sequence

import diffrax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow import solvers
from jflow._core.arrays import float_dtype, sum_event
from jflow.solvers import Method
from jflow.types import Array, Cond, Params, Velocity

__all__ = ["straightness", "transport_cost", "truncation_error"]

# neither solver looks at the end of a step, where v may jump
_MIDPOINT = diffrax.Midpoint()
_MIDPOINT_STEPS, _EULER_STEPS = solvers.fixed(100, _MIDPOINT), solvers.fixed(50, diffrax.Euler())


def straightness(
    velocity: Velocity,
    params: Params,
    x0: Array,
    cond: Cond = None,
    *,
    knots: Sequence[float] = (0.0, 1.0),
    method: Method | int | None = None,
) -> Array:
    """How far each row's path is from a straight line, and 0 where it is one.

        the integral over t of |x1 - x0 - v(x_t, t)|^2 along the row's ODE trajectory

    The mean over rows is the paper's S. In squared units of x, summed over the event. With more
    knots the segments are judged one by one: the sum over k of the integral of |(x_{k+1} - x_k) /
    h_k - v|^2, for flows that are meant to be straight between knots. It is computed as the
    integral of |v|^2 less
    |x_{k+1} - x_k|^2 / h_k, one solve for both: with non-negative weights of the solver's stages
    (Euler, midpoint, Heun) it is at least 0 to rounding. Under jit, close over velocity, knots and
    method.

    Args:
        velocity: The flow's velocity.
        params: The velocity's params.
        x0: Where the paths begin, [b, *event], at the first knot.
        cond: Conditions of the rows.
        knots: Times that rise strictly, the ends of the segments.
        method: The steps in each segment, `solvers.fixed(n, solver)` or n; 100 midpoint steps by
            default. Midpoint and Euler do not look at the end of a segment, where v may jump.

    Returns:
        [b], at least 0.

    Raises:
        ValueError: For knots that do not rise strictly, and for a grid or tolerances as method.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import metrics, types
        >>> one = lambda p, x, t, cond=None, *, key=None: jnp.ones_like(x)
        >>> constant = types.Velocity(lambda *a: {}, one)
        >>> metrics.straightness(constant, {}, jnp.zeros((2, 3)), method=4).round(5).tolist()
        [0.0, 0.0]

    References:
        Liu, Gong, Liu, *Flow Straight and Fast: Learning to Generate and Transfer Data with
        Rectified Flow*, 2022, arXiv:2209.03003.
        Yoon, Lee, *Sequential Flow Straightening for Generative Modeling*, 2024, arXiv:2402.06461.
    """
    method = solvers.as_method("straightness", method, _MIDPOINT_STEPS, accepts=(solvers.fixed,))
    times = np.asarray(knots, np.float64)
    if times.ndim != 1 or len(times) < 2 or not np.all(np.diff(times) > 0):
        raise ValueError(f"straightness: expected knots that rise strictly, got {knots}")

    def apply(params, state, t, cond=None, *, key=None):
        v = velocity.apply(params, state["x"], t, cond)
        return {"x": v, "moved": v, "action": sum_event(jnp.square(v.astype(float_dtype(v))))}

    both, x = Velocity(velocity.init, apply), x0.astype(float_dtype(x0))
    total = jnp.zeros_like(x, shape=x.shape[:1])
    for start, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        state = {"x": x, "moved": jnp.zeros_like(x), "action": jnp.zeros_like(total)}
        state, _ = solvers.sample(both, params, state, cond, method=method, t0=start, t1=end)
        total = total + state["action"] - sum_event(jnp.square(state["moved"])) / (end - start)
        x = state["x"]
    return total


def transport_cost(
    x0: ArrayLike, x1: ArrayLike, cost: Callable[[Array], Array] | None = None
) -> float:
    """Mean cost of moving each row of x0 to the same row of x1.

    Args:
        x0: [n, *event].
        x1: [n, *event], row k belongs to row k of x0.
        cost: (z [n, *event]) -> [n] of z = x1 - x0, such as `losses.power_cost(1.5).value`; |z|^2
            summed over the event by default.

    Returns:
        The mean over pairs; by default in squared units of x.

    Raises:
        ValueError: For unequal shapes, and for a cost that does not return [n].

    Examples:
        >>> import numpy as np
        >>> from jflow import metrics
        >>> metrics.transport_cost(np.zeros((4, 2)), np.ones((4, 2)))
        2.0
    """
    x0, x1 = np.asarray(x0), np.asarray(x1)
    if x0.shape != x1.shape or x0.ndim < 2 or x0.size == 0:
        raise ValueError(
            f"transport_cost: expected x0, x1 of one shape [n, *event], got {x0.shape} and"
            f" {x1.shape}"
        )
    if cost is None:
        return float(np.sum(np.square(x1.astype(np.float64) - x0)) / len(x0))
    costs = np.asarray(cost(jnp.asarray(x1 - x0)))
    if costs.shape != (len(x0),):
        raise ValueError(
            f"transport_cost: expected cost to return [{len(x0)}], got {list(costs.shape)}"
        )
    return float(np.mean(costs, dtype=np.float64))


def truncation_error(
    velocity: Velocity,
    params: Params,
    x0: Array,
    cond: Cond = None,
    *,
    method: Method | int | None = None,
    knots: Sequence[float] = (0.0, 1.0),
    exact_steps: int = 100,
) -> Array:
    """What a coarse solve misses of a fine one, row by row.

        |x1 of the coarse solve - x1 of the fine one|, the global truncation error

    Args:
        velocity: The flow's velocity.
        params: The velocity's params.
        x0: Where the paths begin, [b, *event], at t=0.
        cond: Conditions of the rows.
        method: The coarse solve from t=0 to 1, `solvers.fixed(n, solver)`, `solvers.on_grid(times,
            solver)` or n; 50 Euler steps by default.
        knots: Times between which the velocity is smooth; it may jump at them.
        exact_steps: The fine solve's equal midpoint steps in every segment between knots.

    Returns:
        [b], in the units of x; NaN for rows whose solve failed.

    Raises:
        ValueError: For tolerances as method.
    """
    accepts = (solvers.fixed, solvers.on_grid)
    method = solvers.as_method("truncation_error", method, _EULER_STEPS, accepts=accepts)
    times = np.asarray(knots, np.float64)
    pieces = [
        np.linspace(a, b, exact_steps, endpoint=False)
        for a, b in zip(times[:-1], times[1:], strict=True)
    ]
    fine = np.concatenate([*pieces, times[-1:]])

    def apply(params, state, t, cond=None, *, key=None):
        v = velocity.apply(params, state["x"], t, cond)
        return {"x": v, "moved": v}

    both, x = Velocity(velocity.init, apply), x0.astype(float_dtype(x0))
    start = {
        "x": x,
        "moved": jnp.zeros_like(x),
    }  # x far from the origin would round what the solves differ by
    coarse, _ = solvers.sample(both, params, start, cond, method=method)
    exact, _ = solvers.sample(both, params, start, cond, method=solvers.on_grid(fine, _MIDPOINT))
    return jnp.sqrt(sum_event(jnp.square(coarse["moved"] - exact["moved"])))
