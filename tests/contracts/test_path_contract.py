"""Every schedule, path, conversion and adapter against what each of them promises: the ends, slopes
that are derivatives, and networks shown what the formulas say."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.random import clone
from keys import KEYS, keys_consumed_twice

from jflow import domains, manifolds, oracles, paths
from jflow.paths import parameterizations, schedules
from jflow.types import Field, Path, Velocity

HALF, TWO = np.float64(0.5), np.float64(2.0)  # options are numbers of numpy's as well
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float64)
B = 5


class Schedule(NamedTuple):
    schedule: paths.Schedule
    ends: tuple[float, ...] = (0, 1, 1, 0)  # alpha and sigma at t=0, then at t=1
    at_noise: bool = False  # whether the conversions from noise and score diverge at t=0
    at_data: bool = False  # whether those to noise and score do at t=1
    between: tuple[float, float] = (0.1, 0.9)  # where float32 has the digits of all conversions


BOTH = {"at_noise": True, "at_data": True}
SCHEDULES = {
    "cosine": Schedule(schedules.cosine(), **BOTH),
    "cosine trigonometric": Schedule(schedules.cosine(HALF), (0, 0.5, 1, 0), **BOTH),
    "edm": Schedule(
        schedules.edm(np.float64(0.002), np.float64(80), np.float64(7)),
        (1, 80, 1, 0.002),
        between=(0.4, 0.7),
    ),
    "linear": Schedule(schedules.linear(), **BOTH),
    "linear_vp": Schedule(schedules.linear_vp(), at_noise=True),
    "optimal_transport": Schedule(
        schedules.optimal_transport(np.float64(1e-2)), (0, 1, 1, 1e-2), at_noise=True
    ),
    "piecewise": Schedule(schedules.piecewise(schedules.cosine(), 3), **BOTH),
    "polynomial": Schedule(schedules.polynomial(np.float64(2.5)), at_data=True),
    "polynomial root": Schedule(schedules.polynomial(HALF), at_data=True),
    "unit_variance": Schedule(
        schedules.unit_variance(schedules.edm()),
        tuple(v / np.hypot(1, s) for s in (80, 0.002) for v in (1, s)),
        between=(0.4, 0.7),
    ),
    "ve": Schedule(
        schedules.ve(np.float64(0.01), np.float64(50)), (1, 50, 1, 0.01), between=(0.45, 0.7)
    ),
    "vp": Schedule(
        schedules.vp(np.float64(0.1), np.float64(20)),
        (np.exp(-(0.1 + 20) / 4), np.sqrt(-np.expm1(-(0.1 + 20) / 2)), 1, 0),
        between=(0.5, 0.95),
    ),
}
KINDS = ("velocity", "data", "noise", "score")
CONVERSIONS = [f"{a}_to_{b}" for a in KINDS for b in KINDS if a != b]
FROM_NOISE = {"noise_to_velocity", "noise_to_data", "score_to_velocity", "score_to_data"}
TO_NOISE = {"data_to_velocity", "data_to_noise", "noise_to_score"} | {
    "velocity_to_score",
    "data_to_score",
}


class Row(NamedTuple):
    path: Path
    key: bool = False  # whether its points are drawn
    ends: tuple[float, ...] = (0, 1, 1, 0)  # of x1 and x0 at t=0, then at t=1
    knots: int = 0  # x1 is a trajectory over so many times


def drawn(coefficients):
    return Row(paths.interpolant(coefficients), key=True)


PATHS = {
    **{
        f"affine {name}": Row(paths.affine(row.schedule, tolerance=0.02), ends=row.ends)
        for name, row in SCHEDULES.items()
    },
    "geodesic": Row(paths.geodesic(manifolds.euclidean(3))),
    "interpolant": drawn(paths.with_noise(schedules.cosine(), lambda t: jnp.sin(jnp.pi * t) ** 2)),
    "interpolant schroedinger_bridge": drawn(paths.schroedinger_bridge(HALF)),
    "linear": Row(paths.linear()),
    "reflected in a box that none leaves": Row(
        paths.reflected(paths.linear(), domains.box((3,), -9.0, 9.0))
    ),
    "sequential_path": Row(paths.sequential_path([0.0, 0.3, 1.0]), knots=3),
}


def network(out=lambda v: v, draws=False):
    """A field with params, of rows that do not interact; init shows what the network is shown."""

    def apply(params, x, t, cond=None, *, key=None):
        h = params["w"].astype(x.dtype) * x + jnp.broadcast_to(t, x.shape[:1])[:, None].astype(
            x.dtype
        )
        h = h if cond is None else h + cond[:, None].astype(x.dtype)
        return out(jnp.tanh(h + jax.random.normal(key, x.shape, x.dtype) if draws else h))

    return lambda kind: kind(lambda key, x, t, cond=None: {"w": t, "x": x}, apply)


class Adapter(NamedTuple):
    make: Any  # the network as a noun -> the adapted noun
    noun: type = Velocity  # what it makes
    takes: type = Field
    out: Any = staticmethod(lambda v: v)  # what the network says
    shown: Any = staticmethod(lambda t: t)  # the time that it is shown
    scale: Any = staticmethod(lambda x, t: x)  # and the state
    name: str | None = None  # who says that its output is not shaped like x
    many: bool = False  # whether the network is asked at other times too


SCORES = paths.schroedinger_bridge(HALF)
TABLE = {
    "boundary_mask": Adapter(
        lambda field: (
            parameterizations.boundary_mask(field, data_mean=np.ones(2), gain=TWO).velocity
        ),
        name="boundary_mask",
    ),
    "boundary_mask at data": Adapter(
        lambda field: parameterizations.boundary_mask(field, gain=TWO).score, Field
    ),
    "boundary_subtraction": Adapter(
        lambda field: parameterizations.boundary_subtraction(field, data_mean=np.ones(2)).velocity,
        name="boundary_subtraction",
        many=True,
    ),
    "boundary_subtraction at data": Adapter(
        lambda field: parameterizations.boundary_subtraction(field).score, Field, many=True
    ),
    "edm_denoiser": Adapter(
        lambda field: parameterizations.edm_denoiser(field, data_std=HALF),
        Field,
        shown=staticmethod(lambda t: jnp.log(t) / 4),
        scale=staticmethod(lambda x, t: x / jnp.hypot(t, 0.5)[:, None]),
        name="edm_denoiser",
    ),
    "from_data": Adapter(
        lambda field: parameterizations.from_data(field, margin=np.float64(0.1)), name="from_data"
    ),
    "from_edm": Adapter(
        lambda field: paths.from_edm(field, schedules.edm()),
        shown=staticmethod(schedules.edm().sigma),
        name="from_edm",
    ),
    "from_noise": Adapter(
        lambda field: parameterizations.from_noise(field, margin=np.float64(0.1)),
        name="from_noise",
    ),
    "from_noise_time": Adapter(
        lambda field: paths.from_noise_time(field, scale=TWO),
        shown=staticmethod(lambda t: 2 * (1 - t)),
        name="from_noise_time",
    ),
    "from_score": Adapter(
        lambda field: parameterizations.from_score(field, margin=np.float64(0.1)),
        name="from_score",
    ),
    "from_sigma": Adapter(
        lambda field: paths.from_sigma(field, schedules.ve()),
        shown=staticmethod(schedules.ve().sigma),
        name="from_sigma",
    ),
    "from_trigonometric": Adapter(
        lambda field: paths.from_trigonometric(field, data_std=TWO),
        shown=staticmethod(lambda t: np.pi / 2 * (1 - t)),
        name="from_trigonometric",
    ),
    "interpolant_score": Adapter(
        lambda field: paths.interpolant_score(field, SCORES, margin=np.float64(0.1)),
        Field,
        out=staticmethod(lambda v: {"noise": v}),
        name="interpolant_score",
    ),
    "interpolant_velocity": Adapter(
        paths.interpolant_velocity,
        out=staticmethod(lambda v: {"velocity": v}),
        name="interpolant_velocity",
    ),
    "reschedule": Adapter(
        lambda velocity: paths.reschedule(velocity, paths.LINEAR, schedules.cosine()),
        takes=Velocity,
        name="reschedule",
    ),
    "to_trigonometric": Adapter(
        lambda velocity: paths.to_trigonometric(velocity, data_std=TWO),
        Field,
        takes=Velocity,
        name="reschedule",  # of which it is a case
    ),
}
EXCUSED = {
    **dict.fromkeys(("Interpolant", "Schedule", "LINEAR"), "what paths are made of"),
    **dict.fromkeys(("parameterizations", "schedules"), "modules, all of whose names are here"),
    **dict.fromkeys(
        ("check_ends", "coefficients", "matched_time"),
        "tests/paths/test_schedules.py, test_adapters.py",
    ),
    **dict.fromkeys(
        ("denoiser_to_score", "draw_noise", "with_noise"),
        "in the interpolants, tests/paths/test_interpolants.py",
    ),
    "premetric": "simulated to t: tests/manifolds/test_mesh.py",
    "schroedinger_bridge": "an interpolant",
    **dict.fromkeys(
        (
            "Corrector discrete jump_rates kappa remasking renoising resampling unmasking "
            "without_time"
        ).split(),
        "of tokens, tests/paths/test_discrete.py",
    ),
    "Bounded": "what boundary_mask and boundary_subtraction return",
    **dict.fromkeys(
        "betainc dirichlet dirichlet_source dirichlet_speed dirichlet_velocity "
        "project_simplex".split(),
        "on the simplex, tests/paths/test_dirichlet.py",
    ),
    **dict.fromkeys(
        "BayesianFlow bayesian_continuous bayesian_discrete bayesian_discretized "
        "discretized_logits entropy_accuracy geometric_accuracy quadratic_accuracy".split(),
        "of parameters of distributions, tests/losses/test_bayesian.py",
    ),
    **dict.fromkeys(
        "StatisticalBridge corner_log radial_moments statistical_bridge".split(),
        "on the sphere, tests/paths/test_statistical.py",
    ),
}


def test_every_public_name_is_in_a_table():
    first = lambda table: {name.split()[0] for name in table}  # noqa: E731
    assert set(schedules.__all__) == first(SCHEDULES)
    public = {*paths.__all__, *parameterizations.__all__}
    assert public == first(PATHS) | first(TABLE) | set(CONVERSIONS) | set(EXCUSED)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_schedules(name, dtype, x64):
    """alpha and sigma are what the table says there, slopes and bends are finite, in every type,
    and time is the inverse; conversions and their gradients are finite, or as listed not."""
    row, ends = SCHEDULES[name], jnp.asarray([0.0, 1.0], dtype)
    schedule = row.schedule
    slope = lambda f: lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]  # noqa: E731

    @jax.jit
    def run(ends, t, prediction, x):
        values = [f(ends) for f in schedule[:2]]
        slopes = [g(ends) for f in schedule[:2] for g in (slope(f), slope(slope(f)))]
        times = (
            []
            if schedule.time is None
            else [
                schedule.time(scale * schedule.alpha(t), scale * schedule.sigma(t))
                for scale in (1, 3)
            ]
        )
        converted = {}
        for conversion in CONVERSIONS:
            convert = functools.partial(getattr(paths, conversion), t=ends, schedule=schedule)
            found = [convert(prediction, x)]
            if dtype == jnp.float32:
                found += jax.vjp(convert, prediction, x)[1](jnp.ones_like(x))
            converted[conversion] = found
        return values, slopes, times, converted

    t = jnp.linspace(0.01, 0.99, 50, dtype=dtype)
    x, prediction = jnp.asarray([[0.3, -1.2]] * 2, dtype), jnp.asarray([[0.7, 0.4]] * 2, dtype)
    values, slopes, times, converted = jax.device_get(run(ends, t, prediction, x))
    assert {leaf.dtype for leaf in values + slopes + times} == {np.dtype(dtype)}
    assert np.all(np.isfinite(np.asarray(slopes, np.float64)))
    # sigma = sqrt(2 - 2 t) and the like are taken an epsilon from the end: off by its root
    tolerance = 2 * float(jnp.finfo(dtype).eps) ** 0.5
    given = np.asarray(values, np.float64).T.ravel()
    np.testing.assert_allclose(given, row.ends, rtol=4 * tolerance, atol=tolerance)
    if dtype == jnp.float64:
        for time in times:
            np.testing.assert_allclose(time, t, rtol=1e-11, atol=1e-11)
    for conversion, found in converted.items():
        found = [np.asarray(a, np.float64) for a in found]
        infinite = (
            row.at_noise and conversion in FROM_NOISE,
            row.at_data and conversion in TO_NOISE,
        )
        for end in (0, 1):
            finite = [bool(np.all(np.isfinite(a[end]))) for a in found]
            assert finite[0] != infinite[end] and (infinite[end] or all(finite)), (conversion, end)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
def test_conversions(name, dtype, x64):
    """What an ideal network predicts for data N(1.5, 0.4^2), by the oracle and the definition of
    each: within 1e-5 and 1e-10 of the largest value; in float32 at times where the other part of
    x_t is at most some thirty times larger, since 1e-7 of it is what rounding leaves."""
    row, n = SCHEDULES[name], 64
    schedule, rng = row.schedule, np.random.default_rng(0)
    oracle = oracles.gaussian([1.5] * 3, 0.4**2, schedule)
    cast = lambda a: jnp.asarray(np.asarray(a), dtype)  # noqa: E731
    low, high = row.between if dtype == jnp.float32 else (0.01, 0.99)
    t = cast(rng.uniform(low, high, n)).astype(np.float64)
    noises = rng.normal(size=(2, n, 3))

    @jax.jit
    def predicted(t, noises):
        a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        x = a * (1.5 + 0.4 * noises[0]) + s * noises[1]
        x = x.astype(dtype).astype(jnp.float64)
        score = oracle.score(x, t)
        return x, {
            "velocity": oracle.velocity(x, t),
            "data": 1.5 + a * 0.4**2 / (a**2 * 0.4**2 + s**2) * (x - a * 1.5),
            "noise": -s * score,
            "score": score,
        }

    x, known = jax.device_get(predicted(t, noises))
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-10

    @jax.jit
    def convert(known, x, t):
        return {
            conversion: getattr(paths, conversion)(
                known[conversion.split("_to_")[0]], x, t, schedule
            )
            for conversion in CONVERSIONS
        }

    found = jax.device_get(convert(*jax.tree.map(cast, (known, x, t))))
    for conversion, value in found.items():
        expected = known[conversion.split("_to_")[1]]
        assert value.dtype == dtype
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(
            value, expected, rtol=tolerance, atol=tolerance * scale, err_msg=conversion
        )


def pairs(name, dtype=np.float64):
    row, rng = PATHS[name], np.random.default_rng(0)
    x0 = rng.normal(size=(20, 3))
    x1 = rng.normal(size=(20, row.knots, 3)) if row.knots else rng.normal(size=(20, 3))
    t = np.linspace(0.02, 0.98, 20)
    return jnp.asarray(x0, dtype), jnp.asarray(x1, dtype), jnp.asarray(t, dtype)


@pytest.mark.parametrize("name", PATHS)
def test_paths(name, x64):
    """The target is the derivative of the point, by jvp and by a difference; the ends are those of
    the table; jit is no jit; a drawn path needs its key, the same one gives the same noise."""
    row, traces = PATHS[name], []
    path = row.path
    x0, x1, t = pairs(name)
    drawn = {"key": KEYS[0]} if row.key else {}
    h = 1e-6

    @jax.jit
    def run(x0, x1, t):
        traces.append(1)
        same = {name: clone(key) for name, key in drawn.items()}
        return path.point(x0, x1, t, **drawn), path.target(x0, x1, t, **same)

    point = lambda t, **more: path.point(x0, x1, t, **(drawn | more))  # noqa: E731
    jitted = run(x0, x1, t)
    run(x0 + 1, x1, t)
    assert len(traces) == 1 and isinstance(path, Path)
    plain = point(t), path.target(x0, x1, t, **drawn)
    for one, other in zip(jitted, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
    slope = jax.jvp(point, (t,), (jnp.ones_like(t),))[1]
    np.testing.assert_allclose(plain[1], slope, rtol=1e-12, atol=1e-12)
    by_hand = (point(t + h) - point(t - h)) / (2 * h)
    np.testing.assert_allclose(by_hand, slope, rtol=1e-6, atol=1e-6)
    first, last = (x1[:, 0], x1[:, -1]) if row.knots else (x0, x1)
    a0, s0, a1, s1 = row.ends
    ends = (first if row.knots else a0 * x1 + s0 * x0, last if row.knots else a1 * x1 + s1 * x0)
    for time, expected in enumerate(ends):
        time = jnp.full_like(t, time)
        np.testing.assert_allclose(point(time), expected, atol=2e-7)
        assert np.all(np.isfinite(path.target(x0, x1, time, **drawn)))
    assert np.array_equal(point(t, key=KEYS[1]), plain[0]) != row.key
    if not row.knots:
        with pytest.raises(ValueError, match=r"times t in \[0, 1\]"):
            path.point(x0, x1, t + 0.5, **drawn)
    if row.key:
        for function in path:
            with pytest.raises(ValueError, match="interpolant is stochastic: it needs a key"):
                function(x0, x1, t)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_of_paths(name, dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        x0, x1, t = pairs(name, dtype)
        for function in PATHS[name].path:
            both = lambda *args, f=function: f(*args, key=KEYS[0])  # noqa: E731
            assert jax.eval_shape(both, x0, x1, t).dtype == dtype
        call = lambda key: PATHS[name].path.point(x0, x1, t, key=key)  # noqa: E731
        assert not keys_consumed_twice(call, KEYS[0])


def shown(dtype=np.float32):
    """x, t and cond."""
    x = np.random.default_rng(1).normal(size=(B, 2))
    t = jnp.asarray([0.0, 0.2, 0.5, 0.7, 1.0], jnp.float32 if dtype == jnp.bfloat16 else dtype)
    return jnp.asarray(x, dtype), t, jnp.linspace(-1, 1, B, dtype=dtype)


@pytest.mark.parametrize("name", TABLE)
def test_adapters(name):
    """Finite from end to end, rows are rows, one time is that of every row, gradients reach the
    params and x, cond is handed on; jit is no jit, and two calls are one trace."""
    row, traces = TABLE[name], []
    made = row.make(network(row.out)(row.takes))
    assert type(made) is row.noun
    x, t, cond = shown()
    t = t + 0.01 * (name == "edm_denoiser")  # a logarithm of noise

    @jax.jit
    def run(params, x, t, cond):
        traces.append(1)
        out, pull = jax.vjp(lambda *args: made.apply(*args, cond), params, x, t)
        slopes = pull(jnp.ones_like(out))[:2]
        back = made.apply(params, x[::-1], t[::-1], cond[::-1])[::-1]
        each = made.apply(params, x, 0.3, cond), made.apply(params, x, jnp.full(B, 0.3), cond)
        return out, slopes, back, each, made.apply(params, x, t, cond + 1)

    params = {"w": jnp.asarray(0.7)}
    out, slopes, back, each, told = run(params, x, t, cond)
    run(params, x + 1, t, cond)
    assert len(traces) == 1 and out.shape == x.shape
    assert np.all(np.isfinite(out))
    for slope in jax.tree.leaves(slopes):
        assert np.all(np.isfinite(slope)) and np.any(slope != 0)
    np.testing.assert_allclose(back, out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(*each, rtol=1e-5, atol=1e-5)
    # its difference quotient at t = 1 rounds to the root of epsilon, 3.5e-4
    atol = 5e-4 if name.startswith("boundary_subtraction") else 1e-4
    np.testing.assert_allclose(made.apply(params, x, t, cond), out, rtol=1e-4, atol=atol)
    assert np.any(np.abs(told - out) > 1e-3)


@pytest.mark.parametrize("name", TABLE)
def test_types_keys_and_what_networks_are_shown(name):
    """What comes out has the type of x; init shows the network what apply will; its key is handed
    on, consumed once; an output of another shape than x is an error in the adapter's name."""
    row = TABLE[name]
    made = row.make(network(row.out)(row.takes))
    for dtype in DTYPES:
        with jax.enable_x64(True):
            x, t, cond = shown(dtype)
            params = {"w": jnp.asarray(0.7, t.dtype)}
            out = jax.eval_shape(made.apply, params, x, t, cond)
            assert out.dtype == dtype and out.shape == x.shape
    x, t, cond = shown()
    t = t[1:-1]
    x, cond = x[1:-1], cond[1:-1]
    init = made.init(KEYS[0], x, t, cond)
    np.testing.assert_allclose(init["w"], row.shown(t), rtol=1e-6)
    if name != "from_trigonometric":
        np.testing.assert_allclose(init["x"], row.scale(x, t), rtol=1e-6)
    drawing = row.make(network(row.out, draws=True)(row.takes))
    params = {"w": jnp.asarray(0.7)}
    apply = lambda key: drawing.apply(params, x, t, cond, key=key)  # noqa: E731
    assert not keys_consumed_twice(apply, KEYS[0])
    drawn = jax.jit(lambda: (apply(KEYS[0]), apply(KEYS[1])))()
    assert np.any(drawn[0] != drawn[1])
    if row.name is not None:
        narrow = row.make(network(lambda v: row.out(v[:, :1]))(row.takes))
        with pytest.raises(
            ValueError, match=rf"{row.name}: expected a velocity shaped like x, \[3, 2\], got"
        ):
            jax.eval_shape(narrow.apply, params, x, t, cond)


