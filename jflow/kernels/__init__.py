"""Kernels, a module each: a Pallas version beside its plain jax.numpy reference, one signature, chosen by platform, shape
and type. `choice` of each module says which one None means, and why; `explain` puts it in a line."""

from types import ModuleType

import jax
import jax.numpy as jnp

from jflow.kernels import affine, columns, logistic_mixture, masked_conv, rational_quadratic

__all__ = ["affine", "columns", "explain", "logistic_mixture", "masked_conv", "rational_quadratic"]


def explain(kernel: ModuleType, shape, dtype=jnp.float32, platform: str | None = None) -> str:
    """Which implementation runs, and why: explain(kernels.rational_quadratic, (23, 8, 4096)).

    shape, dtype: of the kernel's largest operand, as its `choice` says; platform: 'cpu', 'cuda', 'rocm' or 'tpu', by default
    that of the first device.
    """
    if platform is None:
        platform = jax.devices()[0].platform
        platform = "cuda" if platform == "gpu" else platform
    name, reason = kernel.choice(platform, tuple(shape), dtype)
    return f"{kernel.__name__.rpartition('.')[2]} of {jnp.dtype(dtype).name}{list(shape)} on {platform}: {name} ({reason})"
