"""Whitening by shrunk correlations, against rows left out one by one, and what it leaves white."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jflow import bijectors as bj
from jflow import distributions, flows

UNITS = np.array([1e-3, 1.0, 50.0, 2000.0, 7.0])


def rows(n, seed=0):
    """Correlated columns in units of their own, far from 0."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, 5)) @ rng.normal(size=(5, 5))
    return (UNITS * (mixed + 3)).astype(np.float32)


@pytest.mark.parametrize("n", [4, 30])
def test_a_flow_behind_it_starts_at_the_likeliest_shrunk_normal_distribution(n, x64):
    """In the units of the data, with fewer rows than columns and with more: of 41 shrinkages the
    one under which each standardized row is likeliest, by the mean and covariance of the others."""
    x, new = rows(n).astype(np.float64), rows(7, seed=1).astype(np.float64)
    flow = flows.flow(bj.whiten((5,)), distributions.normal((5,)))
    params = flow.init(jax.random.key(0), x)
    nats = jax.device_get(flow.log_prob(params, new))
    mean, std = x.mean(0), x.std(0)
    z = (x - mean) / std

    def shrunk(of, s):
        return (1 - s) * np.cov(of.T, bias=True) + s * np.eye(5)

    def left_out(s):
        others = [np.delete(z, i, 0) for i in range(n)]
        laws = [scipy.stats.multivariate_normal(o.mean(0), shrunk(o, s)) for o in others]
        return sum(law.logpdf(row) for law, row in zip(laws, z, strict=True))

    best = max(np.geomspace(1e-5, 1, 41), key=left_out)
    law = scipy.stats.multivariate_normal(np.zeros(5), shrunk(z, best))
    expected = law.logpdf((new - mean) / std) - np.log(std).sum()
    np.testing.assert_allclose(nats, expected, rtol=1e-9)
    assert 1e-5 < best < 1


@pytest.mark.parametrize("side", ["data", "source"])
def test_the_batch_of_init_comes_out_white(side):
    """Without shrinkage the covariance is the identity, on either side; with all of it the columns
    keep their correlations. The ridge, 2.4e-6 in float32, is 1.4e-3 of the least eigenvalue of the
    correlations, which rounding at a condition number of 2000 may double."""
    x = rows(200)
    made = {s: bj.whiten((5,), s) for s in (0.0, 1.0)}

    @jax.jit
    def run(x):
        out = {}
        for s, bijector in made.items():
            params = bijector.init(jax.random.key(0), x, side=side)
            apply = bijector.inverse if side == "data" else bijector.forward
            out[s] = apply(params, x)[0]
        return out

    out = jax.device_get(run(x))
    np.testing.assert_allclose(np.cov(out[0.0].T, bias=True), np.eye(5), atol=3e-3)
    expected = np.corrcoef(x.T.astype(np.float64))
    np.testing.assert_allclose(np.corrcoef(out[1.0].T), expected, atol=1e-3)
    np.testing.assert_allclose(out[1.0].std(0), 1, rtol=1e-3)


def test_rows_that_say_nothing_leave_numbers():
    """One row the identity; a column that is the double of another, and one that does not vary."""
    bijector = bj.whiten((3,))
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    x[:, 1], x[:, 2] = 2 * x[:, 0], 7
    for batch in (x[:1], x, np.full_like(x, 5)):
        params = bijector.init(jax.random.key(0), batch)
        z, log_det = bijector.inverse(params, x)
        assert np.all(np.isfinite(z)) and np.all(np.isfinite(log_det))
        if len(batch) == 1:
            np.testing.assert_array_equal(z, x)
    with pytest.raises(ValueError, match=r"whiten: expected shrinkage in \[0, 1\] or None, got 2"):
        bj.whiten((3,), 2)
    with pytest.raises(ValueError, match=r"whiten: expected .*\[b, 3\], got \[5, 4\]"):
        bijector.init(jax.random.key(0), jnp.zeros((5, 4)))
