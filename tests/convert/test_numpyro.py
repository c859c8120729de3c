"""A flow as a distribution of NumPyro: the same density and samples, and a chain over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import convert, distributions, flows

dist = pytest.importorskip("numpyro.distributions")
numpyro = pytest.importorskip("numpyro")

KEY = jax.random.key(0)


def test_shapes_and_densities_are_those_of_the_flow():
    flow = flows.real_nvp((2,), depth=2, hidden=(8,), standardize=False)
    params = flow.init(KEY, jnp.zeros((3, 2)), jnp.zeros((3, 1)))
    cond = jnp.ones((1, 1))
    of_numpyro = convert.to_numpyro(flow, params, cond)
    assert of_numpyro.event_shape == (2,) and of_numpyro.batch_shape == ()
    x = of_numpyro.sample(KEY, (4, 3))
    assert x.shape == (4, 3, 2) and of_numpyro.sample(KEY).shape == (2,)
    expected = flow.log_prob(params, x.reshape(12, 2), jnp.tile(cond, (12, 1)))
    np.testing.assert_allclose(of_numpyro.log_prob(x).ravel(), expected, rtol=1e-5)
    leaves = jax.tree.leaves(of_numpyro)  # through jit as a pytree
    assert len(leaves) == len(jax.tree.leaves(params)) + 1
    value = jax.jit(lambda d, x: d.log_prob(x))(of_numpyro, x[0, 0])
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)


def test_a_short_chain_stays_in_the_support():
    """NUTS over a uniform density on [2, 6] has mean 4; the standard error is about 0.06."""
    box = convert.to_numpyro(distributions.uniform((1,), 2.0, 6.0), {}, support=(2.0, 6.0))
    kernel = numpyro.infer.NUTS(lambda: numpyro.sample("theta", box))
    chain = numpyro.infer.MCMC(kernel, num_warmup=200, num_samples=800, progress_bar=False)
    chain.run(KEY)
    theta = chain.get_samples()["theta"]
    assert theta.shape == (800, 1) and (theta >= 2).all() and (theta <= 6).all()
    assert abs(float(theta.mean()) - 4) < 0.4


def test_what_is_no_flow_is_refused():
    with pytest.raises(TypeError, match="to_numpyro"):
        convert.to_numpyro(lambda x: x, {})
