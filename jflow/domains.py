"""Domains: convex sets that samples must not leave, and how a point outside is reflected into them.

A `jflow.types.Domain` is `reflect`, `project` and `uniform`. `solvers.reflected` and
`solvers.reflected_step` keep a sampler inside one, `paths.reflected` a path; `check` names the row
of a batch that lies outside. A straight line between two points of a convex set stays inside it, so
that on `paths.linear()` with a source inside the domain nothing else is needed for training:

    source = couplings.with_source(couplings.from_distribution(domain.uniform))
    loss = losses.chain(source, losses.flow_matching(velocity))
    method = solvers.fixed(50, solvers.reflected(diffrax.Heun(), domain))
    x, info = solvers.sample(velocity, params, x0, method=method)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import check_event, check_whole
from jflow._core.inside import check, distance_to
from jflow._core.names import explain_unknown
from jflow.types import Array, Distribution, Domain

__all__ = ["ball", "box", "check", "convex", "reflected_normal_log_prob", "simplex"]

explain_unknown(__name__)

Ends = ArrayLike | Sequence[Any]


def box(event_shape: tuple[int, ...], low: Ends = 0.0, high: Ends = 1.0) -> Domain:
    """The box of all x with low <= x <= high.

    Each number is folded, which is the image under all reflections at the two ends:

        reflect(x) = low + w - |w - (x - low) mod 2 w|,     w = high - low

    A normal step that is folded is an exact step of the reflected Brownian motion, whatever its
    size (`reflected_normal_log_prob`).

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1).
        low: the lower ends, a number or an array that broadcasts to the event.
        high: the upper ends, likewise.

    Returns:
        Domain: the box.

    Raises:
        ValueError: low is not below high, an end is infinite, or a shape does not broadcast.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import domains
        >>> unit = domains.box((1,))
        >>> x = jnp.array([[0.25], [1.25], [-0.5], [3.25]])
        >>> unit.reflect(x).ravel().tolist(), unit.project(x).ravel().tolist()
        ([0.25, 0.75, 0.5, 0.75], [0.25, 1.0, 0.0, 1.0])
    """
    event_shape = tuple(event_shape)
    ends = [_for_event("low", low, event_shape), _for_event("high", high, event_shape)]
    if not np.all(ends[0] < ends[1]):
        raise ValueError(f"domains.box: expected low < high, got low={low}, high={high}")
    volume = float(np.sum(np.log(ends[1] - ends[0])))

    def ends_of(x):
        shape = (1,) * (x.ndim - len(event_shape)) + event_shape
        return [jnp.asarray(end, x.dtype).reshape(shape) for end in ends]

    def project(x):
        return jnp.clip(x, *ends_of(x))

    def reflect(x):
        low, high = ends_of(x)
        w = high - low
        folded = low + w - jnp.abs(w - jnp.mod(x - low, 2 * w))
        return jnp.where((x >= low) & (x <= high), x, jnp.clip(folded, low, high))

    def draw(key, n):
        u = jax.random.uniform(key, (n, *event_shape))
        low, high = ends_of(u)
        return jnp.clip(low + (high - low) * u, low, high)

    return Domain(reflect, project, _uniform("box", event_shape, project, volume, draw))


def ball(event_shape: tuple[int, ...], radius: float = 1.0) -> Domain:
    """The ball of all x with |x| <= radius, the norm over the whole event.

    The image is taken at the nearest point of the sphere, along the ray through the center: the
    distance r = |x| becomes 2 radius - r, and so on, as a number is folded into a box. A normal
    step that is reflected so is a step of the reflected Brownian motion up to its curvature: of
    weak order one.

    Args:
        event_shape: the shape of one x, such as (3,).
        radius: that of the ball.

    Returns:
        Domain: the ball.

    Raises:
        ValueError: radius is not finite and above 0, or the event is empty.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import domains
        >>> disk = domains.ball((2,))
        >>> disk.reflect(jnp.array([[0.0, 1.25], [0.0, 2.5]]))[:, 1].tolist()  # beyond the center
        [0.75, -0.5]

    References:
        Bossy, Gobet, Talay, *A Symmetrized Euler Scheme for an Efficient Approximation of Reflected
            Diffusions*, Journal of Applied Probability 41, 2004.
    """
    event_shape, size = tuple(event_shape), math.prod(event_shape)
    if not 0 < radius < math.inf:
        raise ValueError(f"domains.ball: expected a finite radius > 0, got {radius}")
    if not size:
        raise ValueError(f"domains.ball: expected an event with numbers, got {event_shape}")
    radius = float(radius)
    axes = tuple(range(-len(event_shape), 0))
    volume = size / 2 * math.log(math.pi) - math.lgamma(size / 2 + 1) + size * math.log(radius)

    def scaled(x, of):
        """x times of(|x|) / |x|, the norm kept from overflowing; as it is inside."""
        largest = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), radius)
        norm = largest * jnp.sqrt(jnp.sum(jnp.square(x / largest), axis=axes, keepdims=True))
        outside = norm > radius
        safe = jnp.where(outside, norm, 1)
        return jnp.where(outside, x / safe * of(safe), x)

    def project(x):
        return scaled(x, lambda norm: jnp.full_like(norm, radius))

    def reflect(x):  # the signed distance along the ray is folded into [-radius, radius]
        return scaled(
            x,
            lambda norm: radius - jnp.abs(2 * radius - jnp.mod(norm + radius, 4 * radius)),
        )

    def draw(key, n):
        direction_key, radius_key = jax.random.split(key)
        e = jax.random.normal(direction_key, (n, *event_shape))
        u = jax.random.uniform(radius_key, (n,) + (1,) * len(event_shape))
        norm = jnp.sqrt(jnp.sum(jnp.square(e), axis=axes, keepdims=True))
        return project(radius * u ** (1 / size) * e / norm)

    return Domain(reflect, project, _uniform("ball", event_shape, project, volume, draw))


def simplex(event_shape: tuple[int, ...], *, rounds: int = 8) -> Domain:
    """The simplex of all x with x >= 0 and sum 1 along the last axis, for every token of the event.

    A point is first moved into the plane of sum 1, at right angles, then mirrored at its nearest
    point of the simplex until it is inside (see `convex`).

    Args:
        event_shape: the shape of one x, such as (K,), or (n, K) for n tokens; K is at least 2.
        rounds: how often a point is mirrored at most; a point that is still outside is projected.

    Returns:
        Domain: the simplex. The density of `uniform` is that of numbers in the first K - 1
            coordinates, as is usual for Dirichlet distributions: log (K - 1)! for each token.

    Raises:
        ValueError: the last axis has less than 2 numbers, or rounds is not a whole number of at
            least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import domains
        >>> x = jnp.array([[0.5, 0.75, -0.25]])
        >>> domains.simplex((3,)).reflect(x).tolist()
        [[0.25, 0.5, 0.25]]
    """
    event_shape = tuple(event_shape)
    if not event_shape or event_shape[-1] < 2:
        raise ValueError(
            f"domains.simplex: expected an event whose last axis has at least 2 numbers, got"
            f" {event_shape}"
        )
    k, tokens = event_shape[-1], math.prod(event_shape[:-1])

    def onto_plane(x):
        return x + (1 - jnp.sum(x, axis=-1, keepdims=True)) / k

    def project(x):
        x = onto_plane(x)
        falling = -jnp.sort(-x, axis=-1)
        count = jnp.arange(1, k + 1, dtype=x.dtype).reshape((1,) * (x.ndim - 1) + (k,))
        shifts = (jnp.cumsum(falling, axis=-1) - 1) / count  # with the largest `count` kept
        kept = jnp.sum(falling > shifts, axis=-1, keepdims=True)
        shift = jnp.take_along_axis(shifts, jnp.maximum(kept - 1, 0), axis=-1)
        inside = jnp.min(x, axis=-1, keepdims=True) >= 0
        return jnp.where(inside, x, jnp.maximum(x - shift, 0))

    mirror = convex(project, rounds=rounds).reflect

    def draw(key, n):
        e = jax.random.exponential(key, (n, *event_shape))
        return e / jnp.sum(e, axis=-1, keepdims=True)

    volume = -tokens * math.lgamma(k)
    uniform = _uniform("simplex", event_shape, project, volume, draw)
    return Domain(lambda x: mirror(onto_plane(x)), project, uniform)


def convex(
    project: Callable[[Array], Array], uniform: Distribution | None = None, *, rounds: int = 8
) -> Domain:
    """A closed convex set of your own, by the projection onto it.

        reflect: x <- 2 project(x) - x, while x is outside

    Each round brings a point nearer to all points inside, by the distance to the set at least as
    much as the set is wide, so that few are needed; one that is outside after `rounds` of them is
    projected. Rows stop by themselves: a point inside is left where it is.

    Args:
        project: x [..., *event] -> the nearest point of the set, [..., *event]; x itself inside.
        uniform: the uniform distribution on the set, where you have it.
        rounds: how often a point is mirrored at most.

    Returns:
        Domain: the set.

    Raises:
        ValueError: rounds is not a whole number of at least 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import domains
        >>> positive = domains.convex(lambda x: jnp.maximum(x, 0))
        >>> positive.reflect(jnp.array([[1.0, -2.0]])).tolist()
        [[1.0, 2.0]]
    """
    check_whole("domains.convex", rounds=rounds)

    def reflect(x):
        nearest = jax.lax.fori_loop(0, rounds, lambda _, x: 2 * project(x) - x, x)
        return project(nearest)

    return Domain(reflect, project, uniform)


def reflected_normal_log_prob(
    x: Float[Array, "b *event"],
    mean: Float[Array, "b *event"],
    std: Float[Array, "b ..."],
    low: float = 0.0,
    high: float = 1.0,
) -> Float[Array, " b"]:
    """The log-density of a normal draw that was folded into the box [low, high]^D.

    It is the transition of a Brownian motion that is reflected at both ends, of variance std^2. For
    each number, with w = high - low and all ends moved so that low is 0,

        p(x) = sum_m N(x; 2 m w + mean, std^2) + N(x; 2 m w - mean, std^2)
             = 1/w + 2/w sum_k exp(-k^2 pi^2 std^2 / (2 w^2)) cos(k pi x / w) cos(k pi mean / w)

    The images are summed where std < w / 2, the cosines elsewhere, either to rounding in float64.
    With the mean and the std of `solvers.euler_maruyama` it is the log-density of a step of
    `solvers.reflected_step` in the box. Dimensions with std = 0 have no density, and count 0.

    Args:
        x: the points, [b, *event]; -inf outside the box.
        mean: the mean before it is folded, [b, *event], inside the box or not.
        std: the standard deviation, [b], or [b, ...] that broadcasts.
        low: the lower end of every number.
        high: the upper end of every number.

    Returns:
        The log-densities, [b], in nats, summed over the event, in float32 or better.

    Raises:
        ValueError: low is not below high.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import domains
        >>> x = jnp.array([[0.3]])
        >>> log_prob = domains.reflected_normal_log_prob(x, 0.9 * x, jnp.array([5.0]))
        >>> round(abs(float(log_prob[0])), 3)  # nearly uniform
        0.0

    References:
        Lou, Ermon, *Reflected Diffusion Models*, 2023, arXiv:2304.04740 (both series).
    """
    if not low < high:
        raise ValueError(
            f"reflected_normal_log_prob: expected low < high, got low={low}, high={high}"
        )
    dtype = float_dtype(x, mean, std)
    w, low, high = float(high) - float(low), float(low), float(high)
    x, mean = x.astype(dtype), box(x.shape[1:], low, high).reflect(mean.astype(dtype))
    outside = (x < low) | (x > high)
    s = expand_to(std.astype(dtype), x) / w
    drawn, narrow = s > 0, s < 0.5
    u, m = jnp.where(outside, 0.5, (x - low) / w), (mean - low) / w

    safe = jnp.where(drawn & narrow, s, 0.5)
    images = [2 * k + sign * m for k in range(-3, 4) for sign in (1, -1)]
    terms = jnp.stack([-0.5 * ((u - image) / safe) ** 2 for image in images])
    near = jax.nn.logsumexp(terms, axis=0) - jnp.log(safe) - 0.5 * math.log(2 * math.pi)

    wide = jnp.where(narrow, 0.5, s)
    waves = [
        jnp.exp(-0.5 * (k * math.pi * wide) ** 2)
        * jnp.cos(k * math.pi * u)
        * jnp.cos(k * math.pi * m)
        for k in range(1, 9)
    ]
    far = jnp.log1p(2 * sum(waves[1:], waves[0]))
    log_density = jnp.where(outside, -jnp.inf, jnp.where(narrow, near, far) - math.log(w))
    return sum_event(jnp.where(drawn, log_density, 0))


def _for_event(what, end, event_shape):
    """`end` as a numpy array of the event's shape, finite."""
    value = np.asarray(end, np.float64)
    try:
        value = np.broadcast_to(value, event_shape)
    except ValueError:
        raise ValueError(
            f"domains.box: expected {what} to broadcast to {list(event_shape)}, got shape"
            f" {list(value.shape)}"
        ) from None
    if not np.all(np.isfinite(value)):
        raise ValueError(f"domains.box: expected a finite {what}, got {end}")
    return value


def _uniform(name, event_shape, project, log_volume, draw):
    """The uniform distribution on a set with a known volume."""
    name = f"domains.{name}"

    def init(key, x, cond=None):
        check_event(name, x, event_shape)
        return {}

    def log_prob(params, x, cond=None, *, key=None):
        check_event(name, x, event_shape)
        away = distance_to(project, x.astype(float_dtype(x)))
        inside = jnp.where(away <= 1e-5, jnp.full_like(away, -log_volume), -jnp.inf)
        return jnp.where(jnp.isnan(away), away, inside)

    def sample(params, key, n, cond=None):
        return draw(key, n)

    return Distribution(init, log_prob, sample)
