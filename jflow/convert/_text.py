"""Published weights of the text encoders CLIP and T5, for `nets.CLIPText` and `nets.T5Encoder`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.files import expand
from jflow.convert._layouts import LINEAR, Constant, Layout, Weight, dense, load, shapes_of
from jflow.convert._parts import norm
from jflow.convert._safetensors import read_json, tensors_of
from jflow.nets import CLIPText, T5Encoder, quick_gelu
from jflow.types import Params

_GELU, _GELU_TANH = (partial(jax.nn.gelu, approximate=tanh) for tanh in (False, True))
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "quick_gelu": quick_gelu,
    "gelu": _GELU,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
}
LEGACY_END = 2  # what the configs of CLIP-L and CLIP-G say, which is not the id of the end token
_IDS = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def clip_text(
    files: str | Path | Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any] | None = None,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[CLIPText, Params]:
    """A `nets.CLIPText` and its params from the published weights of CLIP.

    The sizes and the activation come from config.json. Names as transformers writes them are read,
    with 'text_model.' in front or without; there is a projection where the file has one. Of a file
    that holds all of CLIP the part for images is left alone. No published file was opened when this
    was written: the names are those that transformers 5 writes.

    Args:
        files: a folder that holds config.json and the weights, in one file or in several with an
            index; one of the files, beside config.json; or the tensors that `read_safetensors`
            returned, with a config.
        config: what config.json holds; None reads it.
        prefix: of the names; see `load`.
        dtype: of the params; see `load`.
        sharding: where the params go; see `load`.

    Returns:
        The network, which `net.clone(dtype=jnp.bfloat16)` and the like change, and its params.

    Raises:
        FileNotFoundError: there is no config.json, or no such folder.
        ValueError: the config lacks a size or names an unknown activation, or the weights are not
            those of such a network: what is missing, unknown or of another shape is named.

    Examples:
        >>> from jflow import convert
        >>> net, params = convert.clip_text("sd3/text_encoder")  # doctest: +SKIP
        >>> ids, mask = convert.tokenizer("sd3/tokenizer").encode(["a cat"])  # doctest: +SKIP
        >>> features = net.apply({"params": params}, ids)  # doctest: +SKIP

    References:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*,
            2021, arXiv:2103.00020.
    """
    config = _config("clip_text", files, config)
    config = config.get("text_config", config)
    of = partial(_entry, "clip_text", config)
    activation = of("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"clip_text: expected a config whose 'hidden_act' is one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}"
        )
    tensors = _clip_names(tensors_of(files, prefix))
    projection = tensors.get("text_projection.weight")
    end = of("eos_token_id", LEGACY_END)
    net = CLIPText(
        vocab_size=of("vocab_size"),
        max_length=of("max_position_embeddings", 77),
        width=of("hidden_size"),
        num_layers=of("num_hidden_layers"),
        num_heads=of("num_attention_heads"),
        mlp_width=of("intermediate_size"),
        activation=ACTIVATIONS[activation],
        end_id=None if end == LEGACY_END else end,
        projection=None if projection is None else projection.shape[0],
        epsilon=of("layer_norm_eps", 1e-5),
    )
    like = shapes_of(net, _IDS)
    return net, load(tensors, clip_text_layout(net), like, dtype=dtype, sharding=sharding)


def t5_encoder(
    files: str | Path | Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any] | None = None,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[T5Encoder, Params]:
    """A `nets.T5Encoder` and its params from the published weights of T5 v1.1.

    The sizes come from config.json. Of a file that holds all of T5 the decoder is left alone. No
    published file was opened when this was written: the names are those that transformers 5 writes.

    Args:
        files: a folder that holds config.json and the weights, in one file or in several with an
            index; one of the files, beside config.json; or the tensors that `read_safetensors`
            returned, with a config.
        config: what config.json holds; None reads it.
        prefix: of the names; see `load`.
        dtype: of the params; see `load`. T5-XXL overflows in float16.
        sharding: where the params go; see `load`.

    Returns:
        The network, which `net.clone(dtype=jnp.bfloat16)` and the like change, and its params.

    Raises:
        FileNotFoundError: there is no config.json, or no such folder.
        ValueError: the config lacks a size or is of a T5 without gated GELU, or the weights are not
            those of such a network: what is missing, unknown or of another shape is named.

    Examples:
        >>> from jflow import convert
        >>> net, params = convert.t5_encoder("sd3/text_encoder_3")  # doctest: +SKIP
        >>> ids, mask = convert.tokenizer("sd3/tokenizer_3").encode(["a cat"])  # doctest: +SKIP
        >>> features = net.apply({"params": params}, ids)  # doctest: +SKIP

    References:
        Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text
            Transformer*, 2019, arXiv:1910.10683.
    """
    config = _config("t5_encoder", files, config)
    of = partial(_entry, "t5_encoder", config)
    if of("feed_forward_proj", "relu") != "gated-gelu":
        raise ValueError(
            "t5_encoder: expected a config whose 'feed_forward_proj' is 'gated-gelu', as in T5 v1.1"
            f" and its relatives, got {of('feed_forward_proj', 'relu')!r}"
        )
    net = T5Encoder(
        vocab_size=of("vocab_size"),
        width=of("d_model"),
        num_layers=of("num_layers"),
        num_heads=of("num_heads"),
        head_width=of("d_kv"),
        mlp_width=of("d_ff"),
        num_buckets=of("relative_attention_num_buckets", 32),
        max_distance=of("relative_attention_max_distance", 128),
        epsilon=of("layer_norm_epsilon", 1e-6),
    )
    tensors = {
        name: tensor
        for name, tensor in tensors_of(files, prefix).items()
        if not name.startswith(("decoder.", "lm_head."))
    }
    layout = t5_encoder_layout(net)
    if _TABLE_COPY in tensors and _TABLE in tensors:
        layout = layout._replace(copies=((_TABLE_COPY, _TABLE),))
    elif _TABLE_COPY in tensors:
        tensors[_TABLE] = tensors.pop(_TABLE_COPY)
    return net, load(tensors, layout, shapes_of(net, _IDS), dtype=dtype, sharding=sharding)


def clip_text_layout(net: CLIPText) -> Layout:
    """The names of the weights of CLIP's text encoder, as transformers reads them.

    Args:
        net: the network.

    Returns:
        The layout, for `load` and `save`, with 'text_model.' in front of all but the projection.

    Examples:
        >>> from jflow import convert, nets
        >>> layout = convert.clip_text_layout(nets.CLIPText(projection=768))
        >>> layout.weights[-1].keys, layout.weights[-1].path
        ('text_projection.weight', 'projection/kernel')

    References:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*,
            2021, arXiv:2103.00020.
    """
    blocks, layer = range(net.num_layers), "text_model.encoder.layers.{}"
    attention = f"{layer}.self_attn"
    projection = Weight("text_projection.weight", "projection/kernel", LINEAR)
    return Layout(
        "CLIPText",
        (
            Weight("text_model.embeddings.token_embedding.weight", "embed/embedding"),
            Weight("text_model.embeddings.position_embedding.weight", "positions"),
            *norm(f"{layer}.layer_norm1", "blocks/norm_attention", blocks),
            *dense(
                tuple(f"{attention}.{name}_proj" for name in "qkv"), "blocks/attention/qkv", blocks
            ),
            *dense(f"{attention}.out_proj", "blocks/attention/out", blocks),
            *norm(f"{layer}.layer_norm2", "blocks/norm_mlp", blocks),
            *dense(f"{layer}.mlp.fc1", "blocks/mlp_in", blocks),
            *dense(f"{layer}.mlp.fc2", "blocks/mlp_out", blocks),
            *norm("text_model.final_layer_norm", "norm"),
            *(() if net.projection is None else (projection,)),
        ),
        (
            Constant(
                "text_model.embeddings.position_ids",
                lambda _: ((1, net.max_length), (np.arange(net.max_length),)),
            ),
        ),
    )


def t5_encoder_layout(net: T5Encoder) -> Layout:
    """The names of the weights of T5's encoder, as transformers writes them.

    Args:
        net: the network.

    Returns:
        The layout, for `load` and `save`.

    Examples:
        >>> from jflow import convert, nets
        >>> convert.t5_encoder_layout(nets.T5Encoder()).weights[0].path
        'embed/embedding'

    References:
        Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text
            Transformer*, 2019, arXiv:1910.10683.
    """
    blocks = range(net.num_layers)
    attention, mlp = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"

    def linear(keys, path):
        return Weight(keys, f"blocks/{path}/kernel", LINEAR, blocks)

    return Layout(
        "T5Encoder",
        (
            Weight(_TABLE, "embed/embedding"),
            Weight(
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "distances"
            ),
            Weight(f"{attention}.layer_norm.weight", "blocks/norm_attention/scale", blocks=blocks),
            linear(tuple(f"{attention}.SelfAttention.{name}.weight" for name in "qkv"), "qkv"),
            linear(f"{attention}.SelfAttention.o.weight", "out"),
            Weight(f"{mlp}.layer_norm.weight", "blocks/norm_mlp/scale", blocks=blocks),
            linear(tuple(f"{mlp}.DenseReluDense.wi_{i}.weight" for i in (0, 1)), "mlp_in"),
            linear(f"{mlp}.DenseReluDense.wo.weight", "mlp_out"),
            Weight("encoder.final_layer_norm.weight", "norm/scale"),
        ),
    )


_TABLE, _TABLE_COPY = "shared.weight", "encoder.embed_tokens.weight"


def _clip_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the text's part, with 'text_model.' in front where it is not yet."""
    images = ("vision_model.", "visual_projection.", "logit_scale")
    bare = ("embeddings.", "encoder.", "final_layer_norm.")
    return {
        f"text_model.{name}" if name.startswith(bare) else name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(images)
    }


def _config(
    name: str,
    files: str | Path | Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None,
) -> Mapping[str, Any]:
    if config is not None:
        return config
    if isinstance(files, Mapping):
        raise ValueError(f"{name}: expected the config of these tensors, what config.json holds")
    path = expand(files)
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{name}: expected config.json in {folder}, which has the sizes: download it too, or "
            "give config=..."
        )
    return read_json(name, folder / "config.json")


def _entry(name: str, config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = config.get(key, default)
    if value is None:
        raise ValueError(f"{name}: expected {key!r} in the config, got {', '.join(config)}")
    return value
