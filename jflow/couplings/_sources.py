"""Data-dependent couplings: the source is made from its own data row, by a `Source` (key, x1, cond) -> (x0, cond)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to
from jflow._core.checks import check_whole, check_x, need_key
from jflow.types import Array, BatchTransform, Cond, Key, Velocity

DataSource = Callable[
    [Key, Array, Cond], tuple[Array, Cond]
]  # (key, x1 [b, *event], cond) -> (x0 like x1, cond)
Mask = Callable[
    [Key, Array], Array
]  # (key, x1) -> 1 where known, 0 where not; [b, *event] or 1 in place of an axis


def with_source(source: DataSource) -> BatchTransform:
    """The batch transform that makes 'x0' and 'cond' by source(key, x, cond), new at every step.

    In front of any loss that takes 'x0': losses.chain(couplings.with_source(source), losses.flow_matching(velocity)). No
    `pair` comes beside it: the data-dependent pairs are the coupling. Sampling starts from the same source:
    `source(key, known, cond)[0]`.

    Raises ValueError for key=None, a batch with an 'x0' of its own or with conditions that were dropped already, and an x0
    that is not shaped like x.
    Source: Albergo, Goldstein, Boffi, Ranganath, Vanden-Eijnden, "Stochastic Interpolants with Data-Dependent Couplings",
    2024.
    """

    def transform(key, batch, frozen=None):
        need_key("with_source", key)
        check_x("with_source", batch)
        if "x0" in batch:
            raise ValueError("with_source: the batch has an 'x0' of its own")
        if batch.get("dropped") is not None:
            raise ValueError(
                "with_source: conditions were dropped before it makes them; put losses.drop_cond after it"
            )
        x0, cond = source(key, batch["x"], batch.get("cond"))
        if x0.shape != batch["x"].shape:
            raise ValueError(
                f"with_source: expected x0 of shape {list(batch['x'].shape)}, got {list(x0.shape)}"
            )
        rest = {name: value for name, value in batch.items() if name != "cond"}
        return {**rest, "x0": x0} | ({} if cond is None else {"cond": cond})

    return transform


def inpainting(mask: Mask) -> DataSource:
    """x0 = m x1 + (1 - m) noise, standard normal; cond becomes {'mask': m, 'cond': cond} ('cond' where there is one).

    Known numbers stay put along linear paths; `hold_known` makes a velocity leave them alone. At sampling time x1 is
    the picture with anything in the holes."""

    def source(key, x1, cond=None):
        mask_key, noise_key = jax.random.split(key)
        m = jnp.broadcast_to(mask(mask_key, x1), x1.shape).astype(x1.dtype)
        x0 = jnp.where(m > 0, x1, jax.random.normal(noise_key, x1.shape, x1.dtype))
        return x0, {"mask": m} | ({} if cond is None else {"cond": cond})

    return source


def hold_known(velocity: Velocity) -> Velocity:
    """The velocity times 1 - cond['mask']: known numbers do not move, in training and in sampling."""

    def apply(params, x, t, cond=None, *, key=None):
        return (1 - cond["mask"]) * velocity.apply(params, x, t, cond, key=key)

    return Velocity(velocity.init, apply)


def corrupted(degrade: Callable[[Array], Array], sigma: float) -> DataSource:
    """x0 = degrade(x1) + sigma noise; cond becomes {'seen': degrade(x1), 'cond': cond}.

    degrade: keeps the shape, e.g. `block_means(4)` for super-resolution by 4. sigma > 0 gives the flow the randomness
    that a degraded picture has lost. At sampling time x0 = seen + sigma noise. ValueError for sigma < 0."""
    if not sigma >= 0:
        raise ValueError(f"corrupted: expected sigma >= 0, got {sigma}")

    def source(key, x1, cond=None):
        seen = degrade(x1)
        x0 = seen + float(sigma) * jax.random.normal(key, x1.shape, x1.dtype)
        return x0, {"seen": seen} | ({} if cond is None else {"cond": cond})

    return source


def block_means(factor: int) -> Callable[[Array], Array]:
    """Images [b, H, W, C] to the means of their factor x factor blocks, repeated to the old size. ValueError where the
    factor does not divide H and W."""
    check_whole("block_means", factor=factor)

    def degrade(x):
        if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"block_means: expected images [b, H, W, C] that {factor} divides, got {list(x.shape)}"
            )
        b, h, w, c = x.shape
        means = jnp.mean(x.reshape(b, h // factor, factor, w // factor, factor, c), axis=(2, 4))
        return jnp.repeat(jnp.repeat(means, factor, 1), factor, 2)

    return degrade


def tiles(size: int, known: float = 0.7) -> Mask:
    """A mask of images [b, H, W, C]: each size x size tile is known with that probability, by itself."""
    check_whole("tiles", size=size)
    if not 0 <= known <= 1:
        raise ValueError(f"tiles: expected known in [0, 1], got {known}")

    def mask(key, x1):
        if x1.ndim != 4 or x1.shape[1] % size or x1.shape[2] % size:
            raise ValueError(
                f"tiles: expected images [b, H, W, C] that {size} divides, got {list(x1.shape)}"
            )
        b, h, w, _ = x1.shape
        seen = jax.random.bernoulli(key, float(known), (b, h // size, w // size))
        return expand_to(jnp.repeat(jnp.repeat(seen, size, 1), size, 2), x1)

    return mask
