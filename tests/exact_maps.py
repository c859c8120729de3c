"""For the tests of few-step losses: exact maps with a few trainable numbers beside them, and mean
gradients with their standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import teachers

from jflow import oracles
from jflow.types import FlowMap, Velocity

GAUSSIAN = oracles.gaussian([1.0, -0.5], [[0.5, 0.2], [0.2, 0.3]])
MIXTURE = oracles.mixture([0.4, 0.6], [[-1.0, 0.0], [1.0, 0.5]], [0.1, 0.2])
ZERO = {"a": 0.0, "b": 0.0}


def gaussian_map(x, t, r):
    return GAUSSIAN.average_velocity(x, t, r)


def mixture_map(x, t, r):
    """In float64; t < r."""
    gap = (r - t)[:, None]
    return (oracles.mixture_flow_map(MIXTURE, x, t, r) - x) / gap


def rk4_map(x, t, r):
    """That of the other mixture, `teachers.MIXTURE`, by eight steps: in float32, with a forward
    derivative, t <= r."""
    return teachers.exact_map("mixture", 8).apply({}, x, t, r)


DRAWN = {"gaussian": (GAUSSIAN.sample, gaussian_map), "mixture": (teachers.MIXTURE.sample, rk4_map)}


def student(average, end=jnp.ones_like):
    """The velocity average(x, t, end(t)) + a x + b t: at {'a': 0, 'b': 0} the average velocity from
    t to end(t)."""

    def apply(params, x, t, cond=None, *, key=None):
        return average(x, t, end(t)) + params["a"] * x + params["b"] * t[:, None]

    return Velocity(lambda key, x, t, cond=None: ZERO, apply)


def student_map(average):
    """The flow map average(x, t, r) + a x + b r."""

    def apply(params, x, t, r, cond=None, *, key=None):
        return average(x, t, r) + params["a"] * x + params["b"] * r[:, None]

    return FlowMap(lambda key, x, t, r, cond=None: ZERO, apply)


def elementwise(params, x, t, cond=None, *, key=None):
    """Numbers that do not look at each other: events of them can be repeated."""
    return params["a"] * jnp.sin(2 * x) + params["b"] * t.reshape(-1, *(1,) * (x.ndim - 1)) * x


ELEMENTWISE = Velocity(lambda key, x, t, cond=None: {"a": 0.7, "b": -0.4}, elementwise)


def mean_gradient(loss, params, draw, frozen=None, batches=50, rows=2000):
    """(mean, standard error) of the gradient over batches of fresh rows draw(key, n), by the names
    of params, flattened."""

    def one(key):
        data, noise = jax.random.split(key)
        return jax.grad(lambda p: loss(p, noise, {"x": draw(data, rows)}, frozen)[0])(params)

    found = jax.jit(lambda keys: jax.lax.map(one, keys))(
        jax.random.split(jax.random.key(7), batches)
    )
    found = np.stack([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)], axis=-1)
    return found.mean(0), found.std(0, ddof=1) / np.sqrt(batches)


def random_params(init, *args):
    """Params without the zeros of an initialization, which would hide where no gradient arrives."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)


def silent_leaves(loss, params, batch, frozen=None):
    """The names of the leaves that no gradient reaches; raises where one is not finite."""
    grads = jax.jit(jax.grad(lambda p: loss(p, jax.random.key(1), batch, frozen)[0]))(params)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    for path, leaf in leaves:
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
    return [
        jax.tree_util.keystr(path) for path, leaf in leaves if not np.any(np.asarray(leaf) != 0)
    ]
