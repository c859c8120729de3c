"""Editing in the space of attention: what FluxSpace, AMO, RF-Edit and ReFlex do inside a network.

Each is a function of a Linen network and of sites (`capture`), for networks with or without a text
in their attention.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import (
    check_cond,
    check_same_shape,
    check_whole,
    count_rows,
    like_state,
    rows,
    times_of,
)
from jflow._core.numbers import check_number, number_at
from jflow.nets import velocity as lifted
from jflow.paths import LINEAR, Schedule, velocity_to_data, velocity_to_noise
from jflow.solvers import grids
from jflow.steering._condition import check_window
from jflow.steering._features import capture, inject, parse
from jflow.steering._masks import word_indices
from jflow.types import Array, Cond, Field, NumberOrFunction, Params, PyTree, Step, Velocity

__all__ = [
    "EditCondition",
    "adapted_weights",
    "attention_map",
    "fluxspace",
    "modulated_overshoot",
    "orthogonal_part",
    "reflex",
    "rf_edit",
]


class EditCondition(NamedTuple):
    """Three conditions of an edit, of one structure and one shape.

    Attributes:
        base: what the image shows.
        edit: what is to be added to it.
        prior: the condition that stands for none.
    """

    base: Cond
    edit: Cond
    prior: Cond


def orthogonal_part(
    x: Float[Array, "*axes size"], direction: Float[Array, "*axes size"]
) -> Float[Array, "*axes size"]:
    """A vector without its component along a direction.

        x - direction <x, direction> / |direction|^2

    Args:
        x: the vectors, [..., size].
        direction: the directions, [..., size]; where one is 0, x stays as it is.

    Returns:
        The parts of x that are orthogonal to direction, [..., size].

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> steering.orthogonal_part(jnp.array([3.0, 4.0]), jnp.array([2.0, 0.0])).tolist()
        [0.0, 4.0]
    """
    size = jnp.sum(jnp.square(direction), axis=-1, keepdims=True)
    along = jnp.sum(x * direction, axis=-1, keepdims=True)
    return x - direction * jnp.where(size > 0, along / jnp.where(size > 0, size, 1), 0)


def fluxspace(
    net: nn.Module,
    sites: Sequence[str],
    scale: NumberOrFunction,
    *,
    window: tuple[float, float] = (0.0, 1.0),
    mask: Callable[[Array], Array] | None = None,
) -> Velocity:
    """FluxSpace: a linear edit of what attention returns, beside what the image is otherwise.

        l_base + scale mask (l_edit - projection of l_edit onto l_prior)

    l is what a site computes for the base, the edit and the prior condition at the same x and t;
    the projection is that of each token over its heads. scale 0 is the network at its base
    condition. One evaluation of 2b rows gives l_edit and l_prior, one of b rows the velocity. The
    coarse edit of the paper is `orthogonal_part` of pooled texts: the base with
    vector = base.vector + scale orthogonal_part(edit.vector, base.vector).

    Args:
        net: a Linen network.
        sites: such as 'double_blocks:attended' and 'single_blocks:attended' of `nets.Flux`,
            'blocks:attended' of `nets.MMDiT` and `nets.DiT`.
        scale: a number, or t [b] -> [b].
        window: the times between which the edit acts, both ends included.
        mask: of each token, [..., b, n], by the weights [..., b, heads, n, m] of attention under
            the edit condition at the same site, such as `word_mask(...)`; None: all tokens.

    Returns:
        Velocity: its cond is an `EditCondition`, also in `init`; params are those of the network.
            It raises a ValueError for another cond.

    Raises:
        ValueError: a site is wrong (see `capture`), with a mask one that does not end in
            ':attended', or unless 0 <= window[0] < window[1] <= 1.

    References:
        Dalva, Venkatesh, Yanardag, *FluxSpace: Disentangled Semantic Editing in Rectified Flow
            Transformers*, 2024, arXiv:2412.09611. That the edit and the prior see the plain network
            up to the site is ours.
    """
    name = "steering.fluxspace"
    check_number(name, "scale", scale, "that is a number", lambda value: value == value)
    low, high = check_window(name, window)
    tokens = {site: parse(name, site)[1] not in (None, "weights") for site in sites}
    looked = {}  # the weights that the mask of a site is made of
    if mask is not None:
        looked = {site: _weights_of(name, site) for site in sites}
    reader, velocity = capture(net, [*sites, *looked.values()]), lifted(net)

    def read(cond):
        if not isinstance(cond, EditCondition):
            raise ValueError(
                f"{name}: expected cond to be a steering.EditCondition(base, edit, prior), got"
                f" {type(cond).__name__}"
            )
        return cond

    def init(key, x, t, cond=None):
        return velocity.init(key, x, t, read(cond).base)

    def apply(params, x, t, cond=None, *, key=None):
        n, t = count_rows(name, x), times_of(name, t, x)
        base, edit, prior = (check_cond(name, c, n) for c in read(cond))
        keys = (None, None) if key is None else jax.random.split(key)
        double = lambda a, b: jnp.concatenate([jnp.asarray(a), jnp.asarray(b)])  # noqa: E731
        both = double(x, x), double(t, t), jax.tree.map(double, edit, prior)
        _, features = reader.apply(params, *both, key=keys[0])
        one_each = partial(reader.apply, params, x, t, base, key=keys[0])
        _, single = jax.eval_shape(one_each)  # tells the axis of the rows
        w = number_at(name, "scale(t)", scale, t, like=t)
        w = jnp.where((low <= t) & (t <= high), w, jnp.zeros_like(w))

        def shift(feature, like, heads, weights):
            pairs = enumerate(zip(feature.shape, like.shape, strict=True))
            axis = next(i for i, (a, b) in pairs if a != b)  # that of the rows
            of_edit, of_prior = jnp.split(feature, 2, axis)
            flat = lambda a: a.reshape(*a.shape[: a.ndim - 1 - heads], -1)  # noqa: E731
            part = orthogonal_part(flat(of_edit), flat(of_prior)).reshape(of_edit.shape)
            if mask is not None:
                chosen = mask(jnp.split(weights, 2, axis)[0])
                chosen = check_same_shape(name, "mask(weights)", chosen, part[..., 0, 0])
                part = part * chosen[..., None, None].astype(part.dtype)
            by_row = jnp.repeat(w, part.shape[axis] // n)
            beside = (1,) * axis, (1,) * (part.ndim - 1 - axis)
            return part * by_row.reshape(*beside[0], -1, *beside[1]).astype(part.dtype)

        given = {}
        for site, heads in tokens.items():
            of_site = partial(shift, heads=int(heads), weights=features.get(looked.get(site)))
            given[site] = jax.tree.map(of_site, features[site], single[site])
        return velocity.apply(inject(params, given, combine=_sum), x, t, base, key=keys[1])

    return Velocity(init, apply)


def _weights_of(name: str, site: str) -> str:
    path, _, part = site.partition(":")
    if part != "attended":
        raise ValueError(
            f"{name}: expected sites that end in ':attended' with a mask, got {site!r}"
        )
    return f"{path}:weights"


def _sum(own, given):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), own, given)


def attention_map(
    net: nn.Module, sites: Sequence[str], tokens: Sequence[int], *, patch: int
) -> Field:
    """The velocity of a network of an image and a text, and how much each place attends to words.

        m = mean over sites, depths, heads and words of the weights from a patch to a word,
        divided by the largest of the image

    Args:
        net: a Linen network whose attention sees the tokens of the text first and those of the
            image after them: `nets.MMDiT`, `nets.Flux`.
        sites: such as 'blocks:weights' and 'single_blocks:weights'.
        tokens: the words, by their index in the text.
        patch: the side of a patch, `net.patch_size`.

    Returns:
        Field: `apply(params, x, t, cond) -> (v, m)`, m [b, H, W, 1] in [0, 1], for
            `modulated_overshoot`; cond has a context. It takes one evaluation.

    Raises:
        ValueError: a site is not one of weights, or there are no tokens; while tracing, for a token
            that is not in the text.
    """
    name = "steering.attention_map"
    chosen = word_indices(name, tokens)
    for site in sites:
        if parse(name, site)[1] != "weights":
            raise ValueError(f"{name}: expected sites that end in ':weights', got {site!r}")
    reader = capture(net, sites)

    def apply(params, x, t, cond=None, *, key=None):
        v, features = reader.apply(params, x, t, cond, key=key)
        b, height, width, _ = x.shape
        count = (height // patch) * (width // patch)
        means = []
        for weights in features.values():
            weights = weights.reshape(-1, b, *weights.shape[-3:])  # [depth, b, heads, n, m]
            words = weights.shape[-1] - count
            if chosen.max() >= words:
                raise ValueError(f"{name}: expected tokens below {words}, got {tokens}")
            means.append(jnp.mean(weights[..., words:, chosen], axis=(0, 2, 4)))
        m = sum(means[1:], start=means[0])
        m = m / jnp.maximum(jnp.max(m, axis=1, keepdims=True), jnp.finfo(m.dtype).tiny)
        m = m.reshape(b, height // patch, width // patch, 1)
        return v, jnp.repeat(jnp.repeat(m, patch, axis=1), patch, axis=2)

    return Field(reader.init, apply)


def modulated_overshoot(field: Field, scale: float = 2.0, schedule: Schedule = LINEAR) -> Step:
    """AMO: overshooting (`solvers.overshoot`) that is stronger where the image attends to words.

    Each number of the state goes beyond the next time by a share of its own,

        o = min(t_next + scale m (t_next - t) (1 - t_next), 1)

    and comes back with noise as in `solvers.overshoot`. m = 1 everywhere is that step, m = 0 is
    DDIM.

    Args:
        field: apply(params, x, t, cond) -> (v, m): a velocity and a map in [0, 1] that broadcasts
            to x, such as `attention_map(...)`.
        scale: how far beyond where m = 1, at least 0.
        schedule: the path of the velocity; the default is the linear one.

    Returns:
        Step: (params, x, t, t_next, key, cond=None) -> (x_next, mean, std), std shaped like x, for
            `solvers.sample_sde`. With key=None x_next is the mean.

    Raises:
        ValueError: scale is negative.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> from jflow.types import Field
        >>> def apply(params, x, t, cond=None, *, key=None):
        ...     return 0 * x, jnp.array([[0.0, 1.0]])
        >>> step = steering.modulated_overshoot(Field(lambda *_: {}, apply))
        >>> _, mean, std = step({}, jnp.ones((1, 2)), 0.25, 0.5, None)
        >>> std[0, 0].item(), round(std[0, 1].item(), 3)  # noise where m is 1
        (0.0, 0.471)

    References:
        Hu, Xu, Liu, Liu, Fei, *AMO Sampler: Enhancing Text Rendering with Overshooting*, 2024,
            arXiv:2411.19415 (on the linear path).
    """
    name = "steering.modulated_overshoot"
    if not scale >= 0:
        raise ValueError(f"{name}: expected scale >= 0, got {scale}")
    scale = float(scale)

    def step(params, x, t, t_next, key, cond=None):
        x = x.astype(float_dtype(x))
        t, t_next = (rows(s, x.shape[0]).astype(x.dtype) for s in (t, t_next))
        v, m = field.apply(params, x, t, cond)
        v = like_state(name, v, x)
        m = jnp.broadcast_to(m, x.shape).astype(x.dtype)
        data, noise = velocity_to_data(v, x, t, schedule), velocity_to_noise(v, x, t, schedule)
        at, at_next = expand_to(t, x), expand_to(t_next, x)
        beyond = jnp.minimum(at_next + scale * m * (at_next - at) * (1 - at_next), 1)
        sigma = schedule.sigma(at_next)
        back = schedule.alpha(at_next) * schedule.sigma(beyond) / schedule.alpha(beyond)
        kept = jnp.where(sigma > 0, back / jnp.where(sigma > 0, sigma, 1), 0)
        std = sigma * jnp.sqrt(jnp.maximum((1 - kept) * (1 + kept), 0))
        mean = schedule.alpha(at_next) * data + sigma * kept * noise
        std = jnp.broadcast_to(std, x.shape)
        if key is None:
            return mean, mean, std
        return mean + std * jax.random.normal(key, x.shape, x.dtype), mean, std

    return step


def rf_edit(
    net: nn.Module,
    params: Params,
    x: Float[Array, "b *event"],
    source: Cond,
    target: Cond,
    *,
    sites: Sequence[str],
    steps: int = 25,
    until: float = 0.3,
    layers: Sequence[float] | None = None,
) -> Float[Array, "b *event"]:
    """RF-Edit: an edit that is told on its way what attention saw while the image was inverted.

    The image goes from t=1 to 0 under the source condition by RF-Solver, which is the explicit
    midpoint method, and back under the target condition. On the way in, what the sites compute in
    each evaluation is kept; on the way back it takes the place of theirs in the evaluations of the
    same step, the first in the first and the midpoint's in the midpoint's, at t < until. It takes 4
    `steps` evaluations, and the memory of the features of 2 until `steps` of them.

    Args:
        net: a Linen network.
        params: its params.
        x: the images, [b, *event], at t=1.
        source: the condition that describes them.
        target: the condition to edit towards.
        sites: what is shared: the paper's are the values of the last blocks, such as
            'single_blocks:v' of `nets.Flux`; here 'blocks:v' with `layers`.
        steps: of the midpoint method, each way.
        until: the time up to which features are shared, in [0, 1]; 0 is inversion and sampling.
        layers: how much of them goes to each of the scanned blocks, [depth] numbers in [0, 1], such
            as (0, 0, 1, 1) for the last half; None: all.

    Returns:
        The edited images, [b, *event].

    Raises:
        ValueError: a site is wrong (see `capture`), steps is below 1, or until is outside [0, 1].

    References:
        Wang, Pu, Qi, Guo, Ma, Huang, Chen, Li, Shan, *Taming Rectified Flow for Inversion and
            Editing*, 2024, arXiv:2411.04746.
    """
    name = "steering.rf_edit"
    check_whole(name, steps=steps)
    check_number(name, "until", until, "in [0, 1]", lambda u: 0 <= u <= 1)
    reader, velocity = capture(net, sites), lifted(net)
    n = count_rows(name, x)
    source, target = check_cond(name, source, n), check_cond(name, target, n)
    ts = jnp.asarray(grids.uniform(steps), float_dtype(x))
    shared = min(steps, int(np.ceil(until * steps - 1e-9)))
    weight = None if layers is None else jnp.asarray(layers, float)

    def midpoint(look, x, t, t_next, features):
        v, first = look(x, t, features, 0)
        middle = (t + t_next) / 2
        v, second = look(x + (middle - t) * v, middle, features, 1)
        return x + (t_next - t) * v, (first, second)

    def invert(x, ends, keep):
        def look(x, t, _, __):
            if keep:
                return reader.apply(params, x, t, source)
            return velocity.apply(params, x, t, source), None

        return midpoint(look, x, *ends, None)

    def sample(x, at):
        t, t_next, features = at

        def look(x, t, features, which):
            told = inject(params, features[which], weight=weight) if features else params
            return velocity.apply(told, x, t, target), None

        return midpoint(look, x, t, t_next, features)[0], None

    y = x.astype(float_dtype(x))
    down = ts[:0:-1], ts[-2::-1]
    late, early = (
        jax.tree.map(lambda a, s=s: a[s], down)
        for s in (slice(0, steps - shared), slice(steps - shared, None))
    )
    y, _ = jax.lax.scan(partial(invert, keep=False), y, late)
    y, kept = jax.lax.scan(partial(invert, keep=True), y, early)
    if shared:
        # two steps over the same interval, whose first evaluations are at its two ends
        y, _ = jax.lax.scan(sample, y, (ts[:shared], ts[1 : shared + 1], _aligned(kept)))
    y, _ = jax.lax.scan(
        lambda y, ends: sample(y, (*ends, None)), y, (ts[shared:-1], ts[shared + 1 :])
    )
    return y.astype(x.dtype)


def _aligned(kept: PyTree) -> PyTree:
    """Features of the steps of an inversion, (at its later time, in its middle), in rising order of
    time."""
    return jax.tree.map(lambda a: a[::-1], kept)


def adapted_weights(
    text: int,
    *,
    top: int,
    scale: float = 1.0,
    shared: Sequence[bool] | None = None,
) -> Callable[[Array, Array], Array]:
    """How ReFlex mixes the attention of an edit with that of its source image.

    Of a row of the weights of an image token over the image, the source's `top` largest places get
    the edit's weights, scaled to the sum that the source has there; the other places get the
    source's. Its weights over the text are those of the source for the words that both texts share,
    and `scale` times its own for the others. The rows of the text stay those of the edit.

    Args:
        text: how many tokens of text come before those of the image, 0 for none.
        top: how many places are the edit's, at least 1 (ties with the smallest of them too).
        scale: of the weights over words that are not shared.
        shared: for each word of the edit whether the source has it at the same place, [text]; None:
            none.

    Returns:
        A function (own, given) -> new of weights [b, heads, n, m], for `inject(combine=...)` at
        sites ':weights'.

    Raises:
        ValueError: top is below 1, text below 0, or shared has another length.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import steering
        >>> own, source = jnp.array([[[[0.2, 0.3, 0.5]]]]), jnp.array([[[[0.6, 0.3, 0.1]]]])
        >>> mixed = steering.adapted_weights(0, top=2)(own, source)
        >>> [round(float(w), 2) for w in mixed.ravel()]  # 0.9 in the ratio of 2 to 3, and 0.1
        [0.36, 0.54, 0.1]

    References:
        Kim, Park, Song, Kwak, Rhee, *ReFlex: Text-Guided Editing of Real Images in Rectified Flow
            via Mid-Step Feature Extraction and Attention Adaptation*, 2025, arXiv:2507.01496.
            Words are matched by their places, where the paper aligns two texts.
    """
    name = "steering.adapted_weights"
    check_whole(name, top=top)
    check_whole(name, 0, text=text)
    if shared is not None and len(shared) != text:
        raise ValueError(f"{name}: expected shared for {text} words, got {len(shared)}")
    same = jnp.zeros(text, bool) if shared is None else jnp.asarray(shared, bool)

    def combine(own, given):
        given = given.astype(own.dtype)
        image, source = own[..., text:, text:], given[..., text:, text:]
        count = min(top, source.shape[-1])
        least = jax.lax.top_k(source, count)[0][..., -1:]
        chosen = source >= least
        total = jnp.sum(jnp.where(chosen, image, 0), axis=-1, keepdims=True)
        ratio = jnp.sum(jnp.where(chosen, source, 0), axis=-1, keepdims=True) / jnp.where(
            total > 0, total, 1
        )
        mixed = jnp.where(chosen & (total > 0), image * ratio, source)
        words = own[..., text:, :text]
        words = jnp.where(
            jnp.broadcast_to(same, words.shape), given[..., text:, :text], scale * words
        )
        low = jnp.concatenate([words, mixed], axis=-1)
        return jnp.concatenate([own[..., :text, :], low], axis=-2)

    return combine


def reflex(
    net: nn.Module,
    params: Params,
    x: Float[Array, "b *event"],
    source: Cond,
    target: Cond,
    *,
    weights: Sequence[str] = (),
    features: Sequence[str] = (),
    combine: Callable[[Array, Array], Array] | None = None,
    steps: int = 28,
    middle: float = 0.5,
    until: float = 0.25,
    features_until: float | None = None,
    mask: Array | Callable[[Mapping[str, Array]], Array] | None = None,
    blend_until: float = 0.64,
) -> Float[Array, "b *event"]:
    """ReFlex: an edit with features of the image half-way to noise.

    The image is inverted from t=1 to 0 under the source condition, by Euler steps, and the target
    is sampled from there. At each time t < until the sites are read from the network under the
    source condition at the inverted image at `middle`, and at time t, and put into the evaluation
    of the target: an image that is only inverted to the middle still shows its structure. With a
    mask, each step that starts before `blend_until` ends at

        mask x + (1 - mask) (the inverted image at the same time)

    It takes `steps` evaluations each way, and one more for each step before until.

    Args:
        net: a Linen network.
        params: its params.
        x: the images, [b, *event], at t=1.
        source: the condition that describes them, or that stands for none.
        target: the condition to edit towards.
        weights: sites of attention weights, such as 'single_blocks:weights', which `combine` mixes.
        features: sites of features that are replaced, such as 'double_blocks'.
        combine: see `inject`; None: those of the source. `adapted_weights(...)` is the paper's.
        steps: of Euler, each way.
        middle: the time in (0, 1] of the image that is read.
        until: the time up to which the sites are put in, in [0, 1]; 0 is inversion and sampling.
        features_until: an earlier time for `features`, in [0, until]; None: until. The paper's are
            0.25 for weights, 0.15 for features.
        mask: where the image is edited, 1, and where it stays, 0, an array that broadcasts to x; or
            a function of {site: weights} of the source, such as `edit_region(...)`, whose last
            value before until is that of the steps after it; None: it is edited everywhere.
        blend_until: the time up to which the mask acts, in [0, 1]: in the paper's code 18 of 28
            steps for a mask of attention, 25 for one that is given. With 1 the image stays exactly
            as it was where the mask is 0.

    Returns:
        The edited images, [b, *event].

    Raises:
        ValueError: a site is wrong (see `capture`), there is none, steps is below 1, a time is
            outside its interval, mask is a function where there are no weights before until, or it
            does not broadcast to x.

    References:
        Kim, Park, Song, Kwak, Rhee, *ReFlex: Text-Guided Editing of Real Images in Rectified Flow
            via Mid-Step Feature Extraction and Attention Adaptation*, 2025, arXiv:2507.01496. One
            window for weights to the text and to the image is ours (the paper: 0.4 and 0.25).
    """
    name = "steering.reflex"
    check_whole(name, steps=steps)
    check_number(name, "until", until, "in [0, 1]", lambda u: 0 <= u <= 1)
    check_number(name, "blend_until", blend_until, "in [0, 1]", lambda u: 0 <= u <= 1)
    if not 0 < middle <= 1:
        raise ValueError(f"{name}: expected middle in (0, 1], got {middle}")
    if features_until is not None and not 0 <= features_until <= until:
        raise ValueError(
            f"{name}: expected features_until in [0, until={until}], got {features_until}"
        )
    if callable(mask) and not (weights and until > 0):
        raise ValueError(
            f"{name}: expected weights and until > 0 for a mask that is a function, got"
            f" {list(weights)} and {until}"
        )
    reader, velocity = capture(net, [*weights, *features]), lifted(net)
    n = count_rows(name, x)
    source, target = check_cond(name, source, n), check_cond(name, target, n)
    ts = jnp.asarray(grids.uniform(steps), float_dtype(x))
    shared = min(steps, int(np.ceil(until * steps - 1e-9)))
    kept_at = int(np.round(middle * steps))

    def euler(x, ends, params, cond):
        v = velocity.apply(params, x, ends[0], cond)
        return x + (ends[1] - ends[0]) * v

    def invert(x, ends):
        return euler(x, ends, params, source), x

    y = x.astype(float_dtype(x))
    y, passed = jax.lax.scan(invert, y, (ts[:0:-1], ts[-2::-1]))  # at t = 1, ... down to 1 / steps
    read = passed[steps - max(kept_at, 1)]

    def blended(x, where, kept, begin):
        if mask is None:
            return x
        return jnp.where(begin < blend_until - 1e-6, kept + where * (x - kept), x)

    def in_shape(where):
        try:
            return jnp.broadcast_to(where, x.shape).astype(y.dtype)
        except ValueError:
            raise ValueError(
                f"{name}: expected a mask that broadcasts to x {list(x.shape)}, got"
                f" {list(jnp.shape(where))}"
            ) from None

    def sample_told(carry, at):
        (x, where), (t, t_next, kept) = carry, at
        _, found = reader.apply(params, read, t, source)
        of_weights = {site: found[site] for site in weights}
        share = None if features_until is None else (t < features_until - 1e-6).astype(t.dtype)
        told = inject(params, {site: found[site] for site in features}, weight=share)
        told = inject(told, of_weights, combine=combine)
        if callable(mask):
            where = in_shape(mask(of_weights))
        return (blended(euler(x, (t, t_next), told, target), where, kept, t), where), None

    def sample(carry, at):
        (x, where), (t, t_next, kept) = carry, at
        return (blended(euler(x, (t, t_next), params, target), where, kept, t), where), None

    way = ts[:-1], ts[1:], passed[::-1]
    early, late = (
        jax.tree.map(lambda a, part=part: a[part], way)
        for part in (slice(0, shared), slice(shared, None))
    )
    where = jnp.zeros_like(y) if mask is None or callable(mask) else in_shape(mask)
    carry, _ = jax.lax.scan(sample_told, (y, where), early)
    (y, _), _ = jax.lax.scan(sample, carry, late)
    return y.astype(x.dtype)
