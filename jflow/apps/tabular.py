"""A generative model of a table by scikit-learn's conventions: fit, score, sample, condition, fill.

One model per table knows every conditional of its columns (`flows.any_order`), so that rows
are drawn given any columns, and missing values are filled, without another training. `jflow fit`
runs it from the command line.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from jflow import apps, data
from jflow._core.files import expand
from jflow._core.hints import hint
from jflow.apps import tables
from jflow.apps._experiment import stored_values
from jflow.apps.tables import TRAIN, Programs, Shape
from jflow.data import Column, Marginal, Table
from jflow.flows import MixedRows, Within

try:
    from sklearn.base import BaseEstimator
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise ImportError(
        'jflow.apps.tabular needs scikit-learn: pip install "jflow-models[tables]"'
    ) from error

__all__ = ["TabularFlow", "from_loaded", "load"]

CONFIG = Path(__file__).parent / "configs/table.py"
EPOCHS, FEWEST, MOST = 60, 2000, 5000  # updates: so many epochs, within these numbers
DRAWS = 4  # places in its cell that a score of a lattice's number averages
CHUNK = 4096  # rows that are drawn at once
PATIENCE = 1_000_000  # draws that a chunk may cost
RARE = 1e-6  # a probability of ranges below which the table has no such rows


class TabularFlow(BaseEstimator):
    """A generative model of the rows of a table: density, samples, conditions, missing values.

    Numbers, whole numbers, dates, categories and missing values are modeled together, each row
    as a product of conditionals p(column | the columns before it), by one network
    (`flows.any_order`), in an order in which those come first that the others explain best. The
    network is trained for all orders, so that p(some columns | any others) is there without another
    training. It is exact for the order of the density, and as good as the training for the rest.

    Everything is in the table's own units and types. The log-density is per unit of the columns
    that hold numbers with decimals, and a probability where they are whole numbers, dates or
    categories.

    Also known as: synthetic data, synthesizer, tabular data generator, imputation.

    Args:
        columns: Names of the columns to keep, in this order; None keeps all.
        drop: Names of columns to leave out.
        categorical: Names of numeric columns to take as categories.
        numeric: Names of columns to take as numbers where they look like codes or count the rows.
        decimal: The decimal mark, '.' or ',', where the table does not show it.
        day_first: Whether dates such as 03/04/2024 have the day first; None looks.
        header: Whether the first line of a file names the columns; None finds out.
        missing: Texts or numbers, or one, that stand for a missing value, such as 9999, beside NA,
            ?, - and the like.
        drop_missing: Whether rows with a missing value are left out (`dropped_` counts them); else
            that a value is missing is part of what is modeled.
        group_repeated: Whether identical rows go to one part of the table.
        width: Of the network.
        num_blocks: How many residual blocks it has.
        bins: Of the spline of each number.
        dropout: Its rate in training; None takes 0.2 for a table below 20,000 rows, else 0.05.
        learning_rate: Of Adam, at its highest.
        weight_decay: Of Adam.
        steps: Updates; None makes 60 epochs of them, but 2,000 to 5,000.
        batch: Rows of an update.
        patience: Looks at the validation rows, one every 100 updates, without a better one until
            training stops; None never stops early.
        ema: The decay of the average of the parameters, which is what is kept.
        random_state: An int, a numpy RandomState or None.
        workdir: A folder that keeps the run, and that a killed run goes on from; None keeps the
            model in memory.
        progress: Whether to show a progress bar.

    Attributes:
        schema_: What each column was taken for, `data.Column`s.
        n_features_in_: The number of columns.
        feature_names_in_: Their names, where all are text.
        dropped_: How many rows were left out for a missing value.
        params_: The parameters of the network.
        state_: What the table's columns are, JSON.
        values_: The values of the config.
        step_: The update that the parameters are of.
        prepared_: The rows and their parts; not in a model that was loaded or pickled.

    Examples:
        >>> import numpy as np
        >>> import pandas as pd
        >>> from jflow.apps.tabular import TabularFlow
        >>> rng = np.random.default_rng(0)
        >>> age = rng.integers(18, 80, 200)
        >>> df = pd.DataFrame({"age": age, "member": np.where(age > 40, "yes", "no")})
        >>> model = TabularFlow(steps=2, width=8).fit(df)  # leave steps and width out
        >>> model.sample(3, given={"member": "yes"}).shape
        (3, 2)
        >>> model.log_prob(df).shape
        (200,)
    """

    def __init__(
        self,
        *,
        columns: Sequence[str] | None = None,
        drop: Sequence[str] = (),
        categorical: Sequence[str] = (),
        numeric: Sequence[str] = (),
        decimal: str | None = None,
        day_first: bool | None = None,
        header: bool | None = None,
        missing: Any = (),
        drop_missing: bool = False,
        group_repeated: bool = False,
        width: int = 384,
        num_blocks: int = 2,
        bins: int = 16,
        dropout: float | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-4,
        steps: int | None = None,
        batch: int = 256,
        patience: int | None = 10,
        ema: float = 0.995,
        random_state: Any = 0,
        workdir: str | Path | None = None,
        progress: bool = False,
    ):
        self.columns = columns
        self.drop = drop
        self.categorical = categorical
        self.numeric = numeric
        self.decimal = decimal
        self.day_first = day_first
        self.header = header
        self.missing = missing
        self.drop_missing = drop_missing
        self.group_repeated = group_repeated
        self.width = width
        self.num_blocks = num_blocks
        self.bins = bins
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.steps = steps
        self.batch = batch
        self.patience = patience
        self.ema = ema
        self.random_state = random_state
        self.workdir = workdir
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> "TabularFlow":
        """Fit the model to a table.

        Args:
            X: A pandas DataFrame, an array [n, d], or the path of a file (csv and relatives, xlsx,
                parquet), see `data.read_table`.
            y: Not used.

        Returns:
            The estimator.

        Raises:
            ValueError: For a table with columns that cannot be modeled, naming all of them with the
                reason and what to do.
        """
        _refuse(X)
        seed = _seed(self.random_state)
        reading: dict[str, Any] = {
            "columns": None if self.columns is None else _texts(self.columns),
            "drop": _texts(self.drop),
            "categorical": _texts(self.categorical),
            "numeric": _texts(self.numeric),
            "decimal": self.decimal,
            "day_first": self.day_first,
            "header": self.header,
            "missing": _texts(self.missing),
            "drop_missing": self.drop_missing,
            "group_repeated": self.group_repeated,
        }
        prepared = tables.prepare(X, **reading, seed=seed)
        rows = int((prepared.part == TRAIN).sum())
        batch = min(self.batch, rows)
        steps = self.steps or int(np.clip(EPOCHS * rows // batch, FEWEST, MOST))
        path = X if isinstance(X, str | Path) else None
        options: dict[str, Any] = {
            "width": self.width,
            "num_blocks": self.num_blocks,
            "bins": self.bins,
            "dropout": (0.2 if rows < 20_000 else 0.05) if self.dropout is None else self.dropout,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "steps": steps,
            "batch": batch,
            "eval_every": min(100, steps),
            "patience": self.patience,
            "ema": self.ema,
            "seed": seed,
        }
        shape = tables.shape_of_table(lambda: prepared)
        table = {
            "table": str(expand(path).absolute()) if path is not None else "",
            "fingerprint": tables.digest(path) if path else tables.digest_rows(prepared),
            "columns": reading["columns"] or (),
        }
        _, values = apps.read_keys(CONFIG, {**reading, **options, **shape._asdict(), **table})
        experiment = tables.experiment(lambda: prepared, shape, **options)
        folder = Path(tempfile.mkdtemp()) if self.workdir is None else expand(self.workdir)
        try:
            apps.run(
                experiment, folder, config_source=CONFIG, resolved=values, progress=self.progress
            )
            self._take(apps.load(folder), values)
        finally:
            if self.workdir is None:
                shutil.rmtree(folder, ignore_errors=True)
        self.dropped_, self.prepared_ = prepared.dropped, prepared
        return self

    def _take(self, loaded, values):
        self.params_ = jax.tree.map(np.asarray, loaded.params)
        self.state_ = loaded.preprocess.state
        self.values_, self.step_ = values, loaded.step
        self.schema_ = tables.columns_of(self.state_)
        self.n_features_in_ = len(self.schema_)
        names = [column.name for column in self.schema_]
        if self.state_["header"]:
            self.feature_names_in_ = np.array(names, dtype=object)

    def log_prob(self, X: Any, given: Sequence[str] = ()) -> np.ndarray:
        """Log-density of rows, in nats.

        Args:
            X: Rows with the columns of the table: a DataFrame, an array, a path or a `data.Table`.
            given: Names of columns to condition on: log p(the other columns | these).

        Returns:
            [n], float64. A category, a step between numbers, or a missing value that the table did
            not have gives -inf.

        Raises:
            ValueError: For other columns.
        """
        check_is_fitted(self)
        names = [self._named(name) for name in given]
        observed = np.isin([column.name for column in self.schema_], names)
        x = data.encode(self.schema_, self._read(X), allow_unknown=True)
        return self.log_prob_encoded(x, observed)

    def log_prob_encoded(self, x: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """`log_prob` of encoded rows.

        Args:
            x: From `data.encode`, [n, columns].
            observed: bool [columns], the columns to condition on.

        Returns:
            [n], nats. The numbers of a lattice are averaged over 4 places in their cells, one in
            each quarter, in probability.
        """
        schema, marginals = self._columns()
        rng, nats = np.random.default_rng(0), []
        spread = any(c.step and m.number for c, m in zip(schema, marginals, strict=True))
        draws = DRAWS if spread else 1
        part = np.argsort(rng.random((draws, *x.shape)), 0)  # of a cell, a different one each time
        for k in range(draws):
            noise = (part[k] + rng.random(x.shape)) / draws
            rows = data.to_codes_and_numbers(schema, marginals, x, noise)
            gain = data.log_slopes(schema, marginals, rows)[:, ~observed].sum(1)
            nats.append(self._programs().log_prob(self.params_, rows, observed) + gain)
        return np.logaddexp.reduce(nats) - np.log(len(nats))

    def unseen_cells(self, X: Any) -> np.ndarray:
        """Which cells hold what the table of the fit never had; their rows have no density.

        Args:
            X: Rows, as in `log_prob`.

        Returns:
            bool [n, columns], in the order of `schema_`.
        """
        check_is_fitted(self)
        schema, marginals = self._columns()
        x = data.encode(schema, self._read(X), allow_unknown=True)
        rows = data.to_codes_and_numbers(schema, marginals, x, np.full(x.shape, 0.5))
        return np.asarray(rows["code"]) < 0

    def score_samples(self, X: Any) -> np.ndarray:
        """`log_prob` by scikit-learn's name.

        Args:
            X: Rows.

        Returns:
            [n], nats.
        """
        return self.log_prob(X)

    def score(self, X: Any, y: Any = None) -> float:
        """The mean log-density of rows, in nats; larger is better.

        Args:
            X: Rows.
            y: Not used.

        Returns:
            The mean.
        """
        return float(self.log_prob(X).mean())

    def sample(
        self, n: int = 1, given: Mapping[str, Any] | None = None, random_state: Any = None
    ) -> pd.DataFrame:
        """New rows, in the table's columns, units and types.

        Numbers are drawn within the range that the table has.

        Under a condition, rows are distributed as the whole rows that meet it. Columns are drawn in
        the order of the density, with given values in their places and other draws within their
        ranges, and a row is kept in proportion to the probability that the model gives to what it
        was given (likelihood weighting, then rejection). Of 4,096 rows that are drawn at once,
        about as many are kept as would meet the condition by chance, or more.

        Args:
            n: How many rows.
            given: {column: a value, a list of values, or a pair (low, high) of numbers or dates,
                None for no bound}; numpy.nan or '' for a missing value.
            random_state: An int, a numpy RandomState or None, which takes the estimator's.

        Returns:
            A DataFrame of n rows.

        Raises:
            ValueError: For a column that the table does not have, a value that it never has, and a
                range in which it has no row.
        """
        parts = list(self.sample_chunks(n, given, random_state))
        return pd.concat(parts, ignore_index=True)

    def sample_chunks(
        self,
        n: int,
        given: Mapping[str, Any] | None = None,
        random_state: Any = None,
        *,
        encoded: bool = False,
    ) -> Iterator[Any]:
        """`sample` in chunks, so that n may exceed memory.

        Args:
            n: How many rows.
            given: As in `sample`.
            random_state: As in `sample`.
            encoded: Whether chunks are encoded rows instead of DataFrames.

        Yields:
            DataFrames of n rows in all.
        """
        check_is_fitted(self)
        if not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f"sample: expected n to be a whole number of at least 1, got {n!r}")
        schema, marginals = self._columns()
        condition = _condition(self, given or {})
        seed = _seed(self.random_state if random_state is None else random_state)
        rng, key = np.random.default_rng((seed, 3)), jax.random.key(seed)
        weighed, order = condition.ranged | condition.observed, self._programs().model.rank
        size = CHUNK if weighed.any() else min(CHUNK, 1 << (n - 1).bit_length())
        x, observed = (np.tile(each, (size, 1)) for each in (condition.x, condition.observed))
        rows, accept = np.zeros((0, len(schema))), np.zeros(0)
        left, spent, highest = n, 0, -np.inf
        for i in range(2**31):
            drawn, log_mass = self._draw(
                jax.random.fold_in(key, i), x, observed, condition.within, order, rng
            )
            if not i:
                _check_ranges(log_mass[:, condition.ranged], given)
            # A row is kept with the probability weight / highest, which sinks as the highest grows.
            log_weight = log_mass[:, weighed].sum(1)
            highest, spent = max(highest, log_weight.max()), spent + size
            rows = np.concatenate([rows, drawn])
            accept = np.concatenate([accept, log_weight - np.log(1 - rng.random(size))])
            rows, accept = rows[accept >= highest], accept[accept >= highest]
            if spent >= PATIENCE and len(rows) < min(left, 10):
                raise ValueError(
                    f"sample: only {len(rows)} of {spent:,} draws fit {_said(given)}: the table has"
                    " hardly such rows; give less, or wider ranges"
                )
            if len(rows) >= min(left, CHUNK) or spent >= PATIENCE:
                yield rows[:left] if encoded else data.to_frame(schema, rows[:left])
                left, spent = left - len(rows), 0
                rows, accept = rows[:0], accept[:0]
            if left <= 0:
                return

    def impute(self, X: Any, random_state: Any = None) -> pd.DataFrame:
        """Rows with every missing value drawn from its distribution given the rest of the row.

        Call it with several random states for multiple imputation.

        Args:
            X: Rows with the columns of the table, some values missing.
            random_state: An int, a numpy RandomState or None, which takes the estimator's.

        Returns:
            A DataFrame of the rows, filled.

        Raises:
            ValueError: For a category that the table does not have.
        """
        check_is_fitted(self)
        schema, marginals = self._columns()
        table = self._read(X)
        missing = data.missing_cells(table)
        x = data.encode(schema, table, allow_unknown=True)
        _check_known(self, table, x, missing)
        seed = _seed(self.random_state if random_state is None else random_state)
        rng, key = np.random.default_rng((seed, 4)), jax.random.key(seed)
        bounds = tables.within(self._shape())
        for j, (column, marginal) in enumerate(zip(schema, marginals, strict=True)):
            lacking = np.isnan(np.array(marginal.values, float))
            if column.kind == "categorical" and column.missing is not None:
                lacking[list(column.categories).index(column.missing)] = True
            bounds.codes[j, : len(lacking)] &= ~lacking
        filled = [
            self._draw(
                jax.random.fold_in(key, i),
                x[i : i + CHUNK],
                ~missing[i : i + CHUNK],
                bounds,
                None,
                rng,
            )[0]
            for i in range(0, len(x), CHUNK)
        ]
        return data.to_frame(schema, np.concatenate(filled))

    def _draw(self, key, x, observed, bounds, rank, rng):
        """(encoded rows [n, d], log_mass [n, d]) with the cells that are not observed drawn."""
        schema, marginals = self._columns()
        n, size = len(x), 1 << (len(x) - 1).bit_length()
        known, noise = np.where(observed, x, 0.0), rng.random(x.shape)
        rows = data.to_codes_and_numbers(schema, marginals, known, noise)
        code = np.pad(np.maximum(rows["code"], 0), ((0, size - n), (0, 0)), "edge")
        value = np.pad(rows["x"], ((0, size - n), (0, 0)), "edge")
        seen = np.pad(observed, ((0, size - n), (0, 0)), "edge")
        drawn, log_mass = self._programs().sample(
            self.params_, key, MixedRows(code, value), seen, bounds, rank
        )
        drawn = data.from_codes_and_numbers(
            marginals, {"x": np.asarray(drawn.value), "code": np.asarray(drawn.code)}
        )[:n]
        drawn = data.decode(schema, np.where(observed, x, drawn))
        return drawn, np.asarray(log_mass, np.float64)[:n]

    def _columns(self) -> tuple[tuple[Column, ...], tuple[Marginal, ...]]:
        return self.schema_, tables.marginals_of(self.state_)

    def _shape(self) -> Shape:
        return tables.shape_of(self._columns()[1], self.values_["order"])

    def _programs(self) -> Programs:
        shape = self._shape()
        options = (self.values_[name] for name in ("width", "num_blocks", "bins"))
        return tables.programs(shape.codes, shape.numbers, shape.order, *options)

    def _named(self, name: str) -> str:
        names = [column.name for column in self.schema_]
        if name not in names:
            raise ValueError(
                f"there is no column {name!r}: {hint(str(name), names)}the table has"
                f" {', '.join(map(repr, names))}"
            )
        return name

    def _read(self, X) -> Table:
        _refuse(X)
        header = self.header if isinstance(X, str | Path) else None
        table = X
        if not isinstance(X, Table):
            table = data.read_table(X, header=header, missing=_texts(self.missing))
        if not table.header and len(table.cells) != self.n_features_in_:
            raise ValueError(
                f"X has {len(table.cells)} features, but TabularFlow is expecting"
                f" {self.n_features_in_} features as input"
            )
        if table.header:  # by name, in the order of the fit
            for column in self.schema_:
                if column.name not in table.names:
                    data.encode(self.schema_, table)  # says which is not there
            order = [table.names.index(column.name) for column in self.schema_]
            table = table._replace(
                names=tuple(table.names[j] for j in order),
                cells=tuple(table.cells[j] for j in order),
            )
        return table

    def report(self, path: str | Path | None = None) -> dict[str, Any]:
        """Say how good the model is, beside a Gaussian and a copula.

        By distances of columns, associations of pairs, a classifier that tells rows apart, nearest
        training rows, and test log-likelihood.

        Args:
            path: Of a folder that gets report.json, report.html and synthetic.csv; None writes
                nothing.

        Returns:
            The numbers, each part with its direction, see `table_report.report`.

        Raises:
            ValueError: For a model that was loaded: it has no rows to be judged by.
        """
        from jflow.apps import table_report

        check_is_fitted(self)
        if not hasattr(self, "prepared_"):
            raise ValueError(
                "a model that was loaded has no rows to be judged by: call report() after fit()"
            )
        if path is None:
            return table_report.judge(self)[0]
        return table_report.write_report(self, expand(path))

    def save(self, path: str | Path) -> Path:
        """Write the model to a folder, from which `load`, `jflow sample` and `jflow score` read it.

        Args:
            path: Of the folder; made if it is not there.

        Returns:
            The folder.

        Raises:
            ValueError: Where the folder holds another run, naming what differs.
        """
        check_is_fitted(self)
        return tables.write_run(
            expand(path), CONFIG, self.values_, self.params_, self.state_, self.step_
        )

    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k != "prepared_"}

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        tags.input_tags.string = True
        return tags


def load(path: str | Path, *, step: int | None = None, ema: bool = True) -> TabularFlow:
    """A fitted `TabularFlow` from the folder that `save` or `jflow fit` wrote.

    Args:
        path: Of the folder.
        step: The update to take, see `jflow.load`.
        ema: Whether to take the averaged parameters.

    Returns:
        The estimator.

    Raises:
        FileNotFoundError: Where there is none.
        ValueError: For a folder of another kind of experiment.
    """
    return from_loaded(apps.load(path, step=step, ema=ema), path)


def from_loaded(loaded: apps.Loaded, path: str | Path) -> TabularFlow:
    """A fitted `TabularFlow` from what `jflow.load` read.

    Args:
        loaded: From `jflow.load`.
        path: Of the folder that it was read from.

    Returns:
        The estimator.

    Raises:
        ValueError: For another kind of experiment.
    """
    if not tables.is_table(loaded.preprocess.state):
        raise ValueError(f"{path} holds another experiment than a table's: read it by jflow.load")
    values = stored_values(expand(path))
    model = TabularFlow(columns=tuple(values["columns"]) or None, random_state=values["seed"])
    for name in model.get_params():
        if name in values and name != "columns":
            value = values[name]
            setattr(model, name, tuple(value) if isinstance(value, list) else value)
    model._take(loaded, values)
    return model


def _refuse(X: Any) -> None:
    """In scikit-learn's words, what `data.read_table` would refuse in its own."""
    if hasattr(X, "tocsr"):
        raise TypeError(
            "sparse input is not supported: expected a DataFrame, an array or a path; X.toarray()"
            " is dense"
        )
    shape = getattr(X, "shape", (1, 1))
    if len(shape) == 2 and not shape[1]:
        raise ValueError(f"0 feature(s) (shape={shape}) while a minimum of 1 is required.")
    if getattr(getattr(X, "dtype", None), "kind", "") == "c":
        raise ValueError(
            "Complex data not supported: give the real and the imaginary part as two columns"
        )


