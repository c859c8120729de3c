"""Causal blocks: triangular, sampled alike by every sampler, guided as the papers say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import guidance, nets

B, N, D = 4, 6, 2
NULL = 3


def net(**options):
    return nets.CausalTransformer(width=8, num_layers=2, num_heads=2, num_classes=NULL, **options)


def drawn(bijector, scale=0.4, dtype=np.float32):
    """(params, z, labels)"""
    rng = np.random.default_rng(3)
    z, labels = jnp.asarray(rng.normal(size=(B, N, D)), dtype), jnp.arange(B) % 3
    shapes = jax.eval_shape(lambda: bijector.init(jax.random.key(0), z, labels))
    return (
        jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), dtype), shapes),
        z,
        labels,
    )


def test_the_jacobian_is_block_triangular_in_the_order_of_generation():
    order = np.array([4, 0, 5, 2, 1, 3])
    block = bj.causal_block(net(), order=order)
    params, z, labels = drawn(block)
    for apply in (block.forward, block.inverse):
        jacobian = jax.jit(jax.jacrev(lambda row, f=apply: f(params, row[None], labels[:1])[0][0]))(
            z[0]
        )
        jacobian = np.asarray(jacobian)[order][:, :, order]
        touched = np.any(jacobian != 0, axis=(1, 3))
        np.testing.assert_array_equal(touched, np.tri(N, dtype=bool))
        for i in range(N):
            assert np.all(jacobian[i, :, i] * (1 - np.eye(D)) == 0) and np.all(
                np.diag(jacobian[i, :, i]) > 0
            )


def test_zero_head_is_the_identity():
    block = bj.causal_block(net(), order=np.arange(N)[::-1])
    _, z, labels = drawn(block)
    params = block.init(jax.random.key(0), z, labels)
    for apply in (block.forward, block.inverse):
        y, log_det = apply(params, z, labels)
        np.testing.assert_array_equal(y, z)
        np.testing.assert_array_equal(log_det, 0)


GUIDES = {
    "plain": None,
    "labels": guidance.extrapolate(guidance.linear_ramp(1.5), null=NULL),
    "temperature": guidance.extrapolate(0.7, temperature=1.5),
    "scores": guidance.score_sum(1.5, null=NULL),
}
SAMPLERS = {
    "uncached": bj.decoding.uncached(),
    "blocks of 1": bj.decoding.jacobi(1),
    "blocks of 4": bj.decoding.jacobi(4, tol=1e-6),  # does not divide 6
    "one block": bj.decoding.jacobi(16, tol=1e-6),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_every_sampler_gives_the_cached_values(guide):
    """And the parallel inverse leads back. 1e-5 for samplers of tolerance 1e-6."""
    make = lambda s: bj.causal_block(net(), sampler=s, guide=GUIDES[guide])  # noqa: E731
    params, z, labels = drawn(make(bj.decoding.cached()))

    @jax.jit
    def run(params, z):
        x, log_det = make(bj.decoding.cached()).forward(params, z, labels)
        others = {name: make(s).forward(params, z, labels) for name, s in SAMPLERS.items()}
        return x, log_det, others, make(bj.decoding.cached()).inverse(params, x, labels)

    x, log_det, others, (z_again, back) = run(params, z)
    assert np.abs(x - z).max() > 0.5
    for name, (y, other_log_det) in others.items():
        np.testing.assert_allclose(y, x, atol=1e-5, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(other_log_det, log_det, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(z_again, z, atol=1e-4)
    np.testing.assert_allclose(back, -log_det, atol=1e-4)


def test_jacobi_reports_its_passes_and_implicit_gradients_are_those_of_the_cached_scan(x64):
    block = bj.causal_block(net())
    params, z, labels = drawn(block, dtype=np.float64)
    by_jacobi = bj.causal_block(net(), sampler=bj.decoding.jacobi(6, tol=1e-12))

    def objective(b):
        def f(params, z):
            x, log_det = b.forward(params, z, labels)
            return jnp.sum(jnp.sin(x)) + jnp.sum(log_det)

        return jax.jit(jax.grad(f, argnums=(0, 1)))(params, z)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9, rtol=1e-9),
        objective(by_jacobi),
        objective(block),
    )


def linear_predict(args, x, cache, first):
    """mean_i = a x_{i-1}, no cache: passes and residuals in closed form. A block starts from the
    token before it."""
    before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))) if cache is None else x
    before = jnp.where((first + jnp.arange(x.shape[1]) == 0)[None, :, None], 0, before)
    return args * before, jnp.zeros_like(x), cache


def test_jacobi_counts_passes_measures_residuals_and_marks_rows():
    z = jnp.ones((2, 8, 1))
    sampler = bj.decoding.jacobi(4, tol=1e-7)
    chain = jax.jit(lambda a, z: sampler(linear_predict, a, jnp.zeros(()), z))
    geometric = chain(jnp.asarray(0.5), z)
    np.testing.assert_allclose(geometric.x[0, :, 0], 2 - 0.5 ** np.arange(8), rtol=1e-6)
    # each block of 4 needs its 4 passes; the parallel pass over all tokens confirms
    assert (
        geometric.passes == 4 + 4 + 1
        and np.all(geometric.converged)
        and np.all(geometric.residual <= 1e-5)
    )
    # without dependence one pass solves a block and a second... sees no change: z is already the
    # solution
    assert chain(jnp.asarray(0.0), z).passes == 1 + 1 + 1
    lost = chain(jnp.asarray(0.5), z.at[1, 2].set(jnp.inf))
    assert list(lost.converged) == [True, False]
    assert np.all(np.isnan(lost.x[1])) and np.all(np.isfinite(lost.x[0]))


def test_weak_dependence_takes_few_passes():
    """x_i = 1 + a x_{i-1}: the change after k passes is a^k, so 1e-5 takes about log(1e-5) /
    log(a), not n."""
    z = jnp.ones((2, 64, 1))
    found = jax.jit(
        lambda z: bj.decoding.jacobi(64, tol=1e-5)(
            linear_predict, jnp.asarray(0.1), jnp.zeros(()), z
        )
    )(z)
    assert found.passes <= 8


@pytest.mark.parametrize("form", [guidance.extrapolate, guidance.score_sum])
def test_weight_zero_is_the_plain_flow_and_a_net_without_labels_cannot_be_guided(form):
    plain = bj.causal_block(net())
    params, z, labels = drawn(plain)
    none = bj.causal_block(net(), guide=form(0.0, null=NULL))
    some = bj.causal_block(net(), guide=form(2.0, null=NULL))
    table = params["embed"]["cond_0"]["embedding"]
    deaf = {**params, "embed": {"cond_0": {"embedding": 0 * table}}}

    @jax.jit
    def run(params, deaf):
        p = lambda b, params: b.forward(params, z, labels)  # noqa: E731
        return p(plain, params), p(none, params), p(some, params), p(plain, deaf), p(some, deaf)

    x, unguided, guided, x_deaf, guided_deaf = run(params, deaf)
    # a few units of rounding: x reaches 8, and the two programs need not add in the same order
    np.testing.assert_allclose(unguided[0], x[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(guided_deaf[0], x_deaf[0], atol=1e-5)
    np.testing.assert_allclose(guided_deaf[1], x_deaf[1], atol=1e-5)
    assert np.all(np.abs(guided[0] - x[0]).max((1, 2)) > 1e-2)


def test_extrapolation_by_hand_token_by_token():
    """mean and log-scale of both passes from the network itself, weights that rise from 0 to 2."""
    guided = bj.causal_block(
        net(), guide=guidance.extrapolate(guidance.linear_ramp(2.0), null=NULL), max_log_scale=2.0
    )
    params, z, labels = drawn(guided)
    x, log_det = guided.inverse(params, z, labels)
    one, two = (
        net().apply({"params": params}, z, c) for c in (labels, jnp.full_like(labels, NULL))
    )
    w = (2.0 * np.arange(N) / (N - 1))[None, :, None]
    bound = lambda raw: 2.0 * np.tanh(np.asarray(raw) / 2.0)  # noqa: E731
    (m, a), (m_u, a_u) = ((np.asarray(r[..., :D]), bound(r[..., D:])) for r in (one, two))
    mean, log_scale = m + w * (m - m_u), a + w * (a - a_u)
    np.testing.assert_allclose(x, (z - mean) * np.exp(-log_scale), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(log_det, -log_scale.sum((1, 2)), atol=1e-5)


def test_score_sum_is_the_gaussian_of_the_summed_scores():
    """Where s <= s_u the score of the result is score + w (score - score_u), for any x; else s_u is
    raised to s."""
    rng = np.random.default_rng(0)
    mean, mean_u, log_scale = rng.normal(size=(3, 2, 4, 1))
    log_scale_u = log_scale + rng.normal(size=log_scale.shape)
    w = np.linspace(0, 3, 4)
    combine = guidance.score_sum(w, null=0).combine
    both = (
        (jnp.asarray(mean), jnp.asarray(log_scale)),
        (jnp.asarray(mean_u), jnp.asarray(log_scale_u)),
    )
    m, a = combine(*both, jnp.arange(4), 4)
    x = rng.normal(size=mean.shape)
    score = lambda m, a: -(x - m) * np.exp(-2 * a)  # noqa: E731
    floor = np.maximum(log_scale, log_scale_u)
    expected = score(mean, log_scale) + w[None, :, None] * (
        score(mean, log_scale) - score(mean_u, floor)
    )
    np.testing.assert_allclose(score(np.asarray(m), np.asarray(a)), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_computation_keeps_float32_scales_and_an_exact_log_det():
    """The log-det is that of the map that was applied: forward and inverse see other roundings of
    the network only."""
    block = bj.causal_block(net(dtype=jnp.bfloat16))
    params, z, labels = drawn(block)
    x, log_det = block.inverse(params, z, labels)
    jacobian = jax.vmap(jax.jacrev(lambda row, c: block.inverse(params, row[None], c[None])[0][0]))(
        z, labels
    )
    exact = np.linalg.slogdet(np.asarray(jacobian).reshape(B, N * D, N * D))[1]
    assert x.dtype == log_det.dtype == jnp.float32
    np.testing.assert_allclose(log_det, exact, atol=1e-4)
    again, _ = block.forward(params, x, labels)
    np.testing.assert_allclose(again, z, atol=0.1)  # bfloat16 of the two forms


def test_tokens_are_patches_row_by_row():
    x = jnp.arange(4 * 6 * 2.0).reshape(1, 4, 6, 2)
    block = bj.tokens((4, 6, 2), 2)
    z, log_det = block.inverse({}, x)
    assert z.shape == (1, 6, 8) and log_det == 0
    np.testing.assert_array_equal(z[0, 4], x[0, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(block.forward({}, z)[0], x)


def test_bad_input():
    block = bj.causal_block(net(), order=[1, 0])
    with pytest.raises(ValueError, match=r"\[b, 2, d\], got \[4, 6, 2\]"):
        block.inverse({}, jnp.ones((B, N, D)))
    with pytest.raises(ValueError, match="permutation"):
        bj.causal_block(net(), order=[0, 0])
    with pytest.raises(ValueError, match="max_log_scale > 0"):
        bj.causal_block(net(), max_log_scale=0)
    with pytest.raises(ValueError, match="patch_size that divides 4 and 6, got 3"):
        bj.tokens((4, 6, 1), 3)
    with pytest.raises(ValueError, match="block to be a whole number"):
        bj.decoding.jacobi(0)
    with pytest.raises(ValueError, match="tol > 0"):
        bj.decoding.jacobi(2, tol=0)
    with pytest.raises(ValueError, match="null or a temperature"):
        guidance.extrapolate(1.0)
    with pytest.raises(ValueError, match="temperature > 0"):
        guidance.score_sum(1.0, temperature=0)
    guided = bj.causal_block(net(), guide=guidance.extrapolate(1.0, null=NULL))
    params, z, _ = drawn(guided)
    with pytest.raises(ValueError, match="expected cond"):
        guided.inverse(params, z)
    wide = bj.causal_block(net(size=3))
    params, z, labels = drawn(wide)
    with pytest.raises(
        ValueError, match=r"expected 4 numbers a token from the net \(size=2\), got 6"
    ):
        wide.inverse(params, z, labels)


@pytest.mark.parametrize("guide", ["plain", "labels"])
def test_the_network_runs_once_in_a_pass_and_once_a_token(guide):
    """Counted in the jaxpr, where the loops over layers and tokens stand once; both passes of a
    guide are one of 2b rows."""
    block = bj.causal_block(net(), guide=GUIDES[guide])
    params, z, labels = drawn(block)
    count = lambda f, *args: str(jax.make_jaxpr(f)(*args)).count("dot_general[")  # noqa: E731
    once = count(lambda p, z: net().apply({"params": p}, z, labels), params, z)
    assert once == 8
    assert count(lambda p, z: block.inverse(p, z, labels), params, z) == once
    assert count(lambda p, z: block.forward(p, z, labels), params, z) == once
