"""LightningDiT: the published layout read and written, the outputs of a twin in torch, sizes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import convert, nets

PEERS = np.load(Path(__file__).parents[1] / "peers" / "lightning_dit.npz")
TABLES = {key.removeprefix("square."): PEERS[key] for key in PEERS if key.startswith("square.")}


def drawn(name, shape):
    """The tensor or input of a name, as in peers/make_lightning_dit_fixtures.py."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return jnp.asarray(noise, jnp.float32)
    scale = len(shape) == 1 and "norm" in name
    return (scale + 0.15 * noise).astype(np.float32)


def tensors_of(model):
    shapes = json.loads(str(PEERS[f"{model}.shapes"]))
    return {name: drawn(name, tuple(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("model", ["plain", "options"])
def test_outputs_are_those_of_a_twin_in_torch(model, tmp_path):
    tensors = tensors_of(model) | TABLES
    net, params = convert.lightning_dit(tensors, num_heads=3)
    p, options = (1, {}) if model == "plain" else (2, {"qk_norm": True, "shift": False})
    assert net == nets.LightningDiT(p, 48, 2, 3, num_classes=7, time_scale=1.0, **options)
    with jax.default_matmul_precision("highest"):
        out = jflow.field(net).apply(
            params,
            drawn("input.x", (2, 4 * p, 6 * p, 5)),
            jnp.array([0.25, 0.9]),
            jnp.array([3, 7]),
        )
    expected = PEERS[f"{model}.out"]
    assert np.max(np.abs(out - expected)) < 1e-5 * np.abs(expected).max()

    layout = convert.lightning_dit_layout(net, 5, image_size=6 * p)
    convert.save(tmp_path / "model.safetensors", layout, params)
    written = convert.read_safetensors(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        # tables: angles up to 5 in float32, of which the last bit may differ
        atol = 1e-6 if name in TABLES else 0
        np.testing.assert_allclose(written[name], tensor, rtol=0, atol=atol, err_msg=name)


def test_published_sizes():
    published = [  # parameters, width, layers, heads, patch, side, channels
        (130_556_192, 768, 12, 12, 1, 16, 32),
        (458_349_664, 1024, 24, 16, 2, 32, 32),
        (675_256_736, 1152, 28, 16, 1, 16, 32),
        (1_029_401_120, 1536, 24, 24, 1, 16, 32),
        (1_631_767_120, 1792, 28, 28, 1, 16, 32),
    ]
    for count, width, layers, heads, patch, side, channels in published:
        net = nets.LightningDiT(patch, width, layers, heads, num_classes=1000)
        shapes = jax.eval_shape(
            net.init, jax.random.key(0), jnp.zeros((1, side, side, channels)), jnp.zeros(1)
        )
        table = (side // patch) ** 2 * width  # of positions, a tensor of the file
        assert sum(p.size for p in jax.tree.leaves(shapes)) + table == count


def test_positions_and_time_of_each_token():
    """Equal tokens, which attention cannot tell apart, differ by their positions; one time for all
    is that time for each."""
    net, params = convert.lightning_dit(tensors_of("options"), num_heads=3)
    field, x, t = jflow.field(net), jnp.ones((1, 4, 6, 5)), jnp.full((1,), 0.3)
    out = field.apply(params, x, t)
    assert np.unique(np.round(np.asarray(out[0, ::2, ::2, 0]), 4)).size == 6
    np.testing.assert_allclose(field.apply(params, x, jnp.full((1, 6), 0.3)), out, atol=1e-5)


def test_the_program_does_not_grow_with_depth():
    x, t = jnp.zeros((5, 4, 6, 2)), jnp.zeros(5)  # 5: no number of layers

    def instructions(depth):
        net = nets.LightningDiT(2, 16, depth, 2, qk_norm=True)
        params = jax.eval_shape(lambda: net.init(jax.random.key(0), x, t))
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(net.apply(p, x, t))))
        return gradient.lower(params).as_text(dialect="hlo").count(" = ")

    assert instructions(24) == instructions(4) > 100


def test_bad_inputs():
    tensors = tensors_of("options")
    net, params = convert.lightning_dit(tensors, num_heads=3)
    field, t = jflow.field(net), jnp.zeros(1)
    with pytest.raises(ValueError, match=r"LightningDiT: expected patches of 20 .* 3 channels, 12"):
        field.apply(params, jnp.zeros((1, 8, 6, 3)), t)
    with pytest.raises(ValueError, match=r"LightningDiT: takes no cond.context"):
        cond = jflow.types.Condition(context=jnp.zeros((1, 2, 3)))
        field.apply(params, jnp.zeros((1, 8, 6, 5)), t, cond)
    with pytest.raises(ValueError, match=r"lightning_dit: expected num_heads.* width 48"):
        convert.lightning_dit(tensors)
    with pytest.raises(ValueError, match=r"lightning_dit: .* 'blocks.0.mlp.w3.weight' of 2 axes"):
        convert.lightning_dit({k: v for k, v in tensors.items() if ".w3." not in k}, num_heads=3)
    with pytest.raises(ValueError, match=r"expected 'feat_rope.freqs_cos' as jflow computes it"):
        turned = {"feat_rope.freqs_cos": TABLES["feat_rope.freqs_sin"]}
        convert.lightning_dit(tensors | turned, num_heads=3)
