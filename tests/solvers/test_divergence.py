"""Estimates of the divergence against the Jacobian itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import solvers, types

D = 6
ESTIMATES = {
    "hutchinson": lambda noise: solvers.hutchinson(2, noise=noise),
    "hutch++": lambda noise: solvers.hutch_plus_plus(2, 1, noise=noise),
}


def bent(x):
    """A field with a full, lopsided Jacobian at every x [b, D]."""
    matrix = np.random.default_rng(0).normal(size=(D, D)) / 2
    return jnp.sin(x @ jnp.asarray(matrix, x.dtype)) * (1 + x**2) / 2


def rank_two(x):
    """v(x) in the span of two directions, so that the Jacobian has rank 2."""
    rng = np.random.default_rng(1)
    inwards, out = rng.normal(size=(D, 2)) / 2, rng.normal(size=(2, D))
    return jnp.sin(x @ jnp.asarray(inwards, x.dtype)) @ jnp.asarray(out, x.dtype)


def known(f, x):
    jacobian = jax.vmap(jax.jacfwd(lambda row: f(row[None])[0]))(x)
    return jnp.trace(jacobian, axis1=1, axis2=2), jnp.sum(jacobian**2, axis=(1, 2))


def evaluate(divergence, f, x, key=None):
    return jax.jit(lambda x, key: divergence.apply(f, x, divergence.draw(key, x)))(x, key)


def test_exact(x64):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, D)))
    v, div, norm = evaluate(solvers.exact_divergence(), bent, x)
    expected, expected_norm = known(bent, x)
    np.testing.assert_allclose(v, bent(x), rtol=1e-12)
    np.testing.assert_allclose(div, expected, atol=1e-12)  # float64
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-12)


@pytest.mark.parametrize(
    "noise", [jax.random.rademacher, jax.random.normal], ids=["rademacher", "normal"]
)
@pytest.mark.parametrize("name", ESTIMATES)
def test_the_mean_over_probes_is_the_divergence_and_the_norm(name, noise, x64):
    """Within 3 standard errors over 8000 draws, at two points."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, D)))
    draws = 8000
    _, div, norm = evaluate(
        ESTIMATES[name](noise), bent, jnp.repeat(x, draws, axis=0), jax.random.key(0)
    )
    for estimate, exact in zip((div, norm), known(bent, x), strict=True):
        estimate = np.asarray(estimate).reshape(2, draws)
        error = estimate.std(axis=1) / np.sqrt(draws)
        assert np.all(error > 1e-3)  # it is an estimate
        assert np.all(np.abs(estimate.mean(axis=1) - exact) < 3 * error)


def test_hutch_plus_plus_is_exact_where_the_sketch_spans_the_range(x64):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(7, D)))
    expected, _ = known(rank_two, x)
    for sketch in (
        2,
        4,
        D,
    ):  # of rank 2, so that two or more of the sketch's directions are arbitrary
        _, div, _ = evaluate(solvers.hutch_plus_plus(sketch, 1), rank_two, x, jax.random.key(1))
        np.testing.assert_allclose(div, expected, atol=1e-10)  # float64
    _, div, _ = evaluate(solvers.hutch_plus_plus(1), rank_two, x, jax.random.key(1))
    assert np.all(np.abs(div - expected) > 1e-6)
    _, div, norm = evaluate(solvers.hutch_plus_plus(D, 1), bent, x, jax.random.key(1))
    for found, exact in zip((div, norm), known(bent, x), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-10)


def test_hutch_plus_plus_varies_less_at_equal_cost(x64):
    """On a symmetric Jacobian of eigenvalues k^-2, with 18 forward derivatives each."""
    basis = np.linalg.qr(np.random.default_rng(5).normal(size=(40, 40)))[0]
    matrix = jnp.asarray(basis @ np.diag(np.arange(1, 41) ** -2.0) @ basis.T)
    x = jnp.zeros((1000, 40))

    def std(divergence):
        return float(jnp.std(evaluate(divergence, lambda x: x @ matrix, x, jax.random.key(2))[1]))

    # measured: 0.028 and 0.337, of a trace of 1.62
    assert std(solvers.hutch_plus_plus(6, 6)) < 0.2 * std(solvers.hutchinson(18))


