"""Data-dependent couplings: the source is made from its own data row.

A `DataSource` is a function (key, x1, cond) -> (x0, cond).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to
from jflow._core.checks import (
    check_noun,
    check_params,
    check_whole,
    check_x,
    described,
    need_key,
)
from jflow._core.conditions import as_condition
from jflow.types import (
    Array,
    BatchTransform,
    Cond,
    Condition,
    Distribution,
    Flow,
    Key,
    Params,
    Velocity,
)

DataSource = Callable[
    [Key, Array, Cond], tuple[Array, Cond]
]  # (key, x1 [b, *event], cond) -> (x0 like x1, cond)
Mask = Callable[
    [Key, Array], Array
]  # (key, x1) -> 1 where known, 0 where not; [b, *event] or 1 in place of an axis


def with_source(source: DataSource) -> BatchTransform:
    """The batch transform that makes the source, and conditions, from the data of a batch.

    It writes 'x0' and 'cond' by source(key, x, cond), new at every step, in front of any loss that
    takes 'x0':

        losses.chain(couplings.with_source(source), losses.flow_matching(velocity))

    No `pair` comes beside it: the data-dependent pairs are the coupling. Sampling starts from the
    same source, `source(key, known, cond)[0]`.

    Args:
        source: (key, x1 [b, *event], cond) -> (x0 like x1, cond), such as `inpainting(mask)` or
            `corrupted(degrade, sigma)`.

    Returns:
        BatchTransform: (key, batch, frozen=None) -> batch. It raises a ValueError for a key of
            None, for a batch with an 'x0' of its own or with conditions that were dropped already,
            and for an x0 that is not shaped like x.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import couplings
        >>> transform = couplings.with_source(couplings.corrupted(jnp.round, sigma=0.0))
        >>> batch = transform(jax.random.key(0), {"x": jnp.array([[0.9], [2.2]])})
        >>> batch["x0"].ravel().tolist(), batch["cond"].aligned.ravel().tolist()
        ([1.0, 2.0], [1.0, 2.0])

    References:
        Albergo, Goldstein, Boffi, Ranganath, Vanden-Eijnden, *Stochastic Interpolants with
            Data-Dependent Couplings*, 2024, arXiv:2310.03725.
    """

    def transform(key, batch, frozen=None):
        need_key("with_source", key)
        check_x("with_source", batch)
        if "x0" in batch:
            raise ValueError("with_source: the batch has an 'x0' of its own")
        if batch.get("dropped") is not None:
            raise ValueError(
                "with_source: conditions were dropped before it makes them; put "
                "losses.drop_cond after it"
            )
        x0, cond = source(key, batch["x"], batch.get("cond"))
        if x0.shape != batch["x"].shape:
            raise ValueError(
                f"with_source: expected x0 of shape {list(batch['x'].shape)}, got {list(x0.shape)}"
            )
        rest = {name: value for name, value in batch.items() if name != "cond"}
        return {**rest, "x0": x0} | ({} if cond is None else {"cond": cond})

    return transform


def from_distribution(
    distribution: Distribution | Flow, params: Params | None = None
) -> DataSource:
    """A source that is drawn from a distribution, whatever the data are.

    It takes the place of the standard normal noise of `losses.flow_matching`, such as a uniform law
    on a sphere, or masks, where there is no normal one. The draws have the type of the data, and
    the condition of the data is that of the distribution.

    Args:
        distribution: the law of x0, with the shape of x1; the base of the flow that is sampled.
        params: its params; None: {}, for those that have none. They are not trained.

    Returns:
        DataSource: (key, x1, cond) -> (x0, cond), for `with_source`.

    Raises:
        TypeError: for what is no distribution, and for params that are no dict.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import couplings, distributions
        >>> source = couplings.from_distribution(distributions.uniform((2,), 3.0, 4.0))
        >>> batch = couplings.with_source(source)(jax.random.key(0), {"x": jnp.zeros((5, 2))})
        >>> bool(jnp.all((batch["x0"] >= 3) & (batch["x0"] <= 4)))
        True
    """
    check_noun("from_distribution", distribution, Distribution, Flow)
    given = {} if params is None else params
    check_params("from_distribution", given)

    def source(key, x1, cond=None):
        x0 = distribution.sample(given, need_key("from_distribution", key), x1.shape[0], cond)
        return x0.astype(jnp.result_type(x1)), cond

    return source


def inpainting(mask: Mask) -> DataSource:
    """A source that holds the known numbers of the data, and noise in the holes.

        x0 = m x1 + (1 - m) noise,      m = mask(key, x1), noise standard normal

    cond becomes a `types.Condition` with m as what is aligned with x, after what was aligned
    already; its other parts stay, and labels [b] or vectors [b, k] become the part of that name.
    Known numbers stay where they are along linear paths; `hold_known` makes a velocity leave them
    alone. At sampling time x1 is the picture with anything in the holes.

    Args:
        mask: (key, x1 [b, *event]) -> an array that is 1 where a number is known and 0 where not,
            [b, *event] or with 1 in place of an axis, such as `tiles(8)`.

    Returns:
        DataSource: (key, x1, cond) -> (x0, cond), for `with_source`. It raises a ValueError for a
            cond that is neither an array nor a `types.Condition`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import couplings
        >>> source = couplings.inpainting(lambda key, x1: jnp.array([[1.0, 0.0]]))
        >>> x0, cond = source(jax.random.key(0), jnp.array([[5.0, 6.0], [7.0, 8.0]]), None)
        >>> x0[:, 0].tolist(), cond.aligned.tolist()
        ([5.0, 7.0], [[1.0, 0.0], [1.0, 0.0]])
    """

    def source(key, x1, cond=None):
        mask_key, noise_key = jax.random.split(key)
        m = jnp.broadcast_to(mask(mask_key, x1), x1.shape).astype(x1.dtype)
        x0 = jnp.where(m > 0, x1, jax.random.normal(noise_key, x1.shape, x1.dtype))
        return x0, _with_aligned("inpainting", cond, m)

    return source


def hold_known(velocity: Velocity) -> Velocity:
    """A velocity that does not move the known numbers, in training and in sampling.

    It is the velocity times 1 - m, the mask of `inpainting`: the last channels of what is aligned
    with x in cond.

    Args:
        velocity: a velocity whose cond is that of `inpainting`.

    Returns:
        Velocity: the masked velocity, with the params and the init of `velocity`. It raises a
            ValueError for a cond without as many aligned channels as x has.
    """

    def apply(params, x, t, cond=None, *, key=None):
        aligned = cond.aligned if isinstance(cond, Condition) else None
        channels = x.shape[-1] if x.ndim > 1 else 1
        if aligned is None or aligned.shape[-1] < channels:
            raise ValueError(
                "hold_known: expected cond of `inpainting`, whose last aligned channels are a mask"
                f" shaped like x {list(x.shape)}, got "
                f"{described(cond if aligned is None else aligned)}"
            )
        mask = aligned[..., -channels:] if x.ndim > 1 else aligned[..., -1]
        return (1 - mask) * velocity.apply(params, x, t, cond, key=key)

    return Velocity(velocity.init, apply)


def corrupted(degrade: Callable[[Array], Array], sigma: float) -> DataSource:
    """A source that is a degraded version of the data, with noise added.

        x0 = degrade(x1) + sigma noise,      noise standard normal

    cond becomes a `types.Condition` with seen = degrade(x1) as what is aligned with x, after what
    was aligned already; its other parts stay, and labels [b] or vectors [b, k] become the part of
    that name. sigma > 0 gives the flow the randomness that a degraded picture has lost. At sampling
    time x0 = seen + sigma noise.

    Args:
        degrade: x1 [b, *event] -> the same shape, e.g. `block_means(4)` for super-resolution by 4.
        sigma: the standard deviation of the noise, in the units of the data, at least 0.

    Returns:
        DataSource: (key, x1, cond) -> (x0, cond), for `with_source`. It raises a ValueError for a
            cond that is neither an array nor a `types.Condition`.

    Raises:
        ValueError: sigma is negative.
    """
    if not sigma >= 0:
        raise ValueError(f"corrupted: expected sigma >= 0, got {sigma}")

    def source(key, x1, cond=None):
        seen = degrade(x1)
        x0 = seen + float(sigma) * jax.random.normal(key, x1.shape, x1.dtype)
        return x0, _with_aligned("corrupted", cond, seen)

    return source


def _with_aligned(name: str, cond: Cond, channels: Array) -> Condition:
    """cond with more channels at the sites of x, the last of them."""
    made = as_condition(name, cond)
    channels = channels[:, None] if channels.ndim == 1 else channels
    if made.aligned is None:
        return made._replace(aligned=channels)
    before = jnp.broadcast_to(
        made.aligned, (*channels.shape[:-1], jnp.shape(made.aligned)[-1])
    ).astype(channels.dtype)
    return made._replace(aligned=jnp.concatenate([before, channels], axis=-1))


def block_means(factor: int) -> Callable[[Array], Array]:
    """Images to the means of their blocks, repeated to the old size.

    Args:
        factor: the width of a block, in pixels.

    Returns:
        A function of images [b, H, W, C] to images of the same shape. It raises a ValueError where
            the factor does not divide H and W.

    Raises:
        ValueError: factor is not a whole number of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import couplings
        >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
        >>> couplings.block_means(2)(x).ravel().tolist()
        [1.5, 1.5, 1.5, 1.5]
    """
    check_whole("block_means", factor=factor)

    def degrade(x):
        if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"block_means: expected images [b, H, W, C] that {factor} divides, got "
                f"{list(x.shape)}"
            )
        b, h, w, c = x.shape
        means = jnp.mean(x.reshape(b, h // factor, factor, w // factor, factor, c), axis=(2, 4))
        return jnp.repeat(jnp.repeat(means, factor, 1), factor, 2)

    return degrade


def tiles(size: int, known: float = 0.7) -> Mask:
    """A random mask of images in which each tile is known with a given probability, by itself.

    Args:
        size: the width of a tile, in pixels.
        known: the probability that a tile is known, in [0, 1].

    Returns:
        Mask: (key, x1 [b, H, W, C]) -> [b, H, W, 1], True where a pixel is known, for `inpainting`.
            It raises a ValueError where the size does not divide H and W.

    Raises:
        ValueError: size is not a whole number of at least 1, or known is outside [0, 1].
    """
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
