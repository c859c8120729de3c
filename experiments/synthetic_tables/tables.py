"""The tables of `run.py` as DataFrames: text columns are categories, NaN is a missing value."""

import gzip
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd


class Split(NamedTuple):
    """Rows to fit to, rows to judge on, and the column that is predicted from the others."""

    train: pd.DataFrame
    test: pd.DataFrame
    target: str


ADULT = (
    "age,workclass,fnlwgt,education,education-num,marital-status,occupation,relationship,race,sex,"
    "capital-gain,capital-loss,hours-per-week,native-country,income"
).split(",")
WINE = (
    "fixed acidity,volatile acidity,citric acid,residual sugar,chlorides,free sulfur dioxide,"
    "total sulfur dioxide,density,pH,sulphates,alcohol,quality"
).split(",")
MAGIC = "length,width,size,conc,conc1,asym,m3long,m3trans,alpha,dist,class".split(",")
PROTEIN = [*(f"F{i}" for i in range(1, 10)), "RMSD"]

TARGETS = {
    "adult": "income",
    "california": "median_house_value",
    "wine": "quality",
    "magic04": "class",
    "protein": "RMSD",
    "sklearn_wine": "class",
}


def load(name: str, data_dir: str, seed: int) -> Split:
    """Train and test rows: adult's own, else 80 and 20% of the distinct rows, drawn by the seed."""
    target = TARGETS[name]
    if name == "adult":
        train, test = (
            _adult(_path(data_dir, f"adult-{part}.csv.gz")) for part in ("train", "test")
        )
        return Split(train, test, target)
    rows = READERS[name](data_dir).drop_duplicates(ignore_index=True)
    order = np.random.default_rng(seed).permutation(len(rows))
    cut = len(rows) // 5
    test, train = (rows.iloc[part].reset_index(drop=True) for part in (order[:cut], order[cut:]))
    return Split(train, test, target)


def is_category(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column)


def _path(data_dir: str, file: str) -> Path:
    folder = data_dir or os.environ.get("JFLOW_DATA", "")
    path = Path(folder).expanduser() / "tabular" / file
    if not folder or not path.is_file():
        raise SystemExit(
            f"{path}: not there; set --data-dir or JFLOW_DATA to the folder that holds tabular/, or"
            " take --datasets sklearn_wine"
        )
    return path


def _adult(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path, names=ADULT, na_values="?", skipinitialspace=True)
    return rows.assign(income=rows["income"].str.rstrip("."))  # as the train file writes it


def _california(data_dir: str) -> pd.DataFrame:
    return pd.read_csv(_path(data_dir, "california_housing.csv.gz"))


def _wine(data_dir: str) -> pd.DataFrame:
    return pd.concat(
        [
            pd.read_csv(_path(data_dir, f"winequality-{kind}.csv.gz"), names=WINE).assign(kind=kind)
            for kind in ("red", "white")
        ]
    )


def _magic04(data_dir: str) -> pd.DataFrame:
    return pd.read_csv(_path(data_dir, "magic04.data.gz"), names=MAGIC)


def _protein(data_dir: str) -> pd.DataFrame:
    with gzip.open(_path(data_dir, "protein.txt.gz"), "rt") as lines:
        return pd.DataFrame(np.loadtxt(lines), columns=PROTEIN)


def _sklearn_wine(data_dir: str) -> pd.DataFrame:
    from sklearn.datasets import load_wine

    found = load_wine(as_frame=True)
    return found.data.assign(**{"class": found.target_names[found.target].astype(str)})


READERS = {
    "california": _california,
    "wine": _wine,
    "magic04": _magic04,
    "protein": _protein,
    "sklearn_wine": _sklearn_wine,
}
