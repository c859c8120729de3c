import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import oracles, solvers, types
from jflow.metrics import wasserstein
from jflow.paths import schedules
from jflow.solvers import grids, noises

MEAN, VARIANCE = 0.7, 0.25
ORACLE = oracles.gaussian([MEAN], VARIANCE)
V = oracles.as_velocity(ORACLE)
COSINE = schedules.cosine()
V_COSINE = oracles.as_velocity(oracles.gaussian([MEAN], VARIANCE, COSINE))
STEPS = {
    "constant": solvers.euler_maruyama(V, 0.5),
    "of_sigma": solvers.euler_maruyama(V, noises.of_sigma()),
    "decreasing": solvers.euler_maruyama(V, noises.decreasing()),
    "hump": solvers.euler_maruyama(V, noises.hump(2.0)),
    "sbdm": solvers.euler_maruyama(V, noises.sbdm()),
    "score": solvers.euler_maruyama(V, 0.5, score=lambda params, x, t, cond: ORACLE.score(x, t)),
    "ancestral": solvers.ancestral(V),
    "ancestral 0.5": solvers.ancestral(V, 0.5),
    "ancestral cosine": solvers.ancestral(V_COSINE, 1.0, COSINE),
    "sbdm cosine": solvers.euler_maruyama(V_COSINE, noises.sbdm(1.0, COSINE), COSINE),
    "overshoot": solvers.overshoot(V),
}


def discrete_law(step, grid):
    """Mean and variance of the last state, exactly: on a Gaussian the mean of a step is affine in
    x."""
    ts = jnp.asarray(grid)

    def advance(law, ends):
        mean, variance = law
        _, image, std = step({}, jnp.asarray([0.0, 1.0])[:, None], *ends, None)
        start, slope = image[0, 0], image[1, 0] - image[0, 0]
        return (start + slope * mean, slope**2 * variance + std[0] ** 2), None

    return jax.jit(
        lambda: jax.lax.scan(advance, (jnp.zeros(()), jnp.ones(())), (ts[:-1], ts[1:]))[0]
    )()


@pytest.mark.parametrize("name", STEPS)
def test_marginals_converge_at_first_order(x64, name):
    """The law of the last state, in closed form for every number of steps, tends to that of the
    data like 1 / N."""
    laws = [discrete_law(STEPS[name], grids.uniform(n)) for n in (400, 800)]
    errors = [abs(float(mean - MEAN)) + abs(float(variance - VARIANCE)) for mean, variance in laws]
    assert errors[1] < 0.01
    # what is linear in 1 / N cancels for w = (1 - t) / t on this path; a constant w ends with
    # log(N) / N
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 2 if name == "sbdm" else 1, atol=0.2)


@pytest.mark.parametrize(
    "g", [lambda t: 0.8 + 0.0 * t, lambda t: 1 - t], ids=["constant", "falling"]
)
def test_euler_maruyama_has_the_exact_discrete_law(x64, g):
    grid = grids.power(20, 1.3)
    mean, cov = ORACLE.euler_maruyama(grid, g)
    step = solvers.euler_maruyama(V, lambda t: g(t) ** 2 / 2, limit=None)
    np.testing.assert_allclose(discrete_law(step, grid), (mean[-1, 0], cov[-1, 0, 0]), rtol=1e-10)


def test_grpo_is_flow_grpos_step(x64):
    """Its formulas are in s = 1 - t and noise - data, with s' - s < 0; and its slow order, 2c with
    c = scale^2 / 2."""
    x, t, t_next, a = jnp.asarray([[0.3], [-1.2]]), 0.4, 0.45, 0.7
    s, dt, v = 1 - t, t - t_next, -V.apply({}, x, t)
    std = a * np.sqrt(s / (1 - s))
    expected = x * (1 + std**2 * dt / (2 * s)) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
    _, mean, scale = solvers.euler_maruyama(V, noises.grpo(a))({}, x, t, t_next, None)
    np.testing.assert_allclose(mean, expected, rtol=1e-12)
    np.testing.assert_allclose(scale, np.full(2, std * np.sqrt(-dt)), rtol=1e-12)
    step = solvers.euler_maruyama(V, noises.grpo(a), limit=1.0)
    variance = [discrete_law(step, grids.uniform(n))[1] for n in (400, 800)]
    slope = np.log2((variance[0] - VARIANCE) / (variance[1] - VARIANCE))
    np.testing.assert_allclose(slope, a**2, atol=0.1)  # 0.43


