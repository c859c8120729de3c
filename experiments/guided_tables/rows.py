"""Tables with a label: numbers and categories of rows to fit to, to judge by, to compare with."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

ADULT = (
    "age,workclass,fnlwgt,education,education-num,marital-status,occupation,relationship,race,sex,"
    "capital-gain,capital-loss,hours-per-week,native-country,income"
).split(",")


class Rows(NamedTuple):
    """numbers float [n, d], tokens int [n, columns], label int [n], 1 where the wish is met."""

    numbers: np.ndarray
    tokens: np.ndarray
    label: np.ndarray

    def __getitem__(self, index):
        return Rows(self.numbers[index], self.tokens[index], self.label[index])


class Table(NamedTuple):
    """Three parts of a table, and the names of its columns.

    Attributes:
        fit: What the flow and the classifier that guides are trained on.
        judge: What the independent classifier is trained on.
        held: What draws are compared with.
        numbers: Names of the numbers, by the width of their cells: 1 for whole numbers, else 0.
        categories: The values of each category.
        wish: The label in words.
    """

    fit: Rows
    judge: Rows
    held: Rows
    numbers: dict[str, float]
    categories: dict[str, list[str]]
    wish: str


def adult(folder: str, rng) -> Table:
    """Adult: the rows that its authors train on, and two halves of those that they test on."""
    parts = []
    for part in ("train", "test"):
        path = Path(folder).expanduser() / "tabular" / f"adult-{part}.csv.gz"
        if not folder or not path.is_file():
            raise SystemExit(
                f"{path}: not there; set --data-dir or JFLOW_DATA to the folder that holds"
                " tabular/, or run the part 'cancer', which needs no data"
            )
        parts.append(pd.read_csv(path, names=ADULT, skipinitialspace=True))
    frame = pd.concat(parts, ignore_index=True)
    gain, loss = frame["capital-gain"], frame["capital-loss"]
    frame["capital"] = np.select(
        [gain >= 5000, gain > 0, loss > 0], ["gain of 5000 or more", "smaller gain", "loss"], "none"
    )
    frame["country"] = np.where(frame["native-country"] == "United-States", "US", "other")
    cut = len(parts[0])
    order = cut + rng.permutation(len(frame) - cut)
    halves = np.split(order, [len(order) // 2])
    return _table(
        frame,
        frame["income"].str.startswith(">50K"),
        [np.arange(cut), *halves],
        {"age": 1.0, "education-num": 1.0, "hours-per-week": 1.0},
        ("marital-status,relationship,occupation,workclass,capital,sex,race,country").split(","),
        "income above 50,000 $",
    )


def cancer(folder: str, rng) -> Table:
    """Breast cancer in Wisconsin, from scikit-learn, some columns cut into thirds."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer(as_frame=True)
    frame = found.data.copy()
    names = ["mean concavity", "mean symmetry", "worst fractal dimension"]
    for name in names:
        frame[name] = pd.qcut(frame[name], 3, labels=["low", "medium", "high"]).astype(str)
    order = rng.permutation(len(frame))
    return _table(
        frame,
        found.target == 0,
        np.split(order, [len(order) // 2, 3 * len(order) // 4]),
        {"mean texture": 0.0, "mean area": 0.0, "mean smoothness": 0.0},
        names,
        "malignant",
    )


def _table(frame, label, parts, numbers, names, wish):
    codes = {name: pd.Categorical(frame[name]) for name in names}
    rows = Rows(
        frame[list(numbers)].to_numpy(float),
        np.stack([code.codes for code in codes.values()], 1).astype(np.int32),
        np.asarray(label, np.int32),
    )
    categories = {name: list(code.categories) for name, code in codes.items()}
    return Table(*(rows[part] for part in parts), numbers, categories, wish)


READERS = {"adult": adult, "cancer": cancer}
