"""jflow's neural spline flow beside FlowJAX's spline flows of the same size, coupling and autoregressive, on equal rows.

    python experiments/tabular_spline_flow/compare.py --data-dir DATA [--datasets power_plant protein magic04] [--seeds 3]

FlowJAX is trained by its own loop (learning rate 5e-4, batch 256, at most 100 epochs, patience 10) on the same training
and validation rows. Prints, for each set, seed and form, the test log-likelihoods in nats of the standardised columns,
the mean paired difference with its standard error, and the seconds of training, choice of the step to stop at included:
jflow's after its first ten steps and FlowJAX's after a first epoch, so that both are compiled, and then jflow's with
compilation. Needs the extra `experiments`.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jflow import data, train

HEADER = ("seed", "jflow", "FlowJAX", "difference", "jflow s", "FlowJAX s", "with compilation")
FORMS = ("coupling", "autoregressive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="", help="folder that holds tabular/ (default: JFLOW_DATA)")
    parser.add_argument("--datasets", nargs="+", default=["power_plant", "protein", "magic04"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="of FlowJAX's flow")
    parser.add_argument("--out", type=Path, help="append one JSON line a run here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of config.py")
    args = parser.parse_args()
    columns = (f"{name:>{width}s}" for name, width in zip(HEADER, (6, 9, 9, 20, 9, 10, 18), strict=True))
    print(f"{'set':12s}{'FlowJAX':14s}", *columns, sep="", flush=True)
    for dataset in args.datasets:
        results = [one(dataset, seed, args) for seed in range(args.seeds)]
        for form in args.forms:
            difference = np.concatenate([r[form] for r in results])
            error = difference.std(ddof=1) / np.sqrt(len(difference))
            print(f"{dataset:12s}{form:14s}   all{'':21s} {difference.mean():+8.4f} +- {error:.4f}", flush=True)


def one(dataset: str, seed: int, args) -> dict[str, np.ndarray]:
    """The paired differences of one seed, by FlowJAX's form."""
    overrides = dict(item.split("=", 1) for item in args.overrides)
    overrides |= {"dataset": dataset, "data_dir": args.data_dir, "seed": str(seed)}
    experiment, _ = train.load_config(Path(__file__).parent / "config.py", overrides)
    splits, pre = experiment.data(), experiment.preprocess
    state = pre.fit(splits.train)
    rows = {name: pre.apply(state, getattr(splits, name), None)["x"].astype(np.float32) for name in splits._fields}
    ours, our_seconds, our_cold = fit_jflow(experiment, splits, state, rows)
    paired = {}
    for form in args.forms:
        theirs, their_seconds = fit_flowjax(rows, seed, form)
        paired[form] = ours - theirs
        difference, error = paired[form].mean(), paired[form].std(ddof=1) / np.sqrt(len(ours))
        print(
            f"{dataset:12s}{form:14s}{seed:6d}  {ours.mean():8.4f} {theirs.mean():8.4f}  {difference:+8.4f} +- {error:.4f}"
            f"  {our_seconds:8.1f} {their_seconds:9.1f} {our_cold:17.1f}",
            flush=True,
        )
        result = {"dataset": dataset, "form": form, "seed": seed}
        result |= {"jflow": float(ours.mean()), "flowjax": float(theirs.mean())}
        result |= {"difference": float(difference), "standard_error": float(error)}
        result |= {"jflow_seconds": our_seconds, "flowjax_seconds": their_seconds, "jflow_cold_seconds": our_cold}
        if args.out:
            with args.out.open("a") as out:
                out.write(json.dumps(result) + "\n")
    return paired


def fit_jflow(experiment, splits, state, rows) -> tuple[np.ndarray, float, float]:
    """Nats of the test rows, seconds after the first ten steps have compiled all there is, and seconds in all."""
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
    return np.asarray(jax.jit(experiment.model.log_prob)(fitted.best.ema, rows["test"])), warm, cold


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
