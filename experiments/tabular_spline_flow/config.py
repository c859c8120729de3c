r"""Neural spline flow on tables: power plant, protein and magic04, or wine and breast cancer from
scikit-learn.

    jflow train experiments/tabular_spline_flow dataset=power_plant data_dir=DATA \
        --workdir runs/power_plant
    python experiments/tabular_spline_flow/compare.py --data-dir DATA

The second line trains FlowJAX's spline flows of the same size beside it, over three seeds, in both
forms. DATA is the folder that holds tabular/*.gz (or set JFLOW_DATA); dataset=wine and
dataset=breast_cancer need none. `short=True` shrinks the run to seconds, for CI.

Rows that repeat are dropped; a column that sits on a lattice gets one fixed uniform dequantization
at its resolution; then 80% of the rows train, 10% choose the step to stop at, 10% test,
standardized by the training rows. Expected test log-likelihoods, in nats of the standardized
columns, are in README.md.

Method: Durkan, Bekasov, Murray, Papamakarios, *Neural Spline Flows* (2019), RQ-NSF (C).
"""

import gzip
import os
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax

from jflow import data, flows, losses, train
from jflow.apps import Experiment

FILES = {
    "power_plant": "power_plant.txt.gz",
    "protein": "protein.txt.gz",
    "magic04": "magic04.data.gz",
}

FORMS = {"coupling": flows.neural_spline, "autoregressive": flows.neural_spline_autoregressive}


def table(dataset: str, data_dir: str) -> np.ndarray:
    """The numeric columns [n, d] in float64."""
    if dataset in ("wine", "breast_cancer"):
        from sklearn import datasets

        return getattr(datasets, f"load_{dataset}")().data.astype(np.float64)
    if dataset not in FILES:
        raise ValueError(
            f"unknown dataset {dataset!r}: expected one of"
            f" {', '.join([*FILES, 'wine', 'breast_cancer'])}"
        )
    folder = data_dir or os.environ.get("JFLOW_DATA", "")
    path = Path(folder).expanduser() / "tabular" / FILES[dataset]
    if not folder or not path.is_file():
        raise FileNotFoundError(
            f"{path}: set data_dir=FOLDER or JFLOW_DATA; dataset=wine needs no folder"
        )
    with gzip.open(path, "rt") as lines:
        if dataset == "magic04":  # the last column is the class
            return np.loadtxt(lines, delimiter=",", usecols=range(10))
        return np.loadtxt(lines)


def splits(dataset: str, data_dir: str, seed: int) -> data.Splits:
    """Distinct rows, dequantized once, cut 80/10/10 by `seed`."""
    x = np.unique(table(dataset, data_dir), axis=0)
    noise = np.random.default_rng(0).random(x.shape)
    for j in range(x.shape[1]):
        lattice = data.find_lattice(x[:, j])
        if lattice is not None:
            x[:, j] += lattice[0] * noise[:, j]
    return data.split({"x": x}, valid=0.1, test=0.1, seed=seed)


def config(
    *,
    dataset: str = "wine",
    data_dir: str = "",
    form: str = "coupling",
    depth: int = 6,
    hidden: tuple = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-4,
    steps: int = 0,
    batch: int = 256,
    ema: float = 0.995,
    eval_every: int = 100,
    patience: int = 10,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        dataset: which table
        data_dir: folder of the data; JFLOW_DATA if empty
        form: coupling or autoregressive
        depth: how many layers
        hidden: widths of the network of a layer
        bins: how many bins a spline has
        bound: beyond this many standard deviations a spline is the identity
        learning_rate: of Adam, at its highest
        weight_decay: of AdamW
        steps: updates; 0: 60 epochs, at least 1000
        batch: rows of an update
        ema: decay of the average of the parameters, which samples are drawn with
        eval_every: updates between two evaluations
        patience: evaluations without a better one until training stops
        seed: of the parts of the table, the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        steps, depth, hidden, eval_every = 60, 2, (16,), 20
    parts = splits(dataset, data_dir, seed)
    batch = min(batch, len(parts.train["x"]) // 2)
    steps = steps or max(1000, 60 * len(parts.train["x"]) // batch)
    options = {
        "depth": depth,
        "hidden": hidden,
        "bins": bins,
        "bound": bound,
        "activation": nn.relu,
    }
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: expected one of {', '.join(FORMS)}")
    model = FORMS[form](parts.train["x"].shape[1:], **options)
    schedule = optax.cosine_decay_schedule(learning_rate, steps, alpha=0.01)
    log_prob = jax.jit(model.log_prob)

    def evaluate(params, state, key, splits):
        def nats(rows):
            x = data.standardize().apply(state, rows, None)["x"].astype(np.float32)
            return float(np.mean(log_prob(params, x)))

        return {"valid_nll": -nats(splits.valid), "test_log_likelihood": nats(splits.test)}

    return Experiment(
        model=model,
        init=lambda key, rows: model.init(key, rows["x"].astype(np.float32)),
        loss=losses.nll(model),
        optimizer=optax.chain(
            optax.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=weight_decay)
        ),
        data=lambda: parts,
        preprocess=data.standardize(),
        steps=steps,
        batch=batch,
        seed=seed,
        ema=train.ema.warmup(ema),
        sample=lambda params, key, n: {"x": model.sample(params, key, n)},
        evaluate=evaluate,
        eval_every=eval_every,
        save_every=5 * eval_every,
        monitor="valid_nll",
        patience=patience,
    )
