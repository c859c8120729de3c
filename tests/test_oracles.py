"""The closed forms, against the equations that define them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import oracles, solvers
from jflow.paths._affine import LINEAR, Schedule

TRIG = Schedule(alpha=lambda t: jnp.sin(jnp.pi / 2 * t), sigma=lambda t: jnp.cos(jnp.pi / 2 * t))
MEAN, COV = (
    np.array([1.0, -2.0, 0.5]),
    np.array([[2.0, 0.6, 0.1], [0.6, 0.5, -0.2], [0.1, -0.2, 1.0]]),
)
WEIGHTS, MEANS = (
    np.array([0.2, 0.5, 0.3]),
    np.array([[3.0, 0.0, 1.0], [-2.0, 1.0, 0.0], [0.0, -3.0, 2.0]]),
)
COVS = np.stack([COV, np.diag([0.3, 0.1, 0.2]), np.eye(3)])
schedules = pytest.mark.parametrize("schedule", [LINEAR, TRIG], ids=["linear", "trigonometric"])
both = pytest.mark.parametrize(
    "make",
    [partial(oracles.gaussian, MEAN, COV), partial(oracles.mixture, WEIGHTS, MEANS, COVS)],
    ids=["gaussian", "mixture"],
)


def points(n=6):
    x = 2 * jax.random.normal(jax.random.key(0), (n, 3))
    return x, jnp.linspace(0, 1, n), jnp.linspace(1, 0, n) ** 2


def by_row(f):
    """A batched function as one of single rows, to differentiate."""
    return lambda *args: f(*(a[None] for a in args))[0]


@both
@schedules
def test_score_is_the_gradient_of_the_log_density(make, schedule, x64):
    oracle = make(schedule=schedule)
    x, t, _ = points()
    gradient = jax.vmap(jax.grad(by_row(oracle.log_density)))(x, t)
    np.testing.assert_allclose(oracle.score(x, t), gradient, rtol=1e-10, atol=1e-10)  # float64


@both
@schedules
def test_continuity_equation(make, schedule, x64):
    """d_t log p + div v + v . score = 0, which fixes a velocity that carries the density."""
    oracle = make(schedule=schedule)

    def residual(x, t):
        velocity = by_row(oracle.velocity)
        flux = jnp.trace(jax.jacfwd(velocity)(x, t)) + velocity(x, t) @ by_row(oracle.score)(x, t)
        return jax.grad(by_row(oracle.log_density), 1)(x, t) + flux, flux

    x, t, _ = points()
    total, flux = jax.jit(jax.vmap(residual))(x, t)
    assert jnp.max(jnp.abs(total)) < 1e-10 and jnp.max(jnp.abs(flux)) > 1


@schedules
def test_velocity_is_the_conditional_expectation(schedule, x64):
    """E[a' x1 + s' x0 | x_t = x] by quadrature over x1, for a 1-D mixture."""
    oracle = oracles.mixture([0.3, 0.7], [[-1.0], [2.0]], [0.2, 0.5], schedule)
    x1 = jnp.linspace(
        -8, 10, 40001
    )  # spacing 4.5e-4, far below every width: the trapezoid is exact to rounding
    density = 0.3 * jnp.exp(-((x1 + 1) ** 2) / 0.4) / jnp.sqrt(0.4 * jnp.pi) + 0.7 * jnp.exp(
        -((x1 - 2) ** 2) / 1.0
    ) / jnp.sqrt(1.0 * jnp.pi)
    for t in (0.1, 0.5, 0.9):
        (a, da), (s, ds) = (jax.jvp(f, (t,), (1.0,)) for f in schedule[:2])
        for x in (-1.5, 0.3):
            x0 = (x - a * x1) / s
            weight = density * jnp.exp(-(x0**2) / 2) / jnp.sqrt(2 * jnp.pi) / s
            mass = jnp.trapezoid(weight, x1)
            expected = jnp.trapezoid(weight * (da * x1 + ds * x0), x1) / mass
            np.testing.assert_allclose(
                oracle.velocity(jnp.array([[x]]), t)[0, 0], expected, rtol=1e-9
            )
            np.testing.assert_allclose(
                oracle.log_density(jnp.array([[x]]), t)[0], jnp.log(mass), rtol=1e-9
            )


@schedules
def test_gaussian_flow_map(schedule, x64):
    """It starts at x, follows the velocity, composes, and pushes N(0, I) onto the data."""
    oracle = oracles.gaussian(MEAN, COV, schedule)
    x, t, r = points()
    np.testing.assert_allclose(oracle.flow_map(x, t, t), x, atol=1e-13)
    y, slope = jax.jvp(lambda r: oracle.flow_map(x, t, r), (r,), (jnp.ones_like(r),))
    np.testing.assert_allclose(slope, oracle.velocity(y, r), rtol=1e-10, atol=1e-10)
    middle = jnp.full_like(t, 0.35)
    np.testing.assert_allclose(
        oracle.flow_map(oracle.flow_map(x, t, middle), middle, r), y, atol=1e-12
    )
    jacobian = jax.jacfwd(by_row(lambda x: oracle.flow_map(x, 0.0, 1.0)))(
        jnp.zeros(3)
    )  # affine: one point suffices
    np.testing.assert_allclose(jacobian @ jacobian.T, COV, atol=1e-12)
    np.testing.assert_allclose(oracle.flow_map(jnp.zeros((1, 3)), 0.0, 1.0)[0], MEAN, atol=1e-12)


@schedules
def test_gaussian_average_velocity(schedule, x64):
    """(r - t) u is the displacement; u = v + (r - t) du/dt along the trajectory (Geng et al. 2025,
    in our time)."""
    oracle = oracles.gaussian(MEAN, COV, schedule)
    x, t, r = points()
    u, v = oracle.average_velocity(x, t, r), oracle.velocity(x, t)
    np.testing.assert_allclose((r - t)[:, None] * u, oracle.flow_map(x, t, r) - x, atol=1e-12)
    np.testing.assert_allclose(oracle.average_velocity(x, t, t), v, atol=1e-12)
    _, du = jax.jvp(lambda x, t: oracle.average_velocity(x, t, r), (x, t), (v, jnp.ones_like(t)))
    assert jnp.max(jnp.abs(u - v - (r - t)[:, None] * du)) < 1e-10
    assert jnp.max(jnp.abs(u - v)) > 0.1  # the identity is not trivial here


def test_gaussian_covariances_in_every_form(x64):
    x, t, _ = points()
    diagonal = np.array([0.5, 2.0, 1.0])
    for short, full in ((diagonal, np.diag(diagonal)), (0.3, 0.3 * np.eye(3))):
        a, b = oracles.gaussian(MEAN, short), oracles.gaussian(MEAN, full)
        np.testing.assert_allclose(a.velocity(x, t), b.velocity(x, t), atol=1e-12)
        np.testing.assert_allclose(a.log_density(x, t), b.log_density(x, t), atol=1e-12)
    shared = oracles.mixture(WEIGHTS, MEANS, 0.3)
    for covs in (np.full(3, 0.3), np.full((3, 3), 0.3), 0.3 * np.stack([np.eye(3)] * 3)):
        np.testing.assert_allclose(
            oracles.mixture(WEIGHTS, MEANS, covs).score(x, t),
            shared.score(x, t),
            rtol=1e-10,
            atol=1e-12,
        )


@schedules
def test_marginal(schedule, x64):
    t = jnp.array([0.0, 0.3, 1.0])
    oracle = oracles.gaussian(MEAN, COV, schedule)
    mean, cov = oracle.marginal(t)
    a, s = (f(t)[:, None] for f in schedule[:2])
    np.testing.assert_allclose(mean, a * MEAN[None], atol=1e-14)
    np.testing.assert_allclose(
        cov, (a**2)[..., None] * COV[None] + (s**2)[..., None] * np.eye(3)[None], atol=1e-14
    )
    x = points()[0][:3]
    expected = [jax.scipy.stats.multivariate_normal.logpdf(x[i], mean[i], cov[i]) for i in range(3)]
    np.testing.assert_allclose(oracle.log_density(x, t), jnp.stack(expected), rtol=1e-10)


def test_euler_maruyama_moments(x64):
    """Against the affine step written with velocity and score; and first order to the marginal,
    whatever the noise."""
    oracle = oracles.gaussian(MEAN, COV)

    def noise(t):
        return 1.5 * (1 - t)

    times = jnp.array([0.0, 0.2, 0.5, 1.0])
    means, covs = oracle.euler_maruyama(times, noise)
    mean, cov = jnp.zeros(3), jnp.eye(3)
    for i, (t, h) in enumerate(zip(times[:-1], jnp.diff(times), strict=True)):

        def step(x, t=t, h=h):
            return x + h * by_row(
                lambda x: oracle.velocity(x, t) + noise(t) ** 2 / 2 * oracle.score(x, t)
            )(x)

        slope = jax.jacfwd(step)(mean)
        mean, cov = step(mean), slope @ cov @ slope.T + h * noise(t) ** 2 * jnp.eye(3)
        np.testing.assert_allclose(means[i + 1], mean, atol=1e-12)
        np.testing.assert_allclose(covs[i + 1], cov, atol=1e-12)

    errors = [
        jnp.max(jnp.abs(oracle.euler_maruyama(jnp.linspace(0, 1, n + 1), noise)[1][-1] - COV))
        for n in (200, 400)
    ]
    assert errors[1] < 0.02 and 1.9 < errors[0] / errors[1] < 2.1


def test_mixture_of_one_is_the_gaussian(x64):
    x, t, _ = points()
    one, g = oracles.mixture([3.0], MEAN[None], COV[None]), oracles.gaussian(MEAN, COV)
    for name in ("velocity", "score", "log_density"):
        np.testing.assert_allclose(
            getattr(one, name)(x, t), getattr(g, name)(x, t), rtol=1e-12, atol=1e-12
        )
    np.testing.assert_allclose(one.responsibilities(x, t), jnp.ones((6, 1)))


def test_mixture_labels(x64):
    """A label gives its component, the null label the mixture, and Bayes' rule joins them."""
    mix = oracles.mixture(WEIGHTS, MEANS, COVS)
    parts = [oracles.gaussian(m, c) for m, c in zip(MEANS, COVS, strict=True)]
    x, t, _ = points()
    label = jnp.array([0, 1, 2, 3, 2, 3])
    for name in ("velocity", "score", "log_density"):
        given, whole = getattr(mix, name)(x, t, label), getattr(mix, name)(x, t)
        for i, k in enumerate([0, 1, 2, None, 2, None]):
            expected = whole[i] if k is None else getattr(parts[k], name)(x, t)[i]
            np.testing.assert_allclose(given[i], expected, rtol=1e-10, atol=1e-12)
    joint = jnp.stack(
        [np.log(w) + p.log_density(x, t) for w, p in zip(WEIGHTS, parts, strict=True)], axis=1
    )
    np.testing.assert_allclose(
        mix.responsibilities(x, t), jax.nn.softmax(joint, axis=1), rtol=1e-10
    )
    gradient = jax.grad(lambda x: jnp.sum(mix.velocity(x, t, label) ** 2 + mix.score(x, t, label)))(
        x
    )
    assert jnp.all(jnp.isfinite(gradient))


