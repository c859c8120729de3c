"""MADE: a perceptron whose outputs see some inputs only."""

import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jflow._core.arrays import float_dtype
from jflow._core.linen import flatten_cond
from jflow.types import Array, Cond


class MADE(nn.Module):
    """MADE: a perceptron whose outputs see some inputs only, a conditioner of autoregressive maps.

    `module(x [b, d], cond=None) -> raw [b, d, size]`, zero at initialization. raw[:, i] depends on
    those `x[:, j]` alone that come before i in `order`, or have `adjacency[i][j]`; give at most one
    of the two. Every output sees cond: None, a float array [b, ...] or a pytree of them.

    A hidden unit stands for one set of inputs, a row of the adjacency, and reads from units of its
    subsets; the sets are spread evenly over the units. Widths below the number of sets, d for an
    order, leave some outputs without some of their inputs, and warn: take a few times d. Units of
    the empty set carry cond to the first of the order, and are constants without one.

    Attributes:
        size: the count of raw numbers for each input, such as the `size` of an `Elementwise`.
        hidden: the widths.
        order: a permutation of 0 .. d-1, what is conditioned on nothing first; None is 0, 1 ...
            d-1.
        adjacency: `[d][d]` booleans, as nested tuples or an array, without cycles; `longest_path`
            counts the passes that the inverse takes.
        activation: smooth by default, so that the density is.
        residual: whether one masked layer to hidden[0] is followed by a residual block of two
            masked layers for each further width (all the same), as in Neural Spline Flows.
        dropout: the rate, on the hidden units; a key switches it on.
        dtype: the type of the computation of the hidden layers; the last one runs in float32 at
            least.

    Raises:
        ValueError: size or a width is below 1, there are both an order and an adjacency, the order
            is no permutation, the adjacency has a cycle, or the widths differ with residual=True.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.MADE(size=2, hidden=(8,))
        >>> raw, variables = net.init_with_output(jax.random.key(0), jnp.zeros((1, 3)))
        >>> raw.shape
        (1, 3, 2)

    References:
        Germain, Gregor, Murray, Larochelle, *MADE: Masked Autoencoder for Distribution Estimation*,
            2015, arXiv:1502.03509.
        Wehenkel, Louppe, *Graphical Normalizing Flows*, 2021, arXiv:2006.02548, for the graphs.
        Durkan, Bekasov, Murray, Papamakarios, *Neural Spline Flows*, 2019, arXiv:1906.04032, for
            the residual form.
    """

    size: int
    hidden: tuple[int, ...] = (128, 128)
    order: tuple[int, ...] | None = None
    adjacency: tuple[tuple[bool, ...], ...] | None = None
    activation: Callable[[Array], Array] = nn.silu
    residual: bool = False
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"MADE: expected size >= 1, got {self.size}")
        hidden = tuple(self.hidden)
        if not hidden or min(hidden) < 1:
            raise ValueError(
                f"MADE: expected at least one hidden width, all positive, got hidden={hidden}"
            )
        if self.residual and len(set(hidden)) > 1:
            raise ValueError(f"MADE: expected equal widths with residual=True, got hidden={hidden}")
        object.__setattr__(self, "hidden", hidden)
        if self.order is not None and self.adjacency is not None:
            raise ValueError("MADE: expected an order or an adjacency, got both")
        if self.order is not None:
            order = tuple(int(i) for i in self.order)
            if sorted(order) != list(range(len(order))):
                raise ValueError(
                    f"MADE: expected order to be a permutation of 0..d-1, got {list(order)}"
                )
            object.__setattr__(self, "order", order)
        if self.adjacency is not None:
            longest_path(self.adjacency)  # checks it
            rows = tuple(tuple(bool(entry) for entry in row) for row in np.asarray(self.adjacency))
            object.__setattr__(self, "adjacency", rows)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, cond: Cond = None) -> Array:
        """Compute the raw numbers.

        Args:
            x: the inputs, [b, d].
            cond: None, floats [b, ...], or a pytree of them; labels are to be embedded first.

        Returns:
            raw [b, d, size], in float32 or better.
        """
        adjacency = self._adjacency(x)
        c = flatten_cond("MADE", cond, x.shape[0])
        sets = np.unique(adjacency, axis=0)
        sets = sets[np.argsort(sets.sum(1), kind="stable")]
        if min(self.hidden) < len(sets):
            warnings.warn(
                f"MADE: hidden={self.hidden} has fewer units than there are sets of inputs to "
                f"depend on, {len(sets)}: some "
                "outputs do not see all of the inputs they may",
                stacklevel=2,
            )
        units = [sets[_spread(len(sets), width, c is not None)] for width in self.hidden]
        mask, h = units[0].T, x
        if c is not None:
            mask, h = (
                np.vstack([mask, np.ones((c.shape[-1], len(units[0])), bool)]),
                jnp.concatenate([h, c], axis=-1),
            )
        h = self._dense(h, mask, "0", self.dtype)
        for i, (before, after) in enumerate(zip(units, units[1:], strict=False), 1):
            inner = self._dense(self._active(h), _subsets(before, after), str(i), self.dtype)
            if self.residual:
                inner = h + self._dense(
                    self._active(inner), _subsets(after, after), f"{i}_out", self.dtype
                )
            h = inner
        head = np.repeat(_subsets(units[-1], adjacency), self.size, axis=1)
        dtype = float_dtype(x)
        raw = self._dense(self._active(h).astype(dtype), head, "head", dtype, zero=True)
        return raw.reshape(*x.shape, self.size)

    def _active(self, h: Array) -> Array:
        return nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(
            self.activation(h)
        )

    def _adjacency(self, x: Array) -> np.ndarray:
        d = x.shape[-1]
        fixed = self.order or self.adjacency
        given = d if fixed is None else len(fixed)
        if x.ndim != 2 or d != given:
            raise ValueError(f"MADE: expected x of shape [b, {given}], got {list(x.shape)}")
        if self.adjacency is not None:
            return np.asarray(self.adjacency)
        rank = np.arange(d) if self.order is None else np.argsort(self.order)
        return rank[:, None] > rank[None, :]

    def _dense(self, h: Array, mask: np.ndarray, name: str, dtype, zero: bool = False) -> Array:
        """h @ (kernel * mask) + bias.

        The kernel starts with a variance that does not depend on how much the mask leaves.
        """

        def draw(key, shape):
            return jax.random.normal(key, shape) / np.sqrt(
                np.maximum(mask.sum(0, keepdims=True), 1)
            )

        kernel = self.param(f"kernel_{name}", nn.initializers.zeros if zero else draw, mask.shape)
        bias = self.param(f"bias_{name}", nn.initializers.zeros, mask.shape[1:])
        h, kernel, bias = nn.dtypes.promote_dtype(h, kernel, bias, dtype=dtype)
        return h @ (kernel * mask.astype(kernel.dtype)) + bias[None]


