"""Losses of altered batches: data with noise added, conditions left out."""

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to
from jflow._core.checks import check_cond, check_x, like_rows, need_key
from jflow.types import Loss, PyTree

__all__ = ["drop_cond", "noised"]


def noised(loss: Loss, std: float) -> Loss:
    """`loss` of x + std * eps, eps standard normal, drawn anew each time: the density learned is that of noisy data.

    `guidance.denoise` takes the noise out of samples again. Source: Zhai et al., "Normalizing Flows are Capable
    Generative Models", 2024 (std 0.05 to 0.15 for pixels in [-1, 1]).
    """
    if not std >= 0:
        raise ValueError(f"noised: expected std >= 0, got {std}")

    def augmented(params, key, batch, frozen=None):
        need_key("noised", key)
        check_x("noised", batch)
        noise_key, loss_key = jax.random.split(key)
        x = jnp.asarray(batch["x"])
        x = x + std * jax.random.normal(noise_key, x.shape, x.dtype)
        return loss(params, loss_key, {**batch, "x": x}, frozen)

    return augmented


def drop_cond(loss: Loss, drop: float, *, null: PyTree) -> Loss:
    """`loss` with cond replaced by `null`, one row of it without the batch axis, at each row with probability `drop`.

    What classifier-free guidance trains with. Source: Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022.
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop_cond: expected drop in [0, 1], got {drop}")

    def dropping(params, key, batch, frozen=None):
        need_key("drop_cond", key)
        check_x("drop_cond", batch)
        if batch.get("cond") is None:
            raise ValueError(f"drop_cond: expected 'cond' in batch, got the keys {sorted(batch)}")
        drop_key, loss_key = jax.random.split(key)
        n = jnp.shape(batch["x"])[0]
        cond = jax.tree.map(jnp.asarray, check_cond("drop_cond", batch["cond"], n))
        dropped = jax.random.bernoulli(drop_key, drop, (n,))
        nulls = like_rows("drop_cond", null, cond)
        cond = jax.tree.map(lambda c, z: jnp.where(expand_to(dropped, c), z, c), cond, nulls)
        return loss(params, loss_key, {**batch, "cond": cond}, frozen)

    return dropping
