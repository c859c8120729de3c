"""Molecules as strings: a discrete flow from masks on the SMILES of QM9.

    python experiments/molecules/run.py --out runs/molecules
    python experiments/molecules/run.py --out runs/molecules --rdkit PYTHON   # of an environment
                                                                              # with rdkit

It takes minutes and needs JFLOW_DATA (discrete/qm9_smiles.csv.gz, 133,885 strings); --short takes
seconds and a few molecules that it holds itself. Prints a table, and writes the drawn strings to
--out.

90% of the strings are learned, each padded to one length by a symbol of its own. The flow starts
from masks and is trained by cross-entropy; samples are drawn by `solvers.jump` over a uniform grid.
Counted among the draws are the valid ones (what rdkit reads; without rdkit, what closes its
brackets and rings, which is less strict), of these the different ones, and of those the ones that
are not among the learned. Beside it stand n-grams of the same strings.
"""

import argparse
import functools
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sequences import decoded, encoded, read
from validity import closed, counts

import jflow
from jflow import couplings, data, distributions, guidance, losses, nets, paths, solvers, train

READ = """
import sys
from rdkit import Chem, RDLogger
RDLogger.DisableLog("rdApp.*")
for line in sys.stdin:
    molecule = Chem.MolFromSmiles(line.strip()) if line.strip() else None
    print(Chem.MolToSmiles(molecule) if molecule is not None else "")
"""


def strings(short: bool) -> list[str]:
    """The SMILES of QM9, in a fixed random order; a few molecules, repeated, of a short run."""
    if short:
        return ["CCO", "c1ccccc1", "CC(=O)N", "C#N", "OCC1CC1"] * 40
    found = read(Path(os.environ.get("JFLOW_DATA", "")) / "discrete/qm9_smiles.csv.gz")
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def forms(texts: list[str], python: str) -> list[str]:
    """What each of them is in one form for all, "" for what is no molecule."""
    if not python:
        return [closed(text) for text in texts]
    lines = "\n".join(texts) + "\n"
    command = [python, "-c", READ]
    found = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    return found.stdout.split("\n")[: len(texts)]


def grams(texts: list[str], order: int, n: int) -> list[str]:
    """Strings of an n-gram with the frequencies of the learned ones."""
    after: dict[str, Counter] = {}
    for text in texts:
        whole = "^" * (order - 1) + text + "$"
        for i in range(order - 1, len(whole)):
            after.setdefault(whole[i - order + 1 : i], Counter())[whole[i]] += 1
    draw, made = np.random.default_rng(1), []
    tables = {k: (list(c), np.cumsum(list(c.values())) / sum(c.values())) for k, c in after.items()}
    for _ in range(n):
        text = "^" * (order - 1)
        while not text.endswith("$") and len(text) < 60:
            letters, cdf = tables[text[len(text) - order + 1 :]]
            text += letters[int(np.searchsorted(cdf, draw.random(), side="right"))]
        made.append(text.strip("^$"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="", help="folder for the strings")
    parser.add_argument("--rdkit", default="", help="Python of an environment with rdkit")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds, for CI")
    args = parser.parse_args()
    texts = strings(args.short)
    if args.short:
        args.steps, args.width, args.layers, args.draws = 20, 16, 1, 16
    cut = len(texts) * 9 // 10
    symbols, length = "".join(sorted(set("".join(texts)))), max(map(len, texts))
    vocabulary = len(symbols) + 2  # padding and the mask
    mask = vocabulary - 1
    x = data.check_tokens(encoded(texts, symbols, length), vocabulary, mask)

    net = jflow.field(
        nets.TokenLogits(
            nets.TokenDiT(width=args.width, num_layers=args.layers), vocabulary, width=args.width
        )
    )
    law = paths.unmasking(net, mask)
    start = distributions.tokens((length,), np.eye(vocabulary)[mask])
    loss = losses.chain(
        couplings.with_source(couplings.from_distribution(start)), losses.discrete_matching(law)
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, args.steps // 20 + 1, args.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    average = train.ema.warmup(0.99)
    init_key, train_key, draw_key = jax.random.split(jax.random.key(args.seed), 3)
    state = train.init_state(
        net.init(init_key, x[:2], jnp.zeros(2)), optimizer, train_key, ema=average
    )
    step = jax.jit(train.make_step(loss, optimizer, ema=average), donate_argnums=0)
    began, order = time.perf_counter(), np.random.default_rng(args.seed)
    for i in range(args.steps):
        state, metrics = step(state, {"x": x[order.integers(0, cut, args.batch)]})
        if i % 100 == 0:
            print(f"step {i}: loss {metrics['loss']:.4f}", file=sys.stderr, flush=True)
    print(
        f"{sum(p.size for p in jax.tree.leaves(state.ema)):,} parameters, {args.steps} updates in"
        f" {time.perf_counter() - began:.0f} s\n"
    )

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(params, temperature, steps, key):
        jump = solvers.jump(guidance.tempered(law, temperature))
        x0 = jnp.full((args.draws, length), mask, jnp.int32)
        return solvers.sample_sde(jump, params, x0, key, solvers.grids.uniform(steps))[0]

    to_forms = functools.partial(forms, python=args.rdkit)
    known = set(to_forms(texts[:cut]))
    rows = {f"{k}-gram": grams(texts[:cut], k, args.draws) for k in (3, 5)}
    settings = [(1.0, 16), (1.0, 64), (0.8, 64)]
    keys = jax.random.split(draw_key, len(settings))
    for (temperature, steps), key in zip(settings, keys, strict=True):
        made = draw(state.ema, temperature, steps, key)
        rows[f"flow, {steps} jumps, temperature {temperature:g}"] = decoded(
            np.asarray(made), symbols
        )
    rows["QM9, not learned"] = texts[cut:][: args.draws]
    print("| | valid | different | new |\n|---|---|---|---|")
    for name, made in rows.items():
        print(f"| {name} | " + " | ".join(f"{v:.1%}" for v in counts(made, known, to_forms)) + " |")
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            file = Path(args.out) / (re.sub(r"\W+", "_", name) + ".txt")
            file.write_text("\n".join(made) + "\n")


if __name__ == "__main__":
    main()
