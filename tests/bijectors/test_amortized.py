"""Parameters read off the condition, a set for each row."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import nets
from jflow.types import Transport

rng = np.random.default_rng(0)
z, cond = (
    jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
    jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
)
inner = bj.chain(bj.affine((3,)), bj.scan(bj.sylvester(3, 2), 2))


def test_it_starts_as_the_unconditional_map_and_a_zero_head_is_that_map():
    bijector = bj.amortized(inner, nets.MLP((5,), nn.tanh))
    params = bijector.init(jax.random.key(0), z, cond)
    assert set(params) == {"net", "kernel", "bias"}
    assert all(np.all(k == 0) for k in jax.tree.leaves(params["kernel"]))
    params["bias"] = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params["bias"]
    )
    x, log_det = jax.jit(bijector.forward)(params, z, cond)
    expected, expected_log_det = jax.jit(inner.forward)(params["bias"], z)
    np.testing.assert_allclose(
        x, expected, atol=1e-6
    )  # one row at a time or all at once: float32 rounding
    np.testing.assert_allclose(log_det, expected_log_det, atol=1e-6)


def test_each_row_has_its_own_params():
    """bias + kernel^T net(cond_i), worked out row by row; cond itself where there is no net."""
    for net in (nets.MLP((5,), nn.tanh), None):
        bijector = bj.amortized(inner, net)
        shapes = jax.eval_shape(bijector.init, jax.random.key(0), z, cond)
        params = jax.tree.map(
            lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), shapes
        )
        x, log_det = jax.jit(bijector.forward)(params, z, cond)
        features = cond if net is None else net.apply({"params": params["net"]}, cond[:, :0], cond)
        for i in range(4):
            add = lambda b, k, h=features[i]: b + jnp.einsum("f,f...->...", h, k)  # noqa: E731
            own = jax.tree.map(add, params["bias"], params["kernel"])
            expected, expected_log_det = inner.forward(own, z[i : i + 1])
            np.testing.assert_allclose(x[i : i + 1], expected, atol=1e-5)
            np.testing.assert_allclose(log_det[i : i + 1], expected_log_det, atol=1e-5)


def test_without_cond_it_is_the_map_itself():
    bijector = bj.amortized(inner, nets.MLP((5,)))
    params = bijector.init(jax.random.key(0), z)
    assert set(params) == {"bias"}
    np.testing.assert_array_equal(
        bijector.forward(params, z)[0], inner.forward(params["bias"], z)[0]
    )
    with pytest.raises(ValueError, match="expected no cond, since init had none"):
        bijector.forward(params, z, cond)
    with pytest.raises(ValueError, match="expected cond, as at init, got None"):
        bijector.forward(bijector.init(jax.random.key(0), z, cond), z)


def test_keys_reach_the_rows_and_transports_stay_transports():
    residual = bj.amortized(bj.residual(nets.LipschitzMLP((4,), coeff=0.5)))
    params = jax.jit(residual.init)(jax.random.key(0), z, cond)
    params["bias"] = jax.tree.map(lambda p: p + 0.5, params["bias"])
    same = jnp.repeat(z[:1], 4, axis=0)
    log_det = jax.jit(lambda p, key: residual.forward(p, same, 0 * cond, key=key)[1])(
        params, jax.random.key(0)
    )
    assert len(np.unique(np.asarray(log_det))) > 1  # a probe for each row
    assert isinstance(bj.amortized(bj.uniform_dequantization(4)), Transport)


def test_features_have_to_be_vectors():
    class Images(nn.Module):
        @nn.compact
        def __call__(self, x, cond=None):
            return nn.Dense(3)(cond)

    with pytest.raises(ValueError, match=r"features of shape \[4, F\], got \[4, 3, 3\]"):
        bj.amortized(inner, Images()).init(jax.random.key(0), z, jnp.ones((4, 3, 2)))
    with pytest.raises(ValueError, match="lead with 4 rows"):
        bj.amortized(inner).init(jax.random.key(0), z, cond[:3])
