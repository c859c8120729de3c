import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.random import clone

from jflow import couplings, losses, paths, times, types

SMOOTH = paths.with_noise(paths.LINEAR, lambda t: jnp.sin(jnp.pi * t))
X0, X1 = jax.random.normal(jax.random.key(0), (2, 8, 3))


def recorder(velocity=0.0, noise=0.0):
    seen = {}

    def apply(params, x, t, cond=None, *, key=None):
        seen.update(x=x, t=t, cond=cond)
        return {"velocity": jnp.full_like(x, velocity), "noise": jnp.full_like(x, noise)}

    return types.Field(lambda *args: {}, apply), seen


def at(time):
    return lambda key, n: jnp.full((n,), time)


def test_value_by_hand():
    """z is what is left of x_t, and the target what it is multiplied by: all from what the field
    saw."""
    field, seen = recorder(velocity=0.3, noise=-0.2)
    value, metrics = losses.interpolant_matching(field, SMOOTH, time=at(0.25), noise_weight=2.0)(
        {}, jax.random.key(1), {"x": X1, "x0": X0}
    )
    z = (seen["x"] - 0.75 * X0 - 0.25 * X1) / np.sin(np.pi / 4)
    np.testing.assert_allclose([z.mean(), z.var()], [0, 1], atol=4 * np.sqrt(2 / z.size))
    target = X1 - X0 + np.pi * np.cos(np.pi / 4) * z
    np.testing.assert_allclose(metrics["velocity"], np.mean((0.3 - target) ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["noise"], np.mean((-0.2 - z) ** 2), rtol=1e-5)
    np.testing.assert_allclose(value, metrics["velocity"] + 2 * metrics["noise"], rtol=1e-6)


def test_its_minimizer_is_velocity_and_denoiser():
    """Least squares on one time: coefficients of an affine field against the regressions on x_t in
    closed form, for x0 ~ N(0, 1), x1 = x0 / 2 + 1 + 0.3 e."""
    n, t = 40_000, 0.3
    k0, k1, k2 = jax.random.split(jax.random.key(3), 3)
    x0 = jax.random.normal(k0, (n, 1))
    x1 = x0 / 2 + 1 + 0.3 * jax.random.normal(k1, (n, 1))
    affine = types.Field(
        lambda *args: {},
        lambda params, x, t, cond=None, *, key=None: {
            k: p[0] * x + p[1] for k, p in params.items()
        },
    )
    loss = losses.interpolant_matching(affine, SMOOTH, time=at(t))
    params = {"velocity": jnp.zeros(2), "noise": jnp.zeros(2)}
    value = lambda params: loss(params, clone(k2), {"x": x1, "x0": x0})[0]  # noqa: E731
    grad, bend = jax.jit(lambda p: (jax.grad(value)(p), jax.hessian(value)(p)))(params)
    found = {k: -np.linalg.solve(bend[k][k], grad[k]) for k in params}  # quadratic: one Newton step
    a, b, c, dc = 1 - t, t, np.sin(np.pi * t), np.pi * np.cos(np.pi * t)
    variance = (a + b / 2) ** 2 + (0.3 * b) ** 2 + c**2
    slope = (-0.5 * (a + b / 2) + 0.3**2 * b + c * dc) / variance
    # regression slopes of residual deviation below 1.6 on x of deviation above 1: 4 standard errors
    np.testing.assert_allclose(found["velocity"], [slope, 1 - slope * b], atol=4 * 1.6 / np.sqrt(n))
    np.testing.assert_allclose(
        found["noise"], [c / variance, -c / variance * b], atol=4 * 1.0 / np.sqrt(n)
    )


def test_coupling_weight_drop_and_types_as_in_flow_matching():
    field, seen = recorder()
    i, j = jnp.arange(8)[::-1], jnp.roll(jnp.arange(8), 1)
    weight = jnp.arange(1.0, 9)
    loss = losses.chain(
        couplings.pair(lambda *args: (i, j)),
        losses.drop_cond(1.0, null=9),
        losses.interpolant_matching(field, SMOOTH, time=at(0.0)),
    )
    value, metrics = loss(
        {}, jax.random.key(0), {"x": X1, "x0": X0, "weight": weight, "cond": jnp.arange(8)}
    )
    np.testing.assert_allclose(seen["x"], X0[i])
    np.testing.assert_array_equal(seen["cond"], 9)
    assert np.isfinite(value) and value.dtype == jnp.float32
    one, _ = losses.interpolant_matching(field, SMOOTH)(
        {}, jax.random.key(0), {"x": X1.astype(jnp.bfloat16)}
    )
    assert seen["x"].dtype == jnp.bfloat16 and seen["t"].dtype == one.dtype == jnp.float32


def test_a_bridge_trains_to_its_velocity():
    """Point masses -1 and 1: v = (1 - 2t) / (2t (1 - t)) (x - mu) + 2 and z = (x - mu) / noise,
    fitted at one time."""
    bridge = paths.schroedinger_bridge(0.5)
    affine = types.Field(
        lambda *args: {},
        lambda params, x, t, cond=None, *, key=None: {
            k: p[0] * x + p[1] for k, p in params.items()
        },
    )
    loss = losses.interpolant_matching(
        affine, bridge, time=times.from_quantile(lambda u: jnp.full_like(u, 0.2))
    )
    batch = {"x": jnp.ones((64, 1)), "x0": -jnp.ones((64, 1))}
    optimizer = optax.adam(0.1)

    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: loss(p, key, batch)[0])(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    params = {"velocity": jnp.zeros(2), "noise": jnp.zeros(2)}
    run = jax.jit(
        lambda p: jax.lax.scan(
            step, (p, optimizer.init(p)), jax.random.split(jax.random.key(0), 800)
        )
    )
    (params, _), values = run(params)
    rate, mu, noise = (1 - 0.4) / (2 * 0.2 * 0.8), -0.6, 0.5 * np.sqrt(0.16)
    # the noise of the regression is none: x_t determines z
    np.testing.assert_allclose(params["velocity"], [rate, 2 - rate * mu], rtol=1e-2)
    np.testing.assert_allclose(params["noise"], [1 / noise, -mu / noise], rtol=1e-2)
    assert values[-1] < 1e-3 * values[0]


def test_errors():
    field, _ = recorder()
    key = jax.random.key(0)
    for options, message in [
        ({"noise_weight": -1.0}, "noise_weight >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            losses.interpolant_matching(field, SMOOTH, **options)
    with pytest.raises(ValueError, match=r"noise\(0\)"):
        losses.interpolant_matching(field, SMOOTH._replace(noise=jnp.ones_like))
    for wrong in (
        lambda x: {"velocity": x},
        lambda x: x,
        lambda x: {"velocity": x, "noise": x[:, :1]},
    ):
        bad = types.Field(
            lambda *args: {}, lambda params, x, t, cond=None, *, key=None, wrong=wrong: wrong(x)
        )
        with pytest.raises(ValueError, match=r"both of shape \[8, 3\]"):
            losses.interpolant_matching(bad, SMOOTH)({}, key, {"x": X1})
