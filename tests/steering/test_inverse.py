"""Inverse problems against closed forms: the posterior of Gaussian data, formulas in numpy, counts
of evaluations and of passes back through the network."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import oracles, paths, solvers, steering
from jflow.steering import SteeringCondition, measurements
from jflow.types import Velocity

A = np.array([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]])
Y = np.array([[1.0, -0.5]])
MEAN, VARIANCE, STD = np.array([0.5, -1.0, 0.2]), 2.0, 0.6
COSINE = paths.Schedule(lambda t: jnp.sin(jnp.pi * t / 2), lambda t: jnp.cos(jnp.pi * t / 2))
SEEN = measurements.matrix(A)
EULER = diffrax.Euler()


def posterior():
    """Mean and covariance of x1 ~ N(MEAN, VARIANCE I) given Y."""
    gain = VARIANCE * A.T @ np.linalg.inv(VARIANCE * A @ A.T + STD**2 * np.eye(2))
    return MEAN + gain @ (Y[0] - A @ MEAN), VARIANCE * (np.eye(3) - gain @ A)


def states(n=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)), np.linspace(0.05, 0.95, n)


def spread(schedule):
    """The variance of x1 given x_t."""

    def r2(t):
        a, s = schedule.alpha(t), schedule.sigma(t)
        return VARIANCE * s**2 / (VARIANCE * a**2 + s**2)

    return r2


@pytest.mark.parametrize("schedule", [paths.LINEAR, COSINE])
def test_exact_for_gaussian_data(schedule, x64):
    """With the variance of the data both give the velocity of the posterior, at all times."""
    velocity = oracles.as_velocity(oracles.gaussian(MEAN, VARIANCE, schedule))
    options = {"variance": spread(schedule), "schedule": schedule}
    x, t = states()

    @jax.jit
    def run(x, t, cond):
        through = steering.pseudoinverse_guidance(velocity, SEEN, STD, **options)
        past = steering.data_consistency(velocity, SEEN, STD, **options)
        # one way to say "J is the identity" in data_consistency, the other to say it of the data
        a, s = schedule.alpha, schedule.sigma
        straight = steering.data_consistency(
            velocity, SEEN, STD, scale=lambda t: s(t) ** 2 / (a(t) * spread(schedule)(t)), **options
        )
        return [v.apply({}, x, t, cond) for v in (through, past, straight)]

    through, past, straight = jax.device_get(run(x, t, SteeringCondition(Y)))
    want = oracles.gaussian(*posterior(), schedule).velocity(jnp.asarray(x), jnp.asarray(t))
    # the margin leaves these times alone: what remains is rounding
    np.testing.assert_allclose(through, want, atol=1e-10)
    np.testing.assert_allclose(past, want, atol=1e-10)
    v = oracles.gaussian(MEAN, VARIANCE, schedule).velocity(jnp.asarray(x), jnp.asarray(t))
    ratio = (schedule.sigma(t) ** 2 / (schedule.alpha(t) * spread(schedule)(t)))[:, None]
    np.testing.assert_allclose(straight, v + ratio * (past - v), atol=1e-9)


def test_exact_for_every_measurement_of_images(x64):
    """The posterior's velocity by linear algebra, with the matrix of each measurement."""
    rng = np.random.default_rng(3)
    event, t = (4, 4, 1), np.array([0.2, 0.7])
    some = rng.random(event[:2]) < 0.5
    kernel = np.array([[0.0, 0.1, 0.0], [0.1, 0.6, 0.1], [0.0, 0.1, 0.0]])
    seen = [
        measurements.fourier(some),
        measurements.fourier(some[..., None]),
        measurements.mask(some[..., None]),
        measurements.downsample(2, event),
        measurements.blur(kernel, event),
    ]

    def apply(params, x, t, cond=None, *, key=None):  # of data N(0, VARIANCE I)
        t = t.reshape(-1, *(1,) * (x.ndim - 1))
        return (VARIANCE * t - (1 - t)) / (VARIANCE * t**2 + (1 - t) ** 2) * x

    events = [event[:2], *[event] * 4]
    velocity, xs = Velocity(lambda *_: {}, apply), [rng.normal(size=(2, *e)) for e in events]

    @jax.jit
    def run(xs):
        made = []
        for a, x in zip(seen, xs, strict=True):
            columns = jnp.eye(16).reshape(16, *x.shape[1:])
            steered = steering.data_consistency(velocity, a, STD, variance=spread(paths.LINEAR))
            y = a.apply(jnp.flip(x, axis=0))
            made.append((a.apply(columns), y, steered.apply({}, x, t, SteeringCondition(y))))
        return made

    for (a, y, found), x in zip(jax.device_get(run(xs)), xs, strict=True):
        a, y, flat = a.reshape(16, -1).T, y.reshape(2, -1), x.reshape(2, 16)
        cov = np.linalg.inv(np.eye(16) / VARIANCE + a.T @ a / STD**2)
        mean = y @ a @ cov / STD**2
        for i in range(2):
            noisy = t[i] ** 2 * cov + (1 - t[i]) ** 2 * np.eye(16)
            x1 = mean[i] + t[i] * cov @ np.linalg.solve(noisy, flat[i] - t[i] * mean[i])
            want = (x1 - flat[i]) / (1 - t[i])
            np.testing.assert_allclose(found[i].ravel(), want, atol=1e-8)


