"""Writes images of diffusers' SD3 and Flux pipelines on tiny folders, so that the tests need no
torch.

Run once, in an environment that has torch, diffusers and transformers, and commit the result:

    pip install torch diffusers transformers sentencepiece protobuf
    python tests/peers/make_pipeline_fixtures.py

Written with torch 2.13.0, diffusers 0.42.1, transformers 5.24.0. The vocabularies are trained here,
on the few lines of `CORPUS`, and laid out as the published ones: bytes, bytes that end a word,
merges and the two marks for CLIP, and a sentencepiece model for T5. No weights are kept: every
tensor and the noise are drawn from their names (`drawn`), here and in the tests, none is zero. Kept
are, for each folder, its text files, the names and shapes of its tensors, the table of positions,
the condition of one prompt, the noise levels, and the images. Tokenizers lie as in the published
folders (vocab.json and merges.txt, spiece.model), in the last folder as newer versions of
transformers write them (tokenizer.json). The script refuses to write images on which an ingredient
has little influence: a prompt, the negative one, the guidance, the shift, the text of T5.
"""

import io
import json
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors import safe_open

HERE = Path(__file__).parent
CORPUS = """a photo of a red cat that sleeps on the warm roof of a small house
the painting of a blue dog, running along the river at night
two birds sing above the old town while it rains
an astronaut rides a horse on the moon, in the style of a woodcut
portrait of a woman with a green hat, soft light, high detail
blurry, low quality, watermark, text""".split("\n")
PROMPTS = ["a photo of a red cat on the moon", "Two dogs, in soft light: a WOODCUT (1896)"]
NEGATIVE = "blurry, watermark"
SIZE = 16, 24  # height and width of the images
STEPS = 4
LENGTH = 56  # of the text of T5
CLIP_LENGTH = 32
PUBLISHED = "model_index.json", "vocab.json", "merges.txt", "spiece.model"
NEW = "model_index.json", "tokenizer.json"


def drawn(name, shape):
    """The tensor of a name; gains of norms lie around 1, kernels keep the size of their inputs."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if len(shape) < 2:
        return (("bias" not in name) + 0.1 * noise).astype(np.float32)
    return (0.9 * noise / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def clip_vocabulary(folder, pad):
    """vocab.json and merges.txt, as the published ones lie, of `CORPUS`."""
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=180, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = sorted(split.alphabet())
    marks = ["<|startoftext|>", "<|endoftext|>"]
    pieces = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges), *marks]
    assert len(set(pieces)) == len(pieces)
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    ends = {"bos_token": marks[0], "eos_token": marks[1], "unk_token": marks[1], "pad_token": pad}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CLIP_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ends))
    (folder / "special_tokens_map.json").write_text(json.dumps(ends))
    return len(pieces)


def t5_vocabulary(folder):
    """spiece.model of `CORPUS`, with the marks where T5 has them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=70,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    ends = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {"extra_ids": 0, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ends))
    (folder / "special_tokens_map.json").write_text(json.dumps(ends))
    return 70


