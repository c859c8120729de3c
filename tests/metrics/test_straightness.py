import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import oracles, solvers
from jflow.metrics import straightness, transport_cost, truncation_error
from jflow.types import Velocity


def field(apply):
    return Velocity(
        lambda key, x, t, cond=None: {},
        lambda params, x, t, cond=None, *, key=None: apply(x, t, cond),
    )


def rows(n, *event, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *event)).astype(np.float32)


def test_normal_to_normal_is_two_minus_half_pi():
    """Data N(m, I): x_t = t m + sqrt(l) x0, l = (1-t)^2 + t^2, so x1 - x0 = m and the rest of v is
    l' / (2 sqrt(l)) x0.

    The integral of (l')^2 / (4 l) is 2 - pi/2."""
    velocity = oracles.as_velocity(oracles.gaussian([3.0, -1.0, 0.5], 1.0))
    x0 = rows(16, 3)
    found = jax.jit(lambda x: straightness(velocity, {}, x))(x0)
    # second order in the step: measured 8e-5 at 100 steps of the midpoint rule
    np.testing.assert_allclose(found, (2 - np.pi / 2) * np.sum(x0**2, axis=1), rtol=4e-4)


def test_gaussian_of_another_width_by_quadrature():
    std, mean = 0.3, 2.0
    t = (np.arange(20_000) + 0.5) / 20_000
    l, dl = (1 - t) ** 2 + (std * t) ** 2, 2 * (std**2 * t - (1 - t))
    expected = np.mean(dl**2 / (4 * l)) - (std - 1) ** 2
    velocity = oracles.as_velocity(oracles.gaussian([mean], std**2))
    x0 = rows(8, 1)
    np.testing.assert_allclose(
        straightness(velocity, {}, x0, method=200), expected * x0[:, 0] ** 2, rtol=2e-3, atol=1e-4
    )


def test_a_straight_field_has_none():
    """x_t = (1 + t (s - 1)) x0 + t m: curved in x, straight along every trajectory."""

    def apply(x, t, cond):
        t = t[:, None]
        return cond + (2.5 - 1) * (x - t * cond) / (1 + t * (2.5 - 1))

    x0, cond = rows(16, 3), 4 * rows(16, 3, seed=1)
    found = jax.jit(lambda x, c: straightness(field(apply), {}, x, c))(x0, cond)
    # |v|^2 is about 50; the sums over 100 steps round at some 1e-6 of it, and the midpoint rule is
    # exact in neither time
    np.testing.assert_allclose(found, 0, atol=2e-3)
    assert float(jnp.mean(found)) < 1e-5 * float(jnp.mean(jnp.sum(jnp.square(cond), axis=1)))


def test_segments_are_judged_by_themselves():
    """v is 0 until t = 1/2 and 2 after: not straight from end to end (1 a number), straight in each
    half."""
    velocity = field(
        lambda x, t, cond: jnp.broadcast_to(jnp.where(t < 0.5, 0.0, 2.0)[:, None], x.shape)
    )
    x0 = jnp.zeros((4, 3))
    np.testing.assert_allclose(straightness(velocity, {}, x0), 3.0, rtol=1e-5)
    np.testing.assert_allclose(straightness(velocity, {}, x0, knots=(0, 0.5, 1)), 0.0, atol=1e-5)


def test_more_knots_never_find_more():
    velocity = oracles.as_velocity(oracles.eight_gaussians())
    x0 = rows(32, 2)
    found = [
        float(
            jnp.mean(straightness(velocity, {}, x0, knots=np.linspace(0, 1, k + 1), method=64 // k))
        )
        for k in (1, 2, 4)
    ]
    assert found[0] > found[1] > found[2] > 0


def test_it_is_not_negative_and_counts_the_event():
    velocity = oracles.as_velocity(oracles.mixture([1.0, 1.0], [[-2.0], [2.0]], 0.05))
    x0 = rows(64, 1)
    one = straightness(velocity, {}, x0)
    assert float(jnp.min(one)) > -1e-5 and float(jnp.max(one)) > 0.1
    flat = field(
        lambda x, t, cond: velocity.apply({}, x.reshape(-1, 1), jnp.repeat(t, 6)).reshape(x.shape)
    )
    six = straightness(flat, {}, jnp.tile(x0[:, :, None], (1, 2, 3)))
    np.testing.assert_allclose(six, 6 * one, rtol=1e-4, atol=1e-4)


def test_rows_far_from_the_origin_keep_their_digits():
    """The same trajectories moved by 1e4 and by 1e5, in float32: a field of time alone, v = 2 t m,
    has straightness |m|^2 / 3, and Euler's two steps end at m / 2 instead of m."""
    m = rows(8, 3)
    velocity = field(lambda x, t, cond: 2 * t[:, None] * cond)
    for offset in (1e4, 1e5):
        x0 = np.full((8, 3), offset, np.float32)
        found = straightness(velocity, {}, x0, m, method=50)
        np.testing.assert_allclose(
            found, np.sum(m**2, 1) / 3, rtol=1e-3
        )  # the midpoint rule: 1 / (4 steps^2)
        found = truncation_error(velocity, {}, x0, m, method=2)
        np.testing.assert_allclose(found, np.linalg.norm(m, axis=1) / 2, rtol=1e-4)


def test_transport_cost_by_hand():
    x0, x1 = np.zeros((2, 2)), np.asarray([[3.0, 4.0], [0.0, 1.0]])
    assert transport_cost(x0, x1) == (25 + 1) / 2
    assert transport_cost(x0, x1, lambda z: jnp.sum(jnp.abs(z), axis=1)) == (7 + 1) / 2
    assert transport_cost(np.zeros((2, 3, 1)), np.ones((2, 3, 1))) == 3


def test_transport_cost_refuses():
    with pytest.raises(ValueError, match="one shape"):
        transport_cost(np.zeros((2, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"return \[2\], got \[2, 2\]"):
        transport_cost(np.zeros((2, 2)), np.zeros((2, 2)), jnp.abs)
    with pytest.raises(ValueError, match="knots"):
        straightness(field(lambda x, t, c: x), {}, np.zeros((2, 2)), knots=(0, 1, 0.5))


def test_truncation_error_of_euler_on_a_line():
    """dx/dt = x: Euler gives (1 + 1/n)^n, the end is e."""
    x0 = rows(8, 2)
    found = jax.jit(lambda x: truncation_error(field(lambda x, t, c: x), {}, x, method=4))(x0)
    expected = (np.e - 1.25**4) * np.linalg.norm(x0, axis=1)
    np.testing.assert_allclose(
        found, expected, rtol=1e-3
    )  # 100 midpoint steps are off e by 4e-5, of 0.28
    jump = field(
        lambda x, t, cond: jnp.broadcast_to(jnp.where(t < 0.3, 1.0, -2.0)[:, None], x.shape)
    )
    kept = truncation_error(jump, {}, x0, method=solvers.on_grid((0, 0.3, 1)), knots=(0, 0.3, 1))
    np.testing.assert_allclose(kept, 0, atol=1e-5)  # rounding of 200 sums
    assert jax.numpy.all(truncation_error(jump, {}, x0, method=2) > 0.1)
