"""Laws whose numbers are read off cond: what a network says of the next token becomes a density."""

import math

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype, mean_and_std, sum_event
from jflow._core.checks import check_event, check_noun, check_whole
from jflow._core.keys import split_key
from jflow._core.linen import flatten_cond
from jflow.distributions._bases import _LOG_2PI, mixture_log_prob
from jflow.types import Array, Cond, Distribution, Flow, Key

__all__ = ["around_previous", "categorical", "conditional_mixture", "contrasted", "split"]

_lecun = jax.nn.initializers.lecun_normal()


def categorical(num_classes: int, *, temperature: float = 1.0) -> Distribution:
    """The law of one symbol of a vocabulary, whose logits are a linear function of cond.

        log p(x) = log_softmax((bias + cond kernel) / temperature)_x,    x in 0 .. num_classes - 1,

    and -inf for a number outside the vocabulary. Params that were trained at temperature 1 may be
    sampled at another: they serve both laws.

    Also known as: softmax head, cross-entropy.

    Args:
        num_classes: K, the size of the vocabulary.
        temperature: what the logits are divided by.

    Returns:
        Distribution: the law of x [b] of integers, or of floats that are whole; samples are
            integers. Its params are {'logits' [K]}, of zeros, and given a cond [b, k] also 'kernel'
            [k, K].

    Raises:
        ValueError: num_classes is below 1 or temperature is not positive, at construction; or x is
            not [b], at the call.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> letter = distributions.categorical(4)
        >>> x = jnp.array([0, 3, 4])
        >>> log_prob = letter.log_prob(letter.init(jax.random.key(0), x), x)
        >>> [round(float(v), 3) for v in log_prob]  # -log 4, and outside the vocabulary
        [-1.386, -1.386, -inf]
    """
    check_whole("categorical", num_classes=num_classes)
    if not temperature > 0:
        raise ValueError(f"categorical: expected temperature > 0, got {temperature}")
    temperature = float(temperature)

    def init(key, x, cond=None):
        check_event("categorical", x, ())
        c = flatten_cond("categorical", cond, x.shape[0])
        dtype = float_dtype(x) if c is None else float_dtype(c)
        params = {"logits": jnp.zeros_like(x, shape=(num_classes,), dtype=dtype)}
        return params | _kernel(key, c, num_classes, dtype)

    def linear(params, cond, n):
        logits, moved = params["logits"][None], _moved("categorical", params, cond, n)
        return jnp.broadcast_to(logits, (n, num_classes)) if moved is None else logits + moved

    def log_prob(params, x, cond=None, *, key=None):
        check_event("categorical", x, ())
        log_p = jax.nn.log_softmax(linear(params, cond, x.shape[0]) / temperature)
        inside = (x >= 0) & (x < num_classes) & (x == jnp.round(x))
        index = jnp.where(inside, x, jnp.zeros_like(x)).astype(jnp.int32)
        found = jnp.take_along_axis(log_p, index[:, None], axis=1)[:, 0]
        found = jnp.where(inside, found, -jnp.inf)
        return jnp.where(x != x, jnp.nan, found)  # a missing number is missing

    def sample(params, key, n, cond=None):
        logits = linear(params, cond, n) / temperature
        return jax.random.categorical(key, logits, axis=-1)

    return Distribution(init, log_prob, sample)


