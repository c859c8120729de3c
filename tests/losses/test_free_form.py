"""Injective flows: the gradient of the surrogate is that of the volume, and the density on the
surface is one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import distributions, flows, losses

D, LATENT = 4, 2


class Bent(nn.Module):
    """f(x) = h(W x) and g(z) = W^+ h^-1(z), with h(u) = u + a tanh(u) mixed by a matrix: g inverts
    f on the surface, and g' is the pseudoinverse of f' there."""

    backward: bool = False

    @nn.compact
    def __call__(self, x):
        wide = self.param("wide", nn.initializers.normal(), (LATENT, D))
        mix = self.param("mix", nn.initializers.normal(), (LATENT, LATENT))
        bend = self.param("bend", nn.initializers.zeros, (LATENT,))
        if not self.backward:
            u = x @ wide.T
            return (u + bend[None] * jnp.tanh(u)) @ mix.T
        target = x @ jnp.linalg.inv(mix).T

        def newton(u, _):
            value = u + bend[None] * jnp.tanh(u) - target
            return u - value / (1 + bend[None] * (1 - jnp.tanh(u) ** 2)), None

        u, _ = jax.lax.scan(newton, jax.lax.stop_gradient(target), None, length=20)
        return u @ jnp.linalg.pinv(wide).T


def test_the_surrogates_gradient_is_that_of_the_volume(x64):
    """With all d probes the gradient of the loss at beta = 0 in the encoder's params is that of
    -log p(f(x)) - log det(f' f'^T) / 2, by determinants, to 1e-10; with one probe it is so on
    average, over 4,000 keys within 4.5 standard errors in each of the 14 params. The decoder
    learns from the reconstruction alone, and the value of the surrogate is -d whatever the
    volume."""
    model = flows.injective(Bent(), Bent(backward=True), distributions.normal((LATENT,)))
    rng = np.random.default_rng(0)
    net = {
        "wide": rng.normal(size=(LATENT, D)),
        "mix": rng.normal(size=(LATENT, LATENT)),
        "bend": np.array([0.5, -0.4]),
    }
    params, x = {"encoder": net, "decoder": net, "base": {}}, rng.normal(size=(3, D))
    x = np.asarray(model.decode(params, model.encode(params, x)))  # on the surface

    def exact(encoder):
        f = lambda row: Bent().apply({"params": encoder}, row[None])[0]  # noqa: E731
        jacobian = jax.vmap(jax.jacrev(f))(x)
        volume = jnp.linalg.slogdet(jacobian @ jnp.swapaxes(jacobian, 1, 2))[1] / 2
        z = Bent().apply({"params": encoder}, x)
        return -jnp.mean(distributions.normal((LATENT,)).log_prob({}, z) + volume)

    def gradient(probes):
        loss = losses.free_form(model, beta=0.0, probes=probes)
        return lambda key: jax.grad(loss, has_aux=True)(params, key, {"x": x})

    @jax.jit
    def run(key):
        one = jax.lax.map(lambda k: gradient(1)(k)[0], jax.random.split(key, 4000), batch_size=500)
        return jax.grad(exact)(net), gradient(LATENT)(jax.random.clone(key)), one

    expected, (full, metrics), one = jax.device_get(run(jax.random.key(0)))
    for name, value in expected.items():
        np.testing.assert_allclose(full["encoder"][name], value, atol=1e-10)
        draws = one["encoder"][name]
        z = (draws.mean(0) - value) / (draws.std(0) / np.sqrt(len(draws)))
        assert np.max(np.abs(z)) < 4.5, (name, z)
        assert np.max(draws.std(0)) > 1e-3
        np.testing.assert_array_equal(full["decoder"][name], 0)
    np.testing.assert_allclose(metrics["volume_surrogate"], -LATENT, rtol=1e-9)
    np.testing.assert_allclose(metrics["error"], 0, atol=1e-12)


class Arc(nn.Module):
    """z -> 2 (cos z, sin z), and back by the angle, from off the circle too."""

    backward: bool = False

    @nn.compact
    def __call__(self, x, cond=None):
        shift = 0.0 if cond is None else cond
        if self.backward:
            return jnp.arctan2(x[:, 1:], x[:, :1]) - shift
        return 2 * jnp.concatenate([jnp.cos(x + shift), jnp.sin(x + shift)], axis=1)


def test_the_density_on_a_circle_is_with_respect_to_its_length(x64):
    """For angles N(0, s^2) with s = 0.4 on a circle of radius 2: log p = log N(angle) - log 2,
    which integrates to one along the circle, to the e^-30 beyond half a turn. It is that of the
    nearest point: noise of 1e-3 moves the nats by 1e-2 at most, and a point twice as far out has
    as many."""
    s, n = 0.4, 400
    angle = 2 * np.pi * (np.arange(n) + 0.5) / n - np.pi
    model = flows.injective(
        Arc(backward=True), Arc(), distributions.scaled(distributions.normal((1,)), s)
    )
    x = 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    near = np.abs(angle) < 1
    noise = 1e-3 * np.random.default_rng(0).normal(size=x.shape)
    cond = np.full((n, 1), 0.3)
    params = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def run(x):
        density = model.manifold_log_prob
        return (
            density(params, x),
            density(params, x + noise),
            density(params, 2 * x),
            density(params, x, cond),
        )

    found, noisy, far, told = jax.device_get(run(x))
    closed = lambda a: -0.5 * (a / s) ** 2 - np.log(s * np.sqrt(2 * np.pi)) - np.log(2)  # noqa: E731
    np.testing.assert_allclose(found, closed(angle), atol=1e-12)
    np.testing.assert_allclose(np.sum(np.exp(found)) * 4 * np.pi / n, 1, atol=1e-10)
    assert np.max(np.abs(noisy - found)[near]) < 1e-2
    np.testing.assert_allclose(far, found, atol=1e-12)
    np.testing.assert_allclose(told, closed(angle - 0.3), atol=1e-12)


def test_bad_arguments():
    model = flows.injective(nn.Dense(1), nn.Dense(3), distributions.normal((1,)))
    x = jnp.zeros((2, 3))
    params = model.init(jax.random.key(0), x)
    run = lambda **options: losses.free_form(model, **options)(  # noqa: E731
        params, jax.random.key(0), {"x": x}
    )
    with pytest.raises(ValueError, match="at most 1 probes, one a latent number, got 2"):
        run(probes=2)
    with pytest.raises(ValueError, match="expected a finite beta >= 0, got -1"):
        run(beta=-1)
    with pytest.raises(TypeError, match="free_form: expected an InjectiveFlow"):
        losses.free_form(distributions.normal((1,)))
    with pytest.raises(TypeError, match="encoder"):
        flows.injective(lambda x: x, nn.Dense(3), distributions.normal((1,)))
    wrong = flows.injective(nn.Dense(1), nn.Dense(2), distributions.normal((1,)))
    with pytest.raises(ValueError, match=r"decoder\(encoder\(x\)\) of shape \[2, 3\]"):
        wrong.init(jax.random.key(0), x)
