"""Images larger than those that a velocity was trained on, without training.

The network has to take larger images: a U-Net does; a transformer whose positions are fixed does,
and sees places that it never saw, unless their steps are scaled (`scaled_positions` for `nets.DiT`,
`net.clone(grid_step=...)` for `nets.MMDiT`). The attention of any transformer is over more tokens
than it was; `proportional_attention` keeps it as sharp. Images are [b, H, W, C], the path is the
linear one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.checks import (
    check_cond,
    check_noun,
    check_whole,
    count_rows,
    like_state,
    need_key,
)
from jflow._core.numbers import check_number, number_at
from jflow._core.positions import centered_axis, table_rows
from jflow._core.times import Times, check_unit_grid
from jflow.nets import dot_product_attention
from jflow.steering._common import floating, pull_of
from jflow.steering._features import inject
from jflow.types import Array, Cond, Field, Key, NumberOrFunction, Params, Velocity

__all__ = [
    "energy",
    "hiflow",
    "low_pass",
    "projected_flow",
    "proportional_attention",
    "rectified_hr",
    "resized",
    "rising_scales",
    "scaled_positions",
]


def resized(x: Float[Array, "b H W C"], height: int, width: int) -> Float[Array, "b h w C"]:
    """Images in another size: cubic between pixels, with a wider filter where they shrink.

    Args:
        x: the images, [b, H, W, C].
        height: the new height, in pixels.
        width: the new width, in pixels.

    Returns:
        The images [b, height, width, C]; in their own size they are as they were.

    Raises:
        ValueError: x is not of this shape.
    """
    if _images("steering.resized", x).shape[1:3] == (height, width):
        return x
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "cubic").astype(x.dtype)


def low_pass(x: Float[Array, "b H W C"], factor: int) -> Float[Array, "b H W C"]:
    """What an image has in a size `factor` times smaller: the means of its squares, enlarged.

    It is a projection onto images that are constant on squares of factor x factor pixels, linear
    and equal to itself when it is done twice.

    Args:
        x: the images, [b, H, W, C].
        factor: the side of the squares; 1 changes nothing.

    Returns:
        The images, [b, H, W, C].

    Raises:
        ValueError: factor does not divide H and W.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> steering.low_pass(jnp.arange(4.0).reshape(1, 2, 2, 1), 2).ravel().tolist()
        [1.5, 1.5, 1.5, 1.5]
    """
    name = "steering.low_pass"
    b, height, width, channels = _images(name, x).shape
    check_whole(name, factor=factor)
    if height % factor or width % factor:
        raise ValueError(
            f"{name}: expected a factor that divides the height and the width of x"
            f" {list(x.shape)}, got {factor}"
        )
    if factor == 1:
        return x
    blocks = x.reshape(b, height // factor, factor, width // factor, factor, channels)
    means = jnp.mean(blocks, axis=(2, 4), keepdims=True)
    return jnp.broadcast_to(means, blocks.shape).reshape(x.shape)


def energy(x: Float[Array, "b *event"]) -> Float[Array, " b"]:
    """The mean square of an image: what RectifiedHR watches.

    Args:
        x: the images, [b, *event].

    Returns:
        The energies, [b], in squared units of x.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> steering.energy(jnp.array([[1.0, 3.0]])).tolist()
        [5.0]
    """
    return mean_event(jnp.square(x.astype(float_dtype(x))))


def scaled_positions(params: Params, height: int, width: int, factor: float, patch: int) -> Params:
    """Params with which `nets.DiT` sees a larger image at the places of the size it was trained on.

    Also known as: position interpolation.

        position of patch i: i / factor in the place of i, along rows and columns

    The sines and cosines of the scaled places take the place of those of the network: their
    difference is added where patches become tokens, by `inject`.

    Args:
        params: those of a `nets.DiT`.
        height: of the images that it will see, in pixels.
        width: of the images that it will see, in pixels.
        factor: how much larger they are; 1 changes nothing.
        patch: the side of a patch, `net.patch_size`.

    Returns:
        Params: for images of this size alone.

    Raises:
        ValueError: factor is not above 0, patch does not divide the size, or params are not those
            of a DiT.

    References:
        Chen, Wong, Chen, Tian, *Extending Context Window of Large Language Models via Positional
            Interpolation*, 2023, arXiv:2306.15595 (of rotary positions of text).
    """
    name = "steering.scaled_positions"
    if not (factor > 0 and math.isfinite(factor)) or height % patch or width % patch:
        raise ValueError(
            f"{name}: expected a factor > 0 and a size that is divisible by patch={patch}, got"
            f" {factor} and {height} x {width}"
        )
    if not isinstance(params.get("patches"), dict) or "kernel" not in params["patches"]:
        raise ValueError(f"{name}: expected the params of a nets.DiT, got {sorted(params)}")
    size = np.shape(params["patches"]["kernel"])[-1]
    counts = height // patch, width // patch

    def table(step):
        return np.concatenate(list(table_rows(*(centered_axis(n, n, step, size) for n in counts))))

    change = jnp.asarray(table(1 / factor) - table(1.0))
    return inject(params, {"patches": change}, combine=_added)


def _added(own, given):
    """Tokens [b n, width] plus a table [n, width]."""
    return (own.reshape(-1, *given.shape) + given[None].astype(own.dtype)).reshape(own.shape)


def proportional_attention(
    trained: int, attention_fn: Callable[..., Array] = dot_product_attention
) -> Callable[..., Array]:
    """Attention to more tokens than in training that is as sharp as it was there.

    Also known as: log-n scaling of attention, entropy-invariant attention.

        softmax(q k^T sqrt(log m / (size log trained))) v        over m keys

    A softmax over more keys is flatter, for scores of one size; scores that grow with the root of
    log m keep its entropy about the same. With `trained` keys it is attention_fn. The factor is the
    same at all times t. A network takes it with the params that it has, by
    `net.clone(attention_fn=...)`.

    Args:
        trained: the tokens that attention was over in training, those of a text and of padding
            included; at least 2.
        attention_fn: the attention of the scaled queries, such as that of the network.

    Returns:
        A function like `nets.dot_product_attention`, for `attention_fn` of the networks.

    Raises:
        ValueError: trained is no whole number of at least 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets, steering
        >>> small = nets.DiT(patch_size=2, width=8, num_layers=1, num_heads=2)  # of 4 x 4 pixels
        >>> large = small.clone(attention_fn=steering.proportional_attention(4))  # of any size
        >>> q = jnp.zeros((1, 4, 1, 4)).at[0, 0].set(0.5**0.5)  # 4 tokens where there were 2
        >>> weights = steering.proportional_attention(2)(q, q, jnp.eye(4).reshape(1, 4, 1, 4))
        >>> [round(float(w), 3) for w in weights[0, 0, 0]]  # scores of sqrt(2), 0, 0 and 0
        [0.578, 0.141, 0.141, 0.141]

    References:
        Jin, Shen, Li, Xue, *Training-free Diffusion Model Adaptation for Variable-Sized
            Text-to-Image Synthesis*, 2023, arXiv:2306.08645; as in the code of Du, Liu, Zhuo, Qin,
            Li, Ma, Gao, *I-Max: Maximize the Resolution Potential of Pre-trained Rectified Flow
            Transformers with Projected Flow*, 2024, arXiv:2410.07536.
    """
    check_whole("steering.proportional_attention", 2, trained=trained)

    def attention(q, k, v, **rest):
        m = k.shape[1]
        if m != trained:
            q = q * math.sqrt(math.log(m) / math.log(trained))
        return attention_fn(q, k, v, **rest)

    return attention


def cosine_decay(t: Array) -> Array:
    """From 1 at the source to 0 at data: (1 + cos(pi t)) / 2."""
    return (1 + jnp.cos(jnp.pi * t)) / 2


def projected_flow(
    velocity: Velocity, factor: int, *, weight: NumberOrFunction = cosine_decay
) -> Velocity:
    """I-Max: a larger image whose coarse part flows towards that of a smaller one.

    Also known as: I-Max, higher-resolution sampling.

        v + weight(t) P(v_guide - v),      v_guide = (guide - x) / (1 - t),      P = low_pass

    v_guide is the straight flow to the guide, a sample of the size that the velocity was trained
    on, enlarged. Of what the larger image has beyond the size of training nothing is said. t is at
    most 1 - 1e-3 in v_guide.

    Args:
        velocity: the velocity, of images [b, H, W, C].
        factor: how much larger the images are than those of training; 1: P keeps all.
        weight: a number in [0, 1], or t [b] -> [b]; the default falls like a cosine from 1 to 0.
            With 0 it is the velocity.

    Returns:
        Velocity: its cond is a `SteeringCondition` of the guide [b, H, W, C] and the cond of
            `velocity`, also in `init`; params are those of `velocity`. One evaluation.

    Raises:
        ValueError: factor is below 1, or weight is a number outside [0, 1].

    References:
        Du, Liu, Zhuo, Qin, Li, Ma, Gao, *I-Max: Maximize the Resolution Potential of
            Pre-trained Rectified Flow Transformers with Projected Flow*, 2024, arXiv:2410.07536.
            Its code projects by Haar wavelets, which is `low_pass` for a factor of 2, 4, 8 ...
    """
    name = "steering.projected_flow"
    check_noun(name, velocity, Velocity, Field)
    check_whole(name, factor=factor)
    check_number(name, "weight", weight, "in [0, 1]", lambda w: 0 <= w <= 1)

    def change(v, x, t, guide):
        w = number_at(name, "weight(t)", weight, t, like=t)
        to_guide = (guide - x) / expand_to(jnp.maximum(1 - t, 1e-3), x)
        return v + expand_to(w, x) * low_pass(to_guide - v, factor)

    return pull_of(name, velocity, change)


def hiflow(
    velocity: Velocity,
    params: Params,
    x0: Float[Array, "b h w C"],
    key: Key,
    grid: Times | ArrayLike,
    cond: Cond = None,
    *,
    factor: int,
    start: float = 0.4,
    structure: float = 1.0,
    detail: float = 0.5,
    large: Params | None = None,
) -> tuple[Float[Array, "b H W C"], Float[Array, "b h w C"]]:
    """HiFlow: a larger image that flows along with a smaller one.

    First an image is drawn in the size of training, by Euler steps over the grid; of each step the
    predicted data x1_low are kept. Enlarged, they are a reference flow r(t) in the larger size. The
    larger image starts at t = `start` from start up(x1_low) + (1 - start) e, with new noise e, and
    at each later time of the grid

        x1 <- x1 + a P(r - x1),      v = (x1 - x) / (1 - t),       a = structure (share left)
        v <- v + b (v_before + v_r - v_r_before - v),              b = detail (share left)

    with v_r = (r - x) / (1 - t) and P = `low_pass`: the coarse part is that of the reference, and
    the velocity changes as that of the reference does. The share left falls from 1 to 0. It takes
    n evaluations of b small images on a grid [n + 1] and one of b large ones for each time from
    `start` on.

    Args:
        velocity: the velocity, of images of both sizes.
        params: its params.
        x0: the source of the small images, [b, h, w, C].
        key: what e is drawn with.
        grid: rising times [n + 1] from 0 to 1; known, not traced.
        cond: the condition, [b, ...] or one row for all.
        factor: how much larger the large image is, at least 1.
        start: the time in [0, 1) at which the large image starts, up to the next time of the grid.
        structure: how much of the coarse part is that of the reference at first, in [0, 1].
        detail: how much of the change of the velocity is that of the reference at first, in [0, 1].
        large: other params for the large image, such as `scaled_positions(...)`; None: params.

    Returns:
        x1: the large images, [b, factor h, factor w, C].
        low: the small ones, [b, h, w, C].

    Raises:
        ValueError: an option is outside its interval, the grid does not rise, or x0 is no image.

    References:
        Bu et al., *HiFlow: Training-free
            High-Resolution Image Generation with Flow-Aligned Guidance*, 2025, arXiv:2504.06232.
            The projection (there a filter in the Fourier plane) is ours.
    """
    name = "steering.hiflow"
    check_noun(name, velocity, Velocity, Field)
    check_whole(name, factor=factor)
    need_key(name, key)
    check_unit_grid(name, grid)
    small = floating(name, _images(name, x0, "x0"))
    for what, value in (("structure", structure), ("detail", detail)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected {what} in [0, 1], got {value}")
    if not 0 <= start < 1:
        raise ValueError(f"{name}: expected start in [0, 1), got {start}")
    cond = check_cond(name, cond, count_rows(name, x0))
    times = np.asarray(grid, np.float64)
    first = min(int(np.searchsorted(times, start - 1e-9)), len(times) - 2)
    ts = jnp.asarray(times, small.dtype)
    height, width = factor * x0.shape[1], factor * x0.shape[2]

    def look(params, x, t):
        v = velocity.apply(params, x, jnp.broadcast_to(t, x.shape[:1]), cond)
        v = like_state(name, v, x)
        return v, x + (1 - t) * v

    def low_step(x: Array, at: Any) -> tuple[Array, Array]:
        v, x1 = look(params, x, at[0])
        return x + (at[1] - at[0]) * v, x1

    low, predicted = jax.lax.scan(low_step, small, (ts[:-1], ts[1:]))
    noise = jax.random.normal(key, (x0.shape[0], height, width, x0.shape[3]), low.dtype)
    x = ts[first] * resized(low, height, width) + (1 - ts[first]) * noise
    own = params if large is None else large
    left = jnp.linspace(1.0, 0.0, len(times) - first)[:-1].astype(low.dtype)

    def high_step(carry: Any, at: Any) -> tuple[Any, None]:
        x, v_before, ref_before, begun = carry
        t, t_next, x1_low, share = at
        ref = resized(x1_low, height, width)
        _, x1 = look(own, x, t)
        x1 = x1 + structure * share * low_pass(ref - x1, factor)
        v, v_ref = (x1 - x) / (1 - t), (ref - x) / (1 - t)
        v = v + begun * detail * share * (v_before + v_ref - ref_before - v)
        return (x + (t_next - t) * v, v, v_ref, jnp.ones_like(begun)), None

    zero = jnp.zeros_like(x)
    carry = x, zero, zero, jnp.zeros_like(x, shape=())
    ends = ts[first:-1], ts[first + 1 :], predicted[first:], left
    carry, _ = jax.lax.scan(high_step, carry, ends)
    return carry[0].astype(x0.dtype), low.astype(x0.dtype)


def rectified_hr(
    velocities: Sequence[Velocity],
    params: Params | Sequence[Params],
    x0: Float[Array, "b h w C"],
    key: Key,
    grid: Times | ArrayLike,
    cond: Cond = None,
    *,
    sizes: Sequence[tuple[int, int]],
    times: Sequence[float],
) -> tuple[Float[Array, "b H W C"], Float[Array, "steps b"]]:
    """RectifiedHR: grow an image while it is sampled, with new noise each time.

    At each of the refresh times the data that the velocity predicts are enlarged to the next size,
    and put back on the path with new noise (noise refresh),

        x = t up(x1) + (1 - t) e,      e standard normal

    Enlarged images are smoother than real ones: the energy of the prediction falls. A larger scale
    of guidance after each refresh gives it back (energy rectification): the velocities are those of
    the stages, such as `[guidance.cfg(v, w, null=null) for w in rising_scales(3.0, 6.0, 2)]`. One
    evaluation a step, and one more at each refresh.

    Args:
        velocities: one for each size, the first for the size of x0.
        params: theirs, or a sequence of params for each size, such as `scaled_positions(...)`.
        x0: the source in the size of training, [b, h, w, C].
        key: what the new noise is drawn with.
        grid: rising times [n + 1] from 0 to 1; known, not traced.
        cond: the condition, [b, ...] or one row for all.
        sizes: the sizes after the refreshes, (height, width), one fewer than velocities.
        times: when, rising times in [0, 1), one for each of the sizes; the next time of the grid is
            taken.

    Returns:
        x1: the images in the last size, [b, H, W, C].
        energies: those of the data predicted at each step of the grid, [n, b]; see `energy`.

    Raises:
        ValueError: the numbers of velocities, params, sizes and times do not fit, a time is outside
            [0, 1), or they do not rise.

    References:
        Yang, Shen, Hou, Liu, Wang, Tao, Wan, Zhang, Chen, *RectifiedHR: Enable Efficient
            High-Resolution Image Generation via Energy Rectification*, 2025, arXiv:2503.02537.
            Its abstract was read: how images are enlarged, and a guidance that is constant within a
            stage, are ours.
    """
    name = "steering.rectified_hr"
    need_key(name, key)
    check_unit_grid(name, grid)
    x = floating(name, _images(name, x0, "x0"))
    if isinstance(velocities, Velocity | Field):
        raise TypeError(f"{name}: expected a list of velocities, one for each size, got one")
    stages = len(velocities)
    own = list(params) if isinstance(params, list | tuple) else [params] * stages
    if stages < 1 or not len(sizes) == len(times) == stages - 1 or len(own) != stages:
        raise ValueError(
            f"{name}: expected one size and one time fewer than velocities, and params for each,"
            f" got {stages}, {len(sizes)} sizes, {len(times)} times and {len(own)} params"
        )
    if not all(0 <= t < 1 for t in times) or any(np.diff(np.asarray(times, float)) <= 0):
        raise ValueError(f"{name}: expected times that rise in [0, 1), got {list(times)}")
    for velocity in velocities:
        check_noun(name, velocity, Velocity, Field)
    cond = check_cond(name, cond, count_rows(name, x0))
    knots = np.asarray(grid, np.float64)
    at = [0, *(int(np.searchsorted(knots, t - 1e-9)) for t in times), len(knots) - 1]
    if any(b <= a for a, b in zip(at[1:-1], at[2:], strict=True)):
        raise ValueError(f"{name}: expected a step of the grid after each of times {list(times)}")
    ts, energies = jnp.asarray(knots, x.dtype), []
    keys = jax.random.split(key, max(stages - 1, 1))

    for stage, velocity in enumerate(velocities):

        def look(x, t, velocity=velocity, stage=stage):
            v = velocity.apply(own[stage], x, jnp.broadcast_to(t, x.shape[:1]), cond)
            v = like_state(name, v, x)
            return v, x + (1 - t) * v

        def advance(x, ends, look=look):
            v, x1 = look(x, ends[0])
            return x + (ends[1] - ends[0]) * v, energy(x1)

        begin, end = at[stage], at[stage + 1]
        if end > begin:
            x, found = jax.lax.scan(advance, x, (ts[begin:end], ts[begin + 1 : end + 1]))
            energies.append(found)
        if stage < stages - 1:
            x1 = resized(look(x, ts[end])[1], *sizes[stage])
            noise = jax.random.normal(keys[stage], x1.shape, x1.dtype)
            x = ts[end] * x1 + (1 - ts[end]) * noise
    return x.astype(x0.dtype), jnp.concatenate(energies)


def rising_scales(low: float, high: float, stages: int, power: float = 1.0) -> list[float]:
    """The scales of guidance of RectifiedHR: from low to high over the stages of the size.

        scale_i = low + (high - low) (i / (stages - 1))^power,      i = 0 ... stages - 1

    Args:
        low: of the size of training.
        high: of the last size.
        stages: how many sizes, at least 1.
        power: above 0.

    Returns:
        list of float: the scales; [low] for one stage.

    Raises:
        ValueError: stages is below 1, or power is not above 0.

    Examples:
        >>> from jflow import steering
        >>> steering.rising_scales(2.0, 6.0, 3)
        [2.0, 4.0, 6.0]
    """
    if stages < 1 or not power > 0:
        raise ValueError(
            f"steering.rising_scales: expected stages >= 1 and power > 0, got {stages}, {power}"
        )
    return [low + (high - low) * (i / max(stages - 1, 1)) ** power for i in range(stages)]


def _images(name: str, x: Array, what: str = "x") -> Array:
    """x; raise unless it is [b, H, W, C]."""
    if jnp.ndim(x) != 4:
        raise ValueError(f"{name}: expected {what} of shape [b, H, W, C], got {list(jnp.shape(x))}")
    return x
