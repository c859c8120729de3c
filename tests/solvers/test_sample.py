import chex
import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import solvers, types
from jflow.nets._fields import velocity

MEAN, STD = 1.5, 0.4
EXPLICIT = [
    diffrax.Euler(),
    diffrax.Heun(),
    diffrax.Midpoint(),
    diffrax.Ralston(),
    diffrax.Bosh3(),
    diffrax.Tsit5(),
    diffrax.Dopri5(),
    diffrax.ReversibleHeun(),
    diffrax.LeapfrogMidpoint(),
]


def name_of(value):
    return type(value).__name__ if isinstance(value, diffrax.AbstractSolver) else None


def as_velocity(field):
    return types.Velocity(
        lambda *args: {}, lambda params, x, t, cond=None, *, key=None: field(params, x, t, cond)
    )


def gaussian(params, x, t, cond):
    """Velocity of the linear path to N(MEAN, STD^2); its flow map is x1 = MEAN + STD x0."""
    t = t[:, None]
    return MEAN + (t * STD**2 - (1 - t)) / ((1 - t) ** 2 + (t * STD) ** 2) * (x - t * MEAN)


def mixture(params, x, t, cond):
    """Velocity of the linear path to an equal mixture of N((+-2, 0), 0.3 I): nothing about it is
    linear in x."""
    t, variance = t[:, None], (1 - t[:, None]) ** 2 + 0.3 * t[:, None] ** 2
    means = jnp.asarray([[-2.0, 0.0], [2.0, 0.0]], x.dtype)[:, None]
    centered = x[None] - t[None] * means
    weights = jax.nn.softmax(
        -0.5 * jnp.sum(centered**2, axis=2, keepdims=True) / variance[None], axis=0
    )
    return jnp.sum(weights * (means + ((0.3 * t - (1 - t)) / variance)[None] * centered), axis=0)


def stiff_by_row(params, x, t, cond):
    """Relaxation at the rate cond, a number a row, with a forcing that varies in time."""
    return -cond[:, None] * (x - jnp.cos(5 * t)[:, None])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, t, cond=None):
        h = nn.Dense(16)(jnp.concatenate([x, t[:, None]], axis=1))
        return nn.Dense(x.shape[1])(jnp.tanh(h))


def counted(field):
    """The velocity of a field, and how often the compiled program evaluates it."""
    calls = []

    def apply(params, x, t, cond=None, *, key=None):
        jax.debug.callback(lambda: calls.append(1))
        return field(params, x, t, cond)

    return types.Velocity(None, apply), calls


def draw(n=8, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), (n, 2), dtype)


@pytest.mark.parametrize(
    ("solver", "steps"), [(solver, 4) for solver in EXPLICIT] + [(diffrax.Tsit5(), 1)], ids=name_of
)
def test_fixed_grid_evaluations(solver, steps):
    v, calls = counted(gaussian)
    x1, info = solvers.sample(v, {}, draw(), method=solvers.fixed(steps, solver))
    jax.block_until_ready(x1)
    jax.effects_barrier()
    assert info.evaluations.tolist() == [len(calls)] * 8
    assert info.status.tolist() == [solvers.Status.OK] * 8


@pytest.mark.parametrize(
    "solver",
    [diffrax.Heun(), diffrax.Bosh3(), diffrax.Tsit5(), diffrax.ReversibleHeun()],
    ids=name_of,
)
def test_adaptive_evaluations(solver):
    v, calls = counted(stiff_by_row)
    run = jax.jit(
        lambda rate: solvers.sample(
            v, {}, draw(1), rate, method=solvers.adaptive(solver, rtol=1e-3, atol=1e-3)
        )
    )
    for rate in (1.0, 800.0):  # the second rejects its first step
        calls.clear()
        x1, info = run(jnp.asarray([rate]))
        jax.block_until_ready(x1)
        jax.effects_barrier()
        assert info.evaluations.tolist() == [len(calls)]
        assert len(calls) > 10


def test_implicit_solvers_run_uncounted():
    solver = diffrax.ImplicitEuler(
        root_finder=diffrax.VeryChord(rtol=1e-6, atol=1e-6, norm=diffrax_norm)
    )
    x1, info = solvers.sample(as_velocity(gaussian), {}, draw(2), method=solvers.fixed(200, solver))
    assert info.evaluations.tolist() == [-1, -1]
    np.testing.assert_allclose(x1, MEAN + STD * draw(2), atol=1e-2)  # first order: about 1/200
    # diffrax's wrapper passes for the Euler solver in it, and takes three of its steps for one
    _, info = solvers.sample(
        as_velocity(gaussian),
        {},
        draw(2),
        method=solvers.fixed(4, diffrax.HalfSolver(diffrax.Euler())),
    )
    assert info.evaluations.tolist() == [-1, -1]


