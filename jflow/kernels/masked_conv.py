"""A convolution that sees what is above and left of a pixel, and its inverse by wavefront.

The convolution is

    y[i, j] = sum over a < k, b < k of x[i - a, j - b] @ kernel[k - 1 - a, k - 1 - b],

where pixels outside the image are 0. x, y [b, h, w, c], kernel [k, k, c, c] (in, out), of whose
last tap kernel[-1, -1] the upper triangle alone counts. The map is triangular over pixels and
channels: log |det| = h w sum(log |diag kernel[-1, -1]|).

Its inverse knows all pixels of an anti-diagonal i + j = d at once from those before: h + w - 1
steps, not h w. With the last tap D inverted once, u = y D^-1 and taps = kernel D^-1, what is left
is x = u - (earlier pixels) @ taps, one matrix product a step. Its derivatives solve the transposed
system, which is the same wavefront from the opposite corner, and take one correlation for the
kernel: h + w - 1 steps too. They are given to `jax.lax.custom_linear_solve`, so that forward mode
works with every implementation, and so do second derivatives.

Three forms of the wavefront: `wavefront`, plain jax.numpy, which is the reference; a Pallas kernel
for GPUs (Triton), one program an image; a Pallas kernel for TPUs (Mosaic), 128 images in the lanes
and the last diagonals in fast memory. Both kernels are tested in interpret mode, lower for their
platforms, and were compiled ahead of time for an H100 and a TPU v5e; they have not been run or
timed on a device, so that they have to be asked for. On a CPU, where a step costs little, the
reference is about as fast as a loop over pixels (benchmarks/masked_conv.py); fewer steps are what
accelerators need.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow.types import Array

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # JAX 0.12 deprecates it; GPUs have the reference then
    plgpu = None  # type: ignore[assignment]  # a module, where there is one

__all__ = ["choice", "conv", "inverse", "wavefront"]

_FULL = (
    jax.lax.Precision.HIGHEST
)  # accelerators multiply float32 in fewer bits by default; the inverse would not match
# The platforms on which the Pallas kernel has been run and found to be the faster one.
_MEASURED: frozenset[str] = frozenset()
_LANES = 128
_VMEM = (
    8 * 2**20
)  # bytes of the TPU kernel's blocks: half of what a kernel gets without asking for more


def conv(x: Array, kernel: Array) -> Float[Array, "b h w c"]:
    """Convolve an image with a kernel that sees what is above and left of a pixel.

    The formula is that of the module. It is shifted copies of x and one matrix product: XLA's CPU
    backend compiles a convolution inside a scan to a naive one (`nets/_conv.py` has the numbers).

    Args:
        x: the images, [b, h, w, c].
        kernel: [k, k, c, c] (in, out); of the last tap kernel[-1, -1] the upper triangle counts.

    Returns:
        The y [b, h, w, c], in the type of x, computed in float32 or better.

    Raises:
        ValueError: x or kernel has another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import kernels
        >>> kernel = jnp.ones((2, 2, 1, 1))
        >>> kernels.masked_conv.conv(jnp.ones((1, 2, 2, 1)), kernel)[0, ..., 0].tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    _check("masked_conv.conv", x, kernel)
    dtype = float_dtype(x, kernel)
    return _convolve(x.astype(dtype), _masked(kernel.astype(dtype), 0)).astype(x.dtype)


