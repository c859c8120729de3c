"""Sequences of letters: files of them, and a discrete flow from masks that learns one."""

import functools
import gzip
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import (
    couplings,
    data,
    distributions,
    guidance,
    losses,
    nets,
    paths,
    solvers,
    times,
    train,
)
from jflow.apps import Experiment

CHUNK = 64  # sequences whose bound is computed at once


def read(path) -> list[str]:
    """The different sequences of a file, plain or gzipped: one a line, its first word, or FASTA."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no file {file}: give path=FILE, a text with one sequence a line or FASTA, or the"
            " folder of the data, as data_dir=FOLDER or in JFLOW_DATA"
        )
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    if text.lstrip().startswith(">"):
        found = ["".join(block.split("\n")[1:]) for block in text.split(">")[1:]]
    else:
        found = [line.split()[0] for line in text.splitlines() if line.strip()]
        found = found[found[:1] == ["smiles"] :]  # the head of a column
    return list(dict.fromkeys(word for sequence in found if (word := "".join(sequence.split()))))


def encoded(texts, symbols: str, length: int) -> np.ndarray:
    """[n, length] of indices, padded by the first one past the symbols."""
    index = {c: i for i, c in enumerate(symbols)}
    x = np.full((len(texts), length), len(symbols), np.int32)
    for i, (row, text) in enumerate(zip(x, texts, strict=True)):
        if len(text) > length:
            raise ValueError(
                f"sequence {i}, {text[:20]!r}, has {len(text)} letters, more than length={length}"
            )
        if strange := sorted(set(text) - set(symbols)):
            raise ValueError(
                f"sequence {i}, {text[:20]!r}: expected letters among {symbols!r}, got {strange}"
            )
        row[: len(text)] = [index[c] for c in text]
    return x


def decoded(x: np.ndarray, symbols: str) -> list[str]:
    """What stands before the first padding; "" where a symbol follows it."""
    texts = ["".join((symbols + "_")[i] for i in row) for row in x]
    return ["" if "_" in text.rstrip("_") else text.rstrip("_") for text in texts]


def letters(symbols: str, length: int) -> data.Preprocess:
    """Preprocessing from texts to indices, and back for samples."""
    return data.Preprocess(
        lambda rows: {},
        lambda state, rows, rng: {"x": encoded(rows["x"], symbols, length)},
        lambda state, rows: {"x": np.array(decoded(rows["x"], symbols))},
        lambda state, rows: np.zeros(len(rows["x"])),
    )


def trigram_bits(learned, texts) -> float:
    """Bits per letter, and one for the end, of an interpolated 3-gram: the counts of each order,
    with those of the order below as five more observations."""
    counts: Counter = Counter()
    for text in learned:
        whole = "^^" + text + "$"
        for i in range(2, len(whole)):
            counts.update((k, whole[i - k : i + 1]) for k in range(3))
            counts.update(("of", k, whole[i - k : i]) for k in range(3))
    size = sum(key[0] == 0 for key in counts)
    nats = []
    for text in texts:
        whole = "^^" + text + "$"
        for i in range(2, len(whole)):
            p = 1 / (size + 1)  # and one letter that was not seen
            for k in range(3):
                p = (counts[k, whole[i - k : i + 1]] + 5 * p) / (
                    counts["of", k, whole[i - k : i]] + 5
                )
            nats.append(-math.log(p))
    return float(np.mean(nats)) / math.log(2)


def experiment(
    texts: Callable[[], list[str]],
    judge: Callable[[list[str], list[str], list[str]], dict[str, float]],
    *,
    symbols: str,
    length: int,
    width: int,
    layers: int,
    steps: int,
    batch: int,
    learning_rate: float,
    draws: int,
    judged: int,
    seed: int,
) -> Experiment:
    """A discrete flow from masks, trained by the bound of its likelihood.

    `judge` gives numbers of (draws, learned sequences, test sequences). Up to `judged` test
    sequences have their bound computed, of 32 times each.
    """
    mask = len(symbols) + 1  # after the padding
    net = jflow.field(
        nets.TokenLogits(nets.TokenDiT(width=width, num_layers=layers), mask + 1, width=width)
    )
    law = paths.unmasking(net, mask)
    start = distributions.tokens((length,), np.eye(mask + 1)[mask])
    loss = losses.chain(
        couplings.with_source(couplings.from_distribution(start)),
        losses.discrete_kl(law, time=times.low_discrepancy()),
    )

    def splits():
        found = texts()
        encoded(found, symbols, length)  # what is wrong is found before training
        return data.split({"x": np.array(found)}, test=0.1, seed=0)

    @functools.cache
    def drawer(temperature, jumps):
        step = solvers.jump(guidance.tempered(law, temperature))
        grid = solvers.grids.uniform(jumps)

        @functools.partial(jax.jit, static_argnums=2)
        def draw(params, key, n):
            x0 = jnp.full((n, length), mask, jnp.int32)
            return solvers.sample_sde(step, params, x0, key, grid)[0]

        return draw

    def sample(params, key, n, *, temperature=1.0, steps=length):
        return {"x": drawer(float(temperature), int(steps))(params, key, n)}

    @jax.jit
    def bound(params, x, key):
        return solvers.discrete_bound(law, params, start, x, key, times=32)

    def evaluate(params, state, key, splits):
        draw_key, *keys = jax.random.split(key, 1 + math.ceil(judged / CHUNK))
        test = [str(text) for text in splits.test["x"]]
        learned = [str(text) for text in splits.train["x"]]
        some = test[:judged]
        parts = np.array_split(encoded(some, symbols, length), math.ceil(len(some) / CHUNK))
        found = [bound(params, x, own) for x, own in zip(parts, keys, strict=False)]
        elbo, error = (np.concatenate(a) for a in zip(*map(jax.device_get, found), strict=True))
        unit = math.log(2) * np.mean([len(text) + 1 for text in some])
        drawn = decoded(np.asarray(sample(params, draw_key, draws)["x"]), symbols)
        return {
            "bound_bits": float(-elbo.mean() / unit),
            "bound_bits_error": float(elbo.std() / math.sqrt(len(elbo)) / unit),
            "trigram_bits": trigram_bits(learned, some),
            **judge(drawn, learned, test),
        }

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20 + 1, steps, 1e-5)
    return Experiment(
        model=law,
        init=lambda key, rows: law.init(key, jnp.asarray(rows["x"]), jnp.zeros(len(rows["x"]))),
        loss=loss,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        data=splits,
        preprocess=letters(symbols, length),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(0.99),
        sample=sample,
        evaluate=evaluate,
        save_every=max(1, steps // 3),
    )
