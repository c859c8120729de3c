"""Targets against closed forms, quadrature, scipy and numbers of the literature."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from jflow import energy

RANDOM = np.random.default_rng(0)
DRAWN = {
    "banana": energy.banana(),
    "funnel": energy.funnel(2),
    "double_well": energy.double_well(),
    "forty_gaussians": energy.forty_gaussians(),
}
COUNTS = np.array([[2, 0], [5, 1]])


@pytest.fixture(scope="module")
def drawn():
    """20,000 draws of each, and the log-densities at a grid, in one program."""
    axes = {"banana": 30.0, "funnel": 20.0, "double_well": 6.0, "forty_gaussians": 46.0}
    grids = {
        name: np.stack(np.meshgrid(*[np.linspace(-a, a, 801)] * 2, indexing="ij"), -1)
        for name, a in axes.items()
    }

    @jax.jit
    def run(key, grids):
        keys = jax.random.split(key, len(DRAWN))
        x = {
            name: target.sample(k, 20_000)
            for k, (name, target) in zip(keys, DRAWN.items(), strict=True)
        }
        values = {
            name: target.log_density(grids[name].reshape(-1, 2)) for name, target in DRAWN.items()
        }
        return x, values

    return *jax.device_get(run(jax.random.key(0), grids)), axes


@pytest.mark.parametrize("name", DRAWN)
def test_a_density_integrates_to_its_constant_and_its_draws_follow_it(drawn, name):
    """The sum over a grid, with steps below a quarter of the least width (the funnel's neck is cut
    at -20, where its rest is a spike: there the range of x1 is what differs). The draws: the share
    in each half of each axis beside that of the grid, 4 standard errors of 20,000 draws."""
    x, values, axes = drawn
    a, values = axes[name], values[name].astype(np.float64)
    step = 2 * a / 800
    mass = np.exp(values).reshape(801, 801) * step**2
    if name == "funnel":  # the sum over x2 is exact where its width is at least a step
        wide = np.linspace(-a, a, 801) > 2 * math.log(step)
        marginal = scipy.stats.norm(0, 3).pdf(np.linspace(-a, a, 801))
        inside = scipy.stats.chi2(1).cdf(a**2 / np.exp(np.linspace(-a, a, 801)))
        np.testing.assert_allclose(
            mass.sum(1)[wide] / step, (marginal * inside)[wide], rtol=2e-2, atol=1e-7
        )
        return
    log_z = math.log(mass.sum())
    assert abs(log_z - DRAWN[name].log_z) < 1e-4
    mass /= mass.sum()
    for axis in (0, 1):
        for cut in (-0.3, 0.0, 0.3):
            k = int(round((cut * a + a) / step))
            along = mass.sum(1 - axis)
            expected = along[:k].sum() + along[k] / 2
            found = np.mean(x[name][:, axis] < -a + k * step)
            assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000) + 1e-3


def test_the_funnel_widens(drawn):
    """log |x2| has the mean E log |N| = -(log 2 + euler) / 2, and the variance pi^2 / 8 + 9 / 4."""
    logs = np.log(np.abs(drawn[0]["funnel"][:, 1]))
    variance = np.pi**2 / 8 + 9 / 4
    assert abs(logs.mean() + (math.log(2) + np.euler_gamma) / 2) < 4 * (variance / 20_000) ** 0.5
    np.testing.assert_allclose(logs.var(), variance, rtol=0.06)  # 4 of 0.01: kurtosis below 5


def test_the_wells_have_their_published_constants(drawn):
    """log Z = 10.29348 and P(x1 < 0) = 0.155693; in 32 dimensions 164.695675 (anchors); and by
    scipy's adaptive quadrature."""
    z, _ = scipy.integrate.quad(lambda d: math.exp(d / 2 + 6 * d**2 - d**4), -5, 5, points=[-2, 2])
    log_z = math.log(z) + 0.5 * math.log(2 * math.pi)
    assert abs(energy.double_well().log_z - log_z) < 1e-9
    assert abs(log_z - 10.29348) < 1e-5
    assert abs(energy.many_well(32).log_z - 164.695675) < 1e-6
    left = np.mean(drawn[0]["double_well"][:, 0] < 0)
    assert abs(left - 0.155693) < 4 * (0.1557 * 0.8443 / 20_000) ** 0.5
    x = RANDOM.normal(size=(3, 4))
    expected = sum(0.5 * d + 6 * d**2 - d**4 - v**2 / 2 for d, v in (x[:, :2].T, x[:, 2:].T))
    np.testing.assert_allclose(energy.many_well(4).log_density(jnp.asarray(x)), expected, rtol=1e-4)


def test_the_means_of_the_forty_are_fixed():
    """Golden numbers: other means would be another target. At a mean, narrow modes have the density
    1 / 40 of their own."""
    means = jnp.array([[23.1398185, 1.9755287], [-30.4401341, 27.0032135]])
    values = energy.forty_gaussians(0.1).log_density(means)
    np.testing.assert_allclose(values, -math.log(40 * 2 * math.pi * 0.01), atol=1e-4)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (4, 4)])