def conditional_mixture(
    event_shape: tuple[int, ...], components: int = 1, *, min_std: float = 1e-3
) -> Distribution:
    """A mixture of diagonal normals whose weights, means and deviations are read off cond.

        log p(x) = logsumexp_k(log_softmax(logits)_k + log N(x; means_k, stds_k^2)),
        stds = exp(log_stds) + min_std,

    where logits, means and log_stds move by a linear function of cond. The floor of the deviations
    bounds the density: without one a component on a single point has any likelihood. It starts
    without cond as `mixture_of_normals` does, at the data that `init` gets.

    Also known as: mixture density network, mixture head, Gaussian head (components=1).

    Args:
        event_shape: the shape of one x, such as (2,).
        components: K, the number of normals; 1 is a Gaussian.
        min_std: the least standard deviation, in the units of x.

    Returns:
        Distribution: the law, params {'logits' [K], 'means' [K, *event_shape], 'log_stds' [K,
            *event_shape]}, and given a cond [b, k] also 'kernel' [k, K (1 + 2 D)], D the size of
            the event. A Gaussian has no 'logits', and a kernel [k, 2 D].

    Raises:
        ValueError: components is below 1 or min_std is not positive.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> law = distributions.conditional_mixture((2,), 3)
        >>> x, cond = jax.random.normal(jax.random.key(0), (8, 2)), jnp.ones((8, 5))
        >>> params = law.init(jax.random.key(1), x, cond)
        >>> law.log_prob(params, x, cond).shape, params["kernel"].shape
        ((8,), (5, 15))

    References:
        Bishop, *Mixture Density Networks*, Aston University, 1994.
        Tschannen, Pinto, Kolesnikov, *JetFormer: An Autoregressive Generative Model of Raw Images
            and Text*, 2024, arXiv:2411.19722, whose tokens have this law.
    """
    event_shape = tuple(event_shape)
    check_whole("conditional_mixture", components=components)
    if not min_std > 0:
        raise ValueError(f"conditional_mixture: expected min_std > 0, got {min_std}")
    floor, name = float(min_std), "conditional_mixture"
    size = math.prod(event_shape)
    weights = components if components > 1 else 0  # how many logits there are

    def init(key, x, cond=None):
        check_event(name, x, event_shape)
        key_row, key_noise, key_kernel = jax.random.split(key, 3)
        mean, std = mean_and_std(x, axis=0)
        shape = (components, *event_shape)
        means = mean[None]
        if components > 1:
            rows = jax.random.randint(key_row, (components,), 0, x.shape[0])
            noise = 0.1 * std[None] * jax.random.normal(key_noise, shape, std.dtype)
            means = x[rows].astype(std.dtype) + noise
        params = {"means": means, "log_stds": jnp.broadcast_to(jnp.log(std)[None], shape)}
        if weights:
            params["logits"] = jnp.zeros_like(std, shape=(components,))
        c = flatten_cond(name, cond, x.shape[0])
        made = _kernel(key_kernel, c, weights + 2 * components * size, std.dtype)
        if made:  # the means move in the units of x
            one = jnp.ones_like(std, shape=(weights,))
            units = jnp.broadcast_to(std[None], shape).reshape(-1)
            made["kernel"] = (
                made["kernel"] * jnp.concatenate([one, units, jnp.ones_like(units)])[None]
            )
        return params | made

    def read(params, cond, n):
        """logits [n, K] or [1, K], and means and log_stds alike with [*event_shape]."""
        moved = _moved(name, params, cond, n)
        means = params["means"]
        alone = jnp.zeros_like(means, shape=(weights or 1,))
        parts = params["logits"] if weights else alone, means, params["log_stds"]
        if moved is None:
            return tuple(part[None] for part in parts)
        if not weights:
            moved = jnp.pad(moved, ((0, 0), (1, 0)))  # the weight of the one normal does not move
        ends = (components, components * (1 + size))
        return tuple(
            part[None] + move.reshape(n, *part.shape)
            for part, move in zip(parts, jnp.split(moved, ends, axis=1), strict=True)
        )

    def log_prob(params, x, cond=None, *, key=None):
        check_event(name, x, event_shape)
        logits, means, log_stds = read(params, cond, x.shape[0])
        return mixture_log_prob(x, logits, means, jnp.logaddexp(log_stds, math.log(floor)))

    def sample(params, key, n, cond=None):
        key_component, key_noise = jax.random.split(key)
        logits, means, log_stds = (
            jnp.broadcast_to(part, (n, *part.shape[1:])) for part in read(params, cond, n)
        )
        k = jax.random.categorical(key_component, logits, axis=-1)
        k = k.reshape(n, 1, *(1 for _ in event_shape))
        mean, log_std = (
            jnp.squeeze(jnp.take_along_axis(part, k, axis=1), 1) for part in (means, log_stds)
        )
        std = jnp.exp(jnp.logaddexp(log_std, math.log(floor)))
        return mean + std * jax.random.normal(key_noise, mean.shape, mean.dtype)

    return Distribution(init, log_prob, sample)


