"""Rows of numbers and categories whose flow is known, and whose law after a wish is known too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow import oracles
from jflow.types import Field

NONE = -jnp.inf  # the logit of a value that a column does not have


class Law(NamedTuple):
    """A mixture; within a component numbers and categories know nothing of each other.

    weights [K]; means [K, d] and variances [K] of the numbers; tables [K, columns, V], the
    probabilities of the values of each column, 0 for the last, the mask, and for values that a
    column does not have.
    """

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    tables: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """The probability of each value, [columns, V]."""
        return np.einsum("k,kcv->cv", self.weights, self.tables)

    def sample(self, rng, n):
        k = rng.choice(len(self.weights), n, p=self.weights)
        numbers = self.means[k] + self.variances[k, None] ** 0.5 * rng.normal(
            size=(n, self.means.shape[1])
        )
        below = np.cumsum(self.tables[k], axis=-1) < rng.random((n, self.tables.shape[1], 1))
        return {"numbers": numbers, "tokens": below.sum(-1)}


def four_kinds() -> Law:
    """Four kinds of rows: two numbers, a column of three values and one of four."""
    tables = np.zeros((4, 2, 5))
    tables[:, 0, :3] = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.3, 0.6], [0.3, 0.1, 0.6]]
    tables[:, 1, :4] = [
        [0.70, 0.10, 0.10, 0.10],
        [0.10, 0.70, 0.10, 0.10],
        [0.10, 0.10, 0.70, 0.10],
        [0.05, 0.05, 0.20, 0.70],
    ]
    means = np.array([[-1.5, -1.0], [1.5, -1.0], [0.0, 1.0], [0.8, 1.6]])
    return Law(np.array([0.4, 0.3, 0.2, 0.1]), means, np.array([0.3, 0.3, 0.3, 0.15]), tables)


def responsibilities(law: Law, x, t):
    """p(component | x_t) [b, K], of numbers at time t and tokens of which some are masks."""
    logs = [_numbers(law, k).log_density(x["numbers"], t) for k in range(len(law.weights))]
    seen = law.tables.copy()
    seen[..., -1] = 1  # a mask says nothing
    columns = np.arange(seen.shape[1])
    told = jnp.asarray(np.moveaxis(np.log(np.maximum(seen, 1e-30)), 0, -1), jnp.float32)
    found = jnp.sum(told[columns[None], x["tokens"]], axis=1)
    return jax.nn.softmax(jnp.stack(logs, axis=1) + found + np.log(law.weights), axis=1)


def exact_model(law: Law) -> Field:
    """The velocity of the numbers and the law of the tokens that a perfect network would return."""
    tables, mask = jnp.asarray(law.tables, jnp.float32), law.tables.shape[-1] - 1

    def apply(params, x, t, cond=None, *, key=None):
        found = responsibilities(law, x, t)
        v = [_numbers(law, k).velocity(x["numbers"], t) for k in range(len(law.weights))]
        hidden = (x["tokens"] == mask)[..., None]
        p = jnp.where(
            hidden,
            jnp.einsum("bk,kcv->bcv", found, tables),
            jax.nn.one_hot(x["tokens"], mask + 1),
        )
        return {
            "numbers": jnp.einsum("bk,kbd->bd", found, jnp.stack(v)),
            "tokens": jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1)), NONE),
        }

    return Field(lambda *_: {}, apply)


def _numbers(law, k):
    return oracles.gaussian(law.means[k], law.variances[k])


def slope_wish(law: Law, slope, bonus):
    """(log reward, the tilted law) of the wish  slope . numbers + the bonus of each value."""
    factors = law.tables * np.exp(bonus)
    sums = factors.sum(-1)
    grown = law.means @ slope + law.variances * (slope @ slope) / 2
    weights = law.weights * np.exp(grown) * sums.prod(-1)

    def log_reward(x, cond=None):
        found = jnp.asarray(bonus)[np.arange(len(bonus))[None], x["tokens"]]
        return x["numbers"] @ jnp.asarray(slope) + jnp.sum(found, axis=1)

    means = law.means + law.variances[:, None] * slope
    return log_reward, Law(weights / weights.sum(), means, law.variances, factors / sums[..., None])


def label_wish(law: Law, probabilities):
    """(log reward, the tilted law) of a label that each component has with a probability.

    The reward is log p(label | row), what a perfect classifier of rows would return.
    """
    weights = law.weights * probabilities

    def log_reward(x, cond=None):
        found = responsibilities(law, x, jnp.ones(len(x["numbers"])))
        return jnp.log(found @ jnp.asarray(probabilities, found.dtype))

    return log_reward, law._replace(weights=weights / weights.sum())