def test_mixture_flow_map(x64):
    one, g = oracles.mixture([1.0], MEAN[None], COV[None]), oracles.gaussian(MEAN, COV)
    x, t, r = points()
    expected = g.flow_map(x, t, r)
    np.testing.assert_allclose(
        oracles.mixture_flow_map(one, x, t, r), expected, rtol=1e-8, atol=1e-8
    )
    mix = oracles.mixture(WEIGHTS, MEANS, COVS)
    y = oracles.mixture_flow_map(mix, x, t, r)
    np.testing.assert_allclose(
        oracles.mixture_flow_map(mix, y, r, t), x, rtol=1e-7, atol=1e-7
    )  # tolerance 1e-10 a step
    np.testing.assert_array_equal(oracles.mixture_flow_map(mix, x, t, t), x)
    second = oracles.mixture_flow_map(mix, x, t, r, jnp.ones(6, jnp.int32))
    expected = oracles.gaussian(MEANS[1], COVS[1]).flow_map(x, t, r)
    np.testing.assert_allclose(second, expected, rtol=1e-8, atol=1e-8)


def test_mixture_flow_map_needs_float64():
    with pytest.raises(ValueError, match="float64"):
        oracles.mixture_flow_map(oracles.eight_gaussians(), jnp.zeros((1, 2)), 0.0, 1.0)