def diffrax_norm(tree):
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))


@pytest.mark.parametrize(
    "how",
    [{"method": 50}, {}, {"method": solvers.adaptive(diffrax.Tsit5(), rtol=1e-5, atol=1e-5)}],
    ids=["steps", "none", "adaptive"],
)
def test_gaussian_flow_map_there_and_back(how):
    x0 = draw()
    x1, info = solvers.sample(as_velocity(gaussian), {}, x0, **how)
    # Heun with 50 steps is second order: 1 / 50^2 times derivatives of order 1; so is the round
    # trip
    np.testing.assert_allclose(x1, MEAN + STD * x0, atol=2e-3)
    back, _ = solvers.sample(as_velocity(gaussian), {}, x1, t0=1.0, t1=0.0, **how)
    np.testing.assert_allclose(back, x0, atol=2e-3)
    assert np.all(info.status == 0) and info.evaluations.dtype == jnp.int32


def test_a_grid_is_its_times():
    x0, v = draw(), as_velocity(mixture)
    steps, _ = solvers.sample(v, {}, x0, method=7)
    grid, info = solvers.sample(v, {}, x0, method=solvers.on_grid(np.linspace(0, 1, 8)))
    np.testing.assert_array_equal(steps, grid)
    assert info.evaluations.tolist() == [14] * 8
    times = np.asarray([0.0, 0.1, 0.5, 0.6, 1.0], np.float32)
    by_hand = x0
    for t, dt in zip(times[:-1], np.diff(times), strict=True):
        by_hand = by_hand + dt * mixture({}, by_hand, jnp.full((8,), t), None)
    euler, _ = solvers.sample(v, {}, x0, method=solvers.on_grid(times, diffrax.Euler()))
    np.testing.assert_allclose(euler, by_hand, rtol=1e-5, atol=1e-5)
    traced = jax.jit(
        lambda grid: solvers.sample(v, {}, x0, method=solvers.on_grid(grid, diffrax.Euler()))[0]
    )(times)
    np.testing.assert_allclose(traced, euler, rtol=1e-6, atol=1e-6)


def test_falling_grids_and_parts_of_the_interval():
    x0, v = draw(), as_velocity(mixture)
    times = np.linspace(0, 1, 33) ** 2
    x1, _ = solvers.sample(v, {}, x0, method=solvers.on_grid(times, diffrax.Tsit5()))
    back, _ = solvers.sample(v, {}, x1, method=solvers.on_grid(times[::-1], diffrax.Tsit5()))
    np.testing.assert_allclose(back, x0, atol=1e-4)
    half, _ = solvers.sample(v, {}, x0, method=solvers.fixed(16, diffrax.Tsit5()), t1=0.5)
    whole, _ = solvers.sample(v, {}, half, method=solvers.fixed(16, diffrax.Tsit5()), t0=0.5)
    np.testing.assert_allclose(whole, x1, atol=1e-4)


def test_order_of_accuracy_on_a_mixture(x64):
    x0, v = draw(32, jnp.float64), as_velocity(mixture)
    exact, _ = solvers.sample(v, {}, x0, method=solvers.fixed(100, diffrax.Dopri8()))
    counts = [16, 32, 64]
    for solver, order in ((diffrax.Euler(), 1), (diffrax.Heun(), 2)):
        x1s = [
            solvers.sample(v, {}, x0, method=solvers.fixed(steps, solver))[0] for steps in counts
        ]
        errors = [float(jnp.sqrt(jnp.mean((x1 - exact) ** 2))) for x1 in x1s]
        slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
        np.testing.assert_allclose(
            slope, order, atol=0.15
        )  # the next order still shows at 16 steps


def test_adaptive_rows_do_not_couple():
    x0, rates = draw(3), jnp.asarray([1.0, 2.0, 3.0])
    how = {"method": solvers.adaptive(diffrax.Tsit5(), rtol=1e-4, atol=1e-4)}
    v = as_velocity(stiff_by_row)
    alone, info = solvers.sample(v, {}, x0, rates, **how)
    together, infos = solvers.sample(
        v, {}, jnp.concatenate([x0, x0]), jnp.concatenate([rates, 500 * rates]), **how
    )
    np.testing.assert_array_equal(alone, together[:3])
    np.testing.assert_array_equal(info.evaluations, infos.evaluations[:3])
    assert np.all(infos.evaluations[3:] > 5 * info.evaluations)


