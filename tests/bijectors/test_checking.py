"""`bijectors.check` says which promise a bijector breaks, and nothing of one that keeps them."""

import doctest

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import distributions, flows, nets
from jflow.bijectors import _check
from jflow.types import Bijector

X = jax.random.normal(jax.random.key(1), (3, 3))  # as many rows as numbers in an event


def scaling(*, init=None, forward=None, inverse=None):
    """x = z exp(s), s [3]; with something else in place of a field."""

    def start(key, x, cond=None, *, side="data"):
        return {"s": jnp.zeros_like(x, shape=x.shape[1:])}

    def there(params, z, cond=None, *, key=None):
        return z * jnp.exp(params["s"])[None], jnp.broadcast_to(jnp.sum(params["s"]), z.shape[:1])

    def back(params, x, cond=None, *, key=None):
        return x * jnp.exp(-params["s"])[None], jnp.broadcast_to(-jnp.sum(params["s"]), x.shape[:1])

    return Bijector(init or start, forward or there, inverse or back)


def inverse_with(log_det):
    """The scaling with another log_det of its inverse: (s, x) -> log_det."""
    return scaling(
        inverse=lambda p, x, cond=None, *, key=None: (
            x * jnp.exp(-p["s"])[None],
            log_det(p["s"], x),
        )
    )


def shifted(p, z, cond=None, *, key=None):
    return z * jnp.exp(p["s"])[None] + 1, jnp.broadcast_to(p["s"].sum(), z.shape[:1])


def halves_of_numpy(p, z, cond=None, *, key=None):
    return z * np.full((1, 3), 0.5), jnp.broadcast_to(p["s"].sum(), z.shape[:1])


WRONG = {
    "a log_det of the other sign": (
        inverse_with(lambda s, x: jnp.full(x.shape[0], s.sum())),
        "log_det of inverse to be log .det. of its Jacobian, .* in row 0, got",
    ),
    "one log_det for all rows": (
        inverse_with(lambda s, x: -s.sum()),
        r"of shape \[3\] for 3 rows, got \[\]",
    ),
    "a column": (
        inverse_with(lambda s, x: jnp.full((x.shape[0], 1), -s.sum())),
        r"of shape \[3\] .* got \[3, 1\]",
    ),
    "not summed over the event": (
        inverse_with(lambda s, x: 0 * x - s[None]),
        r"of shape \[3\] .* got \[3, 3\]",
    ),
    "summed over rows, which are as many": (
        inverse_with(lambda s, x: -s),
        r"of shape \[6\] for 6 rows, got \[3\]",
    ),
    "a bfloat16 log_det": (
        inverse_with(lambda s, x: jnp.full(x.shape[0], -s.sum(), jnp.bfloat16)),
        "log_det in float32 at least, got float32 and bfloat16",
    ),
    "constants in float64": (
        scaling(forward=halves_of_numpy),
        "float32 to give float32 .* float64 .* under jax_enable_x64",
    ),
    "not the inverse": (
        scaling(forward=shifted),
        r"forward\(inverse\(x\)\) = x, got a difference of up to 1",
    ),
    "rows that mix": (
        scaling(
            inverse=lambda p, x, cond=None, *, key=None: (
                x - jnp.mean(x, 0)[None],
                0 * x[:, 0] + 0 * p["s"].sum(),
            )
        ),
        "the same beside other rows",
    ),
    "not a number": (
        inverse_with(lambda s, x: jnp.log(-jnp.ones(x.shape[0])) + s.sum()),
        "to be finite, got .* row 0",
    ),
    "integers in the params": (
        scaling(
            init=lambda key, x, cond=None, *, side="data": {"s": jnp.zeros(3), "n": jnp.arange(3)}
        ),
        "nested dicts of floats, got int32 at params",
    ),
    "a parameter that nothing reads": (
        scaling(
            init=lambda key, x, cond=None, *, side="data": {
                "s": jnp.zeros(3),
                "unread": jnp.zeros(2),
            }
        ),
        "depend on params.*unread.*, whose gradient is 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_bijector_is_told_what_is_wrong(name):
    bijector, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^check: .*{message}"):
        bj.check(bijector, X)


def test_right_ones_pass():
    assert bj.check(scaling(), X) is None
    coupling = bj.coupling(bj.univariate.shift(), nets.MLP((4,), nn.tanh), split=1)
    assert (
        bj.check(bj.conditioned(coupling, nn.Embed(3, 2)), X, jnp.arange(3), key=jax.random.key(3))
        is None
    )
    with pytest.raises(ValueError, match="expected cond to change inverse"):
        bj.check(scaling(), X, jnp.arange(3))


def test_what_is_no_bijector_or_no_batch_is_refused():
    with pytest.raises(TypeError, match="check: expected a Bijector, got a Flow"):
        bj.check(flows.flow(scaling(), distributions.normal((3,))), X)
    for x in (X[:1], jnp.zeros((3, 3)), jnp.arange(6).reshape(3, 2)):
        with pytest.raises(ValueError, match="two different rows"):
            bj.check(scaling(), x)


def test_the_example_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(bj.check, "check", module=_check)
    assert doctest.DocTestRunner().run(example).failed == 0 and example.examples
