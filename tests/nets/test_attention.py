"""Attention in its forms: one function, masks, memory, and the platforms that it lowers for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import nets

B, N, M, HEADS, SIZE = 2, 7, 9, 2, 4
FORMS = {
    "written out": nets.dot_product_attention,
    "chunked": nets.chunked_attention(block=4),  # divides neither 7 nor 9
    "chunked, one block": nets.chunked_attention(),
    "fused": nets.fused_attention(),
}
every_form = pytest.mark.parametrize("attention", FORMS.values(), ids=FORMS.keys())
ROW = np.arange(M) < 5  # the keys that the first row sees; the second sees none
MASK = jnp.asarray(np.stack([ROW, np.zeros(M, bool)]))


def draws(n, m, dtype=jnp.float32, count=3):
    rng = np.random.default_rng(0)
    sizes = (n, m, m) * (count // 3)
    return [jnp.asarray(rng.normal(size=(B, size, HEADS, SIZE)), dtype) for size in sizes]


def everything(attention):
    """Value, derivative along a tangent, and gradient along a cotangent, as one program."""

    @jax.jit
    def run(q, k, v, dq, dk, dv, mask):
        f = lambda *args: attention(*args, mask=mask)  # noqa: E731
        value, tangent = jax.jvp(f, (q, k, v), (dq, dk, dv))
        return value, tangent, jax.vjp(f, q, k, v)[1](jnp.cos(value))

    return run


def by_hand(q, k, v, seen):
    """The formula in float64, a query at a time; seen is [b, n, m]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen[b, i])
        if len(keys):
            weights = np.exp(k[b, keys, h] @ q[b, i, h] / np.sqrt(SIZE))
            out[b, i, h] = weights @ v[b, keys, h] / weights.sum()
    return out


@every_form
def test_all_forms_are_the_formula_in_value_and_derivatives(attention):
    args, causal = draws(N, M, count=6), jnp.tri(N, M, dtype=bool)
    for mask, seen in (
        (None, np.ones((B, N, M), bool)),
        (MASK, np.broadcast_to(MASK[:, None], (B, N, M))),
        (MASK[:1], np.broadcast_to(ROW, (B, N, M))),
        (causal[None, None], np.broadcast_to(causal, (B, N, M))),
    ):
        value, tangent, gradient = everything(attention)(*args, mask)
        expected = everything(nets.dot_product_attention)(*args, mask)
        np.testing.assert_allclose(value, by_hand(*args[:3], seen), atol=1e-5)  # float32 rounding
        np.testing.assert_allclose(tangent, expected[1], atol=2e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, expected[2]
        )


@pytest.mark.parametrize("form", ["written out", "chunked"])
def test_derivatives_are_differences(form):
    """In float64, which these two forms keep."""
    with jax.enable_x64(True):
        args = draws(N, M, jnp.float64, count=6)
        value, tangent, gradient = everything(FORMS[form])(*args, MASK)

        def moved(step):
            x = (a + step * d for a, d in zip(args[:3], args[3:], strict=True))
            return FORMS[form](*x, mask=MASK)

        np.testing.assert_allclose(tangent, (moved(1e-5) - moved(-1e-5)) / 2e-5, atol=1e-8)
        inner = sum(jnp.vdot(g, d) for g, d in zip(gradient, args[3:], strict=True))
        np.testing.assert_allclose(inner, jnp.vdot(jnp.cos(value), tangent), rtol=1e-12)


@every_form
def test_a_query_that_sees_no_key_gets_zeros(attention):
    """Also where what is not seen is huge."""
    q, k, v, *tangents = draws(N, M, count=6)
    k = jnp.where(MASK[..., None, None], k, 1e6)
    value, tangent, gradient = everything(attention)(q, k, v, *tangents, MASK)
    np.testing.assert_array_equal(value[1], 0)
    np.testing.assert_array_equal(tangent[1], 0)
    for g in gradient:
        assert np.isfinite(g).all() and not np.any(g[1])
    assert np.abs(value[0]).max() > 0.1


def test_causal_chunks_are_the_causal_mask():
    q, k, v = draws(N, N)
    mask = jnp.tri(N, dtype=bool)[None, None]
    expected = nets.dot_product_attention(q, k, v, mask=mask)
    found = nets.chunked_attention(block=3, causal=True)(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    keys = jnp.asarray(np.arange(N) != 0)[None]  # the first query sees nothing then
    expected = nets.dot_product_attention(q, k, v, mask=mask & keys[:, None, None])
    found = nets.chunked_attention(block=3, causal=True)(q, k, v, mask=keys)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(found[:, 0], 0)


@every_form
def test_bfloat16_stays_and_is_summed_in_float32(attention):
    q, k, v = draws(N, M, jnp.bfloat16)
    found = attention(q, k, v)
    expected = by_hand(q, k, v, np.ones((B, N, M), bool))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=2e-2)


def temporary(attention, tokens, derivative):
    x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v) ** 2)

    f = jax.grad(loss, (0, 1, 2)) if derivative else attention
    return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("derivative", [False, True], ids=["value", "gradient"])
def test_memory_of_chunks_is_linear_in_the_tokens(derivative):
    """Four times the tokens: at most four times the temporary memory, and of the written-out form
    about sixteen times."""
    chunked, plain = (
        [temporary(attention, tokens, derivative) for tokens in (1024, 4096)]
        for attention in (nets.chunked_attention(block=128), nets.dot_product_attention)
    )
    assert chunked[1] <= 4.2 * chunked[0]
    assert plain[1] > 12 * plain[0] and plain[1] > 20 * chunked[1]


def test_the_kernel_for_tpus_lowers_for_them():
    """Nothing runs here: 64 tokens are padded, 256 are not; with and without a mask."""

    def lowered(attention, tokens, mask=None):
        x = jax.ShapeDtypeStruct((B, tokens, HEADS, 64), jnp.bfloat16)
        loss = lambda *args: jnp.sum(attention(*args, mask=mask).astype(jnp.float32))  # noqa: E731
        f = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        return jax.export.export(f, platforms=["tpu"])(x, x, x).mlir_module()

    assert "tpu_custom_call" in lowered(nets.tpu_attention(), 256)
    assert "tpu_custom_call" in lowered(nets.tpu_attention(causal=True), 256)
    assert "tpu_custom_call" in lowered(nets.tpu_attention(), 64, jnp.ones((1, 64), bool))


def test_bad_masks_and_options_are_named():
    q, k, v = draws(N, M)
    expected = r"expected a bool mask \[2, 9\], or .* broadcasts to \[2, 2, 7, 9\], got "
    for attention in FORMS.values():
        with pytest.raises(ValueError, match=expected + r"bool of shape \[2, 7\]"):
            attention(q, k, v, mask=jnp.ones((B, N), bool))
        with pytest.raises(ValueError, match=expected + r"float32 of shape \[2, 9\]"):
            attention(q, k, v, mask=jnp.ones((B, M)))
        with pytest.raises(ValueError, match=expected + r"bool of shape \[2, 7, 9\]"):
            attention(q, k, v, mask=jnp.ones((B, N, M), bool))
    with pytest.raises(ValueError, match=r"tpu_attention: .*got bool of shape \[1, 1, 7, 9\]"):
        nets.tpu_attention()(q, k, v, mask=jnp.ones((1, 1, N, M), bool))
    with pytest.raises(ValueError, match="block"):
        nets.chunked_attention(0)
    with pytest.raises(ValueError, match="'xla', 'cudnn' or None, got 'cudn'"):
        nets.fused_attention("cudn")
