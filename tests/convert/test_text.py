"""Text encoders and tokenizers: the features and ids of transformers, counts, bad files."""

import json
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import text_encoders as text

from jflow import convert, nets
from jflow.nets._t5 import buckets

PEERS = np.load(text.FILE)
IDS = jax.ShapeDtypeStruct((1, 1), jnp.int32)
READ = {"clip_l": convert.clip_text, "clip_g": convert.clip_text, "t5": convert.t5_encoder}


def read(model, tensors=None, **changes):
    tensors = text.tensors(model) if tensors is None else tensors
    return READ[model](tensors, config=text.CONFIGS[model] | changes)


@pytest.mark.parametrize("model", ["clip_l", "clip_g"])
def test_clip_has_the_features_of_transformers(model):
    """The largest id is the legacy end; where the end is known, greater ids may stand before it."""
    net, params = read(model)
    ids = jnp.asarray(text.ids(model), jnp.int32)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(net.apply)({"params": params}, ids)
    for name, value in found._asdict().items():
        expected = PEERS[f"{model}.{name}"]
        np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max())


def test_t5_has_the_features_of_transformers():
    net, params = read("t5")
    ids, mask = jnp.asarray(text.ids("t5"), jnp.int32), jnp.asarray(text.mask())
    with jax.default_matmul_precision("highest"):
        found = jax.jit(net.apply)({"params": params}, ids)
        masked = jax.jit(net.apply)({"params": params}, ids, mask)
    assert found.pooled is None
    for name, value in (
        ("tokens", found.tokens),
        ("penultimate", found.penultimate),
        ("masked", masked.tokens),
    ):
        expected = PEERS[f"t5.{name}"]
        np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("model", ["clip_l", "clip_g", "t5"])
def test_ids_are_those_of_transformers(model, tmp_path):
    for i, whole in enumerate((False, True)):
        tokenizer = convert.tokenizer(text.vocabulary(model, tmp_path / str(i), whole=whole))
        ids, mask = tokenizer.encode(text.PROMPTS)
        np.testing.assert_array_equal(ids, PEERS[f"{model}.prompts.ids"])
        np.testing.assert_array_equal(mask, PEERS[f"{model}.prompts.mask"])
        with pytest.warns(UserWarning, match="is left out"):
            cut, _ = tokenizer.encode(text.PROMPTS, length=9, cut=True)
        np.testing.assert_array_equal(cut, PEERS[f"{model}.cut.ids"])


@pytest.mark.parametrize(
    ("net", "count"),
    [
        (nets.CLIPText(), 123_060_480),
        (nets.CLIPText(49408, 77, 1280, 32, 20, 5120, projection=1280), 694_659_840),
        (nets.T5Encoder(), 4_762_310_656),
    ],
    ids=("CLIP-L", "CLIP-G", "T5-XXL"),
)
def test_counts_are_those_of_the_published_sizes(net, count):
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), ids)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_distances_fall_into_the_buckets_of_transformers():
    of = buckets(301, 32, 128)
    np.testing.assert_array_equal([*of[300, :300], *of[0]], PEERS["t5.buckets"])
    assert np.array_equal(of[1:, 1:], of[:-1, :-1])  # by the distance alone


def test_what_an_encoder_does_not_see():
    """T5 what the mask hides, CLIP what follows; no end token and unknown ids give NaN."""
    net, params = read("t5")
    ids, mask = jnp.asarray(text.ids("t5"), jnp.int32), jnp.asarray(text.mask())
    run = jax.jit(net.apply)
    tokens = [run({"params": params}, x, mask).tokens for x in (ids, jnp.where(mask, ids, 5))]
    np.testing.assert_array_equal(*(x[mask] for x in tokens))
    net, params = read("clip_g")
    ids = jnp.asarray(text.ids("clip_g"), jnp.int32)
    run = jax.jit(net.apply)
    found, other = (run({"params": params}, x) for x in (ids, ids.at[0, 6:].set(3)))
    np.testing.assert_array_equal(found.tokens[0, :6], other.tokens[0, :6])
    np.testing.assert_array_equal(found.pooled, other.pooled)
    assert np.abs(found.tokens[0, 6:] - other.tokens[0, 6:]).max() > 1e-2
    strange = run({"params": params}, ids.at[0, 5:].set(3).at[1, 8].set(text.CLIP_SIZE))
    assert np.isnan(strange.pooled[0]).all() and not np.isnan(strange.tokens[0]).any()
    assert np.isnan(strange.tokens[1, 8]).all()


