"""A picture of a published model whose weights are split over devices."""

import numpy as np
from PIL import Image
from pipelines import write
from subprocesses import run_python


def test_it_is_the_picture_of_one_device(tmp_path):
    """Within one of 255 levels, since sums over the parts of a weight round in another order."""
    folder = write(tmp_path / "sd3", "sd3")
    pictures = []
    for name, mesh in (("one", ()), ("four", ("--mesh", "data=2,fsdp=2"))):
        out = tmp_path / f"{name}.png"
        options = ("--prompt", "a photo of a red cat", "--steps", "2", "--seed", "3", "--quiet")
        command = ("sample", "--pretrained", folder, "--out", out, *options, *mesh)
        run_python("-m", "jflow.apps.cli", *command, devices=4)
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert pictures[0].std() > 1
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
