"""Kernel features: with a ridge on the head they are kernel ridge regression."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

from jflow import bijectors, distributions, flows, losses, nets

N, RIDGE = 12, 0.3
M_PERTURB = -6  # of mallopt(3): freed and new memory is filled with this byte


def test_a_shift_by_kernels_at_all_rows_is_kernel_ridge_regression(x64):
    """A coupling that shifts x_2 by a kernel machine of x_1 with its points at the rows: the
    likelihood with ridge a^T K a / 2 has its optimum at scikit-learn's dual coefficients, where the
    gradient by the head is 0 to rounding, and the shift is scikit-learn's prediction."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 3))
    layer = bijectors.coupling(bijectors.univariate.shift(), nets.KernelFeatures(N), split=2)
    flow = flows.flow(bijectors.invert(layer), distributions.normal((3,)))
    params = flow.init(jax.random.key(0), x)
    points = params["bijector"]["net"]
    at_rows = points["points"]
    assert {tuple(row) for row in np.asarray(at_rows)} == {tuple(row[:2]) for row in x}
    length = float(np.exp(points["log_length"]))
    between = np.linalg.norm(x[:, None, :2] - x[None, :, :2], axis=-1)
    np.testing.assert_allclose(length, np.median(between[np.triu_indices(N, 1)]), rtol=1e-12)

    ridge = KernelRidge(alpha=RIDGE, kernel="rbf", gamma=0.5 / length**2)
    ridge.fit(at_rows, -x[_rows_of(at_rows, x), 2])  # towards the normal
    head = {"kernel": ridge.dual_coef_[:, None], "bias": np.zeros(1)}

    @jax.jit
    def run(head):
        at = {"bijector": {**params["bijector"], "head": head}, "base": {}}

        def objective(kernel):
            moved = {"bijector": {**at["bijector"], "head": {**head, "kernel": kernel}}, "base": {}}
            r2 = jnp.sum((at_rows[:, None] - at_rows[None]) ** 2, -1) / length**2
            norm = kernel[:, 0] @ jnp.exp(-r2 / 2) @ kernel[:, 0]
            return N * losses.nll(flow)(moved, None, {"x": x})[0] + RIDGE * norm / 2

        return jax.grad(objective)(head["kernel"]), flow.inverse(at, x)[0] - x

    slope, shift = jax.device_get(run(head))
    assert np.abs(slope).max() < 1e-10
    np.testing.assert_allclose(shift[:, 2], ridge.predict(x[:, :2]), atol=1e-12)
    assert np.abs(shift[:, 2]).max() > 0.1 and not np.any(shift[:, :2])


def _rows_of(points, x):
    return np.argmin(np.linalg.norm(points[:, None] - x[None, :, :2], axis=-1), axis=1)


def test_cond_and_other_axes_stand_beside_and_too_few_rows_are_refused():
    net, rng = nets.KernelFeatures(2, kernel=lambda r: 1 / (1 + r)), np.random.default_rng(0)
    x, cond = rng.normal(size=(2, 3, 1)), rng.normal(size=(2, 4))
    features, variables = net.init_with_output(jax.random.key(0), x, cond)
    points = np.asarray(variables["params"]["points"])
    length = np.exp(variables["params"]["log_length"])
    whole = np.concatenate([x, np.repeat(cond[:, None], 3, 1)], axis=-1)
    r = np.sum((whole[:, :, None] - points) ** 2, axis=-1) / length**2
    np.testing.assert_allclose(features, 1 / (1 + r), rtol=1e-5)
    np.testing.assert_array_equal(net.apply(variables, x[:1, :1], cond[:1]), features[:1, :1])
    with pytest.raises(ValueError, match="at least points=32 rows at init, got 5"):
        nets.KernelFeatures().init(jax.random.key(0), x[0, :1].repeat(5, 0))
    with pytest.raises(ValueError, match="points"):
        nets.KernelFeatures(0)


def test_all_layers_of_a_compiled_start_see_the_data():
    """Two fits at once: with a zero head each layer passes its rows on, so that the points of later
    layers are numbers of the data, bit by bit. XLA's product of a sum with constant zeros reads
    memory that nobody wrote; filled memory makes that show each time, where the C library can."""
    flow = flows.kernelized((13,), depth=3, linear=False, standardize=False)
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(jax.random.key(0), (2, 80, 13))
    fill = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    fill(M_PERTURB, 0xA5)
    try:
        params = jax.device_get(jax.jit(jax.vmap(flow.init))(keys, x))
    finally:
        fill(M_PERTURB, 0)
    points = jax.tree.leaves(params["bijector"])
    points = [leaf for leaf in points if leaf.shape[-1] == 6]
    assert len(points) == 1 and points[0].shape == (2, 3, 32, 6)
    assert np.isin(points[0], np.asarray(x)).all()
