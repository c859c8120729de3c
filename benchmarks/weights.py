"""How long published weights take to load, beside a loop that reads and copies each tensor.

    python benchmarks/weights.py [--width 1152] [--layers 28] [--repeats 5] [--clock wall|cpu]
    python benchmarks/weights.py --short

A file in the layout and of the size of SiT-XL/2, in bfloat16, is written first and read once, so
that the system has it in memory. Then these take turns:

    read and copy   each tensor is read by its offsets and copied into an array made before
    map and copy    each tensor is copied from the mapped file into an array made before
    convert.dit     the params on the default device: stacked, transposed to kernels [in, out]

The arrays of both loops are made new each time, outside the clock, and touched first inside it, as
those of convert.dit are. Printed are the medians and the ratios to the first; and the anonymous
memory of the process, which the files' pages are not in, that `convert.dit` took at most beside the
params, in leaves of the largest size.
"""

import argparse
import gc
import json
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from clocks import CLOCKS, interleaved, medians

from jflow import convert, nets


def write(path, args):
    net = nets.DiT(2, args.width, args.layers, 16, num_classes=1000, time_scale=1.0)
    x = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    like = jax.eval_shape(nets.velocity(net).init, jax.random.key(0), x, t)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, jnp.bfloat16), like)
    layout = convert.dit_layout(net, 4, out_channels=8, image_size=32)
    convert.save(path, layout, params)
    return max(leaf.nbytes for leaf in jax.tree.leaves(params))


def arrays(path):
    return {k: np.empty(v.shape, v.dtype) for k, v in convert.read_safetensors(path).items()}


def read_and_copy(path, clock):
    into, start = arrays(path), clock()
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name, array in into.items():
            first, last = header[name]["data_offsets"]
            stream.seek(8 + length + first)
            raw = np.frombuffer(stream.read(last - first), array.dtype)
            array[...] = raw.reshape(array.shape)
    return clock() - start


def map_and_copy(path, clock):
    into, start = arrays(path), clock()
    for name, tensor in convert.read_safetensors(path).items():
        into[name][...] = tensor
    return clock() - start


def load(path, clock=None):
    return convert.dit(path, num_heads=16, dtype=jnp.bfloat16)[1]


def anonymous() -> int:
    """Bytes of this process that are no file's, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def most_beside(path):
    """The most anonymous memory while loading, beside the params that come out."""
    gc.collect()
    before, seen, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            seen.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = load(path)
    done.set()
    watcher.join()
    return max(seen) - sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--short", action="store_true", help="a small file, for CI")
    args = parser.parse_args()
    if args.short:
        args.width, args.layers, args.repeats = 64, 2, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        largest = write(path, args)
        if Path("/proc/self/status").exists():
            beside = most_beside(path) / largest
            print(f"beside the params: {beside:.2f} of the largest leaf\n")
        clock = CLOCKS[args.clock]
        ways = {"read and copy": read_and_copy, "map and copy": map_and_copy, "convert.dit": load}
        calls = {name: (lambda way=way: way(path, clock)) for name, way in ways.items()}
        interleaved(calls, 1)  # what is read once, traced once, imported once
        found = medians(interleaved(calls, args.repeats, args.clock))
        print(f"{path.stat().st_size / 1e6:.0f} MB\n\n| | s | ratio |\n|---|---|---|")
        for name, value in found.items():
            print(f"| {name} | {value:.3f} | {value / found['read and copy']:.2f} |")


if __name__ == "__main__":
    main()
