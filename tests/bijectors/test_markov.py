"""Layers of Markov chains: the weights of their paths, their kernels, and how they are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate

from jflow import bijectors as bj
from jflow import distributions, flows, losses

BASE = distributions.normal((2,))
LOG_Z = np.log(
    scipy.integrate.quad(lambda d: np.exp(0.5 * d + 6 * d**2 - d**4), -4, 4)[0]
) + 0.5 * np.log(2 * np.pi)


def double_well(x):
    d = x[:, 0]
    return 0.5 * d + 6 * d**2 - d**4 - 0.5 * x[:, 1] ** 2


def between(power):
    """The mixture in the exponent of a wide normal and the double well."""
    return lambda x: power * double_well(x) - (1 - power) * 0.5 * jnp.sum(x**2, axis=-1) / 4


def test_the_reference():
    """The published constant of this double well, to its last digit."""
    np.testing.assert_allclose(LOG_Z, 10.29348, atol=5e-6)


def chain(*layers):
    """Layers of chains between affine maps."""
    affine = [bj.affine((2,)) for _ in range(len(layers) + 1)]
    return bj.chain(affine[0], *(m for pair in zip(layers, affine[1:], strict=True) for m in pair))


LAYERS = chain(
    bj.metropolis(between(0.2), 0.3, repeats=3),
    bj.langevin(between(0.5), 0.01, repeats=2),
    bj.hamiltonian(double_well, 0.1, num_steps=2),
    bj.metropolis(double_well, 0.3, repeats=2),
)


def random_params(seed):
    """Of spread 0.1 about the identity, but for a first map that covers the wells."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: LAYERS.init(jax.random.key(0), jnp.zeros((1, 2))))
    params = jax.tree.map(lambda s: 0.1 * rng.normal(size=s.shape), shapes)
    for i, log_step in {"1": -1.0, "3": -4.5, "5": -2.5, "7": -1.0}.items():
        params[i] = {"log_step": params[i]["log_step"] + log_step}
    params["0"]["log_scale"] = params["0"]["log_scale"] + 0.6
    return {"bijector": params, "base": {}}


def test_the_mean_weight_is_the_constant_at_random_parameters(x64):
    """E[w] = Z whatever the layers do: 5 draws of params, each within 4 of its standard errors, of
    which none is so large that it would hide a wrong contribution: a factor sign or a missing term
    moves the mean by more than 0.5."""
    sample = jax.jit(flows.path_sampler(LAYERS, BASE), static_argnums=2)
    deviations = []
    for seed in range(5):
        x, log_q = sample(random_params(seed), jax.random.key(seed), 200_000)
        w = np.exp(np.asarray(double_well(x) - log_q) - LOG_Z)
        error = np.std(w) / np.sqrt(len(w))
        assert error < 0.1
        deviations.append((np.mean(w) - 1) / error)
    assert np.max(np.abs(deviations)) < 4, deviations
    assert abs(np.mean(deviations)) < 4 / np.sqrt(5)


def test_backwards_the_likelihood_is_unbiased_too(x64):
    """E[p0(z) exp(contribution of inverse)] integrates to one over x: at a point, against the
    mixture that one Langevin step of a normal makes, N(0, (1 - h)^2 + 2 h) by hand."""
    h = 0.3
    layer = bj.langevin(lambda x: -0.5 * jnp.sum(x**2, axis=-1), h)
    x = jnp.array([[0.7]])
    base = distributions.normal((1,))
    model = flows.elbo_flow(layer, base)
    params = model.init(jax.random.key(0), x)
    elbo = model.elbo(params, jnp.repeat(x, 100_000, axis=0), key=jax.random.key(1))
    ratios = np.exp(np.asarray(elbo))
    variance = (1 - h) ** 2 + 2 * h
    expected = np.exp(-0.5 * 0.7**2 / variance) / np.sqrt(2 * np.pi * variance)
    assert abs(np.mean(ratios) - expected) < 4 * np.std(ratios) / np.sqrt(len(ratios))
    assert np.std(ratios) > 0.01 * expected  # there is something to average


def test_detailed_balance_gives_the_change_of_energy(x64):
    layer = bj.metropolis(double_well, 0.5)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)))
    x, contribution = layer.forward(layer.init(jax.random.key(1), z), z, key=jax.random.key(0))
    np.testing.assert_allclose(contribution, double_well(z) - double_well(x), atol=1e-12)
    moved = np.any(np.asarray(x != z), axis=1)
    assert 0 < np.sum(moved) < 64


