"""Triangle meshes: what is computed once of one, points on its faces, and spectral distances.

A function on a mesh is given at the vertices and linear in between. The eigenfunctions of the
Laplacian are such functions; distances made of them are smooth where geodesic ones are not, and
cost a table of numbers.

References:
    Chen, Lipman, *Flow Matching on General Geometries*, 2024, arXiv:2302.03660.
"""

import gzip
import math
from collections.abc import Callable, Sequence
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jflow._core.checks import check_whole, described
from jflow.manifolds import _smooth
from jflow.manifolds._checked import checked
from jflow.types import Array, Manifold, Premetric

__all__ = [
    "Mesh",
    "biharmonic",
    "commute",
    "diffusion",
    "laplacian",
    "mesh",
    "read_obj",
    "surface",
]

Numbers = ArrayLike | Sequence[Any]
_FAR, _NEAR = 16, 4  # edges that `exp`, and one step of many on a path, cross at most


class Mesh(NamedTuple):
    """A triangle mesh in space, with the first eigenfunctions of its Laplacian.

    The arrays are numpy's, in float64: functions made of them take the type of what they get.

    Attributes:
        vertices: [V, 3], in the units of lengths.
        faces: the vertices of each face, [F, 3], around it in the same direction for all.
        neighbors: the face across the edge that lies opposite each corner, [F, 3]; -1 at a
            boundary.
        areas: of the faces, [F].
        eigenvalues: of the Laplacian, [k], rising, in one over a length squared, without the zero
            of the constant.
        eigenfunctions: their values at the vertices, [V, k], orthonormal under the area.
        locate: x [..., 3] -> (face [...], weights [..., 3]), the nearest point of the mesh: its
            face, and its barycentric coordinates there.
    """

    vertices: np.ndarray
    faces: np.ndarray
    neighbors: np.ndarray
    areas: np.ndarray
    eigenvalues: np.ndarray
    eigenfunctions: np.ndarray
    locate: Callable[[Array], tuple[Array, Array]]


def mesh(
    vertices: Numbers, faces: Numbers, *, num_eigenfunctions: int = 100, closed: bool = True
) -> Mesh:
    """A triangle mesh, checked, with the first eigenfunctions of its Laplacian.

        L phi = lambda M phi,    L the cotangent Laplacian, M the area around each vertex

    `biharmonic`, `diffusion` and `commute` make distances of them, `surface` a `Manifold`.

    Args:
        vertices: [V, 3].
        faces: whole numbers [F, 3], the vertices of each face.
        num_eigenfunctions: k, how many are computed, less than V - 1.
        closed: whether a mesh with a boundary is refused.

    Returns:
        Mesh: for `biharmonic` and its relatives.

    Raises:
        ValueError: arrays of another shape; faces with vertices that do not exist or stand twice in
            it, or without area; vertices that no face uses, or two at one place; faces that run
            along an edge in the same direction (one of them is flipped), an edge of more than two
            faces; a boundary where the mesh should be closed; more than one piece. Each names what
            it found first.

    Examples:
        >>> import numpy as np
        >>> from jflow import manifolds
        >>> corners = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        >>> tetrahedron = [[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]]
        >>> made = manifolds.mesh(corners, tetrahedron, num_eigenfunctions=2)
        >>> made.eigenvalues.round(3).tolist()
        [0.667, 0.667]

    References:
        Pinkall, Polthier, *Computing Discrete Minimal Surfaces and Their Conjugates*, Experimental
            Mathematics 2, 1993 (the Laplacian).
    """
    points, triangles = _checked(vertices, faces)
    neighbors = _neighbors(points, triangles, closed)
    check_whole("manifolds.mesh", num_eigenfunctions=num_eigenfunctions)
    if num_eigenfunctions >= len(points) - 1:
        raise ValueError(
            f"manifolds.mesh: expected num_eigenfunctions < {len(points) - 1}, got"
            f" {num_eigenfunctions}"
        )
    stiffness, mass = laplacian(points, triangles)
    values, functions = scipy.sparse.linalg.eigsh(
        stiffness,
        k=num_eigenfunctions + 1,
        M=mass,
        sigma=-1e-3 / mass.diagonal().sum(),  # below the zero, so that the matrix is positive
        v0=np.random.default_rng(0).normal(size=len(points)),
    )
    order = np.argsort(values)[1:]
    functions = functions[:, order]
    functions = functions * np.sign(
        functions[np.argmax(np.abs(functions), axis=0), range(len(order))]
    )
    areas = _areas(points, triangles)
    locate = _locate(points, triangles)
    return Mesh(points, triangles, neighbors, areas, values[order], functions, locate)


