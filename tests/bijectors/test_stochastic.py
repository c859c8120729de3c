"""A variational autoencoder as a layer: its bound where the evidence is known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jflow import bijectors as bj
from jflow import distributions, flows, losses
from jflow.distributions import decoders
from jflow.types import Transport

# x = W z + s e with orthogonal columns of W, so that the posterior of z ~ N(0, I) is a diagonal
# Gaussian
W, S = np.array([[1.0, 2.0], [2.0, 1.0], [-2.0, 2.0]]), 0.7
VARIANCE = 1 / (1 + np.sum(W**2, 0) / S**2)


def model():
    posterior = flows.flow(bj.amortized(bj.affine((2,))), distributions.normal((2,)))
    layer = bj.vae(posterior, decoders.normal(nn.Dense(3)), (2,), (3,))
    params = {
        "posterior": {
            "bijector": {
                "net": {},
                "bias": {"shift": np.zeros(2), "log_scale": np.log(VARIANCE) / 2},
                "kernel": {"shift": W * VARIANCE / S**2, "log_scale": np.zeros((3, 2))},
            },
            "base": {},
        },
        "decoder": {"net": {"kernel": W.T, "bias": np.zeros(3)}, "log_std": np.full(3, np.log(S))},
    }
    return layer, jax.tree.map(jnp.asarray, params)


def test_with_the_exact_posterior_the_bound_is_the_evidence_for_every_key(x64):
    layer, params = model()
    flow = flows.elbo_flow(layer, distributions.normal((2,)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    evidence = scipy.stats.multivariate_normal(np.zeros(3), W @ W.T + S**2 * np.eye(3)).logpdf(x)
    assert jax.tree.map(jnp.shape, flow.init(jax.random.key(0), x)["bijector"]) == jax.tree.map(
        jnp.shape, params
    )
    for seed in range(3):
        elbo = flow.elbo({"bijector": params, "base": {}}, x, key=jax.random.key(seed))
        np.testing.assert_allclose(elbo, evidence, atol=1e-12)


def test_a_poor_posterior_has_a_lower_bound_and_more_draws_a_higher_one(x64):
    """With mean 0 and the prior's spread the bound is E_N(0,I) log p(x | z) - in closed form - and
    IWAE is between."""
    layer, params = model()
    params["posterior"]["bijector"] = jax.tree.map(jnp.zeros_like, params["posterior"]["bijector"])
    flow = flows.elbo_flow(layer, distributions.normal((2,)))
    x = jnp.ones((1, 3))
    evidence = scipy.stats.multivariate_normal(np.zeros(3), W @ W.T + S**2 * np.eye(3)).logpdf(
        np.ones(3)
    )
    closed = -(3 + np.sum(W**2)) / (2 * S**2) - 3 * np.log(S) - 1.5 * np.log(2 * np.pi)

    def mean(flow, draws):
        keys = jax.random.split(jax.random.key(0), draws)
        values = jax.jit(
            jax.vmap(lambda key: flow.elbo({"bijector": params, "base": {}}, x, key=key)[0])
        )(keys)
        return np.mean(values), np.std(values) / draws**0.5

    one, error = mean(flow, 4000)
    assert abs(one - closed) < 4 * error
    many, many_error = mean(flows.importance_weighted(flow, 50), 400)
    assert one + 5 * error < many < evidence + 4 * many_error


def test_the_contribution_of_forward_is_minus_that_of_the_inverse(x64):
    layer, params = model()
    assert isinstance(layer, Transport)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    x, contribution = layer.forward(params, z, key=jax.random.key(0))
    assert x.shape == (4, 3)
    joint = scipy.stats.norm.logpdf(x, z @ W.T, S).sum(1)
    mean = np.asarray(x) @ (W * VARIANCE / S**2)
    np.testing.assert_allclose(
        contribution, scipy.stats.norm.logpdf(z, mean, VARIANCE**0.5).sum(1) - joint, atol=1e-10
    )
    # the evidence, once more: prior minus contribution
    log_p = distributions.normal((2,)).log_prob({}, z) - contribution
    evidence = scipy.stats.multivariate_normal(np.zeros(3), W @ W.T + S**2 * np.eye(3)).logpdf(x)
    np.testing.assert_allclose(log_p, evidence, atol=1e-10)


def test_init_from_both_sides_and_a_condition_of_the_model():
    posterior = flows.sylvester((2,), depth=1, hidden=(4,))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, z):
            return nn.Dense(6)(jnp.concatenate([z["z"], z["cond"]], -1)).reshape(-1, 2, 3)

    layer = bj.vae(posterior, decoders.bernoulli(Net()), (2,), (2, 3))
    x, cond = jnp.ones((4, 2, 3)), jnp.ones((4, 1))
    first = jax.jit(layer.init)(jax.random.key(0), x, cond)
    second = jax.eval_shape(
        lambda: layer.init(jax.random.key(0), jnp.ones((4, 2)), cond, side="source")
    )
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, second)
    flow = flows.elbo_flow(layer, distributions.normal((2,)))
    loss = losses.negative_elbo(flow)
    params = {"bijector": first, "base": {}}
    grads = jax.jit(jax.grad(lambda p: loss(p, jax.random.key(1), {"x": x, "cond": cond})[0]))(
        params
    )
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    sample = jax.jit(lambda p: flow.sample(p, jax.random.key(0), 4, cond))(params)
    assert sample.shape == (4, 2, 3) and set(np.unique(sample)) <= {0.0, 1.0}


def test_bad_input_is_an_error():
    with pytest.raises(TypeError, match="expected a Flow as posterior, got Distribution"):
        bj.vae(distributions.normal((2,)), decoders.normal(nn.Dense(3)), (2,), (3,))
    layer, params = model()
    for call in (layer.forward, layer.inverse):
        with pytest.raises(ValueError, match="needs a key"):
            call(params, jnp.ones((2, 3)))
        with pytest.raises(ValueError, match="expected x of shape"):
            call(params, jnp.ones((2, 4)), key=jax.random.key(0))


def test_the_noise_of_the_decoder_is_not_that_of_the_base():
    """x = z + e, e standard normal: Var x = Var z + 1 whatever the base, within 4 standard errors
    of 20,000 draws."""
    bases = {  # with params and variance
        "diagonal_normal": (
            distributions.diagonal_normal((1,)),
            {"mean": [1.0], "log_std": [0.5]},
            np.e,
        ),
        "mixture_of_normals": (
            distributions.mixture_of_normals((1,), 2),
            {"logits": [0.0, 0.0], "means": [[-0.5], [0.5]], "log_stds": [[0.0], [0.0]]},
            1.25,
        ),
        "multivariate_normal": (
            distributions.multivariate_normal(1),
            {"mean": [0.0], "lower": [[0.0]], "log_diagonal": [0.5]},
            np.e,
        ),
        "normal": (distributions.normal((1,)), {}, 1.0),
        "scaled": (distributions.scaled(distributions.normal((1,)), 2.0), {}, 4.0),
        "student_t": (distributions.student_t((1,)), {"log_df": [np.log(9.0)]}, 9 / 7),
        "uniform": (distributions.uniform((1,), -3.0, 3.0), {}, 3.0),
    }
    # no laws of one row of numbers without a condition: tests/distributions
    others = {"decoders", "mixtures", "around_previous", "categorical", "causal", "contrasted"}
    others |= {"uniform_on", "von_mises_mixture", "wrapped_normal"}  # of points of manifolds
    others |= {"conditional_mixture", "continuation", "split", "token_log_probs", "tokens"}
    assert set(bases) | others == set(distributions.__all__)
    posterior = flows.flow(bj.amortized(bj.affine((1,))), distributions.normal((1,)))
    layer = bj.vae(posterior, decoders.normal(nn.Dense(1)), (1,), (1,))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 1)))
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), shapes)
    params["decoder"]["net"]["kernel"] = jnp.ones((1, 1))

    @jax.jit
    def samples(keys):
        return {
            name: flows.elbo_flow(layer, base).sample(
                {"bijector": params, "base": {k: jnp.array(v) for k, v in own.items()}},
                own_key,
                20_000,
            )
            for own_key, (name, (base, own, _)) in zip(keys, bases.items(), strict=True)
        }

    for name, x in samples(jax.random.split(jax.random.key(1), len(bases))).items():
        square = np.square(np.asarray(x, np.float64) - np.mean(x))
        assert abs(square.mean() - bases[name][2] - 1) < 4 * square.std() / len(x) ** 0.5, name
