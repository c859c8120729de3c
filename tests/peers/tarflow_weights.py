"""A tiny TarFlow as it is published: names and shapes of its tensors, written out from the code of
the authors (apple/ml-tarflow).

Of use to the script that makes the fixtures and to the test; it needs numpy alone.
"""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
EVENT, PATCH, WIDTH, HEAD, DEPTH, LAYERS, CLASSES = (4, 6, 3), 2, 64, 32, 2, 2, 3
TOKENS, SIZE = 6, PATCH**2 * 3
SHAPES: dict[str, tuple[int, ...]] = {"var": (TOKENS, SIZE)}
for _i in range(DEPTH):
    SHAPES |= {
        f"blocks.{_i}.pos_embed": (TOKENS, WIDTH),
        f"blocks.{_i}.class_embed": (CLASSES, 1, WIDTH),
        f"blocks.{_i}.proj_in.weight": (WIDTH, SIZE),
        f"blocks.{_i}.proj_in.bias": (WIDTH,),
        f"blocks.{_i}.proj_out.weight": (2 * SIZE, WIDTH),
        f"blocks.{_i}.proj_out.bias": (2 * SIZE,),
    }
    for _j in range(LAYERS):
        for _name, _shape in {
            "attention.norm": (WIDTH,),
            "attention.qkv": (3 * WIDTH, WIDTH),
            "attention.proj": (WIDTH, WIDTH),
            "mlp.norm": (WIDTH,),
            "mlp.main.0": (4 * WIDTH, WIDTH),
            "mlp.main.2": (WIDTH, 4 * WIDTH),
        }.items():
            SHAPES[f"blocks.{_i}.attn_blocks.{_j}.{_name}.weight"] = _shape
            SHAPES[f"blocks.{_i}.attn_blocks.{_j}.{_name}.bias"] = _shape[:1]


def original() -> dict[str, np.ndarray]:
    """Every tensor drawn at random, the variances positive, and the masks."""
    rng = np.random.default_rng(17)
    drawn = {name: 0.1 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    drawn["var"] = np.exp(5 * drawn["var"])
    drawn |= {f"blocks.{i}.attn_mask": np.tri(TOKENS) for i in range(DEPTH)}
    return {name: tensor.astype(np.float32) for name, tensor in drawn.items()}


def inputs() -> dict[str, np.ndarray]:
    """Images, latents, and labels of which -1 is none."""
    rng = np.random.default_rng(71)
    x = rng.standard_normal((2, *EVENT)).astype(np.float32)
    z = rng.standard_normal((2, *EVENT)).astype(np.float32)
    return {"x": x, "z": z, "y": np.array([2, -1])}
