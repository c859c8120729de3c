"""Spoken digits frame after frame: a flow as the law of a frame, on an LSTM that reads the past.

    # minutes on two CPU cores; JFLOW_DATA/audio/fsdd_dev300.zip, or --data FILE
    python experiments/spoken_digits/run.py --out runs/spoken
    python experiments/spoken_digits/run.py --out runs/spoken --seed 1
    # CI: a minute, on invented frames; numbers mean nothing
    python experiments/spoken_digits/run.py --out runs/short --short

`distributions.causal(nets.CausalLSTM, token)` on log-mel frames of utterances of unequal lengths,
given the digit, the speaker, and a template of both stretched to the length. The token is a RealNVP
(MoGlow), or a Gaussian on the same network; beside them stand a VAR(1) and the linear law that both
begin as, told as much (VARX). Prints nats per frame of held-out utterances by paired differences,
and how often a classifier of real utterances agrees with the label that a sample was drawn for.
Writes results.json and spectrograms.png. README.md has the results.
"""

import argparse
import json
import os
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import speech
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from jflow import distributions, flows, nets, train
from jflow.types import Condition

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Reader(nn.Module):
    """[b, n, d + k + width]: the frame before (before the first: its template), what is known at
    each frame (`aligned`), and what a causal network makes of the past. While it is trained (given
    a key) the network does not see some of the frames, and dropout is on what it says."""

    net: nn.Module
    rate: float

    @nn.compact
    def __call__(self, x, cond=None, cache=None, first=0):
        known = jax.lax.dynamic_slice_in_dim(cond.aligned, first, x.shape[1], axis=1)
        before = jnp.roll(x, 1, axis=1) if cache is None else x
        begins = (first + jnp.arange(x.shape[1]) == 0)[:, None]
        before = jnp.where(begins, known[..., : x.shape[2]], before)
        if self.has_rng("dropout"):
            seen = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape[:2])
            x = jnp.where(seen[..., None], x, 0)
        if cache is None:
            h = self.net(x, cond)
        else:
            h, cache = self.net(x, cond, cache=cache, first=first)
        h = nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(h)
        h = jnp.concatenate([before, known, h], axis=-1)
        return h if cache is None else (h, cache)

    def empty_cache(self, x, rows):
        return self.net.empty_cache(x, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, help="fsdd_dev300.zip")
    parser.add_argument("--steps", type=int, default=1000, help="updates of each model")
    parser.add_argument("--width", type=int, default=96, help="of the LSTM")
    parser.add_argument("--rate", type=float, default=0.3, help="of dropout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="shrink it to seconds")
    args = parser.parse_args()
    out = args.out / str(args.seed)
    out.mkdir(parents=True, exist_ok=True)
    file = args.data or Path(os.environ.get("JFLOW_DATA", "")) / "audio/fsdd_dev300.zip"
    rows = speech.invented(args.seed) if args.short else speech.read(file, args.seed)
    hidden, depth, batch, apart, each = (64,), 4, 32, 50, 10
    if args.short:
        args.steps, args.width = 20, 8
        hidden, depth, batch, apart, each = (8,), 2, 8, 10, 1

    # takes 0 to 2 are the test, 3 is the validation
    part = lambda *takes: [row for row in rows if row["take"] in takes]  # noqa: E731
    learned = part(*range(4, 12))
    learned, held, test = (
        speech.templates(some, learned) for some in (learned, part(3), part(0, 1, 2))
    )
    linear = {
        "VAR(1)": speech.Autoregression(learned),
        "VARX(1)": speech.Autoregression(learned, told=True),
    }
    # The innovations of a linear law are made white for both heads: theirs are diagonal at first.
    white = np.linalg.inv(np.linalg.cholesky(linear["VARX(1)"].rest))
    center = np.concatenate([row["frames"] for row in learned]).mean(0)
    log_scale = float(np.linalg.slogdet(white)[1])

    def whitened(some):
        change = lambda row, k: ((row[k] - center) @ white.T).astype(np.float32)  # noqa: E731
        return [row | {k: change(row, k) for k in ("frames", "template")} for row in some]

    shape = (max(len(row["frames"]) for row in rows), speech.BANDS)
    seen = whitened(learned)
    sets = [batch_of(some, shape[0]) for some in (seen, whitened(held), whitened(test))]
    net = Reader(nets.CausalLSTM(width=args.width, num_classes=10), rate=args.rate)
    gaussian = distributions.conditional_mixture((speech.BANDS,))
    tokens = {
        "flow": flows.real_nvp(
            (speech.BANDS,), depth=depth, hidden=hidden, standardize=False, base=gaussian
        ),
        "Gaussian": gaussian,
    }
    judge = make_pipeline(StandardScaler(), PCA(0.95), SVC(C=10.0, random_state=0))
    judge.fit([speech.along(row["frames"]) for row in learned + held], labels(learned + held))
    real = judge.score([speech.along(row["frames"]) for row in test], labels(test))
    print(f"{len(learned)} utterances, the classifier on {len(test)} real others: {real:.3f}")

    lengths = np.array([len(row["frames"]) for row in test])
    nats = {
        name: np.array([law.log_prob(row).sum() for row in test]) for name, law in linear.items()
    }
    wanted = asked(learned, each, args.seed)
    draw = np.random.default_rng(args.seed)
    drawn = {"VARX(1)": [linear["VARX(1)"].sample(row, draw) for row in wanted]}
    results = {"classifier_on_real": real}
    for name, token in tokens.items():
        begun = time.monotonic()
        law = distributions.causal(net, token, shape)
        begin_key, key = jax.random.split(jax.random.key(args.seed))
        params = begun_linear(token, law.init(begin_key, sets[0]["x"], sets[0]["cond"]), seen)
        params, curve = trained(law, params, key, *sets[:2], args.steps, batch, args.seed, apart)
        log_p = distributions.token_log_probs(net, token)(params, sets[2]["x"], sets[2]["cond"])
        nats[name] = np.asarray(log_p).sum(1) + lengths * log_scale
        x = samples(law, params, whitened(wanted), shape[0], args.seed)
        drawn[name] = [frames @ np.linalg.inv(white).T + center for frames in x]
        size = sum(p.size for p in jax.tree.leaves(params))
        results[name] = {"params": size, "validation": curve}
        print(
            f"{name}: {size} params, least validation loss at {int(np.argmin(curve))} of"
            f" {len(curve) - 1}, {time.monotonic() - begun:.0f} s",
            flush=True,
        )
    print(f"{len(wanted)} samples classified as their label")
    for name, found in drawn.items():
        said = judge.predict([speech.along(frames) for frames in found])
        results.setdefault(name, {})["agreement"] = judged = float((said == labels(wanted)).mean())
        print(f"{name:10s} {judged:8.3f}")
    print(f"nats per frame of {len(test)} held-out utterances, and the flow's above")
    for name, found in nats.items():
        more = (nats["flow"] - found) / lengths
        more = float(more.mean()), float(more.std(ddof=1) / len(test) ** 0.5)
        per_frame = float(found.sum() / lengths.sum())
        results.setdefault(name, {}).update(nats_per_frame=per_frame, flow_above=more)
        print(f"{name:10s} {per_frame:8.3f}   {more[0]:.3f} +- {more[1]:.3f}")
    (out / "results.json").write_text(json.dumps(results, indent=1))
    picture(out / "spectrograms.png", test, wanted, drawn)
    print(f"pictures and numbers: {out}")


def labels(rows):
    return [row["label"] for row in rows]


def batch_of(rows, length):
    made = speech.padded(rows, length)
    return {
        "x": made["x"],
        "cond": Condition(label=made["label"], aligned=made["known"], valid=made["valid"]),
    }


def begun_linear(token, params, seen):
    """The params, where the Gaussian begins as the linear law of the frames with deviations of the
    speaker and of first frames, and reads the LSTM by zeros."""
    linear, bands = speech.Autoregression(seen, told=True), speech.BANDS
    errors = np.concatenate([linear.errors(row) for row in seen])
    given = np.concatenate([linear.given(row) for row in seen])
    given[:, 1 : 1 + 3 * bands] = 0
    given[:, -2:] = 0
    kinds, kind = np.unique(given, axis=0, return_inverse=True)
    kind = np.eye(len(kinds))[kind.ravel()]
    log_stds = 0.5 * np.log(kind.T @ errors**2 / kind.sum(0)[:, None] + 1e-2)
    log_stds = np.linalg.lstsq(given, kind @ log_stds, rcond=None)[0]
    means, law = linear.coefficients, params["token"]
    if "base" in law:  # the layers are identities at first, between permutations
        width = law["base"]["kernel"].shape[0]
        order = np.asarray(token.inverse(law, jnp.eye(bands), jnp.zeros((bands, width)))[0])
        means, log_stds = means @ order, log_stds @ order
    gaussian = law.get("base", law)
    start = np.concatenate([means, log_stds], axis=1)
    begun = {
        "kernel": jnp.zeros_like(gaussian["kernel"]).at[: len(start) - 1].set(start[1:]),
        "means": jnp.zeros_like(gaussian["means"]) + means[0],
        "log_stds": jnp.zeros_like(gaussian["log_stds"]) + log_stds[0],
    }
    return params | {"token": law | {"base": begun} if "base" in law else begun}


def trained(law, params, key, learned, held, steps, batch, seed, apart):
    """The averaged params where the validation loss is least, and these losses, in nats a frame."""
    rate = optax.cosine_decay_schedule(1e-3, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.02))
    state = train.init_state(params, optimizer, key, ema=0.98)

    def loss(params, key, rows, frozen=None):
        log_p = law.log_prob(params, rows["x"], rows["cond"], key=key)
        return -jnp.sum(log_p) / jnp.sum(rows["cond"].valid), {}

    step = train.make_step(loss, optimizer, ema=0.98)
    everything = jax.tree.map(jnp.asarray, learned)

    def update(state, key):
        at = jax.random.randint(key, (batch,), 0, everything["x"].shape[0])
        return step(state, jax.tree.map(lambda a: a[at], everything))[0], None

    advance = jax.jit(lambda state, keys: jax.lax.scan(update, state, keys)[0], donate_argnums=0)
    judge = jax.jit(lambda params: loss(params, None, held)[0])
    best, curve = jax.device_get(params), [float(judge(params))]
    for keys in jax.random.split(jax.random.key(seed + 1000), steps).reshape(-1, apart):
        state = advance(state, keys)
        curve.append(float(judge(state.ema)))
        if curve[-1] == min(curve):
            best = jax.device_get(state.ema)
    return best, curve