def test_samples_of_a_gaussian_posterior(x64):
    """The flow map of the posterior."""
    velocity = oracles.as_velocity(oracles.gaussian(MEAN, VARIANCE))
    steered = steering.data_consistency(velocity, SEEN, STD, variance=spread(paths.LINEAR))
    x0, _ = states()
    x1, info = jax.device_get(
        jax.jit(lambda x0, y: steering.sample_inverse(steered, {}, x0, SEEN, y, method=100))(x0, Y)
    )
    want = oracles.gaussian(*posterior()).flow_map(jnp.asarray(x0), 0.0, 1.0)
    np.testing.assert_allclose(x1, want, atol=2e-3)  # (1 / 100)^2, and the margin 1e-3
    np.testing.assert_allclose(info.residual, x1 @ A.T - Y, atol=1e-12)
    np.testing.assert_allclose(info.norm, np.linalg.norm(x1 @ A.T - Y, axis=1), atol=1e-12)
    assert info.evaluations.tolist() == [200] * 5 and not info.status.any()


def test_without_noise_the_null_space_is_left_to_the_velocity(x64):
    rng = np.random.default_rng(1)
    oracle = oracles.mixture([0.5, 0.5], rng.normal(size=(2, 3)), [0.3, 0.7])
    velocity = oracles.as_velocity(oracle)
    steered = steering.data_consistency(velocity, SEEN)
    x, t = states()

    @jax.jit
    def run(x, t):
        push = steered.apply({}, x, t, SteeringCondition(Y)) - velocity.apply({}, x, t)
        _, info = steering.sample_inverse(steered, {}, x, SEEN, Y, method=solvers.fixed(7, EULER))
        start = steering.consistent_source(SEEN, x, Y, 0.3)
        return measurements.null_space(SEEN, push), info, SEEN.apply(start)

    unseen, info, seen = jax.device_get(run(x, t))
    np.testing.assert_allclose(unseen, 0, atol=1e-12)
    # the last step of Euler goes to the prediction, and it answers the measurement exactly
    np.testing.assert_allclose(info.norm, 0, atol=1e-12)
    assert info.evaluations.tolist() == [7] * 5
    np.testing.assert_allclose(seen, 0.3 * Y + 0.7 * x @ A.T, atol=1e-12)


