"""Rows whose solve fails: the others keep their value and their gradient; and derivatives in the
end times."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import distributions, flows, solvers
from jflow.types import Velocity

# dx/dt = a x^3: x(t) = x / sqrt(1 - 2 a t x^2), which the second row, 2, does not live to see
CUBE = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: params * x**3)
X, FINE = jnp.array([[0.1], [2.0], [-0.5]]), np.array([0.1, -0.5])
LEFT = 1 - 2 * FINE**2
FIXED, ADAPTIVE = solvers.fixed(40), solvers.adaptive(rtol=1e-4, atol=1e-4, max_steps=256)


CHECKPOINT, BACKSOLVE = diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint()


@pytest.mark.parametrize(
    ("how", "adjoint"),
    [(FIXED, CHECKPOINT), (ADAPTIVE, CHECKPOINT), (FIXED, BACKSOLVE)],
    ids=["fixed", "adaptive", "backsolve"],
)
def test_a_row_that_blows_up_leaves_the_gradient_of_the_others(how, adjoint):
    def total(a, x):
        y, info = solvers.sample(CUBE, a, x, method=how._replace(adjoint=adjoint))
        return jnp.sum(jnp.where((info.status == 0)[:, None], y, 0.0)), info.status

    (da, dx), status = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(1.0, X)
    assert [bool(s) for s in status] == [False, True, False]
    np.testing.assert_allclose(da, np.sum(FINE**3 / LEFT**1.5), rtol=1e-2)
    np.testing.assert_allclose(dx[:, 0], [LEFT[0] ** -1.5, 0, LEFT[1] ** -1.5], rtol=1e-2)


def test_where_every_row_fails_the_gradient_is_zero():
    def total(a):
        y, info = solvers.sample(CUBE, a, 1e10 * X[1:2], method=solvers.fixed(4, diffrax.Euler()))
        return jnp.sum(jnp.where((info.status == 0)[:, None], y, 0.0))

    assert jax.jit(jax.grad(total))(1.0) == 0


def test_what_a_velocity_closes_over_is_differentiated_under_vmap_too():
    def one(a):
        velocity = Velocity(None, lambda params, x, t, cond=None, *, key=None: a * x)
        return solvers.sample(
            velocity, {}, jnp.ones((1, 1)), method=solvers.fixed(2, diffrax.Euler())
        )[0]

    def total(a):
        return jnp.sum(jax.vmap(one)(a[None]))

    np.testing.assert_allclose(jax.jit(jax.grad(total))(0.5), 1.25, rtol=1e-6)  # of (1 + a / 2)^2


def test_the_density_of_a_failed_row_stays_out_of_the_gradient_of_the_base():
    """Backwards the same row blows up where a < 0: z = x / sqrt(s), log p = log N(z; mean, 1) - 1.5
    log s, s = 1 + 2 a x^2."""
    flow = flows.cnf(CUBE, distributions.diagonal_normal((1,)), method=12)

    def total(params):
        log_p = flow.log_prob(params, X)
        return jnp.sum(jnp.where(jnp.isfinite(log_p), log_p, 0.0)), log_p

    params = {
        "velocity": jnp.float32(-1.0),
        "base": {"mean": jnp.array([0.3]), "log_std": jnp.zeros(1)},
    }
    slope, log_p = jax.jit(jax.grad(total, has_aux=True))(params)
    z = FINE / np.sqrt(LEFT)
    expected = -0.5 * (z - 0.3) ** 2 - 0.5 * np.log(2 * np.pi) - 1.5 * np.log(LEFT)
    np.testing.assert_allclose(log_p, [expected[0], np.nan, expected[1]], rtol=1e-4)
    np.testing.assert_allclose(slope["base"]["mean"], [np.sum(z - 0.3)], rtol=1e-4)
    # d log p / da = -(z - 0.3) dz/da - 3 x^2 / s with dz/da = -x^3 / s^1.5
    np.testing.assert_allclose(
        slope["velocity"], np.sum((z - 0.3) * FINE**3 / LEFT**1.5 - 3 * FINE**2 / LEFT), rtol=1e-3
    )


def test_a_walk_of_a_row_that_blows_up():
    """Two steps of Euler: x + a x^3 / 2 twice, and its derivative."""
    far, grid = jnp.array([[0.5], [1e20]]), np.linspace(0, 1, 3)

    def total(a):
        step = solvers.euler_maruyama(CUBE, 0.0)
        y, path = solvers.sample_sde(step, a, far, jax.random.key(0), grid, return_trajectory=True)
        return jnp.sum(jnp.where(jnp.isfinite(y), y, 0.0)), (y, path.x)

    slope, (y, states) = jax.jit(jax.grad(total, has_aux=True))(1.0)
    first = 0.5 + 0.5**3 / 2
    np.testing.assert_allclose(states[:, 0, 0], [0.5, first, first + first**3 / 2], rtol=1e-6)
    assert not np.isfinite(y[1, 0])
    np.testing.assert_allclose(slope, first**3 / 2 + (1 + 1.5 * first**2) * 0.5**3 / 2, rtol=1e-5)


def test_the_derivative_in_a_traced_end_time_is_the_velocity_there():
    """dx/dt = a x on two numbers: x e^{at}, log det 2 a t."""
    line = Velocity(None, lambda params, x, t, cond=None, *, key=None: params * x)
    a, t, x = 0.7, 0.6, jnp.array([[0.3, -1.0]])
    how = solvers.fixed(40, diffrax.Midpoint())

    def ends(t0, t1):
        y, log_det, _ = solvers.sample_with_log_det(line, a, x, t0=t0, t1=t1, method=how)
        return y, log_det

    (y0, det0), (y1, det1) = zip(*jax.jit(jax.jacrev(ends, argnums=(0, 1)))(0.0, t), strict=True)
    np.testing.assert_allclose(y1, a * x * np.exp(a * t), rtol=1e-3)
    np.testing.assert_allclose(y0, -a * x * np.exp(a * t), rtol=1e-3)
    np.testing.assert_allclose([det0, det1], [[-2 * a], [2 * a]], rtol=1e-5)
    adaptive = lambda t1: solvers.sample(  # noqa: E731
        line, a, x, t1=t1, method=solvers.adaptive(rtol=1e-4, atol=1e-4)
    )[0]
    np.testing.assert_allclose(jax.jit(jax.jacrev(adaptive))(t), a * x * np.exp(a * t), rtol=1e-3)


def test_no_rows():
    """Of every way to integrate, results of no rows, in the types of what they would be."""
    none, lp = jax.ShapeDtypeStruct((0, 2), np.float32), lambda z: jnp.sum(z, axis=1)
    ways = [
        FIXED,
        ADAPTIVE,
        solvers.on_grid(np.array([0, 0.3, 1])),
        solvers.fixed(2, solvers.unipc()),
    ]
    for how in ways:
        y, info = jax.eval_shape(lambda x, how=how: solvers.sample(CUBE, 1.0, x, method=how), none)
        log_p, _ = jax.eval_shape(
            lambda x, how=how: solvers.log_prob(CUBE, 1.0, x, lp, method=how), none
        )
        assert y.shape == (0, 2) and log_p.shape == info.status.shape == (0,)
    step = solvers.ancestral(CUBE)
    y, path = jax.eval_shape(
        lambda x: solvers.sample_sde(
            step, 1.0, x, jax.random.key(0), np.linspace(0, 1, 3), return_trajectory=True
        ),
        none,
    )
    assert y.shape == (0, 2) and path.x.shape == (3, 0, 2)
