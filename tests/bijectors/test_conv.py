"""What is special to masked convolutions: what a pixel sees, how they combine, and flows of
them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import flows


def drawn(init, x, scale=0.3):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0), x)
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), shapes)


def images(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_pixel_sees_its_corner_of_the_window_and_of_itself_the_channels_before(corner):
    bijector, z = bj.masked_conv(2, 2, corner=corner), images(1, 5, 5, 2)
    params = drawn(bijector.init, z)
    seen = jax.jit(jax.jacrev(lambda z: bijector.forward(params, z)[0][0, 2, 2]))(z)[
        :, 0
    ]  # [channel, 5, 5, channel]
    rows, columns = ([1, 2] if side == 0 else [2, 3] for side in corner)
    want = np.zeros((2, 5, 5, 2), bool)
    want[:, rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = True
    want[0, 2, 2, 1] = False
    np.testing.assert_array_equal(seen != 0, want)


def test_starts_at_the_identity_and_counts_pixels():
    bijector, z = bj.masked_conv(2), images(3, 4, 5, 2)
    params = bijector.init(jax.random.key(0), z)
    np.testing.assert_array_equal(bijector.forward(params, z)[0], z)
    params["log_diagonal"] = jnp.array([0.5, -0.2])
    np.testing.assert_allclose(bijector.forward(params, z)[1], 20 * 0.3 * np.ones(3), rtol=1e-6)


def test_two_from_opposite_corners_see_all_around(x64):
    one, opposite = bj.masked_conv(2), bj.masked_conv(2, corner=(1, 1))
    bijector = bj.chain(one, bj.reverse(), opposite, bj.reverse())
    x = images(1, 3, 3, 2, dtype=np.float64)
    params = drawn(bijector.init, x)

    @jax.jit
    def run(x):
        z, log_det = bijector.inverse(params, x)
        jacobian = jax.jacrev(lambda x: bijector.inverse(params, x)[0])(x).reshape(18, 18)
        return log_det[0], jacobian, bijector.forward(params, z)[0]

    log_det, jacobian, again = run(x)
    assert np.all(jacobian != 0)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-10)
    np.testing.assert_allclose(again, x, atol=1e-12)


def test_inverse_flow_samples_by_convolutions_alone():
    """Loops of the density: over the diagonals, inside the scan over depth. Sampling has that scan
    only."""
    flow, x = flows.inverse_flow((4, 4, 1), scales=1, depth=2, hidden=4), images(2, 4, 4, 1)
    params = drawn(flow.init, x, 0.1)

    def loops(f):
        return str(jax.make_jaxpr(f)(params)).count("scan[")

    assert loops(lambda p: flow.sample(p, jax.random.key(0), 2)) == 1
    assert loops(lambda p: flow.inverse(p, x)[0]) > 1


def test_bad_input():
    for make, message in [
        (lambda: bj.masked_conv(0), "channels to be a whole number of at least 1, got 0"),
        (lambda: bj.masked_conv(2, 0), "size to be a whole number of at least 1, got 0"),
        (lambda: bj.masked_conv(2, corner=(0, 2)), r"\(1, 1\), got \(0, 2\)"),
        (
            lambda: bj.masked_conv(2).init(jax.random.key(0), jnp.ones((2, 4, 4))),
            r"\[b, H, W, 2\], got \[2, 4, 4\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
