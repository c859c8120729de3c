"""Pipelines from the folders that diffusers writes: from prompts to a condition, from latents to an
image."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow import paths, times
from jflow._core.checks import check_whole
from jflow._core.files import expand
from jflow._core.linen import apply_linen
from jflow.convert._autoencoder_kl import autoencoder_kl
from jflow.convert._layouts import some
from jflow.convert._mmdit import flux, mmdit
from jflow.convert._safetensors import read_json, read_safetensors
from jflow.convert._text import clip_text, t5_encoder
from jflow.convert._tokenizer import Tokenizer, tokenizer
from jflow.nets import AutoencoderKL, Flux, MMDiT, chunked_attention, field
from jflow.types import Array, Condition, Params, PyTree, Velocity

PARTS = "text", "velocity", "autoencoder"
_WEIGHTS = "model", "diffusion_pytorch_model"  # what their files are called, before the ending
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


class Pipeline(NamedTuple):
    """A published model of images in its parts, which `load_pipeline` reads from a folder.

    Each function takes its own part of the params, so that a part can be freed when it is done.

    Attributes:
        velocity: on latents [b, h, w, c], from noise at t=0 to data at t=1, with the conditions
            that `cond` makes; its params are params['velocity'].
        params: {'velocity', 'autoencoder', 'text'}, as many of them as were read.
        encode: (params['autoencoder'], images [b, H, W, 3] in [-1, 1], *, key=None) -> latents; see
            `nets.Autoencoder`.
        decode: (params['autoencoder'], latents) -> images.
        cond: (params['text'], prompts, *, length=None, cut=False) -> `types.Condition`, a row for
            each string. length is how many tokens T5 reads, None for as many as published. A prompt
            that is too long for an encoder is an error that says so; with cut=True this encoder
            reads its beginning, and a warning says what it does not read. It is not for jit.
        shape: (height=None, width=None) -> (h, w, c) of the latents of an image, in pixels; None is
            the published size. It raises a ValueError where the sizes don't divide.
        grid: (steps=None, height=None, width=None, *, shift=None) -> times [steps + 1] of the
            published scheduler, for `solvers.on_grid` with `diffrax.Euler()`. None is as published:
            the steps, the size of the image, and the factor by which `times.shift` moves times.
        settings: what images are published with, {'steps', 'height', 'width'}, 'guidance', a scale,
            where there is one, and 'null', the prompt whose condition is the null of
            `guidance.cfg`, where guidance takes one. Without 'null' the network reads the scale.
        net: the network of the velocity, `nets.MMDiT` or `nets.Flux`, for `lora` and `save_lora`;
            None where it was not read.
    """

    velocity: Velocity
    params: Params
    encode: Callable[..., Array]
    decode: Callable[..., Array]
    cond: Callable[..., Condition]
    shape: Callable[..., tuple[int, int, int]]
    grid: Callable[..., np.ndarray]
    settings: dict[str, Any]
    net: MMDiT | Flux | None = None


class _Model(NamedTuple):
    """What a class of diffusers' pipelines consists of."""

    encoders: tuple[str, ...]  # the numbers of the folders of CLIP's encoders, and of T5
    optional: bool  # whether zeros may stand for the tokens of T5
    joined: bool  # whether the tokens of CLIP are read too, and all pooled ones
    steps: int
    guidance: float
    length: int  # of the text that T5 reads
    max_shift: float


_MODELS = {
    "StableDiffusion3Pipeline": _Model(("", "_2", "_3"), True, True, 28, 7.0, 256, 1.16),
    "FluxPipeline": _Model(("", "_2"), False, False, 28, 3.5, 512, 1.15),
}
_SCHNELL: dict[str, Any] = {"steps": 4, "length": 256}  # of Flux without a guidance that it reads


