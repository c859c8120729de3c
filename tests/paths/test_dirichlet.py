"""Dirichlet flow matching: the incomplete beta function's derivatives, the path, its velocity, and
guidance that stays on the simplex, against quadrature, densities and enumerated posteriors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from jax.random import clone

from jflow import guidance, losses, paths, solvers, times
from jflow.types import Field

KEY = jax.random.key(0)
ALARM = 1e-3  # the false-alarm rate of each two-sample test, were the seed not fixed
P = np.array([0.5, 0.3, 0.2])
END = 8.0


def quadrature(a, b, x):
    """dI_x(a, b)/da, as the integral of (log s - E log s) under the density up to x."""
    mean = scipy.special.psi(a) - scipy.special.psi(a + b)
    law = scipy.stats.beta(a, b)
    parts = [(0, x)] if x < 0.5 else [(x, 1)]  # the whole is 0: the shorter side is exact
    value = scipy.integrate.quad(
        lambda s: (np.log(s) - mean) * law.pdf(s), *parts[0], epsabs=1e-14, epsrel=1e-12, limit=200
    )[0]
    return value if x < 0.5 else -value


def test_derivatives_of_the_incomplete_beta_function(x64):
    """In a by quadrature to 1e-9, in b by the symmetry of quadrature, in x as the density; float32
    to 1e-6."""
    cases = np.array(
        list(itertools.product([1.0, 1.5, 4.0, 9.0], [1.0, 3.0, 19.0], [1e-3, 0.2, 0.5, 0.9]))
        + [(0.3, 0.6, 0.4), (30.0, 40.0, 0.45), (9.0, 400.0, 0.03)]
    )
    grads = jax.jit(jax.vmap(jax.grad(paths.betainc, argnums=(0, 1, 2))))
    by_a, by_b, by_x = jax.device_get(grads(*cases.T))
    expected = np.array([quadrature(*case) for case in cases])
    mirrored = np.array([-quadrature(b, a, 1 - x) for a, b, x in cases])
    np.testing.assert_allclose(by_a, expected, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(by_b, mirrored, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(by_x, scipy.stats.beta.pdf(cases[:, 2], *cases.T[:2]), rtol=1e-9)
    narrow = jax.device_get(grads(*cases.T.astype(np.float32)))
    assert narrow[0].dtype == np.float32
    np.testing.assert_allclose(narrow[0], by_a, atol=1e-6)
    np.testing.assert_allclose(narrow[1], by_b, atol=1e-6)


def test_hard_ends_are_finite():
    x = np.array([0, 1e-38, 1e-7, 1 - 6e-8, 1], np.float32)
    grads = jax.jit(jax.vmap(jax.grad(paths.betainc, argnums=(0, 1)), in_axes=(None, None, 0)))
    for a, b in ((1.0, 1.0), (9.0, 3.0), (1.5, 1000.0)):
        by_a, by_b = jax.device_get(grads(a, b, x))
        assert np.all(np.isfinite(by_a)) and np.all(np.isfinite(by_b))
        assert by_a[0] == by_a[-1] == by_b[0] == by_b[-1] == 0
    speed = jax.jit(paths.dirichlet_speed, static_argnums=2)
    for count in (2, 4, 1000):
        c = np.array([0, 0.1, 8, 30], np.float32)
        value = jax.device_get(speed(jnp.tile(x, (4, 1)), jnp.asarray(c)[:, None], count))
        assert np.all(np.isfinite(value)) and np.all(value >= 0) and np.all(value[:, 0] == 0)
        last = (scipy.special.psi(c + count) - scipy.special.psi(c + 1)) / (count - 1)
        np.testing.assert_allclose(value[:, -1], last, rtol=2e-5)  # E log(1 / s) / (K - 1)


@pytest.mark.parametrize("count", (2, 3, 20))
def test_the_field_satisfies_the_continuity_equation(count, x64):
    """d_c p + div(p u) = 0 for the density of Dir(1 + c e_1), to 1e-6 of it: along the share x of
    the corner p = x^c / B up to a constant, and the other K - 2 coordinates add -(K - 2) p C."""
    c, x = (a.ravel() for a in np.meshgrid([0.5, 2.0, 7.0], np.linspace(0.02, 0.98, 13)))
    weights, moves = np.array([1, -8, 8, -1]) / 12, np.array([-2, -1, 1, 2])
    h = 2e-3 * x * (1 - x)

    def log_p(x, c):
        return c * np.log(x) + scipy.special.gammaln(count + c) - scipy.special.gammaln(1 + c)

    speed = jax.jit(paths.dirichlet_speed, static_argnums=2)

    def flux(x):
        return np.exp(log_p(x, c)) * np.asarray(speed(x, c, count)) * (1 - x)

    by_time = 1e3 * sum(
        w * np.exp(log_p(x, c + 1e-3 * d)) for w, d in zip(weights, moves, strict=True)
    )
    outflow = sum(w * flux(x + h * d) for w, d in zip(weights, moves, strict=True)) / h
    others = (count - 2) * np.exp(log_p(x, c)) * np.asarray(speed(x, c, count))
    residual = by_time + outflow - others
    scale = np.abs(by_time) + np.abs(outflow) + np.exp(log_p(x, c))
    assert np.max(np.abs(residual) / scale) < 1e-6


def test_points_of_the_path_have_the_law_of_dirichlet():
    """The share of the corner is Beta(1 + c, K - 1), what is left is uniform; at t=0 the point is
    x0. The target is the velocity of a classifier that knows the token."""
    count, n, t = 4, 2000, 0.3
    path = paths.dirichlet(END)
    known = Field(None, lambda params, x, t, cond=None, *, key=None: 200.0 * cond)
    velocity = paths.dirichlet_velocity(known, END)

    @jax.jit
    def run(key):
        x1 = jnp.tile(jax.nn.one_hot(jnp.array([1]), count)[None], (n, 2, 1))
        x0, _ = paths.dirichlet_source(key, x1)
        times = jnp.full(n, t)
        x = path.point(x0, x1, times, key=clone(KEY))
        wanted = path.target(x0, x1, times, key=clone(KEY))
        first = path.point(x0, x1, jnp.zeros(n), key=clone(KEY))
        return x0, x, first, wanted, velocity.apply({}, x, times, x1)

    x0, x, first, wanted, found = jax.device_get(run(jax.random.key(1)))
    np.testing.assert_allclose(first, x0, atol=1e-6)
    np.testing.assert_allclose(x.sum(-1), 1, atol=1e-5)
    share = x[..., 1].ravel()
    assert scipy.stats.kstest(share, scipy.stats.beta(1 + END * t, count - 1).cdf).pvalue > ALARM
    rest = x[..., 0].ravel() / (1 - share)
    assert scipy.stats.kstest(rest, scipy.stats.beta(1, count - 2).cdf).pvalue > ALARM
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def posterior(params, x, t, cond=None, *, key=None):
    """log p(token | x_t) of independent tokens with probabilities P."""
    c = END * t.reshape(t.shape + (1,) * (x.ndim - 1))
    logs = jnp.log(jnp.asarray(P, x.dtype)).reshape((1,) * (x.ndim - 1) + (3,))
    return logs + c * jnp.log(jnp.maximum(x, 1e-30))


def test_samples_of_the_exact_posterior_reach_the_law_of_the_tokens():
    """And no state leaves the simplex."""
    velocity = paths.dirichlet_velocity(Field(None, posterior), END)

    @jax.jit
    def run(key):
        x0, _ = paths.dirichlet_source(key, jnp.zeros((1000, 2, 3)))
        half, _ = solvers.sample(velocity, {}, x0, method=20, t1=0.5)
        x, _ = solvers.sample(velocity, {}, half, method=20, t0=0.5)
        return half, x

    half, x = jax.device_get(run(KEY))
    for state in (half, x):
        assert state.min() > -1e-6
        np.testing.assert_allclose(state.sum(-1), 1, atol=1e-5)
    for i, p in enumerate(P):  # of the law at t=1, a mixture of Dir(1 + END e_i), each coordinate
        mine, others = scipy.stats.beta(1 + END, 2), scipy.stats.beta(1, 2 + END)
        cdf = lambda s, p=p, a=mine, b=others: p * a.cdf(s) + (1 - p) * b.cdf(s)  # noqa: E731
        assert scipy.stats.kstest(x[..., i].ravel(), cdf).pvalue > ALARM


JOINT = np.random.default_rng(0).dirichlet(np.ones(2), (3, 3))  # p(label | token, token)


def enumerated(x, t, tilt):
    """log-weights [b, 3, 3] of both tokens given x_t, times tilt(label table)."""
    logs = posterior({}, x, t)
    return logs[:, 0, :, None] + logs[:, 1, None, :] + jnp.log(jnp.asarray(tilt, x.dtype))[None]


def test_guidance_by_the_exact_classifier_is_the_exact_posterior(x64):
    """Of two tokens and a label of both, all enumerated; any scale stays on the simplex."""
    x0 = np.random.default_rng(1).dirichlet(np.ones(3), (6, 2))
    t = np.linspace(0.1, 0.9, 6)

    def log_label(params, x, t, cond=None, *, key=None):
        joint = jax.nn.log_softmax(enumerated(x, t, np.ones((3, 3))).reshape(-1, 9), axis=-1)
        per_label = jax.nn.logsumexp(joint[:, :, None] + jnp.log(JOINT).reshape(1, 9, 2), axis=1)
        return jnp.take_along_axis(per_label, cond[:, None], axis=1)[:, 0]

    label = np.zeros(6, np.int32)

    @jax.jit
    def run(x, t):
        made = {}
        for scale in (1.0, 30.0):
            field = guidance.simplex_classifier_guidance(
                Field(None, posterior), Field(None, log_label), scale, end=END
            )
            params = {"field": {}, "classifier": {}}
            made[scale] = jnp.exp(field.apply(params, x, t, label))
        joint = jnp.exp(enumerated(x, t, JOINT[..., 0]))
        joint = joint / jnp.sum(joint, axis=(1, 2), keepdims=True)
        return made, jnp.stack([jnp.sum(joint, axis=2), jnp.sum(joint, axis=1)], axis=1)

    made, expected = jax.device_get(run(x0, t))
    np.testing.assert_allclose(made[1.0], expected, atol=1e-8)
    np.testing.assert_allclose(made[30.0].sum(-1), 1, atol=1e-8)
    assert np.any(made[30.0] < 1e-8) and np.all(made[30.0] >= 0)


def test_classifier_free_guidance_is_linear_in_probabilities_and_projected():
    def logits(params, x, t, cond=None, *, key=None):
        return jnp.log(x) + cond[:, None] * jnp.array([[1.0, 0.0, -1.0]])

    x, t, cond = np.full((2, 3), 1 / 3, np.float32), np.full(2, 0.5, np.float32), np.ones(2)
    conditional = jax.nn.softmax(logits({}, x, t, cond))
    for scale, want in ((1.0, conditional), (0.0, x), (1.2, 1.2 * conditional - 0.2 * x)):
        field = guidance.simplex_cfg(Field(None, logits), scale, null=0.0)
        np.testing.assert_allclose(jnp.exp(field.apply({}, x, t, cond)), want, atol=1e-6)
    wild = jnp.exp(guidance.simplex_cfg(Field(None, logits), 9.0, null=0.0).apply({}, x, t, cond))
    np.testing.assert_allclose(wild, paths.project_simplex(x + 9 * (conditional - x)), atol=1e-6)
    assert np.any(wild < 1e-30)


def test_the_projection_is_the_nearest_point():
    """No point of the simplex is nearer than it, by the angle with every corner; points stay."""
    x = np.random.default_rng(0).normal(0, 2, (50, 5)).astype(np.float32)
    p = np.asarray(paths.project_simplex(x))
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    assert p.min() >= 0
    corners = np.einsum("bi,bki->bk", x - p, np.eye(5)[None] - p[:, None])
    assert corners.max() < 1e-5
    np.testing.assert_allclose(paths.project_simplex(p), p, atol=1e-6)


def test_tokens_are_distilled_from_their_source():
    """With pairs and t=0 the network is shown x0 itself; weights and accuracy are of tokens."""
    x0 = np.random.default_rng(0).dirichlet(np.ones(4), (3, 2)).astype(np.float32)
    tokens = np.array([[0, 1], [2, 3], [3, 3]], np.int32)
    log = Field(None, lambda params, x, t, cond=None, *, key=None: jnp.log(x))
    loss = losses.token_cross_entropy(
        log, paths.dirichlet(), num_classes=4, time=times.fixed((0.0,))
    )
    value, metrics = jax.jit(loss)({}, KEY, {"x": tokens, "x0": x0})
    picked = np.take_along_axis(x0, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(value, -np.log(picked).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (x0.argmax(-1) == tokens).mean())
    outside = jax.jit(loss)({}, KEY, {"x": tokens + 1, "x0": x0})[0]
    assert np.isnan(outside)


def test_bad_options():
    flat = Field(None, lambda params, x, t, cond=None, *, key=None: 0 * x)
    loss = losses.token_cross_entropy(flat, paths.dirichlet(), num_classes=4)
    path, t, one = paths.dirichlet(), jnp.zeros(1), jnp.array([[1.0, 0.0]])
    for call, said in [
        (lambda: paths.dirichlet(0.0), "dirichlet: expected a finite end > 0, got 0.0"),
        (lambda: paths.dirichlet_velocity(flat, -1.0), "dirichlet_velocity: .*end > 0"),
        (lambda: paths.dirichlet_speed(one, 1.0, 1), "num_classes of at least 2, got 1"),
        (lambda: path.point(one, one, t), "dirichlet is stochastic: it needs a key"),
        (
            lambda: path.point(one, 0.7 * one, t, key=KEY),
            r"dirichlet: expected probabilities, .* sum 0.7 at \[0\]",
        ),
        (
            lambda: path.point(one, one + jnp.array([[0.5, -0.5]]), t, key=KEY),
            r"dirichlet: expected probabilities, not negative",
        ),
        (
            lambda: loss({}, KEY, {"x": np.array([[0, 4]])}),
            r"token_cross_entropy: expected tokens in 0 ... 3, got 4 at \[0, 1\]",
        ),
        (
            lambda: loss({}, KEY, {"x": np.ones((1, 2), np.float32)}),
            "token_cross_entropy: expected x to hold tokens, integers",
        ),
        (
            lambda: losses.token_cross_entropy(flat, path, num_classes=1),
            "num_classes",
        ),
        (
            lambda: guidance.simplex_classifier_guidance(flat, flat, 1.0, start=0.0),
            r"simplex_classifier_guidance: expected start in \(0, 1\), got 0.0",
        ),
        (
            lambda: guidance.simplex_cfg(flat, None, null=0),
            "simplex_cfg: expected a function of t or scale a number",
        ),
        (
            lambda: guidance.simplex_cfg(flat, 1.0, null=0).apply({}, one, t),
            "expected cond, what to guide towards",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
