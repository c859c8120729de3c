"""Control by flows against closed forms: soft values, and the ratio of two densities."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors, distributions, flows, losses, nets

ALPHA = 0.3


class Constant(nn.Module):
    """A number, whatever the state."""

    @nn.compact
    def __call__(self, state):
        return jnp.full_like(state[:, 0], self.param("b", nn.initializers.ones, ()))


def linear_quadratic():
    """(policy, params) of the best policy for the reward -q/2 (a - k s)^2, of one step: the law is
    N(k s, alpha / q), and the soft value alpha/2 log(2 pi alpha / q)."""
    linear = bijectors.amortized(bijectors.affine((1,)))
    base = distributions.normal((1,))
    policy = flows.soft_policy(bijectors.chain(), linear, base, ALPHA, Constant())
    k, q = -0.8, 5.0
    params = {
        "bend": {},
        "linear": {
            "net": {},
            "kernel": {"log_scale": np.zeros((1, 1)), "shift": np.full((1, 1), k)},
            "bias": {"log_scale": np.full(1, np.log(ALPHA / q) / 2), "shift": np.zeros(1)},
        },
        "base": {},
        "shift": {"b": np.asarray(ALPHA / 2 * np.log(2 * np.pi))},
    }
    return policy, params, k, q


def test_the_soft_value_of_a_linear_quadratic_step_is_the_closed_form(x64):
    """At the best policy Q is the reward and V the closed form, the residual is zero to rounding,
    and its gradient too. A step before it, the best Q is the reward and discount V, which is a
    shift. A wrong shift has a residual."""
    policy, params, k, q = linear_quadratic()
    rng, discount = np.random.default_rng(0), 0.9
    a, s = rng.normal(size=(6, 1)), rng.normal(size=(6, 1))
    reward = -q / 2 * np.square(a - k * s)[:, 0]
    soft_value = ALPHA / 2 * np.log(2 * np.pi * ALPHA / q)
    loss = losses.soft_bellman(policy, discount)
    last = {"x": a, "cond": s, "next": s + 1, "reward": reward, "done": np.ones(6)}
    first = {name: value for name, value in last.items() if name != "done"}
    earlier = {**params, "shift": {"b": params["shift"]["b"] + discount * soft_value}}
    wrong = {**params, "shift": {"b": params["shift"]["b"] + 0.1}}

    @jax.jit
    def run(params, earlier, wrong):
        grad = jax.value_and_grad(lambda p, b: loss(p, None, b, {"ema": params})[0])
        return (
            policy.action_value(params, a, s),
            policy.value(params, s),
            policy.log_prob(params, a, s),
            grad(params, last),
            grad(earlier, first),
            grad(wrong, last)[0],
        )

    found, value, log_prob, at_last, at_first, residual = jax.device_get(
        run(params, earlier, wrong)
    )
    np.testing.assert_allclose(found, reward, atol=1e-12)
    np.testing.assert_allclose(value, soft_value, atol=1e-12)
    np.testing.assert_allclose(log_prob, (reward - soft_value) / ALPHA, atol=1e-12)
    for level, slope in (at_last, at_first):
        assert level < 1e-24
        assert all(np.max(np.abs(leaf)) < 1e-11 for leaf in jax.tree.leaves(slope))
    np.testing.assert_allclose(residual, 0.01, rtol=1e-9)


def test_the_soft_value_is_the_integral_of_the_action_value(x64):
    """alpha log integral exp(Q / alpha) = V for a random policy of two actions in a box, by the
    midpoint rule of 400^2 points in the numbers before the box, on [-16, 16]; actions of z = 0 have
    the largest Q where the bend keeps volume."""
    net = nets.MLP((8,), nn.tanh)
    couple = lambda kind: bijectors.coupling(kind, net, split=1)  # noqa: E731
    bend = bijectors.chain(
        couple(bijectors.univariate.affine()),
        bijectors.reverse(),
        couple(bijectors.univariate.affine()),
        bijectors.supports.interval(-1, 1),
    )
    additive = bijectors.chain(
        couple(bijectors.univariate.shift()),
        bijectors.reverse(),
        couple(bijectors.univariate.shift()),
    )
    linear = bijectors.amortized(bijectors.affine((2,)))
    box, free = (
        flows.soft_policy(map, linear, distributions.normal((2,)), ALPHA, nn.Dense(1))
        for map in (bend, additive)
    )
    rng, n = np.random.default_rng(0), 400
    state = np.array([[0.4, -1.0, 0.7]])
    before = np.linspace(-16, 16, n + 1)[1:] - 16 / n
    onto = bijectors.supports.interval(-1, 1)

    def drawn(policy):
        shapes = jax.eval_shape(policy.init, jax.random.key(0), np.zeros((1, 2)), state)
        return jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape), shapes)

    @jax.jit
    def run(p_box, p_free):
        u = jnp.stack(jnp.meshgrid(before, before), -1).reshape(-1, 2)
        a, log_det = onto.forward({}, u)
        q = box.action_value(p_box, a, jnp.repeat(state, n * n, 0)) / ALPHA + log_det
        total = jax.nn.logsumexp(q) + 2 * jnp.log(32 / n)
        best = free.push(p_free, jnp.zeros((1, 2)), state)
        nearby = best + 0.1 * jax.random.normal(jax.random.key(0), (50, 2))
        told = jnp.repeat(state, 50, 0)
        return (
            ALPHA * total,
            box.value(p_box, state)[0],
            free.action_value(p_free, best, state)[0],
            free.action_value(p_free, nearby, told),
        )

    total, value, top, others = jax.device_get(run(drawn(box), drawn(free)))
    np.testing.assert_allclose(total, value, atol=1e-8)
    assert np.all(others < top)


def test_the_bound_of_coupled_flows_is_the_kl_of_their_laws_and_less_elsewhere():
    """Agent N(1, 1), expert N(0, 1), KL 1/2: at the true densities the bound is 1/2, on 100,000
    rows within 4.5 standard errors (the ratio's and exp ratio's, of variances 1 and e - 1; bound=50
    takes less than 1e-3); with another mean it is lower by half the square of the difference. The
    ratio is that of the densities."""
    affine, normal = bijectors.affine((1,)), distributions.normal((1,))
    flow, n, bound = flows.flow(affine, normal), 100_000, 50.0
    loss = losses.coupled_flows(flow, flow, bound=bound, likelihood=0.0)
    ratio = losses.coupled_log_ratio(flow, flow, bound)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 1)).astype(np.float32)
    batch = {"x": 1 + x, "expert": rng.normal(size=(n, 1)).astype(np.float32)}
    at = lambda mean: {  # noqa: E731
        "bijector": {"log_scale": np.zeros(1, np.float32), "shift": np.full(1, mean, np.float32)},
        "base": {},
    }

    @jax.jit
    def run(mean):
        params = {"agent": {**at(0.0), "bijector": {**at(0.0)["bijector"], "shift": mean}}}
        params["expert"] = at(0.0)
        value, metrics = loss(params, None, batch)
        return value, metrics["kl"], ratio(params, batch["x"][:5])

    (value, best, found), (_, off, _) = (
        jax.device_get(run(np.full(1, mean, np.float32))) for mean in (1.0, 1.4)
    )
    error = np.sqrt((1 + np.e - 1) / n)
    assert abs(best - 0.5) < 4.5 * error + 1e-3
    assert value == -best
    assert abs((best - off) - 0.4**2 / 2) < 4.5 * 3 * error  # its ratio is 1.4 times as large
    np.testing.assert_allclose(found, batch["x"][:5, 0] - 0.5, atol=2e-3)


def test_a_linear_map_without_params_scales_nothing():
    """V is then the shift alone, here 0, and Q the temperature times the log of the policy."""
    policy = flows.soft_policy(
        bijectors.chain(), bijectors.reverse(), distributions.normal((2,)), 0.5
    )
    a, s = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)
    params = policy.init(jax.random.key(0), a, s)
    np.testing.assert_array_equal(policy.value(params, s), np.zeros(3))
    expected = 0.5 * np.asarray(policy.log_prob(params, a, s))
    np.testing.assert_allclose(policy.action_value(params, a, s), expected, rtol=1e-6)


def test_bad_arguments():
    policy, params, _, _ = linear_quadratic()
    x = np.zeros((2, 1), np.float32)
    rows = {"x": x, "cond": x, "next": x, "reward": np.zeros(2, np.float32)}
    run = lambda batch, frozen: losses.soft_bellman(policy)(params, None, batch, frozen)  # noqa: E731
    with pytest.raises(ValueError, match=r"soft_bellman: expected \['next', 'reward'\] in batch"):
        run({"x": x, "cond": x}, {})
    with pytest.raises(ValueError, match="soft_bellman: expected 'ema' in frozen"):
        run(rows, {})
    with pytest.raises(ValueError, match=r"expected 'reward' of shape \[2\], got \[2, 1\]"):
        run({**rows, "reward": x}, {"ema": params})
    with pytest.raises(ValueError, match=r"discount in \[0, 1\], got 1.5"):
        losses.soft_bellman(policy, 1.5)
    bent = bijectors.chain(bijectors.affine((1,)), bijectors.tanh())
    wrong = flows.soft_policy(bijectors.chain(), bent, distributions.normal((1,)), 1.0)
    with pytest.raises(ValueError, match="whose log_det does not depend on z"):
        wrong.init(jax.random.key(0), x, x)
    with pytest.raises(ValueError, match="expected temperature > 0, got 0"):
        flows.soft_policy(bijectors.chain(), bent, distributions.normal((1,)), 0)
    with pytest.raises(ValueError, match="expected the state as cond, got None"):
        policy.log_prob(params, x, None)
    with pytest.raises(ValueError, match="expected bound > 0, got -1"):
        losses.coupled_flows(distributions.normal((1,)), distributions.normal((1,)), bound=-1)
    with pytest.raises(ValueError, match=r"coupled_flows: expected \['expert'\] in batch"):
        normal = distributions.normal((1,))
        losses.coupled_flows(normal, normal)({"agent": {}, "expert": {}}, None, {"x": x})
