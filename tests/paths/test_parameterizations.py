import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import losses, oracles, paths, solvers, types
from jflow.paths import parameterizations, schedules

MEAN = np.asarray([1.5, -0.5])
MIXTURE = oracles.mixture([0.3, 0.7], [[-2.0, 0.5], [1.0, 1.0]], [0.2, 0.4])
MIXTURE_MEAN = 0.3 * np.asarray([-2.0, 0.5]) + 0.7 * np.asarray([1.0, 1.0])


class Small(nn.Module):
    """tanh layers of (x, t), and dropout."""

    @nn.compact
    def __call__(self, x, t, cond=None):
        h = jnp.concatenate(
            [x, t[:, None], t[:, None] ** 2] + ([] if cond is None else [cond]), axis=1
        )
        h = nn.tanh(nn.Dense(16)(h))
        h = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(h)
        return nn.Dense(x.shape[1])(h)


NET = jflow.field(Small())
BOUNDED = {
    "mask": parameterizations.boundary_mask(NET, data_mean=MIXTURE_MEAN),
    "mask, gain": parameterizations.boundary_mask(NET, data_mean=MIXTURE_MEAN, gain=0.5),
    "mask at data": parameterizations.boundary_mask(NET),
    "subtraction": parameterizations.boundary_subtraction(NET, data_mean=MIXTURE_MEAN),
    "subtraction at data": parameterizations.boundary_subtraction(NET),
}
bounded = pytest.mark.parametrize("name", BOUNDED)


def params_of(field, x, t, seed=0):
    """Random ones, the biases too."""
    params = field.init(jax.random.key(seed), x, t)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
    )


def draw(dtype=float, n=40, low=0.0, high=1.0):
    t = jnp.linspace(low, high, n, dtype=dtype)
    return 2 * jax.random.normal(jax.random.key(5), (n, 2), dtype), t


def as_field(function):
    return types.Field(
        lambda *args: {}, lambda params, x, t, cond=None, *, key=None: function(x, t)
    )


@pytest.mark.parametrize(
    "schedule", [paths.LINEAR, schedules.cosine(), schedules.vp()], ids=["linear", "cosine", "vp"]
)
def test_predictions_become_the_velocity(schedule, x64):
    oracle = oracles.gaussian(MEAN, 0.3, schedule)
    x, t = draw(low=0.02, high=0.98)
    truth = oracle.velocity(x, t)
    x1 = as_field(lambda x, t: paths.velocity_to_data(oracle.velocity(x, t), x, t, schedule))
    x0 = as_field(lambda x, t: -schedule.sigma(t)[:, None] * oracle.score(x, t))
    score = as_field(oracle.score)
    for make, field in (
        (parameterizations.from_data, x1),
        (parameterizations.from_noise, x0),
        (parameterizations.from_score, score),
    ):
        velocity = make(field, schedule)
        assert type(velocity) is types.Velocity
        np.testing.assert_allclose(velocity.apply({}, x, t), truth, rtol=1e-8, atol=1e-8)


def test_without_a_margin_the_conversion_diverges_at_its_end():
    x = jnp.ones((2, 2))
    ends = jnp.asarray([0.0, 1.0])
    exact = parameterizations.from_data(as_field(lambda x, t: jnp.zeros_like(x)), margin=0.0)
    assert (
        np.isfinite(exact.apply({}, x, ends)[0]).all()
        and not np.isfinite(exact.apply({}, x, ends)[1]).any()
    )


def test_a_data_predicting_network_trains_by_the_same_loss():
    """On the linear path |v - target|^2 is |x1 predicted - x1|^2 / (1 - t)^2."""
    guess = as_field(lambda x, t: jnp.tanh(x))
    batch, t = {"x": jnp.ones((3, 2)), "x0": jnp.zeros((3, 2))}, jnp.asarray([0.1, 0.5, 0.8])
    value, _ = losses.flow_matching(parameterizations.from_data(guess), time=lambda key, n: t)(
        {}, jax.random.key(0), batch
    )
    np.testing.assert_allclose(value, np.mean((np.tanh(t) - 1) ** 2 / (1 - t) ** 2), rtol=1e-5)


