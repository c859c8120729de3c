"""One accelerator in one run of at most eight minutes, as tables for benchmarks/README.md.

    python benchmarks/device.py [--out FILE] [--budget 480] [--sections kernels dit]
    python benchmarks/device.py --short

The sections, the most important first:

    kernels     every kernel, forward and inverse, each implementation in float32 on fresh random
                inputs against its plain reference in float64: the relative error ||out - exact|| /
                ||exact|| of the worst output, and of the worst gradient (for random cotangents);
                more than 1e-3, or a number that is not finite, is a failure
    bandwidth   coupling transforms: the fewest bytes (inputs and cotangents read once, outputs and
                gradients written once) over seconds, as a share of what a large copy on the device
                reaches
    density     flows as in density.py, beside FlowJAX where it is installed, and the matrix
                products alone
    dit         a training step of flow matching of DiT-B/2 in bfloat16: model FLOPs utilization by
                attention function
    ode         solvers.sample beside a hand-written scan, as in ode_sampling.py
    depth       temporary memory and time of plain, rematerialized and reversible stacks, as in
                depth.py

Calls are compiled first, those that are compared take turns, and medians are printed; a turn chains
calls that are short beside a launch. Each section runs in a process of its own, so that a crash or
a hang ends that section alone; what fails is a cell of the table, and the exit status tells. Where
the budget is used up, the rest is named and left out. Every row is printed, and appended to --out,
as soon as it is measured. On a CPU, Pallas kernels are interpreted: only their errors mean anything
there.
"""

import argparse
import datetime
import importlib.util
import os
import shlex
import sys
from functools import partial

import density
import depth
import flow_matching_step
import jax
import jax.numpy as jnp
import numpy as np
import ode_sampling
import optax
from sections import Section, attempt, cell, emit, mebibytes, milliseconds, ratio, run_all, timed

import jflow
from jflow import kernels, losses, nets, train
from jflow.bijectors import scales, univariate

TOLERANCE = 1e-3  # of a kernel's relative error: beyond it, the kernel is wrong
BOTH = ("xla", "pallas")
PEAKS = {  # bfloat16 FLOP/s without sparsity, by a part of device_kind; the first that fits
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def column_kernel(name, size):
    """(raw numbers, plain(inverse, x, raw), run(implementation, inverse, x, raw)); size: bins or
    components."""
    scalar_map = (
        univariate.affine()
        if name == "affine"
        else getattr(univariate, name)(size, implementation="plain")
    )
    transform = getattr(kernels, name).transform
    transform = partial(transform, log_scale=scales.bounded()) if name == "affine" else transform

    def plain(inverse, x, raw):
        y, log_slope = (scalar_map.inverse if inverse else scalar_map.forward)(
            x, jnp.moveaxis(raw, 0, -1)
        )
        return y, jnp.sum(log_slope, axis=0)

    def run(implementation, inverse, x, raw):
        return transform(x, raw, inverse=inverse, implementation=implementation)

    return scalar_map.size, plain, run


def masked_convolution(implementation, inverse, x, kernel):
    if inverse:
        return kernels.masked_conv.inverse(x, kernel, implementation=implementation)
    return kernels.masked_conv.conv(x, kernel)


def with_gradient(f):
    """(inputs, cotangents) -> (outputs, gradients)"""

    def both(inputs, cotangents):
        outputs, vjp = jax.vjp(f, *inputs)
        return outputs, vjp(cotangents)

    return jax.jit(both)


def all_kernels(args, rng):
    """(name, inputs, the shape that `choice` asks for, plain, run); with raw numbers of a wider
    spread, a few columns of a spline have gradients of thousands, and their rounding is all that an
    error says."""
    d, n, size, image = (
        (2, 130, 2, (2, 5, 4, 3)) if args.short else (8, 2**14 + 1, 8, (16, 16, 16, 8))
    )
    for name in ("affine", "rational_quadratic", "logistic_mixture"):
        count, plain, run = column_kernel(name, size)
        inputs = 3 * rng.normal(size=(d, n)), 0.5 * rng.normal(size=(count, d, n))
        yield name, inputs, (count, d, n), plain, run
    kernel = rng.normal(size=(3, 3, image[3], image[3])) / (6 * image[3] ** 0.5)
    kernel[-1, -1] += np.diag(2 ** rng.uniform(-1, 1, image[3]) - np.diag(kernel[-1, -1]))
    inputs = rng.normal(size=image), kernel
    yield "masked_conv", inputs, image, partial(masked_convolution, "xla"), masked_convolution


def kernel_errors(args):
    def error(found, exact):
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        worst = np.max([np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b) for a, b in pairs])
        if not worst <= TOLERANCE:
            raise FloatingPointError(f"relative error {worst:.1e}")
        return f"{worst:.1e}"

    def measure(inputs, plain, run, inverse, rng):
        inputs, plain = jax.tree.map(np.float32, inputs), partial(plain, inverse)
        bars = jax.tree.map(
            lambda a: np.float32(rng.normal(size=a.shape)), jax.eval_shape(plain, *inputs)
        )
        with jax.enable_x64(True):
            exact = jax.device_get(with_gradient(plain)(*jax.tree.map(np.float64, (inputs, bars))))
        cells = []
        for implementation in BOTH:
            program = with_gradient(partial(run, implementation, inverse))
            found = attempt(lambda program=program: jax.device_get(program(inputs, bars)))
            cells += [cell(lambda f, i=i: attempt(error, f[i], exact[i]), found) for i in (0, 1)]
        return cells

    rng = np.random.default_rng(args.seed)
    if kernels.columns.triton is None:
        yield (
            "This jax has no Triton in Pallas: on a GPU, the column kernels' `pallas` is their"
            " `xla`."
        )
    for name, inputs, shape, plain, run in all_kernels(args, rng):
        yield kernels.explain(getattr(kernels, name), shape)
        for inverse in (False, True):
            label = name, "x".join(map(str, shape)), "inverse" if inverse else "forward"
            yield label, partial(measure, inputs, plain, run, inverse, rng)


