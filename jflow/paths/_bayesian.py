"""Bayesian flows: the parameters of simple distributions, updated with noisy views of the data.

A sender shows y, the data with noise of accuracy alpha; Bayes' rule updates the parameters theta of
a factorized input distribution; a network of (theta, t) says what the data are. With beta(t) the
accuracy shown by time t, theta has a law in closed form given the data, `point`, which makes
training free of simulation. Time runs as in the paper: t=0 is the prior, t=1 the data. A
`BayesianFlow` holds what differs between kinds of data; `losses.bayesian_flow` and
`solvers.bayesian_update` take it.

References:
    Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_whole
from jflow._core.times import traced
from jflow._core.tokens import at_tokens, check_logits, check_tokens, corners
from jflow.types import Array, Key

__all__ = [
    "BayesianFlow",
    "bayesian_continuous",
    "bayesian_discrete",
    "bayesian_discretized",
    "discretized_logits",
    "entropy_accuracy",
    "geometric_accuracy",
    "quadratic_accuracy",
]

Accuracy = Callable[[Array], Array]


def geometric_accuracy(std: float) -> Accuracy:
    """The accuracy for continuous data, under which the entropy of the input falls linearly.

        beta(t) = std^(-2 t) - 1

    Args:
        std: the standard deviation that is left at t=1, in (0, 1).

    Returns:
        t [b] -> beta(t) [b], from 0 to std^-2 - 1.

    Raises:
        ValueError: std is outside (0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> paths.geometric_accuracy(0.5)(jnp.array([0.0, 1.0])).tolist()
        [0.0, 3.0]

    References:
        Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
    """
    if not 0 < std < 1:
        raise ValueError(f"geometric_accuracy: expected std in (0, 1), got {std}")
    rate = -2 * math.log(std)
    return lambda t: jnp.expm1(rate * t)


def quadratic_accuracy(end: float) -> Accuracy:
    """The accuracy for discrete data: beta(t) = end t^2.

    Args:
        end: beta(1), above 0: K times it is how far apart the classes are at t=1, in nats.

    Returns:
        t [b] -> beta(t) [b].

    Raises:
        ValueError: end is not finite and above 0.

    References:
        Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
    """
    _check_end("quadratic_accuracy", end)
    return lambda t: float(end) * jnp.square(t)


def entropy_accuracy(end: float, num_classes: int) -> Accuracy:
    """The accuracy of ChemBFN for discrete data, whose input loses entropy at an even pace.

        beta(t) = -(4 / K) log(1 - t + t exp(-K end / 4))

    The slope is largest at t=1, where the tokens are nearly decided; what is left to reconstruct
    there is less than under `quadratic_accuracy` at the same number of steps.

    Args:
        end: beta(1), above 0.
        num_classes: the number K of classes.

    Returns:
        t [b] -> beta(t) [b].

    Raises:
        ValueError: end is not finite and above 0, or num_classes is below 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> paths.entropy_accuracy(2.0, 4)(jnp.array([0.0, 1.0])).round(4).tolist()
        [0.0, 2.0]

    References:
        Tao, Abe, *A Bayesian Flow Network Framework for Chemistry Tasks*, 2024, arXiv:2407.20294.
    """
    _check_end("entropy_accuracy", end)
    check_whole("entropy_accuracy", 2, num_classes=num_classes)
    lost = -math.expm1(-num_classes * end / 4)
    return lambda t: -4 / num_classes * jnp.log1p(-lost * t)


def _check_end(name, end):
    if not 0 < end < math.inf:
        raise ValueError(f"{name}: expected a finite end > 0, got {end}")


class BayesianFlow(NamedTuple):
    """What a kind of data needs in a Bayesian flow; `bayesian_discrete` and others make it.

    x is the data [b, *event], theta the parameters of the input distribution, out what the network
    returns at (theta, t), and alpha [b] an accuracy.

    Attributes:
        accuracy: beta, t [b] -> [b], from 0 at t=0 and rising.
        prior: (shape of x, dtype) -> theta at t=0.
        point: (x, t, key) -> theta at t given the data, drawn from its law.
        send: (key, x, alpha) -> y, a noisy view of the data.
        update: (theta, y, t, t_next) -> theta at t_next, by Bayes' rule.
        error: (x, out) -> [b, *event], such that beta'(t) error is the rate of the loss of each
            number, in nats.
        transmission: (key, x, out, alpha) -> [b, *event] nats, the cost of sending one view.
        reconstruction: (x, out) -> [b, *event] nats, -log p of each number by what the network
            returns at t=1.
        draw: (key, out) -> x, drawn from what the network returns.
    """

    accuracy: Accuracy
    prior: Callable[[tuple[int, ...], Any], Array]
    point: Callable[[Array, Array, Key], Array]
    send: Callable[[Key, Array, Array], Array]
    update: Callable[[Array, Array, Array, Array], Array]
    error: Callable[[Array, Array], Array]
    transmission: Callable[[Key, Array, Array, Array], Array]
    reconstruction: Callable[[Array, Array], Array]
    draw: Callable[[Key, Array], Array]


def bayesian_continuous(accuracy: Accuracy) -> BayesianFlow:
    """The Bayesian flow of real numbers: theta is the mean of a normal with precision 1 + beta.

        mean_t ~ N(g x, g (1 - g)),  g = beta / (1 + beta)      y ~ N(x, 1 / alpha)
        error |x - out|^2 / 2      transmission alpha |x - out|^2 / 2

    The network predicts the data. The reconstruction is that of N(out, 1 / (1 + beta(1))), so that
    loss and reconstruction bound -log p(x) of the data as they are. Data should be scaled to
    variance 1 or to [-1, 1].

    Args:
        accuracy: beta, such as `geometric_accuracy(0.02)`.

    Returns:
        BayesianFlow: of x [b, *event] floats, theta and out like x.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> flow = paths.bayesian_continuous(paths.geometric_accuracy(0.5))
        >>> theta, y = flow.prior((1, 1), jnp.float32), jnp.array([[2.0]])
        >>> flow.update(theta, y, jnp.zeros(1), jnp.ones(1)).tolist()  # 3 of 4 is from y
        [[1.5]]

    References:
        Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
    """
    point, send, update = _of_means(accuracy)

    def error(x, out):
        return jnp.square(x - _like("bayesian_continuous", out, x)) / 2

    def transmission(key, x, out, alpha):
        return expand_to(alpha, x) * error(x, out)

    def reconstruction(x, out):
        end = jnp.ones_like(x, shape=(1,), dtype=float_dtype(x))
        precision = expand_to(1 + accuracy(end), x)
        return precision * error(x, out) + jnp.log(2 * math.pi / precision) / 2

    return BayesianFlow(
        accuracy,
        jnp.zeros,
        point,
        send,
        update,
        error,
        transmission,
        reconstruction,
        lambda key, out: out,
    )


def bayesian_discretized(accuracy: Accuracy, centers: Float[np.ndarray, " bins"]) -> BayesianFlow:
    """The Bayesian flow of numbers that are one of some levels, such as intensities of pixels.

        error |x - sum_k p_k k|^2 / 2
        transmission log N(y; x, 1 / alpha) - log sum_k p_k N(y; k, 1 / alpha)

    theta, its law and the sender are those of `bayesian_continuous`. The network returns logits of
    the levels, p = softmax(out): as they are, or made of a mean and a log standard deviation by
    `discretized_logits`.

    Args:
        accuracy: beta, such as `geometric_accuracy(0.02)`.
        centers: the levels, [bins], equally spaced and rising, for images from 1/n - 1 to 1 - 1/n.

    Returns:
        BayesianFlow: of x [b, *event] floats, each one of the levels, theta like x, and out [b,
            *event, bins]. Where x is known and is off the levels it raises a ValueError; elsewhere
            the loss is NaN.

    Raises:
        ValueError: centers are not equally spaced and rising.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import paths
        >>> levels = np.array([-0.5, 0.5])
        >>> flow = paths.bayesian_discretized(paths.geometric_accuracy(0.1), levels)
        >>> flow.error(jnp.array([[0.5]]), jnp.zeros((1, 1, 2))).tolist()
        [[0.125]]

    References:
        Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
    """
    name = "bayesian_discretized"
    levels = np.asarray(centers, np.float64)
    widths = np.diff(levels) if levels.ndim == 1 else np.zeros(0)
    if widths.size == 0 or not (widths[0] > 0 and np.allclose(widths, widths[0], rtol=1e-4)):
        raise ValueError(
            f"{name}: expected at least two centers that rise in equal steps, got {centers}"
        )
    width, count = float(widths[0]), len(levels)
    point, send, update = _of_means(accuracy)

    def index(x):
        place = (x - float(levels[0])) / width
        nearest = jnp.round(place)
        if not traced(x):
            off = np.argwhere(
                ~((np.abs(np.asarray(place - nearest)) < 0.1) & _within(np.asarray(nearest), count))
            )
            if len(off):
                at = tuple(int(i) for i in off[0])
                raise ValueError(
                    f"{name}: expected numbers among {count} levels from {levels[0]:.6g} to"
                    f" {levels[-1]:.6g}, got {float(np.asarray(x)[at]):.6g} at {list(at)}"
                )
        inside = _within(nearest, count) & (jnp.abs(place - nearest) < 0.1)
        return jnp.where(inside, nearest, -1).astype(jnp.int32)  # outside: NaN by `at_tokens`

    def log_p(out, shape):
        return jax.nn.log_softmax(check_logits(name, out, shape, count), axis=-1)

    def error(x, out):
        at = jnp.asarray(levels, float_dtype(out)).reshape((1,) * x.ndim + (-1,))
        mean = jnp.sum(jnp.exp(log_p(out, x.shape)) * at, axis=-1)
        known = at_tokens(jnp.broadcast_to(at, (*x.shape, count)), index(x))
        return jnp.square(known - mean) / 2

    def transmission(key, x, out, alpha):
        y, wide = send(key, x, alpha), expand_to(alpha, out)
        at = jnp.asarray(levels, y.dtype).reshape((1,) * x.ndim + (-1,))
        logs = -wide / 2 * jnp.square(y[..., None] - at)
        known = at_tokens(logs, index(x))
        return known - jax.nn.logsumexp(log_p(out, x.shape) + logs, axis=-1)

    def reconstruction(x, out):
        return -at_tokens(log_p(out, x.shape), index(x))

    def draw(key, out):
        at = jax.random.categorical(key, out, axis=-1)
        return jnp.asarray(levels, float_dtype(out))[at]

    return BayesianFlow(
        accuracy, jnp.zeros, point, send, update, error, transmission, reconstruction, draw
    )


def bayesian_discrete(accuracy: Accuracy, num_classes: int) -> BayesianFlow:
    """The Bayesian flow of tokens: theta are probabilities of the classes.

        theta_t = softmax(y),  y ~ N(beta (K e_x - 1), beta K I)
        update softmax(log theta + y),  y ~ N(alpha (K e_x - 1), alpha K I)
        error K |e_x - p|^2 / 2      transmission y_x - log sum_k p_k exp(y_k)

    The network returns logits, p = softmax(out). With beta = end t^2 the loss is K end t |e_x -
    p|^2.

    Args:
        accuracy: beta, such as `quadratic_accuracy(3.0)` or ChemBFN's `entropy_accuracy(1.0, 40)`.
        num_classes: the number K of classes, at least 2.

    Returns:
        BayesianFlow: of x [b, *sites] integers, theta [b, *sites, K] and out [b, *sites, K or
            more]. Where x is known and outside 0 ... K - 1 it raises a ValueError; elsewhere the
            loss is NaN.

    Raises:
        ValueError: num_classes is below 2.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> flow = paths.bayesian_discrete(paths.quadratic_accuracy(3.0), 2)
        >>> theta, y = flow.prior((1,), jnp.float32), jnp.log(jnp.array([[3.0, 1.0]]))
        >>> flow.update(theta, y, jnp.zeros(1), jnp.ones(1)).round(4).tolist()
        [[0.75, 0.25]]

    References:
        Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
    """
    name, k = "bayesian_discrete", num_classes
    check_whole(name, 2, num_classes=num_classes)

    def prior(shape, dtype):
        return jnp.full((*shape, k), 1 / k, dtype)

    def send(key, x, alpha):
        check_tokens(name, x, k)
        wide = expand_to(alpha, x)[..., None]
        noise = jax.random.normal(key, (*x.shape, k), alpha.dtype)
        return wide * (k * corners(x, k, alpha.dtype) - 1) + jnp.sqrt(wide * k) * noise

    def point(x, t, key):
        return jax.nn.softmax(send(key, x, accuracy(t)), axis=-1)

    def update(theta, y, t, t_next):
        return jax.nn.softmax(jnp.log(theta) + y, axis=-1)

    def log_p(out, x):
        check_tokens(name, x, k)
        return jax.nn.log_softmax(check_logits(name, out, x.shape, k), axis=-1)

    def error(x, out):
        logs = log_p(out, x)
        return k / 2 * jnp.sum(jnp.square(corners(x, k, logs.dtype) - jnp.exp(logs)), axis=-1)

    def transmission(key, x, out, alpha):
        y = send(key, x, alpha)
        return at_tokens(y, x) - jax.nn.logsumexp(log_p(out, x) + y, axis=-1)

    def reconstruction(x, out):
        return -at_tokens(log_p(out, x), x)

    def draw(key, out):
        return jax.random.categorical(key, out[..., :k], axis=-1)

    return BayesianFlow(
        accuracy, prior, point, send, update, error, transmission, reconstruction, draw
    )


def discretized_logits(
    mean: Float[Array, "*shape"],
    log_std: Float[Array, "*shape"],
    centers: Float[np.ndarray, " bins"],
) -> Float[Array, "*shape bins"]:
    """Logits of the levels under a normal law whose mass between two levels is shared.

        p_k = F((k + w/2 - mean) / std) - F((k - w/2 - mean) / std)

    with w the distance of the levels and F the normal distribution function. The first and the last
    level take the tails.

    Args:
        mean: the means, [*shape].
        log_std: the logs of the standard deviations, [*shape].
        centers: the levels, [bins], rising in equal steps.

    Returns:
        log p, [*shape, bins].

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import paths
        >>> logits = paths.discretized_logits(jnp.zeros(1), jnp.zeros(1), np.array([-1.0, 1.0]))
        >>> jnp.exp(logits).round(3).tolist()
        [[0.5, 0.5]]

    References:
        Graves, Srivastava, Atkinson, Gomez, *Bayesian Flow Networks*, 2023, arXiv:2308.07037.
    """
    levels = np.asarray(centers, np.float64)
    inner = (levels[1:] + levels[:-1]) / 2
    far = 1e4 * (levels[-1] - levels[0])
    edges = np.concatenate([[levels[0] - far], inner, [levels[-1] + far]])
    shape = (1,) * mean.ndim + (-1,)
    at = jnp.asarray(edges, mean.dtype).reshape(shape) - mean[..., None]
    at = at * jnp.exp(-log_std)[..., None]
    low, high = at[..., :-1], at[..., 1:]
    flip = low + high > 0  # the upper tail is the lower one, mirrored
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    log_low, log_high = jax.scipy.stats.norm.logcdf(low), jax.scipy.stats.norm.logcdf(high)
    return log_high + jnp.log1p(-jnp.exp(jnp.minimum(log_low - log_high, -1e-6)))


def _of_means(accuracy):
    """point, send and update of the means of normals."""

    def send(key, x, alpha):
        wide = expand_to(alpha, x)
        return x + jax.random.normal(key, x.shape, float_dtype(x)) / jnp.sqrt(wide)

    def point(x, t, key):
        beta = expand_to(accuracy(t), x)
        share = beta / (1 + beta)
        noise = jax.random.normal(key, x.shape, float_dtype(x))
        return share * x + jnp.sqrt(share * (1 - share)) * noise

    def update(theta, y, t, t_next):
        before, after = (expand_to(1 + accuracy(at), theta) for at in (t, t_next))
        return (before * theta + (after - before) * y) / after

    return point, send, update


def _within(place, count):
    return (place >= 0) & (place < count)


def _like(name, out, x):
    if out.shape != x.shape:
        raise ValueError(
            f"{name}: expected a prediction of shape {list(x.shape)}, got {list(out.shape)}"
        )
    return out.astype(float_dtype(out))
