"""Tiny text encoders and their vocabularies, as they are published.

Of use to the scripts that make fixtures and to the tests; it needs numpy alone. The vocabularies in
text/ and the names in text.npz were written by make_text_fixtures.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FOLDER, FILE = HERE / "text", HERE / "text.npz"
PROMPTS = (
    "",
    "A photo of a cat, sitting on the mat!",
    "the  DOG's   tail\twasn't\nwagging; it'll rain in 1984...",
    "Überraschung: naïve cafés, e\u0301clair, ﬁne ① ｆｕｌｌ Ｗidth",
    "猫が寝る 🐈\u200d⬛ and 🎨 — “quoted”",
    "!!! wow! </s> <pad> <|endoftext|> <extra_id_3>x",
    " \u00a0 leading and trailing \u3000 ",
)
WIDTH = 32
CLIP = {
    "hidden_size": WIDTH,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "projection_dim": 20,
}
T5 = {
    "d_model": WIDTH,
    "d_kv": 6,
    "d_ff": 44,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
CLIP_END, CLIP_SIZE, T5_SIZE = 639, 640, 184  # T5 has some rows more than the 180 ids
CONFIGS = {
    "clip_l": CLIP | {"vocab_size": CLIP_SIZE, "hidden_act": "quick_gelu", "eos_token_id": 2},
    "clip_g": CLIP | {"vocab_size": CLIP_SIZE, "hidden_act": "gelu", "eos_token_id": CLIP_END},
    "t5": T5 | {"vocab_size": T5_SIZE},
}
PADS = {"clip_l": "<|endoftext|>", "clip_g": "!"}


def drawn(name: str, shape) -> np.ndarray:
    """The tensor of a name, none of it zero; the scales of norms lie around 1."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    scale = len(shape) == 1 and "bias" not in name
    return (scale + 0.15 * noise).astype(np.float32)


def tensors(model: str) -> dict[str, np.ndarray]:
    """The weights under the names that transformers saves."""
    shapes = json.loads(str(np.load(FILE)[f"{model}.shapes"]))
    return {name: drawn(name, shape) for name, shape in shapes.items()}


def ids(model: str) -> np.ndarray:
    """Two prompts of 9 ids; that of CLIP-G has an id above that of its end token's first place."""
    size = CONFIGS[model]["vocab_size"]
    found = np.random.default_rng(len(model)).integers(3, size - 2, (2, 9))
    if model != "t5":
        found[0, 5:], found[1, 7:] = CLIP_END, CLIP_END
    return found


def mask() -> np.ndarray:
    """What T5 sees of these prompts."""
    return np.arange(9)[None] < np.array([[6], [9]])


def vocabulary(model: str, folder: Path, *, whole: bool = False) -> Path:
    """A folder with the files of a tokenizer: tokenizer.json where `whole`, or the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "t5" if model == "t5" else "clip"
    older = {"t5": ["spiece.model"], "clip": ["vocab.json", "merges.txt"]}[kind]
    if whole:
        shutil.copy(FOLDER / f"{kind}.json", folder / "tokenizer.json")
    for name in () if whole else older:
        shutil.copy(FOLDER / name, folder)
    config = {"model_max_length": 77, "pad_token": PADS.get(model, "<pad>"), "eos_token": "</s>"}
    if kind == "clip":
        config |= {name: "<|endoftext|>" for name in ("eos_token", "unk_token")}
        config |= {"bos_token": "<|startoftext|>", "tokenizer_class": "CLIPTokenizer"}
    else:
        config |= {"unk_token": "<unk>", "extra_ids": 100, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
