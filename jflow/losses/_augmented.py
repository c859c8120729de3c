"""Batch transforms that alter rows: noise added, conditions dropped, sources made anew or mixed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.batch import check_dropped
from jflow._core.checks import (
    check_batch,
    check_cond,
    check_x,
    count_rows,
    frozen_entry,
    like_rows,
    need_key,
    need_pairs,
    need_x,
)
from jflow.types import Array, BatchTransform, NumberOrFunction, PyTree

__all__ = ["annealed_source", "drop_cond", "fresh_source", "noised"]


def noised(std: NumberOrFunction) -> BatchTransform:
    """A batch transform that adds noise to the data, drawn anew each time: x becomes x + std eps.

    eps is standard normal. The density that is learned is that of noisy data; `guidance.denoise`
    takes the noise out of samples again. A std that falls to 0 during training is the noise
    curriculum of JetFormer: the flow learns what is coarse first.

    Also known as: noise augmentation, noise curriculum.

    Args:
        std: The standard deviation of the noise, not negative, in units of the data; or a function
            of the number of updates, frozen['step'], such as a schedule of optax. `count_steps` as
            the refresh of `make_step` advances that.

    Returns:
        The transform (key, batch, frozen=None) -> batch.

    Raises:
        ValueError: For a std below 0, at step 0 where it is a function; at trace time for a key
            that is None, a batch without 'x', and a frozen without 'step' where one is needed.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> noise = losses.noised(lambda step: 0.5 * jnp.maximum(1 - step / 10, 0))
        >>> batch = {"x": jnp.ones((1, 2))}
        >>> noise(jax.random.key(0), batch, {"step": jnp.array(10)})["x"].tolist()  # it has ended
        [[1.0, 1.0]]

    References:
        Zhai et al., *Normalizing Flows are Capable Generative Models*, 2024, arXiv:2412.06329 (std
            0.05 to 0.15 for pixels in [-1, 1]).
        Tschannen, Pinto, Kolesnikov, *JetFormer: An Autoregressive Generative Model of Raw Images
            and Text*, 2024, arXiv:2411.19722, for noise that is annealed.
    """
    with jax.ensure_compile_time_eval():
        first = float(jnp.asarray(std(jnp.int32(0)) if callable(std) else std))
    if not first >= 0:
        raise ValueError(f"noised: expected std >= 0, got {first:g}")

    def transform(key, batch, frozen=None):
        need_key("noised", key)
        check_x("noised", batch)
        x = jnp.asarray(batch["x"])
        at = std(frozen_entry("noised", frozen, "step")) if callable(std) else first
        return {
            **batch,
            "x": x + jnp.asarray(at, x.dtype) * jax.random.normal(key, x.shape, x.dtype),
        }

    return transform


def drop_cond(p: float, *, null: PyTree) -> BatchTransform:
    """A batch transform for classifier-free guidance: cond is dropped with probability p.

    Also known as: label dropout, condition dropout, unconditional dropout.

    Rows are dropped independently. `guidance.cfg` with the same null then guides the trained
    network. `batch['dropped']`, [b] bool, says which rows were dropped; a loss with guidance in its
    target reads it (`mean_flow`, `shortcut`), the others accept it. It comes after what pairs rows
    or makes conditions (`couplings.pair`, `couplings.with_source`), which refuse the other order.

    Args:
        p: The probability in [0, 1].
        null: One row of cond without the batch axis: an integer label, a vector, a pytree of those.
            Parts that are None in a `types.Condition` are kept, as the mask of a picture to fill.

    Returns:
        The transform (key, batch, frozen=None) -> batch.

    Raises:
        ValueError: At construction for p outside [0, 1]; at trace time for a key that is None, a
            batch without 'cond', and a null that is no row of it.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> drop = losses.drop_cond(1.0, null=10)
        >>> batch = drop(jax.random.key(0), {"x": jnp.ones((3, 2)), "cond": jnp.array([1, 2, 3])})
        >>> batch["cond"].tolist(), batch["dropped"].tolist()
        ([10, 10, 10], [True, True, True])

    References:
        Ho, Salimans, *Classifier-Free Diffusion Guidance*, 2022, arXiv:2207.12598.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"drop_cond: expected p in [0, 1], got {p}")

    def transform(key, batch, frozen=None):
        need_key("drop_cond", key)
        need_x("drop_cond", batch)
        n = count_rows("drop_cond", batch["x"])
        check_dropped("drop_cond", batch)
        if batch.get("cond") is None:
            raise ValueError(f"drop_cond: expected 'cond' in batch, got the keys {sorted(batch)}")
        cond = jax.tree.map(jnp.asarray, check_cond("drop_cond", batch["cond"], n))
        dropped = jax.random.bernoulli(key, p, (n,))
        nulls = like_rows("drop_cond", null, cond)
        cond = jax.tree.map(lambda c, z: jnp.where(expand_to(dropped, c), z, c), cond, nulls)
        before = batch.get("dropped")
        return {**batch, "cond": cond, "dropped": dropped if before is None else dropped | before}

    return transform


def fresh_source() -> BatchTransform:
    """A batch transform for synthetic and real rows: unpaired rows get fresh noise as source.

    Where `batch['paired']`, [b] bool, is False, 'x0' is replaced by standard normal noise, drawn
    anew each time. 'paired' is then taken out of the batch. Synthetic rows of x carry the x0 that a
    model made them from; real rows have no partner, and what stands in their x0 is ignored (zeros,
    for example). Real rows inverted along a model's ODE (`solvers.sample` from t0=1 to t1=0) do
    have one.

    Returns:
        The transform (key, batch, frozen=None) -> batch.

    Raises:
        ValueError: At trace time for a key that is None, a batch without 'x0' or 'paired', and a
            'paired' that is not a boolean for each row.

    References:
        Lee, Lin, Fanti, *Improving the Training of Rectified Flows*, 2024, arXiv:2405.20320
            (synthetic and real pairs together).
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
    """A batch transform that mixes the noise of pairs with fresh noise.

    z is standard normal and c = amount(frozen['step']). c = 1 is training on random pairs
    (1-rectified flow), c = 0 reflow on the pairs as they are; the marginals are the same for all c
    where x0 is standard normal. `count_steps` as the refresh of `make_step` advances
    frozen['step']. SlimFlow's annealing reflow is this in front of `losses.flow_matching`;
    `distillation` and `rectified_diffusion` read pairs too.

    Args:
        amount: The step -> c in [0, 1], an optax schedule that falls from 1 to 0, or another
            function. c above 1 makes the loss NaN.

    Returns:
        The transform (key, batch, frozen=None) -> batch.

    Raises:
        ValueError: At construction for an amount(0) outside [0, 1]; at trace time for a batch
            without 'x0', a frozen without 'step', and a key that is None.

    References:
        Zhu, Liu, Liu, *SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow*,
            2024, arXiv:2407.12718.
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
