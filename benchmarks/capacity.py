r"""The largest model that each layout of the training state fits, by calculation: nothing is
allocated.

    python benchmarks/capacity.py [--model dit] [--memory 16 80 141] [--devices 8 64] [--rows 8] \
        [--short]
    python benchmarks/capacity.py --published

Models of a family grow in width and depth together: DiT as from B to XL (depth = width * 28 / 1152,
heads of 64), or coupling flows on 3072 numbers (depth = width / 32). The largest is taken for which

    state + gradients + gathered + rows * activations  <=  memory * (1 - reserve)

holds on one device, all in bytes of float32 and all from the shapes of the traced functions:

    state        params, Adam's two moments and the average, split by the layout's rules
                 (jflow.train.shardings)
    gradients    as the params are split
    gathered     fsdp alone: the weights of two layers (in use, and on their way) and what no scan
                 slices, whole
    activations  what one row keeps for the backward pass: residuals of jax.vjp of the loss, those
                 of two batches subtracted; with remat also one layer's own, recomputed
    reserve      for XLA's working memory, 0.2 unless told

Layouts: `data`, the state on every device; `fsdp`, split over all of them; `+ remat`, layers
recomputed in the backward pass; `data + reversible`, rebuilt from their outputs (coupling flows);
`tensor`, matrices split over groups of up to 8 devices, whose activations are counted whole, an
upper bound. `--check` compares the formula with XLA's own account of a small model on 8 fake
devices. `--published` prints what the params of published models of images take in bfloat16, part
by part: `jflow sample --pretrained` holds one part at a time.
"""

import argparse
import functools
import math
import os

