"""Flow posteriors against Gaussian ones: two targets in the plane, and a small variational
autoencoder.

    python experiments/flow_posteriors/run.py targets [--picture targets.png]
    python experiments/flow_posteriors/run.py vae [--seeds 3]

Minutes each on two CPU cores; --short shrinks both to seconds. Prints the tables of README.md
beside this file. Needs the extra `experiments`, no download.

Methods: Rezende, Mohamed, *Variational Inference with Normalizing Flows* (2015); Kingma et al.,
*Improving Variational Inference with Inverse Autoregressive Flow* (2016); van den Berg et al.,
*Sylvester Normalizing Flows for Variational Inference* (2018); the tighter bound: Burda, Grosse,
Salakhutdinov, *Importance Weighted Autoencoders* (2016).
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jflow import bijectors, data, distributions, flows, losses, metrics, train
from jflow.distributions import decoders

POSTERIORS = {
    "Gaussian": lambda event, **o: flows.planar(event, depth=0, **o),
    "planar, 8": lambda event, **o: flows.planar(event, depth=8, **o),
    "planar, 32": lambda event, **o: flows.planar(event, depth=32, **o),
    "radial, 32": lambda event, **o: flows.radial(event, depth=32, **o),
    "Sylvester, 8": lambda event, **o: flows.sylvester(event, depth=8, **o),
    "IAF, 4": lambda event, **o: flows.iaf(event, depth=4, hidden=(64,), **o),
}


def banana(x):
    """Normalized: x0 ~ N(0, 2^2), x1 given x0 ~ N(x0^2 / 4 - 1, 0.5^2)."""
    bend = x[:, 1] - jnp.square(x[:, 0]) / 4 + 1
    return -0.5 * (jnp.square(x[:, 0] / 2) + jnp.square(bend / 0.5)) - jnp.log(2 * jnp.pi)


def ring(x):
    """exp(-U1) of Rezende and Mohamed (2015), two modes on a ring; normalized by quadrature in
    `log_z`."""
    radius = jnp.linalg.norm(x, axis=-1)
    modes = jnp.logaddexp(
        -0.5 * jnp.square((x[:, 0] - 2) / 0.6), -0.5 * jnp.square((x[:, 0] + 2) / 0.6)
    )
    return modes - 0.5 * jnp.square((radius - 2) / 0.4)


def fit(loss, params, batches, steps, rate):
    """Adam with a cosine, all steps in one compiled scan; batches: step key -> batch."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(rate, steps))
    )
    step = train.make_step(loss, optimizer)

    @jax.jit
    def run(state, keys):
        return jax.lax.scan(lambda state, key: (step(state, batches(key))[0], None), state, keys)[0]

    state = train.init_state(params, optimizer, jax.random.key(0))
    return run(state, jax.random.split(jax.random.key(1), steps)).params


def targets(args):
    steps, draws = (200, 64) if args.short else (6000, 256)
    axis = np.linspace(-9, 12, 1401)
    grid = jnp.asarray(
        np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2), jnp.float32
    )
    fitted = {}
    print(
        "| target | posterior | ELBO - log Z | log Z of 1e5 weights | seconds"
        " |\n|---|---|---|---|---|"
    )
    for name, log_density in (("banana", banana), ("ring", ring)):
        mass = np.exp(np.asarray(log_density(grid), np.float64))
        log_z = np.log(mass.sum()) + 2 * np.log(axis[1] - axis[0])
        for posterior in args.only:
            start = time.perf_counter()
            flow = POSTERIORS[posterior]((2,))
            params = flow.init(jax.random.key(args.seed), jnp.zeros((2, 2)))
            loss = losses.reverse_kl(flow, log_density, draws=draws)
            params = fit(loss, params, lambda key: {}, steps, 5e-3)
            x, log_q = jax.jit(flow.sample_and_log_prob, static_argnums=2)(
                params, jax.random.key(2), 100_000
            )
            weights = np.asarray(log_density(x) - log_q, np.float64) - log_z
            seconds = time.perf_counter() - start
            error = weights.std() / np.sqrt(len(weights))
            row = (
                f"{weights.mean():.4f} +- {error:.4f} | {metrics.log_mean_exp(weights):+.4f} |"
                f" {seconds:.0f}"
            )
            print(f"| {name} | {posterior} | {row} |", flush=True)
            fitted[name, posterior] = flow, params, log_density
    if args.picture:
        draw(fitted, args.picture)