def load_pipeline(
    folder: str | Path,
    *,
    parts: Sequence[str] = PARTS,
    guidance: float | None = None,
    dtype: Any = None,
    sharding: Callable[[PyTree], PyTree] | None = None,
    attention_fn: Callable[..., Array] | None = None,
) -> Pipeline:
    """Read a folder of Stable Diffusion 3 or FLUX.1, as diffusers writes it.

    Time, sign and prediction of the published network are translated: the velocity goes from noise
    at t=0 to data at t=1. The condition of SD3 has the tokens of the last layer but one of both
    CLIPs side by side, filled with zeros to the width of T5, and then those of T5; and both pooled
    vectors. That of FLUX.1 has the tokens of T5 and the pooled vector of CLIP. No token is masked.
    SD3 may come without T5, whose tokens are then zeros, as published. No published file of weights
    was opened when this was written: images were compared with those of diffusers on random
    weights.

    Args:
        folder: with model_index.json, and what it names: transformer, vae, text_encoder ...,
            tokenizer ..., scheduler. Of a part in several precisions the plain file is read.
        parts: what to read of 'text', 'velocity' and 'autoencoder'. What is left out takes no
            memory, and its functions raise: read one part after another, and free each. () reads
            none, for `shape`, `grid` and `settings` alone.
        guidance: the scale that FLUX.1 dev reads; None is 3.5. Other models have no such input:
            `guidance.cfg` guides SD3.
        dtype: of the params and of the computation, such as jnp.float32. None is the type of the
            files of each part, with bfloat16 in the place of float16, which overflows.
        sharding: shapes of params -> their shardings: where the params go straight from the files,
            such as `partial(train.shardings, mesh=mesh, rules=[(".*", train.fsdp("data"))])`. None
            is the default device.
        attention_fn: of the velocity and of the autoencoder; see `nets.SelfAttention`. None is
            `nets.chunked_attention()`, whose memory is linear in the number of tokens.

    Returns:
        The pipeline.

    Raises:
        FileNotFoundError: there is no such folder, no model_index.json, or a file that it needs is
            missing.
        ValueError: the folder is of another class of pipelines, lacks an encoder, has a scheduler
            with options that are not known, or weights that are quantized or of several types; or
            an option is not for this model.

    Examples:
        >>> import diffrax
        >>> import jax
        >>> from jflow import convert, guidance, solvers
        >>> model = convert.load_pipeline("stable-diffusion-3-medium")  # doctest: +SKIP
        >>> text = model.cond(model.params["text"], ["a red cat", ""])  # doctest: +SKIP
        >>> cond, null = (jax.tree.map(lambda x: x[i], text) for i in (0, 1))  # doctest: +SKIP
        >>> velocity = guidance.cfg(model.velocity, 7.0, null=null)  # doctest: +SKIP
        >>> x0 = jax.random.normal(jax.random.key(0), (1, *model.shape()))  # doctest: +SKIP
        >>> method = solvers.on_grid(model.grid(28), diffrax.Euler())  # doctest: +SKIP
        >>> cond = jax.tree.map(lambda x: x[None], cond)  # doctest: +SKIP
        >>> x1, _ = solvers.sample(  # doctest: +SKIP
        ...     velocity, model.params["velocity"], x0, cond, method=method
        ... )
        >>> images = model.decode(model.params["autoencoder"], x1)  # doctest: +SKIP

    References:
        Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*,
            2024, arXiv:2403.03206.
        Black Forest Labs, *FLUX*, 2024, https://github.com/black-forest-labs/flux.
    """
    path = expand(folder)
    index = _index(path)
    name = index["_class_name"]
    model = _MODELS[name]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(
            f"load_pipeline: expected parts among {', '.join(PARTS)}, got {list(parts)}"
        )
    joined, transformer = model.joined, _read(path / "transformer" / "config.json")
    reads_guidance = not joined and bool(transformer.get("guidance_embeds"))
    if guidance is not None and not reads_guidance:
        hint = "guide it by guidance.cfg" if joined else "it was distilled from another model"
        raise ValueError(
            f"load_pipeline: the network of {path} reads no guidance, got guidance={guidance}: "
            f"{hint}"
        )
    if not joined and not reads_guidance:
        model = model._replace(**_SCHNELL)
    how = _Reading(path, dtype, sharding, attention_fn or chunked_attention())
    vae = _read(path / "vae" / "config.json")
    patch = transformer["patch_size"] if joined else 2
    shape = _shape(path, vae, transformer, joined, patch)
    channels = transformer["in_channels"] // (1 if joined else 4)
    if channels != vae["latent_channels"]:
        raise ValueError(
            f"load_pipeline: {path} has latents of {vae['latent_channels']} channels in vae and of "
            f"{channels} in transformer: they are of different models"
        )
    settings: dict[str, Any] = {"steps": model.steps, **_size(vae, transformer, joined)}
    settings |= {"guidance": model.guidance} if joined or reads_guidance else {}
    settings |= {"null": ""} if joined else {}
    found = Pipeline(
        velocity=Velocity(*(_absent(path, "velocity"),) * 2),
        params={},
        encode=_absent(path, "autoencoder"),
        decode=_absent(path, "autoencoder"),
        cond=_absent(path, "text"),
        shape=shape,
        grid=_grid(path, model, patch, shape),
        settings=settings,
    )
    params = {}
    if "text" in parts:
        cond, params["text"] = _text(how, index, model, transformer["joint_attention_dim"])
        found = found._replace(cond=cond)
    if "velocity" in parts:
        scale = model.guidance if guidance is None else guidance
        net, params["velocity"] = _network(how, transformer, joined, scale)
        found = found._replace(velocity=paths.from_noise_time(field(net)), net=net)
    if "autoencoder" in parts:
        file, kind = how.file("vae"), how.kind("vae")
        vae_net = AutoencoderKL(dtype=kind, attention_fn=how.attention_fn)
        both, params["autoencoder"] = autoencoder_kl(
            file, net=vae_net, dtype=kind, sharding=sharding
        )
        found = found._replace(encode=both.encode, decode=both.decode)
    return found._replace(params=params)


