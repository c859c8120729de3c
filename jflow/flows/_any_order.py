"""One network for every conditional of a mixed row: categories and numbers, in any order."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_key, check_whole, need_key
from jflow._core.nouns import compiled
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
        rank: [d], the place of each column in the order that the density takes.
        log_prob: `log_prob(params, rows, observed=None) -> [b]`, log p(the other cells | the
            observed ones) in nats.
        sample: `sample(params, key, rows, observed, within=None, rank=None) -> (rows, log_mass)`:
            the rows with the cells that are not observed drawn anew, one after another by `rank`
            [d] or [b, d]; None has the observed columns first and the others in the order of the
            density. `within` restricts each draw. log_mass [b, d] is the log-probability, given
            the columns of a lower rank, of an observed cell, and of others that a draw without the
            restriction would have met it.
    """

    init: Any
    conditionals: Any
    rank: np.ndarray
    log_prob: Any
    sample: Any


class _Net(NamedTuple):
    """A masked perceptron as functions of its params.

    Its units have degrees 0, ..., d - 1: a unit of degree m sees the columns of a rank below m,
    units see units of no higher degree, and the column of rank r reads the units of degrees up to
    r. The number of units grows with the degree, since only those of the highest see all that the
    last column depends on.

    init: (key) -> params. units: (params, rows, rank, key) -> the last layer's units [b, width].
    outputs: (params, units) -> the logits of each column's codes [b, d, K], and what the splines
    and scales of numbers are made of [b, columns with numbers, size]. start, advance: the units one
    degree after another, as the columns of a row become known."""

    init: Any
    units: Any
    outputs: Any
    start: Any
    advance: Any


def _net(sizes, numbers, size: int, width: int, num_blocks: int, dropout: float) -> _Net:
    d, most, total = len(sizes), int(sizes.max()), int(sizes.sum())
    starts, degree = np.cumsum(sizes) - sizes, _degrees(d, width)
    begins, block = np.searchsorted(degree, np.arange(d)), int((degree == d - 1).sum())
    width, passes = len(degree), degree[:, None] <= degree[None]
    layers = [(f"in_{i}", f"out_{i}") for i in range(num_blocks)]

    def init(key):
        shapes = {
            "codes": ((total, width), d**-0.5),
            "unknown": ((d, width), d**-0.5),
            "logits": ((d, width, most), 1e-2 * width**-0.5),
        }
        if len(numbers):
            shapes["numbers"] = (len(numbers), len(_KNOTS), width), (4 * d) ** -0.5
            shapes["raw"] = (len(numbers), width, size), 1e-2 * width**-0.5
        for enter, leave in layers:
            shapes[enter] = (width, width), (2 / width) ** 0.5
            shapes[leave] = (width, width), 0.1 * (2 / width) ** 0.5
        keys = jax.random.split(key, len(shapes))
        params = {
            name: {"kernel": scale * jax.random.normal(k, shape)}
            for k, (name, (shape, scale)) in zip(keys, shapes.items(), strict=True)
        }
        for name in shapes.keys() - {"codes", "unknown", "numbers"}:
            params[name]["bias"] = jnp.zeros(params[name]["kernel"][..., :1, :].shape)
        return params

    def entry(params, rows, rank, at, n):
        """What the units at, ..., at + n - 1 see of the columns [b, n]."""

        def part(name):
            return jax.lax.dynamic_slice_in_dim(params[name]["kernel"], at, n, -1)

        seen = part("codes")[rows.code + starts[None]]
        if len(numbers):
            z = rows.value[:, numbers]
            ramps = jnp.clip((z[..., None] - _KNOTS[None, None, :-1]) / _WIDTH, 0.0, 1.0)
            features = jnp.concatenate([ramps, jnp.clip(z, -8.0, 8.0)[..., None]], -1)
            seen = seen.at[:, numbers].add(jnp.einsum("bnf,nfw->bnw", features, part("numbers")))
        degrees = jax.lax.dynamic_slice_in_dim(jnp.asarray(degree), at, n)
        below = rank[..., None] < degrees[None, None]
        return jnp.where(below, seen, part("unknown")[None]).sum(1)

    def units(params, rows, rank, key=None):
        keys = None if key is None or not dropout else jax.random.split(key, num_blocks + 1)

        def dropped(x, i):
            if keys is None:
                return x
            return jnp.where(jax.random.bernoulli(keys[i], 1 - dropout, x.shape), x, 0.0) / (
                1 - dropout
            )

        def masked(x, layer):
            return x @ jnp.where(passes, layer["kernel"], 0.0) + layer["bias"]

        h = entry(params, rows, rank, 0, width)
        for i, (enter, leave) in enumerate(layers):
            r = nn.gelu(masked(nn.gelu(h), params[enter]))
            h = h + masked(dropped(r, i), params[leave])
        return dropped(nn.gelu(h), num_blocks)

    def outputs(params, h):
        """h: the units that each column reads [b, d, width], or that all read [b, width]."""

        def times(columns, layer):
            form = "bw,dwk->bdk" if columns.ndim == 2 else "bdw,dwk->bdk"
            return jnp.einsum(form, columns, layer["kernel"]) + layer["bias"].swapaxes(0, 1)

        logits = times(h, params["logits"])
        if not len(numbers):
            return logits, jnp.zeros_like(logits, shape=(len(logits), 0, size))
        return logits, times(h if h.ndim == 2 else h[:, numbers], params["raw"])

    def start(b, dtype):
        return [jnp.zeros((b, width), dtype) for _ in range(2 * num_blocks + 1)]

    def advance(params, rows, rank, m, known):
        """`known` with the units of degree m, which need the columns of a rank below m. As many are
        computed as the highest degree has; those of higher degrees are left 0."""
        at, known = jnp.asarray(begins)[m], list(known)
        here = jax.lax.dynamic_slice_in_dim(jnp.asarray(degree), at, block) == m

        def put(i, x):
            known[i] = jax.lax.dynamic_update_slice_in_dim(known[i], jnp.where(here, x, 0.0), at, 1)

        def masked(x, layer):
            part = (
                jax.lax.dynamic_slice_in_dim(layer[k], at, block, 1) for k in ("kernel", "bias")
            )
            kernel, bias = part
            return x @ kernel + bias  # the units of higher degrees are still 0

        h = entry(params, rows, rank, at, block)
        for i, (enter, leave) in enumerate(layers):
            put(2 * i, nn.gelu(h))
            put(2 * i + 1, nn.gelu(masked(known[2 * i], params[enter])))
            h = h + masked(known[2 * i + 1], params[leave])
        put(-1, nn.gelu(h))
        return known

    return _Net(init, units, outputs, start, advance)


