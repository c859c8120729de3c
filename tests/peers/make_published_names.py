"""Writes the names and shapes of SD3, SD3.5 and FLUX.1, as the code of their authors makes them.

Run once, with checkouts of https://github.com/Stability-AI/sd3.5 and
https://github.com/black-forest-labs/flux, and commit the result:

    pip install torch einops transformers
    python tests/peers/make_published_names.py SD35 FLUX

Written at the commits fbf8f48 and 802fb47, with torch 2.13.0. The networks are made without numbers
(on torch's meta device); no weight file is opened. The sizes of FLUX.1 are those of the authors'
src/flux/util.py. The code of SD3 takes its sizes from the shapes in a file; here they are those of
diffusers' configurations (depth, table of positions, blocks with a second attention). In the result
'{}' in a name stands for the number of a block, and [name, first, last, shape] for all of them.
"""

import ast
import json
import re
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
SD3 = {  # depth, side of the table of positions, qk_norm, blocks with a second attention
    "SD3-medium": (24, 192, None, 0),
    "SD3.5-medium": (24, 384, "rms", 13),
    "SD3.5-large": (38, 192, "rms", 0),
}


def sd3(checkout):
    sys.path.insert(0, checkout)
    from mmditx import MMDiTX

    for name, (depth, side, qk_norm, dual) in SD3.items():
        width = 64 * depth
        yield (
            name,
            MMDiTX(
                input_size=None,
                pos_embed_max_size=side,
                num_patches=side**2,
                in_channels=16,
                depth=depth,
                adm_in_channels=2048,
                context_embedder_config={
                    "target": "torch.nn.Linear",
                    "params": {"in_features": 4096, "out_features": width},
                },
                qk_norm=qk_norm,
                x_block_self_attn_layers=list(range(dual)),
                device="meta",
            ),
        )


def flux(checkout):
    source = Path(checkout) / "src"
    sys.path.insert(0, str(source))
    from flux.model import Flux, FluxParams

    (configs,) = (
        node.value
        for node in ast.parse((source / "flux" / "util.py").read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "configs"
    )
    found = dict(zip(map(ast.literal_eval, configs.keys), configs.values, strict=True))
    for name in ("dev", "schnell"):
        (call,) = (k.value for k in found[f"flux-{name}"].keywords if k.arg == "params")
        sizes = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        with torch.device("meta"):
            yield f"FLUX.1-{name}", Flux(FluxParams(**sizes))


def rows(model):
    """[name, first, last, shape] in the order of the names; first is None without blocks."""
    found = []
    for key, tensor in model.state_dict().items():
        number = re.search(r"blocks\.(\d+)\.", key)
        i = int(number[1]) if number else None
        name = key.replace(f"blocks.{i}.", "blocks.{}.")
        found.append([name, i, i, list(tensor.shape)])
    found.sort(key=lambda row: (row[0], row[1] or 0))
    merged = found[:1]
    for name, i, _, shape in found[1:]:
        last = merged[-1]
        if i is not None and last[0] == name and last[3] == shape and last[2] == i - 1:
            last[2] = i
        else:
            merged.append([name, i, i, shape])
    return merged


def main(of_sd3, of_flux):
    names = {name: rows(model) for part in (sd3(of_sd3), flux(of_flux)) for name, model in part}
    lines = (
        f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, found)) + "\n]"
        for name, found in names.items()
    )
    (HERE / "published_names.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
