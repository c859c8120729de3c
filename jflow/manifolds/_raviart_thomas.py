"""Velocities on a triangle mesh that move densities: what leaves a face enters the next one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype, zero_log_det
from jflow._core.checks import (
    check_cond,
    check_event,
    check_noun,
    check_whole,
    described,
    with_checked_output,
)
from jflow._core.nouns import compiled
from jflow.manifolds._mesh import Mesh, gradients
from jflow.types import Bijector, Field, Velocity

__all__ = ["mesh_bijector", "raviart_thomas"]

_MOST = 1000  # edges that a point crosses in one step


def raviart_thomas(velocity: Velocity | Field, mesh: Mesh) -> Velocity:
    """A velocity on a mesh with a density: the flux through an edge is one on both of its faces.

        v(x, t) = sum_i f_i (x - p_i) / (2 A),      f_i = m_i . velocity(middle of e_i, t)

    in a face of area A, with e_i the edge opposite the corner p_i and m_i its outward normal times
    its length, averaged over its two faces. The divergence is sum_i f_i / A. Where the tangent
    parts of a velocity on two faces differ across their edge, as those of `tangent` do, mass
    gathers along edges or is thinned behind them, which no divergence knows; here neither happens.
    At a boundary the flux is 0. On a mesh of long edges v is a rough copy of the velocity, of first
    order in their length.

    For samples and densities `mesh_bijector` follows v exactly. What differentiates a density in
    reverse mode needs v itself, with steps along the faces, whose density is right to first order
    in the step:

        surface = manifolds.surface(manifolds.biharmonic(mesh))
        v = manifolds.raviart_thomas(network, mesh)
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
    velocity = _checked("manifolds.raviart_thomas", velocity, mesh)
    edges, corners = _edges(mesh), mesh.vertices[mesh.faces]

    def apply(params, x, t, cond=None, *, key=None):
        face, _ = mesh.locate(x)
        rates = _rates(edges, velocity, params, face, t.astype(x.dtype), cond, key)
        away = x[:, None] - jnp.asarray(corners, x.dtype)[face]
        return jnp.sum(rates[..., None] * away, axis=1)

    return Velocity(velocity.init, apply)


