import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import couplings, losses, nets, solvers, types

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (6, 8, 8, 2))


def test_inpainting_keeps_what_is_known_and_draws_the_rest():
    x0, cond = jax.jit(couplings.inpainting(couplings.tiles(2, 0.7)))(KEY, IMAGES, jnp.arange(6))
    mask = np.asarray(cond.aligned)
    assert mask.shape == IMAGES.shape and set(np.unique(mask)) == {0.0, 1.0}
    np.testing.assert_array_equal(mask[..., 0], mask[..., 1])
    tiles = mask[..., 0].reshape(6, 4, 2, 4, 2)
    assert (tiles == tiles[:, :, :1, :, :1]).all()
    np.testing.assert_allclose(
        tiles[:, :, 0, :, 0].mean(), 0.7, atol=4 * np.sqrt(0.21 / 96)
    )  # 4 standard errors
    np.testing.assert_array_equal(x0[mask > 0], IMAGES[mask > 0])
    drawn = np.asarray(x0)[mask == 0]
    np.testing.assert_allclose(
        [drawn.mean(), drawn.var()], [0, 1], atol=4 * np.sqrt(2 / drawn.size)
    )
    assert not np.isin(drawn, IMAGES).any()
    np.testing.assert_array_equal(cond.label, np.arange(6))
    # what lies in the holes of the given picture has no say
    again, _ = couplings.inpainting(couplings.tiles(2, 0.7))(
        KEY, jnp.where(mask > 0, IMAGES, jnp.nan), jnp.arange(6)
    )
    np.testing.assert_allclose(again, x0, rtol=1e-6)


def test_known_numbers_stay_through_training_and_sampling():
    moving = types.Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: 1 + x)
    x0, cond = couplings.inpainting(couplings.tiles(4, 0.5))(KEY, IMAGES, None)
    x1, _ = solvers.sample(couplings.hold_known(moving), {}, x0, cond, method=3)
    known = cond.aligned > 0
    np.testing.assert_array_equal(x1[known], IMAGES[known])
    assert np.all(x1[~known] != x0[~known])
    loss = losses.chain(
        couplings.with_source(couplings.inpainting(couplings.tiles(8, 1.0))),
        losses.flow_matching(couplings.hold_known(moving)),
    )
    np.testing.assert_allclose(
        loss({}, KEY, {"x": IMAGES})[0], 0, atol=1e-12
    )  # all known: nothing to learn


def test_super_resolution_starts_at_the_block_means():
    source = couplings.corrupted(couplings.block_means(4), 0.25)
    x0, cond = jax.jit(source)(KEY, IMAGES, None)
    seen, means = cond.aligned, np.asarray(IMAGES).reshape(6, 2, 4, 2, 4, 2).mean((2, 4))
    np.testing.assert_allclose(np.asarray(seen)[:, ::4, ::4], means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(couplings.block_means(4)(seen), seen, rtol=1e-5, atol=1e-6)
    noise = np.asarray(x0 - seen) / 0.25
    np.testing.assert_allclose(
        [noise.mean(), noise.var()], [0, 1], atol=4 * np.sqrt(2 / noise.size)
    )
    assert jax.tree.structure(cond) == jax.tree.structure(types.Condition(aligned=0))


def test_what_was_in_cond_stays_beside_what_the_source_adds():
    """Vectors and labels become parts, and a mask goes behind what is aligned already, where
    `hold_known` finds it."""
    inpaint = couplings.inpainting(lambda key, x1: x1 > 0)
    low = couplings.corrupted(couplings.block_means(4), 0.1)
    _, cond = low(KEY, IMAGES, jnp.arange(6))
    x0, both = inpaint(KEY, IMAGES, cond)
    np.testing.assert_array_equal(both.label, np.arange(6))
    np.testing.assert_array_equal(both.aligned, jnp.concatenate([cond.aligned, IMAGES > 0], -1))
    still = types.Velocity(None, lambda params, x, t, cond=None, *, key=None: jnp.ones_like(x))
    held = couplings.hold_known(still).apply({}, IMAGES, jnp.zeros(6), both)
    np.testing.assert_array_equal(held, IMAGES <= 0)
    for net in (
        nets.UNet(4, (1,), attention=(False,), num_classes=6),
        nets.DiT(2, 8, 1, 1, num_classes=6),
    ):
        params = jax.eval_shape(jflow.velocity(net).init, KEY, x0, jnp.zeros(6), both)
        assert params["aligned"]["kernel"].shape[-2] in (4, 2 * 2 * 4)  # channels of both, patches
    x0, cond = inpaint(KEY, IMAGES[:, 0, 0, 0], jnp.ones(6))  # numbers, given a number
    assert x0.shape == (6,) and cond.aligned.shape == cond.vector.shape == (6, 1)
    held = couplings.hold_known(still).apply({}, x0, jnp.zeros(6), cond)
    np.testing.assert_array_equal(held, IMAGES[:, 0, 0, 0] <= 0)


def test_errors():
    for cond, said in (({"a": KEY}, "a dict"), (IMAGES, r"an array float32\[6, 8, 8, 2\]")):
        with pytest.raises(ValueError, match=rf"inpainting: .*types.Condition, got {said}"):
            couplings.inpainting(couplings.tiles(2))(KEY, IMAGES, cond)
    held = couplings.hold_known(types.Velocity(None, None))
    for cond in (None, types.Condition(aligned=IMAGES[..., :1])):
        with pytest.raises(ValueError, match=r"hold_known: .*like x \[6, 8, 8, 2\], got"):
            held.apply({}, IMAGES, jnp.zeros(6), cond)
    for source in (
        lambda: couplings.corrupted(couplings.block_means(3), 0.1),
        lambda: couplings.inpainting(couplings.tiles(3)),
    ):
        with pytest.raises(
            ValueError, match=r"images \[b, H, W, C\] that 3 divides, got \[6, 8, 8, 2\]"
        ):
            source()(KEY, IMAGES)
    with pytest.raises(ValueError, match="'x0' of its own"):
        couplings.with_source(couplings.corrupted(couplings.block_means(2), 0.1))(
            KEY, {"x": IMAGES, "x0": IMAGES}
        )
    with pytest.raises(ValueError, match=r"x0 of shape \[6, 8, 8, 2\], got \[6, 8, 8\]"):
        couplings.with_source(lambda key, x, cond: (x[..., 0], cond))(KEY, {"x": IMAGES})
