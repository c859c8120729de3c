"""Angles of protein side chains and backbones, and a kernel density to compare with."""

import csv
import gzip
import io
from pathlib import Path

import numpy as np

from jflow import data

NAMES = ("phi", "psi", "chi1", "chi2", "chi3")
KAPPAS = tuple(10.0 * 2.0**k for k in range(10))  # to 5120, a bump of 0.8 degrees


def read(path, angles: int) -> np.ndarray:
    """[n, angles] in radians in [-pi, pi): phi, psi, chi1 ... of rows that have them all, without
    duplicates."""
    text = gzip.decompress(Path(path).read_bytes()).decode()
    rows = [row[1 : 1 + angles] for row in csv.reader(io.StringIO(text))]
    degrees = np.unique(np.array([row for row in rows if "NULL" not in row], float), axis=0)
    shuffled = np.random.default_rng(0).permutation(degrees)
    return np.mod(np.radians(shuffled) + np.pi, 2 * np.pi) - np.pi


def splits(x: np.ndarray) -> data.Splits:
    """80%, 10% and 10% of the rows, always the same; of the last two 2000 rows at most."""
    rows = data.split({"x": x.astype(np.float32)}, valid=0.1, test=0.1, seed=0)
    return rows._replace(valid={"x": rows.valid["x"][:2000]}, test={"x": rows.test["x"][:2000]})


def toy(angles: int, n: int = 400) -> np.ndarray:
    """Two clouds on the torus, for runs without the data."""
    rng = np.random.default_rng(0)
    center = np.where(rng.random((n, 1)) < 0.6, -1.1, 2.9)
    return np.mod(rng.vonmises(0, 8, (n, angles)) + center + np.pi, 2 * np.pi) - np.pi


def kernel_log_density(train: np.ndarray, x: np.ndarray, kappas=KAPPAS) -> np.ndarray:
    """[kappas, b] nats: log of the mean over train of prod_d exp(kappa cos(x_d - y_d)) / (2 pi
    I_0(kappa))."""
    from scipy.special import ive

    wave = lambda a: np.concatenate([np.cos(a), np.sin(a)], 1).astype(np.float32)  # noqa: E731
    dim, out = x.shape[1], []
    for part in np.array_split(x, len(x) // 256 + 1):
        near = wave(part) @ wave(train).T - dim  # at most 0
        highest = near.max(1, keepdims=True)
        rows = []
        for kappa in kappas:
            mean = np.exp(kappa * (near - highest)).mean(1)
            constant = dim * np.log(2 * np.pi * ive(0, kappa))
            rows.append(np.log(mean) + kappa * highest[:, 0] - constant)
        out.append(np.stack(rows))
    return np.concatenate(out, axis=1)


def kernel_nll(rows: data.Splits) -> tuple[np.ndarray, float]:
    """(nats of each test row, kappa) of the product von Mises kernel density of the training rows,
    its kappa chosen on the validation rows."""
    found = kernel_log_density(rows.train["x"], rows.valid["x"]).mean(1)
    best = KAPPAS[int(np.argmax(found))]
    return -kernel_log_density(rows.train["x"], rows.test["x"], (best,))[0], best
