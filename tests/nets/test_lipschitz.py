"""Norms of kernels, and the networks that stay under them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import flows, losses, nets
from jflow._core.linen import apply_linen
from jflow.nets import norms


def kernel(shape=(5, 7), scale=1.0, seed=0):
    return scale * np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (40, 12), (3, 4, 6, 6)], ids=str)
def test_spectral_bound_is_certified_and_tight(shape):
    """Never below numpy's SVD (float32 rounding aside), above by at most rank^(1/512)."""
    w = kernel(shape)
    largest = np.linalg.svd(w, compute_uv=False)[..., 0]
    bound = jax.jit(norms.spectral_bound)(jnp.asarray(w, jnp.float32))
    assert bound.shape == largest.shape
    assert np.all(bound >= largest * (1 - 1e-5)) and np.all(
        bound <= largest * min(shape[-2:]) ** (1 / 512) * (1 + 1e-5)
    )


def test_spectral_bound_of_rank_one_and_of_zero():
    w = jnp.asarray(np.outer([1.0, 2.0, 2.0], [3.0, 4.0]), jnp.float32)
    np.testing.assert_allclose(norms.spectral_bound(w), 15, rtol=1e-5)
    value, grad = jax.value_and_grad(norms.spectral_bound)(jnp.zeros((3, 2)))
    assert value < 1e-15 and np.all(np.isfinite(grad))
    np.testing.assert_allclose(jax.grad(norms.spectral_bound)(w), w / 15, rtol=1e-4)  # u v^T


@pytest.mark.parametrize(
    ("p", "q", "closed"),
    [
        (
            1,
            1,
            lambda w: np.abs(w).sum(1).max(),
        ),  # kernels act as x @ w: a row is the image of a unit vector
        (np.inf, np.inf, lambda w: np.abs(w).sum(0).max()),
        (1, 2, lambda w: np.linalg.norm(w, axis=1).max()),
        (1, np.inf, lambda w: np.abs(w).max()),
        (2, np.inf, lambda w: np.linalg.norm(w, axis=0).max()),
        (1.5, np.inf, lambda w: np.linalg.norm(w, 3, axis=0).max()),
    ],
)
def test_induced_norms_with_a_closed_form(p, q, closed, x64):
    w = kernel()
    np.testing.assert_allclose(norms.induced_norm(jnp.asarray(w), p, q), closed(w), rtol=1e-12)


@pytest.mark.parametrize(
    ("p", "q"), [(1.5, 3.0), (3.0, 1.5), (np.inf, 2), (np.inf, 1), (2, 1), (2.5, 2.5)], ids=str
)
def test_induced_norms_by_power_iteration(p, q, x64):
    """Against the largest of |x w|_q / |x|_p over 2e5 directions, signs included: never below, and
    rarely far above."""
    w, rng = kernel((3, 4)), np.random.default_rng(1)
    x = np.concatenate(
        [rng.normal(size=(200_000, 3)), np.stack(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, 8).T]
    )
    searched = np.max(np.linalg.norm(x @ w, q, axis=1) / np.linalg.norm(x, p, axis=1))
    found = float(jax.jit(norms.induced_norm, static_argnums=(1, 2))(jnp.asarray(w), p, q))
    assert searched * (1 - 1e-9) <= found <= searched * 1.001


def test_induced_norm_of_two_near_its_limits(x64):
    """The iteration for p = q = 2.0001 meets the singular value, from below its bound."""
    w = kernel()
    found = jax.jit(norms.induced_norm, static_argnums=(1, 2))(jnp.asarray(w), 2 + 1e-9, 2 + 1e-9)
    np.testing.assert_allclose(found, np.linalg.svd(w, compute_uv=False)[0], rtol=1e-6)


