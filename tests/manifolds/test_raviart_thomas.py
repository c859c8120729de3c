"""Flows on triangle meshes: against closed forms in the plane, against samples, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.scipy.stats import norm
from keys import KEYS
from meshes import grid, icosphere

from jflow import distributions, flows, manifolds, solvers
from jflow.types import Velocity

STEPS = 40
ALARM = 1e-3
PARAMS = {"bijector": {}, "base": {}}


def of_points(function):
    """The velocity function(x [b, 3], t [b, 1], cond), without params."""
    return Velocity(
        lambda *_: {}, lambda params, x, t, cond=None, *, key=None: function(x, t[:, None], cond)
    )


def follows(velocity, mesh, steps=STEPS):
    """The flow of a velocity from uniform points of a mesh."""
    surface = manifolds.surface(manifolds.biharmonic(mesh))
    return flows.cnf(
        manifolds.raviart_thomas(velocity, mesh),
        distributions.uniform_on(surface),
        divergence=solvers.riemannian_divergence(surface),
        method=solvers.fixed(steps, solvers.geodesic_euler(surface)),
    )


def exactly(velocity, mesh, steps):
    """The same, by the exact map."""
    surface = manifolds.surface(manifolds.biharmonic(mesh))
    bijector = manifolds.mesh_bijector(velocity, mesh, steps)
    return flows.flow(bijector, distributions.uniform_on(surface))


def parts_of(mesh, n=2):
    """The middles [F n^2, 3] and areas [F n^2] of n^2 equal parts of each face."""
    i, j = (a.ravel() for a in np.meshgrid(range(n), range(n), indexing="ij"))
    upright, turned = (np.stack([i, j])[:, i + j < n - k] + (k + 1) / 3 for k in (0, 1))
    u, v = np.concatenate([upright, turned], axis=1) / n
    x = np.einsum("iq,fij->fqj", np.stack([1 - u - v, u, v]), mesh.vertices[mesh.faces])
    return x.reshape(-1, 3).astype(np.float32), np.repeat(mesh.areas / n**2, n**2)


def logistic(x, rates):
    """The density [n] at time 1 of uniform points of a box that move by u' = rate u (1 - u)."""
    u = x[:, :2].astype(np.float64)
    before = u / (u + (1 - u) * np.exp(rates[:2]))
    return np.prod(before * (1 - before) / (u * (1 - u)), axis=1)


def test_affine_fields_in_the_plane_are_exact():
    """Of v = b (x - c) in a square whose sides nothing reaches, the density of n steps is known:
    log p0(c + (1 - b / n)^n (x - c)) - 2 b; to rounding in float32."""
    mesh = manifolds.mesh(*grid(4), num_eigenfunctions=2, closed=False)
    surface = manifolds.surface(manifolds.biharmonic(mesh))
    center, rate = np.array([[0.5, 0.45, 0.0]], np.float32), 0.7
    velocity = manifolds.raviart_thomas(of_points(lambda x, *_: rate * (x - center)), mesh)
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
    flow = follows(of_points(lambda x, *_: rates * x * (1 - x)), mesh)
    params = {"velocity": {}, "base": {}}
    found = np.exp(jax.device_get(jax.jit(lambda x: flow.log_prob(params, x))(x)))
    expected = logistic(x, rates[0])
    assert abs(found @ areas - 1) < 0.01
    assert np.abs(found - expected) @ areas < 0.02 < 0.1 < np.abs(1 - expected) @ areas


def test_on_a_closed_mesh_the_density_is_that_of_the_samples():
    """Of a constant vector, which has no divergence within a face but gathers points at one side:
    the integral is 1 to 0.01, the means of coordinates are those of 1000 samples to four standard
    errors."""
    mesh = manifolds.mesh(*icosphere(1), num_eigenfunctions=2)
    x, areas = parts_of(mesh)
    flow = follows(of_points(lambda x, *_: jnp.zeros_like(x) + jnp.array([[0.0, 0.2, 0.4]])), mesh)
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


def turning(x, t, cond):
    """A velocity without symmetry that changes with time."""
    x = x[:, jnp.array([1, 2, 0])]
    return jnp.array([[0.0, 0.4, 0.8]]) * (1 + t) + 0.2 * jnp.sin(5 * x)


@functools.cache
def sphere():
    return manifolds.mesh(*icosphere(1), num_eigenfunctions=2)


