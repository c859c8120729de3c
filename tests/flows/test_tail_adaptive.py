"""A flow of light and heavy columns: no heavy number reaches a light column, and the tails of the
base are those of the samples."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from jflow import flows, metrics

INDEX = np.array([np.inf, 2.0, np.inf, 2.0, 2.0, np.inf])
HEAVY, N = np.isfinite(INDEX), 4000


def test_light_columns_are_functions_of_light_numbers_and_tails_those_of_the_base():
    """At random params: the Jacobian's block of light columns by heavy numbers is 0, the other is
    not; far out the heavy numbers are mapped with a constant slope; and of the samples the light
    columns are called light, the heavy ones heavy with the base's index 2 to 30%."""
    flow = flows.tail_adaptive((6,), INDEX, depth=2, hidden=(4,), bins=3, activation=nn.tanh)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 6)).astype(np.float32)
    params = flow.init(jax.random.key(0), x)
    params["bijector"] = jax.tree.map(
        lambda p: (0.4 * rng.normal(size=p.shape)).astype(np.float32), params["bijector"]
    )

    @jax.jit
    def run(params, far):
        one = lambda z: flow.forward(params, z[None])[0][0]  # noqa: E731
        jacobian = jax.jacrev(one)(x[0])
        return jacobian, jax.vmap(one)(far), flow.sample(params, jax.random.key(1), N)

    base = np.sort(HEAVY)  # whose light numbers come first
    far = np.where(base, np.array([[1e5], [2e5], [3e5]]), x[1]).astype(np.float32)
    jacobian, ends, samples = jax.device_get(run(params, far))
    assert not np.any(jacobian[np.ix_(~HEAVY, base)])
    assert np.all(jacobian[np.ix_(HEAVY, ~base)])
    steps = np.diff(ends, axis=0)
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-3, atol=1e-3)
    assert not np.any(steps[:, ~HEAVY]) and np.all(np.abs(steps[:, HEAVY]) > 1e3)
    found = metrics.tail_index(samples)
    np.testing.assert_array_equal(np.isfinite(found), HEAVY)
    np.testing.assert_allclose(found[HEAVY], 2, rtol=0.3)


def test_the_index_has_to_be_of_the_columns_and_positive():
    for event_shape, index in (((2,), [1.0]), ((2,), [1.0, 0.0]), ((1, 2), [[1.0, 2.0]])):
        with pytest.raises(ValueError, match="tail_adaptive: expected an event_shape"):
            flows.tail_adaptive(event_shape, index)
    for index in ([np.inf] * 2, [2.0] * 2):  # one group alone
        flow = flows.tail_adaptive((2,), index, depth=1, hidden=(2,), bins=2)
        shapes = jax.eval_shape(flow.init, jax.random.key(0), np.ones((3, 2), np.float32))
        assert set(shapes["base"]) == (set() if np.isinf(index[0]) else {"log_df"})
