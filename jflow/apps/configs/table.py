"""A model of the rows of a table, with every conditional: what `jflow fit` trains.

Adam on a cosine schedule with clipped gradients; the parameters of the lowest validation loss are
kept.
"""

from jflow.apps import Experiment, tables


def config(
    *,
    table: str = "",
    fingerprint: str = "",  # of the table's bytes; "" takes any
    columns: tuple[str, ...] = (),
    drop: tuple[str, ...] = (),
    categorical: tuple[str, ...] = (),
    numeric: tuple[str, ...] = (),
    decimal: str | None = None,
    day_first: bool | None = None,
    header: bool | None = None,
    missing: tuple[str, ...] = (),
    drop_missing: bool = False,
    group_repeated: bool = False,
    codes: tuple[
        int, ...
    ] = (),  # this and the next four: what the table's columns are, see tables.Shape
    numbers: tuple[bool, ...] = (),
    low: tuple[float, ...] = (),
    high: tuple[float, ...] = (),
    order: tuple[int, ...] = (),
    width: int = 384,
    num_blocks: int = 2,
    bins: int = 16,
    dropout: float = 0.2,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-4,
    steps: int = 5000,
    batch: int = 256,
    eval_every: int = 100,
    patience: int | None = 10,
    ema: float = 0.995,
    seed: int = 0,
) -> Experiment:
    """The experiment of one table.

    Args:
        columns: names of the columns to keep, a,b,c; all if empty
        drop: names of columns to leave out, a,b,c
        categorical: names of numeric columns to take as categories, a,b,c
        numeric: names of columns to take as numbers where they look like codes or count rows, a,b
        decimal: the decimal mark, "." or ",", where the table does not show it
        day_first: whether dates such as 03/04/2024 have the day first; None looks
        header: whether the first line names the columns; None finds out
        missing: what stands for a missing value beside NA, ?, - and the like, such as 9999,-99
        drop_missing: whether rows with a missing value are left out; else it is a value like others
        group_repeated: whether identical rows go to one part; refused where that changes the
        columns
        width: of the network
        num_blocks: how many residual blocks the network has
        bins: how many bins the spline of a number has
        dropout: rate of dropout in training; `jflow fit` takes 0.05 from 20,000 rows on
        learning_rate: of Adam, at its highest
        weight_decay: of Adam, per update and learning rate
        steps: updates; `jflow fit` takes fewer for a small table
        batch: rows of an update; `jflow fit` takes all rows of a small table
        eval_every: updates between two looks at the validation rows
        patience: looks without a better one until training stops; none never stops early
        ema: decay of the average of the parameters, which is what is kept
        seed: of the parts of the table, the parameters and the batches
    """
    load = tables.loader(
        table=table,
        fingerprint=fingerprint,
        columns=columns,
        drop=drop,
        categorical=categorical,
        numeric=numeric,
        decimal=decimal,
        day_first=day_first,
        header=header,
        missing=missing,
        drop_missing=drop_missing,
        group_repeated=group_repeated,
        seed=seed,
    )
    return tables.experiment(
        load,
        tables.Shape(codes, numbers, low, high, order) if codes else tables.shape_of_table(load),
        width=width,
        num_blocks=num_blocks,
        bins=bins,
        dropout=dropout,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        steps=steps,
        batch=batch,
        eval_every=eval_every,
        patience=patience,
        ema=ema,
        seed=seed,
    )