def test_entropies(x64):
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)  # exact: log p is quadratic
    z = np.stack(np.meshgrid(nodes, nodes, nodes), axis=-1).reshape(-1, 3)
    w = (
        np.prod(np.stack(np.meshgrid(weights, weights, weights), axis=-1).reshape(-1, 3), axis=1)
        / (2 * np.pi) ** 1.5
    )
    g = oracles.gaussian(MEAN, COV)
    x = jnp.asarray(MEAN[None] + z @ np.linalg.cholesky(COV).T)
    np.testing.assert_allclose(g.entropy, -jnp.sum(w * g.log_density(x, 1.0)), rtol=1e-12)

    eight = oracles.eight_gaussians()
    grid = np.linspace(
        -8, 8, 801
    )  # spacing 0.02 against a width of 0.32: the trapezoid is exact to rounding
    log_p = eight.log_density(
        jnp.asarray(np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)), 1.0
    )
    area = (grid[1] - grid[0]) ** 2
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_p)) * area, 1.0, rtol=1e-10)
    np.testing.assert_allclose(
        -jnp.sum(jnp.exp(log_p) * log_p) * area, 2.6147, atol=5e-5
    )  # the digits published


@both
@schedules
def test_ends_are_finite_in_float32(make, schedule):
    oracle = make(schedule=schedule)
    x = jnp.concatenate([points(4)[0], jnp.full((2, 3), 1e3)])
    for t in (0.0, 1.0):
        for f in (oracle.velocity, oracle.score, oracle.log_density):
            value, gradients = jax.value_and_grad(lambda x, t, f=f: jnp.sum(f(x, t)), (0, 1))(
                x, jnp.full(6, t)
            )
            assert jnp.isfinite(value) and all(jnp.all(jnp.isfinite(g)) for g in gradients)
    if isinstance(oracle, oracles.Gaussian):
        for t, r in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0), (0.5, 0.5)):
            for f in (oracle.flow_map, oracle.average_velocity):
                ends = jnp.full(6, t), jnp.full(6, r)
                gradients = jax.grad(lambda x, t, r, f=f: jnp.sum(f(x, t, r)), (0, 1, 2))(x, *ends)
                assert all(jnp.all(jnp.isfinite(g)) for g in gradients)


