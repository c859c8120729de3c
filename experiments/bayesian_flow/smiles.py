"""A Bayesian flow network on SMILES of small molecules, with ChemBFN's accuracy.

    # minutes on two CPU cores; JFLOW_DATA/discrete/qm9_smiles.csv.gz, or --data FILE
    python experiments/bayesian_flow/smiles.py --out runs/smiles
    python experiments/bayesian_flow/smiles.py --out runs/short --short  # CI, made-up data

The strings of QM9, a character a token, padded to one length; the last 5% (shuffled) are the test.
Prints the bound of the test strings in bits per string and per character (the padding is part of
the string), that of independent characters, and of samples in few and more steps: how many are
well-formed (atoms, brackets and rings that close), how many of these are new, and how many differ.
Well-formed says nothing of valences.

Methods: Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks* (2023); Tao, Abe, *A Bayesian
Flow Network Framework for Chemistry Tasks* (2024).
"""

import argparse
import gzip
import os
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import losses, nets, paths, solvers, times, train

ATOM = r"(?:\[[A-Za-z][A-Za-z0-9@+-]*\]|[BCNOFcno])"
BOND = r"[-=#/\\]?"


def well_formed(text: str) -> bool:
    """Whether parentheses and ring numbers are paired, and what is between them are atoms and
    bonds."""
    depth = 0
    for symbol in re.sub(r"\[[^\]]*\]", "C", text):
        depth += {"(": 1, ")": -1}.get(symbol, 0)
        if depth < 0:
            return False
    digits = re.findall(r"\d", re.sub(r"\[[^\]]*\]", "", text))
    if depth or any(digits.count(digit) % 2 for digit in set(digits)):
        return False
    chain = rf"{ATOM}(?:{BOND}\d)*"
    flat, last = text, None
    while flat != last:  # the innermost branches, one after another
        last = flat
        flat = re.sub(rf"(?<=[\]A-Za-z0-9])\({BOND}{chain}(?:{BOND}{chain})*\)", "", flat)
    return re.fullmatch(rf"{chain}(?:{BOND}{chain})*", flat) is not None


def read(args):
    if args.short:
        return ["CCO", "c1ccccc1", "CC(=O)N", "C#N", "OCC1CC1"] * 40
    file = args.data or Path(os.environ.get("JFLOW_DATA", "")) / "discrete/qm9_smiles.csv.gz"
    lines = gzip.open(file, "rt").read().split()
    return [line.split(",")[0] for line in lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the samples")
    parser.add_argument("--data", type=Path, help="the strings, gzipped, a line each after a head")
    parser.add_argument("--steps", type=int, default=1500, help="updates")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3, help="falls to 0 along a cosine")
    parser.add_argument("--end", type=float, default=0.6, help="accuracy at t=1")
    parser.add_argument("--count", type=int, default=500, help="samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="numbers mean nothing")
    args = parser.parse_args()
    if args.short:
        args.steps, args.width, args.layers, args.count = 10, 8, 1, 20
    args.out.mkdir(parents=True, exist_ok=True)
    texts = read(args)
    length = max(map(len, texts))
    symbols = " " + "".join(sorted(set("".join(texts))))
    code = {symbol: i for i, symbol in enumerate(symbols)}
    rows = np.array([[code[s] for s in text.ljust(length)] for text in texts], np.int32)
    rows = np.random.default_rng(0).permutation(rows)
    cut = len(rows) * 19 // 20
    rows, test = jnp.asarray(rows[:cut]), rows[cut:][:1024]

    k = len(symbols)
    flow = paths.bayesian_discrete(paths.entropy_accuracy(args.end, k), k)
    field = jflow.field(nets.TokenDiT(width=args.width, num_layers=args.layers, num_heads=4))
    loss = losses.bayesian_flow(field, flow, time=times.low_discrepancy())
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(args.rate, args.steps)),
    )
    ema = train.ema.warmup(0.995)
    step = train.make_step(loss, optimizer, ema=ema)

    @jax.jit
    def fit(state, keys):
        def advance(state, key):
            at = jax.random.randint(key, (args.batch,), 0, len(rows))
            return step(state, {"x": rows[at]})[0], None

        return jax.lax.scan(advance, state, keys)[0]

    begun = time.monotonic()
    params = field.init(jax.random.key(args.seed), flow.prior((1, length), float), jnp.zeros(1))
    state = train.init_state(params, optimizer, jax.random.key(args.seed + 1), ema=ema)
    params = jax.block_until_ready(
        fit(state, jax.random.split(jax.random.key(args.seed + 2), args.steps)).ema
    )
    print(f"{k} symbols, {length} characters, {time.monotonic() - begun:.0f} s of training")

    kept = losses.bayesian_reconstruction(field, flow)

    @jax.jit
    def bits(key):
        keys = jax.random.split(key)
        found = [
            part(params, own, {"x": test}) for part, own in zip((loss, kept), keys, strict=True)
        ]
        return jnp.stack([metrics["bits"] for _, metrics in found])

    found = np.array([bits(key) for key in jax.random.split(jax.random.key(3), 20)])
    total, error = found.sum(1).mean(), found.sum(1).std() / np.sqrt(len(found))
    places = np.stack([(np.asarray(rows) == a).mean(0) for a in range(k)], 1)
    alone = -np.log2(np.maximum(places[np.arange(length)[None], test], 1e-6)).sum(1).mean()
    print(f"bound: {total:.2f} +- {error:.2f} bits a string, {total / length:.3f} a character")
    print(f"of them the reconstruction: {found[:, 1].mean():.2f} bits")
    print(f"independent characters: {alone:.2f} bits a string")

    known = set(texts)
    for grid in (10, 50):
        draw = jax.jit(
            lambda key, grid=grid: solvers.sample_bayesian(
                field, flow, params, key, (args.count, length), grid=grid
            )
        )
        made = [
            "".join(symbols[i] for i in row).rstrip() for row in np.asarray(draw(jax.random.key(4)))
        ]
        good = [text for text in made if well_formed(text)]
        new = [text for text in good if text not in known]
        print(
            f"{grid} steps: well-formed {len(good) / len(made):.1%}, of these new"
            f" {len(new) / max(len(good), 1):.1%},"
            f" different {len(set(good)) / max(len(good), 1):.1%}"
        )
        (args.out / f"samples_{grid}.txt").write_text("\n".join(made) + "\n")
    print("well-formed of the data:", np.mean([well_formed(text) for text in texts[:2000]]))


if __name__ == "__main__":
    main()
