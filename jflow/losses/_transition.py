"""Transition matching: what carries noise to data in a few steps, each of which draws."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jflow import times
from jflow._core.arrays import expand_to, float_dtype, mean_event
from jflow._core.batch import mean_of_rows, read_as_given
from jflow._core.checks import check_noun, need_key
from jflow._core.sites import check_features, site_rows
from jflow._core.times import Times, partition
from jflow.losses._pairs import draw_parts
from jflow.nets import Headed
from jflow.solvers import transition_condition
from jflow.types import BatchTransform, Cond, Loss, Time

__all__ = ["transition_matching", "transition_pairs"]

_UNIFORM = times.uniform()


def transition_matching(net: Headed, *, time: Time = _UNIFORM, head_time: Time = _UNIFORM) -> Loss:
    """Difference transition matching (DTM): the law of data minus noise, given where they meet.

    Flow matching knows the mean of Y = x1 - x0 at x_t; this learns to draw from its law. On the
    linear path, with h the features of x_t = (1 - t) x0 + t x1, a noise z and a time s for each
    token,

        y_s = (1 - s) z + s Y,      loss = (velocity(y_s, s, h) - (Y - z))^2,

    the mean over the event, then over rows. At the minimum the head carries noise to the law of Y
    at a token, given x_t; the tokens of one step are independent of one another given x_t.
    `solvers.sample_transitions` walks x <- x + Y / T in T such steps. With features of the whole
    event one step is exact, with those of tokens the law of x tends to that of the data as T grows:
    two unit Gaussians of correlation 0.9 end with variance and correlation (1, 0) at T = 1, (.83,
    .80) at T = 4 and (.99, .90) at T = 64.

    Args:
        net: a backbone and a head, as `nets.headed` makes them.
        time: the law of t, (key, n) -> t [n]. The paper's, of a fixed T, is
            `times.sequential(T, starts=1.0)`; with uniform times one network serves every T.
        head_time: the law of s, (key, n) -> s [n].

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b], or [b, n] along the tokens of x [b, n, ...]}. The mean is weighted, sum(w l) /
        sum(w). It has no metrics.

    Raises:
        TypeError: At construction for what is no `nets.Headed`.
        ValueError: At trace time for features or a velocity of another shape, a batch without 'x'
            or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, nets
        >>> from jflow.types import Field, Velocity
        >>> backbone = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: x)
        >>> head = Velocity(lambda *_: {}, lambda params, y, s, h=None, *, key=None: 0 * y)
        >>> loss = losses.transition_matching(nets.headed(backbone, head))
        >>> params = {"backbone": {}, "head": {}}
        >>> value, metrics = loss(params, jax.random.key(0), {"x": jnp.ones((4, 3, 2))})
        >>> value.shape
        ()

    References:
        Shaul, Singer, Gat, Lipman, *Transition Matching: Scalable and Flexible Generative
            Modeling*, 2025, arXiv:2506.23589 (times in [0, 1] and the law of t are ours).
    """
    check_noun("transition_matching", net, Headed)

    def loss(params, key, batch, frozen=None):
        pairs = draw_parts("transition_matching", key, batch, time)
        x0, x1, t, weight = pairs.x0, pairs.x1, pairs.t, pairs.weight
        if isinstance(x1, Mapping):
            raise ValueError(f"transition_matching: expected 'x' to be an array, got {sorted(x1)}")
        features_key, head_key = jax.random.split(pairs.dropout_key)
        time_key, noise_key = jax.random.split(pairs.path_key)
        at = expand_to(t, x1)
        x_t = ((1 - at) * x0 + at * x1).astype(x1.dtype)
        h = net.features(params, x_t, t, pairs.cond, key=features_key)
        sites = check_features("transition_matching", x1, h).shape[1:-1]
        y = site_rows((x1 - x0).astype(float_dtype(x1)), sites)
        z = jax.random.normal(noise_key, y.shape, y.dtype)
        s = head_time(time_key, y.shape[0]).astype(y.dtype)
        at = expand_to(s, y)
        y_s = ((1 - at) * z + at * y).astype(x1.dtype)
        v = net.velocity.apply(params, y_s, s, site_rows(h, sites), key=head_key)
        if v.shape != y.shape:
            raise ValueError(
                f"transition_matching: expected a velocity of shape {list(y.shape)}, "
                f"got {list(v.shape)}"
            )
        error = jnp.square(v.astype(y.dtype) - (y - z)).reshape(x1.shape)
        if weight is not None and weight.ndim == 2:  # then a token is a row
            error, weight = site_rows(error, x1.shape[1:2]), weight.reshape(-1)
        return mean_of_rows(mean_event(error), weight), {}

    return loss


def transition_pairs(
    grid: int | Times, *, condition: Callable[..., Cond] = transition_condition
) -> BatchTransform:
    """A batch transform for autoregressive transition matching (ARTM): a state, given the last.

        x_k = (1 - t_k) e + t_k x,      e standard normal, anew for both states of a pair

    For a step k that is uniform over the grid, x becomes the state at t_{k+1} and cond the state at
    t_k with its time. In front of any loss of a conditional law it trains the kernel that
    `solvers.sample_kernels` draws from; with a law that is causal over tokens it is ARTM:

        law = distributions.causal(net, token)
        loss = losses.chain(losses.transition_pairs(8), losses.nll(law))

    The noise of the two states is independent. With one noise for both, as in DTM, the chain would
    have the same marginals, but kernels that the tokens drawn so far all but determine.

    Args:
        grid: the number of equal steps, or times that rise from 0 to 1.
        condition: (x_k, t_k [b], cond) -> the condition of the law.

    Returns:
        The transform (key, batch, frozen=None) -> batch, of a batch without 'x0'.

    Raises:
        ValueError: At construction for times that do not rise from 0 to 1; at trace time for a
            batch without 'x' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> pairs = losses.transition_pairs(1)  # from noise to data
        >>> batch = pairs(jax.random.key(0), {"x": jnp.ones((2, 3, 1))})
        >>> batch["x"].ravel().tolist(), batch["cond"].aligned.shape
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], (2, 3, 1))

    References:
        Shaul, Singer, Gat, Lipman, *Transition Matching: Scalable and Flexible Generative
            Modeling*, 2025, arXiv:2506.23589.
    """
    knots = partition("transition_pairs", grid)

    def transform(key, batch, frozen=None):
        need_key("transition_pairs", key)
        x, cond = read_as_given("transition_pairs", without_weight(batch), ("x", "cond"))
        step_key, *keys = jax.random.split(key, 3)
        ts = jnp.asarray(knots, float_dtype(x))
        k = jax.random.randint(step_key, x.shape[:1], 0, len(knots) - 1)
        last, after = (noised_to(key, x, ts[i]) for key, i in zip(keys, (k, k + 1), strict=True))
        return {**batch, "x": after, "cond": condition(last, ts[k], cond)}

    return transform


def without_weight(batch):
    """The batch without weights, which may be those of rows or of tokens, as the loss says."""
    return {name: value for name, value in batch.items() if name != "weight"}


def noised_to(key, x, t):
    """(1 - t) e + t x, with x [b, *event] and t [b, ...] along its leading axes."""
    at = expand_to(t, x)
    noise = jax.random.normal(key, x.shape, float_dtype(x))
    return ((1 - at) * noise + at * x).astype(x.dtype)
