"""Bayesian flow networks against closed forms: updates, entropies, limits, laws of samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.random import clone

from jflow import losses, paths, solvers, times
from jflow.types import Field

KEY = jax.random.key(0)
ALARM = 1e-3  # the false-alarm rate of each test of a law, were the seed not fixed
N = 20_000
P = np.array([0.5, 0.3, 0.2])
ENTROPY = float(-np.sum(P * np.log(P)))
LEVELS = np.array([-0.5, 0.0, 0.5])


def exact_tokens(params, theta, t, cond=None, *, key=None):
    return jnp.log(jnp.asarray(P, theta.dtype))[None] + jnp.log(jnp.maximum(theta, 1e-37))


def exact_levels(accuracy):
    def apply(params, theta, t, cond=None, *, key=None):
        beta, at = accuracy(t)[:, None], jnp.asarray(LEVELS, theta.dtype)[None]
        logs = jnp.log(jnp.asarray(P, theta.dtype))[None]
        return logs + (1 + beta) * theta[:, None] * at - beta / 2 * at**2

    return apply


QUADRATIC, GEOMETRIC = paths.quadratic_accuracy(6.0), paths.geometric_accuracy(0.1)
CHEM = paths.entropy_accuracy(6.0, 3)
TOKENS = np.random.default_rng(0).choice(3, N, p=P).astype(np.int32)
CASES = {
    "tokens": (paths.bayesian_discrete(QUADRATIC, 3), exact_tokens, TOKENS, ENTROPY),
    "tokens, ChemBFN's": (paths.bayesian_discrete(CHEM, 3), exact_tokens, TOKENS, ENTROPY),
    "levels": (
        paths.bayesian_discretized(GEOMETRIC, LEVELS),
        exact_levels(GEOMETRIC),
        LEVELS[TOKENS].astype(np.float32),
        ENTROPY,
    ),
    "numbers": (
        paths.bayesian_continuous(GEOMETRIC),
        lambda params, theta, t, cond=None, *, key=None: theta,
        np.random.default_rng(1).normal(size=N).astype(np.float32),
        0.5 * np.log(2 * np.pi * np.e),
    ),
}


@functools.cache
def rows(name, steps):
    """The loss of each row and its reconstruction: their metrics come from vmap over rows."""
    flow, apply, x, _ = CASES[name]
    sent = losses.bayesian_flow(Field(None, apply), flow, steps=steps)
    kept = losses.bayesian_reconstruction(Field(None, apply), flow)

    @jax.jit
    def run(keys, x):
        one = lambda loss: jax.vmap(lambda key, x: loss({}, key, {"x": x[None]})[0])  # noqa: E731
        return one(sent)(keys[0], x), one(kept)(keys[1], x)

    found = jax.device_get(run(jax.random.split(KEY, (2, N)), x))
    return [np.asarray(a, np.float64) for a in found]


@pytest.mark.parametrize("name", CASES)
def test_the_bound_of_the_exact_posterior_is_the_entropy(name):
    """In continuous time, and of any number of steps where what is sent is known exactly: within
    four standard errors."""
    flow, _, _, entropy = CASES[name]
    for steps in (None, 1, 5) if name != "numbers" else (None,):
        total = np.sum(rows(name, steps), axis=0)
        error = total.std() / np.sqrt(N)
        assert abs(total.mean() - entropy) < 4 * error
        assert error < 0.05


def test_the_loss_of_n_steps_falls_to_that_of_continuous_time():
    """Of normal numbers both are known: sum_i alpha_i / (2 (1 + beta_i)) and log(1 + beta) / 2."""
    expected = []
    for steps in (1, 4, 64):
        beta = np.asarray(GEOMETRIC(jnp.arange(steps + 1) / steps), np.float64)
        expected.append(np.sum(np.diff(beta) / (1 + beta[:-1]) / 2))
        value = rows("numbers", steps)[0]
        assert abs(value.mean() - expected[-1]) < 4 * value.std() / np.sqrt(N)
    limit = 0.5 * np.log(1 / 0.1**2)
    assert expected[0] > expected[1] > expected[2] > limit
    value = rows("numbers", None)[0]
    assert abs(value.mean() - limit) < 4 * value.std() / np.sqrt(N)
    assert expected[2] - limit < 0.05 * limit


@pytest.mark.parametrize("name", CASES)
def test_updates_in_sequence_are_the_closed_form(name):
    """theta after eight views has the law of theta drawn at once (Kolmogorov and Smirnov); of
    tokens it is the softmax of the sum of the views."""
    flow, _, x, _ = CASES[name]
    x, grid = x[:2000], np.linspace(0, 1, 9)

    @jax.jit
    def run(key):
        theta, total = flow.prior(x.shape, jnp.float32), 0.0
        for t, t_next, own in zip(grid, grid[1:], jax.random.split(key, 8), strict=False):
            t, t_next = jnp.full(len(x), t), jnp.full(len(x), t_next)
            y = flow.send(own, jnp.asarray(x), flow.accuracy(t_next) - flow.accuracy(t))
            theta, total = flow.update(theta, y, t, t_next), total + y
        return theta, total, flow.point(jnp.asarray(x), jnp.ones(len(x)), jax.random.key(9))

    theta, total, once = jax.device_get(run(jax.random.key(1)))
    if theta.ndim > 1:
        np.testing.assert_allclose(theta, jax.nn.softmax(total), atol=1e-5)
        theta, once = (np.take_along_axis(a, x[:, None], 1)[:, 0] for a in (theta, once))
    assert scipy.stats.ks_2samp(theta, once).pvalue > ALARM


@pytest.mark.parametrize("name", ("tokens", "levels"))
def test_samples_of_the_exact_posterior_have_the_law_of_the_data(name):
    flow, apply, _, _ = CASES[name]
    draw = jax.jit(
        lambda key: solvers.sample_bayesian(Field(None, apply), flow, {}, key, (4000,), grid=12)
    )
    x = jax.device_get(draw(KEY))
    counts = np.array(
        [(x == value).sum() for value in ((0, 1, 2) if x.dtype.kind == "i" else LEVELS)]
    )
    assert counts.sum() == 4000 and scipy.stats.chisquare(counts, 4000 * P).pvalue > ALARM


def test_neither_k_nor_t_is_lost():
    """K end t |e_x - p|^2 at t = 1/2 for end = 6, K = 3 and flat p, of two tokens; in bits too."""
    flat = Field(None, lambda params, theta, t, cond=None, *, key=None: 0 * theta)
    loss = losses.bayesian_flow(
        flat, paths.bayesian_discrete(QUADRATIC, 3), time=times.fixed((0.5,))
    )
    value, metrics = loss({}, KEY, {"x": np.array([[0, 2]], np.int32)})
    np.testing.assert_allclose(value, 2 * 3 * 6 * 0.5 * (2 / 3), rtol=1e-5)
    np.testing.assert_allclose(metrics["bits"], value / np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["bits_per_dim"], value / np.log(2) / 2, rtol=1e-6)


def test_the_accuracies():
    """Ends, slopes, and what ChemBFN's is for: the error of the input falls evenly in t."""
    t = np.linspace(0, 1, 11)
    slope = jax.vmap(jax.grad(CHEM))(t)
    lost = 1 - np.exp(-3 * 6 / 4)
    np.testing.assert_allclose(slope, 4 / 3 * lost / (1 - lost * t), rtol=1e-4)
    for accuracy, end in ((CHEM, 6), (QUADRATIC, 6), (GEOMETRIC, 99)):
        np.testing.assert_allclose(accuracy(np.array([0.0, 1.0])), [0, end], rtol=1e-5)
        assert np.all(np.diff(accuracy(t)) > 0)

    @jax.jit
    def errors(key):
        def at(accuracy, t):
            flow = paths.bayesian_discrete(accuracy, 3)
            x = jnp.zeros(4000, jnp.int32)
            theta = flow.point(x, jnp.full(4000, t), clone(key))
            return jnp.mean(jnp.sum(jnp.square(theta - jnp.array([[1.0, 0, 0]])), axis=1))

        return jnp.array(
            [[at(a, s) for s in (0.0, 0.25, 0.5, 0.75, 1.0)] for a in (CHEM, QUADRATIC)]
        )

    found = np.asarray(errors(KEY))
    bend = [np.abs(np.diff(row, 2)).max() / row[0] for row in found]
    assert bend[0] < 0.15 < bend[1]