def test_noises_at_points():
    t = jnp.asarray([0.0, 0.25, 1.0])
    np.testing.assert_allclose(noises.of_sigma(2.0)(t), [2.0, 1.5, 0.0])
    np.testing.assert_allclose(
        noises.decreasing()(t), [1.0, (np.sqrt(0.5) + 1) ** 2 / 4, 0.0], atol=1e-6
    )
    np.testing.assert_allclose(noises.hump()(t), [0.0, 0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(noises.sbdm()(t), [np.inf, 3.0, 0.0])
    # sigma^2 d log(alpha / sigma), alpha = sin, sigma = cos: (pi / 2) cot
    np.testing.assert_allclose(
        noises.sbdm(1.0, COSINE)(t)[1:], [np.pi / 2 / np.tan(np.pi / 8), 0], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(noises.grpo(1.0)(t), [np.inf, 1.5, 0.0])


def test_ancestral_is_ddpm_and_ddim(x64):
    """eta = 1: mean and variance of x_s given x_t and x1, for a variance preserving path; eta = 0:
    no noise at all."""
    x, t, s = jnp.asarray([[0.3], [-1.2]]), 0.3, 0.5
    v = V_COSINE.apply({}, x, t)
    bar_t, bar_s = np.sin(np.pi * t / 2) ** 2, np.sin(np.pi * s / 2) ** 2
    beta = 1 - bar_t / bar_s
    x1 = np.sin(np.pi * t / 2) * x + 2 / np.pi * np.cos(np.pi * t / 2) * v  # D = pi / 2
    expected = (np.sqrt(bar_s) * beta * x1 + np.sqrt(1 - beta) * (1 - bar_s) * x) / (1 - bar_t)
    _, mean, std = STEPS["ancestral cosine"]({}, x, t, s, None)
    np.testing.assert_allclose(mean, expected, rtol=1e-10)
    np.testing.assert_allclose(
        std, np.full(2, np.sqrt(beta * (1 - bar_s) / (1 - bar_t))), rtol=1e-10
    )
    for step in (
        solvers.ancestral(V, 0.0),
        solvers.overshoot(V, 0.0),
        solvers.euler_maruyama(V, 0.0),
    ):
        end, path = solvers.sample_sde(
            step, {}, x, jax.random.key(0), grids.cosine(5), return_trajectory=True
        )
        np.testing.assert_allclose(path.std, 0, atol=1e-7)
        np.testing.assert_allclose(
            end,
            solvers.sample(V, {}, x, method=solvers.on_grid(grids.cosine(5), solvers.ddim()))[0],
            rtol=1e-6,
        )


def test_overshoot_by_hand(x64):
    """On the linear path: o = min(t' + c h (1 - t'), 1), a = t' / o."""
    x, t, s, c = jnp.asarray([[0.3], [-1.2]]), 0.3, 0.5, 2.0
    o = s + c * (s - t) * (1 - s)
    a = s / o
    _, mean, std = solvers.overshoot(V, c)({}, x, t, s, None)
    np.testing.assert_allclose(mean, a * (x + (o - t) * V.apply({}, x, t)), rtol=1e-12)
    np.testing.assert_allclose(
        std, np.full(2, np.sqrt((1 - s) ** 2 - (a * (1 - o)) ** 2)), rtol=1e-12
    )


def test_one_point_of_data_is_exact(x64):
    """mean and std leave x_t ~ N(alpha x1, sigma^2) as it is, however large the steps;
    Euler-Maruyama does not."""
    point = oracles.as_velocity(oracles.gaussian([MEAN], 1e-14))
    grid = [0.0, 0.3, 0.9]
    for step in (solvers.ancestral(point), solvers.ancestral(point, 0.3), solvers.overshoot(point)):
        np.testing.assert_allclose(discrete_law(step, grid), (0.9 * MEAN, 0.01), rtol=1e-6)
    assert discrete_law(solvers.euler_maruyama(point, 0.5), grid)[1] > 0.011


def test_a_mixture_keeps_its_modes():
    oracle = oracles.mixture([0.3, 0.7], [[-2.0, 0.0], [2.0, 0.5]], 0.1)
    v = oracles.as_velocity(oracle)
    data, x0 = oracle.sample(jax.random.key(0), 500), jax.random.normal(jax.random.key(1), (500, 2))
    floor = wasserstein(np.asarray(oracle.sample(jax.random.key(2), 500)), np.asarray(data))
    for step in (solvers.euler_maruyama(v, noises.decreasing()), solvers.ancestral(v)):
        x, _ = jax.jit(lambda x, key: solvers.sample_sde(step, {}, x, key, grids.cosine(100)))(  # noqa: B023
            x0, jax.random.key(3)
        )
        # what two samples of 500 differ by anyway (0.3 to 0.4, mostly by the weights of the modes),
        # and 1 / 100
        assert wasserstein(np.asarray(x), np.asarray(data)) < floor + 0.3
        np.testing.assert_allclose(np.mean(x[:, 0] > 0), 0.7, atol=3 * np.sqrt(0.21 / 500))


def test_step_log_prob_of_other_shapes_and_of_no_noise():
    # summed over the event, a std for each element, and float32 at least
    x = jnp.ones((2, 3, 2), jnp.bfloat16)
    std = jnp.asarray([0.5, 2.0])[:, None, None] * jnp.ones((2, 3, 2))
    given = solvers.step_log_prob(x, jnp.zeros((2, 3, 2)), std)
    expected = 6 * (-0.5 / np.asarray([0.25, 4.0]) - np.log([0.5, 2.0]) - 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(given, expected, rtol=1e-6)
    zero = lambda x: jnp.sum(solvers.step_log_prob(x, jnp.zeros((2, 3)), jnp.zeros((2,))))  # noqa: E731
    value, slope = jax.value_and_grad(zero)(jnp.ones((2, 3)))
    assert value == 0 and np.all(slope == 0)


def test_data_to_data_takes_a_score():
    """Between N(-1, 1) and N(1, 1), paired by adding 2, x_t ~ N(2t - 1, 1): v = 2, and the score is
    that of x_t."""
    v = types.Velocity(None, lambda params, x, t, cond=None, *, key=None: jnp.full_like(x, 2.0))
    step = solvers.euler_maruyama(v, 0.7, score=lambda params, x, t, cond: 2 * t[:, None] - 1 - x)
    x0 = jax.random.normal(jax.random.key(0), (4000, 1)) - 1
    x, _ = solvers.sample_sde(step, {}, x0, jax.random.key(1), grids.uniform(100))
    assert abs(float(jnp.corrcoef(x[:, 0], x0[:, 0])[0, 1]) - np.exp(-0.7)) < 3 / np.sqrt(4000)
    np.testing.assert_allclose(
        [x.mean(), x.var()], [1, 1], atol=0.08
    )  # 3 sqrt(2 / 4000), and 1 / 100
