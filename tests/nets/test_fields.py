import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.nets._fields import field, velocity


class Net(nn.Module):
    """A velocity network of the smallest kind; `out` widens it to break the contract."""

    out: int = 0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, t, cond=None):
        h = jnp.concatenate([x, t[:, None]] + ([] if cond is None else [cond]), axis=1)
        h = nn.Dense(8, dtype=self.dtype)(h)
        h = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(h)
        return nn.Dense(self.out or x.shape[1], dtype=self.dtype)(h)


class Plain(nn.Module):
    """Takes no cond at all."""

    @nn.compact
    def __call__(self, x, t):
        return x * self.param("scale", nn.initializers.ones, ()) * t[:, None]


class Pair(nn.Module):
    """A state of two parts."""

    @nn.compact
    def __call__(self, x, t, cond=None):
        return {"a": nn.Dense(3)(x["a"]), "b": x["b"] * t[:, None, None]}


def batch(key=0, dtype=jnp.float32):
    k1, k2, k3 = jax.random.split(jax.random.key(key), 3)
    x, cond = jax.random.normal(k1, (4, 3), dtype), jax.random.normal(k2, (4, 2), dtype)
    return x, jax.random.uniform(k3, (4,), dtype), cond


def test_velocity_is_the_network():
    x, t, cond = batch()
    v = velocity(Net())
    params = v.init(jax.random.key(1), x, t, cond)
    expected = Net().apply({"params": params}, x, t, cond)
    np.testing.assert_array_equal(v.apply(params, x, t, cond), expected)
    np.testing.assert_array_equal(field(Net()).apply(params, x, t, cond), expected)


def test_a_key_switches_dropout_on():
    x, t, _ = batch()
    v = velocity(Net())
    params = v.init(jax.random.key(1), x, t)
    plain = v.apply(params, x, t)
    np.testing.assert_array_equal(plain, v.apply(params, x, t))
    assert not np.allclose(plain, v.apply(params, x, t, key=jax.random.key(2)))


def test_a_scalar_time_is_every_row_s():
    x, _, _ = batch()
    v = velocity(Net())
    params = v.init(jax.random.key(1), x, 0.3)
    np.testing.assert_array_equal(v.apply(params, x, 0.3), v.apply(params, x, jnp.full((4,), 0.3)))


def test_a_module_without_cond_works_without_cond():
    x, t, _ = batch()
    v = velocity(Plain())
    np.testing.assert_allclose(v.apply(v.init(jax.random.key(1), x, t), x, t), x * t[:, None])


def test_pytree_states():
    x = {"a": jnp.ones((4, 3)), "b": jnp.ones((4, 2, 2))}
    t = jnp.arange(4.0)
    v = velocity(Pair())
    out = v.apply(v.init(jax.random.key(1), x, t), x, t)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, x)
    np.testing.assert_array_equal(out["b"][:, 0, 0], t)


def test_types_follow_x():
    x, t, _ = batch()
    v = velocity(Net(dtype=jnp.bfloat16))
    params = v.init(jax.random.key(1), x, t)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert v.apply(params, x, t).dtype == jnp.float32
    assert v.apply(params, x.astype(jnp.bfloat16), t).dtype == jnp.bfloat16


def test_float64(x64):
    x, t, _ = batch(dtype=jnp.float64)
    v = velocity(Net())
    params = v.init(jax.random.key(1), x, t)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
    assert v.apply(params, x, t).dtype == jnp.float64


def test_errors_name_the_shapes():
    x, t, cond = batch()
    v = velocity(Net())
    params = v.init(jax.random.key(1), x, t)
    with pytest.raises(ValueError, match=r"t of shape \[4\].*got \[3\]"):
        v.apply(params, x, t[:3])
    with pytest.raises(ValueError, match=r"t of shape \[4\].*got \[4, 1\]"):
        v.apply(params, x, t[:, None])
    with pytest.raises(ValueError, match=r"cond to lead with 4 rows, got shape \[2, 2\]"):
        v.apply(params, x, t, cond[:2])
    wide = velocity(Net(out=5))
    params = wide.init(jax.random.key(1), x, t)
    with pytest.raises(ValueError, match=r"shaped like x, \[4, 3\], got \[4, 5\]"):
        wide.apply(params, x, t)
    assert field(Net(out=5)).apply(params, x, t).shape == (4, 5)
