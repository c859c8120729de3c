"""Text encoders and tokenizers: the features and ids of transformers, counts, bad files."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import text_encoders as text

from jflow import convert, nets

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
    for i, whole in enumerate((False, True)[: 1 if model == "clip_g" else 2]):
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
