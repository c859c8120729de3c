import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import same_when_repeated

import jflow
from jflow import losses, metrics, nets, solvers
from jflow.losses import (
    c_rectified_flow,
    inner_potential,
    potential_velocity,
    power_cost,
    quadratic_cost,
)
from jflow.types import Field

TURN = np.asarray([[0.0, -1.0], [1.0, 0.0]])
COSTS = {"quadratic": quadratic_cost(), "1.5": power_cost(1.5), "3": power_cost(3.0)}


def field(apply):
    return Field(
        lambda key, x, t, cond=None: {},
        lambda params, x, t, cond=None, *, key=None: apply(params, x, t, cond),
    )


def at(times):
    return lambda key, n: jnp.asarray(times)


@pytest.mark.parametrize("name", COSTS)
def test_the_conjugate_is_a_supremum(name, x64):
    z, y = np.linspace(-8, 8, 16_001)[:, None], np.linspace(-2, 2, 9)[:, None]
    values = np.asarray(COSTS[name].value(jnp.asarray(z)))
    sup = np.max(y * z[:, 0] - values, axis=1)
    # the grid misses the top by at most half its step: (5e-4)^2 of a curvature of order one, more
    # for |z|^1.5 near 0
    np.testing.assert_allclose(COSTS[name].conjugate(jnp.asarray(y)), sup, atol=1e-5)


@pytest.mark.parametrize("name", COSTS)
def test_the_gradients_undo_each_other(name, x64):
    cost = COSTS[name]
    z = jax.random.normal(jax.random.key(0), (32, 2, 3))
    slope, back = (jax.grad(lambda a, f=f: jnp.sum(f(a))) for f in (cost.value, cost.conjugate))
    np.testing.assert_allclose(back(slope(z)), z, rtol=1e-12)
    gap = cost.conjugate(slope(z)) - jnp.sum(z * slope(z), axis=(1, 2)) + cost.value(z)
    np.testing.assert_allclose(gap, 0, atol=1e-12)


def test_quadratic_is_half_of_flow_matching_with_a_gradient(x64):
    """Same x0, x1 and t: (|y|^2 / 2 - <u, y> + |u|^2 / 2) / d = |y - u|^2 / (2 d)."""
    k0, k1 = jax.random.split(jax.random.key(0))
    batch = {
        "x0": jax.random.normal(k0, (16, 3)),
        "x": jax.random.normal(k1, (16, 3)),
        "weight": jnp.arange(16.0),
    }
    bowl = field(lambda params, x, t, cond: (jnp.cos(x) @ params) * t)
    times = at(np.linspace(0, 1, 16))
    params = jnp.asarray([1.0, -2.0, 0.5])
    one, _ = c_rectified_flow(bowl, time=times)(params, jax.random.key(1), batch)
    other, _ = losses.flow_matching(potential_velocity(bowl), time=times)(
        params, jax.random.key(1), batch
    )
    np.testing.assert_allclose(one, other / 2, rtol=1e-12)


def test_stationary_at_the_projection_of_any_gaussian_coupling(x64):
    """f = x'Bx / 2 at a fixed time: the minimum solves B S + S B = dS/dt (the projection on
    gradients), S = E x_t x_t'.

    Both sides are moments of the rows at hand, so that the gradient vanishes to rounding on any
    rows.
    """
    rng = np.random.default_rng(0)
    x0 = rng.standard_normal((50, 2))
    x1 = x0 @ rng.standard_normal((2, 2)) + 0.3 * rng.standard_normal((50, 2))
    t = 0.4
    x_t, u = (1 - t) * x0 + t * x1, x1 - x0
    s, ds = x_t.T @ x_t, u.T @ x_t + x_t.T @ u
    eye = np.eye(2)
    b = np.linalg.solve(np.kron(s, eye) + np.kron(eye, s), ds.ravel()).reshape(2, 2)
    bowl = field(lambda params, x, t, cond: jnp.einsum("bi,ij,bj->b", x, params, x) / 2)
    grad = jax.grad(
        lambda p: c_rectified_flow(bowl, time=at(np.full(50, t)))(
            p, jax.random.key(0), {"x0": x0, "x": x1}
        )[0]
    )
    np.testing.assert_allclose(grad(b), 0, atol=1e-12)
    assert np.abs(grad(b + np.diag([0.1, 0]))).max() > 1e-2


