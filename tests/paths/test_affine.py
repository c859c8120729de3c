import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import paths, types

MEAN, STD = 1.5, 0.4
COSINE = paths.Schedule(
    alpha=lambda t: jnp.sin(jnp.pi * t / 2), sigma=lambda t: jnp.cos(jnp.pi * t / 2)
)

# conversion -> the end of the linear path at which it diverges
DIVERGES = {
    "velocity_to_data": None,
    "velocity_to_noise": None,
    "score_to_noise": None,
    "data_to_velocity": 1.0,
    "data_to_noise": 1.0,
    "noise_to_score": 1.0,
    "velocity_to_score": 1.0,
    "data_to_score": 1.0,
    "noise_to_velocity": 0.0,
    "noise_to_data": 0.0,
    "score_to_velocity": 0.0,
    "score_to_data": 0.0,
}


def gaussian(x, t):
    """What an ideal network predicts for data N(MEAN, STD^2) on the linear path, in closed form."""
    t = t[:, None]
    variance = (1 - t) ** 2 + (t * STD) ** 2
    centered = x - t * MEAN
    return {
        "velocity": MEAN + (t * STD**2 - (1 - t)) / variance * centered,
        "data": MEAN + t * STD**2 / variance * centered,
        "noise": (1 - t) / variance * centered,
        "score": -centered / variance,
    }


def draw(dtype, low, high, n=64):
    k1, k2 = jax.random.split(jax.random.key(0))
    return jax.random.normal(k1, (n, 3), dtype), jax.random.uniform(k2, (n,), dtype, low, high)


def test_linear_is_a_path():
    x, t = draw(jnp.float32, 0, 1)
    x0, x1, s = x, 2 * x[::-1], t[:, None]
    path = paths.linear()
    assert type(path) is types.Path
    np.testing.assert_allclose(path.point(x0, x1, t), (1 - s) * x0 + s * x1, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(path.target(x0, x1, t), x1 - x0, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(path.point(x0, x1, jnp.zeros_like(t)), x0)
    np.testing.assert_array_equal(path.point(x0, x1, jnp.ones_like(t)), x1)


@pytest.mark.parametrize("name", DIVERGES)
def test_conversions_agree_with_a_gaussian(name):
    # t away from the ends: there the relative error of float32 grows like 1/t or 1/(1-t)
    x, t = draw(jnp.float32, 0.1, 0.9)
    source, target = name.split("_to_")
    truth = gaussian(x, t)
    np.testing.assert_allclose(
        getattr(paths, name)(truth[source], x, t), truth[target], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", DIVERGES)
def test_conversions_agree_with_a_gaussian_in_float64(name, x64):
    x, t = draw(jnp.float64, 0.001, 0.999)
    source, target = name.split("_to_")
    truth = gaussian(x, t)
    np.testing.assert_allclose(
        getattr(paths, name)(truth[source], x, t), truth[target], rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("schedule", [paths.LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("name", DIVERGES)
def test_conversions_recover_a_pair(name, schedule, x64):
    """On one pair (x0, x1) every prediction is known, whatever the schedule; the score is that of
    x0 alone."""
    x1, t = draw(jnp.float64, 0.01, 0.99)
    x0 = jax.random.normal(jax.random.key(7), x1.shape, jnp.float64)
    path = paths.affine(schedule)
    x = path.point(x0, x1, t)
    truth = {
        "velocity": path.target(x0, x1, t),
        "data": x1,
        "noise": x0,
        "score": -x0 / schedule.sigma(t)[:, None],
    }
    source, target = name.split("_to_")
    np.testing.assert_allclose(
        getattr(paths, name)(truth[source], x, t, schedule), truth[target], rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("schedule", [paths.LINEAR, COSINE], ids=["linear", "cosine"])
def test_target_is_the_derivative_of_point(schedule, x64):
    x1, t = draw(jnp.float64, 0, 1)
    x0 = x1[::-1]
    path = paths.affine(schedule)
    _, slope = jax.jvp(lambda t: path.point(x0, x1, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(path.target(x0, x1, t), slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_ends_are_finite_or_as_documented(name, dtype):
    eps = float(jnp.finfo(dtype).eps)
    convert = getattr(paths, name)
    x = jnp.asarray([[0.3, -1.2]], dtype)
    prediction = jnp.asarray([[0.7, 0.4]], dtype)
    for t in (0.0, eps, 1 - eps, 1.0):
        value = convert(prediction, x, jnp.asarray([t], dtype))
        grads = jax.grad(lambda p, x, t: jnp.sum(convert(p, x, t)), argnums=(0, 1, 2))(
            prediction, x, jnp.asarray([t], dtype)
        )
        finite = [bool(jnp.all(jnp.isfinite(a))) for a in (value, *grads)]
        if t == DIVERGES[name]:
            assert not finite[0]
        else:
            assert all(finite), (t, finite)


def test_scalar_times_are_every_row_s():
    x, _ = draw(jnp.float32, 0, 1)
    np.testing.assert_array_equal(
        paths.velocity_to_data(x, x, 0.25),
        paths.velocity_to_data(x, x, jnp.full(x.shape[:1], 0.25)),
    )
