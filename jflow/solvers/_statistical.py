"""The stochastic step of a bridge on the statistical manifold."""

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import rows
from jflow._core.simplex import sphere_exp, to_tangent
from jflow._core.tokens import check_logits
from jflow.paths import StatisticalBridge, corner_log
from jflow.types import Field, Step

__all__ = ["bridge_step"]


def bridge_step(field: Field, bridge: StatisticalBridge) -> Step:
    """A step of samples of tokens along a bridge on the sphere, on which they stay.

        mean = exp_x((1 - V' / V) sum_k p_k log_x(e_k)),      p = softmax(field(x, t, cond))
        std^2 = (V - V') V' / V

    Primes are at t_next, and the noise, in the tangent space at x, is added before exp. It is the
    transition of the flat bridge, exact where curvature does not matter; the last step, to t=1, has
    no noise and ends in the predicted mean. The token is the largest number of the last state among
    the first K.

    Args:
        field: the classifier, as `losses.token_cross_entropy` with the path of the bridge, or
            `losses.bridge_drift`, trains it.
        bridge: the bridge, of `paths.statistical_bridge`; samples begin at bridge.start(key, (n,
            *sites)).

    Returns:
        Step: (params, x [b, *sites, D], t, t_next, key, cond=None) -> (x_next, mean, std [b]), for
            `sample_sde`. std is that in the tangent space. With key=None x_next is the mean.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import paths, solvers
        >>> from jflow.types import Field
        >>> bridge = paths.statistical_bridge(3, steps=16, draws=64)
        >>> def first(params, x, t, cond=None, *, key=None):  # it is always class 0
        ...     return jnp.array([0.0, -99.0, -99.0, 0.0]) + 0 * x
        >>> step = solvers.bridge_step(Field(lambda *_: {}, first), bridge)
        >>> x0 = bridge.start(jax.random.key(0), (1,))
        >>> x, _ = solvers.sample_sde(step, {}, x0, jax.random.key(1), solvers.grids.uniform(4))
        >>> [abs(v) for v in x.round(3).tolist()[0]]
        [1.0, 0.0, 0.0, 0.0]

    References:
        Jo, Hwang, *Continuous Diffusion Model for Language Modeling*, 2025, arXiv:2502.11564. The
            transition is that of a Brownian bridge; the paper takes Euler's steps.
    """
    name, k = "bridge_step", bridge.num_classes

    def step(params, x, t, t_next, key, cond=None):
        x = x.astype(float_dtype(x))
        t, t_next = (rows(at, x.shape[0]).astype(x.dtype) for at in (t, t_next))
        logits = field.apply(params, x, t, cond)
        p = jax.nn.softmax(check_logits(name, logits, x.shape[:-1], k), axis=-1)
        before, after = bridge.remaining(t), bridge.remaining(t_next)
        pull = expand_to(1 - after / before, x) * corner_log(x, p)
        std = jnp.sqrt(jnp.maximum((before - after) * after / before, 0))
        mean = sphere_exp(x, pull)
        if key is None:
            return mean, mean, std
        noise = to_tangent(x, jax.random.normal(key, x.shape, x.dtype))
        return sphere_exp(x, pull + expand_to(std, x) * noise), mean, std

    return step
