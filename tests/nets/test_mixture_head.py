import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow.distributions import mixtures
from jflow.losses._mixture import mixture_matching
from jflow.nets import ResidualMLP, TimeMLP, UNet
from jflow.nets._fields import field
from jflow.nets._mixture_head import MixtureHead


@pytest.mark.parametrize(
    ("network", "event"),
    [
        (TimeMLP(hidden=(16,)), (2,)),
        (UNet(channels=8, multipliers=(1,), attention=(False,)), (4, 4, 3)),
    ],
)
def test_the_last_axis_is_what_a_component_covers(network, event):
    f = field(MixtureHead(network, components=3, features=8))
    x, t = jax.random.normal(jax.random.key(0), (5, *event)), jnp.linspace(0, 1, 5)
    params = jax.jit(f.init)(jax.random.key(1), x, t)
    m = jax.jit(f.apply)(params, x, t)
    assert m.logits.shape == (5, *event[:-1], 3) and m.means.shape == (5, *event[:-1], 3, event[-1])
    assert m.log_std.shape == (5,) and np.all(m.log_std == 0)
    assert mixtures.log_prob(m, x).shape == (5,)
    # components start apart, else they would stay together
    assert np.min(np.std(m.means.reshape(5, -1, 3, event[-1]), axis=2)) > 1e-3
    # away from the zeros that networks start with, all params have a gradient
    params = jax.tree.map(
        lambda p: p + 0.1 * np.random.default_rng(0).standard_normal(p.shape, np.float32), params
    )
    slope = jax.jit(jax.grad(lambda p: mixture_matching(f)(p, jax.random.key(2), {"x": x})[0]))(
        params
    )
    assert all(np.any(leaf != 0) and np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_training_finds_both_modes_of_a_velocity():
    # data +-2 with std 0.2 in one dimension: at t = 0 the velocity x1 - x0 is +-2 - x0, with that
    # std
    f = field(MixtureHead(ResidualMLP(width=32, num_blocks=1), components=2, features=16))
    start = lambda key, n: jnp.zeros(n)  # noqa: E731
    loss = mixture_matching(f, time=start)
    params = jax.jit(f.init)(jax.random.key(0), jnp.zeros((256, 1)), jnp.zeros(256))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 400))

    def data(key):
        sign, noise = jax.random.split(key)
        return 2.0 * jax.random.rademacher(sign, (256, 1), jnp.float32) + 0.2 * jax.random.normal(
            noise, (256, 1)
        )

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            key, data_key = jax.random.split(key)
            value, slope = jax.value_and_grad(lambda p: loss(p, key, {"x": data(data_key)})[0])(
                params
            )
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(key, 400)
        )
        return params, values

    params, values = train(params, jax.random.key(1))
    x = jnp.array([[0.5], [-1.0]])
    m = f.apply(params, x, jnp.zeros(2))
    np.testing.assert_allclose(
        np.sort(m.means[..., 0], axis=1), np.array([[-2.5, 1.5], [-1.0, 3.0]]), atol=0.2
    )
    np.testing.assert_allclose(jax.nn.softmax(m.logits), 0.5, atol=0.15)
    # the entropy is log 2 + log(0.2) + 1.42 = 0.50; a single Gaussian cannot get below log(2) +
    # 1.42 = 2.11
    assert 0.40 < values[-40:].mean() < 0.70


def test_bad_fields_say_so():
    with pytest.raises(ValueError, match="components to be a whole number of at least 1, got 0"):
        MixtureHead(TimeMLP(), components=0)
