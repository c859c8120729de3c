from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import oracles, paths, solvers, types
from jflow.paths import parameterizations, schedules

PEER = np.load(Path(__file__).parents[1] / "peers" / "paths.npz")
LINEAR = paths.LINEAR
PLAIN = paths.Schedule(LINEAR.alpha, LINEAR.sigma)  # its time is a root, not a closed form
PAIRS = {
    "linear to cosine": (LINEAR, schedules.cosine()),
    "plain to cosine": (PLAIN, schedules.cosine()),
    "cosine to linear": (schedules.cosine(), LINEAR),
    "linear to vp": (LINEAR, schedules.vp()),
    "vp to linear": (schedules.vp(), LINEAR),
    "plain vp to polynomial": (paths.Schedule(*schedules.vp()[:2]), schedules.polynomial(2.0)),
    "polynomial to linear_vp": (schedules.polynomial(2.0), schedules.linear_vp()),
    "edm to linear": (schedules.edm(), LINEAR),
    "plain ve to cosine": (paths.Schedule(*schedules.ve()[:2]), schedules.cosine()),
    "optimal_transport to ve": (schedules.optimal_transport(1e-4), schedules.ve()),
    "linear to unit_edm": (LINEAR, schedules.unit_variance(schedules.edm())),
}


def mixture(schedule):
    return oracles.mixture([0.3, 0.7], [[-2.0, 0.5], [1.0, 1.0]], [0.2, 0.4], schedule)


def draw(schedule, n=60, seed=0):
    """(x, t) on the path of a schedule to a wide Gaussian."""
    k1, k2 = jax.random.split(jax.random.key(seed))
    t = jnp.linspace(0.02, 0.98, n)
    x0, x1 = jax.random.normal(k1, (n, 2)), 2 * jax.random.normal(k2, (n, 2))
    return schedule.alpha(t)[:, None] * x1 + schedule.sigma(t)[:, None] * x0, t


@pytest.mark.parametrize("pair", PAIRS)
def test_the_rescheduled_field_is_the_field_of_the_new_path(pair, x64):
    trained, new = PAIRS[pair]
    changed = paths.reschedule(oracles.as_velocity(mixture(trained)), trained, new)
    x, r = draw(new)
    # only where the trained schedule has ever been
    angle = lambda schedule, t: jnp.arctan2(schedule.alpha(t), schedule.sigma(t))  # noqa: E731
    low, high = angle(trained, jnp.asarray([0.0, 1.0]))
    known = np.asarray((angle(new, r) > low) & (angle(new, r) < high))
    assert known.sum() > 20
    given = jax.jit(lambda x, r: changed.apply({}, x, r))(x, r)
    truth = mixture(new).velocity(x, r)
    scale = np.abs(truth).max(axis=1, keepdims=True)
    np.testing.assert_allclose((given / scale)[known], (truth / scale)[known], atol=1e-10)


@pytest.mark.parametrize("pair", ["linear to cosine", "edm to linear", "linear to vp"])
def test_both_flows_end_in_the_same_place(pair, x64):
    trained, new = PAIRS[pair]
    velocity = oracles.as_velocity(mixture(trained))
    changed = paths.reschedule(velocity, trained, new)
    start = jax.random.normal(jax.random.key(0), (8, 2))
    zero = jnp.zeros(8)
    t, c = paths.matched_time(trained, new, zero)
    at_start = new.sigma(zero)[:, None] * start
    # the trained schedule may start later than the new one, whose first ratio it never had, or have
    # to be met on its way
    options = {"method": solvers.adaptive(diffrax.Dopri8(), rtol=1e-9, atol=1e-9)}
    end, info = jax.jit(lambda x: solvers.sample(changed, {}, x, **options))(at_start)
    since = float(t[0])
    other, _ = jax.jit(lambda x: solvers.sample(velocity, {}, x, t0=since, **options))(
        at_start / c[:, None]
    )
    assert np.all(info.status == 0)
    last = paths.matched_time(trained, new, jnp.ones(8))[1][:, None]
    np.testing.assert_allclose(end / last, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "pair", [("linear", "cosine"), ("vp", "linear"), ("linear", "vp"), ("cosine", "linear_vp")]
)
def test_against_flow_matching(pair, x64):
    """The same change of schedule by the package flow_matching, of the exact field of N(1.5,
    0.4^2)."""
    trained, new = (LINEAR if name == "linear" else getattr(schedules, name)() for name in pair)
    velocity = oracles.as_velocity(oracles.gaussian([1.5] * 3, 0.16, trained))
    given = paths.reschedule(velocity, trained, new).apply(
        {}, jnp.asarray(PEER["x"]), jnp.asarray(PEER["t"])
    )
    np.testing.assert_allclose(given, PEER[f"{pair[0]}_to_{pair[1]}"], rtol=1e-8)


