"""Flow matching of the next token: the exact head is the minimum, and has the exact density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jflow
from jflow import distributions, flows, losses, nets
from jflow.types import Condition, Velocity

A, S, N = 0.8, 0.5, 3  # x_i = A x_{i-1} + S noise, from x_{-1} = 0


class Past(nets.CausalLSTM):
    """A network without params that says nothing, for `nets.WithPrevious`."""

    def __call__(self, x, cond=None, cache=None, first=0):
        h = jnp.zeros((*x.shape[:2], 1), x.dtype)
        return h if cache is None else (h, cache)


NET = nets.WithPrevious(Past())
SOURCES = {
    "normal": (distributions.normal((1,)), 1.0, 0.0),
    "around the preceding token": (distributions.around_previous(1, 0.3), 0.3, 1.0),
}


def exact(std, at):
    """The velocity between N(at p, std^2) and N(a p, S^2), p the preceding token."""

    def apply(params, x, t, cond=None, *, key=None):
        p, t = cond[:, :1], t[:, None]
        start, end = at * p, params["a"] * p
        variance = ((1 - t) * std) ** 2 + (t * S) ** 2
        slope = (t * S**2 - (1 - t) * std**2) / variance
        return end - start + slope * (x - (1 - t) * start - t * end)

    return Velocity(lambda key, x, t, cond=None: {"a": jnp.asarray(A)}, apply)


LOWER = S * np.tril(A ** np.abs(np.subtract.outer(np.arange(N), np.arange(N))))


def rows(key, count):
    return (jax.random.normal(key, (count, N)) @ LOWER.T)[..., None]


@pytest.mark.parametrize("name", SOURCES)
def test_the_exact_head_is_the_minimum_and_its_cnf_the_autoregression(name, x64):
    """The least loss is pi/2 times the product of the two standard deviations (within 4 standard
    errors of 32 keys), another coefficient costs more, and the params have the law of x whatever
    the source was."""
    base, std, at = SOURCES[name]
    velocity = exact(std, at)
    loss = losses.causal_matching(NET, velocity, base, draws=2)
    law = distributions.causal(NET, flows.cnf(velocity, base), (N, 1))
    x = rows(jax.random.key(2), 3)
    params = law.init(jax.random.key(0), x[:2])
    assert set(params["token"]) == {"velocity", "base"}

    @jax.jit
    def values(a):
        given = {"net": params["net"], "token": {"velocity": {"a": a}, "base": {}}}
        keys = jax.random.split(jax.random.key(1), (32, 2))
        return jax.lax.map(lambda key: loss(given, key[0], {"x": rows(key[1], 500)})[0], keys)

    best, less, more = (np.asarray(values(a)) for a in (A, A - 0.2, A + 0.2))
    error = best.std() / np.sqrt(len(best))
    assert abs(best.mean() - std * S * np.pi / 2) < 4 * error
    for other in (less, more):  # under the same keys
        excess = other - best
        assert excess.mean() > 4 * excess.std() / np.sqrt(len(best))

    normal = scipy.stats.multivariate_normal(np.zeros(N), LOWER @ LOWER.T)
    found = law.log_prob(params, x)
    np.testing.assert_allclose(found, normal.logpdf(x[..., 0]), atol=1e-4)  # rtol of the solve


def small():
    """(loss, law, params) of a network that learns."""
    net, head = nets.CausalLSTM(width=3), jflow.velocity(nets.TimeMLP((3,)))
    base = distributions.normal((2,))
    law = distributions.causal(net, flows.cnf(head, base, method=2), (N, 2))
    x = np.asarray(np.random.default_rng(1).normal(size=(3, N, 2)), np.float32)
    params = law.init(jax.random.key(0), x)
    draw = np.random.default_rng(2)
    params = jax.tree.map(
        lambda p: np.asarray(p + 0.3 * draw.normal(size=p.shape), p.dtype), params
    )
    return losses.causal_matching(net, head, base), law, params, x


def test_padding_and_weights_of_tokens():
    """What stands in padding is nowhere; a token of weight 0 does not count but is the past of the
    others; a row of weight 0 is nowhere either."""
    loss, _, params, x = small()
    valid = np.array([[True, True, True], [True, True, False], [False] * 3])
    key = jax.random.key(3)
    run = jax.jit(jax.value_and_grad(lambda p, batch: loss(p, key, batch)[0]))
    batch = {"x": x, "cond": Condition(valid=valid)}
    spoilt = batch | {"x": np.where(valid[..., None], x, np.inf)}
    expected = run(params, batch)
    jax.tree.map(np.testing.assert_array_equal, run(params, spoilt), expected)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(expected[1]))
    for weight in (valid.astype(np.float32), 2 * np.ones((3, N), np.float32)):
        found = run(params, spoilt | {"weight": weight})
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
        )

    weight = np.zeros((3, N), np.float32)
    weight[0, 2] = 1
    last = run(params, {"x": x, "weight": weight})[0]
    moved = x.copy()
    moved[0, 0] += 1
    assert abs(run(params, {"x": moved, "weight": weight})[0] - last) > 1e-4
    moved = x.copy()
    moved[1:] = np.nan
    np.testing.assert_array_equal(run(params, {"x": moved, "weight": weight})[0], last)
    by_rows = run(params, {"x": moved, "weight": np.array([1.0, 0.0, 0.0], np.float32)})
    assert np.isfinite(by_rows[0])


def test_what_is_refused():
    loss, _, params, x = small()
    run = lambda **batch: loss(params, jax.random.key(0), {"x": x} | batch)  # noqa: E731
    for batch, said in (
        ({"x": x[..., 0]}, r"expected x of shape \[b, n, d\], got \[3, 3\]"),
        ({"weight": np.ones((3, 2))}, r"'weight' of shape \[3\] or \[3, 3\], got \[3, 2\]"),
        ({"cond": Condition(valid=np.ones((3, 2), bool))}, "cond.valid of shape"),
        ({"x0": x}, "unknown keys in batch: .'x0'."),
    ):
        with pytest.raises(ValueError, match=f"causal_matching: (expected )?{said}"):
            run(**batch)
    with pytest.raises(ValueError, match="expected params with .'net', 'token'."):
        loss({"net": {}}, jax.random.key(0), {"x": x})
    with pytest.raises(ValueError, match="draws to be a whole number of at least 1, got 0"):
        losses.causal_matching(NET, exact(1, 0), distributions.normal((1,)), draws=0)
    with pytest.raises(TypeError, match="expected a Velocity or a Field"):
        losses.causal_matching(NET, NET, distributions.normal((1,)))
