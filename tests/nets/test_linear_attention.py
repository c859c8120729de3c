"""Attention that is no softmax over all keys: conserved sums, causal forms, masks, cost."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import nets

B, N, HEADS, SIZE = 2, 8, 2, 4
FORMS = {
    "flow": nets.flow_attention(),
    "causal flow": nets.flow_attention(causal=True, block=3),
    "sinkhorn": nets.sinkhorn_attention(5),
    "transnormer": nets.transnormer_attention(),
    "causal transnormer": nets.transnormer_attention(causal=True, decay=0.9, block=3),
    "galerkin": nets.galerkin_attention,
    "fourier": nets.fourier_attention,
    "hybrid": nets.hybrid_attention(4, decay=0.8),
}
LINEAR = ("flow", "transnormer", "galerkin", "fourier")
KEPT = np.arange(N) < 6  # the last two tokens are padding


def numbers(seed=0, n=N):
    return np.random.default_rng(seed).normal(size=(3, B, n, HEADS, SIZE))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def elu1(x):
    return np.where(x > 0, x + 1, np.exp(x))


def softmax(x, axis=-1):
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def layer(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def flow(q, k, v):
    """Of one head: q, k, v [n, size]; also the sums that are conserved."""
    q, k = sigmoid(q), sigmoid(k)
    n, m = len(q), len(k)
    weights = q @ k.T
    into, out = weights.sum(1), weights.sum(0)
    taken, given = (weights / out).sum(1), (weights / into[:, None]).sum(0)
    y = weights / into[:, None] @ (m * softmax(given)[:, None] * v)
    return sigmoid(taken * n / m)[:, None] * y, taken.sum() - m, given.sum() - n


def causal_flow(q, k, v):
    """A token at a time, each sum over what came before over the number of its terms."""
    q, k = sigmoid(q), sigmoid(k)
    into = [q[i] @ k[: i + 1].sum(0) for i in range(N)]
    out = [k[i] @ q[: i + 1].sum(0) for i in range(N)]
    shares = lambda b, c, i: sum(b[j] * (j + 1) / c[j] for j in range(i + 1)) / (i + 1)  # noqa: E731
    taken = np.array([q[i] @ shares(k, out, i) for i in range(N)])
    given = np.array([k[i] @ shares(q, into, i) for i in range(N)])
    y = np.zeros_like(v)
    for i in range(N):
        for j in range(i + 1):
            share = (j + 1) * np.exp(given[j]) / np.exp(given[: j + 1]).sum()
            y[i] += sigmoid(taken[i]) * (q[i] @ k[j]) / into[i] * share * v[j]
    return y


def sinkhorn(q, k, v, steps):
    weights = np.exp(q @ k.T / np.sqrt(SIZE))
    for step in range(steps):
        weights = weights / weights.sum(1 - step % 2, keepdims=True)
    return weights @ v, weights


def hybrid(q, k, v, chunk, decay):
    """As a recurrence over tokens of the state, read a chunk late."""
    y, state = np.zeros_like(v), np.zeros((SIZE, SIZE))
    for first in range(0, N, chunk):
        part = slice(first, first + chunk)
        y[part] = softmax(q[part] @ k[part].T / np.sqrt(SIZE)) @ v[part]
        y[part] += q[part] @ state / np.sqrt(SIZE)
        state = decay * state + sum(np.outer(k[j], v[j]) for j in range(first, first + chunk))
    return y


BY_HAND = {
    "flow": lambda q, k, v: flow(q, k, v)[0],
    "causal flow": causal_flow,
    "sinkhorn": lambda q, k, v: sinkhorn(q, k, v, 5)[0],
    "transnormer": lambda q, k, v: rms(elu1(q) @ elu1(k).T @ v),
    "causal transnormer": lambda q, k, v: rms(
        np.tril(0.9 ** np.subtract.outer(np.arange(N), np.arange(N))) * (elu1(q) @ elu1(k).T) @ v
    ),
    "galerkin": lambda q, k, v: q @ (layer(k).T @ layer(v)) / N,
    "fourier": lambda q, k, v: layer(q) @ layer(k).T @ v / N,
    "hybrid": lambda q, k, v: hybrid(q, k, v, 4, 0.8),
}


@cache
def results(name):
    """As one program: the value, a tangent, a gradient, and values under changes of the inputs."""
    attention = FORMS[name]
    square = name not in ("transnormer", "galerkin", "fourier", "flow")

    @jax.jit
    def run(qkv, dqkv, padded):
        f = lambda qkv: attention(*qkv)  # noqa: E731
        value, tangent = jax.jvp(f, (qkv,), (dqkv,))
        (gradient,) = jax.vjp(f, qkv)[1](jnp.cos(value))
        mask = jnp.asarray(KEPT)[None]
        masked = attention(*qkv, mask=mask), attention(*padded, mask=mask)
        low = attention(*(x.astype(jnp.bfloat16) for x in qkv))
        last = attention(*qkv.at[:, :, -1].set(dqkv[:, :, -1]))  # the last token is another one
        cross = value if square else attention(qkv[0, :, :5], qkv[1], qkv[2])
        return {
            "value": value,
            "slopes": (jnp.vdot(tangent, jnp.cos(value)), jnp.vdot(gradient, dqkv)),
            "masked": masked,
            "low": low,
            "last": last,
            "cross": cross,
        }

    qkv, dqkv = numbers(0), numbers(1)
    padded = np.where(KEPT[:, None, None], qkv, 50.0)
    return jax.device_get(run(*(jnp.asarray(x, jnp.float32) for x in (qkv, dqkv, padded))))


every = pytest.mark.parametrize("name", FORMS)


@every
def test_the_formula_a_head_at_a_time(name):
    """In float64 numpy; what is left is rounding of float32, a few 1e-7 of sums of 8 terms."""
    q, k, v = numbers()
    value = results(name)["value"]
    for b, h in np.ndindex(B, HEADS):
        expected = BY_HAND[name](q[b, :, h], k[b, :, h], v[b, :, h])
        np.testing.assert_allclose(value[b, :, h], expected, atol=1e-5)


@every
def test_forward_mode_and_reverse_mode_agree(name):
    forward, reverse = results(name)["slopes"]
    np.testing.assert_allclose(forward, reverse, rtol=1e-4)
    assert abs(forward) > 1e-2


@every
def test_padding_changes_nothing_for_the_others(name):
    clean, padded = results(name)["masked"]
    np.testing.assert_allclose(padded[:, KEPT], clean[:, KEPT], atol=1e-6)
    if name in ("flow", "sinkhorn", "transnormer"):  # as if there were six tokens
        q, k, v = numbers()[:, :, KEPT]
        form = {**BY_HAND, "flow": lambda *args: flow(*args)[0]}[name]
        expected = form(q[0, :, 0], k[0, :, 0], v[0, :, 0])
        np.testing.assert_allclose(clean[0, KEPT, 0], expected, atol=1e-5)
    if not name.startswith("causal") and name != "hybrid":
        assert np.abs(results(name)["value"] - clean).max() > 1e-3


@every
def test_bfloat16_stays(name):
    """Inputs of 8 bits: a few percent of results of order one."""
    found = results(name)
    assert found["low"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found["low"].astype(np.float32), found["value"], atol=0.15)


def test_causal_forms_do_not_see_what_comes_later():
    for name in ("causal flow", "causal transnormer"):
        found = results(name)
        np.testing.assert_allclose(found["last"][:, :-1], found["value"][:, :-1], atol=1e-6)
    found = results("hybrid")  # causal over chunks: the last token is of the second
    np.testing.assert_allclose(found["last"][:, :4], found["value"][:, :4], atol=1e-6)
    for name in FORMS:
        assert np.abs(results(name)["last"] - results(name)["value"]).max() > 1e-3


def test_the_first_chunk_of_the_hybrid_is_softmax_attention():
    q, k, v = (jnp.asarray(x[:, :4], jnp.float32) for x in numbers())
    expected = nets.dot_product_attention(q, k, v)
    np.testing.assert_allclose(results("hybrid")["value"][:, :4], expected, atol=1e-6)


def test_a_decay_of_each_chunk_is_read():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in numbers())
    given = jnp.full((B, 2, HEADS), np.log(0.8))
    found = nets.hybrid_attention(4)(q, k, v, log_decay=given)
    np.testing.assert_allclose(found, results("hybrid")["value"], atol=1e-6)
    other = nets.hybrid_attention(2)(q, k, v, log_decay=jnp.full((B, 4, HEADS), -1e9))
    near = nets.hybrid_attention(2, decay=1e-12)(q, k, v)  # all but the chunk before is forgotten
    np.testing.assert_allclose(other, near, atol=1e-6)


def test_linear_forms_take_as_many_queries_as_they_are_given():
    for name in ("transnormer", "galerkin", "fourier"):
        found = results(name)
        np.testing.assert_allclose(found["cross"], found["value"][:, :5], atol=1e-6)
    q, k, v = numbers()
    expected = flow(q[0, :5, 0], k[0, :, 0], v[0, :, 0])[0]
    np.testing.assert_allclose(results("flow")["cross"][0, :, 0], expected, atol=1e-5)


def test_flow_is_conserved():
    """The formula that the network computes, by hand: sums are m and n to rounding of float64."""
    q, k, v = numbers()
    for rows in (N, 5):
        _, into, out = flow(q[0, :rows, 0], k[0, :, 0], v[0, :, 0])
        assert abs(into) < 1e-12 and abs(out) < 1e-12


def test_sinkhorn_rows_are_exact_and_columns_converge():
    """The weights themselves, as the attention of the identity matrix."""
    q, k, _ = (jnp.asarray(x[:, :SIZE], jnp.float32) for x in numbers())
    v = jnp.broadcast_to(jnp.eye(SIZE)[None, :, None], q.shape)
    weights = {steps: nets.sinkhorn_attention(steps)(q, k, v) for steps in (1, 21)}
    plain = nets.dot_product_attention(q, k, v)
    np.testing.assert_allclose(weights[1], plain, atol=1e-6)
    np.testing.assert_allclose(weights[21].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(weights[21].sum(1), 1, atol=1e-5)
    assert np.abs(plain.sum(1) - 1).max() > 0.1


def test_galerkin_is_an_integral():
    """Every token twice: the same result for each, where a sum would double."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in numbers())
    for attention in (nets.galerkin_attention, nets.fourier_attention):
        twice = attention(*(jnp.concatenate([x, x], axis=1) for x in (q, k, v)))
        np.testing.assert_allclose(twice[:, :N], attention(q, k, v), atol=1e-6)


