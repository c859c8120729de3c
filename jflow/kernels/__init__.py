"""Kernels, a module each: a Pallas version beside its plain jax.numpy reference, one signature.

The version is chosen by platform, shape and type. `choice` of each module says which one None
means, and why; `explain` puts it in a line.
"""

from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jflow._core.names import explain_unknown
from jflow.kernels import affine, columns, logistic_mixture, masked_conv, rational_quadratic

__all__ = ["affine", "columns", "explain", "logistic_mixture", "masked_conv", "rational_quadratic"]

explain_unknown(__name__)


def explain(
    kernel: ModuleType,
    shape: Sequence[int],
    dtype: DTypeLike = jnp.float32,
    platform: str | None = None,
) -> str:
    """Say which implementation of a kernel runs, and why.

    Args:
        kernel: a module of `jflow.kernels`, such as `kernels.rational_quadratic`.
        shape: of the largest operand of the kernel, as its `choice` says.
        dtype: of that operand.
        platform: 'cpu', 'cuda', 'rocm' or 'tpu'; None is that of the first device.

    Returns:
        One line of text.

    Examples:
        >>> from jflow import kernels
        >>> line = kernels.explain(kernels.rational_quadratic, (23, 8, 4096), platform="cpu")
        >>> line.split(": ")[0]
        'rational_quadratic of float32[23, 8, 4096] on cpu'
    """
    if platform is None:
        platform = jax.devices()[0].platform
        platform = "cuda" if platform == "gpu" else platform
    name, reason = kernel.choice(platform, tuple(shape), dtype)
    operand = f"{jnp.dtype(dtype).name}{list(shape)}"
    return f"{kernel.__name__.rpartition('.')[2]} of {operand} on {platform}: {name} ({reason})"
