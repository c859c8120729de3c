"""Networks that compute in bfloat16, trained with float32 params, gradients and moments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jflow
from jflow import bijectors, distributions, flows, losses, nets, train

OPTIMIZER = optax.adam(3e-3)
X = (np.random.default_rng(0).normal(size=(64, 4)) * [1, 0.5, 0.2, 1] + 0.5).astype(np.float32)
IMAGES = X[:, :, None, None]


def coupling_flow(dtype):
    def layer(order):
        coupling = bijectors.coupling(
            bijectors.univariate.affine(), nets.MLP((32,), jnp.tanh, dtype=dtype), split=2
        )
        return bijectors.chain(bijectors.permute(order), coupling)

    orders = np.stack([np.roll(np.arange(4), 2)] * 4)
    return flows.flow(bijectors.scan(layer, 4, xs=orders), distributions.normal((4,)))


def nll(dtype):
    flow = coupling_flow(dtype)
    return losses.nll(flow), partial(flow.init, x=X)


def matching(dtype):
    velocity = jflow.velocity(
        nets.DiT(patch_size=1, width=16, num_layers=2, num_heads=2, dtype=dtype)
    )
    return losses.flow_matching(velocity), partial(
        velocity.init, x=IMAGES, t=jnp.zeros(len(IMAGES))
    )


# Bounds on |loss in bfloat16 - loss in float32| after training, both averaged over the last 20
# steps of 100. bfloat16 has
# 8 bits: the features of a layer are off by 0.4 % each, and the loss, whose noise is the same in
# both, by about that.
CASES = {"flow": (nll, X, 0.05), "dit": (matching, IMAGES, 0.05)}


@pytest.fixture(scope="module", params=CASES)
def trained(request):
    make, rows, bound = CASES[request.param]
    out = {}
    for dtype in (None, jnp.bfloat16):
        loss, init = make(dtype)
        state = train.init_state(init(jax.random.key(0)), OPTIMIZER, jax.random.key(1), ema=0.99)
        step = train.make_step(loss, OPTIMIZER, ema=0.99)
        run = jax.jit(
            lambda state, x, step=step: jax.lax.scan(
                lambda s, _: step(s, {"x": x}), state, length=100
            )
        )
        end, metrics = run(state, rows)
        grads = jax.eval_shape(
            jax.grad(lambda p, loss=loss: loss(p, jax.random.key(0), {"x": rows})[0]), end.params
        )
        out[dtype] = (state, end, metrics["loss"], grads, loss)
    return out, bound, rows


def test_params_gradients_and_moments_stay_float32(trained):
    out, _, rows = trained
    _, end, values, grads, loss = out[jnp.bfloat16]
    for tree in (end.params, end.ema, grads, end.opt_state[0].mu, end.opt_state[0].nu, values):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    program = str(jax.make_jaxpr(loss)(end.params, jax.random.key(0), {"x": rows}))
    assert "bf16" in program  # and yet it computes in bfloat16


def test_the_loss_is_that_of_float32(trained):
    out, bound, _ = trained
    (_, _, exact, _, _), (_, _, half, _, _) = out[None], out[jnp.bfloat16]
    exact, half = np.asarray(exact), np.asarray(half)
    assert exact[:5].mean() - exact[-20:].mean() > 4 * bound  # there was something to learn
    assert abs(half[-20:].mean() - exact[-20:].mean()) < bound
    assert not np.array_equal(half, exact)
