"""Independent tokens: a law, and the source of a discrete flow."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keys import KEYS, keys_consumed_twice

from jflow import couplings, distributions


def test_it_is_a_law_and_is_drawn_from():
    """Probabilities of all sequences sum to 1, draws have these frequencies; outside the vocabulary
    the log-probability is -inf."""
    p = np.array([[0.2, 0.8, 0.0], [0.5, 0.25, 0.25]])
    law = distributions.tokens((2,), p)
    assert law.init(KEYS[0], jnp.zeros((1, 2), int)) == {}
    x = np.array(list(itertools.product(range(3), repeat=2)))
    found = np.exp(law.log_prob({}, x))
    np.testing.assert_allclose(found, p[0][x[:, 0]] * p[1][x[:, 1]], rtol=1e-6)
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)
    np.testing.assert_array_equal(law.log_prob({}, np.array([[0, 3], [-1, 0]])), -np.inf)
    n = 4000
    drawn = np.asarray(law.sample({}, KEYS[0], n))
    assert drawn.shape == (n, 2) and np.issubdtype(drawn.dtype, np.integer)
    shares = (drawn[..., None] == np.arange(3)).mean(0)
    assert np.all(np.abs(shares - p) <= 4 * np.sqrt(p * (1 - p) / n))
    assert not keys_consumed_twice(lambda key: law.sample({}, key, 3), KEYS[0])


def test_a_source_of_a_batch_is_drawn_in_the_type_of_its_data():
    law = distributions.tokens((2,), [0.0, 1.0])
    transform = couplings.with_source(couplings.from_distribution(law))
    x = np.zeros((3, 2), np.int8)
    batch = jax.jit(transform)(KEYS[0], {"x": x, "cond": np.arange(3)})
    assert batch["x0"].dtype == np.int8
    np.testing.assert_array_equal(batch["x0"], 1)
    np.testing.assert_array_equal(batch["cond"], np.arange(3))


def test_bad_options():
    for call, said in [
        (lambda: distributions.tokens((2,), [0.5, 0.6]), "tokens: .* with sum 1.1"),
        (lambda: distributions.tokens((2,), [1.5, -0.5]), r"not negative.* got \[1.5, -0.5\]"),
        (lambda: distributions.tokens((2,), np.ones((3, 1))), r"\[V\] or \[2, 'V'\], got \[3, 1\]"),
        (
            lambda: distributions.tokens((2,), [1.0]).log_prob({}, jnp.zeros((1, 2))),
            "tokens: expected x to hold tokens",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