def test_samples_have_the_moments(x64):
    n = 20_000
    mix, g = oracles.mixture(WEIGHTS, MEANS, COVS), oracles.gaussian(MEAN, COV)
    second = mix.sample(jax.random.key(1), n, jnp.ones(n, jnp.int32))
    mean = WEIGHTS @ MEANS
    spread = np.einsum(
        "k,kij->ij", WEIGHTS, COVS + MEANS[:, :, None] * MEANS[:, None, :]
    ) - np.outer(mean, mean)
    for x, m, c in (
        (g.sample(jax.random.key(0), n), MEAN, COV),
        (second, MEANS[1], COVS[1]),
        (mix.sample(jax.random.key(2), n), mean, spread),
        (mix.sample(jax.random.key(3), n, jnp.full(n, 3)), mean, spread),
    ):
        assert x.shape == (n, 3)
        scale = np.sqrt(np.diag(c))
        assert np.all(
            np.abs(np.mean(x, axis=0) - m) < 5 * scale / np.sqrt(n)
        )  # five standard errors
        # The standard error of a covariance entry is at most sqrt(3 / n) of the scales (kurtosis at
        # most 4 here).
        assert np.all(np.abs(np.cov(x.T) - c) < 5 * np.sqrt(3 / n) * np.outer(scale, scale))
    counts = np.bincount(mix.sample_labels(jax.random.key(4), n), minlength=3)
    assert np.all(np.abs(counts / n - WEIGHTS) < 5 * np.sqrt(WEIGHTS * (1 - WEIGHTS) / n))


def test_as_nouns():
    """Samplers run on an oracle as on a network without params."""
    g = oracles.gaussian(MEAN, COV)
    x, t, r = points()
    velocity, flow, average = (
        oracles.as_velocity(g),
        oracles.as_flow_map(g),
        oracles.as_average_velocity(g),
    )
    assert (
        velocity.init(jax.random.key(0), x, t) == {} and flow.init(jax.random.key(0), x, t, r) == {}
    )
    assert velocity.apply({}, x.astype(jnp.bfloat16), t).dtype == jnp.bfloat16
    np.testing.assert_array_equal(flow.apply({}, x, t, r), g.flow_map(x, t, r))
    np.testing.assert_array_equal(average.apply({}, x, t, r), g.average_velocity(x, t, r))
    x1, _ = solvers.sample(velocity, {}, x, method=64)
    np.testing.assert_allclose(
        x1, g.flow_map(x, 0.0, 1.0), atol=5e-3
    )  # Heun with h = 1/64: error of order h^2
    mix = oracles.mixture(WEIGHTS, MEANS, COVS)
    x1, _ = solvers.sample(
        oracles.as_velocity(mix), {}, x, jnp.full(6, 2), method=64
    )  # cond is the label
    np.testing.assert_allclose(
        x1, oracles.gaussian(MEANS[2], COVS[2]).flow_map(x, 0.0, 1.0), atol=5e-3
    )


