"""Folders of SD3 and Flux as diffusers writes them: its images, and what is wrong with a folder."""

import json
import shutil
from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import MODELS, PEERS, write

from jflow import convert, guidance, solvers, train

PROMPTS = ["a photo of a red cat on the moon", "Two dogs, in soft light: a WOODCUT (1896)"]
NEGATIVE = "blurry, watermark"
SIZE = {"height": 16, "width": 24}
LENGTH = 56


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {model: write(root / model, model) for model in MODELS}


def without(folder, to, *names):
    """A copy of a folder, whose files are links, without the files and folders of these names."""
    shutil.copytree(folder, to, copy_function=lambda a, b: Path(b).hardlink_to(a))
    for name in names:
        path = to / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return to


def edited(folder, to, name, **changes):
    """A copy with other entries in one of its JSON files."""
    text = json.loads((folder / name).read_text()) | changes
    without(folder, to, name)
    (to / name).write_text(json.dumps(text))
    return to


def sampler(model, velocity):
    """cond -> images in [0, 1], of four steps of Euler, from the noise of the peers."""
    x0 = np.random.default_rng(list(b"noise")).standard_normal((2, *model.shape(**SIZE)))
    method = solvers.on_grid(model.grid(4, **SIZE), diffrax.Euler())
    sample = jax.jit(partial(solvers.sample, velocity, method=method))

    def images(cond):
        x1, _ = sample(model.params["velocity"], x0.astype(np.float32), cond)
        image = model.decode(model.params["autoencoder"], x1)
        return np.clip(np.asarray(image) / 2 + 0.5, 0, 1)

    return images


def rows(text, *numbers):
    return jax.tree.map(lambda x: x[np.array(numbers)], text)


def agree(found, name):
    """Within 1/255 on 99.9% of pixels was asked; float32 does better."""
    expected = PEERS[name]
    assert found.shape == expected.shape
    assert np.mean(np.abs(found - expected) < 1 / 255) > 0.999
    assert np.abs(found - expected).max() < 0.1 / 255


@pytest.fixture(scope="module")
def sd3(folders):
    """The pipeline, and what draws its images under guidance: (cond, null) -> images."""
    model = convert.load_pipeline(folders["sd3"])
    return model, sampler(model, guidance.negative(model.velocity, guidance.scaled(4.0)))


def test_images_of_sd3_are_those_of_diffusers(sd3):
    model, images = sd3
    text = model.cond(model.params["text"], [*PROMPTS, "", NEGATIVE], length=LENGTH)
    np.testing.assert_allclose(text.context[:1], PEERS["sd3.context"], atol=1e-5)
    np.testing.assert_allclose(text.vector[:1], PEERS["sd3.vector"], atol=1e-5)
    agree(images((rows(text, 0, 1), rows(text, 2, 2))), "sd3.images")
    agree(images((rows(text, 0, 1), rows(text, 3, 3))), "sd3.negative")
    found = model.encode(model.params["autoencoder"], jnp.zeros((1, *SIZE.values(), 3)))
    assert found.shape == (1, *model.shape(**SIZE))


def test_sd3_without_t5(folders, sd3, tmp_path):
    """Its index says so, or it was not downloaded, which is said: zeros stand for its tokens."""
    _, images = sd3
    parts = "text_encoder_3", "tokenizer_3"
    gone = without(folders["sd3"], tmp_path / "gone", *parts)
    with pytest.warns(UserWarning, match="no folder text_encoder_3.*zeros stand for the tokens"):
        convert.load_pipeline(gone, parts=("text",))
    (gone / "model_index.json").unlink()
    (gone / "model_index.json").write_text(str(PEERS["sd3.without_t5.index"]))
    model = convert.load_pipeline(gone, parts=("text",))
    text = model.cond(model.params["text"], [*PROMPTS, ""], length=LENGTH)
    assert not text.context[:, -LENGTH:].any()
    agree(images((rows(text, 0, 1), rows(text, 2, 2))), "sd3.without_t5")


