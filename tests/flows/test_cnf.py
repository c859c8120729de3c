from functools import partial

import chex
import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import distributions, losses, solvers, types
from jflow.flows import cnf
from jflow.nets._fields import velocity


class Net(nn.Module):
    """A small velocity with weights wide enough to bend space."""

    @nn.compact
    def __call__(self, x, t, cond=None):
        h = jnp.concatenate([x, t[:, None]] + ([] if cond is None else [cond]), axis=1)
        h = jnp.tanh(nn.Dense(16, kernel_init=nn.initializers.normal(1.0))(h))
        return nn.Dense(x.shape[1], kernel_init=nn.initializers.normal(0.4))(h)


def gaussian_velocity():
    """Velocity of the linear path to N(mean, exp(log_std)^2), its two numbers the parameters."""

    def apply(params, x, t, cond=None, *, key=None):
        t, variance = t[:, None], jnp.exp(2 * params["log_std"])[None]
        spread = (1 - t) ** 2 + t**2 * variance
        return params["mean"][None] + (t * variance - (1 - t)) / spread * (
            x - t * params["mean"][None]
        )

    def init(key, x, t, cond=None):
        return {
            "mean": jnp.asarray([1.5, -0.5], x.dtype),
            "log_std": jnp.log(jnp.asarray([0.4, 2.0], x.dtype)),
        }

    return types.Velocity(init, apply)


def normal_log_prob(params, x):
    z = (x - params["mean"][None]) * jnp.exp(-params["log_std"])[None]
    return jnp.sum(-0.5 * z**2 - params["log_std"][None] - 0.5 * jnp.log(2 * jnp.pi), axis=1)


def net_flow(size, **how):
    flow = cnf(velocity(Net()), distributions.normal((size,)), **how)
    x = jax.random.normal(jax.random.key(0), (6, size))
    return flow, flow.init(jax.random.key(1), x), x


@pytest.mark.parametrize(
    "how",
    [{}, {"method": solvers.on_grid(np.linspace(0, 1, 17) ** 2)}],
    ids=["default", "grid"],
)
def test_forward_and_inverse_cancel(how):
    flow, params, x = net_flow(3, **how)

    @jax.jit
    def run(params, x):
        z, down = flow.inverse(params, x)
        return down, *flow.forward(params, z)

    down, y, up = run(params, x)
    np.testing.assert_allclose(y, x, atol=2e-4)
    np.testing.assert_allclose(up + down, 0, atol=2e-4)
    assert np.any(np.abs(up) > 0.1)


def test_log_det_is_that_of_the_jacobian():
    flow, params, z = net_flow(3, method=16)

    @jax.jit
    @jax.vmap
    @partial(jax.jacrev, has_aux=True)
    def run(z):
        x, log_det = flow.forward(params, z[None])
        return x[0], log_det[0]

    jacobian, log_det = run(z)
    # the solver's map is within 1e-4 of the true one, and its Jacobian within ten times that
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-3)


def test_a_flow_matching_velocity_drops_in():
    """The optimum of flow matching on Gaussian data has that Gaussian's density, and its
    gradients."""
    flow = cnf(gaussian_velocity(), distributions.normal((2,)))
    x = jnp.asarray([[1.5, -0.5]]) + jax.random.normal(jax.random.key(0), (6, 2))
    params = flow.init(jax.random.key(1), x)

    def total(params):
        log_prob = flow.log_prob(params, x)
        return jnp.sum(log_prob), log_prob

    (_, log_prob), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    # the relative error of the solve is 1e-5 a step; terms of size 10 in the log-density
    np.testing.assert_allclose(
        log_prob, normal_log_prob(params["velocity"], x), rtol=1e-3, atol=1e-3
    )
    expected = jax.grad(lambda p: jnp.sum(normal_log_prob(p, x)))(params["velocity"])
    chex.assert_trees_all_close(grad["velocity"], expected, rtol=5e-3, atol=5e-3)
    samples = jax.jit(flow.sample, static_argnums=2)(params, jax.random.key(2), 4000)
    # 4 standard errors of a mean and of a log standard deviation
    np.testing.assert_allclose(samples.mean(axis=0), [1.5, -0.5], atol=4 * 2 / np.sqrt(4000))
    np.testing.assert_allclose(
        np.log(samples.std(axis=0)), params["velocity"]["log_std"], atol=4 / np.sqrt(8000)
    )


