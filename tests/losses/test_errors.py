import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses, manifolds, oracles, paths, solvers, times, types

V, TARGET, X_T = jax.random.normal(jax.random.key(0), (3, 6, 4))
T = jnp.asarray([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


def still(value=0.0):
    return types.Velocity(
        lambda *args: {}, lambda params, x, t, cond=None, *, key=None: jnp.full_like(x, value)
    )


def test_mean_squared_is_the_default():
    batch, key = {"x": V, "x0": TARGET}, jax.random.key(1)
    default, _ = losses.flow_matching(still())({}, key, batch)
    given, _ = losses.flow_matching(still(), metric=losses.mean_squared_error)({}, key, batch)
    assert default == given
    np.testing.assert_allclose(default, np.mean((V - TARGET) ** 2), rtol=1e-6)
    np.testing.assert_allclose(
        losses.mean_squared_error(V, TARGET, X_T, T), np.mean((V - TARGET) ** 2, axis=1), rtol=1e-6
    )


def test_riemannian_error():
    """On flat space it is the mean square; on the sphere what is normal counts nothing; in the ball
    lengths are those of the metric."""
    flat = losses.riemannian_error(manifolds.euclidean(4))
    np.testing.assert_allclose(
        flat(V, TARGET, X_T, T), losses.mean_squared_error(V, TARGET, X_T, T), rtol=1e-6
    )
    x = X_T / jnp.linalg.norm(X_T, axis=1, keepdims=True)
    sphere = losses.riemannian_error(manifolds.sphere(3))
    np.testing.assert_allclose(
        sphere(V + 5 * x, TARGET, x, T), sphere(V, TARGET, x, T), rtol=1e-4, atol=1e-5
    )
    ball = losses.riemannian_error(manifolds.poincare_ball(4))(V, TARGET, x / 2, T)
    expected = (8 / 3) ** 2 * losses.mean_squared_error(V, TARGET, X_T, T)  # 2 / (1 - 1 / 4)
    np.testing.assert_allclose(ball, expected, rtol=1e-5)


def test_pseudo_huber_by_hand():
    for c in (1e-3, 0.7, 30.0):
        square = np.sum(np.square(np.asarray(V - TARGET, np.float64)), axis=1)
        expected = (np.sqrt(square + c**2) - c) / 4
        np.testing.assert_allclose(losses.pseudo_huber(c)(V, TARGET, X_T, T), expected, rtol=1e-5)


def test_pseudo_huber_between_its_limits():
    """|r|^2 / (2 c d) within c, |r| / d beyond: so c scales with the norm of r over the event."""
    r = V[:1] - TARGET[:1]
    square = float(jnp.sum(r**2))
    near = losses.pseudo_huber(1e3)(r, jnp.zeros_like(r), r, T[:1])
    far = losses.pseudo_huber(1e-3)(r, jnp.zeros_like(r), r, T[:1])
    np.testing.assert_allclose(near, square / (2 * 1e3 * 4), rtol=1e-3)
    np.testing.assert_allclose(far, np.sqrt(square) / 4, rtol=1e-3)
    # an event k times as large, of the same numbers: with c sqrt(k) it is the same over sqrt(k)
    tiled = jnp.tile(r, (1, 9))
    np.testing.assert_allclose(
        3 * losses.pseudo_huber(3 * 0.5)(tiled, jnp.zeros_like(tiled), tiled, T[:1]),
        losses.pseudo_huber(0.5)(r, jnp.zeros_like(r), r, T[:1]),
        rtol=1e-6,
    )


def test_gradients_are_finite_at_a_perfect_velocity():
    for metric in (
        losses.pseudo_huber(1e-3),
        losses.perceptual_huber(lambda x, y: jnp.sum((x - y) ** 2, axis=1), 1e-3),
    ):
        grad = jax.grad(lambda v, metric=metric: jnp.sum(metric(v, TARGET, X_T, T)))(TARGET)
        np.testing.assert_array_equal(grad, 0)


def test_perceptual_huber_by_hand():
    seen = {}

    def distance(x, y):
        seen.update(x=x, y=y)
        return jnp.sum(jnp.abs(x - y), axis=1)

    x0, x1 = TARGET, V
    x_t = (1 - T[:, None]) * x0 + T[:, None] * x1
    guess = x1 - x0 + 0.1
    given = losses.perceptual_huber(distance, 0.5)(guess, x1 - x0, x_t, T)
    np.testing.assert_allclose(seen["y"], x1, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen["x"], x1 + (1 - T[:, None]) * 0.1, rtol=1e-5, atol=1e-6)
    huber = (np.sqrt(4 * 0.1**2 + 0.25) - 0.5) / 4
    # sum |x - y| = 4 (1 - t) 0.1: over 1 - t it counts the same at every time, but at t=1, where
    # there is nothing to see
    np.testing.assert_allclose(given, T * huber + 0.4 * (T < 1), rtol=1e-4, atol=1e-6)


def test_in_flow_matching():
    """The metric gets v and target in float32, x_t on the path at t, and its rows are weighted."""
    seen = {}

    def metric(v, target, x_t, t):
        seen.update(v=v, target=target, x_t=x_t, t=t)
        return t

    batch = {
        "x": V.astype(jnp.bfloat16),
        "x0": TARGET.astype(jnp.bfloat16),
        "weight": jnp.arange(1.0, 7),
    }
    value, _ = losses.flow_matching(still(2.0), metric=metric, time=lambda key, n: T)(
        {}, jax.random.key(0), batch
    )
    np.testing.assert_allclose(value, np.sum(np.arange(1, 7) * T) / 21, rtol=1e-6)
    assert seen["v"].dtype == seen["target"].dtype == jnp.float32
    np.testing.assert_array_equal(seen["v"], 2)
    np.testing.assert_array_equal(seen["x_t"][0], batch["x0"][0])
    with pytest.raises(ValueError, match=r"metric of shape \[6\], got \[6, 4\]"):
        losses.flow_matching(still(), metric=lambda v, *rest: v)({}, jax.random.key(0), batch)
    with pytest.raises(ValueError, match=r"distance of shape \[6\], got \[\]"):
        losses.flow_matching(still(), metric=losses.perceptual_huber(lambda x, y: jnp.sum(x), 1.0))(
            {}, jax.random.key(0), batch
        )
    for c in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="c > 0"):
            losses.pseudo_huber(c)


def test_synthetic_and_real_pairs_in_one_batch():
    """Synthetic rows (x0, x1 = flow of x0), real rows inverted along the flow, and real rows with
    fresh noise."""
    oracle = oracles.gaussian([1.0, -1.0], [[0.5, 0.2], [0.2, 0.4]])
    velocity = oracles.as_velocity(oracle)
    z, real = jax.random.normal(jax.random.key(0), (4, 2)), oracle.sample(jax.random.key(1), 8)
    made, _ = jax.jit(lambda z: solvers.sample(velocity, {}, z, method=50))(z)
    inverted, _ = jax.jit(lambda x: solvers.sample(velocity, {}, x, method=50, t0=1.0, t1=0.0))(
        real[:4]
    )
    batch = {
        "x": jnp.concatenate([made, real]),
        "x0": jnp.concatenate([z, inverted, jnp.zeros((4, 2))]),
        "paired": jnp.arange(12) < 8,
    }
    seen = []

    def apply(params, x, t, cond=None, *, key=None):
        seen.append(x)
        return jnp.zeros_like(x)

    loss = losses.flow_matching(
        types.Velocity(lambda *args: {}, apply), time=lambda key, n: jnp.zeros(n)
    )
    for key in (0, 1):
        losses.chain(losses.fresh_source(), loss)({}, jax.random.key(key), batch)
    first, second = seen  # at t=0, x_t is the source
    np.testing.assert_array_equal(first[:8], batch["x0"][:8])
    assert np.all(first[8:] != second[8:]) and np.all(first[8:] != 0)
    # the inverted rows are pairs of the same flow as the made ones: their targets are its average
    # velocity
    t = jnp.zeros(8)
    np.testing.assert_allclose(
        (batch["x"] - batch["x0"])[:8],
        oracle.average_velocity(batch["x0"][:8], t, t + 1),
        atol=2e-3,
    )
    with_u = losses.flow_matching(
        velocity, time=times.u_shaped(), metric=losses.pseudo_huber(0.1), path=paths.linear()
    )
    assert np.isfinite(losses.chain(losses.fresh_source(), with_u)({}, jax.random.key(0), batch)[0])
    for bad in ({"x": made, "x0": z}, {"x": made, "paired": jnp.ones(4, bool)}):
        with pytest.raises(ValueError, match="'x0' and 'paired' in batch"):
            losses.fresh_source()(jax.random.key(0), bad)
    for paired in (jnp.ones(4), jnp.ones(3, bool)):
        with pytest.raises(ValueError, match=r"'paired' of shape \[4\] and type bool"):
            losses.fresh_source()(jax.random.key(0), {"x": made, "x0": z, "paired": paired})
