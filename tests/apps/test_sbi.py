"""From a simulator to a posterior, on problems whose posterior is known."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jflow import convert, distributions
from jflow.apps import sbi
from jflow.apps.sbi._coordinates import from_real, to_real

KEY = jax.random.key(0)
BOX = sbi.box_uniform([-1.0, 2.0], [1.0, 6.0])
NOISE = np.array([0.3, 1.0], np.float32)
OBSERVED = np.array([0.6, 4.5], np.float32)
SMALL = sbi.npe(depth=2, hidden=(32,))


def simulator(key, theta):
    return theta + NOISE * jax.random.normal(key, theta.shape)


def exact(observed=OBSERVED):
    """The two marginals of the posterior: normals cut to the box."""
    ends = (BOX.low - observed) / NOISE, (BOX.high - observed) / NOISE
    return [
        scipy.stats.truncnorm(a, b, m, s) for a, b, m, s in zip(*ends, observed, NOISE, strict=True)
    ]


@pytest.fixture(autouse=True)
def ranks_may_differ():
    """Simulators here are written as people write them."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def fitted():
    with jax.numpy_rank_promotion("allow"):
        options = {"num_simulations": 4000, "steps": 800, "estimator": SMALL, "progress": False}
        return sbi.fit(KEY, BOX, simulator, **options)


# ---- priors


def numpyro_priors():
    dist = pytest.importorskip("numpyro.distributions")
    normal = dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2))
    return [
        (dist.Uniform(jnp.array([-1.0, 2.0]), jnp.array([1.0, 6.0])), [-1, 2], [1, 6]),
        (dist.LogNormal(jnp.zeros(2), 1.0).to_event(1), [0, 0], [np.inf] * 2),
        (normal, [-np.inf] * 2, [np.inf] * 2),
        (dist.Beta(2.0, 3.0), [0], [1]),
    ]


def priors():
    uniform, gamma = scipy.stats.uniform(0.1, 0.2), scipy.stats.gamma(2.0)
    pair = (
        lambda key, n: 3 + jax.random.exponential(key, (n, 1)),
        lambda theta: np.where(theta[:, 0] >= 3, 3 - theta[:, 0], -np.inf),
    )
    return [
        (distributions.uniform((2,), -1.0, 4.0), [-1, -1], [4, 4]),
        (distributions.normal((2,)), [-np.inf] * 2, [np.inf] * 2),
        (BOX, [-1, 2], [1, 6]),
        ([uniform, gamma], [0.1, 0], [0.3, np.inf]),
        (scipy.stats.norm([0.0, 5.0], 1.0), [-np.inf] * 2, [np.inf] * 2),
        (scipy.stats.multivariate_normal([0.0, 1.0]), [-np.inf] * 2, [np.inf] * 2),
        (pair, [3], [np.inf]),
    ]


@pytest.mark.parametrize("of", [priors, numpyro_priors])
def test_the_support_of_a_prior_is_found(of):
    for given, low, high in of():
        prior = sbi.as_prior(given)
        np.testing.assert_allclose(prior.low, low, atol=1e-6)
        np.testing.assert_allclose(prior.high, high, atol=1e-6)
        theta = prior.sample(KEY, 50)
        assert theta.shape == (50, len(low)) and theta.dtype == np.float32
        assert np.isfinite(prior.log_prob(theta)).all()
        if np.isfinite(low).all():
            assert (prior.log_prob(2 * prior.low[None] - theta - 1e-3) == -np.inf).all()
        np.testing.assert_array_equal(theta, prior.sample(KEY, 50))


def test_densities_of_priors_are_those_of_the_parts():
    prior = sbi.as_prior([scipy.stats.uniform(0.1, 0.2), scipy.stats.gamma(2.0)])
    theta = prior.sample(KEY, 5).astype(np.float64)
    expected = np.log(5) + scipy.stats.gamma(2.0).logpdf(theta[:, 1])
    np.testing.assert_allclose(prior.log_prob(theta), expected, rtol=1e-6)


