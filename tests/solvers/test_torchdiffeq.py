"""Samples, log-densities and their gradients are those of torchdiffeq, kept in
tests/peers/ode.npz."""

from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import distributions, solvers
from jflow.types import Velocity

PEER = np.load(Path(__file__).parents[1] / "peers" / "ode.npz")
BASE = distributions.normal((3,))
NAMES = ("w0", "b0", "w1", "b1")


def apply(p, x, t, cond=None, *, key=None):
    h = jnp.concatenate([x, t[:, None]], axis=1)
    return jnp.tanh(h @ p["w0"] + p["b0"][None]) @ p["w1"] + p["b1"][None]


VELOCITY = Velocity(lambda key, x, t, cond=None: {}, apply)


@pytest.fixture
def net(x64):
    return {name: jnp.asarray(PEER[name]) for name in NAMES}, jnp.asarray(PEER["x"])


@pytest.mark.parametrize(
    ("name", "options", "atol"),
    [
        ("dopri5", {"method": solvers.adaptive(diffrax.Dopri5(), rtol=1e-10, atol=1e-10)}, 1e-9),
        ("euler", {"method": solvers.fixed(8, diffrax.Euler())}, 1e-12),
        ("midpoint", {"method": solvers.fixed(8, diffrax.Midpoint())}, 1e-12),
    ],
)
def test_samples(net, name, options, atol):
    params, x = net
    y, info = jax.jit(lambda params, x: solvers.sample(VELOCITY, params, x, **options))(params, x)
    np.testing.assert_allclose(y, PEER[name], atol=atol)
    np.testing.assert_array_equal(info.status, solvers.Status.OK)


@pytest.mark.parametrize(
    "adjoint",
    [diffrax.RecursiveCheckpointAdjoint(), diffrax.DirectAdjoint(), diffrax.BacksolveAdjoint()],
    ids=["checkpoint", "direct", "backsolve"],
)
def test_log_densities_and_their_gradients(net, adjoint):
    params, x = net

    def nll(params):
        log_prob, _ = solvers.log_prob(
            VELOCITY,
            params,
            x,
            lambda z: BASE.log_prob({}, z),
            method=solvers.fixed(16, diffrax.Dopri8(), adjoint=adjoint),
        )
        return -jnp.mean(log_prob), log_prob

    (_, log_prob), gradient = jax.jit(jax.value_and_grad(nll, has_aux=True))(params)
    np.testing.assert_allclose(log_prob, PEER["log_prob"], atol=1e-9)
    for name in NAMES:
        np.testing.assert_allclose(gradient[name], PEER[f"gradient_{name}"], atol=1e-8)
