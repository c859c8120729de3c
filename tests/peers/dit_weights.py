"""A tiny DiT as it is published: names and shapes of its tensors, written out from the code of the
authors (facebookresearch/DiT, willisma/SiT), and the same tensors under the names of diffusers.

Of use to the script that makes the fixtures and to the test; it needs numpy alone.
"""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

CHANNELS, PATCH, WIDTH, HEADS, DEPTH, CLASSES, SIDE = 4, 2, 48, 4, 2, 7, 4
SHAPES = {
    "x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
    "x_embedder.proj.bias": (WIDTH,),
    "t_embedder.mlp.0.weight": (WIDTH, 256),
    "t_embedder.mlp.0.bias": (WIDTH,),
    "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
    "t_embedder.mlp.2.bias": (WIDTH,),
    "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
    "final_layer.linear.weight": (PATCH**2 * 2 * CHANNELS, WIDTH),  # with learned variances
    "final_layer.linear.bias": (PATCH**2 * 2 * CHANNELS,),
    "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
    "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
}
for _i in range(DEPTH):
    for _name, _out, _in in (
        ("attn.qkv", 3, 1),
        ("attn.proj", 1, 1),
        ("mlp.fc1", 4, 1),
        ("mlp.fc2", 1, 4),
        ("adaLN_modulation.1", 6, 1),
    ):
        SHAPES[f"blocks.{_i}.{_name}.weight"] = (_out * WIDTH, _in * WIDTH)
        SHAPES[f"blocks.{_i}.{_name}.bias"] = (_out * WIDTH,)


def original() -> dict[str, np.ndarray]:
    """Every tensor drawn at random, and the table of positions of 4 x 4 patches."""
    rng = np.random.default_rng(16)
    drawn = {name: 0.15 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    drawn["pos_embed"] = positions(SIDE, SIDE)[None]
    return {name: tensor.astype(np.float32) for name, tensor in drawn.items()}


def positions(rows: int, columns: int) -> np.ndarray:
    """[rows columns, width]: sines and cosines of the column, then of the row, token by token."""
    table = np.zeros((rows, columns, WIDTH))
    for k in range(WIDTH // 4):
        frequency = 10_000.0 ** (-k / (WIDTH // 4))
        table[:, :, k] = np.sin(np.arange(columns) * frequency)[None]
        table[:, :, k + WIDTH // 4] = np.cos(np.arange(columns) * frequency)[None]
        table[:, :, k + WIDTH // 2] = np.sin(np.arange(rows) * frequency)[:, None]
        table[:, :, k + 3 * WIDTH // 4] = np.cos(np.arange(rows) * frequency)[:, None]
    return table.reshape(-1, WIDTH)


def of_diffusers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same numbers under the names of DiTTransformer2DModel."""
    found = {}
    for part in ("weight", "bias"):
        found[f"pos_embed.proj.{part}"] = tensors[f"x_embedder.proj.{part}"]
        found[f"proj_out_1.{part}"] = tensors[f"final_layer.adaLN_modulation.1.{part}"]
        found[f"proj_out_2.{part}"] = tensors[f"final_layer.linear.{part}"]
        for i in range(DEPTH):
            ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            embedder = f"{theirs}.norm1.emb.timestep_embedder"
            found[f"{embedder}.linear_1.{part}"] = tensors[f"t_embedder.mlp.0.{part}"]
            found[f"{embedder}.linear_2.{part}"] = tensors[f"t_embedder.mlp.2.{part}"]
            found[f"{theirs}.norm1.linear.{part}"] = tensors[f"{ours}.adaLN_modulation.1.{part}"]
            q, k, v = np.split(tensors[f"{ours}.attn.qkv.{part}"], 3)
            found[f"{theirs}.attn1.to_q.{part}"] = q
            found[f"{theirs}.attn1.to_k.{part}"] = k
            found[f"{theirs}.attn1.to_v.{part}"] = v
            found[f"{theirs}.attn1.to_out.0.{part}"] = tensors[f"{ours}.attn.proj.{part}"]
            found[f"{theirs}.ff.net.0.proj.{part}"] = tensors[f"{ours}.mlp.fc1.{part}"]
            found[f"{theirs}.ff.net.2.{part}"] = tensors[f"{ours}.mlp.fc2.{part}"]
    for i in range(DEPTH):
        name = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        found[name] = tensors["y_embedder.embedding_table.weight"]
    return found


def inputs() -> dict[str, np.ndarray]:
    """Images of 4 x 6 patches, times of SiT and of DiT, and labels, one of them the null label."""
    rng = np.random.default_rng(61)
    return {
        "x": rng.standard_normal((2, 8, 12, CHANNELS)).astype(np.float32),
        "t": np.array([[0.3, 0.9], [17, 903]], np.float32),
        "y": np.array([3, CLASSES]),
    }