def test_bad_inputs_are_errors():
    for wrong, text in (
        (lambda: oracles.gaussian(MEAN, np.eye(2)), r"\[1, 2, 2\]"),
        (lambda: oracles.gaussian(MEAN, np.diag([1.0, 0.0, 1.0])), "positive definite"),
        (lambda: oracles.gaussian(MEAN, np.eye(3) + np.eye(3, k=1)), "symmetric"),
        (lambda: oracles.gaussian(1.0, 1.0), r"shape \[d\]"),
        (lambda: oracles.mixture([0.5, 0.5], MEANS, 1.0), "weights"),
        (lambda: oracles.mixture([0.5, 0.5, 0.0], MEANS, 1.0), "positive weights"),
        (
            lambda: oracles.gaussian(MEAN, COV).velocity(jnp.zeros((2, 4)), 0.5),
            r"expected x of shape \[b, 3\]",
        ),
        (
            lambda: oracles.gaussian(MEAN, COV).velocity(jnp.zeros((2, 3)), jnp.zeros(3)),
            r"t of shape \[2\]",
        ),
        (
            lambda: oracles.eight_gaussians().score(jnp.zeros((2, 2)), 0.5, jnp.zeros(3, int)),
            "label of shape",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            wrong()


def test_joint_gaussian_is_the_regression_on_its_parts(x64):
    """By the covariances of (x1 - x0, x_t) as linear maps of (x1, x0), at any times of the parts;
    where all have one time it is the plain Gaussian; the residual is what is left."""
    names = {"a": [1.0], "b": [-2.0, 0.5]}
    oracle = oracles.joint_gaussian(names, COV)
    x, t, s = points()
    parts = {"a": x[:, :1], "b": x[:, 1:]}
    found = oracle.velocity(parts, {"a": t, "b": s})
    left = oracle.residual({"a": t, "b": s})
    whole = np.block([[COV, np.zeros((3, 3))], [np.zeros((3, 3)), np.eye(3)]])
    for i in range(len(x)):
        time = np.diag(np.repeat([float(t[i]), float(s[i])], [1, 2]))
        state, slope = np.hstack([time, np.eye(3) - time]), np.hstack([np.eye(3), -np.eye(3)])
        gain = slope @ whole @ state.T @ np.linalg.inv(state @ whole @ state.T)
        expected = MEAN + gain @ (np.asarray(x[i]) - time @ MEAN)
        np.testing.assert_allclose(np.hstack([found["a"][i], found["b"][i]]), expected, atol=1e-10)
        rest = np.diag(slope @ whole @ slope.T - gain @ state @ whole @ slope.T)
        np.testing.assert_allclose(left["a"][i], rest[:1].mean(), atol=1e-10)
        np.testing.assert_allclose(left["b"][i], rest[1:].mean(), atol=1e-10)
    one = oracle.velocity(parts, t)
    plain = oracles.gaussian(MEAN, COV).velocity(x, t)
    np.testing.assert_allclose(np.hstack([one["a"], one["b"]]), plain, rtol=1e-9, atol=1e-9)
    drawn = oracle.sample(jax.random.key(0), 4096)
    drawn = np.hstack([drawn["a"], drawn["b"]])
    np.testing.assert_allclose(drawn.mean(0), MEAN, atol=5 * np.sqrt(2 / 4096))
    np.testing.assert_allclose(np.cov(drawn.T), COV, atol=5 * 2 * np.sqrt(2 / 4096))
    for bad, said in (
        (({"a": 0.0, "b": [1.0]}, np.eye(2)), r"a mean \[d\] of each part, got {'a': \[\], 'b'"),
        ((names, np.eye(2)), r"a covariance \[3, 3\] of all parts, got \[2, 2\]"),
        ((names, -np.eye(3)), "joint_gaussian: expected positive definite"),
    ):
        with pytest.raises(ValueError, match=said):
            oracles.joint_gaussian(*bad)
    with pytest.raises(ValueError, match=r"t with the parts of x, \['a', 'b'\], got \['a'\]"):
        oracle.velocity(parts, {"a": t})