def test_a_prior_that_is_none_is_refused():
    with pytest.raises(TypeError, match="expected a distribution of jflow, NumPyro or scipy"):
        sbi.as_prior(3.0)
    with pytest.raises(TypeError, match=r"got a tuple.*box_uniform\(low, high\)"):
        sbi.as_prior(([0.0, 0.0], [1.0, 1.0]))
    with pytest.raises(ValueError, match=r"draws of vectors, \[256, d\].*\[256, 2, 2\]"):
        sbi.as_prior(distributions.normal((2, 2)))
    for low, high in [([0.0, 2.0], [1.0, 1.0]), (0.0, 1.0)]:
        with pytest.raises(ValueError, match="low < high, such as"):
            sbi.box_uniform(low, high)
    triangle = (
        lambda key, n: jnp.sort(jax.random.uniform(key, (n, 2)), axis=1),
        lambda theta: (
            np.where((0 < theta[:, 0]) & (theta[:, 0] < theta[:, 1]), 0.7, -np.inf)
            + np.where(theta[:, 1] < 1, 0, -np.inf)
        ),
    )
    with pytest.raises(ValueError, match="its support is not a box"):
        sbi.as_prior(triangle)
    prior = sbi.as_prior(triangle, support=([0, 0], [1, 1]))
    assert prior.high.tolist() == [1, 1]
    with pytest.raises(ValueError, match="draws lie outside of the support"):
        sbi.as_prior(triangle, support=([0, 0], [1, 0.5]))


def test_coordinates_invert_and_their_slopes_are_those_of_autodiff():
    low = np.array([-np.inf, 0.0, -np.inf, -2.0], np.float32)
    high = np.array([np.inf, np.inf, 5.0, 3.0], np.float32)
    theta = np.array([[-700.0, 1e-3, 4.9, -1.999], [3.0, 80.0, -60.0, 2.9], [0, 1, 0, 0]])
    theta = theta.astype(np.float32)
    u, log_slope = to_real(low, high, theta)
    np.testing.assert_allclose(from_real(low, high, u), theta, rtol=1e-4, atol=1e-6)
    jacobian = jax.vmap(jax.jacobian(lambda a: to_real(low, high, a[None])[0][0]))(theta)
    np.testing.assert_allclose(log_slope, np.linalg.slogdet(jacobian)[1], rtol=1e-3)
    far = np.array([[1e4, 1e4, -1e4, 1e4], [-1e4, -1e4, 1e4, -1e4]], np.float32)
    back = from_real(low, high, far)
    assert (back >= low).all() and (back <= high).all()


# ---- posteriors


def test_a_posterior_is_a_density_on_the_box_and_close_to_the_exact_one(fitted):
    grid = [np.linspace(a, b, 201) for a, b in zip(BOX.low, BOX.high, strict=True)]
    points = np.stack(np.meshgrid(*grid, indexing="ij"), -1)
    density = np.exp(fitted.log_prob(points, OBSERVED))
    assert density.shape == (201, 201) and np.isfinite(density).all()  # with the edges
    whole = np.trapezoid(np.trapezoid(density, grid[1], axis=1), grid[0])
    np.testing.assert_allclose(whole, 1, atol=2e-3)
    first, second = exact()
    truth = first.pdf(points[..., 0]) * second.pdf(points[..., 1])
    distance = np.abs(density - truth).mean() * 8 / 2  # total variation; the box has area 8
    assert distance < 0.1
    outside = [[1.001, 3.0], [0.0, 1.999], [0.0, 1e9], [-np.inf, 3.0]]
    assert (fitted.log_prob(outside, OBSERVED) == -np.inf).all()


def test_draws_lie_in_the_box_and_follow_the_density(fitted):
    """Kolmogorov-Smirnov at 1e-3, of 2000 draws against the density's own marginals."""
    theta = np.asarray(fitted.sample(KEY, 2000, OBSERVED))
    assert (theta >= BOX.low).all() and (theta <= BOX.high).all()
    grid = [np.linspace(a, b, 201) for a, b in zip(BOX.low, BOX.high, strict=True)]
    density = np.exp(fitted.log_prob(np.stack(np.meshgrid(*grid, indexing="ij"), -1), OBSERVED))
    for j in range(2):
        marginal = np.trapezoid(density, grid[1 - j], axis=1 - j)
        cdf = np.concatenate([[0], np.cumsum((marginal[1:] + marginal[:-1]) / 2)])
        uniform = np.interp(theta[:, j], grid[j], cdf / cdf[-1])
        assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_the_map_is_at_least_as_dense_as_any_draw(fitted):
    best = fitted.map(OBSERVED)
    theta = fitted.sample(KEY, 2000, OBSERVED)
    assert best.shape == (2,)
    assert fitted.log_prob(best, OBSERVED) >= fitted.log_prob(theta, OBSERVED).max()
    assert ((best >= BOX.low) & (best <= BOX.high)).all()