def test_dps_is_the_limit_of_a_sure_prediction(x64):
    """Where x1 given x_t is taken for certain, r -> 0, pseudoinverse_guidance follows the gradient
    of the likelihood."""
    velocity = oracles.as_velocity(
        oracles.mixture([0.4, 0.6], [[1.0, 0, 0], [0, -1, 1]], [0.3, 0.7])
    )
    sure = lambda t: jnp.full_like(t, 1e-9)  # noqa: E731
    x, t = states()

    @jax.jit
    def run(x, t, cond):
        limit = steering.pseudoinverse_guidance(velocity, SEEN, STD, variance=sure)
        loss = steering.squared_residual(SEEN, STD)
        dps = steering.loss_guidance(velocity, loss, lambda t: (1 - t) / t)
        return limit.apply({}, x, t, cond), dps.apply({}, x, t, cond)

    limit, dps = jax.device_get(run(x, t, SteeringCondition(Y)))
    np.testing.assert_allclose(limit, dps, rtol=1e-6)  # the variance over that of the noise, 3e-9


def bent(traces=None, back=True):
    """tanh(w x + t), that notes how often it is traced; with back=False a pass back through it is
    an error."""

    @jax.custom_vjp
    def net(w, x, t):
        return jnp.tanh(w * x + t[:, None])

    def forward(w, x, t):
        return net(w, x, t), (w, x, t)

    def backward(kept, cotangent):
        raise AssertionError("a pass back through the network")

    net.defvjp(forward, backward)

    def apply(params, x, t, cond=None, *, key=None):
        if traces is not None:
            traces.append(x.shape)
        if back:
            return jnp.tanh(params["w"] * x + t[:, None])
        return net(params["w"], x, t)

    return Velocity(lambda key, x, t, cond=None: {"w": jnp.ones(())}, apply)


PARAMS = {"w": jnp.asarray(0.75)}


def to_image(x1, image):
    return jnp.sum((x1 - image) ** 2, axis=1) / 2


def count(jaxpr, name):
    """How often a primitive is in a program, inner programs included."""
    inner = [
        p
        for e in jaxpr.eqns
        for v in e.params.values()
        for p in (v if isinstance(v, tuple | list) else [v])
    ]
    inner = [getattr(p, "jaxpr", p) for p in inner]
    return sum(e.primitive.name == name for e in jaxpr.eqns) + sum(
        count(p, name) for p in inner if hasattr(p, "eqns")
    )


def test_flow_chef_never_goes_back_through_the_network():
    """By the program: a network whose derivative is an error, and one tanh in the jaxpr with no
    transpose of it; the methods that do go back raise."""
    x, t = (jnp.asarray(a, jnp.float32) for a in states())
    cond = SteeringCondition(jnp.asarray(Y, jnp.float32))
    past = {
        "flow_chef": lambda v: steering.flow_chef(v, steering.residual_norm(SEEN), 2.0),
        "data_consistency": lambda v: steering.data_consistency(v, SEEN, STD),
    }
    through = {
        "loss_guidance": lambda v: steering.loss_guidance(v, steering.residual_norm(SEEN), 2.0),
        "pseudoinverse_guidance": lambda v: steering.pseudoinverse_guidance(v, SEEN, STD),
    }
    for make in past.values():
        steered = make(bent(back=False))
        jax.make_jaxpr(steered.apply)(PARAMS, x, t, cond)
        program = jax.make_jaxpr(make(bent()).apply)(PARAMS, x, t, cond).jaxpr
        assert count(program, "tanh") == 1
    for make in through.values():
        with pytest.raises(AssertionError, match="a pass back"):
            jax.make_jaxpr(make(bent(back=False)).apply)(PARAMS, x, t, cond)


