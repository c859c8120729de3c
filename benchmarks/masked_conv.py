"""The inverse of a masked convolution and its gradient: by wavefront, pixel after pixel, and as a
dense triangular solve.

    python benchmarks/masked_conv.py [--short]

Prints, for each size of image, the sequential steps and the median time of `--repeats` calls taken
in turn, as a ratio to the wavefront's, and the largest relative difference from it. The gradient of
the first two is the same implicit one (a second solve and a correlation); the dense solve is
differentiated by JAX, its matrix is built in every call, and it is left out where the image has
more than `--dense` numbers. Fewer steps pay where each has a price, on an accelerator; on a CPU the
work counts, of which the wavefront does up to twice as much (its diagonals are padded).
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from jflow.kernels import masked_conv


def by_pixel(y, kernel):
    """x with masked_conv.conv(x, kernel) = y for a kernel whose last tap is the identity; h w
    steps."""

    def run(u, taps):
        b, h, w, c = u.shape
        k = taps.shape[0]

        def step(x, n):
            i, j = n // w, n % w
            window = jax.lax.dynamic_slice(x, (0, i, j, 0), (b, k, k, c)).reshape(b, -1)
            here = (
                jax.lax.dynamic_slice(u, (0, i, j, 0), (b, 1, 1, c))
                - (window @ taps)[:, None, None]
            )
            return jax.lax.dynamic_update_slice(x, here, (0, i + k - 1, j + k - 1, 0)), None

        taps = taps.at[-1, -1].set(0).reshape(-1, c)
        x = jnp.pad(jnp.zeros_like(u), ((0, 0), (k - 1, 0), (k - 1, 0), (0, 0)))
        return jax.lax.scan(step, x, jnp.arange(h * w))[0][:, k - 1 :, k - 1 :]

    def transposed(_, g):
        return jnp.flip(run(jnp.flip(g, (1, 2)), kernel.swapaxes(2, 3)), (1, 2))

    return jax.lax.custom_linear_solve(
        lambda x: masked_conv.conv(x, kernel), y, lambda _, u: run(u, kernel), transposed
    )


def dense(y, kernel):
    size = y[0].size
    rows = masked_conv.conv(jnp.eye(size).reshape(size, *y.shape[1:]), kernel).reshape(
        size, size
    )  # x_row @ rows = y_row
    return jax.lax.linalg.triangular_solve(rows, y.reshape(-1, size), left_side=False).reshape(
        y.shape
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--size", type=int, default=3, help="of the kernel")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--dense", type=int, default=1024, help="most numbers in an image for the dense solve"
    )
    parser.add_argument(
        "--short", action="store_true", help="images of 8 x 8 and 16 x 16, three repeats"
    )
    args = parser.parse_args()
    if args.short:
        args.sides, args.repeats = [8, 16], 3

    rng = np.random.default_rng(0)
    shape = (args.size, args.size, args.channels, args.channels)
    kernel = jnp.asarray(
        rng.normal(size=shape) * 0.3 / (args.size**2 * args.channels**0.5), jnp.float32
    )
    kernel = kernel.at[-1, -1].set(jnp.eye(args.channels))
    print(
        f"{args.batch} images, {args.channels} channels, kernel {args.size} x {args.size},"
        " float32, ",
        end="",
    )
    print(
        f"{jax.devices()[0].device_kind}\n{'image':>9s}"
        f" {'':10s}{'steps':>7s}{'inverse':>18s}{'and gradient':>18s}",
        end="",
    )
    print(f"{'difference':>12s}")
    for side in args.sides:
        y = jnp.asarray(rng.normal(size=(args.batch, side, side, args.channels)), jnp.float32)
        ways = {"wavefront": (masked_conv.inverse, 2 * side - 1), "pixels": (by_pixel, side**2)}
        if side**2 * args.channels <= args.dense:
            ways["dense"] = (dense, side**2 * args.channels)
        calls = {}
        for name, (inverse, _) in ways.items():
            calls[name, 0] = jax.jit(inverse)
            calls[name, 1] = jax.jit(
                jax.grad(lambda y, kernel, f=inverse: jnp.sum(jnp.sin(f(y, kernel))), (0, 1))
            )
        values = {name: jax.block_until_ready(call(y, kernel)) for name, call in calls.items()}
        times = {name: [] for name in calls}
        for _ in range(args.repeats):
            for name, call in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(call(y, kernel))
                times[name].append(time.perf_counter() - start)
        for name, (_, steps) in ways.items():
            print(f"{f'{side} x {side}':>9s} {name:10s}{steps:7d}", end="")
            for gradient in (0, 1):
                seconds = np.median(times[name, gradient])
                print(
                    f"{1e3 * seconds:9.2f} ms"
                    f" {seconds / np.median(times['wavefront', gradient]):6.2f}",
                    end="",
                )
            pairs = [jax.tree.leaves([values[n, 0], values[n, 1]]) for n in (name, "wavefront")]
            gaps = [
                jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)) for a, b in zip(*pairs, strict=True)
            ]
            print(f"{max(map(float, gaps)):12.0e}")


if __name__ == "__main__":
    main()
