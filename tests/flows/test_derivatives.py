"""Derivatives that JAX does not take by itself: one recipe for each rule of ours, and the ODE,
which needs an argument."""

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import bijectors as bj
from jflow import distributions, flows, nets, solvers

SMALL = {
    "depth": 1,
    "hidden": (2,),
    "activation": nn.tanh,
    "standardize": False,
}  # whose log_std has no gradient
RECIPES = {
    "a kernel": lambda: flows.neural_spline((2,), bins=2, bound=3.0, linear=False, **SMALL),
    "a fixed point": lambda: flows.iaf((2,), **SMALL),
    "a scalar root": lambda: flows.planar((2,), depth=1, standardize=False),
    "activations rebuilt": lambda: flows.real_nvp((2,), reversible=True, **SMALL),
    "a series of products": lambda: flows.residual_flow(
        (2,), **SMALL, log_det=bj.log_dets.neumann(2)
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_forward_mode_and_second_derivatives_are_those_of_differences(x64, name):
    """In the params and x at once, along one direction: the slope by jvp is that of the gradient,
    to rounding, and a product with the Hessian the central difference of the gradient, of error
    h^2."""
    flow, rng, h = RECIPES[name](), np.random.default_rng(0), 1e-4
    x = rng.normal(size=(2, 2))
    shapes = jax.eval_shape(flow.init, jax.random.key(0), x), x
    at, along = (
        jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes) for _ in range(2)
    )

    @jax.jit
    def run(at, along):
        def objective(at):
            return jnp.sum(jnp.sin(flow.log_prob(*at, key=jax.random.key(1))))

        def derivatives(step):
            moved = jax.tree.map(lambda a, v: a + step * v, at, along)
            slope = jax.jvp(objective, (moved,), (along,))[1]
            return slope, *jax.jvp(jax.grad(objective), (moved,), (along,))

        return jax.lax.map(derivatives, jnp.array([-h, 0, h]))

    slope, gradient, product = jax.tree.map(np.asarray, run(at, along))
    dots = jax.tree.map(lambda g, v: np.sum(g * v, axis=tuple(range(1, g.ndim))), gradient, along)
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(dots)), rtol=1e-8)
    for got, g in zip(*map(jax.tree.leaves, (product, gradient)), strict=True):
        np.testing.assert_allclose(got[1], (g[2] - g[0]) / (2 * h), rtol=1e-5, atol=1e-6)


def test_an_ode_names_the_adjoint_that_forward_mode_needs():
    """Without one a velocity of zero, at init, leaves the Hessian of the normal base, minus the
    identity."""
    x = jnp.array([0.3, -0.2])

    def density(adjoint=None):
        velocity = jflow.velocity(nets.TimeMLP((2,), nn.tanh, time_scale=1.0))
        flow = flows.cnf(
            velocity,
            distributions.normal((2,)),
            method=solvers.fixed(1, diffrax.Euler(), adjoint=adjoint),
        )
        params = jax.tree.map(jnp.zeros_like, jax.eval_shape(flow.init, jax.random.key(0), x[None]))
        return lambda x: flow.log_prob(params, x[None])[0]

    for adjoint in (diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()):
        f = density(adjoint)
        for derivative in (lambda x, f=f: jax.jvp(f, (x,), (x,))[1], jax.hessian(f)):
            with pytest.raises(TypeError, match=r"adjoint=diffrax.DirectAdjoint\(\)"):
                jax.jit(derivative).lower(x)
    hessian = jax.jit(jax.hessian(density()))(x)
    np.testing.assert_allclose(hessian, -np.eye(2), atol=1e-6)
