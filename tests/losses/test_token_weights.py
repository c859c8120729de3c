"""Weights of single tokens, the same in all losses of tokens: sum(w l) / sum(w)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.random import clone

from jflow import losses, paths, times
from jflow.types import Field

KEY = jax.random.key(0)
K, N = 3, 4
X = np.array([[0, 2, 1, 0], [2, 2, 0, 1]], np.int32)
X0 = np.array([[1, 2, 1, 1], [0, 2, 2, 0]], np.int32)
WEIGHT = np.array([[1, 1, 0.5, 0], [2, 1, 0, 0]], np.float32)  # the last token is padding


def of_tokens(params, x, t, cond=None, *, key=None):
    """Logits of each token by itself."""
    return params * jnp.stack([jnp.sin(1.0 + x), x * t[:, None], 0.3 * x], axis=-1)


def of_states(params, x, t, cond=None, *, key=None):
    """Logits of a state [b, n, K] of each token by itself."""
    return params * jnp.sin(2 * x) + t[:, None, None]


TOKENS, STATES = Field(None, of_tokens), Field(None, of_states)
START = times.fixed([0.0])  # where a path is at its source, whatever the key
PRIOR = {"x0": X0}
SIMPLEX = {"x0": np.linspace(0.1, 1, 2 * N * K, dtype=np.float32).reshape(2, N, K)}
FLOW = paths.bayesian_discrete(paths.quadratic_accuracy(3.0), K)
CASES = {
    "discrete_matching": (losses.discrete_matching(TOKENS, time=START), PRIOR),
    "discrete_kl": (losses.discrete_kl(TOKENS, time=START), PRIOR),
    "token_cross_entropy": (
        losses.token_cross_entropy(STATES, paths.linear(), num_classes=K, time=START),
        SIMPLEX,
    ),
    "bayesian_flow": (losses.bayesian_flow(STATES, FLOW), {}),
    "bayesian_flow of steps": (losses.bayesian_flow(STATES, FLOW, steps=2), {}),
    "bayesian_reconstruction": (losses.bayesian_reconstruction(STATES, FLOW), {}),
    "bridge_drift": (
        losses.bridge_drift(STATES, paths.statistical_bridge(K, steps=4, draws=8)),
        {},
    ),
}
SHORTER = ("discrete_matching", "discrete_kl", "token_cross_entropy")  # without a draw


@functools.cache
def made(name):
    """The (value, metrics) of several weights, and others, in one program."""
    loss, source = CASES[name]

    @jax.jit
    def run(key):
        def at(weight=None, x=X, columns=N):
            rows = {k: v[:, :columns] for k, v in ({"x": x} | source).items()}
            rows |= {} if weight is None else {"weight": jnp.asarray(weight)}
            return loss(jnp.float32(0.7), clone(key), rows)

        of_rows = np.array([1.0, 3.0], np.float32)
        weights = {
            "ones": np.ones((2, N)),
            "all": np.repeat(of_rows[:, None], N, axis=1),
            "both": WEIGHT,
            "first": WEIGHT * [[1], [0]],
            "second": WEIGHT * [[0], [1]],
            "equal": WEIGHT > 0,
            "other padding": WEIGHT,
        }
        padded = np.concatenate([X[:, :3], (X[:, 3:] + 1) % K], axis=1)
        data = [padded if kind == "other padding" else X for kind in weights]
        found = jax.vmap(at)(np.stack([*weights.values()]).astype(np.float32), np.stack(data))
        nth = lambda i: jax.tree.map(lambda a: a[i], found)  # noqa: E731
        each = {kind: nth(i) for i, kind in enumerate(weights)}
        shorter = at(WEIGHT[:, :3], columns=3) if name in SHORTER else each["both"]
        return each | {"none": at(), "rows": at(of_rows), "shorter": shorter}

    return jax.device_get(run(KEY))


@pytest.mark.parametrize("name", CASES)
def test_weights_of_tokens(name):
    """Ones change nothing, equal ones within rows are those of rows, the mean is a weighted one,
    and what is padded does not count: without it the value is the same. Tolerances are those of
    float32 sums in another order."""
    found = made(name)
    close = functools.partial(
        jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-5)
    )
    close(found["ones"], found["none"])
    close(found["all"], found["rows"])
    close(found["other padding"], found["both"])
    close(found["shorter"], found["both"])
    share = WEIGHT.sum(1) / WEIGHT.sum()
    close(
        jax.tree.map(lambda a, b: share[0] * a + share[1] * b, found["first"], found["second"]),
        found["both"],
    )
    assert len({float(found[k][0]) for k in ("none", "rows", "both", "first", "equal")}) == 5


def test_one_token_alone_is_its_cross_entropy():
    weight = np.zeros((2, N), np.float32)
    weight[1, 2] = 5
    loss = jax.jit(CASES["discrete_matching"][0])
    value, _ = loss(0.7, KEY, {"x": X, "weight": weight} | PRIOR)
    log_p = jax.nn.log_softmax(of_tokens(0.7, X0, np.zeros(2)))
    np.testing.assert_allclose(value, -log_p[1, 2, X[1, 2]], rtol=1e-6)


def test_numbers_that_do_not_count_may_be_missing():
    """Of a Bayesian flow of real numbers: neither the value nor its gradient holds their NaN."""
    flow = paths.bayesian_continuous(paths.geometric_accuracy(0.1))
    field = Field(None, lambda params, x, t, cond=None, *, key=None: params * x)
    x = np.array([[0.5, np.nan], [np.inf, -1.0]], np.float32)
    batch = {"x": x, "weight": np.isfinite(x)}
    loss = jax.jit(jax.value_and_grad(losses.bayesian_flow(field, flow), has_aux=True))
    (value, _), slope = loss(jnp.float32(0.7), KEY, batch)
    assert value > 0 and np.isfinite(slope) and slope != 0


@pytest.mark.parametrize("name", CASES)
def test_weights_of_another_shape(name):
    loss, source = CASES[name]
    for shape in ((2, 3), (1, N), (2, N, 1), ()):
        with pytest.raises(ValueError, match=r"'weight' of shape \[2\] or \[2, 4\], got"):
            loss(0.7, KEY, {"x": X, "weight": np.ones(shape)} | source)


def test_rewards_of_rows_meet_weights_of_tokens():
    transform = losses.reward_weights(1.0)
    batch = {
        "x": X[:, :2],
        "reward": np.array([0.0, np.log(2)]),
        "weight": np.array([[1, 3], [0, 2]]),
    }
    weight = transform(KEY, batch)["weight"]
    np.testing.assert_allclose(weight, [[0.5, 1.5], [0, 2]], rtol=1e-6)
