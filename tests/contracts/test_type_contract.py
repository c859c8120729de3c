"""With 64-bit mode on, what is given in float32 comes out in float32: options that are numbers of
numpy's change no type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import distributions, times
from jflow.bijectors import scales, univariate
from jflow.distributions import mixtures

HALF, TWO = np.float64(0.5), np.float64(2.0)


def both_ways(bijector):
    """(params, x) -> both directions, the params made of x."""

    def run(x, t):
        params = bijector.init(jax.random.key(0), x)
        return params, bijector.forward(params, x), bijector.inverse(params, x)

    return run


def on_raw(transformer):
    def run(x, t):
        raw = jnp.zeros((*x.shape, transformer.size), x.dtype)
        columns = [column(x, raw.transpose(2, 0, 1)) for column in transformer.columns or ()]
        return transformer.forward(x, raw), transformer.inverse(x, raw), columns

    return run


def density(distribution):
    return lambda x, t: distribution.log_prob(distribution.init(jax.random.key(0), x), x)


TABLE = {
    "affine": on_raw(univariate.affine(TWO)),
    "affine softplus": on_raw(univariate.affine(scale=scales.softplus(HALF))),
    "affine sigmoid": on_raw(univariate.affine(scale=scales.sigmoid(TWO))),
    "block_autoregressive": both_ways(bj.block_autoregressive(2, 2, 1, leak=HALF)),
    "circular_rational_quadratic": on_raw(univariate.circular_rational_quadratic(4, TWO)),
    "circular_shift": on_raw(univariate.circular_shift(TWO)),
    "deep_sigmoidal": on_raw(univariate.deep_sigmoidal(2, 1, HALF)),
    "exact mixture": lambda x, t: mixtures.exact([0.5, 0.5], np.eye(2), HALF).apply({}, x, t),
    "free_rational_quadratic": on_raw(univariate.free_rational_quadratic(4, TWO)),
    "logistic_mixture": on_raw(univariate.logistic_mixture(2, HALF)),
    "rational_quadratic": on_raw(univariate.rational_quadratic(4, TWO)),
    "scaled": density(distributions.scaled(distributions.normal((2,)), TWO)),
    "shift of times": lambda x, t: times.shift(t, TWO),
    "sigmoid": both_ways(bj.sigmoid(0.1 * HALF)),
    "shift_then_scale": on_raw(univariate.shift_then_scale(scales.sigmoid(TWO))),
    "sinh_arcsinh": on_raw(univariate.sinh_arcsinh()),
    "student_t": density(distributions.student_t((2,), TWO)),
    "supports.interval": both_ways(bj.supports.interval(-TWO, TWO)),
    "supports.less_than": both_ways(bj.supports.less_than(TWO)),
    "truncated_normal_dequantization": lambda x, t: bj.truncated_normal_dequantization(
        HALF, 5
    ).inverse({}, x, key=jax.random.key(0)),
    "unconstrained_monotone": on_raw(
        univariate.unconstrained_monotone(2, bound=TWO, max_log_slope=TWO)
    ),
    "uniform": density(distributions.uniform((2,), -HALF, TWO)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", TABLE)
def test_floats_come_out_in_the_type_in_which_they_went_in(name, dtype, x64):
    x, t = jax.ShapeDtypeStruct((3, 2), dtype), jax.ShapeDtypeStruct((3,), dtype)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(TABLE[name], x, t)):
        assert leaf.dtype == dtype, jax.tree_util.keystr(path)
