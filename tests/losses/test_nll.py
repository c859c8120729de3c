import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses, types


def scale_family():
    """N(cond, exp(log_scale)^2) as a Distribution, which notes the key it was given."""
    seen = {}

    def log_prob(params, x, cond=None, *, key=None):
        seen["key"] = key
        mean = jnp.zeros_like(x) if cond is None else cond
        z = (x - mean) * jnp.exp(-params["log_scale"])
        return jnp.sum(-0.5 * z**2 - params["log_scale"] - 0.5 * jnp.log(2 * jnp.pi), axis=1)

    return types.Distribution(None, log_prob, None), seen


def test_nll_is_the_mean_in_nats():
    flow, seen = scale_family()
    params, x = {"log_scale": jnp.asarray(0.3)}, jax.random.normal(jax.random.key(0), (16, 2))
    value, metrics = losses.nll(flow)(params, None, {"x": x})
    np.testing.assert_allclose(value, -jnp.mean(flow.log_prob(params, x)), rtol=1e-6)
    assert metrics == {} and seen["key"] is None


def test_nll_with_cond_weight_and_key():
    flow, seen = scale_family()
    params, key = {"log_scale": jnp.asarray(0.3)}, jax.random.key(3)
    x, cond = jax.random.normal(jax.random.key(0), (2, 5, 2))
    weight = jnp.asarray([1.0, 0.0, 2.0, 0.5, 0.5])
    value, _ = losses.nll(flow)(params, key, {"x": x, "cond": cond, "weight": weight})
    assert seen["key"] is key
    np.testing.assert_allclose(
        value, -np.sum(weight * flow.log_prob(params, x, cond)) / 4, rtol=1e-6
    )


def test_the_gradient_finds_the_scale():
    flow, _ = scale_family()
    x = 2.0 * jax.random.normal(jax.random.key(0), (64, 1))
    best = {"log_scale": 0.5 * jnp.log(jnp.mean(x**2))}  # the maximum likelihood, in closed form
    np.testing.assert_allclose(
        jax.grad(lambda p: losses.nll(flow)(p, None, {"x": x})[0])(best)["log_scale"], 0, atol=1e-5
    )


def test_errors():
    loss = losses.nll(scale_family()[0])
    params, x = {"log_scale": jnp.asarray(0.0)}, jnp.zeros((4, 2))
    for batch, message in [
        ({"y": x}, r"unknown keys in batch: \['y'\]; allowed are \['x', 'cond', 'weight'\]"),
        ({"x": x, "x0": x}, "unknown keys"),
        ({}, "under 'x'"),
        ({"x": x, "weight": jnp.ones(3)}, r"\[4\], got \[3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(params, None, batch)
