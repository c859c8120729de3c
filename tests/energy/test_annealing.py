"""Annealing: kernels that leave a density as it is, and weights whose mean is Z."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from jflow import distributions, energy

KEY = jax.random.key(0)
START = energy.as_target(distributions.normal((2,)), {}, (2,))
KERNELS = {
    "metropolis": energy.metropolis_kernel(0.7),
    "hamiltonian": energy.hamiltonian_kernel(lambda level: 0.25 + 0.1 * level, 3),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_leaves_its_density_as_it_is(name):
    """20,000 exact draws of the double well after 5 transitions: mean and spread of x1, x2 and x1^2
    are as before, within 4 standard errors of the difference of two independent sets, and half of
    the proposals or fewer are refused. Without the refusals they are not."""
    target = energy.double_well()
    kernel = KERNELS[name]

    @jax.jit
    def run(key):
        key_draw, key_fresh, *keys = jax.random.split(key, 7)
        x = target.sample(key_draw, 20_000)
        accepted = []
        for k in keys:
            x, taken = kernel(k, target.log_density, x, jnp.ones(()))
            accepted.append(jnp.mean(taken))
        return x, target.sample(key_fresh, 20_000), jnp.stack(accepted)

    moved, fresh, accepted = jax.device_get(run(KEY))
    assert np.all((accepted > 0.3) & (accepted < 0.98))
    for of in (lambda x: x, np.square, lambda x: np.abs(x[:, :1]) ** 3):
        a, b = of(moved), of(fresh)
        error = np.sqrt((a.var(0) + b.var(0)) / 20_000)
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4 * error), (a.mean(0), b.mean(0), error)


@pytest.fixture(scope="module")
def two_sites():
    """A field on two sites, with log Z and the mean of x1^2 by quadrature."""

    def integral(of):
        def weighted(b, a):
            return of(a) * math.exp(-2 * (a - b) ** 2 + a**2 + b**2 - 0.5 * (a**4 + b**4))

        return scipy.integrate.dblquad(weighted, -5, 5, -5, 5, epsabs=1e-8)[0]

    z = integral(lambda a: 1.0)
    target = energy.phi4((2,), mass_squared=-1.0, coupling=0.5)
    return target._replace(log_z=math.log(z)), integral(lambda a: a * a) / z


@pytest.mark.parametrize("name", KERNELS)
def test_the_mean_weight_is_z_for_any_number_of_levels(two_sites, name):
    """The mean of 20,000 weights and the weighted mean of x1^2, within 4 of their standard errors
    (x1^4 has the mean 1 or less); more levels make the draws worth more. A start that is not
    normalized counts."""
    target, mean_square = two_sites
    start = START._replace(log_density=lambda x: START.log_density(x) + 3.0, log_z=3.0)
    choices = (1, [0.2, 1.0], 16)

    @jax.jit
    def run(key):
        found = [
            energy.annealed_importance_sampling(
                k, target, start, KERNELS[name], draws=20_000, levels=levels
            )
            for k, levels in zip(jax.random.split(key, 3), choices, strict=True)
        ]
        squares = [
            jnp.sum(jax.nn.softmax(one.log_weights) * jnp.square(one.x[:, 0])) for one in found
        ]
        log_weights = [one.log_weights for one in found]
        return (
            list(map(energy.estimate_log_z, log_weights)),
            list(map(energy.effective_sample_size, log_weights)),
            squares,
            [one.acceptance for one in found],
        )

    log_z, sizes, squares, acceptance = jax.device_get(run(KEY))
    for (value, error), size, square in zip(log_z, sizes, squares, strict=True):
        assert abs(value - target.log_z) < 4 * error < 0.1
        assert abs(square - mean_square) < 4 / size**0.5
    assert [len(shares) for shares in acceptance] == [1, 2, 16]
    assert sizes[2] > 1.3 * sizes[0]


def test_a_draw_outside_the_support_weighs_nothing():
    """A half-plane: half of the normal draws stay at weight 0, and nothing is NaN."""
    half = energy.Target(lambda x: jnp.where(x[:, 0] > 0, START.log_density(x), -jnp.inf), (2,))
    found = energy.annealed_importance_sampling(
        KEY, half, START, KERNELS["metropolis"], draws=2000, levels=[0.5, 1.0]
    )
    weights = np.exp(np.asarray(found.log_weights))
    assert np.all(np.isfinite(weights)) and 0.4 < np.mean(weights == 0) < 0.6
    np.testing.assert_allclose(weights.mean(), 0.5, atol=4 * 0.5 / 2000**0.5)


def test_bad_input_is_named():
    def run(**options):
        options = {"target": energy.banana(), "start": START, "draws": 2, **options}
        return energy.annealed_importance_sampling(KEY, kernel=KERNELS["metropolis"], **options)

    with pytest.raises(ValueError, match="expected a start with sample and log_z"):
        run(start=START._replace(log_z=None))
    with pytest.raises(ValueError, match="levels that rise from above 0 to 1"):
        run(levels=[0.5, 0.2, 1.0])
    with pytest.raises(ValueError, match="levels to be a whole number of at least 1"):
        run(levels=0)
    with pytest.raises(TypeError, match="expected a Target, got the function"):
        run(target=lambda x: x)
    with pytest.raises(ValueError, match=r"log_density of shape \[2\], got \[2, 2\]"):
        run(target=energy.Target(lambda x: x, (2,)))
    with pytest.raises(ValueError, match="metropolis_kernel: .*step > 0, got 0"):
        energy.metropolis_kernel(0)
    with pytest.raises(ValueError, match="num_steps to be a whole number"):
        energy.hamiltonian_kernel(0.1, 0)
