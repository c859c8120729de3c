"""Scalar maps of many raw numbers each, in one pass over memory.

Couplings spend their time on them.

The layout is columns: x [d, n] holds the d numbers of n rows, raw [size, d, n] their raw numbers.
The long axis comes last, so that vector units work along it whatever d and size are, and a sum over
bins is a sum of whole arrays. The matrix product of a head can write raw in this order as well as
in any other (`bijectors.coupling` does).

A map is written once, on arrays of one shape, and run by two implementations: 'xla', on whole
arrays, and 'pallas', block by block with every intermediate in registers. Both read raw once, add
up the log-slopes of a column on the way, and go back by a hand-written rule from (x, raw, y) alone:
nothing of size [size, d, n] but raw and its gradient reaches memory. Forward mode and second
derivatives go through the reference, see `_pullback`.

The Pallas kernels (Triton on GPUs, Mosaic on TPUs) are tested in interpret mode and lower for both;
they have not been run on a device, so that they have to be asked for.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Float

from jflow._core.pullback import with_pullback
from jflow.types import Array, Elementwise

try:
    from jax.experimental.pallas import triton
except ImportError:  # jax says that it will go; GPUs then get 'xla'
    triton = None  # type: ignore[assignment]  # a module, where there is one

__all__ = ["Column", "choice", "run", "with_columns"]

# Platforms on which the Pallas kernels have been run and were faster: None takes them there.
_MEASURED: frozenset[str] = frozenset()

_LANES = 128  # columns of a block: the lanes of a TPU, four warps of a GPU
# Bytes of raw in a block: a TPU holds four such in its fast memory, inputs and outputs, twice each.
_BLOCK = 2**20


class Column(NamedTuple):
    """A scalar map as kernels see it, on arrays of any one shape.

    Attributes:
        size: the count of raw numbers of one number.
        apply: the function (x [...], raw) -> (y [...], log_slope [...]); raw is an array
            [size, ...], or a list of `size` arrays in a Pallas kernel.
        pullback: the function (x, raw, y, y_bar, log_slope_bar) -> (x_bar, parts) of cotangents;
            the parts joined are like raw.
    """

    size: int
    apply: Callable
    pullback: Callable


def by_autodiff(apply: Callable) -> Callable:
    """A `pullback` for maps of so few raw numbers that their derivative needs no thought."""

    def pullback(x, raw, y, y_bar, log_slope_bar):
        del y
        x_bar, raw_bar = jax.vjp(apply, x, list(raw))[1]((y_bar, log_slope_bar))
        return x_bar, (raw_bar,)

    return pullback


def with_columns(
    transformer: Elementwise, kernel: Callable, implementation: str | None
) -> Elementwise:
    """Give a scalar map a kernel as its columns, of which the map is the reference.

    Args:
        transformer: the scalar map.
        kernel: the function (x [d, n], raw [size, d, n], inverse=, implementation=, reference=) ->
            (y, log_det), such as `kernels.rational_quadratic.transform`.
        implementation: 'xla', 'pallas', None for the choice of the kernel, or 'plain' for no
            columns at all.

    Returns:
        Elementwise: the map with its columns.

    Raises:
        ValueError: implementation is none of the four.
    """
    if implementation not in (None, "xla", "pallas", "plain"):
        raise ValueError(
            f"expected implementation None, 'xla', 'pallas' or 'plain', got {implementation!r}"
        )
    if implementation == "plain":
        return transformer

    def columns(inverse):
        def reference(x, raw):
            y, log_slope = getattr(transformer, "inverse" if inverse else "forward")(
                x, jnp.moveaxis(raw, 0, -1)
            )
            return y.astype(x.dtype), jnp.sum(log_slope, axis=0).astype(x.dtype)

        return jax.jit(
            partial(kernel, inverse=inverse, implementation=implementation, reference=reference)
        )

    return transformer._replace(columns=(columns(False), columns(True)))


def run(
    column: Column,
    x: Array,
    raw: Array,
    implementation: str | None = None,
    reference: Callable | None = None,
) -> tuple[Float[Array, "d n"], Float[Array, " n"]]:
    """Run a scalar map on columns of numbers, and add up their log-slopes.

    Args:
        column: the map.
        x: the numbers, [d, n].
        raw: their raw numbers, [size, d, n], of the type of x.
        implementation: 'xla', 'pallas' (interpreted on the CPU), or None: what `choice` says of the
            platform it runs on.
        reference: the same function of (x, raw), which forward mode differentiates. None is 'xla'
            itself, whose many small operations take longer to trace.

    Returns:
        A pair (y [d, n], the sum of the log-slopes over d [n], in nats), both in the type of x and
            raw.

    Raises:
        ValueError: x or raw has another shape, or implementation is none of the three.
        TypeError: x and raw differ in type, are no floats, or are of a type that Pallas does not
            take.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.kernels import columns
        >>> def apply(x, raw):
        ...     return x + raw[0], jnp.zeros_like(x)
        >>> def pullback(x, raw, y, y_bar, log_slope_bar):
        ...     return y_bar, (y_bar[None],)
        >>> shift = columns.Column(1, apply, pullback)
        >>> columns.run(shift, jnp.ones((1, 2)), jnp.full((1, 1, 2), 3.0))[0].tolist()
        [[4.0, 4.0]]
    """
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(
            f"kernels: expected implementation None, 'xla' or 'pallas', got {implementation!r}"
        )
    if x.ndim != 2 or raw.shape != (column.size, *x.shape):
        raise ValueError(
            f"kernels: expected x [d, n] and raw [{column.size}, d, n], got {list(x.shape)} and "
            f"{list(raw.shape)}"
        )
    if x.dtype != raw.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"kernels: expected x and raw of one floating type, got {x.dtype} and {raw.dtype}"
        )
    if implementation == "pallas" and (refusal := _refusal(x.dtype)):
        raise TypeError(f"kernels: {refusal}; use implementation='xla' or None")
    implementation = "xla" if x.size == 0 else implementation  # Pallas has no grid of no blocks
    return _differentiable(column, implementation, reference)(x, raw)


def choice(platform: str, shape: Sequence[int], dtype: DTypeLike) -> tuple[str, str]:
    """Say which implementation None means on a platform, and why.

    Args:
        platform: 'cpu', 'cuda', 'rocm' or 'tpu'.
        shape: of raw, [size, d, n].
        dtype: of x and raw.

    Returns:
        A pair (implementation, reason) of texts.

    Raises:
        ValueError: shape has not three axes.

    Examples:
        >>> from jflow.kernels import columns
        >>> columns.choice("cpu", (23, 8, 4096), "float32")[0]
        'xla'
    """
    if len(shape) != 3:
        raise ValueError(f"kernels: expected the shape of raw, [size, d, n], got {list(shape)}")
    if platform == "cpu":
        return "xla", "Pallas is only interpreted on the CPU"
    if refusal := _refusal(dtype, platform):
        return "xla", refusal
    if platform in _MEASURED:
        return "pallas", f"faster than XLA on {platform}"
    return (
        "xla",
        f"nobody has timed the Pallas kernel on {platform}: ask for it by implementation='pallas'",
    )


def _refusal(dtype, platform: str | None = None) -> str | None:
    if platform in ("cuda", "rocm") and triton is None:
        return "this jax has no Triton, which the Pallas kernels need on GPUs"
    if jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16, jnp.float16):
        return None
    return f"the Pallas kernels take float32, bfloat16 and float16, not {jnp.dtype(dtype).name}"


def _differentiable(
    column: Column, implementation: str | None, reference: Callable | None
) -> Callable:
    xla = partial(_xla_apply, column)

    def apply(x, raw):
        return _dispatch(implementation, xla, partial(_pallas_apply, column), x, raw)

    def pullback(args, outputs, cotangents):
        args = (*args, outputs[0], *cotangents)
        return _dispatch(
            implementation, partial(_xla_pull, column), partial(_pallas_pull, column), *args
        )

    return with_pullback(apply, pullback, reference=jax.jit(reference or xla))


def _dispatch(implementation, xla, pallas, x, raw, *rest):
    """As asked for; else by the platform, which is known when the code is lowered, not when it is
    traced.
    """
    platforms = ("cpu", "cuda", "rocm", "tpu")
    names = {p: implementation or choice(p, raw.shape, raw.dtype)[0] for p in platforms}
    if set(names.values()) == {"xla"}:
        return xla(x, raw, *rest)
    gpu_too = platforms if triton is not None else ("cpu", "tpu")
    branches = {
        p: partial(pallas, p) if name == "pallas" and p in gpu_too else xla
        for p, name in names.items()
    }
    return jax.lax.platform_dependent(x, raw, *rest, **branches)


def _xla_apply(column, x, raw):
    y, log_slope = column.apply(x, raw)
    return y, jnp.sum(log_slope, axis=0)


def _xla_pull(column, x, raw, y, y_bar, log_det_bar):
    x_bar, parts = column.pullback(x, raw, y, y_bar, jnp.broadcast_to(log_det_bar[None], x.shape))
    return x_bar, jnp.concatenate(
        [jnp.stack(part) if isinstance(part, list | tuple) else part for part in parts]
    )


def _pallas_apply(column, platform, x, raw):
    def kernel(x_ref, raw_ref, y_ref, log_det_ref):
        def rows(at, inside, total):
            y, log_slope = column.apply(
                _read(x_ref, at), [_read(raw_ref, j, at) for j in range(column.size)]
            )
            y_ref[at, :] = y.astype(y_ref.dtype)
            return total + jnp.sum(jnp.where(inside, log_slope, 0), axis=0, keepdims=True)

        log_det_ref[0] = _over_rows(x_ref, x.shape[0], platform, rows).astype(log_det_ref.dtype)

    n, wide, grid, block = _blocks(platform, x, raw)
    x, raw = wide(x), wide(raw)
    out = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((grid[1], 1, x.shape[1]), _inner(x.dtype)),
    )
    y, log_det = _call(
        kernel, platform, grid, (block(), block(column.size)), (block(), block(None)), out
    )(x, raw)
    return y[:, :n], jnp.sum(log_det[:, 0, :n], axis=0).astype(x.dtype)


def _pallas_pull(column, platform, x, raw, y, y_bar, log_det_bar):
    def kernel(x_ref, raw_ref, y_ref, y_bar_ref, log_det_bar_ref, x_bar_ref, raw_bar_ref):
        def rows(at, inside, total):
            x = _read(x_ref, at)
            raw = [_read(raw_ref, j, at) for j in range(column.size)]
            log_slope_bar = jnp.broadcast_to(_read(log_det_bar_ref, slice(None)), x.shape)
            x_bar, parts = column.pullback(
                x, raw, _read(y_ref, at), _read(y_bar_ref, at), log_slope_bar
            )
            x_bar_ref[at, :] = x_bar.astype(x_bar_ref.dtype)
            for j, raw_bar in enumerate(row for part in parts for row in part):
                raw_bar_ref[j, at, :] = raw_bar.astype(raw_bar_ref.dtype)
            return total

        _over_rows(x_ref, x.shape[0], platform, rows)

    n, wide, grid, block = _blocks(platform, x, raw)
    x, raw, y, y_bar, log_det_bar = (
        wide(x),
        wide(raw),
        wide(y),
        wide(y_bar),
        wide(log_det_bar[None]),
    )
    ins = (
        block(),
        block(column.size),
        block(),
        block(),
        pl.BlockSpec((1, _LANES), lambda i, k: (0, i)),
    )
    out = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(raw.shape, raw.dtype))
    x_bar, raw_bar = _call(kernel, platform, grid, ins, (block(), block(column.size)), out)(
        x, raw, y, y_bar, log_det_bar
    )
    return x_bar[:, :n], raw_bar[:, :, :n]


def _blocks(platform, x, raw):
    """(n, a function that pads columns to whole blocks, the grid over blocks of columns and rows,
    block specs).
    """
    d, n = x.shape
    step = _step(platform)
    rows = max(
        step,
        min(-(-d // step), _BLOCK // (raw.dtype.itemsize * raw.shape[0] * _LANES * step)) * step,
    )
    grid = (-(-n // _LANES), -(-d // rows))

    def wide(array):
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, grid[0] * _LANES - n)])

    def block(size=0):
        """Of x (size 0), of raw, or (None) of one row of partial sums for each block of rows."""
        if size is None:
            return pl.BlockSpec((1, 1, _LANES), lambda i, k: (k, 0, i))
        if size == 0:
            return pl.BlockSpec((rows, _LANES), lambda i, k: (k, i))
        return pl.BlockSpec((size, rows, _LANES), lambda i, k: (0, k, i))

    return n, wide, grid, block


def _call(kernel, platform, grid, in_specs, out_specs, out_shape):
    params = triton.CompilerParams(num_warps=4) if platform in ("cuda", "rocm") else None
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=params,
        interpret=platform == "cpu",
    )


def _step(platform) -> int:
    """Rows at a time: a TPU's vectors have eight of 128 lanes, a GPU's threads one each."""
    return 8 if platform == "tpu" else 1


def _over_rows(x_ref, d: int, platform, rows):
    """Fold rows(at, inside, total) over the rows of a block that lie within x.

    total [1, lanes] starts at zero.
    """
    step, height = _step(platform), x_ref.shape[0]
    left = d - pl.program_id(1) * height

    def some(i, total):
        inside = step * i + jax.lax.broadcasted_iota(jnp.int32, (step, _LANES), 0) < left
        return rows(pl.ds(step * i, step), inside, total)

    count = jax.lax.div(jnp.minimum(height, left) + (step - 1), jnp.int32(step))
    return jax.lax.fori_loop(0, count, some, jnp.zeros((1, _LANES), _inner(x_ref.dtype)))


def _read(ref, *at):
    return ref[(*at, slice(None))].astype(_inner(ref.dtype))


def _inner(dtype):
    """What is computed in: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def each(row: Callable, count: int, *rows, shared) -> tuple:
    """A tuple of parts, each of them rows: row(j, *rows[j], shared) for every j < count.

    row gives a tuple of arrays [...]. On arrays this is a loop, so that XLA computes `shared` once;
    on lists, as in a Pallas kernel, it is unrolled.
    """
    if not isinstance(rows[0], list):
        return jax.lax.map(
            lambda of_j: row(*of_j, shared), (jnp.arange(count, dtype=rows[0].dtype), *rows)
        )
    parts = zip(
        *(row(j, *of_j, shared) for j, *of_j in zip(range(count), *rows, strict=True)), strict=True
    )
    return tuple(map(list, parts))


def exponentials(rows):
    """exp(row - the largest of all rows) of each row.

    An array is taken at once, since XLA would find the largest again for each of a list.
    """
    top = rows[0]
    for j in range(1, len(rows)):
        top = jnp.maximum(top, rows[j])
    return (
        [jnp.exp(row - top) for row in rows]
        if isinstance(rows, list)
        else jnp.exp(rows - top[None])
    )
