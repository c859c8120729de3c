"""The FID network against pytorch-fid's, with the same random weights: see
tests/peers/make_inception_fixtures.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers.make_inception_fixtures import EVERY, images, seeded, to_resize

from jflow import convert, nets

FROZEN = np.load(Path(__file__).parents[1] / "peers" / "inception.npz")


@pytest.fixture(scope="module")
def state():
    """A state dict as torch would save it."""
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    shapes = jax.eval_shape(nets.InceptionFID().init, jax.random.key(0), image)["params"]
    found = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, like in shapes.items():
        height, width, inputs, outputs = like["kernel"].shape
        found[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        found |= {
            f"{name}.bn.{part}": (outputs,)
            for part in ("weight", "bias", "running_mean", "running_var")
        }
    return {name: seeded(name, shape) for name, shape in found.items()}


def test_features_are_those_of_pytorch_fid(state):
    """In float32, through 94 convolutions: 1e-5 of the features, which reach 30."""
    params = convert.inception(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    found = nets.InceptionFID(resize=False).apply(
        {"params": params}, jnp.asarray(images(), jnp.float32)
    )
    assert found.shape == (2, 2048)
    expected = FROZEN["features"]
    np.testing.assert_allclose(found[:, ::EVERY], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("i", [0, 1])
def test_resize_is_that_of_torch(i, x64):
    """An image to enlarge and one to shrink, by what the network itself calls."""
    seen = []

    class Probe(nets.InceptionFID):
        def _conv(self, h, *args, **kwargs):
            seen.append(h)
            raise StopIteration

    with pytest.raises(StopIteration):
        Probe().apply({"params": {}}, jnp.asarray(to_resize()[i]))
    np.testing.assert_allclose((seen[0][0, ::23, ::29] + 1) / 2, FROZEN[f"resized_{i}"], atol=1e-12)


def test_weights_from_an_npz_file(state, tmp_path):
    few = {k: v.astype(np.float32) for k, v in state.items()}
    np.savez(tmp_path / "inception.npz", **few)
    read = convert.inception(tmp_path / "inception.npz")
    jax.tree.map(np.testing.assert_array_equal, read, convert.inception(few))


def test_bad_weights(state, tmp_path):
    with pytest.raises(ValueError, match=r"'Mixed_7a.branch3x3_1.bn.running_var'"):
        convert.inception(
            {k: v for k, v in state.items() if k != "Mixed_7a.branch3x3_1.bn.running_var"}
        )
    wrong = {**state, "Mixed_5b.branch1x1.conv.weight": np.zeros((64, 192, 3, 3))}
    with pytest.raises(ValueError, match=r"Mixed_5b.*\[64, 192, 1, 1\], got \[64, 192, 3, 3\]"):
        convert.inception(wrong)
    with pytest.raises(ValueError, match="1008 classes, got weights for 1000"):
        convert.inception({**state, "fc.weight": np.zeros((1000, 2048))})
    (tmp_path / "weights.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"weights\.npz is not an npz file"):
        convert.inception(tmp_path / "weights.npz")
    with pytest.raises(FileNotFoundError):
        convert.inception(tmp_path / "nowhere.npz")


def test_bad_images():
    for x in (
        jnp.zeros((1, 99, 99, 1)),
        jnp.zeros((99, 99, 3)),
        jnp.zeros((1, 99, 99, 3), jnp.uint8),
    ):
        with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
            nets.InceptionFID().apply({"params": {}}, x)
    with pytest.raises(ValueError, match="at least 75 x 75"):
        nets.InceptionFID(resize=False).apply({"params": {}}, jnp.zeros((1, 60, 99, 3)))
