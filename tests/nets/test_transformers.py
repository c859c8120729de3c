"""CausalTransformer and ViT: causality, the cache, conditions, precision."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import nets
from jflow._core import linen
from jflow._core.linen import init_linen

B, N, D = 3, 5, 2
apply_linen = jax.jit(linen.apply_linen, static_argnums=0)  # op by op is a program each


def randomised(net, x, cond=None, scale=0.3):
    shapes = jax.eval_shape(partial(init_linen, net), jax.random.key(0), x, cond)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(p.dtype), shapes)


def data(dtype=np.float32):
    return np.random.default_rng(1).normal(size=(B, N, D)).astype(dtype)


@pytest.mark.parametrize("make", [nets.CausalTransformer, nets.TarFlowTransformer])
def test_output_i_depends_on_all_tokens_before_i_and_on_no_other(make):
    net, x = make(width=8, num_layers=2, num_heads=2), data()
    params = randomised(net, x)
    jacobian = jax.jit(jax.jacrev(lambda row: apply_linen(net, params, row[None])[0]))(
        x[0]
    )  # [n, 2 d, n, d]
    touched = np.any(np.asarray(jacobian) != 0, axis=(1, 3))
    np.testing.assert_array_equal(touched, np.tri(N, k=-1, dtype=bool))


@pytest.mark.parametrize("make", [nets.CausalTransformer, nets.TarFlowTransformer])
@pytest.mark.parametrize("block", [1, 2, 5])
def test_steps_with_a_cache_are_the_parallel_pass(block, make):
    """Float32; the sums of a softmax come in another order, hence 1e-5."""
    net, x = make(width=8, num_layers=2, num_heads=2, num_classes=3), data()
    labels, temperature = np.arange(B), np.linspace(0.5, 2.0, B, dtype=np.float32)
    params = randomised(net, x, labels)

    @jax.jit
    def run(x):
        whole = apply_linen(net, params, x, labels, temperature)
        cache, parts = net.empty_cache(x, B), []
        before = jnp.concatenate(
            [jnp.full_like(x[:, :1], 7.0), x[:, :-1]], axis=1
        )  # 7: nobody reads what precedes 0
        for first in range(0, N, block):
            tokens = before[:, first : first + block]
            raw, cache = apply_linen(net, params, tokens, labels, temperature, cache, first)
            parts.append(raw)
        return whole, jnp.concatenate(parts, axis=1)

    whole, parts = run(x)
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert np.abs(whole).max() > 0.5


def test_temperature_one_is_none_and_another_changes_rows():
    net, x = nets.CausalTransformer(width=8, num_layers=1, num_heads=2), data()
    params = randomised(net, x, scale=0.5)
    plain, given = (
        np.asarray(apply_linen(net, params, x, None, t)) for t in (None, np.float32([1, 1, 3]))
    )
    np.testing.assert_allclose(given[:2], plain[:2], atol=1e-5)
    assert np.all(np.abs(given[2, 1:] - plain[2, 1:]).max(-1) > 1e-3)  # slot 0 sees one key, itself
    np.testing.assert_allclose(given[2, 0], plain[2, 0], atol=1e-5)


@pytest.mark.parametrize("make", [nets.CausalTransformer, nets.ViT])
def test_conditions(make):
    """None is the null label, a zero vector is no vector, and each changes what it should."""
    x = data()
    net = make(width=8, num_layers=1, num_heads=2, num_classes=3)
    labels = np.asarray([0, 1, 3])
    params = randomised(net, x, labels)
    with_labels, without = (np.asarray(apply_linen(net, params, x, c)) for c in (labels, None))
    np.testing.assert_allclose(with_labels[2], without[2], atol=1e-6)
    assert np.all(np.abs(with_labels[:2] - without[:2]).max((1, 2)) > 1e-3)

    net, vector = make(width=8, num_layers=1, num_heads=2), np.ones((B, 4), np.float32)
    params = randomised(net, x, vector)
    plain = {name: p for name, p in params.items() if name != "embed"}
    without, of_zeros, of_ones = jax.device_get(
        [apply_linen(net, plain, x), *(apply_linen(net, params, x, k * vector) for k in (0, 1))]
    )
    np.testing.assert_allclose(of_zeros, without, atol=1e-6)
    assert np.abs(of_ones - without).max() > 1e-3
    with pytest.raises(ValueError, match="num_classes"):
        randomised(net, x, labels)
    with pytest.raises(ValueError, match="lead with 3 rows"):
        apply_linen(net, params, x, vector[:2])


@pytest.mark.parametrize("make", [nets.CausalTransformer, nets.ViT])
def test_layers_differ_at_init_and_remat_changes_nothing(make):
    x = data()
    net = make(width=8, num_layers=2, num_heads=2)
    blocks = jax.jit(lambda key: init_linen(net, key, x)["blocks"])(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(blocks)):
        assert leaf.shape[0] == 2
        if "kernel" in jax.tree_util.keystr(path):
            assert np.any(leaf[0] != leaf[1])
    params = randomised(net, x)
    grads = [
        jax.jit(jax.grad(lambda p, n=n: jnp.sum(jnp.sin(apply_linen(n, p, x)))))(params)
        for n in (net, make(width=8, num_layers=2, num_heads=2, remat=True))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *grads)


def test_bfloat16_computes_with_float32_output_and_params():
    net, x = nets.CausalTransformer(width=8, num_layers=2, num_heads=2, dtype=jnp.bfloat16), data()
    params = randomised(net, x)
    raw = apply_linen(net, params, x)
    exact = apply_linen(nets.CausalTransformer(width=8, num_layers=2, num_heads=2), params, x)
    assert raw.dtype == jnp.float32 and net.empty_cache(x, B)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(raw, exact, atol=0.1)  # 8 bits of mantissa, values of order one
    assert np.any(raw != exact)


@pytest.mark.parametrize("make", [nets.CausalTransformer, nets.ViT])
def test_bad_input(make):
    with pytest.raises(ValueError, match="divisible by num_heads=3, got 8"):
        make(width=8, num_heads=3)
    with pytest.raises(ValueError, match="layers to be a whole number of at least 1, got 0"):
        make(num_layers=0)
    net = make(width=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"shape \[b, n, d\], got \[3, 5\]"):
        randomised(net, data()[..., 0])
    params = randomised(net, data())
    longer = np.concatenate([data(), data()], axis=1)
    with pytest.raises(ValueError, match="do not fit|expected at most 5 tokens"):
        apply_linen(net, params, longer)


def test_the_formulas_in_numpy(x64):
    """Both networks written out for one row, in float64: the causal one shifted, masked, with a
    temperature."""
    erf = np.vectorize(math.erf)

    def dense(p, h):
        return h @ p["kernel"] + p["bias"]

    def norm(p, h):
        h = h - h.mean(-1, keepdims=True)
        return h / np.sqrt(h.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def gelu(h):
        return h * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))

    assert (
        abs(gelu(1.0) - 0.5 * (1 + erf(1 / np.sqrt(2)))) < 1e-3
    )  # the tanh form is near the exact one

    def attention(q, k, v, seen, temperature):
        scores = np.where(seen, q @ k.T / np.sqrt(q.shape[-1]) / temperature, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ v

    def transformer(p, h, seen, temperature, qkv, out):
        h = dense(p["tokens"], h) + p["positions"]
        for i in range(2):
            b = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
            y = dense(qkv(b), norm(b["LayerNorm_0"], h)).reshape(N, 3, 2, 4)
            parts = [
                attention(*y[:, :, head].swapaxes(0, 1), seen, temperature) for head in range(2)
            ]
            h = h + dense(out(b), np.concatenate(parts, -1))
            h = h + dense(b["leave"], gelu(dense(b["in"], norm(b["LayerNorm_1"], h))))
        return norm(p["norm"], h)

    x = data(np.float64)
    net = nets.CausalTransformer(width=8, num_layers=2, num_heads=2)
    params = jax.tree.map(np.asarray, randomised(net, x))
    before = np.concatenate([np.zeros((1, D)), np.asarray(x[0, :-1])])
    h = transformer(
        params, before, np.tri(N, dtype=bool), 1.7, lambda b: b["qkv"], lambda b: b["out"]
    )
    got = jax.jit(lambda x: apply_linen(net, params, x, None, jnp.full((B,), 1.7)))(x)
    np.testing.assert_allclose(got[0], dense(params["head"], h), atol=1e-10)

    net = nets.ViT(width=8, num_layers=2, num_heads=2)
    params = jax.tree.map(np.asarray, randomised(net, x))
    part = lambda name: lambda b: b["attention"][name]  # noqa: E731
    h = transformer(params, np.asarray(x[0]), np.ones((N, N), bool), 1.0, part("qkv"), part("out"))
    np.testing.assert_allclose(jax.jit(lambda x: apply_linen(net, params, x))(x)[0], h, atol=1e-10)
