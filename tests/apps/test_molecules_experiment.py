"""The configs of sequences in experiments/molecules: a file of one's own is read, and what cannot
be read is said. That they train and draw is shown by .ci/short.py."""

import gzip
import math
import runpy
from pathlib import Path

import pytest

from jflow import apps
from jflow.apps import cli

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "molecules"
SEQUENCES = runpy.run_path(str(EXPERIMENT / "sequences.py"))
SIZES = ["width=16", "layers=1", "steps=2", "batch=4", "draws=4", "judged=4", "length=6"]


def test_the_sequences_of_a_fasta_file_are_what_is_learned(tmp_path):
    """Lower case and line breaks inside records are those of files; repeated ones are left out."""
    records = [f">{i}\nac{'gt'[i % 2]}\nt{'acgt' * (i % 3)}\n" for i in range(20)]
    file = tmp_path / "mine.fa.gz"
    file.write_bytes(gzip.compress("".join(records).encode()))
    keys = {"path": str(file), "length": 12}
    experiment, _ = apps.load_config(EXPERIMENT / "dna.py", keys)
    train, _, test = experiment.data()
    texts = [*train["x"], *test["x"]]
    tails = ("", "ACGT", "ACGTACGT")
    assert sorted(texts) == sorted(f"AC{c}T{tail}" for c in "GT" for tail in tails)
    pre = experiment.preprocess
    rows = pre.apply({}, train, None)
    assert rows["x"].shape == (5, 12) and rows["x"].max() == 5  # the padding, after ACGTN
    assert pre.undo({}, rows)["x"].tolist() == train["x"].tolist()


def test_what_it_cannot_read_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("JFLOW_DATA", raising=False)
    file = tmp_path / "mine.smi"
    file.write_text("smiles\nCCO a name\n\nCC\nCCO\nC?O\n")
    assert SEQUENCES["read"](file) == ["CCO", "CC", "C?O"]
    for keys, said in [
        ([], "no file discrete/qm9_smiles.csv.gz: give path=FILE"),
        ([f"data_dir={tmp_path}"], f"no file {tmp_path}/discrete/qm9_smiles.csv.gz"),
        ([f"path={file}"], r"sequence 2, 'C?O': expected letters among .* got ['?']"),
        ([f"path={file}", "length=2"], "sequence 0, 'CCO', has 3 letters, more than length=2"),
    ]:
        run = ["train", str(EXPERIMENT), *SIZES[:-1], *keys, "--workdir", str(tmp_path / "run")]
        assert cli.main(run) != 0
        first, *last = said.split(" .* ")
        message = capsys.readouterr().err
        assert first in message and all(part in message for part in last)


def test_texts_and_indices_are_each_other():
    texts = ["", "ab", "bba"]
    x = SEQUENCES["encoded"](texts, "ab", 3)
    assert x.tolist() == [[2, 2, 2], [0, 1, 2], [1, 1, 0]]
    assert SEQUENCES["decoded"](x, "ab") == texts
    assert SEQUENCES["decoded"]([[0, 2, 1]], "ab") == [""]


def test_bits_of_the_3_gram():
    """Learned "a", judged "a": of both letters, "a" and the end, the three orders in turn."""
    one = (1 + 5 / 3) / 7  # of two letters seen, each once, and one that was not
    two = (1 + 5 * one) / 6
    three = (1 + 5 * two) / 6
    assert math.isclose(SEQUENCES["trigram_bits"](["a"], ["a"]), -math.log2(three), rel_tol=1e-12)


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("CC(=O)O", 1),
        ("C1CC1", 1),
        ("C1CC", 0),
        ("C(C", 0),
        ("C)C(", 0),
        ("[NH3+]C", 1),
        ("C()", 0),
    ],
)
def test_brackets_and_rings(text, fine):
    closed = runpy.run_path(str(EXPERIMENT / "validity.py"))["closed"]
    assert closed(text) == (text if fine else "")