def test_the_ends_that_are_enforced_are_those_of_the_exact_velocity(x64):
    """v(x, 0) = E[x1] - x and v(x, 1) = x - E[x0] = x, on a mixture."""
    x, _ = draw()
    np.testing.assert_allclose(
        MIXTURE.velocity(x, 0.0), MIXTURE_MEAN[None] - x, rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(MIXTURE.velocity(x, 1.0), x, rtol=1e-12, atol=1e-12)


@bounded
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_the_ends_are_exact_whatever_the_network_says(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        velocity = BOUNDED[name].velocity
        x, t = draw(dtype)
        params = params_of(NET, x, t)
        tolerance = {
            "rtol": 4 * float(jnp.finfo(dtype).eps),
            "atol": 40 * float(jnp.finfo(dtype).eps),
        }
        wide = lambda a: np.asarray(a, np.float64)  # noqa: E731
        for key in (None, jax.random.key(3)):  # with dropout too
            at = lambda time, key=key: velocity.apply(params, x, jnp.full_like(t, time), key=key)  # noqa: E731
            assert at(1.0).dtype == dtype
            np.testing.assert_allclose(wide(at(1.0)), wide(x), **tolerance)
            if "at data" not in name:
                np.testing.assert_allclose(wide(at(0.0)), MIXTURE_MEAN[None] - wide(x), **tolerance)
        # and the network counts between
        other = velocity.apply(params_of(NET, x, t, seed=7), x, jnp.full_like(t, 0.5))
        assert (
            np.max(np.abs(wide(velocity.apply(params, x, jnp.full_like(t, 0.5))) - wide(other)))
            > 0.1
        )


@bounded
def test_the_score_is_that_of_the_velocity(name, x64):
    velocity, score = BOUNDED[name]
    x, t = draw(low=0.0, high=1 - 1e-4)
    params = params_of(NET, x, t)
    truth = paths.velocity_to_score(velocity.apply(params, x, t), x, t)
    np.testing.assert_allclose(score.apply(params, x, t), truth, rtol=1e-7, atol=1e-7)
    # at t=1 it is the limit
    one = jnp.ones_like(t)
    np.testing.assert_allclose(
        score.apply(params, x, one), score.apply(params, x, one - 1e-4), rtol=1e-2, atol=1e-2
    )


@bounded
def test_the_exact_velocity_is_within_reach(name, x64):
    """What the network would have to say is finite up to both ends, and no larger there than a
    little before."""
    x, _ = draw(n=20)
    mask = "mask" in name
    needed = []
    for t in (1e-2, 1e-4, 1 - 1e-2, 1 - 1e-4):
        time = jnp.full((20,), t)
        zero = parameterizations.boundary_mask(
            as_field(lambda x, t: jnp.zeros_like(x)),
            data_mean=None if "at data" in name else MIXTURE_MEAN,
        )
        left = MIXTURE.velocity(x, time) - zero.velocity.apply({}, x, time)
        needed.append(
            np.abs(left / ((1 - t) * (1 if "at data" in name else t)) if mask else left).max()
        )
    assert needed[1] < 1.5 * needed[0] + 0.1 and needed[3] < 1.5 * needed[2] + 0.1


@pytest.mark.parametrize("name", ["mask", "mask at data", "subtraction", "subtraction at data"])
def test_sde_sampling_stays_finite_at_the_data_end(name):
    """dx = (v + w score) dt + sqrt(2 w) dW to t=1 and the score there: an untrained unconstrained
    velocity's (t v - x) / (1 - t) has grown a thousandfold a thousandth before the end, this one's
    has not."""
    velocity, score = BOUNDED[name]
    x = jax.random.normal(jax.random.key(0), (64, 2))
    params = params_of(NET, x, jnp.zeros(64))
    grid = jnp.concatenate([jnp.linspace(0, 0.999, 100), jnp.asarray([0.9999, 0.99999, 1.0])])

    sde = solvers.euler_maruyama(velocity, 0.5, score=score.apply)

    def step(x, now):
        return sde(params, x, *now)[0], jnp.abs(score.apply(params, x, now[0])).max()

    keys = jax.random.split(jax.random.key(1), 102)
    end, sizes = jax.jit(lambda x: jax.lax.scan(step, x, (grid[:-1], grid[1:], keys)))(x)
    last = score.apply(params, end, jnp.ones(64))
    assert np.all(np.isfinite(end)) and np.all(np.isfinite(last))
    assert max(float(sizes.max()), float(jnp.abs(last).max())) < 200
    free = NET.apply(params, end, jnp.full((64,), 0.99999))
    assert jnp.abs(paths.velocity_to_score(free, end, jnp.full((64,), 0.99999))).max() > 1e4


def test_the_mean_may_depend_on_the_condition():
    means = jnp.asarray([[1.0, 2.0], [-3.0, 0.5]])
    x, label = jnp.ones((4, 2)), jnp.asarray([0, 1, 1, 0])
    one_hot = jax.nn.one_hot(label, 2)
    for make in (parameterizations.boundary_mask, parameterizations.boundary_subtraction):
        velocity = make(NET, data_mean=lambda cond: cond @ means).velocity
        params = velocity.init(jax.random.key(0), x, jnp.zeros(4), one_hot)
        v = velocity.apply(params, x, jnp.zeros(4), one_hot)
        np.testing.assert_allclose(v, means[label] - x, atol=1e-5)