def filled(part, model):
    """The model with drawn weights; what is no parameter, such as a table, is its own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.as_tensor(drawn(f"{part}/{name}", tuple(parameter.shape))))
    return model.eval()


def clip(part, model, vocabulary, width, act):
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,  # as published: the pooled token is then the one with the largest id
        pad_token_id=1,
    )
    return filled(part, model(config))


def t5(part, vocabulary, width):
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=8,
        num_heads=4,
        d_ff=2 * width,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    return filled(part, transformers.T5EncoderModel(config))


def vae(scale, shift):
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=16,
        sample_size=16,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return filled("vae", model)


def sd3(folder):
    """The folder of an SD3 pipeline."""
    vocabulary = clip_vocabulary(folder / "tokenizer", "<|endoftext|>")
    clip_vocabulary(folder / "tokenizer_2", "!")
    pieces = t5_vocabulary(folder / "tokenizer_3")
    projected = transformers.CLIPTextModelWithProjection
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=filled("transformer", transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(1.5305, 0.0609),
        text_encoder=clip("text_encoder", projected, vocabulary, 16, "quick_gelu"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=clip("text_encoder_2", projected, vocabulary, 24, "gelu"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder_3=t5("text_encoder_3", pieces, 48),
        tokenizer_3=transformers.T5Tokenizer.from_pretrained(folder / "tokenizer_3"),
    )


def flux(folder, guidance):
    """The folder of a Flux pipeline."""
    vocabulary = clip_vocabulary(folder / "tokenizer", "<|endoftext|>")
    pieces = t5_vocabulary(folder / "tokenizer_2")
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance
    )
    return diffusers.FluxPipeline(
        transformer=filled("transformer", transformer),
        scheduler=scheduler,
        vae=vae(0.3611, 0.1159),
        text_encoder=clip("text_encoder", transformers.CLIPTextModel, vocabulary, 16, "quick_gelu"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=t5("text_encoder_2", pieces, 48),
        tokenizer_2=transformers.T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
    )


def noise(pipe):
    """One for each prompt; packed for Flux."""
    height, width = SIZE[0] // 2, SIZE[1] // 2
    latents = torch.as_tensor(drawn_noise((len(PROMPTS), height, width, 16))).permute(0, 3, 1, 2)
    if isinstance(pipe, diffusers.FluxPipeline):
        latents = pipe._pack_latents(latents, len(PROMPTS), 16, height, width)
    return latents


def drawn_noise(shape):
    return np.random.default_rng(list(b"noise")).standard_normal(shape).astype(np.float32)


def images(pipe, prompts=PROMPTS, **options):
    pipe.set_progress_bar_config(disable=True)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if tokenizer := getattr(pipe, name, None):
            most = LENGTH if isinstance(tokenizer, transformers.T5Tokenizer) else CLIP_LENGTH
            assert max(map(len, tokenizer(list(prompts)).input_ids)) <= most
    with torch.no_grad():
        return pipe(
            prompts,
            num_inference_steps=STEPS,
            height=SIZE[0],
            width=SIZE[1],
            latents=noise(pipe),
            max_sequence_length=LENGTH,
            output_type="np",
            **options,
        ).images


def sigmas(pipe, steps, tokens):
    """The noise levels for an image of so many tokens, as the pipeline asks for them."""
    if isinstance(pipe, diffusers.FluxPipeline):
        config = pipe.scheduler.config
        lengths = config.base_image_seq_len, config.max_image_seq_len
        mu = calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.sigmas.numpy()


def levels(pipe):
    return {
        "sigmas": sigmas(pipe, STEPS, SIZE[0] * SIZE[1] // 16),
        "sigmas_28": sigmas(pipe, 28, 4096),
    }


def check_influence(found, **others):
    """Raise unless each of the others is another picture: by 4/255 at the mean pixel."""
    cut = np.mean((found == 0) | (found == 1))
    print(f"deviation {found.std():.2f}, {100 * cut:.1f}% black or white")
    assert 0.1 < found.std() and cut < 0.1
    for name, other in others.items():
        change = np.abs(found - other).mean() * 255
        print(f"  {name}: {change:.1f}/255")
        assert change > 4, (name, change)


def written(folder, pipe, kept):
    """{path: bytes} of the small files, and {part: {name: shape}} of the tensors."""
    pipe.save_pretrained(folder)
    texts, shapes = {}, {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                found = {key: file.get_slice(key).get_shape() for key in file.keys()}
            shapes[name] = found
        elif path.is_file() and (name.endswith("config.json") or path.name in kept):
            texts[name] = path.read_bytes()
    return texts, shapes


def main():
    kept = {}

    def keep(name, pipe, folder, **found):
        texts, shapes = written(folder, pipe, NEW if name == "flux_schnell" else PUBLISHED)
        kept[f"{name}.shapes"] = json.dumps(shapes)
        for path, text in texts.items():
            kept[f"{name}.file.{path}"] = np.frombuffer(text, np.uint8)
        for key, value in found.items():
            kept[f"{name}.{key}"] = value.astype(np.float32)

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "sd3"
        pipe = sd3(folder)
        plain = images(pipe, guidance_scale=4.0)
        negative = images(pipe, guidance_scale=4.0, negative_prompt=[NEGATIVE] * len(PROMPTS))
        unguided = images(pipe, guidance_scale=1.0)
        pipe.scheduler.set_shift(1.0)
        unshifted = images(pipe, guidance_scale=4.0)
        pipe.scheduler.set_shift(3.0)
        table = pipe.transformer.pos_embed.pos_embed.numpy()
        embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=LENGTH)
        keep(
            "sd3",
            pipe,
            folder,
            **levels(pipe),
            images=plain,
            negative=negative,
            table=table,
            context=embeds[:1].detach().numpy(),
            vector=pooled[:1].detach().numpy(),
        )
        parts = {"text_encoder_3": None, "tokenizer_3": None}
        short = diffusers.StableDiffusion3Pipeline(**(pipe.components | parts))
        without = images(short, guidance_scale=4.0)
        kept["sd3.without_t5"] = without.astype(np.float32)
        kept["sd3.without_t5.index"] = json.dumps(
            json.loads((folder / "model_index.json").read_text())
            | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        )
        check_influence(
            plain,
            prompts=images(pipe, PROMPTS[::-1], guidance_scale=4.0),
            negative=negative,
            unguided=unguided,
            unshifted=unshifted,
            without_t5=without,
        )
        for name, guided in (("flux_dev", True), ("flux_schnell", False)):
            folder = Path(root) / name
            pipe = flux(folder, guided)
            plain = images(pipe, guidance_scale=3.5)
            embeds, pooled, _ = pipe.encode_prompt(PROMPTS, None, max_sequence_length=LENGTH)
            # both have the same encoders
            texts = {"context": embeds[:1], "vector": pooled[:1]} if guided else {}
            texts = {part: tensor.detach().numpy() for part, tensor in texts.items()}
            keep(name, pipe, folder, images=plain, **levels(pipe), **texts)
            others = {"prompts": images(pipe, PROMPTS[::-1], guidance_scale=3.5)}
            if guided:
                others["unguided"] = images(pipe, guidance_scale=1.0)
                pipe.scheduler.register_to_config(base_shift=0.0, max_shift=0.0)
                others["unshifted"] = images(pipe, guidance_scale=3.5)
            check_influence(plain, **others)
    np.savez_compressed(HERE / "pipeline.npz", **kept)
    print((HERE / "pipeline.npz").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
