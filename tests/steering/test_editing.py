"""Edits without inversion, and sampling under a wish: limits, closed forms, evaluations."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from keys import KEYS, keys_consumed_twice

import jflow
from jflow import nets, solvers, steering
from jflow._core.keys import same_draws
from jflow.types import Velocity

RNG = np.random.default_rng(0)
X, Y = (RNG.normal(size=(5, 3)).astype(np.float32) for _ in range(2))
OLD, NEW = jnp.full(5, -0.4), jnp.full(5, 0.7)
STD, KEY = 0.6, KEYS[0]
GRID = np.array([0.0, 0.1, 0.3, 0.6, 0.8, 1.0])
H = np.diff(GRID)


def gaussian():
    """The exact velocity of N(cond, STD^2) in every dimension."""

    def apply(params, x, t, cond=None, *, key=None):
        t = t[:, None]
        slope, rest = line(t)
        return slope * x + rest * cond[:, None]

    return Velocity(lambda *_: {}, apply)


def line(t):
    """v = slope x + rest cond at time t."""
    slope = (t * STD**2 - (1 - t)) / (t**2 * STD**2 + (1 - t) ** 2)
    return slope, 1 - t * slope


def bent():
    """A velocity with params that is not linear in x, and counts: sinh is in it alone, and cosh in
    its derivative alone."""

    def apply(params, x, t, cond=None, *, key=None):
        told = 0.0 if cond is None else cond[:, None]
        return jnp.sinh(params["w"] * jnp.tanh(x) + told) - t[:, None]

    return Velocity(lambda *_: {"w": jnp.ones(())}, apply)


V, BENT, W = gaussian(), bent(), {"w": jnp.asarray(0.8)}
TOWARD = steering.SteeringCondition(X, NEW)
SMALL = functools.partial(optax.sgd, 0.1)


def moved(f, velocity=BENT, params=W, x=X, old=OLD, new=NEW, key=KEY, **options):
    return f(velocity, params, jnp.asarray(x), old, new, same_draws(key), **options)


def test_equal_conditions_change_nothing_exactly():
    """By a network, whose sums over units would round apart in batches of another size."""
    net = jflow.velocity(nets.ResidualMLP(width=32, num_blocks=1, num_classes=4))
    x, labels = RNG.normal(size=(7, 4, 4, 1)).astype(np.float32), jnp.arange(7) % 4
    params = net.init(KEY, x, jnp.zeros(7), labels)
    params = jax.tree.map(lambda p: p + 0.1 * RNG.normal(size=p.shape).astype(np.float32), params)

    @jax.jit
    def run(labels, new):
        call = functools.partial(moved, velocity=net, params=params, x=x, old=labels, new=new)
        return {
            "flow_edit": call(steering.flow_edit, n_avg=2, grid=5),
            "flow_director": call(steering.flow_director, scale=3.0, grid=3),
            "delta_velocity": call(
                steering.delta_velocity, times=GRID[:-1], optimizer=SMALL(), n_avg=2
            ),
            "approximate_flow": call(
                steering.approximate_flow, times=GRID[:-1], optimizer=optax.adam(0.1)
            ),
        }

    same, other = jax.device_get((run(labels, labels), run(labels, (labels + 1) % 4)))
    for name in same:
        np.testing.assert_array_equal(same[name], x, err_msg=name)
        assert np.abs(other[name] - x).max() > 1e-3, name


def test_flow_edit_of_gaussians_is_the_closed_form():
    """The noise cancels: z - x follows a line of its own, in float64 by numpy; to the rounding of
    float32. Fewer steps start later; where all are plain, nothing of x is left, and the edit is a
    sample; one plain step at the end is that of z_t."""

    @jax.jit
    def run(x):
        call = functools.partial(moved, steering.flow_edit, V, {}, x, grid=GRID)
        return {
            "all": call(),
            "averaged": call(n_avg=3, key=KEYS[1]),
            "three": call(n_max=3),
            "plain": call(n_min=5),
            "one plain": call(n_min=1),
        }

    made, shifted = jax.device_get((run(X), run(X + 1)))

    def expected(first):
        d = 0.0
        for t, h in zip(GRID[first:-1], H[first:], strict=True):
            slope, rest = line(t)
            d = d + h * (slope * d + rest * (0.7 + 0.4))
        return X + d

    for name, first in (("all", 0), ("averaged", 0), ("three", 2)):
        np.testing.assert_allclose(made[name], expected(first), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(made["plain"], shifted["plain"])
    assert np.abs(made["one plain"] - made["all"]).max() > 1e-3
    shares = (shifted["one plain"] - made["one plain"]).ravel()  # z_t + h v(z_t) of x, at t = 0.8
    np.testing.assert_allclose(shares, 0.8 * (1 + 0.2 * line(0.8)[0]) + 0 * shares, rtol=1e-4)


def test_dvrf_is_flow_edit_and_dds_in_its_limits():
    """With the shift 1 and Euler's steps it is flow_edit of a velocity that is not linear, under
    the same draws. With the shift 0 a step is that of the delta denoising score over t, whose noise
    predictions E[e | x_t] = (1 - t) (x_t - t m) / var are those of Gaussians; to float32."""
    t, rate, z = 0.6, 0.3, jnp.asarray(Y)

    @jax.jit
    def run():
        steps = optax.sgd(lambda i: jnp.asarray(H, jnp.float32)[i])
        both = {
            "flow_edit": moved(steering.flow_edit, grid=GRID, n_avg=2),
            "shift 1": moved(
                steering.delta_velocity,
                key=jax.random.split(jax.random.clone(KEY))[0],  # the draws of flow_edit
                times=GRID[:-1],
                optimizer=steps,
                shift=1.0,
                n_avg=2,
            ),
        }
        dds = lambda times: moved(  # noqa: E731
            steering.delta_velocity, V, {}, times=times, optimizer=optax.sgd(rate), shift=0.0
        )
        ramp = moved(steering.delta_velocity, times=[t], optimizer=optax.sgd(rate))
        half = moved(steering.delta_velocity, times=[t], optimizer=optax.sgd(rate), shift=t)
        return both, dds([t]), dds([t, t]), ramp, half

    both, once, twice, ramp, half = jax.device_get(run())
    np.testing.assert_allclose(both["shift 1"], both["flow_edit"], rtol=1e-5, atol=1e-5)
    assert np.abs(both["flow_edit"] - X).max() > 0.1
    np.testing.assert_allclose(ramp, half, rtol=1e-6)  # the default shift is t
    z = X.astype(float)
    for made in (once, twice):
        delta = (1 - t) / (t**2 * STD**2 + (1 - t) ** 2) * (t * (z - X) - t * (0.7 + 0.4))
        z = z - rate * delta / t
        np.testing.assert_allclose(made, z, rtol=1e-5, atol=1e-5)


def test_the_approximate_flow_between_gaussians_and_its_limit_of_score_distillation():
    """Between Gaussians of one width the velocities differ by (m1 - m0) (1 - t) / var, whatever the
    noise. What renders gets the slope through its own transpose. Without a source the expected
    gradient of a step is x - t slope x - rest m, over 4000 draws to 4 standard errors."""
    times, rates = np.array([0.1, 0.4, 0.8]), np.array([0.3, 0.2, 0.1])
    var = times**2 * STD**2 + (1 - times) ** 2
    step = (0.7 + 0.4) * (1 - times) / var
    matrix = RNG.normal(size=(2, 3)).astype(np.float32)
    many, t = 4000, 0.5

    @jax.jit
    def run():
        schedule = optax.sgd(lambda i: jnp.asarray(rates, jnp.float32)[i])
        call = functools.partial(moved, steering.approximate_flow, V, {})
        rendered = call(
            {"a": jnp.zeros((5, 2))}.__getitem__("a"),
            times=times,
            optimizer=schedule,
            render=lambda theta, key: theta @ matrix,
        )
        spread = steering.approximate_flow(
            V,
            {},
            jnp.broadcast_to(X[:1], (many, 3)),
            None,
            NEW[:1],
            jax.random.clone(KEY),
            times=[t],
            optimizer=optax.sgd(1.0),
        )
        tuned = moved(
            steering.approximate_flow,
            times=[t],
            optimizer=optax.sgd(1.0),
            source_params={"w": jnp.asarray(0.1)},
            new=OLD,
        )
        return call(times=times, optimizer=schedule), rendered, spread, tuned

    plain, rendered, spread, tuned = jax.device_get(run())
    np.testing.assert_allclose(plain, X + (rates * step).sum(), rtol=1e-5, atol=1e-5)
    expected = (rates * step).sum() * matrix.sum(1)
    np.testing.assert_allclose(rendered, np.tile(expected, (5, 1)), rtol=1e-4, atol=1e-5)
    slope, rest = line(t)
    mean = X[0] - (X[0] - t * slope * X[0] - rest * 0.7)
    error = np.abs(spread.mean(0) - mean) / (spread.std(0) / np.sqrt(many))
    assert np.all(error < 4) and np.all(spread.std(0) > 0.1)
    assert np.abs(tuned - X).max() > 1e-3  # the source has other params


def test_flow_director_edits_inside_its_mask_and_is_guided():
    """Without mask and guidance it is flow_edit; the mask keeps numbers to the last digit; the step
    is linear in the scale, and not without it; a mask may come from the difference."""
    mask = np.array([[1.0, 0.0, 1.0]], np.float32)

    @jax.jit
    def run():
        call = functools.partial(moved, steering.flow_director, n_avg=3, grid=GRID)
        one = functools.partial(call, n_max=1)
        return {
            "edit": moved(steering.flow_edit, n_avg=3, grid=GRID),
            "plain": call(),
            "masked": call(mask=mask, scale=2.0),
            "own mask": call(mask=lambda d, t: 1.0 * (jnp.arange(3) != 1)[None], scale=2.0),
            "scales": [one(scale=s) for s in (1.0, 2.0, 3.0)],
        }

    made = jax.device_get(run())
    np.testing.assert_allclose(made["plain"], made["edit"], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(made["masked"][:, 1], X[:, 1])
    assert np.all(np.abs(made["masked"] - X)[:, ::2] > 1e-4)
    np.testing.assert_array_equal(made["own mask"], made["masked"])
    first, second, third = made["scales"]
    np.testing.assert_allclose(third - second, second - first, rtol=1e-3, atol=1e-5)
    assert np.abs(second - first).max() > 1e-3


def test_anchored_guidance_is_a_fixed_point():
    """On the flow v = a x and a quadratic wish the fixed point solves a linear equation, x_n = p_n
    x0 + s sum_k h_k p_k^2 (y - x_n) with p_k the rest of the product of 1 + a h; by numpy. On a
    straight flow the error after m iterations is scale^m of that without any. scale 0 is the
    sampler, and a cap on the norm is one on the change."""
    a, s = -0.7, 0.6
    linear = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: a * x)
    straight = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x + 1)
    wish = lambda x: -jnp.sum((x - Y) ** 2, axis=1) / 2  # noqa: E731

    @jax.jit
    def run(x):
        call = lambda v, scale=s, m=60, **options: steering.anchored_guidance(  # noqa: E731
            v, {}, x, log_prob=wish, scale=scale, iterations=m, grid=GRID, **options
        )
        return {
            "linear": call(linear),
            "none": call(linear, 0.0, 1),
            "straight": [call(straight, m=m)[0] for m in (1, 2, 5)],
            "capped": call(straight, max_norm=1e-3),
            "sampled": solvers.sample(linear, {}, x, method=solvers.on_grid(GRID, diffrax.Euler()))[
                0
            ],
        }

    made = jax.device_get(run(X))
    rest = np.append(np.cumprod((1 + a * H)[::-1])[::-1][1:], 1.0)
    total = np.sum(H * rest**2)
    expected = (np.prod(1 + a * H) * X + s * total * Y) / (1 + s * total)
    x, residual = made["linear"]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)
    assert np.all(residual < 1e-5)
    np.testing.assert_allclose(made["none"][0], made["sampled"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(made["none"][1], 0)
    exact = (X + 1 + s * Y) / (1 + s)
    for m, x in zip((1, 2, 5), made["straight"], strict=True):
        np.testing.assert_allclose(x - exact, (-s) ** m * (X + 1 - exact), rtol=1e-4, atol=1e-5)
    change = np.linalg.norm(made["capped"][0] - X - 1, axis=1)
    np.testing.assert_allclose(change, 1e-3, rtol=1e-2)


def test_periodic_guidance_steps_when_it_says():
    """A recursion of numpy's: k Euler steps of v = 1, then steps of sgd on x^2 / 2, inside the
    window alone and never at the end; without a rate it is the sampler."""
    one = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x + 1)
    loss = lambda x, t: jnp.sum(x**2, axis=1) / 2  # noqa: E731
    cases = [
        (1, 1, 0.0, 1.0),
        (2, 3, 0.0, 1.0),
        (3, 1, 0.0, 1.0),
        (1, 2, 0.2, 0.7),
    ]

    @jax.jit
    def run(x):
        return [
            steering.periodic_guidance(
                one,
                {},
                x,
                loss=loss,
                optimizer=optax.sgd(0.2),
                every=every,
                repeats=repeats,
                window=(start, stop),
                grid=GRID,
            )
            for every, repeats, start, stop in cases
        ]

    for made, (every, repeats, start, stop) in zip(run(X), cases, strict=True):
        x, since = X.astype(float), 0
        for t, h in zip(GRID[1:], H, strict=True):
            x, inside = x + h, start <= t < stop
            since += inside
            if inside and since % every == 0:
                x = x * 0.8**repeats
        np.testing.assert_allclose(made, x, rtol=1e-5, atol=1e-6)


def test_coherent_motion_lowers_the_variance_that_numpy_finds():
    video = RNG.normal(size=(2, 5, 3, 2)).astype(np.float32)
    d = np.abs(np.diff(video.astype(float), axis=1))
    expected = d.var(axis=1).mean(axis=-1).max(axis=-1)
    data = RNG.normal(size=(2, 5, 3, 2)).astype(np.float32)

    def apply(params, x, t, cond=None, *, key=None):  # to the data, and the state has a part in it
        left = 1 - t.reshape(-1, 1, 1, 1)
        return (data + 0.5 * x - x) / (left + 0.5)

    velocity = Velocity(lambda *_: {}, apply)

    @jax.jit
    def run(x):
        call = lambda rate, **options: steering.coherent_motion(  # noqa: E731
            velocity, {}, x, optimizer=optax.sgd(rate), grid=10, **options
        )
        still = jnp.arange(5.0).reshape(1, 5, 1, 1) * jnp.ones((2, 5, 3, 2)) + x[:, :1]
        scores = [steering.motion_variance(v) for v in (x, still, call(0.0), call(2.0))]
        plain = solvers.sample(velocity, {}, x, method=solvers.fixed(10, diffrax.Euler()))[0]
        return scores, call(0.0), plain

    (found, steady, before, after), zero, plain = jax.device_get(run(video))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(steady, 0, atol=1e-10)
    assert np.all(after < 0.9 * before)
    np.testing.assert_allclose(zero, plain, rtol=1e-4, atol=1e-5)


def evaluations(function, *args, of="sinh"):
    """How often a primitive runs in function(*args), loops counted out."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            inner = [
                v.jaxpr if isinstance(v, ClosedJaxpr) else v
                for value in eqn.params.values()
                for v in (value if isinstance(value, tuple | list) else (value,))
                if isinstance(v, ClosedJaxpr | Jaxpr)
            ]
            assert eqn.primitive.name not in ("while", "cond") or not any(map(count, inner))
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total += (eqn.primitive.name == of) + times * sum(map(count, inner))
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