def test_flow_chef_is_the_step_of_the_paper(x64):
    """x <- x - s' grad L(x1), then a step of Euler with the same v, in numpy; and what the two
    gradients differ by, d x1 / d x."""
    x, t = states()
    image, h, size = np.array([[1.0, 2.0, 3.0]]), 0.25, 0.1
    cond = SteeringCondition(image)

    @jax.jit
    def run(x, t):
        chef = steering.flow_chef(bent(), to_image, size / h).apply(PARAMS, x, t, cond)
        through = steering.loss_guidance(bent(), to_image, size / h).apply(PARAMS, x, t, cond)
        late = steering.flow_chef(bent(), to_image, 1.0, window=(0.4, 0.6))
        norm = steering.residual_norm(SEEN)
        gradient = jax.grad(lambda x: norm(x, Y)[0])
        exact = jnp.asarray(np.linalg.pinv(A) @ Y[0])[None]
        return chef, through, late.apply(PARAMS, x, t, cond), (gradient(x[:1]), gradient(exact))

    chef, through, late, (slope, flat) = jax.device_get(run(x, t))
    v = np.tanh(0.75 * x + t[:, None])
    x1 = x + (1 - t)[:, None] * v
    np.testing.assert_allclose(x + h * chef, x - size * (x1 - image) + h * v, atol=1e-12)
    jacobian = 1 + (1 - t)[:, None] * 0.75 * (1 - v**2)
    np.testing.assert_allclose(through, v - size / h * jacobian * (x1 - image), atol=1e-12)
    inside = (t >= 0.4) & (t <= 0.6)
    assert inside.any() and not inside.all()
    np.testing.assert_allclose(late, v - inside[:, None] * (x1 - image), atol=1e-12)
    away = x[0] @ A.T - Y[0]
    np.testing.assert_allclose(slope[0], away @ A / np.linalg.norm(away), atol=1e-12)
    assert np.isfinite(flat).all() and np.abs(flat).max() <= np.linalg.norm(A, 2) + 1e-9


CALLS = []


def note(x):
    CALLS.append(x.shape[0])
    return np.zeros_like(x)


def counted():
    """A velocity that counts how often it runs, those in passes back included."""

    def apply(params, x, t, cond=None, *, key=None):
        form = jax.ShapeDtypeStruct(x.shape, x.dtype)
        zeros = jax.pure_callback(note, form, jax.lax.stop_gradient(x))
        return params["w"] * jnp.tanh(x + zeros)

    return Velocity(lambda key, x, t, cond=None: {"w": jnp.ones(())}, apply)


def runs(function, *args):
    """(what it returns, the rows of each evaluation that it made)."""
    CALLS.clear()
    return jax.device_get(jax.jit(function)(*args)), list(CALLS)


def test_evaluations_are_those_of_the_docstrings():
    x, _ = states(2)
    x, y, n = jnp.asarray(x, jnp.float32), jnp.asarray(Y, jnp.float32), 3
    how = solvers.fixed(n, EULER)
    net, norm = counted(), steering.residual_norm(SEEN)
    for steered in (
        steering.pseudoinverse_guidance(net, SEEN, STD),
        steering.data_consistency(net, SEEN, STD),
        steering.loss_guidance(net, norm, 1.0),
        steering.flow_chef(net, norm, 1.0),
    ):
        run = lambda x, y, v=steered: steering.sample_inverse(v, PARAMS, x, SEEN, y, method=how)  # noqa: E731
        (_, info), made = runs(run, x, y)
        assert info.evaluations.tolist() == [n, n] and made == [2] * n
    run = lambda key, y: steering.pnp_flow(net, PARAMS, key, SEEN, y, steps=n, draws=2)  # noqa: E731
    (_, info), made = runs(run, jax.random.key(0), jnp.concatenate([y, y]))
    assert info.evaluations.tolist() == [2 * n] * 2 and made == [4] * n
    key = jax.random.key(1)
    run = lambda x, y: steering.flower(net, PARAMS, x, key, SEEN, y, STD, steps=n)  # noqa: E731
    (_, info), made = runs(run, x, y)
    assert info.evaluations.tolist() == [n, n] and made == [2] * n
    run = lambda x, y: steering.d_flow(net, PARAMS, x, SEEN, y, steps=2, method=how)  # noqa: E731
    (_, info), made = runs(run, x, y)
    assert len(made) == (2 * 3 + 1) * n and info.evaluations.tolist() == [len(made)] * 2