def _texts(values: Any) -> tuple[str, ...]:
    """Names or values, of which one may stand alone."""
    return tuple(map(str, [values] if isinstance(values, str | int | float) else values))


def _seed(random_state: Any) -> int:
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31))


class _Condition(NamedTuple):
    """x [d] encoded values of the observed columns; observed and ranged [d] bool; the bounds of the
    others."""

    x: np.ndarray
    observed: np.ndarray
    ranged: np.ndarray
    within: Within


def _check_ranges(log_mass: np.ndarray, given: Any) -> None:
    if np.exp(log_mass.sum(1)).mean() < RARE:
        raise ValueError(
            f"sample: a row of the table meets {_said(given)} with a probability below {RARE}:"
            " widen the ranges"
        )


def _said(given) -> str:
    return ", ".join(f"{name}={value}" for name, value in given.items())


def _condition(model: TabularFlow, given: Mapping[str, Any]) -> _Condition:
    schema, marginals = model._columns()
    d, bounds = len(schema), tables.within(model._shape())
    x, observed, ranged = np.zeros(d), np.zeros(d, bool), np.zeros(d, bool)
    names = [column.name for column in schema]
    for name, value in given.items():
        j = names.index(model._named(name))
        column, marginal = schema[j], marginals[j]
        if isinstance(value, tuple):
            _restrict(bounds, j, column, marginal, value)
            ranged[j] = True
        elif isinstance(value, list | set | frozenset):
            wanted = [_encoded(column, marginal, v) for v in value]
            if not wanted:
                raise ValueError(f"given {name!r}: expected at least one value, got []")
            if any(code < 0 for _, code in wanted):
                raise ValueError(
                    f"given {name!r}: expected values of their own in a list, got {value};"
                    " a range of numbers is a pair (low, high)"
                )
            bounds.codes[j] = np.isin(np.arange(bounds.codes.shape[1]), [c for _, c in wanted])
            ranged[j] = True
        else:
            x[j], _ = _encoded(column, marginal, value)
            observed[j] = True
    return _Condition(x, observed, ranged, bounds)


