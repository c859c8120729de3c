"""Every base distribution against every promise of `types.Distribution`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from compiling import compiled_again
from keys import KEYS, keys_consumed_twice

from jflow import distributions
from jflow.types import Distribution


class Row(NamedTuple):
    make: Any  # event_shape -> Distribution
    support: tuple[float, float] = (-np.inf, np.inf)
    reach: float = 40.0  # half the range that holds all of the mass but 1e-6
    center: dict = {}  # where the parameters lie, 0 if unsaid
    moments: bool = True  # whether the fourth moment exists, for standard errors of the second
    event: tuple[int, ...] = (2, 3)


TABLE = {
    "conditional_mixture": Row(lambda event: distributions.conditional_mixture(event, 3)),
    "conditional_mixture of one": Row(distributions.conditional_mixture),
    "diagonal_normal": Row(distributions.diagonal_normal),
    "mixture_of_normals": Row(lambda event: distributions.mixture_of_normals(event, 4)),
    "multivariate_normal": Row(lambda event: distributions.multivariate_normal(*event), event=(3,)),
    "normal": Row(distributions.normal),
    "scaled": Row(lambda event: distributions.scaled(distributions.diagonal_normal(event), 0.7)),
    "student_t": Row(
        lambda event: distributions.student_t(event), reach=400.0, center={"log_df": np.log(6)}
    ),
    "student_t of df 1": Row(
        lambda event: distributions.student_t(event), reach=1e7, moments=False
    ),
    "uniform": Row(lambda event: distributions.uniform(event, -1.0, 2.5), support=(-1.0, 2.5)),
}


def test_every_public_name_is_in_the_table():
    modules = {"decoders", "mixtures"}  # tests/distributions
    # of symbols, of sequences, of a token given the one before: tests/distributions/test_causal.py
    elsewhere = {"around_previous", "categorical", "causal", "continuation", "token_log_probs"}
    elsewhere |= {"tokens"}  # tests/distributions/test_tokens.py
    elsewhere |= {"contrasted", "split"}  # laws of laws: tests/distributions/test_split.py
    elsewhere |= {"uniform_on", "wrapped_normal"}  # tests/distributions/test_on_manifolds.py
    elsewhere |= {"von_mises_mixture"}  # of angles: tests/distributions/test_von_mises.py
    assert set(distributions.__all__) == {name.split()[0] for name in TABLE} | modules | elsewhere


def setup(name, event=None, dtype=np.float32):
    """(distribution, params away from their initial values, x)"""
    rng = np.random.default_rng(0)
    event = TABLE[name].event if event is None else event
    distribution = TABLE[name].make(event)
    assert isinstance(distribution, Distribution)
    low, high = np.clip(TABLE[name].support, -3, 3)
    x = jnp.asarray(rng.uniform(low, high, size=(8, *event)), dtype)
    initial = jax.eval_shape(distribution.init, jax.random.key(0), x)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(initial))
    center = TABLE[name].center
    params = {
        k: (center.get(k, 0) + 0.4 * rng.normal(size=leaf.shape)).astype(dtype)
        for k, leaf in initial.items()
    }
    return distribution, params, x


@pytest.mark.parametrize("name", TABLE)
def test_the_density_integrates_to_one(name, x64):
    """In one dimension, by the trapezoid rule in u with x = sinh(u), which reaches far into the
    tails; 1e-5."""
    distribution, params, _ = setup(name, (1,), np.float64)
    if np.isfinite(TABLE[name].support[0]):
        x, weight = np.linspace(-3, 4, 700_001), 1.0
    else:
        x = np.linspace(-1, 1, 40_001) * np.arcsinh(TABLE[name].reach)
        x, weight = np.sinh(x), np.cosh(x)
    log_prob = jax.jit(distribution.log_prob)(params, x[:, None])
    assert log_prob.shape == x.shape and log_prob.dtype == np.float64
    step = np.arcsinh(x[1]) - np.arcsinh(x[0]) if np.ndim(weight) else x[1] - x[0]
    np.testing.assert_allclose(np.sum(np.exp(log_prob) * weight) * step, 1, atol=1e-5)


@pytest.mark.parametrize("name", TABLE)
def test_samples_follow_the_density(name):
    """Kolmogorov-Smirnov against the integrated density, 20,000 draws with a fixed seed; false
    alarm 1 in 1000."""
    distribution, params, _ = setup(name, (1,))
    n = 20_000
    sample = jax.jit(distribution.sample, static_argnums=2)(params, jax.random.key(3), n)
    assert sample.shape == (n, 1) and sample.dtype == jnp.float32
    u = np.linspace(-1, 1, 100_001) * np.arcsinh(TABLE[name].reach)
    density = np.exp(
        np.asarray(jax.jit(distribution.log_prob)(params, np.sinh(u)[:, None]), np.float64)
    ) * np.cosh(u)
    cdf = np.cumsum(density) * (u[1] - u[0])
    at = np.interp(np.arcsinh(np.sort(np.asarray(sample[:, 0], np.float64))), u, cdf)
    distance = np.max(np.abs(at - (np.arange(n) + 0.5) / n)) + 0.5 / n
    assert distance < scipy.stats.kstwo.isf(1e-3, n)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.moments])
def test_sample_moments_are_those_of_the_density(name):
    """In two dimensions: mean and second moments by quadrature, within 4 standard errors of 20,000
    draws."""
    distribution, params, _ = setup(name, (2,))
    u = np.linspace(-1, 1, 801) * np.arcsinh(TABLE[name].reach)
    grid, weight = np.sinh(u), np.cosh(u) * (u[1] - u[0])
    grid = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    log_prob = jax.jit(distribution.log_prob)(params, jnp.asarray(grid, jnp.float32))
    density = np.exp(np.asarray(log_prob, np.float64)) * np.outer(weight, weight).reshape(-1)
    np.testing.assert_allclose(
        density.sum(), 1, atol=1e-2 if name == "uniform" else 1e-4
    )  # it is cut within a cell
    sample = np.asarray(
        jax.jit(distribution.sample, static_argnums=2)(params, jax.random.key(4), 20_000),
        np.float64,
    )
    for moment in (lambda x: x, lambda x: x**2, lambda x: x[:, :1] * x[:, 1:]):
        draws, expected = moment(sample), (density / density.sum()) @ moment(grid)
        slack = 1e-2 if name == "uniform" else 0
        assert np.all(np.abs(draws.mean(0) - expected) < 4 * draws.std(0) / np.sqrt(20_000) + slack)


@pytest.mark.parametrize("name", TABLE)
def test_log_prob_is_in_float32_at_least_and_gradients_reach_every_parameter(name):
    distribution, params, x = setup(name)

    @jax.jit
    def run(params, x):
        grads = jax.grad(
            lambda p, x: jnp.sum(jnp.sin(distribution.log_prob(p, x))), argnums=(0, 1)
        )(params, x)
        half = x.astype(jnp.bfloat16)
        halves = (
            distribution.log_prob(params, half),
            distribution.log_prob(params, half.astype(jnp.float32)),
        )
        return distribution.log_prob(params, x), grads, halves

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(
            lambda x: (distribution.init(jax.random.key(0), x), distribution.log_prob(params, x)), x
        )
        jax.eval_shape(lambda key: distribution.sample(params, key, 3), jax.random.key(0))
    log_prob, grads, (half, exact) = run(params, x)
    assert log_prob.shape == half.shape == (8,) and log_prob.dtype == half.dtype == jnp.float32
    np.testing.assert_allclose(half, exact, rtol=1e-5)
    for path, g in jax.tree_util.tree_leaves_with_path(grads[0]):
        reached = (
            np.tril(np.ones((3, 3), bool), -1)
            if jax.tree_util.keystr(path) == "['lower']"
            else True
        )
        assert np.all(np.isfinite(g)) and np.all((g != 0) | ~np.broadcast_to(reached, g.shape)), (
            path
        )


@pytest.mark.parametrize("name", TABLE)
def test_extreme_inputs_give_no_nan(name):
    distribution, params, _ = setup(name)
    values = jnp.array([1e6, -1e6, 1e30, -1e30], jnp.float32)
    event = TABLE[name].event
    x = jnp.broadcast_to(values.reshape(4, *(1 for _ in event)), (4, *event))
    objective = lambda params, x: jnp.sum(distribution.log_prob(params, x))  # noqa: E731
    log_prob, grads = jax.jit(
        lambda p, x: (distribution.log_prob(p, x), jax.grad(objective, (0, 1))(p, x))
    )(params, x)
    assert not np.any(np.isnan(log_prob)) and np.all(log_prob < -50)
    assert not any(np.any(np.isnan(g)) for g in jax.tree.leaves(grads))
    if np.isfinite(TABLE[name].support[0]):
        assert np.all(np.isneginf(log_prob))


@pytest.mark.parametrize("name", TABLE)
def test_log_prob_of_a_missing_number_is_nan_and_of_the_other_rows_what_it_was(name):
    distribution, params, x = setup(name)
    missing = x.at[(2, *[0] * len(TABLE[name].event))].set(jnp.nan)
    expected = np.where(np.arange(8) == 2, np.nan, distribution.log_prob(params, x))
    np.testing.assert_array_equal(distribution.log_prob(params, missing), expected)


@pytest.mark.parametrize("name", TABLE)
def test_init_is_finite_on_one_row_and_on_zeros(name):
    event = TABLE[name].event
    distribution = TABLE[name].make(event)
    for x in (jnp.zeros((1, *event)), jnp.full((5, *event), 12345.678)):
        params = jax.jit(distribution.init)(jax.random.key(0), x)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
        for part, leaf in params.items():
            if (
                "std" in part or "diagonal" in part
            ):  # a coordinate that does not vary gets deviation 1
                np.testing.assert_allclose(leaf, 0, atol=1e-3)


@pytest.mark.parametrize("name", TABLE)
def test_without_jit_a_second_call_compiles_nothing(name):
    distribution, params, x = setup(name)
    key = jax.random.key(0)
    again = compiled_again(
        init=lambda: distribution.init(key, x),
        log_prob=lambda: distribution.log_prob(params, x),
        sample=lambda: distribution.sample(params, key, 3),
    )
    assert not again


@pytest.mark.parametrize("name", TABLE)
def test_keys_are_consumed_once(name):
    distribution, params, x = setup(name)
    calls = lambda a, b, c: (  # noqa: E731
        distribution.init(a, x),
        distribution.log_prob(params, x, key=b),
        distribution.sample(params, c, 3),
    )
    assert not keys_consumed_twice(calls, *KEYS[:3])


@pytest.mark.parametrize("name", TABLE)
def test_a_wrong_shape_is_an_error(name):
    distribution, params, x = setup(name)
    expected = ", ".join(map(str, TABLE[name].event))
    for wrong in (x[:, 0], x[..., :2], x[None]):
        with pytest.raises(ValueError, match=rf"expected x of shape \[b, {expected}\], got"):
            distribution.log_prob(params, wrong)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if len(row.event) > 1])
def test_an_empty_event_shape_is_a_scalar(name):
    distribution, params, x = setup(name, ())
    assert jax.eval_shape(distribution.init, jax.random.key(0), x) == jax.eval_shape(lambda: params)
    assert jax.eval_shape(distribution.log_prob, params, x).shape == (8,)
    assert jax.eval_shape(
        lambda key: distribution.sample(params, key, 3), jax.random.key(0)
    ).shape == (3,)


def test_bad_options_fail_at_construction():
    for make in (
        lambda: distributions.uniform((2,), 1.0, 1.0),
        lambda: distributions.student_t((2,), 0.0),
        lambda: distributions.mixture_of_normals((2,), 0),
        lambda: distributions.mixture_of_normals((2,), 1.5),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_normals_are_scipys(x64):
    x = np.random.default_rng(0).normal(size=(9, 4)) * 3
    np.testing.assert_allclose(
        distributions.normal((4,)).log_prob({}, x), scipy.stats.norm.logpdf(x).sum(1), rtol=1e-12
    )
    mean, std = np.arange(4.0), np.array([0.1, 1, 2, 30])
    got = distributions.diagonal_normal((4,)).log_prob({"mean": mean, "log_std": np.log(std)}, x)
    np.testing.assert_allclose(got, scipy.stats.norm.logpdf(x, mean, std).sum(1), rtol=1e-12)


def test_multivariate_normal_is_scipys_and_starts_at_the_batchs_covariance(x64):
    rng = np.random.default_rng(0)
    normal, cholesky = distributions.multivariate_normal(4), rng.normal(size=(4, 4))
    params = {"mean": rng.normal(size=4), "lower": cholesky, "log_diagonal": rng.normal(size=4)}
    factor = np.tril(cholesky, -1) + np.diag(np.exp(params["log_diagonal"]))
    x = rng.normal(size=(9, 4))
    expected = scipy.stats.multivariate_normal.logpdf(x, params["mean"], factor @ factor.T)
    np.testing.assert_allclose(normal.log_prob(params, x), expected, rtol=1e-9)

    x = (
        rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)) * [1e-3, 1, 1e3] + 7.0
    )  # of unlike scales
    x = np.concatenate([x, x[:, :1] + x[:, 1:2]], axis=1)  # and a column that is the sum of others
    params = normal.init(jax.random.key(0), jnp.asarray(x))
    factor = np.tril(params["lower"], -1) + np.diag(np.exp(params["log_diagonal"]))
    np.testing.assert_allclose(params["mean"], x.mean(0), rtol=1e-12)
    ridge = 1e-4
    np.testing.assert_allclose(
        factor @ factor.T / np.outer(x.std(0), x.std(0)),
        np.corrcoef(x.T) + ridge * np.eye(4),
        atol=1e-9,
    )


def test_diagonal_normal_starts_at_the_batch():
    x = jnp.asarray(3 + 5 * np.random.default_rng(0).normal(size=(100, 4)), jnp.float32)
    for unit in (
        1,
        1e-37,
        1e-30,
        1e30,
        5e36,
    ):  # squares and sums of what float32 holds may overflow or vanish in it
        rows = np.asarray(x * np.float32(unit), np.float64)
        params = distributions.diagonal_normal((4,)).init(
            jax.random.key(0), jnp.asarray(rows, jnp.float32)
        )
        np.testing.assert_allclose(params["mean"], rows.mean(0), rtol=1e-5)
        np.testing.assert_allclose(params["log_std"], np.log(rows.std(0)), rtol=1e-5)


def test_mixture_is_the_weighted_sum_of_scipys(x64):
    rng = np.random.default_rng(1)
    params = {
        "logits": rng.normal(size=3),
        "means": rng.normal(size=(3, 2)),
        "log_stds": rng.normal(size=(3, 2)),
    }
    x = rng.normal(size=(9, 2))
    parts = scipy.stats.norm.pdf(x[:, None], params["means"], np.exp(params["log_stds"])).prod(-1)
    weights = np.exp(params["logits"]) / np.exp(params["logits"]).sum()
    got = distributions.mixture_of_normals((2,), 3).log_prob(params, x)
    np.testing.assert_allclose(got, np.log(parts @ weights), rtol=1e-12)


@pytest.mark.parametrize("df", [0.3, 1.0, 5.0, 1e3, 1e6])
def test_student_t_is_scipys_in_both_precisions(df):
    """Large df is where lgamma cancels and x^2/df drowns in 1: float32 holds 1e-5 of scipy's
    float64 up to df = 1e6."""
    x = np.array([0.0, 1e-3, 0.3, 0.999, 1.001, 3.0, 30.0, 1e6, -1e9])
    expected = scipy.stats.t.logpdf(x, df)
    log_prob = distributions.student_t((1,)).log_prob
    single = log_prob(
        {"log_df": jnp.log(jnp.full(1, df, jnp.float32))}, jnp.asarray(x[:, None], jnp.float32)
    )
    np.testing.assert_allclose(single, expected, rtol=1e-5 if df < 1e4 else 1e-3, atol=1e-5)
    with jax.enable_x64(True):
        double = log_prob({"log_df": np.log([df])}, x[:, None])
        np.testing.assert_allclose(double, expected, rtol=1e-9, atol=1e-9)


def test_uniform_is_flat_inside_and_nothing_outside():
    uniform = distributions.uniform((2,), -1.0, 3.0)
    x = jnp.array(
        [[-1.0, 3.0], [0.0, 0.0], [0.0, 3.001], [-jnp.inf, 0.0], [jnp.nan, 0.0], [jnp.nan, 9.0]]
    )
    expected = [-2 * np.log(4)] * 2 + [-np.inf] * 2 + [np.nan] * 2
    np.testing.assert_allclose(uniform.log_prob({}, x), expected, rtol=1e-6)
    np.testing.assert_allclose(
        uniform.log_prob({}, jnp.ones((1, 2), int)), [-2 * np.log(4)], rtol=1e-6
    )