def longest_path(adjacency: npt.ArrayLike) -> int:
    """The number of inputs on the longest path of a graph of dependences.

    An autoregressive map is inverted exactly by as many passes: d for a full order, 2 for a
    coupling, 1 where nothing depends on anything. The counting is that of the library zuko (Rozet
    et al.).

    Args:
        adjacency: [d, d] booleans, true at `[i][j]` where i depends on j.

    Returns:
        The count, from 1 to d.

    Raises:
        ValueError: the graph has a cycle, or is not a square array of booleans.

    Examples:
        >>> from jflow import nets
        >>> nets.longest_path([[False, False, False], [True, False, False], [True, False, False]])
        2
    """
    graph = np.asarray(adjacency)
    if (
        graph.ndim != 2
        or graph.shape[0] != graph.shape[1]
        or graph.shape[0] < 1
        or graph.dtype != bool
    ):
        raise ValueError(
            f"expected a square adjacency of booleans, got {graph.dtype} {list(graph.shape)}"
        )
    level = np.ones(len(graph), int)
    for _ in range(len(graph)):
        new = 1 + np.max(np.where(graph, level[None, :], 0), axis=1)
        if np.array_equal(new, level):
            return int(level.max())
        level = new
    raise ValueError(f"expected an adjacency without cycles, got {graph.astype(int).tolist()}")


def _spread(sets: int, width: int, with_empty: bool) -> np.ndarray:
    """Which set each unit stands for, [width].

    With fewer units than sets the last is kept, the first on demand.
    """
    if with_empty and 1 < width < sets:
        return np.arange(width) * (sets - 1) // (width - 1)
    return ((np.arange(width) + 1) * sets - 1) // width


def _subsets(inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """[len(inner), len(outer)]: whether row i of `inner` is a subset of row j of `outer`."""
    return inner.astype(int) @ (~outer).T.astype(int) == 0
