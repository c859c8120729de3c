"""The models of posteriordb against scipy, their reference draws, and an evidence by quadrature."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from jflow import energy
from jflow.energy import _posteriordb as models

NORMAL, CAUCHY = scipy.stats.norm.logpdf, scipy.stats.halfcauchy.logpdf
RANDOM = np.random.default_rng(0)
DATA = {
    "arK": {"K": 5, "y": RANDOM.normal(size=12)},
    "eight_schools": {
        "y": [28, 8, -3, 7, -1, 1, 18, 12],
        "sigma": [15, 10, 16, 11, 9, 11, 10, 18],
    },
    "garch": {"y": RANDOM.normal(size=9), "sigma1": 0.5},
    "kidiq": {"kid_score": RANDOM.normal(size=7), "mom_iq": RANDOM.normal(size=7)},
    "lynx_hare": {
        "ts": [1, 2, 3],
        "y_init": [30, 4],
        "y": [[47.2, 6.1], [70.2, 9.8], [77.4, 35.2]],
    },
    "mixture": {"y": RANDOM.normal(size=6)},
}
DATA["eight_schools_centered"] = DATA["eight_schools"]


def ark(data, v):
    y = data["y"]
    means = [v[0] + sum(v[k] * y[t - k] for k in range(1, 6)) for t in range(5, len(y))]
    prior = NORMAL(v[:6], 0, 10).sum() + CAUCHY(v[6], 0, 2.5)
    return prior, NORMAL(y[5:], means, v[6]).sum()


def schools(data, v):
    theta, mu, tau = v[:8], v[8], v[9]
    prior = NORMAL(theta, mu, tau).sum() + NORMAL(mu, 0, 5) + CAUCHY(tau, 0, 5)
    return prior, NORMAL(data["y"], theta, data["sigma"]).sum()


def garch(data, v):
    mu, alpha0, alpha1, beta1 = v
    y, sigma = data["y"], [data["sigma1"]]
    for before in y[:-1]:
        sigma.append(math.sqrt(alpha0 + alpha1 * (before - mu) ** 2 + beta1 * sigma[-1] ** 2))
    return 0.0, NORMAL(y, mu, sigma).sum()


def kidiq(data, v):
    fit = NORMAL(data["kid_score"], v[0] + v[1] * data["mom_iq"], v[2]).sum()
    return CAUCHY(v[2], 0, 2.5), fit


def mixture(data, v):
    mu, sigma, theta = v[:2], v[2:4], v[4]
    prior = math.log(2) + NORMAL(mu, 0, 2).sum() + scipy.stats.halfnorm.logpdf(sigma, 0, 2).sum()
    density = [
        p * np.exp(NORMAL(data["y"], m, s))
        for p, m, s in zip((theta, 1 - theta), mu, sigma, strict=True)
    ]
    return prior + scipy.stats.beta.logpdf(theta, 5, 5), np.log(sum(density)).sum()


def lynx_hare(data, v):
    (alpha, beta, gamma, delta), start, sigma = v[:4], v[4:6], v[6:]
    found = scipy.integrate.solve_ivp(
        lambda t, z: [(alpha - beta * z[1]) * z[0], (delta * z[0] - gamma) * z[1]],
        (0, data["ts"][-1]),
        start,
        t_eval=data["ts"],
        rtol=1e-9,
        atol=1e-9,
    ).y.T
    law = lambda y, m: scipy.stats.lognorm.logpdf(y, sigma, scale=m).sum()  # noqa: E731
    rates = sum(
        scipy.stats.truncnorm.logpdf(rate, -m / s, np.inf, m, s)
        for rate, m, s in zip(v[:4], (1, 0.05, 1, 0.05), (0.5, 0.05, 0.5, 0.05), strict=True)
    )
    prior = rates + scipy.stats.lognorm.logpdf(start, 1, scale=10).sum()
    prior += scipy.stats.lognorm.logpdf(sigma, 1, scale=math.exp(-1)).sum()
    return prior, law(data["y_init"], start) + law(data["y"], found)


JOINT = {
    "arK": ark,
    "eight_schools": schools,
    "eight_schools_centered": schools,
    "garch": garch,
    "kidiq": kidiq,
    "lynx_hare": lynx_hare,
    "mixture": mixture,
}


@pytest.mark.parametrize("name", JOINT)
def test_a_density_is_that_of_its_quantities(name):
    """scipy's prior and likelihood of the quantities, plus the log-determinant of the Jacobian of
    `constrain`; on few data at two points near 0, so that float32 keeps five digits. The draws of
    the prior have the mean slope 0 of its log-density, within 5 of its standard errors."""
    target, constrain, unconstrain = models._MODELS[name][2](DATA[name])
    (d,) = target.event_shape
    x = 0.3 * RANDOM.normal(size=(2, d)).astype(np.float32)

    @jax.jit
    def run(x, key):
        values = constrain(x)
        slopes = None
        if target.prior is not None:
            draws = target.prior.sample(key, 4000)
            slopes = jax.grad(lambda x: jnp.sum(target.prior.log_density(x)))(draws)
        jacobian = jax.vmap(jax.jacfwd(lambda x: constrain(x[None])[0]))(x)
        parts = [] if target.prior is None else [target.prior.log_density(x)]
        return values, unconstrain(values), jacobian, target.log_density(x), parts, slopes

    values, again, jacobian, density, parts, slopes = jax.device_get(run(x, jax.random.key(0)))
    np.testing.assert_allclose(again, x, atol=1e-5)
    prior, likelihood = np.array([JOINT[name](DATA[name], v.astype(np.float64)) for v in values]).T
    log_det = np.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(density, prior + likelihood + log_det, rtol=1e-4, atol=1e-3)
    for part in parts:
        np.testing.assert_allclose(part, prior + log_det, rtol=1e-4, atol=1e-3)
    if slopes is not None:
        assert np.all(np.abs(slopes.mean(0)) < 5 * slopes.std(0) / 4000**0.5)


def evidence_of_the_schools():
    """theta and mu integrated in closed form, tau by quadrature: y ~ N(0, diag(s^2 + tau^2) +
    25)."""
    y, s = (np.array(DATA["eight_schools"][key], float) for key in ("y", "sigma"))

    def integrand(log_tau):
        tau = math.exp(log_tau)
        covariance = np.diag(s**2 + tau**2) + 25.0
        log = scipy.stats.multivariate_normal(np.zeros(8), covariance).logpdf(y)
        return math.exp(log + CAUCHY(tau, 0, 5) + log_tau)

    return math.log(scipy.integrate.quad(integrand, -25, 15, epsabs=1e-22, limit=200)[0])


def test_the_evidence_of_the_eight_schools():
    """-31.3113 (anchors), by quadrature, and by 100,000 draws of the prior within 4 standard
    errors."""
    target, _, _ = models._MODELS["eight_schools"][2](DATA["eight_schools"])
    exact = evidence_of_the_schools()
    assert abs(exact - target.log_z) < 1e-4 and abs(exact + 31.3113) < 1e-4
    run = jax.jit(
        lambda key: energy.estimate_log_z(target.log_likelihood(target.prior.sample(key, 100_000)))
    )
    log_z, error = jax.device_get(run(jax.random.key(0)))
    assert abs(log_z - exact) < 4 * error < 0.05


@pytest.mark.parametrize("name", JOINT)
def test_the_reference_draws_are_those_of_the_density(name, data_dir):
    """The mean slope of a log-density is 0 under its own law: every tenth of the 10,000 draws,
    within 5 standard errors for each number; a model with another data or prior would drift."""
    found = energy.posteriordb(name, data_dir / "posteriordb")
    assert found.draws.shape == (10_000, len(found.names))
    draws = jnp.asarray(found.draws[::10], jnp.float32)
    run = jax.jit(jax.grad(lambda x: jnp.sum(found.target.log_density(x))))
    slopes = jax.device_get(run(found.unconstrain(draws)))
    assert np.all(np.abs(slopes.mean(0)) < 5 * slopes.std(0) / 1000**0.5)


def test_unknown_names_and_missing_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="expected a name among .*'arK'.*, got 'schools'"):
        energy.posteriordb("schools", tmp_path)
    with pytest.raises(FileNotFoundError, match="garch-garch11.zip"):
        energy.posteriordb("garch", tmp_path)
    target = models._MODELS["kidiq"][2](DATA["kidiq"])[0]
    with pytest.raises(ValueError, match=r"kidiq: expected .*\[b, 3\], got \[1, 2\]"):
        target.log_density(jnp.zeros((1, 2)))
