"""Characters of Shakespeare, one after the other: a causal law of symbols on tinyshakespeare.

Train and write (10 minutes at most on two CPU cores; JFLOW_DATA/discrete/tinyshakespeare.txt.gz, or
path=FILE):

    jflow train experiments/shakespeare_characters --workdir runs/shakespeare
    jflow evaluate runs/shakespeare
    python experiments/shakespeare_characters/write.py runs/shakespeare

net=transformer takes a causal transformer with rotary positions in the place of the LSTM.
`short=True` trains on some prose of jflow's in seconds, for CI. The expected numbers are in
README.md beside this file.

The law is `distributions.causal(net, distributions.categorical(65))`, trained by `losses.nll` on
pieces of the first 90% of the text. Reported are bits per character of the last 10%, in pieces that
overlap by half: every character but the first ones is judged given the `length / 2` to `length - 1`
characters before it. Beside it stands an interpolated 3-gram of the same 90%. Exact bits of
autoregressive models are what bounds of discrete flows are to be compared with.
"""

import functools
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from characters import SYMBOLS, counted, grams, pieces, read, tail_mask

from jflow import data, distributions, losses, nets, train, types
from jflow.apps import Experiment


def config(
    *,
    path: str = "",
    net: str = "lstm",
    length: int = 128,
    width: int = 256,
    layers: int = 1,
    steps: int = 1200,
    batch: int = 32,
    learning_rate: float = 4e-3,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        path: the text, plain or gzipped; discrete/tinyshakespeare.txt.gz in JFLOW_DATA if empty
        net: lstm or transformer
        length: characters of a piece
        width: of the network
        layers: of the network
        steps: updates
        batch: pieces of an update
        learning_rate: of Adam, at its highest
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        path, length, width, layers, steps, batch = types.__file__, 16, 16, 1, 30, 8
    sizes = {"width": width, "num_layers": layers, "vocabulary": len(SYMBOLS)}
    if net not in ("lstm", "transformer"):
        raise ValueError(f"unknown net {net!r}: expected lstm or transformer")
    module = (
        nets.CausalLSTM(**sizes)
        if net == "lstm"
        else nets.CausalTransformer(**sizes, features=width, rotary_period=1000.0)
    )
    token = distributions.categorical(len(SYMBOLS))
    law = distributions.causal(module, token, (length,))
    of_tokens = distributions.token_log_probs(module, token)

    def splits():
        file = path or Path(os.environ.get("JFLOW_DATA", "")) / "discrete/tinyshakespeare.txt.gz"
        symbols = read(file, SYMBOLS)
        cut = len(symbols) * 9 // 10
        step = max(1, length // 8)
        return data.Splits(
            {"x": pieces(symbols[:cut], length, step)},
            None,
            {"x": pieces(symbols[cut:], length, length // 2)},
        )

    @functools.cache
    def drawer(temperature, characters):
        token = distributions.categorical(len(SYMBOLS), temperature=temperature)
        return distributions.causal(module, token, (characters,)).sample

    def sample(params, key, n, *, temperature=1.0, characters=length):
        return {"x": drawer(float(temperature), int(characters))(params, key, n)}

    def evaluate(params, state, key, splits):
        x = splits.test["x"]
        used = tail_mask(x.shape)
        nats = [np.asarray(of_tokens(params, some)) for some in np.array_split(x, len(x) // 64 + 1)]
        text = np.concatenate([x[0], x[1:, length // 2 :].reshape(-1)])  # each character once
        learned = counted(splits.train["x"], length // 8)
        return {
            "test_bits": float(-np.concatenate(nats)[used].mean() / np.log(2)),
            "trigram_bits": grams(learned, text, len(SYMBOLS), order=3),
            "unigram_bits": grams(learned, text, len(SYMBOLS), order=1),
        }

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20 + 1, steps, 1e-5)
    return Experiment(
        model=law,
        init=lambda key, rows: law.init(key, jnp.asarray(rows["x"])),
        loss=losses.nll(law),
        optimizer=optax.chain(optax.clip_by_global_norm(100.0), optax.adam(schedule)),
        data=splits,
        preprocess=data.identity(),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(0.99),
        sample=sample,
        evaluate=evaluate,
        eval_every=max(1, steps // 3),
        save_every=max(1, steps // 3),
    )