def conv_matrix(w, size):
    """The convolution with zeros around the image as a matrix, from its action on unit images."""
    units = np.eye(size[0] * size[1] * w.shape[2]).reshape(-1, *size, w.shape[2])
    out = jax.lax.conv_general_dilated(
        jnp.asarray(units),
        jnp.asarray(w),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return np.asarray(out).reshape(len(units), -1)


@pytest.mark.parametrize(
    ("shape", "size", "slack"),
    [((3, 3, 2, 3), (6, 5), 1.3), ((1, 1, 3, 2), (4, 4), 1.02), ((5, 3, 1, 2), (4, 6), 1.5)],
    ids=str,
)
def test_conv_bound_is_certified(shape, size, slack, x64):
    """Above the largest singular value of the convolution on images of this size, by less than the
    torus allows."""
    w = kernel(shape)
    largest = np.linalg.svd(conv_matrix(w, size), compute_uv=False)[0]
    bound = float(jax.jit(norms.conv_bound, static_argnums=1)(jnp.asarray(w), size))
    assert largest * (1 - 1e-12) <= bound <= slack * largest


def test_conv_bound_is_reached_on_wide_images(x64):
    """A kernel of equal entries k on a large image: its norm tends to their sum."""
    w = jnp.ones((3, 3, 1, 1))
    assert (
        8.8
        < np.linalg.svd(conv_matrix(w, (24, 24)), compute_uv=False)[0]
        < norms.conv_bound(w, (24, 24))
        < 9.1
    )


def test_lip_swish_is_one_lipschitz(x64):
    for beta in (0.1, 1.0, 7.0):
        x = jnp.linspace(-20, 20, 100_001) / beta
        slopes = jax.vmap(jax.grad(lambda x, beta=beta: nets.lip_swish(x, beta)))(x)
        assert 0.999 < jnp.max(slopes) <= 1 and jnp.min(slopes) > -0.1


NETS = {
    "mlp": (nets.LipschitzMLP((8, 8), coeff=0.8), (3,)),
    "mlp of elu": (nets.LipschitzMLP((8,), coeff=0.8, activation=nn.elu), (3,)),
    "conv": (nets.LipschitzConv((4, 4), (3, 1, 3), coeff=0.8), (4, 3, 2)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_constant_holds_for_all_params(name, scale, x64):
    """Largest singular value of the Jacobian at points near and far."""
    net, event = NETS[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(
        np.concatenate([rng.normal(size=(4, *event)), 10 * rng.normal(size=(4, *event))])
    )
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: scale * rng.normal(size=p.shape), shapes)

    @jax.jit
    def jacobians(params):
        weights = net.apply({"params": params}, x, method=net.weights)
        return jax.vmap(jax.jacrev(lambda x: net.run(weights, x[None])[0].reshape(-1)))(x)

    largest = np.linalg.svd(jacobians(params).reshape(8, -1, x[0].size), compute_uv=False)[:, 0]
    assert 0 < np.max(largest) <= 0.8 + 1e-12


def test_the_constant_is_reached():
    """A line through three layers of one unit; coeff / 1.0 for large kernels, their own product for
    small ones."""
    net, x = nets.LipschitzMLP((1, 1), coeff=0.8, activation=lambda h: h), jnp.ones((1, 1))
    params = net.init(jax.random.key(0), x)["params"]
    for value, expected in ((5.0, 0.8), (-2.0, -0.8), (0.5, 0.125)):
        filled = {
            name: jnp.full_like(p, value) for name, p in params.items() if name.startswith("kernel")
        }
        slope = net.apply({"params": params | filled}, x) - net.apply(
            {"params": params | filled}, 0 * x
        )
        np.testing.assert_allclose(slope, [[expected]], rtol=1e-5)


def test_mixed_norms_bound_the_net_in_its_own_norm(x64):
    net = nets.LipschitzMLP((8, 8), coeff=0.8, orders=(np.inf, 1.5, 3, np.inf), activation=nn.tanh)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 3)))
    params = jax.tree.map(
        lambda p: rng.normal(size=p.shape), jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    )
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda x: net.apply({"params": params}, x[None])[0])))(x)
    assert np.max(np.abs(jacobian).sum(-1)) <= 0.8


