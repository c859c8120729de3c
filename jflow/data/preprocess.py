"""From data units to model units and back, with the log-determinant that carries densities between them.

A `Preprocess` is fitted on training rows alone. Its state is JSON: numbers, strings, lists and dicts, kept beside the
checkpoint. Densities: log p_data(x) = log p_model(y) + log_det(state, y) for y = apply(state, x, rng), in nats.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jflow.data.seeds import generator
from jflow.data.splits import Rows, count

State = Mapping[str, Any]


class Preprocess(NamedTuple):
    """fit(train rows) -> state; apply(state, rows, rng) -> rows in model units; undo(state, rows) -> rows in data
    units; log_det(state, rows in model units, as `apply` returned them) -> [b], log |d apply / dx| over the event.

    rng is a numpy Generator; None suffices where nothing is drawn. Keys other than the one acted on pass unchanged.
    """

    fit: Callable[[Rows], State]
    apply: Callable[[State, Rows, np.random.Generator | None], Rows]
    undo: Callable[[State, Rows], Rows]
    log_det: Callable[[State, Rows], np.ndarray]


def _floating(x) -> np.ndarray:
    """As floats: float64 stays, everything else becomes float32."""
    x = np.asarray(x)
    return x if x.dtype == np.float64 else x.astype(np.float32)


def _sum(x: np.ndarray) -> np.ndarray:
    return x.sum(axis=tuple(range(1, x.ndim)), dtype=np.float64)


def _constant(rows: Rows, key: str, log_slope: float) -> np.ndarray:
    x = np.asarray(rows[key])
    return np.full(len(x), log_slope * x[0].size if len(x) else 0.0)


def _check_rows(expected: str, x: np.ndarray, fine: np.ndarray) -> None:
    """Raise, naming the first row and the value in it, unless `fine` [n, *event] holds everywhere."""
    if not fine.all():
        where = tuple(int(i) for i in np.argwhere(~fine)[0])
        rows = int((~fine.reshape(len(x), -1)).any(1).sum())
        place = f", element {list(where[1:])}" if len(where) > 1 else ""
        raise ValueError(f"{expected}, got {x[where]} in row {where[0]}{place} ({rows} such rows)")


def identity() -> Preprocess:
    """Leaves rows as they are: state {}."""
    return Preprocess(
        lambda rows: {},
        lambda state, rows, rng: dict(rows),
        lambda state, rows: dict(rows),
        lambda state, rows: np.zeros(count(rows)),
    )


def standardise(*, axis: int | tuple[int, ...] | None = 0, key: str = "x") -> Preprocess:
    """y = (x - mean) / std with the training rows' mean and standard deviation, taken over `axis`.

    axis=0: one pair for each element of the event (columns of a table); (0, 1, 2): one for each channel of images;
    None: one for all. An element that never varies in the training rows is an error that names its index. `undo` works
    in float64, so that numbers of many digits come back. log_det = -sum log std. State: {'mean', 'std'}.
    """

    def fit(rows):
        x = np.asarray(rows[key], np.float64)
        if len(x) < 2:
            raise ValueError(f"standardise needs at least 2 training rows, got {len(x)}")
        if not np.isfinite(x).all():
            row = int(np.argwhere(~np.isfinite(x))[0][0])
            raise ValueError(f"standardise: {key!r} is not finite in training row {row}")
        mean, std = x.mean(axis, keepdims=True)[0], x.std(axis, keepdims=True)[0]
        # A constant column's std is not exactly 0: its mean is off by rounding.
        flat = std <= 1e-12 * np.abs(x).max(axis, keepdims=True)[0]
        if flat.any():
            where = [tuple(map(int, i)) if len(i) > 1 else int(i[0]) for i in np.argwhere(flat)[:5]]
            raise ValueError(f"standardise: {key!r} is constant over the training rows at index {where} of the event")
        return {"mean": mean.tolist(), "std": std.tolist()}

    def apply(state, rows, rng):
        x = _floating(rows[key])
        y = (x - np.asarray(state["mean"])) / np.asarray(state["std"])
        return {**rows, key: y.astype(x.dtype)}

    def undo(state, rows):
        y = np.asarray(rows[key], np.float64)
        return {**rows, key: y * np.asarray(state["std"]) + np.asarray(state["mean"])}

    def log_det(state, rows):
        shape = np.asarray(rows[key]).shape
        return -_sum(np.broadcast_to(np.log(np.asarray(state["std"])), shape))

    return Preprocess(fit, apply, undo, log_det)


def dequantize(levels: int, *, key: str = "x") -> Preprocess:
    """y = (x + u) / levels in [0, 1) for integers x in 0 .. levels-1, u uniform in [0, 1) from rng.

    log p_model(y) + log_det, log_det = -D log(levels), is then a lower bound in expectation on the log-mass of x; the
    uniform model on [0, 1) has exactly log2(levels) bits per dimension. `undo` floors to the levels, clipping what lies
    outside. Source: Lucas Theis, Aaron van den Oord, Matthias Bethge, A note on the evaluation of generative models,
    2016.
    """
    if not 2 <= levels <= 2**16:
        raise ValueError(f"dequantize: expected 2 .. 65536 levels, got {levels}")

    def check(x):
        on_level = (x == np.round(x)) & (x >= 0) & (x < levels)
        _check_rows(f"dequantize({levels}): expected integers in 0 .. {levels - 1}", x, on_level)

    def fit(rows):
        check(np.asarray(rows[key]))
        return {}

    def apply(state, rows, rng):
        if rng is None:
            raise ValueError("dequantize draws noise: it needs rng, a numpy Generator, got None")
        x = _floating(rows[key])
        check(x)
        # Keep off the cells' ends by a few ulps, so that rounding here or in a later part cannot change the level.
        edge = 8 * levels * np.finfo(x.dtype).eps
        u = np.clip(rng.random(x.shape, x.dtype), edge, 1 - edge)
        return {**rows, key: ((x + u) / levels).astype(x.dtype)}

    def undo(state, rows):
        x = np.clip(np.floor(np.asarray(rows[key], np.float64) * levels), 0, levels - 1)
        return {**rows, key: x.astype(np.uint8 if levels <= 256 else np.int32)}

    return Preprocess(fit, apply, undo, lambda state, rows: _constant(rows, key, -np.log(levels)))


def scale(low: float, high: float, *, key: str = "x") -> Preprocess:
    """y = 2 (x - low) / (high - low) - 1: [low, high] to [-1, 1]; log_det = D log(2 / (high - low))."""
    if not low < high:
        raise ValueError(f"scale: expected low < high, got {low} and {high}")
    slope = 2 / (high - low)

    def apply(state, rows, rng):
        return {**rows, key: (_floating(rows[key]) - low) * slope - 1}

    def undo(state, rows):
        return {**rows, key: (_floating(rows[key]) + 1) / slope + low}

    return Preprocess(lambda rows: {}, apply, undo, lambda state, rows: _constant(rows, key, np.log(slope)))


def logit(alpha: float = 0.05, *, key: str = "x") -> Preprocess:
    """y = log p - log(1 - p), p = alpha + (1 - 2 alpha) x, for x in [0, 1].

    log_det = sum log(1 - 2 alpha) + softplus(y) + softplus(-y), since 1 / (p (1 - p)) = (1 + e^y)(1 + e^-y).
    Source: Laurent Dinh, Jascha Sohl-Dickstein, Samy Bengio, Density estimation using Real NVP, 2017.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"logit: expected 0 < alpha < 0.5, got {alpha}")

    def apply(state, rows, rng):
        x = _floating(rows[key])
        _check_rows("logit: expected x in [0, 1]", x, (x >= 0) & (x <= 1))
        p = alpha + (1 - 2 * alpha) * x
        return {**rows, key: np.log(p) - np.log1p(-p)}

    def undo(state, rows):
        y = _floating(rows[key])
        p = np.exp(-np.logaddexp(y.dtype.type(0), -y))  # the sigmoid, without overflow
        return {**rows, key: (p - alpha) / (1 - 2 * alpha)}

    def log_det(state, rows):
        y = np.asarray(rows[key], np.float64)
        return _sum(np.log1p(-2 * alpha) + np.logaddexp(0.0, y) + np.logaddexp(0.0, -y))

    return Preprocess(lambda rows: {}, apply, undo, log_det)