def laplacian(
    vertices: Numbers, faces: Numbers
) -> tuple[scipy.sparse.csr_matrix, scipy.sparse.dia_matrix]:
    """The cotangent Laplacian of a mesh, and the area around each vertex.

        f^T L f = integral |grad f|^2,    f^T M f = about integral f^2

    for f linear on every face: L_ij = -(cot a + cot b) / 2 with the angles opposite the edge ij; M
    is diagonal, a third of the area of the faces around a vertex.

    Args:
        vertices: [V, 3].
        faces: whole numbers [F, 3].

    Returns:
        stiffness: L, sparse [V, V], without a unit.
        mass: M, sparse [V, V], an area.

    Examples:
        >>> from jflow import manifolds
        >>> stiffness, mass = manifolds.laplacian([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        >>> (stiffness.toarray() + 0.0).round(3).tolist()
        [[1.0, -0.5, -0.5], [-0.5, 0.5, 0.0], [-0.5, 0.0, 0.5]]
        >>> float(mass.diagonal().sum())
        0.5
    """
    points, triangles = np.asarray(vertices, np.float64), np.asarray(faces)
    corners, n = points[triangles], len(points)
    rows, columns, entries = [], [], []
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        a, b = corners[:, j] - corners[:, i], corners[:, k] - corners[:, i]
        half = 0.5 * np.sum(a * b, axis=1) / np.linalg.norm(np.cross(a, b), axis=1)
        for p, q, sign in ((j, k, -1), (k, j, -1), (j, j, 1), (k, k, 1)):
            rows.append(triangles[:, p])
            columns.append(triangles[:, q])
            entries.append(sign * half)
    where = np.concatenate(rows), np.concatenate(columns)
    stiffness = scipy.sparse.csr_matrix((np.concatenate(entries), where), shape=(n, n))
    around = np.bincount(
        triangles.ravel(), np.repeat(_areas(points, triangles) / 3, 3), minlength=n
    )
    return stiffness, scipy.sparse.diags(around)


def biharmonic(mesh: Mesh) -> Premetric:
    """The biharmonic distance: smooth, with few local minima beside the point itself.

        d(x, y)^2 = sum_k (phi_k(x) - phi_k(y))^2 / lambda_k^2

    Args:
        mesh: the mesh, of `mesh(...)`.

    Returns:
        Premetric: for `paths.premetric`; d is in the units of an area over a length.

    References:
        Lipman, Rustamov, Funkhouser, *Biharmonic Distance*, ACM Transactions on Graphics 29, 2010.
    """
    return _premetric("biharmonic", mesh, lambda values: values**-2.0)


def diffusion(mesh: Mesh, time: float) -> Premetric:
    """The diffusion distance: how differently heat from x and from y has spread after a time.

        d(x, y)^2 = sum_k exp(-2 time lambda_k) (phi_k(x) - phi_k(y))^2

    Args:
        mesh: the mesh, of `mesh(...)`.
        time: in the units of an area, above 0; short times see details and have local minima.

    Returns:
        Premetric: for `paths.premetric`.

    Raises:
        ValueError: time is not above 0.

    References:
        Coifman, Lafon, *Diffusion Maps*, Applied and Computational Harmonic Analysis 21, 2006.
    """
    if not 0 < time < math.inf:
        raise ValueError(f"manifolds.diffusion: expected a finite time > 0, got {time}")
    time = float(time)
    return _premetric("diffusion", mesh, lambda values: np.exp(-2 * time * values))


