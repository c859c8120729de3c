"""Flows of rotations: densities that are even, integrate to one and are what is sampled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jflow import bijectors, distributions, flows, manifolds

SURFACE = 2 * np.pi**2  # of the sphere of unit quaternions


def hopf_grid(n):
    """Quaternions [n^3, 4] and weights that add up to 2 pi^2.

    q = (sqrt(s) e^ia, sqrt(1 - s) e^ib) has the surface element ds da db / 2: Gauss-Legendre in s,
    the midpoint rule in the two angles, which converges faster than any power for smooth densities.
    """
    s, weights = np.polynomial.legendre.leggauss(n)
    angles = 2 * np.pi * (np.arange(n) + 0.5) / n
    s, a, b = np.meshgrid((s + 1) / 2, angles, angles, indexing="ij")
    r, t = np.sqrt(s), np.sqrt(1 - s)
    q = np.stack([r * np.cos(a), r * np.sin(a), t * np.cos(b), t * np.sin(b)], axis=-1)
    volume = np.broadcast_to((weights / 2)[:, None, None] * (2 * np.pi / n) ** 2 / 2, s.shape)
    return q.reshape(-1, 4), volume.reshape(-1)


def drawn(shapes, scale, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes
    )


@functools.cache
def trained_like():
    """(flow, params away from their initial values)"""
    flow = flows.rotations(depth=3, hidden=(8,), activation=jnp.tanh)
    shapes = jax.eval_shape(flow.init, jax.random.key(0), np.zeros((2, 4), np.float32))
    return flow, drawn(shapes, 0.3)


def test_the_density_over_rotations_is_even_and_integrates_to_one_and_is_what_is_sampled():
    """The quadrature of 32^3 points in float32 is 1 to 1e-3 on the sphere, where q and -q hold one
    half each; for matrices it is 1 with respect to the volume of so3. Then 4,000 samples: the mean
    of each of 9 + 1 functions of the rotation is that of the quadrature, within 4.5 standard errors
    (a false alarm in 15,000 for ten)."""
    flow, params = trained_like()
    matrices = flows.transformed(flow, bijectors.rotation_matrix())
    q, weights = hopf_grid(32)
    q, n = q.astype(np.float32), 4000

    @jax.jit
    def run(params, q):
        behind = {"bijector": {}, "base": params}
        rotation = manifolds.from_quaternion(q)
        x, log_prob = flow.sample_and_log_prob(params, jax.random.key(3), n)
        return (
            *(flow.log_prob(params, sign * q) for sign in (1, -1)),
            matrices.log_prob(behind, rotation),
            rotation,
            x,
            log_prob,
            flow.log_prob(params, x),
            manifolds.from_quaternion(x),
        )

    plus, minus, of_matrix, rotation, x, log_prob, again, drawn_rotation = jax.device_get(
        run(params, q)
    )
    np.testing.assert_allclose(minus, plus, atol=1e-4)
    density = np.exp(plus.astype(np.float64))
    assert np.ptp(plus) > 2  # far from uniform
    assert abs(np.sum(weights * density) - 1) < 1e-3
    # a volume of so3 is four times that of the sphere of quaternions, which covers it twice
    assert abs(np.sum(4 * weights * np.exp(of_matrix)) - 1) < 1e-3
    np.testing.assert_allclose(of_matrix, plus - np.log(4), atol=1e-4)
    # samples
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(log_prob, again, atol=1e-3)
    for seen, there in (
        (drawn_rotation.reshape(n, 9), rotation.reshape(-1, 9)),
        (np.square(x[:, :1]), np.square(q[:, :1])),
    ):
        expected = np.sum((weights * density)[:, None] * there, axis=0)
        z = (seen.mean(0) - expected) / (seen.std(0) / np.sqrt(n))
        assert np.max(np.abs(z)) < 4.5, z


def test_of_uniform_directions_a_projective_map_makes_angular_central_gaussian_ones(x64):
    """The closed form |det S|^(-1/2) (x' S^-1 x)^(-2) / (2 pi^2) with S = A A', in four dimensions,
    and in two against the quadrature of a circle; the paper's double Moebius map is one of them."""
    bijector = bijectors.projective(4)
    base = distributions.uniform_on(manifolds.sphere(3))
    flow = flows.flow(bijector, base)
    x = scipy.stats.uniform_direction(4).rvs(6, random_state=np.random.default_rng(0))
    shapes = jax.eval_shape(flow.init, jax.random.key(0), x)
    params = drawn(shapes, 0.7)
    p = params["bijector"]
    lower = np.tril(p["lower"], -1) + np.eye(4)
    upper = np.triu(p["upper"], 1) + np.diag(np.exp(p["log_diagonal"]))
    a = lower @ upper
    s = np.linalg.inv(a @ a.T)
    closed = (
        0.5 * np.linalg.slogdet(s)[1]
        - 2 * np.log(np.einsum("bi,ij,bj->b", x, s, x))
        - np.log(SURFACE)
    )
    # the double Moebius map of r = 0.5 e_1: twice from -q past r to the sphere, in the paper's form
    r = np.array([0.5, 0, 0, 0])
    a_r = (1 + r @ r) * np.eye(4) - 2 * np.outer(r, r)
    factors = {
        "lower": np.zeros((4, 4)),
        "upper": np.zeros((4, 4)),
        "log_diagonal": np.log(np.diag(a_r)),  # diagonal, since r is along an axis
    }

    @jax.jit
    def run(params, x):
        y, _ = bijector.forward(factors, x)
        return flow.log_prob(params, x), y

    found, moebius = jax.device_get(run(params, x))
    np.testing.assert_allclose(found, closed, atol=1e-12)

    def past(q):  # the other point of the sphere on the line from q through r
        d = q - r
        return r - d * ((1 - r @ r) / np.sum(d * d, axis=1))[:, None]

    # the two images, of q and of -q, subtracted and normalized
    direction = past(x) - past(-x)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(moebius, -direction, atol=1e-12)


def test_quaternions_and_matrices(x64):
    """R(q) v is q v q^-1 by scipy; there and back is q up to its sign, at w = 0 too."""
    rng = np.random.default_rng(0)
    q = scipy.stats.uniform_direction(4).rvs(8, random_state=rng)
    q[0] = [0, 0.6, 0, 0.8]
    run = jax.jit(lambda q: (r := manifolds.from_quaternion(q), manifolds.to_quaternion(r)))
    rotation, again = jax.device_get(run(q))
    expected = scipy.spatial.transform.Rotation.from_quat(q[:, [1, 2, 3, 0]]).as_matrix()
    np.testing.assert_allclose(rotation, expected, atol=1e-14)
    np.testing.assert_allclose(np.abs(np.sum(q * again, axis=1)), 1, atol=1e-14)
    assert np.all(again[:, 0] >= 0)
    with pytest.raises(ValueError, match=r"rotation_matrix: expected x of shape \[b, 4\]"):
        bijectors.rotation_matrix().forward({}, np.ones((2, 3)))


def test_rigid_bodies_are_the_same_for_both_quaternions(x64):
    """Under a condition too: log_prob(q, p) = log_prob(-q, p), the round trip, and a density that
    knows how the position goes with the rotation. The log-det is that of the ambient space, by the
    Jacobian, since the map keeps the length of the quaternion."""
    flow = flows.rigid_body(depth=3, hidden=(4,), activation=jnp.tanh)
    rng = np.random.default_rng(0)
    x, cond = rng.normal(size=(5, 7)), rng.normal(size=(5, 2))
    x[:, :4] /= np.linalg.norm(x[:, :4], axis=1, keepdims=True)
    params = drawn(jax.eval_shape(flow.init, jax.random.key(0), x, cond), 0.4)
    other = x * np.array([-1, -1, -1, -1, 1, 1, 1])

    @jax.jit
    def run(params, x, other):
        z, log_det = flow.inverse(params, x, cond)
        one = lambda row, c: flow.inverse(params, row[None], c[None])[0][0]  # noqa: E731
        exact = jnp.linalg.slogdet(jax.vmap(jax.jacrev(one))(x, cond))[1]
        both = [flow.log_prob(params, rows, cond) for rows in (x, other)]
        return *both, flow.forward(params, z, cond)[0], z, log_det, exact

    plus, minus, again, z, log_det, exact = jax.device_get(run(params, x, other))
    np.testing.assert_allclose(minus, plus, atol=1e-12)
    np.testing.assert_allclose(again, x, atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(z[:, :4], axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(log_det, exact, atol=1e-9)
