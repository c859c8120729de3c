"""Promoters of E. coli: a discrete flow of DNA, guided by its class and by a predictor.

    python experiments/promoters/run.py

It takes minutes and needs JFLOW_DATA (discrete/dna, 839 promoters and 3,000 other pieces, 81
letters each); --short takes seconds and letters drawn at random. Prints a table.

80% of the pieces are learned by one flow from masks that is told the class, or, one time in seven,
none; one classifier learns the class from partly masked pieces, for guidance, and another one, the
judge, from whole ones. Counted is how many draws the judge takes for promoters, and how far the
frequencies of four letters in a row are from those of the other promoters, in total variation.
"""

import argparse
import functools
import gzip
import os
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import couplings, distributions, guidance, losses, nets, paths, solvers, train
from jflow.types import Field

LETTERS, MASK, NULL, LENGTH = "ACGT", 4, 2, 81


def pieces(name: str) -> np.ndarray:
    """[n, LENGTH] of a FASTA file."""
    file = Path(os.environ.get("JFLOW_DATA", "")) / "discrete/dna" / name
    with gzip.open(file, "rt") as lines:
        blocks = lines.read().upper().split(">")[1:]
    found = ["".join(block.split("\n")[1:]).strip() for block in blocks]
    whole = [text for text in found if len(text) == LENGTH and not set(text) - set(LETTERS)]
    return np.array([[LETTERS.index(c) for c in text] for text in whole], np.int32)


class Classifier(nn.Module):
    """Logits of the class, of the one-hot vectors of a piece."""

    width: int

    @nn.compact
    def __call__(self, x, t, cond=None):
        for _ in range(2):
            x = nn.gelu(nn.Conv(self.width, (9,))(x))
        return nn.Dense(2)(jnp.concatenate([x.mean(1), x.max(1)], axis=-1))


def cross_entropy(classifier: Field, source=None):
    """A loss of the class, of whole pieces or of points of the path from the source."""
    path = paths.discrete()

    def loss(params, key, batch, frozen=None):
        x, t = batch["x"], jnp.ones(len(batch["x"]))
        if source is not None:
            time_key, source_key, path_key = jax.random.split(key, 3)
            t = jax.random.uniform(time_key, t.shape)
            x0 = source.sample({}, source_key, len(x)).astype(x.dtype)
            x = path.point(x0, x, t, key=path_key)
        logits = classifier.apply(params, jax.nn.one_hot(x, 5), t)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, batch["cond"])
        return errors.mean(), {}

    return loss


