"""One transformer over a text and an image in both orders, and experts along time."""

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

import jflow
from jflow import distributions, losses, nets, solvers

B, N, D, SYMBOLS, LENGTH = 3, 4, 2, 3, 2
NET = nets.TextImageTransformer(SYMBOLS, length=LENGTH, width=8, num_layers=2, num_heads=2)
X = np.asarray(np.random.default_rng(0).normal(size=(B, N, D)), np.float32)
T = np.array([0.1, 0.5, 0.9], np.float32)
TEXT = np.array([[0, 1], [2, 2], [1, 0]], np.int32)
VELOCITY = jflow.velocity(nets.TextToImage(NET))
HEAD = distributions.categorical(SYMBOLS)
LAW = distributions.causal(nets.ImageToText(NET), HEAD, (LENGTH,))


def moved(params, scale=0.3):
    draw = np.random.default_rng(3)
    return jax.tree.map(
        lambda p: np.asarray(p + scale * draw.normal(size=p.shape), p.dtype), params
    )


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(VELOCITY.init, jax.random.key(0), X, T, TEXT)
    head = jax.eval_shape(HEAD.init, jax.random.key(0), TEXT[:, 0], np.zeros((B, 8), np.float32))
    zeros = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), {"net": shapes, "text": head})
    return moved(zeros)


