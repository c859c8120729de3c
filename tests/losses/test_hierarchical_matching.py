import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import couplings, losses
from jflow.losses._hierarchical import HierarchyLevel, hierarchical_matching
from jflow.nets import ResidualMLP, TimeMLP
from jflow.nets._fields import velocity
from jflow.solvers._hierarchical import HierarchyCondition
from jflow.types import Velocity


def as_velocity(function):
    return Velocity(
        lambda *args: {}, lambda params, x, t, cond=None, *, key=None: function(params, x, t, cond)
    )


def fixed(values):
    return lambda key, n: jnp.asarray(values)


def rows(n=8, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, 2))


def test_one_level_is_flow_matching():
    net = as_velocity(lambda params, x, t, cond: params["w"] * x + t[:, None] + cond)
    params, times = {"w": jnp.array(0.3)}, np.linspace(0.1, 0.9, 8).astype(np.float32)
    flipped = lambda key, x0, x1, cond=None: (jnp.arange(8)[::-1], jnp.arange(8))  # noqa: E731
    batch = {
        "x": rows(),
        "x0": rows(seed=1),
        "cond": rows(seed=2),
        "weight": jnp.linspace(0.5, 2, 8),
    }
    one = hierarchical_matching(net, [HierarchyLevel(time=fixed(times), coupling=flipped)])
    known = losses.chain(couplings.pair(flipped), losses.flow_matching(net, time=fixed(times)))
    found, expected = (
        jax.value_and_grad(lambda p, f=f: f(p, jax.random.key(0), batch)[0])(params)
        for f in (one, known)
    )
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1]["w"], expected[1]["w"])


def test_inputs_and_target_of_three_levels():
    seen = {}

    def net(params, x, t, cond):
        seen.update(x=x, t=t, cond=cond)
        return jnp.zeros_like(x)

    noise = []  # what the couplings were shown: z_i, y_i and cond, level by level

    def spy(key, z, y, cond=None):
        noise.append((z, y, cond))
        return np.arange(8), np.arange(8)

    times = [np.full(8, t, np.float32) for t in (0.2, 0.5, 0.9)]
    loss = hierarchical_matching(
        as_velocity(net), [HierarchyLevel(time=fixed(t), coupling=spy) for t in times]
    )
    x1 = rows()
    value = loss({}, jax.random.key(3), {"x": x1})[0]
    z = [z for z, _, _ in noise]
    total = x1
    for i in range(3):
        # x^i = (1 - t_i) z_i + t_i (x1 - sum_{j < i} z_j)
        expected = (1 - times[i][0]) * z[i] + times[i][0] * total
        found = seen["x"] if i == 2 else seen["cond"].states[i]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(noise[i][1], total, atol=1e-6)
        total = total - z[i]
    np.testing.assert_allclose(value, jnp.mean(total**2), rtol=1e-5)
    np.testing.assert_allclose(jnp.stack(seen["cond"].times), jnp.stack(times[:2]))
    assert noise[0][2] is None and len(noise[2][2].states) == 2


def test_rows_follow_the_couplings_of_every_level():
    def rolled(k):
        return HierarchyLevel(
            time=fixed(np.full(8, 1.0, np.float32)),
            coupling=lambda key, z, y, cond=None: (jnp.arange(8), jnp.roll(jnp.arange(8), k)),
        )

    def net(params, x, t, cond):
        # at t = 1 the state above is its data, and the state here the velocity: all rows must
        # belong together
        np.testing.assert_allclose(cond.states[0], cond.cond, atol=1e-6)
        return cond.cond

    x1 = rows()
    hierarchical_matching(as_velocity(net), [rolled(3), rolled(2)])(
        {}, jax.random.key(0), {"x": x1, "cond": x1}
    )


