"""Mixtures of von Mises laws of angles, whose numbers are read off cond."""

import math

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_event, check_whole
from jflow._core.linen import flatten_cond
from jflow.distributions._conditional import _kernel, _moved
from jflow.types import Distribution

__all__ = ["von_mises_mixture"]

_LOG_2PI = math.log(2 * math.pi)


def von_mises_mixture(
    event_shape: tuple[int, ...], components: int = 1, *, min_std: float = 0.03
) -> Distribution:
    """A mixture of von Mises laws of angles, whose weights, means and spreads are read off cond.

        log p(x) = logsumexp_k(log_softmax(logits)_k + sum_i log vM(x_i; means_ki, c_ki)),
        vM(x; m, c) = exp(c cos(x - m)) / (2 pi I_0(c)),    1 / c = exp(-log_concentrations) +
        min_std^2,

    with respect to radians, where logits, means and log_concentrations move by a linear function of
    cond. I_0 is the modified Bessel function. The concentration c is the inverse of a variance
    where it is large, so that min_std bounds the density as in `conditional_mixture`; c = 0 is the
    uniform law. Any real numbers are taken as angles; samples are in [-pi, pi].

    Also known as: circular normal mixture, Tikhonov distribution.

    Args:
        event_shape: the shape of one x, such as (2,) for two angles.
        components: K, the number of von Mises laws.
        min_std: the least spread of a component, in radians.

    Returns:
        Distribution: the law, params {'logits' [K], 'means' and 'log_concentrations' [K,
            *event_shape]}, and given a cond [b, k] also 'kernel' [k, K (1 + 2 D)], D the size of
            the event; one component has no 'logits'. It starts with means at rows of the data that
            `init` gets, concentrations of 1, and no influence of cond on the weights beyond that of
            a random kernel.

    Raises:
        ValueError: components is below 1 or min_std is not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import distributions
        >>> law = distributions.von_mises_mixture((1,))
        >>> params = {"means": jnp.zeros((1, 1)), "log_concentrations": jnp.full((1, 1), -20.0)}
        >>> round(float(law.log_prob(params, jnp.ones((1, 1)))[0]), 3)  # uniform: -log(2 pi)
        -1.838

    References:
        Mardia, Jupp, *Directional Statistics*, Wiley, 1999.
        Best, Fisher, *Efficient Simulation of the von Mises Distribution*, Applied Statistics 28,
            1979, for the samples.
    """
    event_shape, name = tuple(event_shape), "von_mises_mixture"
    check_whole(name, components=components)
    if not min_std > 0:
        raise ValueError(f"{name}: expected min_std > 0, got {min_std}")
    size, log_floor = math.prod(event_shape), 2 * math.log(min_std)
    weights = components if components > 1 else 0

    def init(key, x, cond=None):
        check_event(name, x, event_shape)
        row_key, kernel_key = jax.random.split(key)
        x = x.astype(float_dtype(x))
        rows = jax.random.randint(row_key, (components,), 0, x.shape[0])
        params = {"means": x[rows], "log_concentrations": jnp.zeros_like(x[rows])}
        if weights:
            params["logits"] = jnp.zeros_like(x, shape=(components,))
        c = flatten_cond(name, cond, x.shape[0])
        return params | _kernel(kernel_key, c, weights + 2 * components * size, x.dtype)

    def read(params, cond, n):
        """log-weights [n, K], means and concentrations [n, K, *event_shape]; or 1 for n."""
        moved = _moved(name, params, cond, n)
        means = params["means"]
        logits = params["logits"] if weights else jnp.zeros_like(means, shape=(1,))
        parts = [logits[None], means[None], params["log_concentrations"][None]]
        if moved is not None:
            if not weights:
                moved = jnp.pad(moved, ((0, 0), (1, 0)))
            moves = jnp.split(moved, (components, components * (1 + size)), axis=1)
            parts = [
                part + move.reshape(n, *part.shape[1:])
                for part, move in zip(parts, moves, strict=True)
            ]
        logits, means, raw = parts
        return jax.nn.log_softmax(logits), means, jnp.exp(-jnp.logaddexp(-raw, log_floor))

    def log_prob(params, x, cond=None, *, key=None):
        check_event(name, x, event_shape)
        log_weights, means, c = read(params, cond, x.shape[0])
        x = x.astype(float_dtype(x))
        # cos(a) - 1 without a difference of like numbers, and I_0(c) exp(-c), which does not grow
        log_p = -2 * c * jnp.square(jnp.sin((x[:, None] - means) / 2))
        log_p = log_p - jnp.log(jax.scipy.special.i0e(c)) - _LOG_2PI
        log_p = jnp.sum(log_p, axis=tuple(range(2, log_p.ndim)))
        return jax.nn.logsumexp(log_p + log_weights, axis=1)

    def sample(params, key, n, cond=None):
        component_key, angle_key = jax.random.split(key)
        log_weights, means, c = (
            jnp.broadcast_to(part, (n, *part.shape[1:])) for part in read(params, cond, n)
        )
        k = jax.random.categorical(component_key, log_weights, axis=-1)
        k = k.reshape(n, 1, *(1 for _ in event_shape))
        mean, c = (jnp.squeeze(jnp.take_along_axis(part, k, axis=1), 1) for part in (means, c))
        x = mean + _centered_angles(angle_key, c)
        return x - 2 * math.pi * jnp.round(x / (2 * math.pi))

    return Distribution(init, log_prob, sample)


def _centered_angles(key, c):
    """Draws of von Mises laws of mean 0 and concentrations c, by rejection from wrapped Cauchy
    laws; two of three proposals are accepted at least."""
    c = jnp.maximum(c, 1e-6)
    r = 1 + jnp.sqrt(1 + 4 * jnp.square(c))
    rho = 2 * c / (jnp.sqrt(r) * (jnp.sqrt(r) + math.sqrt(2)))
    s = (1 + jnp.square(rho)) / (2 * rho)

    def propose(carry):
        key, angle, accepted = carry
        key, draw_key = jax.random.split(key)
        u = jax.random.uniform(draw_key, (3, *c.shape), c.dtype, minval=jnp.finfo(c.dtype).tiny)
        z = jnp.cos(math.pi * u[0])
        f = (1 + s * z) / (s + z)
        w = c * (s - f)
        good = (w * (2 - w) > u[1]) | (jnp.log(w / u[1]) + 1 - w >= 0)
        proposed = jnp.sign(u[2] - 0.5) * jnp.arccos(jnp.clip(f, -1, 1))
        return key, jnp.where(accepted, angle, proposed), accepted | good

    start = key, jnp.zeros_like(c), jnp.zeros_like(c, bool)
    return jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), propose, start)[1]