def test_a_step_evaluates_the_density_where_it_arrives_and_no_more():
    """R + 1 evaluations in R steps: what is known at a state goes on to the next step. Each of the
    Hamiltonian trajectories, of L = 5 leapfrog steps, has L + 1."""
    seen = []

    def counted(x):
        jax.debug.callback(lambda: seen.append(1))
        return double_well(x)

    layers = (bj.metropolis, 5), (bj.langevin, 5), (bj.hamiltonian, 4 * 6)
    for make, expected in layers:
        layer = make(counted, repeats=4)
        z = jnp.zeros((3, 2))
        params = layer.init(jax.random.key(1), z)
        jax.block_until_ready(layer.forward(params, z, key=jax.random.key(0)))
        jax.effects_barrier()
        assert len(seen) == expected, (make, len(seen))
        seen.clear()


def test_a_start_outside_the_support_weighs_nothing_once_it_is_inside():
    """Minus infinity becomes a weight of 0, and never NaN."""
    inside = lambda x: jnp.where(x[:, 0] > 0, -x[:, 0], -jnp.inf)  # noqa: E731
    layer = bj.metropolis(inside, 1.0, repeats=20)
    z = jnp.full((64, 1), -0.5)
    x, contribution = jax.device_get(
        layer.forward(layer.init(jax.random.key(1), z), z, key=jax.random.key(0))
    )
    entered = x[:, 0] > 0
    assert np.all(entered == np.isneginf(contribution)) and np.sum(entered) > 32
    assert np.all(contribution[~entered] == 0)


def test_trained_end_to_end_the_constant_and_the_wells_are_found():
    """300 steps of Adam on the divergence of paths through Hamiltonian layers, whose gradient is
    exact; then 50000 draws: the mean weight within 4 standard errors, which are below 0.01, and
    the lower well's mass, 0.155693 by quadrature, within 0.02 (a weighted share has a standard
    error below 0.005). The bound gains more than a nat, and the error halves."""
    layers = bj.chain(
        bj.affine((2,)),
        bj.scan(
            lambda power: bj.hamiltonian(between(power), num_steps=3),
            10,
            xs=jnp.linspace(0.05, 1, 10),
        ),
    )
    sample = flows.path_sampler(layers, BASE)
    loss = losses.reverse_kl(sample, double_well, draws=256)
    optimizer = optax.adam(0.01)

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            grads, _ = jax.grad(loss, has_aux=True)(params, key, {})
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        start, keys = (params, optimizer.init(params)), jax.random.split(jax.random.key(2))
        (params, _), _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(1), 300))
        drawn = [sample(p, key, 50_000) for p, key in zip((start[0], params), keys, strict=True)]
        return [(x, double_well(x) - log_q) for x, log_q in drawn]

    params = flows.elbo_flow(layers, BASE).init(jax.random.key(0), jnp.zeros((1, 2)))
    (_, before), (x, after) = jax.device_get(run(params))
    w, w_before = np.exp(after - LOG_Z), np.exp(before - LOG_Z)
    error = np.std(w) / np.sqrt(len(w))
    assert error < 0.01 and abs(np.mean(w) - 1) < 4 * error
    assert abs(np.sum(w * (x[:, 0] < 0)) / np.sum(w) - 0.155693) < 0.02
    assert np.mean(after) > np.mean(before) + 1 and np.std(w) < 0.6 * np.std(w_before)


def test_bad_input_is_an_error():
    for make in (bj.metropolis, bj.langevin, bj.hamiltonian):
        with pytest.raises(ValueError, match="expected step > 0, got -1"):
            make(double_well, -1)
        with pytest.raises(ValueError, match="repeats to be a whole number of at least 1, got 0"):
            make(double_well, repeats=0)
        layer = make(lambda x: jnp.sum(double_well(x)))
        z = jnp.zeros((3, 2))
        params = layer.init(jax.random.key(1), z)
        with pytest.raises(ValueError, match="needs a key"):
            layer.forward(params, z)
        with pytest.raises(ValueError, match=r"log_density of shape \[3\], got \[\]"):
            layer.forward(params, z, key=jax.random.key(0))
    with pytest.raises(ValueError, match="num_steps to be a whole number"):
        bj.hamiltonian(double_well, num_steps=0)
    with pytest.raises(TypeError, match="path_sampler: expected a Transport or a Bijector"):
        flows.path_sampler(BASE, BASE)
    with pytest.raises(TypeError, match="reverse_kl: expected a Flow"):
        losses.reverse_kl(flows.elbo_flow(LAYERS, BASE), double_well)
