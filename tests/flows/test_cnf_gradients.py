"""Gradients of log-densities through the solve, by every adjoint: a closed form, and finite
differences."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import distributions, solvers, types
from jflow.flows import cnf

MATRIX = np.asarray([[0.3, -0.8], [0.5, -0.4]])
ADJOINTS = {
    "through the steps": lambda: None,  # the default on a fixed grid
    "checkpoint": diffrax.RecursiveCheckpointAdjoint,
    "direct": diffrax.DirectAdjoint,
    "backsolve": diffrax.BacksolveAdjoint,
}


def linear(params, x, t, cond=None, *, key=None):
    return x @ params["matrix"].T + params["shift"][None] * t[:, None]


def bent(params, x, t, cond=None, *, key=None):
    return jnp.tanh(x @ params["matrix"].T + t[:, None]) * params["shift"][None] + x**2 / 4


def inputs():
    params = {"matrix": jnp.asarray(MATRIX), "shift": jnp.asarray([0.7, -1.1])}
    return params, jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))


def standard_normal(x):
    return -0.5 * jnp.sum(x**2 + jnp.log(2 * jnp.pi), axis=1)


def by_solve(field, **how):
    def total(params, x, key=None):
        velocity = types.Velocity(None, field)
        return jnp.sum(
            solvers.log_prob(velocity, params, x, standard_normal, key=key, **how)[0]
            * jnp.arange(1.0, 4.0)
        )

    return total


def in_closed_form(params, x):
    """v = A x + c t: as one linear system of (x, t, 1), x_0 = E(-1) of it at t = 1."""
    system = (
        jnp.zeros((4, 4))
        .at[:2, :2]
        .set(params["matrix"])
        .at[:2, 2]
        .set(params["shift"])
        .at[2, 3]
        .set(1.0)
    )
    state = jnp.concatenate([x, jnp.ones((len(x), 2))], axis=1)
    x0 = (state @ jax.scipy.linalg.expm(-system).T)[:, :2]
    return jnp.sum((standard_normal(x0) - jnp.trace(params["matrix"])) * jnp.arange(1.0, 4.0))


@pytest.mark.parametrize("name", ADJOINTS)
def test_closed_form_of_a_linear_field(name, x64):
    """Values and gradients in params and x. 40 steps of order 5; Backsolve solves its own equation
    as well as that."""
    params, x = inputs()
    expected = jax.jit(jax.value_and_grad(in_closed_form, (0, 1)))(params, x)
    hows = [solvers.fixed(40)]
    if name in ("checkpoint", "backsolve"):  # "direct" unrolls its max_steps
        hows.append(solvers.adaptive(rtol=1e-8, atol=1e-8))
    for how in hows:
        found = jax.jit(
            jax.value_and_grad(
                by_solve(linear, method=how._replace(adjoint=ADJOINTS[name]())), (0, 1)
            )
        )(params, x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected
        )


def test_adjoints_agree_with_finite_differences(x64):
    """A bent field, with an estimate under one key, and exact: the central difference of the same
    discrete solve, by the midpoint rule, which is a third of the default to compile. The exact
    divergence is with each adjoint in the closed form above. Backsolve, which solves an equation of
    its own, has the default."""
    params, x = inputs()
    direction = jax.tree.map(
        lambda p, k: jax.random.normal(k, p.shape),
        (params, x),
        jax.tree.unflatten(
            jax.tree.structure((params, x)), list(jax.random.split(jax.random.key(1), 3))
        ),
    )
    moved = [
        jax.tree.map(lambda p, d, h=h: p + h * d, (params, x), direction) for h in (1e-5, -1e-5)
    ]
    midpoint, default = solvers.fixed(30, diffrax.Midpoint()), solvers.fixed(30)
    estimate, key = solvers.hutchinson(1), jax.random.key(0)

    def slope(method, divergence, name):
        how = method._replace(adjoint=ADJOINTS[name]())
        total = by_solve(bent, divergence=divergence, method=how)
        grads = jax.jit(jax.grad(total, (0, 1)))(params, x, key)
        pairs = zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
        return sum(jnp.sum(g * d) for g, d in pairs)

    def difference(method, divergence):
        total = jax.jit(by_solve(bent, divergence=divergence, method=method))
        there, back = (total(*at, key) for at in moved)
        return (there - back) / 2e-5

    exact = solvers.exact_divergence()
    of_steps = slope(midpoint, estimate, "checkpoint")
    # h^2, and the rounding of 1e-16 / h
    np.testing.assert_allclose(of_steps, difference(midpoint, estimate), rtol=1e-7)
    np.testing.assert_allclose(
        slope(midpoint, exact, "checkpoint"), difference(midpoint, exact), rtol=1e-7
    )
    for name in ("direct", "through the steps"):
        np.testing.assert_allclose(slope(midpoint, estimate, name), of_steps, rtol=1e-10)
    # the accuracy of 30 steps
    known = difference(default, estimate)
    np.testing.assert_allclose(slope(default, estimate, "backsolve"), known, rtol=1e-5)


def test_samples_carry_their_density(x64):
    """sample_and_log_prob and log_prob of the same x: two solves of 40 steps; and both gradients, x
    being fixed."""
    params, _ = inputs()
    flow = cnf(types.Velocity(None, bent), distributions.normal((2,)), method=40)
    params = {"velocity": params, "base": {}}
    x, log_prob = jax.jit(flow.sample_and_log_prob, static_argnums=2)(params, jax.random.key(0), 6)
    np.testing.assert_allclose(jax.jit(flow.log_prob)(params, x), log_prob, atol=1e-7)
    z, down = flow.inverse(params, x)
    y, up = flow.forward(params, z)
    np.testing.assert_allclose(y, x, atol=1e-7)
    np.testing.assert_allclose(up, -down, atol=1e-7)


def test_density_before_the_end(x64):
    """t1: the density at an earlier time is that of the flow stopped there."""
    params, x = inputs()
    flow = cnf(types.Velocity(None, bent), distributions.normal((2,)), method=40, t1=0.6)
    half = cnf(
        types.Velocity(None, bent),
        distributions.normal((2,)),
        method=solvers.on_grid(np.linspace(0, 0.6, 41)),
    )
    params = {"velocity": params, "base": {}}
    np.testing.assert_allclose(flow.log_prob(params, x), half.log_prob(params, x), rtol=1e-12)
    z, _ = flow.inverse(params, x)
    back, _ = solvers.sample(types.Velocity(None, bent), params["velocity"], z, t1=0.6, method=200)
    np.testing.assert_allclose(back, x, atol=1e-5)
    sample, log_prob = flow.sample_and_log_prob(params, jax.random.key(0), 4)
    np.testing.assert_allclose(flow.log_prob(params, sample), log_prob, atol=1e-7)
