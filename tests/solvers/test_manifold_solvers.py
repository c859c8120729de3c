"""Flows on manifolds against closed forms: orders of solvers, densities, and the velocity that
Riemannian flow matching learns."""

import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.random import clone
from keys import KEYS

from jflow import couplings, distributions, flows, guidance, losses, manifolds, paths, solvers
from jflow import velocity as velocity_of
from jflow.nets import TimeMLP
from jflow.types import Velocity

SPHERE, SO3, TORUS = manifolds.sphere(2), manifolds.so3(), manifolds.torus(1)
PULL = 1.3  # towards the north pole
A, B = np.random.default_rng(3).normal(size=(2, 3))


def made(apply):
    return Velocity(lambda *args: {}, apply)


def to_the_pole(params, x, t, cond=None, *, key=None):
    """Towards the pole and around it: with z the height and r the turn at time t,

    tan(angle / 2) falls like exp(-PULL t),    the turn grows by sin(3 t)
    """
    pole = jnp.asarray([[0.0, 0.0, 1.0]], x.dtype)
    around = jnp.stack([-x[:, 1], x[:, 0], 0 * x[:, 2]], axis=1)
    return PULL * (pole - x[:, 2:] * x) + 3 * jnp.cos(3 * t)[:, None].astype(x.dtype) * around


def pole_solution(x0, t=1.0):
    angle = 2 * np.arctan(np.tan(np.arccos(x0[:, 2]) / 2) * np.exp(-PULL * t))
    turn = np.arctan2(x0[:, 1], x0[:, 0]) + np.sin(3 * t)
    flat = np.sin(angle)
    return np.stack([flat * np.cos(turn), flat * np.sin(turn), np.cos(angle)], axis=1)


def cross(w):
    return np.cross(np.eye(3), np.asarray(w)).T


def from_both_sides(params, x, t, cond=None, *, key=None):
    """R' = [a] R + R [b], whose solution is expm(t [a]) R expm(t [b])."""
    a, b = (jnp.asarray(cross(w), x.dtype)[None] for w in (A, B))
    return a @ x + x @ b


def rotation_solution(x0, t):
    return scipy.linalg.expm(t * cross(A)) @ x0 @ scipy.linalg.expm(t * cross(B))


