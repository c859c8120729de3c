import jax
import jax.numpy as jnp
import numpy as np

from jflow import couplings


def test_independent_keeps_rows():
    x = jnp.zeros((5, 2))
    i, j = couplings.independent()(jax.random.key(0), x, x, jnp.arange(5))
    np.testing.assert_array_equal(i, np.arange(5))
    np.testing.assert_array_equal(j, np.arange(5))
    assert isinstance(i, np.ndarray)  # known while tracing: no rows move