def test_gaussian_data_have_a_known_inner_velocity():
    # x1 ~ N(m, c I): v given x_1 is N(mu, tau^2), so that the best velocity of the inner flow from
    # N(0, 1) to it is known; its loss is a minimum: the gradient by a factor and a shift vanishes,
    # and both directions are worse
    m, c, t1, t2 = 0.8, 0.5, 0.4, 0.6

    def best(params, y, r, told):
        x, t = told.states[0], told.times[0][:, None]
        length = t**2 * c + (1 - t) ** 2
        mu, tau2 = m + (t * c - (1 - t)) / length * (x - t * m), c / length
        r = r[:, None]
        v = mu + (r * tau2 - (1 - r)) / (r**2 * tau2 + (1 - r) ** 2) * (y - r * mu)
        return (1 + params["scale"]) * v + params["shift"]

    x1 = m + c**0.5 * jax.random.normal(jax.random.key(1), (50_000, 1))
    levels = [HierarchyLevel(time=fixed(np.full(50_000, t, np.float32))) for t in (t1, t2)]
    loss = hierarchical_matching(as_velocity(best), levels)
    both = jax.jit(jax.value_and_grad(lambda p: loss(p, jax.random.key(2), {"x": x1})[0]))
    zero = {"scale": jnp.zeros(()), "shift": jnp.zeros(())}
    value, slope = both(zero)
    for name in zero:
        np.testing.assert_allclose(
            slope[name], 0, atol=0.04, err_msg=name
        )  # standard error about 0.01
        for change in (-0.1, 0.1):
            assert both({**zero, name: jnp.array(change)})[0] > value
    # what is left is the variance of (v - z) given both states
    length = t1**2 * c + (1 - t1) ** 2
    tau2 = c / length
    np.testing.assert_allclose(value, tau2 / (t2**2 * tau2 + (1 - t2) ** 2), rtol=0.03)


@pytest.mark.parametrize("net", [TimeMLP(hidden=(16,)), ResidualMLP(width=16, num_blocks=1)])
def test_plain_velocity_networks_are_told_the_levels_above(net):
    v = velocity(net)
    x, t = rows(), jnp.full(8, 0.5)
    told = HierarchyCondition((rows(seed=4),), (jnp.full(8, 0.3),), rows(seed=5))
    params = jax.jit(v.init)(jax.random.key(0), x, t, told)
    params = jax.tree.map(
        lambda p: p + 0.3 * np.random.default_rng(0).standard_normal(p.shape, np.float32), params
    )
    apply = jax.jit(v.apply)
    base = apply(params, x, t, told)
    for other in (
        told._replace(states=(rows(seed=6),)),
        told._replace(times=(jnp.full(8, 0.9),)),
        told._replace(cond=x),
    ):
        assert np.max(np.abs(apply(params, x, t, other) - base)) > 1e-4
    loss = hierarchical_matching(v)
    slope = jax.jit(jax.grad(lambda p: loss(p, jax.random.key(1), {"x": x, "cond": x})[0]))(params)
    assert all(np.any(leaf != 0) and np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_a_coupling_of_velocities_has_to_mind_the_state_above():
    # at t_2 = 0 the network sees z_2 itself. Blind transport pairs it with velocities, which depend
    # on x_1; transport among near x_1 leaves them independent (64 rows: a correlation has standard
    # error 0.125, more than 0.4 is no chance)
    def correlation(coupling):
        seen = {}

        def net(params, x, t, told):
            seen.update(z=x[:, 0], x=told.states[0][:, 0])
            return x

        levels = [HierarchyLevel(time=fixed(np.full(64, t, np.float32))) for t in (0.9, 0.0)]
        levels[1] = levels[1]._replace(coupling=coupling)
        x1 = 3 * jax.random.normal(jax.random.key(1), (64, 1))
        hierarchical_matching(as_velocity(net), levels)({}, jax.random.key(0), {"x": x1})
        return abs(np.corrcoef(seen["z"], seen["x"])[0, 1])

    minding = couplings.near_condition(weight=1e3, condition=lambda outer: outer.states[0])
    assert correlation(couplings.optimal_transport()) > 0.8
    assert correlation(couplings.optimal_transport(minding)) < 0.4


def test_bad_input_says_so():
    net = as_velocity(lambda params, x, t, cond: x)
    with pytest.raises(ValueError, match="at least one level"):
        hierarchical_matching(net, [])
    with pytest.raises(TypeError, match="expected a losses.HierarchyLevel, got 2"):
        hierarchical_matching(net, [2])
    with pytest.raises(ValueError, match=r"velocity of shape \[8, 2\], got \[8, 1\]"):
        hierarchical_matching(as_velocity(lambda p, x, t, c: x[:, :1]))(
            {}, jax.random.key(0), {"x": rows()}
        )