def fitted(loss, params, rows, steps, batch, key, rate=2e-3):
    """The averaged params after `steps` updates, with as many rows of each class."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20 + 1, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
    average = train.ema.warmup(0.99)
    draw_key, state_key = jax.random.split(key)
    state = train.init_state(params, optimizer, state_key, ema=average)
    step = jax.jit(train.make_step(loss, optimizer, ema=average), donate_argnums=0)
    draw = np.random.default_rng(int(jax.random.randint(draw_key, (), 0, 2**30)))
    labels = np.arange(batch) % 2
    for i in range(steps):
        x = np.stack([rows[c][draw.integers(len(rows[c]))] for c in labels])
        state, metrics = step(state, {"x": x, "cond": labels})
        if i % 100 == 0:
            print(f"step {i}: loss {metrics['loss']:.4f}", file=sys.stderr, flush=True)
    return state.ema


def words(x: np.ndarray) -> np.ndarray:
    """The frequencies of four letters in a row."""
    four = np.lib.stride_tricks.sliding_window_view(x, 4, axis=1) @ [64, 16, 4, 1]
    return np.bincount(four.ravel(), minlength=256) / four.size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--jumps", type=int, default=81)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="seconds, for CI")
    args = parser.parse_args()
    if args.short:
        args.steps, args.width, args.draws, args.jumps, args.batch = 4, 8, 8, 2, 4
    order = np.random.default_rng(0)
    if args.short:
        groups = [order.integers(4, size=(40, LENGTH), dtype=np.int32) for _ in range(2)]
    else:
        groups = [pieces("Ecoli_non_prom.fa.gz"), pieces("Ecoli_prom.fa.gz")]
    groups = [group[order.permutation(len(group))] for group in groups]
    learned = [group[: len(group) * 4 // 5] for group in groups]
    held = [group[len(group) * 4 // 5 :] for group in groups]

    width = args.width
    net = nets.TokenDiT(width=width, num_layers=3, num_heads=4, num_classes=2, dropout=0.1)
    field = jflow.field(nets.TokenLogits(net, 5, width=width))
    law = paths.unmasking(field, MASK)
    source = distributions.tokens((LENGTH,), np.eye(5)[MASK])
    noisy, judge = (jflow.field(Classifier(width)) for _ in range(2))
    keys = jax.random.split(jax.random.key(args.seed), 7)
    hot, t = jnp.zeros((2, LENGTH, 5)), jnp.zeros(2)
    loss = losses.chain(
        couplings.with_source(couplings.from_distribution(source)),
        losses.drop_cond(1 / 7, null=NULL),
        losses.discrete_matching(law),
    )
    began = time.perf_counter()
    start = field.init(keys[0], jnp.zeros((2, LENGTH), int), t, jnp.array([0, 1]))
    flow = fitted(loss, start, learned, args.steps, args.batch, keys[1])
    quarter = max(1, args.steps // 2)
    predict = fitted(
        cross_entropy(noisy, source),
        noisy.init(keys[2], hot, t),
        learned,
        quarter,
        args.batch,
        keys[3],
    )
    judged = fitted(
        cross_entropy(judge),
        judge.init(keys[4], hot, t),
        learned,
        quarter // 2 + 1,
        args.batch,
        keys[5],
    )
    print(f"trained in {time.perf_counter() - began:.0f} s\n")

    @jax.jit
    def says(x):
        return jnp.argmax(judge.apply(judged, jax.nn.one_hot(x, 5), jnp.ones(len(x))), axis=1)

    def of_class(step, params, cond):
        @functools.partial(jax.jit, static_argnums=1)
        def draw(key, n):
            x0 = jnp.full((n, LENGTH), MASK, jnp.int32)
            grid = solvers.grids.uniform(args.jumps)
            return solvers.sample_sde(step, params, x0, key, grid, jnp.full((n,), cond))[0]

        return draw

    def by_predictor(scale):
        """Rates of no class, times the ratio of the predictor's probabilities."""

        def told_nothing(params, x, t, cond=None, *, key=None):
            return law.apply(params, x, t, jnp.full_like(cond, NULL), key=key)

        def last(params, x, t, cond=None, *, key=None):
            return told_nothing(params["rates"], x, t, cond, key=key)

        free = paths.jump_rates(Field(law.init, told_nothing))
        rates = guidance.taylor_rates(free, guidance.label_log_prob(noisy), scale)
        return solvers.ending(solvers.euler_jump(rates), solvers.jump(Field(law.init, last)))

    both = {"rates": flow, "predictor": predict}
    draws = {
        "flow, no class": of_class(solvers.jump(law), flow, NULL),
        "flow, other pieces": of_class(solvers.jump(law), flow, 0),
        "flow, promoters": of_class(solvers.jump(law), flow, 1),
        **{
            f"classifier-free, scale {w:g}": of_class(
                solvers.jump(guidance.discrete_cfg(law, w, null=NULL)), flow, 1
            )
            for w in (2.0, 4.0)
        },
        **{
            f"predictor, first order, scale {w:g}": of_class(by_predictor(w), both, 1)
            for w in (1.0, 4.0)
        },
    }
    made = {
        name: np.asarray(draw(key, args.draws))
        for (name, draw), key in zip(
            draws.items(), jax.random.split(keys[6], len(draws)), strict=True
        )
    }
    made = {"promoters, not learned": held[1], "other pieces, not learned": held[0]} | made
    print("| | judged a promoter | distance of words |\n|---|---|---|")
    for name, x in made.items():
        far = 0.5 * np.abs(words(x) - words(learned[1])).sum()
        print(f"| {name} | {np.asarray(says(x)).mean():.1%} | {far:.3f} |")


if __name__ == "__main__":
    main()
