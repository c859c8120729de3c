import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import oracles, paths
from jflow._core.arrays import expand_to
from jflow.distributions import mixtures
from jflow.distributions.mixtures import GaussianMixture
from jflow.paths import Schedule

WEIGHTS, MEANS, VARIANCE = (
    np.array([0.5, 0.2, 0.3]),
    np.array([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]]),
    0.3,
)
CURVED = Schedule(alpha=lambda t: jnp.sin(jnp.pi * t / 2), sigma=lambda t: jnp.cos(jnp.pi * t / 2))


def batch(seed, n=6):
    key = jax.random.key(seed)
    return 1.5 * jax.random.normal(key, (n, 2)), jnp.linspace(0.0, 0.9, n)


def image_mixture(seed=0):
    """Rows of 2 x 3 pixels of 2 channels, 4 components a pixel."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return GaussianMixture(
        jax.random.normal(keys[0], (5, 2, 3, 4)),
        jax.random.normal(keys[1], (5, 2, 3, 4, 2)),
        0.3 * jax.random.normal(keys[2], (5,)),
    )


def brute_log_prob(m, x):
    """One row at a time, in float64 numpy, component by component."""
    logits, means, log_std = (np.asarray(v, np.float64) for v in m)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    total = np.zeros(len(x))
    for row in range(len(x)):
        s = np.exp(log_std[row])
        for site in np.ndindex(logits.shape[1:-1]):
            place = (row, *site)
            d = means[place].shape[-1]
            squares = ((np.asarray(x[place], np.float64) - means[place]) ** 2).sum(-1)
            total[row] += np.log(
                np.sum(
                    weights[place] * np.exp(-0.5 * squares / s**2) / (2 * np.pi * s**2) ** (d / 2)
                )
            )
    return total


def test_log_prob_counts_log_std_once_a_dimension():
    m = image_mixture()
    x = jax.random.normal(jax.random.key(1), (5, 2, 3, 2))
    np.testing.assert_allclose(mixtures.log_prob(m, x), brute_log_prob(m, x), rtol=1e-5)


@pytest.mark.parametrize("schedule", [paths.LINEAR, CURVED])
def test_the_exact_field_has_the_oracle_s_mean_and_responsibilities(schedule, x64):
    oracle = oracles.mixture(WEIGHTS, MEANS, VARIANCE, schedule)
    x, t = (v.astype(jnp.float64) for v in batch(0))
    m = mixtures.exact(WEIGHTS, MEANS, VARIANCE, schedule).apply({}, x, t)
    np.testing.assert_allclose(mixtures.mean(m), oracle.velocity(x, t), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        jax.nn.softmax(m.logits), oracle.responsibilities(x, t), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("schedule", [paths.LINEAR, CURVED])
def test_the_exact_field_is_the_law_of_the_velocity(schedule):
    # Monte Carlo by importance: data weighted by how likely x_t = x is from it; 4e5 draws leave
    # about 1% of error
    oracle = oracles.mixture(WEIGHTS, MEANS, VARIANCE)
    x1 = oracle.sample(jax.random.key(0), 400_000)
    x, t = jnp.array([[0.4, -0.3]]), jnp.array([0.45])
    a, s = float(schedule.alpha(t[0])), float(schedule.sigma(t[0]))
    weights = jax.nn.softmax(-0.5 * jnp.sum((x - a * x1) ** 2, axis=1) / s**2)[:, None]
    u = paths.data_to_velocity(x1, x, t[0], schedule)
    mean = jnp.sum(weights * u, axis=0)
    var = jnp.mean(jnp.sum(weights * (u - mean[None]) ** 2, axis=0))
    m = mixtures.exact(WEIGHTS, MEANS, VARIANCE, schedule).apply({}, x, t)
    np.testing.assert_allclose(mixtures.mean(m)[0], mean, atol=0.05)
    np.testing.assert_allclose(mixtures.variance(m)[0], var, rtol=0.03)


def test_moments_of_samples():
    m = jax.tree.map(lambda v: jnp.repeat(v[:1], 100_000, axis=0), image_mixture())
    x, center, std = mixtures.sample(m, jax.random.key(2))
    one = jax.tree.map(lambda v: v[:1], m)
    # 1e5 draws of numbers of order one: standard error 0.005
    np.testing.assert_allclose(x.mean(0), mixtures.mean(one)[0], atol=0.03)
    np.testing.assert_allclose(jnp.mean(x.var(0)), mixtures.variance(one)[0], rtol=0.03)
    np.testing.assert_allclose(jnp.std((x - center) / expand_to(std, x)), 1, rtol=0.01)


@pytest.mark.parametrize("precision", [0.7, 0.0, -0.4])
def test_tilt_is_the_product(precision):
    m = image_mixture()
    eta = jax.random.normal(jax.random.key(3), (5, 2, 3, 2))
    rate, unit = jnp.full(5, precision), jnp.full(5, 1.7)
    tilted = mixtures.tilt(m, eta, rate, unit)
    # per site, log tilted - log m - factor is one constant: differences between points vanish
    points = jax.random.normal(jax.random.key(4), (7, 5, 2, 3, 2))
    sites = lambda v: jax.tree.map(lambda a: a[:, :1, :1], v)  # noqa: E731

    def rest(x):
        one = lambda m: GaussianMixture(m.logits[:, :1, :1], m.means[:, :1, :1], m.log_std)  # noqa: E731
        x, e = sites(x), sites(eta)
        factor = jnp.sum(e * x, axis=(1, 2, 3)) - 0.5 * precision * jnp.sum(x**2, axis=(1, 2, 3))
        return mixtures.log_prob(one(tilted), x) - mixtures.log_prob(one(m), x) - factor / 1.7

    values = jnp.stack([rest(x) for x in points])
    np.testing.assert_allclose(values, jnp.broadcast_to(values[:1], values.shape), atol=2e-5)


@pytest.mark.parametrize("schedule", [paths.LINEAR, CURVED])
def test_the_exact_posterior_carried_is_the_exact_posterior_there(schedule, x64):
    field = mixtures.exact(WEIGHTS, MEANS, VARIANCE, schedule)
    x, t = (v.astype(jnp.float64) for v in batch(1))
    y, r = x + 0.7, t + 0.09
    before = mixtures.velocity_to_data(field.apply({}, x, t), x, t, schedule)
    after = mixtures.velocity_to_data(field.apply({}, y, r), y, r, schedule)
    found = mixtures.carried(before, x, t, y, r, schedule)
    np.testing.assert_allclose(found.means, after.means, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.log_std, after.log_std, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        jax.nn.softmax(found.logits), jax.nn.softmax(after.logits), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("schedule", [paths.LINEAR, CURVED])
def test_carried_velocity_is_the_oracle_s_at_every_later_time(schedule, x64):
    oracle = oracles.mixture(WEIGHTS, MEANS, VARIANCE, schedule)
    field = mixtures.exact(WEIGHTS, MEANS, VARIANCE, schedule)
    x, t = (v.astype(jnp.float64) for v in batch(2))
    x1 = mixtures.velocity_to_data(field.apply({}, x, t), x, t, schedule)
    y = x - 0.4
    for r in (t, t + 0.05, jnp.ones(6)):
        found = mixtures.carried_velocity(x1, x, t, y, r, schedule)
        np.testing.assert_allclose(found, oracle.velocity(y, r), rtol=1e-8, atol=1e-8)


def test_carried_velocity_is_accurate_and_differentiable_in_float32():
    # from noise: the sharpest update there is; the oracle's own rounding near t = 1 is of the order
    # of the tolerance
    oracle = oracles.eight_gaussians()
    angles = 2 * np.pi * np.arange(8) / 8
    field = mixtures.exact(np.ones(8), 5 * np.stack([np.cos(angles), np.sin(angles)], 1), 0.1)
    x, y = jax.random.normal(jax.random.key(0), (2, 64, 2)) * jnp.array([1.0, 4.0])[:, None, None]
    t = jnp.zeros(64)
    carried, velocity = jax.jit(mixtures.carried_velocity), jax.jit(oracle.velocity)
    for r in (0.3, 0.9, 0.999, 1.0):
        x1 = mixtures.velocity_to_data(field.apply({}, x, t), x, t)
        found = carried(x1, x, t, y, jnp.full(64, r))
        np.testing.assert_allclose(found, velocity(y, r), atol=2e-3)
    slope = jax.jit(jax.grad(lambda y: mixtures.carried_velocity(x1, x, t, y, jnp.ones(64)).sum()))(
        y
    )
    assert np.isfinite(slope).all()


def test_flow_velocity_is_the_oracle_of_every_row(x64):
    logits = jnp.log(jnp.asarray(WEIGHTS))[None].repeat(6, 0)
    m = GaussianMixture(
        logits, jnp.asarray(MEANS)[None].repeat(6, 0), jnp.full(6, 0.5 * np.log(VARIANCE))
    )
    x, t = (v.astype(jnp.float64) for v in batch(3))
    expected = oracles.mixture(WEIGHTS, MEANS, VARIANCE).velocity(x, t)
    np.testing.assert_allclose(mixtures.flow_velocity(m, x, t), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [paths.LINEAR, CURVED])
@pytest.mark.parametrize("ends", [(0.0, 0.4), (0.3, 0.8), (0.3, 1.0), (0.0, 1.0)])
def test_the_reverse_transition_leads_from_marginal_to_marginal(ends, schedule):
    # 2e5 draws: standard errors of mean and second moment are about 0.003 and 0.005
    n = 200_000
    oracle = oracles.mixture(WEIGHTS, MEANS, VARIANCE)
    draw, noise, step = jax.random.split(jax.random.key(0), 3)
    x1, x0 = oracle.sample(draw, n), jax.random.normal(noise, (n, 2))
    t, r = (jnp.full(n, v) for v in ends)
    path = paths.affine(schedule)
    m = mixtures.exact(WEIGHTS, MEANS, VARIANCE, schedule).apply({}, path.point(x0, x1, t), t)

    @jax.jit
    def moved(m, x):
        return mixtures.sample(mixtures.reverse_transition(m, x, t, r, schedule), step)[0]

    found, expected = moved(m, path.point(x0, x1, t)), path.point(x0, x1, r)
    np.testing.assert_allclose(found.mean(0), expected.mean(0), atol=0.03)
    np.testing.assert_allclose(np.cov(found.T), np.cov(expected.T), atol=0.05)
    np.testing.assert_allclose((found**3).mean(0), (expected**3).mean(0), atol=0.3)


def test_conversions_add_up():
    field = mixtures.exact(WEIGHTS, MEANS, VARIANCE, CURVED)
    x, t = batch(4)
    m = field.apply({}, x, t)
    x1, x0 = mixtures.velocity_to_data(m, x, t, CURVED), mixtures.velocity_to_noise(m, x, t, CURVED)
    a, s = CURVED.alpha(t)[:, None], CURVED.sigma(t)[:, None]
    np.testing.assert_allclose(a * mixtures.mean(x1) + s * mixtures.mean(x0), x, atol=1e-5)
    np.testing.assert_allclose(
        mixtures.mean(x1), paths.velocity_to_data(mixtures.mean(m), x, t, CURVED), atol=1e-5
    )


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_shifted_moves_a_gaussian_by_the_bias(share):
    m = GaussianMixture(
        jnp.zeros((3, 1)), jnp.array([[[1.0, -2.0]]] * 3), jnp.log(jnp.full(3, 0.8))
    )
    bias = jnp.sqrt(share) * 0.8 * jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    found = mixtures.shifted(m, bias)
    np.testing.assert_allclose(mixtures.mean(found), mixtures.mean(m) + bias, atol=1e-5)
    np.testing.assert_allclose(mixtures.variance(found), (1 - share) * 0.64, rtol=1e-5)


def test_misfits_say_what_was_expected():
    m = image_mixture()
    with pytest.raises(
        ValueError,
        match=r"expected logits \[b, \*sites, K\].*got \[5, 2, 3, 4\] and \[5, 2, 3, 4, 2\]",
    ):
        mixtures.log_prob(m, jnp.zeros((5, 2, 3, 3)))
    with pytest.raises(ValueError, match=r"log_std of shape \[5\], got \[\]"):
        mixtures.log_prob(m._replace(log_std=jnp.zeros(())), jnp.zeros((5, 2, 3, 2)))
    with pytest.raises(TypeError, match="expected a GaussianMixture"):
        mixtures.log_prob(jnp.zeros((5, 2)), jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match="positive weights"):
        mixtures.exact([0.0, 1.0], [[1.0], [2.0]], 0.1)
