"""A neural spline flow for a table of numbers and categories: what `jflow fit` trains.

Starts at the Gaussian of the training rows, follows Adam on a cosine schedule with clipped
gradients, and keeps the parameters of the lowest validation loss.
"""

import jax
import optax

from jflow import distributions, flows, losses
from jflow.apps import Experiment, tables


def config(
    *,
    table: str = "",
    fingerprint: str = "",  # of the table's bytes; "" takes any
    features: int = 0,  # columns that are fitted; 0 reads the table to count them
    columns: str = "",
    drop: str = "",
    categorical: str = "",
    header: bool | None = None,
    group_repeated: bool = False,
    depth: int = 6,
    hidden: tuple = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    learning_rate: float = 1e-3,
    steps: int = 4000,
    batch: int = 256,
    eval_every: int = 50,
    patience: int = 20,
    seed: int = 0,
) -> Experiment:
    """The experiment of one table.

    Args:
        columns: names of the columns to keep, a,b,c; all if empty
        drop: names of columns to leave out, a,b,c
        categorical: names of numeric columns to take as categories, a,b,c
        header: whether the first line names the columns; None finds out
        group_repeated: whether identical rows go to one part; refused where that changes the
        columns
        depth: how many coupling layers
        hidden: widths of the network of a layer, 64,64
        bins: how many bins a spline has
        bound: beyond this many standard deviations a spline is the identity
        learning_rate: of Adam, at its highest
        steps: updates at most
        batch: rows of an update; `jflow fit` takes all rows of a small table
        eval_every: updates between two looks at the validation rows; `jflow fit` takes an epoch,
        but 5 to 100
        patience: looks without a better one until training stops
        seed: of the parts of the table, the parameters and the batches
    """
    if not table:
        raise ValueError("there is no table: expected table=PATH, as `jflow fit PATH` sets it")
    load = tables.loader(
        table=table,
        fingerprint=fingerprint,
        columns=columns,
        drop=drop,
        categorical=categorical,
        header=header,
        group_repeated=group_repeated,
        seed=seed,
    )
    features = features or len(load().schema)
    base = distributions.multivariate_normal(features)
    model = flows.neural_spline(
        (features,), depth=depth, hidden=hidden, bins=bins, bound=bound, base=base
    )
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(100, steps), steps + 1, 0.01 * learning_rate
    )
    draw = jax.jit(model.sample, static_argnums=2)
    return Experiment(
        model=model,
        init=tables.init_on_rows(model, load),
        loss=losses.nll(model),
        optimizer=optax.chain(optax.clip_by_global_norm(5.0), optax.adam(schedule)),
        data=tables.splits(load),
        preprocess=tables.preprocess(load),
        steps=steps,
        batch=batch,
        seed=seed,
        sample=lambda params, key, n: {"x": draw(params, key, n)},
        evaluate=tables.evaluate(model),
        eval_every=eval_every,
        save_every=500,
        monitor="valid_nll",
        patience=patience,
    )
