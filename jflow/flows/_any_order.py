"""One network for every conditional of a mixed row: categories and numbers, in any order."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jflow._core.checks import check_whole, need_key
from jflow._core.linen import apply_linen, init_linen
from jflow._core.seeds import generator
from jflow.bijectors import splines
from jflow.types import Array

__all__ = ["AnyOrder", "MixedRows", "Within", "any_order"]

_BOUND = 5.0  # of the splines, in standard deviations of the base
_KNOTS, _WIDTH = np.linspace(-3.0, 3.0, 13, retstep=True)  # of the ramps that encode numbers
_LEAST_MASS = 1e-30


class MixedRows(NamedTuple):
    """Rows whose columns are codes, numbers, or either.

    Attributes:
        code: [b, d], the code of each cell, from 0. In a column with numbers the last code means
            that the cell is a number.
        value: [b, d], the numbers; what stands beside another code is not read.
    """

    code: Int[Array | np.ndarray, "b d"]
    value: Float[Array | np.ndarray, "b d"]


class Within(NamedTuple):
    """What each cell of a sample may be.

    Attributes:
        codes: [..., d, K] bool, the codes that are allowed; K is the largest number of codes of a
            column.
        low: [..., d], the least number that is allowed.
        high: [..., d], the largest.
    """

    codes: Bool[Array | np.ndarray, "... d K"]
    low: Float[Array | np.ndarray, "... d"]
    high: Float[Array | np.ndarray, "... d"]


class AnyOrder(NamedTuple):
    """A distribution of mixed rows that knows every conditional.

    Attributes:
        init: `init(key, rows) -> params`.
        conditionals: `conditionals(params, rows, rank, *, key=None) -> [b, d]`, in nats,
            log p(x_j | the columns of the row with a lower rank) for every column j. rank [b, d]
            are whole numbers from 0 to d - 1; columns of one rank do not see each other. A key
            switches dropout on.
        ranks: [orders, d], the ranks of the columns in the orders that the density averages.
        log_prob: `log_prob(params, rows, observed=None) -> [b]`, log p(the other cells | the
            observed ones) in nats.
        sample: `sample(params, key, rows, observed, within=None, first=None) -> (rows, log_mass)`:
            the rows with the cells that are not observed drawn anew, one after another. `within`
            restricts each draw; `first` [d] bool names columns to draw before the others, from left
            to right. log_mass [b, d] is the log-probability that a draw without the restriction
            would have met it, 0 in observed cells.
    """

    init: Any
    conditionals: Any
    ranks: np.ndarray
    log_prob: Any
    sample: Any


class _Heads(nn.Module):
    """(rows, rank) -> the logits of each column's codes [b, d, K] and what the splines and scales
    of numbers are made of [b, columns with numbers, size].

    A masked perceptron whose units have degrees 0, ..., d - 1: a unit of degree m sees the columns
    of a rank below m, units see units of no higher degree, and the column of rank r reads the units
    of degrees up to r."""

    starts: tuple[int, ...]
    total: int
    most: int
    numbers: tuple[int, ...]
    size: int
    width: int
    num_blocks: int
    dropout: float

    @nn.compact
    def __call__(self, rows: MixedRows, rank):
        d, numbers, width = len(self.starts), np.array(self.numbers, int), self.width
        degree = np.arange(width) * d // width
        passes = degree[:, None] <= degree[None]
        table = self.param("codes", nn.initializers.normal(d**-0.5), (self.total + d, width))
        seen = table[rows.code + np.array(self.starts)[None]]  # [b, d, width]
        if len(numbers):
            z = rows.value[:, numbers]
            ramps = jnp.clip((z[..., None] - _KNOTS[None, None, :-1]) / _WIDTH, 0.0, 1.0)
            features = jnp.concatenate([ramps, jnp.clip(z, -8.0, 8.0)[..., None]], -1)
            embed = self.param(
                "numbers",
                nn.initializers.normal((d * 4) ** -0.5),
                (len(numbers), len(_KNOTS), width),
            )
            seen = seen.at[:, numbers].add(jnp.einsum("bnf,nfw->bnw", features, embed))
        hidden = table[self.total :][None]
        h = jnp.where(rank[..., None] < degree[None, None], seen, hidden).sum(1)
        for i in range(self.num_blocks):
            r = _masked(self, f"in_{i}", nn.gelu(h), passes, 1.0)
            r = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(nn.gelu(r))
            h = h + _masked(self, f"out_{i}", r, passes, 0.1)
        h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(nn.gelu(h))
        h = jnp.where(degree[None, None] <= rank[..., None], h[:, None], 0.0)  # [b, d, width]
        small = nn.initializers.normal(1e-2 * width**-0.5)
        logits = jnp.einsum("bdw,dwk->bdk", h, self.param("logits", small, (d, width, self.most)))
        logits = logits + self.param("logits_bias", nn.initializers.zeros, (d, self.most))[None]
        shape = (len(numbers), width, self.size)
        raw = jnp.einsum("bnw,nwr->bnr", h[:, numbers], self.param("raw", small, shape))
        return logits, raw + self.param("raw_bias", nn.initializers.zeros, shape[::2])[None]


def _masked(module: nn.Module, name: str, x: Array, passes: np.ndarray, gain: float) -> Array:
    width = len(passes)
    scale = nn.initializers.normal(gain * (2 / width) ** 0.5)
    kernel = module.param(name, scale, (width, width))
    bias = module.param(f"{name}_bias", nn.initializers.zeros, (width,))
    return x @ jnp.where(passes, kernel, 0.0) + bias[None]


def any_order(
    codes: Sequence[int],
    numbers: Sequence[bool],
    *,
    width: int = 512,
    num_blocks: int = 2,
    bins: int = 16,
    dropout: float = 0.0,
    orders: int = 4,
) -> AnyOrder:
    """A distribution of rows with codes and numbers, given any of their cells.

    One masked network reads a row and an order of its columns, and gives for each column its
    distribution given the columns before it: probabilities of its codes and, where the column has
    numbers, a monotone rational-quadratic spline behind a shift and a scale that carries the number
    to a normal base. A number may have codes beside it, for values of a probability of their own (a
    missing value, no rain). The chain rule over an order s gives the density of a row,

        p_s(x) = prod_j p(x_s(j) | x_s(1), ..., x_s(j - 1)),

    in one evaluation, and the model is the mean of p_s over `orders` fixed random orders. Given
    some columns, they come first in the order. Train it with `losses.any_order_nll`, for all orders
    at once. Log-densities are with respect to counting measure for codes and to length for numbers.

    The conditionals are learned, one network for all; they are those of one joint distribution only
    as far as the network has learned them.

    Also known as: order-agnostic autoregressive model, arbitrary conditional density, MADE of mixed
    columns.

    Args:
        codes: How many codes each column has beside numbers.
        numbers: Whether each column has numbers. A column without them has at least one code.
        width: Of the masked network, which spreads it over the d places of an order.
        num_blocks: How many residual blocks it has.
        bins: Of each spline.
        dropout: The rate, where `conditionals` gets a key.
        orders: How many orders the density averages.

    Returns:
        The distribution, an `AnyOrder`. Numbers should be standardized.

    Raises:
        ValueError: For lists of unequal length, and a column with neither codes nor numbers.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> model = flows.any_order([2, 0], [False, True], width=8, num_blocks=1)
        >>> rows = flows.MixedRows(jnp.array([[1, 0]]), jnp.array([[0.0, 0.3]]))
        >>> params = model.init(jax.random.key(0), rows)
        >>> observed = jnp.array([[True, False]])  # the number, given the code
        >>> model.log_prob(params, rows, observed).shape
        (1,)
        >>> model.sample(params, jax.random.key(1), rows, observed)[0].code.tolist()
        [[1, 0]]

    References:
        Uria, Murray, Larochelle, *A Deep and Tractable Density Estimator*, 2014, arXiv:1310.1757.
        Germain, Gregor, Murray, Larochelle, *MADE: Masked Autoencoder for Distribution Estimation*,
            2015, arXiv:1502.03509.
        Gorishniy, Rubachev, Babenko, *On Embeddings for Numerical Features in Tabular Deep
            Learning*, 2022, arXiv:2203.05556, for the encoding of numbers by ramps.
    """
    name, d = "any_order", len(codes)
    check_whole(name, width=width, num_blocks=num_blocks, bins=bins, orders=orders)
    if not d or len(numbers) != d:
        raise ValueError(
            f"{name}: expected codes and numbers of the same length, at least 1, got {d} and"
            f" {len(numbers)}"
        )
    sizes = np.array([k + bool(has) for k, has in zip(codes, numbers, strict=True)])
    if sizes.min() < 1:
        raise ValueError(f"{name}: column {int(sizes.argmin())} has neither codes nor numbers")
    total, most, starts = int(sizes.sum()), int(sizes.max()), np.cumsum(sizes) - sizes
    with_numbers = np.flatnonzero(np.asarray(numbers, bool))
    place = np.zeros(d, int)  # of a column among those with numbers
    place[with_numbers] = np.arange(len(with_numbers))
    has_numbers = np.asarray(numbers, bool)
    ranks = np.argsort(
        np.stack([generator(name, i).permutation(d) for i in range(orders)])
    )  # [orders, d]: when each column comes
    heads = _Heads(
        tuple(starts.tolist()),
        total,
        most,
        tuple(with_numbers.tolist()),
        2 + 3 * bins + splines.IDENTITY.extra,  # shift, log-scale, spline
        width,
        num_blocks,
        dropout,
    )
    possible = np.arange(most) < sizes[:, None]

    def check(rows, observed):
        if not isinstance(rows, MixedRows) or rows.code.shape[1:] != (d,):
            raise ValueError(f"{name}: expected MixedRows of shape [b, {d}], got {_shapes(rows)}")
        if observed is not None and observed.shape != rows.code.shape:
            raise ValueError(
                f"{name}: expected observed of shape {list(rows.code.shape)}, got"
                f" {list(observed.shape)}"
            )

    def is_number(code):
        return has_numbers[None] & (code == sizes[None] - 1)

    def outputs(params, rows, rank, key=None):
        rows = rows._replace(value=jnp.where(is_number(rows.code), rows.value, 0.0))
        logits, raw = apply_linen(heads, params, rows, rank, key=key)
        return jax.nn.log_softmax(jnp.where(possible[None], logits, -jnp.inf)), raw

    def init(key, rows):
        check(rows, None)
        rows = MixedRows(jnp.asarray(rows.code), jnp.asarray(rows.value))
        return init_linen(heads, key, rows, jnp.zeros(rows.code.shape, int))

    def conditionals(params, rows, rank, *, key=None):
        check(rows, rank)
        log_codes, raw = outputs(params, rows, rank, key)
        log_prob = jnp.take_along_axis(log_codes, rows.code[..., None], -1)[..., 0]
        if not len(with_numbers):
            return log_prob
        here = is_number(rows.code)[:, with_numbers]
        z = jnp.where(here, rows.value[:, with_numbers], 0.0)
        u, log_slope = _to_base(z, raw)
        density = jnp.where(here, jax.scipy.stats.norm.logpdf(u) + log_slope, 0.0)
        return log_prob.at[:, with_numbers].add(density)

    def log_prob(params, rows, observed=None):
        observed = jnp.zeros(rows.code.shape, bool) if observed is None else observed
        check(rows, observed)

        def of_order(rank):
            terms = conditionals(params, rows, _observed_first(observed, rank[None]))
            return jnp.where(observed, 0.0, terms).sum(-1)

        return jax.nn.logsumexp(jax.lax.map(of_order, ranks), axis=0) - np.log(orders)

    def sample(params, key, rows, observed, within=None, first=None):
        check(rows, observed)
        need_key(name, key)
        b = len(rows.code)
        order_key, key = jax.random.split(key)
        rank = jnp.asarray(ranks)[jax.random.randint(order_key, (b,), 0, orders)]
        if first is not None:
            rank = jnp.where(jnp.asarray(first)[None], np.arange(d)[None] - d, rank)
        rank = _observed_first(observed, rank)
        order = jnp.argsort(rank, -1)
        if within is not None:
            within = Within(
                jnp.broadcast_to(within.codes, (b, d, most)),
                jnp.broadcast_to(within.low, (b, d)),
                jnp.broadcast_to(within.high, (b, d)),
            )

        def draw(when, carry):
            rows, seen, log_mass = carry
            column = order[:, when]
            code_key, value_key = jax.random.split(jax.random.fold_in(key, when))
            log_codes, raw = outputs(params, rows, rank)
            log_codes = _of_column(log_codes, column)  # [b, K]
            low, high = jnp.full(b, -jnp.inf), jnp.full(b, jnp.inf)
            if len(with_numbers):
                raw = _of_column(raw, jnp.asarray(place)[column])
            if within is not None:
                allowed = _of_column(within.codes, column)
                log_codes = jnp.where(allowed, log_codes, -jnp.inf)
                if len(with_numbers):
                    low, _ = _to_base(_of_column(within.low, column), raw)
                    high, _ = _to_base(_of_column(within.high, column), raw)
                    inside = jax.scipy.stats.norm.cdf(high) - jax.scipy.stats.norm.cdf(low)
                    number = jnp.asarray(np.where(has_numbers, sizes - 1, most))[column]
                    cost = jnp.log(jnp.maximum(inside, _LEAST_MASS))[:, None]
                    log_codes = log_codes + jnp.where(
                        np.arange(most)[None] == number[:, None], cost, 0.0
                    )
            mass = jax.nn.logsumexp(log_codes, -1)
            code = jax.random.categorical(code_key, log_codes)
            now = ~seen & (np.arange(d)[None] == column[:, None])
            value = rows.value
            if len(with_numbers):
                u = jnp.clip(jax.random.truncated_normal(value_key, low, high), low, high)
                z = _from_base(u, raw)
                if within is not None:
                    z = jnp.clip(z, _of_column(within.low, column), _of_column(within.high, column))
                value = jnp.where(now, z[:, None], value)
            rows = MixedRows(jnp.where(now, code[:, None], rows.code), value)
            return rows, seen | now, jnp.where(now, mass[:, None], log_mass)

        code, value = jnp.asarray(rows.code), jnp.asarray(rows.value)
        start = MixedRows(code, value), observed, jnp.zeros_like(value)
        rows, _, log_mass = jax.lax.fori_loop(observed.sum(-1).min(), d, draw, start)
        return rows, log_mass

    return AnyOrder(init, conditionals, ranks, log_prob, sample)


def _observed_first(observed, rank):
    """Ranks 0, ..., d - 1 [b, d] in the order of `rank`, the observed columns before the others."""
    d = observed.shape[1]
    return jnp.argsort(jnp.argsort(jnp.where(observed, rank - 2 * d, rank), -1), -1)


def _shapes(rows):
    return [list(jnp.shape(leaf)) for leaf in jax.tree.leaves(rows)]


def _of_column(x, column):
    """x [b, d, ...] at one column of each row."""
    column = column.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, column, 1)[:, 0]


def _shift_and_scale(raw):
    return raw[..., 0], 6.0 * jnp.tanh(raw[..., 1] / 6.0), raw[..., 2:]


def _to_base(z: Array, raw: Array) -> tuple[Array, Array]:
    shift, log_scale, raw = _shift_and_scale(raw)
    u, log_slope = splines.rational_quadratic((z - shift) * jnp.exp(-log_scale), raw, bound=_BOUND)
    return u, log_slope - log_scale


def _from_base(u: Array, raw: Array) -> Array:
    shift, log_scale, raw = _shift_and_scale(raw)
    z, _ = splines.rational_quadratic_inverse(u, raw, bound=_BOUND)
    return z * jnp.exp(log_scale) + shift
