"""FlowTurbo: the pseudo corrector by hand, the refiner exact and trained, and what each kind of
step costs."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_maps import silent_leaves

import jflow
from jflow import losses, nets, oracles, solvers, times
from jflow.types import Field, Velocity

MIXTURE = oracles.mixture([0.4, 0.6], [[-2.0, 0.0], [1.5, 1.0]], 0.3)
GAUSSIAN = oracles.gaussian([2.0, -1.0], [0.25, 4.0])
V = oracles.as_velocity(MIXTURE)
KEY = jax.random.key(0)


def noise(n, d=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), float)


def exact_refiner(oracle, extra=lambda params, t: 0.0):
    """R = v(x, t) - V, and a perturbation."""

    def apply(params, pair, t, cond=None, *, key=None):
        x, v = pair
        return oracle.velocity(x, t) - v + extra(params, t)

    return Field(lambda *args: {}, apply)


def run(refiner, params, x0, velocity=V, **options):
    return jax.jit(lambda p, x: solvers.sample_refined(velocity, {}, refiner, p, x, **options))(
        params, x0
    )


def test_the_pseudo_corrector_by_hand(x64):
    x, grid = noise(8), solvers.grids.power(5, 1.5)
    y, last = x, MIXTURE.velocity(x, 0.0)
    for t, h in zip(grid, np.diff(grid), strict=False):
        b = MIXTURE.velocity(y + h * last, t + h)
        y, last = y + h / 2 * (last + b), b
    out, info = jax.jit(
        lambda x: solvers.sample(V, {}, x, method=solvers.on_grid(grid, solvers.pseudo_corrector()))
    )(x)
    np.testing.assert_allclose(out, y, rtol=1e-10)
    np.testing.assert_array_equal(info.evaluations, 6)
    heun, _ = jax.jit(lambda x: solvers.sample(V, {}, x, method=solvers.on_grid(grid[:2])))(x)
    one, _ = jax.jit(
        lambda x: solvers.sample(
            V, {}, x, method=solvers.on_grid(grid[:2], solvers.pseudo_corrector())
        )
    )(x)
    np.testing.assert_allclose(one, heun, rtol=1e-12)


def test_the_order_of_the_pseudo_corrector(x64):
    """Second order on a mixture, regressed."""
    x, steps = noise(32), (32, 64, 128, 256)
    end = oracles.mixture_flow_map(MIXTURE, x, jnp.zeros(32), jnp.ones(32))
    solve = lambda x, n: solvers.sample(  # noqa: E731
        V, {}, x, method=solvers.fixed(n, solvers.pseudo_corrector())
    )[0]
    miss = [np.sqrt(np.mean((jax.jit(solve, static_argnums=1)(x, n) - end) ** 2)) for n in steps]
    np.testing.assert_allclose(-np.polyfit(np.log(steps), np.log(miss), 1)[0], 2, atol=0.15)


def test_without_refined_steps_it_is_a_solver(x64):
    x0, refiner, grid = noise(8), exact_refiner(MIXTURE), solvers.grids.power(4, 1.3)
    x, info = run(refiner, {}, x0, heun=1, pseudo=3, refine=0, grid=grid)
    expected, told = jax.jit(
        lambda x: solvers.sample(V, {}, x, method=solvers.on_grid(grid, solvers.pseudo_corrector()))
    )(x0)
    np.testing.assert_allclose(x, expected, rtol=1e-12)
    np.testing.assert_array_equal(info.evaluations, told.evaluations)
    x, info = run(refiner, {}, x0, heun=4, pseudo=0, refine=0, grid=grid)
    expected, told = jax.jit(lambda x: solvers.sample(V, {}, x, method=solvers.on_grid(grid)))(x0)
    np.testing.assert_allclose(x, expected, rtol=1e-12)
    np.testing.assert_array_equal(info.evaluations, told.evaluations)


def test_steps_of_an_exact_refiner_are_heuns(x64):
    x0 = noise(8)
    x, info = run(exact_refiner(MIXTURE), {}, x0, heun=2, pseudo=0, refine=4)
    expected, _ = jax.jit(lambda x: solvers.sample(V, {}, x, method=6))(x0)
    np.testing.assert_allclose(x, expected, rtol=1e-10)
    np.testing.assert_array_equal(info.evaluations, 4)
    assert np.all(info.status == solvers.Status.OK)


def test_refined_steps_by_hand(x64):
    """H1 P1 R2 with a refiner that is wrong by a known function of what it is told."""
    offset = lambda x, v, t: 0.1 * jnp.sin(x) + 0.2 * v * t  # noqa: E731
    refiner = Field(None, lambda p, pair, t, cond=None, *, key=None: offset(*pair, t[:, None]))
    y, h, f = noise(4), 0.25, MIXTURE.velocity
    a = f(y, 0.0)
    b = f(y + h * a, h)
    y = y + h / 2 * (a + b)
    c = f(y + h * b, 2 * h)
    y, v = y + h / 2 * (b + c), c
    for t in (0.5, 0.75):
        a = v + offset(y, v, t)
        b = a + offset(y + h * a, a, t + h)
        y, v = y + h / 2 * (a + b), a
    x, info = run(refiner, {}, noise(4), heun=1, pseudo=1, refine=2)
    np.testing.assert_allclose(x, y, rtol=1e-10)
    np.testing.assert_array_equal(info.evaluations, 3)


@pytest.mark.parametrize("oracle", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_the_exact_offset_has_no_residual_and_a_wrong_one_its_square(x64, oracle):
    batch, frozen = {"x": oracle.sample(KEY, 64)}, {"teacher": {}}
    refiner = exact_refiner(oracle, lambda p, t: p["a"] + p["b"] * t[:, None])
    loss = losses.velocity_refiner(refiner, oracles.as_velocity(oracle))
    both = jax.jit(jax.value_and_grad(lambda p: loss(p, KEY, batch, frozen), has_aux=True))
    (value, metrics), grads = both({"a": jnp.zeros(()), "b": jnp.zeros(())})
    assert metrics["residual"] < 1e-20 and value == metrics["residual"]
    assert all(abs(g) < 1e-10 for g in grads.values())
    (value, _), grads = both({"a": jnp.full((), 0.3), "b": jnp.zeros(())})
    np.testing.assert_allclose(value, 0.09, rtol=1e-10)
    np.testing.assert_allclose(grads["a"], 0.6, rtol=1e-10)


def test_nothing_to_refine_where_the_times_are_equal_or_the_flow_straight(x64):
    """R = 0 is exact at r = t; and to first order in r - t beyond."""
    nothing = Field(None, lambda p, pair, t, cond=None, *, key=None: jnp.zeros_like(pair[0]))
    batch, frozen, miss = {"x": MIXTURE.sample(KEY, 512)}, {"teacher": {}}, []
    same = lambda key, n: (jax.random.uniform(key, (n,)),) * 2  # noqa: E731
    assert losses.velocity_refiner(nothing, V, times=same)({}, KEY, batch, frozen)[0] == 0
    for reach in (0.02, 0.01):
        times = lambda key, n, reach=reach: (  # noqa: E731
            t := jax.random.uniform(key, (n,), maxval=0.9),
            t + reach,
        )
        miss.append(losses.velocity_refiner(nothing, V, times=times)({}, KEY, batch, frozen)[0])
    np.testing.assert_allclose(np.log2(miss[0] / miss[1]) / 2, 1, atol=0.1)
    constant = Velocity(None, lambda p, x, t, cond=None, *, key=None: jnp.full_like(x, 0.7))
    assert losses.velocity_refiner(nothing, constant)({}, KEY, batch, frozen)[0] < 1e-30


def test_the_event_repeated_and_weights_and_conditions(x64):
    sines = Velocity(
        None, lambda p, x, t, cond=None, *, key=None: jnp.sin(x + t[:, None]) * cond[:, None]
    )
    nothing = Field(None, lambda p, pair, t, cond=None, *, key=None: 0.1 * pair[0] + 0.2 * pair[1])
    loss, cond = losses.velocity_refiner(nothing, sines), jnp.arange(1.0, 7)
    batch, frozen = {"x": noise(6), "x0": noise(6, seed=1), "cond": cond}, {"teacher": {}}
    value, _ = loss({}, KEY, batch, frozen)
    twice = {k: jnp.concatenate([batch[k], batch[k]], -1) for k in ("x", "x0")}
    np.testing.assert_allclose(loss({}, KEY, {**twice, "cond": cond}, frozen)[0], value, rtol=1e-12)
    rows = [loss({}, KEY, {**batch, "weight": jnp.eye(6)[i]}, frozen)[0] for i in range(6)]
    np.testing.assert_allclose(np.mean(rows), value, rtol=1e-12)


def test_a_trained_refiner_beats_steps_left_out():
    """Two Gaussians: H1 P3 R2 comes nearer to the exact flow than the pseudo corrector in as many
    evaluations of v."""
    refiner = solvers.refiner(jflow.velocity(nets.ResidualMLP(32, 1)))
    loss, optimizer = (
        losses.velocity_refiner(refiner, V, times=times.nearby_pairs(0.2)),
        optax.adam(3e-3),
    )

    def update(state, key):
        params, opt = state
        batch = {"x": MIXTURE.sample(jax.random.fold_in(key, 0), 256)}
        grads = jax.grad(lambda p: loss(p, key, batch, {"teacher": {}})[0])(params)
        step, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(params, step), opt), None

    x = noise(2)
    params = jax.jit(refiner.init)(KEY, (x, x), jnp.zeros(2))
    keys = jax.random.split(jax.random.key(1), 1500)
    params = jax.jit(lambda p: jax.lax.scan(update, (p, optimizer.init(p)), keys)[0][0])(params)
    x0 = noise(1024, seed=2)
    end, _ = jax.jit(
        lambda x: solvers.sample(V, {}, x, method=solvers.fixed(100, diffrax.Tsit5()))
    )(x0)
    x, info = run(refiner, params, x0, heun=1, pseudo=3, refine=2)
    assert info.evaluations[0] == 5
    plain, told = jax.jit(
        lambda x: solvers.sample(V, {}, x, method=solvers.fixed(4, solvers.pseudo_corrector()))
    )(x0)
    assert told.evaluations[0] == 5
    mine, theirs = (float(jnp.sqrt(jnp.mean((y - end) ** 2))) for y in (x, plain))
    assert mine < 0.8 * theirs, (mine, theirs)


def test_gradients_reach_the_refiner_alone():
    net, small = (
        jflow.velocity(nets.ResidualMLP(8, 1)),
        solvers.refiner(jflow.velocity(nets.ResidualMLP(8, 1))),
    )
    x = noise(4)
    params = jax.tree.map(lambda p: p + 0.2, jax.jit(net.init)(KEY, x, jnp.zeros(4)))
    at_first = jax.jit(small.init)(KEY, (x, x), jnp.zeros(4))
    assert np.all(small.apply(at_first, (x, x), jnp.zeros(4)) == 0)
    theirs = jax.tree.map(lambda p: p + 0.1, at_first)
    loss = losses.velocity_refiner(small, net)
    assert not silent_leaves(loss, theirs, {"x": x}, {"teacher": params})


def test_rows_that_fail_are_nan_and_said_so():
    broken = Velocity(None, lambda p, x, t, cond=None, *, key=None: jnp.where(x > 1, jnp.inf, x))
    refiner = Field(None, lambda p, pair, t, cond=None, *, key=None: jnp.zeros_like(pair[0]))
    x, info = solvers.sample_refined(
        broken, {}, refiner, {}, jnp.asarray([[0.0, 0.5], [2.0, 0.0]]), refine=1, pseudo=0
    )
    np.testing.assert_array_equal(info.status, [solvers.Status.OK, solvers.Status.NOT_FINITE])
    assert np.all(np.isnan(x[1])) and np.all(np.isfinite(x[0]))


def test_bad_input():
    refiner, x = exact_refiner(MIXTURE), noise(4)
    sample = lambda **options: solvers.sample_refined(V, {}, refiner, {}, x, **options)  # noqa: E731
    for wrong in ({"heun": 0}, {"pseudo": -1}, {"refine": 1.5}, {"heun": True}):
        with pytest.raises(ValueError, match="to be a whole number of at least "):
            sample(**wrong)
    with pytest.raises(ValueError, match="grid of 10 times, got 3"):
        sample(grid=[0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="rises strictly"):
        sample(heun=1, pseudo=0, refine=0, grid=[1.0, 0.0])
    loss = losses.velocity_refiner(refiner, V)
    with pytest.raises(ValueError, match="'teacher' in frozen"):
        loss({}, KEY, {"x": x})
    with pytest.raises(ValueError, match="needs a key"):
        loss({}, None, {"x": x}, {"teacher": {}})
    with pytest.raises(ValueError, match="t <= r"):
        losses.velocity_refiner(refiner, V, times=lambda key, n: (jnp.ones(n), jnp.zeros(n)))
    wide = Field(None, lambda p, pair, t, cond=None, *, key=None: jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="shaped like x"):
        losses.velocity_refiner(wide, V)({}, KEY, {"x": x}, {"teacher": {}})
