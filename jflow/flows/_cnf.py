"""Continuous normalizing flows: a velocity and a base distribution as a `Flow`."""

import diffrax
import jax
import jax.numpy as jnp

from jflow import solvers
from jflow._core.checks import (
    check_cond,
    check_draws,
    check_key,
    check_noun,
    check_params,
    count_rows,
)
from jflow._core.keys import split_key
from jflow._core.nouns import base_log_prob, sample_source
from jflow.solvers import Divergence, Method, exact_divergence
from jflow.types import Distribution, Flow, Velocity

__all__ = ["cnf"]

_DEFAULT, _EXACT = solvers.adaptive(diffrax.Tsit5()), exact_divergence()


def cnf(
    velocity: Velocity,
    base: Distribution,
    *,
    divergence: Divergence = _EXACT,
    method: Method | int | None = None,
    t1: float = 1.0,
) -> Flow:
    """Continuous normalizing flow: a velocity and a base distribution as a `Flow`.

    Also known as: continuous normalizing flow, FFJORD, neural ODE density.

    The map is the solution of dx/dt = velocity(x, t, cond) from the base at t=0 to the data at t1,
    and

        log p(x(t1)) = log p_base(x(0)) - integral from 0 to t1 of div velocity dt,

    in nats; log-densities and log-determinants are [b].

    A velocity trained by `losses.flow_matching` drops in as params['velocity'], over a standard
    normal base; `losses.nll(cnf(...))` trains by likelihood, `losses.regularized_nll` with
    penalties. Training through the solve is cheaper with `solvers.fixed` or `solvers.on_grid`,
    where the memory of the gradient of the parameters does not grow with the batch. The rows of a
    failed solve are NaN; `solvers.log_prob` says why. Dropout is off inside the ODE. For images of
    8 bits see `with_dequantization`.

    With tolerances, derivatives are in reverse mode alone: jax.jvp, jax.hessian and gradients of
    gradients (score matching) want a fixed number of steps, or an adjoint that knows them,
    `solvers.adaptive(adjoint=diffrax.DirectAdjoint())`.

    Args:
        velocity: the right-hand side, x [b, *event] and t [b] -> [b, *event].
        base: the distribution at t=0.
        divergence: `solvers.exact_divergence()`, deterministic, or an estimate that needs a key in
            every function but `sample`: `solvers.hutchinson(probes)` or
            `solvers.hutch_plus_plus(sketch)`.
        method: how the ODE is solved: a `solvers.Method` whose grid, if it has one, runs from 0 to
            the time of the data, or a number of steps. None is Tsit5 with rtol = atol = 1e-5, each
            row with its own steps.
        t1: the time of the data.

    Returns:
        Flow: the flow, with params {'velocity', 'base'}.

    Raises:
        ValueError: an option is out of its range, at construction; or the divergence is an estimate
            and there is no key, at the call.
        TypeError: velocity is not a `Velocity`, or base not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, flows, oracles
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0], 4.0))
        >>> flow = flows.cnf(velocity, distributions.normal((1,)), method=32)
        >>> log_prob = flow.log_prob({"velocity": {}, "base": {}}, jnp.zeros((1, 1)))
        >>> round(float(log_prob[0]), 2)  # that of N(0, 4): -log(8 pi) / 2
        -1.61

    References:
        Chen, Rubanova, Bettencourt, Duvenaud, *Neural Ordinary Differential Equations*, 2018,
            arXiv:1806.07366.
    """
    there = solvers.as_method("cnf", method, _DEFAULT, t1=t1, rising=True)
    back = solvers.reverse(there)
    solvers.check_divergence("cnf", divergence)
    check_noun("cnf", velocity, Velocity)
    check_noun("cnf", base, Distribution, Flow)

    def init(key, x, cond=None):
        check_key("flows.cnf.init", key)
        x, cond = (
            jnp.asarray(x),
            check_cond("flows.cnf.init", cond, count_rows("flows.cnf.init", x)),
        )
        velocity_key, base_key = jax.random.split(key)
        t = jnp.zeros_like(x, shape=x.shape[:1])
        return {
            "velocity": velocity.init(velocity_key, x, t, cond),
            "base": base.init(base_key, x, cond),
        }

    def moved(name, params, x, cond, key, **options):
        cond = check_cond(name, cond, count_rows(name, x))
        x, log_det, _ = solvers.sample_with_log_det(
            velocity, params["velocity"], x, cond, key=key, divergence=divergence, **options
        )
        return x, log_det

    def forward(params, z, cond=None, *, key=None):
        check_params("flows.cnf.forward", params, "velocity", "base")
        return moved("flows.cnf.forward", params, z, cond, key, method=there, t1=t1)

    def inverse(params, x, cond=None, *, key=None):
        check_params("flows.cnf.inverse", params, "velocity", "base")
        ends = {"t0": t1, "t1": 0.0} if back.grid is None else {}  # a grid has its own
        return moved("flows.cnf.inverse", params, x, cond, key, method=back, **ends)

    def density(params, z, cond, key):
        return base_log_prob("cnf", base, params, z, check_cond("cnf", cond, z.shape[0]), key)

    def log_prob(params, x, cond=None, *, key=None):
        name = "flows.cnf.inverse"
        check_params(name, params, "velocity", "base")
        cond = check_cond(name, cond, count_rows(name, x))
        probe_key, base_key = split_key(key, 2)
        options = {"key": probe_key, "divergence": divergence, "method": there, "t1": t1}
        of_base = lambda z: density(params, z, cond, base_key)  # noqa: E731
        value, _ = solvers.log_prob(velocity, params["velocity"], x, of_base, cond, **options)
        return value

    def sample(params, key, n, cond=None):
        check_params("flows.cnf.sample", params, "velocity", "base")
        n, cond = check_draws("flows.cnf.sample", key, n, cond)
        z = sample_source(base, params, key, n, cond)
        x, _ = solvers.sample(velocity, params["velocity"], z, cond, method=there, t1=t1)
        return x

    def sample_and_log_prob(params, key, n, cond=None):
        check_params("flows.cnf.sample_and_log_prob", params, "velocity", "base")
        n, cond = check_draws("flows.cnf.sample_and_log_prob", key, n, cond)
        base_key, probe_key, density_key = jax.random.split(key, 3)
        z = sample_source(base, params, base_key, n, cond)
        x, log_det = forward(params, z, cond, key=probe_key)
        return x, density(params, z, cond, density_key) - log_det

    return Flow(init, log_prob, sample, sample_and_log_prob, forward, inverse)
