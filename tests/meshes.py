"""Triangle meshes that tests share."""

import numpy as np
import scipy.spatial


def icosphere(level):
    """Vertices on the unit sphere, and faces that look outward."""
    golden = (1 + np.sqrt(5)) / 2
    corners = [[s, t * golden, 0] for s in (-1, 1) for t in (-1, 1)]
    vertices = np.array([np.roll(c, k) for c in corners for k in range(3)])
    faces = scipy.spatial.ConvexHull(vertices).simplices
    normals = np.cross(*np.moveaxis(np.diff(vertices[faces], axis=1), 1, 0))
    inward = np.sum(normals * vertices[faces].mean(1), axis=1) < 0
    faces = np.where(inward[:, None], faces[:, ::-1], faces)
    for _ in range(level):
        a, b, c = np.moveaxis(faces, 1, 0)
        edges = np.sort(np.concatenate([[a, b], [b, c], [c, a]], axis=1).T, axis=1)
        unique, middle = np.unique(edges, axis=0, return_inverse=True)
        ab, bc, ca = middle.ravel().reshape(3, -1) + len(vertices)
        vertices = np.concatenate([vertices, vertices[unique].mean(1)])
        faces = np.concatenate(
            [np.stack(f, 1) for f in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))]
        )
    return vertices / np.linalg.norm(vertices, axis=1, keepdims=True), faces


def grid(n, keep=lambda x, y: True):
    """Squares [0, 1]^2 of two triangles in the plane z = 0, those whose middle is kept."""
    i, j = (a.ravel() for a in np.meshgrid(range(n), range(n), indexing="ij"))
    kept = np.array([keep((a + 0.5) / n, (b + 0.5) / n) for a, b in zip(i, j, strict=True)])
    i, j = i[kept], j[kept]
    at = lambda i, j: i * (n + 1) + j  # noqa: E731
    lower = np.stack([at(i, j), at(i + 1, j), at(i + 1, j + 1)], 1)
    upper = np.stack([at(i, j), at(i + 1, j + 1), at(i, j + 1)], 1)
    faces = np.concatenate([lower, upper])
    used, faces = np.unique(faces, return_inverse=True)
    vertices = np.stack([used // (n + 1), used % (n + 1), 0 * used], 1) / n
    return vertices, faces.reshape(-1, 3)