def test_bad_options_fail_at_construction():
    nan, inf, net = float("nan"), float("inf"), network()(Field)
    margins = (parameterizations.from_data, parameterizations.from_noise)
    margins = (*margins, parameterizations.from_score)
    for make, said in [
        (lambda: schedules.polynomial(0), "schedules.polynomial: .*got 0"),
        (lambda: schedules.polynomial(nan), "schedules.polynomial: .*got nan"),
        (lambda: schedules.optimal_transport(1.0), "schedules.optimal_transport: .*got 1.0"),
        (lambda: schedules.optimal_transport(-0.1), "schedules.optimal_transport: .*got -0.1"),
        (lambda: schedules.cosine(0.0), "schedules.cosine: .*got 0.0"),
        (lambda: schedules.vp(0.0, 20.0), "schedules.vp: expected a finite beta_min > 0"),
        (lambda: schedules.ve(1.0, 0.5), "schedules.ve: expected 0 < sigma_min < sigma_max"),
        (lambda: schedules.edm(0.0, 80.0), "schedules.edm: expected 0 < sigma_min"),
        (lambda: schedules.edm(rho=-1.0), "schedules.edm: expected a finite rho > 0"),
        *(
            (lambda m=make, v=v: m(net, margin=v), rf"{make.__name__}: expected 0 <= margin < 0.5")
            for make in margins
            for v in (-0.1, 0.5, nan)
        ),
        *(
            (lambda v=v: paths.interpolant_score(net, SCORES, margin=v), "0 <= margin < 0.5")
            for v in (-0.1, 0.5)
        ),
        *(
            (lambda v=v: paths.schroedinger_bridge(v), "schroedinger_bridge: .*sigma > 0")
            for v in (0.0, -1.0, inf)
        ),
        *(
            (lambda v=v: parameterizations.boundary_mask(net, gain=v), "boundary_mask: .*gain > 0")
            for v in (0.0, nan, -1.0)
        ),
        (
            lambda: parameterizations.edm_denoiser(net, data_std=-1.0),
            "edm_denoiser: .*data_std > 0",
        ),
        (lambda: paths.from_trigonometric(net, data_std=0.0), "from_trigonometric: .*data_std > 0"),
        (lambda: paths.to_trigonometric(net, data_std=0.0), "to_trigonometric: .*data_std > 0"),
        (lambda: paths.sequential_path([0.0, 0.5]), "sequential_path: expected knots"),
    ]:
        with pytest.raises(ValueError, match=said):
            make()