def draw(fitted, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = ["target", *dict.fromkeys(posterior for _, posterior in fitted)]
    figure, axes = plt.subplots(2, len(columns), figsize=(2 * len(columns), 4.2))
    for row, name in zip(axes, ("banana", "ring"), strict=True):
        box = (-6, 6, -3, 9) if name == "banana" else (-4, 4, -4, 4)
        axis = np.linspace(0, 1, 160)
        points = np.stack(
            np.meshgrid(box[0] + axis * (box[1] - box[0]), box[2] + axis * (box[3] - box[2])), -1
        )
        points = jnp.asarray(points.reshape(-1, 2), jnp.float32)
        for cell, column in zip(row, columns, strict=True):
            flow, params, target = fitted[name, columns[1] if column == "target" else column]
            log_prob = (
                target(points) if column == "target" else jax.jit(flow.log_prob)(params, points)
            )
            cell.imshow(np.exp(log_prob).reshape(160, 160), origin="lower", cmap="magma")
            cell.set_title(column, fontsize=9)
            cell.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


class Encoder(nn.Module):
    """x -> features; what the IAF is told. The other posteriors' own MLP has the same widths."""

    @nn.compact
    def __call__(self, x):
        h = nn.silu(nn.Dense(200)(2 * x.reshape(len(x), -1) - 1))
        return nn.silu(nn.Dense(200)(h))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        h = nn.silu(nn.Dense(200)(nn.silu(nn.Dense(200)(z))))
        return nn.Dense(64)(h).reshape(-1, 8, 8, 1)


def autoencoder(posterior, latent):
    options = {"embed": Encoder()} if posterior.startswith("IAF") else {"hidden": (200, 200)}
    posterior = POSTERIORS[posterior]((latent,), **options)
    layer = bijectors.vae(posterior, decoders.bernoulli(Decoder()), (latent,), (8, 8, 1))
    return flows.elbo_flow(layer, distributions.normal((latent,)))


def vae(args):
    """Digits whose pixels are drawn anew as Bernoulli(value / 16) for every batch; the test draws
    are fixed."""
    steps, draws = (50, 10) if args.short else (6000, 500)
    latent = 8
    splits = data.digits()
    gray = {
        name: jnp.asarray(getattr(splits, name)["x"] / 16, jnp.float32)
        for name in ("train", "test")
    }
    test = jax.random.bernoulli(jax.random.key(7), gray["test"]).astype(jnp.float32)

    def batches(key):
        key_row, key_pixel = jax.random.split(key)
        rows = gray["train"][jax.random.randint(key_row, (128,), 0, len(gray["train"]))]
        return {"x": jax.random.bernoulli(key_pixel, rows).astype(jnp.float32)}

    print(
        f"| posterior | test ELBO | test IWAE, {draws} draws | seconds a seed |\n|---|---|---|---|"
    )
    for posterior in args.only:
        flow = autoencoder(posterior, latent)
        tight = flows.importance_weighted(flow, draws)
        bound = jax.jit(lambda p, key, flow=flow: flow.elbo(p, test, key=key))
        tight_bound = jax.jit(lambda p, key, flow=tight: flow.elbo(p, test, key=key))
        scores, start = [], time.perf_counter()
        for seed in range(args.seed, args.seed + args.seeds):
            params = jax.jit(flow.init)(jax.random.key(seed), test[:4])
            params = fit(losses.negative_elbo(flow), params, batches, steps, 2e-3)
            elbo = np.mean([jnp.mean(bound(params, jax.random.key(i))) for i in range(50)])
            scores.append([elbo, jnp.mean(tight_bound(params, jax.random.key(50)))])
        mean, spread = np.mean(scores, 0), np.std(scores, 0)
        seconds = (time.perf_counter() - start) / args.seeds
        cells = [f"{m:.2f} +- {s:.2f}" for m, s in zip(mean, spread, strict=True)]
        print(f"| {posterior} | {cells[0]} | {cells[1]} | {seconds:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["targets", "vae"])
    parser.add_argument("--short", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="of the autoencoder")
    parser.add_argument(
        "--only", nargs="+", choices=list(POSTERIORS), help="default: all; in short, two"
    )
    parser.add_argument("--picture", help="file for the densities of the targets")
    args = parser.parse_args()
    args.only = args.only or list(POSTERIORS)[: 2 if args.short else None]
    {"targets": targets, "vae": vae}[args.part](args)


if __name__ == "__main__":
    main()
