"""Latents of an autoencoder: encoded once, standardized, decoded at the end; masks and layouts at
their sites."""

import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jflow._core.checks import check_whole
from jflow.data._preprocess import Preprocess
from jflow.data._splits import Rows, as_array, as_arrays, count
from jflow.types import Array, Key, Params


def latents(
    encode: Callable[..., Array],
    params: Params,
    rows: Rows,
    *,
    key: Key | None = None,
    batch: int = 256,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Rows with latents in the place of data: each is encoded once, before a flow is trained.

    Also known as: cached latents, precomputed latents.

    `standardize_latents` brings them to deviation 1 and samples back to data. Batches are read,
    encoded and written one after another: beside the latents, memory does not grow with the rows,
    which may lie on disk (`read_shards`). With a key a latent is one draw of its posterior, which
    is what the decoder was trained on: the deviation of means alone would be too small.

    Args:
        encode: (params, x [b, *event], *, key=None) -> latents [b, *latent], such as
            `autoencoder.encode`; it is compiled, and sees 'x' as the rows have it (uint8 images,
            say).
        params: Of the encoder.
        rows: {'x': [n, *event], ...}; the other arrays pass as they are.
        key: Of the draws; None gives what encode(params, x) is without one, the posterior's mean.
        batch: Rows that are encoded at once.
        progress: Whether to show a progress bar.

    Returns:
        The rows, 'x' [n, *latent] in the type of the latents.

    Raises:
        ValueError: For no rows, and for an encoder that does not return a latent for each row.
        FloatingPointError: For a latent that is not finite, by the number of its row.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> encode = lambda params, x, *, key=None: params["a"] * x.reshape(len(x), 2, 2).mean(2)
        >>> rows = {"x": np.arange(12.0).reshape(3, 4), "cond": np.arange(3)}
        >>> data.latents(encode, {"a": 2.0}, rows, batch=2, progress=False)["x"].tolist()
        [[1.0, 5.0], [9.0, 13.0], [17.0, 21.0]]

    References:
        Dao, Phung, Nguyen, Tran, *Flow Matching in Latent Space*, 2023, arXiv:2307.08698.
    """
    check_whole("latents", batch=batch)
    rows, n = as_arrays(rows), count(rows)
    if n == 0:
        raise ValueError("latents: expected at least one row, got none")
    batch = min(batch, n)
    run = jax.jit(lambda params, x, key: encode(params, x, key=key))
    starts = range(0, n, batch)
    keys = [None] * len(starts) if key is None else jax.random.split(key, len(starts))
    made = None
    with tqdm(total=n, unit="row", disable=not progress, file=sys.stderr) as bar:
        for start, own_key in zip(starts, keys, strict=True):
            x = np.asarray(rows["x"][start : start + batch])
            z = np.asarray(run(params, _padded(x, batch), own_key))
            if z.shape[:1] != (batch,):
                raise ValueError(
                    f"latents: expected encode to return latents [{batch}, ...] of {batch} rows,"
                    f" got {list(z.shape)}"
                )
            z = z[: len(x)]
            bad = ~np.isfinite(z.reshape(len(z), -1)).all(1)
            if bad.any():
                raise FloatingPointError(
                    f"latents: the latent of row {start + int(bad.argmax())} is not finite"
                )
            if made is None:
                made = np.empty((n, *z.shape[1:]), z.dtype)
            made[start : start + len(x)] = z
            bar.update(len(x))
    assert made is not None  # there is a row
    return {**rows, "x": made}


def standardize_latents(
    decode: Callable[..., Array], params: Params, *, batch: int = 256
) -> Preprocess:
    """Preprocessing of latents to mean 0 and deviation 1 in each channel, whose way back decodes.

        y = (z - shift) scale,    undo: decode(params, y / scale + shift)

    with the mean and the inverse deviation of the training latents, over rows and sites. As the
    preprocessing of an `apps.Experiment` its state lies in every checkpoint, and `jflow sample` and
    `jflow.load` give data rather than latents. `undo` therefore leads from model units to what was
    encoded, and is no inverse of `apply`.

    Args:
        decode: (params, latents [b, *latent]) -> x [b, *event], such as `autoencoder.decode`; it is
            compiled.
        params: Of the decoder.
        batch: Rows that are decoded at once.

    Returns:
        A `Preprocess` of rows with latents 'x' [n, *latent], the channels last, of state {'shift',
        'scale'}, a number for each channel. Its log_det is that of the latents' scaling.

    Raises:
        ValueError: When fitted, for fewer than 2 training rows, and for a channel that is constant
            or not finite, by its number.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> latents = {"x": np.array([[1.0], [3.0]])}
        >>> preprocess = data.standardize_latents(lambda params, z: 10 * z, {})
        >>> state = preprocess.fit(latents)
        >>> y = preprocess.apply(state, latents, None)
        >>> y["x"].tolist(), preprocess.undo(state, y)["x"].tolist()
        ([[-1.0], [1.0]], [[10.0], [30.0]])

    References:
        Rombach, Blattmann, Lorenz, Esser, Ommer, *High-Resolution Image Synthesis with Latent
            Diffusion Models*, 2021, arXiv:2112.10752, for one scale; a shift and a scale for each
            channel are ours.
    """
    check_whole("standardize_latents", batch=batch)
    run = jax.jit(decode)

    def fit(rows):
        z = as_array("x", rows["x"])
        if len(z) < 2:
            raise ValueError(f"standardize_latents needs at least 2 training rows, got {len(z)}")
        axes, size = tuple(range(len(z.shape) - 1)), math.prod(z.shape[:-1])

        def total(of):
            starts = range(0, len(z), batch)
            return sum(np.sum(of(np.asarray(z[i : i + batch])), axes) for i in starts)

        with np.errstate(invalid="ignore", over="ignore"):
            mean = total(lambda part: part.astype(np.float64)) / size
            square = total(lambda part: (part - mean) ** 2) / size
        if not np.isfinite(square).all() or (square <= (1e-6 * mean) ** 2).any():
            where = int((~(np.isfinite(square) & (square > (1e-6 * mean) ** 2))).argmax())
            raise ValueError(
                f"standardize_latents: channel {where} of the training latents is constant or not"
                f" finite: mean {mean[where]:g}, deviation {np.sqrt(square[where]):g}"
            )
        return {"shift": mean.tolist(), "scale": (1 / np.sqrt(square)).tolist()}

    def apply(state, rows, rng):
        z = np.asarray(as_array("x", rows["x"]))
        y = (z - np.asarray(state["shift"])) * np.asarray(state["scale"])
        return {**as_arrays(rows), "x": y.astype(np.result_type(z.dtype, np.float32))}

    def undo(state, rows):
        y = np.asarray(as_array("x", rows["x"]))
        size, made = min(batch, len(y)), []
        for i in range(0, len(y), batch):
            part = y[i : i + batch]
            z = part / np.asarray(state["scale"]) + np.asarray(state["shift"])
            z = _padded(z.astype(y.dtype), size)
            made.append(np.asarray(run(params, z))[: len(part)])
        return {**as_arrays(rows), "x": np.concatenate(made)}

    def log_det(state, rows):
        shape = as_array("x", rows["x"]).shape
        sites = math.prod(shape[1:-1])
        return np.full(shape[0], sites * np.log(np.asarray(state["scale"])).sum())

    return Preprocess(fit, apply, undo, log_det)


def pool_mask(known: Any, factor: int) -> Any:
    """A mask of pixels at the sites of latents: a site is known where all of its pixels are.

    Also known as: inpainting mask in latent space.

    It is 1 less the largest hole of each block, so that no latent counts as known that has read a
    hole in its own block. An encoder of a wider view than a block also reads holes beyond it. The
    code of the paper takes one pixel of each block instead.

        couplings.inpainting(lambda key, z: data.pool_mask(drawn_pixels(key, z), 8))

    Args:
        known: 1 or True where a pixel is known, [b, H, W, c], an array of numpy or jax.
        factor: Pixels of a site, each way; it divides H and W.

    Returns:
        float32 [b, H / factor, W / factor, c], an array as `known` is.

    Raises:
        ValueError: For another shape.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> known = np.ones((1, 4, 4, 1))
        >>> known[0, 0, 3] = 0.0
        >>> data.pool_mask(known, 2)[0, :, :, 0].tolist()
        [[1.0, 0.0], [1.0, 1.0]]

    References:
        Dao, Phung, Nguyen, Tran, *Flow Matching in Latent Space*, 2023, arXiv:2307.08698.
    """
    check_whole("pool_mask", factor=factor)
    if np.ndim(known) != 4:
        raise ValueError(
            f"pool_mask: expected a mask [b, H, W, c] of pixels, got {list(np.shape(known))}"
        )
    return _blocks("pool_mask", known, factor).min((2, 4)).astype(np.float32)


def pool_layout(layout: Any, factor: int, num_classes: int) -> Any:
    """A semantic layout at the sites of latents: the share of each class in the pixels of a site.

    Also known as: semantic map, segmentation map in latent space, semantic-to-image.

        Condition(aligned=data.pool_layout(layout, 8, num_classes))

    Args:
        layout: The class of each pixel, integers [b, H, W], an array of numpy or jax. A number
            outside 0 .. num_classes - 1 is of no class, and counts in no share.
        factor: Pixels of a site, each way; it divides H and W.
        num_classes: How many classes there are.

    Returns:
        float32 [b, H / factor, W / factor, num_classes], an array as `layout` is.

    Raises:
        ValueError: For another shape or type.

    Examples:
        >>> import numpy as np
        >>> from jflow import data
        >>> layout = np.array([[[0, 0, 2, 2], [0, 1, 2, 2]]])
        >>> data.pool_layout(layout, 2, 3)[0, 0].tolist()
        [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]

    References:
        Dao, Phung, Nguyen, Tran, *Flow Matching in Latent Space*, 2023, arXiv:2307.08698.
    """
    check_whole("pool_layout", factor=factor, num_classes=num_classes)
    if np.ndim(layout) != 3 or not np.issubdtype(layout.dtype, np.integer):
        raise ValueError(
            "pool_layout: expected the class of each pixel, integers [b, H, W], got"
            f" {layout.dtype} {list(np.shape(layout))}"
        )
    of_class = layout[..., None] == np.arange(num_classes)[None, None, None]
    return _blocks("pool_layout", of_class, factor).astype(np.float32).mean((2, 4))


def _blocks(name: str, x: Any, factor: int) -> Any:
    """[b, H, W, c] -> [b, H / factor, factor, W / factor, factor, c]."""
    b, h, w, c = x.shape
    if h % factor or w % factor:
        raise ValueError(f"{name}: expected H and W that {factor} divides, got {h} and {w}")
    return x.reshape(b, h // factor, factor, w // factor, factor, c)


def _padded(x: np.ndarray, n: int) -> np.ndarray:
    """x with its last row repeated to n rows, so that one program serves all batches."""
    return np.concatenate([x, np.repeat(x[-1:], n - len(x), axis=0)]) if len(x) < n else x
