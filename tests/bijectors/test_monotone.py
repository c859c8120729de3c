"""What is special to the monotone networks: formulas, tails, slopes, quadrature, implicit
derivatives, symmetry."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats

from jflow import bijectors as bj
from jflow import distributions, flows
from jflow.bijectors import univariate

MAKE = {
    "mixture": lambda: univariate.logistic_mixture(3),
    "sigmoidal": lambda: univariate.deep_sigmoidal(3, 2),
    "integral": lambda: univariate.unconstrained_monotone(3),
}


def bounded(raw, limit=3.0):
    return limit * np.tanh(raw / limit)


def components(raw):
    """Weights, locations and log scales of one set of raw numbers; their fixed factors are part of
    every checkpoint."""
    count = len(raw) // 3
    factors = 0.5 + np.arange(3 * count) / (
        3 * count - 1
    )  # log w_1, location_1, scale_1, log w_2 ...
    log_w, location, log_scale = raw.reshape(3, count) * factors.reshape(count, 3).T
    w = np.exp(log_w)
    return w / w.sum(), location, bounded(log_scale)


def test_logistic_mixture_is_scipys(x64):
    rng = np.random.default_rng(0)
    for floor in (0.0, 0.1):
        mixture = univariate.logistic_mixture(3, floor)
        for raw in rng.normal(size=(10, 11)):
            w, mean, log_s = components(raw[:9])
            x = 3 * rng.normal(size=(20, 1))
            cdf, rest, density = (
                f(x, mean, np.exp(log_s)) @ w
                for f in (
                    scipy.stats.logistic.cdf,
                    scipy.stats.logistic.sf,
                    scipy.stats.logistic.pdf,
                )
            )
            a = bounded(raw[9])
            y, log_slope = mixture.forward(x[:, 0], np.broadcast_to(raw, (20, 11)))
            g, slope = np.log(cdf / rest), density / (cdf * rest)
            np.testing.assert_allclose(
                y, ((1 - floor) * g + floor * x[:, 0]) * np.exp(a) + raw[10], atol=1e-9
            )
            np.testing.assert_allclose(
                log_slope, np.log((1 - floor) * slope + floor) + a, atol=1e-9
            )


def test_deep_sigmoidal_is_its_formula(x64):
    rng = np.random.default_rng(1)
    sigmoidal, x = univariate.deep_sigmoidal(4, 2, floor=0.01), rng.normal(size=30)
    for raw in rng.normal(size=(10, 24)):
        h = x
        for layer in raw.reshape(2, 12):
            w, b, log_a = components(layer)
            share = scipy.special.expit(np.exp(log_a) * h[:, None] + b) @ w
            h = scipy.special.logit(share)
        y, _ = sigmoidal.forward(x, np.broadcast_to(raw, (30, 24)))
        np.testing.assert_allclose(y, 0.99 * h + 0.01 * x, atol=1e-9)


@pytest.mark.parametrize("name", ["mixture", "sigmoidal"])
def test_slopes_stay_between_the_floor_and_the_steepest_component(name):
    """exp(3) = 20 a layer: the logit of a mixture is nowhere steeper than its steepest
    component."""
    transformer, rng = MAKE[name](), np.random.default_rng(2)
    raw = (4 * rng.normal(size=(4000, transformer.size))).astype(np.float32)
    if name == "mixture":
        raw[:, -2] = 0
    _, log_slope = jax.jit(transformer.forward)(rng.uniform(-10, 10, 4000).astype(np.float32), raw)
    assert log_slope.min() > np.log(0.99e-3) and log_slope.min() < -6  # the floor of 1e-3 is in use
    assert log_slope.max() < 3 * (1 if name == "mixture" else 2)


def test_the_tails_of_a_mixture_keep_their_digits(x64):
    """float32 against float64 where F or 1 - F is exp(-1e6), and the slopes 1 / max s that the
    tails tend to. The log slope to two ulps of the largest z = (x - mu) / s, which a compiler may
    round one way in F and another way in a share of it.
    """
    mixture, rng = univariate.logistic_mixture(3, floor=0.0), np.random.default_rng(3)
    raw = np.repeat(rng.normal(size=(50, 11)).astype(np.float32)[None], 4, axis=0)
    x = np.repeat(np.array([[-1e6], [-100.0], [100.0], [1e6]], np.float32), 50, axis=1)
    run = jax.jit(mixture.forward)
    got, exact = run(x, raw), run(x.astype(np.float64), raw.astype(np.float64))
    np.testing.assert_allclose(got[0], exact[0], rtol=1e-5)
    z = [
        np.max((np.abs(x[:, :1]) + np.abs(mean)) / np.exp(s), -1)
        for _, mean, s in map(components, raw[0, :, :9].astype(float))
    ]
    assert np.all(np.abs(got[1] - exact[1]) < 1e-5 + 2 * np.spacing(np.float32(np.stack(z, -1))))
    slowest = [max(components(r[:9])[2]) for r in raw[0].astype(float)]
    for end in (0, 3):
        np.testing.assert_allclose(
            exact[1][end], -np.array(slowest) + bounded(raw[0, :, 9]), atol=1e-6
        )


def integrand(raw, bound):
    """exp(v) and its bound, from the docstring's formula."""
    half = (len(raw) - 2) // 2
    free = raw[: 2 * half] / np.sqrt(1 + half * np.sum(raw[: 2 * half] ** 2) / 9)
    frequencies = np.arange(1, half + 1) * np.pi / (2 * bound)
    return lambda t: np.exp(
        free[:half] @ np.cos(frequencies * t) + free[half:] @ np.sin(frequencies * t)
    )