FLAT = Velocity(None, lambda p, x, t, cond=None, *, key=None: jnp.sinh(x * x))
VIDEO, IMAGE, NOTHING = jnp.zeros((2, 4, 3)), jnp.zeros((2, 4, 4, 1)), jnp.zeros((4, 3))
EIGHT = solvers.grids.uniform(8)


def video_of(f, **options):
    return lambda: f(FLAT, {}, VIDEO, **options)


METHODS = {
    # (what runs, evaluations of the velocity, backward passes through it)
    "edit_by_inversion": (
        lambda: steering.edit_by_inversion(
            BENT, W, jnp.asarray(X), OLD, NEW, method=solvers.fixed(4, diffrax.Euler())
        ),
        2 * 4,
        0,
    ),
    "rf_inversion": (lambda: moved(steering.rf_inversion, method=4), 8, 0),
    "otip": (lambda: moved(steering.otip, method=4), 8, 0),
    "flow_edit": (
        lambda: moved(steering.flow_edit, n_max=7, n_min=2, n_avg=3, grid=10),
        2 * 3 * 5 + 2,
        0,
    ),
    "flow_director": (lambda: moved(steering.flow_director, n_max=7, n_avg=3, grid=10), 42, 0),
    "delta_velocity": (
        lambda: moved(steering.delta_velocity, times=GRID, optimizer=SMALL(), n_avg=3),
        2 * 3 * 6,
        0,
    ),
    "approximate_flow": (
        lambda: moved(steering.approximate_flow, times=GRID, optimizer=SMALL()),
        12,
        0,
    ),
    "approximate_flow without a source": (
        lambda: moved(steering.approximate_flow, old=None, times=GRID, optimizer=SMALL()),
        6,
        0,
    ),
    "anchored_guidance": (
        lambda: steering.anchored_guidance(
            BENT, W, jnp.asarray(X), log_prob=lambda x: x[:, 0], scale=0.1, iterations=3, grid=4
        ),
        4 * 4,
        3 * 4,
    ),
    "periodic_guidance": (
        lambda: steering.periodic_guidance(
            BENT,
            W,
            jnp.asarray(X),
            loss=lambda x, t: x[:, 0],
            optimizer=SMALL(),
            every=2,
            repeats=3,
            grid=9,
        ),
        9,
        0,
    ),
    "coherent_motion": (
        video_of(steering.coherent_motion, optimizer=SMALL(), window=(0.0, 0.45), grid=10),
        10 + 4,
        4,
    ),
    "particle_search": (
        lambda: steering.particle_search(
            FLAT, {}, NOTHING, KEY, EIGHT, lambda x: x[:, 0], particles=2
        ),
        8,
        0,
    ),
    "hiflow": (lambda: steering.hiflow(FLAT, {}, IMAGE, KEY, EIGHT, factor=2, start=0.4), 8 + 4, 0),
    "rectified_hr": (
        lambda: steering.rectified_hr(
            [FLAT] * 2, {}, IMAGE, KEY, EIGHT, sizes=[(8, 8)], times=[0.5]
        ),
        8 + 1,
        0,
    ),
    "toward_data": (lambda: steering.toward_data(BENT, 0.5).apply(W, X, T, TOWARD), 1, 0),
    "toward_noise": (lambda: steering.toward_noise(BENT, 0.5).apply(W, X, T, TOWARD), 1, 0),
    "transport_guided": (lambda: steering.transport_guided(BENT).apply(W, X, T, TOWARD), 1, 0),
}
T = jnp.full(5, 0.5)
EXCUSED = {
    "motion_variance": "of a video, without a velocity",
    "rf_solver": "a diffrax solver, tests/steering/test_inversion.py",
}


