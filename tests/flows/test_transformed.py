"""Flows behind a map onto a support, heavy tails, and what a recipe standardizes."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from jax.random import clone

import jflow
from jflow import bijectors, data, distributions, flows, losses, nets, train
from jflow.bijectors import supports
from jflow.types import ElboFlow, Flow

ONTO = supports.columns(supports.positive(), None, supports.interval(0, 1))


def bounded(n, seed=0):
    """Incomes around 30,000, temperatures, and shares."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 3))
    x = np.stack([3e4 * np.exp(z[:, 0]), 20 + 5 * z[:, 1], 1 / (1 + np.exp(-z[:, 2]))], axis=1)
    return jnp.asarray(x, jnp.float32)


def test_a_recipe_standardizes_the_unbounded_numbers():
    """After `init` its layers are the identity, and what they see has mean 0 and deviation 1."""
    flow = flows.transformed(flows.neural_spline((3,), depth=2, hidden=(4,), bins=3), ONTO)
    assert isinstance(flow, Flow)
    x = bounded(500)

    @jax.jit
    def run(key, x):
        params = flow.init(key, x)
        z, log_det = flow.inverse(params, x)
        again, back = flow.forward(params, z)
        drawn, log_prob = flow.sample_and_log_prob(params, clone(key), 64)
        return params, z, log_det, again, back, drawn, log_prob, flow.log_prob(params, drawn)

    params, z, log_det, again, back, drawn, log_prob, expected = run(jax.random.key(0), x)
    np.testing.assert_allclose(np.mean(z, axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.std(z, axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(again, x, rtol=1e-3)
    np.testing.assert_allclose(back, -log_det, atol=1e-3)
    np.testing.assert_allclose(log_prob, expected, atol=1e-2)
    assert np.all(drawn[:, 0] > 0) and np.all((drawn[:, 2] > 0) & (drawn[:, 2] < 1))
    y, slope = ONTO.inverse({"0": {}, "1": {}}, x)
    inner = flows.neural_spline((3,), depth=2, hidden=(4,), bins=3)
    np.testing.assert_allclose(
        flow.log_prob(params, x), inner.log_prob(params["base"], y) + slope, rtol=1e-5
    )
    outside = flow.log_prob(params, x.at[0, 2].set(1.0).at[1, 0].set(-3.0))
    assert np.isneginf(outside[:2]).all() and np.all(np.isfinite(outside[2:]))
    with pytest.raises(ValueError, match=r"interval\(0, 1\).*1 of 500.*in row 7"):
        flow.init(jax.random.key(0), x.at[7, 2].set(1.0))


IMAGE = (4, 4, 1)
MODELS = {
    "coupling": (lambda: flows.nanoflow((3,), depth=2, hidden=(4,)), (3,)),
    "autoregressive": (lambda: flows.maf((3,), depth=2, hidden=(4,)), (3,)),
    "residual": (lambda: flows.residual_flow((3,), depth=1, hidden=(4,)), (3,)),
    "cnf": (
        lambda: flows.cnf(jflow.velocity(nets.TimeMLP((4,))), distributions.normal((3,)), method=2),
        (3,),
    ),
    "glow": (lambda: flows.glow(IMAGE, scales=1, depth=1, hidden=2), IMAGE),
    "tarflow": (
        lambda: flows.tarflow(IMAGE, patch_size=2, width=8, depth=2, num_layers=1, num_heads=1),
        IMAGE,
    ),
    "a flow of a flow": (
        lambda: flows.transformed(flows.real_nvp((3,), depth=2, hidden=(4,)), ONTO),
        (3,),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_flow_composes(name):
    """Their functions have the shapes of a flow's; nothing is computed."""
    make, event = MODELS[name]
    flow = flows.transformed(make(), supports.interval(0, 255))
    key, x = jax.random.key(0), jnp.full((2, *event), 100.0)
    params = jax.eval_shape(flow.init, key, x)
    assert set(params) == {"bijector", "base"}
    assert jax.eval_shape(flow.log_prob, params, x).shape == (2,)
    assert jax.eval_shape(lambda p, k: flow.sample(p, k, 5), params, key).shape == (5, *event)
    pair = jax.eval_shape(lambda p, k: flow.sample_and_log_prob(p, k, 5), params, key)
    assert [a.shape for a in pair] == [(5, *event), (5,)]
    for direction in (flow.forward, flow.inverse):
        assert [a.shape for a in jax.eval_shape(direction, params, x)] == [(2, *event), (2,)]


def test_a_bound_stays_a_bound():
    """An `ElboFlow` behind a bijector, and a flow behind a map that draws."""
    inner = flows.elbo_flow(bijectors.uniform_dequantization(4), distributions.uniform((2,)))
    shifted = flows.transformed(inner, bijectors.reverse())
    counts = flows.transformed(
        flows.real_nvp((2,), depth=2, hidden=(4,)), supports.columns(supports.integers(0), None)
    )
    assert isinstance(shifted, ElboFlow) and isinstance(counts, ElboFlow)
    x, key = jnp.asarray([[0.0, 3.0], [2.0, 1.0], [5.0, 1.5]]), jax.random.key(0)
    params = shifted.init(key, x[:2])
    elbo = shifted.elbo(params, x[:2], key=clone(key))
    np.testing.assert_allclose(elbo, -2 * np.log(4), rtol=1e-6)
    z, _ = shifted.inverse(params, x[:2], key=clone(key))
    np.testing.assert_array_equal(shifted.forward(params, z)[0], x[:2])
    params = counts.init(key, x)
    sample = counts.sample(params, clone(key), 50)
    assert np.all(sample[:, 0] == np.round(sample[:, 0])) and np.all(sample[:, 0] >= 0)
    assert np.any(sample[:, 1] != np.round(sample[:, 1]))
    z, _ = counts.inverse(params, x, key=clone(key))
    np.testing.assert_allclose(counts.forward(params, z)[0], x, atol=1e-4)


def test_noise_can_be_a_flow_on_the_unit_cube():
    """Itself made by `transformed`, and conditioned on x; in shapes alone."""
    noise = flows.transformed(flows.real_nvp((2,), depth=2, hidden=(4,)), supports.interval(0, 1))
    flow = flows.transformed(
        flows.real_nvp((2,), depth=2, hidden=(4,)), supports.integers(0, noise=noise)
    )
    key, x = jax.random.key(0), jnp.asarray([[0.0, 3.0], [2.0, 1.0]])
    params = jax.eval_shape(flow.init, key, x)
    assert set(params["bijector"]["1"]) == {"bijector", "base"}
    assert jax.eval_shape(lambda p, k: flow.elbo(p, x, key=k), params, key).shape == (2,)


def test_a_flow_onto_the_simplex_has_one_number_less_inside():
    flow = flows.transformed(flows.real_nvp((2,), depth=2, hidden=(4,)), supports.simplex(3))
    x = jnp.asarray(np.random.default_rng(0).dirichlet([2.0, 3.0, 4.0], size=50), jnp.float32)
    params = flow.init(jax.random.key(0), x)
    sample = flow.sample(params, jax.random.key(1), 20)
    assert sample.shape == (20, 3) and np.all(sample > 0)
    np.testing.assert_allclose(np.sum(sample, axis=1), 1, atol=1e-6)


def test_a_condition_reaches_the_flow_inside():
    flow = flows.transformed(
        flows.real_nvp((2,), depth=2, hidden=(4,), embed=nn.Embed(3, 4)), supports.positive()
    )
    x, labels = jnp.ones((3, 2)), jnp.arange(3)
    params = flow.init(jax.random.key(0), x, labels)
    params = jax.tree.map(lambda p: p + 0.1, params)
    assert len(set(np.asarray(flow.log_prob(params, x, labels)).tolist())) == 3


def test_what_is_no_flow_is_refused():
    with pytest.raises(TypeError, match="transformed: expected a Flow or an ElboFlow, got a Distr"):
        flows.transformed(distributions.normal((2,)), supports.positive())
    with pytest.raises(TypeError, match="give what a call of it returns"):
        flows.transformed(flows.maf((2,)), supports.positive)
    with pytest.raises(TypeError, match="expected a Bijector or a Transport, got a list"):
        flows.transformed(flows.maf((2,)), [supports.positive(), None])


def test_heavy_tails_want_a_robust_scale_and_a_base_with_tails():
    """A Cauchy, a Student-t(2) and a lognormal column, 4000 rows: held-out nats within 0.1 of the
    truth, and the quantiles of samples at 0.1% and 99.9% within a factor of 2 of it; a normal base
    is more than half a nat away. The log-density of the Student-t column, given the others at their
    medians, is within 0.3 nats of the truth from its median out to where 1 row in 2000 lies.

    And 1000 rows of two normal columns and a lognormal one, of which one row has 1e4 in the first
    column: held-out nats of the others stay within 0.1 of the truth, where the recipe alone is
    more than a nat away.
    """
    heavy = scipy.stats.cauchy(10, 3), scipy.stats.t(2, 0, 0.1), scipy.stats.lognorm(1)
    light = scipy.stats.norm(0, 1), scipy.stats.norm(5, 0.1), scipy.stats.lognorm(1)
    rng = np.random.default_rng(0)

    def rows(laws, n):
        columns = [law.rvs(n, random_state=rng) for law in laws]
        return np.stack(columns, axis=1).astype(np.float32)

    def log_density(laws, x):
        return sum(law.logpdf(column) for law, column in zip(laws, x.T, strict=True))

    tables = {"tails": (heavy, rows(heavy, 4000)), "outlier": (light, rows(light, 1000))}
    tables["outlier"][1][0, 0] = 1e4
    held_out = {name: rows(laws, 4000) for name, (laws, _) in tables.items()}
    onto, steps, gaps = supports.columns(None, None, supports.positive()), 600, {}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    )
    small, trained = {"depth": 3, "hidden": (16,)}, {}
    for name, recipe in {
        "normal": flows.real_nvp((3,), **small),
        "robust": flows.heavy_tailed(flows.real_nvp, (3,), **small),
    }.items():
        flow = flows.transformed(recipe, onto)
        step, log_prob = (
            jax.jit(train.make_step(losses.nll(flow), optimizer)),
            jax.jit(flow.log_prob),
        )
        for of, (laws, x) in tables.items():
            params = flow.init(jax.random.key(0), jnp.asarray(x[:1000]))
            state = train.init_state(params, optimizer, jax.random.key(1))
            for _, batch in zip(range(steps), data.batches({"x": x}, 256), strict=False):
                state, _ = step(state, batch)
            truth = log_density(laws, held_out[of])
            gaps[name, of] = np.mean(truth - log_prob(state.params, held_out[of]))
            trained[of] = state.params
    assert gaps["normal", "tails"] > 0.5 and gaps["robust", "tails"] < 0.1, gaps
    assert gaps["normal", "outlier"] > 1 and gaps["robust", "outlier"] < 0.1, gaps
    line = np.tile([10.0, 0.0, 1.0], (4000, 1)).astype(np.float32)
    line[:, 1] = heavy[1].ppf(np.linspace(2.5e-4, 1 - 2.5e-4, 4000))
    apart = log_prob(trained["tails"], line) - log_density(heavy, line)
    assert np.abs(apart).max() < 0.3, np.abs(apart).max()
    sample = flow.sample(trained["tails"], jax.random.key(2), 40_000)
    for law, column in zip(heavy[:2], sample.T, strict=False):
        ends = [0.001, 0.999]
        ratio = np.quantile(column, ends) / law.ppf(ends)
        assert np.all((ratio > 0.5) & (ratio < 2)), ratio


def test_what_heavy_tailed_sets_is_not_given_and_no_flow_is_a_recipe():
    with pytest.raises(TypeError, match="takes base= and standardize=, such as.*got any_order"):
        flows.heavy_tailed(flows.any_order, (2,))
    with pytest.raises(TypeError, match="expected a recipe.*got Flow"):
        flows.heavy_tailed(flows.maf((2,)), (2,))
    with pytest.raises(TypeError, match="standardize are what it sets"):
        flows.heavy_tailed(flows.maf, (2,), standardize=False)
    with pytest.raises(ValueError, match="expected df > 0"):
        flows.heavy_tailed(flows.maf, (2,), df=0.0)


SMALL = {
    "glow": {"scales": 1, "depth": 1, "hidden": 2},
    "tarflow": {"patch_size": 2, "width": 8, "depth": 1, "num_layers": 1, "num_heads": 1},
    "jet": {"patch_size": 2, "width": 8, "depth": 2, "num_layers": 1, "num_heads": 1},
    "starflow": {"patch_size": 2, "width": 8, "num_layers": 1, "num_heads": 1},
    "bnaf": {"hidden": 2},
    "kernelized": {"depth": 1, "points": 2},
    "inverse_flow": {"scales": 1, "depth": 1, "hidden": 2},
}


def recipes():
    """The recipes that standardize and take a base, which jetformer makes of a prior;
    `inverse_flow` passes its options on to `glow`."""
    for name in sorted(set(flows.__all__) - {"jetformer"}):
        arguments = inspect.signature(getattr(flows, name)).parameters
        if "standardize" in arguments or name == "inverse_flow":
            yield name


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_takes_a_base_with_tails_and_a_robust_scale(name):
    """In shapes alone; one degree of freedom for each number."""
    event = IMAGE if name in SMALL and name not in ("bnaf", "kernelized") else (2,)
    flow = getattr(flows, name)(
        event,
        base=distributions.student_t(event),
        standardize=bijectors.robust_standardize(event),
        **SMALL.get(name, {"depth": 1}),
    )
    params = jax.eval_shape(flow.init, jax.random.key(0), jnp.ones((2, *event)))
    assert params["base"]["log_df"].shape == event


def test_a_robust_scale_does_not_look_at_outliers():
    """Of 200 standard normal numbers and one of 1e8, in units of 100 about 5000."""
    x = np.random.default_rng(0).normal(size=(201, 2))
    x[0] = 1e6
    x[:, 1] = 1.0  # all alike
    x[1, 1] = 3.0
    x = jnp.asarray(5000 + 100 * x, jnp.float32)
    robust = bijectors.robust_standardize((2,))
    z = np.asarray(robust.inverse(robust.init(jax.random.key(0), x), x)[0])
    assert abs(np.median(z[:, 0])) < 1e-3
    assert np.subtract(*np.quantile(z[:, 0], [0.75, 0.25])) == pytest.approx(1.349, rel=1e-2)
    assert np.std(z[:, 1]) == pytest.approx(1, rel=1e-3)  # the quartiles say nothing
    from_source = robust.init(jax.random.key(0), x, side="source")
    np.testing.assert_allclose(robust.forward(from_source, x)[0], z, atol=1e-2, rtol=1e-3)
