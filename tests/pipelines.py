"""Tiny folders of SD3 and Flux pipelines, as diffusers writes them, with weights made here.

`tests/pipelines.py FOLDER MODEL` writes one, where PYTHONPATH has the repository.
"""

import json
import sys
from pathlib import Path

import numpy as np

from jflow import convert

PEERS = np.load(Path(__file__).parent / "peers" / "pipeline.npz")
MODELS = "sd3", "flux_dev", "flux_schnell"


def drawn(name, shape):
    """The tensor of a name, as in peers/make_pipeline_fixtures.py."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if len(shape) < 2:
        return (("bias" not in name) + 0.1 * noise).astype(np.float32)
    return (0.9 * noise / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def write(folder, model):
    """The folder of a model with its weights; its path."""
    start = f"{model}.file."
    for name in PEERS.files:
        if name.startswith(start):
            path = folder / name.removeprefix(start)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PEERS[name].tobytes())
    for file, shapes in json.loads(str(PEERS[f"{model}.shapes"])).items():
        part = file.split("/")[0]
        tensors = {
            name: PEERS[f"{model}.table"]
            if name == "pos_embed.pos_embed"
            else drawn(f"{part}/{name}", shape)
            for name, shape in shapes.items()
        }
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        convert.write_safetensors(folder / file, tensors)
    return folder


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
