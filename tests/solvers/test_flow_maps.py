"""The protocol of few-step models: exact maps of a Gaussian carry exactly, evaluations are counted,
students grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import losses, metrics, nets, oracles, solvers, times, train
from jflow._core import times as core_times
from jflow.types import Field, FlowMap, Velocity

ORACLE = oracles.gaussian([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
MAP = oracles.as_average_velocity(ORACLE)
X = jax.random.normal(jax.random.key(0), (5, 2))


def test_one_step_and_many_of_the_exact_map_end_in_the_same_place():
    exact = ORACLE.flow_map(X, jnp.zeros(5), jnp.ones(5))
    for options in ({"steps": 1}, {"steps": 4}, {"grid": [0.0, 0.1, 0.7, 1.0]}):
        x, info = solvers.sample_flow_map(MAP, {}, X, **options)
        np.testing.assert_allclose(x, exact, atol=2e-6)
        assert np.all(info.status == solvers.Status.OK)
    np.testing.assert_array_equal(info.evaluations, 3)


def test_carry_and_the_velocity_inside():
    t, r = jnp.full(5, 0.2), jnp.full(5, 0.6)
    np.testing.assert_allclose(
        solvers.apply_flow_map(MAP, {}, X, t, r), ORACLE.flow_map(X, t, r), atol=1e-6
    )
    np.testing.assert_allclose(
        solvers.apply_flow_map(MAP, {}, solvers.apply_flow_map(MAP, {}, X, t, r), r, t),
        X,
        atol=1e-6,
    )  # and back
    np.testing.assert_allclose(
        solvers.instantaneous_velocity(MAP).apply({}, X, t), ORACLE.velocity(X, t), atol=1e-6
    )


@pytest.mark.parametrize("renoise", [0.5, 1.0])
def test_renoising_keeps_the_marginals(renoise):
    n = 20_000
    x0 = jax.random.normal(jax.random.key(1), (n, 2))
    draw = jax.jit(
        lambda x0, key: solvers.sample_flow_map(MAP, {}, x0, steps=3, renoise=renoise, key=key)[0]
    )
    x = np.asarray(draw(x0, jax.random.key(2)))
    mean, cov = (np.asarray(v[0]) for v in ORACLE.marginal(1.0))
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * np.sqrt(0.5 / n))
    np.testing.assert_allclose(np.cov(x.T), cov, atol=5 * np.sqrt(2 * 0.5**2 / n))
    assert (
        np.abs(x - ORACLE.flow_map(x0, jnp.zeros(n), jnp.ones(n))).max() > 0.1
    )  # not the deterministic map


def test_consistency_models_are_asked_for_data_alone():
    asked = []

    def init(key, x, t, cond=None):
        return {}

    def apply(params, x, t, cond=None, *, key=None):
        asked.append(t.shape)
        return ORACLE.average_velocity(x, t, jnp.ones_like(t))

    model = solvers.consistency_map(Velocity(init, apply))
    x, _ = solvers.sample_flow_map(model, {}, X)
    np.testing.assert_allclose(x, ORACLE.flow_map(X, jnp.zeros(5), jnp.ones(5)), atol=2e-6)
    many = jnp.repeat(X, 4000, axis=0)
    two, _ = solvers.sample_flow_map(
        model, {}, many, grid=[0.0, 0.4, 1.0], renoise=1.0, key=jax.random.key(3)
    )
    # to data, to t = 0.4 by fresh noise, to data: the law of x1 given each x0, pushed through the
    # posterior map
    x1 = solvers.apply_flow_map(MAP, {}, many, 0.0, 1.0)
    z = jax.random.normal(jax.random.key(4), x1.shape)
    again = solvers.apply_flow_map(MAP, {}, 0.4 * x1 + 0.6 * z, 0.4, 1.0)
    np.testing.assert_allclose(np.mean(two, 0), np.mean(again, 0), atol=0.02)
    np.testing.assert_allclose(np.std(two, 0), np.std(again, 0), atol=0.02)


def test_total_derivative_is_that_along_the_trajectory(x64):
    t, r = jnp.linspace(0.1, 0.7, 5), jnp.linspace(0.3, 0.9, 5)
    x = X.astype(jnp.float64)
    v = ORACLE.velocity(x, t)
    u, slope = solvers.total_derivative(MAP, {}, x, t, r, v)
    # d/dt of (r - t) u = x_r - x_t with x_r fixed: the MeanFlow identity
    np.testing.assert_allclose(u, v + (r - t)[:, None] * slope, atol=1e-9)
    errors = []
    for h in (2e-2, 1e-2):
        _, approximate = solvers.total_derivative(
            MAP, {}, x, t, r, v, jvp=solvers.finite_difference(h)
        )
        errors.append(float(jnp.max(jnp.abs(approximate - slope))))
    assert 3.5 < errors[0] / errors[1] < 4.5  # second order


NETS = {
    "ResidualMLP": (nets.ResidualMLP(16, 2, num_classes=3), (4,)),
    "UNet": (nets.UNet(8, num_classes=3), (4, 4, 1)),
    "DiT": (nets.DiT(2, 16, 2, num_heads=2, num_classes=3), (4, 4, 1)),
}


@pytest.mark.parametrize("name", NETS)
def test_a_flow_map_grown_from_a_velocity_is_that_velocity_until_it_is_trained(name):
    net, event = NETS[name]
    velocity, model = jflow.velocity(net), jflow.flow_map(net)
    rng = np.random.default_rng(0)
    x, t, r = rng.normal(size=(3, *event)), np.asarray([0.0, 0.3, 0.5]), np.ones(3)
    x, t, r = (a.astype(np.float32) for a in (x, t, r))
    cond = np.asarray([0, 1, 3])
    teacher = jax.eval_shape(velocity.init, jax.random.key(1), x, t, cond)
    teacher = jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(p.dtype), teacher)

    @jax.jit
    def run(key, teacher):
        student = train.warm_start(model.init(key, x, t, r, cond), teacher)
        return student, velocity.apply(teacher, x, t, cond)

    student, v = jax.device_get(run(jax.random.key(2), teacher))
    np.testing.assert_allclose(model.apply(student, x, t, r, cond), v, atol=1e-5)
    moved = jax.tree.map(lambda p: (p + 0.3 * rng.normal(size=p.shape)).astype(p.dtype), student)
    near, far = (
        np.asarray(model.apply(moved, x, t, other, cond)) for other in (r, r - np.float32(0.2))
    )
    assert np.all(np.max(np.abs(near - far).reshape(3, -1), axis=1) > 1e-3)  # r is heard


@pytest.mark.parametrize("name", NETS)
def test_networks_have_forward_derivatives(name):
    """jvp through norms, attention, dropout under one key and remat, against central
    differences."""
    net, event = NETS[name]
    variants = {"dropout": net.clone(dropout=0.3)} | (
        {"remat": net.clone(remat=True)} if name == "DiT" else {}
    )
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, *event), jnp.float64)
        t, r, cond = jnp.asarray([0.2, 0.5]), jnp.asarray([0.6, 0.9]), jnp.asarray([0, 2])
        v = jax.random.normal(jax.random.key(1), x.shape, jnp.float64)
        for variant in variants.values():
            model = jflow.flow_map(variant.clone(time_scale=1.0))
            shapes = jax.eval_shape(model.init, jax.random.key(2), x, t, r, cond)
            rng = np.random.default_rng(0)
            params = jax.tree.map(
                lambda p, rng=rng: jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), shapes
            )

            def slope(jvp, model=model, params=params):
                key = jax.random.key(3)
                return solvers.total_derivative(model, params, x, t, r, v, cond, key=key, jvp=jvp)[
                    1
                ]

            exact = jax.jit(lambda slope=slope: slope(jax.jvp))()
            near = jax.jit(lambda slope=slope: slope(solvers.finite_difference(1e-4)))()
            assert np.max(np.abs(exact)) > 1e-2
            np.testing.assert_allclose(exact, near, atol=1e-5 * float(np.max(np.abs(exact))))


@pytest.mark.parametrize("name", NETS)
def test_networks_have_forward_derivatives_in_r(name, x64):
    """As `lagrangian_map_distillation` asks for it, under dropout and, where there is one,
    remat."""
    net, event = NETS[name]
    net = net.clone(dropout=0.3, time_scale=1.0, **({"remat": True} if name == "DiT" else {}))
    model = jflow.flow_map(net)
    x = jax.random.normal(jax.random.key(0), (2, *event), jnp.float64)
    t, r, cond = jnp.asarray([0.2, 0.5]), jnp.asarray([0.6, 0.9]), jnp.asarray([0, 2])
    shapes = jax.eval_shape(model.init, jax.random.key(2), x, t, r, cond)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), shapes)

    def slope(jvp):
        apply = lambda r: model.apply(params, x, t, r, cond, key=jax.random.key(3))  # noqa: E731
        return jvp(apply, (r,), (jnp.ones_like(r),))[1]

    exact, near = jax.jit(
        lambda: [slope(jvp) for jvp in (jax.jvp, solvers.finite_difference(1e-4))]
    )()
    assert np.max(np.abs(exact)) > 1e-2
    np.testing.assert_allclose(exact, near, atol=1e-5 * float(np.max(np.abs(exact))))


def test_remat_changes_no_gradient_of_a_loss_with_a_forward_derivative(x64):
    """Reverse over forward through attention, norms, dropout under one key and recomputed
    blocks."""
    net = nets.DiT(2, 16, 2, num_heads=2, num_classes=3, dropout=0.3, time_scale=1.0)
    x, t, cond = (
        jax.random.normal(jax.random.key(0), (3, 4, 4, 1), jnp.float64),
        jnp.ones(3),
        jnp.asarray([0, 1, 3]),
    )
    shapes = jax.eval_shape(jflow.flow_map(net).init, jax.random.key(1), x, t, t, cond)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), shapes)
    made = [
        losses.mean_flow(jflow.flow_map(net.clone(remat=r)), times=times.pairs(equal=0.0))
        for r in (False, True)
    ]
    batch = {"x": x, "cond": cond}
    plain, remat = jax.jit(
        lambda p: [jax.grad(lambda p, f=f: f(p, jax.random.key(2), batch)[0])(p) for f in made]
    )(params)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(remat), strict=True
    ):
        assert np.any(one != 0), jax.tree_util.keystr(path)
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * float(np.max(np.abs(one))))


@jax.custom_vjp
def kernel(x):
    """tanh, by reverse mode alone."""
    return jnp.tanh(x)


kernel.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


def test_a_kernel_without_forward_mode_is_trained_by_finite_differences(x64):
    def of(act):
        return FlowMap(
            None,
            lambda p, x, t, r, cond=None, *, key=None: p * act(x + t[:, None]) * (r - t)[:, None],
        )

    batch, options = {"x": X.astype(jnp.float64)}, {"times": times.pairs(equal=0.25)}
    with pytest.raises(TypeError, match="custom_vjp"):
        losses.mean_flow(of(kernel), **options)(0.7, jax.random.key(1), batch)

    def grad(act, **more):
        loss = losses.mean_flow(of(act), **options, **more)
        return jax.jit(jax.grad(lambda p: loss(p, jax.random.key(1), batch)[0]))(0.7)

    np.testing.assert_allclose(
        grad(kernel, jvp=solvers.finite_difference(1e-4)), grad(jnp.tanh), rtol=1e-6
    )


def test_by_evaluations_reports_what_was_counted():
    rows = metrics.quality_by_evaluations(
        lambda n: solvers.sample_flow_map(MAP, {}, X, steps=n),
        lambda x: {"mean": jnp.mean(x)},
        counts=(1, 3),
    )
    assert [row["evaluations"] for row in rows] == [1, 3] and rows[0]["failed"] == 0
    heun = metrics.quality_by_evaluations(
        lambda n: solvers.sample(oracles.as_velocity(ORACLE), {}, X, method=n),
        lambda x: {},
        counts=(2,),
    )
    assert heun == [{"evaluations": 4.0, "failed": 0.0}]


def test_rows_that_fail_are_nan_and_said_so():
    broken = FlowMap(
        MAP.init, lambda p, x, t, r, cond=None, *, key=None: jnp.where(x > 1, jnp.inf, x)
    )
    x = jnp.asarray([[0.0, 0.5], [2.0, 0.0]])
    out, info = solvers.sample_flow_map(broken, {}, x)
    np.testing.assert_array_equal(info.status, [solvers.Status.OK, solvers.Status.NOT_FINITE])
    assert np.all(np.isnan(out[1])) and np.all(np.isfinite(out[0]))
    assert metrics.quality_by_evaluations(lambda n: (out, info), lambda x: {"n": len(x)}, (1,))[
        0
    ] == {
        "evaluations": 1.0,
        "failed": 0.5,
        "n": 1.0,
    }


STUDENT = Velocity(None, lambda p, x, t, cond=None, *, key=None: jnp.sin(x))
STUDENT_MAP = FlowMap(None, lambda p, x, t, r, cond=None, *, key=None: jnp.sin(x))
TWICE = Field(None, lambda p, pair, t, cond=None, *, key=None: pair[0])
JUDGE = Field(None, lambda p, x, t, cond=None, *, key=None: jnp.sum(x, axis=1))
APART = lambda key, n, frozen: (jnp.full(n, 0.2), jnp.full(n, 0.3))  # noqa: E731
VP = jflow.paths.schedules.vp()
TAUGHT = {
    "mean_flow": lambda v: losses.mean_flow(STUDENT_MAP, teacher=v),
    "improved_mean_flow": lambda v: losses.improved_mean_flow(STUDENT_MAP, teacher=v),
    "shortcut": lambda v: losses.shortcut(STUDENT_MAP, teacher=v),
    "consistency_training": lambda v: losses.consistency_training(STUDENT, steps=APART, teacher=v),
    "consistency_flow_matching": lambda v: losses.consistency_flow_matching(STUDENT, teacher=v),
    "anchored_consistency": lambda v: losses.anchored_consistency(STUDENT_MAP, teacher=v),
    "eulerian_map_distillation": lambda v: losses.eulerian_map_distillation(STUDENT_MAP, v),
    "lagrangian_map_distillation": lambda v: losses.lagrangian_map_distillation(STUDENT_MAP, v),
    "self_correction": lambda v: losses.self_correction(STUDENT, v),
    "velocity_matching": lambda v: losses.velocity_matching(STUDENT, v),
    "velocity_distillation": lambda v: losses.velocity_distillation(STUDENT, v),
    "velocity_refiner": lambda v: losses.velocity_refiner(TWICE, v),
    "flow_guided_distillation": lambda v: losses.flow_guided_distillation(STUDENT, v),
    "distribution_matching": lambda v: losses.distribution_matching(
        lambda p, x0, cond: x0, STUDENT, v
    ),
    "bespoke_error": solvers.bespoke_error,
    "perflow": lambda v: losses.perflow(STUDENT, v),
    "phased_rectified_diffusion": lambda v: losses.phased_rectified_diffusion(
        STUDENT, v, schedule=VP
    ),
    "trajectory_distillation": lambda v: losses.trajectory_distillation(STUDENT_MAP, v),
    "trigflow_consistency": lambda v: losses.trigflow_consistency(STUDENT, teacher=v),
    "tunable_distillation": lambda v: losses.tunable_distillation(STUDENT, v),
}
SELF_TAUGHT = {
    "adversarial": losses.adversarial(lambda p, x0, cond: x0, JUDGE),
    "c_rectified_flow": losses.c_rectified_flow(JUDGE),
    "flow_matching": losses.flow_matching(STUDENT),
    "initial_velocity": losses.initial_velocity(STUDENT),
    "constant_acceleration": losses.constant_acceleration(STUDENT, STUDENT),
    "rectified_diffusion": losses.rectified_diffusion(STUDENT),
    "shared_timesteps": losses.shared_timesteps(STUDENT_MAP, STUDENT, STUDENT, (0.0, 0.5, 1.0)),
}
NETWORKS = {"student": {}, "fake": {}, "discriminator": {}}
FROZEN = {"teacher": {}, "ema": {}, "velocity": {}}


@pytest.mark.parametrize("name", TAUGHT)
def test_a_teacher_of_another_shape_is_named(name):
    """One column would broadcast."""
    narrow = Velocity(None, lambda p, x, t, cond=None, *, key=None: x[:, :1])
    with pytest.raises(
        ValueError, match=rf"{name}.*: expected a velocity shaped like x, \[5, 2\], got \[5, 1\]"
    ):
        params = solvers.bespoke_params(2) if name == "bespoke_error" else NETWORKS
        TAUGHT[name](narrow)(params, jax.random.key(0), {"x": X, "x0": X}, FROZEN)


@pytest.mark.parametrize("name", [*TAUGHT, *SELF_TAUGHT])
def test_pairs_that_do_not_match_the_data_are_refused(name):
    loss = TAUGHT[name](STUDENT) if name in TAUGHT else SELF_TAUGHT[name]
    for x0 in (X[:, :1], X[:4], X[:1]):
        with pytest.raises(
            ValueError, match=rf"{name}: expected 'x0' of the shape of 'x', \[5, 2\], got"
        ):
            loss(NETWORKS, jax.random.key(0), {"x": X, "x0": x0}, FROZEN)


def test_bad_input():
    with pytest.raises(ValueError, match="at least 1"):
        solvers.sample_flow_map(MAP, {}, X, steps=0)
    with pytest.raises(ValueError, match="rises strictly"):
        solvers.sample_flow_map(MAP, {}, X, grid=[1.0, 0.0])
    with pytest.raises(ValueError, match="renoise in"):
        solvers.sample_flow_map(MAP, {}, X, renoise=1.5)
    with pytest.raises(ValueError, match="needs a key"):
        solvers.sample_flow_map(MAP, {}, X, steps=2, renoise=1.0)
    with pytest.raises(ValueError, match="whole numbers"):
        metrics.quality_by_evaluations(lambda n: None, lambda x: {}, (0,))
    with pytest.raises(ValueError, match="0 < h"):
        solvers.finite_difference(0.0)
    with pytest.raises(ValueError, match="t <= r"):
        core_times.check_pairs("loss", lambda key, n: (jnp.ones(n), jnp.zeros(n)))
    with pytest.raises(ValueError, match=r"'b' is \[3\], the student has the shape \[2\]"):
        train.warm_start({"a": jnp.zeros(1), "b": jnp.zeros(2)}, {"b": jnp.zeros(3)})
    with pytest.raises(ValueError, match="no such leaf"):
        train.warm_start({"a": jnp.zeros(1)}, {"b": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"r of shape \[2\]"):
        nets.ResidualMLP(8, 1).init(
            jax.random.key(0), jnp.zeros((2, 1)), jnp.zeros(2), None, jnp.zeros(3)
        )