@pytest.mark.parametrize("name", METHODS)
def test_evaluations_are_as_many_as_said(name):
    """And backward passes through the velocity."""
    run, forward, backward = METHODS[name]
    assert evaluations(run) == forward
    assert evaluations(run, of="cosh") == backward


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_types_one_row_of_conditions_and_keys(dtype):
    """What comes out has the type of what goes in; one row is for all; keys are consumed once."""
    with jax.enable_x64(True):  # in which float32 stays float32
        x = jnp.asarray(X, dtype)
        w = {"w": jnp.asarray(0.8, jnp.promote_types(dtype, jnp.float32))}
        for f, options in (
            (steering.flow_edit, {"n_min": 1, "grid": 4}),
            (steering.flow_director, {"grid": 4}),
            (steering.delta_velocity, {"times": [0.5], "optimizer": SMALL()}),
            (steering.approximate_flow, {"times": [0.5], "optimizer": SMALL()}),
        ):

            def run(key, f=f, options=options, x=x, w=w):
                return f(BENT, w, x, OLD[:1], NEW[:1], key, **options)

            made = jax.eval_shape(run, KEY)
            assert made.dtype == dtype and made.shape == x.shape
            assert not keys_consumed_twice(run, KEY)
        guided = jax.eval_shape(
            lambda x: steering.anchored_guidance(
                BENT, w, x, NEW[:1], log_prob=lambda x: x[:, 0], scale=1.0
            )[0],
            x,
        )
        periodic = jax.eval_shape(
            lambda x: steering.periodic_guidance(
                BENT, w, x, NEW[:1], loss=lambda x, t: x[:, 0], optimizer=SMALL(), grid=4
            ),
            x,
        )
        assert {guided.dtype, periodic.dtype} == {np.dtype(dtype)}