def asked(learned, each, seed):
    """What samples are drawn for: `each` utterances of every digit and speaker, as long as training
    utterances."""
    draw, wanted = np.random.default_rng(seed), []
    for label in range(10):
        for speaker in range(len(speech.SPEAKERS)):
            alike = [r for r in learned if r["label"] == label and r["speaker"] == speaker]
            wanted += [alike[i] for i in draw.integers(len(alike), size=each)]
    return wanted


def samples(law, params, wanted, length, seed):
    """An utterance [n, d] for each that is wanted."""
    cond = batch_of(wanted, length)["cond"]
    law_of = jax.jit(lambda params, key: law.sample(params, key, len(wanted), cond))
    x = np.asarray(law_of(params, jax.random.key(seed + 2000)))
    return [row[some] for row, some in zip(x, cond.valid, strict=True)]


def picture(path, test, wanted, drawn):
    """A real utterance and one of each model, of the first speaker, for every digit."""

    def first(rows, digit):
        return next(
            i for i, row in enumerate(rows) if row["label"] == digit and row["speaker"] == 0
        )

    kinds = {"real": (test, [row["frames"] for row in test])}
    kinds |= {name: (wanted, frames) for name, frames in drawn.items()}
    figure, axes = plt.subplots(len(kinds), 10, figsize=(11, 4.6))
    for line, (name, (rows, frames)) in zip(axes, kinds.items(), strict=True):
        for digit, axis in enumerate(line):
            shown = frames[first(rows, digit)]
            axis.imshow(shown.T, origin="lower", aspect="auto", vmin=8, vmax=26)
            axis.set(xticks=[], yticks=[], title=f"{digit}" if name == "real" else "")
        line[0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
