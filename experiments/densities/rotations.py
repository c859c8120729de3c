"""A flow of rotations for a density with four equal peaks, by its energy alone.

    python experiments/densities/rotations.py --out runs/rotations
    python experiments/densities/rotations.py --out runs/short --short

The target is log p~(q) = kappa (w^4 + x^4 + y^4 + z^4) of a unit quaternion: peaks at the identity
and at half a turn about each axis, the same for q and -q. `flows.rotations` learns it by
`losses.reverse_kl`. The constant Z is known by quadrature over the sphere of quaternions. OUT gets
table.md and rotations.png.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from jflow import flows, losses, train

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def log_density(kappa):
    return lambda q: kappa * jnp.sum(q**4, axis=-1)


def log_z(kappa, n=80):
    """By Gauss-Legendre and the midpoint rule in the coordinates (sqrt(s) e^ia, sqrt(1-s) e^ib)."""
    s, weights = np.polynomial.legendre.leggauss(n)
    angles = 2 * np.pi * (np.arange(n) + 0.5) / n
    s = (s + 1) / 2
    fourth = np.cos(angles) ** 4 + np.sin(angles) ** 4
    energy = s[:, None, None] ** 2 * fourth[:, None] + (1 - s[:, None, None]) ** 2 * fourth
    inner = np.mean(np.exp(kappa * energy), axis=(1, 2))
    return np.log(np.sum(weights / 2 * inner) * 2 * np.pi**2)


def fit(kappa, seed, args):
    flow = flows.rotations(depth=args.depth, hidden=(32,))
    keys = jax.random.split(jax.random.key(seed), 3)
    loss = losses.reverse_kl(flow, log_density(kappa), draws=args.batch)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, args.steps))
    )
    step = train.make_step(loss, optimizer)
    start = flow.init(keys[0], jnp.eye(4))
    state = train.init_state(start, optimizer, keys[1])
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, {}), s, None, length=args.steps))
    return flow, run(state)[0].params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of table and picture")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--short", action="store_true", help="seconds: to see that it runs")
    args = parser.parse_args()
    args.depth, args.batch, args.test = 8, 256, 10_000
    if args.short:
        args.seeds, args.steps, args.depth, args.batch, args.test = 1, 2, 1, 8, 32
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    lines = ["| kappa | log Z | estimate | ESS | samples at each peak |", "|---|---|---|---|---|"]
    figure, axes = plt.subplots(1, 2, figsize=(6, 3))
    for kappa, axis in zip((4.0, 8.0), axes, strict=True):
        rows = []
        for seed in range(args.seeds):
            flow, params = fit(kappa, seed, args)
            draw = jax.jit(lambda p, k, f=flow: f.sample_and_log_prob(p, k, args.test))
            q, log_q = jax.device_get(draw(params, jax.random.key(99)))
            log_w = np.asarray(log_density(kappa)(q) - log_q, np.float64)
            w = np.exp(log_w - log_w.max())
            peaks = np.bincount(np.argmax(np.abs(q), 1), minlength=4) / len(q)
            rows.append(
                (log_w.max() + np.log(w.mean()), w.sum() ** 2 / (w**2).sum() / len(w), peaks)
            )
            print(f"{kappa}, {time.process_time() - began:.0f} CPU s", file=sys.stderr, flush=True)
        estimates, sizes, peaks = zip(*rows, strict=True)
        lines.append(
            f"| {kappa:g} | {log_z(kappa):.4f} | {', '.join(f'{e:.4f}' for e in estimates)} |"
            f" {', '.join(f'{e:.2f}' for e in sizes)} |"
            f" {np.min(peaks):.3f} to {np.max(peaks):.3f} |"
        )
        axis.scatter(*(q * np.sign(q[:, :1]))[:3000, 1:3].T, s=1)
        axis.set(title=f"kappa {kappa:g}: x and y, w > 0", aspect="equal")
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    figure.tight_layout()
    figure.savefig(args.out / "rotations.png", dpi=70)


if __name__ == "__main__":
    main()
