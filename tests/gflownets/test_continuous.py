"""Continuous GFlowNets at exact solutions, against quadrature, and outside of the theory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from keys import KEYS, keys_consumed_twice

from jflow import distributions, gflownets, losses, manifolds, nets, train

LINE, CIRCLE, TORUS = manifolds.euclidean(1), manifolds.torus(1), manifolds.torus(2)
STEPS, SPREAD, LOG_Z = 3, 0.7, 1.3


def of_law(log_prob, draw):
    """A transition without params."""
    return gflownets.Transition(
        lambda *args: {},
        lambda params, other, x, step: log_prob(other, x),
        lambda params, key, x, step: draw(key, x),
    )


def normal(z, std):
    return -0.5 * ((z[:, 0] / std) ** 2 + np.log(2 * np.pi)) - jnp.log(std)


class ExactFlow(nn.Module):
    """The exact log-flow as the one feature, in float64 from a table of functions."""

    log_flow: object

    @nn.compact
    def __call__(self, seen):
        step = jnp.argmax(seen[:, -(STEPS + 1) :], axis=1)
        return self.log_flow(seen[:, : -(STEPS + 1)], step)[:, None]


def brownian():
    """A Brownian motion, whose bridge is its backward transition: R = Z N(0, N s^2)."""
    forward = of_law(
        lambda other, x: normal(other - x, SPREAD),
        lambda key, x: x + SPREAD * jax.random.normal(key, x.shape, x.dtype),
    )
    log_flow = lambda x, step: LOG_Z + normal(x, SPREAD * jnp.sqrt(jnp.maximum(step, 1)))  # noqa: E731
    policy = gflownets.continuous_policy(
        LINE,
        forward,
        gflownets.bridge_transition(SPREAD, (0.0,)),
        steps=STEPS,
        flow=ExactFlow(log_flow),
    )
    return policy, lambda x: LOG_Z + normal(x, SPREAD * np.sqrt(STEPS))


def two_von_mises(angle):
    x = angle[..., 0]
    parts = [2 * jnp.cos(x - 1), 4 * jnp.cos(x + 2) - 1]
    return jnp.logaddexp(*parts) - jnp.log(
        2 * np.pi * (jax.scipy.special.i0(2.0) + jax.scipy.special.i0(4.0) * jnp.exp(-1.0))
    )


def forgetful(stop):
    """Each move on the circle is a fresh draw of the reward, backwards too. With a stop the number
    of moves is uniform."""

    def draw(key, x):
        grid = jnp.linspace(-np.pi, np.pi, 4000, dtype=x.dtype)[:, None]
        return grid[jax.random.categorical(key, two_von_mises(grid), shape=x.shape[:1])]

    fresh = of_law(lambda other, x: two_von_mises(other), draw)

    def log_flow(x, step):
        angle = jnp.arctan2(x[:, 1], x[:, 0])[:, None]
        left = (STEPS + 1 - step) / STEPS if stop else 1.0
        return LOG_Z + two_von_mises(angle) + jnp.log(left)

    policy = gflownets.continuous_policy(
        CIRCLE,
        fresh,
        fresh,
        steps=STEPS,
        stop=nets.MLP((4,)) if stop else None,
        flow=ExactFlow(log_flow),
    )
    return policy, lambda x: LOG_Z + two_von_mises(x)


EXACT = {
    "Brownian motion": brownian,
    "fresh draws": lambda: forgetful(False),
    "fresh draws and stops": lambda: forgetful(True),
}


@pytest.mark.parametrize("name", EXACT)
def test_balance_is_exact_at_an_exact_solution_and_on_any_trajectory(name, x64):
    """To the rounding of float64 in sums of about 10 terms of size 10; off by 0.1 in log Z, the
    loss of trajectories is 0.01."""
    policy, log_reward = EXACT[name]()

    @jax.jit
    def run():
        params = policy.init(KEYS[0])
        params["log_z"] = jnp.asarray(LOG_Z)
        params["flow"]["kernel"] = jnp.zeros_like(params["flow"]["kernel"]).at[0].set(1)
        ends = jax.random.uniform(KEYS[1], (50, 1), minval=-3, maxval=3)
        found = []
        for x, length in (
            policy.sample(params, KEYS[2], 50),
            policy.sample_backward(params, KEYS[3], ends),
        ):
            batch = {"x": x, "length": length, "log_reward": log_reward(x[:, -1])}
            trajectory = losses.continuous_trajectory_balance(policy)
            found += [
                trajectory(params, None, batch)[0],
                losses.continuous_detailed_balance(policy)(params, None, batch)[0],
                trajectory(params | {"log_z": LOG_Z + 0.1}, None, batch)[0],
            ]
        return jnp.stack(found), length, x, ends

    found, length, x, ends = jax.device_get(run())
    np.testing.assert_allclose(found, [0, 0, 0.01] * 2, atol=1e-20, rtol=1e-6)
    np.testing.assert_array_equal(x[:, -1], ends)
    assert set(length.tolist()) == ({1, 2, 3} if "stops" in name else {STEPS})


def learned(manifold, law, steps, **more):
    make = lambda: gflownets.transition(law, nets.MLP((8,)), manifold, steps=steps)  # noqa: E731
    policy = gflownets.continuous_policy(manifold, make(), make(), steps=steps, **more)
    params = jax.jit(policy.init)(KEYS[0])
    rng = np.random.default_rng(0)  # away from where stops and flows are 0
    for what in {"stop", "flow"} & set(params):
        kernel = params[what]["kernel"]
        params[what]["kernel"] = jnp.asarray(rng.normal(size=kernel.shape), kernel.dtype)
    return policy, params


def hybrid():
    """Normals on the line with a stop, the nodes and the log-weight of a rule."""
    law = distributions.conditional_mixture((1,), 2, min_std=0.3)
    nodes = np.linspace(-15, 15, 251)[:, None]
    return *learned(LINE, law, 3, stop=nets.MLP((8,))), nodes, np.log(0.12)


def fixed():
    law = distributions.von_mises_mixture((2,), 2, min_std=0.6)
    angles = np.linspace(-np.pi, np.pi, 17)[:-1]
    nodes = np.stack(np.meshgrid(angles, angles), -1).reshape(-1, 2)
    return *learned(TORUS, law, 3), nodes, 2 * np.log(2 * np.pi / 16)


@pytest.mark.parametrize("make", [hybrid, fixed])
def test_the_density_of_what_is_made(make):
    """By quadrature: it integrates to 1; 5,000 samples have its means, within 4.5 standard errors;
    and importance sampling along learned backward trajectories estimates it, without bias."""
    policy, params, nodes, log_weight = make()
    nodes, n, draws = np.asarray(nodes, np.float32), 5_000, 1_000
    log_density = jax.jit(gflownets.terminal_log_density, static_argnums=0)(
        policy, params, nodes, log_weight
    )
    p = np.exp(np.asarray(log_density, np.float64) + log_weight)
    np.testing.assert_allclose(p.sum(), 1, atol=1e-4)  # float32, and the rule
    x, length = jax.device_get(jax.jit(policy.sample, static_argnums=2)(params, KEYS[1], n))
    assert len(set(length.tolist())) == (3 if make is hybrid else 1)
    last = x[:, -1].astype(np.float64)
    np.testing.assert_array_equal(x[np.arange(n), length - 1], x[:, -1])
    for f in (np.cos, np.sin, lambda x: np.cos(2 * x)):
        error = f(last).mean(0) - p @ f(nodes.astype(np.float64))
        assert np.all(np.abs(error) < 4.5 * f(last).std(0) / np.sqrt(n)), error
    at = np.argsort(-p)[:3]
    many = np.repeat(nodes[at], draws, axis=0)  # one draw each
    estimate = jax.jit(gflownets.continuous_log_prob, static_argnums=(0, 4))
    one = estimate(policy, params, KEYS[2], many, 1).reshape(3, draws)
    ratio = np.exp(np.asarray(one, np.float64) - np.asarray(log_density)[at][:, None])
    assert np.all(np.abs(ratio.mean(1) - 1) < 4.5 * ratio.std(1) / np.sqrt(draws))
    # all together: the logarithm of the mean of the same draws
    together = gflownets.continuous_log_prob(policy, params, KEYS[2], nodes[at], draws)
    np.testing.assert_allclose(
        together, np.asarray(log_density)[at] + np.log(ratio.mean(1)), atol=1e-4
    )


def test_detailed_balance_on_a_line_keeps_its_trajectories_near():
    """A flow whose log cannot fall as the reward's does far out makes the policy wider and wider:
    without squares under its head this loss was 6e7 at the end."""
    law, net = distributions.conditional_mixture((1,), 2), nets.MLP((16,), activation=jnp.tanh)
    policy = gflownets.continuous_policy(
        LINE,
        gflownets.transition(law, net, LINE, steps=STEPS),
        gflownets.bridge_transition(2.0, (0.0,)),
        steps=STEPS,
        flow=net,
    )
    rollout = gflownets.continuous_rollouts(policy, lambda x: normal(x - 1, 1.0), 64)
    optimizer = optax.adam(1e-2)
    step = train.make_step(losses.continuous_detailed_balance(policy), optimizer)
    state = train.init_state(policy.init(KEYS[0]), optimizer, KEYS[1])

    @jax.jit
    def run(state, keys):
        return jax.lax.scan(lambda state, key: step(state, rollout(state, key)), state, keys)

    loss = run(state, jax.random.split(KEYS[2], 150))[1]["loss"]
    assert float(loss[:3].mean()) > 5 and float(loss[-20:].mean()) < 1


def test_gradients_reach_every_number_and_keys_are_consumed_once():
    law = distributions.von_mises_mixture((1,), 2)
    policy, params = learned(CIRCLE, law, 3, stop=nets.MLP((8,)), flow=nets.MLP((8,)))
    objectives = [losses.continuous_trajectory_balance, losses.continuous_detailed_balance]
    rollout = gflownets.continuous_rollouts(policy, lambda x: jnp.cos(x[:, 0]), 16)
    state = type("State", (), {"params": params})
    batch = rollout(state, KEYS[1])

    @jax.jit
    def run(params, batch):
        return [jax.grad(lambda p: make(policy)(p, None, batch)[0])(params) for make in objectives]  # noqa: B023

    for make, slopes in zip(objectives, jax.device_get(run(params, batch)), strict=True):
        for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
            unused = make is objectives[0] and "flow" in jax.tree_util.keystr(path)
            assert np.all(np.isfinite(slope)) and np.any(slope) != unused, path
    from_points = gflownets.continuous_rollouts(
        policy, lambda x: jnp.cos(x[:, 0]), 16, backward=CIRCLE.random
    )
    calls = lambda a, b, c: (policy.init(a), rollout(state, b), from_points(state, c))  # noqa: E731
    assert not keys_consumed_twice(calls, *KEYS[:3])


def test_a_transition_that_cannot_reach_the_reward_is_seen_on_backward_trajectories_alone():
    """The theory's condition on the supports: one move within 1 of 0, a reward of 1 on |x| < 4. Its
    own trajectories balance, with Z = 2 in place of 8; the others have an infinite loss."""
    box = lambda x: jnp.where(jnp.abs(x[:, 0]) < 1, -np.log(2.0), -jnp.inf)  # noqa: E731
    draw = lambda key, x: x + jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)  # noqa: E731
    near = of_law(lambda other, x: box(other - x), draw)
    policy = gflownets.continuous_policy(LINE, near, near, steps=1)
    loss = losses.continuous_trajectory_balance(policy)
    params = policy.init(KEYS[0]) | {"log_z": jnp.log(2.0)}
    found = []
    for x, length in (
        policy.sample(params, KEYS[1], 50),
        policy.sample_backward(params, KEYS[2], jnp.linspace(-3.9, 3.9, 50)[:, None]),
    ):
        found.append(
            float(loss(params, None, {"x": x, "length": length, "log_reward": 0 * x[:, -1, 0]})[0])
        )
    np.testing.assert_allclose(found, [0, np.inf], atol=1e-12)


def test_the_bridge_is_the_conditional_of_the_walk(x64):
    """log p(x_(k-1)) + log p(x_k | x_(k-1)) - log p(x_k), by scipy."""
    rng = np.random.default_rng(0)
    before, x, step = rng.normal(size=(9, 1)), rng.normal(size=(9, 1)), np.arange(9) % 3 + 2
    got = gflownets.bridge_transition(SPREAD, (0.5,)).log_prob({}, before, x, jnp.asarray(step))
    law = lambda z, variance: scipy.stats.norm.logpdf(z[:, 0], 0, SPREAD * np.sqrt(variance))  # noqa: E731
    expected = law(before - 0.5, step - 1) + law(x - before, 1) - law(x - 0.5, step)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_bad_input_is_an_error():
    law = distributions.conditional_mixture((1,))
    move = gflownets.transition(law, nets.MLP((4,)), LINE, steps=2)
    with pytest.raises(ValueError, match="not flat"):
        gflownets.transition(law, nets.MLP((4,)), manifolds.sphere(2), steps=2)
    with pytest.raises(TypeError, match="expected a Transition"):
        gflownets.continuous_policy(LINE, law, move, steps=2)
    with pytest.raises(ValueError, match="steps"):
        gflownets.continuous_policy(LINE, move, move, steps=0)
    with pytest.raises(ValueError, match=r"expected start of shape \[1\], got \[2\]"):
        gflownets.continuous_policy(LINE, move, move, steps=2, start=(0.0, 1.0))
    with pytest.raises(ValueError, match="infinite"):
        gflownets.uniform_transition(LINE)
    with pytest.raises(ValueError, match="std > 0"):
        gflownets.bridge_transition(0.0, (0.0,))
    policy = gflownets.continuous_policy(LINE, move, move, steps=2)
    params, batch = (
        jax.jit(policy.init)(KEYS[0]),
        {"x": jnp.zeros((3, 2, 1)), "length": jnp.full(3, 2)},
    )
    with pytest.raises(ValueError, match="expected 'log_reward' in the batch"):
        losses.continuous_trajectory_balance(policy)(params, None, batch)
    batch["log_reward"] = jnp.zeros(3)
    with pytest.raises(ValueError, match="expected a policy with a flow"):
        losses.continuous_detailed_balance(policy)(params, None, batch)
    with pytest.raises(ValueError, match=r"expected x of shape \[n, 2, 1\], got \[3, 3, 1\]"):
        policy.score(params, jnp.zeros((3, 3, 1)), jnp.full(3, 2))
    with pytest.raises(ValueError, match="a log-reward"):
        rollout = gflownets.continuous_rollouts(policy, lambda x: x, 4)
        rollout(type("State", (), {"params": params}), KEYS[1])
