"""Digits with captions, and what an image and a caption are judged by."""

import numpy as np
from sklearn.svm import SVC

from jflow import data

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYMBOLS = " efghinorstuvwxz"  # the first one ends a word
LENGTH = 5
NULL = np.zeros(LENGTH, np.int32)  # no caption


def encode(words):
    """Words -> symbols [n, LENGTH] int32."""
    for word in words:
        if len(word) > LENGTH or not set(word) <= set(SYMBOLS):
            raise ValueError(f"expected at most {LENGTH} symbols of {SYMBOLS!r}, got {word!r}")
    padded = [[SYMBOLS.index(symbol) for symbol in word.ljust(LENGTH)] for word in words]
    return np.asarray(padded, np.int32)


def decode(symbols):
    """symbols [n, LENGTH] -> words."""
    return ["".join(SYMBOLS[i] for i in row).rstrip() for row in np.asarray(symbols)]


CAPTIONS = encode(WORDS)


def captioned(short):
    """Scikit-learn's digits, whose 'cond' is the caption; 1437 to train on, 360 to test."""

    def rows(split):
        split = data.take(split, slice(100)) if short else split
        return {"x": split["x"], "cond": CAPTIONS[split["cond"]]}

    found = data.digits()
    return data.Splits(rows(found.train), None, rows(found.test))


def labels_of(captions):
    """The digit [n] that each caption [n, LENGTH] names."""
    return np.argmax(np.all(captions[:, None] == CAPTIONS[None], axis=2), axis=1)


def support_vectors(splits):
    """(images in 0 .. 16 -> digits) of a support-vector classifier of the training digits."""
    flat = lambda x: np.asarray(x, np.float64).reshape(len(x), -1)  # noqa: E731
    classifier = SVC(gamma=0.001, C=10.0)
    classifier.fit(flat(splits.train["x"]), labels_of(splits.train["cond"]))
    return lambda x: classifier.predict(flat(x))
