"""Triangle meshes: what is wrong with one is named, eigenvalues are those of the sphere, walks are
straight, and the simulated paths go down along a premetric to their ends."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
import scipy.stats
from keys import KEYS
from meshes import grid, icosphere

from jflow import manifolds, paths

ALARM = 1e-3


@functools.cache
def sphere():
    return manifolds.mesh(*icosphere(2), num_eigenfunctions=48)


@functools.cache
def corner():
    """A square without its upper right quarter."""
    return manifolds.mesh(
        *grid(8, lambda x, y: x < 0.5 or y < 0.5), num_eigenfunctions=30, closed=False
    )


def test_eigenvalues_and_areas_approach_those_of_the_sphere():
    """l (l + 1), 2 l + 1 times; the error is of second order in the length of edges."""
    expected = np.concatenate([[l * (l + 1)] * (2 * l + 1) for l in (1, 2, 3)])
    errors, areas = [], []
    for level in (2, 3):
        made = manifolds.mesh(*icosphere(level), num_eigenfunctions=15)
        errors.append(np.abs(made.eigenvalues / expected - 1).max())
        areas.append(4 * np.pi - made.areas.sum())
        _, mass = manifolds.laplacian(made.vertices, made.faces)
        products = made.eigenfunctions.T @ mass @ made.eigenfunctions
        np.testing.assert_allclose(products, np.eye(15), atol=1e-8)
        np.testing.assert_allclose(mass.diagonal().sum(), made.areas.sum(), rtol=1e-12)
    assert errors[1] < 0.02 and 3 < errors[0] / errors[1] < 5
    assert 0 < areas[1] < 0.1 and 3 < areas[0] / areas[1] < 5


def test_the_energy_of_a_linear_function_is_exact():
    """f^T L f = |slope|^2 area in the plane; constants have none."""
    vertices, faces = grid(3)
    stiffness, mass = manifolds.laplacian(vertices, faces)
    f = vertices @ [2.0, -1.0, 0.0]
    np.testing.assert_allclose(f @ stiffness @ f, 5.0, rtol=1e-12)
    np.testing.assert_allclose(stiffness @ np.ones(len(f)), 0, atol=1e-12)
    np.testing.assert_allclose(mass.diagonal().sum(), 1, rtol=1e-12)


@functools.cache
def measured():
    """One program: of points of the sphere's mesh and around it."""
    made = sphere()
    surface = manifolds.surface(manifolds.biharmonic(made))

    @jax.jit
    def run(key, far):
        keys = jax.random.split(key, 3)
        x, y = surface.random(keys[0], 2000), surface.random(keys[1], 2000)
        v = surface.to_tangent(x[:100], jax.random.normal(keys[2], (100, 3)))
        v = 0.3 * v / jnp.linalg.norm(v, axis=1, keepdims=True)
        at = made.locate(far)
        slope = jax.grad(lambda x: jnp.sum(surface.dist(x, y[:4])))(y[:4])
        return {
            "x": x,
            "face": made.locate(x)[0],
            "again": surface.project(x),
            "near": surface.project(far),
            "weights": at[1],
            "v": v,
            "walked": surface.exp(x[:100], v),
            "basis": surface.tangent_basis(x[:100]),
            "dist": surface.dist(x, y),
            "y": y,
            "same": surface.dist(x[:4], x[:4]),
            "slope": slope,
            "log": surface.log(x[:100], y[:100]),
        }

    far = 1.3 * np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    return jax.device_get(run(KEYS[0], far)) | {"far": far}