def test_new_measurements_do_not_compile_anew_and_rows_fail_alone():
    traces = []
    steered = steering.data_consistency(bent(traces), SEEN)
    x, _ = states()
    x = jnp.asarray(x, jnp.float32)

    @jax.jit
    def run(x, y):
        return steering.sample_inverse(steered, PARAMS, x, SEEN, y, method=solvers.fixed(2, EULER))

    y = jnp.asarray(Y, jnp.float32)
    run(x, y)
    made = len(traces)
    x1, info = jax.device_get(run(x.at[1].set(jnp.nan), y + 1))
    assert len(traces) == made
    bad = np.arange(5) == 1
    assert (np.isnan(info.norm) == bad).all() and (np.isnan(x1).any(axis=1) == bad).all()
    assert (info.status == np.where(bad, solvers.Status.NOT_FINITE, 0)).all()
    np.testing.assert_allclose(info.norm[~bad], 0, atol=1e-5)


def test_pnp_flow_by_hand(x64):
    """Two turns with two draws, of Gaussian data, whose prediction is known."""
    y, key = np.array([[1.0, -0.5], [0.0, 2.0]]), jax.random.key(3)
    velocity = oracles.as_velocity(oracles.gaussian(MEAN, VARIANCE))
    x, _ = jax.device_get(
        jax.jit(
            lambda key, y: steering.pnp_flow(
                velocity, {}, key, SEEN, y, steps=2, step_size=0.2, power=0.5, draws=2
            )
        )(key, y)
    )
    want = y @ np.linalg.pinv(A).T
    for t, own in zip((0.0, 0.5), jax.random.split(key, 2), strict=True):
        want = want - 0.2 * (1 - t) ** 0.5 * (want @ A.T - y) @ A
        e = np.asarray(jax.random.normal(own, (4, 3)))
        z = t * np.repeat(want, 2, axis=0) + (1 - t) * e
        gain = VARIANCE * t / (VARIANCE * t**2 + (1 - t) ** 2)
        want = (MEAN + gain * (z - t * MEAN)).reshape(2, 2, 3).mean(axis=1)
    np.testing.assert_allclose(x, want, atol=1e-12)


def test_flower_samples_a_gaussian_posterior(x64):
    """With spread 1 in any number of steps: 20,000 samples, five standard errors."""
    velocity, n = oracles.as_velocity(oracles.gaussian(MEAN, VARIANCE)), 20_000
    mean, cov = posterior()
    run = jax.jit(
        lambda x0, key, steps: steering.flower(
            velocity,
            {},
            x0,
            key,
            SEEN,
            Y,
            STD,
            steps=steps,
            spread=1.0,
            variance=spread(paths.LINEAR),
        )[0],
        static_argnums=2,
    )
    for steps in (1, 3):
        first, second = jax.random.split(jax.random.key(steps))
        x = np.asarray(run(jax.random.normal(first, (n, 3)), second, steps))
        variances = np.diag(cov)
        assert (np.abs(x.mean(axis=0) - mean) < 5 * np.sqrt(variances / n)).all()
        error = np.sqrt((np.outer(variances, variances) + cov**2) / n)  # of a covariance
        assert (np.abs(np.cov(x.T) - cov) < 5 * error).all()