def test_the_free_field_is_gaussian(shape):
    """log Z = n / 2 log(2 pi) - log det(H) / 2, H the Hessian of the action; and the sum over all
    neighbors in loops, which meet twice on an axis of two sites."""
    target = energy.phi4(shape, mass_squared=0.7, coupling=0.0)
    size = math.prod(shape)
    hessian = jax.jit(jax.hessian(lambda x: -target.log_density(x.reshape(1, *shape))[0]))(
        jnp.zeros(size)
    )
    expected = 0.5 * (size * math.log(2 * math.pi) - np.linalg.slogdet(hessian)[1])
    np.testing.assert_allclose(target.log_z, expected, rtol=1e-5)
    x = RANDOM.normal(size=shape)
    action = 0.0
    for site in itertools.product(*map(range, shape)):
        action += -4 * x[site] ** 2 + 8 * x[site] ** 4
        for axis in range(len(shape)):
            neighbor = tuple(
                (s + (i == axis)) % n for i, (s, n) in enumerate(zip(site, shape, strict=True))
            )
            action += (x[neighbor] - x[site]) ** 2
    found = energy.phi4(shape).log_density(jnp.asarray(x[None]))[0]
    np.testing.assert_allclose(found, -action, rtol=1e-4)


def test_particles():
    """The pair energies in loops; a thirteen-particle icosahedron has the published least energy
    -44.326801; energies and gradients of particles in one place are finite."""
    x = RANDOM.normal(size=(4, 2)) * 3
    x -= x.mean(0)
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)]
    expected = -sum(-4 * (d - 4) ** 2 + 0.9 * (d - 4) ** 4 for d in distances)
    golden = (1 + 5**0.5) / 2
    corners = [np.roll([0, a, b * golden], k) for a in (-1, 1) for b in (-1, 1) for k in range(3)]
    cluster = np.concatenate([np.zeros((1, 3)), corners]) / np.linalg.norm(corners[0])
    scales = np.linspace(0.9, 1.1, 401)
    wells, pairs = energy.double_well_particles(), energy.lennard_jones(trap=1e-6)
    shift = np.array([[0.5, -1.0]])

    @jax.jit
    def run(x, clusters):
        same = jnp.zeros((1, 13, 3))
        gradient = jax.grad(lambda x: pairs.log_density(x)[0])
        gradient_wells = jax.grad(lambda x: wells.log_density(x)[0])
        return (
            wells.log_density(jnp.stack([x, x[::-1], x + shift])),
            jnp.max(pairs.log_density(clusters)),
            (pairs.log_density(same), gradient(same), gradient_wells(jnp.zeros((1, 4, 2)))),
        )

    values, deepest, degenerate = jax.device_get(
        run(jnp.asarray(x, jnp.float32), jnp.asarray(scales[:, None, None] * cluster, jnp.float32))
    )
    np.testing.assert_allclose(values, expected - np.array([0, 0, 2 * 1.25]), rtol=1e-4)
    np.testing.assert_allclose(deepest, 44.326801, rtol=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in degenerate)


def test_the_cox_process_is_its_two_laws():
    """scipy's normal and Poisson laws; the draws of the prior have its mean and covariance."""
    target = energy.log_gaussian_cox(COUNTS, scale=0.5, mean_count=8.0)
    center = np.array(list(itertools.product([0.25, 0.75], repeat=2)))
    covariance = 1.91 * np.exp(-np.linalg.norm(center[:, None] - center, axis=-1) / 0.5)
    mean = math.log(8) - 1.91 / 2
    x = RANDOM.normal(size=(3, 2, 2))

    @jax.jit
    def run(x):
        draws = target.prior.sample(jax.random.key(0), 20_000)
        return target.prior.log_density(x), target.log_likelihood(x), draws

    log_prior, log_likelihood, draws = jax.device_get(run(jnp.asarray(x, jnp.float32)))
    flat = x.reshape(3, 4)
    normal = scipy.stats.multivariate_normal(np.full(4, mean), covariance)
    np.testing.assert_allclose(log_prior, normal.logpdf(flat), rtol=1e-4)
    poisson = scipy.stats.poisson(np.exp(flat) / 4).logpmf(COUNTS.reshape(4)).sum(1)
    np.testing.assert_allclose(log_likelihood, poisson, rtol=1e-4)
    draws = draws.reshape(-1, 4)
    np.testing.assert_allclose(draws.mean(0), mean, atol=4 * (1.91 / 20_000) ** 0.5)
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=4 * 1.91 * (2 / 20_000) ** 0.5)
    again = [energy.log_gaussian_cox(size=5).log_likelihood(jnp.zeros((1, 5, 5))) for _ in "ab"]
    assert again[0] == again[1]  # the drawn counts are fixed


OPTIONS = {
    "funnel: expected dim to be a whole number of at least 2": lambda: energy.funnel(1),
    "expected an even dim, got 3": lambda: energy.many_well(3),
    "forty_gaussians: expected a finite std > 0, got 0": lambda: energy.forty_gaussians(0),
    "phi4: expected coupling > 0, or": lambda: energy.phi4((2,), coupling=0.0),
    "phi4: expected sites to be": lambda: energy.phi4((1, 4)),
    "particles to be a whole number of at least 2": lambda: energy.double_well_particles(1),
    "expected a finite trap > 0": lambda: energy.lennard_jones(trap=0.0),
    r"counts of shape \[m, m\], got \[4\]": lambda: energy.log_gaussian_cox(np.ones(4)),
    "counts that are whole numbers": lambda: energy.log_gaussian_cox(COUNTS / 2),
    "expected a finite scale > 0": lambda: energy.log_gaussian_cox(scale=-1.0),
    r"phi4: expected .*\[b, 2\], got \[3\]": lambda: energy.phi4((2,)).log_density(jnp.ones(3)),
}


@pytest.mark.parametrize("message", OPTIONS)
def test_bad_options_are_named(message):
    with pytest.raises(ValueError, match=message):
        OPTIONS[message]()