@pytest.mark.parametrize("scale", [0.5, 50.0])
def test_unconstrained_monotone_is_the_integral_scipy_finds(scale, x64):
    """Mild and saturated: the default nodes integrate to 1e-9, which is why map, log slope and
    inverse agree."""
    integral, rng = univariate.unconstrained_monotone(8), np.random.default_rng(4)
    raw, x = scale * rng.normal(size=(6, 18)), rng.uniform(-5, 5, 6)
    raw[:, -2:] = rng.normal(size=(6, 2))
    y, log_slope = integral.forward(x, raw)
    for i in range(6):
        g = integrand(raw[i], 5.0)
        a, b = bounded(raw[i, -2]), raw[i, -1]
        expected, _ = scipy.integrate.quad(g, 0, x[i], epsabs=1e-12, epsrel=1e-12, limit=500)
        np.testing.assert_allclose(y[i], expected * np.exp(a) + b, atol=1e-9, rtol=1e-9)
        np.testing.assert_allclose(log_slope[i], np.log(g(x[i])) + a, atol=1e-9)
        assert abs(np.log(g(x[i]))) <= 3


def test_unconstrained_monotone_equals_zukos_integral(x64):
    """tests/peers/make_transformers_fixtures.py; the raw numbers whose scaled-down form are the
    given coefficients."""
    with np.load(Path(__file__).parents[1] / "peers" / "transformers.npz") as arrays:
        c, x, expected = (arrays[f"integral_{name}"] for name in ("coefficients", "x", "y"))
    raw = c / np.sqrt(1 - 4 * np.sum(c * c, -1, keepdims=True) / 9)
    raw = np.broadcast_to(np.pad(raw, ((0, 0), (0, 2)))[:, None], (*x.shape, 10))
    np.testing.assert_allclose(
        univariate.unconstrained_monotone(4).forward(x, raw)[0], expected, atol=1e-10
    )


def test_unconstrained_monotone_goes_on_with_the_slope_of_the_edge(x64):
    integral, raw = (
        univariate.unconstrained_monotone(3),
        np.random.default_rng(5).normal(size=(1, 8)),
    )
    for side in (-1.0, 1.0):
        (edge, log_slope), (far, far_log_slope) = (
            integral.forward(np.array([x]), raw) for x in (side * 5, side * 1e6)
        )
        np.testing.assert_allclose(far_log_slope, log_slope, atol=1e-12)
        np.testing.assert_allclose(far, edge + np.exp(log_slope) * side * (1e6 - 5), rtol=1e-12)