def inverse(
    y: Array, kernel: Array, *, implementation: str | None = None
) -> Float[Array, "b h w c"]:
    """Find the image of which a masked convolution is given, by a wavefront of h + w - 1 steps.

    It is the x with conv(x, kernel) = y. Where the taps but the last one (of kernel D^-1, D the
    last) sum to r < 1 in absolute value, for every output channel, no |x| exceeds max |y D^-1| /
    (1 - r). Else x, and its rounding, may grow exponentially in h + w and overflow on large images.

    Args:
        y: the images, [b, h, w, c].
        kernel: [k, k, c, c] (in, out); of the last tap kernel[-1, -1] the upper triangle counts.
        implementation: 'xla' (the reference), 'pallas' (interpreted where it is not compiled: on
            the CPU), or None: what `choice` says of the platform on which the code is run.

    Returns:
        The x [b, h, w, c], in the type of y, computed in float32 or better.

    Raises:
        ValueError: y or kernel has another shape, implementation is none of the three, or Pallas
            does not take the shape or type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import kernels
        >>> y = jnp.array([[1.0, 2.0], [2.0, 4.0]]).reshape(1, 2, 2, 1)
        >>> kernels.masked_conv.inverse(y, jnp.ones((2, 2, 1, 1)))[0, ..., 0].tolist()
        [[1.0, 1.0], [1.0, 1.0]]

    References:
        Kallappa, Nagar, Varma,
            *FInC Flow: Fast and Invertible k x k Convolutions for Normalizing Flows*, 2023,
            arXiv:2301.09266.
        Nagar, Varma, *Parallel Backpropagation for Inverse of a Convolution with Application to
            Normalizing Flows*, 2025, arXiv:2410.14634.
    """
    _check("masked_conv.inverse", y, kernel)
    dtype = float_dtype(y, kernel)
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(
            "masked_conv.inverse: expected implementation None, 'xla' or 'pallas', got "
            f"{implementation!r}"
        )
    if implementation == "pallas" and (refusal := _refusal(y.shape, dtype, kernel.shape[:2])):
        raise ValueError(
            f"masked_conv.inverse: the Pallas kernel takes {refusal}; use implementation='xla' or "
            "None"
        )
    kernel = _masked(kernel.astype(dtype), 0)

    # a solve for every pixel would take LAPACK many times as long as the wavefront
    divisor = jax.lax.linalg.triangular_solve(kernel[-1, -1], jnp.eye(y.shape[3], dtype=dtype))
    u = jnp.matmul(y.astype(dtype), divisor, precision=_FULL)
    if kernel.shape[:2] == (1, 1):
        return u.astype(y.dtype)
    # the zero makes the taps vary over a mesh axis wherever u does: the solve's derivative would
    # not be summed over it
    taps = jnp.matmul(kernel, divisor, precision=_FULL) + jnp.zeros_like(u, shape=())
    run = partial(_run, implementation)

    def unit_conv(x):
        return x + _convolve(x, _masked(taps, taps.shape[3]))

    def solve(_, u):
        return run(u, taps)

    def solve_transposed(_, g):
        return jnp.flip(run(jnp.flip(g, (1, 2)), taps.swapaxes(2, 3)), (1, 2))

    return jax.lax.custom_linear_solve(unit_conv, u, solve, solve_transposed).astype(y.dtype)


def choice(
    platform: str, shape: Sequence[int], dtype: DTypeLike, size: Sequence[int] = (3, 3)
) -> tuple[str, str]:
    """Say which implementation None means on a platform, and why.

    Args:
        platform: 'cpu', 'cuda', 'rocm' or 'tpu'.
        shape: of y, [b, h, w, c].
        dtype: of y.
        size: of the kernel, (k, k).

    Returns:
        A pair (implementation, reason) of texts.

    Examples:
        >>> from jflow import kernels
        >>> kernels.masked_conv.choice("cpu", (8, 32, 32, 3), "float32")[0]
        'xla'
    """
    if platform == "cpu":
        return "xla", "Pallas is only interpreted on the CPU"
    if refusal := _refusal(shape, dtype, size):
        return "xla", f"the Pallas kernel takes {refusal}"
    if platform not in _MEASURED:
        return (
            "xla",
            f"nobody has timed the Pallas kernel on {platform} yet: ask for it by "
            "implementation='pallas'",
        )
    return "pallas", "one kernel for all diagonals"


def wavefront(
    u: Float[Array, "b h w c"], taps: Float[Array, "rows columns c c"]
) -> Float[Array, "b h w c"]:
    """Solve x = u - (earlier pixels of x) @ taps, diagonal by diagonal: the reference of `inverse`.

    It carries the last diagonals of x, row i of the image in row i of each, and gathers the
    neighbors of all pixels of a diagonal into rows for one matrix product. See `inverse` for an
    example.

    Args:
        u: the images, [b, h, w, c].
        taps: [k, k, c, c] (in, out), the last one left out.

    Returns:
        The x [b, h, w, c].
    """
    if u.shape[1] > u.shape[2]:  # the pixels of a diagonal are padded to the shorter side
        return wavefront(u.swapaxes(1, 2), taps.swapaxes(0, 1)).swapaxes(1, 2)
    _, h, w, _ = u.shape
    earlier, span, above = _earlier(taps)
    matrix = jnp.concatenate([taps[-1 - a, -1 - b] for a, b in earlier])
    column = np.arange(h + w - 1)[:, None] - np.arange(h)[None, :]
    inside = (column >= 0) & (
        column < w
    )  # what lies outside is nobody's neighbor, but must not overflow

    def step(past, now):  # past [span, b, above + h, c], the latest diagonal first
        u_d, inside_d = now
        seen = jnp.concatenate(
            [past[a + b - 1, :, above - a : above - a + h] for a, b in earlier], axis=-1
        )
        x_d = jnp.where(inside_d[None, :, None], u_d - jnp.matmul(seen, matrix, precision=_FULL), 0)
        return jnp.concatenate([jnp.pad(x_d, ((0, 0), (above, 0), (0, 0)))[None], past[:-1]]), x_d

    diagonals = jnp.moveaxis(_skew(u), 2, 0)
    start = jnp.zeros_like(diagonals, shape=(span, u.shape[0], above + h, u.shape[3]))
    _, x = jax.lax.scan(step, start, (diagonals, jnp.asarray(inside)))
    return _unskew(jnp.moveaxis(x, 0, 2), w)


