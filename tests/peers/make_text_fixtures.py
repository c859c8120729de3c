"""Writes tiny vocabularies of CLIP and T5, and what transformers computes with them and with tiny
text encoders, so that the tests need no torch.

    pip install torch transformers tokenizers sentencepiece
    python tests/peers/make_text_fixtures.py

Written with torch 2.13.0, transformers 5.24.0, tokenizers 0.23.3, sentencepiece 0.2.3. The weights
are drawn from their names (`text_encoders.drawn`), here and in the tests; kept are the vocabularies
(text/), the names that transformers saves, ids and features. T5's own rules of normalization (NFKC
and more) take 240 kB; the tiny vocabulary has a few of them.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import text_encoders as text
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.t5.modeling_t5 import T5Attention

CORPUS = """A photo of a cat that is sitting on the mat. The dog's tail is wagging, and it will rain
in the morning. A painting of a house beside the sea, with a boat in the distance; oil on canvas.
Two children are playing with a red ball on the green grass. The old man wasn't reading the paper.
A close photo of a flower, leading lines, trailing light, full width, fine detail, soft colors.
An astronaut is riding a horse on the moon! The cafe on the corner has a quiet table, they said.
"""
RULES = {  # code points, as T5's NFKC maps them
    "\t": " ",
    "\n": " ",
    "\u00a0": " ",
    "\u3000": " ",
    "e\u0301": "é",
    "ﬁ": "fi",
    "①": "1",
    **{chr(0xFEE0 + ord(c)): c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"},
}


def make_clip() -> None:
    """As published: the bytes, the bytes at the ends of words, merges, start and end."""
    clip = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    clip.normalizer = normalizers.Lowercase()
    clip.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    clip.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False)
    clip.train_from_iterator(CORPUS.splitlines(), trainer)
    with tempfile.TemporaryDirectory() as folder:
        clip.model.save(folder)
        merges = Path(folder, "merges.txt").read_text().splitlines()[1:]
    alphabet = bytes_in_order()
    count = text.CLIP_SIZE - 2 - 2 * len(alphabet)
    merges = merges[:count]
    names = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
    names += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(names)) == text.CLIP_SIZE and names[text.CLIP_END] == "<|endoftext|>"
    assert names[0] == "!"
    vocab = {name: i for i, name in enumerate(names)}
    (text.FOLDER / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (text.FOLDER / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def bytes_in_order() -> list[str]:
    """The 256 characters that stand for bytes, from '!' on, as in the published vocabulary."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printed] + [chr(256 + i) for i in range(256 - len(printed))]


def make_t5() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder, "rules.tsv")
        points = lambda s: " ".join(f"{ord(c):X}" for c in s)  # noqa: E731
        rules.write_text("".join(f"{points(a)}\t{points(b)}\n" for a, b in RULES.items()))
        corpus = Path(folder, "corpus.txt")
        corpus.write_text(CORPUS)
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(Path(folder, "spiece")),
            vocab_size=80,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_tsv=str(rules),
            minloglevel=2,
        )
        (text.FOLDER / "spiece.model").write_bytes(Path(folder, "spiece.model").read_bytes())


def make_ids(out: dict) -> None:
    for model, kind in (("clip_l", CLIPTokenizer), ("clip_g", CLIPTokenizer), ("t5", T5Tokenizer)):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = kind.from_pretrained(text.vocabulary(model, Path(folder)))
            tokenizer.save_pretrained(Path(folder, "saved"))
            if model != "clip_g":
                whole = Path(folder, "saved", "tokenizer.json").read_text()
                (text.FOLDER / f"{model[:4].rstrip('_')}.json").write_text(
                    json.dumps(json.loads(whole), ensure_ascii=False)
                )
        found = tokenizer(list(text.PROMPTS), padding="max_length", max_length=77)
        out[f"{model}.prompts.ids"] = np.array(found["input_ids"], np.int16)
        out[f"{model}.prompts.mask"] = np.array(found["attention_mask"], bool)
        cut = tokenizer(list(text.PROMPTS), padding="max_length", max_length=9, truncation=True)
        out[f"{model}.cut.ids"] = np.array(cut["input_ids"], np.int16)


@torch.no_grad()
def make_features(out: dict) -> None:
    models_of = {
        "clip_l": (CLIPTextModel, CLIPTextConfig),
        "clip_g": (CLIPTextModelWithProjection, CLIPTextConfig),
        "t5": (T5EncoderModel, T5Config),
    }
    for model, (kind, config) in models_of.items():
        net = kind(config(**text.CONFIGS[model])).eval()
        with tempfile.TemporaryDirectory() as folder:
            net.save_pretrained(folder)
            saved = load_file(Path(folder, "model.safetensors"))
            shapes = {name: list(tensor.shape) for name, tensor in saved.items()}
            out[f"{model}.shapes"] = json.dumps(shapes)
            from safetensors.numpy import save_file

            weights = {name: text.drawn(name, shape) for name, shape in shapes.items()}
            save_file(weights, Path(folder, "model.safetensors"), {"format": "pt"})
            net, info = kind.from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), info
        net = net.double().eval()
        given = {"input_ids": torch.tensor(text.ids(model)), "output_hidden_states": True}
        found = net(**given)
        out[f"{model}.tokens"] = found.last_hidden_state.float().numpy()
        out[f"{model}.penultimate"] = found.hidden_states[-2].float().numpy()
        if model == "clip_l":
            out[f"{model}.pooled"] = found.pooler_output.float().numpy()
        elif model == "clip_g":
            out[f"{model}.pooled"] = found.text_embeds.float().numpy()
        else:
            masked = net(**given, attention_mask=torch.tensor(text.mask()))
            out["t5.masked"] = masked.last_hidden_state.float().numpy()
    distance = torch.arange(-300, 301)
    out["t5.buckets"] = T5Attention._relative_position_bucket(distance).numpy().astype(np.int8)


if __name__ == "__main__":
    text.FOLDER.mkdir(exist_ok=True)
    make_clip()
    make_t5()
    out: dict = {}
    make_ids(out)
    make_features(out)
    np.savez_compressed(text.FILE, **out)