class _Reading(NamedTuple):
    """How the parts of a folder are read."""

    path: Path
    dtype: Any
    sharding: Any
    attention_fn: Callable[..., Array]

    def file(self, part: str) -> Path:
        """The weights of a part: its plain file, or index of files, or all that is there."""
        folder = self.path / part
        if not folder.is_dir():
            raise FileNotFoundError(
                f"load_pipeline: expected a folder {part} in {self.path}, which its "
                "model_index.json names: download it too"
            )
        names = (f"{name}.safetensors{end}" for end in (".index.json", "") for name in _WEIGHTS)
        return next((folder / n for n in names if (folder / n).exists()), folder)

    def kind(self, part: str) -> Any:
        """The type of a part's params."""
        types: dict[Any, list[str]] = {}
        for name, tensor in read_safetensors(self.file(part)).items():
            if not name.endswith("position_ids"):
                types.setdefault(tensor.dtype, []).append(name)
        quantized = [
            name
            for kind, names in types.items()
            for name in names
            if not jnp.issubdtype(kind, jnp.floating)
        ]
        if quantized:
            raise ValueError(
                f"load_pipeline: expected weights of floating types in {self.path / part}, got "
                f"others in {some(quantized)}: quantized weights are not read, take those in "
                "bfloat16"
            )
        if self.dtype is not None:
            return jnp.dtype(self.dtype)
        if len(types) > 1:
            said = ", ".join(f"{kind} ({len(ns)}, such as {ns[0]})" for kind, ns in types.items())
            raise ValueError(
                f"load_pipeline: expected weights of one type in {self.path / part}, got {said}: "
                "give the dtype that all of them are to have, jnp.bfloat16 or jnp.float32"
            )
        kind = next(iter(types), jnp.dtype(jnp.float32))
        return kind if kind.itemsize >= 4 else jnp.dtype(jnp.bfloat16)


