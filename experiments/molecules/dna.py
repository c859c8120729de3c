"""DNA: a discrete flow from masks on promoters, those of E. coli or sequences of a file.

Train, report and draw (README.md has the minutes; JFLOW_DATA/discrete/dna/Ecoli_prom.fa.gz, or
data_dir=FOLDER in its place, or path=FILE, FASTA or one sequence a line, plain or gzipped):

    jflow train experiments/molecules/dna.py --workdir runs/dna
    jflow train experiments/molecules/dna.py path=mine.fa length=200 --workdir runs/mine
    jflow evaluate runs/dna
    jflow sample runs/dna --num 1000 --out dna.csv

`short=True` trains on letters drawn at random in seconds, for CI. The expected numbers are in
README.md beside this file.

A tenth of the different sequences is held out. Reported are bits per letter of these (and one for
the end of a sequence), by the bound of `solvers.discrete_bound`, beside an interpolated 3-gram, and
how far the frequencies of four letters in a row are from those of what was learned, in total
variation: of `draws` draws, and of the sequences held out.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np
from sequences import experiment, read

from jflow.apps import Experiment


def config(
    *,
    path: str = "",
    data_dir: str = "",
    length: int = 81,
    width: int = 64,
    layers: int = 3,
    steps: int = 600,
    batch: int = 64,
    learning_rate: float = 2e-3,
    draws: int = 400,
    judged: int = 512,
    seed: int = 0,
    short: bool = False,
) -> Experiment:
    """The job that the head of this file describes.

    Args:
        path: the sequences, plain or gzipped; promoters of E. coli in data_dir if empty
        data_dir: folder that holds discrete/dna/Ecoli_prom.fa.gz; JFLOW_DATA if empty
        length: letters of a sequence at most
        width: of the network
        layers: of the network
        steps: updates
        batch: sequences of an update
        learning_rate: of Adam, at its highest
        draws: sequences that are drawn and counted
        judged: sequences, not learned, that the bound is of
        seed: of the parameters and the batches
        short: shrink the run to seconds, for CI
    """
    if short:
        length, width, layers, steps, batch, draws, judged = 10, 16, 1, 30, 4, 8, 8
    folder = Path(data_dir or os.environ.get("JFLOW_DATA", ""))

    def texts():
        if short:
            at = np.random.default_rng(0).integers(4, size=(40, length))
            return ["".join("ACGT"[i] for i in row) for row in at]
        found = read(path or folder / "discrete/dna/Ecoli_prom.fa.gz")
        return list(dict.fromkeys(text.upper() for text in found))

    def judge(drawn, learned, test):
        whole = words(learned)
        return {
            "words_of_draws": distance(words(drawn), whole),
            "words_of_test": distance(words(test), whole),
        }

    return experiment(
        texts,
        judge,
        symbols="ACGTN",
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


def words(texts: list[str]) -> dict[str, float]:
    """The frequencies of four letters in a row."""
    found = Counter(text[i : i + 4] for text in texts for i in range(len(text) - 3))
    return {word: count / found.total() for word, count in found.items()}


def distance(p: dict[str, float], q: dict[str, float]) -> float:
    """In total variation, from 0 to 1."""
    return sum(abs(p.get(word, 0) - q.get(word, 0)) for word in {*p, *q}) / 2
