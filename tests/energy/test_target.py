"""Targets: a posterior's two parts, what is refused, and what weights say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import distributions, energy

NORMAL = distributions.normal((2,))


def test_a_posterior_is_the_sum_of_its_parts():
    """A normal prior and a normal likelihood of y = 1: the evidence is N(y; 0, 2) twice."""
    target = energy.posterior(
        lambda x: NORMAL.log_prob({}, x),
        lambda x: NORMAL.log_prob({}, x - 1),
        (2,),
        sample=lambda key, n: NORMAL.sample({}, key, n),
    )
    x = target.prior.sample(jax.random.key(0), 20_000)
    assert target.prior.log_z == 0 and target.sample is None
    np.testing.assert_allclose(
        target.log_density(x), target.prior.log_density(x) + target.log_likelihood(x), rtol=1e-6
    )
    log_z, error = energy.estimate_log_z(target.log_likelihood(x))
    exact = -np.log(4 * np.pi) - 0.5
    assert abs(log_z - exact) < 4 * error < 0.03


def test_the_worth_of_weighted_draws():
    """Of two weights 1 and 3, (1 + 3)^2 / (1 + 9); a constant and weights of 0 change nothing. The
    error is the spread of the weights over their mean, over the root of their number."""
    weights = jnp.log(jnp.array([1.0, 3.0, 0.0])) + 200
    np.testing.assert_allclose(energy.effective_sample_size(weights), 1.6, rtol=1e-4)
    log_z, error = energy.estimate_log_z(weights)
    np.testing.assert_allclose(log_z, 200 + np.log(4 / 3), rtol=1e-6)
    np.testing.assert_allclose(
        error, np.std([1, 3, 0], ddof=1) / (4 / 3) / 3**0.5, rtol=1e-4
    )  # float32 logs of 200 keep 5 digits of a weight


def test_a_bad_target_names_the_first_bad_point():
    x = jnp.array([[1.0, 0.0], [-1.0, 2.0], [-3.0, 0.0]])

    def check(log_density, x=x):
        energy.check_target(energy.Target(log_density, (2,)), x)

    check(lambda x: jnp.log(jnp.maximum(x[:, 0], 0)))  # -inf at some
    with pytest.raises(ValueError, match=r"got nan at row 1, x = \[-1.,  2.\]"):
        check(lambda x: jnp.log(x[:, 0]))
    with pytest.raises(ValueError, match="got inf at row 0"):
        check(lambda x: jnp.full(3, jnp.inf))
    with pytest.raises(ValueError, match="-inf at all of the 3 points"):
        check(lambda x: jnp.full(3, -jnp.inf))
    with pytest.raises(ValueError, match=r"log_density of shape \[3\], got \[3, 2\]"):
        check(lambda x: x)
    with pytest.raises(ValueError, match=r"expected .*\[b, 2\], got \[3\]"):
        check(lambda x: x, x[:, 0])
    with pytest.raises(TypeError, match="expected a Target"):
        energy.check_target(lambda x: x, x)
