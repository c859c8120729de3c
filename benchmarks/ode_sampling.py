"""Samples along an ODE: `solvers.sample` beside a hand-written scan, torchdiffeq and flow_matching,
on the same weights.

    python benchmarks/ode_sampling.py --torch-python PATH
    python benchmarks/ode_sampling.py --short

PATH is the Python of an environment with torch, torchdiffeq (torchcfm samples by it) and
flow_matching; without it the scan alone is measured against. The velocity is a perceptron of (x,
t), with random weights; each solver takes 100 evaluations of it. All samplers take turns; torch
runs eagerly, without gradients, on one thread or --threads, whichever is faster. Prints the median
seconds of a call, the median over turns of the ratio scan / sampler (above 1: faster than the
scan), the time of the first call, compilation included, and the largest difference from the scan's
samples.
"""

import argparse
import os
import tempfile
import time
from functools import partial

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from clocks import interleaved, peer

import jflow
from jflow import nets, solvers

SIZES = {
    "2 numbers, 3 x 64, 256 rows": (2, 64, 256),
    "64 numbers, 3 x 256, 512 rows": (64, 256, 512),
}
LAYERS, EVALUATIONS = 3, 100


class RK4(diffrax.AbstractERK):
    """Kutta's 3/8 rule, which is what torchdiffeq calls rk4."""

    tableau = diffrax.ButcherTableau(
        c=np.array([1 / 3, 2 / 3, 1.0]),
        a_lower=(np.array([1 / 3]), np.array([-1 / 3, 1.0]), np.array([1.0, -1.0, 1.0])),
        b_sol=np.array([1, 3, 3, 1]) / 8,
        b_error=np.zeros(4),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


SOLVERS = {"euler": (diffrax.Euler(), 1), "midpoint": (diffrax.Midpoint(), 2), "rk4": (RK4(), 4)}


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, t, cond=None):
        return nn.Dense(x.shape[1])(nets.MLP((self.width,) * LAYERS, nn.selu)(x, t[:, None]))


def plain(params):
    """[(weight, bias)] of `Net`, first layer first."""
    layers = [params["MLP_0"][f"Dense_{i}"] for i in range(LAYERS)] + [params["Dense_0"]]
    return [(layer["kernel"], layer["bias"]) for layer in layers]


def by_hand(method, steps):
    """(layers, x) -> x at t = 1: what one would write without a library."""
    dt = 1 / steps

    def v(layers, x, t):
        h = jnp.concatenate([x, jnp.full((x.shape[0], 1), t)], axis=1)
        for weight, bias in layers[:-1]:
            h = jax.nn.selu(h @ weight + bias)
        return h @ layers[-1][0] + layers[-1][1]

    def step(layers, x, t):
        k1 = v(layers, x, t)
        if method == "euler":
            return x + dt * k1
        if method == "midpoint":
            return x + dt * v(layers, x + dt / 2 * k1, t + dt / 2)
        k2 = v(layers, x + dt / 3 * k1, t + dt / 3)
        k3 = v(layers, x + dt * (k2 - k1 / 3), t + 2 * dt / 3)
        k4 = v(layers, x + dt * (k1 - k2 + k3), t + dt)
        return x + dt / 8 * (k1 + 3 * (k2 + k3) + k4)

    def sample(layers, x):
        times = jnp.arange(steps) * dt
        return jax.lax.scan(lambda x, t: (step(layers, x, t), None), x, times)[0]

    return jax.jit(sample)


def first_call(call):
    start = time.perf_counter()
    value = np.asarray(jax.block_until_ready(call()))
    return value, time.perf_counter() - start


def compare(title, features, width, rows, args):
    velocity = jflow.velocity(Net(width))
    params_key, x_key = jax.random.split(jax.random.key(0))
    x0 = jax.random.normal(x_key, (rows, features))
    params = velocity.init(params_key, x0, jnp.zeros(rows))
    layers = plain(params)
    with tempfile.TemporaryDirectory() as folder:
        file, made = f"{folder}/weights.npz", f"{folder}/x.npy"
        weights, biases = zip(*layers, strict=True)
        named = [
            {f"{name}{i}": leaf for i, leaf in enumerate(leaves)}
            for name, leaves in (("w", weights), ("b", biases))
        ]
        np.savez(file, x0=x0, **named[0], **named[1])
        with peer(
            args.torch_python, "torch_ode.py", "--weights", file, "--threads", args.threads
        ) as ask:
            for method in args.methods:
                solver, each = SOLVERS[method]
                steps = args.evaluations // each
                calls = {
                    "scan by hand": partial(by_hand(method, steps), layers, x0),
                    "jflow": partial(sampler(velocity, solver, steps), params, x0),
                }
                firsts = {name: first_call(call) for name, call in calls.items()}
                for library in ("torchdiffeq", "flow_matching") if ask else ():
                    request = {"library": library, "method": method, "steps": steps}
                    seconds = ask({**request, "out": made})["seconds"]
                    firsts[library] = np.load(made), seconds
                    calls[library] = lambda request=request: ask(request)["seconds"]
                table(
                    f"{title}, {steps} steps of {method}", interleaved(calls, args.repeats), firsts
                )


def sampler(velocity, solver, steps):
    return jax.jit(
        lambda params, x: solvers.sample(velocity, params, x, method=solvers.fixed(steps, solver))[
            0
        ]
    )


def table(title, times, firsts):
    reference, exact = np.asarray(times["scan by hand"]), firsts["scan by hand"][0]
    print(
        f"\n{title}\n{'':16s}{'ms':>9s}{'scan / it':>11s}"
        f"{'first call, s':>15s}{'off the scan':>14s}"
    )
    for name, seconds in times.items():
        value, first = firsts[name]
        ratio, gap = np.median(reference / np.asarray(seconds)), np.abs(value - exact).max()
        print(
            f"{name:16s}{1e3 * np.median(seconds):9.2f}{ratio:11.3f}{first:15.2f}{gap:14.1e}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", help="a Python with torch, torchdiffeq and flow_matching")
    parser.add_argument("--methods", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument(
        "--evaluations", type=int, default=EVALUATIONS, help="of the velocity; a multiple of 4"
    )
    parser.add_argument("--repeats", type=int, default=20, help="turns")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of torch, where they beat one"
    )
    parser.add_argument(
        "--short", action="store_true", help="the small network, 20 evaluations, 5 turns"
    )
    args = parser.parse_args()
    sizes = SIZES
    if args.short:
        args.evaluations, args.repeats, sizes = 20, 5, dict(list(SIZES.items())[:1])
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, medians of {args.repeats} turns")
    for title, size in sizes.items():
        compare(title, *size, args)


if __name__ == "__main__":
    main()
