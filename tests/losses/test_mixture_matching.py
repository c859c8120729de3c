import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses
from jflow.distributions import mixtures
from jflow.distributions.mixtures import GaussianMixture
from jflow.losses._mixture import mixture_matching
from jflow.types import Field

WEIGHTS, MEANS, VARIANCE = (
    np.array([0.5, 0.2, 0.3]),
    np.array([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]]),
    0.3,
)
EXACT = mixtures.exact(WEIGHTS, MEANS, VARIANCE)


def data(n, seed=0):
    which, noise = jax.random.split(jax.random.key(seed))
    k = jax.random.categorical(which, jnp.log(jnp.asarray(WEIGHTS)), shape=(n,))
    return jnp.asarray(MEANS, jnp.float32)[k] + VARIANCE**0.5 * jax.random.normal(noise, (n, 2))


def at(t):
    return lambda key, n: jnp.full(n, t)


def bent(params, x, t, cond=None, *, key=None):
    """The exact mixture with errors that params switch on."""
    m = EXACT.apply({}, x, t)
    tilt = params["logits"] * jnp.array([[1.0, -1.0, 0.5]])
    return GaussianMixture(
        m.logits + tilt, m.means * (1 + params["means"]), m.log_std + params["log_std"]
    )


BENT = Field(lambda *args: {}, bent)
ZERO = {"logits": jnp.zeros(()), "means": jnp.zeros(()), "log_std": jnp.zeros(())}


def test_one_component_of_fixed_std_is_flow_matching():
    std = 0.7
    pull = lambda params, x, t: params["a"] * x + t[:, None]  # noqa: E731
    single = Field(
        lambda *args: {},
        lambda params, x, t, cond=None, *, key=None: GaussianMixture(
            jnp.zeros((x.shape[0], 1)),
            pull(params, x, t)[:, None],
            jnp.full(x.shape[0], np.log(std)),
        ),
    )
    params, batch, key = (
        {"a": jnp.array(0.3)},
        {"x": data(64), "weight": jnp.linspace(0.1, 1, 64)},
        jax.random.key(1),
    )
    found = mixture_matching(single)(params, key, batch)[0]
    # the same noise and times, by hand
    time_key, noise_key, _, _ = jax.random.split(key, 4)
    t, x0 = jax.random.uniform(time_key, (64,)), jax.random.normal(noise_key, (64, 2))
    x_t = (1 - t)[:, None] * x0 + t[:, None] * batch["x"]
    error = jnp.mean((pull(params, x_t, t) - (batch["x"] - x0)) ** 2, axis=1)
    expected = jnp.sum(batch["weight"] * error) / batch["weight"].sum() / (2 * std**2)
    np.testing.assert_allclose(found, expected + np.log(std) + 0.5 * np.log(2 * np.pi), rtol=1e-5)


@pytest.mark.parametrize("t", [0.1, 0.7])
def test_the_minimum_is_the_conditional_entropy(t):
    # H(u | x_t) = H(x1) + H(x_t | x1) - H(x_t) + log |du / dx1|, entropies by Monte Carlo on the
    # densities: all within 0.01 nats at 1e5 draws; u = (x1 - x_t) / (1 - t) at fixed x_t
    n = 100_000
    x1 = data(n, 3)
    x_t = (1 - t) * jax.random.normal(jax.random.key(4), x1.shape) + t * x1

    def entropy(x, means, var):
        m = GaussianMixture(
            jnp.log(jnp.asarray(WEIGHTS, jnp.float32))[None],
            jnp.asarray(means, jnp.float32)[None],
            jnp.zeros(1),
        )
        m = jax.tree.map(
            lambda v: jnp.broadcast_to(v, (n, *v.shape[1:])),
            m._replace(log_std=jnp.log(jnp.array([var])) / 2),
        )
        return -jnp.mean(mixtures.log_prob(m, x))

    noise = np.log(2 * np.pi * np.e * (1 - t) ** 2)  # H(x_t | x1) in two dimensions
    length = t**2 * VARIANCE + (1 - t) ** 2
    expected = (
        entropy(x1, MEANS, VARIANCE) + noise - entropy(x_t, t * MEANS, length) - 2 * np.log(1 - t)
    )
    found = jax.jit(mixture_matching(EXACT, time=at(t)))({}, jax.random.key(0), {"x": x1})[0]
    np.testing.assert_allclose(2 * found, expected, atol=0.02)


@pytest.mark.parametrize("transition", [1.0, 0.6])
def test_the_exact_mixture_is_a_minimum(transition):
    loss = mixture_matching(BENT, time=at(0.4), transition=transition)
    x = data(50_000, 5)
    both = jax.jit(jax.value_and_grad(lambda params: loss(params, jax.random.key(0), {"x": x})[0]))
    value, slope = both(ZERO)
    for name in ZERO:
        # standard error of the slopes at 5e4 rows is about 0.005
        np.testing.assert_allclose(slope[name], 0, atol=0.02, err_msg=name)
        for change in (-0.2, 0.2):
            assert both({**ZERO, name: jnp.array(change)})[0] > value, (name, change)


def test_a_transition_to_the_end_has_the_gradients_of_the_velocity():
    # a transition of 1 - 1e-6 scores x1 rather than u: the values differ by log(1 - t), the
    # gradients do not
    params = {"logits": jnp.array(0.3), "means": jnp.array(0.1), "log_std": jnp.array(-0.2)}
    x = data(4000, 6)
    slopes = []
    for transition in (1.0, 1 - 1e-6):
        loss = mixture_matching(BENT, time=at(0.5), transition=transition)
        slopes.append(
            jax.jit(jax.grad(lambda p, loss=loss: loss(p, jax.random.key(0), {"x": x})[0]))(params)
        )
    # different noise: two estimates from 4000 rows each
    for name in params:
        np.testing.assert_allclose(slopes[0][name], slopes[1][name], atol=0.05, err_msg=name)


def test_conditions_and_their_dropping_reach_the_field():
    seen = {}

    def apply(params, x, t, cond=None, *, key=None):
        seen["cond"] = cond
        return EXACT.apply({}, x, t)

    loss = losses.chain(
        losses.drop_cond(1.0, null=7), mixture_matching(Field(lambda *args: {}, apply))
    )
    loss({}, jax.random.key(0), {"x": data(8), "cond": jnp.arange(8)})
    np.testing.assert_array_equal(seen["cond"], np.full(8, 7))


def test_bad_input_says_so():
    with pytest.raises(ValueError, match=r"transition in \(0, 1\], got 0"):
        mixture_matching(EXACT, transition=0)
    field = Field(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: x)
    with pytest.raises(TypeError, match="expected a GaussianMixture, got"):
        mixture_matching(field)({}, jax.random.key(0), {"x": data(4)})
