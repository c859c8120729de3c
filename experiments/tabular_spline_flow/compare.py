r"""jflow's neural spline flows beside FlowJAX's of the same size, coupling and autoregressive, on
equal rows.

    python experiments/tabular_spline_flow/compare.py --data-dir DATA \
        [--datasets power_plant protein magic04] [--seeds 3]

FlowJAX is trained by its own loop (learning rate 5e-4, batch 256, at most 100 epochs, patience 10)
on the same training and validation rows. Prints, for each set, seed and form, the test
log-likelihoods in nats of the standardized columns, the mean paired difference with its standard
error, and the seconds of training, choice of the step to stop at included: jflow's after its first
ten steps and FlowJAX's after a first epoch, so that both are compiled, and then jflow's with
compilation. The line "better" of a set takes, over all seeds, jflow's form of the lower validation
loss and FlowJAX's form of the higher test log-likelihood. Needs the extra `experiments`.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import apps, data, train

HEADER = ("seed", "jflow", "FlowJAX", "difference", "jflow s", "FlowJAX s", "with compilation")
FORMS = ("coupling", "autoregressive")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", default="", help="folder that holds tabular/ (default: JFLOW_DATA)"
    )
    parser.add_argument("--datasets", nargs="+", default=["power_plant", "protein", "magic04"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--forms", nargs="+", default=list(FORMS), choices=FORMS, help="of the flows"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of config.py")
    args = parser.parse_args()
    columns = (
        f"{name:>{width}s}" for name, width in zip(HEADER, (6, 9, 9, 20, 9, 10, 18), strict=True)
    )
    print(f"{'set':12s}{'form':14s}", *columns, sep="", flush=True)
    for dataset in args.datasets:
        results = {
            form: [one(dataset, form, seed, args) for seed in range(args.seeds)]
            for form in args.forms
        }
        for form, runs in results.items():
            report(dataset, form, runs, runs)
        ours = min(results.values(), key=lambda runs: np.mean([run.valid_nll for run in runs]))
        theirs = max(
            results.values(), key=lambda runs: np.mean([run.theirs.mean() for run in runs])
        )
        report(dataset, "better", ours, theirs)


class Run(NamedTuple):
    ours: np.ndarray  # nats of the test rows
    theirs: np.ndarray
    valid_nll: float  # of ours


def report(dataset: str, form: str, ours: list[Run], theirs: list[Run]) -> None:
    difference = np.concatenate([a.ours - b.theirs for a, b in zip(ours, theirs, strict=True)])
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    means = [
        np.mean([run.ours.mean() for run in ours]),
        np.mean([run.theirs.mean() for run in theirs]),
    ]
    print(
        f"{dataset:12s}{form:14s}   all {means[0]:9.4f} {means[1]:8.4f}  {difference.mean():+8.4f}"
        f" +- {error:.4f}",
        flush=True,
    )


def one(dataset: str, form: str, seed: int, args) -> Run:
    overrides = dict(item.split("=", 1) for item in args.overrides)
    overrides |= {"dataset": dataset, "form": form, "data_dir": args.data_dir, "seed": str(seed)}
    experiment, _ = apps.load_config(Path(__file__).parent / "config.py", overrides)
    splits, pre = experiment.data(), experiment.preprocess
    state = pre.fit(splits.train)
    rows = {
        name: pre.apply(state, getattr(splits, name), None)["x"].astype(np.float32)
        for name in splits._fields
    }
    ours, valid_nll, our_seconds, our_cold = fit_jflow(experiment, splits, state, rows)
    theirs, their_seconds = fit_flowjax(rows, seed, form)
    difference = (ours - theirs).mean()
    error = (ours - theirs).std(ddof=1) / np.sqrt(len(ours))
    print(
        f"{dataset:12s}{form:14s}{seed:6d} {ours.mean():9.4f} {theirs.mean():8.4f} "
        f" {difference:+8.4f} +- {error:.4f}  {our_seconds:8.1f} {their_seconds:9.1f}"
        f" {our_cold:17.1f}",
        flush=True,
    )
    return Run(ours, theirs, valid_nll)


def fit_jflow(experiment, splits, state, rows) -> tuple[np.ndarray, float, float, float]:
    """Nats of the test rows, the best validation loss, seconds after the first ten steps, which
    compile, and in all."""
    start = time.perf_counter()
    batches = data.batches({"x": rows["train"]}, experiment.batch, seed=experiment.seed)
    init_key, train_key = jax.random.split(jax.random.key(experiment.seed))
    params = experiment.init(init_key, {"x": rows["train"][: experiment.batch]})
    experiment.evaluate(params, state, None, splits)  # compiles
    fitted = train.fit(
        train.init_state(params, experiment.optimizer, train_key, ema=experiment.ema),
        train.make_step(experiment.loss, experiment.optimizer, ema=experiment.ema),
        batches,
        steps=experiment.steps,
        evaluate=lambda s: experiment.evaluate(s.ema, state, None, splits),
        eval_every=experiment.eval_every,
        monitor=experiment.monitor,
        patience=experiment.patience,
        log_every=10,
        progress=False,
    )
    cold = time.perf_counter() - start
    warm = fitted.history[-1]["time"] - fitted.history[0]["time"]
    nats = np.asarray(jax.jit(experiment.model.log_prob)(fitted.best.ema, rows["test"]))
    return nats, fitted.best.value, warm, cold


def fit_flowjax(rows, seed: int, form: str) -> tuple[np.ndarray, float]:
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow, masked_autoregressive_flow
    from flowjax.train import fit_to_data

    build_key, train_key = jax.random.split(jax.random.key(seed))
    x = np.concatenate([rows["train"], rows["valid"]])
    make = {"coupling": coupling_flow, "autoregressive": masked_autoregressive_flow}[form]
    flow = make(
        build_key,
        base_dist=Normal(jnp.zeros(x.shape[1])),
        transformer=RationalQuadraticSpline(knots=8, interval=5),
        flow_layers=6,
        nn_width=64,
        nn_depth=2,
    )
    options = dict(learning_rate=5e-4, batch_size=256, max_patience=10, show_progress=False)
    options["val_prop"] = len(rows["valid"]) / len(x)
    fit_to_data(train_key, flow, x, max_epochs=1, **options)  # compiles
    start = time.perf_counter()
    flow, _ = fit_to_data(train_key, flow, x, max_epochs=100, **options)
    seconds = time.perf_counter() - start
    return np.asarray(flow.log_prob(rows["test"])), seconds


if __name__ == "__main__":
    main()
