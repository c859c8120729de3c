"""A LoRA is trained on a published folder by the config of experiments/lora_pipeline, and drawn
with."""

import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from pipelines import write

import jflow
from jflow import convert
from jflow.apps import cli

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "lora_pipeline"
PROMPT = "a red square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("published") / "schnell", "flux_schnell")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The workdir of a run, and its LoRA as a file."""
    made = tmp_path_factory.mktemp("lora")
    keys = f"folder={folder}", "short=True", "learning_rate=0.05", "rank=2"
    command = ["train", str(EXPERIMENT), *keys, "--workdir", str(made / "run"), "--quiet"]
    assert cli.main(command) == 0
    before = sys.argv
    try:
        sys.argv = ["export.py", str(made / "run"), "--out", str(made / "lora.safetensors")]
        runpy.run_path(str(EXPERIMENT / "export.py"), run_name="__main__")
    finally:
        sys.argv = before
    return made / "run", made / "lora.safetensors"


def drawn(folder, out, *options):
    size = "--height", "16", "--width", "24", "--steps", "2", "--quiet"
    command = ["sample", "--pretrained", str(folder), "--out", str(out), *size, *options]
    assert cli.main([*command, "--prompt", PROMPT]) == 0
    with Image.open(out) as image:
        return np.asarray(image).astype(int), json.loads(image.text["options"])


def test_its_checkpoint_holds_the_lora_alone(folder, run):
    loaded = jflow.load(run[0])
    base = convert.load_pipeline(folder, parts=("velocity",)).params["velocity"]
    (checkpoint,) = (run[0] / "checkpoints").iterdir()
    leaves = json.loads((checkpoint / "manifest.json").read_text())["leaves"]
    assert leaves and not [name for name in leaves if name.startswith("frozen")]
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    whole = sum(x.nbytes for x in jax.tree.leaves(base))
    own = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    assert own < 0.2 * whole and size < whole
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(loaded.params))


def test_the_run_and_the_command_line_draw_with_it(folder, run, tmp_path):
    """The folder with the file draws another picture than without; a LoRA of zeros the same."""
    workdir, file = run
    plain, said = drawn(folder, tmp_path / "plain.png")
    assert "lora" not in said
    adapted, said = drawn(folder, tmp_path / "adapted.png", "--lora", str(file))
    assert said["lora"] == [str(file)] and np.abs(adapted - plain).max() > 10
    tensors = convert.read_safetensors(file)
    half = {n: x / 2 if ".lora_B." in n else x for n, x in tensors.items()}
    convert.write_safetensors(tmp_path / "half.safetensors", half)
    twice = ("--lora", str(tmp_path / "half.safetensors")) * 2
    assert np.abs(drawn(folder, tmp_path / "twice.png", *twice)[0] - adapted).max() <= 1
    nothing = {n: 0 * x if ".lora_B." in n else x for n, x in tensors.items()}
    convert.write_safetensors(tmp_path / "zeros.safetensors", nothing)
    zeros, _ = drawn(folder, tmp_path / "zeros.png", "--lora", str(tmp_path / "zeros.safetensors"))
    assert np.abs(zeros - plain).max() <= 1

    out = tmp_path / "run.png"
    assert cli.main(["sample", str(workdir), "--num", "2", "--out", str(out), "--quiet"]) == 0
    with Image.open(out) as image:
        assert image.size == (2 * 24 + 3, 16 + 2)


def test_mistakes_are_said_in_one_line(folder, run, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    convert.write_safetensors(other, {"unet.x.lora_A.weight": np.ones((2, 3), np.float32)})
    begin = "sample", "--out", str(tmp_path / "x.png")
    of_run = str(run[0]), "--num", "1"
    published = ("--pretrained", str(folder), "--prompt", PROMPT, "--height", "16", "--width", "24")
    for command, said in (
        ((*begin, *published, "--lora", str(other)), "lora: "),
        ((*begin, *published, "--lora", str(tmp_path / "none.safetensors")), "there is no file"),
        (
            (*begin, *of_run, "--lora", str(other)),
            "--lora goes with --pretrained",
        ),
        (("train", str(EXPERIMENT), "--workdir", str(tmp_path / "run")), "set folder=FOLDER"),
    ):
        assert cli.main(list(command)) != 0
        text = capsys.readouterr().err
        assert said in text and "Traceback" not in text, text


def test_pictures_and_their_captions(tmp_path):
    config = runpy.run_path(str(EXPERIMENT / "config.py"))
    for name, color, size in (("b.png", (255, 0, 0), (40, 20)), ("a.jpg", (0, 0, 0), (20, 40))):
        Image.new("RGB", size, color).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"picture {name}\n")
    images, captions = config["read_pictures"](str(tmp_path), 16, 24)
    assert captions == ["picture a.jpg", "picture b.png"] and images.shape == (2, 16, 24, 3)
    np.testing.assert_array_equal(images[1], np.broadcast_to([1.0, -1, -1], (16, 24, 3)))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a caption beside a.jpg, in a .txt of its name"):
        config["read_pictures"](str(tmp_path), 16, 24)