def explode(params, x, t, cond):
    """x / (1 - x t) from x(0) = x: beyond 1 it never arrives."""
    return x**2


@pytest.mark.parametrize(
    "how",
    [{"method": 50}, {"method": solvers.adaptive(diffrax.Tsit5(), rtol=1e-5, atol=1e-5)}],
    ids=["fixed", "adaptive"],
)
def test_failed_rows_are_nan_and_say_so(how):
    x0 = jnp.asarray([[0.5, -1.0], [0.5, 3.0], [jnp.nan, 0.5], [jnp.inf, 0.5], [-2.0, 0.1]])
    x1, info = solvers.sample(as_velocity(explode), {}, x0, **how)
    np.testing.assert_array_equal(info.status != 0, [False, True, True, True, False])
    assert np.all(np.isnan(x1[1:4]))
    good = np.asarray([0, 4])
    np.testing.assert_allclose(x1[good], x0[good] / (1 - x0[good]), rtol=2e-3)
    # a row that cannot succeed gives up, long before max_steps
    assert np.all(info.evaluations < 2000)


def test_what_failed_is_named():
    x0, how = (
        jnp.asarray([[0.5], [3.0]]),
        {"method": solvers.adaptive(diffrax.Tsit5(), rtol=1e-5, atol=1e-5)},
    )
    v = as_velocity(explode)
    assert solvers.sample(v, {}, x0, method=50)[1].status.tolist() == [
        solvers.Status.OK,
        solvers.Status.NOT_FINITE,
    ]
    assert solvers.sample(v, {}, x0, **how)[1].status.tolist() == [
        solvers.Status.OK,
        solvers.Status.STEP_TOO_SMALL,
    ]
    hasty = diffrax.ImplicitEuler(
        root_finder=diffrax.VeryChord(rtol=1e-7, atol=1e-7, norm=diffrax_norm),
        root_find_max_steps=2,
    )
    x1, info = solvers.sample(v, {}, x0, method=solvers.fixed(4, hasty))
    assert info.status.tolist() == [solvers.Status.SOLVER] * 2 and np.all(
        np.isnan(x1)
    )  # the batch shares a root find
    few = solvers.sample(v, {}, x0, method=how["method"]._replace(max_steps=3))
    assert few[1].status.tolist() == [solvers.Status.MAX_STEPS] * 2 and np.all(np.isnan(few[0]))


@pytest.mark.parametrize(
    "how",
    [{"method": 5}, {"method": solvers.adaptive(diffrax.Tsit5(), rtol=1e-3, atol=1e-3)}],
    ids=["fixed", "adaptive"],
)
def test_traced_once(how):
    traces = []

    def apply(params, x, t, cond=None, *, key=None):
        traces.append(1)
        return params["a"] * x

    v = types.Velocity(None, apply)
    run = jax.jit(lambda params, x: solvers.sample(v, params, x, **how))
    run({"a": jnp.asarray(1.0)}, draw())
    first = len(traces)
    run({"a": jnp.asarray(2.0)}, draw() + 1)
    assert len(traces) == first > 0
    # and without jit too, where diffrax keeps its own cache
    solvers.sample(v, {"a": jnp.asarray(1.0)}, draw(), **how)
    first = len(traces)
    solvers.sample(v, {"a": jnp.asarray(2.0)}, draw() + 1, **how)
    assert len(traces) == first


@pytest.mark.parametrize(
    "how",
    [{"method": 5}, {"method": solvers.adaptive(diffrax.Tsit5(), rtol=1e-3, atol=1e-3)}],
    ids=["fixed", "adaptive"],
)
def test_no_host_callbacks(how):
    """A compiled sampler talks to no host: runtime checks that do so hang a TPU."""
    run = lambda x: solvers.sample(as_velocity(gaussian), {}, x, **how)  # noqa: E731
    assert "callback" not in str(jax.make_jaxpr(run)(draw()))


def test_adaptive_gradients_agree_between_adjoints():
    """Backsolve solves its own equation, to the accuracy of the solver. (For fixed grids see the
    tests of cnf.)"""
    v = velocity(Net())
    x0 = draw()
    params = v.init(jax.random.key(1), x0, 0.0)

    def loss(params, x0, adjoint):
        x1, _ = solvers.sample(
            v,
            params,
            x0,
            method=solvers.adaptive(
                diffrax.Bosh3(), rtol=1e-6, atol=1e-6, adjoint=adjoint, max_steps=64
            ),
        )
        return jnp.sum(jnp.cos(x1))

    expected, given = (
        jax.jit(jax.grad(lambda p, x: loss(p, x, adjoint), argnums=(0, 1)))(params, x0)  # noqa: B023
        for adjoint in (diffrax.RecursiveCheckpointAdjoint(), diffrax.BacksolveAdjoint())
    )
    chex.assert_trees_all_close(given, expected, rtol=1e-4, atol=1e-4)
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(expected))


