import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.distributions import mixtures
from jflow.distributions.mixtures import GaussianMixture
from jflow.guidance._mixture import probabilistic_guidance
from jflow.types import Field

MEANS = jnp.array([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]])
NULL = 3


def apply(params, x, t, cond=None, *, key=None):
    """Component cond is preferred; the null label prefers none. Rows stay rows: x and t are
    used."""
    n = x.shape[0]
    logits = 3.0 * jax.nn.one_hot(cond, 4)[:, :3]
    means = MEANS[None] + 0.3 * x[:, None] + t[:, None, None]
    return GaussianMixture(logits, means, jnp.full(n, np.log(0.4)))


FIELD = Field(lambda *args: {}, apply)


def inputs(n=6):
    x = jax.random.normal(jax.random.key(0), (n, 2))
    return x, jnp.linspace(0.1, 0.8, n), jnp.arange(n) % 3


@pytest.mark.parametrize("orthogonal", [0.0, 1.0])
def test_the_mask_is_the_paper_s_gaussian(orthogonal):
    # guided / conditional ~ N(m + w sqrt(v) n, (1 - w^2) v) / N(m, v), by log densities at many
    # points
    x, t, cond = inputs()
    w = 0.6
    guided = probabilistic_guidance(FIELD, w, null=NULL, orthogonal=orthogonal).apply(
        {}, x, t, cond
    )
    plain, free = apply({}, x, t, cond), apply({}, x, t, jnp.full(6, NULL))
    m, v = np.asarray(mixtures.mean(plain)), np.asarray(mixtures.variance(plain))[:, None]
    difference = m - np.asarray(mixtures.mean(free))
    x1 = np.asarray(x + (1 - t)[:, None] * m)
    unit = x1 / np.linalg.norm(x1, axis=1, keepdims=True)
    difference = difference - orthogonal * np.sum(difference * unit, axis=1, keepdims=True) * unit
    difference = difference / np.sqrt(np.mean(difference**2, axis=1, keepdims=True))
    points = 2 * np.random.default_rng(0).standard_normal((9, 6, 2)).astype(np.float32)
    mask = -0.5 * np.sum(
        (points - m - w * np.sqrt(v) * difference) ** 2 / ((1 - w**2) * v), axis=-1
    )
    mask += 0.5 * np.sum((points - m) ** 2 / v, axis=-1)
    rest = (
        np.stack([mixtures.log_prob(guided, p) - mixtures.log_prob(plain, p) for p in points])
        - mask
    )
    np.testing.assert_allclose(rest, np.broadcast_to(rest[:1], rest.shape), atol=2e-4)


def test_a_single_gaussian_keeps_its_power():
    # E |x - m|^2 is the same before and after, whatever the scale; the mean moves by scale standard
    # deviations
    single = Field(
        lambda *args: {},
        lambda params, x, t, cond=None, *, key=None: GaussianMixture(
            jnp.zeros((x.shape[0], 1)),
            cond[:, None] + x[:, None],
            jnp.full(x.shape[0], np.log(0.5)),
        ),
    )
    x, t, _ = inputs()
    cond = jnp.ones((6, 2)) * jnp.array([[1.0, 2.0]])
    guided = probabilistic_guidance(single, lambda t: t, null=jnp.zeros(2), orthogonal=0.0).apply(
        {}, x, t, cond
    )
    moved = mixtures.mean(guided) - (cond + x)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(moved**2, axis=1)), 0.5 * t, rtol=1e-4)
    np.testing.assert_allclose(
        jnp.mean(moved**2, axis=1) + mixtures.variance(guided), 0.25, rtol=1e-4
    )


def test_guidance_moves_weight_to_the_condition_s_side():
    x, t, cond = inputs()
    plain = jax.nn.softmax(apply({}, x, t, cond).logits)
    guided = jax.nn.softmax(
        probabilistic_guidance(FIELD, 0.7, null=NULL, orthogonal=0.0).apply({}, x, t, cond).logits
    )
    own = jax.nn.one_hot(cond, 3) > 0
    assert np.all(guided[own] > plain[own])
