r"""Transition matching beside flow matching on digits, at a few steps.

    python experiments/transition_matching/run.py --out runs/transition  # 8x8, no download
    python experiments/transition_matching/run.py --out runs/short --short  # CI

An image is 4 x 4 tokens of 2 x 2 pixels. All networks get the same number of updates of as many
tokens: a DiT as a velocity (Euler's method in T steps); a DiT as a backbone with a small head a
token (DTM: each of T steps draws the displacement, the head's ODE inside a step); a causal
transformer whose flow head draws a token of the next state given the last state (ARTM) or given all
states before (FHTM). Prints the energy distance of samples to held-out digits over that of training
digits, and what a sample costs; draws OUT/samples.png. README.md has the results.
"""

import argparse
import json
import math
import time
from pathlib import Path

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jflow
from jflow import data, distributions, flows, losses, metrics, nets, solvers, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEW = 4  # the steps of the causal methods, whose networks are trained for them
SIDE, PATCH = 4, 2
TOKENS = SIDE**2


class Features(nn.Module):
    """A feature for each token: the token lifted to `size` numbers, plus what a network adds."""

    net: nn.Module
    size: int

    @nn.compact
    def __call__(self, x, t, cond=None):
        lifted = nn.Dense(self.size, name="lift")(x)
        return lifted + self.net(lifted, t, cond)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the table and the picture"
    )
    parser.add_argument("--steps", type=int, default=1500, help="updates of each training")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64, help="of the transformers")
    parser.add_argument("--layers", type=int, default=2, help="of the transformers")
    parser.add_argument("--head", type=int, default=64, help="width of the heads")
    parser.add_argument(
        "--rate", type=float, default=2e-3, help="learning rate, falling to 0 along a cosine"
    )
    parser.add_argument("--inner", type=int, default=16, help="Euler steps of a head")
    parser.add_argument("--count", type=int, default=1000, help="samples of each number of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--short", action="store_true", help="20 steps of a narrow network: numbers mean nothing"
    )
    args = parser.parse_args()
    if args.short:
        args.steps, args.width, args.layers, args.head, args.count = 20, 16, 1, 16, 20
    rows, labels, test = images()
    args.out.mkdir(parents=True, exist_ok=True)
    key, label_key, noise_key = jax.random.split(jax.random.key(args.seed), 3)
    cond = jax.random.choice(label_key, jnp.asarray(labels), (args.count,))
    x0 = jax.random.normal(noise_key, (args.count, SIDE, SIDE, PATCH**2))

    made, lines = {}, {}
    for name, (method, grid) in METHODS.items():
        key, init_key, fit_key, draw_key = jax.random.split(key, 4)
        begun = time.monotonic()
        loss, params, draw = method(args, init_key, rows, labels)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        batch = args.batch // FEW if name == "FHTM" else args.batch  # as many tokens an update
        params = fitted(loss, params, rows, labels, batch, args, fit_key)
        seconds = time.monotonic() - begun
        print(f"{name}: {count} parameters, {seconds:.0f} s of training")
        for steps in grid:
            x, cost = draw(params, draw_key, x0, cond, steps)
            made[name, steps] = np.asarray(x)
            lines[f"{name}, {steps}"] = {"cost": cost, "parameters": count, "seconds": seconds}
    report(made, lines, rows, test, args)


def flow_matching(args, key, rows, labels):
    """(loss, params, draw) of a velocity and Euler's method. One layer more makes up for the head
    of the other."""
    velocity = jflow.velocity(dit(args, args.layers + 1))
    params = velocity.init(key, rows[:1], jnp.zeros(1), labels[:1])

    def draw(params, key, x0, cond, steps):
        x, info = solvers.sample(velocity, params, x0, cond, method=euler(steps))
        return x, f"{int(info.evaluations[0])} of the network"

    return losses.flow_matching(velocity), params, draw


def difference(args, key, rows, labels):
    """(loss, params, draw) of DTM."""
    net = nets.headed(
        jflow.field(Features(dit(args, args.layers), args.width)),
        jflow.velocity(nets.ResidualMLP(width=args.head, num_blocks=2)),
    )
    params = net.init(key, rows[:1], jnp.zeros(1), labels[:1])

    def draw(params, key, x0, cond, steps):
        x, info = solvers.sample_transitions(
            net, params, x0, key, cond, grid=steps, method=args.inner
        )
        return x, f"{int(info.backbone[0])} of the backbone, {int(info.head[0])} of the head"

    return losses.transition_matching(net), params, draw


def autoregressive(args, key, rows, labels):
    """(loss, params, draw) of ARTM: a causal law of the next state's tokens."""
    net, head, base, token = causal_parts(args)
    law = distributions.causal(net, token, (TOKENS, PATCH**2))
    x = rows[:8].reshape(8, TOKENS, -1)
    params = law.init(key, x, solvers.transition_condition(x, jnp.zeros(8), labels[:8]))
    matching = losses.causal_matching(net, head, base)
    loss = losses.chain(flat, losses.transition_pairs(FEW), matching)

    def draw(params, key, x0, cond, steps):
        x0 = x0.reshape(len(x0), TOKENS, -1)
        x = solvers.sample_kernels(law, params, x0, key, cond, grid=steps)
        return x, f"{steps * TOKENS} of the backbone, {steps * TOKENS * args.inner} of the head"

    return loss, params, draw


