"""Reflected flows: solvers and stochastic steps that do not leave a domain.

At the boundary the part of a velocity that points outward is taken away by reflection, so that the
flow slides along it:

    dx = v(x, t) dt + dL,      L grows only on the boundary, along the inner normal

References:
    Xie, Zhu, Yu, Yang, Cheng, Zhang, Zhang, Zhang, *Reflected Flow Matching*, 2024,
        arXiv:2405.16577.
    Lou, Ermon, *Reflected Diffusion Models*, 2023, arXiv:2304.04740 (the stochastic step).
"""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax

from jflow._core.checks import described
from jflow.solvers._integrate import count_evaluations
from jflow.solvers._wrapped import Wrapped
from jflow.types import Domain, Step

__all__ = ["reflected", "reflected_step"]


def reflected(solver: diffrax.AbstractSolver, domain: Domain) -> diffrax.AbstractSolver:
    """A solver whose states stay in a domain: each step of another solver, reflected.

        x_next = reflect(step(x)),      with the velocity taken at reflect(x) in every stage

    It is for samples. The flow that slides along the boundary has no inverse there and no density:
    `solvers.log_prob` goes with a plain solver, and is that of the reflected flow as far as the
    velocity points nowhere outward at the boundary. A solver that starts a step with the last
    velocity of the step before (`diffrax.Tsit5`) evaluates it anew.

    Args:
        solver: any solver of diffrax or of `jflow.solvers`. With tolerances (`solvers.adaptive`)
            the error is that of the step before it is reflected.
        domain: of `jflow.domains`; the states are one array, not a dict of parts.

    Returns:
        A diffrax solver, for `solvers.fixed`, `solvers.on_grid` and `solvers.adaptive`.

    Raises:
        TypeError: domain is not a `Domain`, or solver not a diffrax solver.

    Examples:
        >>> import diffrax
        >>> import jax.numpy as jnp
        >>> from jflow import domains, solvers
        >>> from jflow.types import Velocity
        >>> right = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x + 1)
        >>> solver = solvers.reflected(diffrax.Euler(), domains.box((1,)))
        >>> method = solvers.fixed(8, solver)
        >>> x, _ = solvers.sample(right, {}, jnp.array([[0.5]]), method=method)
        >>> x.tolist()  # within a step of the boundary
        [[1.0]]

    References:
        Xie, Zhu, Yu, Yang, Cheng, Zhang, Zhang, Zhang, *Reflected Flow Matching*, 2024,
            arXiv:2405.16577.
    """
    _check_domain("solvers.reflected", domain)
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(
            f"solvers.reflected: expected solver to be a diffrax.AbstractSolver, got"
            f" {described(solver)}"
        )
    return _Reflected(solver, domain.reflect)


def reflected_step(step: Step, domain: Domain) -> Step:
    """A stochastic step that stays in a domain: the draw of another step, reflected.

        x_next = reflect(mean + std e)

    With `euler_maruyama` it is the Euler-Maruyama step of the reflected SDE. The score of a
    velocity that `euler_maruyama` takes by itself is that of a path from normal noise: give the
    score, where the source is another.

    Args:
        step: such as `solvers.euler_maruyama(velocity, noise, score=score)`.
        domain: of `jflow.domains`.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), for `sample_sde`. Mean
            and std are those of the normal law before it is reflected: in a box the log-density of
            the step is `domains.reflected_normal_log_prob(x_next, mean, std, low, high)`, and
            `step_log_prob` is not. With key=None x_next is the mean, reflected.

    Raises:
        TypeError: domain is not a `Domain`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import domains, solvers
        >>> from jflow.types import Velocity
        >>> still = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> brownian = solvers.euler_maruyama(still, 0.5, score=lambda params, x, t, cond: 0 * x)
        >>> step = solvers.reflected_step(brownian, domains.box((1,)))  # dW, reflected
        >>> x0, grid = jnp.full((100, 1), 0.5), solvers.grids.uniform(3)
        >>> x, _ = solvers.sample_sde(step, {}, x0, jax.random.key(0), grid)
        >>> bool(jnp.all((x >= 0) & (x <= 1)))
        True

    References:
        Lou, Ermon, *Reflected Diffusion Models*, 2023, arXiv:2304.04740.
    """
    _check_domain("solvers.reflected_step", domain)

    def reflecting(params, x, t, t_next, key, cond=None):
        x_next, mean, std = step(params, x, t, t_next, key, cond)
        return domain.reflect(x_next), mean, std

    return reflecting


class _Inside(diffrax.AbstractTerm):
    """A term whose vector field is taken at the reflected state."""

    term: diffrax.AbstractTerm
    reflect: Callable = eqx.field(static=True)

    def vf(self, t, y, args):
        return self.term.vf(t, jax.tree.map(self.reflect, y), args)

    def contr(self, t0, t1, **kwargs):
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf, control):
        return self.term.prod(vf, control)

    def is_vf_expensive(self, t0, t1, y, args):
        return self.term.is_vf_expensive(t0, t1, y, args)


class _Reflected(Wrapped):
    """A solver whose stages are evaluated, and whose steps end, inside."""

    reflect: Callable = eqx.field(static=True)

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(_Inside(terms, self.reflect), t0, t1, y0, args)

    def func(self, terms, t0, y0, args):
        return self.solver.func(_Inside(terms, self.reflect), t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, error, dense, state, result = self.solver.step(
            _Inside(terms, self.reflect), t0, t1, y0, args, solver_state, True
        )
        return jax.tree.map(self.reflect, y1), error, dense, state, result

    def evaluations(self, steps):
        """No velocity of the step before is used again: as if every step were the first."""
        return count_evaluations(self.solver, steps, steps)


def _check_domain(name, domain):
    if not isinstance(domain, Domain):
        raise TypeError(f"{name}: expected a Domain (jflow.domains), got {described(domain)}")