@functools.cache
def two_steps():
    """One program: the exact flow of `turning` on the 80 faces of a sphere in two steps."""
    mesh, flow = sphere(), exactly(of_points(turning), sphere(), 2)
    x, areas = parts_of(mesh, 16)

    @jax.jit
    def run(key, x, vertices):
        samples = flow.sample(PARAMS, key, 4000)
        starts = jnp.concatenate([samples, vertices])
        ends, ahead = flow.forward(PARAMS, starts)
        back, behind = flow.inverse(PARAMS, ends)
        some = samples[:500]
        basis = manifolds.surface(manifolds.biharmonic(mesh)).tangent_basis(some)
        carried = lambda e: jax.jvp(lambda z: flow.forward(PARAMS, z)[0], (some,), (e,))[1]  # noqa: E731
        return {
            "columns": jax.vmap(carried, 1)(basis),
            "density": jnp.exp(flow.log_prob(PARAMS, x)),
            "face": mesh.locate(samples)[0],
            "starts": starts,
            "back": back,
            "log_dets": (ahead, behind),
        }

    found = jax.device_get(run(KEYS[0], x, mesh.vertices.astype(np.float32)))
    return found | {"mass": found["density"].astype(np.float64) * areas}


def test_the_exact_density_integrates_to_one_in_two_steps():
    """To 1e-3, the error of 256 equal parts a face, where densities differ by a factor of 200; the
    masses of groups of faces are those of 4000 samples by a chi-squared test."""
    r, count = two_steps(), len(sphere().faces)
    assert abs(r["mass"].sum() - 1) < 1e-3
    assert r["density"].max() > 200 * r["density"].min()
    of_faces = r["mass"].reshape(count, -1).sum(1)
    group = np.argsort(np.argsort(of_faces)) // 8  # of faces with about as much mass
    expected = np.bincount(group, of_faces) / of_faces.sum() * len(r["face"])
    counts = np.bincount(group[r["face"]])
    assert scipy.stats.chisquare(counts, expected).pvalue > ALARM


def test_there_and_back():
    """To the rounding of float32, from vertices too, which lie in no face more than in another."""
    r = two_steps()
    np.testing.assert_allclose(r["back"], r["starts"], atol=2e-5)
    ahead, behind = r["log_dets"]
    np.testing.assert_allclose(ahead, -behind, atol=1e-4)
    assert np.std(ahead) > 0.5


def test_the_determinant_is_that_of_the_derivative():
    """Of two orthonormal tangent vectors, carried along in forward mode, to 1e-3 in float32."""
    r = two_steps()
    products = np.einsum("inx,jnx->nij", *[r["columns"].astype(np.float64)] * 2)
    found = np.linalg.slogdet(products)[1] / 2
    np.testing.assert_allclose(found, r["log_dets"][0][:500], atol=1e-3)


def test_the_exact_flow_of_a_flat_square():
    """Of v = (x (1 - x), -y (1 - y) / 2) in one step, against the logistic flow of the box: the
    integral is 1 to 1e-3, what is on a side stays there, and the densities differ by 0.02 in total,
    an error of edges of 1/8."""
    mesh = manifolds.mesh(*grid(8), num_eigenfunctions=2, closed=False)
    x, areas = parts_of(mesh, 8)
    rates = np.array([[1.0, -0.5, 0.0]], np.float32)
    flow = exactly(of_points(lambda x, *_: rates * x * (1 - x)), mesh, 1)
    sides = np.array([[0, 0.3, 0], [1, 1, 0], [0.6, 0, 0]], np.float32)

    @jax.jit
    def run(x, sides):
        return flow.log_prob(PARAMS, x), flow.forward(PARAMS, sides)[0]

    density, moved = jax.device_get(run(x, sides))
    density = np.exp(density.astype(np.float64))
    assert abs(density @ areas - 1) < 1e-3
    assert np.abs(density - logistic(x, rates[0])) @ areas < 0.02
    np.testing.assert_allclose(moved[[0, 1, 2], [0, 0, 1]], [0, 1, 0], atol=2e-6)


