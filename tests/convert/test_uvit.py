"""U-ViT: the published layout read and written, the outputs of a twin in torch, published sizes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import convert, nets

PEERS = np.load(Path(__file__).parents[1] / "peers" / "uvit.npz")


def drawn(name, shape):
    """The tensor or input of a name, as in peers/make_uvit_fixtures.py."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return jnp.asarray(noise, jnp.float32)
    scale = len(shape) == 1 and "norm" in name and "weight" in name
    return (scale + 0.15 * noise).astype(np.float32)


def tensors_of(model):
    shapes = json.loads(str(PEERS[f"{model}.shapes"]))
    return {name: drawn(name, tuple(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("model", ["labels", "plain"])
def test_outputs_are_those_of_a_twin_in_torch(model, tmp_path):
    tensors = tensors_of(model)
    net, params = convert.uvit(tensors, (8, 6), num_heads=2)
    labels = model == "labels"
    assert net == nets.UViT(
        2, 32, 4, 2, num_classes=5 if labels else None, conv=labels, time_scale=1.0
    )
    cond = jnp.array([1, 5]) if labels else None
    with jax.default_matmul_precision("highest"):
        out = jflow.field(net).apply(
            params, drawn("input.x", (2, 8, 6, 4)), jnp.array([3.5, 625.0]), cond
        )
    expected = PEERS[f"{model}.out"]
    error = np.max(np.abs(out - expected), axis=(1, 2, 3)) / np.abs(expected).max()
    assert error[0] < 1e-5
    assert error[1] < 1e-4  # the sines of 625 in float32 differ between the two

    convert.save(tmp_path / "model.safetensors", convert.uvit_layout(net), params)
    written = convert.read_safetensors(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_published_sizes():
    published = [  # parameters, width, layers, heads, patch, side, channels, rows of labels
        (44_255_328, 512, 12, 8, 2, 32, 3, 0),
        (44_292_228, 512, 12, 8, 4, 64, 3, 0),
        (130_940_292, 768, 16, 12, 4, 64, 3, 1000),
        (286_827_652, 1024, 20, 16, 4, 64, 3, 1000),
        (286_763_172, 1024, 20, 16, 2, 32, 4, 1001),
        (500_832_016, 1152, 28, 16, 2, 32, 4, 1001),
    ]
    for count, width, layers, heads, patch, side, channels, rows in published:
        classes, conv = rows - 1 if rows else None, width < 1152  # the largest has none
        net = nets.UViT(patch, width, layers, heads, num_classes=classes, conv=conv)
        shapes = jax.eval_shape(
            net.init, jax.random.key(0), jnp.zeros((1, side, side, channels)), jnp.zeros(1)
        )
        assert sum(p.size for p in jax.tree.leaves(shapes)) == count


def test_the_program_does_not_grow_with_depth():
    x, t = jnp.zeros((5, 4, 6, 2)), jnp.zeros(5)  # 5: no number of layers

    def instructions(depth):
        net = nets.UViT(2, 16, depth, 2)
        params = jax.eval_shape(lambda: net.init(jax.random.key(0), x, t))
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, x, t))))
        return gradient.lower(params).as_text(dialect="hlo").count(" = ")

    assert instructions(24) == instructions(4) > 100


def test_bad_inputs():
    net, params = convert.uvit(tensors_of("labels"), (8, 6), num_heads=2)
    field, t = jflow.field(net), jnp.zeros(1)
    with pytest.raises(ValueError, match=r"UViT: expected x of 12 patches.*\[1, 8, 8, 4\], of 16"):
        field.apply(params, jnp.zeros((1, 8, 8, 4)), t)
    with pytest.raises(ValueError, match=r"UViT: expected patches of 16 numbers.* 3 channels, 12"):
        field.apply(params, jnp.zeros((1, 8, 6, 3)), t)
    with pytest.raises(ValueError, match=r"UViT: takes no cond.vector"):
        field.apply(params, jnp.zeros((1, 8, 6, 4)), t, jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"uvit: expected num_heads.* width 32"):
        convert.uvit(tensors_of("labels"), (8, 6))
    with pytest.raises(ValueError, match=r"expected 'pos_embed' of shape \[1, 18, 32\], got"):
        convert.uvit(tensors_of("labels"), (8, 8), num_heads=2)
    with pytest.raises(
        ValueError, match=r"uvit: .* 'patch_embed.proj.weight' of 4 axes, got 1 oth"
    ):
        convert.uvit({"a": np.zeros(1)}, (8, 8))
