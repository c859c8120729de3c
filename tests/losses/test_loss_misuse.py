"""What the losses and samplers of few steps share when they are asked for the wrong thing, or an
odd one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import data, losses, nets, solvers, train
from jflow.types import FlowMap, Velocity

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 2))
T = jnp.linspace(0, 0.9, 8)
FLAT = Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: 0 * x)
MAP = FlowMap(lambda *a: {}, lambda p, x, t, r, cond=None, *, key=None: 0 * x)
STEPS = losses.grid_steps(lambda n: np.linspace(0, 1, n + 1), 4)


@pytest.mark.parametrize(
    "make",
    [
        losses.mean_flow,
        losses.improved_mean_flow,
        losses.shortcut,
        losses.anchored_consistency,
        losses.eulerian_map_distillation,
        lambda v: losses.lagrangian_map_distillation(v, v),
        lambda v: losses.trajectory_distillation(v, v),
        lambda v: solvers.sample_flow_map(v, {}, X),
    ],
)
def test_a_velocity_in_place_of_a_flow_map_is_named(make):
    with pytest.raises(
        TypeError, match="expected a FlowMap, got a Velocity: make one by jflow.flow_map"
    ):
        make(FLAT)


DROPPED = {
    "trigflow": lambda v, **k: losses.trigflow_consistency(v, **k),
    "discrete": lambda v, **k: losses.consistency_training(v, steps=STEPS, **k),
    "consistency flow": lambda v, **k: losses.consistency_flow_matching(v, **k),
    "anchored": lambda v, **k: losses.anchored_consistency(solvers.consistency_map(v), **k),
    "self-corrected": lambda v, **k: losses.self_correction(v, v, **k),
    "tunable": lambda v, **k: losses.tunable_distillation(v, v, **k),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropped_conditions_are_null(name):
    """With p=1 every row is told null, whatever its cond; the losses take 'dropped' and ignore
    it."""
    v = Velocity(
        lambda *a: {}, lambda p, x, t, cond=None, *, key=None: x * t[:, None] + p * cond[:, None]
    )
    frozen = {"teacher": 1.0, "ema": 0.5, "step": jnp.int32(0)}
    batch = {"x": X, "x0": X + 1.0, "cond": jnp.arange(8.0)}
    drop = losses.drop_cond(1.0, null=7.0)(KEY, batch)
    told = lambda cond, **more: DROPPED[name](v)(1.0, KEY, {**batch, "cond": cond, **more}, frozen)[  # noqa: E731
        0
    ]
    np.testing.assert_allclose(
        told(drop["cond"], dropped=drop["dropped"]), told(jnp.full(8, 7.0)), rtol=1e-6
    )
    assert abs(told(batch["cond"]) / told(jnp.full(8, 7.0)) - 1) > 1e-2
    with pytest.raises(
        ValueError, match=r"'dropped' of shape \[8\] and type bool, got \[8\] and int32"
    ):
        told(drop["cond"], dropped=jnp.ones(8, jnp.int32))


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (losses.trigflow_consistency(FLAT, tangent=lambda g: g.mean()), "a tangent"),
        (
            losses.eulerian_map_distillation(MAP, tangent=lambda g: g.mean()),
            "eulerian_map_distillation: expected a tangent",
        ),
        (losses.velocity_matching(FLAT, tangent=lambda g: g.mean()), "a tangent"),
        (losses.velocity_distillation(FLAT, FLAT, tangent=lambda g: g.mean()), "a tangent"),
        (
            losses.consistency_training(FLAT, steps=STEPS, metric=lambda *a: jnp.zeros(())),
            "a metric",
        ),
        (losses.self_correction(FLAT, FLAT, metric=lambda *a: jnp.zeros(())), "a metric"),
        (losses.mean_flow(MAP, kappa=lambda c: 0.5, null=0.0), r"kappa\(cond\)"),
        (
            losses.trajectory_distillation(
                solvers.consistency_map(Velocity(lambda *a: {}, lambda p, x, t, *a, **k: x[:, :1])),
                FLAT,
            ),
            "",
        ),
    ],
)
def test_outputs_that_would_broadcast_are_refused(loss, what):
    frozen = {"teacher": {}, "ema": {}, "step": jnp.int32(0)}
    with pytest.raises(ValueError, match=f"{what}.*shape"):
        loss({}, KEY, {"x": X, "cond": jnp.zeros(8)}, frozen)


def test_the_sampler_takes_steps_or_a_grid_and_renoises_from_data_alone():
    with pytest.raises(ValueError, match="one of steps and grid, got both"):
        solvers.sample_flow_map(MAP, {}, X, steps=2, grid=[0.0, 1.0])
    with pytest.raises(ValueError, match="expected a grid that ends at 1"):
        solvers.sample_flow_map(MAP, {}, X, grid=[0.0, 0.5], renoise=1.0)
    with pytest.raises(ValueError, match="expected rows .* got int32"):
        solvers.sample_flow_map(MAP, {}, jnp.zeros((4, 2), int))
    with pytest.raises(ValueError, match="expected rows"):
        solvers.apply_flow_map(MAP, {}, jnp.float32(1.0), 0.0, 1.0)
    with pytest.raises(ValueError, match="'velocity', 'acceleration'"):
        solvers.sample_acceleration(FLAT, FLAT, {"velocity": {}}, X)
    with pytest.raises(ValueError, match="steps"):
        losses.fixed_steps(FLAT, 0)


def test_a_loss_can_be_made_inside_jit():
    value = jax.jit(lambda x: losses.mean_flow(MAP)({}, KEY, {"x": x})[0])(X)
    np.testing.assert_allclose(value, losses.mean_flow(MAP)({}, KEY, {"x": X})[0], rtol=1e-6)


def test_a_student_keeps_its_own_types():
    net = nets.ResidualMLP(8)
    fresh = jflow.flow_map(net).init(KEY, X, T, T)
    teacher = jax.tree.map(
        lambda p: (p + 1).astype(jnp.bfloat16), jflow.velocity(net).init(KEY, X, T)
    )
    params = train.warm_start(fresh, teacher)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(
        params["stem"]["bias"], teacher["stem"]["bias"].astype(jnp.float32)
    )


def test_the_anchor_of_a_network_that_starts_at_zero_has_a_moderate_gradient():
    target = jax.random.normal(KEY, (4, 8, 2))
    slope = jax.grad(
        lambda v: jnp.mean(losses.squared_and_cosine_error(v, target, target, jnp.zeros(4)))
    )(0 * target)
    assert 0.1 < jnp.linalg.norm(slope) < 10
    assert losses.squared_and_cosine_error(
        jnp.ones(4), jnp.ones(4), jnp.ones(4), jnp.zeros(4)
    ).shape == (4,)


def test_shortcut_rows_of_no_weight_leave_the_metrics_finite():
    loss = losses.shortcut(MAP, levels=3, every=4)
    weight = jnp.array([0.0, 1, 1, 1, 0, 1, 1, 1])
    value, metrics = loss({}, KEY, {"x": X, "weight": weight}, {"ema": {}})
    assert np.isfinite(value) and metrics["self_consistency"] == 0


def test_an_average_of_model_and_encoder_reaches_the_inner_loss_as_the_models():
    velocity = Velocity(lambda *a: 0.0, lambda p, x, t, cond=None, *, key=None: p * x)
    encoder = losses.noise_encoder(FLAT)
    inner = losses.consistency_training(velocity, steps=STEPS, target=losses.averaged_target)
    loss, params = losses.variational_noise(inner, encoder, kl=0.1), {"model": 1.0, "encoder": {}}
    said = lambda ema: jax.jit(  # noqa: E731
        lambda: loss(params, KEY, {"x": X}, {"ema": {"model": ema, "encoder": {}}})[0]
    )()
    assert np.isfinite(said(1.0)) and abs(said(1.0) - said(0.5)) > 1e-4


def test_pairs_in_bfloat16_are_written_as_float32_and_checked(tmp_path):
    velocity = Velocity(
        lambda *a: 0.0, lambda p, x, t, cond=None, *, key=None: (p * x).astype(x.dtype)
    )
    options = dict(
        key=KEY, method=np.int64(2), batch=8, progress=False, about={"guidance": np.float32(3)}
    )
    source = data.normal_source((3,), jnp.bfloat16)
    data.generate_reflow_pairs(tmp_path / "good", velocity, jnp.float32(0.5), source, 8, **options)
    rows = data.read_shards(tmp_path / "good")
    assert (
        rows["x0"].dtype == rows["x"].dtype == np.float32
        and np.isfinite(np.asarray(rows["x"])).all()
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        data.generate_reflow_pairs(
            tmp_path / "bad", velocity, jnp.float32(jnp.nan), source, 8, **options
        )


def test_about_says_what_json_can_say(tmp_path):
    source, options = data.normal_source((2,)), dict(key=KEY, method=1, batch=4, progress=False)
    with pytest.raises(TypeError, match="about: expected what JSON can say, got a function"):
        data.generate_reflow_pairs(
            tmp_path, FLAT, {}, source, 4, about={"source": lambda key, n: {}}, **options
        )


def test_a_condition_of_pairs_is_one_array(tmp_path):
    source = lambda key, n: {"x0": jnp.zeros((n, 2)), "cond": {"label": jnp.zeros(n)}}  # noqa: E731
    with pytest.raises(ValueError, match="expected 'cond' of the source to be one array"):
        data.generate_reflow_pairs(tmp_path, FLAT, {}, source, 4, key=KEY, progress=False)