def test_affine_maps_in_the_plane_are_exact():
    """Of v = rate (1 + t) (x - c + turn J (x - c)), J a quarter of a turn and c a vertex around
    which fluxes run: log |det| is 3 rate at c, beside it and elsewhere, and without the turn x(1) =
    c + exp(1.5 rate) (x - c), to rounding in float32."""
    mesh = manifolds.mesh(*grid(4), num_eigenfunctions=2, closed=False)
    center, rate = np.array([[0.5, 0.5, 0.0]], np.float32), 0.3
    x = np.random.default_rng(0).uniform(0.43, 0.57, (50, 3)) * [1, 1, 0]
    x[:3] = center + np.array([[0, 0, 0], [1e-6, 0, 0], [1e-4, 2e-4, 0]])
    x = x.astype(np.float32)

    def velocity(x, t, cond):
        away = x - center
        quarter = jnp.stack([-away[:, 1], away[:, 0], away[:, 2]], axis=1)
        return rate * (1 + t) * (away + cond * quarter)

    move = manifolds.mesh_bijector(of_points(velocity), mesh, 3)
    run = jax.jit(lambda x, turn: move.forward({}, x, jnp.full((50, 1), turn)))
    for turn in (0.0, 2.0):
        y, log_det = jax.device_get(run(x, turn))
        np.testing.assert_allclose(log_det, 3 * rate, atol=2e-5)
        if not turn:
            ends = center + np.exp(1.5 * rate) * (x - center)
            np.testing.assert_allclose(y, ends, atol=2e-6)
    assert np.linalg.norm(y[:3] - center, axis=1).max() < 1e-3


def test_steps_of_euler_approach_the_exact_map():
    """Of a velocity that does not change with time one step is as good as five, and Euler's steps
    along the faces are off by a first order of their length. Rows with a condition are moved by the
    velocity with it: half of them here on the way back."""
    mesh = sphere()
    surface = manifolds.surface(manifolds.biharmonic(mesh))
    velocity = of_points(lambda x, t, cond: turning(x, 0 * t, None) * (1 if cond is None else cond))
    z, back = surface.random(KEYS[1], 300), np.arange(300)[:, None] < 150

    @jax.jit
    def run(z):
        one, five = (manifolds.mesh_bijector(velocity, mesh, n).forward({}, z)[0] for n in (1, 5))
        mixed = manifolds.mesh_bijector(velocity, mesh, 1).forward(
            {}, jnp.where(back, one, z), jnp.where(back, -1.0, 1.0)
        )
        field, solver = manifolds.raviart_thomas(velocity, mesh), solvers.geodesic_euler(surface)
        euler = [
            solvers.sample(field, {}, z, method=solvers.fixed(n, solver))[0] for n in (40, 160)
        ]
        return one, five, mixed[0], euler

    one, five, mixed, euler = jax.device_get(run(z))
    np.testing.assert_allclose(five, one, atol=2e-5)
    np.testing.assert_allclose(mixed, np.where(back, z, one), atol=2e-5)
    errors = [np.linalg.norm(x - one, axis=1).mean() for x in euler]
    assert errors[1] < 0.005 and 3 < errors[0] / errors[1] < 5


def test_what_it_does_not_take():
    mesh = manifolds.mesh(*icosphere(0), num_eigenfunctions=2)
    still = of_points(lambda x, *_: jnp.zeros_like(x))
    for call, said in [
        (lambda: manifolds.raviart_thomas(3, mesh), "manifolds.raviart_thomas: .*Velocity"),
        (lambda: manifolds.raviart_thomas(still, 3), "expected a manifolds.Mesh, got 3"),
        (lambda: manifolds.mesh_bijector(3, mesh), "manifolds.mesh_bijector: .*Velocity"),
        (lambda: manifolds.mesh_bijector(still, 3), "mesh_bijector: expected a manifolds.Mesh"),
    ]:
        with pytest.raises(TypeError, match=said):
            call()
    with pytest.raises(ValueError, match="mesh_bijector: expected steps to be a whole number"):
        manifolds.mesh_bijector(still, mesh, steps=0)
    with pytest.raises(ValueError, match=r"mesh_bijector: expected x of shape \[b, 3\], got \[4\]"):
        manifolds.mesh_bijector(still, mesh).forward({}, jnp.zeros(4))
    wide = of_points(lambda x, *_: x[:, :1])
    with pytest.raises(ValueError, match=r"mesh_bijector: expected a velocity .* \[30, 3\]"):
        manifolds.mesh_bijector(wide, mesh).forward({}, jnp.zeros((1, 3)))