def test_every_public_name_is_here():
    files = "anchored delta_velocity flow_edit inversion periodic transport".split()
    modules = {f"jflow.steering._{name}" for name in files}
    made = {
        n for n in steering.__all__ if getattr(getattr(steering, n), "__module__", "") in modules
    }
    counted_too = {"particle_search", "hiflow", "rectified_hr"}  # tested in files of their own
    assert made | counted_too == {name.split()[0] for name in METHODS} | set(EXCUSED)


def test_bad_input_is_named():
    edit = functools.partial(moved, steering.flow_edit)
    direct = functools.partial(moved, steering.flow_director)
    delta = functools.partial(moved, steering.delta_velocity, optimizer=SMALL())
    wish = {"log_prob": lambda x: x[:, 0], "scale": 1.0}
    anchored = lambda **options: steering.anchored_guidance(  # noqa: E731
        BENT, W, jnp.asarray(X), **(wish | options)
    )
    periodic = lambda **options: steering.periodic_guidance(  # noqa: E731
        BENT, W, jnp.asarray(X), **({"loss": lambda x, t: x[:, 0], "optimizer": SMALL()} | options)
    )
    narrow = Velocity(None, lambda *args, **key: BENT.apply(*args, **key)[:, :1])
    for call, said in [
        (lambda: edit(n_max=3, n_min=4), r"flow_edit: expected n_min <= n_max <= 50.*n_min=4"),
        (lambda: edit(n_max=60), "flow_edit: expected n_min <= n_max <= 50.*n_max=60"),
        (lambda: edit(n_avg=0), "flow_edit: expected n_avg to be a whole number of at least 1"),
        (lambda: edit(grid=[0.0, 0.5]), "flow_edit: expected a grid that ends at 1"),
        (lambda: edit(old=None), "flow_edit: expected cond, the condition of x, got None"),
        (lambda: edit(new=None), "flow_edit: expected new_cond, what to edit to, got None"),
        (lambda: edit(old=OLD[:2]), "flow_edit: expected cond to lead with 5 rows"),
        (lambda: edit(key=None), "flow_edit is stochastic: it needs a key"),
        (lambda: edit(x=np.ones((5, 3), int)), "flow_edit: expected x of a floating type"),
        (lambda: edit(x=np.float32(1)), r"flow_edit: expected x of shape \[b, \*event\], got \[\]"),
        (lambda: edit(velocity=narrow), r"flow_edit: expected a velocity shaped like x, \[5, 3\]"),
        (
            lambda: jax.jit(lambda grid: edit(grid=grid))(jnp.asarray(GRID)),
            "flow_edit: expected a grid of known times",
        ),
        (lambda: direct(n_avg=2, n_worse=2), "flow_director: expected n_worse below n_avg=2"),
        (lambda: direct(mask=np.ones(4)), r"flow_director: expected a mask .* got shape \[4\]"),
        (lambda: delta(times=[0.5, 1.5]), r"delta_velocity: expected times in \[0, 1\]"),
        (lambda: delta(times=0.5), r"delta_velocity: expected times of shape \[n\], got \[\]"),
        (lambda: delta(times=[0.5], shift=-1.0), "delta_velocity: .*shift >= 0, got -1.0"),
        (
            lambda: moved(steering.approximate_flow, new=None, times=[0.5], optimizer=SMALL()),
            "approximate_flow: expected new_cond",
        ),
        (lambda: anchored(scale=-1.0), "anchored_guidance: expected scale >= 0, got -1.0"),
        (lambda: anchored(iterations=0), "anchored_guidance: expected iterations to be a whole"),
        (lambda: anchored(max_norm=0.0), "anchored_guidance: expected max_norm > 0 or None"),
        (
            lambda: anchored(log_prob=jnp.sum),
            r"anchored_guidance: expected log_prob\(x\) of shape \[5\], got \[\]",
        ),
        (
            lambda: periodic(window=(0.0, 1.5)),
            "periodic_guidance: expected a window .*first < last",
        ),
        (
            lambda: periodic(window=(0.55, 0.6), grid=4),
            r"expected 1 or more steps of the grid to arrive in the window \[0.55, 0.6\), .*got 0",
        ),
        (lambda: periodic(every=4, grid=4), "expected 4 or more steps .*got 3"),
        (
            lambda: steering.coherent_motion(FLAT, {}, VIDEO, optimizer=SMALL(), grid=4),
            "coherent_motion: expected 1 or more steps",
        ),
        (lambda: periodic(every=0), "periodic_guidance: expected every to be a whole number"),
        (
            lambda: periodic(loss=lambda x, t: x),
            r"periodic_guidance: expected the loss of shape \[5\], got \[5, 3\]",
        ),
        (lambda: steering.motion_variance(jnp.ones((2, 2, 1))), "at least 3 frames, got"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
    for call, said in [
        (lambda: delta(times=[0.5], optimizer=None), "expected an optimizer of optax.*got None"),
        (lambda: periodic(optimizer=0.1), "periodic_guidance: expected an optimizer of optax"),
    ]:
        with pytest.raises(TypeError, match=said):
            call()
