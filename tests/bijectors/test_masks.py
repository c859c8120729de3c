"""Masks are no part of a checkpoint: golden values keep old flows loading."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import nets
from jflow.bijectors import masks


def test_golden():
    np.testing.assert_array_equal(
        masks.checkerboard(3, 4)[..., 0], [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    )
    np.testing.assert_array_equal(masks.channels(5), [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(masks.random((8,), seed=0), [1, 0, 1, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(masks.random((2, 3), seed=4), [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(
        masks.alternating(masks.channels(3), 3), [[1, 0, 0], [0, 1, 1], [1, 0, 0]]
    )
    for mask in (masks.checkerboard(1, 1), masks.channels(2), masks.random((3, 3))):
        assert mask.dtype == bool


def test_random_masks_keep_half_and_differ_by_seed():
    drawn = np.stack([masks.random((7,), seed=i) for i in range(20)])
    assert np.all(drawn.sum(1) == 3) and len(np.unique(drawn, axis=0)) > 10


def test_alternating_masks_of_a_scan_transform_everything():
    mask = masks.checkerboard(2, 2)
    layer = lambda m: bj.masked_coupling(bj.univariate.affine(), nets.MLP((4,)), m)  # noqa: E731
    stack = bj.scan(layer, 2, xs=masks.alternating(mask, 2))
    x = jnp.ones((1, 2, 2, 3))
    params = jax.tree.map(lambda p: p + 0.1, stack.init(jax.random.key(0), x))
    assert np.all(stack.forward(params, x)[0] != x)
    params = jax.tree.map(lambda p: p[:1], params)
    one = bj.scan(layer, 1, xs=masks.alternating(mask, 1)).forward({"shared": {}, **params}, x)[0]
    np.testing.assert_array_equal((one == x)[0, ..., 0], mask[..., 0])


def test_bad_sizes_name_what_was_expected():
    for make, message in [
        (
            lambda: masks.checkerboard(0, 3),
            "expected height to be a whole number of at least 1, got 0",
        ),
        (lambda: masks.channels(0), "expected count to be a whole number of at least 1, got 0"),
        (
            lambda: masks.random((3, 0)),
            r"expected event_shape\[1\] to be a whole number of at least 1, got 0",
        ),
        (
            lambda: masks.alternating(masks.channels(2), 0),
            "expected depth to be a whole number of at least 1, got 0",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="expected a boolean mask, got int64"):
        masks.alternating(np.array([0, 1]), 2)