def _encoded(column: Column, marginal: Marginal, value: Any) -> tuple[float, int]:
    """A value as an encoded number, and its code (-1: another number); ValueError for what the
    table never has."""
    x = float(data.encode_value(column, value))
    cell = np.array([[x]])
    rows = data.to_codes_and_numbers((column,), (marginal,), cell, np.zeros_like(cell))
    code = int(rows["code"][0, 0])
    if code < 0:
        raise ValueError(f"given {column.name!r}: the table has no missing value in this column")
    if marginal.number and code == len(marginal.values):
        if not column.low <= x <= column.high:
            raise ValueError(
                f"given {column.name!r}: {value!r} is outside the table's range, {_range(column)}"
            )
        code = -1
    return x, code


def _range(column: Column) -> str:
    return f"{data.value_text(column, column.low)} to {data.value_text(column, column.high)}"


def _restrict(bounds: Within, j: int, column: Column, marginal: Marginal, ends: tuple) -> None:
    """Narrow the bounds of a column to a pair (low, high), both included, None for no end."""
    name = column.name
    if len(ends) != 2:
        raise ValueError(f"given {name!r}: expected a pair (low, high), got {ends}")
    if not marginal.number:
        raise ValueError(
            f"given {name!r}: a range needs numbers or dates, and this column has categories: give"
            " a list of them"
        )
    low = -np.inf if ends[0] is None else float(data.encode_value(column, ends[0]))
    high = np.inf if ends[1] is None else float(data.encode_value(column, ends[1]))
    values = np.array(marginal.values)
    inside = (values >= low) & (values <= high)  # NaN is outside
    high = high + column.step
    number = low < marginal.high and high > marginal.low and low < high
    if not (inside.any() or number):
        raise ValueError(
            f"given {name!r}: the table has no row from {ends[0]} to {ends[1]}; its values go from"
            f" {_range(column)}"
        )
    bounds.codes[j, : len(values)] = inside
    bounds.codes[j, len(values)] = number
    if number:
        ends_in_table = np.array([max(low, marginal.low), min(high, marginal.high)])
        bounds.low[j], bounds.high[j] = data.to_normal(marginal, ends_in_table)


def _check_known(model: TabularFlow, table: Table, x: np.ndarray, missing: np.ndarray) -> None:
    unknown = np.isnan(x) & ~missing
    if unknown.any():
        i, j = (int(k) for k in np.argwhere(unknown)[0])
        raise ValueError(
            f"{table.path}: line {table.lines[i]}, column {table.names[j]!r}:"
            f" {str(table.cells[j][i])!r} is none of the values of the table that was fitted"
            f" ({int(unknown.sum())} such cells)"
        )