PROBLEMS = {
    "sphere": (SPHERE, made(to_the_pole), pole_solution),
    "so3": (SO3, made(from_both_sides), rotation_solution),
}
SOLVERS = {
    "geodesic_euler": (solvers.geodesic_euler, 1, 1),
    "geodesic_midpoint": (solvers.geodesic_midpoint, 2, 2),
    "geodesic_rk4": (solvers.geodesic_rk4, 4, 4),
    "projected Heun": (lambda m: solvers.projected(diffrax.Heun(), m), 2, 2),
    "projected Bosh3": (lambda m: solvers.projected(diffrax.Bosh3(), m), 3, 3),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_orders_of_solvers(problem, x64):
    """Two steps to a time and to half of it: the error falls by 2^(order + 1), to 0.3 in the power;
    states are on the manifold to rounding, and evaluations are counted."""
    manifold, velocity, solution = PROBLEMS[problem]
    x0 = np.asarray(manifold.random(KEYS[0], 8))
    names = [name for name in SOLVERS if problem == "sphere" or name != "projected Bosh3"]
    methods = {name: solvers.fixed(2, SOLVERS[name][0](manifold)) for name in names}

    @jax.jit
    def run(x0, t1):
        return {
            name: solvers.sample(velocity, {}, x0, method=method, t1=t1)
            for name, method in methods.items()
        }

    times = (0.1, 0.05)
    ends = [jax.device_get(run(x0, t1)) for t1 in times]
    for name in names:
        _, order, stages = SOLVERS[name]
        errors = []
        for t1, end in zip(times, ends, strict=True):
            x, info = end[name]
            manifolds.check(manifold, x, tolerance=1e-12)
            errors.append(np.sqrt(np.mean((x - solution(x0, t1)) ** 2)))
            evaluations = 2 * stages + (name == "projected Bosh3")  # which reuses the last stage
            assert info.evaluations.tolist() == [evaluations] * 8 and not info.status.any()
        slope = np.log2(errors[0] / errors[1])
        assert abs(slope - order - 1) < 0.3, (name, slope, errors)


def test_adaptive_steps_that_are_projected(x64):
    x0 = np.asarray(SPHERE.random(KEYS[1], 3))
    method = solvers.adaptive(solvers.projected(diffrax.Tsit5(), SPHERE), rtol=1e-9, atol=1e-9)
    x, info = solvers.sample(made(to_the_pole), {}, x0, method=method)
    np.testing.assert_allclose(x, pole_solution(x0), atol=1e-7)
    manifolds.check(SPHERE, x, tolerance=1e-12)
    assert not info.status.any() and np.all(info.evaluations > 6)


def pole_density(x):
    """Of uniform points that were carried: (sin a0 / sin a1)^2 / (4 pi), a conformal map."""
    a1 = np.arccos(x[:, 2])
    a0 = 2 * np.arctan(np.tan(a1 / 2) * np.exp(PULL))
    return 2 * np.log(np.sin(a0) / np.sin(a1)) - math.log(4 * math.pi)


def test_log_density_on_the_sphere_both_ways(x64):
    """With the exact field, by the Euclidean divergence of a lifted velocity and by that of the
    metric, by three solvers, for data and for samples."""
    base = distributions.uniform_on(SPHERE)
    lifted = manifolds.tangent(made(to_the_pole), SPHERE)
    metric = solvers.riemannian_divergence(SPHERE)
    models = {
        "lifted": flows.cnf(lifted, base, method=solvers.fixed(24, solvers.geodesic_rk4(SPHERE))),
        "metric": flows.cnf(
            made(to_the_pole),
            base,
            divergence=metric,
            method=solvers.fixed(24, solvers.projected(diffrax.Dopri5(), SPHERE)),
        ),
        "adaptive": flows.cnf(
            lifted,
            base,
            divergence=metric,
            method=solvers.adaptive(
                solvers.projected(diffrax.Tsit5(), SPHERE), rtol=1e-8, atol=1e-8
            ),
        ),
    }
    params = {"velocity": {}, "base": {}}
    x = np.asarray(SPHERE.random(KEYS[0], 5))

    @jax.jit
    def run(x):
        return {
            name: (model.log_prob(params, x), model.sample_and_log_prob(params, clone(KEYS[1]), 4))
            for name, model in models.items()
        }

    for name, (log_prob, (sample, own)) in jax.device_get(run(x)).items():
        np.testing.assert_allclose(log_prob, pole_density(x), atol=2e-5, err_msg=name)
        np.testing.assert_allclose(own, pole_density(sample), atol=2e-5, err_msg=name)
        manifolds.check(SPHERE, sample, tolerance=1e-10)


def test_estimates_of_the_divergence_are_unbiased(x64):
    """The mean over all signs of the probes is the exact divergence; the lifted velocity has it as
    its Euclidean one where the embedding keeps lengths."""
    signs = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    net = lambda x, t: jnp.sin(2 * x[:, ::-1]) + x * x  # noqa: E731
    for manifold, euclidean in ((SPHERE, True), (manifolds.hyperboloid(2), False)):
        velocity = manifolds.tangent(
            made(lambda params, x, t, cond=None, *, key=None: net(x, t)), manifold
        )
        x = manifold.random(KEYS[2], 3)
        f = lambda x: velocity.apply({}, x, jnp.zeros(3))  # noqa: E731, B023
        exact = solvers.riemannian_divergence(manifold).apply(f, x, None)[1]
        some = solvers.riemannian_divergence(manifold, 4)
        probes = np.broadcast_to(signs, (3, 4, 2))
        np.testing.assert_allclose(some.apply(f, x, probes)[1], exact, rtol=1e-10)
        assert some.draw(KEYS[0], x).shape == (3, 4, 2)
        plain = solvers.exact_divergence().apply(f, x, None)[1]
        assert np.allclose(plain, exact, rtol=1e-10) == euclidean


def test_an_isometry_leaves_the_density_of_covariances(x64):
    """X' = A X + X A' moves X by congruence, an isometry: the log-density is that of the base at
    the start, though the Euclidean divergence is not 0."""
    manifold = manifolds.spd(2)
    a = np.array([[0.5, 0.8], [-0.3, 0.2]])
    field = made(
        lambda params, x, t, cond=None, *, key=None: (
            jnp.asarray(a)[None] @ x + x @ jnp.asarray(a.T)[None]
        )
    )
    base = distributions.wrapped_normal(manifold, np.eye(2), 0.6)
    flow = flows.cnf(
        field,
        base,
        divergence=solvers.riemannian_divergence(manifold),
        method=solvers.fixed(16, solvers.geodesic_rk4(manifold)),
    )
    x0 = np.asarray(base.sample({}, KEYS[0], 4))
    push = scipy.linalg.expm(a)
    x1 = push @ x0 @ push.T
    found = jax.jit(flow.log_prob)({"velocity": {}, "base": {}}, x1)
    np.testing.assert_allclose(found, base.log_prob({}, x0), rtol=1e-5)


def cardioid(params, x, t, cond=None, *, key=None):
    """The velocity of Riemannian flow matching on the circle from uniform x0 to data of density
    (1 + a cos x) / (2 pi), a = params: given x_t = x, the data are within h = pi (1 - t) of x, and
    their mean signed distance over 1 - t is the velocity."""
    h = np.pi * (1 - t)[:, None]
    mass = 2 * h + 2 * params * jnp.cos(x) * jnp.sin(h)
    moment = -2 * params * jnp.sin(x) * (jnp.sin(h) - h * jnp.cos(h))
    left = jnp.maximum(1 - t, 1e-12)[:, None]
    return moment / jnp.maximum(mass, 1e-12) / left


def test_the_marginal_velocity_of_the_circle_has_the_density_of_the_data(x64):
    base = distributions.uniform_on(TORUS)
    x = np.linspace(-3, 3, 7)[:, None]
    flow = flows.cnf(
        made(cardioid), base, method=solvers.fixed(32, solvers.geodesic_rk4(TORUS)), t1=1 - 1e-6
    )
    a = 0.8
    found = jax.jit(flow.log_prob)({"velocity": a, "base": {}}, x)
    expected = np.log((1 + a * np.cos(x[:, 0])) / (2 * np.pi))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_flow_matching_on_the_circle_is_least_at_the_marginal_velocity():
    """The gradient of the loss at the closed form is 0 within 4 standard errors, where beside it it
    is not: data, source, path and error are those of the circle."""
    a, n = 0.8, 4096
    velocity = made(lambda p, x, t, cond=None, *, key=None: cardioid(a, x, t) + p * jnp.sin(x))
    loss = losses.chain(
        couplings.with_source(couplings.from_distribution(distributions.uniform_on(TORUS))),
        losses.flow_matching(
            velocity, path=paths.geodesic(TORUS), metric=losses.riemannian_error(TORUS)
        ),
    )
    # data by rejection: uniform x kept with probability (1 + a cos x) / (1 + a)
    rng = np.random.default_rng(0)
    x = rng.uniform(-np.pi, np.pi, 4 * n)
    x = x[rng.uniform(size=4 * n) * (1 + a) < 1 + a * np.cos(x)][:n].astype(np.float32)

    @jax.jit
    def slopes(p, keys):
        grad = lambda key, x: jax.grad(lambda p: loss(p, key, {"x": x})[0])(p)  # noqa: E731
        return jax.vmap(grad)(keys, x.reshape(64, -1, 1))

    keys = jax.random.split(KEYS[3], 64)
    for p, least in ((0.0, True), (0.2, False)):
        found = np.asarray(slopes(p, keys))
        assert (abs(found.mean()) < 4 * found.std() / 8) == least, (p, found.mean())


def test_guided_and_conditional_velocities_stay_tangent():
    """Networks on the torus see angles as one point modulo turns; guidance adds tangent vectors."""
    for manifold in (SPHERE, TORUS, SO3):
        net = manifolds.tangent(velocity_of(TimeMLP((8,), time_features=4)), manifold)
        x, t = manifold.random(KEYS[0], 4), jnp.linspace(0, 1, 4)
        cond = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        params = jax.tree.map(lambda p: p + 0.3, net.init(KEYS[1], x, t, cond))
        guided = guidance.cfg(net, 2.0, null=jnp.zeros(2))

        @jax.jit
        def run(x, net=net, guided=guided, params=params, t=t, cond=cond):
            return net.apply(params, x, t, cond), guided.apply(params, x, t, cond)

        plain, v = run(x)
        assert np.abs(v - plain).max() > 1e-3 and np.abs(plain[0] - plain[1]).max() > 1e-3
        np.testing.assert_allclose(manifold.to_tangent(x, v), v, atol=1e-5)
        if manifold is TORUS:
            np.testing.assert_allclose(run(x + 2 * np.pi)[1], v, atol=1e-4)


def test_training_and_sampling_in_one_line_each():
    """What a user writes: a loss of data on the sphere falls, and samples are on it."""
    base = distributions.uniform_on(SPHERE)
    velocity = manifolds.tangent(velocity_of(TimeMLP((16,), time_features=4)), SPHERE)
    loss = losses.chain(
        couplings.with_source(couplings.from_distribution(base)),
        losses.flow_matching(
            velocity, path=paths.geodesic(SPHERE), metric=losses.riemannian_error(SPHERE)
        ),
    )
    x = SPHERE.project(jnp.asarray([[0.0, 0.0, 1.0]]) + 0.2 * SPHERE.random(KEYS[0], 64))
    params = velocity.init(KEYS[1], x, jnp.zeros(64))

    @jax.jit
    def train(params):
        def step(params, key):
            value, grad = jax.value_and_grad(lambda p: loss(p, key, {"x": x})[0])(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grad), value

        return jax.lax.scan(step, params, jax.random.split(KEYS[2], 200))

    params, values = train(params)
    assert np.mean(values[-20:]) < 0.5 * np.mean(values[:5])
    flow = flows.cnf(velocity, base, method=solvers.fixed(8, solvers.geodesic_midpoint(SPHERE)))
    sample = flow.sample({"velocity": params, "base": {}}, KEYS[3], 64)
    manifolds.check(SPHERE, sample)
    assert np.mean(sample[:, 2]) > 0.5


def test_bad_options_fail_at_construction():
    for make in (solvers.geodesic_euler, solvers.geodesic_midpoint, solvers.geodesic_rk4):
        with pytest.raises(TypeError, match=f"{make.__name__}: expected a Manifold"):
            make(3)
    with pytest.raises(TypeError, match="projected: expected a diffrax.AbstractSolver"):
        solvers.projected(3, SPHERE)
    with pytest.raises(TypeError, match="projected: expected a Manifold"):
        solvers.projected(diffrax.Euler(), 3)
    with pytest.raises(ValueError, match="riemannian_divergence: expected probes to be a whole"):
        solvers.riemannian_divergence(SPHERE, 0)
    with pytest.raises(ValueError, match="riemannian_divergence.* needs a key"):
        solvers.riemannian_divergence(SPHERE, 2).draw(None, jnp.zeros((1, 3)))
    with pytest.raises(TypeError, match="paths.geodesic: expected a Manifold"):
        paths.geodesic(2)
    with pytest.raises(ValueError, match="paths.geodesic: expected alpha to run from 0 to 1"):
        paths.geodesic(SPHERE, paths.schedules.edm())
    with pytest.raises(TypeError, match="riemannian_error: expected a Manifold"):
        losses.riemannian_error(2)
    with pytest.raises(TypeError, match="from_distribution: expected a Distribution"):
        couplings.from_distribution(SPHERE)
