import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import paths, solvers, types

SMOOTH = paths.with_noise(paths.schedules.cosine(), lambda t: jnp.sin(jnp.pi * t) ** 2)
BRIDGE = paths.schroedinger_bridge(0.7)
both = pytest.mark.parametrize("coefficients", [SMOOTH, BRIDGE], ids=["smooth", "bridge"])
M0, V0, M1, V1, COV = (
    -1.0,
    0.5,
    2.0,
    0.2,
    0.15,
)  # means and variances of the two ends, and their covariance


def at(coefficients, t):
    return [jax.jvp(f, (t,), (jnp.ones_like(t),)) for f in coefficients]


def gaussian(coefficients, x, t):
    """Velocity, denoiser and score for coupled Gaussian ends: regressions of jointly normal numbers
    on x_t."""
    (a, da), (b, db), (c, dc) = (tuple(v[:, None] for v in pair) for pair in at(coefficients, t))
    variance = a**2 * V0 + b**2 * V1 + 2 * a * b * COV + c**2
    with_slope = a * da * V0 + b * db * V1 + (a * db + b * da) * COV + c * dc
    centered = x - a * M0 - b * M1
    return {
        "velocity": da * M0 + db * M1 + with_slope / variance * centered,
        "noise": c / variance * centered,
        "score": -centered / variance,
    }


def field(coefficients):
    def apply(params, x, t, cond=None, *, key=None):
        found = gaussian(coefficients, x, t)
        return {"velocity": found["velocity"], "noise": found["noise"]}

    return types.Field(lambda key, x, t, cond=None: {}, apply)


def pairs(key, n):
    """Rows of the two ends, with their covariance."""
    root = np.linalg.cholesky([[V0, COV], [COV, V1]])
    z = jax.random.normal(key, (n, 2)) @ root.T
    return M0 + z[:, :1], M1 + z[:, 1:]


@both
def test_the_mean_over_keys_has_no_noise(coefficients, x64):
    path = paths.interpolant(coefficients)
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 20, 3))
    t, key = jnp.linspace(0.02, 0.98, 20), jax.random.key(1)
    # what is not z is source x0 + data x1, whatever the draw: the mean over many keys, 4 standard
    # errors
    points = jax.vmap(lambda k: path.point(x0, x1, t, key=k))(jax.random.split(key, 2000))
    (a, _), (b, _), (c, _) = (tuple(v[:, None] for v in pair) for pair in at(coefficients, t))
    assert np.max(np.abs(points.mean(axis=0) - a * x0 - b * x1) / c) < 5 / np.sqrt(2000)
    np.testing.assert_allclose(
        (points - (a * x0 + b * x1)[None]).std() ** 2, np.mean(c**2), rtol=0.02
    )


def test_the_bridge_has_the_conditional_flow_of_its_paper(x64):
    """u = (1 - 2t) / (2 t (1 - t)) (x - mu) + x1 - x0 about mu = (1 - t) x0 + t x1."""
    path, key = paths.interpolant(BRIDGE), jax.random.key(0)
    x0, x1 = jax.random.normal(key, (2, 20, 3))
    t = jnp.linspace(0.02, 0.98, 20)
    s = t[:, None]
    mu, x = (1 - s) * x0 + s * x1, path.point(x0, x1, t, key=key)
    expected = (1 - 2 * s) / (2 * s * (1 - s)) * (x - mu) + x1 - x0
    np.testing.assert_allclose(path.target(x0, x1, t, key=key), expected, rtol=1e-10)
    np.testing.assert_allclose(BRIDGE.noise(t), 0.7 * np.sqrt(t * (1 - t)), rtol=1e-12)


@both
def test_score_from_the_denoiser(coefficients, x64):
    t = jnp.linspace(0.02, 0.98, 20)
    x = jax.random.normal(jax.random.key(0), (20, 1))
    truth = gaussian(coefficients, x, t)
    np.testing.assert_allclose(
        paths.denoiser_to_score(truth["noise"], t, coefficients), truth["score"], rtol=1e-10
    )
    score = paths.interpolant_score(field(coefficients), coefficients)
    np.testing.assert_allclose(score.apply({}, x, t), truth["score"], rtol=1e-10)
    velocity = paths.interpolant_velocity(field(coefficients))
    assert type(velocity) is types.Velocity
    np.testing.assert_allclose(velocity.apply({}, x, t), truth["velocity"], rtol=1e-12)


def test_the_ode_and_the_sde_end_in_the_data(x64):
    """One field: its velocity carries N(M0, V0) to N(M1, V1), and with its score so does the SDE of
    w = 0.3."""
    velocity = paths.interpolant_velocity(field(SMOOTH))
    score = paths.interpolant_score(field(SMOOTH), SMOOTH)
    z = jnp.asarray([[-2.0], [-1.0], [0.0], [1.0], [2.0]])
    start = M0 + np.sqrt(V0) * z
    end, _ = jax.jit(
        lambda x: solvers.sample(
            velocity, {}, x, method=solvers.adaptive(diffrax.Dopri8(), rtol=1e-9, atol=1e-9)
        )
    )(start)
    # between Gaussians in one dimension an ODE keeps the order, so z goes to z
    np.testing.assert_allclose(end, M1 + np.sqrt(V1) * z, atol=1e-6)

    n, steps = 20_000, 200
    sde = solvers.euler_maruyama(velocity, 0.3, score=score.apply)
    start = M0 + np.sqrt(V0) * jax.random.normal(jax.random.key(1), (n, 1))
    keys = jax.random.split(jax.random.key(2), steps)
    times = jnp.linspace(0.0, 1.0, steps + 1)
    step = lambda x, now: (sde({}, x, *now)[0], None)  # noqa: E731
    end = jax.jit(lambda x: jax.lax.scan(step, x, (times[:-1], times[1:], keys))[0])(start)
    # four standard errors, and as much as Euler's bias of order 1 / steps
    np.testing.assert_allclose(end.mean(), M1, atol=4 * np.sqrt(V1 / n) + 1 / steps)
    np.testing.assert_allclose(end.var(), V1, atol=4 * V1 * np.sqrt(2 / n) + 1 / steps)


def test_the_score_is_finite_at_the_ends_where_the_noise_is_none():
    x = jnp.asarray([[0.3], [-1.0]])
    for coefficients in (SMOOTH, BRIDGE):
        score = paths.interpolant_score(field(coefficients), coefficients)
        ends = score.apply({}, x, jnp.asarray([0.0, 1.0]))
        # those of the two distributions, to first order in the margin
        np.testing.assert_allclose(ends[:, 0], [-(0.3 - M0) / V0, -(-1.0 - M1) / V1], rtol=0.02)


def test_errors():
    linear = paths.schroedinger_bridge().source
    zero, t = jnp.zeros_like, lambda t: t
    for bad, message in [
        (
            paths.Interpolant(t, linear, zero),
            r"source\(0\), source\(1\) = 1, 0 to within 0.01, got 0, 1",
        ),
        (
            paths.Interpolant(linear, lambda t: 0.9 * t, zero),
            r"data\(0\), data\(1\) = 0, 1 to within 0.01, got 0, 0.9",
        ),
        (
            paths.Interpolant(linear, t, t),
            r"noise\(0\), noise\(1\) = 0, 0 to within 0.01, got 0, 1",
        ),
        (paths.Interpolant(linear, t, lambda t: 0.0), r"noise to map t \[b\] to \[b\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            paths.interpolant(bad)
