"""Pictures of a published model from the command line."""

import json

import numpy as np
import pytest
from PIL import Image
from pipelines import write

from jflow.apps import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("published") / "schnell", "flux_schnell")


def sample(folder, out, *options):
    size = "--height", "16", "--width", "24", "--steps", "2"
    return cli.main(["sample", "--pretrained", str(folder), "--out", str(out), *size, *options])


def test_a_picture_for_each_prompt_and_seed(folder, tmp_path, capsys):
    """Numbered files that say how they were made; a picture does not depend on the others."""
    prompts = "a photo of a red cat", "two dogs"
    both = ("--prompt", prompts[0], "--prompt", prompts[1], "--num", "2", "--seed", "3")
    sample(folder, tmp_path / "all.png", *both)
    said = capsys.readouterr()
    assert f"all_4.png: seed 4, '{prompts[1]}'" in said.out + said.err
    pictures = [Image.open(tmp_path / f"all_{i}.png") for i in (1, 2, 3, 4)]
    assert all(picture.size == (24, 16) for picture in pictures)
    assert pictures[3].text["prompt"] == prompts[1]
    assert json.loads(pictures[3].text["options"])["seed"] == 4
    numbers = [np.asarray(picture) for picture in pictures]
    assert all(np.any(numbers[0] != other) for other in numbers[1:])
    sample(folder, tmp_path / "one.png", "--prompt", prompts[1], "--seed", "4", "--quiet")
    assert np.abs(np.asarray(Image.open(tmp_path / "one.png")) - numbers[3].astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "required with --pretrained: --prompt"),
        (("--prompt", "a cat", "--label", "3"), "--label goes with DIR alone"),
        (("--prompt", "a cat", "--guidance", "3"), "was distilled and takes none"),
        (("--prompt", "a cat", "--negative-prompt", "a dog"), "not guided by a second prompt"),
        (("--prompt", "a cat", "--height", "15"), "a width that 4 divides, got 15 and 24"),
        (("--prompt", "a red cat on the moon " * 20), "the limit is"),
    ],
)
def test_mistakes_are_said_in_one_line(folder, tmp_path, capsys, options, said):
    assert sample(folder, tmp_path / "x.png", *options) != 0
    text = capsys.readouterr().err
    assert said in text and "Traceback" not in text and not list(tmp_path.iterdir())


def test_a_run_or_a_published_model(tmp_path, capsys):
    assert cli.main(["sample", "--num", "3", "--out", str(tmp_path / "x.png")]) != 0
    assert "or --pretrained FOLDER" in capsys.readouterr().err
