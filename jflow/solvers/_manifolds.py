"""Solvers whose states stay on a manifold, and the divergence of its metric.

The state of a solve is x, or (x, (sums, ...)) where a log-density is integrated along with it: x
moves on the manifold and the sums as numbers do.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from jflow._core.checks import check_noun, check_whole, need_key
from jflow.solvers._divergence import Divergence
from jflow.solvers._exponential import Stepper
from jflow.solvers._wrapped import Wrapped
from jflow.types import Manifold

__all__ = [
    "geodesic_euler",
    "geodesic_midpoint",
    "geodesic_rk4",
    "projected",
    "riemannian_divergence",
]


def projected(solver: diffrax.AbstractSolver, manifold: Manifold) -> diffrax.AbstractSolver:
    """A solver of diffrax that brings the state back to a manifold after each step.

    The order of the solver is kept where the velocity is smooth around the manifold, as those of
    `manifolds.tangent` are: what a step leaves the manifold by is an error of the step. Solvers
    with an error estimate keep it, for `solvers.adaptive`.

    Args:
        solver: an explicit solver of diffrax or of `jflow.solvers`.
        manifold: where the states are to be.

    Returns:
        A diffrax solver, for `solvers.fixed`, `solvers.on_grid` and `solvers.adaptive`.

    Raises:
        TypeError: for what is no diffrax solver, or no manifold.

    Examples:
        >>> import diffrax
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds, solvers
        >>> from jflow.types import Velocity
        >>> def turn(params, x, t, cond=None, *, key=None):
        ...     return jnp.stack([-x[:, 1], x[:, 0]], axis=1)
        >>> velocity, x0 = Velocity(lambda *_: {}, turn), jnp.array([[1.0, 0.0]])
        >>> onto = solvers.projected(diffrax.Euler(), manifolds.sphere(1))
        >>> for solver in (diffrax.Euler(), onto):
        ...     x1, _ = solvers.sample(velocity, {}, x0, method=solvers.fixed(4, solver))
        ...     print(round(float(jnp.linalg.norm(x1)), 3))
        1.129
        1.0
    """
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(f"projected: expected a diffrax.AbstractSolver, got {solver!r}")
    check_noun("projected", manifold, Manifold)
    return _Projected(solver, manifold)


def geodesic_euler(manifold: Manifold) -> diffrax.AbstractSolver:
    """Euler's method along geodesics: x <- exp_x(h v(x, t)).

    It is of first order, one evaluation a step, and stays on the manifold.

    Args:
        manifold: the manifold; the velocity has to be tangent to it.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    Raises:
        TypeError: for what is no manifold.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds, solvers
        >>> from jflow.types import Velocity
        >>> def turn(params, x, t, cond=None, *, key=None):
        ...     return jnp.stack([-x[:, 1], x[:, 0]], axis=1)
        >>> velocity, x0 = Velocity(lambda *_: {}, turn), jnp.array([[1.0, 0.0]])
        >>> method = solvers.fixed(1, solvers.geodesic_euler(manifolds.sphere(1)))
        >>> x1, _ = solvers.sample(velocity, {}, x0, method=method)
        >>> [round(float(a), 4) for a in x1[0]]  # cos 1, sin 1
        [0.5403, 0.8415]
    """
    return _geodesic("geodesic_euler", manifold, ((),), (1.0,), 1)


def geodesic_midpoint(manifold: Manifold) -> diffrax.AbstractSolver:
    """The explicit midpoint method in normal coordinates: second order, two evaluations a step.

    Around the start x of a step, u stands for the point exp_x(u); there the equation is du/dt =
    D log_x(y)[v(y, t)] at y = exp_x(u), which a Runge-Kutta method solves from u = 0. So every
    method keeps its order, and the states are on the manifold.

    Args:
        manifold: the manifold; the velocity has to be tangent to it.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    Raises:
        TypeError: for what is no manifold.

    References:
        Munthe-Kaas, *High Order Runge-Kutta Methods on Manifolds*, 1999 (with the group's
            exponential in the place of exp_x).
    """
    return _geodesic("geodesic_midpoint", manifold, ((), (0.5,)), (0.0, 1.0), 2)


def geodesic_rk4(manifold: Manifold) -> diffrax.AbstractSolver:
    """The classical Runge-Kutta method in normal coordinates: fourth order, four evaluations.

    See `geodesic_midpoint` for the coordinates.

    Args:
        manifold: the manifold; the velocity has to be tangent to it.

    Returns:
        A diffrax solver, for `solvers.fixed` and `solvers.on_grid`.

    Raises:
        TypeError: for what is no manifold.

    References:
        Munthe-Kaas, *High Order Runge-Kutta Methods on Manifolds*, 1999.
    """
    rows = ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))
    return _geodesic("geodesic_rk4", manifold, rows, (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4)


def riemannian_divergence(manifold: Manifold, probes: int | None = None) -> Divergence:
    """The divergence of a tangent velocity with respect to the metric of a manifold.

        div v = sum_i inner(x, e_i, dv(x)[e_i]) + d log_volume_element(x)[v]

    with e_1, ..., e_d orthonormal at x. `solvers.log_prob` and `flows.cnf` with it give densities
    with respect to the volume of the metric, over a base that does. On a sphere in space it takes
    two derivatives, where `exact_divergence` takes three and needs `manifolds.tangent`.

    Args:
        manifold: the manifold.
        probes: None for the exact sum; else how many random tangent vectors e, of mean 0 and unit
            covariance, whose mean of inner(x, e, dv(x)[e]) is an unbiased estimate, which needs a
            key.

    Returns:
        Divergence: for `log_prob`, `sample_with_log_det` and `flows.cnf`. In the place of the
            squared Frobenius norm it has the sum of the squared lengths of the tangent parts of
            dv(x)[e_i].

    Raises:
        TypeError: for what is no manifold.
        ValueError: probes is not a whole number of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds, solvers
        >>> disk = manifolds.poincare_ball(2)
        >>> divergence = solvers.riemannian_divergence(disk)
        >>> x = jnp.array([[0.5, 0.0]])
        >>> v, div, _ = divergence.apply(lambda x: x, x, divergence.draw(None, x))
        >>> round(float(div[0]), 4)  # 2 + 2 x.grad log(2 / (1 - |x|^2)) = 2 + 4 / 3
        3.3333

    References:
        Chen, Lipman, *Flow Matching on General Geometries*, 2024, arXiv:2302.03660.
    """
    check_noun("riemannian_divergence", manifold, Manifold)
    if probes is not None:
        check_whole("riemannian_divergence", probes=probes)

    def draw(key, x):
        if probes is None:
            return None
        need_key("riemannian_divergence", key)
        return jax.random.rademacher(key, (x.shape[0], probes, manifold.dim), x.dtype)

    def apply(f, x, probes):
        basis = jnp.moveaxis(manifold.tangent_basis(x), 1, 0)  # [d, b, *shape]
        if probes is not None:
            basis = jnp.einsum(
                "bkd,db...->kb...", probes, basis, precision=jax.lax.Precision.HIGHEST
            )
        v, columns = jax.vmap(lambda e: jax.jvp(f, (x,), (e,)), out_axes=(None, 0))(basis)
        columns = jax.vmap(lambda c: manifold.to_tangent(x, c))(columns)
        dot = jax.vmap(lambda a, b: manifold.inner(x, a, b))
        total = jnp.sum if probes is None else jnp.mean
        change = jax.jvp(manifold.log_volume_element, (x,), (v,))[1]
        return v, total(dot(basis, columns), axis=0) + change, total(dot(columns, columns), axis=0)

    return Divergence(draw, apply)


def on_point(run: Callable, state: Any, *others: Any) -> Any:
    """run(x, ...) on the point of a state, x or (x, sums)."""
    if isinstance(state, tuple):
        return (run(state[0], *(other[0] for other in others)), *state[1:])
    return run(state, *others)


class _Projected(Wrapped):
    manifold: Manifold = eqx.field(static=True)

    @property
    def projected(self):  # whose evaluations are counted
        return self.solver

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, *rest = self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)
        return on_point(self.manifold.project, y1), *rest


def _geodesic(name, manifold, rows, weights, order):
    check_noun(name, manifold, Manifold)
    return _Geodesic(manifold, rows, weights, order)


class _Geodesic(Stepper):
    """An explicit Runge-Kutta method for u in x = exp_x0(u)."""

    manifold: Manifold = eqx.field(static=True)
    rows: tuple[tuple[float, ...], ...] = eqx.field(static=True)
    weights: tuple[float, ...] = eqx.field(static=True)
    accuracy: int = eqx.field(static=True)

    def order(self, terms):
        return self.accuracy

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        h, slopes = terms.contr(t0, t1), []
        for row in self.rows:
            y = self._moved(y0, row, slopes, h)
            v = terms.vf(t0 + sum(row) * (t1 - t0), y, args)
            slopes.append(on_point(self._chart, v, y, y0) if row else v)
        y1 = self._moved(y0, self.weights, slopes, h)
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

    def _chart(self, v, x, x0):
        """du/dt where x is at velocity v."""
        return jax.jvp(lambda x: self.manifold.log(x0, x), (x,), (v,))[1]

    def _moved(self, y0, weights, slopes, h):
        used = [(w, s) for w, s in zip(weights, slopes, strict=True) if w]
        if not used:
            return y0
        change = jax.tree.map(
            lambda *leaves: sum(h * w * leaf for (w, _), leaf in zip(used, leaves, strict=True)),
            *(s for _, s in used),
        )
        if not isinstance(y0, tuple):
            return self.manifold.exp(y0, change)
        rest = jax.tree.map(jnp.add, y0[1:], change[1:])
        return (self.manifold.exp(y0[0], change[0]), *rest)

    def evaluations(self, steps):
        return len(self.rows) * steps
