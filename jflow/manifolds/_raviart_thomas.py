"""A velocity on a triangle mesh that moves densities: what leaves a face enters the next one."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.checks import check_noun, described
from jflow.manifolds._mesh import Mesh, gradients
from jflow.types import Field, Velocity

__all__ = ["raviart_thomas"]


def raviart_thomas(velocity: Velocity | Field, mesh: Mesh) -> Velocity:
    """A velocity on a mesh with a density: the flux through an edge is one on both of its faces.

        v(x, t) = sum_i f_i (x - p_i) / (2 A),      f_i = m_i . velocity(middle of e_i, t)

    in a face of area A, with e_i the edge opposite the corner p_i and m_i its outward normal times
    its length, averaged over its two faces. The divergence is sum_i f_i / A. Where the tangent
    parts of a velocity on two faces differ across their edge, as those of `tangent` do, mass
    gathers along edges or is thinned behind them, which no divergence knows; here neither happens.
    At a boundary the flux is 0. On a mesh of long edges v is a rough copy of the velocity, of first
    order in their length.

    With steps along the faces the density follows, to first order in the step:

        surface = manifolds.surface(manifolds.biharmonic(mesh))
        v = manifolds.raviart_thomas(manifolds.tangent(network, surface), mesh)
        flows.cnf(v, distributions.uniform_on(surface),
                  divergence=solvers.riemannian_divergence(surface),
                  method=solvers.fixed(100, solvers.geodesic_euler(surface)))

    Args:
        velocity: of points [b, 3] and t [b], in the coordinates of the mesh, asked at the middles
            of edges, three for each point.
        mesh: the mesh, of `mesh(...)`.

    Returns:
        Velocity: of points [b, 3] on the mesh, with the params of `velocity`.

    Raises:
        TypeError: for what is no velocity, or no mesh.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> from jflow.types import Velocity
        >>> corners = [[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
        >>> square = manifolds.mesh(
        ...     corners, [[0, 1, 2], [0, 2, 3]], num_eigenfunctions=2, closed=False
        ... )
        >>> east = Velocity(lambda *_: {}, lambda *_, key=None: jnp.array([[1.0, 0.0, 0.0]] * 3))
        >>> v = manifolds.raviart_thomas(east, square)
        >>> x = jnp.array([[0.5, 0.5, 0.0]])  # halfway; at the sides nothing goes through
        >>> v.apply({}, x, jnp.zeros(1)).tolist()
        [[0.5, -0.5, 0.0]]

    References:
        Raviart, Thomas, *A Mixed Finite Element Method for 2nd Order Elliptic Problems*, 1977 (the
            field; its use for flows is ours).
    """
    check_noun("manifolds.raviart_thomas", velocity, Velocity, Field)
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"manifolds.raviart_thomas: expected a manifolds.Mesh, got {described(mesh)}"
        )
    corners = mesh.vertices[mesh.faces]
    middles = (np.roll(corners, -1, axis=1) + np.roll(corners, -2, axis=1)) / 2
    outward = -2 * mesh.areas[:, None, None] * gradients(mesh.vertices, mesh.faces)
    ends = (np.roll(mesh.faces, -k, axis=1)[..., None] for k in (1, 2))
    beyond = mesh.faces[mesh.neighbors]  # [F, 3, 3]
    opposite = np.argmin(sum(beyond == end for end in ends), axis=2)
    normals = (outward - outward[mesh.neighbors, opposite]) / 2
    normals = np.where(mesh.neighbors[..., None] >= 0, normals, 0) / (2 * mesh.areas[:, None, None])

    def apply(params, x, t, cond=None, *, key=None):
        face, _ = mesh.locate(x)
        at, p, m = (jnp.asarray(table, x.dtype)[face] for table in (middles, corners, normals))
        t, cond = jax.tree.map(lambda a: jnp.repeat(a, 3, axis=0), (t, cond))
        w = velocity.apply(params, at.reshape(-1, 3), t, cond, key=key).reshape(at.shape)
        rates = jnp.sum(m * w, axis=2, keepdims=True)
        return jnp.sum(rates * (x[:, None] - p), axis=1)

    return Velocity(velocity.init, apply)