def commute(mesh: Mesh) -> Premetric:
    """The commute-time distance: how long a random walk takes from x to y and back.

        d(x, y)^2 = sum_k (phi_k(x) - phi_k(y))^2 / lambda_k

    On a surface the sum diverges with the number of eigenfunctions, and where it is cut off it has
    ripples, local minima in which a path may end: prefer `biharmonic` for paths.

    Args:
        mesh: the mesh, of `mesh(...)`.

    Returns:
        Premetric: for `paths.premetric`.

    References:
        Chen, Lipman, *Flow Matching on General Geometries*, 2024, arXiv:2302.03660 (its use).
    """
    return _premetric("commute", mesh, lambda values: 1 / values)


def read_obj(path: str | File) -> tuple[Float[np.ndarray, "V 3"], Int[np.ndarray, "F 3"]]:
    """The vertices and faces of a Wavefront .obj file, plain or gzipped.

    Args:
        path: the file; its faces are triangles.

    Returns:
        vertices: [V, 3], float64, those that a face uses.
        faces: [F, 3], whole numbers from 0.

    Raises:
        ValueError: a face is not a triangle, or there is none; the line is named.
    """
    content = File(path).read_bytes()
    text = (gzip.decompress(content) if str(path).endswith(".gz") else content).decode()
    vertices, faces = [], []
    for number, line in enumerate(text.splitlines(), 1):
        kind, *rest = line.split() or [""]
        if kind == "v":
            vertices.append([float(a) for a in rest[:3]])
        elif kind == "f":
            if len(rest) != 3:
                raise ValueError(
                    f"read_obj: expected triangles, got {len(rest)} corners in line {number}"
                )
            at = [int(corner.split("/")[0]) for corner in rest]
            faces.append([i - 1 if i > 0 else len(vertices) + i for i in at])
    if not faces:
        raise ValueError(f"read_obj: expected faces in {path}, got none")
    used, renumbered = np.unique(np.asarray(faces), return_inverse=True)
    return np.asarray(vertices)[used], renumbered.reshape(-1, 3)


def _checked(vertices, faces):
    name = "manifolds.mesh"
    vertices, faces = np.asarray(vertices, np.float64), np.asarray(faces)
    for what, array in (("vertices", vertices), ("faces", faces)):
        if array.ndim != 2 or array.shape[1] != 3 or not len(array):
            raise ValueError(f"{name}: expected {what} of shape [n, 3], got {list(array.shape)}")
    if faces.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected faces to be whole numbers, got {faces.dtype}")
    n = len(vertices)
    where = lambda bad: int(np.flatnonzero(bad)[0])  # noqa: E731
    if np.any(bad := ~np.isfinite(vertices).all(1)):
        raise ValueError(f"{name}: expected finite vertices, got vertex {where(bad)} that is not")
    if np.any(bad := ((faces < 0) | (faces >= n)).any(1)):
        at = where(bad)
        raise ValueError(
            f"{name}: expected faces of vertices 0 to {n - 1}, got face {at}: {faces[at].tolist()}"
        )
    _, first, counts = np.unique(vertices, axis=0, return_index=True, return_counts=True)
    if np.any(counts > 1):
        at = int(first[np.argmax(counts > 1)])
        same = np.flatnonzero((vertices == vertices[at]).all(1)).tolist()
        raise ValueError(
            f"{name}: expected different vertices, got vertices {same[:3]} at the same place: merge"
            " them, so that their faces are neighbors"
        )
    twice = (faces == np.roll(faces, 1, axis=1)).any(1)
    flat = _areas(vertices, faces) <= 1e-12 * np.ptp(vertices, axis=0).max() ** 2
    for bad, what in ((twice, "three different vertices"), (flat, "an area")):
        if np.any(bad):
            at = where(bad)
            raise ValueError(
                f"{name}: expected faces with {what}, got face {at}: {faces[at].tolist()}"
            )
    if np.any(bad := np.bincount(faces.ravel(), minlength=n) == 0):
        raise ValueError(
            f"{name}: expected every vertex in a face, got {bad.sum()} unused, first vertex"
            f" {where(bad)}"
        )
    return vertices, faces.astype(np.int64)