LADDER = [
    64 * k
    for k in (
        2,
        3,
        4,
        6,
        8,
        10,
        12,
        14,
        16,
        18,
        20,
        24,
        28,
        32,
        36,
        40,
        48,
        56,
        64,
        72,
        80,
        96,
        112,
        128,
        160,
    )
]
GIB = 2**30


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("dit", "coupling"), default="dit")
    parser.add_argument(
        "--memory", type=float, nargs="+", default=[16, 80, 141], help="GiB of a device"
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rows", type=int, default=8, help="of the batch, on each device")
    parser.add_argument(
        "--tokens",
        type=int,
        default=256,
        help="of an image (dit): 256 is 32x32 latents in patches of 2",
    )
    parser.add_argument("--reserve", type=float, default=0.2)
    parser.add_argument(
        "--check", action="store_true", help="compare with XLA's account of a small model"
    )
    parser.add_argument(
        "--published", action="store_true", help="the params of SD3, SD3.5 and FLUX.1, in bfloat16"
    )
    parser.add_argument(
        "--short", action="store_true", help="one memory, one number of devices, a small ladder"
    )
    args = parser.parse_args()
    if args.short:
        args.memory, args.devices, args.tokens = [2], [8], 64
    return args


def main():
    args = arguments()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    if args.check:
        return check(args)
    if args.published:
        return published()
    names = layouts(args.model)
    for devices in args.devices:
        print(
            f"\n{args.model} on {devices} devices, {args.rows} rows each: parameters in millions"
            " (width x depth)\n"
        )
        print(f"| GiB a device | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
        for memory in args.memory:
            cells = [
                largest(args, name, devices, memory * GIB * (1 - args.reserve)) for name in names
            ]
            print(f"| {memory:g} | {' | '.join(cells)} |", flush=True)


def published():
    import jax
    import jax.numpy as jnp

    from jflow import nets
    from jflow.types import Condition

    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    ids, image = of(1, 77, dtype=jnp.int32), of(1, 64, 64, 3)
    latents, t = of(1, 8, 8, 16), of(1)
    joint, flux = (Condition(context=of(1, 4, 4096), vector=of(1, width)) for width in (2048, 768))
    clip_l = nets.CLIPText(), ids
    clip_l_pooled = nets.CLIPText(projection=768), ids
    clip_g = nets.CLIPText(width=1280, num_layers=32, num_heads=20, mlp_width=5120, projection=1280)
    t5 = nets.T5Encoder(), ids
    decoder = nets.AutoencoderKL(latent_channels=16, quant_convs=False), image
    text = [clip_l_pooled, (clip_g, ids), t5]
    flux_1 = nets.Flux(2, 3072, 19, 38, 24, rope_axes=(16, 56, 56))
    models = {
        "SD3-medium": (text, (nets.MMDiT(2, 1536, 24, 24), latents, t, joint)),
        "SD3.5-medium": (
            text,
            (nets.MMDiT(2, 1536, 24, 24, 13, True, grid_size=384), latents, t, joint),
        ),
        "SD3.5-large": (text, (nets.MMDiT(2, 2432, 38, 38, qk_norm=True), latents, t, joint)),
        "FLUX.1-dev": ([clip_l, t5], (flux_1.clone(guidance=3.5), latents, t, flux)),
        "FLUX.1-schnell": ([clip_l, t5], (flux_1, latents, t, flux)),
    }

    def count(net, *inputs):
        params = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

    print("params in GiB of bfloat16\n\n| model | text | velocity | autoencoder | largest | sum |")
    print("|" + "---|" * 6)
    for name, (encoders, velocity) in models.items():
        parts = [sum(count(*e) for e in encoders), count(*velocity), count(*decoder)]
        parts = [2 * n / GIB for n in parts]
        numbers = [*parts, max(parts), sum(parts)]
        print(f"| {name} | {' | '.join(f'{n:.2f}' for n in numbers)} |", flush=True)


def layouts(model):
    return (
        "data",
        *(("data + reversible",) if model == "coupling" else ()),
        "fsdp",
        "fsdp + remat",
        "tensor",
    )


def largest(args, layout, devices, budget):
    """By bisection: what a device needs grows with the width."""
    ladder = LADDER[:8] if args.short else LADDER
    low, high = -1, len(ladder)
    while high - low > 1:
        middle = (low + high) // 2
        if (
            sum(
                needed(args.model, ladder[middle], args.tokens, layout, devices, args.rows).values()
            )
            <= budget
        ):
            low = middle
        else:
            high = middle
    if low < 0:
        return "-"
    shapes = traced(args.model, ladder[low], args.tokens, "plain")[0]
    count = sum(math.prod(leaf.shape) for leaf in leaves(shapes.params))
    more = ">= " if low == len(ladder) - 1 else ""
    return f"{more}{count / 1e6:,.0f} ({ladder[low]} x {depth_of(args.model, ladder[low])})"


def depth_of(model, width):
    return max(1, round(width * 28 / 1152)) if model == "dit" else max(2, width // 32)


@functools.cache
def traced(model, width, tokens, memory_mode):
    """Shapes of the state and the bytes that one row keeps, with what they were traced from;
    nothing is computed."""
    import jax
    import jax.numpy as jnp
    import optax

    import jflow
    from jflow import flows, losses, nets, train

    depth, key = depth_of(model, width), jax.eval_shape(lambda: jax.random.key(0))
    if model == "dit":
        net = nets.DiT(
            patch_size=2,
            width=width,
            num_layers=depth,
            num_heads=width // 64,
            remat=memory_mode == "remat",
        )
        velocity = jflow.velocity(net)
        event, loss = (
            (2 * math.isqrt(tokens), 2 * math.isqrt(tokens), 4),
            losses.flow_matching(velocity),
        )
        init = lambda key, x: velocity.init(key, x, jnp.zeros(len(x)))  # noqa: E731
    else:
        saved = {"remat": memory_mode == "remat", "reversible": memory_mode == "reversible"}
        flow = flows.real_nvp((3072,), depth=depth, hidden=(width, width), **saved)
        event, loss, init = (3072,), losses.nll(flow), flow.init

    def start(key, x):
        return train.init_state(init(key, x), optax.adam(1e-4), key, ema=0.999)

    def residuals(rows):
        x = jax.ShapeDtypeStruct((rows, *event), jnp.float32)
        kept = jax.eval_shape(
            lambda p, key, x: jax.vjp(lambda p: loss(p, key, {"x": x})[0], p)[1],
            state.params,
            key,
            x,
        )
        return sum(train.bytes_per_device(leaf, single) for leaf in leaves(kept))

    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.eval_shape(start, key, jax.ShapeDtypeStruct((2, *event), jnp.float32))
    few, more = residuals(2), residuals(4)
    return state, (more - few) / 2, loss, start, event


def leaves(tree):
    import jax

    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]


def rules_of(model, layout):
    from jax.sharding import PartitionSpec as P

    from jflow import train

    if layout.startswith("fsdp"):
        return ((".*", train.fsdp()),)
    if layout.startswith("data"):
        return ()
    columns, rows = P(None, "model"), P("model", None)
    if model == "dit":
        return (("blocks/.*(in|modulation|qkv)/kernel", columns), ("blocks/.*out/kernel", rows))
    return (("Dense_0/kernel", columns), ("Dense_1/kernel", rows), ("head/kernel", columns))


def needed(model, width, tokens, layout, devices, rows):
    """Bytes on one device, by what they are for."""
    import jax

    from jflow import train

    mode = layout.split(" + ")[1] if "+" in layout else "plain"
    group = min(8, devices)
    names, sizes = (
        (("data",), (devices,))
        if layout != "tensor"
        else (("data", "model"), (devices // group, group))
    )
    mesh = jax.sharding.AbstractMesh(sizes, names)
    state, row, *_ = traced(model, width, tokens, mode)
    placed = train.shardings(state, mesh, rules_of(model, layout))
    if mode == "remat":
        row += traced(model, width, tokens, "plain")[1] / depth_of(model, width)
    gathered = 0
    if layout.startswith("fsdp"):
        depth = depth_of(model, width)
        for leaf, where in zip(leaves(state.params), jax.tree.leaves(placed.params), strict=True):
            if where.shard_shape(leaf.shape) != leaf.shape:
                scanned = leaf.shape[0] == depth and leaf.ndim > 1
                gathered += math.prod(leaf.shape) * 4 * (2 / depth if scanned else 1)
    return {
        "state": train.bytes_per_device(state, placed),
        "gradients": train.bytes_per_device(state.params, placed.params),
        "gathered": gathered,
        "activations": rows * row,
    }


def check(args):
    """The formula beside XLA's arguments and temporaries, for a small model on 8 fake devices."""
    import jax
    import optax

    from jflow import train

    width = 256
    print("| layout | formula, MiB | XLA, MiB | ratio |\n|---|---|---|---|")
    for layout in layouts(args.model):
        mode = layout.split(" + ")[1] if "+" in layout else "plain"
        state, _, loss, _, event = traced(args.model, width, args.tokens, mode)
        axes = {"model": 8} if layout == "tensor" else {"data": 8}
        mesh, rules = train.make_mesh(axes), rules_of(args.model, layout)
        placed = train.shardings(state, mesh, rules)
        loss = train.gather_params(loss, mesh, rules) if layout.startswith("fsdp") else loss
        where = train.replicated(mesh) if layout == "tensor" else train.data_sharding(mesh)
        rows = args.rows * (1 if layout == "tensor" else 8)
        x = jax.ShapeDtypeStruct((rows, *event), "float32", sharding=where)
        args_ = jax.tree.map(
            lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), state, placed
        )
        step = train.make_step(loss, optax.adam(1e-4), ema=0.999)
        program = (
            jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
            .lower(args_, {"x": x})
            .compile()
        )
        account = program.memory_analysis()
        xla = account.argument_size_in_bytes + account.temp_size_in_bytes
        predicted = sum(needed(args.model, width, args.tokens, layout, 8, args.rows).values())
        print(
            f"| {layout} | {predicted / 2**20:.0f} | {xla / 2**20:.0f} | {xla / predicted:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