def test_cond_shifts_without_a_bound(x64):
    net = nets.LipschitzMLP((8,), coeff=0.8)
    x, cond = jnp.ones((2, 3)), jnp.asarray([[0.0, 1.0], [100.0, -100.0]])
    params = net.init(jax.random.key(0), x, cond)["params"]
    params["kernel_1"] = jax.random.normal(jax.random.key(1), (8, 3))
    out = net.apply({"params": params}, x, cond)
    assert np.max(np.abs(out[1] - out[0])) > 1
    params["cond"] = jnp.zeros_like(params["cond"])
    alone = {name: p for name, p in params.items() if name != "cond"}
    np.testing.assert_array_equal(
        net.apply({"params": params}, x, cond), net.apply({"params": alone}, x)
    )
    with pytest.raises(ValueError, match="LipschitzMLP: expected cond as at init, got None"):
        apply_linen(net, params, x)
    with pytest.raises(
        ValueError, match='do not fit its params: Could not find parameter named "cond"'
    ):
        apply_linen(net, alone, x, cond)


def test_the_constant_holds_after_training():
    """By numpy's SVD of every scaled kernel, c^(1/layers) each, after steps large enough to press
    against the bound."""
    flow = flows.residual_flow((2,), depth=2, hidden=(16, 16), coeff=0.9)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)) ** 3, jnp.float32)
    params = flow.init(jax.random.key(0), x)
    optimizer = optax.adam(0.05)
    loss = losses.nll(flow)

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            value, grads = jax.value_and_grad(lambda p: loss(p, key, {"x": x})[0])(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 40)
        )

    (params, _), values = run(params)
    assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.1
    net = nets.LipschitzMLP((16, 16), coeff=0.9)
    stacked = params["bijector"]["0"]["stacked"]["1"]
    raw_norms = []
    for i in range(2):
        layer = jax.tree.map(lambda p, i=i: p[i], stacked)
        for j, (w, _, _) in enumerate(net.apply({"params": layer}, x, method=net.weights)):
            assert np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)[0] <= 0.9 ** (
                1 / 3
            ) * (1 + 1e-5)
            raw_norms.append(np.linalg.svd(layer[f"kernel_{j}"], compute_uv=False)[0])
    assert max(raw_norms) > 1.5  # the bounds were at work


def test_bfloat16_compute_keeps_float32_results():
    net = nets.LipschitzMLP((8,), dtype=jnp.bfloat16)
    x = jnp.ones((2, 3))
    params = net.init(jax.random.key(0), x)
    assert net.apply(params, x).dtype == jnp.float32
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


def test_bad_options_are_errors():
    for make, message in (
        (lambda: nets.LipschitzMLP(()), "at least one hidden layer"),
        (lambda: nets.LipschitzMLP((4,), orders=(2, 2)), "expected 3 orders"),
        (lambda: nets.LipschitzMLP((4,), orders=(2, 2, 1)), "the last equal to the first"),
        (
            lambda: nets.LipschitzMLP((4,), orders=(0.5, 2, 0.5)),
            "orders of norms from 1 to inf, got 0.5",
        ),
        (lambda: nets.LipschitzConv((4,), (3,)), "expected 2 odd kernel sides"),
        (lambda: nets.LipschitzConv((4,), (3, 2)), "expected 2 odd kernel sides"),
        (
            lambda: norms.spectral_bound(jnp.ones((2, 2)), 0),
            "steps to be a whole number of at least 1, got 0",
        ),
        (
            lambda: nets.LipschitzMLP((4,)).init(jax.random.key(0), jnp.ones((2, 3, 1))),
            r"shape \[b, d\], got \[2, 3, 1\]",
        ),
        (
            lambda: nets.LipschitzConv((4,), (3, 3)).init(jax.random.key(0), jnp.ones((2, 3))),
            r"\[b, H, W, C\], got \[2, 3\]",
        ),
        (
            lambda: nets.LipschitzMLP((4,)).init(
                jax.random.key(0), jnp.ones((2, 3)), jnp.ones((3, 1))
            ),
            "lead with 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
