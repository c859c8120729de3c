"""For the tests of distillations: exact flow maps of two laws, and maps next to them with two
params."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow import oracles
from jflow.types import FlowMap, Velocity

GAUSSIAN = oracles.gaussian([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
MIXTURE = oracles.mixture([0.4, 0.6], [[-1.5, 0.5], [1.0, -0.5]], [0.3, 0.2])
ORACLES = {"gaussian": GAUSSIAN, "mixture": MIXTURE}


def exact_map(name, steps=64):
    """The average velocity of an oracle. The mixture's is solved by `steps` of RK4, for it needs a
    forward-mode derivative: y' = v(x + (r - t) y, t + s (r - t)) over s in [0, 1]."""
    if name == "gaussian":
        return oracles.as_average_velocity(GAUSSIAN)

    def apply(params, x, t, r, cond=None, *, key=None):
        gap, h = r - t, 1 / steps

        def slope(s, y):
            return MIXTURE.velocity(x + gap[:, None] * y, t + s * gap)

        def step(y, s):
            a = slope(s, y)
            b = slope(s + h / 2, y + h / 2 * a)
            c = slope(s + h / 2, y + h / 2 * b)
            return y + h / 6 * (a + 2 * b + 2 * c + slope(s + h, y + h * c)), None

        return jax.lax.scan(step, jnp.zeros_like(x), jnp.arange(steps, dtype=x.dtype) * h)[0]

    return FlowMap(lambda key, x, t, r, cond=None: {}, apply)


WEIGHTS, CENTRES, SPREAD = np.asarray([0.3, 0.7]), np.asarray([-2.0, 1.5]), 0.6
LINE_MIXTURE = oracles.mixture(WEIGHTS, CENTRES[:, None], SPREAD**2)


def straight_mixture(knots=(0.0, 1.0)):
    """The velocity of LINE_MIXTURE's flow made straight between the knots, + a x + b t. In one
    dimension the flow keeps quantiles: the line through x at t is found by bisection, in float64.
    """

    def below(x, t):
        std = jnp.sqrt((1 - t) ** 2 + (t * SPREAD) ** 2)
        share = jax.scipy.stats.norm.cdf((x - t * CENTRES[None]) / std)
        return jnp.sum(WEIGHTS[None] * share, axis=1, keepdims=True)

    def root(rises, like):
        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            above = rises(middle) > 0
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        return jax.lax.fori_loop(
            0, 60, halve, (jnp.full_like(like, -8.0), jnp.full_like(like, 8.0))
        )[0]

    def apply(params, x, t, cond=None, *, key=None):
        times = jnp.asarray(knots, t.dtype)
        k = jnp.clip(jnp.searchsorted(times, t, side="right") - 1, 0, len(knots) - 2)
        a, b = times[k][:, None], times[k + 1][:, None]
        w = (t[:, None] - a) / (b - a)
        end = lambda z: root(lambda y: below(y, b) - below(z, a), z)  # noqa: E731
        start = root(lambda z: (1 - w) * z + w * end(z) - x, x)
        return (end(start) - start) / (b - a) + params["a"] * x + params["b"] * t[:, None]

    return Velocity(lambda key, x, t, cond=None: at(), apply)


def at(a=0.0, b=0.0):
    return {"a": jnp.asarray(a, float), "b": jnp.asarray(b, float)}


def near_map(flow_map):
    """u + a x + b t."""

    def apply(params, x, t, r, cond=None, *, key=None):
        return flow_map.apply({}, x, t, r, cond) + params["a"] * x + params["b"] * t[:, None]

    return FlowMap(lambda key, x, t, r, cond=None: at(), apply)


def near_data(flow_map):
    """The consistency model F(x, t) = u(x, t, 1) + a x + b (1 - t)."""

    def apply(params, x, t, cond=None, *, key=None):
        u = flow_map.apply({}, x, t, jnp.ones_like(t), cond)
        return u + params["a"] * x + params["b"] * (1 - t[:, None])

    return Velocity(lambda key, x, t, cond=None: at(), apply)


def standard_scores(gradient, batches=100, seed=5):
    """The mean of gradient(key), a pytree of scalars, in its standard errors over so many keys."""
    g = jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(seed), batches))
    return np.asarray([np.mean(v) / (np.std(v) / np.sqrt(batches)) for v in jax.tree.leaves(g)])


def scrambled(shapes, scale=0.3):
    """Params of no value that a test could rest on: heads are not zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), shapes)


def reached(grads):
    """Whether every leaf is finite and not all zero."""
    return all(
        np.all(np.isfinite(g)) and np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads)
    )
