r"""Synthetic tables beside SDV's: utility, detection, conditional draws, imputation.

    python experiments/synthetic_tables/run.py --data-dir DATA --sdv-python PATH --workdir DIR
    python experiments/synthetic_tables/run.py --workdir DIR --only-print
    python experiments/synthetic_tables/run.py --short

Tasks, each over --datasets and --seeds:

    synthesis    as many synthetic rows as there are real ones to fit to. Utility: AUC (text
                 targets) or R^2 on real test rows of gradient boosting that the rows trained.
                 Detection: the AUC of gradient boosting that tells them from real test rows,
                 cross-fitted; 0.5 is perfect
    conditions   draws given values and ranges: the category whose share differs most from that in
                 the real rows that meet the condition, all and test rows alone, in percentage
                 points, and its standard error
    imputation   a fifth of the cells of real test rows hidden at random and filled 20 times: CRPS
                 of numbers (over the column's standard deviation) and Brier score of categories,
                 means over the columns; smaller is better

Methods: `real` stands for the real rows that the others are fitted to, `independent` for these
with every column shuffled by itself; jflow is `apps.tabular.TabularFlow` at its defaults; copula,
ctgan and tvae are SDV's at theirs, the latter two trained for as many seconds of CPU time as
jflow's fit took, or --seconds where that is not known. Imputations are compared with the mean or
the most frequent category (`simple`), with draws from the column by itself (`independent`), and
with scikit-learn's IterativeImputer that draws from its posterior (`iterative`).

Each run is a JSON file of --workdir, which is not run again, so that a killed command goes on;
--only-print prints the tables of what is there. PATH is the Python of an environment with `pip
install torch "sdv>=2"`. DATA is the folder that holds tabular/*.gz (or set JFLOW_DATA). --short
needs neither and takes seconds: a small table of scikit-learn's.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import judge
import numpy as np
import pandas as pd
import tables
from tables import Split
from threadpoolctl import threadpool_limits

DATASETS = ["adult", "california", "wine", "magic04", "protein"]
PEERS = ["copula", "ctgan", "tvae"]
METHODS = {
    "synthesis": ["real", "independent", "jflow", *PEERS],
    "conditions": ["real", "jflow"],
    "imputation": ["simple", "independent", "iterative", "jflow"],
}
CONDITIONS: dict[str, list[dict[str, Any]]] = {
    "adult": [
        {"education": "HS-grad", "sex": "Female"},
        {"marital-status": "Never-married", "workclass": "Private"},
        {"education": "Bachelors", "income": ">50K"},
        {"hours-per-week": 50, "sex": "Male"},
        {"age": (25, 35), "marital-status": "Married-civ-spouse"},
    ],
    "sklearn_wine": [{"alcohol": (12.0, 13.0)}, {"hue": (0.9, 1.1)}],
}
IMPUTED = ("adult", "magic04", "sklearn_wine")
HIDDEN = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="", help="that holds tabular/ (default: JFLOW_DATA)")
    parser.add_argument("--workdir", default="runs/synthetic_tables", help="of results")
    parser.add_argument("--sdv-python", default="", help="without it, SDV's methods are left out")
    parser.add_argument("--tasks", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--datasets", nargs="+", default=DATASETS, choices=list(tables.TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="of each task, those named (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of CPU for CTGAN and TVAE without jflow's"
    )
    parser.add_argument("--rows", type=int, default=2000, help="of test rows with hidden cells")
    parser.add_argument("--imputations", type=int, default=20)
    parser.add_argument("--draws", type=int, default=10_000, help="of each condition")
    parser.add_argument("--only-print", action="store_true", help="the tables of what is there")
    parser.add_argument("--short", action="store_true", help="a small run that takes seconds")
    args = parser.parse_args()
    unknown = set(args.methods or ()) - {name for names in METHODS.values() for name in names}
    if unknown:
        parser.error(f"--methods: no {sorted(unknown)}; there are {METHODS}")
    if not args.short:
        everything(args, Path(args.workdir).expanduser())
        return
    args.datasets, args.seeds, args.imputations, args.draws = ["sklearn_wine"], [0], 3, 200
    with tempfile.TemporaryDirectory() as folder:
        everything(args, Path(folder))


def everything(args, workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    if not args.only_print:
        for task in args.tasks:
            for dataset in args.datasets:
                for seed in args.seeds:
                    for method in METHODS[task]:
                        if args.methods is None or method in args.methods:
                            once(task, dataset, seed, method, args, workdir)
    show(workdir)


def once(task: str, dataset: str, seed: int, method: str, args, workdir: Path) -> None:
    """Run one method, unless its result is there or it cannot be run, and write what it gave."""
    result = workdir / f"{task}-{dataset}-{seed}-{method}.json"
    left_out = (
        (method in PEERS and not args.sdv_python)
        or (task == "conditions" and dataset not in CONDITIONS)
        or (task == "imputation" and dataset not in IMPUTED)
    )
    if left_out or result.exists():
        return
    split = tables.load(dataset, args.data_dir, seed)
    begun, cpu = time.perf_counter(), time.process_time()
    with threadpool_limits(1):  # threads of scikit-learn that wait for each other cost CPU time
        found = TASKS[task](dataset, split, seed, method, args, workdir)
    found = {"task": task, "dataset": dataset, "seed": seed, "method": method} | found
    print(f"{time.perf_counter() - begun:7.1f} s {time.process_time() - cpu:7.1f} s CPU", end="  ")
    print(json.dumps({k: v for k, v in found.items() if k != "columns"}), flush=True)
    result.write_text(json.dumps(found, indent=1) + "\n")


# Synthesis


def synthesis(dataset: str, split: Split, seed: int, method: str, args, workdir: Path) -> dict:
    rows, spent = made_by(dataset, split, seed, method, args, workdir)
    train, test, target = split
    return {
        "measure": "AUC" if tables.is_category(train[target]) else "R^2",
        "utility": judge.utility(rows, test, target, seed),
        "detection": judge.detection(test, rows, seed),
        "rows": len(rows),
    } | spent


def made_by(
    dataset: str, split: Split, seed: int, method: str, args, workdir: Path
) -> tuple[pd.DataFrame, dict]:
    """As many rows as the train split has, and what the fit cost."""
    train = split.train
    if method == "real":
        return train, {}
    if method == "independent":
        return shuffled(train, len(train), np.random.default_rng(seed)), {}
    if method == "jflow":
        model, spent = fitted(dataset, split, seed, args, workdir)
        return model.sample(len(train), random_state=seed + 1), spent
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "train.csv", Path(folder) / "made.csv"
        train.to_csv(source, index=False)
        command = [args.sdv_python, str(Path(__file__).parent / "sdv_run.py"), "--method", method]
        command += ["--train", str(source), "--out", str(out), "--num", str(len(train))]
        command += ["--seconds", str(seconds_of_jflow(dataset, seed, args, workdir))]
        done = subprocess.run([*command, "--seed", str(seed)], stdout=subprocess.PIPE)
        if done.returncode:
            raise SystemExit(f"{method}: sdv_run.py failed on {dataset}, seed {seed}: see above")
        return pd.read_csv(out), json.loads(done.stdout.splitlines()[-1])


def shuffled(rows: pd.DataFrame, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """n rows, each column drawn by itself; a permutation where n is the number of rows."""
    drawn = {
        name: rows[name].iloc[np.resize(rng.permutation(len(rows)), n)].to_numpy() for name in rows
    }
    return pd.DataFrame(drawn).astype(rows.dtypes)


def fitted(dataset: str, split: Split, seed: int, args, workdir: Path) -> tuple[Any, dict]:
    """The TabularFlow of a table and a seed, and what its fit cost; kept in the workdir."""
    from jflow.apps import tabular

    folder = workdir / f"model-{dataset}-{seed}"
    costs = folder.with_suffix(".json")
    if costs.exists():
        return tabular.load(folder), json.loads(costs.read_text())
    options: dict[str, Any] = {"steps": 20, "width": 16} if args.short else {}
    wall, begun = time.perf_counter(), time.process_time()
    model = tabular.TabularFlow(random_state=seed, **options).fit(split.train)
    spent = {
        "cpu_seconds": time.process_time() - begun,
        "seconds": time.perf_counter() - wall,
    }
    model.save(folder)
    costs.write_text(json.dumps(spent))
    return model, spent


def seconds_of_jflow(dataset: str, seed: int, args, workdir: Path) -> float:
    costs = workdir / f"model-{dataset}-{seed}.json"
    return json.loads(costs.read_text())["cpu_seconds"] if costs.exists() else args.seconds


# Conditions


def conditions(dataset: str, split: Split, seed: int, method: str, args, workdir: Path) -> dict:
    found = []
    for given in CONDITIONS[dataset]:
        train, test = (rows[judge.meets(rows, given)] for rows in (split.train, split.test))
        drawn, references, spent = train, {"test": test}, {}
        if method == "jflow":
            model, _ = fitted(dataset, split, seed, args, workdir)
            begun = time.process_time()
            drawn = model.sample(args.draws, given=given, random_state=seed + 2)
            spent = {"cpu_seconds": time.process_time() - begun}
            if not judge.meets(drawn, given).all():
                raise RuntimeError(f"{method}: draws given {given} that do not meet it")
            references["all"] = pd.concat([train, test])
        off = {
            name: {"rows": len(real)} | judge.deviation(real, drawn, given)._asdict()
            for name, real in references.items()
        }
        found.append({"given": said(given)} | spent | off)
    return {"conditions": found}


def said(given: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value[0]}..{value[1]}" if isinstance(value, tuple) else f"{name}={value}"
        for name, value in given.items()
    )


# Imputation


def imputation(dataset: str, split: Split, seed: int, method: str, args, workdir: Path) -> dict:
    rng = np.random.default_rng((seed, 1))
    rows = rng.permutation(len(split.test))[: args.rows]
    truth = split.test.iloc[np.sort(rows)].reset_index(drop=True)
    hidden = (rng.random(truth.shape) < HIDDEN) & truth.notna().to_numpy()
    lacking = truth.mask(hidden)
    if method == "jflow":
        model, _ = fitted(dataset, split, seed, args, workdir)

        def fill(i: int) -> pd.DataFrame:
            return model.impute(lacking, random_state=i)

    else:
        fill = FILLERS[method](split.train, lacking, seed)
    draws = [fill(i) for i in range(1 if method == "simple" else args.imputations)]
    numbers = [name for name in truth if not tables.is_category(truth[name])]
    scores = judge.imputation_scores(truth, hidden, draws, split.train[numbers].std())
    means = {kind: float(np.mean(list(each.values()))) for kind, each in scores.items() if each}
    return {"hidden_cells": int(hidden.sum()), "means": means, "columns": scores}


def simple(train: pd.DataFrame, lacking: pd.DataFrame, seed: int) -> Callable:
    """The mean of a column of numbers, the most frequent one of categories."""
    center = {
        name: train[name].mode()[0] if tables.is_category(train[name]) else train[name].mean()
        for name in train
    }
    return lambda i: lacking.fillna(center)


def independent(train: pd.DataFrame, lacking: pd.DataFrame, seed: int) -> Callable:
    """A value that another row has, whatever the rest of the row."""

    def fill(i: int) -> pd.DataFrame:
        rng = np.random.default_rng((seed, i))
        return lacking.fillna(shuffled(train.dropna(), len(lacking), rng))

    return fill


def iterative(train: pd.DataFrame, lacking: pd.DataFrame, seed: int) -> Callable:
    """Draws by scikit-learn's IterativeImputer: Bayesian linear regressions in turn.

    Numbers are standardized and kept within the range of the column. Categories are indicators of
    all but the most frequent one, which has what is left of 1; the largest draw wins. (Indicators
    of all would determine each other exactly, so that none would ever leave its start.) At most
    10,000 complete rows are fitted to.
    """
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    whole = train.dropna()
    whole = whole.sample(min(10_000, len(whole)), random_state=seed)
    numbers = [name for name in train if not tables.is_category(train[name])]
    texts = {
        name: whole[name].value_counts().index.to_numpy(object)
        for name in train
        if name not in numbers
    }
    center, scale = whole[numbers].mean(), whole[numbers].std()

    def indicators(rows: pd.DataFrame) -> np.ndarray:
        parts = [((rows[numbers] - center) / scale).to_numpy()]
        for name, known in texts.items():
            part = (rows[name].to_numpy(object)[:, None] == known[1:]).astype(float)
            parts.append(np.where(rows[name].isna().to_numpy()[:, None], np.nan, part))
        return np.concatenate(parts, 1)

    x = indicators(whole)
    imputer = IterativeImputer(
        sample_posterior=True, max_iter=5, random_state=seed, min_value=x.min(0), max_value=x.max(0)
    ).fit(x)

    def fill(i: int) -> pd.DataFrame:
        imputer.random_state_ = np.random.RandomState((seed, i))
        y = imputer.transform(indicators(lacking))
        made = {name: y[:, j] * scale[name] + center[name] for j, name in enumerate(numbers)}
        start = len(numbers)
        for name, known in texts.items():
            part, start = y[:, start : start + len(known) - 1], start + len(known) - 1
            part = np.concatenate([1 - part.sum(1, keepdims=True), part], 1)
            made[name] = known[part.argmax(1)]
        return lacking.fillna(pd.DataFrame(made))

    return fill


FILLERS = {"simple": simple, "independent": independent, "iterative": iterative}
TASKS = {"synthesis": synthesis, "conditions": conditions, "imputation": imputation}


# Tables


def show(workdir: Path) -> None:
    results = [json.loads(path.read_text()) for path in sorted(workdir.glob("*-*-*-*.json"))]
    by_task = {task: [r for r in results if r["task"] == task] for task in METHODS}
    for print_task, task in ((show_synthesis, "synthesis"), (show_imputation, "imputation")):
        if by_task[task]:
            print_task(by_task[task], METHODS[task])
    if by_task["conditions"]:
        show_conditions(by_task["conditions"])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """'mean +- standard deviation over the seeds', '' of nothing."""
    if not len(values):
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {np.std(values, ddof=1):.{digits}f}"


def of(results: list[dict], **wanted: Any) -> list[dict]:
    return [r for r in results if all(r[k] == v for k, v in wanted.items())]


def line(cells: Sequence[Any]) -> None:
    print("|", " | ".join(str(c) for c in cells), "|", flush=True)


def known(results: list[dict], key: str, order: Sequence[str]) -> list[str]:
    return [name for name in order if any(r[key] == name for r in results)]


def show_synthesis(results: list[dict], order: Sequence[str]) -> None:
    methods = known(results, "method", order)
    print("\nSynthesis: mean +- standard deviation over the seeds\n")
    line(["table", "", *methods])
    line(["---"] * (2 + len(methods)))
    for dataset in known(results, "dataset", list(tables.TARGETS)):
        here = of(results, dataset=dataset)
        seeds = len({r["seed"] for r in here})
        rows = [("utility", f"{here[0]['measure']}, {seeds} seed(s)", 3)]
        rows += [("detection", "detection AUC", 3), ("cpu_seconds", "CPU seconds of the fit", 0)]
        rows += [("epochs", "epochs", 0)]
        for key, label, digits in rows:
            values = [
                [r[key] for r in of(here, method=m) if r.get(key) is not None] for m in methods
            ]
            if any(values):
                line([dataset, label, *(spread(v, digits) for v in values)])


def show_imputation(results: list[dict], order: Sequence[str]) -> None:
    methods = known(results, "method", order)
    print("\nImputation: mean +- standard deviation over the seeds; smaller is better\n")
    line(["table", "", *methods])
    line(["---"] * (2 + len(methods)))
    for dataset in known(results, "dataset", list(tables.TARGETS)):
        here = of(results, dataset=dataset)
        for key, label in (("crps", "CRPS of numbers"), ("brier", "Brier score of categories")):
            values = [
                [r["means"][key] for r in of(here, method=m) if key in r["means"]] for m in methods
            ]
            if any(values):
                line([dataset, label, *(spread(v) for v in values)])


def show_conditions(results: list[dict]) -> None:
    print("\nConditions: largest deviation of a category's share +- its error, percentage points\n")
    columns = ["table", "given", "method", "seed", "CPU seconds of the draws"]
    line([*columns, "rows", "from all rows", "test rows", "from these"])
    line(["---"] * 9)
    for r in results:
        for c in r["conditions"]:
            cells = [r["dataset"], c["given"], r["method"], r["seed"]]
            cells += [f"{c['cpu_seconds']:.1f}" if "cpu_seconds" in c else ""]
            for off in (c.get("all"), c["test"]):
                cells += [off["rows"], farthest(off)] if off else ["", ""]
            line(cells)


def farthest(off: dict) -> str:
    return f"{off['points']:.2f} +- {off['error']:.2f}, {off['category']}"


if __name__ == "__main__":
    main()
