"""Molecules as strings: a discrete flow from masks on SMILES, those of QM9 or of a file.

Train, report and draw (README.md has the minutes; JFLOW_DATA/discrete/qm9_smiles.csv.gz, or
data_dir=FOLDER in its place, or path=FILE, a text with one string a line, plain or gzipped):

    jflow train experiments/molecules --workdir runs/molecules
    jflow train experiments/molecules path=mine.smi length=64 --workdir runs/mine
    jflow evaluate runs/molecules
    jflow sample runs/molecules --num 1000 --out molecules.csv

`short=True` trains on a few molecules in seconds, for CI. The expected numbers are in README.md
beside this file.

A tenth of the different strings is held out. Reported are bits per letter of these (and one for the
end of a string), by the bound of `solvers.discrete_bound`, beside an interpolated 3-gram, and of
`draws` draws the shares of valid ones, of different ones among these and of new ones among those.
Valid is what rdkit reads where it is installed; else what closes its brackets and rings, which is
less strict.
"""

import os
from pathlib import Path

from sequences import experiment, read
from validity import closed, counts, readable

from jflow.apps import Experiment

SYMBOLS = "#%()+-./0123456789:=@ABCDEFGHIKLMNOPRSTUVWXYZ[\\]abcdefghiklmnoprstuvy~$*"
FEW = ["CCO", "c1ccccc1", "CC(=O)N", "C#N", "OCC1CC1", "CCC", "CO", "CN", "CCN", "C1CC1", "O", "CC"]


def config(
    *,
    path: str = "",
    data_dir: str = "",
    length: int = 32,
    width: int = 96,
    layers: int = 3,
    steps: int = 600,
    batch: int = 64,
    learning_rate: float = 2e-3,
    draws: int = 1000,
    judged: int = 512,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        path: the strings, one a line, plain or gzipped; those of QM9 in data_dir if empty
        data_dir: folder that holds discrete/qm9_smiles.csv.gz; JFLOW_DATA if empty
        length: letters of a string at most
        width: of the network
        layers: of the network
        steps: updates
        batch: strings of an update
        learning_rate: of Adam, at its highest
        draws: strings that are drawn and counted
        judged: strings, not learned, that the bound is of
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        length, width, layers, steps, batch, draws, judged = 10, 16, 1, 30, 4, 8, 8
    folder = Path(data_dir or os.environ.get("JFLOW_DATA", ""))

    def texts():
        return FEW if short else read(path or folder / "discrete/qm9_smiles.csv.gz")

    def judge(drawn, learned, test):
        forms = readable() or (lambda texts: [closed(text) for text in texts])
        valid, different, new = counts(drawn, set(forms(learned)), forms)
        return {"valid": valid, "different": different, "new": new}

    return experiment(
        texts,
        judge,
        symbols=SYMBOLS,
        length=length,
        width=width,
        layers=layers,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        draws=draws,
        judged=judged,
        seed=seed,
    )
