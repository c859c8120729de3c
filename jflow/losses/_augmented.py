"""Batch transforms that alter rows: data with noise added, conditions left out, sources made anew or mixed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import check_dropped
from jflow._core.checks import (
    check_batch,
    check_cond,
    check_x,
    frozen_entry,
    like_rows,
    need_key,
    need_pairs,
)
from jflow.types import Array, BatchTransform, PyTree

__all__ = ["annealed_source", "drop_cond", "fresh_source", "noised"]


def noised(std: float) -> BatchTransform:
    """x becomes x + std * eps, eps standard normal, drawn anew each time: the density learned is that of noisy data.

    `guidance.denoise` takes the noise out of samples again. Source: Zhai et al., "Normalizing Flows are Capable
    Generative Models", 2024 (std 0.05 to 0.15 for pixels in [-1, 1]).
    """
    if not std >= 0:
        raise ValueError(f"noised: expected std >= 0, got {std}")
    std = float(std)  # a number of numpy's would bring float64 along

    def transform(key, batch, frozen=None):
        need_key("noised", key)
        check_x("noised", batch)
        x = jnp.asarray(batch["x"])
        return {**batch, "x": x + std * jax.random.normal(key, x.shape, x.dtype)}

    return transform


def drop_cond(p: float, *, null: PyTree) -> BatchTransform:
    """cond becomes `null`, one row of it without the batch axis, in each row with probability p, whatever the others do.

    null: an integer label, a vector, a pytree of those. It is what classifier-free guidance trains with: `guidance.cfg` with
    the same null then guides the trained network. 'dropped' [b] bool says which rows were dropped; a loss with guidance in
    its target reads it (`mean_flow`, `shortcut`), the others accept it. It comes after what pairs rows or makes conditions
    (`couplings.pair`, `couplings.with_source`), which refuse the other order.

    Raises ValueError at construction for p outside [0, 1]; at trace time for key=None, a batch without 'cond', and a null
    that is no row of it.
    Source: Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"drop_cond: expected p in [0, 1], got {p}")

    def transform(key, batch, frozen=None):
        need_key("drop_cond", key)
        check_x("drop_cond", batch)
        check_dropped("drop_cond", batch)
        if batch.get("cond") is None:
            raise ValueError(f"drop_cond: expected 'cond' in batch, got the keys {sorted(batch)}")
        n = jnp.shape(batch["x"])[0]
        cond = jax.tree.map(jnp.asarray, check_cond("drop_cond", batch["cond"], n))
        dropped = jax.random.bernoulli(key, p, (n,))
        nulls = like_rows("drop_cond", null, cond)
        cond = jax.tree.map(lambda c, z: jnp.where(expand_to(dropped, c), z, c), cond, nulls)
        before = batch.get("dropped")
        return {**batch, "cond": cond, "dropped": dropped if before is None else dropped | before}

    return transform


def fresh_source() -> BatchTransform:
    """For batches of synthetic and real rows: where 'paired' [b], a boolean of the batch, is False, 'x0' is replaced by
    standard normal noise, drawn anew each time. 'paired' is then taken out of the batch.

    Synthetic rows of x carry the x0 that a model made them from; real rows have no partner, and what stands in their x0
    is ignored (zeros, say). Real rows inverted along a model's ODE (`solvers.sample` from t0=1 to t1=0) do have one.
    Source: Lee, Lin, Fanti, "Improving the Training of Rectified Flows", 2024 (synthetic and real pairs together).
    """

    def transform(key, batch, frozen=None):
        need_key("fresh_source", key)
        check_batch("fresh_source", batch)
        if batch.get("x0") is None or batch.get("paired") is None:
            raise ValueError(
                f"fresh_source: expected 'x0' and 'paired' in batch, got the keys {sorted(batch)}"
            )
        rest = {name: value for name, value in batch.items() if name != "paired"}
        x0, paired = jnp.asarray(batch["x0"]), jnp.asarray(batch["paired"])
        if paired.shape != x0.shape[:1] or paired.dtype != bool:
            raise ValueError(
                f"fresh_source: expected 'paired' of shape {[x0.shape[0]]} and type bool, "
                f"got {list(paired.shape)} and {paired.dtype}"
            )
        noise = jax.random.normal(key, x0.shape, x0.dtype)
        return {**rest, "x0": jnp.where(expand_to(paired, x0), x0, noise)}

    return transform


def annealed_source(amount: Callable[[Array], Array]) -> BatchTransform:
    """Noise of pairs mixed with fresh noise z: 'x0' of the batch becomes sqrt(1 - c^2) x0 + c z, z ~ N(0, I).

    c = amount(frozen['step']) in [0, 1]: 1 is training on random pairs (1-rectified flow), 0 reflow on the pairs as they are;
    the marginals are the same for all of them, for x0 standard normal. amount: any optax schedule that falls from 1 to 0, or
    another function of the step. `count_steps` as the refresh of `make_step` advances frozen['step']. SlimFlow's annealing
    reflow is this in front of `losses.flow_matching`; `distillation` and `rectified_diffusion` read pairs too.

    Errors: ValueError at construction for an amount(0) outside [0, 1], at trace time for a batch without 'x0', a frozen
    without 'step', and key=None. c above 1 makes the loss NaN.
    Source: Zhu, Liu, Liu, "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow", 2024.
    """
    first = float(amount(jnp.zeros((), jnp.int32)))
    if not 0 <= first <= 1:
        raise ValueError(
            f"annealed_source: expected an amount in [0, 1] of every step, got {first} at step 0"
        )

    def transform(key, batch, frozen=None):
        need_key("annealed_source", key)
        need_pairs("annealed_source", batch)
        x0 = jnp.asarray(batch["x0"])
        c = jnp.asarray(amount(frozen_entry("annealed_source", frozen, "step")), float_dtype(x0))
        z = jax.random.normal(key, x0.shape, float_dtype(x0))
        return {**batch, "x0": (jnp.sqrt((1 - c) * (1 + c)) * x0 + c * z).astype(x0.dtype)}

    return transform