@pytest.mark.parametrize("name", ("flux_dev", "flux_schnell"))
def test_images_of_flux_are_those_of_diffusers(folders, name):
    model = convert.load_pipeline(folders[name])
    text = model.cond(model.params["text"], PROMPTS, length=LENGTH)
    np.testing.assert_allclose(text.context[:1], PEERS["flux_dev.context"], atol=1e-5)
    np.testing.assert_allclose(text.vector[:1], PEERS["flux_dev.vector"], atol=1e-5)
    agree(sampler(model, model.velocity)(text), f"{name}.images")


def test_what_is_published_beside_the_weights(folders):
    """The noise levels of the schedulers, for two sizes of images, and the settings."""
    plans = {name: convert.load_pipeline(folder, parts=()) for name, folder in folders.items()}
    for name, plan in plans.items():
        assert plan.params == {}
        few, many = plan.grid(4, **SIZE), plan.grid(28, 256, 256) if name != "sd3" else plan.grid()
        np.testing.assert_allclose(1 - few, PEERS[f"{name}.sigmas"], atol=1e-7)
        np.testing.assert_allclose(1 - many, PEERS[f"{name}.sigmas_28"], atol=1e-7)
        with pytest.raises(ValueError, match=r"the part 'text' of .* was not read: see `parts`"):
            plan.cond({}, "a cat")
    size = {"height": 16, "width": 16}
    assert plans["sd3"].settings == {"steps": 28, **size, "guidance": 7.0, "null": ""}
    size = {"height": 256, "width": 256}
    assert plans["flux_dev"].settings == {"steps": 28, **size, "guidance": 3.5}
    assert plans["flux_schnell"].settings == {"steps": 4, **size}
    np.testing.assert_allclose(
        plans["flux_schnell"].grid(4, shift=3.0), solvers.grids.shifted(np.arange(5) / 4, 3.0)
    )
    assert plans["sd3"].shape() == (8, 8, 16)
    for height, width, said in (
        (18, 16, "a height and a width that 4 divides, got 18 and 16; near them are 16 and 16"),
        (64, 16, "at most 32, up to which .* has positions, got 64"),
        (0, 16, "height"),
    ):
        with pytest.raises(ValueError, match=said):
            plans["sd3"].shape(height, width)


def test_types_and_places_of_the_params(folders, tmp_path):
    """Files in float16 become bfloat16, of several types are refused, and shards are straight."""
    mesh = train.make_mesh({"data": -1})
    sharding = partial(train.shardings, mesh=mesh, rules=[(".*", train.fsdp("data"))])
    file = "text_encoder/model.safetensors"
    tensors = convert.read_safetensors(folders["flux_dev"] / file)
    gone = without(folders["flux_dev"], tmp_path / "half", file)
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    convert.write_safetensors(gone / file, half)
    model = convert.load_pipeline(gone, parts=("text",), sharding=sharding)
    clip, t5 = (jax.tree.leaves(model.params["text"][f"text_encoder{n}"]) for n in ("", "_2"))
    assert {leaf.dtype for leaf in clip} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in t5} == {jnp.dtype(jnp.float32)}
    assert {leaf.sharding.mesh for leaf in [*clip, *t5]} == {mesh}
    assert any("data" in leaf.sharding.spec for leaf in t5)

    name = next(iter(half))
    convert.write_safetensors(gone / file, half | {name: tensors[name]})
    said = r"one type in .*text_encoder, got float32 \(1, such as .*float16 \(.*give the dtype"
    with pytest.raises(ValueError, match=said):
        convert.load_pipeline(gone, parts=("text",))
    model = convert.load_pipeline(gone, parts=("text",), dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}
    convert.write_safetensors(gone / file, half | {name: tensors[name].astype(np.int8)})
    with pytest.raises(ValueError, match=f"got others in {name}: quantized weights are not read"):
        convert.load_pipeline(gone, parts=("text",), dtype=jnp.float32)