def _run(implementation: str | None, u: Array, taps: Array) -> Array:
    """The wavefront as chosen.

    The platform is known when the code is lowered, not when it is traced.
    """
    if u.shape[1] > u.shape[2]:
        return _run(implementation, u.swapaxes(1, 2), taps.swapaxes(0, 1)).swapaxes(1, 2)
    gpu = wavefront if plgpu is None else _triton
    kernels: dict[str, Callable] = {
        "cpu": partial(_mosaic, interpret=True),
        "cuda": gpu,
        "rocm": gpu,
        "tpu": _mosaic,
    }
    branches: dict[str, Callable] = {
        platform: run
        if (implementation or choice(platform, u.shape, u.dtype, taps.shape[:2])[0]) == "pallas"
        else wavefront
        for platform, run in kernels.items()
    }
    if set(branches.values()) == {wavefront}:
        return wavefront(u, taps)
    return jax.lax.platform_dependent(u, taps, **branches)


def _triton(u: Array, taps: Array, *, interpret: bool = False) -> Array:
    """One program an image, which overwrites u by x in the GPU's memory, diagonal by diagonal."""
    b, h, w, c = u.shape
    earlier, span, above = _earlier(taps)
    rows, channels = (max(16, pl.next_power_of_2(n)) for n in (h, c))  # what Triton's dot takes
    more = channels - c
    skewed = jnp.pad(_skew(u).swapaxes(1, 2), ((0, 0), (span, 0), (above, rows - h), (0, more)))
    near = jnp.pad(
        jnp.stack([taps[-1 - a, -1 - b] for a, b in earlier]), ((0, 0), (0, more), (0, more))
    )

    def program(near_ref, _, x_ref):
        n = pl.program_id(0)

        def step(d, carry):
            x_d = x_ref[n, d, pl.ds(above, rows), :]
            for tap, (i, j) in enumerate(earlier):
                seen = x_ref[n, d - i - j, pl.ds(above - i, rows), :]
                x_d -= jnp.dot(seen, near_ref[tap], precision=_FULL)
            x_ref[n, d, pl.ds(above, rows), :] = x_d
            if not interpret:
                # The next diagonal is read by other threads than wrote this one.
                plgpu.debug_barrier()
            return carry

        jax.lax.fori_loop(span, span + h + w - 1, step, 0)

    x = pl.pallas_call(
        program,
        jax.eval_shape(lambda: skewed),
        grid=(b,),
        input_output_aliases={1: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(near, skewed)
    return _unskew(x[:, span:, above : above + h, :c].swapaxes(1, 2), w)


def _mosaic(u: Array, taps: Array, *, interpret: bool = False) -> Array:
    """Images in the lanes, rows in the sublanes, channels by scalars.

    The grid walks over blocks of images and diagonals.

    The last diagonals stay in scratch memory, a ring of them, behind rows of zeros.
    """
    b, h, w, c = u.shape
    earlier, span, above = _earlier(taps)
    block = min(b, _LANES)
    images = -(-b // block) * block
    diagonals = jnp.pad(_skew(u).transpose(2, 3, 1, 0), ((0, 0), (0, 0), (0, 0), (0, images - b)))
    near = jnp.stack([taps[-1 - i, -1 - j] for i, j in earlier])

    def program(near_ref, u_ref, x_ref, past_ref):
        d = pl.program_id(1)

        @pl.when(d == 0)
        def _():
            past_ref[...] = jnp.zeros_like(past_ref)

        def channel(k, x_d):
            for tap, (i, j) in enumerate(earlier):
                seen = past_ref[(d + span - i - j) % span, k, above - i : above - i + h, :]
                x_d = [x - near_ref[tap, k, out] * seen for out, x in enumerate(x_d)]
            return x_d

        x_d = jax.lax.fori_loop(0, c, channel, [u_ref[0, out] for out in range(c)])
        for out in range(c):
            x_ref[0, out] = x_d[out]
            past_ref[d % span, out, above : above + h, :] = x_d[out]

    slab = pl.BlockSpec((1, c, h, block), lambda n, d: (d, 0, 0, n))
    x = pl.pallas_call(
        program,
        jax.eval_shape(lambda: diagonals),
        grid=(images // block, h + w - 1),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), slab],
        out_specs=slab,
        scratch_shapes=[pltpu.VMEM((span, c, above + h, block), diagonals.dtype)],
        interpret=interpret,
    )(near, diagonals)
    return _unskew(x[..., :b].transpose(3, 2, 0, 1), w)


def _refusal(shape, dtype, size) -> str | None:
    """What the Pallas kernels take, where y of this shape and type is something else."""
    _, h, w, c = shape
    h, span, taps = min(h, w), sum(size) - 2, size[0] * size[1] - 1
    rows, channels = (max(16, pl.next_power_of_2(n)) for n in (h, c))
    if jnp.dtype(dtype) != jnp.float32:
        return f"float32, got {jnp.dtype(dtype).name}"
    if (
        c > 64 or rows * channels**2 * taps > 2**19
    ):  # the products are unrolled: compilation takes minutes beyond
        products = rows * channels**2 * taps
        return f"up to 2^19 products a diagonal and 64 channels, got {products} and {c}"
    if (needed := 4 * _LANES * c * (span * (h + max(size) - 1) + 4 * h)) > _VMEM:
        return f"up to {_VMEM} bytes of fast memory, got {needed}"
    return None


def _convolve(x: Array, kernel: Array) -> Array:
    b, h, w, c = x.shape
    rows, columns = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), (rows - 1, 0), (columns - 1, 0), (0, 0)))
    seen = [padded[:, i : i + h, j : j + w] for i in range(rows) for j in range(columns)]
    flat = jnp.concatenate(seen, axis=-1).reshape(b * h * w, rows * columns * c)
    return jnp.matmul(flat, kernel.reshape(-1, c), precision=_FULL).reshape(x.shape)


def _masked(kernel: Array, diagonal: int) -> Array:
    """The kernel with its last tap upper triangular from that diagonal on."""
    kept = np.ones(kernel.shape, bool)
    kept[-1, -1] = np.triu(kept[-1, -1], diagonal)
    return jnp.where(kept, kernel, 0)


def _earlier(taps: Array) -> tuple[list[tuple[int, int]], int, int]:
    """The offsets (rows up, columns left) of the neighbors of a pixel, and how far they reach back.

    The last two numbers are diagonals and rows.
    """
    rows, columns = taps.shape[:2]
    offsets = [(a, b) for a in range(rows) for b in range(columns) if a + b]
    return offsets, rows + columns - 2, rows - 1


def _skew(u: Array) -> Array:
    """[b, h, w, c] -> [b, h, h + w - 1, c]: row i moved i to the right.

    An anti-diagonal becomes a column.
    """
    b, h, w, c = u.shape
    flat = jnp.pad(u, ((0, 0), (0, 0), (0, h), (0, 0))).reshape(b, h * (w + h), c)
    return flat[:, : h * (w + h - 1)].reshape(b, h, h + w - 1, c)


def _unskew(x: Array, w: int) -> Array:
    b, h, slanted, c = x.shape
    flat = jnp.pad(x.reshape(b, h * slanted, c), ((0, 0), (0, h), (0, 0)))
    return flat.reshape(b, h, w + h, c)[:, :, :w]


def _check(name: str, x: Array, kernel: Array) -> None:
    if (
        x.ndim != 4
        or kernel.ndim != 4
        or kernel.shape[2:] != (x.shape[3],) * 2
        or 0 in kernel.shape
    ):
        raise ValueError(
            f"{name}: expected x [b, h, w, c] and a kernel [k, k, c, c], got {list(x.shape)} and "
            f"{list(kernel.shape)}"
        )
