"""Autoregressive maps: every number steers the elementwise map of the numbers after it.

The natural form, y_i = univariate.forward(x_i; net(x)_i) with a net whose i-th output sees x_1 ..
x_{i-1} alone, is one pass of the net in `forward`. `inverse` repeats x <- univariate.inverse(y;
net(x)), which after k passes is right in the first k numbers whatever it started from. It is hence
exact after as many passes as the longest path of the dependency graph has nodes, and mostly long
before that.

So the form decides what is fast. `autoregressive` itself samples in one pass: it is the inverse
autoregressive flow. `invert(autoregressive(...))` has a density in one pass: the masked
autoregressive flow.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import check_cond, check_noun, check_side
from jflow._core.implicit import fixed_point
from jflow._core.keys import same_draws
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow._core.nouns import compiled
from jflow.types import Array, Bijector, Cond, Elementwise, Key, Params, PyTree

__all__ = ["InverseInfo", "autoregressive", "autoregressive_inverse", "jacobi", "sequential"]


class InverseInfo(NamedTuple):
    """How the numerical inverse of an autoregressive map went.

    Attributes:
        passes: the number of passes of the network, a scalar.
        residual: [b], the largest change of the last pass, relative to 1 + |x|.
        converged: [b], whether a row converged.
    """

    passes: Int[Array, ""]
    residual: Float[Array, " b"]
    converged: Bool[Array, " b"]


@runtime_checkable
class Solver(Protocol):
    """How x = step(x, args) is solved from `start` [b, *event] for a causal step.

    The solution is exact after `passes` steps; step(x, args) closes over nothing that is
    differentiated.
    """

    def __call__(
        self, step: Callable[[Array, PyTree], Array], start: Array, args: PyTree, passes: int
    ) -> tuple[Array, InverseInfo]: ...


def jacobi(tol: float | None = None, max_passes: int | None = None) -> Solver:
    """Solve an autoregressive inverse by updating all numbers of a row at once.

    The iteration stops when no number changes by more than `tol`, relative to 1 + |x|. A batch
    takes the passes of its slowest row, but no row changes once it has settled: rows do not depend
    on their batch. There is no Gauss-Seidel form here: a masked net evaluates all numbers in any
    case, and then all may as well be used.

    Args:
        tol: the tolerance. None is 32 units of rounding (3.8e-6 in float32), where the rows are as
            near to a float64 solution as those of `sequential`; at 8 units the iteration chases its
            own rounding, for twice the passes.
        max_passes: a budget, for the iteration of the gradient too. None is one pass beyond the
            longest path, the one that sees nothing change. A row for which the budget does not
            suffice has not converged.

    Returns:
        Solver: the solver, for `autoregressive` and `block_autoregressive`.

    Raises:
        ValueError: tol is negative, or max_passes is below 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, nets
        >>> bijector = bijectors.autoregressive(
        ...     bijectors.univariate.affine(), nets.MADE(2, (8,)), solver=bijectors.jacobi(tol=1e-4)
        ... )
        >>> x = jnp.ones((3, 2))
        >>> z, log_det = bijector.inverse(bijector.init(jax.random.key(0), x), x)
        >>> z[0].tolist()  # it starts at the identity
        [1.0, 1.0]

    References:
        Song, Meng, Liao, Ermon,
            *Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving*, 2021,
            arXiv:2002.03629.
    """
    if tol is not None and not tol >= 0:
        raise ValueError(f"jacobi: expected tol >= 0, got {tol}")
    if max_passes is not None and max_passes < 1:
        raise ValueError(f"jacobi: expected max_passes >= 1, got {max_passes}")

    def solve(step, start, args, passes):
        enough = _rounding(start) if tol is None else tol
        most = passes + 1 if max_passes is None else min(max_passes, passes + 1)
        found = fixed_point(step, start, args, tol=enough, max_evaluations=most)
        return found.x, InverseInfo(found.evaluations, found.change, found.change <= enough)

    return solve


def sequential() -> Solver:
    """Solve an autoregressive inverse one number after another.

    It takes exactly as many passes as the longest path, without a look at the residual on the way.
    One more pass measures it: a row that still changes then comes of a net that is not causal, or
    of too few `passes`, and has not converged. `jacobi` returns the same numbers up to its
    tolerance; this is what it is compared with. See `jacobi` for an example.

    Returns:
        Solver: the solver, for `autoregressive` and `block_autoregressive`.
    """

    def solve(step, start, args, passes):
        found = fixed_point(
            step, start, args, tol=-1.0, max_evaluations=passes + 1
        )  # no change is that small
        return found.x, InverseInfo(
            found.evaluations, found.change, found.change <= _rounding(start)
        )

    return solve


def autoregressive(
    univariate: Elementwise,
    net: nn.Module,
    *,
    solver: Solver | None = None,
    passes: int | None = None,
) -> Bijector:
    """Map every number by a scalar map whose raw numbers depend on the numbers before it.

    `forward` is x_i = univariate.forward(z_i; net(z, cond)_i), one pass of the net; `inverse`
    solves for z, see `autoregressive_inverse`. Derivatives of both directions are exact, those of
    the inverse by the implicit function theorem. Rows of an inverse that did not converge are NaN.
    As it stands it is the layer of the inverse autoregressive flow, which samples in one pass;
    `invert` of it is that of the masked autoregressive flow, which has its density in one pass.

    Also known as: IAF layer, MAF layer, masked autoregressive layer.

    Args:
        univariate: the scalar map, such as `univariate.affine()` or
            `univariate.rational_quadratic()`.
        net: a causal Linen module (x [b, *event], cond=None) -> raw [b, *event, univariate.size];
            entry i of raw depends on what comes before entry i of x. `nets.MADE` on vectors, a
            masked transformer on tokens. It should return zeros at initialization, so that the map
            starts at the identity.
        solver: of the inverse; None is `jacobi()`, which needs no tuning. The other is
            `sequential()`.
        passes: the nodes on the longest path of the dependency graph (`nets.longest_path`). None is
            the size of the event, which is always enough. For tokens it is how many there are.

    Returns:
        Bijector: the map, with params {'net'}.

    Raises:
        TypeError: univariate is not an `Elementwise`, or net not a Linen module.
        ValueError: the net returns raw numbers of another shape, or passes is below 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, nets
        >>> bijector = bijectors.autoregressive(bijectors.univariate.affine(), nets.MADE(2, (8,)))
        >>> z = jnp.ones((3, 2))
        >>> x, log_det = bijector.forward(bijector.init(jax.random.key(0), z), z)
        >>> x.shape, log_det.tolist()  # it starts at the identity
        ((3, 2), [0.0, 0.0, 0.0])

    References:
        Kingma, Salimans, Jozefowicz, et al.,
            *Improving Variational Inference with Inverse Autoregressive Flow*, 2016,
            arXiv:1606.04934.
        Papamakarios, Pavlakou, Murray, *Masked Autoregressive Flow for Density Estimation*, 2017,
            arXiv:1705.07057.
    """
    check_noun("autoregressive", univariate, Elementwise)
    check_linen("autoregressive", "net", net)

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        cond = check_cond("autoregressive", cond, x.shape[0])
        params = {"net": init_linen(net, key, x, cond)}
        jax.eval_shape(
            lambda params: _raw(univariate, net, params, x, cond, None), params
        )  # raises where shapes differ
        return params

    def forward(params, z, cond=None, *, key=None):
        x, log_slope = univariate.forward(z, _raw(univariate, net, params, z, cond, key))
        return x.astype(z.dtype), sum_event(log_slope)

    def inverse(params, x, cond=None, *, key=None):
        return autoregressive_inverse(
            univariate, net, params, x, cond, solver=solver, passes=passes, key=key
        )[:2]

    return compiled(Bijector(init, forward, inverse))


def autoregressive_inverse(
    univariate: Elementwise,
    net: nn.Module,
    params: Params,
    y: Float[Array, "b *event"],
    cond: Cond = None,
    *,
    solver: Solver | None = None,
    passes: int | None = None,
    key: Key | None = None,
) -> tuple[Float[Array, "b *event"], Float[Array, " b"], InverseInfo]:
    """Invert an autoregressive map, and say how it went.

    It does what `autoregressive(...).inverse` does, and returns its `InverseInfo` too. It repeats x
    <- univariate.inverse(y; net(x, cond)); one evaluation of the net beyond info.passes gives the
    log-det. Rows that did not converge are NaN.

    Args:
        univariate: the scalar map, as for `autoregressive`.
        net: the causal Linen module, as for `autoregressive`.
        params: those of the map, {'net'}.
        y: what `forward` returned, [b, *event].
        cond: the condition as the net takes it.
        solver: `jacobi()` or `sequential()`; None is `jacobi()`.
        passes: the nodes on the longest path of the dependency graph; None is the size of the
            event.
        key: switches dropout on in the net; every pass has the same draws.

    Returns:
        A triple (x [b, *event], log_det [b] of the inverse in nats, info).

    Raises:
        ValueError: passes is below 1, or the net returns raw numbers of another shape.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, nets
        >>> univariate, net = bijectors.univariate.affine(), nets.MADE(2, (8,))
        >>> y = jnp.ones((3, 2))
        >>> params = bijectors.autoregressive(univariate, net).init(jax.random.key(0), y)
        >>> x, log_det, info = bijectors.autoregressive_inverse(univariate, net, params, y)
        >>> info.converged.tolist()
        [True, True, True]
    """

    def step(x, args):
        y, params, cond, key = args
        return univariate.inverse(y, _raw(univariate, net, params, x, cond, same_draws(key)))[0]

    x, info = solve_causal(step, y, (params, cond, same_draws(key)), solver, passes)
    _, log_slope = univariate.forward(x, _raw(univariate, net, params, x, cond, key))
    return x.astype(y.dtype), -sum_event(log_slope), info


def solve_causal(
    step, y: Array, args: tuple, solver: Solver | None, passes: int | None
) -> tuple[Array, InverseInfo]:
    """The x [b, *event], in float32 at least, with x = step(x, (y, *args)).

    Rows that do not converge are NaN.
    """
    passes = math.prod(y.shape[1:]) if passes is None else passes
    if passes < 1:
        raise ValueError(f"autoregressive: expected passes >= 1, got {passes}")
    y = y.astype(float_dtype(y))
    # Numbers whose turn has not come may run away. Masks and causal attention multiply them by
    # zero, which is harmless as long as they are finite.
    largest = float(jnp.finfo(y.dtype).max) ** 0.5

    def bounded(x):
        return jnp.clip(jnp.where(x == x, x, 0), -largest, largest)

    def bounded_step(x, args):
        return jnp.clip(step(bounded(x), args), -largest, largest)

    def fits(x):
        return jnp.all(jnp.abs(x) < largest, axis=tuple(range(1, x.ndim)))

    # A row without a preimage would never settle, and keep its batch waiting: it solves for zeros,
    # and is NaN all the same.
    solvable = fits(y)
    y = jnp.where(expand_to(solvable, y), y, 0)
    x, info = (jacobi() if solver is None else solver)(bounded_step, y, (y, *args), passes)
    info = info._replace(converged=info.converged & solvable & fits(x))
    return jnp.where(expand_to(info.converged, x), x, jnp.nan), info


def _rounding(x: Array) -> float:
    return 32 * float(jnp.finfo(x.dtype).eps)


def _raw(univariate, net, params, x, cond, key) -> Array:
    cond = check_cond("autoregressive", cond, x.shape[0])
    raw = apply_linen(net, params["net"], x, cond, key=key)
    if raw.shape != (*x.shape, univariate.size):
        raise ValueError(
            f"autoregressive: expected {type(net).__name__} to return raw numbers of shape "
            f"{[*x.shape, univariate.size]}, got {list(raw.shape)}"
        )
    return raw.astype(float_dtype(x))