def test_the_nearest_point_and_uniform_draws():
    """No draw on the mesh is nearer than what `project` gives, a point stays where it is, and draws
    are in proportion to the area: chi-squared over groups of faces."""
    r, made = measured(), sphere()
    np.testing.assert_allclose(r["again"], r["x"], atol=1e-6)
    away = np.linalg.norm(r["near"] - r["far"], axis=1)
    vertices = np.concatenate([made.vertices, r["x"]])
    nearest = np.linalg.norm(r["far"][:, None] - vertices, axis=2).min(1)
    assert np.all(away <= nearest + 1e-6) and np.all(nearest - away < 0.2)
    np.testing.assert_allclose(r["weights"].sum(1), 1, atol=1e-6)
    assert np.all(r["weights"] >= -1e-6)
    group = np.arange(len(made.faces)) % 20
    counts = np.bincount(group[r["face"]], minlength=20)
    shares = np.bincount(group, made.areas) / made.areas.sum()
    assert scipy.stats.chisquare(counts, 2000 * shares).pvalue > ALARM
    up = np.sort(r["x"][:, 2] / np.linalg.norm(r["x"], axis=1))  # Archimedes, nearly
    assert np.abs((up + 1) / 2 - np.linspace(0, 1, 2000)).max() < 0.05


def test_a_walk_goes_straight_on_over_the_edges():
    """On the sphere's mesh to 0.03 of where a great circle ends, 0.3 away, with bases that are
    orthonormal and tangent; in the plane a straight line, which slides along a boundary."""
    r = measured()
    x, v = r["x"][:100].astype(np.float64), r["v"].astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    v = v - np.sum(x * v, 1, keepdims=True) * x
    v = v / np.linalg.norm(v, axis=1, keepdims=True)
    ideal = np.cos(0.3) * x + np.sin(0.3) * v
    assert np.abs(r["walked"] - ideal).max() < 0.03
    products = np.einsum("nik,njk->nij", r["basis"], r["basis"])
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(2), (100, 2, 2)), atol=1e-5)
    inside = np.einsum("nik,nk->ni", r["basis"], r["v"])
    np.testing.assert_allclose(np.linalg.norm(inside, axis=1), 0.3, rtol=1e-5)

    plane = manifolds.surface(manifolds.biharmonic(corner()))
    x = jnp.array([[0.1, 0.1, 0.0], [0.3, 0.3, 0.0], [0.9, 0.3, 0.0]])
    v = jnp.array([[0.25, 0.31, 0.5], [-0.17, 0.23, 0.0], [-0.15, 0.5, 0.0]])
    ends = plane.exp(x, v)
    np.testing.assert_allclose(ends[:2], (x + v)[:2] * jnp.array([[1.0, 1.0, 0.0]]), atol=1e-6)
    np.testing.assert_allclose(ends[2], [0.75, 0.5, 0.0], atol=1e-3)  # along the inner edge


