"""Masks of attention against numpy and scipy, and what they leave of FluxSpace's and ReFlex's
edits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.special

import jflow
from jflow import nets, steering
from jflow.types import Condition

RNG = np.random.default_rng(0)
TEXT, TOKENS, SIZE = 3, [0, 2], (8, 12)
LOGITS = RNG.normal(size=(2, 3, 4, TEXT + 24, TEXT + 24), scale=2.0)  # [depth, b, heads, n, m]
WEIGHTS = scipy.special.softmax(LOGITS, axis=-1)


def test_attention_to_words_and_the_mask_of_fluxspace():
    """It is the softmax over the text alone. At a threshold of a half the mask is where this is
    above the middle of the range that it has in the image."""
    alone = scipy.special.softmax(LOGITS[..., TEXT:, :TEXT], axis=-1)
    by_hand = alone[..., TOKENS].mean((-3, -1))
    found, half, most, every = jax.device_get(
        jax.jit(
            lambda w: (
                steering.word_attention(w, TEXT, TOKENS),
                *(
                    steering.word_mask(TEXT, TOKENS, threshold=t, sharpness=8.0)(w)
                    for t in (0.5, 0.9, 0.0)
                ),
            )
        )(WEIGHTS.astype(np.float32))
    )
    np.testing.assert_allclose(found, by_hand, rtol=2e-5)
    low, high = by_hand.min(-1, keepdims=True), by_hand.max(-1, keepdims=True)
    scaled = (by_hand - low) / (high - low)
    for mask, least in ((half, 0.5), (most, 0.5 + np.log(9) / 8), (every, -1.0)):
        np.testing.assert_array_equal(mask[..., TEXT:], scaled >= least)
        np.testing.assert_array_equal(mask[..., :TEXT], 0)
    assert most.sum() < half.sum() < every.sum() == 2 * 3 * 24
    equal = steering.word_mask(1, [0])(jnp.full((1, 4, 4), 0.25))
    np.testing.assert_array_equal(equal, 0)
    for tokens in ([], [3], [-1], [[0]]):
        with pytest.raises(ValueError, match="tokens to be indices of words below 3, got"):
            steering.word_mask(TEXT, tokens)
    for more in ({"threshold": 1.5}, {"sharpness": 0.0}):
        with pytest.raises(ValueError, match=r"threshold in \[0, 1\] and sharpness > 0"):
            steering.word_mask(TEXT, TOKENS, **more)


def test_otsus_threshold_is_the_best_of_all_edges():
    x = np.concatenate([RNG.normal(size=(4, 30)), RNG.normal(3, 0.5, size=(4, 20))], axis=1)
    x = x.astype(np.float32)
    found, moved, equal = jax.device_get(
        jax.jit(
            lambda x: (
                steering.otsu_threshold(x, 16),
                steering.otsu_threshold(5 * x.reshape(4, 5, 10) - 2, 16),
                steering.otsu_threshold(0 * x),
            )
        )(x)
    )
    for row, threshold in zip(x, found, strict=True):
        counts, edges = np.histogram(row.astype(np.float64), 16)
        centers, between = (edges[:-1] + edges[1:]) / 2, []
        for i in range(1, 16):
            n, m = counts[:i].sum(), counts[i:].sum()
            apart = np.average(centers[:i], weights=counts[:i]) - (
                np.average(centers[i:], weights=counts[i:])
            )
            between.append(n * m * apart**2)
        np.testing.assert_allclose(threshold, edges[1 + np.argmax(between)], rtol=1e-5)
    np.testing.assert_allclose(moved, 5 * found - 2, rtol=1e-4)
    np.testing.assert_array_equal(equal, 0)
    with pytest.raises(ValueError, match="bins to be a whole number of at least 2"):
        steering.otsu_threshold(x, 1)


def test_the_region_of_an_edit():
    """Blurred and dilated by scipy, of the mean over sites and depths."""
    other = WEIGHTS[0, :, ::-1, ::-1]  # [b, heads, n, m], with no depth
    region = steering.edit_region(TEXT, TOKENS, SIZE, patch=2, blur=1.0, dilation=2, bins=16)
    sharp = steering.edit_region(TEXT, TOKENS, SIZE, patch=2, blur=0.0, dilation=0, bins=16)
    features = {"a:weights": WEIGHTS.astype(np.float32), "b:weights": other.astype(np.float32)}
    made, plain = jax.device_get(jax.jit(lambda f: (region(f), sharp(f)))(features))
    share = lambda w: steering.word_attention(jnp.asarray(w), TEXT, TOKENS)  # noqa: E731
    a = np.mean([np.mean(share(features["a:weights"]), axis=0), share(features["b:weights"])], 0)
    for image, blur, dilation in ((made, 1.0, 2), (plain, 0.0, 0)):
        for row, mask in zip(a.reshape(3, 4, 6), image[..., 0], strict=True):
            if blur:
                row = scipy.ndimage.gaussian_filter(row, blur, mode="constant", radius=3)
            chosen = row > float(steering.otsu_threshold(row[None], 16)[0])
            chosen = np.kron(chosen, np.ones((2, 2))).astype(bool)
            if dilation:
                chosen = scipy.ndimage.binary_dilation(chosen, iterations=dilation)
            np.testing.assert_array_equal(mask, chosen)
    for size, more in (((8, 11), {}), (SIZE, {"blur": -1.0}), (SIZE, {"dilation": -1})):
        with pytest.raises(ValueError, match="edit_region: expected"):
            steering.edit_region(TEXT, TOKENS, size, patch=2, **more)


WEIGHT_SITES = ["blocks:weights", "last_block:weights"]
NET = nets.MMDiT(width=8, num_layers=2, num_heads=2)
IMAGE = RNG.normal(size=(2, 4, 4, 1)).astype(np.float32)
BASE, EDIT, PRIOR = (
    Condition(
        context=RNG.normal(size=(2, TEXT, 4)).astype(np.float32),
        vector=RNG.normal(size=(2, 2)).astype(np.float32),
    )
    for _ in range(3)
)


def params_of(net, *args):
    shapes = jax.eval_shape(jflow.velocity(net).init, jax.random.key(0), *args)
    return jax.tree.map(lambda a: RNG.normal(size=a.shape, scale=0.3).astype(np.float32), shapes)


def test_fluxspace_edits_the_tokens_of_its_mask():
    """By hand from what `capture` reads; a mask of ones is no mask, one of zeros is the base."""
    params = params_of(NET, IMAGE, 0.3, BASE)
    sites = ["blocks:attended", "last_block:attended"]
    word, reader = steering.word_mask(TEXT, [1]), steering.capture(NET, [*sites, *WEIGHT_SITES])
    ones = lambda w: jnp.ones_like(w[..., 0, :, 0])  # noqa: E731
    masks = (word, None, ones, lambda w: 0 * ones(w))
    cond = steering.EditCondition(BASE, EDIT, PRIOR)

    @jax.jit
    def run(params):
        _, edit = reader.apply(params, IMAGE, 0.3, EDIT)
        _, prior = reader.apply(params, IMAGE, 0.3, PRIOR)
        given = {}
        for site, of_weights in zip(sites, WEIGHT_SITES, strict=True):
            wide = [f[site].reshape(*f[site].shape[:-2], -1) for f in (edit, prior)]
            part = steering.orthogonal_part(*wide) * word(edit[of_weights])[..., None]
            given[site] = 1.5 * part.reshape(edit[site].shape)
        told = steering.inject(params, given, combine=lambda own, part: own + part)
        edited = [
            steering.fluxspace(NET, sites, 1.5, mask=mask).apply(params, IMAGE, 0.3, cond)
            for mask in masks
        ]
        by_hand, base = (jflow.velocity(NET).apply(p, IMAGE, 0.3, BASE) for p in (told, params))
        return by_hand, base, *edited

    by_hand, base, masked, plain, ones, zeros = jax.device_get(run(params))
    np.testing.assert_allclose(masked, by_hand, atol=1e-5)  # float32, of order 3
    np.testing.assert_allclose(ones, plain, atol=1e-5)
    np.testing.assert_allclose(zeros, base, atol=1e-5)
    assert np.abs(masked - plain).max() > 1e-3 and np.abs(masked - base).max() > 1e-3
    with pytest.raises(ValueError, match="':attended' with a mask, got 'blocks:v'"):
        steering.fluxspace(NET, ["blocks:v"], 1.0, mask=word)
    wrong = steering.fluxspace(NET, sites, 1.0, mask=lambda w: w[..., 0])
    with pytest.raises(ValueError, match=r"expected mask\(weights\) of shape"):
        jax.eval_shape(wrong.apply, params, IMAGE, 0.3, cond)


def test_reflex_leaves_what_its_mask_leaves():
    """Without sites put in, the mixture of a first step by hand. Where the mask is 0 to the end,
    the image is as it was, to the last bit, also where the mask is of attention. An earlier time
    for features leaves them out from there on."""
    net = nets.TokenDiT(width=8, num_layers=1, num_heads=2)
    x = RNG.normal(size=(2, 5, 1)).astype(np.float32)
    source, target = RNG.normal(size=(2, 2, 3)).astype(np.float32)
    params, velocity = params_of(net, x, 0.3, source), jflow.velocity(net)
    half = (np.arange(5) < 2)[None, :, None]  # of the tokens
    site = "blocks:weights"

    def attended(features):
        seen = jnp.mean(features[site], axis=(0, 2, 3))  # how much each token is attended to
        return (seen > jnp.mean(seen, axis=1, keepdims=True))[..., None]

    def edit(**more):
        given = {"weights": [site], "steps": 4, "until": 0.5, "blend_until": 1.0, **more}
        return steering.reflex(net, params, x, source, target, **given)

    look = jax.jit(lambda y, t, cond: 0.25 * velocity.apply(params, y, t, cond))
    y, kept = x, []
    for t in (1.0, 0.75, 0.5, 0.25):
        kept.append(y)
        y = y - look(y, t, source)
    y = np.where(half, y + look(y, 0.0, target), kept[3])
    for t in (0.25, 0.5, 0.75):
        y = y + look(y, t, target)

    @jax.jit
    def run(kept):
        features = {"weights": (), "features": ["blocks:attended"]}
        return (
            edit(until=0.0, blend_until=0.25, mask=half),
            (edit(mask=half), edit(mask=attended)),
            attended(steering.capture(net, [site]).apply(params, kept, 0.25, source)[1]),
            [edit(**features, **more) for more in ({"features_until": 0.25}, {"until": 0.25}, {})],
        )

    once, (halved, chosen), where, (earlier, until, both) = jax.device_get(run(kept[2]))
    np.testing.assert_allclose(once, y, atol=2e-5)  # 8 steps of float32 at 3
    half, where = (np.broadcast_to(m, x.shape).astype(bool) for m in (half, where))
    assert 0 < where.mean() < 1
    for made, changed in ((halved, half), (chosen, where)):
        np.testing.assert_array_equal(made[~changed], x[~changed])
        assert np.abs(made - x)[changed].min() > 0
    np.testing.assert_allclose(earlier, until, atol=2e-5)
    assert np.abs(earlier - both).max() > 1e-3
    for more, said in (
        ({"features_until": 0.6}, r"features_until in \[0, until=0.5\], got 0.6"),
        ({"blend_until": 1.5}, r"blend_until in \[0, 1\]"),
        ({"mask": attended, "until": 0.0}, "weights and until > 0 for a mask"),
        ({"mask": np.ones((2, 3))}, r"a mask that broadcasts to x \[2, 5, 1\], got \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=said):
            jax.eval_shape(lambda more=more: edit(**more))


def test_reflex_takes_the_region_of_an_edit():
    params = jax.eval_shape(jflow.velocity(NET).init, jax.random.key(0), IMAGE, 0.3, BASE)
    region = steering.edit_region(TEXT, [1], (4, 4), patch=2)
    edit = lambda params: steering.reflex(  # noqa: E731
        NET, params, IMAGE, BASE, EDIT, weights=WEIGHT_SITES, mask=region, steps=4
    )
    assert jax.eval_shape(edit, params).shape == IMAGE.shape