def around_previous(features: int, std: float) -> Distribution:
    """The normal law around the preceding token, as the source of a flow to the next one.

        x_0 ~ N(x_{i-1}, std^2),

    where the preceding token is the first `features` numbers of cond, as `nets.WithPrevious` puts
    them there. A flow between neighbors is short where neighbors are alike. The law that a flow
    learns does not depend on its source.

    Args:
        features: d, the size of a token.
        std: the standard deviation.

    Returns:
        Distribution: the law of x [b, d] given cond [b, d + k], params {}.

    Raises:
        ValueError: features is below 1 or std is not positive, at construction; or cond has fewer
            numbers, at the call.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> source = distributions.around_previous(1, 0.5)
        >>> cond = jnp.array([[3.0, 7.0]])  # the preceding token 3, and what a network gave
        >>> log_prob = source.log_prob({}, jnp.array([[3.0]]), cond)
        >>> round(float(log_prob[0]), 3)  # -log(2 pi) / 2 + log 2
        -0.226

    References:
        Wang, Liu, Meng, et al., *FELLE: Autoregressive Speech Synthesis with Token-Wise
            Coarse-to-Fine Flow Matching*, 2025, arXiv:2502.11128.
    """
    check_whole("around_previous", features=features)
    if not std > 0:
        raise ValueError(f"around_previous: expected std > 0, got {std}")
    std = float(std)

    def previous(cond: Cond, n: int) -> Array:
        c = flatten_cond("around_previous", cond, n)
        if c is None or c.shape[1] < features:
            raise ValueError(
                f"around_previous: expected cond [b, k] that begins with the {features} numbers of"
                f" the preceding token (nets.WithPrevious), got"
                f" {None if c is None else list(c.shape)}"
            )
        return c[:, :features]

    def init(key, x, cond=None):
        check_event("around_previous", x, (features,))
        previous(cond, x.shape[0])
        return {}

    def log_prob(params, x, cond=None, *, key=None):
        check_event("around_previous", x, (features,))
        z = (x - previous(cond, x.shape[0]).astype(x.dtype)) / std
        return sum_event(-0.5 * (jnp.square(z) + _LOG_2PI) - math.log(std))

    def sample(params, key, n, cond=None):
        mean = previous(cond, n)
        return mean + std * jax.random.normal(key, mean.shape, mean.dtype)

    return Distribution(init, log_prob, sample)


def split(first: Distribution | Flow, rest: Distribution | Flow, size: int) -> Distribution:
    """Two independent laws of the numbers of an event: of the first ones, and of the rest.

        log p(x | cond) = log p_first(x[..., :size] | cond) + log p_rest(x[..., size:])

    The rest does not look at cond: with a normal law it is what a flow factors out, whose
    likelihood counts.

    Args:
        first: the law of the first `size` numbers along the last axis of x, given cond.
        rest: the law of the others.
        size: how many numbers are the first ones.

    Returns:
        Distribution: the law of x [b, *event], params {'first', 'rest'}.

    Raises:
        TypeError: first or rest is not a `Distribution` or a `Flow`.
        ValueError: size is below 1; or at the call, x has no more than `size` numbers.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> law = distributions.split(
        ...     distributions.conditional_mixture((1,)), distributions.normal((2,)), 1
        ... )
        >>> x = jax.random.normal(jax.random.key(0), (4, 3))
        >>> params = law.init(jax.random.key(1), x)
        >>> law.log_prob(params, x).shape, law.sample(params, jax.random.key(2), 5).shape
        ((4,), (5, 3))

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density estimation using Real NVP*, 2016, arXiv:1605.08803,
            for dimensions that are factored out.
        Tschannen, Pinto, Kolesnikov, *JetFormer: An Autoregressive Generative Model of Raw Images
            and Text*, 2024, arXiv:2411.19722.
    """
    check_noun("split", first, Distribution, Flow)
    check_noun("split", rest, Distribution, Flow)
    check_whole("split", size=size)

    def parts(x):
        if x.ndim < 2 or x.shape[-1] <= size:
            raise ValueError(
                f"split: expected more than {size} numbers along the last axis of x, got"
                f" {list(x.shape)}"
            )
        return x[..., :size], x[..., size:]

    def init(key, x, cond=None):
        (a, b), (first_key, rest_key) = parts(x), jax.random.split(key)
        return {"first": first.init(first_key, a, cond), "rest": rest.init(rest_key, b)}

    def log_prob(params, x, cond=None, *, key=None):
        (a, b), (first_key, rest_key) = parts(x), split_key(key, 2)
        found = first.log_prob(params["first"], a, cond, key=first_key)
        return found + rest.log_prob(params["rest"], b, key=rest_key)

    def sample(params, key, n, cond=None):
        first_key, rest_key = jax.random.split(key)
        a = first.sample(params["first"], first_key, n, cond)
        b = rest.sample(params["rest"], rest_key, n)
        return jnp.concatenate([a, b.astype(a.dtype)], axis=-1)

    return Distribution(init, log_prob, sample)