def chain_preprocess(*parts: Preprocess) -> Preprocess:
    """One after another: `apply` runs left to right, `undo` right to left. State: {'parts': [one state each]}.

    Each part is fitted on what the parts before it make of the training rows, with a fixed generator for noise.
    """

    def fit(rows):
        rng, states = generator("chain_preprocess", 0), []
        for part in parts:
            states.append(part.fit(rows))
            rows = part.apply(states[-1], rows, rng)
        return {"parts": states}

    def pairs(state):
        if len(state["parts"]) != len(parts):
            raise ValueError(f"expected the state of {len(parts)} parts, got {len(state['parts'])}")
        return list(zip(parts, state["parts"], strict=True))

    def apply(state, rows, rng):
        for part, s in pairs(state):
            rows = part.apply(s, rows, rng)
        return rows

    def undo(state, rows):
        for part, s in reversed(pairs(state)):
            rows = part.undo(s, rows)
        return rows

    def log_det(state, rows):
        total = np.zeros(count(rows))
        # Walk back to where each part's output lies; the first part need not be undone (it may floor).
        for i, (part, s) in reversed(list(enumerate(pairs(state)))):
            total += part.log_det(s, rows)
            if i:
                rows = part.undo(s, rows)
        return total

    return Preprocess(fit, apply, undo, log_det)
