"""Guidance of numbers and tokens together against tilted laws that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jflow import oracles, solvers, steering
from jflow.types import Field

MASK, MEAN, VARIANCE = 3, -0.5, 0.64
WEIGHTS = np.array([0.5, 0.2, 0.3])
GAUSSIAN = oracles.gaussian([MEAN], VARIANCE)
WORDS = oracles.tokens([[0], [1], [2]], WEIGHTS, source=[0.0, 0.0, 0.0, 1.0])
BONUS = np.log([1.0, 4.0, 2.0])
ROWS = 2048


def joint(params, x, t, cond=None, *, key=None):
    """Numbers and tokens that know nothing of each other."""
    return {
        "numbers": GAUSSIAN.velocity(x["numbers"], t),
        "tokens": WORDS.field.apply({}, x["tokens"], t),
    }


MODEL = Field(lambda *_: {}, joint)
X0 = {
    "numbers": np.random.default_rng(0).normal(size=(ROWS, 1)).astype(np.float32),
    "tokens": np.full((ROWS, 1), MASK, np.int32),
}


def test_numbers_and_tokens_have_the_tilted_laws():
    """With exp(a x) times a factor of the token, the numbers are N(m + s^2 a, s^2) and the tokens
    are weighted by the factor; without a reward all is as it was. The false-alarm rate of each test
    is 1e-4 beyond its bias: 0.03 of the means for 64 steps and 16 draws."""
    grid, slope = solvers.grids.uniform(64), 1.5

    @jax.jit
    def run(x0, key):
        keys = jax.random.split(key, 2)

        def reward(x, cond):
            return slope * x["numbers"][:, 0] + jnp.asarray(BONUS)[x["tokens"][:, 0]]

        none = lambda x, cond: 0 * x["numbers"][:, 0]  # noqa: E731
        return (
            steering.tfg_flow(MODEL, {}, x0, keys[0], grid, none, draws=2),
            steering.tfg_flow(MODEL, {}, x0, keys[1], grid, reward, draws=16),
        )

    plain, tilted = jax.device_get(run(X0, jax.random.key(1)))
    tilt = WEIGHTS * np.exp(BONUS)
    for x, mean, law in (
        (plain, MEAN, WEIGHTS),
        (tilted, MEAN + VARIANCE * slope, tilt / tilt.sum()),
    ):
        shares = [np.mean(x["tokens"] == word) for word in range(3)]
        z = scipy.stats.norm.isf(0.5e-4)
        np.testing.assert_allclose(
            x["numbers"].mean(), mean, atol=0.03 + z * (VARIANCE / ROWS) ** 0.5
        )
        np.testing.assert_allclose(x["numbers"].var(), VARIANCE, rtol=0.05 + z * (2 / ROWS) ** 0.5)
        np.testing.assert_allclose(shares, law, atol=0.03 + z * 0.5 / ROWS**0.5)
        np.testing.assert_allclose(np.sum(shares), 1)  # no mask is left


def test_what_the_gradients_do_and_what_is_wrong():
    """One step of data_scale moves the prediction by the gradient; a NaN is a NaN row; what is
    wrong is named."""
    x0 = {name: value[:4] for name, value in X0.items()}
    linear = lambda x, cond: 2 * x["numbers"][:, 0]  # noqa: E731
    key, grid = jax.random.key(0), [0.0, 1.0]
    run = lambda reward, x0=x0, **more: steering.tfg_flow(  # noqa: E731
        MODEL, {}, x0, key, grid, reward, **{"draws": 2, **more}
    )
    plain, moved = (run(linear, data_scale=s)["numbers"] for s in (0.0, 0.25))
    np.testing.assert_allclose(moved - plain, 0.5, atol=1e-6)
    bad = lambda x, cond: jnp.where(jnp.arange(len(x["tokens"])) == 1, jnp.nan, 0.0)  # noqa: E731
    with pytest.raises(ValueError, match="tfg_flow: .*got nan at step 0 of row 1"):
        run(bad)
    lost = np.isnan(np.asarray(jax.jit(lambda: run(bad)["numbers"])())[:, 0])
    np.testing.assert_array_equal(lost, [False, True, False, False])
    with pytest.raises(ValueError, match="log_reward"):
        run(lambda x, cond: x["numbers"])
    with pytest.raises(ValueError, match="'numbers' and 'tokens', got"):
        run(linear, x0={"numbers": x0["numbers"]})
    with pytest.raises(ValueError, match="tokens"):
        run(linear, x0={**x0, "tokens": x0["numbers"]})
    with pytest.raises(ValueError, match="the numbers of x0 of a floating type, got int32"):
        run(linear, x0={**x0, "numbers": x0["tokens"]})
    with pytest.raises(ValueError, match="scale that is finite, got inf"):
        run(linear, scale=np.inf)
    with pytest.raises(ValueError, match="draws"):
        run(linear, draws=0)


def test_passes_backward():
    """The network is differentiated once a step, and not where scale is 0."""
    backward = []

    @jax.custom_vjp
    def seen(z):
        return z

    seen.defvjp(lambda z: (z, None), lambda _, g: backward.append(1) or (g,))
    model = Field(
        MODEL.init,
        lambda params, x, t, cond=None: joint(params, {**x, "numbers": seen(x["numbers"])}, t),
    )
    linear = lambda x, cond: x["numbers"][:, 0]  # noqa: E731
    for scale, data_scale, passes in ((1.0, 0.0, 1), (0.0, 0.5, 0)):
        backward.clear()
        scales = {"scale": scale, "data_scale": data_scale}
        run = lambda x0: steering.tfg_flow(  # noqa: E731
            model,
            {},
            x0,
            jax.random.key(0),
            [0.0, 0.5, 1.0],
            linear,
            **scales,  # noqa: B023
        )
        jax.eval_shape(run, X0)
        assert len(backward) == passes, (scale, backward)
