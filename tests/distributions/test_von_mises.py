"""The mixture of von Mises laws against scipy's, and its samples against its density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from keys import KEYS, keys_consumed_twice

from jflow import distributions

RNG = np.random.default_rng(0)
PARAMS = {
    "logits": RNG.normal(size=3),
    "means": RNG.uniform(-3, 3, (3, 2)),
    "log_concentrations": np.array([[-3.0, 0.0], [1.0, 3.0], [6.0, 9.0]]),
}
FLOOR = 0.05


def in_float32(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def test_density_is_the_weighted_sum_of_scipys(x64):
    x = RNG.uniform(-7, 7, (50, 2))  # any real number is an angle
    c = 1 / (np.exp(-PARAMS["log_concentrations"]) + FLOOR**2)
    weights = np.exp(PARAMS["logits"]) / np.exp(PARAMS["logits"]).sum()
    parts = scipy.stats.vonmises.logpdf(x[:, None], c, PARAMS["means"]).sum(-1)
    expected = scipy.special.logsumexp(parts + np.log(weights), axis=1)
    law = distributions.von_mises_mixture((2,), 3, min_std=FLOOR)
    # both Bessel functions are rational approximations of 16 digits
    np.testing.assert_allclose(law.log_prob(PARAMS, x), expected, rtol=1e-10, atol=1e-10)


def test_samples_follow_the_density_and_wrap():
    """Kolmogorov-Smirnov of each angle against scipy, 20,000 draws; false alarm 1 in 1000 each. A
    concentration near 0 is the uniform law."""
    n, law = 20_000, distributions.von_mises_mixture((4,), min_std=1e-4)
    log_c = np.array([[-30.0, -2.0, 1.0, 6.0]])
    params = in_float32({"means": np.zeros((1, 4)), "log_concentrations": log_c})
    x = np.asarray(jax.jit(law.sample, static_argnums=2)(params, KEYS[0], n), np.float64)
    for column, c in zip(x.T, np.exp(log_c[0]), strict=True):
        known = scipy.stats.uniform(-np.pi, 2 * np.pi) if c < 1e-6 else scipy.stats.vonmises(c)
        assert scipy.stats.kstest(column, known.cdf).pvalue > 1e-3
    params["means"] = params["means"] + 3.0
    turned = np.asarray(law.sample(params, KEYS[1], n))
    assert np.all(np.abs(turned) <= np.float32(np.pi)) and np.mean(turned[:, 3] < 0) > 0


def test_components_are_drawn_by_their_weights_and_cond_moves_the_law():
    """The mean cosine and sine of 20,000 draws within 4.5 standard errors of those of the density,
    by the rectangle rule, for each of two conditions."""
    law, n = distributions.von_mises_mixture((1,), 2), 20_000
    cond = np.array([[0.0], [1.0]], np.float32)
    params = {"logits": np.array([0.5, -0.5]), "means": np.array([[0.3], [2.0]])}
    params |= {"log_concentrations": np.array([[2.0], [1.0]]), "kernel": RNG.normal(size=(1, 6))}
    params = in_float32(params)
    angles = np.linspace(-np.pi, np.pi, 401)[:-1]
    tile = lambda c, m: np.tile(c, (m, 1))  # noqa: E731
    rule = jax.jit(lambda c: law.log_prob(params, jnp.asarray(angles[:, None], jnp.float32), c))
    draw = jax.jit(lambda c, key: law.sample(params, key, n, c))
    means = []
    for c, key in zip(cond, KEYS[:2], strict=True):
        p = np.exp(np.asarray(rule(tile(c, 400)), np.float64)) * 2 * np.pi / 400
        np.testing.assert_allclose(p.sum(), 1, atol=1e-5)  # of float32
        x = np.asarray(draw(tile(c, n), key), np.float64)[:, 0]
        for f in (np.cos, np.sin):
            assert abs(f(x).mean() - p @ f(angles)) < 4.5 * f(x).std() / np.sqrt(n)
        means.append(np.cos(x).mean())
    assert abs(means[0] - means[1]) > 0.05


def test_init_starts_at_the_data_and_gradients_reach_every_number():
    law = distributions.von_mises_mixture((2,), 3)
    x, cond = RNG.uniform(-3, 3, (8, 2)).astype(np.float32), np.ones((8, 4), np.float32)

    @jax.jit
    def run(x, cond):
        params = law.init(KEYS[0], x, cond)
        slopes = jax.grad(lambda p: jnp.sum(jnp.sin(law.log_prob(p, x, cond))))(params)
        half = law.log_prob(params, x.astype(jnp.bfloat16), cond)
        return params, slopes, half, law.log_prob(params, jnp.full((1, 2), 1e6), cond[:1])

    params, slopes, half, far = jax.device_get(run(x, cond))
    assert all(np.any(np.all(x == mean, axis=1)) for mean in params["means"])
    assert params["kernel"].shape == (4, 15) and half.dtype == np.float32
    assert all(np.all(np.isfinite(s)) and np.any(s) for s in jax.tree.leaves(slopes))
    assert np.all(np.isfinite(far))  # a large number is an angle too


def test_keys_are_consumed_once_and_bad_options_are_errors():
    law, x = distributions.von_mises_mixture((2,), 3), jnp.zeros((4, 2))
    params = law.init(KEYS[0], x)
    calls = lambda a, b: (law.init(a, x), law.sample(params, b, 3))  # noqa: E731
    assert not keys_consumed_twice(calls, *KEYS[:2])
    with pytest.raises(ValueError, match="components"):
        distributions.von_mises_mixture((2,), 0)
    with pytest.raises(ValueError, match="expected min_std > 0, got 0"):
        distributions.von_mises_mixture((2,), min_std=0.0)
    with pytest.raises(ValueError, match=r"expected x of shape \[b, 2\], got"):
        law.log_prob(params, jnp.zeros((4, 3)))
