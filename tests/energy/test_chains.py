"""Markov chains with flows: they leave the target as it is, and a flow makes them fast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import distributions, energy, flows

KEY, N = jax.random.key(0), 20_000
BANANA = energy.banana()
FLOW = flows.flow(bj.affine((2,)), distributions.normal((2,)))
WIDE = {
    "bijector": {"shift": jnp.array([0.0, 0.5]), "log_scale": jnp.array([0.8, 0.9])},
    "base": {},
}
KERNELS = {
    "independence": (energy.independence_kernel(FLOW, WIDE), BANANA),
    "successive": (
        energy.successive_kernels(
            energy.independence_kernel(FLOW, WIDE), energy.metropolis_kernel(0.5)
        ),
        BANANA,
    ),
    "pulled back": (energy.hamiltonian_kernel(0.2, 3), energy.pull_back(BANANA, FLOW, WIDE)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_chain_leaves_the_target_as_it_is(name):
    """N chains from exact draws: after 10 transitions the first two moments of both coordinates
    and their bend are the exact ones within 4.5 standard errors (8 numbers, 3 kernels: a false
    alarm in 5000). Each transition moves a share of chains that is neither all nor none."""
    kernel, target = KERNELS[name]

    @jax.jit
    def run(key):
        key_start, key_run = jax.random.split(key)
        x = target.sample(key_start, N)
        states, accepted = energy.run_chains(kernel, target, x, key_run, 2, thin=5)
        x = states[-1]
        return (FLOW.forward(WIDE, x)[0] if name == "pulled back" else x), accepted

    x, accepted = jax.device_get(run(KEY))
    assert 0.15 < np.mean(accepted) < 0.99
    first, second = x.T
    # x1 = 2 e, x2 = e^2 - 1 + e' / 2 with independent standard normals
    exact = [
        (first, 0.0),
        (first**2, 4.0),
        (second, 0.0),
        (second**2, 2.25),
        (first * second, 0.0),
        (first**2 * second, 8.0),
    ]
    for found, mean in exact:
        assert abs(np.mean(found) - mean) < 4.5 * np.std(found) / np.sqrt(N), (name, mean)


def test_an_exact_flow_is_always_accepted_and_its_source_is_the_base(x64):
    """Independence proposals are all taken up to rounding; pulled back, the target is the base
    times Z, in closed form."""
    params = {"bijector": {"shift": jnp.array([3.0, -1]), "log_scale": jnp.array([2.0, -3])}}
    params["base"] = {}
    flow = flows.flow(bj.affine((2,)), distributions.normal((2,)))
    target = energy.Target(lambda x: flow.log_prob(params, x) + 1.7, (2,), 1.7)
    x = flow.sample(params, KEY, 50)
    states, accepted = energy.run_chains(
        energy.independence_kernel(flow, params), target, x, KEY, 20
    )
    np.testing.assert_array_equal(accepted, 1)
    assert np.all(states[1:] != states[:-1])
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    pulled = energy.pull_back(target, flow, params)
    np.testing.assert_allclose(
        pulled.log_density(z), 1.7 - 0.5 * np.sum(z**2, -1) - np.log(2 * np.pi), atol=1e-12
    )
    assert pulled.log_z == 1.7 and pulled.event_shape == (2,) and pulled.sample is None


SCALES = np.array([10.0, 0.01])


def test_a_flow_makes_a_stiff_target_easy():
    """A normal of scales 10 and 0.01: the same 50 trajectories from one point give both moments
    within 20% in the source of a flow that is wrong by a factor of 1.3, and without it the long
    direction, whose stable step is 1/1000 of its scale, has not moved by a tenth."""
    flow = flows.flow(bj.affine((2,)), distributions.normal((2,)))
    log_scale = jnp.log(jnp.asarray(1.3 * SCALES, jnp.float32))
    params = {"bijector": {"shift": jnp.zeros(2), "log_scale": log_scale}, "base": {}}
    scales = jnp.asarray(SCALES, jnp.float32)
    target = energy.Target(lambda x: -0.5 * jnp.sum((x / scales[None]) ** 2, -1), (2,))

    @jax.jit
    def run(key):
        keys, start = jax.random.split(key), jnp.zeros((500, 2))
        pulled = energy.pull_back(target, flow, params)
        z, near = energy.run_chains(energy.hamiltonian_kernel(0.5, 5), pulled, start, keys[0], 50)
        x, far = energy.run_chains(energy.hamiltonian_kernel(0.01, 5), target, start, keys[1], 50)
        return flow.forward(params, z[-1])[0], x[-1], near, far

    with_flow, without, near, far = jax.device_get(run(KEY))
    assert np.mean(near) > 0.8 and np.mean(far) > 0.5
    np.testing.assert_allclose(np.std(with_flow, 0) / SCALES, 1, atol=0.2)
    assert np.std(without[:, 0]) < 0.1 * SCALES[0]


def test_blackjax_runs_in_the_source_of_a_flow():
    """Its HMC of one point, vmapped: the mean and the spread of the banana's bend within
    4.5 standard errors of 500 independent chains."""
    blackjax = pytest.importorskip("blackjax")
    pulled = energy.pull_back(BANANA, FLOW, WIDE)
    engine = blackjax.hmc(
        lambda z: pulled.log_density(z[None])[0], 0.2, jnp.ones(2), num_integration_steps=5
    )

    @jax.jit
    def run(key):
        key_start, key_run = jax.random.split(key)
        states = jax.vmap(engine.init)(pulled.sample(key_start, 500))

        def step(states, key):
            return jax.vmap(engine.step)(jax.random.split(key, 500), states)[0], None

        states, _ = jax.lax.scan(step, states, jax.random.split(key_run, 20))
        return FLOW.forward(WIDE, states.position)[0]

    second = jax.device_get(run(KEY))[:, 1]
    assert abs(np.mean(second)) < 4.5 * 1.5 / np.sqrt(500)
    assert abs(np.mean(second**2) - 2.25) < 4.5 * np.std(second**2) / np.sqrt(500)


def test_a_start_or_a_proposal_without_density():
    """A chain leaves a place without density at once, and never enters one, NaN or not."""
    base, params = distributions.normal((1,)), {}
    for outside in (-jnp.inf, jnp.nan):
        density = lambda x, bad=outside: jnp.where(x[:, 0] > 0, 0.0, bad)  # noqa: E731
        kernel = energy.independence_kernel(base, params)
        x, _ = kernel(KEY, density, jnp.ones((64, 1)), 1)
        assert np.all(x > 0)
    density = lambda x: jnp.where(x[:, 0] > 0, 0.0, -jnp.inf)  # noqa: E731
    states, _ = energy.run_chains(
        energy.independence_kernel(base, params),
        energy.Target(density, (1,)),
        -jnp.ones((64, 1)),
        KEY,
        20,
    )
    assert np.all(states[-1] > 0)


def test_bad_input_is_an_error():
    with pytest.raises(TypeError, match="independence_kernel: expected a Flow or a Distribution"):
        energy.independence_kernel(BANANA, {})
    with pytest.raises(ValueError, match="expected at least one kernel"):
        energy.successive_kernels()
    with pytest.raises(TypeError, match="pull_back: expected a Target"):
        energy.pull_back(lambda x: x, FLOW, WIDE)
    with pytest.raises(ValueError, match="thin to be a whole number of at least 1, got 0"):
        energy.run_chains(energy.metropolis_kernel(), BANANA, jnp.zeros((1, 2)), KEY, 1, thin=0)
    with pytest.raises(TypeError, match="run_chains: expected a Target"):
        energy.run_chains(energy.metropolis_kernel(), FLOW, jnp.zeros((1, 2)), KEY, 1)