def mesh_bijector(velocity: Velocity | Field, mesh: Mesh, steps: int = 100) -> Bijector:
    """The map along a velocity on a mesh from t=0 to t=1, one to one, with its exact determinant.

    Over each step the fluxes f_i of `raviart_thomas` are held at their values in its middle. Then
    in a face

        v(x) = sum_i f_i (x - p_i) / (2 A),      x(s) = x + v(x) (exp(b s) - 1) / b,
        b = sum_i f_i / (2 A),                   d log |det| / ds = 2 b,

    so that a point runs straight to an edge, which it meets at a time in closed form, and goes on
    in the next face. Nothing else is approximated: each step maps the surface one to one, and

        surface = manifolds.surface(manifolds.biharmonic(mesh))
        flows.flow(manifolds.mesh_bijector(network, mesh), distributions.uniform_on(surface))

    has a density of integral 1 for any number of steps. A velocity that changes with time is
    followed to second order in their length.

    Without cond the network is asked once a step, in the middles of all edges, whatever the number
    of points. With cond it is asked at three edges for each point in each face on its way. A
    network of points in space will do: what is not tangent does not count. Dropout is off.

    Derivatives are in forward mode alone: train by `losses.flow_matching`, which solves nothing.
    Fluxes may run around a vertex, where a point next to it would turn without end: after 1000
    edges in one step it rests, and what is left of the step adds to the log-determinant at the mean
    rate so far.

    Args:
        velocity: of points [b, 3] and t [b], in the coordinates of the mesh.
        mesh: the mesh, of `mesh(...)`.
        steps: the number of steps of time.

    Returns:
        Bijector: of points [b, 3], with the params of `velocity`. Points off the mesh are taken to
            the nearest one on it. The log-determinant is that of areas on the mesh.

    Raises:
        TypeError: for what is no velocity, or no mesh.
        ValueError: steps is below 1; at the call, x or the velocity is not [b, 3].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> from jflow.types import Velocity
        >>> corners = [[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
        >>> square = manifolds.mesh(
        ...     corners, [[0, 1, 2], [0, 2, 3]], num_eigenfunctions=2, closed=False
        ... )
        >>> east = Velocity(lambda *_: {}, lambda params, x, t, cond=None, key=None: 0 * x + 1)
        >>> move = manifolds.mesh_bijector(east, square, steps=4)
        >>> x, log_det = move.forward({}, jnp.array([[0.25, 0.5, 0.0]]))
        >>> back, _ = move.inverse({}, x)
        >>> [round(float(a), 4) for a in back[0]]
        [0.25, 0.5, 0.0]

    References:
        Raviart, Thomas, *A Mixed Finite Element Method for 2nd Order Elliptic Problems*, 1977 (the
            field; the map is ours).
    """
    name = "manifolds.mesh_bijector"
    velocity = _checked(name, velocity, mesh)
    check_whole(name, steps=steps)
    edges, corners = _edges(mesh), mesh.vertices[mesh.faces]

    def moved(params, x, cond, direction):
        check_event(name, x, (3,))
        dtype, cond = float_dtype(x), check_cond(name, cond, len(x))
        face, weights = mesh.locate(x.astype(dtype))
        # a rounding off the edges, so that a point at a vertex takes time to go around it
        weights = jnp.maximum(weights, 4 * jnp.finfo(dtype).eps)
        weights = weights / jnp.sum(weights, axis=1, keepdims=True)
        # not constants, on which the compiler would run what a network does with places alone
        known = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, edges))

        def step(state, t):
            if cond is None:
                table = _rates(known, velocity, params, slice(None), t, None, None)
                rates = lambda face: direction * table[face]  # noqa: E731
            else:
                each = jnp.broadcast_to(t, face.shape)
                rates = lambda face: (  # noqa: E731
                    direction * _rates(known, velocity, params, face, each, cond, None)
                )
            return _run(known, rates, state, 1 / steps), None

        times = (jnp.arange(steps, dtype=dtype) + 0.5) / steps
        start = face, weights, zero_log_det(x)
        (face, weights, log_det), _ = jax.lax.scan(step, start, times[::direction])
        y = jnp.sum(weights[..., None] * jnp.asarray(corners, dtype)[face], axis=1)
        return y.astype(x.dtype), log_det

    def init(key, x, cond=None, *, side="data"):
        return velocity.init(key, x, jnp.zeros_like(x, shape=x.shape[:1]), cond)

    def forward(params, z, cond=None, *, key=None):
        return moved(params, z, cond, 1)

    def inverse(params, x, cond=None, *, key=None):
        return moved(params, x, cond, -1)

    return compiled(Bijector(init, forward, inverse))


def _checked(name, velocity, mesh) -> Velocity:
    check_noun(name, velocity, Velocity, Field)
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{name}: expected a manifolds.Mesh, got {described(mesh)}")
    return with_checked_output(name, velocity)


class _Edges(NamedTuple):
    """What fluxes are made of. An edge of a face is numbered by the corner opposite.

    Attributes:
        middles: of the E edges, [E, 3].
        normals: m, out of the first face of an edge, as long as the edge and the mean over its
            faces; 0 at a boundary; [E, 3].
        of_faces: the edges of each face, [F, 3].
        shares: 1 / (2 A) in the first face of an edge, -1 / (2 A) in the other, [F, 3].
        beyond: the face across each edge, [F, 3], and `back`, the number of the edge there.
    """

    middles: np.ndarray
    normals: np.ndarray
    of_faces: np.ndarray
    shares: np.ndarray
    beyond: np.ndarray
    back: np.ndarray