@pytest.mark.parametrize(
    "closed",
    [
        schedules.vp(),
        schedules.cosine(),
        schedules.linear_vp(),
        schedules.edm(),
        schedules.polynomial(3.0),
    ],
    ids=["vp", "cosine", "linear_vp", "edm", "polynomial"],
)
def test_closed_form_and_root_agree_and_the_root_differentiates(closed, x64):
    t, new = jnp.linspace(0.01, 0.99, 30), schedules.unit_variance(closed)

    def by_root(r):
        return paths.matched_time(paths.Schedule(*closed), new, r)[0]

    root, slope = jax.jit(lambda t: jax.jvp(by_root, (t,), (jnp.ones_like(t),)))(t)
    np.testing.assert_allclose(root, t, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(slope, 1, rtol=1e-8)


def gaussian(schedule):
    return oracles.gaussian([1.5, -0.5], [[0.5, 0.2], [0.2, 0.3]], schedule)


def field(apply):
    return types.Field(lambda key, x, t, cond=None: {"x": x, "t": t}, apply)


def test_edm_denoiser_and_noise_network(x64):
    """D = x + sigma^2 score and eps = -sigma score of x1 + sigma noise (Tweedie), in closed form
    for a Gaussian."""
    schedule, mean = schedules.edm(), jnp.asarray([[1.5, -0.5]])
    cov = jnp.asarray([[0.5, 0.2], [0.2, 0.3]])

    def score(x, sigma):
        marginal = cov[None] + sigma[:, None, None] ** 2 * jnp.eye(2)[None]
        return -jnp.linalg.solve(marginal, (x - mean)[..., None])[..., 0]

    def denoise(params, x, sigma, cond=None, *, key=None):
        return x + sigma[:, None] ** 2 * score(x, sigma)

    def noise(params, x, sigma, cond=None, *, key=None):
        return -sigma[:, None] * score(x, sigma)

    x, t = draw(schedule)
    for velocity in (
        paths.from_edm(field(denoise), schedule),
        paths.from_sigma(field(noise), schedule),
    ):
        np.testing.assert_allclose(
            velocity.apply({}, x, t), gaussian(schedule).velocity(x, t), rtol=1e-8, atol=1e-10
        )
        linear = paths.reschedule(velocity, schedule, LINEAR)
        y, r = draw(LINEAR)
        np.testing.assert_allclose(
            linear.apply({}, y, r), gaussian(LINEAR).velocity(y, r), rtol=1e-8, atol=1e-8
        )
        # what init shows the network is what apply will
        np.testing.assert_array_equal(velocity.init(None, x, t)["t"], schedule.sigma(t))


def test_trigonometric_network(x64):
    """x = cos(tau) x1 + std sin(tau) z: the network is dx/dtau / std at x = std y."""
    for std in (1.0, 0.5):
        oracle = gaussian(schedules.cosine(std))

        def slope(params, y, tau, cond=None, *, key=None, std=std, oracle=oracle):
            return oracle.velocity(std * y, 1 - 2 * tau / np.pi) * (-2 / np.pi) / std

        velocity = paths.from_trigonometric(field(slope), data_std=std)
        x, t = draw(schedules.cosine(std))
        np.testing.assert_allclose(velocity.apply({}, x, t), oracle.velocity(x, t), rtol=1e-10)
    # and by the definition on one pair, tau = pi/2 at noise: F = (cos(tau) std z - sin(tau) x1) /
    # std
    x1, z, t, std = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[0.3, -0.4]]), jnp.asarray([0.3]), 0.5
    tau = np.pi / 2 * (1 - t[:, None])
    pair = field(
        lambda params, y, s, cond=None, *, key=None: (
            (jnp.cos(tau) * std * z - jnp.sin(tau) * x1) / std
        )
    )
    target = paths.affine(schedules.cosine(std)).target(z, x1, t)
    np.testing.assert_allclose(
        paths.from_trigonometric(pair, data_std=std).apply({}, x1, t), target, rtol=1e-12
    )


def test_noise_time_network(x64):
    """A network of noise - data at s = 1 - t, called at 1000 s."""
    oracle = gaussian(LINEAR)

    def net(params, x, s, cond=None, *, key=None):
        return -oracle.velocity(x, 1 - s / 1000)

    x, t = draw(LINEAR)
    velocity = paths.from_noise_time(field(net), scale=1000.0)
    np.testing.assert_allclose(velocity.apply({}, x, t), oracle.velocity(x, t), rtol=1e-9)
    np.testing.assert_allclose(velocity.init(None, x, t)["t"], 1000 * (1 - t), rtol=1e-12)


def test_preconditioned_network_is_linear_at_no_and_much_noise(x64):
    """With F = 0 the denoiser keeps x where there is no noise, and forgets it where there is
    nothing else."""
    nothing = field(lambda params, x, level, cond=None, *, key=None: jnp.zeros_like(x))
    denoiser = parameterizations.edm_denoiser(nothing, data_std=0.5)
    x = jnp.ones((2, 3))
    np.testing.assert_allclose(
        denoiser.apply({}, x, jnp.asarray([1e-4, 0.5])), x * jnp.asarray([[1.0], [0.5]]), rtol=1e-6
    )
    seen = denoiser.init(None, x, jnp.asarray([0.5, 2.0]))
    np.testing.assert_allclose(seen["t"], np.log([0.5, 2.0]) / 4)
    np.testing.assert_allclose(seen["x"][:, 0], 1 / np.hypot([0.5, 2.0], 0.5))
    # F is what is left of x1 by unit variance: c_out F = x1 - c_skip x has variance c_out^2 for
    # data of that deviation
    x1, z = (
        0.5 * jax.random.normal(jax.random.key(0), (20000, 1)),
        jax.random.normal(jax.random.key(1), (20000, 1)),
    )
    ones = field(lambda params, x, level, cond=None, *, key=None: jnp.ones_like(x))
    for sigma in (0.1, 1.0, 20.0):
        level = jnp.full((20000,), sigma)
        skipped = parameterizations.edm_denoiser(nothing).apply({}, x1 + sigma * z, level)
        out = parameterizations.edm_denoiser(ones).apply({}, x1 + sigma * z, level) - skipped
        # four standard errors of a variance from 20000 draws
        np.testing.assert_allclose(np.var((x1 - skipped) / out), 1, atol=4 * np.sqrt(2 / 20000))
