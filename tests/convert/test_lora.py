"""LoRAs of SD3 and Flux as others write them: the outputs of diffusers, both ways."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jflow
from jflow import adapters, convert, paths
from jflow.types import Condition

PEERS = Path(__file__).parents[1] / "peers"
PIPELINES = {"sd35": "SD3LoraLoaderMixin", "flux_dev": "FluxLoraLoaderMixin"}
FILES = ("sd35.peft", "sd35.diffusers") + tuple(
    f"flux_dev.{kind}" for kind in ("peft", "diffusers", "kohya", "xlabs")
)


def drawn(name, shape):
    """The tensor or input of a name, as in peers/make_mmdit_fixtures.py."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return noise.astype(np.float32)
    scale = len(shape) == 1 and "bias" not in name
    return (scale + 0.12 * noise).astype(np.float32)


@cache
def fixture(file):
    return np.load(PEERS / file)


@cache
def model(name):
    """(network, params) of a base."""
    peers = fixture("mmdit.npz")
    shapes = json.loads(str(peers[f"{name}.diffusers.shapes"]))
    tensors = {key: drawn(key, tuple(shape)) for key, shape in shapes.items()}
    if name == "sd35":
        return convert.mmdit(tensors | {"pos_embed.pos_embed": peers["sd35.table"]})
    return convert.flux(tensors, rope_axes=(4, 6, 6), guidance=1 / 256)


@cache
def output(name):
    """params -> the velocity on the inputs of the peers, compiled once for all LoRAs of a base."""
    net, _ = model(name)
    velocity = paths.from_noise_time(jflow.field(net))
    size = (2, 6, 8, 16) if name == "sd35" else (2, 6, 4, 4)
    cond = Condition(
        context=drawn("input.context", (2, 5, 20)), vector=drawn("input.vector", (2, 24))
    )
    x, t = drawn("input.x", size), 1 - jnp.array([1 / 256, 0.625])

    @jax.jit
    def run(params):
        with jax.default_matmul_precision("highest"):
            return velocity.apply(params, x, t, cond)

    return run


def write_file(name, path):
    """A file of the peers."""
    peers = fixture("lora.npz")
    shapes = json.loads(str(peers[f"{name}.shapes"]))
    told = json.loads(str(peers[f"{name}.metadata"]))
    tensors = {
        key: np.float32(told[key])
        if key in told
        else 2 * drawn(key.removeprefix("base_model.model.").removeprefix("transformer."), shape)
        for key, shape in shapes.items()
    }
    config = {f"transformer.{key}": value for key, value in told.items() if key not in tensors}
    metadata = {"lora_adapter_metadata": json.dumps(config)} if config else {}
    convert.write_safetensors(path, tensors, metadata)


@pytest.mark.parametrize("file", FILES)
def test_merged_outputs_are_those_of_diffusers(file, tmp_path):
    """With fused names and split ones, several ranks and alphas, convolutions, and norms of which
    diffusers has the halves in the other order. Of the base shapes alone are read."""
    name = file.split(".")[0]
    net, base = model(name)
    path = tmp_path / "lora.safetensors"
    write_file(file, path)
    adapter, params = convert.lora(path, net, jax.eval_shape(lambda: base))
    v = output(name)(adapters.merge(base, adapter, params))
    expected = fixture("lora.npz")[f"{file}.out"]
    plain = fixture("lora.npz")[f"{name}.base.out"]
    assert np.abs(expected - plain).max() > 0.1 * np.abs(plain).max()
    error = np.max(np.abs(v + expected), axis=(1, 2, 3)) / np.abs(expected).max()
    assert error[0] < 1e-5 and error[1] < 1e-4


