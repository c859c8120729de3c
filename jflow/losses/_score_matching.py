"""Training a flow by its score, the gradient of its log-density, instead of its likelihood."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype, sum_event
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_noun, check_rows, check_whole, need_key
from jflow.types import Array, Distribution, Flow, Loss

__all__ = ["denoising_score_matching", "score_matching"]


def score_matching(flow: Flow | Distribution, *, probes: int | None = 1) -> Loss:
    """Score matching: half the squared error of the score of a flow, up to a constant.

    Also known as: Hyvärinen score matching, sliced score matching, EBFlow.

    With the score s(x) = grad_x log p(x), integration by parts makes the error of s against the
    score of the data, which nobody knows, a mean over data:

        E |s(x) - grad log p_data(x)|^2 / 2 + const = E [|s(x)|^2 / 2 + tr grad s(x)].

    Of the trace an estimate v.(grad s) v is taken, v of independent signs, or all of it with
    probes=None. Summands of log p that do not depend on x have no gradient, so that the log-dets of
    linear layers are not computed: in a flow whose linear layers map data to noise
    (`bijectors.invert(bijectors.linear(d))`) a step costs O(d^2) a layer instead of O(d^3). The
    flow is normalized by construction: after training, `flow.log_prob` is its density in nats,
    which the value of this loss is not.

    The activations must have a second derivative that is not 0 (no ReLU). Score matching hardly
    sees the weights of modes that lie apart.

    Args:
        flow: The flow, whose params the loss takes. Splines take
            `implementation="plain"` (`flows.neural_spline`), which is made for second derivatives.
        probes: The number of draws of v for each row; None for the trace itself, one direction
            after another, which needs no key.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b]}. It has no metrics.

    Raises:
        TypeError: At construction for what has no log_prob.
        ValueError: At construction for probes < 1; at trace time for a batch without 'x', with an
            unknown key, or with rows that don't match, and for probes without a key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, losses
        >>> loss = losses.score_matching(distributions.normal((2,)), probes=None)
        >>> x = jnp.array([[3.0, 4.0]])
        >>> round(float(loss({}, None, {"x": x})[0]), 3)  # |x|^2 / 2 - 2
        10.5

    References:
        Hyvärinen, *Estimation of Non-Normalized Statistical Models by Score Matching*, 2005.
        Song, Garg, Shi, Ermon, *Sliced Score Matching: A Scalable Approach to Density and Score
            Estimation*, 2019, arXiv:1905.07088.
        Chao, Sun, Hsu, Kira, Lee, *Training Energy-Based Normalizing Flow with Score-Matching
            Objectives*, 2023, arXiv:2305.15267.
    """
    check_noun("score_matching", flow, Flow, Distribution)
    if probes is not None:
        check_whole("score_matching", probes=probes)

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read_batch("score_matching", batch, ("x", "cond", "weight"))
        if probes is None:
            size = math.prod(x.shape[1:])
            directions = jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
            directions = jnp.broadcast_to(directions, (size, *x.shape))
        else:
            key, probe_key = jax.random.split(need_key("score_matching", key))
            directions = jax.random.rademacher(probe_key, (probes, *x.shape), x.dtype)
        score, curvature = jax.linearize(_score("score_matching", flow, params, cond, key), x)
        traces = jax.lax.map(lambda v: sum_event(v * curvature(v)), directions)
        trace = jnp.sum(traces, axis=0) / (1 if probes is None else probes)
        return mean_of_rows(0.5 * sum_event(jnp.square(score)) + trace, weight), {}

    return loss


def denoising_score_matching(flow: Flow | Distribution, std: float) -> Loss:
    """Denoising score matching: the score of a flow regressed on the way back from noise.

    With noise e of unit variance, the loss is the mean of

        std^2 |s(x + std e) + e / std|^2 / 2,    s(x) = grad_x log p(x),

    which is least where p is the density of the data with their noise, not of the data: a Gaussian
    of covariance C is learned as one of C + std^2 I. It costs one derivative less than
    `score_matching`, in whose docstring is what the two share. The factor std^2 keeps the loss of
    the order of the dimension whatever the noise.

    Also known as: DSM.

    Args:
        flow: The flow, whose params the loss takes.
        std: The standard deviation of the noise, in units of the data.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b]}, that needs a key. It
        has no metrics.

    Raises:
        TypeError: At construction for what has no log_prob.
        ValueError: At construction for a std that is not positive; at trace time for a batch
            without 'x', with an unknown key, or with rows that don't match, and for a key that is
            None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, losses
        >>> loss = losses.denoising_score_matching(distributions.normal((2,)), 1.0)
        >>> x = jnp.zeros((4, 2))
        >>> float(loss({}, jax.random.key(0), {"x": x})[0])  # N(0, I) has the score of this noise
        0.0

    References:
        Vincent, *A Connection Between Score Matching and Denoising Autoencoders*, 2011.
        Chao, Sun, Hsu, Kira, Lee, *Training Energy-Based Normalizing Flow with Score-Matching
            Objectives*, 2023, arXiv:2305.15267.
    """
    check_noun("denoising_score_matching", flow, Flow, Distribution)
    if not std > 0:
        raise ValueError(f"denoising_score_matching: expected std > 0, got {std}")

    def loss(params, key, batch, frozen=None):
        x, cond, weight = read_batch("denoising_score_matching", batch, ("x", "cond", "weight"))
        noise_key, flow_key = jax.random.split(need_key("denoising_score_matching", key))
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        score = _score("denoising_score_matching", flow, params, cond, flow_key)(x + std * noise)
        error = std * score.astype(float_dtype(x)) + noise
        return mean_of_rows(0.5 * sum_event(jnp.square(error)), weight), {}

    return loss


def _score(name: str, flow, params, cond, key) -> Callable[[Array], Array]:
    """x -> grad log p(x), like x."""

    def total(x):
        log_prob = flow.log_prob(params, x, cond, key=key)
        return jnp.sum(check_rows(name, "log_prob", log_prob, x.shape[0]))

    return jax.grad(total)