def test_flower_by_hand(x64):
    """Two steps with spread 0, of Gaussian data, with the posterior of each prediction solved for
    by another formula; without noise the end answers the measurement."""
    velocity = oracles.as_velocity(oracles.gaussian(MEAN, VARIANCE))
    x0, _ = states(2)
    key = jax.random.key(5)
    run = jax.jit(
        lambda x0, std: steering.flower(velocity, {}, x0, key, SEEN, Y, std, steps=2),
        static_argnums=1,
    )
    x, info = jax.device_get(run(x0, STD))
    want = x0
    for t, own in zip((0.0, 0.5), jax.random.split(key, 2), strict=True):
        gain = VARIANCE * t / (VARIANCE * t**2 + (1 - t) ** 2)
        x1 = MEAN + gain * (want - t * MEAN)
        r2 = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
        precision = np.eye(3) / r2 + A.T @ A / STD**2
        m = np.linalg.solve(precision, (x1 / r2 + Y @ A / STD**2).T).T
        e = np.asarray(jax.random.normal(jax.random.split(own, 3)[2], (2, 3)))
        want = (t + 0.5) * m + (0.5 - t) * e
    np.testing.assert_allclose(x, want, atol=1e-12)
    np.testing.assert_allclose(info.residual, want @ A.T - Y, atol=1e-12)
    np.testing.assert_allclose(run(x0, 0.0)[1].norm, 0, atol=1e-12)


def test_d_flow_by_hand(x64):
    """Three steps of gradient descent, with a velocity that moves by 1."""
    one = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: jnp.ones_like(x))
    x0, _ = states(2)
    x1, info = jax.device_get(
        jax.jit(
            lambda x0, y: steering.d_flow(
                one, {}, x0, SEEN, y, steps=3, optimizer=optax.sgd(0.05), prior=0.3, method=2
            )
        )(x0, Y)
    )
    want = x0
    for _ in range(3):
        slope = 2 * ((want + 1) @ A.T - Y) @ A
        length = np.linalg.norm(want, axis=1, keepdims=True)
        want = want - 0.05 * (slope + 0.3 * (want - 2 * want / length**2))
    np.testing.assert_allclose(x1, want + 1, atol=1e-8)  # 1e-10 keeps log |x0| finite
    np.testing.assert_allclose(info.residual, (want + 1) @ A.T - Y, atol=1e-8)


