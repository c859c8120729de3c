"""Characters of Shakespeare, all at once: a discrete flow from masks on tinyshakespeare.

Train, judge and write (12 minutes of CPU time; JFLOW_DATA/discrete/tinyshakespeare.txt.gz, or
path=FILE):

    jflow train experiments/shakespeare_characters/discrete.py --workdir runs/masked
    jflow evaluate runs/masked
    python experiments/shakespeare_characters/write.py runs/masked --temperature 0.7

source=uniform starts from uniform characters in the place of masks. `short=True` trains on some
prose of jflow's in seconds, for CI. The expected numbers are in README.md beside this file.

The network reads a piece of text whose characters are partly masked, by an LSTM from each side of
the size of the causal one's, and says what each character is; it is not shown the time. It is
trained by `losses.discrete_kl`, a bound of the likelihood. Reported are bits per character of
pieces of the last 10% of the text, each by itself, by `solvers.discrete_bound`, with the standard
error over pieces and the one of the Monte Carlo estimate alone.
"""

import functools
import math
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from characters import SYMBOLS, counted, grams, pieces, read

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
    types,
)
from jflow.apps import Experiment

MASK = len(SYMBOLS)


class BothSides(nn.Module):
    """An LSTM from the left and one from the right, and a hidden layer of both: h [b, n, width] to
    as many numbers."""

    width: int

    @nn.compact
    def __call__(self, h, t, cond=None):
        cell = lambda: nn.OptimizedLSTMCell(self.width)  # noqa: E731
        left = nn.RNN(cell())(h)
        right = nn.RNN(cell(), reverse=True, keep_order=True)(h)
        both = nn.Dense(2 * self.width)(jnp.concatenate([left, right], axis=-1))
        return nn.Dense(h.shape[-1])(nn.gelu(both))


def config(
    *,
    path: str = "",
    source: str = "mask",
    length: int = 128,
    width: int = 192,
    steps: int = 1200,
    batch: int = 32,
    learning_rate: float = 4e-3,
    judged: int = 0,
    draws: int = 64,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        path: the text, plain or gzipped; discrete/tinyshakespeare.txt.gz in JFLOW_DATA if empty
        source: mask or uniform
        length: characters of a piece
        width: of each LSTM
        steps: updates
        batch: pieces of an update
        learning_rate: of Adam, at its highest
        judged: pieces that the bound is of, evenly spaced; 0 for all
        draws: antithetic times of the bound for each piece
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        path, length, width, steps, batch, draws = types.__file__, 16, 16, 30, 8, 4
        judged = 8
    if source not in ("mask", "uniform"):
        raise ValueError(f"unknown source {source!r}: expected mask or uniform")
    size = len(SYMBOLS) + (source == "mask")
    net = jflow.field(nets.TokenLogits(BothSides(width), size, width=width))
    law = paths.unmasking(paths.without_time(net), MASK) if source == "mask" else net
    shares = np.eye(size)[MASK] if source == "mask" else np.full(size, 1 / size)
    start = distributions.tokens((length,), shares)
    loss = losses.chain(
        couplings.with_source(couplings.from_distribution(start)),
        losses.discrete_kl(law, time=times.low_discrepancy()),
    )

    def splits():
        file = path or Path(os.environ.get("JFLOW_DATA", "")) / "discrete/tinyshakespeare.txt.gz"
        symbols = read(file, SYMBOLS)
        cut = len(symbols) * 9 // 10
        return data.Splits(
            {"x": pieces(symbols[:cut], length, max(1, length // 8))},
            None,
            {"x": pieces(symbols[cut:], length, length)},
        )

    @functools.cache
    def drawer(temperature, characters, jumps, noise):
        sharp = guidance.tempered(law, temperature)
        step = solvers.jump(sharp)
        if noise > 0:
            corrector = (
                paths.remasking(noise, MASK)
                if source == "mask"
                else (paths.resampling(noise, shares))
            )
            noisy = solvers.euler_jump(paths.jump_rates(sharp, corrector=corrector))
            step = solvers.ending(noisy, step)
        begin = distributions.tokens((characters,), shares)
        grid = solvers.grids.uniform(jumps)

        @functools.partial(jax.jit, static_argnums=2)
        def draw(params, key, n):
            start_key, jump_key = jax.random.split(key)
            x0 = begin.sample({}, start_key, n)
            return solvers.sample_sde(step, params, x0, jump_key, grid)[0]

        return draw

    def sample(params, key, n, *, temperature=1.0, characters=length, jumps=128, noise=0.0):
        options = float(temperature), int(characters), int(jumps), float(noise)
        return {"x": drawer(*options)(params, key, n)}

    @jax.jit
    def bound(params, x, key):
        return solvers.discrete_bound(law, params, start, x, key, times=draws)

    def evaluate(params, state, key, splits):
        x = splits.test["x"]
        chosen = x if not judged else x[np.linspace(0, len(x) - 1, judged).astype(int)]
        parts = np.array_split(chosen, math.ceil(len(chosen) / 64))
        keys = jax.random.split(key, len(parts))
        found = [bound(params, some, key) for some, key in zip(parts, keys, strict=True)]
        elbo, error = (np.concatenate(a) for a in zip(*map(jax.device_get, found), strict=True))
        unit, learned = length * math.log(2), counted(splits.train["x"], max(1, length // 8))
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "pieces": len(chosen),
            "bound_bits": float(-elbo.mean() / unit),
            "bound_bits_error": float(elbo.std() / math.sqrt(len(elbo)) / unit),
            "monte_carlo_error": float(np.sqrt(np.sum(error**2)) / len(error) / unit),
            "trigram_bits": grams(learned, x.reshape(-1), len(SYMBOLS), order=3),
            "unigram_bits": grams(learned, x.reshape(-1), len(SYMBOLS), order=1),
        }

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20 + 1, steps, 1e-5)

    def init(key, rows):
        x = jnp.asarray(rows["x"])
        return law.init(key, x, jnp.zeros(len(x)))

    return Experiment(
        model=law,
        init=init,
        loss=loss,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        data=splits,
        preprocess=data.identity(),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(0.99),
        sample=sample,
        evaluate=evaluate,
        save_every=max(1, steps // 3),
    )