def any_order(
    codes: Sequence[int],
    numbers: Sequence[bool],
    *,
    width: int = 384,
    num_blocks: int = 2,
    bins: int = 16,
    dropout: float = 0.0,
    order: Sequence[int] | None = None,
) -> AnyOrder:
    """A distribution of rows with codes and numbers, given any of their cells.

    One masked network reads a row and an order of its columns, and gives for each column its
    distribution given the columns before it: probabilities of its codes and, where the column has
    numbers, a monotone rational-quadratic spline behind a shift and a scale that carries the number
    to a normal base. A number may have codes beside it, for values of a probability of their own (a
    missing value, no rain). The chain rule over an order s gives the density of a row,

        p(x) = prod_j p(x_s(j) | x_s(1), ..., x_s(j - 1)),

    in one evaluation. Given some columns, they come first in the order. Train it with
    `losses.any_order_nll`, for all orders at once. Log-densities are with respect to counting
    measure for codes and to length for numbers.

    The conditionals are learned, one network for all; they are those of one joint distribution only
    as far as the network has learned them.

    Also known as: order-agnostic autoregressive model, arbitrary conditional density, MADE of mixed
    columns.

    Args:
        codes: How many codes each column has beside numbers.
        numbers: Whether each column has numbers. A column without them has at least one code.
        width: Of the masked network, which spreads it over the d places of an order, up to three
            times as many units for the last as for the first.
        num_blocks: How many residual blocks it has.
        bins: Of each spline.
        dropout: The rate, where `conditionals` gets a key.
        order: The columns in the order of the density, a permutation of 0, ..., d - 1; None takes
            them from left to right. What is left to say of a column when all others are known is
            learned best where it comes last.

    Returns:
        The distribution, an `AnyOrder`. Numbers should be standardized.

    Raises:
        ValueError: For lists of unequal length, a column with neither codes nor numbers, and an
            order that is no permutation of the columns.

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
    check_whole(name, width=width, num_blocks=num_blocks, bins=bins)
    if not d or len(numbers) != d:
        raise ValueError(
            f"{name}: expected codes and numbers of the same length, at least 1, got {d} and"
            f" {len(numbers)}"
        )
    sizes = np.array([k + bool(has) for k, has in zip(codes, numbers, strict=True)])
    if sizes.min() < 1:
        raise ValueError(f"{name}: column {int(sizes.argmin())} has neither codes nor numbers")
    most = int(sizes.max())
    with_numbers = np.flatnonzero(np.asarray(numbers, bool))
    place = np.zeros(d, int)  # of a column among those with numbers
    place[with_numbers] = np.arange(len(with_numbers))
    has_numbers = np.asarray(numbers, bool)
    if order is not None and sorted(order) != list(range(d)):
        raise ValueError(
            f"{name}: expected order to be a permutation of 0 to {d - 1}, got {list(order)}"
        )
    fixed = np.argsort(np.arange(d) if order is None else np.array(order))
    size = 2 + 3 * bins + splines.IDENTITY.extra  # shift, log-scale, spline
    net = _net(sizes, with_numbers, size, width, num_blocks, dropout)
    degree = _degrees(d, width)
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

    def without_other_numbers(rows):
        code, value = jnp.asarray(rows.code), jnp.asarray(rows.value)
        return MixedRows(code, jnp.where(is_number(code), value, 0.0))

    def init(key, rows):
        check(rows, None)
        check_key(name, key)
        dtype = float_dtype(rows.value)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), net.init(key))

    def conditionals(params, rows, rank, *, key=None):
        check(rows, rank)
        rows = without_other_numbers(rows)
        units = net.units(params, rows, rank, key)
        reads = degree[None, None] <= rank[..., None]
        logits, raw = net.outputs(params, jnp.where(reads, units[:, None], 0.0))
        log_codes = jax.nn.log_softmax(jnp.where(possible[None], logits, -jnp.inf))
        log_prob = jnp.take_along_axis(log_codes, rows.code[..., None], -1)[..., 0]
        if not len(with_numbers):
            return log_prob
        here = is_number(rows.code)[:, with_numbers]
        u, log_slope = _to_base(rows.value[:, with_numbers], raw)
        density = jnp.where(here, jax.scipy.stats.norm.logpdf(u) + log_slope, 0.0)
        return log_prob.at[:, with_numbers].add(density)

    def log_prob(params, rows, observed=None):
        observed = jnp.zeros(rows.code.shape, bool) if observed is None else observed
        check(rows, observed)

        terms = conditionals(params, rows, _observed_first(observed, fixed[None]))
        return jnp.where(observed, 0.0, terms).sum(-1)

    def sample(params, key, rows, observed, within=None, rank=None):
        check(rows, observed)
        need_key(name, key)
        b = len(rows.code)
        if rank is None:
            rank = _observed_first(observed, fixed[None])
        rank = jnp.broadcast_to(rank, (b, d))
        columns = jnp.argsort(rank, -1)
        if within is not None:
            within = Within(
                jnp.broadcast_to(within.codes, (b, d, most)),
                jnp.broadcast_to(within.low, (b, d)),
                jnp.broadcast_to(within.high, (b, d)),
            )

        def draw(when, carry):
            rows, known, log_mass = carry
            column = columns[:, when]
            code_key, value_key = jax.random.split(jax.random.fold_in(key, when))
            known = net.advance(params, rows, rank, when, known)
            logits, raw = net.outputs(params, known[-1])  # each row draws another column
            logits = jnp.where(jnp.asarray(possible)[column], _of_column(logits, column), -jnp.inf)
            log_codes = jax.nn.log_softmax(logits)  # [b, K]
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
            now = ~observed & (np.arange(d)[None] == column[:, None])
            value = rows.value
            if len(with_numbers):
                u = jnp.clip(jax.random.truncated_normal(value_key, low, high), low, high)
                z = _from_base(u, raw)
                if within is not None:
                    z = jnp.clip(z, _of_column(within.low, column), _of_column(within.high, column))
                value = jnp.where(now, z[:, None], value)
            rows = MixedRows(jnp.where(now, code[:, None], rows.code), value)
            rows = without_other_numbers(rows)  # a number beside another code is never read
            return rows, known, jnp.where(now, mass[:, None], log_mass)

        rows = without_other_numbers(rows)
        zeros = jnp.zeros_like(rows.value)
        start = rows, net.start(b, zeros.dtype), zeros
        rows, _, log_mass = jax.lax.fori_loop(0, d, draw, start)
        return rows, jnp.where(observed, conditionals(params, rows, rank), log_mass)

    return compiled(AnyOrder(init, conditionals, fixed, log_prob, sample))


def _degrees(d, width):
    """The degrees of at least `width` units, in order: d + 2 m parts of degree m."""
    parts = d + 2 * np.arange(d)
    return np.repeat(np.arange(d), -(-width * parts // parts.sum()))


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