def flops(attention, n):
    x = jax.ShapeDtypeStruct((1, n, 1, 16), jnp.float32)
    return jax.jit(attention).lower(x, x, x).cost_analysis()["flops"]


def test_cost_doubles_with_the_tokens():
    """Of the call itself: a scanned body would count once. Softmax is the check of the check; what
    does not scale with the tokens is a few numbers of a head."""
    for name in LINEAR:
        assert 1.95 < flops(FORMS[name], 512) / flops(FORMS[name], 256) < 2.01, name
    plain = nets.dot_product_attention
    assert flops(plain, 512) / flops(plain, 256) > 3.9


def test_bad_options_and_shapes_are_named():
    x = jnp.ones((B, N, HEADS, SIZE))
    for make, text in (
        (lambda: nets.sinkhorn_attention(4), "odd number of steps, got 4"),
        (lambda: nets.transnormer_attention(decay=0.5), "1 unless causal"),
        (lambda: nets.hybrid_attention(0), "chunk to be a whole number"),
        (lambda: nets.hybrid_attention(3)(x, x, x), "chunks of 3 tokens, got 8"),
        (lambda: nets.sinkhorn_attention()(x[:, :3], x, x), "as many queries as keys, got 3 and 8"),
        (lambda: nets.galerkin_attention(x, x, x, mask=jnp.ones((B, 3), bool)), r"\[2, 8\]"),
    ):
        with pytest.raises(ValueError, match=text):
            make()


@pytest.mark.parametrize("causal", [False, True])
def test_flow_attention_is_finite_without_tokens_and_with_late_large_keys(causal):
    """A row of padding alone, and a later key whose outflow is 200 times the first one's."""
    q = jnp.zeros((2, 4, 1, 2))
    k = jnp.zeros((2, 4, 1, 2)).at[:, 0].set(-12.0)
    mask = jnp.asarray([[True] * 4, [False] * 4])
    attention = nets.flow_attention(causal=causal)
    value, back = jax.vjp(lambda q, k, v: attention(q, k, v, mask=mask), q, k, k + 1)
    assert np.all(np.isfinite(value)) and not np.any(value[1])
    assert all(np.all(np.isfinite(x)) for x in back(jnp.ones_like(value)))
