"""An event () is an event (1,) without its axis: the same numbers from the same params and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.random import clone

import jflow
from jflow import distributions, flows, losses, nets, solvers

B = 4
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (B,))
T = jnp.linspace(0.1, 0.8, B)
NET = nets.TimeMLP((4,), time_features=4)
VELOCITY, WIDE = jflow.velocity(NET), jflow.velocity(nets.TimeMLP((5,), time_features=4))
REFINER, ENCODER = solvers.refiner(WIDE), losses.noise_encoder(WIDE)
MIXTURE = jflow.field(nets.MixtureHead(NET, components=2, features=3))


def params_of(init, *args, scale=0.5):
    shapes, rng = jax.eval_shape(init, clone(KEY), *args), np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes)


def refiner(x):
    p, own = params_of(VELOCITY.init, x, T), params_of(REFINER.init, (x, x), T)
    x1, info = solvers.sample_refined(VELOCITY, p, REFINER, own, x, heun=1, pseudo=1, refine=1)
    loss = losses.velocity_refiner(REFINER, VELOCITY)
    return x1, info.status, loss(own, clone(KEY), {"x": x}, {"teacher": p})


def variational_noise(x):
    p = {"model": params_of(VELOCITY.init, x, T), "encoder": params_of(ENCODER.init, x, T)}
    loss = losses.variational_noise(losses.flow_matching(VELOCITY), ENCODER, kl=0.1)
    x1, info = solvers.sample_variational(VELOCITY, ENCODER, p, x, steps=2, key=clone(KEY))
    return x1, info.status, loss(p, clone(KEY), {"x": x})


def mixture_head(x):
    p = params_of(MIXTURE.init, x, T)
    found = MIXTURE.apply(p, x, T)
    assert found.means.shape == (B, 2, *x.shape[1:]) and found.log_std.shape == (B,)
    return losses.mixture_matching(MIXTURE, transition=0.5)(p, clone(KEY), {"x": x})


def continuous_flow(x):
    flow = flows.cnf(
        VELOCITY, distributions.normal(x.shape[1:]), method=1, divergence=solvers.hutchinson(1)
    )
    p = params_of(flow.init, x)
    walked, _ = solvers.sample_sde(
        solvers.ancestral(VELOCITY), p["velocity"], x, clone(KEY), np.linspace(0, 1, 3)
    )
    return (
        flow.log_prob(p, x, key=clone(KEY)),
        walked,
        losses.flow_matching(VELOCITY)(p["velocity"], clone(KEY), {"x": x}),
    )


def coupling_flow(x):
    flow = flows.real_nvp(x.shape[1:], depth=2, hidden=(3,))
    p = params_of(flow.init, x)
    drawn = flow.sample_and_log_prob(p, clone(KEY), B)
    return drawn, losses.nll(flow)(p, clone(KEY), {"x": x})


@pytest.mark.parametrize(
    "what", [refiner, variational_noise, mixture_head, continuous_flow, coupling_flow]
)
def test_a_scalar_is_a_vector_of_one_number(what):
    scalars, vectors = jax.jit(lambda x: (what(x), what(x[:, None])))(X)
    for one, other in zip(jax.tree.leaves(scalars), jax.tree.leaves(vectors), strict=True):
        assert one.shape in ((), (B,)) and np.all(np.isfinite(one))
        np.testing.assert_allclose(one, np.reshape(other, one.shape), rtol=2e-4, atol=1e-5)