def _index(path: Path) -> dict[str, Any]:
    """model_index.json of a folder, of a class that is known."""
    if not (path / "model_index.json").exists():
        if path.is_file():
            hint = "it is a file: for a single one see convert.mmdit, convert.flux and their prefix"
        elif not path.is_dir():
            hint = "there is no such folder"
        elif (path.parent / "model_index.json").exists():
            hint = f"give the folder around it, {path.parent}"
        else:
            there = some(sorted(file.name for file in path.iterdir())) or "nothing"
            hint = f"there is {there}"
        raise FileNotFoundError(
            "load_pipeline: expected a folder as diffusers writes it, with model_index.json in it, "
            f"got {path}: {hint}"
        )
    index = _read(path / "model_index.json")
    if index.get("_class_name") not in _MODELS:
        raise ValueError(
            f"load_pipeline: expected a pipeline of the class {' or '.join(_MODELS)}, got "
            f"{index.get('_class_name')} in {path}"
        )
    return index


_read = partial(read_json, "load_pipeline")


def _absent(path: Path, part: str) -> Callable[..., Any]:
    def function(*args, **options):
        raise ValueError(f"load_pipeline: the part {part!r} of {path} was not read: see `parts`")

    return function


def _network(
    how: _Reading, config: Mapping[str, Any], joined: bool, guidance: float
) -> tuple[MMDiT | Flux, Params]:
    kind, options = how.kind("transformer"), {"sharding": how.sharding}
    net: MMDiT | Flux
    if joined:
        net, params = mmdit(
            how.file("transformer"),
            num_heads=config["num_attention_heads"],
            dtype=kind,
            **options,
        )
    else:
        net, params = flux(
            how.file("transformer"),
            guidance=guidance,
            rope_axes=tuple(config["axes_dims_rope"]),
            dtype=kind,
            **options,
        )
    return net.clone(dtype=kind, attention_fn=how.attention_fn), params


def _text(
    how: _Reading, index: Mapping[str, Any], model: _Model, width: int
) -> tuple[Callable[..., Condition], Params]:
    """The function `cond` of tokens of a width, and the params of the encoders."""
    *clips, last = model.encoders
    without = _without_t5(how.path, index, model)
    numbers = clips if without else model.encoders
    for number in numbers:
        if (index.get(f"text_encoder{number}") or [None])[1:] in ([], [None]):
            raise ValueError(
                f"load_pipeline: {how.path} has no text_encoder{number}, and "
                f"{index['_class_name']} needs it"
                + ("; T5, which is text_encoder_3, alone may be left out" if model.optional else "")
            )
    encoders: dict[str, tuple[nn.Module, Tokenizer]] = {}
    params = {}
    for number in numbers:
        name, read = f"text_encoder{number}", t5_encoder if number == last else clip_text
        kind = how.kind(name)
        folder = how.path / f"tokenizer{number}"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"load_pipeline: expected a folder {folder.name} in {how.path}, the vocabulary of "
                f"{name}: download it too"
            )
        net, params[name] = read(how.file(name), dtype=kind, sharding=how.sharding)
        encoders[name] = net.clone(dtype=kind), tokenizer(folder)

    @jax.jit
    def encode(params, ids):
        found = [apply_linen(net, params[name], ids[name]) for name, (net, _) in encoders.items()]
        clip, t5 = (found, None) if without else (found[:-1], found[-1].tokens)
        if not model.joined:
            return Condition(context=t5, vector=clip[0].pooled)
        tokens = jnp.concatenate([features.penultimate for features in clip], axis=-1)
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, width - tokens.shape[-1])))
        if t5 is None:
            t5 = jnp.zeros((len(tokens), ids["length"].shape[0], width), tokens.dtype)
        return Condition(
            context=jnp.concatenate([tokens, t5.astype(tokens.dtype)], axis=1),
            vector=jnp.concatenate([features.pooled for features in clip], axis=-1),
        )

    def cond(params, prompts, *, length=None, cut=False):
        length = model.length if length is None else length
        check_whole("load_pipeline", length=length)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("load_pipeline: expected at least one prompt, got none")
        ids = {"length": np.empty(length, bool)}  # only its shape counts
        for name, (_, words) in encoders.items():
            t5 = name == f"text_encoder{last}"
            try:
                ids[name], _ = words.encode(prompts, cut=cut, **({"length": length} if t5 else {}))
            except ValueError as error:
                raise ValueError(f"load_pipeline: {name}: {error}") from error
        return encode(params, ids)

    return cond, params