def test_shapes_of_one_and_of_several_observations(fitted):
    several = np.stack([OBSERVED, OBSERVED / 2 + 1])
    theta = fitted.sample(KEY, 5, several)
    assert theta.shape == (2, 5, 2)
    all_rows = fitted.log_prob(theta, several)
    assert all_rows.shape == (2, 5)
    paired = fitted.log_prob(theta[:, 0], several)
    alone = fitted.log_prob(theta[1], several[1])
    np.testing.assert_allclose(paired, all_rows[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(alone, all_rows[1], rtol=1e-4, atol=1e-5)
    assert fitted.log_prob(theta[0, 0], OBSERVED).shape == ()
    for wrong in (np.zeros(3), np.zeros((2, 2, 2)), 1.0):
        with pytest.raises(ValueError, match=r"observation of the shape \[2\]"):
            fitted.sample(KEY, 5, wrong)
    with pytest.raises(ValueError, match=r"expected theta \[..., 2\], got \[3\]"):
        fitted.log_prob(np.zeros(3), OBSERVED)
    with pytest.raises(ValueError, match=r"expected theta \[2, ..., 2\].* got \[3, 2\]"):
        fitted.log_prob(np.zeros((3, 2)), several)
    with pytest.raises(ValueError, match="NaN"):
        fitted.sample(KEY, 5, [np.nan, 1.0])
    with pytest.raises(ValueError, match="amortized: pass the observation"):
        fitted.sample(KEY, 5)


def test_an_observation_outside_of_everything_simulated_is_named(fitted):
    with pytest.warns(UserWarning, match="outside of everything simulated, at a distance of"):
        fitted.sample(KEY, 5, [30.0, 4.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.sample(KEY, 5, OBSERVED)


def test_a_key_gives_one_posterior_and_a_file_keeps_it(tmp_path):
    options = {"num_simulations": 200, "steps": 3, "estimator": SMALL, "progress": False}
    one, same = (sbi.fit(KEY, BOX, simulator, **options) for _ in range(2))
    theta = one.sample(KEY, 5, OBSERVED)
    np.testing.assert_array_equal(theta, same.sample(KEY, 5, OBSERVED))
    sbi.save(tmp_path / "posterior", one)
    again = sbi.load(tmp_path / "posterior", BOX, estimator=SMALL)
    np.testing.assert_array_equal(theta, again.sample(KEY, 5, OBSERVED))
    with pytest.raises(ValueError, match="expected the prior that was fitted, with the support"):
        sbi.load(tmp_path / "posterior", sbi.box_uniform([0, 0], [1, 1]), estimator=SMALL)
    with pytest.raises(ValueError, match="another estimator or embedding"):
        sbi.load(tmp_path / "posterior", BOX)
    (tmp_path / "other").write_text("text")
    with pytest.raises(ValueError, match="holds no posterior"):
        sbi.load(tmp_path / "other", BOX)


def test_rounds_spend_simulations_where_the_posterior_is():
    """The posterior has the standard deviation 0.5 in a prior of width 20. A disc of radius 3 holds
    7 in 100 draws of the prior, and most of the second round's; the medians and quartiles of the
    result are those of the exact posterior."""
    prior = sbi.box_uniform([-10.0, -10.0], [10.0, 10.0])
    simulated = []

    def noisy(key, theta):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        simulated.append(theta)
        return theta + 0.5 * rng.normal(size=theta.shape)

    observed = np.array([3.0, -4.0], np.float32)
    options = {"num_simulations": 2000, "steps": 1000, "estimator": SMALL, "progress": False}
    options |= {"learning_rate": 5e-3}
    posterior = sbi.fit(KEY, prior, noisy, observation=observed, rounds=2, **options)
    first, second = (np.linalg.norm(a - observed, axis=1) for a in simulated)
    assert (first < 3).mean() < 0.12 and (second < 3).mean() > 0.5
    low, middle, high = np.quantile(posterior.sample(KEY, 2000), [0.25, 0.5, 0.75], axis=0)
    assert np.abs(middle - observed).max() < 0.2
    np.testing.assert_allclose((high - low) / 1.349, 0.5, rtol=0.3)
    with pytest.raises(ValueError, match="2 rounds were aimed at one observation"):
        sbi.calibration(KEY, posterior, noisy)
    with pytest.raises(ValueError, match="rounds=2 aim at one observation, and none was given"):
        sbi.fit(KEY, prior, noisy, rounds=2)


class Means(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x.mean(1))


@pytest.mark.parametrize("estimator", [SMALL, sbi.fmpe(hidden=(16,), method=8)])
def test_estimators_take_an_embedding_of_what_was_simulated(estimator):
    def rows(key, theta):
        return theta[:, None] + jax.random.normal(key, (len(theta), 7, 2))

    options = {"num_simulations": 300, "steps": 4, "estimator": estimator, "progress": False}
    posterior = sbi.fit(KEY, BOX, rows, embed=Means(), **options)
    x = np.full((7, 2), [0.1, 4.0])
    theta = posterior.sample(KEY, 6, x)
    assert ((theta >= BOX.low) & (theta <= BOX.high)).all()
    shuffled = posterior.log_prob(theta, x[::-1])
    np.testing.assert_allclose(posterior.log_prob(theta, x), shuffled, rtol=1e-4, atol=1e-4)
    assert np.isfinite(posterior.log_prob(theta, x)).all()


# ---- simulators


def simulated(function, n=400, prior=BOX, **options):
    return sbi.simulate(KEY, prior, function, n, progress=False, **options)


def test_a_simulator_in_numpy_is_called_as_it_is():
    types = []

    def by_key(key, theta):
        types.append(type(theta))
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return theta + rng.normal(size=theta.shape)

    theta, x = simulated(by_key, 1500)  # two calls
    again = simulated(by_key, 1500)
    assert types[-1] is np.ndarray and x.dtype == np.float32
    np.testing.assert_array_equal(x, again[1])
    noise = x - theta
    assert len(np.unique(noise[:, 0])) == 1500
    rng = np.random.default_rng(0)  # noise that jax would compile into a constant
    theta, x = simulated(lambda key, theta: theta + rng.normal(size=theta.shape), 1500)
    assert len(np.unique((x - theta)[:, 0].round(4))) > 1400


def test_what_is_not_finite_is_left_out_with_counts():
    def broken(share):
        def run(key, theta):
            bad = theta[:, :1] < -1 + 2 * share
            return jnp.where(bad, jnp.nan, simulator(key, theta))

        return run

    with pytest.warns(UserWarning, match=r"of 4000 simulations \(\d\.\d%\) hold NaN.*left out"):
        theta, x = simulated(broken(0.01), 4000)
    assert 3900 < len(theta) < 4000 and np.isfinite(x).all()
    with pytest.raises(
        ValueError, match=r"400 of 400 simulations \(100.0%\).*theta = \[.*to where it runs$"
    ):
        simulated(broken(1.1))
    with pytest.raises(ValueError, match="max_invalid=0.2"):
        simulated(broken(0.4), max_invalid=0.2)


def test_simulators_that_do_not_fit_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"a row for each of theta \[400, 2\], got .*\[3\]"):
        simulated(lambda key, theta: jnp.zeros(3))
    with pytest.raises(ValueError, match="failed on draws of the prior.*IndexError"):
        simulated(lambda key, theta: np.asarray(theta)[:, 5])
    with pytest.raises(ValueError, match=r"simulator failed .*\[400, 1\].*simulator\(key, theta\)"):
        simulated(lambda key, theta: theta @ np.eye(3), prior=sbi.box_uniform([0], [1]))
    with pytest.raises(TypeError, match="key"):
        sbi.simulate(0, BOX, simulator, 10)
    assert simulated(lambda key, theta: theta.sum(1))[1].shape == (400, 1)


def test_pairs_that_do_not_fit_are_refused():
    theta = BOX.sample(KEY, 50)
    for t, x, said in (
        (theta[:, :1], theta, r"theta \[n, 2\]"),
        (theta, theta[:20], r"\[50, 2\] and \[20, 2\]"),
        (theta[:10], theta[:10], "at least 20 pairs"),
        (theta, 0 * theta + 3.0, "simulations are the same"),
        (theta + 5, theta, "50 of 50 rows of theta lie outside"),
        (theta, np.full_like(theta, np.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            sbi.fit_simulations(KEY, BOX, t, x, progress=False)


# ---- what people look at


def exact_posterior(narrow, correlation=0.0):
    """The exact one of a normal prior, with its standard deviation times `narrow` and a correlation
    that is not there."""
    prior = sbi.as_prior(distributions.normal((2,)))
    covariance = narrow**2 / 2 * np.array([[1, correlation], [correlation, 1]])

    def sample(key, n, x):
        noise = np.asarray(jax.random.normal(key, (len(x), n, 2)))
        return x[:, None] / 2 + noise @ np.linalg.cholesky(covariance).T

    def log_prob(theta, x):
        x = x[:, None] if theta.ndim == 3 else x
        return scipy.stats.multivariate_normal([0, 0], covariance).logpdf(theta - x / 2)

    return sbi.Posterior(sample, log_prob, None, None, {}, prior, None, None, 1, [])


def unit_noise(key, theta):
    return theta + jax.random.normal(key, theta.shape)


def test_calibration_sees_a_correlation_that_the_marginals_do_not_show():
    wrong = exact_posterior(1.0, correlation=0.95)
    found = sbi.calibration(KEY, wrong, unit_noise, progress=False)
    assert found.rejected == ("density", "tarp")


def test_calibration_rejects_a_narrow_posterior_and_not_the_exact_one():
    """At a false-alarm rate of 0.01 for all four tests together."""
    found = sbi.calibration(KEY, exact_posterior(1.0), unit_noise, progress=False)
    assert found.rejected == () and found.ranks.shape == (300, 2)
    assert list(found.p_values) == ["theta 1", "theta 2", "density", "tarp"]
    found = sbi.calibration(KEY, exact_posterior(0.6), unit_noise, progress=False)
    assert found.rejected == ("theta 1", "theta 2", "density", "tarp")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    titles = [axis.get_title() for axis in sbi.plot_calibration(found).axes]
    assert titles[0] == "theta 1, p = 0.0002" and titles[-1] == "coverage"
    pyplot.close("all")


def test_pictures_and_arviz_refuse_what_does_not_fit():
    draws = np.zeros((10, 2))
    with pytest.raises(ValueError, match="d names"):
        sbi.pairplot(draws, names=["a"])
    with pytest.raises(ValueError, match=r"a truth \[2\], got \[3\]"):
        sbi.pairplot(draws, truth=[0, 0, 0])


def test_draws_are_handed_to_arviz():
    arviz = pytest.importorskip("arviz")
    draws = np.random.default_rng(0).normal([1.0, 5.0], 1, size=(500, 2))
    data = sbi.to_arviz(draws, names=["mass", "charge"], observation=OBSERVED)
    summary = arviz.summary(data)
    assert list(summary.index) == ["mass", "charge"]
    np.testing.assert_allclose(summary["mean"].astype(float), draws.mean(0), atol=0.01)
    assert sbi.to_arviz(draws)["posterior"]["theta"].shape == (1, 500, 2)


def test_a_posterior_at_an_observation_is_a_distribution_of_numpyro(fitted):
    pytest.importorskip("numpyro")
    of_numpyro = convert.to_numpyro(fitted.at(OBSERVED), fitted.params, support=(BOX.low, BOX.high))
    theta = of_numpyro.sample(KEY, (7,))
    expected = fitted.log_prob(theta, OBSERVED)
    np.testing.assert_allclose(of_numpyro.log_prob(theta), expected, rtol=1e-4, atol=1e-5)
    assert of_numpyro.support(theta).all() and not of_numpyro.support(theta + 10).any()


def test_evidence_where_the_likelihood_is_known(fitted):
    """The integral of the prior times normals, by hand, from exact draws of the posterior. The
    fitted flow is far better than an error of 0.02 nats needs, and 0.1 is 5 of these."""
    ends = [(BOX.high - OBSERVED) / NOISE, (BOX.low - OBSERVED) / NOISE]
    inside = scipy.stats.norm.cdf(ends[0]) - scipy.stats.norm.cdf(ends[1])
    log_z = np.sum(np.log(inside / (BOX.high - BOX.low)))
    rng = np.random.default_rng(0)
    draws = np.stack([law.rvs(2000, random_state=rng) for law in exact()], -1).astype(np.float32)

    def log_likelihood(theta):
        return jax.scipy.stats.norm.logpdf(OBSERVED, theta, NOISE).sum(-1)

    found = sbi.evidence(KEY, fitted, log_likelihood, draws, OBSERVED)
    for value, error in found:
        assert abs(value - log_z) < 0.1 and error < 0.02


def test_the_density_is_handed_to_blackjax(fitted):
    """A short chain stays in the box and has the posterior's mean, within about five errors."""
    blackjax = pytest.importorskip("blackjax")
    kernel = blackjax.normal_random_walk(
        lambda theta: fitted.log_prob(theta, OBSERVED), jnp.array([0.4, 1.2])
    )

    def step(state, key):
        state, _ = kernel.step(key, state)
        return state, state.position

    start = kernel.init(jnp.asarray(OBSERVED))
    chain = jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(KEY, 4000))[1])()
    assert ((chain >= BOX.low) & (chain <= BOX.high)).all()
    theta = fitted.sample(KEY, 2000, OBSERVED)
    assert (np.abs(chain.mean(0) - theta.mean(0)) < 0.3 * theta.std(0)).all()
