"""Promoters of Arabidopsis by flows of probabilities: Dirichlet flow, and bridges on the sphere.

    # minutes on two CPU cores; JFLOW_DATA/discrete/dna, or --data FOLDER
    python experiments/simplex_promoters/run.py --out runs/simplex_promoters
    python experiments/simplex_promoters/run.py --out runs/short --short  # CI, made-up letters

64 letters around the TATA box (150 to 213 of the 251 of CNNPromoterData, the start of
transcription at 200), of promoters with a TATA box or of no promoter. A convolutional network that
is trained on the real training letters judges: how many samples that were asked for a class are
given it (agreement). Beside it stands the distance of the samples' 3-mers from those of the test
sequences (half the sum of absolute differences of frequencies, 0 to 1; mean of both classes). The
baselines draw each letter by the frequencies of its place and class, and training sequences
themselves. One network of the same size for both flows, with classifier-free guidance; the
Dirichlet flow is also distilled into one evaluation. README.md has the results.

Methods: Stark et al., *Dirichlet Flow Matching with Applications to DNA Sequence Design* (2024);
Jo, Hwang, *Continuous Diffusion Model for Language Modeling* (2025).
"""

import argparse
import gzip
import json
import os
import time
from pathlib import Path

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import guidance, losses, nets, paths, solvers, times, train

LETTERS, NULL = "ACGT", 2
FILES = ("Arabidopsis_non_prom.fa.gz", "Arabidopsis_tata.fa.gz")
WINDOW = slice(150, 214)


def read(file):
    """Letters as tokens [n, 251] of a file of FASTA."""
    records = gzip.open(file, "rt").read().split(">")[1:]
    rows = ["".join(record.split("\n")[1:]).upper() for record in records]
    for i, row in enumerate(rows):
        if wrong := set(row) - set(LETTERS):
            raise ValueError(f"{file}: expected letters of {LETTERS}, got {wrong} in record {i}")
    return np.array([[LETTERS.index(letter) for letter in row] for row in rows], np.int32)


def sequences(args):
    """(training x, labels), (test x, labels): 1 for a promoter; the last tenth of each is the
    test."""
    if args.short:
        rng = np.random.default_rng(0)
        rows = [rng.integers(0, 4, (100, 251)).astype(np.int32) for _ in FILES]
    else:
        folder = args.data or Path(os.environ.get("JFLOW_DATA", "")) / "discrete/dna"
        rows = [read(folder / file) for file in FILES]
    made = ([], []), ([], [])
    for label, x in enumerate(rows):
        x = np.random.default_rng(label).permutation(x)[:, WINDOW]
        cut = len(x) * 9 // 10
        for part, piece in zip(made, (x[:cut], x[cut:]), strict=True):
            part[0].append(piece)
            part[1].append(np.full(len(piece), label, np.int32))
    return [tuple(np.concatenate(values) for values in part) for part in made]


class Judge(nn.Module):
    """Logits of the two classes."""

    @nn.compact
    def __call__(self, x):
        h = jax.nn.one_hot(x, 4)
        h = nn.relu(nn.Conv(48, (9,))(h))
        h = nn.relu(nn.Conv(48, (5,), strides=(2,))(h))
        h = nn.relu(nn.Dense(64)(h.reshape(len(x), -1)))
        return nn.Dense(2)(h)


