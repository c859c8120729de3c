"""Constant acceleration flow: its path, what makes up for a wrong start, and a sampler that is
exact on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import LINE_MIXTURE, same_when_repeated, straight_mixture
from jax.random import clone

import jflow
from jflow import losses, metrics, nets, oracles, solvers
from jflow.losses import constant_acceleration, initial_velocity
from jflow.solvers import AccelerationCondition, sample_acceleration
from jflow.types import Velocity

KEY = jax.random.key(0)
GAUSSIAN = oracles.gaussian([1.0, -2.0], [0.25, 4.0])  # carried by x1 = mean + std x0
MEAN, STD = jnp.asarray([[1.0, -2.0]]), jnp.asarray([[0.5, 2.0]])
MIXTURE = oracles.mixture([0.3, 0.7], [[-1.0, 0.5], [1.5, -0.5]], [0.2, 0.4])


def pairs(n, key=KEY):
    x0 = jax.random.normal(key, (n, 2))
    return {"x0": x0, "x": MEAN + STD * x0}


def velocity_of(function):
    """A Velocity (params, x, t, cond) -> v without init."""
    return Velocity(lambda *_: {}, lambda p, x, t, cond=None, *, key=None: function(p, x, t, cond))


def exact_start(h):
    """h (x1 - x0) from x_t = x0 + s (x1 - x0), s = h t + (1 - h) t^2."""

    def start(params, x, t, cond):
        s = (h * t + (1 - h) * t**2)[:, None]
        x0 = (x - s * MEAN) / (1 + s * (STD - 1))
        return h * (MEAN + (STD - 1) * x0)

    return velocity_of(start)


@pytest.mark.parametrize("h", [0.5, 1.5, 2.0])
def test_the_exact_start_of_a_gaussian_has_no_residual(h, x64):
    run = jax.jit(
        lambda v, h=h: initial_velocity(exact_start(v), h=h)({}, clone(KEY), pairs(256))[1][
            "residual"
        ]
    )
    assert run(h) < 1e-20 and run(0.9 * h) > 1e-3


def test_the_exact_start_of_a_mixture_has_no_residual(x64):
    h, flow = 1.5, straight_mixture()
    x0 = jax.random.normal(KEY, (32, 1))
    batch = {
        "x0": x0,
        "x": jax.jit(lambda x: oracles.mixture_flow_map(LINE_MIXTURE, x, 0.0, 1.0))(x0),
    }
    start = velocity_of(lambda p, x, t, cond: h * flow.apply(p, x, h * t + (1 - h) * t**2))
    run = jax.jit(
        lambda a: initial_velocity(start, h=h)({"a": a, "b": 0.0}, KEY, batch)[1]["residual"]
    )
    assert run(0.0) < 1e-6 and run(0.1) > 1e-3


def test_the_exact_acceleration_of_a_mixture_has_no_residual(x64):
    """Told the exact v0 = h (x1 - x0), the acceleration is 2 (1 / h - 1) v0, whatever the pairs."""
    h = 1.5
    x0 = jax.random.normal(KEY, (16, 2))
    carried = lambda x: oracles.mixture_flow_map(MIXTURE, x, 0.0, 1.0)  # noqa: E731
    start = velocity_of(lambda p, x, t, cond: h * (carried(x) - x))
    acceleration = velocity_of(lambda p, x, t, told: p["s"] * told.v0)
    batch = {"x0": x0, "x": carried(x0)}
    loss = constant_acceleration(acceleration, start)
    run = jax.jit(lambda s: loss({"s": s}, KEY, batch, {"velocity": {}})[1]["residual"])
    exact = 2 * (1 / h - 1)
    assert run(exact) < 1e-20 and run(exact + 0.1) > 1e-3
    params = {"velocity": {}, "acceleration": {"s": exact}}
    options = ({"steps": 1}, {"steps": 3}, {"grid": [0.0, 0.1, 0.7, 1.0]})
    known = velocity_of(lambda p, x, t, cond: h * (batch["x"] - x0))  # one solve for all
    for x, info in jax.jit(
        lambda: [sample_acceleration(acceleration, known, params, x0, **o) for o in options]
    )():
        np.testing.assert_allclose(x, batch["x"], atol=1e-12)
        assert np.all(info.status == solvers.Status.OK)
    np.testing.assert_array_equal(info.evaluations, 4)  # three steps and the start


def wrong_start(params, x, t, cond):
    """Nothing like h (x1 - x0), but a function of x0: what constant_acceleration must make good."""
    x0 = jnp.where(t[:, None] == 0, x, (x - MEAN) / STD)
    return jnp.sin(3 * x0)


def exact_acceleration(params, x, t, told):
    """x0 from x_t = x0 + t (1 - t) v0 + t^2 (x1 - x0), then 2 (x1 - x0) - 2 v0."""
    t = t[:, None]
    x0 = (x - t * (1 - t) * told.v0 - t**2 * MEAN) / (1 + t**2 * (STD - 1))
    return 2 * (MEAN + (STD - 1) * x0) - 2 * told.v0


def test_a_wrong_start_is_made_good_forward_and_backward(x64):
    batch = pairs(64)
    start, acceleration = velocity_of(wrong_start), velocity_of(exact_acceleration)
    told = velocity_of(
        lambda p, x, t, told: 2 * (1 / 1.5 - 1) * told.v0
    )  # exact for the exact start alone
    _, metrics = jax.jit(
        lambda: constant_acceleration(acceleration, start)({}, KEY, batch, {"velocity": {}})
    )()
    assert metrics["residual"] < 1e-20
    params = {"velocity": {}, "acceleration": {}}

    @jax.jit
    def carried(grid):
        networks, ends = (
            ((acceleration, start), (told, exact_start(1.5))),
            ((batch["x0"], grid), (batch["x"], grid[::-1])),
        )
        return [
            sample_acceleration(*pair, params, x, grid=times)[0]
            for pair in networks
            for x, times in ends
        ]

    for steps in (1, 2, 5):
        x, back, y, again = carried(jnp.linspace(0, 1, steps + 1))
        np.testing.assert_allclose([x, y], [batch["x"]] * 2, atol=1e-12)
        np.testing.assert_allclose([back, again], [batch["x0"]] * 2, atol=1e-12)


def test_without_acceleration_it_is_flow_matching():
    velocity = velocity_of(lambda p, x, t, cond: jnp.sin(x) + t[:, None])
    batch = {**pairs(64), "weight": jnp.linspace(0.5, 2, 64)}
    both = (initial_velocity(velocity, h=1.0), losses.flow_matching(velocity))
    np.testing.assert_allclose(
        *jax.jit(lambda: [loss({}, clone(KEY), batch)[0] for loss in both])(), rtol=1e-6
    )


@pytest.mark.parametrize("oracle", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_on_random_pairs_the_start_is_the_velocity_at_another_time(oracle):
    """E[h (x1 - x0) | x_t] = h v(x_t, h t + (1 - h) t^2): the mean gradient there is zero."""
    h = 1.5

    def apply(params, x, t, cond):
        exact = h * oracle.velocity(x, h * t + (1 - h) * t**2)
        return exact + params["a"] * x + params["b"] * t[:, None]

    loss = initial_velocity(velocity_of(apply), h=h)

    def gradient(key, params):
        a, b, c = jax.random.split(key, 3)
        batch = {"x": oracle.sample(a, 500), "x0": jax.random.normal(b, (500, 2))}
        return jax.grad(lambda p: loss(p, c, batch)[0])(params)

    run = jax.jit(jax.vmap(gradient, (0, None)))

    def scores(a, b):
        g = run(
            jax.random.split(jax.random.key(5), 200), {"a": jnp.asarray(a), "b": jnp.asarray(b)}
        )
        return {name: abs(np.mean(v) / (np.std(v) / np.sqrt(200))) for name, v in g.items()}

    exact = scores(0.0, 0.0)
    assert exact["a"] < 3 and exact["b"] < 3
    assert scores(0.1, 0.0)["a"] > 10 and scores(0.0, 0.3)["b"] > 10


def test_a_tiled_event_has_the_same_loss():
    batch = pairs(64)
    start = velocity_of(lambda p, x, t, cond: jnp.sin(x))
    acceleration = velocity_of(lambda p, x, t, told: jnp.cos(x) * told.v0)
    for loss in (initial_velocity(start), constant_acceleration(acceleration, start)):
        same_when_repeated(loss, {}, batch["x0"], batch["x"], {"velocity": {}}, rtol=1e-5)


def test_networks_train_and_sample_with_conditions():
    net = nets.ResidualMLP(8, 1, num_classes=3)
    start, acceleration = jflow.velocity(net), jflow.velocity(net)
    batch = {**pairs(30), "cond": jnp.arange(30) % 3}
    t = jnp.zeros(30)
    rng = np.random.default_rng(0)

    def drawn(init, *args):
        shapes = jax.eval_shape(init, KEY, *args)
        return jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), p.dtype), shapes)

    params = {
        "velocity": drawn(start.init, batch["x"], t, batch["cond"]),
        "acceleration": drawn(
            acceleration.init, batch["x"], t, AccelerationCondition(batch["x0"], batch["cond"])
        ),
    }
    loss = constant_acceleration(acceleration, start)

    @jax.jit
    def run(params):
        frozen = {"velocity": params["velocity"]}
        both = jax.grad(lambda p, f: loss(p, clone(KEY), batch, f)[0], argnums=(0, 1))(
            params["acceleration"], frozen
        )
        first = jax.grad(lambda p: initial_velocity(start)(p, clone(KEY), batch)[0])(
            params["velocity"]
        )
        return (
            first,
            *both,
            sample_acceleration(acceleration, start, params, batch["x0"], batch["cond"], steps=2),
        )

    first, own, frozen, (x, info) = run(params)
    for path, leaf in [
        *jax.tree_util.tree_leaves_with_path(first),
        *jax.tree_util.tree_leaves_with_path(own),
    ]:
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), jax.tree_util.keystr(path)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(frozen))
    assert x.shape == (30, 2) and np.all(np.isfinite(x)) and np.all(info.evaluations == 3)


def test_rows_that_fail_are_nan_and_said_so():
    start = velocity_of(lambda p, x, t, cond: jnp.where(x > 1, jnp.inf, x))
    still = velocity_of(lambda p, x, t, told: jnp.zeros_like(x))
    x, info = sample_acceleration(
        still, start, {"velocity": {}, "acceleration": {}}, jnp.asarray([[0.0, 0.5], [2.0, 0.0]])
    )
    np.testing.assert_array_equal(info.status, [solvers.Status.OK, solvers.Status.NOT_FINITE])
    np.testing.assert_allclose(x[0], [0.0, 1.0])
    assert np.all(np.isnan(x[1]))
    rows = metrics.quality_by_evaluations(lambda n: (x, info), lambda x: {}, (1,))
    assert rows == [{"evaluations": 2.0, "failed": 0.5}]


def test_bad_input():
    start, batch = exact_start(1.5), pairs(8)
    for h in (0.0, 2.1, float("nan")):
        with pytest.raises(ValueError, match="0 < h <= 2"):
            initial_velocity(start, h=h)
    for loss in (initial_velocity(start), constant_acceleration(start, start)):
        with pytest.raises(ValueError, match="'x0' beside 'x'"):
            loss({}, KEY, {"x": batch["x"]}, {"velocity": {}})
        with pytest.raises(ValueError, match="needs a key"):
            loss({}, None, batch, {"velocity": {}})
    with pytest.raises(ValueError, match="'velocity' in frozen"):
        constant_acceleration(start, start)({}, KEY, batch)
    flat = velocity_of(lambda p, x, t, cond: x[:, 0])
    with pytest.raises(
        ValueError,
        match=r"initial_velocity: expected a velocity shaped like x, \[8, 2\], got \[8\]",
    ):
        initial_velocity(flat)({}, KEY, batch)
    with pytest.raises(ValueError, match="constant_acceleration: expected"):
        constant_acceleration(flat, start)({}, KEY, batch, {"velocity": {}})
    params = {"velocity": {}, "acceleration": {}}
    with pytest.raises(ValueError, match="at least 1"):
        sample_acceleration(start, start, params, batch["x"], steps=0)
    with pytest.raises(ValueError, match="strictly monotone"):
        sample_acceleration(start, start, params, batch["x"], grid=[0.0, 0.5, 0.2])
    with pytest.raises(ValueError, match="times in"):
        sample_acceleration(start, start, params, batch["x"], grid=[0.0, 2.0])