def test_what_comes_second_sees_what_comes_first_and_not_the_other_way_round(params):
    """Both uses have params of one form. A velocity sees each symbol, and no symbol sees the image
    there; a symbol sees the image and the symbols before it, and the image no symbol there."""
    init = lambda x: jax.eval_shape(nets.ImageToText(NET).init, jax.random.key(0), TEXT, x)  # noqa: E731
    assert jax.tree.structure(init(X)["params"]) == jax.tree.structure(params["net"])
    other = X + 1.0

    @jax.jit
    def run(params, text, image):
        apply = lambda first: NET.apply({"params": params}, text, image, T, first)  # noqa: E731
        return apply(True), apply(False)

    found = jax.device_get(run(params["net"], TEXT, X))
    of_image = jax.device_get(run(params["net"], TEXT, other))
    (h, v), (h_image, v_alone) = found
    np.testing.assert_allclose(of_image[0][0], h, rtol=1e-5, atol=1e-6)
    assert np.all(np.abs(of_image[1][0] - h_image).max(-1) > 1e-3)
    for i in range(LENGTH):
        changed = TEXT.copy()
        changed[:, i] = (changed[:, i] + 1) % SYMBOLS
        (_, v_of), (h_of, v_alone_of) = jax.device_get(run(params["net"], changed, X))
        assert np.all(np.abs(v_of - v).max((1, 2)) > 1e-4)
        np.testing.assert_allclose(v_alone_of, v_alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(h_of[:, : i + 1], h_image[:, : i + 1], rtol=1e-5, atol=1e-6)
        assert np.all(np.abs(h_of[:, i + 1] - h_image[:, i + 1]).max(-1) > 1e-3)


def test_the_law_of_a_text_given_an_image_sums_to_one(params):
    every = np.stack(np.meshgrid(*[np.arange(SYMBOLS)] * LENGTH), -1).reshape(-1, LENGTH)
    every = every.astype(np.int32)
    of_law = {"net": params["net"], "token": params["text"]}

    @jax.jit
    def run(image):
        return LAW.log_prob(of_law, every, jnp.broadcast_to(image[None], (len(every), N, D)))

    first, second = jax.device_get((run(X[0]), run(X[1])))
    np.testing.assert_allclose([logsumexp(first), logsumexp(second)], 0, atol=1e-5)
    assert np.abs(first - second).max() > 1e-3
    drawn = LAW.sample(of_law, jax.random.key(0), B, X)
    assert drawn.shape == (B, LENGTH) and drawn.dtype == jnp.int32


def test_both_losses_on_one_network_add_up_in_value_and_gradient(params):
    """The gradient of the network is the sum of those of both parts, and neither is zero."""
    parts = {
        "image": losses.selected(losses.flow_matching(VELOCITY), params=lambda p: p["net"]),
        "text": losses.selected(
            losses.nll(LAW),
            params=lambda p: {"net": p["net"], "token": p["text"]},
            batch=lambda b: {"x": b["cond"], "cond": b["x"]},
            weight=0.25,
        ),
    }
    batch = {"x": X, "cond": TEXT}
    total = losses.sum_losses(parts)

    @jax.jit
    def run(params, key):
        whole = jax.value_and_grad(total, has_aux=True)(params, key, batch)
        own = jax.random.split(jax.random.clone(key), 2)
        each = [
            jax.value_and_grad(loss, has_aux=True)(params, k, batch)
            for loss, k in zip(parts.values(), own, strict=True)
        ]
        return whole, each, LAW.log_prob({"net": params["net"], "token": params["text"]}, TEXT, X)

    (whole, each, log_prob) = jax.device_get(run(params, jax.random.key(0)))
    (value, metrics), grads = whole
    np.testing.assert_allclose(value, sum(part[0][0] for part in each), rtol=1e-6)
    np.testing.assert_allclose(metrics["text/loss"], -0.25 * log_prob.mean(), rtol=1e-5)
    added = jax.tree.map(lambda a, b: a + b, each[0][1], each[1][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, added)
    for part in each:
        assert np.any(part[1]["net"]["blocks"]["attention"]["qkv"]["kernel"] != 0)


class Constant(nn.Module):
    """A velocity that is one number everywhere."""

    @nn.compact
    def __call__(self, x, t, cond=None):
        return self.param("value", nn.initializers.ones, ()) + 0 * x


EXPERTS = nets.TimeExperts([Constant(), Constant(), Constant()], [0.25, 0.5])


def test_each_time_has_its_expert():
    """Rows at different times, rows at one, edges, which belong to what follows, and a solve, which
    is 0.25 + 0.25 2 + 0.5 3; the gradient of each expert counts its rows."""
    velocity = jflow.velocity(EXPERTS)
    params = velocity.init(jax.random.key(0), X, T)
    assert sorted(params) == ["experts_0", "experts_1", "experts_2"]
    params = {name: {"value": np.float32(i + 1)} for i, name in enumerate(sorted(params))}
    x = np.zeros((4, 1), np.float32)
    for t, expected in {
        (0.0, 0.25, 0.4, 1.0): [1, 2, 2, 3],
        (0.1, 0.1, 0.2, 0.24): [1, 1, 1, 1],
        (0.5, 0.6, 0.7, 1.0): [3, 3, 3, 3],
    }.items():
        found = velocity.apply(params, x, np.array(t, np.float32))
        np.testing.assert_array_equal(found[:, 0], expected)
    slope = jax.grad(
        lambda p: jnp.sum(velocity.apply(p, x, np.array([0, 0, 0.3, 0.9], np.float32)))
    )
    grads = slope(params)
    assert [float(grads[name]["value"]) for name in sorted(grads)] == [2, 1, 1]
    grid = solvers.on_grid(np.linspace(0, 1, 5), diffrax.Euler())
    x1, _ = solvers.sample(velocity, params, x, method=grid)
    np.testing.assert_allclose(x1, 0.25 + 0.5 + 1.5, rtol=1e-6)


BAD = {
    r"2 edges that rise in \(0, 1\).* got \[0.5\]": lambda: EXPERTS.clone(edges=[0.5]),
    r"edges .* got \[0.5, 0.25\]": lambda: EXPERTS.clone(edges=[0.5, 0.25]),
    r"experts\[1\] to be an instance": lambda: nets.TimeExperts([Constant(), len], [0.5]),
    "TextToImage: expected net to be a TextImageTransformer": lambda: nets.TextToImage(Constant()),
    "ImageToText: expected net to be a TextImageTransformer": lambda: nets.ImageToText(Constant()),
    r"integers \[b, 2\], got \[3, 1\]": lambda: VELOCITY.init(jax.random.key(0), X, T, TEXT[:, :1]),
    r"text, integers \[b, 2\], got float32": lambda: VELOCITY.init(
        jax.random.key(0), X, T, np.float32(TEXT)
    ),
    r"tokens of an image, \[b, n, d\], got None": lambda: LAW.init(jax.random.key(0), TEXT),
    "at most 2 symbols": lambda: LAW.init(jax.random.key(0), np.zeros((B, 3), np.int32), X),
    "expected length": lambda: nets.TextImageTransformer(3, length=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()