def test_the_plain_file_of_several(folders, tmp_path):
    """Folders of the hub hold a part in several precisions."""
    file = "text_encoder/model.safetensors"
    gone = without(folders["flux_dev"], tmp_path / "both")
    convert.write_safetensors(gone / file.replace("model", "model.fp16"), {"x": np.zeros(1)})
    assert convert.load_pipeline(gone, parts=("text",)).params.keys() == {"text"}


def test_folders_that_are_not_whole(folders, tmp_path):
    sd3, dev, empty = folders["sd3"], folders["flux_dev"], tmp_path / "empty"
    empty.mkdir()
    to = (tmp_path / str(i) for i in range(100))
    index, scheduler = "model_index.json", "scheduler/scheduler_config.json"
    no_clip = {"text_encoder_2": [None, None], "tokenizer_2": [None, None]}
    for folder, error, said in (
        (tmp_path / "none", FileNotFoundError, "model_index.json .*there is no such folder"),
        (sd3 / index, FileNotFoundError, "it is a file: for a single one see convert.mmdit"),
        (sd3 / "vae", FileNotFoundError, f"give the folder around it, {sd3}"),
        (empty, FileNotFoundError, r"as diffusers writes it.*there is nothing"),
        (
            edited(sd3, next(to), index, _class_name="StableDiffusionXLPipeline"),
            ValueError,
            "StableDiffusion3Pipeline or FluxPipeline, got StableDiffusionXLPipeline",
        ),
        (
            edited(sd3, next(to), index, **no_clip),
            ValueError,
            "has no text_encoder_2, and StableDiffusion3Pipeline needs it; T5, .* may be left out",
        ),
        (
            edited(dev, next(to), index, **no_clip),
            ValueError,
            "has no text_encoder_2, and FluxPipeline needs it$",
        ),
        (
            without(sd3, next(to), "text_encoder"),
            FileNotFoundError,
            "expected a folder text_encoder in .*, which its model_index.json names",
        ),
        (
            without(sd3, next(to), "tokenizer_2"),
            FileNotFoundError,
            "expected a folder tokenizer_2 in .*, the vocabulary of text_encoder_2",
        ),
        (
            without(sd3, next(to), "tokenizer_2/merges.txt"),
            FileNotFoundError,
            "tokenizer_2 one of tokenizer.json; vocab.json and merges.txt;",
        ),
        (
            without(sd3, next(to), "vae/config.json"),
            FileNotFoundError,
            "there is no file .*vae/config.json: download it too",
        ),
        (
            edited(sd3, next(to), "vae/config.json", latent_channels=4),
            ValueError,
            "4 channels in vae and of 16 in transformer: they are of different models",
        ),
        (
            edited(sd3, next(to), scheduler, use_karras_sigmas=True),
            ValueError,
            "FlowMatchEulerDiscreteScheduler without .* got use_karras_sigmas=True",
        ),
        (
            edited(sd3, next(to), scheduler, _class_name="DDIMScheduler"),
            ValueError,
            "got _class_name='DDIMScheduler'",
        ),
    ):
        with pytest.raises(error, match=said):
            convert.load_pipeline(folder, parts=("text",))
    with pytest.raises(ValueError, match=r"parts among text, velocity, autoencoder, got \['vae'\]"):
        convert.load_pipeline(sd3, parts=("vae",))
    with pytest.raises(ValueError, match=r"reads no guidance, got guidance=2.0: guide it by"):
        convert.load_pipeline(sd3, guidance=2.0)
    with pytest.raises(ValueError, match=r"reads no guidance, got .*it was distilled"):
        convert.load_pipeline(folders["flux_schnell"], guidance=2.0)


def test_prompts_over_the_limit(sd3):
    model, _ = sd3
    long = "a red cat on the moon, " * 5
    said = r"load_pipeline: text_encoder: .*prompt 1 has 3\d tokens.*the limit is 32"
    with pytest.raises(ValueError, match=said):
        model.cond(model.params["text"], ["a cat", long])
    with pytest.raises(ValueError, match="at least one prompt, got none"):
        model.cond(model.params["text"], [])