@pytest.mark.parametrize("model", ["clip_l", "clip_g", "t5"])
def test_files_in_all_their_forms(model, tmp_path):
    """A folder in shards, older names, whole models of which encoders are parts; and back."""
    given = text.tensors(model)
    net, params = read(model)
    (tmp_path / "config.json").write_text(json.dumps(text.CONFIGS[model]))
    layout = (convert.t5_encoder_layout if model == "t5" else convert.clip_text_layout)(net)
    convert.save(tmp_path / "model.safetensors", layout, params, max_shard_size=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    saved = convert.read_safetensors(tmp_path)
    same(READ[model](tmp_path), (net, params))
    bare = {"clip_l": "text_model."}.get(model, "")  # transformers 5 writes CLIP-L without
    assert {name.removeprefix(bare) for name in saved} == given.keys()
    if model == "t5":
        table = given["shared.weight"]
        copy = {"encoder.embed_tokens.weight": table}
        same(read(model, given | copy | {"lm_head.weight": table}), (net, params))
        alone = {name: tensor for name, tensor in given.items() if name != "shared.weight"}
        same(read(model, alone | copy), (net, params))
        with pytest.raises(ValueError, match="'encoder.embed_tokens.weight' to be equal to"):
            read(model, given | {"encoder.embed_tokens.weight": table + 1})
    else:
        older = {"text_model.embeddings.position_ids": np.arange(77)[None]}
        images = {"vision_model.x": np.ones(2), "logit_scale": np.ones(())}
        same(read(model, saved | older | images), (net, params))
        with pytest.raises(ValueError, match="position_ids' as jflow computes it"):
            read(model, saved | {key: value + 1 for key, value in older.items()})
        with pytest.raises(ValueError, match="unknown: x"):
            read(model, saved | {"x": np.ones(2)})


def same(found, expected):
    assert found[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_bad_configs_and_ids_are_refused(tmp_path):
    def refused(match, run, *args, error=ValueError, **options):
        with pytest.raises(error, match=match):
            run(*args, **options)

    refused("'hidden_act' is one of quick_gelu, .* got 'relu'", read, "clip_l", hidden_act="relu")
    refused("'hidden_size' in the config, got ", read, "clip_l", hidden_size=None)
    refused("'gated-gelu', .* got 'relu'", read, "t5", feed_forward_proj="relu")
    refused("expected the config of these tensors", convert.t5_encoder, text.tensors("t5"))
    refused("config.json in ", convert.clip_text, tmp_path, error=FileNotFoundError)
    broken = tmp_path / "config.json"
    for written, said in (("{", "is no JSON"), ("[1]", r"to hold an object, got \[1\]")):
        broken.write_text(written)
        for name in ("clip_text", "t5_encoder", "autoencoder_kl"):
            refused(f"^{name}: .*{broken} {said}", getattr(convert, name), tmp_path)
    broken.rename(tmp_path / "tokenizer_config.json")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    refused("^tokenizer: .*tokenizer_config.json to hold an object", convert.tokenizer, tmp_path)
    refused("expected 'text_model.embed.* of shape", read, "clip_l", vocab_size=5)
    refused("num_buckets to be a multiple of 4", nets.T5Encoder, num_buckets=30)
    refused("divisible by num_heads=5", nets.CLIPText, num_heads=5)
    shape = partial(jax.eval_shape, nets.CLIPText(num_layers=1).init, jax.random.key(0))
    refused("at most 77 tokens", shape, jax.ShapeDtypeStruct((1, 78), jnp.int32))
    refused("integer ids", shape, jax.ShapeDtypeStruct((1, 7), jnp.float32))
    shape = partial(jax.eval_shape, nets.T5Encoder(num_layers=1).init, jax.random.key(0))
    refused("bool mask of shape", shape, IDS, jax.ShapeDtypeStruct((1, 1), jnp.int32))


def test_prompts_and_vocabularies_that_are_refused(tmp_path, monkeypatch):
    clip, t5 = (text.vocabulary(model, tmp_path / model) for model in ("clip_l", "t5"))
    known = convert.tokenizer(clip)
    assert known[1:] == (77, 638, 639, 639, text.CLIP_SIZE)
    assert convert.tokenizer(t5)[1:] == (77, None, 1, 0, 180)
    prompts = ["a cat", "one two three four five"]
    for tokenizer in (known, convert.tokenizer(t5)):
        with pytest.raises(
            ValueError, match=r"prompt 1 has \d\d tokens, .* the limit is 7: .*'.*five'"
        ):
            tokenizer.encode(prompts, length=7)
        with pytest.warns(UserWarning, match="the limit is 7: '.*five' is left out"):
            ids, mask = tokenizer.encode(prompts, length=7, cut=True)
        assert ids[1, -1] == tokenizer.end and mask[1].all() and ids.dtype == np.int32
    with pytest.raises(TypeError, match="strings as prompts, got 3"):
        known.encode(["a", 3])
    with pytest.raises(ValueError, match="length"):
        known.encode("a", length=1)

    (clip / "tokenizer_config.json").write_text('{"pad_token": {"content": "<none>"}}')
    with pytest.raises(ValueError, match="special token '<none>' in the vocabulary"):
        convert.tokenizer(clip)
    (clip / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no 'model_max_length'"):
        convert.tokenizer(clip).encode("a cat")
    (clip / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt; spiece.model; there is vocab.json"):
        convert.tokenizer(clip)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        convert.tokenizer(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"sentencepiece, .* pip install 'jflow-models\[text\]'"):
        convert.tokenizer(t5)
