"""Hamiltonian MixFlows: the map is invertible and preserves a density, and the bound rises with the
length of the orbit, towards log Z."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import distributions, energy

LOG_Z = 1.5
# x_1 ~ N(0, 1) and x_2 | x_1 ~ N(x_1^2 / 2, 1): a banana, scaled by e^LOG_Z.
BANANA = energy.Target(
    lambda x: LOG_Z - 0.5 * (x[:, 0] ** 2 + (x[:, 1] - x[:, 0] ** 2 / 2) ** 2) - np.log(2 * np.pi),
    (2,),
    LOG_Z,
)
PARAMS = {"bijector": {}, "base": {"first": {}, "rest": {}}}


def test_the_map_is_invertible_and_preserves_the_density_up_to_leapfrogs_error(x64):
    """Round trip 1e-10 of order-one numbers; log_det against slogdet of the Jacobian; the change of
    log p(x) + log_det is 0 to rounding with a step of 1e-9, and seen with leapfrog steps of 0.1."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(6, 4)), rng.random((6, 1))], axis=1)
    _, joint = energy.hamiltonian_mix_flow(BANANA, distributions.normal((2,)), 1, step_size=0.1)

    @jax.jit
    def run(x):
        changes = []
        for size in (1e-9, 0.1):
            shift = energy.hamiltonian_shift(BANANA, step_size=size, steps=3)
            y, log_det = shift.forward({}, x)
            changes.append(joint.log_density(y) + log_det - joint.log_density(x))
        again, back = shift.inverse({}, y)
        jacobian = jax.vmap(jax.jacfwd(lambda row: shift.forward({}, row[None])[0][0]))(x)
        return y, again, log_det, back, jnp.linalg.slogdet(jacobian)[1], changes

    y, again, log_det, back, slogdet, (tiny, changes) = jax.device_get(run(x))
    np.testing.assert_allclose(again, x, atol=1e-10)
    np.testing.assert_allclose(log_det, slogdet, atol=1e-10)
    np.testing.assert_allclose(back, -log_det, atol=1e-10)
    assert np.abs(tiny).max() < 1e-6 and np.abs(changes).max() > 1e-4
    assert np.abs(y[:, 2:4] - x[:, 2:4]).min() > 1e-3 and np.all((y[:, 4] >= 0) & (y[:, 4] < 1))


def test_the_bound_rises_with_the_length_and_stays_below_log_z(x64):
    """Means of 200 draws over lengths 1, 10 and 100 from N(0, I): each above the one before by more
    than 0.05, with paired standard errors of about 0.02; the last within 0.15 nats of log Z and not
    above by 4 of its standard errors. The samples have the target's means, (0, 1/2), to 0.12, and
    deviations, 1 and sqrt(3/2), to 0.1: four standard errors of 2000 draws."""

    @jax.jit
    def run(key):
        bounds = []
        for length in (1, 10, 100):
            mixture, joint = energy.hamiltonian_mix_flow(
                BANANA, distributions.normal((2,)), length, step_size=0.02, steps=50
            )
            bounds.append(mixture.elbo(PARAMS, jax.random.clone(key), 200, joint.log_density))
        return jnp.stack(bounds), mixture.sample(PARAMS, jax.random.key(1), 2000)

    bounds, samples = jax.device_get(run(jax.random.key(0)))
    means, errors = bounds.mean(axis=1), bounds.std(axis=1) / np.sqrt(200)
    assert np.all(np.diff(means) > 0.05)
    assert LOG_Z - 0.15 < means[-1] < LOG_Z + 4 * errors[-1]
    np.testing.assert_allclose(samples[:, :2].mean(axis=0), [0, 0.5], atol=0.12)
    np.testing.assert_allclose(samples[:, :2].std(axis=0), [1, np.sqrt(1.5)], atol=0.1)


def test_options_are_checked():
    with pytest.raises(ValueError, match="expected step_size > 0, got 0"):
        energy.hamiltonian_shift(BANANA, step_size=0)
    with pytest.raises(ValueError, match=r"expected a target of vectors, got event_shape \(2, 1\)"):
        energy.hamiltonian_shift(BANANA._replace(event_shape=(2, 1)), step_size=0.1)
    with pytest.raises(TypeError, match="hamiltonian_shift: expected"):
        energy.hamiltonian_shift(lambda x: x, step_size=0.1)
    with pytest.raises(ValueError, match="hamiltonian_shift"):
        energy.hamiltonian_shift(BANANA, step_size=0.1).forward({}, jnp.ones((3, 4)))