def test_probes_need_a_key_and_share_it():
    flow, params, x = net_flow(3, divergence=solvers.hutchinson(2), method=4)
    exact, _, _ = net_flow(3, method=4)
    key = jax.random.key(5)
    log_prob = jax.jit(flow.log_prob)
    estimate = log_prob(params, x, key=key)
    np.testing.assert_array_equal(estimate, log_prob(params, x, key=key))
    assert not np.allclose(estimate, log_prob(params, x, key=jax.random.key(6)))
    np.testing.assert_array_equal(
        jax.jit(flow.inverse)(params, x, key=key)[0], jax.jit(exact.inverse)(params, x)[0]
    )
    for call in (flow.log_prob, flow.forward, flow.inverse):
        with pytest.raises(ValueError, match="needs a key"):
            call(params, x)
    shapes = jax.eval_shape(lambda key: flow.sample_and_log_prob(params, key, 3), key)
    assert shapes[1].shape == (3,)


def test_adjoints_agree():
    """Backsolve solves its own equation, to the accuracy of 20 steps. Direct is in
    tests/flows/test_cnf_gradients.py."""
    default, params, x = net_flow(2, method=20)
    grads = []
    for adjoint in (
        diffrax.RecursiveCheckpointAdjoint(),
        diffrax.BacksolveAdjoint(),
    ):
        loss = losses.nll(
            cnf(
                velocity(Net()),
                distributions.normal((2,)),
                method=solvers.fixed(20, adjoint=adjoint),
            )
        )
        grads.append(jax.jit(jax.grad(lambda p: loss(p, None, {"x": x})[0]))(params))  # noqa: B023
    chex.assert_tree_all_finite(grads)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads[0]["velocity"]))
    chex.assert_trees_all_close(grads[0], grads[1], rtol=1e-3, atol=1e-3)


def test_conditions():
    flow = cnf(velocity(Net()), distributions.normal((2,)), method=8)
    x, cond = jax.random.normal(jax.random.key(0), (2, 4, 2))
    params = flow.init(jax.random.key(1), x, cond)
    log_prob, sample = jax.jit(flow.log_prob), jax.jit(flow.sample, static_argnums=2)
    assert not np.allclose(log_prob(params, x, cond), log_prob(params, x, -cond))
    key = jax.random.key(2)
    assert not np.allclose(sample(params, key, 4, cond), sample(params, key, 4, -cond))


def test_float64(x64):
    flow = cnf(
        gaussian_velocity(),
        distributions.normal((2,)),
        method=solvers.adaptive(rtol=1e-9, atol=1e-9),
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    params = flow.init(jax.random.key(1), x)
    log_prob = jax.jit(flow.log_prob)(params, x)
    assert log_prob.dtype == jnp.float64
    np.testing.assert_allclose(
        log_prob, normal_log_prob(params["velocity"], x), atol=1e-7
    )  # a hundred tolerances


def test_errors_at_construction():
    v, base = velocity(Net()), distributions.normal((2,))
    for how, message in [
        ({"method": solvers.on_grid([0.0, 1.0]), "t1": 0.9}, "own ends"),
        ({"method": 0}, "at least 1, got 0"),
        ({"method": solvers.on_grid([1.0, 0.5, 0.0])}, "rises strictly"),
    ]:
        with pytest.raises(ValueError, match=message):
            cnf(v, base, **how)
    with pytest.raises(TypeError, match=r"hutchinson\(1\), got 2"):
        cnf(v, base, divergence=2)