def _neighbors(vertices, faces, closed):
    """[F, 3]: the face across the edge opposite each corner, -1 where there is none."""
    name, count = "manifolds.mesh", len(faces)
    start, end = faces[:, [1, 2, 0]], faces[:, [2, 0, 1]]  # the edge opposite corner i
    owner = np.repeat(np.arange(count), 3)
    low, high = np.minimum(start, end).ravel(), np.maximum(start, end).ravel()
    ahead = (start < end).ravel()
    edges, which, times = np.unique(
        np.stack([low, high], 1), axis=0, return_inverse=True, return_counts=True
    )
    which = which.ravel()
    if np.any(times > 2):
        at = int(np.argmax(times > 2))
        raise ValueError(
            f"{name}: expected at most two faces along an edge, got {times[at]} along"
            f" {edges[at].tolist()}: faces {owner[which == at].tolist()}"
        )
    agreeing = np.bincount(which, ahead, minlength=len(edges))
    wrong = (times == 2) & (agreeing != 1)
    if np.any(wrong):
        conflicts = np.bincount(owner[wrong[which]], minlength=count)
        at = int(np.argmax(conflicts))
        raise ValueError(
            f"{name}: expected faces that run around in the same direction, got face {at},"
            f" {faces[at].tolist()}, against {conflicts[at]} of its neighbors: it is flipped"
        )
    if closed and np.any(times == 1):
        at = int(np.argmax(times == 1))
        raise ValueError(
            f"{name}: expected a closed mesh, got a hole: {np.sum(times == 1)} edges with one face,"
            f" first {edges[at].tolist()}; closed=False takes a mesh with a boundary"
        )
    order = np.argsort(which, kind="stable")
    first = np.searchsorted(which[order], np.arange(len(edges)))
    neighbors = np.full(3 * count, -1)
    inner = times == 2
    one, two = order[first[inner]], order[first[inner] + 1]
    neighbors[one], neighbors[two] = owner[two], owner[one]
    n = len(vertices)
    graph = scipy.sparse.coo_matrix((np.ones(3 * count), (low, high)), shape=(n, n))
    pieces, of = scipy.sparse.csgraph.connected_components(graph, directed=False)
    if pieces > 1:
        raise ValueError(
            f"{name}: expected one piece, got {pieces}, of {np.bincount(of).tolist()[:5]} vertices"
        )
    return neighbors.reshape(-1, 3)


def _areas(vertices, faces):
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)


def gradients(vertices, faces):
    """[F, 3, 3]: the gradients of the barycentric coordinates, tangent vectors of the face."""
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    normal = np.cross(b - a, c - a)
    square = np.sum(normal**2, axis=1, keepdims=True)
    return np.stack([np.cross(normal, edge) / square for edge in (c - b, a - c, b - a)], axis=1)


def _locate(vertices, faces):
    """The nearest point: by the exact nearest points of the faces whose circles come nearest."""
    corners = vertices[faces]
    center = corners.mean(1)
    radius = np.linalg.norm(corners - center[:, None], axis=2).max(1)
    kept = min(32, len(faces))

    def locate(x):
        shape, x = x.shape[:-1], x.reshape(-1, 3)
        c, r = jnp.asarray(center, x.dtype), jnp.asarray(radius, x.dtype)
        square = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(c * c, axis=1)[None]
        cross = jnp.matmul(x, c.T, precision=jax.lax.Precision.HIGHEST)
        bound = jnp.sqrt(jnp.maximum(square - 2 * cross, 0)) - r[None]
        _, candidates = jax.lax.top_k(jax.lax.stop_gradient(-bound), kept)
        near = jnp.asarray(corners, x.dtype)[candidates]  # [n, kept, 3, 3]
        weights = _nearest_weights(x[:, None], near)
        away = x[:, None] - jnp.sum(weights[..., None] * near, axis=2)
        best = jnp.argmin(jax.lax.stop_gradient(jnp.sum(away * away, axis=2)), axis=1)[:, None]
        face = jnp.take_along_axis(candidates, best, axis=1)[:, 0]
        weights = jnp.take_along_axis(weights, best[..., None], axis=1)[:, 0]
        return face.reshape(shape), weights.reshape(*shape, 3)

    return locate


