"""Writes outputs of diffusers' SD3 and Flux transformers, so that the tests need no torch.

Run once, in an environment that has torch and diffusers, and commit the result:

    pip install torch diffusers
    python tests/peers/make_mmdit_fixtures.py

Written with torch 2.13.0, diffusers 0.42.1. No weights are kept: every tensor and every input is
drawn from its name (`drawn`), here and in the tests, none is zero. Kept are, for each model in each
of its two layouts, the names and shapes of the tensors, and the output. The names of the original
layout are written here by hand, from the published code; diffusers' own converters (of which the
one of Flux has the published width in it, which is replaced) carry those tensors into the model
that is run, and they take every one of them. Of the published sizes names and shapes alone are
kept.
"""

import inspect
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils

HERE = Path(__file__).parent
DRAWN = 0.12  # the standard deviation of the tensors
SD3_HEAD, FLUX_HEAD = 64, 16
SIGMAS = 1 / 256, 0.625  # the first is small: float32 keeps all digits of the features of time


def drawn(name, shape):
    """The tensor or input of a name; scales of norms lie around 1, so that attention is sharp."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    if name.startswith("input."):
        return noise.astype(np.float32)
    scale = len(shape) == 1 and "bias" not in name
    return (scale + DRAWN * noise).astype(np.float32)


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def original_sd3(width, layers, dual, qk_norm, context, pooled, channels=16):
    names = {"x_embedder.proj.weight": (width, channels, 2, 2), "x_embedder.proj.bias": (width,)}
    names |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    names |= linear("y_embedder.mlp.0", width, pooled) | linear("y_embedder.mlp.2", width, width)
    names |= linear("context_embedder", width, context)
    for i in range(layers):
        for block in ("context_block", "x_block"):
            prefix = f"joint_blocks.{i}.{block}"
            last = block == "context_block" and i == layers - 1
            own = block == "x_block" and i < dual
            chunks = 2 if last else 9 if own else 6
            names |= linear(f"{prefix}.adaLN_modulation.1", chunks * width, width)
            for attn in ("attn", "attn2")[: 1 + own]:
                names |= linear(f"{prefix}.{attn}.qkv", 3 * width, width)
                if qk_norm:
                    names |= {f"{prefix}.{attn}.ln_{part}.weight": (SD3_HEAD,) for part in "qk"}
                if not last:
                    names |= linear(f"{prefix}.{attn}.proj", width, width)
            if not last:
                names |= linear(f"{prefix}.mlp.fc1", 4 * width, width)
                names |= linear(f"{prefix}.mlp.fc2", width, 4 * width)
    names |= linear("final_layer.linear", 4 * channels, width)
    return names | linear("final_layer.adaLN_modulation.1", 2 * width, width)


def original_flux(width, head, layers, singles, guidance, context, pooled, packed):
    names = linear("img_in", width, packed) | linear("txt_in", width, context)
    for part, inputs in {"time": 256, "vector": pooled, "guidance": 256}.items():
        if part != "guidance" or guidance:
            names |= linear(f"{part}_in.in_layer", width, inputs)
            names |= linear(f"{part}_in.out_layer", width, width)
    for i in range(layers):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{i}.{stream}"
            names |= linear(f"{prefix}_mod.lin", 6 * width, width)
            names |= linear(f"{prefix}_attn.qkv", 3 * width, width)
            names |= linear(f"{prefix}_attn.proj", width, width)
            for part in ("query", "key"):
                names[f"{prefix}_attn.norm.{part}_norm.scale"] = (head,)
            names |= linear(f"{prefix}_mlp.0", 4 * width, width)
            names |= linear(f"{prefix}_mlp.2", width, 4 * width)
    for i in range(singles):
        prefix = f"single_blocks.{i}"
        names |= linear(f"{prefix}.modulation.lin", 3 * width, width)
        names |= linear(f"{prefix}.linear1", 7 * width, width)
        names |= linear(f"{prefix}.linear2", width, 5 * width)
        for part in ("query", "key"):
            names[f"{prefix}.norm.{part}_norm.scale"] = (head,)
    names |= linear("final_layer.linear", packed, width)
    return names | linear("final_layer.adaLN_modulation.1", 2 * width, width)


def load(model, tensors, table):
    """Fill the model; every one of its tensors is given, but the table of positions, its own."""
    missing, unexpected = model.load_state_dict(
        {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}, strict=False
    )
    assert missing == ([table] if table else []) and not unexpected, (missing, unexpected)
    return model.eval()


def convert_flux(width):
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("3072") == 1
    space = vars(single_file_utils).copy()
    exec(source.replace("3072", str(width)), space)
    return space["convert_flux_transformer_checkpoint_to_diffusers"]


def sd3(heads, layers, dual, qk_norm, context, pooled, size, grid):
    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=SD3_HEAD,
        num_attention_heads=heads,
        joint_attention_dim=context,
        caption_projection_dim=SD3_HEAD * heads,
        pooled_projection_dim=pooled,
        pos_embed_max_size=grid,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm" if qk_norm else None,
    )


def flux(heads, head, layers, singles, guidance, context, pooled, packed, axes):
    return FluxTransformer2DModel(
        in_channels=packed,
        num_layers=layers,
        num_single_layers=singles,
        attention_head_dim=head,
        num_attention_heads=heads,
        joint_attention_dim=context,
        pooled_projection_dim=pooled,
        guidance_embeds=guidance,
        axes_dims_rope=axes,
    )


def run_sd3(model):
    x, context, vector = (
        torch.as_tensor(drawn(f"input.{name}", shape))
        for name, shape in (("x", (2, 6, 8, 16)), ("context", (2, 5, 20)), ("vector", (2, 24)))
    )
    out = model(
        hidden_states=x.permute(0, 3, 1, 2),
        encoder_hidden_states=context,
        pooled_projections=vector,
        timestep=1000 * torch.tensor(SIGMAS),
        return_dict=False,
    )[0]
    return out.permute(0, 2, 3, 1).numpy()


def run_flux(model, guidance):
    x, context, vector = (
        torch.as_tensor(drawn(f"input.{name}", shape))
        for name, shape in (("x", (2, 6, 4, 4)), ("context", (2, 5, 20)), ("vector", (2, 24)))
    )
    packed = x.reshape(2, 3, 2, 2, 2, 4).permute(0, 1, 3, 5, 2, 4).reshape(2, 6, 16)  # c, ph, pw
    row, column = torch.meshgrid(torch.arange(3), torch.arange(2), indexing="ij")
    ids = torch.stack([0 * row, row, column], dim=-1).reshape(6, 3)
    out = model(
        hidden_states=packed,
        encoder_hidden_states=context,
        pooled_projections=vector,
        timestep=torch.tensor(SIGMAS),
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
        guidance=torch.full((2,), SIGMAS[0]) if guidance else None,
        return_dict=False,
    )[0]
    out = out.reshape(2, 3, 2, 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return out.reshape(2, 6, 4, 4).numpy()


@torch.no_grad()
def main():
    arrays = {}

    def keep(name, make, original, convert, run, table=""):
        model = make()
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if k != table}
        published = {k: drawn(k, shape) for k, shape in shapes.items()}
        arrays[f"{name}.diffusers.out"] = run(load(model, published, table))

        published = {k: torch.as_tensor(drawn(k, shape)) for k, shape in original.items()}
        if table:
            arrays[f"{name}.table"] = model.state_dict()[table].numpy()
            published["pos_embed"] = model.state_dict()[table]
        converted = convert(published)
        assert not published, list(published)
        converted.pop(table, None)
        arrays[f"{name}.original.out"] = run(load(make(), converted, table))
        for layout, names in (("diffusers", shapes), ("original", original)):
            arrays[f"{name}.{layout}.shapes"] = np.array(json.dumps(names))

    for name, layers, dual, qk_norm in (("sd3", 2, 0, False), ("sd35", 3, 1, True)):
        keep(
            name,
            partial(sd3, 2, layers, dual, qk_norm, 20, 24, 8, 6),
            original_sd3(2 * SD3_HEAD, layers, dual, qk_norm, 20, 24),
            single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
            run_sd3,
            "pos_embed.pos_embed",
        )
    for name, guidance in (("flux_dev", True), ("flux_schnell", False)):
        keep(
            name,
            partial(flux, 2, FLUX_HEAD, 2, 2, guidance, 20, 24, 16, (4, 6, 6)),
            original_flux(2 * FLUX_HEAD, FLUX_HEAD, 2, 2, guidance, 20, 24, 16),
            convert_flux(2 * FLUX_HEAD),
            partial(run_flux, guidance=guidance),
        )

    def keep_published(name, make, original):
        with torch.device("meta"):
            shapes = {k: tuple(v.shape) for k, v in make().state_dict().items()}
        shapes.pop("pos_embed.pos_embed", None)
        for layout, names in (("diffusers", shapes), ("original", original)):
            arrays[f"{name}.{layout}.shapes"] = np.array(json.dumps(names))

    for name, layers, dual, qk_norm in (
        ("SD3-medium", 24, 0, False),
        ("SD3.5-medium", 24, 13, True),
        ("SD3.5-large", 38, 0, True),
    ):
        keep_published(
            name,
            partial(sd3, layers, layers, dual, qk_norm, 4096, 2048, 128, 192),
            original_sd3(SD3_HEAD * layers, layers, dual, qk_norm, 4096, 2048),
        )
    for name, guidance in (("FLUX.1-dev", True), ("FLUX.1-schnell", False)):
        keep_published(
            name,
            partial(flux, 24, 128, 19, 38, guidance, 4096, 768, 64, (16, 56, 56)),
            original_flux(3072, 128, 19, 38, guidance, 4096, 768, 64),
        )

    np.savez_compressed(HERE / "mmdit.npz", **arrays)
    for name, value in arrays.items():
        print(name, value.dtype, value.shape, np.std(value) if value.dtype.kind == "f" else "")


if __name__ == "__main__":
    main()