def test_the_gradient_of_hutch_plus_plus_is_unbiased_and_finite(x64):
    """Its basis is not differentiated; at a velocity of zero the sketch has no rank at all."""
    x = jnp.asarray(np.random.default_rng(6).normal(size=(1, D)))
    matrix = jnp.asarray(np.random.default_rng(7).normal(size=(D, D)))
    divergence = solvers.hutch_plus_plus(2, 1)

    def mean(scale, x, key):
        def field(x):
            return scale * jnp.sin(x @ matrix) + scale**2 * bent(x)

        return jnp.sum(divergence.apply(field, x, divergence.draw(key, x))[1])

    keys = jax.random.split(jax.random.key(3), 4000)
    grads = jax.jit(jax.vmap(jax.grad(mean, (0, 1)), (None, None, 0)))(jnp.asarray(0.7), x, keys)
    exact = jax.grad(
        lambda scale, x: known(lambda x: scale * jnp.sin(x @ matrix) + scale**2 * bent(x), x)[0][0],
        (0, 1),
    )(jnp.asarray(0.7), x)
    for grad, expected in zip(grads, exact, strict=True):
        error = np.asarray(grad).std(axis=0) / np.sqrt(len(keys))
        # 7 numbers: 4 standard errors
        assert np.all(error > 0) and np.all(
            np.abs(np.asarray(grad).mean(axis=0) - expected) < 4 * error
        )
    for grad in jax.grad(mean, (0, 1))(jnp.asarray(0.0), x, keys[0]):
        assert np.all(np.isfinite(grad))


def test_one_solve_has_one_draw():
    """On a linear field the log-det is the estimate at its probes; along a solve they must not
    change."""
    matrix = jnp.asarray(np.random.default_rng(8).normal(size=(D, D)) / 3, jnp.float32)
    velocity = types.Velocity(None, lambda params, x, t, cond=None, *, key=None: x @ params.T)
    x, key, divergence = jnp.ones((3, D)), jax.random.key(4), solvers.hutch_plus_plus(2, 1)
    expected = evaluate(divergence, lambda x: x @ matrix.T, x, key)[1]
    for how in ({"method": 6}, {"method": solvers.adaptive(rtol=1e-4, atol=1e-4)}):
        _, log_det, info = solvers.sample_with_log_det(
            velocity, matrix, x, key=key, divergence=divergence, **how
        )
        np.testing.assert_allclose(log_det, expected, rtol=1e-4)
        assert np.all(info.evaluations < 300)


def test_errors():
    x = jnp.ones((2, D))
    for make, message in [
        (lambda: solvers.hutchinson(0), "hutchinson: expected probes .* at least 1, got 0"),
        (lambda: solvers.hutch_plus_plus(0), "expected sketch .* got 0"),
        (lambda: solvers.hutch_plus_plus(2, 1.5), "expected probes .* got 1.5"),
        (
            lambda: solvers.hutch_plus_plus(D + 1).draw(jax.random.key(0), x),
            "at most the event's 6 numbers, got 7",
        ),
        (lambda: solvers.hutch_plus_plus(2).draw(None, x), "hutch_plus_plus .*needs a key"),
        (lambda: solvers.hutchinson(2).draw(None, x), "hutchinson .*needs a key"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_an_exact_divergence_goes_through_the_columns_in_turns():
    """Of x A, beyond 64 numbers: trace and squared norm of A, their gradients, and the memory of a
    few of D columns."""
    size = 70
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    x = jax.random.normal(jax.random.key(1), (2, size))

    def both(matrix, x):
        v, trace, norm = solvers.exact_divergence().apply(lambda x: jnp.tanh(x) @ matrix, x, None)
        return jnp.sum(trace), (v, trace, norm)

    slope, (v, trace, norm) = jax.jit(jax.grad(both, has_aux=True))(matrix, x)
    steep = 1 - jnp.tanh(x) ** 2
    np.testing.assert_allclose(v, jnp.tanh(x) @ matrix, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(trace, steep @ jnp.diag(matrix), rtol=1e-4)
    np.testing.assert_allclose(norm, steep**2 @ jnp.sum(matrix**2, axis=1), rtol=1e-4)
    np.testing.assert_allclose(slope, jnp.diag(jnp.sum(steep, axis=0)), atol=1e-5)


def test_an_exact_divergence_keeps_a_few_columns():
    """Of an event of 512 numbers, all of whose columns are 2 MiB a row, for the trace and for its
    gradient."""
    x = jax.ShapeDtypeStruct((2, 512), jnp.float32)
    trace = lambda p, x: (  # noqa: E731
        solvers.exact_divergence().apply(lambda x: jnp.tanh(p * x), x, None)[1].sum()
    )
    for f in (trace, jax.grad(trace)):
        compiled = jax.jit(f).lower(jax.ShapeDtypeStruct((), jnp.float32), x).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20
