"""Path gradients: the mean of the plain gradient, none of its noise at the solution, few
operations; and the fit by reweighted draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jflow import bijectors, distributions, energy, flows, losses, nets

KEY, EVENT, DRAWS = jax.random.key(0), (4,), 32
BASE = distributions.normal(EVENT)
TARGET = energy.many_well(4)


def stack(depth, hidden, univariate):
    layers = []
    for order in flows.alternating_permutations(4, depth):
        layers += [
            bijectors.permute(order),
            bijectors.coupling(univariate, nets.MLP((hidden,) * 2), split=2),
        ]
    return bijectors.chain(*layers)


def random(params, scale=0.2):
    flat, back = ravel_pytree(params)
    noise = np.random.default_rng(0).normal(size=flat.shape).astype(np.float32)
    return back(flat + scale * noise)


def vector(loss):
    """(params, key) -> its gradient, under a copy of the key: losses are compared draw by draw."""

    def gradient(params, key):
        return jax.grad(loss, has_aux=True)(params, jax.random.clone(key), {})[0]

    return lambda params, key: ravel_pytree(gradient(params, key))[0]


def test_its_mean_is_the_plain_gradient_and_both_forms_are_one():
    """512 draws of each: the means agree within 4.5 of their standard errors at each of the
    params; the walk over the layers gives the gradient of the plain form, in float32, and its
    metrics are those of the same draws."""
    bijector = stack(2, 4, bijectors.univariate.affine())
    flow = flows.flow(bijector, BASE)
    params = random(flow.init(KEY, jnp.zeros((2, 4))))
    makers = losses.reverse_kl, losses.path_gradient
    plain, path = (make(flow, TARGET.log_density, draws=DRAWS) for make in makers)
    fast = losses.fast_path_gradient(bijector, BASE, TARGET.log_density, draws=DRAWS)

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 512)
        first = jax.random.clone(keys)[0]
        copies = jax.random.clone(keys), jax.random.clone(keys)
        found = [
            jax.lax.map(lambda k, f=f: vector(f)(params, k), copy)
            for f, copy in zip((plain, path), copies, strict=True)
        ]
        same = [vector(f)(params, first) for f in (path, fast)]
        return found, same, [f(params, jax.random.clone(first), {}) for f in (path, fast)]

    (a, b), (one, other), values = jax.device_get(run(KEY))
    error = np.sqrt((a.var(0) + b.var(0)) / 512)
    assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4.5 * error + 1e-6)
    scale = np.abs(one).max()
    np.testing.assert_allclose(one, other, atol=1e-5 * scale)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), *values)


def test_at_the_solution_nothing_is_left(x64):
    """The target is the flow itself: both gradients are 0 but for rounding, in float64 1e-12 of
    the plain one, draw by draw."""
    bijector = stack(1, 4, bijectors.univariate.affine())
    flow = flows.flow(bijector, BASE)
    params = jax.tree.map(
        lambda p: p.astype(jnp.float64), random(flow.init(KEY, jnp.zeros((2, 4))))
    )
    density = lambda x: flow.log_prob(params, x)  # noqa: E731
    fits = (
        losses.reverse_kl(flow, density, draws=1),
        losses.path_gradient(flow, density, draws=1),
        losses.fast_path_gradient(bijector, BASE, density, draws=1),
    )
    run = jax.jit(lambda key: [jnp.linalg.norm(vector(fit)(params, key)) for fit in fits])
    plain, path, fast = jax.device_get(run(KEY))
    assert plain > 0.1 and path < 1e-11 * plain and fast < 1e-11 * plain


def test_near_the_solution_its_variance_is_lower():
    """Params 0.002 away from those of the target: a tenth of the trace of the covariance of the
    plain gradient and less, over 128 gradients."""
    flow = flows.flow(stack(2, 4, bijectors.univariate.affine()), BASE)
    params = random(flow.init(KEY, jnp.zeros((2, 4))))
    density = lambda x: flow.log_prob(params, x)  # noqa: E731
    near = random(params, 0.002)
    makers = losses.reverse_kl, losses.path_gradient

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 128)
        return [
            jax.lax.map(lambda k, m=m: vector(m(flow, density, draws=DRAWS))(near, k), keys)
            for m in makers
        ]

    plain, path = (gradients.var(0).sum() for gradients in jax.device_get(run(KEY)))
    assert path < 0.1 * plain


def test_it_takes_less_than_twice_the_operations():
    """Counted by XLA on an unscanned stack of couplings with nets of 64, in which the nets are
    nearly all: 5/3 of the plain gradient, 4/3 for the walk over the layers."""
    bijector = stack(3, 64, bijectors.univariate.affine(scale=bijectors.scales.exponential))
    flow = flows.flow(bijector, BASE)
    params = jax.eval_shape(flow.init, KEY, jnp.zeros((2, 4)))
    options = {"draws": 64}
    fits = (
        losses.reverse_kl(flow, TARGET.log_density, **options),
        losses.path_gradient(flow, TARGET.log_density, **options),
        losses.fast_path_gradient(bijector, BASE, TARGET.log_density, **options),
    )
    plain, path, fast = (
        jax.jit(vector(fit)).lower(params, KEY).compile().cost_analysis()["flops"] for fit in fits
    )
    assert path < 1.75 * plain and fast < 1.45 * plain, (path / plain, fast / plain)


def test_reweighted_draws_have_the_gradient_of_the_forward_divergence():
    """N(0, 1) fitted by N(m, s): d/dm and d/dlog s of E_p [-log q] in closed form, within the
    spread of 50,000 weighted draws; the share of draws that count is s exp(-m^2 / (2 s^2 - 1)) /
    ... in closed form for s = 1, exp(-m^2)."""
    mean, log_scale = 0.5, 0.3
    flow = flows.flow(bijectors.affine((1,)), distributions.normal((1,)))
    base = distributions.normal((1,))
    loss = losses.forward_kl(flow, lambda x: 2.0 + base.log_prob({}, x), draws=50_000)

    def at(log_scale):
        leaf = {"shift": jnp.array([mean]), "log_scale": jnp.array([log_scale])}
        return {"bijector": leaf, "base": {}}

    @jax.jit
    def run(key):
        slope = jax.grad(loss, has_aux=True)(at(log_scale), jax.random.clone(key), {})[0]
        return slope["bijector"], loss(at(0.0), key, {})

    slope, (value, metrics) = jax.device_get(run(KEY))
    variance = np.exp(2 * log_scale)
    np.testing.assert_allclose(slope["shift"], mean / variance, atol=0.03)
    np.testing.assert_allclose(slope["log_scale"], 1 - (1 + mean**2) / variance, atol=0.03)
    np.testing.assert_allclose(metrics["effective_sample_size"], np.exp(-(mean**2)), atol=0.03)
    np.testing.assert_allclose(metrics["log_z"], 2.0, atol=0.02)
    np.testing.assert_allclose(
        value, 0.5 * (np.log(2 * np.pi) + 1 + mean**2), atol=0.03
    )  # the cross-entropy of N(0, 1) and N(m, 1)


FLOW = flows.flow(bijectors.affine((1,)), distributions.normal((1,)))
P = {"bijector": {"shift": jnp.zeros(1), "log_scale": jnp.zeros(1)}, "base": {}}


@pytest.mark.parametrize("name", ["path_gradient", "forward_kl", "fast_path_gradient"])
def test_bad_input_is_an_error(name):
    def make(log_density, **options):
        if name == "fast_path_gradient":
            normal = distributions.normal((1,))
            return losses.fast_path_gradient(bijectors.affine((1,)), normal, log_density, **options)
        return getattr(losses, name)(FLOW, log_density, **options)

    good = make(lambda x: x[:, 0], draws=2)
    with pytest.raises(ValueError, match=f"{name}: expected draws to be a whole number"):
        make(lambda x: x[:, 0], draws=0)
    with pytest.raises(ValueError, match="needs a key"):
        good(P, None, {})
    with pytest.raises(ValueError, match=rf"{name}: unknown keys in batch: \['x'\]"):
        good(P, KEY, {"x": jnp.zeros((2, 1))})
    with pytest.raises(ValueError, match=r"log_density of shape \[2\], got \[2, 1\]"):
        make(lambda x: x, draws=2)(P, KEY, {})
    with pytest.raises(TypeError, match=f"{name}: expected a (Flow|Bijector)"):
        getattr(losses, name)(lambda x: x, lambda x: x, *[lambda x: x] * (name[:4] == "fast"))


def test_a_base_with_params_is_refused():
    base = distributions.diagonal_normal((1,))
    loss = losses.fast_path_gradient(bijectors.affine((1,)), base, lambda x: x[:, 0])
    with pytest.raises(ValueError, match=r"a base without params, got \['log_std', 'mean'\]"):
        loss({**P, "base": {"mean": jnp.zeros(1), "log_std": jnp.zeros(1)}}, KEY, {})


def test_the_fast_form_knows_the_map_that_drew_its_masks():
    """With dropout in the coupling: the slope of log q is that of the very map that made x."""
    map_ = bijectors.coupling(bijectors.univariate.affine(), nets.MLP((8,), dropout=0.5), split=1)
    base = distributions.normal((2,))
    params = {"bijector": map_.init(jax.random.key(0), jnp.zeros((1, 2))), "base": {}}
    params = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    loss = losses.fast_path_gradient(map_, base, lambda x: -jnp.sum(jnp.cosh(x), -1), draws=16)
    key = jax.random.key(2)
    found = jax.grad(lambda p: loss(p, key, {})[0])(params)["bijector"]

    key_base, key_map = jax.random.split(key)
    chain = bijectors.chain(map_)
    z = base.sample({}, key_base, 16)

    def forward(own):
        return chain.forward({"0": own}, z, key=jax.random.clone(key_map))

    def by_hand(own, stopped):
        x, _ = forward(own)

        def log_q(x):
            back, log_det = chain.inverse({"0": stopped}, x, key=jax.random.clone(key_map))
            return base.log_prob({}, back) + log_det

        return jnp.mean(log_q(x) + jnp.sum(jnp.cosh(x), -1))

    expected = jax.grad(by_hand)(params["bijector"], params["bijector"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected
    )