def adam(loss, params, rows, labels, steps, rate, seed, batch=64, *, balanced=True):
    """The average of the parameters; `loss` is a Loss of 'x' and 'cond', and of 'x0' where rows are
    pairs."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(rate, steps))
    )
    step = train.make_step(loss, optimizer, ema=train.ema.warmup(0.995))
    share = np.bincount(labels, minlength=2)[labels] if balanced else np.ones(len(labels))
    logits = jnp.asarray(-np.log(share), jnp.float32)
    rows = {name: jnp.asarray(value) for name, value in {**rows, "cond": labels}.items()}

    def advance(state, key):
        at = jax.random.categorical(key, logits, shape=(batch,))
        return step(state, {name: value[at] for name, value in rows.items()})[0], None

    @jax.jit
    def run(state, keys):
        return jax.lax.scan(advance, state, keys)[0]

    state = train.init_state(params, optimizer, jax.random.key(seed), ema=train.ema.warmup(0.995))
    state = run(state, jax.random.split(jax.random.key(seed + 1), steps))
    return jax.block_until_ready(state.ema)


def judge(rows, labels, args):
    """x -> log-probabilities of the classes."""
    net = Judge()

    def loss(params, key, batch, frozen=None):
        flip_key, letter_key = jax.random.split(key)
        flip = jax.random.bernoulli(flip_key, 0.05, batch["x"].shape)  # letters at random
        x = jnp.where(flip, jax.random.randint(letter_key, flip.shape, 0, 4), batch["x"])
        logits = net.apply({"params": params}, x)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["cond"])
        return jnp.mean(nats), {}

    params = net.init(jax.random.key(0), rows[:2])["params"]
    params = adam(loss, params, {"x": rows}, labels, args.judge_steps, 1e-3, 100)
    return jax.jit(lambda x: jax.nn.log_softmax(net.apply({"params": params}, x)))


def words(x, k=3):
    """Frequencies [4^k] of the k-mers of sequences."""
    codes = sum(4**i * x[:, i : x.shape[1] - k + 1 + i] for i in range(k))
    counts = np.bincount(codes.ravel(), minlength=4**k)
    return counts / counts.sum()


def score(x, labels, classify, test):
    x = np.asarray(x)
    named = np.asarray(classify(x)).argmax(1)
    far = [0.5 * np.abs(words(x[labels == c]) - words(test[0][test[1] == c])).sum() for c in (0, 1)]
    return {
        "agreement": float(np.mean(named == labels)),
        "of promoters": float(np.mean(named[labels == 1] == 1)),
        "3-mers": float(np.mean(far)),
    }


def network(args):
    return jflow.field(
        nets.TokenDiT(width=args.width, num_layers=args.layers, num_heads=4, num_classes=2)
    )


def fit_tokens(path, size, rows, labels, args, seed):
    field = network(args)
    loss = losses.chain(
        losses.drop_cond(0.1, null=NULL),
        losses.token_cross_entropy(field, path, num_classes=4, time=times.low_discrepancy()),
    )
    x = jnp.full((1, rows.shape[1], size), 1 / size)
    params = field.init(jax.random.key(seed), x, jnp.zeros(1), jnp.zeros(1, jnp.int32))
    return field, adam(loss, params, {"x": rows}, labels, args.steps, args.rate, seed)


def dirichlet_sampler(field, end, scale, grid):
    guided = field if scale == 1 else guidance.simplex_cfg(field, scale, null=NULL)
    velocity = paths.dirichlet_velocity(guided, end)
    method = solvers.fixed(grid, diffrax.Euler())

    def draw(params, key, labels, length):
        x0, _ = paths.dirichlet_source(key, jnp.zeros((len(labels), length, 4)))
        x, _ = solvers.sample(velocity, params, x0, labels, method=method)
        return x0, jnp.argmax(x, axis=-1)

    return jax.jit(draw, static_argnums=3)


def bridge_sampler(field, bridge, scale, grid):
    guided = field if scale == 1 else guidance.simplex_cfg(field, scale, null=NULL)
    step = solvers.bridge_step(guided, bridge)

    def draw(params, key, labels, length):
        start_key, walk_key = jax.random.split(key)
        x0 = bridge.start(start_key, (len(labels), length))
        x, _ = solvers.sample_sde(step, params, x0, walk_key, solvers.grids.uniform(grid), labels)
        return x0, jnp.argmax(x[..., :4], axis=-1)

    return jax.jit(draw, static_argnums=3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of table and samples")
    parser.add_argument("--data", type=Path, help="folder of the files of FASTA")
    parser.add_argument("--steps", type=int, default=1000, help="updates of each flow")
    parser.add_argument("--distilled", type=int, default=400, help="updates of the distillation")
    parser.add_argument("--judge-steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3, help="falls to 0 along a cosine")
    parser.add_argument("--end", type=float, default=8.0, help="concentration at t=1")
    parser.add_argument("--grid", type=int, default=40, help="Euler steps of a sample")
    parser.add_argument("--count", type=int, default=400, help="samples")
    parser.add_argument("--pairs", type=int, default=1500, help="pairs of the distillation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="numbers mean nothing")
    args = parser.parse_args()
    if args.short:
        args.steps, args.distilled, args.judge_steps, args.pairs = 10, 5, 10, 20
        args.width, args.layers, args.grid, args.count = 8, 1, 2, 20
    args.out.mkdir(parents=True, exist_ok=True)
    (rows, labels), test = sequences(args)
    classify, length = judge(rows, labels, args), rows.shape[1]
    asked = np.arange(args.count).astype(np.int32) % 2
    table = {"test": score(*test, classify, test)}

    def note(name, x, seconds=0.0):
        table[name] = {**score(x, asked, classify, test), "seconds": seconds}
        print(f"{name}: {json.dumps(table[name])}", flush=True)

    print(f"test: {json.dumps(table['test'])}", flush=True)
    rng = np.random.default_rng(0)
    replay = np.array([rng.choice(np.flatnonzero(labels == c)) for c in asked])
    note("training sequences", rows[replay])
    places = [np.stack([(rows[labels == c] == a).mean(0) for a in range(4)], -1) for c in (0, 1)]
    sites = np.stack([places[c] for c in asked])
    note(
        "letters by their place",
        (rng.random(sites.shape[:2])[..., None] > sites.cumsum(-1)).sum(-1),
    )

    begun = time.monotonic()
    field, params = fit_tokens(paths.dirichlet(args.end), 4, rows, labels, args, args.seed)
    seconds, best = time.monotonic() - begun, None
    for scale in (2.0,) if args.short else (1.0, 2.0, 4.0):
        draw = dirichlet_sampler(field, args.end, scale, args.grid)
        best = draw(params, jax.random.key(1), asked, length)[1]
        note(f"Dirichlet flow, scale {scale:.0f}", best, seconds)

    begun, pairs = time.monotonic(), []
    draw = dirichlet_sampler(field, args.end, 2.0, args.grid)
    size = min(args.pairs, 500)
    wanted = np.arange(size).astype(np.int32) % 2
    for key in jax.random.split(jax.random.key(2), -(-args.pairs // size)):
        pairs.append(jax.device_get(draw(params, key, wanted, length)))
    pairs = {
        "x0": np.concatenate([p[0] for p in pairs]),
        "x": np.concatenate([p[1] for p in pairs]),
    }
    loss = losses.token_cross_entropy(
        field, paths.dirichlet(args.end), num_classes=4, time=times.fixed((0.0,))
    )
    wanted = np.tile(wanted, len(pairs["x"]) // size)
    student = adam(loss, params, pairs, wanted, args.distilled, args.rate / 2, args.seed + 5)
    x0, _ = paths.dirichlet_source(jax.random.key(3), jnp.zeros((args.count, length, 4)))
    once = jnp.argmax(field.apply(student, x0, jnp.zeros(args.count), asked), axis=-1)
    note("Dirichlet flow of scale 2, distilled, one evaluation", once, time.monotonic() - begun)

    for name, mask in (("mask", 1.0), ("mask or middle", 0.5)):
        begun = time.monotonic()
        bridge = paths.statistical_bridge(4, mask=mask)
        field, params = fit_tokens(bridge.path, bridge.size, rows, labels, args, args.seed + 10)
        seconds = time.monotonic() - begun
        for scale in (2.0,) if args.short else (1.0, 2.0):
            draw = bridge_sampler(field, bridge, scale, args.grid)
            note(
                f"bridge from the {name}, scale {scale:.0f}",
                draw(params, jax.random.key(4), asked, length)[1],
                seconds,
            )
        if args.short:
            break
    (args.out / "table.json").write_text(json.dumps(table, indent=1))
    lines = ["".join(LETTERS[i] for i in row) for row in np.asarray(best)[asked == 1][:8]]
    (args.out / "samples.txt").write_text("\n".join(lines) + "\n")
    print("promoters of the guided Dirichlet flow:", *lines, sep="\n")


if __name__ == "__main__":
    main()
