"""Writes what libigl computes on a triangle mesh, as small float64 arrays, so that the tests need
no libigl: the cotangent Laplacian, the areas around vertices, and exact distances on the surface.

    pip install libigl
    PYTHONPATH=tests python tests/peers/make_mesh_fixtures.py

Written with libigl 2.6.3. The distances are those between a point and where `manifolds.surface`
walks from it: both are made vertices of the mesh.
"""

from pathlib import Path

import igl
import jax
import numpy as np
from meshes import icosphere

from jflow import manifolds


def with_vertex(vertices, faces, face, weights):
    """The mesh with a point inside a face as its last vertex; the face becomes three."""
    point = weights @ vertices[faces[face]]
    a, b, c = faces[face]
    n = len(vertices)
    faces = np.concatenate([faces, [[b, c, n], [c, a, n]]])
    faces[face] = [a, b, n]
    return np.concatenate([vertices, [point]]), faces


def distance(mesh, surface, x, y):
    """The exact one of libigl."""
    vertices, faces, ends = mesh.vertices, mesh.faces, []
    for point in (x, y):
        around = manifolds.mesh(vertices, faces, num_eigenfunctions=2)
        face, weights = jax.device_get(around.locate(point[None]))
        vertices, faces = with_vertex(vertices, faces, face[0], np.asarray(weights[0]))
        ends.append(np.array([len(vertices) - 1]))
    none = np.array([], np.int64)
    return float(igl.exact_geodesic(vertices, faces, ends[0], none, ends[1], none)[0])


def main():
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    vertices, faces = icosphere(1)
    vertices = vertices * [1.0, 1.3, 0.8] + 0.05 * rng.normal(size=vertices.shape)
    mesh = manifolds.mesh(vertices, faces, num_eigenfunctions=2)
    surface = manifolds.surface(manifolds.biharmonic(mesh))
    x = np.asarray(surface.random(jax.random.key(0), 12), np.float64)
    v = np.asarray(surface.to_tangent(x, rng.normal(size=x.shape)))
    v = v * rng.uniform(0.2, 1.0, (12, 1)) / np.linalg.norm(v, axis=1, keepdims=True)
    y = np.asarray(surface.exp(x, v))
    dist = [distance(mesh, surface, *pair) for pair in zip(x, y, strict=True)]
    mass = igl.massmatrix(vertices, faces, igl.MASSMATRIX_TYPE_BARYCENTRIC)
    np.savez_compressed(
        Path(__file__).with_name("meshes.npz"),
        vertices=vertices,
        faces=faces.astype(np.int32),
        stiffness=-igl.cotmatrix(vertices, faces).toarray(),
        mass=mass.diagonal(),
        x=x,
        v=v,
        y=y,
        dist=dist,
    )


if __name__ == "__main__":
    main()