def full_history(args, key, rows, labels):
    """(loss, params, draw) of FHTM: a causal law of all states."""
    net, head, base, token = causal_parts(args)
    law = distributions.causal(net, token, (FEW * TOKENS, PATCH**2))
    x = np.tile(rows[:8].reshape(8, TOKENS, -1), (1, FEW, 1))
    params = law.init(key, x, labels[:8])
    matching = losses.causal_matching(net, head, base)
    loss = losses.chain(flat, losses.full_history(FEW), matching)

    def draw(params, key, x0, cond, steps):
        x = law.sample(params, key, len(x0), cond)[:, -TOKENS:]
        return x, f"{FEW * TOKENS} of the backbone, {FEW * TOKENS * args.inner} of the head"

    return loss, params, draw


def causal_parts(args):
    """(net, head, base, token): a causal transformer and the flow head of a token."""
    net = nets.CausalTransformer(
        features=args.width,
        width=args.width,
        num_layers=args.layers,
        num_heads=4,
        num_classes=10,
    )
    head = jflow.velocity(nets.ResidualMLP(width=args.head, num_blocks=2))
    base = distributions.normal((PATCH**2,))
    return net, head, base, flows.cnf(head, base, method=euler(args.inner))


def flat(key, batch, frozen=None):
    """Tokens in a row."""
    x = batch["x"]
    return {**batch, "x": x.reshape(x.shape[0], TOKENS, -1)}


def euler(steps):
    return solvers.fixed(steps, diffrax.Euler())


METHODS = {
    "flow matching": (flow_matching, (1, 2, 4, 16, 64)),
    "DTM": (difference, (1, 2, 4, 16)),
    "ARTM": (autoregressive, (FEW,)),
    "FHTM": (full_history, (FEW,)),
}


def dit(args, layers):
    return nets.DiT(patch_size=1, width=args.width, num_layers=layers, num_heads=4, num_classes=10)


def images():
    """Training digits as tokens [n, 4, 4, 4] in [-1, 1] with their labels, and held-out ones."""
    splits = data.digits()
    x, test = (np.asarray(part["x"], np.float32) / 8 - 1 for part in (splits.train, splits.test))
    return tokens(x), np.asarray(splits.train["cond"]), test


def tokens(x):
    """[n, 8, 8, 1] -> [n, 4, 4, 4]"""
    x = x.reshape(len(x), SIDE, PATCH, SIDE, PATCH)
    return x.swapaxes(2, 3).reshape(len(x), SIDE, SIDE, PATCH**2)


def pictures(x):
    """The inverse of `tokens`."""
    x = np.asarray(x).reshape(len(x), SIDE, SIDE, PATCH, PATCH)
    return x.swapaxes(2, 3).reshape(len(x), SIDE * PATCH, SIDE * PATCH, 1)


def fitted(loss, params, rows, labels, batch, args, key):
    """Averaged params after args.steps updates."""
    optimizer = optax.adam(optax.cosine_decay_schedule(args.rate, args.steps))
    average = train.ema.warmup(0.998)
    return train.fit(
        train.init_state(params, optimizer, key, ema=average),
        train.make_step(loss, optimizer, ema=average),
        data.batches({"x": rows, "cond": labels}, batch, seed=args.seed),
        steps=args.steps,
        inner=math.gcd(args.steps, 20),
        log_every=args.steps,
        progress=True,
    ).state.ema


def report(made, lines, rows, test, args) -> None:
    rng = np.random.default_rng(0)
    real = pictures(rows)
    subsets = [rng.choice(len(real), len(test), replace=False) for _ in range(5)]
    floor = np.mean([metrics.energy_distance(real[i], test) for i in subsets])
    print(f"\n{'':24s}{'energy':>8s}   evaluations")
    for (name, steps), x in made.items():
        line = lines[f"{name}, {steps}"]
        line["energy"] = metrics.energy_distance(np.clip(pictures(x), -1, 1), test) / float(floor)
        print(f"{name + f', {steps} steps':24s}{line['energy']:8.2f}   {line['cost']}")
    (args.out / "results.json").write_text(json.dumps(lines, indent=1))
    shown = {"held-out digits": test} | {
        f"{name}, {steps}": pictures(x) for (name, steps), x in made.items()
    }
    figure, axes = plt.subplots(len(shown), 1, figsize=(8, 0.45 * len(shown)))
    for ax, (name, x) in zip(axes, shown.items(), strict=True):
        ax.imshow(np.concatenate(x[:16, :, :, 0], axis=1), cmap="gray", vmin=-1, vmax=1)
        ax.axis("off")
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(0.2, 0.01, 0.99, 0.99, hspace=0.08)
    figure.savefig(args.out / "samples.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