@pytest.mark.parametrize("name", MAKE)
def test_derivatives_of_the_inverse_are_finite_differences_and_one_over_the_slope(name, x64):
    """First derivatives in y and in every raw number, and the second in y: d2x/dy2 = -f'' /
    f'^3."""
    transformer, rng = MAKE[name](), np.random.default_rng(6)
    y, raw = rng.normal(size=4), rng.normal(size=(4, transformer.size))

    def value(y, raw):
        return transformer.inverse(y[None], raw[None])[0][0]

    def f(x, raw):
        return transformer.forward(x[None], raw[None])[0][0]

    @jax.jit
    @jax.vmap
    def derivatives(y, raw):
        x = value(y, raw)
        slope = jax.grad(f)
        return {
            "back": transformer.inverse(y[None], raw[None])[1][0],
            "y": jax.grad(value)(y, raw),
            "yy": jax.grad(jax.grad(value))(y, raw),
            "raw": jax.grad(value, 1)(y, raw),
            "jvp": jax.jvp(lambda raw: value(y, raw), (raw,), (jnp.ones_like(raw),))[1],
            "slope": slope(x, raw),
            "bend": jax.grad(slope)(x, raw),
        }

    r = derivatives(y, raw)
    np.testing.assert_allclose(r["y"], 1 / r["slope"], rtol=1e-9)
    np.testing.assert_allclose(r["back"], -np.log(r["slope"]), atol=1e-9)
    np.testing.assert_allclose(r["yy"], -r["bend"] / r["slope"] ** 3, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(r["jvp"], np.sum(r["raw"], -1), rtol=1e-9, atol=1e-12)
    h = 1e-5
    inverse = jax.jit(lambda y, raw: transformer.inverse(y, raw)[0])
    np.testing.assert_allclose(
        r["y"], (inverse(y + h, raw) - inverse(y - h, raw)) / (2 * h), rtol=1e-5
    )
    steps = h * np.eye(transformer.size)[:, None]
    for i in range(transformer.size):
        change = (inverse(y, raw + steps[i]) - inverse(y, raw - steps[i])) / (2 * h)
        np.testing.assert_allclose(r["raw"][:, i], change, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", MAKE)
def test_saturated_inverses_in_float32(name):
    """x is as good as float32 holds x and y: |f(x) - y| < 1e-5 (1 + |y| + |b| + f'(x) (1 + |x|)),
    on every row."""
    transformer, rng = MAKE[name](), np.random.default_rng(7)
    raw = (4 * rng.normal(size=(4000, transformer.size))).astype(np.float32)
    y = (5 * rng.normal(size=4000)).astype(np.float32)

    @jax.jit
    def run(y, raw):
        x, log_slope = transformer.inverse(y, raw)
        return x, log_slope, transformer.forward(x, raw)[0]

    x, log_slope, again = run(y, raw)
    size = 1 + np.abs(y) + np.abs(raw[:, -1]) + np.exp(-log_slope) * (1 + np.abs(x))
    assert np.max(np.abs(again - y) / size) < 1e-5


def test_components_part_on_bimodal_data():
    """From raw = 0, where all components are alike, the likelihood of two narrow modes at -2 and
    1.5 is learned: 400 steps come within 0.2 nats of the entropy 1.1, where one component, or many
    alike, cannot come below 1.9."""
    flow = flows.flow(
        bj.invert(bj.elementwise(univariate.logistic_mixture(4), (1,))), distributions.normal((1,))
    )
    rng = np.random.default_rng(8)
    side = rng.random(2000) < 0.4
    x = (np.where(side, -2.0, 1.5) + 0.3 * rng.normal(size=2000)).astype(np.float32)[:, None]
    # negative log-likelihood of the best Gaussian, and of the best logistic, which is what alike
    # components amount to
    gaussian = 0.5 * np.log(2 * np.pi * np.e * x.var())
    optimizer = optax.adam(0.05)

    @jax.jit
    def train(params):
        def step(state, _):
            params, moments = state
            loss, grads = jax.value_and_grad(lambda p: -jnp.mean(flow.log_prob(p, x)))(params)
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), length=400)

    (params, _), losses = train(flow.init(jax.random.key(0), x))
    entropy = 0.5 * np.log(2 * np.pi * np.e * 0.09) - 0.4 * np.log(0.4) - 0.6 * np.log(0.6)
    assert gaussian > 1.9 > entropy + 0.7
    assert losses[-1] < entropy + 0.2
    raw = np.asarray(params["bijector"]["raw"], float)[0]
    _, mean, _ = components(raw[:12])
    assert np.ptp(mean) > 2
