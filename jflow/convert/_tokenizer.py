"""Prompts as ids, from the vocabularies that lie beside published text encoders."""

import importlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jflow._core.checks import check_whole
from jflow._core.files import expand
from jflow.convert._safetensors import read_json

# A prompt -> its ids, without those around it, and the text from the i-th of them on.
_Pieces = Callable[[str], tuple[Sequence[int], Callable[[int], str]]]
_START, _END = "<|startoftext|>", "<|endoftext|>"  # of CLIP
_WORDS = (
    rf"{re.escape(_START)}|{re.escape(_END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}"
    r"|[^\s\p{L}\p{N}]+"
)
_LONGEST = 1_000_000  # a greater limit in a file stands for none


class Tokenizer(NamedTuple):
    """What makes ids of prompts, for a text encoder.

    Attributes:
        encode: (prompts, *, length=None, cut=False) -> (ids int32 [b, length], mask bool
            [b, length]), numpy arrays. prompts is one string or several; length is the count of
            tokens, with those at the start and end, None for `length` of the tokenizer. The mask is
            True up to the end token, and False on what fills the rest. A prompt with more tokens is
            refused; with cut=True it loses those at its end, and a warning says which words.
        length: the greatest count of tokens, from tokenizer_config.json, or None.
        start: the id before each prompt, or None.
        end: the id after each prompt.
        pad: the id that fills the rest.
        size: of the vocabulary; an encoder's `vocab_size` is no smaller.

    Examples:
        >>> from jflow import convert
        >>> tokenizer = convert.tokenizer("sd3/tokenizer")  # doctest: +SKIP
        >>> ids, mask = tokenizer.encode(["a cat", "a dog"], length=77)  # doctest: +SKIP
    """

    encode: Callable[..., tuple[np.ndarray, np.ndarray]]
    length: int | None
    start: int | None
    end: int
    pad: int
    size: int


def tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a published text encoder, from its folder of files.

    Read is the first that is there of tokenizer.json; vocab.json and merges.txt, the pairs of bytes
    of CLIP, with lower case and '</w>' at the ends of words; and spiece.model, the vocabulary of
    T5. The limit and the padding come from tokenizer_config.json and special_tokens_map.json:
    CLIP-L fills with its end token, CLIP-G with '!', whose id is 0, T5 with 0.

    Args:
        folder: the path of the folder.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: the folder has none of these files: the message names them.
        ImportError: the package that reads the file is not installed: `tokenizers`, or
            `sentencepiece` for spiece.model.
        ValueError: a special token is not in the vocabulary.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from jflow import convert
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> names = ["a", "c", "t", "a</w>", "t</w>", "at</w>", "<|startoftext|>", "<|endoftext|>"]
        >>> vocab = {name: i for i, name in enumerate(names)}
        >>> _ = (folder / "vocab.json").write_text(json.dumps(vocab))
        >>> _ = (folder / "merges.txt").write_text("#version: 0.2\\na t</w>\\n")
        >>> ids, mask = convert.tokenizer(folder).encode("A cat", length=6)
        >>> ids.tolist(), mask.sum(1).tolist()
        ([[6, 3, 1, 5, 7, 7]], [5])

    References:
        Sennrich, Haddow, Birch, *Neural Machine Translation of Rare Words with Subword Units*,
            2015, arXiv:1508.07909.
        Kudo, Richardson, *SentencePiece: A simple and language independent subword tokenizer and
            detokenizer for Neural Text Processing*, 2018, arXiv:1808.06226.
    """
    path = expand(folder)
    files = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
    readers = (_read_whole, _read_clip, _read_sentencepiece)
    for names, read in zip(files, readers, strict=True):
        if all((path / name).exists() for name in names):
            return read(path, _config(path))
    there = (
        ", ".join(sorted(file.name for file in path.iterdir())) if path.is_dir() else "no folder"
    )
    raise FileNotFoundError(
        f"tokenizer: expected in {path} one of {'; '.join(' and '.join(n) for n in files)}; there "
        f"is {there or 'nothing'}"
    )


def _read_whole(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    backend = _package("tokenizers").Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.no_padding()
    backend.no_truncation()
    around = backend.encode("").ids
    if len(around) not in (1, 2):
        raise ValueError(
            f"tokenizer: expected {path / 'tokenizer.json'} to put an end token behind an empty "
            f"prompt, and maybe a start token before it, got the ids {around}"
        )
    return _with_ids(path, config, backend, around[0] if len(around) == 2 else None, around[-1])


def _read_clip(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    package = _package("tokenizers")
    start = _token(config, "bos_token") or _START
    end, unknown = (_token(config, name) or _END for name in ("eos_token", "unk_token"))
    backend = package.Tokenizer(
        package.models.BPE.from_file(
            str(path / "vocab.json"),
            str(path / "merges.txt"),
            end_of_word_suffix="</w>",
            unk_token=unknown,
        )
    )
    known, of = package.normalizers, package.pre_tokenizers
    backend.normalizer = known.Sequence(
        [known.NFC(), known.Replace(package.Regex(r"\s+"), " "), known.Lowercase()]
    )
    words = of.Split(package.Regex(_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = of.Sequence([words, of.ByteLevel(add_prefix_space=False)])
    ids = [_id(path, backend, token) for token in (start, end)]
    backend.add_special_tokens([start, end])
    return _with_ids(path, config, backend, *ids)


def _with_ids(path: Path, config: Mapping[str, Any], backend, start: int | None, end: int):
    """The tokenizer of one of `tokenizers`, whose special tokens are known."""
    pad = _token(config, "pad_token")
    pad_id = end if pad is None else _id(path, backend, pad)
    if pad is not None:  # it is special: '!' in a prompt is the padding of CLIP-G
        backend.add_special_tokens([pad])

    def pieces(prompt: str):
        found = backend.encode(prompt, add_special_tokens=False)
        return found.ids, lambda i: prompt[found.offsets[i][0] :]

    return _tokenizer(pieces, config, start, end, pad_id, backend.get_vocab_size())


def _read_sentencepiece(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    package = _package("sentencepiece")
    model = package.SentencePieceProcessor(model_file=str(path / "spiece.model"))
    size, extra = model.get_piece_size(), int(config.get("extra_ids", 100))
    special = {model.id_to_piece(i): i for i in (model.pad_id(), model.eos_id(), model.unk_id())}
    special |= {f"<extra_id_{i}>": size + extra - 1 - i for i in range(extra)}
    split = re.compile(f"({'|'.join(map(re.escape, special))})")

    def pieces(prompt: str):
        ids: list[int] = []
        for part in split.split(prompt):
            ids += [special[part]] if part in special else model.encode(part)
        return ids, lambda i: model.decode([piece for piece in ids[i:] if piece < size])

    return _tokenizer(pieces, config, None, model.eos_id(), model.pad_id(), size + extra)


def _tokenizer(
    pieces: _Pieces,
    config: Mapping[str, Any],
    start: int | None,
    end: int,
    pad: int,
    size: int,
) -> Tokenizer:
    limit = config.get("model_max_length")
    limit = int(limit) if limit is not None and limit < _LONGEST else None
    before = [] if start is None else [start]

    def encode(prompts, *, length=None, cut=False):
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if wrong:
            raise TypeError(f"tokenizer: expected strings as prompts, got {wrong[0]!r}")
        length = limit if length is None else length
        if length is None:
            raise ValueError(
                "tokenizer: expected a length, because tokenizer_config.json has no "
                "'model_max_length'"
            )
        check_whole("tokenizer", least=len(before) + 1, length=length)
        ids = np.full((len(prompts), length), pad, np.int32)
        mask = np.zeros((len(prompts), length), bool)
        for i, prompt in enumerate(prompts):
            found, rest = pieces(prompt)
            room = length - len(before) - 1
            if len(found) > room:
                lost = rest(room)
                said = (
                    f"prompt {i} has {len(found) + len(before) + 1} tokens, with those around it, "
                    f"and the limit is {length}"
                )
                if not cut:
                    raise ValueError(
                        f"tokenizer: {said}: shorten it, or leave out {lost!r} by cut=True"
                    )
                warnings.warn(f"tokenizer: {said}: {lost!r} is left out", stacklevel=2)
            row = [*before, *found[:room], end]
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return ids, mask

    return Tokenizer(encode, limit, start, end, pad, size)


def _config(path: Path) -> dict[str, Any]:
    """What the files beside a vocabulary say of it."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).exists():
            found |= read_json("tokenizer", path / name)
    return found


def _token(config: Mapping[str, Any], name: str) -> str | None:
    """A special token, which files write as a string or as an object."""
    token = config.get(name)
    return token.get("content") if isinstance(token, Mapping) else token


def _id(path: Path, backend, token: str) -> int:
    found = backend.token_to_id(token)
    if found is None:
        raise ValueError(
            f"tokenizer: expected the special token {token!r} in the vocabulary of {path}, which"
            " does not have it"
        )
    return found


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"tokenizer: reading this folder takes the package {name}, which is not installed: pip "
            "install 'jflow-models[text]'"
        ) from error