def _nearest_weights(x, corners):
    """Barycentric coordinates [..., 3] of the point of a triangle [..., 3, 3] nearest to x [...,
    3]: that of the plane where it lies inside, else the nearest on the three edges."""
    a, b, c = (corners[..., i, :] for i in range(3))
    dot = lambda u, v: jnp.sum(u * v, axis=-1)  # noqa: E731
    ab, ac, ax = b - a, c - a, x - a
    aa, bb, cross = dot(ab, ab), dot(ac, ac), dot(ab, ac)
    pa, pb = dot(ax, ab), dot(ax, ac)
    square = aa * bb - cross * cross
    v, w = (bb * pa - cross * pb) / square, (aa * pb - cross * pa) / square
    plane = jnp.stack([1 - v - w, v, w], axis=-1)
    options, squares = [], []
    for i, j in ((0, 1), (1, 2), (2, 0)):
        p, q = corners[..., i, :], corners[..., j, :]
        s = jnp.clip(dot(x - p, q - p) / dot(q - p, q - p), 0, 1)
        parts = [jnp.zeros_like(s)] * 3
        parts[i], parts[j] = 1 - s, s
        options.append(jnp.stack(parts, axis=-1))
        away = x - p - s[..., None] * (q - p)
        squares.append(dot(away, away))
    best = jnp.argmin(jnp.stack(squares, axis=-1), axis=-1)[..., None]
    edge = jnp.where(best == 0, options[0], jnp.where(best == 1, options[1], options[2]))
    inside = jnp.min(plane, axis=-1, keepdims=True) >= 0
    return jnp.where(inside, plane, edge)


class _Tables(NamedTuple):
    """What walks gather of a face: corners, gradients of its coordinates, neighbors."""

    corners: Array
    slopes: Array
    faces: Array
    neighbors: Array


def _tables(mesh, dtype) -> _Tables:
    return _Tables(
        jnp.asarray(mesh.vertices[mesh.faces], dtype),
        jnp.asarray(gradients(mesh.vertices, mesh.faces), dtype),
        jnp.asarray(mesh.faces, jnp.int32),
        jnp.asarray(mesh.neighbors, jnp.int32),
    )


def _walk(tables, face, weights, w, crossings):
    """(face [b], weights [b, 3]) after going straight on along w [b, 3], a tangent vector of the
    face. Over an edge w is turned about it into the next face; at a boundary its part along the
    edge is left. What is left after so many crossings is not walked."""

    def cross(_, state):
        face, weights, w = state
        slopes, corners = tables.slopes[face], tables.corners[face]
        rate = jnp.sum(slopes * w[:, None], axis=2)
        # what slides along a boundary does not fall by its rounding
        falls = rate < -1e-5 * jnp.max(jnp.abs(rate), axis=1, keepdims=True)
        s = jnp.where(falls, weights / jnp.where(falls, -rate, 1), jnp.inf)
        out = jnp.argmin(s, axis=1)
        share = jnp.minimum(jnp.min(s, axis=1), 1)[:, None]
        crosses = jnp.min(s, axis=1) < 1
        weights = jnp.maximum(weights + share * rate, 0)
        rest = (1 - share) * w
        at = lambda table, i: jnp.take_along_axis(  # noqa: E731
            table, i.reshape(-1, *(1,) * (table.ndim - 1)), axis=1
        )[:, 0]
        # the edge opposite the corner `out`, and what of the rest goes across it
        ends = [at(corners, (out + k) % 3) for k in (1, 2)]
        edge = ends[1] - ends[0]
        edge = edge / _smooth.norm(edge)[:, None]
        along = jnp.sum(rest * edge, axis=1, keepdims=True)
        across = _smooth.norm(rest - along * edge)[:, None]
        beyond = at(tables.neighbors[face], out)
        shared = [at(tables.faces[face], (out + k) % 3) for k in (1, 2)]
        values = [at(weights, (out + k) % 3) for k in (1, 2)]
        inner = beyond >= 0
        into = jnp.maximum(beyond, 0)
        theirs = tables.faces[into]
        moved = sum(
            jnp.where(theirs == vertex[:, None], value[:, None], 0.0)
            for vertex, value in zip(shared, values, strict=True)
        )
        fresh = (theirs != shared[0][:, None]) & (theirs != shared[1][:, None])
        inward = jnp.sum(jnp.where(fresh[..., None], tables.slopes[into], 0), axis=1)
        inward = inward / jnp.maximum(_smooth.norm(inward), 1e-30)[:, None]
        turned = along * edge + jnp.where(inner[:, None], across * inward, 0)
        goes = (crosses & inner)[:, None]
        face = jnp.where(crosses & inner, into, face)
        weights = jnp.where(goes, moved, weights)
        weights = weights / jnp.sum(weights, axis=1, keepdims=True)
        return face, weights, jnp.where(crosses[:, None], turned, jnp.zeros_like(w))

    face, weights, _ = jax.lax.fori_loop(0, crossings, cross, (face, weights, w))
    return face, weights


