"""MeanFlow: exact maps have no residual, the mean gradient there is zero, and guidance inside the
target is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_maps import (
    GAUSSIAN,
    LINE_MIXTURE,
    ORACLES,
    at,
    exact_map,
    near_map,
    random_params,
    same_when_repeated,
    silent_leaves,
    standard_scores,
    straight_mixture,
)
from jax.random import clone

import jflow
from jflow import losses, nets, oracles, solvers, times
from jflow.data import truncate_pairs
from jflow.losses import improved_mean_flow, mean_flow
from jflow.times import rectified_pairs
from jflow.types import FlowMap, Velocity

KEY = jax.random.key(0)
TIMES = times.pairs(equal=0.25)
LOSSES = {"mean_flow": mean_flow, "improved_mean_flow": improved_mean_flow}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("law", ORACLES)
def test_the_exact_map_has_no_residual(name, law, x64):
    oracle, exact = ORACLES[law], exact_map(law)
    batch = {"x": oracle.sample(KEY, 256)}
    if law == "mixture":
        x, t, r = batch["x"][:8], jnp.linspace(0, 0.4, 8), jnp.linspace(0.4, 1, 8)
        whole = oracles.mixture_flow_map(oracle, x, t, r)
        np.testing.assert_allclose(solvers.apply_flow_map(exact, {}, x, t, r), whole, atol=1e-6)
    loss = LOSSES[name](near_map(exact), times=TIMES, teacher=oracles.as_velocity(oracle))
    run = jax.jit(lambda params: loss(params, KEY, batch, {"teacher": {}})[1]["residual"])
    assert run(at()) < 1e-6
    assert run(at(a=0.1)) > 1e-3 and run(at(b=0.1)) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("law", ORACLES)
def test_as_published_the_mean_gradient_at_the_exact_map_is_zero(name, law):
    """In standard errors, over 100 batches of 500."""
    oracle = ORACLES[law]
    loss = LOSSES[name](near_map(exact_map(law, 4)), times=TIMES, power=0.0)

    def gradient(key, params):
        data_key, loss_key = jax.random.split(key)
        return jax.grad(lambda p: loss(p, loss_key, {"x": oracle.sample(data_key, 500)})[0])(params)

    scores = standard_scores(gradient)
    assert np.all(np.abs(scores(at())) < 3)
    assert np.abs(scores(at(a=0.1))[0]) > 10 and np.abs(scores(at(b=0.3))[1]) > 10


def test_the_published_loss_is_not_lowest_at_the_exact_map():
    oracle = oracles.gaussian([0.0], [0.25])
    loss = mean_flow(near_map(oracles.as_average_velocity(oracle)), times=times.pairs(), power=0.0)
    batch = {"x": oracle.sample(KEY, 50_000)}
    run = jax.jit(lambda a: loss(at(a), KEY, batch)[0])
    exact, moved = run(0.0), run(-0.1)
    assert exact > 0.1 and moved < exact - 0.005


@pytest.mark.parametrize("name", LOSSES)
def test_without_intervals_it_is_flow_matching(name):
    velocity = Velocity(
        lambda *_: {}, lambda p, x, t, cond=None, *, key=None: p["a"] * jnp.sin(x) + t[:, None]
    )
    model = FlowMap(
        lambda *_: {}, lambda p, x, t, r, cond=None, *, key=None: velocity.apply(p, x, t)
    )
    uniform = times.uniform()

    def same(key, n):
        t = uniform(key, n)
        return t, t

    batch = {"x": GAUSSIAN.sample(KEY, 64), "weight": jnp.linspace(0.5, 2, 64)}
    matching, loss = losses.flow_matching(velocity), LOSSES[name](model, times=same, power=0.0)

    @jax.jit
    def both(params):
        return [
            jax.value_and_grad(lambda p, f=f: f(p, clone(KEY), batch)[0])(params)
            for f in (matching, loss)
        ]

    expected, found = both(at(0.7))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_weight_is_the_row_s_own_error_without_gradient(name):
    model = near_map(oracles.as_average_velocity(GAUSSIAN))
    batch = {"x": GAUSSIAN.sample(KEY, 1)}

    def run(power, c=0.1):
        loss = LOSSES[name](model, times=TIMES, power=power, c=c)
        return jax.jit(jax.value_and_grad(lambda p: loss(p, KEY, batch)[0]))(at(0.3))

    (plain, g), (value, h) = run(0.0), run(0.75)
    np.testing.assert_allclose(value, plain / (plain + 0.1) ** 0.75, rtol=1e-5)
    np.testing.assert_allclose(h["a"], g["a"] / (plain + 0.1) ** 0.75, rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_tiled_event_has_the_same_loss(name, power):
    def apply(params, x, t, r, cond=None, *, key=None):
        return jnp.sin(2 * x + t[:, None]) * (1 + (r - t)[:, None])

    loss = LOSSES[name](FlowMap(lambda *_: {}, apply), times=TIMES, power=power)
    x0 = jax.random.normal(jax.random.key(1), (64, 2))
    same_when_repeated(loss, {}, x0, GAUSSIAN.sample(KEY, 64), rtol=1e-5)


RATE, NULL = 0.8, jnp.asarray([0.5, -1.0])
FIELD = Velocity(lambda *_: {}, lambda p, x, t, cond=None, *, key=None: RATE * x + cond)


def guided_map(scale, inside=lambda t: t >= 0):
    """The average velocity of RATE x + null + scale (cond - null): x and what is added grow by the
    same exponential."""

    def apply(params, x, t, r, cond=None, *, key=None):
        z = RATE * (r - t)
        growth = jnp.where(z == 0, 1 + z / 2, jnp.expm1(z) / jnp.where(z == 0, 1, z))[:, None]
        guided = NULL[None] + scale(cond) * (told(cond) - NULL[None])
        return growth * (RATE * x + jnp.where(inside(t)[:, None], guided, told(cond)))

    return FlowMap(lambda *_: {}, apply)


def told(cond):
    return cond["b"] if isinstance(cond, dict) else cond


@pytest.mark.parametrize("name", LOSSES)
def test_guidance_inside_the_target_has_the_scale_omega_over_one_minus_kappa(name, x64):
    batch = {"x": GAUSSIAN.sample(KEY, 64), "cond": jax.random.normal(jax.random.key(1), (64, 2))}
    frozen = {"teacher": {}}
    options = {"times": TIMES, "teacher": FIELD, "null": NULL}

    def residual(model, **more):
        loss = losses.chain(
            losses.drop_cond(0.3, null=NULL), LOSSES[name](model, **{**options, **more})
        )
        return jax.jit(lambda: loss({}, KEY, batch, frozen)[1]["residual"])()

    guided = guided_map(lambda cond: 4.0)
    assert residual(guided, omega=2.0, kappa=0.5) < 1e-20
    assert residual(guided, omega=4.0, kappa=0.0) < 1e-20
    assert residual(guided, omega=2.0, kappa=0.25) > 1e-2
    # within an interval of t alone: rows with r = t say so without an integral over the edge
    part = guided_map(lambda cond: 4.0, lambda t: (t >= 0.2) & (t <= 0.6))
    only = {"times": times.pairs(equal=1.0), "omega": 2.0, "kappa": 0.5}
    assert residual(part, interval=(0.2, 0.6), **only) < 1e-20
    assert residual(part, interval=(0.2, 0.8), **only) > 1e-2


@pytest.mark.parametrize("name", LOSSES)
def test_the_guided_target_has_no_gradient_and_dropped_rows_are_not_guided(name):
    """One point, v = 0, u = a cond: the target is a (kappa cond + (1 - omega - kappa) null), 0
    where cond is dropped."""
    model = FlowMap(lambda *_: {}, lambda p, x, t, r, cond=None, *, key=None: p["a"] * cond)
    batch = {"x": jnp.ones((4, 1)), "x0": jnp.ones((4, 1)), "cond": jnp.full((4, 1), 3.0)}
    options = {
        "times": times.pairs(equal=1.0),
        "power": 0.0,
        "omega": 2.0,
        "kappa": 0.25,
        "null": jnp.asarray([2.0]),
    }

    def run(drop):
        loss = losses.chain(
            losses.drop_cond(drop, null=options["null"]), LOSSES[name](model, **options)
        )
        return jax.jit(jax.value_and_grad(lambda p: loss(p, KEY, batch)[0]))(at(0.5))

    (guided, g), (dropped, h) = run(0.0), run(1.0)
    error = 0.5 * (3 - 0.25 * 3 - (1 - 2 - 0.25) * 2)
    np.testing.assert_allclose([guided, g["a"]], [error**2, 2 * error * 3], rtol=1e-6)
    np.testing.assert_allclose([dropped, h["a"]], [1.0, 2 * 1.0 * 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "slope", "residual"),
    [
        ("mean_flow", 0.9091718183991926, 0.8000010352796627, 1.1743635237292191),
        ("improved_mean_flow", 0.7215928890941822, 0.7654776350951235, 0.7624680654998945),
    ],
)
def test_dropped_rows_and_guidance_have_the_value_that_was_recorded(
    name, value, slope, residual, x64
):
    """A golden number, of a loss that dropped conditions by itself: rows 0, 1 and 3, which its key
    chose."""

    def apply(params, x, t, r, cond=None, *, key=None):
        told = 0.3 * cond[:, None]
        return params * jnp.tanh(x + told) + t[:, None] * x - 0.5 * (r - t)[:, None] * told

    x, dropped = (
        jnp.linspace(-1, 1, 12).reshape(6, 2),
        jnp.asarray([True, True, False, True, False, False]),
    )
    batch = {"x": x, "x0": jnp.cos(3 * x), "weight": jnp.asarray([1.0, 2.0, 0.5, 1.0, 1.5, 0.0])}
    batch |= {"cond": jnp.where(dropped, 3, jnp.arange(6) % 3), "dropped": dropped}
    loss = LOSSES[name](
        FlowMap(lambda *_: {}, apply),
        times=lambda key, n: (jnp.linspace(0, 0.6, n), jnp.linspace(0.3, 1, n)),
        omega=1.5,
        kappa=0.2,
        interval=(0.1, 0.9),
        power=0.5,
        null=3,
    )
    (found, metrics), g = jax.jit(jax.value_and_grad(lambda p: loss(p, KEY, batch), has_aux=True))(
        0.7
    )
    np.testing.assert_allclose(
        [found, g, metrics["residual"]], [value, slope, residual], rtol=1e-12
    )
    without = {
        **batch,
        "dropped": jnp.zeros(6, bool),
    }  # what is told null but not said to be is guided
    assert abs(loss(0.7, KEY, without)[0] / value - 1) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_one_model_for_every_scale(name, x64):
    w = jnp.linspace(1, 5, 64)
    batch = {"x": GAUSSIAN.sample(KEY, 64), "cond": {"b": jax.random.normal(KEY, (64, 2)), "w": w}}
    field = Velocity(FIELD.init, lambda p, x, t, cond=None, *, key=None: RATE * x + cond["b"])
    null = {"b": NULL, "w": 1.0}
    model = guided_map(lambda cond: cond["w"][:, None])
    loss = losses.chain(
        losses.drop_cond(0.2, null=null),
        LOSSES[name](
            model, times=TIMES, teacher=field, kappa=lambda cond: 1 - 1 / cond["w"], null=null
        ),
    )
    assert jax.jit(lambda: loss({}, KEY, batch, {"teacher": {}})[1]["residual"])() < 1e-20


def test_a_head_is_the_tangent_and_trained_by_itself(x64):
    exact = oracles.as_average_velocity(GAUSSIAN)
    head = Velocity(
        lambda *_: {},
        lambda p, x, t, cond=None, *, key=None: GAUSSIAN.velocity(x, t) + p["head"] * x,
    )
    model = FlowMap(
        lambda *_: {},
        lambda p, x, t, r, cond=None, *, key=None: exact.apply({}, x, t, r) + p["a"] * x,
    )
    loss = improved_mean_flow(
        model, head=head, times=TIMES, teacher=oracles.as_velocity(GAUSSIAN), power=0.0
    )
    batch = {"x": GAUSSIAN.sample(KEY, 64)}

    @jax.jit
    def run(a, b):
        return jax.value_and_grad(lambda p: loss(p, KEY, batch, {"teacher": {}}), has_aux=True)(
            {"a": a, "head": b}
        )

    (_, metrics), _ = run(0.0, 0.0)
    assert metrics["residual"] < 1e-20 and metrics["head"] < 1e-20
    (value, metrics), g = run(0.0, 0.1)
    np.testing.assert_allclose(value, metrics["residual"] + metrics["head"], rtol=1e-12)
    assert metrics["residual"] > 1e-5  # a wrong tangent is seen, but moves the map, not the head:
    np.testing.assert_allclose(g["head"], 2 * metrics["head"] / 0.1, rtol=1e-10)
    assert abs(g["a"]) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_the_derivative_may_be_a_finite_difference(name, x64):
    model = near_map(oracles.as_average_velocity(GAUSSIAN))
    batch = {"x": GAUSSIAN.sample(KEY, 64)}
    derivatives = (jax.jvp, solvers.finite_difference(1e-4))
    made = [LOSSES[name](model, times=TIMES, jvp=f) for f in derivatives]
    found = jax.jit(lambda p: [loss(p, clone(KEY), batch)[0] for loss in made])(at(0.1))
    np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_goes_through_the_derivative(name):
    model = near_map(oracles.as_average_velocity(GAUSSIAN))
    batch = {"x": GAUSSIAN.sample(KEY, 64)}

    def cut(f, primals, tangents):
        u, slope = jax.jvp(f, primals, tangents)
        return u, jax.lax.stop_gradient(slope)

    made = [LOSSES[name](model, times=TIMES, jvp=jvp) for jvp in (jax.jvp, cut)]
    one, two = jax.jit(
        lambda p: [jax.grad(lambda p, f=f: f(p, clone(KEY), batch)[0])(p) for f in made]
    )(at(0.3, 0.2))
    np.testing.assert_allclose(one["a"], two["a"], rtol=1e-5)
    np.testing.assert_allclose(one["b"], two["b"], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_every_param_and_nothing_frozen(name):
    model = jflow.flow_map(nets.ResidualMLP(8, 1, num_classes=3))
    teacher = Velocity(lambda *_: {}, lambda p, x, t, cond=None, *, key=None: p["s"] * x)
    batch = {"x": GAUSSIAN.sample(KEY, 32), "cond": jnp.arange(32) % 3}
    loss = LOSSES[name](model, times=TIMES, teacher=teacher, omega=2.0, kappa=0.2, null=3)
    loss = losses.chain(losses.drop_cond(0.2, null=3), loss)
    time = jnp.zeros(32)
    params = random_params(model.init, batch["x"], time, time, batch["cond"])
    assert not silent_leaves(loss, params, batch, {"teacher": {"s": jnp.asarray(0.5)}})


def test_truncated_pairs():
    rng = np.random.default_rng(0)
    rows = {
        "x0": rng.normal(size=(100, 2, 3)),
        "x": rng.normal(size=(100, 2, 3)),
        "cond": np.arange(100),
    }
    far = np.square(rows["x"] - rows["x0"]).sum(axis=(1, 2))
    kept = truncate_pairs(rows, 0.13)
    np.testing.assert_array_equal(kept["cond"], np.flatnonzero(far <= np.sort(far)[86]))
    np.testing.assert_array_equal(kept["x"], rows["x"][kept["cond"]])
    np.testing.assert_array_equal(truncate_pairs(rows, 0.0)["x0"], rows["x0"])
    with pytest.raises(ValueError, match=r"share in \[0, 1\), got 1"):
        truncate_pairs(rows, 1)
    with pytest.raises(ValueError, match="'x0' beside 'x'"):
        truncate_pairs({"x": rows["x"]}, 0.1)
    with pytest.raises(ValueError, match=r"\[100, 2, 3\], got \[100, 2\]"):
        truncate_pairs({"x": rows["x"], "x0": rows["x0"][..., 0]}, 0.1)


def straight_gaussian(params, x, t, cond=None, *, key=None):
    """The lines from x0 to mean + std x0, of a Gaussian with independent numbers."""
    mean, std, t = jnp.asarray([[1.0, -2.0]]), jnp.asarray([[0.5, 2.0]]), t[:, None]
    x0 = (x - t * mean) / (1 - t + t * std)
    return mean + (std - 1) * x0 + params["a"] * x + params["b"] * t


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("law", ORACLES)
def test_on_truncated_rectified_pairs_the_straight_map_has_no_residual(name, law, x64):
    """The average velocity of a straight flow is its velocity, whatever r; the pairs are told in
    advance, v = x1 - x0."""
    x0 = np.random.default_rng(0).normal(size=(32, 2 if law == "gaussian" else 1))
    if law == "gaussian":
        flow, x1 = (
            Velocity(lambda *_: at(), straight_gaussian),
            np.asarray([1.0, -2.0]) + x0 * np.asarray([0.5, 2.0]),
        )
    else:
        flow, x1 = (
            straight_mixture(),
            jax.jit(lambda x: oracles.mixture_flow_map(LINE_MIXTURE, x, 0.0, 1.0))(x0),
        )
    pairs = truncate_pairs({"x0": x0, "x": np.asarray(x1)}, 0.25)
    model = FlowMap(flow.init, lambda p, x, t, r, cond=None, *, key=None: flow.apply(p, x, t))
    loss = LOSSES[name](
        model, times=rectified_pairs(equal=0.25), jvp=solvers.finite_difference(1e-3)
    )
    run = jax.jit(lambda p: loss(p, KEY, pairs)[1]["residual"])
    assert pairs["x"].shape[0] == 24 and run(at()) < 1e-6
    assert run(at(a=0.1)) > 1e-3 and run(at(b=0.1)) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_bad_input(name):
    model, make, batch = (
        oracles.as_average_velocity(GAUSSIAN),
        LOSSES[name],
        {"x": GAUSSIAN.sample(KEY, 8)},
    )
    for options, said in (
        ({"power": -1.0}, "power >= 0"),
        ({"c": 0.0}, "c > 0"),
        ({"omega": 0.0}, "omega > 0"),
        ({"kappa": 1.0}, "kappa in"),
        ({"interval": (0.5, 0.2)}, "interval"),
        ({"omega": 2.0}, "needs null"),
        ({"kappa": lambda cond: cond}, "needs null"),
        ({"times": lambda key, n: (jnp.ones(n), jnp.zeros(n))}, "t <= r"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{said}"):
            make(model, **options)
    with pytest.raises(ValueError, match="'cond' in batch"):
        make(model, omega=2.0, null=NULL)({}, KEY, batch)
    with pytest.raises(ValueError, match=r"kappa\(cond\) of shape \[8\], got \[8, 2\]"):
        cond = jnp.zeros((8, 2))
        make(model, kappa=lambda cond: cond, null=NULL)({}, KEY, {**batch, "cond": cond})
    for frozen in (None, {}, {"ema": {}}):
        with pytest.raises(ValueError, match=f"{name}: expected 'teacher' in frozen"):
            make(model, teacher=oracles.as_velocity(GAUSSIAN))({}, KEY, batch, frozen)
    with pytest.raises(ValueError, match="under 'x'"):
        make(model)({}, KEY, {"x0": batch["x"]})
    flat = FlowMap(lambda *_: {}, lambda p, x, t, r, cond=None, *, key=None: x[:, 0])
    with pytest.raises(ValueError, match=r"shaped like x, \[8, 2\], got \[8\]"):
        make(flat)({}, KEY, batch)