def _without_t5(path: Path, index: Mapping[str, Any], model: _Model) -> bool:
    """Whether zeros stand for the tokens of T5."""
    name = f"text_encoder{model.encoders[-1]}"
    if not model.optional:
        return False
    if (index.get(name) or [None])[-1] is None:
        return True
    if not (path / name).is_dir():
        warnings.warn(
            f"load_pipeline: {path} has no folder {name}, which its model_index.json names: zeros "
            "stand for the tokens of T5",
            stacklevel=4,
        )
        return True
    return False


def _size(vae: Mapping[str, Any], transformer: Mapping[str, Any], joined: bool) -> dict[str, int]:
    """The published size of images."""
    side = (transformer["sample_size"] if joined else 128) * _factor(vae)
    return {"height": side, "width": side}


def _factor(vae: Mapping[str, Any]) -> int:
    """How many pixels a latent site has along each axis."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def _shape(
    path: Path, vae: Mapping[str, Any], transformer: Mapping[str, Any], joined: bool, patch: int
) -> Callable[..., tuple[int, int, int]]:
    factor = _factor(vae)
    side = _size(vae, transformer, joined)
    most = transformer["pos_embed_max_size"] * patch * factor if joined else math.inf

    def shape(height=None, width=None):
        height = side["height"] if height is None else height
        width = side["width"] if width is None else width
        check_whole("load_pipeline", height=height, width=width)
        whole = factor * patch
        if height % whole or width % whole:
            near = [max(whole, round(size / whole) * whole) for size in (height, width)]
            raise ValueError(
                f"load_pipeline: expected a height and a width that {whole} divides, got {height} "
                f"and {width}; near them are {near[0]} and {near[1]}"
            )
        if max(height, width) > most:
            raise ValueError(
                f"load_pipeline: expected a height and a width of at most {most}, up to which "
                f"{path} has positions, got {height} and {width}"
            )
        return height // factor, width // factor, vae["latent_channels"]

    return shape


def _grid(path: Path, model: _Model, patch: int, shape) -> Callable[..., np.ndarray]:
    file = path / "scheduler" / "scheduler_config.json"
    config = {"time_shift_type": "exponential", "num_train_timesteps": 1000} | _read(file)
    options = ("beta", "exponential", "karras")
    other = [f"use_{name}_sigmas" for name in options] + ["invert_sigmas", "stochastic_sampling"]
    other = [name for name in [*other, "shift_terminal"] if config.get(name)]
    other += [] if config.get("_class_name") == _SCHEDULER else ["_class_name"]
    other += [] if config["num_train_timesteps"] == 1000 else ["num_train_timesteps"]
    other += [] if config["time_shift_type"] in ("exponential", "linear") else ["time_shift_type"]
    if other:
        said = ", ".join(f"{name}={config.get(name)!r}" for name in other)
        raise ValueError(
            f"load_pipeline: expected {file} to be of a {_SCHEDULER} without more options than its "
            f"shift, got {said}"
        )

    def factor(tokens):
        """By which times are shifted for an image of so many tokens."""
        if not config.get("use_dynamic_shifting"):
            return config.get("shift", 1.0)
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", model.max_shift)
        mu = low + (high - low) * (tokens - few) / (many - few)
        return math.exp(mu) if config["time_shift_type"] == "exponential" else mu

    def grid(steps=None, height=None, width=None, *, shift=None):
        steps = model.steps if steps is None else steps
        check_whole("load_pipeline", steps=steps)
        h, w, _ = shape(height, width)
        by = factor((h // patch) * (w // patch)) if shift is None else shift
        if model.joined:  # the last level but one is that of 1 in 1000, which is shifted twice
            moved = 1.0 if config.get("use_dynamic_shifting") and shift is None else by
            t = np.linspace(0, times.shift(1 - 1 / 1000, moved), steps)
        else:
            t = np.arange(steps) / steps
        return np.append(times.shift(t, by), 1.0)

    return grid