def _place(tables, face, weights):
    return jnp.sum(weights[..., None] * tables.corners[face], axis=-2)


def _values(tables, functions, face, weights):
    """Functions given at the vertices [V, k], in between: [..., k]."""
    return jnp.sum(weights[..., None] * functions[tables.faces[face]], axis=-2)


def _premetric(name, mesh, weigh):
    if not isinstance(mesh, Mesh):
        raise TypeError(f"manifolds.{name}: expected a manifolds.Mesh, got {described(mesh)}")
    weights = weigh(mesh.eigenvalues)
    scaled = mesh.eigenfunctions * np.sqrt(weights)  # so that d is a plain norm
    # far more than any way along the mesh in a unit of time, where grad d nearly vanishes
    most = 8 * float(np.linalg.norm(np.ptp(mesh.vertices, axis=0)))

    def dist(x, y):
        x, y = jnp.broadcast_arrays(x, y)
        tables, functions = _tables(mesh, x.dtype), jnp.asarray(scaled, x.dtype)
        at = [_values(tables, functions, *mesh.locate(point)) for point in (x, y)]
        return _smooth.norm(at[0] - at[1])

    def velocity(tables, functions, face, weights, end, left):
        """-(d / left) grad d / |grad d|^2 on the face, no longer than `most`."""
        apart = _values(tables, functions, face, weights) - end
        square = jnp.sum(apart * apart, axis=1, keepdims=True)
        rates = jnp.sum(functions[tables.faces[face]] * apart[:, None], axis=2)
        slope = jnp.sum(rates[..., None] * tables.slopes[face], axis=1)  # of d^2 / 2
        steep = jnp.sum(slope * slope, axis=1, keepdims=True)
        v = -_smooth.divide(square * slope, steep) / left[:, None]
        speed = _smooth.norm(v)[:, None]
        return v * jnp.minimum(1, most / jnp.maximum(speed, most * 1e-6))

    def descend(x0, x1, t, steps):
        dtype = x0.dtype
        t, tables, functions = t.astype(dtype), _tables(mesh, dtype), jnp.asarray(scaled, dtype)
        end = _values(tables, functions, *mesh.locate(x1))
        left_of = lambda s: jnp.maximum(1 - s, 1e-4)  # noqa: E731

        def one(i, state):
            v = velocity(tables, functions, *state, end, left_of(i.astype(dtype) * t / steps))
            return _walk(tables, *state, v * (t / steps)[:, None], _NEAR)

        face, weights = jax.lax.fori_loop(0, steps, one, mesh.locate(x0))
        v = velocity(tables, functions, face, weights, end, left_of(t))
        return _place(tables, face, weights), v

    return Premetric(mesh, weights, dist, descend)


