"""Densities on triangle meshes: against closed forms in the plane, and against samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm
from meshes import grid, icosphere

from jflow import distributions, flows, manifolds, solvers
from jflow.types import Velocity

STEPS = 40


def of_points(function):
    return Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: function(x))


def follows(velocity, mesh, steps=STEPS):
    """The flow of a velocity from uniform points of a mesh."""
    surface = manifolds.surface(manifolds.biharmonic(mesh))
    return flows.cnf(
        manifolds.raviart_thomas(velocity, mesh),
        distributions.uniform_on(surface),
        divergence=solvers.riemannian_divergence(surface),
        method=solvers.fixed(steps, solvers.geodesic_euler(surface)),
    )


def parts_of(mesh):
    """The middles and areas of four parts of each face."""
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
    parts = [np.stack(f, 1) for f in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))]
    return np.concatenate(parts).mean(1).astype(np.float32), np.tile(mesh.areas / 4, 4)


def test_affine_fields_in_the_plane_are_exact():
    """Of v = b (x - c) in a square whose sides nothing reaches, the density of n steps is known:
    log p0(c + (1 - b / n)^n (x - c)) - 2 b; to rounding in float32."""
    mesh = manifolds.mesh(*grid(4), num_eigenfunctions=2, closed=False)
    surface = manifolds.surface(manifolds.biharmonic(mesh))
    center, rate = np.array([[0.5, 0.45, 0.0]], np.float32), 0.7
    velocity = manifolds.raviart_thomas(of_points(lambda x: rate * (x - center)), mesh)
    x = np.random.default_rng(0).uniform(0.3, 0.7, (50, 3)).astype(np.float32) * [1, 1, 0]
    base = lambda x: jnp.sum(norm.logpdf(x, 0.4, 0.2), axis=1)  # noqa: E731
    found, _ = jax.jit(
        lambda x: solvers.log_prob(
            velocity,
            {},
            x,
            base,
            divergence=solvers.riemannian_divergence(surface),
            method=solvers.fixed(8, solvers.geodesic_euler(surface)),
        )
    )(x.astype(np.float32))
    expected = base(center + (1 - rate / 8) ** 8 * (x - center)) - 2 * rate
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_flat_square_is_the_box():
    """v = (x (1 - x), -y (1 - y) / 2) does not leave the box, and its flow is logistic. On a mesh
    of edges of 1/8 the density has integral 1 to 0.01, an error of the steps, and differs from it
    by 0.02 in total, an error of the mesh."""
    mesh = manifolds.mesh(*grid(8), num_eigenfunctions=2, closed=False)
    x, areas = parts_of(mesh)
    rates = np.array([[1.0, -0.5, 0.0]], np.float32)
    flow = follows(of_points(lambda x: rates * x * (1 - x)), mesh)
    params = {"velocity": {}, "base": {}}
    found = np.exp(jax.device_get(jax.jit(lambda x: flow.log_prob(params, x))(x)))
    expected = 1.0
    for u, rate in zip(x.T[:2].astype(np.float64), rates[0], strict=False):
        before = u / (u + (1 - u) * np.exp(rate))
        expected = expected * before * (1 - before) / (u * (1 - u))
    assert abs(found @ areas - 1) < 0.01
    assert np.abs(found - expected) @ areas < 0.02 < 0.1 < np.abs(1 - expected) @ areas


def test_on_a_closed_mesh_the_density_is_that_of_the_samples():
    """Of a constant vector, which has no divergence within a face but gathers points at one side:
    the integral is 1 to 0.01, the means of coordinates are those of 1000 samples to four standard
    errors."""
    mesh = manifolds.mesh(*icosphere(1), num_eigenfunctions=2)
    x, areas = parts_of(mesh)
    flow = follows(of_points(lambda x: jnp.zeros_like(x) + jnp.array([[0.0, 0.2, 0.4]])), mesh)
    params = {"velocity": {}, "base": {}}

    @jax.jit
    def run(key, x):
        return flow.log_prob(params, x), flow.sample(params, key, 1000)

    density, samples = jax.device_get(run(jax.random.key(0), x))
    mass = np.exp(density) * areas
    assert abs(mass.sum() - 1) < 0.01
    errors = samples.std(0) / np.sqrt(len(samples))
    assert np.all(np.abs(mass @ x / mass.sum() - samples.mean(0)) < 4 * errors)
    assert samples[:, 2].mean() > 6 * errors[2]


def test_what_it_does_not_take():
    mesh = manifolds.mesh(*icosphere(0), num_eigenfunctions=2)
    still = of_points(jnp.zeros_like)
    for call, said in [
        (lambda: manifolds.raviart_thomas(3, mesh), "manifolds.raviart_thomas: .*Velocity"),
        (lambda: manifolds.raviart_thomas(still, 3), "expected a manifolds.Mesh, got 3"),
    ]:
        with pytest.raises(TypeError, match=said):
            call()