def _edges(mesh) -> _Edges:
    corners = mesh.vertices[mesh.faces]
    middles = (np.roll(corners, -1, axis=1) + np.roll(corners, -2, axis=1)) / 2
    outward = -2 * mesh.areas[:, None, None] * gradients(mesh.vertices, mesh.faces)
    ends = (np.roll(mesh.faces, -k, axis=1)[..., None] for k in (1, 2))
    beyond = mesh.faces[mesh.neighbors]  # [F, 3, 3]
    back = np.argmin(sum(beyond == end for end in ends), axis=2)
    inner = mesh.neighbors >= 0
    normals = np.where(inner[..., None], (outward - outward[mesh.neighbors, back]) / 2, 0)
    sides = np.arange(mesh.faces.size).reshape(mesh.faces.shape)
    others = np.where(inner, sides[mesh.neighbors, back], sides)
    first, of_faces = np.unique(np.minimum(sides, others), return_inverse=True)
    return _Edges(
        middles.reshape(-1, 3)[first],
        normals.reshape(-1, 3)[first],
        of_faces.reshape(sides.shape),
        np.where(sides <= others, 1, -1) / (2 * mesh.areas[:, None]),
        mesh.neighbors,
        back,
    )


def _rates(edges, velocity, params, face, t, cond, key):
    """[n, 3]: f_i / (2 A) of n faces, by an index of them, at times t [n] or one time for all."""
    of, shares = edges.of_faces, jnp.asarray(edges.shares, t.dtype)[face]
    if t.ndim:  # three edges for each row
        at = jnp.asarray(of)[face].ravel()
        t, cond = jax.tree.map(lambda a: jnp.repeat(a, 3, axis=0), (t, cond))
        places = jnp.arange(len(at)).reshape(-1, 3)
    else:  # each edge once
        at, places = slice(None), jnp.asarray(of)
        t = jnp.broadcast_to(t, edges.middles.shape[:1])
    middles, normals = (jnp.asarray(a, t.dtype)[at] for a in (edges.middles, edges.normals))
    fluxes = jnp.sum(normals * velocity.apply(params, middles, t, cond, key=key), axis=1)
    return shares * fluxes[places]


def _run(edges, rates, state, duration):
    """(face [b], weights [b, 3], log_det [b]) after a time under `rates`, face -> f_i / (2 A).

    The barycentric coordinates have w_i' = b w_i - f_i / (2 A)."""
    columns = jnp.arange(3)[None]

    def unfinished(state):
        count, *_, used = state
        return (count < _MOST) & jnp.any(used < duration)

    def cross(state):
        count, face, weights, gained, used = state
        left = jnp.maximum(duration - used, 0)
        out_of = rates(face)
        b = jnp.sum(out_of, axis=1)
        speed = b[:, None] * weights - out_of
        leaves = (out_of > 0) & (speed < 0)
        # by how much of its present speed a coordinate changes: (exp(b s) - 1) / b
        reach = jnp.where(leaves, weights / jnp.where(leaves, -speed, 1), jnp.inf)
        edge, nearest = jnp.argmin(reach, axis=1), jnp.min(reach, axis=1)
        flat = jnp.abs(b) < 1e-30
        divisor = jnp.where(flat, 1, b)
        furthest = jnp.where(flat, left, jnp.expm1(b * left) / divisor)
        crosses = nearest < furthest
        length = jnp.where(crosses, nearest, furthest)
        spent = jnp.where(flat, length, jnp.log1p(b * length) / divisor)
        spent = jnp.where(crosses, jnp.minimum(spent, left), left)

        weights = jnp.maximum(weights + speed * length[:, None], 0)
        at = lambda table, i: jnp.take_along_axis(table, i[:, None], axis=1)  # noqa: E731
        # beyond the edge its ends come in the other order, after the corner that lies opposite
        there = at(edges.back[face], edge)
        ends = at(weights, (edge + 2) % 3), at(weights, (edge + 1) % 3)
        place = (columns - there) % 3
        entered = jnp.where(place == 0, 0, jnp.where(place == 1, *ends))
        weights = jnp.where(crosses[:, None], entered, weights)
        weights = weights / jnp.sum(weights, axis=1, keepdims=True)
        face = jnp.where(crosses, at(edges.beyond[face], edge)[:, 0], face).astype(face.dtype)
        used = jnp.where(crosses, used + spent, duration)
        return count + 1, face, weights, gained + 2 * b * spent, used

    face, weights, log_det = state
    none = jnp.zeros_like(log_det)
    state = 0, face, weights, none, none
    _, face, weights, gained, used = jax.lax.while_loop(unfinished, cross, state)
    rest = jnp.maximum(duration - used, 0) / jnp.where(used > 0, used, 1)
    return face, weights, log_det + gained * (1 + rest)
