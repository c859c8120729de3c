"""Where in an image an edit acts: masks made of its attention to words, by FluxSpace and ReFlex.

The weights are those of networks whose attention sees the tokens of the text first and those of the
image after them (`nets.MMDiT`, `nets.Flux`), as `capture` reads them at sites ':weights'.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow.types import Array

__all__ = ["edit_region", "otsu_threshold", "word_attention", "word_mask"]


def word_attention(
    weights: Float[Array, "*lead heads n m"], text: int, tokens: Sequence[int]
) -> Float[Array, "*lead patches"]:
    """How much of its attention to a text each patch of an image pays to some words of it.

        mean over heads and words of  w_word / (sum over the text of w)

    These are the weights of a softmax over the text alone.

    Args:
        weights: the weights of attention, [..., heads, n, m], of whose n queries and m keys the
            first `text` are those of the text.
        text: how many tokens the text has.
        tokens: the words, by their index in the text.

    Returns:
        The mean weights, [..., n - text], in [0, 1]; 0 for a patch that pays none to the text.

    Raises:
        ValueError: tokens are not indices of the text.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> of_patch = jnp.array([0.1, 0.3, 0.6])  # to two words, and to itself
        >>> weights = jnp.broadcast_to(of_patch, (1, 3, 3))
        >>> round(float(steering.word_attention(weights, 2, [1])[0]), 3)  # 0.3 / (0.1 + 0.3)
        0.75
    """
    chosen = word_indices("steering.word_attention", tokens, text)
    weights = weights[..., text:, :text].astype(float_dtype(weights))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    share = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
    return jnp.mean(share[..., chosen], axis=(-3, -1))


def word_mask(
    text: int, tokens: Sequence[int], *, threshold: float = 0.5, sharpness: float = 10.0
) -> Callable[[Array], Array]:
    """FluxSpace's mask: the patches of an image that attend most to some words.

        a = word_attention(weights),    s = sigmoid(sharpness ((a - min a) / (max a - min a) - 1/2))

    of an image; the mask is 1 where s >= threshold, elsewhere 0, and 0 at the tokens of the text.
    With threshold 0 it is 1 at all patches; 1/2 is half-way between the least and the most
    attention.

    Args:
        text: how many tokens of text come before those of the image.
        tokens: the words, by their index in the text.
        threshold: in [0, 1].
        sharpness: of the sigmoid, above 0.

    Returns:
        A function of weights [..., heads, n, m] -> [..., n], for `fluxspace(mask=...)`.

    Raises:
        ValueError: tokens are not indices of the text, threshold is outside [0, 1], or sharpness is
            not above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> to_words = jnp.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])  # of 4 tokens
        >>> weights = jnp.pad(to_words, ((0, 0), (0, 2)))[None]  # none to the image
        >>> steering.word_mask(2, [1])(weights).tolist()  # the second patch attends to the word
        [0.0, 0.0, 0.0, 1.0]

    References:
        Dalva, Venkatesh, Yanardag, *FluxSpace: Disentangled Semantic Editing in Rectified Flow
            Transformers*, 2024, arXiv:2412.09611. The text of its section on masks was not at hand:
            the formula is that of an implementation by others, with the paper's threshold.
    """
    name = "steering.word_mask"
    word_indices(name, tokens, text)
    if not 0 <= threshold <= 1 or not sharpness > 0:
        raise ValueError(
            f"{name}: expected threshold in [0, 1] and sharpness > 0, got {threshold}, {sharpness}"
        )

    def mask(weights):
        a = word_attention(weights, text, tokens)
        low, high = (f(a, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
        scaled = jnp.where(high > low, (a - low) / jnp.where(high > low, high - low, 1), 0)
        chosen = jax.nn.sigmoid(sharpness * (scaled - 0.5)) >= threshold
        none = jnp.zeros((*a.shape[:-1], text), bool)
        return jnp.concatenate([none, chosen], axis=-1).astype(a.dtype)

    return mask


def otsu_threshold(x: Float[Array, "b *event"], bins: int = 64) -> Float[Array, " b"]:
    """The threshold that separates the numbers of each row best into low and high ones.

        the edge of a bin with the largest  n_low n_high (mean_low - mean_high)^2

    of the histogram between the least and the largest number, whose bins are at their centers.

    Also known as: Otsu's method.

    Args:
        x: the numbers, [b, *event].
        bins: of the histogram, at least 2.

    Returns:
        The thresholds, [b], in the units of x; the first edge where several are the best.

    Raises:
        ValueError: bins is below 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> x = jnp.array([[0.0, 1.0, 2.0, 6.0, 7.0, 8.0]])
        >>> steering.otsu_threshold(x, bins=8).tolist()  # all edges from 3 to 6 part it alike
        [3.0]

    References:
        Otsu, *A Threshold Selection Method from Gray-Level Histograms*, 1979.
    """
    check_whole("steering.otsu_threshold", 2, bins=bins)
    flat = x.reshape(len(x), -1).astype(float_dtype(x))
    low, high = jnp.min(flat, axis=1), jnp.max(flat, axis=1)
    width = (high - low) / bins
    safe = jnp.where(width > 0, width, 1)[:, None]
    at = jnp.clip(jnp.floor((flat - low[:, None]) / safe), 0, bins - 1).astype(int)
    counts = jnp.sum(jax.nn.one_hot(at, bins, dtype=flat.dtype), axis=1)
    centers = jnp.arange(bins, dtype=flat.dtype)[None] + 0.5  # in widths above the least
    n_low, sum_low = jnp.cumsum(counts, axis=1), jnp.cumsum(counts * centers, axis=1)
    n_high, sum_high = n_low[:, -1:] - n_low, sum_low[:, -1:] - sum_low
    n_low, n_high = n_low[:, :-1], n_high[:, :-1]  # an edge after each bin but the last
    apart = sum_low[:, :-1] / jnp.maximum(n_low, 1) - sum_high[:, :-1] / jnp.maximum(n_high, 1)
    best = jnp.argmax(n_low * n_high * apart**2, axis=1)
    return low + width * (best + 1)


def edit_region(
    text: int,
    tokens: Sequence[int],
    size: tuple[int, int],
    *,
    patch: int,
    blur: float = 2.0,
    dilation: int = 3,
    bins: int = 64,
) -> Callable[[Mapping[str, Array]], Array]:
    """ReFlex's mask: the region of an image that attends to some words.

    The attention to the words (`word_attention`), in the mean over sites and depths, is blurred by
    a normal law of standard deviation `blur` patches, cut off at 2.5 of them, 0 outside the image;
    the region is where it is above `otsu_threshold`, and `dilation` pixels around that, counted
    along rows and columns.

    Args:
        text: how many tokens of text come before those of the image.
        tokens: the words, by their index in the text.
        size: the height and the width of the images, in pixels.
        patch: the side of a patch, `net.patch_size`.
        blur: in patches, at least 0.
        dilation: in pixels, at least 0.
        bins: of the histogram of `otsu_threshold`.

    Returns:
        A function of features {site: weights [..., b, heads, n, m]} -> [b, H, W, 1], 1 in the
        region and 0 outside, for `reflex(mask=...)`.

    Raises:
        ValueError: tokens are not indices of the text, patch does not divide the size, blur or
            dilation is negative, or bins is below 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> to_word = jnp.array([0.0, 0.1, 0.1, 0.2, 0.9])  # of the word itself and of 4 patches
        >>> to_others = jnp.broadcast_to((1 - to_word[:, None]) / 4, (5, 4))
        >>> weights = jnp.concatenate([to_word[:, None], to_others], axis=1)[None, None]
        >>> region = steering.edit_region(1, [0], (2, 2), patch=1, blur=0.0, dilation=0)
        >>> region({"blocks:weights": weights}).shape
        (1, 2, 2, 1)

    References:
        Kim, Park, Song, Kwak, Rhee, *ReFlex: Text-Guided Editing of Real Images in Rectified Flow
            via Mid-Step Feature Extraction and Attention Adaptation*, 2025, arXiv:2507.01496; the
            mask as in its code. It enlarges the map before the threshold, by cubics.
    """
    name = "steering.edit_region"
    word_indices(name, tokens, text)
    check_whole(name, patch=patch)
    check_whole(name, 0, dilation=dilation)
    check_whole(name, 2, bins=bins)
    height, width = size
    if height % patch or width % patch or not blur >= 0:
        raise ValueError(
            f"{name}: expected a size that is divisible by patch={patch} and blur >= 0, got"
            f" {height} x {width} and {blur}"
        )
    rows, columns = height // patch, width // patch

    def region(features):
        maps = [word_attention(weights, text, tokens) for weights in features.values()]
        maps = [m.reshape(-1, *m.shape[-2:]).mean(0) for m in maps]
        a = jnp.mean(jnp.stack(maps), axis=0).reshape(-1, rows, columns)
        of_rows, of_columns = (jnp.asarray(_blurring(n, blur), a.dtype) for n in (rows, columns))
        a = jnp.einsum("ih,bhw,jw->bij", of_rows, a, of_columns)
        chosen = a > otsu_threshold(a, bins)[:, None, None]
        chosen = jnp.repeat(jnp.repeat(chosen, patch, axis=1), patch, axis=2)
        for _ in range(dilation):
            p = jnp.pad(chosen, ((0, 0), (1, 1), (1, 1)))
            beside = p[:, :-2, 1:-1] | p[:, 2:, 1:-1] | p[:, 1:-1, :-2] | p[:, 1:-1, 2:]
            chosen = chosen | beside
        return chosen[..., None].astype(a.dtype)

    return region


def word_indices(name: str, tokens: Sequence[int], text: int | None = None) -> np.ndarray:
    """tokens as indices of words, below text where it is known."""
    chosen = np.asarray(tokens, int)
    below = np.inf if text is None else text
    if chosen.ndim != 1 or not len(chosen) or chosen.min() < 0 or chosen.max() >= below:
        among = "" if text is None else f" below {text}"
        raise ValueError(f"{name}: expected tokens to be indices of words{among}, got {tokens}")
    return chosen


def _blurring(n: int, scale: float) -> np.ndarray:
    """The matrix [n, n] of a blur along an axis, with zeros beyond its ends."""
    if scale == 0:
        return np.eye(n)
    reach = int(np.ceil(2.5 * scale))
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * scale**2))
    apart = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    return np.where(apart <= reach, np.exp(-(apart**2) / (2 * scale**2)), 0) / kernel.sum()
