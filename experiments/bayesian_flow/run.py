"""A Bayesian flow network on binary digits, in nats per image.

    python experiments/bayesian_flow/run.py --out runs/bayesian_flow  # minutes on two CPU cores
    python experiments/bayesian_flow/run.py --out runs/short --short  # seconds, for CI

The data are those of experiments/flow_posteriors: scikit-learn's digits, 8x8, every pixel 1 with
probability value / 16, drawn anew for each batch and once for the test. A residual MLP sees the
probabilities that each pixel is 1, and is trained by the loss of continuous time. Prints the bound
of the test digits in continuous time and in few steps, for the quadratic accuracy and for
ChemBFN's, and writes OUT/samples.png. No download. README.md has the results.

Methods: Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks* (2023); Tao, Abe, *A Bayesian
Flow Network Framework for Chemistry Tasks* (2024) for the second accuracy.
"""

import argparse
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import jflow
from jflow import data, losses, nets, paths, solvers, times, train

ACCURACIES = {
    "quadratic": paths.quadratic_accuracy,
    "ChemBFN's": lambda end: paths.entropy_accuracy(end, 2),
}


class PixelLogits(nn.Module):
    """Logits of 0 and 1 of each pixel, from the probability that each is 1.

    What has been seen of a pixel itself is added as it is: under the exact posterior the logit is
    that plus the log-odds of the pixel given all the others."""

    width: int
    num_blocks: int

    @nn.compact
    def __call__(self, theta, t, cond=None):
        seen = 2 * theta[..., 1] - 1
        net = nets.ResidualMLP(width=self.width, num_blocks=self.num_blocks)
        log_theta = jnp.log(jnp.maximum(theta, 1e-9))
        logit = log_theta[..., 1] - log_theta[..., 0] + net(seen, t)
        return jnp.stack([jnp.zeros_like(logit), logit], axis=-1)


def digits():
    """(gray training images in [0, 1], binary test images)."""
    splits = data.digits()
    train_x, test_x = (
        jnp.asarray(getattr(splits, name)["x"][..., 0] / 16, jnp.float32)
        for name in ("train", "test")
    )
    # the draws of experiments/flow_posteriors, whose images have a channel
    test = jax.random.bernoulli(jax.random.key(7), test_x[..., None])[..., 0]
    return train_x, test.astype(jnp.int32)


def fit(field, flow, gray, args):
    """The average of the parameters over the last updates, by Adam in one compiled scan."""
    loss = losses.bayesian_flow(field, flow, time=times.low_discrepancy())
    schedule = optax.cosine_decay_schedule(args.rate, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(schedule))
    step = train.make_step(loss, optimizer, ema=0.998)

    def advance(state, key):
        key_row, key_pixel = jax.random.split(key)
        rows = gray[jax.random.randint(key_row, (args.batch,), 0, len(gray))]
        x = jax.random.bernoulli(key_pixel, rows).astype(jnp.int32)
        return step(state, {"x": x})[0], None

    @jax.jit
    def run(state, keys):
        return jax.lax.scan(advance, state, keys)[0]

    init_key, state_key, keys_key = jax.random.split(jax.random.key(args.seed), 3)
    theta = flow.prior((1, 8, 8), jnp.float32)
    params = field.init(init_key, theta, jnp.zeros(1))
    state = train.init_state(params, optimizer, state_key, ema=0.998)
    return run(state, jax.random.split(keys_key, args.steps)).ema


def bound(field, flow, params, test, steps, draws):
    """(nats an image, of them the reconstruction, standard error over draws)."""
    sent = losses.bayesian_flow(field, flow, steps=steps, time=times.low_discrepancy())
    kept = losses.bayesian_reconstruction(field, flow)

    @jax.jit
    def one(key):
        first, second = jax.random.split(key)
        return sent(params, first, {"x": test})[0], kept(params, second, {"x": test})[0]

    found = np.array([one(key) for key in jax.random.split(jax.random.key(1), draws)])
    total = found.sum(1)
    return total.mean(), found[:, 1].mean(), total.std() / np.sqrt(draws)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the picture")
    parser.add_argument("--steps", type=int, default=6000, help="updates")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3, help="falls to 0 along a cosine")
    parser.add_argument("--end", type=float, default=6.0, help="accuracy at t=1")
    parser.add_argument("--draws", type=int, default=200, help="of times and noise, for the bound")
    parser.add_argument("--grid", type=int, default=40, help="steps of a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(ACCURACIES), default=list(ACCURACIES))
    parser.add_argument("--short", action="store_true", help="numbers mean nothing")
    args = parser.parse_args()
    if args.short:
        args.steps, args.width, args.blocks, args.draws, args.grid = 50, 16, 1, 4, 4
        args.only = args.only[:1]
    args.out.mkdir(parents=True, exist_ok=True)
    gray, test = digits()
    field = jflow.field(PixelLogits(args.width, args.blocks))
    print("| accuracy | steps | nats an image | of them the reconstruction | seconds |")
    print("|---|---|---|---|---|")
    for name in args.only:
        flow, begun = paths.bayesian_discrete(ACCURACIES[name](args.end), 2), time.monotonic()
        params = fit(field, flow, gray, args)
        jax.block_until_ready(params)
        seconds = time.monotonic() - begun
        for steps in (None, 100, 20):
            total, kept, error = bound(field, flow, params, test, steps, args.draws)
            cells = f"{total:.2f} +- {error:.2f} | {kept:.2f} | {seconds:.0f}"
            print(f"| {name} | {steps or 'continuous'} | {cells} |", flush=True)
        draw = jax.jit(
            lambda key, flow=flow, params=params: solvers.sample_bayesian(
                field, flow, params, key, (60, 8, 8), grid=args.grid
            )
        )
        x = np.asarray(draw(jax.random.key(2)))[..., None]
        picture = data.image_grid(x, 0, 1, columns=20, zoom=4)
        file = "samples.png" if name == args.only[0] else "samples_chembfn.png"
        Image.fromarray(picture).save(args.out / file, optimize=True)


if __name__ == "__main__":
    main()
