"""From data units to model units and back, with the log-determinant that carries densities between
them.

A `Preprocess` is fitted on training rows alone. Its state is JSON: numbers, strings, lists and
dicts, kept beside the checkpoint. Densities: log p_data(x) = log p_model(y) + log_det(state, y) for
y = apply(state, x, rng), in nats.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jflow._core.arrays import numpy_mean_and_std
from jflow._core.seeds import generator
from jflow.data._splits import Rows, as_array, as_arrays, count

State = Mapping[str, Any]


class Preprocess(NamedTuple):
    """A step of preprocessing: four functions over a state that is fitted on training rows alone.

    The state is JSON, kept beside the checkpoint. log p_data(x) = log p_model(y) + log_det(state,
    y), in nats, for y = apply(state, x, rng). Keys of the rows other than the one acted on pass
    unchanged.

    Attributes:
        fit: (training rows) -> state.
        apply: (state, rows, rng) -> rows in model units; rng is a numpy generator, and None
            suffices where nothing is drawn.
        undo: (state, rows) -> rows in data units.
        log_det: (state, rows in model units, as apply returned them) -> [b], log |d apply / dx|
            over the event.
    """

    fit: Callable[[Rows], State]
    apply: Callable[[State, Rows, np.random.Generator | None], Rows]
    undo: Callable[[State, Rows], Rows]
    log_det: Callable[[State, Rows], np.ndarray]


LARGEST = 2.0**1022  # a quarter of float64's range: differences of such numbers are finite


def _read(rows: Rows, key: str) -> tuple[np.ndarray, np.dtype]:
    """rows[key] in float64, and the type that model units have: float64 where the rows are, else
    float32.

    Integers and float32 meet an offset in float64: 10^9 and 10^9 + 1 are one number in float32, and
    their difference from a mean is not.
    """
    x = np.asarray(as_array(key, rows[key]))
    return x.astype(np.float64), np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def _sum(x: np.ndarray) -> np.ndarray:
    return x.sum(axis=tuple(range(1, x.ndim)), dtype=np.float64)


def _constant(rows: Rows, key: str, log_slope: float) -> np.ndarray:
    x = as_array(key, rows[key])
    return np.full(len(x), log_slope * math.prod(x.shape[1:]))


def _check_rows(expected: str, x: np.ndarray, fine: np.ndarray) -> None:
    """Raise, naming the first row and its value, unless `fine` [n, *event] holds everywhere."""
    if not fine.all():
        where = tuple(int(i) for i in np.argwhere(~fine)[0])
        rows = int((~fine.reshape(len(x), -1)).any(1).sum())
        place = f", element {list(where[1:])}" if len(where) > 1 else ""
        raise ValueError(f"{expected}, got {x[where]} in row {where[0]}{place} ({rows} such rows)")


def identity() -> Preprocess:
    """Preprocessing that leaves rows as they are.

    Returns:
        A `Preprocess` of state {} and log_det 0.
    """
    return Preprocess(
        lambda rows: {},
        lambda state, rows, rng: as_arrays(rows),
        lambda state, rows: as_arrays(rows),
        lambda state, rows: np.zeros(count(rows)),
    )


def standardize(*, axis: int | tuple[int, ...] | None = 0, key: str = "x") -> Preprocess:
    """Preprocessing to mean 0 and standard deviation 1 of the training rows.

        y = (x - mean) / std,    log_det = -sum log std

    All in float64, so that numbers of many digits, far from 0 or near its ends, keep them; `undo`
    returns float64.

    Args:
        axis: What the moments are taken over. 0: one pair for each element of the event (columns of
            a table); (0, 1, 2): one for each channel of images; None: one for all.
        key: The array that is acted on.

    Returns:
        A `Preprocess` of state {'mean', 'std'}.

    Raises:
        ValueError: When fitted, for fewer than 2 training rows, for numbers that are not finite or
            beyond 2^1022, and, naming its index, for an element whose training rows differ by no
            more than the rounding of their type.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> preprocess, rows = data.standardize(), {"x": np.array([[1.0], [3.0]])}
        >>> state = preprocess.fit(rows)
        >>> preprocess.apply(state, rows, None)["x"].ravel().tolist()
        [-1.0, 1.0]
    """

    def fit(rows):
        given = np.asarray(as_array(key, rows[key]))
        x, _ = _read(rows, key)
        if len(x) < 2:
            raise ValueError(f"standardize needs at least 2 training rows, got {len(x)}")
        if not np.isfinite(x).all():
            row = int(np.argwhere(~np.isfinite(x))[0][0])
            raise ValueError(f"standardize: {key!r} is not finite in training row {row}")
        size = np.abs(x).max(axis, keepdims=True)[0]
        if (size > LARGEST).any():
            raise ValueError(
                f"standardize: {key!r} holds {size.max():g}, near the end of float64: divide it by"
                " a constant"
            )
        mean, std = (moment[0] for moment in numpy_mean_and_std(x, axis))
        # float32 rounds by float32's steps, and what came as integers of many digits by those of
        # float64.
        eps = np.finfo(given.dtype if given.dtype in (np.float16, np.float32) else np.float64).eps
        flat = np.ptp(x, axis, keepdims=True)[0] <= 2 * eps * size
        if flat.any():
            where = [tuple(map(int, i)) if len(i) > 1 else int(i[0]) for i in np.argwhere(flat)[:5]]
            raise ValueError(
                f"standardize: {key!r} is constant over the training rows at index {where} of the"
                f" event, up to the rounding of {given.dtype}"
            )
        return {"mean": mean.tolist(), "std": std.tolist()}

    def apply(state, rows, rng):
        x, dtype = _read(rows, key)
        y = (x - np.asarray(state["mean"])) / np.asarray(state["std"])
        return {**as_arrays(rows), key: y.astype(dtype)}

    def undo(state, rows):
        y, _ = _read(rows, key)
        return {**as_arrays(rows), key: y * np.asarray(state["std"]) + np.asarray(state["mean"])}

    def log_det(state, rows):
        shape = as_array(key, rows[key]).shape
        return -_sum(np.broadcast_to(np.log(np.asarray(state["std"])), shape))

    return Preprocess(fit, apply, undo, log_det)


def dequantize(levels: int, *, key: str = "x") -> Preprocess:
    """Uniform dequantization: integers become reals in [0, 1).

    Also known as: dequantization, uniform dequantization, dequantize pixels.

        y = (x + u) / levels,    log_det = -D log(levels)

    for integers x in 0 .. levels-1, with u uniform in [0, 1). log p_model(y) + log_det is then a
    lower bound in expectation on the log-mass of x; the uniform model on [0, 1) has exactly
    log2(levels) bits per dimension. `undo` floors to the levels, and clips what lies outside.

    Args:
        levels: How many values a number has, 2 .. 65536; 256 for 8-bit images.
        key: The array that is acted on.

    Returns:
        A `Preprocess`, which needs a generator.

    Raises:
        ValueError: For other levels; when applied, for what is no integer in 0 .. levels-1, and
            without a generator.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> preprocess, rows = data.dequantize(256), {"x": np.array([[0, 255]], np.uint8)}
        >>> state = preprocess.fit(rows)
        >>> y = preprocess.apply(state, rows, np.random.default_rng(0))
        >>> preprocess.undo(state, y)["x"].tolist()
        [[0, 255]]

    References:
        Theis, van den Oord, Bethge, *A note on the evaluation of generative models*, 2016,
        arXiv:1511.01844.
    """
    if not 2 <= levels <= 2**16:
        raise ValueError(f"dequantize: expected 2 .. 65536 levels, got {levels}")

    def check(x):
        on_level = (x == np.round(x)) & (x >= 0) & (x < levels)
        _check_rows(f"dequantize({levels}): expected integers in 0 .. {levels - 1}", x, on_level)

    def fit(rows):
        check(np.asarray(as_array(key, rows[key])))
        return {}

    def apply(state, rows, rng):
        if rng is None:
            raise ValueError("dequantize draws noise: it needs rng, a numpy Generator, got None")
        x, dtype = _read(rows, key)
        check(x)
        # Keep off the cells' ends by a few ulps, so that rounding here or in a later part cannot
        # change the level.
        edge = 8 * levels * np.finfo(dtype).eps
        u = np.clip(rng.random(x.shape, dtype), edge, 1 - edge)
        return {**as_arrays(rows), key: ((x + u) / levels).astype(dtype)}

    def undo(state, rows):
        y, _ = _read(rows, key)
        x = np.clip(np.floor(y * levels), 0, levels - 1)
        return {**as_arrays(rows), key: x.astype(np.uint8 if levels <= 256 else np.int32)}

    return Preprocess(fit, apply, undo, lambda state, rows: _constant(rows, key, -np.log(levels)))


def scale(low: float, high: float, *, key: str = "x") -> Preprocess:
    """Preprocessing from [low, high] to [-1, 1].

        y = 2 (x - low) / (high - low) - 1,    log_det = D log(2 / (high - low))

    Computed in float64; `undo` returns float64.

    Args:
        low: What becomes -1.
        high: What becomes 1.
        key: The array that is acted on.

    Returns:
        A `Preprocess` of state {}.

    Raises:
        ValueError: Unless low < high, and where high - low is too large or too small for float64.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> data.scale(0, 255).apply({}, {"x": np.array([[0.0, 255.0]])}, None)["x"].tolist()
        [[-1.0, 1.0]]
    """
    if not low < high:
        raise ValueError(f"scale: expected low < high, got {low} and {high}")
    width = float(high) - float(low)
    if not (np.isfinite(width) and width > 2.0**-1022):
        raise ValueError(
            f"scale: expected high - low within float64's range, got low={low} and high={high}"
        )

    def apply(state, rows, rng):
        x, dtype = _read(rows, key)
        return {**as_arrays(rows), key: ((x - low) / width * 2 - 1).astype(dtype)}

    def undo(state, rows):
        y, _ = _read(rows, key)
        return {**as_arrays(rows), key: (y + 1) / 2 * width + low}

    return Preprocess(
        lambda rows: {},
        apply,
        undo,
        lambda state, rows: _constant(rows, key, np.log(2) - np.log(width)),
    )


def logit(alpha: float = 0.05, *, key: str = "x") -> Preprocess:
    """Preprocessing of [0, 1] to the real line.

        y = log p - log(1 - p),    p = alpha + (1 - 2 alpha) x
        log_det = sum log(1 - 2 alpha) + softplus(y) + softplus(-y)

    since 1 / (p (1 - p)) = (1 + e^y)(1 + e^-y).

    Args:
        alpha: How far from 0 and 1 the numbers are kept, in (0, 1/2).
        key: The array that is acted on.

    Returns:
        A `Preprocess` of state {}.

    Raises:
        ValueError: For another alpha; when applied, for numbers outside [0, 1].

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density estimation using Real NVP*, 2016, arXiv:1605.08803.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"logit: expected 0 < alpha < 0.5, got {alpha}")

    def apply(state, rows, rng):
        x, dtype = _read(rows, key)
        _check_rows("logit: expected x in [0, 1]", x, (x >= 0) & (x <= 1))
        # 1 - p from 1 - x: as 1 minus p it would lose its digits near 0, and be 0 for a small
        # alpha.
        p, rest = (alpha + (1 - 2 * alpha) * side for side in (x, 1 - x))
        return {**as_arrays(rows), key: (np.log(p) - np.log(rest)).astype(dtype)}

    def undo(state, rows):
        y, dtype = _read(rows, key)
        p = np.exp(-np.logaddexp(0.0, -y))  # the sigmoid, without overflow
        return {**as_arrays(rows), key: ((p - alpha) / (1 - 2 * alpha)).astype(dtype)}

    def log_det(state, rows):
        y, _ = _read(rows, key)
        return _sum(np.log1p(-2 * alpha) + np.logaddexp(0.0, y) + np.logaddexp(0.0, -y))

    return Preprocess(lambda rows: {}, apply, undo, log_det)


def chain_preprocess(*parts: Preprocess) -> Preprocess:
    """Preprocessing steps, one after another.

    `apply` runs left to right, `undo` right to left. Each part is fitted on what the parts before
    it make of the training rows, with a fixed generator for noise.

    Args:
        *parts: The steps.

    Returns:
        A `Preprocess` of state {'parts': [one state each]}.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> preprocess = data.chain_preprocess(data.scale(0, 10), data.standardize())
        >>> state = preprocess.fit({"x": np.array([[0.0], [10.0]])})
        >>> preprocess.apply(state, {"x": np.array([[5.0]])}, None)["x"].tolist()
        [[0.0]]
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
        # Walk back to where each part's output lies; the first part need not be undone (it may
        # floor).
        for i, (part, s) in reversed(list(enumerate(pairs(state)))):
            total += part.log_det(s, rows)
            if i:
                rows = part.undo(s, rows)
        return total

    return Preprocess(fit, apply, undo, log_det)
