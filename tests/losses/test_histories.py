"""Sequences of states from noise to data: their covariances, and what is given along the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses, paths, solvers
from jflow.types import Condition

RHO, N = 0.9, 40_000
COV = np.array([[1.0, RHO], [RHO, 1.0]])
TIMES = [0.0, 0.25, 0.7, 1.0]


def pairs_of_tokens(n=N):
    """[n, 2, 1], two unit Gaussians of correlation 0.9."""
    z = np.random.default_rng(0).normal(size=(n, 2))
    return (z @ np.linalg.cholesky(COV).T)[..., None].astype(np.float32)


def covariance(x):
    return np.cov(np.asarray(x, np.float64).reshape(len(x), -1).T)


def test_the_states_of_a_history_have_noise_of_their_own():
    """cov(x_k, x_l) = t_k t_l COV, and (1 - t_k)^2 more for k = l; standard errors are at most
    0.007."""
    x = pairs_of_tokens()
    made = jax.jit(losses.full_history(TIMES))(jax.random.key(0), {"x": x})["x"]
    assert made.shape == (N, 6, 1)
    np.testing.assert_array_equal(made[:, 4:], x)
    t = np.array(TIMES[1:])
    expected = np.kron(np.outer(t, t), COV) + np.kron(np.diag((1 - t) ** 2), np.eye(2))
    np.testing.assert_allclose(covariance(made), expected, atol=0.03)


def test_the_states_of_a_path_share_their_noise():
    """cov(x_k, x_l) = t_k t_l COV + (1 - t_k) (1 - t_l) I, from x_0 on."""
    x = pairs_of_tokens()
    made = jax.jit(losses.path_states(TIMES))(jax.random.key(0), {"x": x})["x"]
    assert made.shape == (N, 4, 2)
    t = np.array(TIMES)
    expected = np.kron(np.outer(t, t), COV) + np.kron(np.outer(1 - t, 1 - t), np.eye(2))
    np.testing.assert_allclose(covariance(made), expected, atol=0.03)
    given = losses.path_states(TIMES)(jax.random.key(0), {"x": x[:3], "x0": 0 * x[:3]})
    assert set(given) == {"x"}
    np.testing.assert_allclose(given["x"], t[None, :, None] * x[:3, None, :, 0], atol=1e-6)


def test_the_noise_of_a_path_is_drawn_anew_at_each_time():
    """On a bridge of deviation s between points at 0, cov is diagonal with s^2 t (1 - t)."""
    path = paths.interpolant(paths.schroedinger_bridge(0.5))
    x = np.zeros((N, 1), np.float32)
    made = jax.jit(losses.path_states(TIMES, path))(jax.random.key(0), {"x": x, "x0": x})["x"]
    t = np.array(TIMES)
    np.testing.assert_allclose(covariance(made), np.diag(0.25 * t * (1 - t)), atol=0.003)


def test_a_row_of_images_falls_from_noise_to_the_last_of_them():
    x = np.random.default_rng(1).normal(size=(1, 3, 2, 1)).astype(np.float32)
    x = np.broadcast_to(x, (N, 3, 2, 1))
    batch = {"x": x, "cond": np.zeros(N, np.int32)}
    made = jax.jit(losses.falling_noise(TIMES))(jax.random.key(0), batch)
    t = np.repeat(TIMES[1:], 2)
    np.testing.assert_allclose(np.mean(made["x"], 0)[:, 0], t * x[0].reshape(-1), atol=0.02)
    np.testing.assert_allclose(covariance(made["x"]), np.diag((1 - t) ** 2), atol=0.03)
    assert made["cond"].shape == (N,)


def test_pairs_of_a_kernel_are_neighbors_of_the_grid_with_independent_noise():
    """A step is drawn uniformly; given the step, cov of the two states is that of a history."""
    x, at = pairs_of_tokens(), np.array(TIMES)
    transform = losses.transition_pairs(TIMES, condition=lambda x, t, cond: (x, t, cond))
    made = jax.jit(transform)(jax.random.key(0), {"x": x, "cond": x})
    last, t, cond = jax.device_get(made["cond"])
    np.testing.assert_array_equal(cond, x)
    k = np.searchsorted(at, t + 1e-3) - 1
    shares = np.bincount(k, minlength=3) / N
    np.testing.assert_allclose(shares, 1 / 3, atol=0.01)
    for step in range(3):
        both = np.concatenate([last[k == step], made["x"][k == step]], axis=1)
        s = at[step : step + 2]
        expected = np.kron(np.outer(s, s), COV) + np.kron(np.diag((1 - s) ** 2), np.eye(2))
        np.testing.assert_allclose(covariance(both), expected, atol=0.05)


def test_what_is_given_along_the_tokens_follows_them():
    x = np.zeros((2, 3, 1), np.float32)
    valid = np.array([[True, True, True], [True, True, False]])
    cond = Condition(label=np.arange(2), aligned=np.arange(6.0).reshape(2, 3, 1), valid=valid)
    batch = {"x": x, "cond": cond, "weight": np.array([[1.0, 2.0, 3.0]] * 2)}
    made = losses.full_history(2)(jax.random.key(0), batch)
    assert made["weight"][0].tolist() == [1, 2, 3, 1, 2, 3]
    assert made["cond"].valid[1].tolist() == [True, True, False] * 2
    assert made["cond"].label.tolist() == [0, 1]
    np.testing.assert_array_equal(made["cond"].aligned[0, :, 0], [0, 1, 2, 0, 1, 2])
    told = solvers.transition_condition(x, np.full(2, 0.5, np.float32), cond)
    assert told.label.tolist() == [0, 1] and told.aligned.shape == (2, 3, 2)
    np.testing.assert_array_equal(told.context[0, :, 0], x[0, :, 0])
    np.testing.assert_array_equal(told.mask, valid)
    places = told.context[0, :, 1:]
    assert len({tuple(place) for place in np.asarray(places).tolist()}) == 3
    later = solvers.transition_condition(x, np.full(2, 0.75, np.float32), cond)
    assert np.any(later.vector != told.vector)


def test_bad_input_says_so():
    key, x = jax.random.key(0), jnp.zeros((2, 3, 1))
    with pytest.raises(ValueError, match="rise strictly from 0 to 1"):
        losses.full_history([0.0, 0.5])
    with pytest.raises(ValueError, match=r"falling_noise: expected 'x' of shape \[b, 2, n, d\]"):
        losses.falling_noise(2)(key, {"x": x})
    with pytest.raises(ValueError, match=r"full_history: expected 'x' of shape \[b, n, d\]"):
        losses.full_history(2)(key, {"x": x[..., 0]})
    with pytest.raises(ValueError, match=r"unknown keys in batch: \['x0'\]"):
        losses.transition_pairs(2)(key, {"x": x, "x0": x})
    with pytest.raises(ValueError, match="no cond.context"):
        solvers.transition_condition(x, jnp.zeros(2), Condition(context=jnp.zeros((2, 1, 1))))
    with pytest.raises(ValueError, match=r"x of shape \[b, n, d\], got \[2, 3\]"):
        solvers.transition_condition(x[..., 0], jnp.zeros(2))
    for transform in (losses.path_states(2), losses.full_history(2), losses.transition_pairs(2)):
        with pytest.raises(ValueError, match="is stochastic: it needs a key"):
            transform(None, {"x": x})
