"""Writes outputs of diffusers' SD3 and Flux transformers with LoRAs, so that tests need no torch.

Run once, in an environment that has torch, diffusers, peft and jflow, and commit the result:

    pip install torch diffusers peft
    python tests/peers/make_lora_fixtures.py

Written with torch 2.13.0, diffusers 0.42.1, peft 0.21.2. The base is that of
make_mmdit_fixtures.py, with every tensor drawn from its name, and so is every matrix of the LoRAs
(`lora_tensors`). Kept are, by file: its names and shapes, its metadata, and the output. Two files
are jflow's own: diffusers reads what `convert.save_lora` wrote, and their outputs are kept too.
"""

import inspect
import json
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import safetensors
import torch
from diffusers.loaders import lora_conversion_utils
from peft import LoraConfig, get_peft_model

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "convert")]
from make_mmdit_fixtures import drawn, flux, load, run_flux, run_sd3, sd3  # noqa: E402

TABLE = "pos_embed.pos_embed"
MODELS = {
    "sd35": (lambda: sd3(2, 3, 1, True, 20, 24, 8, 6), run_sd3, TABLE),
    "flux_dev": (
        lambda: flux(2, 16, 2, 2, True, 20, 24, 16, (4, 6, 6)),
        lambda model: run_flux(model, True),
        "",
    ),
}
# every kind of module, and not in every block: ranks and alphas differ
TARGETS = {
    "sd35": r"(pos_embed\.proj|context_embedder|norm_out\.linear|proj_out"
    r"|transformer_blocks\.[02]\.(attn\.(to_q|to_v|add_k_proj)|norm1(_context)?\.linear)"
    r"|transformer_blocks\.0\.(attn2\.to_k|ff\.net\.2)"
    r"|transformer_blocks\.1\.(attn\.to_out\.0|ff_context\.net\.0\.proj))",
    "flux_dev": r"(x_embedder|norm_out\.linear|proj_out"
    r"|time_text_embed\.guidance_embedder\.linear_1"
    r"|transformer_blocks\.1\.(attn\.(to_q|to_k|to_add_out)|norm1\.linear)"
    r"|single_transformer_blocks\.[01]\.(attn\.to_v|proj_mlp|proj_out))",
}
KOHYA = {  # module of the original: inputs, outputs, in widths of 32; alpha
    "double_blocks_0_img_attn_qkv": (32, 96, 2.0),
    "double_blocks_1_txt_mlp_0": (32, 128, None),
    "double_blocks_1_img_mod_lin": (32, 192, 4.0),
    "single_blocks_1_linear1": (32, 224, 1.0),
    "single_blocks_0_linear2": (160, 32, 3.0),
}
XLABS = {  # module: outputs, rank
    "double_blocks.0.processor.qkv_lora1": (96, 2),
    "double_blocks.1.processor.qkv_lora2": (96, 1),
    "double_blocks.1.processor.proj_lora1": (32, 2),
}


def lora_tensors(shapes):
    """Each matrix from its name, so large that the LoRA changes the output much."""
    return {name: 2 * drawn(name, shape) for name, shape in shapes.items()}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def base(name):
    make, run, table = MODELS[name]
    model = make()
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if k != table}
    return load(model, {k: drawn(k, shape) for k, shape in shapes.items()}, table), run


def config_of(name):
    return LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=TARGETS[name],
        rank_pattern={r"transformer_blocks\.0\.attn\.to_q": 2},
        alpha_pattern={"proj_out": 1.5},
        init_lora_weights=False,
    )


def filled(model):
    """The model, of which every matrix of the LoRA is drawn by the name that a file has."""
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            file_name = name.replace(".default.", ".").removeprefix("base_model.model.")
            tensor.copy_(torch.as_tensor(2 * drawn(file_name, tuple(tensor.shape))))
    return model


@torch.no_grad()
def main():
    arrays = {}

    def keep(name, tensors, metadata, out):
        arrays[f"{name}.shapes"] = np.array(json.dumps(shapes_of(tensors)))
        arrays[f"{name}.metadata"] = np.array(json.dumps(metadata))
        arrays[f"{name}.out"] = out

    for name in MODELS:
        plain, run = base(name)
        arrays[f"{name}.base.out"] = run(plain)
        # peft, with its configuration in the metadata as diffusers saves it
        model, run = base(name)
        wrapped = filled(get_peft_model(model, config_of(name)))
        out = run(wrapped)
        with tempfile.TemporaryDirectory() as folder:
            wrapped.save_pretrained(folder)
            with safetensors.safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
        config = {k: config[k] for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
        keep(f"{name}.peft", tensors, config, out)
        # diffusers, without a scale
        short = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
        model, run = base(name)
        model.load_lora_adapter({f"transformer.{k}": v for k, v in short.items()})
        keep(f"{name}.diffusers", {f"transformer.{k}": v for k, v in short.items()}, {}, run(model))

    # kohya's names and alphas, through diffusers' converter, which has the published width in it
    shapes, alphas = {}, {}
    for module, (inputs, outputs, alpha) in KOHYA.items():
        shapes[f"lora_unet_{module}.lora_down.weight"] = (2, inputs)
        shapes[f"lora_unet_{module}.lora_up.weight"] = (outputs, 2)
        if alpha is not None:
            alphas[f"lora_unet_{module}.alpha"] = alpha
    source = inspect.getsource(lora_conversion_utils._convert_kohya_flux_lora_to_diffusers)
    assert source.count("[3072, 3072, 3072, 12288]") == 1
    space = vars(lora_conversion_utils).copy()
    exec(source.replace("[3072, 3072, 3072, 12288]", "[32, 32, 32, 128]"), space)
    kohya = {k: torch.as_tensor(v) for k, v in lora_tensors(shapes).items()}
    kohya |= {k: torch.tensor(v) for k, v in alphas.items()}
    converted = space["_convert_kohya_flux_lora_to_diffusers"](dict(kohya))
    model, run = base("flux_dev")
    model.load_lora_adapter({k: v.contiguous().clone() for k, v in converted.items()})
    keep("flux_dev.kohya", kohya, alphas, run(model))

    # x-labs' names
    shapes = {}
    for module, (outputs, rank) in XLABS.items():
        shapes[f"{module}.down.weight"] = (rank, 32)
        shapes[f"{module}.up.weight"] = (outputs, rank)
    xlabs = {k: torch.as_tensor(v) for k, v in lora_tensors(shapes).items()}
    converted = lora_conversion_utils._convert_xlabs_flux_lora_to_diffusers(dict(xlabs))
    model, run = base("flux_dev")
    model.load_lora_adapter({k: v.contiguous().clone() for k, v in converted.items()})
    keep("flux_dev.xlabs", xlabs, {}, run(model))

    # what jflow writes
    import test_lora

    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pytorch_lora_weights.safetensors"
            test_lora.write_own(name, path)
            model, run = base(name)
            pipeline = test_lora.PIPELINES[name]
            mixin = getattr(diffusers.loaders, pipeline)
            state, metadata = mixin.lora_state_dict(folder, return_lora_metadata=True)
            model.load_lora_adapter(state, metadata=metadata)
            arrays[f"{name}.own.out"] = run(model)
    np.savez_compressed(HERE / "lora.npz", **arrays)


if __name__ == "__main__":
    main()