def test_gradients_of_a_flow_map():
    """d x1 / d x0 of the Gaussian's map is STD; the condition has a gradient as well."""
    x0 = draw()
    slope = jax.grad(lambda x: jnp.sum(solvers.sample(as_velocity(gaussian), {}, x, method=50)[0]))(
        x0
    )
    np.testing.assert_allclose(slope, jnp.full_like(x0, STD), atol=2e-3)
    shift = as_velocity(lambda params, x, t, cond: jnp.zeros_like(x) + cond)
    grad = jax.grad(lambda c: jnp.sum(solvers.sample(shift, {}, x0, c, method=2)[0]))(x0)
    np.testing.assert_allclose(grad, jnp.ones_like(x0), rtol=1e-6)


def test_conditions_follow_their_rows():
    x0, label = draw(), jnp.arange(8)
    v = as_velocity(lambda params, x, t, cond: jnp.zeros_like(x) + cond["label"][:, None])
    for how in ({"method": 2}, {"method": solvers.adaptive(rtol=1e-3, atol=1e-3)}):
        x1, _ = solvers.sample(v, {}, x0, {"label": label}, **how)
        np.testing.assert_allclose(x1, x0 + label[:, None], rtol=1e-5)


def test_trees_and_images():
    x0 = {"a": jnp.ones((3, 4, 4, 1)), "b": jnp.ones((3,))}
    v = as_velocity(lambda params, x, t, cond: jax.tree.map(lambda x: -x, x))
    for how in (
        {"method": 50},
        {"method": solvers.adaptive(diffrax.Tsit5(), rtol=1e-5, atol=1e-5)},
    ):
        x1, info = solvers.sample(v, {}, x0, **how)
        jax.tree.map(
            lambda x: np.testing.assert_allclose(x, np.full(x.shape, np.exp(-1)), rtol=2e-4), x1
        )
        assert info.status.shape == (3,)


def test_bfloat16_states_are_integrated_in_float32():
    x0 = draw().astype(jnp.bfloat16)
    v = as_velocity(lambda params, x, t, cond: jnp.ones_like(x))
    x1, _ = solvers.sample(v, {}, x0, method=solvers.fixed(1000, diffrax.Euler()))
    assert x1.dtype == jnp.bfloat16
    # in bfloat16, steps of 1/1000 would be lost beside numbers of size 1
    np.testing.assert_allclose(np.float32(x1), np.float32(x0) + 1, rtol=8e-3, atol=8e-3)


def test_float32_stays_float32_beside_float64(x64):
    x0 = draw()
    for how in ({"method": 4}, {"method": solvers.adaptive(rtol=1e-3, atol=1e-3)}):
        seen = []

        def apply(params, x, t, cond=None, *, key=None, seen=seen):
            seen.append((x.dtype, t.dtype))
            return gaussian(params, x, t, cond)

        x1, _ = solvers.sample(types.Velocity(None, apply), {}, x0, **how)
        assert x1.dtype == jnp.float32 and set(seen) == {
            (jnp.dtype("float32"), jnp.dtype("float32"))
        }


def test_errors():
    x0, v = draw(), as_velocity(gaussian)
    for how, message in [
        ({"method": 0}, "at least 1, got 0"),
        ({"method": 2.5}, "at least 1, got 2.5"),
        ({"method": solvers.on_grid([0.0, 1.0]), "t0": 1.0, "t1": 0.0}, "own ends"),
        ({"method": 5, "t0": 1.0}, "to differ"),
        ({"method": 5, "t1": 1.5}, r"t0 and t1 in \[0, 1\], got 0.0 and 1.5"),
        ({"method": solvers.adaptive(), "t0": -0.1}, r"t0 and t1 in \[0, 1\], got -0.1"),
    ]:
        with pytest.raises(ValueError, match=message):
            solvers.sample(v, {}, x0, **how)
    with pytest.raises(ValueError, match="floating type, got int32"):
        solvers.sample(v, {}, jnp.zeros((2, 2), jnp.int32))
    with pytest.raises(ValueError, match="lead with 8 rows"):
        solvers.sample(v, {}, x0, jnp.arange(3))
    wide = as_velocity(lambda params, x, t, cond: x[:, :1])
    with pytest.raises(ValueError, match=r"\[8, 2\], got \[8, 1\]"):
        solvers.sample(wide, {}, x0)