V, X = bent(), jnp.ones((1, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: steering.pseudoinverse_guidance(V, SEEN, -1.0), "finite std >= 0, got -1.0"),
        (lambda: steering.data_consistency(V, SEEN, -1.0), "finite std >= 0, got -1.0"),
        (lambda: steering.data_consistency(V, SEEN, margin=0.5), r"margin in \(0, 0.5\), got 0.5"),
        (lambda: steering.flow_chef(V, to_image, -1.0), "scale >= 0 and finite, got -1.0"),
        (
            lambda: steering.flow_chef(V, to_image, 1.0, window=(0.5, 1.5)),
            r"flow_chef: expected a window .* 0 <= first < last <= 1, got \(0.5, 1.5\)",
        ),
        (lambda: steering.loss_guidance(V, to_image, 1.0, window=(0.5, 0.2)), "expected a window"),
        (lambda: steering.data_consistency(V, SEEN, window=0.5), "expected a window"),
        (lambda: steering.squared_residual(SEEN, 0.0), "expected std > 0, got 0.0"),
        (lambda: steering.consistent_source(SEEN, jnp.ones((1, 3)), Y, 2.0), r"t in \[0, 1\]"),
        (
            lambda: steering.pnp_flow(V, PARAMS, jax.random.key(0), SEEN, Y, steps=0),
            "steps to be a whole number",
        ),
        (lambda: steering.pnp_flow(V, PARAMS, None, SEEN, Y), "needs a key"),
        (
            lambda: steering.flower(V, PARAMS, X, jax.random.key(0), SEEN, Y, STD, spread=2.0),
            r"spread in \[0, 1\], got 2.0",
        ),
        (lambda: steering.flower(V, PARAMS, X, None, SEEN, Y, STD), "needs a key"),
        (
            lambda: steering.d_flow(V, PARAMS, X, SEEN, Y, prior=-1.0),
            "finite prior >= 0",
        ),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_things_than_measurements_and_losses_are_named():
    for make in (
        lambda a: steering.data_consistency(V, a),
        lambda a: steering.pseudoinverse_guidance(V, a, 0.1),
        lambda a: steering.flower(V, PARAMS, X, jax.random.key(0), a, Y, 0.1),
        lambda a: steering.pnp_flow(V, PARAMS, jax.random.key(0), a, Y),
        lambda a: steering.d_flow(V, PARAMS, X, a, Y),
        lambda a: steering.sample_inverse(V, PARAMS, X, a, Y),
        lambda a: steering.consistent_source(a, X, Y, 0.1),
        lambda a: measurements.null_space(a, X),
        steering.residual_norm,
        steering.squared_residual,
    ):
        with pytest.raises(TypeError, match=r"expected a Measurement, such as measurements.matrix"):
            make(A)
    for make in (steering.flow_chef, steering.loss_guidance):
        with pytest.raises(TypeError, match=r"expected a loss .*residual_norm\(measurement\), got"):
            make(V, SEEN, 1.0)


def test_types_are_kept_and_late_times_of_half_precision_are_finite():
    x, y = jnp.ones((4, 3), jnp.bfloat16), jnp.ones((4, 2), jnp.bfloat16)
    key = jax.random.key(0)
    made = [
        steering.flower(V, PARAMS, x, key, SEEN, y, 0.1, steps=2)[0],
        steering.pnp_flow(V, PARAMS, key, SEEN, y, steps=2)[0],
        steering.data_consistency(V, SEEN, 0.1).apply(
            PARAMS, x, jnp.ones(4, jnp.bfloat16), SteeringCondition(y)
        ),
        steering.pseudoinverse_guidance(V, SEEN, 0.1).apply(
            PARAMS, x, jnp.ones(4, jnp.bfloat16), SteeringCondition(y)
        ),
    ]
    assert [a.dtype for a in made] == [jnp.bfloat16] * 4
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in made)


def test_bad_shapes():
    x, t, y = jnp.ones((4, 3)), jnp.full((4,), 0.5), jnp.ones((4, 2))
    cond = SteeringCondition(y)
    for steered in (
        steering.data_consistency(V, SEEN),
        steering.pseudoinverse_guidance(V, SEEN, 0.1),
        steering.flow_chef(V, steering.residual_norm(SEEN), 1.0),
        steering.loss_guidance(V, steering.squared_residual(SEEN), 1.0),
    ):
        with pytest.raises(ValueError, match=r"measurement of shape \[4, 2\], .*got \[4, 5\]"):
            steered.apply(PARAMS, x, t, SteeringCondition(jnp.ones((4, 5))))
        with pytest.raises(ValueError, match="SteeringCondition.*got an array"):
            steered.apply(PARAMS, x, t, y)
        with pytest.raises(ValueError, match="to lead with 4 rows"):
            steered.apply(PARAMS, x, t, SteeringCondition(jnp.ones((3, 2))))
    for make in (steering.flow_chef, steering.loss_guidance):
        with pytest.raises(ValueError, match=r"expected the loss of shape \[4\], got \[\]"):
            make(V, lambda x1, y: jnp.sum(x1), 1.0).apply(PARAMS, x, t, cond)
    with pytest.raises(ValueError, match=r"measurement of shape \[4, 2\], .*got \[4, 3\]"):
        steering.sample_inverse(steering.data_consistency(V, SEEN), PARAMS, x, SEEN, x)
    with pytest.raises(ValueError, match=r"flower: .*of shape \[4, 2\], .*got \[4, 3\]"):
        steering.flower(V, PARAMS, x, jax.random.key(0), SEEN, x, 0.1)
    with pytest.raises(ValueError, match=r"variance\(t\) of shape \[4\], got \[\]"):
        steering.data_consistency(V, SEEN, 0.1, variance=lambda t: t[0]).apply(PARAMS, x, t, cond)
