"""Constraints: a quadratic programme whose solution and multipliers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import losses

RNG = np.random.default_rng(0)
Q = np.diag([1.0, 2.0, 4.0])
CENTER, A, TARGETS = RNG.normal(size=3), RNG.normal(size=(2, 3)), np.array([0.5, -1.0])


def quadratic(x, key, batch, frozen=None):
    return 0.5 * (x - CENTER) @ Q @ (x - CENTER), {"norm": x @ x}


def linear(row):
    return lambda x, key, batch, frozen=None: (A[row] @ x, {})


LOSS = losses.constrained(
    quadratic, {str(i): (linear(i), TARGETS[i]) for i in range(2)}, damping=2.0
)


def test_descent_ends_at_the_solution_with_its_multipliers(x64):
    """min (x - c) Q (x - c) / 2 under A x = b: Q (x - c) + A^T l = 0, solved in numpy; 4000 steps
    of gradient descent, with a rate of their own for the multipliers."""
    system = np.block([[Q, A.T], [A, np.zeros((2, 2))]])
    exact = np.linalg.solve(system, np.concatenate([Q @ CENTER, TARGETS]))
    optimizer = optax.partition(
        {"model": optax.sgd(0.03), "multipliers": optax.sgd(0.1)},
        {"model": "model", "multipliers": "multipliers"},
    )
    start = {"model": jnp.zeros(3), "multipliers": {"0": jnp.zeros(()), "1": jnp.zeros(())}}

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads, _ = jax.grad(LOSS, has_aux=True)(params, None, {})
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=4000)
        return params, LOSS(params, None, {})

    params, (value, metrics) = jax.device_get(run(start))
    np.testing.assert_allclose(params["model"], exact[:3], atol=1e-8)
    np.testing.assert_allclose(
        [params["multipliers"][str(i)] for i in range(2)], exact[3:], atol=1e-8
    )
    np.testing.assert_allclose([metrics["0/value"], metrics["1/value"]], TARGETS, atol=1e-8)
    np.testing.assert_allclose(value, metrics["loss"], atol=1e-12)
    np.testing.assert_allclose(metrics["norm"], params["model"] @ params["model"])
    np.testing.assert_allclose(metrics["0/multiplier"], exact[3], atol=1e-8)


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="at least one constraint, got none"):
        losses.constrained(quadratic, {})
    with pytest.raises(ValueError, match="finite damping >= 0, got -1"):
        losses.constrained(quadratic, {"0": (linear(0), 0.0)}, damping=-1)
    params = {"model": jnp.zeros(3), "multipliers": {"0": 0.0}}
    with pytest.raises(ValueError, match=r"without \['1'\]"):
        LOSS(params, None, {})