def quarter_turn(times, scale=1.0, shift=0.0):
    """Rows with the moments of N(0, I) exactly, at every time: x1 = shift + scale TURN x0."""
    corners = np.asarray([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x0 = np.tile(corners, (len(times), 1))
    return {"x0": x0, "x": shift + scale * x0 @ TURN.T}, at(np.repeat(times, 4))


def test_turned_pairs_become_the_optimal_map(x64):
    """N(0, I) to N(m, s^2 I), paired by a quarter turn: plain rectification keeps the turn, since
    its paths don't cross.

    The c-rectified velocity is m + l' / (2 l) (x - t m) with l = (1-t)^2 + (s t)^2, whose map is
    the optimal s x + m. f is quadratic in x with coefficients polynomial in t, and the loss
    quadratic in those: one Newton step minimizes it.
    """
    scale, shift, degree = 1.3, np.asarray([1.0, -2.0]), 16
    nodes, weights = np.polynomial.legendre.leggauss(40)
    batch, time = quarter_turn((nodes + 1) / 2, scale, shift)
    batch["weight"] = np.repeat(weights, 4)

    def apply(params, x, t, cond):
        basis = jnp.cos(
            jnp.arange(degree)[None] * jnp.arccos(jnp.clip(2 * t - 1, -1 + 1e-9, 1 - 1e-9))[:, None]
        )
        matrices, slopes = jnp.tensordot(basis, params["B"], 1), basis @ params["b"]
        return jnp.einsum("bi,bij,bj->b", x, matrices, x) / 2 + jnp.sum(slopes * x, axis=1)

    bowl = field(apply)
    flat, unravel = jax.flatten_util.ravel_pytree(
        {"B": jnp.zeros((degree, 2, 2)), "b": jnp.zeros((degree, 2))}
    )
    loss = lambda p: c_rectified_flow(bowl, time=time)(unravel(p), jax.random.key(0), batch)[0]  # noqa: E731
    grad, hessian = jax.jit(lambda p: (jax.grad(loss)(p), jax.hessian(loss)(p)))(flat)
    params = unravel(jnp.asarray(-np.linalg.pinv(hessian, rtol=1e-12) @ grad))

    x0 = np.random.default_rng(1).standard_normal((64, 2))
    x1 = np.asarray(
        jax.jit(lambda x: solvers.sample(potential_velocity(bowl), params, x, method=200)[0])(x0)
    )
    np.testing.assert_allclose(
        x1, scale * x0 + shift, atol=1e-4
    )  # degree 16 of a function with poles near
    turned = shift + scale * x0 @ TURN.T
    assert metrics.transport_cost(x0, x1) < 0.7 * metrics.transport_cost(x0, turned)
    np.testing.assert_allclose(np.cov(x1.T), scale**2 * np.cov(x0.T), atol=1e-3)


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
def test_every_power_cost_undoes_a_quarter_turn(p, x64):
    """v = a x, a = l' / (2 l), has the marginals of the turned pairs; f = sign(a) |a|^(p-1) sum
    |x_i|^p / p gives it.

    Stationary in that family and against every quadratic form added to f.
    """
    cost, t = power_cost(p), 0.3
    a = (2 * t - 1) / ((1 - t) ** 2 + t**2)
    corners = np.asarray([[1.0, 0.3], [0.3, 1.0]])
    x_t = np.concatenate(
        [corners * sign for sign in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    )  # as symmetric as f
    x0 = np.linalg.solve((1 - t) * np.eye(2) + t * TURN, x_t.T).T
    batch, time = {"x0": x0, "x": x0 @ TURN.T}, at(np.full(8, t))

    def apply(params, x, t, cond):
        return params["g"] * jnp.sum(jnp.abs(x) ** p, axis=1) / p + jnp.einsum(
            "bi,ij,bj->b", x, params["M"], x
        )

    params = {"g": jnp.asarray(np.sign(a) * np.abs(a) ** (p - 1)), "M": jnp.zeros((2, 2))}
    x = jax.random.normal(jax.random.key(0), (8, 2))
    v = potential_velocity(field(apply), cost).apply(params, x, jnp.full((8,), t))
    np.testing.assert_allclose(v, a * x, rtol=1e-12)
    loss = lambda params: c_rectified_flow(field(apply), cost, time=time)(  # noqa: E731
        params, jax.random.key(0), batch
    )[0]
    grads = jax.grad(loss)(params)
    np.testing.assert_allclose(grads["g"], 0, atol=1e-12)
    np.testing.assert_allclose(grads["M"], 0, atol=1e-12)
    assert loss(params) > 0.1  # the turn costs, and no gradient follows it
    assert abs(jax.grad(loss)({**params, "g": params["g"] + 0.1})["g"]) > 1e-2


@pytest.mark.parametrize("name", COSTS)
def test_zero_for_pairs_that_a_gradient_explains(name, x64):
    """x1 = 3 x0: u = 2 x0 = a x_t with a = 2 / (1 + 2 t), and f = sum c(a x_i) / a has grad c*(grad
    f) = a x."""
    cost = COSTS[name]
    rise = lambda t: 2 / (1 + 2 * t)  # noqa: E731
    bowl = field(lambda params, x, t, cond: cost.value(rise(t)[:, None] * x) / rise(t))
    x0 = jax.random.normal(jax.random.key(0), (64, 2))
    value, _ = c_rectified_flow(bowl, cost)({}, jax.random.key(1), {"x0": x0, "x": 3 * x0})
    np.testing.assert_allclose(value, 0, atol=1e-12)


@pytest.mark.parametrize("name", COSTS)
def test_a_tiled_event_has_the_same_loss(name, x64):
    waves = field(lambda params, x, t, cond: t * jnp.sum(jnp.cos(x), axis=1))
    x0, x = jax.random.normal(jax.random.key(0), (2, 8, 3))
    same_when_repeated(c_rectified_flow(waves, COSTS[name]), {}, x0, x, rtol=1e-12)


def test_a_network_gives_a_gradient_field_and_trains():
    net = jflow.velocity(nets.TimeMLP((16,)))
    bowl = inner_potential(net)
    x, t = jax.random.normal(jax.random.key(0), (4, 2)), jnp.linspace(0.1, 0.9, 4)
    params = jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape),
        bowl.init(jax.random.key(1), x, t),
    )
    for cost in (None, power_cost(3.0)):
        grads = jax.jit(
            jax.grad(lambda p, c=cost: c_rectified_flow(bowl, c)(p, jax.random.key(2), {"x": x})[0])
        )(params)
        assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    v = potential_velocity(bowl)
    jacobian = jax.vmap(jax.jacfwd(lambda x, t: v.apply(params, x[None], t[None])[0]))(x, t)
    np.testing.assert_allclose(jacobian, jacobian.swapaxes(1, 2), atol=1e-5)
    assert np.abs(jacobian[:, 0, 1]).min() > 1e-4


def test_refusals():
    with pytest.raises(ValueError, match="1 < p < inf, got 1"):
        losses.power_cost(1)
    wrong = field(lambda params, x, t, cond: x)
    with pytest.raises(ValueError, match=r"potential of shape \[4\].*got \[4, 2\]"):
        potential_velocity(wrong).apply({}, jnp.zeros((4, 2)), jnp.zeros(4))
    with pytest.raises(ValueError, match="c_rectified_flow is stochastic"):
        c_rectified_flow(wrong)({}, None, {"x": jnp.zeros((4, 2))})
