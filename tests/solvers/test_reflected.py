"""Reflected solvers and steps: no state leaves, what stays inside is as without them, the flow
slides along the boundary, and Brownian motion has its closed form."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from keys import KEYS

from jflow import domains, solvers
from jflow.types import Velocity

ALARM = 1e-3


def moving(f):
    return Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: f(x, t))


OUTWARD = moving(lambda x, t: 30 * (x - 0.2) + 20 * jnp.sin(9 * x))
CALM = moving(lambda x, t: 0.3 * (0.5 - x) * (1 + t[:, None]))
SOLVERS = {  # evaluations in three steps
    "Euler": (diffrax.Euler(), 3),
    "Heun": (diffrax.Heun(), 6),
    "Tsit5": (diffrax.Tsit5(), 21),  # seven stages; outside a domain the first is the last one
    "adams_bashforth": (solvers.adams_bashforth(3), 3),
    "dpm_solver_2": (solvers.dpm_solver_2(), 6),
}
DOMAINS = {
    "box": (domains.box((3,)), 0.5),
    "simplex": (domains.simplex((3,)), 1 / 3),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_no_state_leaves_and_what_stays_inside_is_as_it_was(name):
    """With three steps of a velocity that points outward, up to thirty boxes a unit of time; and a
    velocity that stays inside gives what the solver gives without a domain."""
    solver, evaluations = SOLVERS[name]

    @jax.jit
    def run(e):
        out, calm = {}, {}
        for kind, (domain, center) in DOMAINS.items():
            x0 = domain.project(center + e)
            method = solvers.fixed(3, solvers.reflected(solver, domain))
            out[kind] = solvers.sample(OUTWARD, {}, x0, method=method)
            out[kind] += (domain.project(out[kind][0]),)
        x0 = 0.5 + 0.1 * e
        for kind, how in (
            ("without", solver),
            ("with", solvers.reflected(solver, DOMAINS["box"][0])),
        ):
            calm[kind] = solvers.sample(CALM, {}, x0, method=solvers.fixed(3, how))[0]
        return out, calm

    out, calm = jax.device_get(run(0.3 * np.random.default_rng(0).normal(size=(50, 3)).astype("f")))
    for x, info, nearest in out.values():
        assert np.all(info.status == 0) and np.all(info.evaluations == evaluations)
        np.testing.assert_allclose(x, nearest, atol=1e-6)
        assert np.ptp(x) > 0.1
    np.testing.assert_allclose(calm["with"], calm["without"], rtol=1e-6, atol=1e-6)


def test_with_tolerances_and_backwards():
    """Each row has its own steps, and stays inside; on a grid gradients are finite, and the way
    back stays inside too."""
    domain = domains.ball((2,))
    method = solvers.adaptive(solvers.reflected(diffrax.Tsit5(), domain), rtol=1e-2, atol=1e-2)
    grid = solvers.on_grid([0.0, 0.3, 1.0], solvers.reflected(diffrax.Heun(), domain))
    push = moving(lambda x, t: 3 * x + jnp.ones_like(x))

    @jax.jit
    def run(x0):
        x, info = solvers.sample(push, {}, x0, method=method)
        pull = moving(lambda x, t: -5 * x)
        back = lambda x: solvers.sample(pull, {}, x, method=solvers.reverse(grid))[0]  # noqa: E731
        end, transposed = jax.vjp(back, x0)
        return x, info, end, transposed(jnp.ones_like(end))

    x0 = np.array([[0.1, 0.2], [-0.3, 0.4], [0.7, -0.5]], np.float32)
    x, info, back, (slope,) = jax.device_get(run(x0))
    assert np.all(info.status == 0) and np.all(info.evaluations > 7)
    for states in (x, back):
        assert np.all(np.linalg.norm(states, axis=1) <= 1 + 1e-6)
    assert np.all(np.isfinite(slope)) and np.any(slope != 0)


def test_the_flow_slides_along_the_boundary(x64):
    """A constant velocity v in the unit disk: the state meets the circle, then its angle phi from v
    obeys dphi/dt = -|v| sin(phi), so that tan(phi / 2) falls like exp(-|v| t). The error is of
    order one."""
    speed, domain = 3.0, domains.ball((2,))
    velocity = moving(lambda x, t: jnp.broadcast_to(jnp.array([[speed, 0.0]]), x.shape))
    steps = np.array([50, 100, 200, 400])
    x0 = np.array([[0.0, 0.5]])
    ends = jax.jit(
        lambda x0: [
            solvers.sample(
                velocity,
                {},
                x0,
                method=solvers.fixed(int(n), solvers.reflected(diffrax.Euler(), domain)),
            )[0]
            for n in steps
        ]
    )(x0)
    met = np.sqrt(1 - 0.5**2) / speed
    phi = 2 * np.arctan(np.tan(np.pi / 12) * np.exp(-speed * (1 - met)))  # sin(pi / 6) = 0.5
    errors = np.array(
        [np.linalg.norm(np.asarray(end) - [np.cos(phi), np.sin(phi)]) for end in ends]
    )
    assert np.all(errors < 3 * speed / steps) and errors[-1] < errors[0] / 3


def test_brownian_motion_on_an_interval_has_its_closed_form():
    """dW from 0.3, reflected at 0 and 1, at the time 0.2 of the grid: Kolmogorov-Smirnov against
    the cosine series, with steps as long as the interval and short ones; no state leaves."""
    still = moving(lambda x, t: jnp.zeros_like(x))
    brownian = solvers.euler_maruyama(still, 0.5, score=lambda params, x, t, cond: 0 * x)
    step = solvers.reflected_step(brownian, domains.box((1,)))
    x0 = jnp.full((4000, 1), 0.3)
    k = np.arange(1, 100)[:, None]

    def cdf(x):
        weight = np.exp(-0.5 * (k * np.pi) ** 2 * 0.2) * np.cos(k * np.pi * 0.3) / (k * np.pi)
        return x + 2 * np.sum(weight * np.sin(k * np.pi * x), axis=0)

    for grid, key in (([0.0, 0.2], KEYS[0]), (np.linspace(0, 0.2, 9), KEYS[1])):
        x, path = solvers.sample_sde(step, {}, x0, key, grid, return_trajectory=True)
        assert np.all((path.x >= 0) & (path.x <= 1)) and np.any(x != path.mean[-1])
        assert scipy.stats.kstest(np.asarray(x[:, 0], np.float64), cdf).pvalue > ALARM
    nats = jnp.mean(domains.reflected_normal_log_prob(x, path.mean[-1], path.std[-1]))
    own = jnp.mean(solvers.step_log_prob(x, path.mean[-1], path.std[-1]))
    assert nats > own  # the images count, which the normal does not see


def test_a_step_without_a_key_is_its_mean_reflected():
    step = solvers.reflected_step(
        solvers.euler_maruyama(moving(lambda x, t: 4 + 0 * x), 0.1, score=lambda p, x, t, c: 0 * x),
        domains.box((1,)),
    )
    x, mean, std = step({}, jnp.full((1, 1), 0.75), 0.0, 0.25, None)
    assert x.tolist() == [[0.25]] and mean.tolist() == [[1.75]] and std.shape == (1,)


def test_bad_options():
    for call, said in [
        (
            lambda: solvers.reflected(domains.box((1,)), diffrax.Euler()),
            "solvers.reflected: .*Domain",
        ),
        (lambda: solvers.reflected(3, domains.box((1,))), "solvers.reflected: expected solver"),
        (
            lambda: solvers.reflected_step(None, None),
            "solvers.reflected_step: .*Domain .*, got None",
        ),
    ]:
        with pytest.raises(TypeError, match=said):
            call()
    with pytest.raises(ValueError, match="no error estimate"):
        solvers.adaptive(solvers.reflected(diffrax.Euler(), domains.box((1,))))
