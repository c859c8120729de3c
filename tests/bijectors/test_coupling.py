"""What is special to coupling layers: what passes, how often the network runs, masks, precision,
errors."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import nets

AFFINE = bj.univariate.affine()
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def with_noise(bijector, x, cond=None, scale=0.5):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(bijector.init, jax.random.key(0), x, cond)
    return jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(p.dtype), shapes)


def both(bijector, params, x):
    """forward and inverse, each (y, log_det), in one compilation."""
    return jax.jit(lambda p, x: (bijector.forward(p, x), bijector.inverse(p, x)))(params, x)


class OneLayer(nn.Module):
    @nn.compact
    def __call__(self, x, cond=None):
        return nn.tanh(nn.Dense(6, name="hidden")(x))


def test_an_affine_coupling_is_nflows(x64):
    """tests/peers/make_fixtures.py: nflows' coupling with this library's scale."""
    with np.load(Path(__file__).parents[1] / "peers" / "coupling.npz") as arrays:
        peer = dict(arrays)
    bijector = bj.coupling(AFFINE, OneLayer(), split=2)
    params = {
        "net": {"hidden": {"kernel": peer["hidden_kernel"], "bias": peer["hidden_bias"]}},
        "head": {"kernel": peer["head_kernel"], "bias": peer["head_bias"]},
    }
    expected = jax.eval_shape(bijector.init, jax.random.key(0), peer["x"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    for got, keys in zip(
        both(bijector, params, peer["x"]), (("y", "log_det"), ("back", "back_log_det")), strict=True
    ):
        for value, key in zip(got, keys, strict=True):
            np.testing.assert_allclose(value, peer[key], atol=1e-12)


@pytest.mark.parametrize(
    "transformer", [AFFINE, bj.univariate.rational_quadratic(4), bj.univariate.shift()]
)
def test_starts_at_the_identity(transformer):
    bijector = bj.coupling(transformer, nets.MLP((8,)), split=2)
    params = jax.jit(bijector.init)(jax.random.key(0), X)
    for x, log_det in both(bijector, params, X):
        np.testing.assert_allclose(x, X, atol=1e-6)
        np.testing.assert_allclose(log_det, 0, atol=1e-5)


def test_the_first_part_passes_untouched_and_the_rest_depends_on_it():
    bijector = bj.coupling(AFFINE, nets.MLP((8,), nn.tanh), split=1)
    params = with_noise(bijector, X)
    np.testing.assert_array_equal(both(bijector, params, X)[0][0][:, 0], X[:, 0])
    jacobian = np.asarray(
        jax.jit(jax.jacfwd(lambda x: bijector.forward(params, x[None])[0][0]))(X[0])
    )
    free = np.tri(4, 1).astype(bool)  # the column of what passes, and the diagonal
    np.testing.assert_array_equal(
        jacobian != 0, np.hstack([free, np.zeros((4, 3), bool)]) | np.eye(4, dtype=bool)
    )


def test_the_network_runs_once_for_value_and_log_det():
    bijector = bj.coupling(AFFINE, nets.MLP((8, 8)), split=2)
    params = with_noise(bijector, X)
    for apply in (bijector.forward, bijector.inverse):
        program = str(jax.make_jaxpr(apply)(params, X))
        assert program.count("dot_general") == 3  # two hidden layers and the head


def test_a_mask_of_the_first_entries_is_a_split():
    """The masked net sees zeros in place of the rest, so with the kernel's other rows the two
    couplings are one."""
    split = bj.coupling(AFFINE, OneLayer(), split=2)
    masked = bj.masked_coupling(AFFINE, OneLayer(), np.array([True, True, False, False]))
    p = with_noise(split, X)
    kernel, head = p["net"]["hidden"]["kernel"], p["head"]
    q = {
        "net": {
            "hidden": {
                "kernel": np.concatenate([kernel, 7 * kernel]),
                "bias": p["net"]["hidden"]["bias"],
            }
        },
        "head": {
            "kernel": np.concatenate([3 + head["kernel"], head["kernel"]], axis=1),
            "bias": np.concatenate([head["bias"], head["bias"]]),
        },
    }
    for a, b in zip(both(split, p, X), both(masked, q, X), strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=1e-5)
        np.testing.assert_allclose(a[1], b[1], atol=1e-5)


def test_a_net_in_bfloat16_leaves_the_flow_in_float32():
    """The round trip does not see the network's precision: both directions read the same numbers
    from it."""
    layer = bj.coupling(AFFINE, nets.MLP((16,), nn.tanh, dtype=jnp.bfloat16), split=2)
    bijector = bj.chain(*[bj.permute([2, 3, 0, 1]), layer] * 8)
    params = with_noise(bijector, X, scale=0.2)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))

    @jax.jit
    def run(z):
        x, log_det = bijector.forward(params, z)
        return x, log_det, bijector.inverse(params, x)

    x, log_det, (z, back) = run(X)
    assert x.dtype == log_det.dtype == jnp.float32 and np.max(np.abs(x - X)) > 0.1
    np.testing.assert_allclose(z, X, atol=1e-4)
    np.testing.assert_allclose(back, -log_det, atol=1e-4)


def test_log_det_can_reach_what_narrow_data_need():
    """Two default layers take a unit normal below deviation 0.05 in every dimension, and above
    20."""
    for raw in (-40.0, 40.0):
        y, log_slope = AFFINE.forward(jnp.ones(1), jnp.array([[raw, 0.0]]))
        assert abs(float(log_slope[0])) > np.log(20) - 1e-3
        np.testing.assert_allclose(y, np.exp(log_slope), rtol=1e-6)


def test_errors_say_what_was_expected():
    def init(bijector, x=X, cond=None):
        return bijector.init(jax.random.key(0), x, cond)

    net = nets.MLP((4,))
    image = jnp.ones((2, 4, 4, 2))
    for call, message in [
        (lambda: bj.coupling(AFFINE, net, split=-1), "split >= 0, got -1"),
        (
            lambda: init(bj.coupling(AFFINE, net, split=4)),
            r"longer than split=4, got x of shape \[5, 4\]",
        ),
        (
            lambda: init(bj.coupling(AFFINE, net, split=1, axis=0)),
            "axis 0 of x to be an event axis",
        ),
        (
            lambda: init(bj.coupling(AFFINE, net, split=1, axis=-2)),
            "axis -2 of x to be an event axis",
        ),
        (
            lambda: init(bj.coupling(AFFINE, net, split=1, axis=2)),
            "axis 2 of x to be an event axis",
        ),
        (
            lambda: init(bj.coupling(AFFINE, net, split=2), cond=jnp.ones((4, 1))),
            "cond to lead with 5 rows",
        ),
        (
            lambda: init(bj.masked_coupling(AFFINE, net, np.ones(3, bool))),
            r"mask of shape \[3\] does not broadcast",
        ),
        (
            lambda: init(bj.masked_coupling(AFFINE, net, np.ones(4, bool)), X[0]),
            r"those of x of shape \[4\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="boolean mask, got int64"):
        bj.masked_coupling(AFFINE, net, np.array([0, 1, 1]))
    rows = bj.coupling(
        AFFINE, net, split=1, axis=1
    )  # of 4 rows of pixels: 1 steers 3, but the net answers for 1
    with pytest.raises(ValueError, match=r"features of shape \[2, 3, 4, 'F'\], got \[2, 1, 4, 4\]"):
        rows.forward(init(rows, image), image)
