"""What is special to the elementwise bijectors: closed forms, supports, and actnorm's first
batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import distributions, flows


@pytest.mark.parametrize(
    "bijector, forward, slope",
    [
        (
            bj.sigmoid(),
            lambda z: 1 / (1 + np.exp(-z)),
            lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2,
        ),
        (bj.softplus(), lambda z: np.log1p(np.exp(z)), lambda z: 1 / (1 + np.exp(-z))),
        (bj.tanh(), np.tanh, lambda z: 1 / np.cosh(z) ** 2),
        (
            bj.invert(bj.logit()),
            lambda z: 1 / (1 + np.exp(-z)),
            lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2,
        ),
    ],
    ids=["sigmoid", "softplus", "tanh", "logit"],
)
def test_closed_forms(bijector, forward, slope, x64):
    z = np.linspace(-15, 15, 61)[:, None]
    x, log_det = bijector.forward({}, jnp.asarray(z))
    np.testing.assert_allclose(x, forward(z), rtol=1e-10)
    np.testing.assert_allclose(log_det, np.log(slope(z))[:, 0], atol=1e-9)


@pytest.mark.parametrize(
    "bijector, expected",
    [(bj.sigmoid(), [-80, -80]), (bj.softplus(), [-80, 0]), (bj.tanh(), [2 * np.log(2) - 160] * 2)],
    ids=["sigmoid", "softplus", "tanh"],
)
def test_far_away_the_log_slope_is_still_finite_and_right(bijector, expected):
    """At z = -80 float32 holds exp(z) but not 1 + exp(z)."""
    log_det = bijector.forward({}, jnp.array([[-80.0], [80.0]]))[1]
    np.testing.assert_allclose(log_det, expected, rtol=1e-6, atol=1e-30)


def test_log_dets_of_half_precision_are_computed_in_float32():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1000)), jnp.bfloat16)
    for bijector in (bj.sigmoid(), bj.softplus(), bj.tanh()):
        x, log_det = bijector.forward({}, z)
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            log_det, bijector.forward({}, z.astype(jnp.float32))[1], rtol=1e-5
        )


def test_a_margin_takes_the_ends_of_the_interval():
    """RealNVP's logit: pixels 0 and 1 are inside, and the density over [0, 1] is that of
    logit(alpha + (1 - 2 alpha) x)."""
    alpha, x = 0.05, jnp.array([[0.0], [0.3], [1.0]])
    z, log_det = bj.sigmoid(alpha).inverse({}, x)
    p = alpha + (1 - 2 * alpha) * np.asarray(x)
    np.testing.assert_allclose(z, np.log(p / (1 - p)), rtol=1e-5)
    np.testing.assert_allclose(log_det, np.log((1 - 2 * alpha) / (p * (1 - p)))[:, 0], rtol=1e-5)
    for margin in (-0.1, 0.5):
        with pytest.raises(ValueError, match="0 <= margin < 0.5"):
            bj.sigmoid(margin)


def test_the_density_of_a_squashed_cauchy_is_the_closed_form(x64):
    """z has density 1 / (pi (1 + z^2)), so x = sigmoid(z) has that over x (1 - x)."""
    flow = flows.flow(bj.sigmoid(), distributions.student_t((1,), 1.0))
    x = jnp.linspace(0.01, 0.99, 50)[:, None]
    z = np.log(x / (1 - x))
    log_prob = flow.log_prob({"bijector": {}, "base": {"log_df": jnp.zeros(1)}}, x)
    np.testing.assert_allclose(
        np.exp(log_prob), (1 / np.pi / (1 + z**2) / (x * (1 - x)))[:, 0], rtol=1e-10
    )


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_actnorm_takes_any_unit_but_leaves_a_constant_channel_alone(scale):
    rng = np.random.default_rng(0)
    x = scale * rng.normal(size=(100, 3)) * [1.0, 0.0, 2.0] + scale * np.array(
        [0.0, 12345.678, 1.0]
    )
    x = jnp.asarray(x, jnp.float32)
    params = bj.actnorm(3).init(jax.random.key(0), x)
    np.testing.assert_allclose(
        params["log_scale"], [np.log(x[:, 0].std()), 0, np.log(x[:, 2].std())], atol=1e-5
    )
    z, _ = bj.actnorm(3).inverse(params, x)
    np.testing.assert_allclose(z.std(0)[::2], 1, rtol=1e-4)


@pytest.mark.parametrize("side", ["data", "source"])
def test_standardize_takes_any_unit_and_offset_and_one_row_leaves_the_identity(side):
    x = (np.random.default_rng(0).normal(size=(200, 2)) * [100, 1e-6] + [5000, 3e-6]).astype(
        np.float32
    )
    bijector = bj.standardize((2,))
    params = jax.jit(bijector.init, static_argnames="side")(jax.random.key(0), x, side=side)
    z, log_det = (bijector.inverse if side == "data" else bijector.forward)(params, x)
    np.testing.assert_allclose(z, (x - x.mean(0, dtype=float)) / x.std(0, dtype=float), atol=1e-4)
    np.testing.assert_allclose(log_det, -np.log(x.std(0, dtype=float)).sum(), rtol=1e-5)
    assert not any(
        np.any(leaf) for leaf in bijector.init(jax.random.key(0), x[:1], side=side).values()
    )


def test_standardize_of_scalars_and_of_channels_that_do_not_vary():
    x = np.float32([3, 5])
    assert bj.standardize(()).inverse(bj.standardize(()).init(jax.random.key(0), x), x)[
        0
    ].tolist() == [-1, 1]
    x = np.stack([x, np.float32([7, 7])], -1)
    assert bj.standardize((2,)).inverse(bj.standardize((2,)).init(jax.random.key(0), x), x)[
        0
    ].tolist() == [
        [-1, 0],
        [1, 0],
    ]


def test_actnorm_averages_over_rows_and_positions():
    x = jnp.asarray(2 + 3 * np.random.default_rng(0).normal(size=(8, 5, 6, 2)), jnp.float32)
    bijector = bj.actnorm(2)
    params = bijector.init(jax.random.key(0), x)
    z, log_det = bijector.inverse(params, x)
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(
        log_det, -30 * np.log(x.std((0, 1, 2))).sum() * np.ones(8), rtol=1e-5
    )


def test_elementwise_gives_each_number_its_own_parameters():
    bijector = bj.elementwise(bj.univariate.affine(), (2, 3))
    z = jnp.ones((1, 2, 3))
    params = bijector.init(jax.random.key(0), z)
    assert params["raw"].shape == (2, 3, 2)
    shifted = {"raw": params["raw"].at[1, 2, 1].set(4.0)}
    np.testing.assert_allclose(
        bijector.forward(shifted, z)[0], np.ones((1, 2, 3)) + 4 * np.eye(6)[5].reshape(1, 2, 3)
    )
