"""Batch transforms that alter rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses


def seen(params, key, batch, frozen=None):
    """A loss whose metrics are what it was given."""
    return jnp.zeros(()), {**batch, "key": key, "frozen": frozen}


def test_noise_is_gaussian_of_the_given_deviation_and_fresh():
    x = jnp.full((20_000, 2), 3.0)
    loss = losses.chain(losses.noised(0.1), seen)
    _, got = loss({}, jax.random.key(0), {"x": x, "weight": jnp.ones(20_000)}, {"ema": 1})
    noise = np.asarray(got["x"] - x)
    np.testing.assert_allclose(noise.std(), 0.1, rtol=0.02)  # 40,000 draws: 4 standard errors
    np.testing.assert_allclose(noise.mean(), 0, atol=0.002)
    assert got["frozen"] == {"ema": 1} and "weight" in got
    again = loss({}, jax.random.key(1), {"x": x})[1]["x"]
    assert np.any(again != got["x"])
    np.testing.assert_array_equal(losses.noised(0.0)(jax.random.key(0), {"x": x})["x"], x)


def test_conditions_are_dropped_by_row_at_the_given_rate():
    n = 10_000
    cond = {"label": jnp.arange(n) % 3, "vector": jnp.ones((n, 2))}
    loss = losses.chain(losses.drop_cond(0.25, null={"label": 3, "vector": np.zeros(2)}), seen)
    _, got = loss({}, jax.random.key(0), {"x": jnp.zeros((n, 1)), "cond": cond})
    dropped = np.asarray(got["cond"]["label"] == 3)
    np.testing.assert_array_equal(dropped, got["dropped"])
    np.testing.assert_array_equal(dropped, np.all(got["cond"]["vector"] == 0, axis=1))
    np.testing.assert_array_equal(got["cond"]["label"][~dropped], cond["label"][~dropped])
    assert abs(dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)


def test_they_compose_with_independent_keys():
    both = losses.chain(losses.noised(1.0), losses.drop_cond(0.5, null=9), seen)
    x, cond = jnp.zeros((64, 1)), jnp.zeros(64, jnp.int32)
    _, got = both({}, jax.random.key(0), {"x": x, "cond": cond})
    assert np.all(got["x"] != 0) and set(np.unique(got["cond"])) == {0, 9}


def test_bad_input():
    batch = {"x": jnp.zeros((2, 1))}
    with pytest.raises(ValueError, match="std >= 0, got -1"):
        losses.noised(-1)
    with pytest.raises(ValueError, match=r"p in \[0, 1\], got 2"):
        losses.drop_cond(2, null=0)
    with pytest.raises(ValueError, match="expected 'cond' in batch"):
        losses.drop_cond(0.1, null=0)(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="null"):
        losses.drop_cond(0.1, null=np.zeros(2))(
            jax.random.key(0), {**batch, "cond": jnp.zeros((2, 3))}
        )