def test_premetrics_vanish_at_the_point_alone():
    """0 with slope 0 where the points are one, and above 0 elsewhere; the biharmonic one is the
    series of Legendre polynomials on the sphere, to 5%."""
    r, made = measured(), sphere()
    np.testing.assert_array_equal(r["same"], 0)
    np.testing.assert_array_equal(r["slope"], 0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    cosine = np.sum(unit(r["x"]) * unit(r["y"]), axis=1).astype(np.float64)
    square = sum(
        (2 * l + 1)
        / (2 * np.pi)
        * (1 - scipy.special.eval_legendre(l, cosine))
        / (l * (l + 1)) ** 2
        for l in range(1, 7)
    )
    far = cosine < 0.9
    np.testing.assert_allclose(r["dist"][far], np.sqrt(square[far]), rtol=0.05)
    for metric in (
        manifolds.biharmonic(made),
        manifolds.diffusion(made, np.float64(0.05)),
        manifolds.commute(made),
    ):
        embedded = made.eigenfunctions * np.sqrt(metric.weights)
        gaps = scipy.spatial.distance.pdist(embedded)
        assert gaps.min() > 0.02 * gaps.max()


@pytest.mark.parametrize("name", ("biharmonic", "diffusion"))
def test_a_path_goes_down_to_its_end(name):
    """d(x_t, x1) is within 3% of d(x0, x1) of (1 - t) d(x0, x1), the end within a tenth of an edge
    of x1, for 95 of 100 pairs at least; the target is the slope of the point, by differences, to
    15% for half of them; the biharmonic path is a great circle, by its symmetry."""
    made = sphere()
    make = {"biharmonic": manifolds.biharmonic, "diffusion": lambda m: manifolds.diffusion(m, 0.3)}
    metric = make[name](made)
    path, surface, n = paths.premetric(metric, steps=100), manifolds.surface(metric), 60

    @jax.jit
    def run(key):
        x0, x1 = (surface.random(k, n) for k in jax.random.split(key))
        t = jnp.linspace(0.1, 0.8, n)
        at = jnp.concatenate([t - 0.02, t, t + 0.02, jnp.ones(n)])
        four = lambda x: jnp.concatenate([x] * 4)  # noqa: E731
        points = path.point(four(x0), four(x1), at).reshape(4, n, 3)
        d = metric.dist(jnp.concatenate([x0, points[1]]), jnp.concatenate([x1, x1]))
        return x0, x1, t, points, path.target(x0, x1, t), d.reshape(2, n)

    x0, x1, t, points, target, (d0, d) = jax.device_get(run(KEYS[1]))
    before, middle, after, end = points
    assert np.mean(np.abs(d - (1 - t) * d0) < 0.03 * d0) >= 0.95
    assert np.mean(np.linalg.norm(end - x1, axis=1) < 0.03) >= 0.95
    error = np.linalg.norm((after - before) / 0.04 - target, axis=1)
    assert np.median(error / np.linalg.norm(target, axis=1)) < 0.15
    if name == "biharmonic":
        away = np.abs(np.einsum("ni,ni->n", np.cross(x0, x1), middle))
        assert np.median(away) < 0.02 and np.max(away) < 0.2


def test_a_path_goes_around_a_corner():
    """From one arm to the other it stays on the mesh, off the straight line, and arrives."""
    made = corner()
    path = paths.premetric(manifolds.biharmonic(made), steps=80)
    x0 = np.array([[0.9, 0.3, 0.0], [0.95, 0.1, 0.0]], np.float32)
    x1 = np.array([[0.2, 0.9, 0.0], [0.45, 0.95, 0.0]], np.float32)
    times = np.linspace(0, 1, 9, dtype=np.float32)

    @jax.jit
    def run(times):
        walk = jax.vmap(lambda t: path.point(x0, x1, jnp.full(2, t)))(times)
        return walk, jax.vmap(lambda x: made.locate(x))(walk)

    walk, (face, weights) = jax.device_get(run(times))
    on_it = np.einsum("tbi,tbij->tbj", weights, made.vertices[made.faces[face]])
    np.testing.assert_allclose(walk, on_it, atol=1e-5)
    np.testing.assert_allclose(walk[0], x0, atol=1e-6)
    assert np.all(np.linalg.norm(walk[-1] - x1, axis=1) < 0.05)
    assert np.all((walk[..., 0] <= 0.5 + 1e-5) | (walk[..., 1] <= 0.5 + 1e-5))


def test_libigl(x64):
    """The Laplacian and the areas to rounding, and walks as far as the exact distance along the
    surface, in float64 (make_mesh_fixtures.py). A walk past a vertex may not be the shortest way,
    as 2 of 12 are not."""
    peer = np.load(Path(__file__).parents[1] / "peers/meshes.npz")
    stiffness, mass = manifolds.laplacian(peer["vertices"], peer["faces"])
    np.testing.assert_allclose(stiffness.toarray(), peer["stiffness"], atol=1e-12)
    np.testing.assert_allclose(mass.diagonal(), peer["mass"], rtol=1e-12)
    made = manifolds.mesh(peer["vertices"], peer["faces"], num_eigenfunctions=2)
    walked = jax.jit(manifolds.surface(manifolds.biharmonic(made)).exp)(peer["x"], peer["v"])
    np.testing.assert_allclose(walked, peer["y"], atol=1e-9)
    longer = np.linalg.norm(peer["v"], axis=1) - peer["dist"]
    assert longer.min() > -1e-9 and np.sum(longer < 1e-9) == 10


def test_what_is_wrong_with_a_mesh_is_named():
    vertices, faces = icosphere(0)
    square, halves = grid(1)
    moved = lambda at, value: np.where(np.arange(len(vertices))[:, None] == at, value, vertices)  # noqa: E731
    flipped = np.array(faces)
    flipped[7] = flipped[7, ::-1]
    two = np.concatenate([faces, faces + 12]), np.concatenate([vertices, vertices + 5])
    for given, said in [
        ((vertices[:, :2], faces), r"expected vertices of shape \[n, 3\], got \[12, 2\]"),
        ((vertices, faces.astype(float)), "expected faces to be whole numbers, got float64"),
        ((moved(3, np.nan), faces), "expected finite vertices, got vertex 3"),
        ((vertices[:-1], faces), "expected faces of vertices 0 to 10, got face"),
        ((vertices, [*faces, [4, 5, 4]]), r"three different vertices, got face 20: \[4, 5, 4\]"),
        ((np.concatenate([square, [[2.0, 2, 0]]]), [[0, 3, 4]]), "expected faces with an area"),
        ((np.concatenate([vertices, [[9.0, 9, 9]]]), faces), "1 unused, first vertex 12"),
        ((moved(3, vertices[8]), faces), r"got vertices \[3, 8\] at the same place: merge"),
        ((vertices, flipped), "got face 7, .* against 3 of its neighbors: it is flipped"),
        ((vertices, [*faces, faces[0][::-1]]), "at most two faces along an edge, got 3"),
        ((vertices, faces[:-1]), "expected a closed mesh, got a hole: 3 edges with one face"),
        ((two[1], two[0]), r"expected one piece, got 2, of \[12, 12\] vertices"),
    ]:
        with pytest.raises(ValueError, match=f"manifolds.mesh: .*{said}"):
            manifolds.mesh(*given, num_eigenfunctions=2)
    made = manifolds.mesh(square, halves, num_eigenfunctions=2, closed=False)
    for call, kind, said in [
        (lambda: manifolds.mesh(vertices, faces), ValueError, "num_eigenfunctions < 11, got 100"),
        (lambda: manifolds.diffusion(made, 0.0), ValueError, "manifolds.diffusion: .* time > 0"),
        (lambda: manifolds.biharmonic(3), TypeError, "manifolds.biharmonic: .*Mesh, got 3"),
        (lambda: manifolds.surface(made), TypeError, "manifolds.surface: .*Premetric, got a Mesh"),
        (lambda: paths.premetric(made), TypeError, "paths.premetric: expected a Premetric"),
        (lambda: paths.premetric(manifolds.commute(made), steps=0), ValueError, "steps"),
    ]:
        with pytest.raises(kind, match=said):
            call()
    path = paths.premetric(manifolds.commute(made))
    with pytest.raises(ValueError, match=r"paths.premetric: expected x of shape \[b, 3\]"):
        path.point(jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.zeros(2))


def test_files_of_meshes(data_dir, tmp_path):
    """The two of the paper: closed, and of genus 0 by Euler's formula; a quadrangle is named."""
    for name, count in (("spot", 2930), ("bunny", 2502)):
        vertices, faces = manifolds.read_obj(data_dir / f"riemannian/mesh/{name}.obj.gz")
        assert len(vertices) == count and len(vertices) - len(faces) // 2 == 2
        made = manifolds.mesh(vertices, faces, num_eigenfunctions=3)
        assert np.all(made.neighbors >= 0) and np.all(made.eigenvalues > 0)
    (tmp_path / "square.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n")
    with pytest.raises(ValueError, match="expected triangles, got 4 corners in line 5"):
        manifolds.read_obj(tmp_path / "square.obj")
