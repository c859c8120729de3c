"""For the tests of few-step losses: exact flow maps of two laws, maps next to them with two params,
mean gradients with their standard errors, and where gradients arrive."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow import oracles
from jflow.types import FlowMap, Velocity

GAUSSIAN = oracles.gaussian([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
MIXTURE = oracles.mixture([0.4, 0.6], [[-1.5, 0.5], [1.0, -0.5]], [0.3, 0.2])
ORACLES = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
ELEMENTS = {"a": 0.7, "b": -0.4}


def exact_map(name, steps=64):
    """The average velocity of an oracle. The mixture's is solved by `steps` of RK4, for it needs a
    forward-mode derivative: y' = v(x + (r - t) y, t + s (r - t)) over s in [0, 1]. What is scanned
    is the stage, which is compiled once where a step of four has it four times."""
    if name == "gaussian":
        return oracles.as_average_velocity(GAUSSIAN)

    def apply(params, x, t, r, cond=None, *, key=None):
        gap, h = r - t, 1 / steps

        def stage(carry, now):
            """y of the step's start, what the step adds to it so far, the last slope."""
            y, more, k = carry
            s, reach, weight = now
            y = jnp.where(reach == 0, y + more, y)
            more = jnp.where(reach == 0, 0, more)
            k = MIXTURE.velocity(x + gap[:, None] * (y + reach * k), t + s * gap)
            return (y, more + weight * k, k), None

        reach = np.tile([0, h / 2, h / 2, h], steps)
        s = np.repeat(np.arange(steps) * h, 4) + reach
        weight = np.tile([h / 6, h / 3, h / 3, h / 6], steps)
        stages = jnp.asarray([s, reach, weight], x.dtype).T
        (y, more, _), _ = jax.lax.scan(stage, (jnp.zeros_like(x),) * 3, stages)
        return y + more

    return FlowMap(lambda key, x, t, r, cond=None: {}, apply)


WEIGHTS, CENTRES, SPREAD = np.asarray([0.3, 0.7]), np.asarray([-2.0, 1.5]), 0.6
LINE_MIXTURE = oracles.mixture(WEIGHTS, CENTRES[:, None], SPREAD**2)


def straight_mixture(knots=(0.0, 1.0)):
    """The velocity of LINE_MIXTURE's flow made straight between the knots, + a x + b t. In one
    dimension the flow keeps quantiles: the line through x at t is found by bisection, in float64,
    to 1e-12."""

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
            0, 44, halve, (jnp.full_like(like, -8.0), jnp.full_like(like, 8.0))
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


def near_data(flow_map, end=jnp.ones_like):
    """u(x, t, end(t)) + a x + b (1 - t): a consistency model, whose end is data unless it is
    said."""

    def apply(params, x, t, cond=None, *, key=None):
        u = flow_map.apply({}, x, t, end(t), cond)
        return u + params["a"] * x + params["b"] * (1 - t[:, None])

    return Velocity(lambda key, x, t, cond=None: at(), apply)


def elementwise(params, x, t, cond=None, *, key=None):
    """Numbers that do not look at each other: events of them can be repeated."""
    return params["a"] * jnp.sin(2 * x) + params["b"] * t.reshape(-1, *(1,) * (x.ndim - 1)) * x


ELEMENTWISE = Velocity(lambda key, x, t, cond=None: ELEMENTS, elementwise)

# Networks of one number for each number of x, whose params are a scalar or nothing.
SINE = Velocity(
    lambda *a: {}, lambda p, x, t, cond=None, *, key=None: p * jnp.sin(x) * (1 + t[:, None])
)
SINE_MAP = FlowMap(
    lambda *a: {},
    lambda p, x, t, r, cond=None, *, key=None: p * jnp.sin(x) + (t * jnp.square(r))[:, None],
)
COSINE = Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: jnp.cos(x) * t[:, None])


def over_keys(function, batches, seed):
    """measure(*args) -> (mean, standard error) of function(key, *args), a pytree of scalars, over
    so many keys, flattened. Its calls share one program."""
    keys = jax.random.split(jax.random.key(seed), batches)
    run = jax.jit(lambda keys, *args: jax.lax.map(lambda key: function(key, *args), keys))

    def measure(*args):
        found = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(run(keys, *args))]
        found = np.stack(found, axis=-1)
        return found.mean(0), found.std(0, ddof=1) / np.sqrt(batches)

    return measure


def mean_gradient(loss, draw, frozen=None, batches=50, rows=1000):
    """measure(params) -> (mean, standard error) of the gradient over batches of fresh rows
    draw(key, n), by the names of params."""

    def one(key, params):
        data, noise = jax.random.split(key)
        return jax.grad(lambda p: loss(p, noise, {"x": draw(data, rows)}, frozen)[0])(params)

    return over_keys(one, batches, 7)


def standard_scores(gradient, batches=100, seed=5):
    """scores(*args): the mean of gradient(key, *args), a pytree of scalars, in its standard
    errors."""
    measure = over_keys(gradient, batches, seed)
    return lambda *args: np.divide(*measure(*args))


def random_params(init, *args):
    """Params without the zeros of an initialization, which would hide where no gradient arrives."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)


def silent_leaves(loss, params, batch, frozen=None):
    """The names of the params that no gradient reaches; raises where one is not finite, and where
    one reaches what is frozen."""
    run = lambda p, f: loss(p, jax.random.key(1), batch, f)[0]  # noqa: E731
    grads, others = jax.jit(jax.grad(run, argnums=(0, 1), allow_int=True))(params, frozen)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    for path, leaf in leaves:
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(others):
        if leaf.dtype != jax.dtypes.float0:
            assert not np.any(leaf), f"frozen{jax.tree_util.keystr(path)}"
    return [
        jax.tree_util.keystr(path) for path, leaf in leaves if not np.any(np.asarray(leaf) != 0)
    ]


def same_when_repeated(loss, params, x0, x1, frozen=None, *, rtol, **rest):
    """Whether value and gradient are those of events repeated along their last axis."""
    run = jax.jit(jax.value_and_grad(lambda p, b: loss(p, jax.random.key(0), b, frozen)[0]))
    one, two = (
        jax.tree.leaves(run(params, {"x0": twice(x0), "x": twice(x1), **rest}))
        for twice in (lambda x: x, lambda x: jnp.concatenate([x, x], axis=-1))
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol)