def test_single_blocks_of_x_labs(tmp_path):
    """Its q, k and v are the first outputs of 'linear1', and its projection is 'linear2'; the same
    matrices under the names of kohya and diffusers are the oracle."""
    net, base = model("flux_dev")
    shapes = jax.eval_shape(lambda: base)["single_blocks"]
    width, wide = net.width, shapes["out"]["kernel"].shape[1]
    down, up = drawn("down", (2, width)), drawn("up", (3 * width, 2))
    out_down, out_up = drawn("out down", (1, wide)), drawn("out up", (width, 1))
    start = "single_blocks.1.processor"
    files = {
        "xlabs": {
            f"{start}.qkv_lora.down.weight": down,
            f"{start}.qkv_lora.up.weight": up,
            f"{start}.proj_lora.down.weight": out_down,
            f"{start}.proj_lora.up.weight": out_up,
        },
        "others": {
            "lora_unet_single_blocks_1_linear2.lora_down.weight": out_down,
            "lora_unet_single_blocks_1_linear2.lora_up.weight": out_up,
        },
    }
    for name, part in zip("qkv", np.split(up, 3), strict=True):
        module = f"transformer.single_transformer_blocks.1.attn.to_{name}"
        files["others"] |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": part}
    found = {}
    for name, tensors in files.items():
        convert.write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        found[name] = convert.lora(tmp_path / f"{name}.safetensors", net, base)[1]
    jax.tree.map(np.testing.assert_array_equal, found["xlabs"], found["others"])
    own = found["xlabs"]["single_blocks"]["in"]["kernel"]
    change = np.asarray(own["A"][1] @ own["B"][1])
    np.testing.assert_allclose(change[:, : 3 * width], down.T @ up.T, atol=1e-5)
    assert not np.any(change[:, 3 * width :]) and not np.any(own["A"][0])


def own_params(name):
    """A LoRA of every linear module of a base, as jflow trains it."""
    made = {}
    for path, leaf in flatten_dict(model(name)[1], sep="/").items():
        if path.endswith("kernel"):
            *depth, inputs, outputs = leaf.shape
            made[path] = {
                "A": 2 * drawn(f"{path}/A", (*depth, inputs, 2)),
                "B": 2 * drawn(f"{path}/B", (*depth, 2, outputs)),
            }
    return unflatten_dict(made, sep="/")


def write_own(name, path):
    convert.save_lora(path, model(name)[0], own_params(name), scale=0.5)


@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_reads_what_is_written(name, tmp_path):
    """The peers read the file that is written here; read back it has the same bits."""
    net, base = model(name)
    params = own_params(name)
    merged = adapters.merge(base, adapters.lora(2, alpha=1.0), params)
    expected = fixture("lora.npz")[f"{name}.own.out"]
    error = np.max(np.abs(output(name)(merged) + expected), axis=(1, 2, 3))
    assert error[0] < 1e-5 * np.abs(expected).max() and error[1] < 1e-4 * np.abs(expected).max()
    write_own(name, tmp_path / "lora.safetensors")
    _, again = convert.lora(tmp_path / "lora.safetensors", net, base)
    for path, leaf in flatten_dict(again, sep="/").items():
        scale = 0.5 if path.endswith("B") else 1.0
        np.testing.assert_array_equal(leaf, scale * flatten_dict(params, sep="/")[path])


def test_modules_in_one_kernel(tmp_path):
    """A fused file has one A for q, k and v, a split one has several: their ranks add up, unless
    they are the same numbers."""
    net, base = model("flux_dev")
    shapes = {}
    for kind in ("kohya", "peft"):
        write_file(f"flux_dev.{kind}", tmp_path / f"{kind}.safetensors")
        _, params = convert.lora(tmp_path / f"{kind}.safetensors", net, base)
        shapes[kind] = params["double_blocks"]["image"]["heads"]["qkv"]["kernel"]["A"].shape
    assert shapes == {"kohya": (2, 32, 2), "peft": (2, 32, 6)}


