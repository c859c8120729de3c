"""Digits on a surface of 16 dimensions: a free-form injective flow, beside PCA and a VAE.

    python experiments/densities/injective.py --out runs/injective
    python experiments/densities/injective.py --out runs/short --short

scikit-learn's digits, 8x8, 1437 train and 360 test. The flow is `flows.injective` trained by
`losses.free_form` on pixels with a little noise; the VAE has the same networks (its encoder with a
variance besides) and is trained by `losses.reconstruction`; PCA draws from the Gaussian of its 16
coordinates. Errors are squared and summed over 64 pixels of deviation about 0.4 in [0, 1]. OUT gets
table.md and digits.png.
"""

import argparse
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

from jflow import distributions, flows, losses, metrics, train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LATENT, NOISE = 16, 0.03


class Net(nn.Module):
    """A perceptron beside a linear map."""

    out: int
    width: int

    @nn.compact
    def __call__(self, x):
        h = nn.silu(nn.Dense(self.width)(x))
        h = h + nn.silu(nn.Dense(self.width)(h))
        return nn.Dense(self.out)(x) + nn.Dense(self.out)(h)


class Vae(nn.Module):
    width: int

    def setup(self):
        self.encoder, self.decoder = Net(2 * LATENT, self.width), Net(64, self.width)

    def encode(self, x):
        return tuple(jnp.split(self.encoder(x), 2, axis=-1))

    def decode(self, z):
        return self.decoder(z)

    def __call__(self, x):
        return self.decode(self.encode(x)[0])


def fit(loss, start, x, seed, args):
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, args.steps))
    )
    noisy = losses.chain(losses.noised(NOISE), loss)
    step = train.make_step(noisy, optimizer)
    keys = jax.random.split(jax.random.key(seed), 2)
    state = train.init_state(start, optimizer, keys[0])

    x = jnp.asarray(x)

    def update(state, key):
        return step(state, {"x": x[jax.random.randint(key, (128,), 0, len(x))]})

    run = jax.jit(lambda state, keys: jax.lax.scan(update, state, keys)[0].params)
    return run(state, jax.random.split(keys[1], args.steps))


def one_seed(seed, args):
    images = (load_digits().data / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    x, test = images[order[:1437]], images[order[1437:]]
    n, keys = len(test), jax.random.split(jax.random.key(100 + seed), 5)
    rows = {}

    def add(name, seen, drawn):
        error = np.sum((np.asarray(seen) - test) ** 2, axis=1).mean()
        rows[name] = error, metrics.energy_distance(np.asarray(drawn), test)

    mean, (_, scale, basis) = x.mean(0), np.linalg.svd(x - x.mean(0), full_matrices=False)
    basis, scale = basis[:LATENT], scale[:LATENT] / np.sqrt(len(x))
    draws = np.random.default_rng(seed).normal(size=(n, LATENT)) * scale
    add("PCA and a Gaussian", mean + (test - mean) @ basis.T @ basis, mean + draws @ basis)

    vae = Vae(args.width)
    loss = losses.reconstruction(vae, sigma=args.sigma)
    params = fit(loss, vae.init(keys[0], x[:2])["params"], x, seed, args)
    z = jax.random.normal(keys[1], (n, LATENT))
    decoded = vae.apply({"params": params}, z, method="decode")
    add("VAE", vae.apply({"params": params}, jnp.asarray(test)), decoded)

    model = flows.injective(
        Net(LATENT, args.width), Net(64, args.width), distributions.normal((LATENT,))
    )
    start = model.init(keys[2], jnp.asarray(x[:2]))
    params = fit(losses.free_form(model, args.beta), start, x, seed, args)
    seen = model.decode(params, model.encode(params, jnp.asarray(test)))
    drawn = model.sample(params, keys[3], n)
    add("free-form injective flow", seen, drawn)
    nats = model.manifold_log_prob(params, jnp.asarray(test[:100])).mean()
    rows["another set of digits"] = 0.0, metrics.energy_distance(x[:n], test)
    return rows, float(nats), np.asarray(drawn), np.asarray(decoded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of table and picture")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--beta", type=float, default=50.0, help="weight of the squared error")
    parser.add_argument("--sigma", type=float, default=0.1, help="noise of the VAE's decoder")
    parser.add_argument("--short", action="store_true", help="seconds: to see that it runs")
    args = parser.parse_args()
    args.width = 256
    if args.short:
        args.seeds, args.steps, args.width = 1, 2, 16
    args.out.mkdir(parents=True, exist_ok=True)
    began, made = time.process_time(), []
    for seed in range(args.seeds):
        made.append(one_seed(seed, args))
        print(f"seed {seed}: {time.process_time() - began:.0f} CPU s", file=sys.stderr, flush=True)
    lines = ["| | squared error, test | energy distance of samples |", "|---|---|---|"]
    for name in made[0][0]:
        errors, distances = np.array([rows[name] for rows, *_ in made]).T
        lines.append(
            f"| {name} | {errors.mean():.3f} +- {errors.std():.3f} |"
            f" {distances.mean():.4f} +- {distances.std():.4f} |"
        )
    lines.append("")
    nats = ", ".join(f"{nats:.1f}" for _, nats, *_ in made)
    lines.append(f"Nats of the 16-dimensional volume of each seed's own surface: {nats}.")
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(1, 2, figsize=(6, 3))
    for axis, drawn, name in zip(axes, made[0][2:], ("injective flow", "VAE"), strict=True):
        tiles = drawn[:64].reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
        axis.imshow(tiles, cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(name)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(args.out / "digits.png", dpi=60)


if __name__ == "__main__":
    main()