def contrasted(token: Distribution | Flow, scale: float, *, draws: int = 32) -> Distribution:
    """Guidance of a law by two conditions: towards the first half of cond, away from the second.

        p_scale(x) ~ p(x | c) (p(x | c) / p(x | null))^(scale - 1),    cond = (c, null) [b, 2 k],

    from which a sample is one of `draws` samples of p(x | c), chosen with probabilities in
    proportion to the second factor: importance resampling, exact as draws grows. At scale 1 it is
    p(x | c). Its normalizer is unknown, so that there is no `log_prob`. It takes the h of
    `nets.Contrasted` as cond: `causal(nets.Contrasted(net, null), contrasted(token, 2.0))` samples
    with the params of `causal(net, token)`.

    Also known as: classifier-free guidance of an autoregressive model, density guidance.

    Args:
        token: the law of a token given one condition.
        scale: how far it is guided; 1 is not at all.
        draws: the number of samples that one is chosen from.

    Returns:
        Distribution: the guided law, with the params of `token`. Its `log_prob` raises a
            ValueError.

    Raises:
        TypeError: token is not a `Distribution` or a `Flow`.
        ValueError: scale is below 1, or draws is below 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> law = distributions.contrasted(distributions.conditional_mixture((1,)), 2.0)
        >>> zero = jnp.zeros((1, 1))
        >>> params = {"means": zero, "log_stds": zero}
        >>> params |= {"kernel": jnp.array([[1.0, 0.0]])}  # the mean is cond
        >>> cond = jnp.array([[0.5, 0.0]])  # towards 0.5, away from 0
        >>> x = law.sample(params, jax.random.key(0), 4096, jnp.repeat(cond, 4096, axis=0))
        >>> round(float(x.mean()), 1)  # N(2 0.5, 1)
        1.0

    References:
        Ho, Salimans, *Classifier-Free Diffusion Guidance*, 2022, arXiv:2207.12598.
        Tschannen, Eastwood, Mentzer, *GIVT: Generative Infinite-Vocabulary Transformers*, 2023,
            arXiv:2312.02116, which samples this density by rejection; to resample is ours.
    """
    check_noun("contrasted", token, Distribution, Flow)
    check_whole("contrasted", draws=draws)
    if not scale >= 1:
        raise ValueError(f"contrasted: expected scale >= 1, got {scale}")
    scale = float(scale)

    def halves(cond):
        shape = getattr(cond, "shape", None)
        if shape is None or len(shape) != 2 or shape[1] % 2:
            given = None if shape is None else list(shape)
            raise ValueError(f"contrasted: expected cond [b, 2 k], got {given}")
        return jnp.split(cond, 2, axis=1)

    def init(key, x, cond=None):
        return token.init(key, x, halves(cond)[0])

    def log_prob(params, x, cond=None, *, key=None):
        raise ValueError(
            "contrasted: expected samples alone, because the density has no closed normalizer, got"
            " a call of log_prob"
        )

    def sample(params, key, n, cond=None):
        draw_key, choose_key = jax.random.split(key)
        towards, away = (jnp.repeat(half, draws, axis=0) for half in halves(cond))
        x = token.sample(params, draw_key, n * draws, towards)
        gain = token.log_prob(params, x, towards) - token.log_prob(params, x, away)
        chosen = jax.random.categorical(choose_key, (scale - 1) * gain.reshape(n, draws))
        x = x.reshape(n, draws, *x.shape[1:])
        index = chosen.reshape(n, *(1 for _ in x.shape[1:]))
        return jnp.squeeze(jnp.take_along_axis(x, index, axis=1), 1)

    return Distribution(init, log_prob, sample)


def _kernel(key: Key, c: Array | None, size: int, dtype) -> dict:
    """{'kernel' [k, size]} for cond [b, k]; nothing without one."""
    return {} if c is None else {"kernel": _lecun(key, (c.shape[1], size), dtype)}


def _moved(name: str, params, cond: Cond, n: int) -> Array | None:
    """What the kernel adds for a cond of n rows, [n, size]; None where there is neither."""
    c = flatten_cond(name, cond, n)
    if (c is None) != ("kernel" not in params):
        had = "with" if "kernel" in params else "without"
        raise ValueError(f"{name}: expected a call {had} cond, as its params were made")
    if c is None:
        return None
    if c.shape[1] != params["kernel"].shape[0]:
        raise ValueError(
            f"{name}: expected cond of {params['kernel'].shape[0]} numbers a row, got {c.shape[1]}"
        )
    return jnp.matmul(c.astype(params["kernel"].dtype), params["kernel"])
