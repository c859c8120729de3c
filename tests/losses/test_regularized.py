"""Likelihood, kinetic energy and Jacobian norm of linear fields, whose paths are matrix
exponentials."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

from jflow import distributions, flows, losses, solvers, types

MATRIX = np.asarray([[0.3, -0.8, 0.1], [0.5, -0.4, 0.2], [-0.3, 0.6, 0.5]])
LINEAR = types.Velocity(
    lambda key, x, t, cond=None: jnp.asarray(MATRIX, x.dtype),
    lambda params, x, t, cond=None, *, key=None: x @ params.T,
)
BASE = distributions.normal((3,))
PARAMS = {"velocity": MATRIX, "base": {}}


def test_closed_form_on_a_linear_field(x64):
    """x_t = expm((t - 1) A) x_1: int |A x_t|^2 dt by quadrature, int |A|_F^2 dt = |A|_F^2, log-det
    tr A."""
    x = np.random.default_rng(0).normal(size=(4, 3))
    weight = np.asarray([1.0, 2.0, 0.5, 0.0])
    params = jax.tree.map(jnp.asarray, PARAMS)

    def speed(t):
        return np.sum((x @ (MATRIX @ scipy.linalg.expm((t - 1) * MATRIX)).T) ** 2, axis=1)

    kinetic = scipy.integrate.quad_vec(speed, 0, 1, epsabs=1e-12)[0]
    z = x @ scipy.linalg.expm(-MATRIX).T
    nll = 0.5 * np.sum(z**2 + np.log(2 * np.pi), axis=1) + np.trace(MATRIX)
    loss = losses.regularized_nll(LINEAR, BASE, kinetic=0.3, jacobian=0.2, method=32)
    value, metrics = jax.jit(
        lambda p: loss(p, None, {"x": jnp.asarray(x), "weight": jnp.asarray(weight)})
    )(params)
    expected = {"nll": nll, "kinetic": kinetic, "jacobian": np.full(4, np.sum(MATRIX**2))}
    expected = {what: np.average(rows, weights=weight) for what, rows in expected.items()}
    for what, number in expected.items():
        # 32 steps of order 5
        np.testing.assert_allclose(metrics[what], number, rtol=1e-7, err_msg=what)
    total = expected["nll"] + 0.3 * expected["kinetic"] + 0.2 * expected["jacobian"]
    np.testing.assert_allclose(value, total, rtol=1e-7)


def test_without_factors_it_is_the_likelihood_of_the_flow(x64):
    x, params = (
        jnp.asarray(np.random.default_rng(1).normal(size=(5, 3))),
        jax.tree.map(jnp.asarray, PARAMS),
    )
    for how in ({"method": 6, "t1": 0.7}, {"method": solvers.on_grid(np.linspace(0, 0.5, 5))}):
        loss = losses.regularized_nll(LINEAR, BASE, kinetic=0, jacobian=0, **how)
        expected = losses.nll(flows.cnf(LINEAR, BASE, **how))
        value, known = jax.jit(
            lambda p: (loss(p, None, {"x": x})[0], expected(p, None, {"x": x})[0])  # noqa: B023
        )(params)
        np.testing.assert_allclose(value, known, rtol=1e-12)


def test_estimates_of_the_norm(x64):
    """The mean over probes is |A|_F^2, within 4 standard errors over 4000 rows, from both
    estimators."""
    x, params = jnp.zeros((4000, 3)), jax.tree.map(jnp.asarray, PARAMS)
    for divergence in (solvers.hutchinson(1, noise=jax.random.normal), solvers.hutch_plus_plus(1)):
        loss = losses.regularized_nll(LINEAR, BASE, divergence=divergence, method=1)
        jacobian = jax.jit(lambda key: loss(params, key, {"x": x})[1]["jacobian"])(  # noqa: B023
            jax.random.key(0)
        )
        probes = divergence.draw(jax.random.key(1), x)
        _, _, rows = divergence.apply(lambda x: x @ params["velocity"].T, x, probes)
        error = np.std(rows) / np.sqrt(4000)
        assert error > 0.001
        np.testing.assert_allclose(jacobian, np.sum(MATRIX**2), atol=4 * error)


def test_penalties_shrink_what_they_penalize():
    """A rotation leaves the likelihood of a standard normal alone: only the penalties see it, and
    undo it."""
    spin = types.Velocity(
        None,
        lambda params, x, t, cond=None, *, key=None: (
            params * jnp.stack([-x[:, 1], x[:, 0]], axis=1)
        ),
    )
    x = jax.random.normal(jax.random.key(0), (64, 2))
    for factors, shrinks in (({"kinetic": 0, "jacobian": 0}, False), ({}, True)):
        loss = losses.regularized_nll(spin, distributions.normal((2,)), method=4, **factors)
        grad = jax.jit(
            jax.grad(lambda rate: loss({"velocity": rate, "base": {}}, None, {"x": x})[0])  # noqa: B023
        )(jnp.asarray(0.8))
        # of rate w: kinetic w^2 E|x|^2, Jacobian 2 w^2
        expected = 2 * 0.8 * 0.01 * (np.mean(np.sum(x**2, axis=1)) + 2) if shrinks else 0
        np.testing.assert_allclose(grad, expected, atol=1e-3)


def test_errors():
    with pytest.raises(ValueError, match="kinetic, jacobian >= 0, got -1"):
        losses.regularized_nll(LINEAR, BASE, kinetic=-1)
    with pytest.raises(ValueError, match="own ends"):
        losses.regularized_nll(LINEAR, BASE, method=solvers.on_grid([0.0, 1.0]), t1=0.5)
    loss = losses.regularized_nll(LINEAR, BASE, divergence=solvers.hutchinson(), method=1)
    with pytest.raises(ValueError, match="needs a key"):
        loss(jax.tree.map(jnp.asarray, PARAMS), None, {"x": jnp.ones((2, 3))})