def test_masses_between_levels(x64):
    """By scipy's distribution function, with the tails in the end levels; far away still finite."""
    mean, log_std = np.array([0.1, -3.0, 5.0]), np.array([-1.0, 0.0, -2.0])
    logits = jax.jit(lambda m, s: paths.discretized_logits(m, s, LEVELS))
    edges = np.array([-np.inf, -0.25, 0.25, np.inf])
    law = scipy.stats.norm(mean[:, None], np.exp(log_std)[:, None])
    expected = np.log(np.diff(law.cdf(edges[None]), axis=1))
    found = np.asarray(logits(mean, log_std))
    seen = np.isfinite(expected) & (expected > -30)
    np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, rtol=1e-6)
    slope = jax.grad(lambda m: jnp.sum(logits(m, log_std)[:, 1]))(np.array([0.1, 90.0, -90.0]))
    assert np.all(np.isfinite(slope))


def test_bad_options():
    flat = Field(None, lambda params, theta, t, cond=None, *, key=None: 0 * theta)
    tokens = paths.bayesian_discrete(QUADRATIC, 3)
    levels = paths.bayesian_discretized(GEOMETRIC, LEVELS)
    run = lambda flow, x, field=flat: losses.bayesian_flow(field, flow)({}, KEY, {"x": x})  # noqa: E731
    shaped = Field(
        None, lambda params, theta, t, cond=None, *, key=None: theta[..., None] + LEVELS[None, None]
    )
    for call, said in [
        (lambda: run(tokens, np.array([[0, 3]])), r"tokens in 0 ... 2, got 3 at \[0, 1\]"),
        (lambda: run(tokens, np.zeros((1, 2), np.float32)), "to hold tokens, integers"),
        (
            lambda: run(levels, np.array([[0.7]], np.float32), shaped),
            r"bayesian_discretized: expected numbers among 3 levels from -0.5 to 0.5, got 0.7",
        ),
        (lambda: run(levels, np.array([[0.5]], np.float32)), "expected logits of shape"),
        (
            lambda: run(paths.bayesian_continuous(GEOMETRIC), np.ones((1, 2), np.float32), shaped),
            "bayesian_continuous: expected a prediction of shape",
        ),
        (lambda: losses.bayesian_flow(flat, tokens, steps=0), "steps"),
        (lambda: paths.bayesian_discrete(QUADRATIC, 1), "num_classes"),
        (lambda: paths.bayesian_discretized(GEOMETRIC, [0.0, 1.0, 3.0]), "equal steps"),
        (lambda: paths.geometric_accuracy(1.0), r"geometric_accuracy: expected std in \(0, 1\)"),
        (lambda: paths.quadratic_accuracy(0.0), "quadratic_accuracy: expected a finite end > 0"),
        (lambda: paths.entropy_accuracy(-1.0, 3), "entropy_accuracy: expected a finite end > 0"),
        (
            lambda: solvers.sample_bayesian(flat, tokens, {}, None, (2,)),
            "solvers.sample_bayesian is stochastic: it needs a key",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
    inside = jax.jit(lambda x: run(levels, x, shaped)[0])
    assert np.isnan(inside(np.array([[0.7]], np.float32)))
    assert np.isfinite(inside(np.array([[0.5]], np.float32)))