def over(program, sets):
    return [program(*inputs) for inputs in sets]


def bandwidth(args):
    shapes = [
        ("rational_quadratic", 16, 2**20),
        ("affine", 16, 2**20),
        ("rational_quadratic", 64, 2**18),
    ]
    shapes += [("affine", 64, 2**18), ("rational_quadratic", 16, 2**16)]
    numbers, rotated, bins = (
        2**28,
        2**29,
        8,
    )  # float32 in the copy, bytes of inputs in rotation: more than caches hold
    if args.short:
        shapes, numbers, rotated, bins = (
            [("rational_quadratic", 2, 256), ("affine", 2, 256)],
            2**20,
            2**12,
            2,
        )
    block, copy = jnp.ones(numbers), jax.jit(jnp.copy)

    def bytes_of(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def measure(name, d, n, what):
        size, _, run = column_kernel(name, bins)

        def draw(key):
            """(x, raw), and the cotangents of (y, log_det) where there are gradients."""
            keys = jax.random.split(key, 4)
            inputs = (
                3 * jax.random.normal(keys[0], (d, n)),
                jax.random.normal(keys[1], (size, d, n)),
            )
            bars = jax.random.normal(keys[2], (d, n)), jax.random.normal(keys[3], (n,))
            return (inputs, bars) if "gradient" in what else inputs

        def program(implementation):
            f = partial(run, implementation, what != "forward")
            return with_gradient(f) if "gradient" in what else jax.jit(f)

        keys = jax.random.split(jax.random.key(args.seed), 64)
        read = jax.eval_shape(draw, keys[0])
        least = bytes_of((read, jax.eval_shape(program("xla"), *read)))
        sets = list(map(jax.jit(draw), keys[: -(-rotated // bytes_of(read))]))
        calls = {i: partial(over, program(i), sets) for i in BOTH}
        times = timed({"copy": partial(copy, block), **calls}, args)
        speed = cell(lambda s: 2 * block.nbytes / np.median(s), times["copy"])
        shares = [
            cell(lambda s, v: f"{len(sets) * least / np.median(s) / v:.2f}", times[i], speed)
            for i in BOTH
        ]
        return [f"{least / 2**20:.3g}", cell(lambda v: f"{v / 1e9:.0f}", speed), *shares]

    for name, d, n in shapes:
        for what in ("forward", "inverse", "inverse, gradient"):
            yield (name, f"{d} x {n}", what), partial(measure, name, d, n, what)


def densities(args):
    cases = [
        ("spline", 64, 2**16),
        ("spline", 16, 2**16),
        ("affine", 64, 2**16),
        ("spline", 16, 2**12),
    ]
    makers = {"jflow": density.jflow_model, "products": density.products_model}
    makers["pallas"] = partial(density.jflow_model, implementation="pallas")
    if all(map(importlib.util.find_spec, ("flowjax", "equinox", "paramax"))):
        makers["FlowJAX"] = density.flowjax_model

    def measure(models, what):
        times = timed(
            {k: cell(lambda model: model[0][what], model) for k, model in models.items()}, args
        )
        ratios = [
            ratio(times[k], times["jflow"]) if k in times else "-"
            for k in ("pallas", "FlowJAX", "products")
        ]
        known = [models.get(k) for k in ("jflow", "FlowJAX") if what == "train"]
        memory = [
            cell(lambda m: mebibytes(m[1]().compile()), model) if model else "-" for model in known
        ]
        return [milliseconds(times["jflow"]), *ratios, *(memory or ("", ""))]

    for kind, features, rows in [("affine", 4, 64)] if args.short else cases:
        sizes = argparse.Namespace(depth=2 if args.short else 8, batch=rows)
        kept = {
            k: make for k, make in makers.items() if k != "pallas" or kind == "spline"
        }  # the one with a kernel
        models = {k: attempt(make, features, kind, sizes) for k, make in kept.items()}
        for what in density.WHAT:
            yield (kind, features, rows, what), partial(measure, models, what)


def dit_steps(args):
    """A step has 6 FLOPs for each weight of a matrix product and token, 2 forward and 4 backward,
    and for each row's attention 12 depth width tokens^2 (`flow_matching_step.model_flops`); what is
    computed again does not count."""
    case, batches, side = (
        flow_matching_step.SIZES["base"]["dit"]._replace(turn=2),
        (256, 128, 64),
        8192,
    )
    if args.short:
        sizes = {"patch_size": 2, "width": 32, "num_layers": 2, "num_heads": 2}
        case, batches, side = flow_matching_step.Case((8, 8, 4), 4, 1, sizes), (4, 2), 256
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAKS.items() if name in kind), None)
    square = jax.random.normal(jax.random.key(args.seed), (side, side), jnp.bfloat16)
    product = partial(jax.jit(jnp.matmul), square, square)
    functions = {
        "written out": nets.dot_product_attention,
        "jax.nn, xla": jax.nn.dot_product_attention,
    }
    if jax.default_backend() == "gpu":
        functions["jax.nn, cudnn"] = partial(jax.nn.dot_product_attention, implementation="cudnn")

    def build(attention_fn, rows):
        net = nets.DiT(
            **case.sizes, num_classes=1000, dtype=jnp.bfloat16, attention_fn=attention_fn
        )
        velocity, optimizer, keys = (
            jflow.velocity(net),
            optax.adam(1e-4),
            jax.random.split(jax.random.key(args.seed), 4),
        )
        x, cond = (
            jax.random.normal(keys[0], (rows, *case.shape)),
            jax.random.randint(keys[1], (rows,), 0, 1000),
        )
        params = jax.jit(velocity.init)(keys[2], x, jnp.zeros(rows), cond)
        state, step = (
            train.init_state(params, optimizer, keys[3]),
            train.make_step(losses.flow_matching(velocity), optimizer),
        )
        return flow_matching_step.contestant(step, state, {"x": x, "cond": cond}, case.turn)

    def measure(attention_fn):
        for rows in batches:  # the first that fits
            entry = attempt(build, attention_fn, rows)
            if "RESOURCE_EXHAUSTED" not in f"{entry}":
                break
        if isinstance(entry, Exception):
            raise entry
        times = timed({"step": entry.turn, "product": product}, args)
        step = cell(lambda s: s / entry.steps, times["step"])
        rate = cell(
            lambda s: flow_matching_step.model_flops(case._replace(batch=rows)) / np.median(s), step
        )
        best = cell(lambda s: 2 * side**3 / np.median(s), times["product"])
        shares = [cell(lambda r, p: f"{r / p:.3f}", rate, p) if p else "-" for p in (peak, best)]
        rates = [cell(lambda r: f"{r / 1e12:.3g}", r) for r in (rate, best)]
        return [rows, milliseconds(step), *rates, *shares, f"{entry.memory / 2**20:.1f}"]

    for name, attention_fn in functions.items():
        yield (name,), partial(measure, attention_fn)


def ode_samples(args):
    sizes = {"64 numbers, 3 x 1024, 16384 rows": (64, 1024, 16384), **ode_sampling.SIZES}
    methods, evaluations = list(ode_sampling.SOLVERS), ode_sampling.EVALUATIONS
    if args.short:
        sizes, methods, evaluations = dict(list(ode_sampling.SIZES.items())[:1]), methods[:1], 20

    def measure(method, features, width, rows):
        solver, each = ode_sampling.SOLVERS[method]
        velocity = jflow.velocity(ode_sampling.Net(width))
        params_key, x_key = jax.random.split(jax.random.key(args.seed))
        x = jax.random.normal(x_key, (rows, features))
        params = velocity.init(params_key, x, jnp.zeros(rows))
        by_hand = partial(
            ode_sampling.by_hand(method, evaluations // each), ode_sampling.plain(params), x
        )
        sample = partial(ode_sampling.sampler(velocity, solver, evaluations // each), params, x)
        times = timed({"scan": by_hand, "jflow": sample}, args)
        gap = cell(lambda *_: f"{np.max(np.abs(by_hand() - sample())):.1e}", *times.values())
        return [milliseconds(times["scan"]), ratio(times["scan"], times["jflow"]), gap]

    for size, numbers in sizes.items():
        for method in methods:
            yield (size, method), partial(measure, method, *numbers)


def deep_stacks(args):
    sizes = argparse.Namespace(features=16, rows=2**14, hidden=(128, 128))
    names, depths = ("spline", "affine"), (16, 4, 64)
    if args.short:
        sizes, names, depths = (
            argparse.Namespace(features=4, rows=64, hidden=(16,)),
            ("affine",),
            (4, 16),
        )
    modes, x = ("plain", "remat", "reversible"), depth.moons(sizes)

    def measure(layer, layers):
        params, _ = depth.trained(depth.stack(layer, sizes.features, layers), layers, x, 0)

        def compiled(mode):
            stack = depth.stack(layer, sizes.features, layers, **depth.MODES[mode])
            return (
                jax.jit(jax.value_and_grad(depth.negative_log_likelihood(stack)))
                .lower(params, x)
                .compile()
            )

        programs = {mode: attempt(compiled, mode) for mode in modes}
        times = timed(
            {mode: cell(lambda p: partial(p, params, x), p) for mode, p in programs.items()}, args
        )
        ratios = [ratio(times[mode], times["plain"]) for mode in modes[1:]]
        return [
            *(cell(mebibytes, programs[mode]) for mode in modes),
            milliseconds(times["plain"]),
            *ratios,
        ]

    for layers in depths:
        for name in names:
            yield (name, layers), partial(measure, depth.layers(sizes)[name], layers)


SECTIONS = {
    "kernels": Section(
        kernel_errors,
        0.25,
        "Kernels: relative error from the plain reference in float64",
        "kernel | shape | | xla | its gradient | pallas | its gradient",
    ),
    "bandwidth": Section(
        bandwidth,
        0.25,
        "Coupling transforms: bytes a second over those of a copy",
        "kernel | d x n | | least MiB | copy, GB/s | xla / copy | pallas / copy",
    ),
    "density": Section(
        densities,
        0.2,
        "Densities, 8 couplings: jflow, and the others' seconds over jflow's",
        "flow | D | rows | | jflow, ms | its pallas | FlowJAX | products | jflow, temp MiB |"
        " FlowJAX, temp MiB",
    ),
    "dit": Section(
        dit_steps,
        0.15,
        "DiT-B/2 on 32x32x4, bfloat16: model FLOPs of a training step over the peak, and over those"
        " of a large product",
        "attention | rows | ms | TFLOP/s | product's TFLOP/s | of the peak | of the product |"
        " temp MiB",
    ),
    "ode": Section(
        ode_samples,
        0.05,
        "Samples along an ODE, 100 evaluations: speed over that of a hand-written scan",
        "network | solver | scan, ms | scan / jflow | off the scan",
    ),
    "depth": Section(
        deep_stacks,
        0.1,
        "Deep stacks: temporary memory of the gradient's program, and seconds over the plain"
        " scan's",
        "stack | depth | plain, MiB | remat, MiB | reversible, MiB | plain, ms | remat / plain |"
        " reversible / plain",
    ),
}


def head(args):
    """What jax knows of the device and its driver."""
    device = jax.devices()[0]
    facts = [
        attempt(lambda: " ".join(device.client.platform_version.split())),
        attempt(lambda: f"compute capability {device.compute_capability}"),
        attempt(lambda: f"{device.memory_stats()['bytes_limit'] / 2**30:.0f} GiB to allocate"),
    ]
    known = ", ".join(
        [f"jax {jax.__version__}", *(f for f in facts if isinstance(f, str)), f"seed {args.seed}"]
    )
    known += "; tiny shapes in place of those below" if args.short else ""
    emit(args, f"## {device.device_kind}, {datetime.date.today()}\n\n`{args.command}`: {known}.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="in this order"
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds for all")
    parser.add_argument("--out", help="a file to append the tables to")
    parser.add_argument("--repeats", type=int, default=20, help="turns, at most")
    parser.add_argument("--seed", type=int, help="of the inputs; drawn and printed by default")
    parser.add_argument("--short", action="store_true", help="tiny shapes and three turns, for CI")
    args = parser.parse_args()
    args.command = shlex.join(["python", "benchmarks/device.py", *sys.argv[1:]])
    args.seed = int(np.random.SeedSequence().entropy % 2**31) if args.seed is None else args.seed
    args.turn, args.row = (
        2e-3,
        3.0,
    )  # seconds that a turn of a call and all turns of a row take, about
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    if args.short:
        args.repeats, args.turn = 3, 0.0
        quick = "--xla_backend_optimization_level=0"  # compiles in half the time
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
    run_all(SECTIONS, args.sections, args, head)


if __name__ == "__main__":
    main()
