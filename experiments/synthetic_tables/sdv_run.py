r"""SDV's synthesizers for `run.py`: one fit and its rows, one JSON line; run by the Python of an
environment with sdv.

    SDV_PYTHON experiments/synthetic_tables/sdv_run.py --method ctgan --train train.csv \
        --out made.csv --num 1000 --seconds 120 --seed 0

All options are SDV's defaults, but for the epochs of CTGAN and TVAE: they train until the fit,
preprocessing included, has used as many seconds of CPU time as it may. Text columns are
categorical, all others numerical. SDV comes under the Business Source License, which allows
measurements like these: read it before other uses.
"""

import argparse
import importlib
import json
import sys
import time
import warnings

import numpy as np
import pandas as pd

try:
    import sdv
    import torch
    from sdv.metadata import Metadata
    from sdv.single_table import CTGANSynthesizer, GaussianCopulaSynthesizer, TVAESynthesizer
except ImportError as error:
    sys.exit(f"{error}: this script needs sdv and torch (pip install torch sdv)")

METHODS = {
    "copula": GaussianCopulaSynthesizer,
    "ctgan": CTGANSynthesizer,
    "tvae": TVAESynthesizer,
}


class Until:
    """Stands for tqdm around the range of epochs, and ends it at a moment of CPU time."""

    def __init__(self, end: float):
        self.end, self.epochs = end, 0

    def __call__(self, epochs, **_):
        for epoch in epochs:
            yield epoch
            self.epochs = epoch + 1
            if time.process_time() >= self.end:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=list(METHODS), required=True)
    parser.add_argument("--train", required=True, help="a csv file of the rows to fit to")
    parser.add_argument("--out", required=True, help="the csv file that synthetic rows go to")
    parser.add_argument("--num", type=int, required=True, help="of synthetic rows")
    parser.add_argument("--seconds", type=float, required=True, help="of CPU time for CTGAN, TVAE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002  SDV draws from the global state
    warnings.simplefilter("ignore")

    rows = pd.read_csv(args.train)
    kinds = {
        name: {
            "sdtype": "numerical" if pd.api.types.is_numeric_dtype(rows[name]) else "categorical"
        }
        for name in rows
    }
    metadata = Metadata.load_from_dict({"tables": {"table": {"columns": kinds}}})
    wall, begun = time.perf_counter(), time.process_time()
    until = Until(begun + args.seconds)
    options = {}
    if args.method != "copula":
        importlib.import_module(f"ctgan.synthesizers.{args.method}").tqdm = until
        options = {"epochs": 10**6, "enable_gpu": False}
    model = METHODS[args.method](metadata, **options)
    model.fit({"table": rows})
    spent = {
        "cpu_seconds": time.process_time() - begun,
        "seconds": time.perf_counter() - wall,
        "epochs": until.epochs or None,
        "versions": {"sdv": sdv.__version__, "torch": torch.__version__},
    }
    model.sample(args.num)["table"].to_csv(args.out, index=False)
    print(json.dumps(spent))


if __name__ == "__main__":
    main()
