"""Classifier guidance with the exact classifier of a mixture: the exact conditional velocity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import guidance, oracles, paths, types

MEANS, NULL = [[2.0, 0.0], [-1.0, 1.5], [0.5, -2.0]], 3
PARAMS = {"velocity": {}, "classifier": {}}
COSINE = paths.Schedule(lambda t: jnp.sin(jnp.pi * t / 2), lambda t: jnp.cos(jnp.pi * t / 2))


def bayes(oracle):
    """Logits log p(k | x_t = x), up to what the softmax takes away."""
    logits = lambda params, x, t, cond=None, *, key=None: (  # noqa: E731
        jnp.log(oracle.responsibilities(x, t)) + 5.0
    )
    return guidance.label_log_prob(types.Field(lambda key, x, t, cond=None: {}, logits))


def draw(n=32, low=0.05):
    keys = jax.random.split(jax.random.key(0), 3)
    x, t = (
        2 * jax.random.normal(keys[0], (n, 2)),
        jax.random.uniform(keys[1], (n,), minval=low, maxval=0.95),
    )
    return x, t, jax.random.randint(keys[2], (n,), 0, NULL)


@pytest.mark.parametrize("schedule", [paths.LINEAR, COSINE])
def test_scale_one_is_the_conditional_velocity(x64, schedule):
    oracle = oracles.mixture([0.5, 0.3, 0.2], MEANS, [0.25, 0.1, 0.4], schedule)
    velocity = guidance.with_cond(oracles.as_velocity(oracle))
    x, t, label = draw()
    make = lambda w: guidance.classifier_guidance(velocity, bayes(oracle), w, schedule=schedule)  # noqa: E731
    np.testing.assert_allclose(
        make(1.0).apply(PARAMS, x, t, label), oracle.velocity(x, t, label), atol=1e-9
    )
    # and at any scale that of cfg, which asks the velocity alone
    cfg = guidance.cfg(oracles.as_velocity(oracle), 2.5, null=NULL).apply({}, x, t, label)
    np.testing.assert_allclose(make(2.5).apply(PARAMS, x, t, label), cfg, atol=1e-9)
    w = lambda t: 1 + t  # noqa: E731
    in_time = make(w).apply(PARAMS, x, t, label)
    low, high = (make(s).apply(PARAMS, x, t, label) for s in (1.0, 2.0))
    np.testing.assert_allclose(in_time, low + t[:, None] * (high - low), atol=1e-9)


def test_near_the_source_it_is_finite(x64):
    """c diverges at t = 0, its product with the gradient does not: an error of the order of
    start."""
    oracle = oracles.mixture([0.5, 0.3, 0.2], MEANS, [0.25, 0.1, 0.4])
    x, _, label = draw()
    t = jnp.zeros(x.shape[0])
    guide = guidance.classifier_guidance(
        guidance.with_cond(oracles.as_velocity(oracle)), bayes(oracle), 1.0, start=1e-4
    )
    # measured 0.00076 at start 1e-4, and ten times that at 1e-3
    np.testing.assert_allclose(
        guide.apply(PARAMS, x, t, label), oracle.velocity(x, t, label), atol=2e-3
    )


def test_the_null_label_guides_nowhere(x64):
    oracle = oracles.mixture([0.5, 0.3, 0.2], MEANS, [0.25, 0.1, 0.4])
    x, t, label = draw()
    guide = guidance.classifier_guidance(
        guidance.with_cond(oracles.as_velocity(oracle)), bayes(oracle), 3.0
    )
    np.testing.assert_array_equal(
        guide.apply(PARAMS, x, t, jnp.full_like(label, NULL)), oracle.velocity(x, t)
    )


def test_on_top_of_a_conditional_velocity(x64):
    oracle = oracles.mixture([0.5, 0.3, 0.2], MEANS, [0.25, 0.1, 0.4])
    x, t, label = draw()
    velocity = oracles.as_velocity(oracle)
    guide = guidance.classifier_guidance(velocity, bayes(oracle), 1.0)
    twice = 2 * oracle.velocity(x, t, label) - oracle.velocity(x, t)
    np.testing.assert_allclose(guide.apply(PARAMS, x, t, label), twice, atol=1e-9)


def test_errors():
    """Traced alone."""
    velocity = types.Velocity(None, lambda params, x, t, cond=None, *, key=None: x)
    logits = types.Field(None, lambda params, x, t, cond=None, *, key=None: jnp.zeros((4, 3)))
    x, t, label = draw(4)

    def traced(classifier, cond):
        guide = guidance.classifier_guidance(velocity, classifier, 1.0)
        return jax.eval_shape(guide.apply, PARAMS, x, t, cond)

    with pytest.raises(ValueError, match=r"shape \[4\], got \[4, 3\]"):
        traced(logits, label)
    with pytest.raises(ValueError, match=r"labels \[b\]"):
        traced(guidance.label_log_prob(logits), jnp.zeros((4, 2), jnp.int32))
    with pytest.raises(TypeError, match="labels of an integer type, got an array float"):
        traced(guidance.label_log_prob(logits), jnp.full(4, 0.5))
