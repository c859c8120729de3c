import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import apps, couplings, data, losses, nets
from jflow.types import Condition

KEY = jax.random.key(0)
ROWS = {"x": np.random.default_rng(0).normal(size=(10, 4, 6, 1)).astype(np.float32)}
ROWS["cond"] = np.arange(10)


def blocks(params, x, *, key=None):
    """The means of blocks of 2 x 2, and themselves once more with noise."""
    b, h, w, _ = x.shape
    means = params * x.reshape(b, h // 2, 2, w // 2, 2, 1).mean((2, 4))
    noise = 0 if key is None else jax.random.normal(key, means.shape)
    return jnp.concatenate([means, means + noise], axis=-1)


def test_each_row_is_encoded_once_by_one_program():
    traced = []

    def encode(params, x, *, key=None):
        traced.append(x.shape)
        return blocks(params, x)

    made = data.latents(encode, 3.0, ROWS, batch=4, progress=False)
    np.testing.assert_allclose(made["x"], blocks(3.0, ROWS["x"]), rtol=1e-6)
    assert made["cond"] is ROWS["cond"] and traced == [(4, 4, 6, 1)]
    drawn = [data.latents(blocks, 3.0, ROWS, key=KEY, batch=4, progress=False)["x"] for _ in "ab"]
    np.testing.assert_array_equal(*drawn)
    noise = drawn[0][..., 1] - made["x"][..., 1]
    assert len(np.unique(noise)) == noise.size  # no batch has the noise of another


def test_what_is_wrong_with_an_encoder_is_said_by_row():
    bad = lambda params, x, *, key=None: jnp.where(x[:, :1, 0] > 6, jnp.inf, x[:, :1, 0])  # noqa: E731
    with pytest.raises(FloatingPointError, match="latent of row 7 is not finite"):
        data.latents(bad, {}, {"x": np.arange(10.0).reshape(10, 1, 1)}, batch=4, progress=False)
    with pytest.raises(ValueError, match=r"latents \[4, ...\] of 4 rows, got \[\]"):
        data.latents(lambda p, x, *, key=None: x.sum(), {}, ROWS, batch=4, progress=False)
    with pytest.raises(ValueError, match="at least one row"):
        data.latents(blocks, 1.0, {"x": np.zeros((0, 4, 6, 1))}, progress=False)


def test_memory_does_not_grow_with_the_rows_but_for_the_latents():
    """Rows of 64 kB that are made where they are read."""

    class Made:
        by_position = True

        def __init__(self, n):
            self.n = n

        def __len__(self):
            return self.n

        def __getitem__(self, at):
            return np.ones((len(range(self.n)[at]), 16384), np.float32) * np.arange(16384.0)

    preprocess = data.standardize_latents(lambda params, z: z, {}, batch=8)
    encode = lambda params, x, *, key: jax.random.normal(key, (8, 64))  # noqa: E731

    def peak(n):
        tracemalloc.start()
        rows = {"x": Made(n)}
        made = data.latents(encode, {}, rows, key=KEY, batch=8, progress=False)["x"]
        preprocess.fit({"x": made})
        found = tracemalloc.get_traced_memory()[1] - made.nbytes
        tracemalloc.stop()
        return found

    peak(16)  # what is imported and traced
    assert peak(1024) < 1.2 * peak(128)


def test_latents_are_standardized_by_channel_as_they_are_drawn():
    """Of two channels with the deviation 1/2, 1 of the noise in the second. A false alarm at 5
    standard errors of a variance."""
    rows = {"x": np.random.default_rng(1).normal(size=(4000, 2, 2, 1)).astype(np.float32)}
    made = data.latents(blocks, 1.0, rows, key=KEY, batch=1000, progress=False)
    preprocess = data.standardize_latents(lambda params, z: params * z, 10.0, batch=1500)
    state = preprocess.fit(made)
    variance = 1 / np.square(state["scale"])
    np.testing.assert_allclose(variance, [0.25, 1.25], rtol=5 * np.sqrt(2 / 4000))
    y = preprocess.apply(state, made, None)
    assert y["x"].dtype == np.float32
    np.testing.assert_allclose(y["x"].mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(y["x"].std((0, 1, 2)), 1, rtol=1e-6)
    np.testing.assert_allclose(preprocess.undo(state, y)["x"], 10 * made["x"], atol=1e-5)
    np.testing.assert_allclose(preprocess.log_det(state, y), np.log(state["scale"]).sum())
    flat = made["x"].copy()
    flat[..., 1] = 7
    with pytest.raises(ValueError, match="channel 1 of the training latents is constant"):
        preprocess.fit({"x": flat})


CONFIG = """
import jax, jax.numpy as jnp, numpy as np, optax
import jflow
from jflow import data, losses, nets, solvers
from jflow.apps import Experiment

def config():
    images = np.random.default_rng(0).normal(5, 2, size=(64, 2, 3, 1)).astype(np.float32)
    pca, velocity = nets.pca_autoencoder(2), jflow.velocity(nets.TimeMLP((4,)))
    params = pca.init(jax.random.key(0), images)
    sample = lambda params, key, n: {"x": jax.random.normal(key, (n, 2))}
    return Experiment(
        model=velocity,
        init=lambda key, rows: velocity.init(key, rows["x"], jnp.zeros(len(rows["x"]))),
        loss=losses.flow_matching(velocity),
        optimizer=optax.sgd(0.1),
        data=lambda: data.Splits(data.latents(pca.encode, params, {"x": images}, progress=False)),
        preprocess=data.standardize_latents(pca.decode, params),
        sample=sample,
        steps=1,
        batch=8,
    )
"""


def test_the_scale_lies_in_the_checkpoint_and_samples_are_decoded(tmp_path):
    file, run, out = tmp_path / "config.py", tmp_path / "run", tmp_path / "samples.npz"
    file.write_text(CONFIG)
    experiment, values = apps.load_config(file)
    apps.run(experiment, run, config_source=file, resolved=values, progress=False)
    loaded, latents = jflow.load(run), experiment.data().train
    assert loaded.preprocess.state == experiment.preprocess.fit(latents)
    y = loaded.preprocess.apply(latents)
    images = loaded.preprocess.undo(y)["x"]
    assert images.shape == (64, 2, 3, 1)
    np.testing.assert_allclose(images.mean(0), 5, atol=2)  # in the units of the images
    from jflow.apps import cli

    assert cli.main(["sample", str(run), "--num", "3", "--out", str(out), "--quiet"]) == 0
    drawn = np.load(out)["x"]
    assert drawn.shape == (3, 2, 3, 1)
    np.testing.assert_allclose(
        drawn,
        loaded.preprocess.undo(
            loaded.experiment.sample(None, jax.random.fold_in(jax.random.key(0), 0), 3)
        )["x"],
        rtol=1e-5,
    )


def test_masks_and_layouts_are_pooled_alike_by_numpy_and_in_a_program():
    draw = np.random.default_rng(2)
    known, layout = draw.random((2, 4, 6, 1)) < 0.8, draw.integers(-1, 3, (2, 4, 6))
    mask, shares = data.pool_mask(known, 2), data.pool_layout(layout, 2, 3)
    holes = (~known).reshape(2, 2, 2, 3, 2, 1).max((2, 4))
    np.testing.assert_array_equal(mask, 1 - holes)
    assert 0 < mask.mean() < 1
    at = layout[1, 2:4, 4:6]
    np.testing.assert_allclose(shares[1, 1, 2], [(at == k).mean() for k in range(3)])
    again = jax.jit(
        lambda known, layout: (data.pool_mask(known, 2), data.pool_layout(layout, 2, 3))
    )
    for one, other in zip(again(known, layout), (mask, shares), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype == np.float32
    for wrong in (
        lambda: data.pool_mask(known[..., 0], 2),
        lambda: data.pool_mask(known, 4),
        lambda: data.pool_layout(layout / 2, 2, 3),
        lambda: data.pool_layout(layout, 3, 3),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()


def test_labels_holes_and_layouts_go_with_latents():
    """Holes are drawn in pixels; a network gets the label, the layout and the mask, and leaves the
    latents of whole blocks alone."""
    z = jax.random.normal(KEY, (3, 2, 3, 4))
    layout = np.random.default_rng(3).integers(0, 2, (3, 8, 12))
    cond = Condition(label=jnp.arange(3), aligned=data.pool_layout(layout, 4, 2))
    pixels = lambda key, z: jax.random.bernoulli(key, 0.96, (3, 8, 12, 1))  # noqa: E731
    source = couplings.inpainting(lambda key, z: data.pool_mask(pixels(key, z), 4))
    velocity = couplings.hold_known(
        jflow.velocity(nets.UNet(4, (1,), attention=(False,), num_classes=3))
    )
    loss = losses.chain(
        couplings.with_source(source),
        losses.drop_cond(0.5, null=Condition(label=3)),
        losses.flow_matching(velocity),
    )

    @jax.jit
    def value(key):
        key, source_key, init_key = jax.random.split(key, 3)
        x0, made = source(source_key, z, cond)
        params = velocity.init(init_key, z, jnp.zeros(3), made)
        return x0, made, loss(params, key, {"x": z, "cond": cond})[0]

    x0, made, found = value(jax.random.key(1))
    mask = np.asarray(made.aligned[..., 2:])
    np.testing.assert_array_equal(made.aligned[..., :2], cond.aligned)
    np.testing.assert_array_equal(x0[mask > 0], z[mask > 0])
    assert not np.isin(x0[mask == 0], z).any() and 0 < mask.mean() < 1
    np.testing.assert_array_equal(made.label, cond.label)
    assert found > 0


def test_the_distance_through_principal_components_splits():
    """W2^2 = residual + W2^2 in the subspace, for latents of any kind; the spectrum of the
    covariance is divided between them."""
    draw = np.random.default_rng(4)
    x = jnp.asarray(draw.normal(size=(40, 2, 3)) @ draw.normal(size=(3, 3)) + 1, jnp.float32)
    pca = nets.pca_autoencoder(2)
    params = pca.init(KEY, x)
    z, drawn = pca.encode(params, x), 2 * jax.random.normal(KEY, (40, 2)) + 0.5
    square = lambda a, b: jflow.metrics.wasserstein(a, b) ** 2  # noqa: E731
    residual = float(jnp.mean(jnp.sum((x - pca.decode(params, z)) ** 2, (1, 2))))
    np.testing.assert_allclose(
        square(pca.decode(params, drawn), x), residual + square(drawn, z), rtol=1e-5
    )
    flat = np.asarray(x, np.float64).reshape(40, 6)
    spectrum = np.linalg.eigvalsh(np.cov(flat.T, bias=True))  # rising
    np.testing.assert_allclose(residual, spectrum[:-2].sum(), rtol=1e-4)
    np.testing.assert_allclose(np.var(z, 0), spectrum[:-3:-1], rtol=1e-4)
    with pytest.raises(ValueError, match="at least 7 rows and numbers"):
        nets.pca_autoencoder(7).init(KEY, x)