def surface(premetric: Premetric) -> Manifold:
    """A mesh as a `Manifold`, with a premetric in the place of the geodesic distance.

    Points are [3], on the faces, and tangent vectors lie along them. `exp` walks straight on: over
    an edge the direction is turned into the next face, and at a boundary it slides along it; one
    call crosses 16 edges at most. `dist` is the premetric, and `log` the direction in which it
    falls, -d grad d / |grad d|^2. That is the usual logarithm for the geodesic distance alone: no
    shortest path is computed, and exp(x, log(x, y)) is near y for neighbors alone. `project` takes
    the nearest point, among the 32 faces whose circles come nearest. `random` is uniform in the
    area. `embed` are the coordinates, from the middle of the vertices, in units of their standard
    deviation.

    Args:
        premetric: such as `biharmonic(mesh)`.

    Returns:
        Manifold: points [3].

    Raises:
        TypeError: premetric is something else.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> corners = [[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1]]
        >>> square = manifolds.mesh(
        ...     corners, [[0, 1, 2], [0, 2, 3]], num_eigenfunctions=2, closed=False
        ... )
        >>> surface = manifolds.surface(manifolds.biharmonic(square))
        >>> surface.project(jnp.array([0.5, 0.25, 3.0])).shape
        (3,)
    """
    if not isinstance(premetric, Premetric):
        raise TypeError(f"manifolds.surface: expected a Premetric, got {described(premetric)}")
    mesh = premetric.mesh
    normals = np.cross(*np.moveaxis(np.diff(mesh.vertices[mesh.faces], axis=1), 1, 0))
    normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
    first = mesh.vertices[mesh.faces[:, 1]] - mesh.vertices[mesh.faces[:, 0]]
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    bases = np.stack([first, np.cross(normals, first)], axis=1)
    middle, size = mesh.vertices.mean(0), float(mesh.vertices.std(0).mean())
    total = np.cumsum(mesh.areas) / mesh.areas.sum()

    def rows(function, *arrays):
        """A function of rows [n, 3] on arrays [..., 3]."""
        arrays = jnp.broadcast_arrays(*arrays)
        out = function(*(a.reshape(-1, 3) for a in arrays))
        return out.reshape(*arrays[0].shape[:-1], *out.shape[1:])

    def tangent(x, v):
        n = jnp.asarray(normals, x.dtype)[mesh.locate(x)[0]]
        return v - jnp.sum(n * v, axis=-1, keepdims=True) * n

    def walked(x, v):
        tables = _tables(mesh, x.dtype)
        face, weights = mesh.locate(x)
        n = jnp.asarray(normals, x.dtype)[face]
        along = v - jnp.sum(n * v, axis=-1, keepdims=True) * n
        return _place(tables, *_walk(tables, face, weights, along, _FAR))

    def falls(x, y):
        return premetric.descend(x, y, jnp.zeros_like(x[:, 0]), 1)[1]

    def random(key, n):
        face_key, place_key = jax.random.split(key)
        u = jax.random.uniform(place_key, (n, 2))
        dtype = u.dtype
        face = jnp.searchsorted(jnp.asarray(total, dtype), jax.random.uniform(face_key, (n,)))
        face = jnp.minimum(face, len(total) - 1)
        root = jnp.sqrt(u[:, :1])
        weights = jnp.concatenate([1 - root, root * (1 - u[:, 1:]), root * u[:, 1:]], axis=1)
        return _place(_tables(mesh, dtype), face, weights)

    zero = lambda x: jnp.zeros_like(x[..., 0])  # noqa: E731
    made = Manifold(
        shape=(3,),
        dim=2,
        exp=lambda x, v: rows(walked, x, v),
        log=lambda x, y: rows(falls, x, y),
        dist=lambda x, y: premetric.dist(x, y),
        project=lambda x: _place(_tables(mesh, x.dtype), *mesh.locate(x)),
        to_tangent=tangent,
        inner=lambda x, u, v: jnp.sum(u * v, axis=-1) + zero(x),
        tangent_basis=lambda x: jnp.asarray(bases, x.dtype)[mesh.locate(x)[0]],
        random=random,
        log_volume=math.log(mesh.areas.sum()),
        log_det_exp=lambda x, v: zero(x + v),
        log_volume_element=zero,
        embed=lambda x: (
            (x - jnp.asarray(middle, x.dtype).reshape((1,) * (x.ndim - 1) + (3,))) / size
        ),
    )
    return checked("surface", made)