LAYOUT = convert.Layout(
    "two Dense", (convert.Weight("fc.weight", "kernel", convert.LINEAR), convert.Weight("n", "n"))
)
BASE = {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32), "n": np.zeros(3)}
A, B = np.ones((1, 3), np.float32), np.ones((2, 1), np.float32)
BAD = {
    "unknown names": ({"fc.lora_A.weight": A, "fc.lora_B.weight": B, "n": B}, "got also n"),
    "another module": (
        {"transformer.gc.lora_A.weight": A, "transformer.gc.lora_B.weight": B},
        r"two Dense has no modules of these names: transformer\.gc; 0 others.*another base",
    ),
    "half a pair": ({"fc.lora_A.weight": A}, r"got fc\.lora_A\.weight$"),
    "nothing": ({"fc.alpha": np.float32(1)}, r"got also fc\.alpha"),
    "two types": (
        {"fc.lora_A.weight": A, "fc.lora_B.weight": B.astype(np.float16)},
        "'fc.lora_A.weight' is float32, 'fc.lora_B.weight' is float16",
    ),
    "two ranks": (
        {"fc.lora_A.weight": A, "fc.lora_B.weight": np.ones((2, 2), np.float32)},
        r"got \[1, 3\] and \[2, 2\]",
    ),
    "another width": (
        {"fc.lora_A.weight": np.ones((1, 4), np.float32), "fc.lora_B.weight": B},
        r"expected 'fc' from \[3\] to 2 numbers, got from \[4\] to 2: .*another base",
    ),
    "too large a rank": (
        {
            "fc.lora_A.weight": np.ones((3, 3), np.float32),
            "fc.lora_B.weight": np.ones((2, 3), np.float32),
        },
        "'fc', from 3 to 2 numbers, of at most the lower rank, got 3",
    ),
    "one module twice": (
        {f"{p}fc.lora_A.weight": A for p in ("", "transformer.")}
        | {f"{p}fc.lora_B.weight": B for p in ("", "transformer.")},
        "'fc' and 'transformer.fc' are one module",
    ),
    "DoRA": (
        {"fc.lora_A.weight": A, "fc.lora_B.weight": B, "fc.lora_magnitude_vector.weight": B},
        "DoRA, whose magnitudes are not supported",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_used_is_an_error(name, tmp_path):
    tensors, message = BAD[name]
    convert.write_safetensors(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        convert.lora(tmp_path / "lora.safetensors", LAYOUT, BASE)


def test_control_loras_and_text_encoders(tmp_path):
    net, base = model("flux_dev")
    file = tmp_path / "lora.safetensors"
    wide = {
        "x_embedder.lora_A.weight": np.ones((1, 32)),
        "x_embedder.lora_B.weight": np.ones((32, 1)),
    }
    convert.write_safetensors(file, wide)
    with pytest.raises(
        ValueError, match=r"from \[32\] to 32.*Control LoRA, which widens the input"
    ):
        convert.lora(file, net, base)
    text = {"text_encoder.q.lora_A.weight": A, "text_encoder.q.lora_B.weight": B}
    pair = {"transformer.fc.lora_A.weight": A, "transformer.fc.lora_B.weight": B}
    convert.write_safetensors(file, text | pair)
    with pytest.raises(ValueError, match=r"text_encoder\.q; 1 others.*prefix='transformer.'"):
        convert.lora(file, LAYOUT, BASE)
    _, params = convert.lora(file, LAYOUT, BASE, prefix="transformer.", dtype=jnp.bfloat16)
    assert params["kernel"]["A"].dtype == jnp.bfloat16


def test_a_folder_of_peft_and_what_cannot_be_written(tmp_path):
    """peft keeps alpha in a file beside; with rsLoRA it is divided by the root of the rank."""
    config = {"lora_alpha": 6, "use_rslora": True, "alpha_pattern": None, "r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pair = {
        "base_model.model.fc.lora_A.weight": np.ones((2, 3), np.float32),
        "base_model.model.fc.lora_B.weight": np.ones((2, 2), np.float32),
    }
    convert.write_safetensors(tmp_path / "adapter_model.safetensors", pair)
    _, params = convert.lora(tmp_path, LAYOUT, BASE)
    np.testing.assert_allclose(params["kernel"]["B"], np.full((2, 2), 6 / 2**0.5), rtol=1e-6)
    with pytest.raises(ValueError, match=r"save_lora: expected params at the kernels of two Dense"):
        convert.save_lora(tmp_path / "x", LAYOUT, {"n": {"A": A, "B": B}})
    with pytest.raises(ValueError, match=r"'A' \['in', 'rank'\].*got {'A': \[1, 3\]}"):
        convert.save_lora(tmp_path / "x", LAYOUT, {"kernel": {"A": A}})
    with pytest.raises(TypeError, match=r"expected net to be nets\.MMDiT, nets\.Flux or a Layout"):
        convert.save_lora(tmp_path / "x", {}, {})
