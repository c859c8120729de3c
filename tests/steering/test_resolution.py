"""Larger images: the limits of each method, and what each does to coarse parts and energies."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import bijectors, nets, oracles, solvers, steering
from jflow.types import Velocity

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(3, 4, 4, 1)).astype(np.float32)
LARGE = RNG.normal(size=(3, 8, 8, 1)).astype(np.float32)
GRID = solvers.grids.uniform(8)
EULER = solvers.fixed(8, diffrax.Euler())


def pixels(variance=0.5, mean=0.3):
    """Every pixel a Gaussian by itself, at any size: a velocity that sizes do not matter to."""
    law = oracles.gaussian([mean], variance)

    def apply(params, x, t, cond=None, *, key=None):
        rows = jnp.broadcast_to(jnp.reshape(t, (-1, 1)), (len(x), x[0].size)).ravel()
        return law.velocity(x.reshape(-1, 1), rows).reshape(x.shape)

    return Velocity(lambda *_: {}, apply)


V = pixels()


def test_the_projection_is_one():
    low = np.asarray(steering.low_pass(LARGE, 2))
    np.testing.assert_allclose(steering.low_pass(low, 2), low, atol=1e-6)
    blocks = LARGE.reshape(3, 4, 2, 4, 2, 1).mean((2, 4))
    np.testing.assert_allclose(low[:, ::2, ::2], blocks, atol=1e-6)
    assert abs((low * (LARGE - low)).sum()) < 1e-4
    bands, _ = bijectors.haar().forward({}, LARGE)  # means times 2, and three of differences
    wavelet, _ = bijectors.haar().inverse({}, bands.at[..., 1:].set(0))
    np.testing.assert_allclose(low, wavelet, atol=1e-6)
    np.testing.assert_array_equal(steering.low_pass(LARGE, 1), LARGE)
    np.testing.assert_array_equal(steering.resized(IMAGE, 4, 4), IMAGE)
    np.testing.assert_allclose(steering.energy(LARGE), (LARGE**2).mean((1, 2, 3)), rtol=1e-6)
    with pytest.raises(ValueError, match="divides the height"):
        steering.low_pass(LARGE, 3)
    with pytest.raises(ValueError, match=r"\[b, H, W, C\]"):
        steering.resized(LARGE[0], 4, 4)


def test_scaled_positions_are_those_of_the_smaller_size():
    """At factor 1 nothing changes. At factor 2 patch 2 i stands where patch i stood: an image of
    one color, whose tokens differ by their positions alone, has the same values there when the
    network has no attention between its tokens (its values are zero)."""
    net = nets.DiT(patch_size=1, width=8, num_layers=1, num_heads=1)
    velocity = jflow.velocity(net)
    small, large = (np.full((1, side, side, 1), 0.3, np.float32) for side in (3, 6))
    shapes = jax.eval_shape(velocity.init, jax.random.key(0), small, 0.5)
    params = jax.tree.map(lambda a: RNG.normal(size=a.shape, scale=0.3).astype(np.float32), shapes)
    params["blocks"]["attention"]["out"]["kernel"] *= 0

    same = steering.scaled_positions(params, 6, 6, 1.0, 1)
    scaled = steering.scaled_positions(params, 6, 6, 2.0, 1)
    v = {
        "small": velocity.apply(params, small, 0.5),
        "large": velocity.apply(params, large, 0.5),
        "same": velocity.apply(same, large, 0.5),
        "scaled": velocity.apply(scaled, large, 0.5),
    }
    v = jax.device_get(v)
    np.testing.assert_array_equal(v["same"], v["large"])
    np.testing.assert_allclose(v["scaled"][:, ::2, ::2], v["small"], atol=1e-5)
    assert np.abs(v["large"][:, ::2, ::2] - v["small"]).max() > 0.01
    with pytest.raises(ValueError, match="factor > 0"):
        steering.scaled_positions(params, 6, 6, 0.0, 1)
    with pytest.raises(ValueError, match="params of a nets.DiT"):
        steering.scaled_positions(params["blocks"], 6, 6, 2.0, 1)


def test_attention_is_as_sharp_among_more_tokens():
    """Scores by hand; at the size of training, the network as it is. Among 16 tokens of random
    scores its entropy, over that of equal weights, is nearer to that among the 4 of training."""
    rng, fn = np.random.default_rng(6), steering.proportional_attention(4)
    q, k, v = rng.normal(size=(3, 5, 16, 2, 8)).astype(np.float32)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64)
    scores *= np.sqrt(np.log(16) / np.log(4) / 8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    by_hand = np.einsum("bhqk,bkhd->bqhd", weights, v)
    seen = np.arange(16) < 9  # padding counts as tokens, and stays unseen
    masked = np.where(seen, weights, 0)
    masked /= masked.sum(-1, keepdims=True)

    small = nets.DiT(patch_size=1, width=8, num_layers=1, num_heads=2)
    velocity, sharp = (jflow.velocity(n) for n in (small, small.clone(attention_fn=fn)))
    x = rng.normal(size=(1, 2, 2, 1)).astype(np.float32)
    shapes = jax.eval_shape(velocity.init, jax.random.key(0), x, 0.5)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape, scale=0.3).astype(np.float32), shapes)

    @jax.jit
    def run(q, k, v):
        shown = jnp.broadcast_to(jnp.eye(16)[None, :, None], (5, 16, 2, 16))
        entropies = []
        for attend, n in ((fn, 4), (fn, 16), (nets.dot_product_attention, 16)):
            w = attend(q[:, :n], k[:, :n], shown[:, :n, :, :n])
            entropies.append(jnp.mean(-jnp.sum(w * jnp.log(w), axis=-1)) / np.log(n))
        both = [v.apply(params, x, 0.5) for v in (velocity, sharp)]
        return fn(q, k, v), fn(q, k, v, mask=jnp.asarray(seen)[None]), entropies, both

    made, unseen, (trained, scaled, plain), (own, same) = jax.device_get(run(q, k, v))
    np.testing.assert_allclose(made, by_hand, atol=1e-5)
    np.testing.assert_allclose(unseen, np.einsum("bhqk,bkhd->bqhd", masked, v), atol=1e-5)
    np.testing.assert_array_equal(own, same)
    assert abs(scaled - trained) < abs(plain - trained), (trained, scaled, plain)
    for wrong in (1, 4.5, True):
        with pytest.raises(ValueError, match="proportional_attention: expected trained"):
            steering.proportional_attention(wrong)


def test_projected_flow():
    """With weight 0 it is the velocity; with weight 1 at every time the coarse part of the samples
    is that of the guide, and the fine part that of the velocity by itself."""
    guide = steering.resized(IMAGE, 8, 8)

    @jax.jit
    def run(x0):
        cond = steering.SteeringCondition(guide)
        none = steering.projected_flow(V, 2, weight=0.0)
        full = steering.projected_flow(V, 2, weight=1.0)
        sampled = [
            solvers.sample(v, {}, x0, c, method=EULER)[0]
            for v, c in ((none, cond), (V, None), (full, cond))
        ]
        return sampled, none.apply({}, x0, 0.3, cond) - V.apply({}, x0, 0.3)

    (none, plain, full), difference = jax.device_get(run(LARGE))
    np.testing.assert_array_equal(difference, 0)
    np.testing.assert_allclose(none, plain, atol=1e-6)
    coarse = np.asarray(steering.low_pass(guide, 2))
    np.testing.assert_allclose(steering.low_pass(full, 2), coarse, atol=1e-5)
    fine = lambda x: x - np.asarray(steering.low_pass(x, 2))  # noqa: E731
    np.testing.assert_allclose(fine(full), fine(plain), atol=1e-5)  # the velocity is linear
    for weight in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"weight in \[0, 1\]"):
            steering.projected_flow(V, 2, weight=weight)
    with pytest.raises(ValueError, match="SteeringCondition"):
        steering.projected_flow(V, 2).apply({}, LARGE, 0.3, None)
    with pytest.raises(ValueError, match=r"the target of shape \[3, 8, 8, 1\], got \[3, 4, 4, 1\]"):
        steering.projected_flow(V, 2).apply({}, LARGE, 0.3, steering.SteeringCondition(IMAGE))


def test_hiflow():
    """Without guidance, from t=0 and at factor 1, it is Euler's method from the noise that its key
    draws, whose first image is Euler's from x0. With all of the structure the coarse part of the
    large image follows the reference; with factor 1 the whole image does."""
    key = jax.random.key(3)

    @jax.jit
    def run(x0, key):
        run = lambda **more: steering.hiflow(  # noqa: E731
            V, {}, x0, jax.random.clone(key), GRID, **more
        )
        noise = jax.random.normal(jax.random.clone(key), x0.shape)
        euler = [solvers.sample(V, {}, x, method=EULER)[0] for x in (noise, x0)]
        return (
            run(factor=1, start=0.0, structure=0.0, detail=0.0),
            euler,
            [run(factor=2, start=0.0, structure=s, detail=0.0)[0] for s in (0.0, 1.0)],
        )

    (high, low), (from_noise, from_x0), (free, led) = jax.device_get(run(IMAGE, key))
    np.testing.assert_allclose(high, from_noise, atol=1e-5)
    np.testing.assert_allclose(low, from_x0, atol=1e-5)
    away = lambda x: np.abs(  # noqa: E731
        np.asarray(steering.low_pass(x - steering.resized(low, 8, 8), 2))
    ).mean()
    assert away(led) < 0.6 * away(free), (away(led), away(free))
    for more in ({"structure": 1.5}, {"detail": -1}, {"start": 1.0}, {"factor": 0}):
        with pytest.raises(ValueError, match="expected"):
            steering.hiflow(V, {}, IMAGE, key, GRID, **{"factor": 2, **more})
    for x0, grid, said in [
        (IMAGE[..., 0], GRID, r"hiflow: expected x0 of shape \[b, H, W, C\], got \[3, 4, 4\]"),
        (IMAGE > 0, GRID, "hiflow: expected x0 of a floating type, got bool"),
        (IMAGE, GRID[:-1], "hiflow: expected times from 0 to 1, got 0 to 0.875"),
    ]:
        with pytest.raises(ValueError, match=said):
            steering.hiflow(V, {}, x0, key, grid, factor=2)
    for call in (
        lambda factor: steering.low_pass(IMAGE, factor),
        lambda factor: steering.projected_flow(V, factor),
    ):
        with pytest.raises(ValueError, match="factor to be a whole number"):
            call(2.0)


def test_rectified_hr_keeps_the_energy_with_a_larger_scale():
    """One stage is Euler's method. Enlarged predictions lose energy beside the flow of the small
    size; a velocity of a larger scale in the second stage gives back a part of it."""
    key = jax.random.key(4)
    x0 = np.random.default_rng(5).normal(size=(64, 4, 4, 1)).astype(np.float32)
    louder = pixels(variance=0.9)  # what a larger scale does: predictions go further from the mean

    @jax.jit
    def run(x0, key):
        grow = lambda *velocities, **more: steering.rectified_hr(  # noqa: E731
            velocities, {}, x0, jax.random.clone(key), GRID, **more
        )
        stages = {"sizes": [(8, 8)], "times": [0.5]}
        return (
            grow(V, sizes=[], times=[]),
            solvers.sample(V, {}, x0, method=EULER)[0],
            grow(V, V, **stages),
            grow(V, louder, **stages),
        )

    (plain, energies), euler, (grown, low), (_, high) = jax.device_get(run(x0, key))
    np.testing.assert_allclose(plain, euler, atol=1e-5)
    assert energies.shape == low.shape == (8, 64) and grown.shape == (64, 8, 8, 1)
    np.testing.assert_array_equal(low[:4], energies[:4])
    of = lambda e: e[4:].mean()  # noqa: E731
    assert of(low) < of(energies) and of(low) < of(high), (of(low), of(energies), of(high))
    assert steering.rising_scales(1.0, 4.0, 3, power=2.0) == [1.0, 1.75, 4.0]
    for velocities, sizes, times in [
        ([V], [(8, 8)], [0.5]),
        ([V, V], [(8, 8)], [1.0]),
        ([V, V, V], [(6, 6), (8, 8)], [0.5, 0.2]),
    ]:
        with pytest.raises(ValueError, match="expected"):
            steering.rectified_hr(velocities, {}, x0, key, GRID, sizes=sizes, times=times)
    with pytest.raises(TypeError, match="rectified_hr: expected a list of velocities.*got one"):
        steering.rectified_hr(V, {}, x0, key, GRID, sizes=[], times=[])
