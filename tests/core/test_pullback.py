"""Functions whose reverse mode is written by hand and whose other derivatives are JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow._core.pullback import reverse_only, with_pullback


def power(x, n):
    return x**3 * n, jnp.sum(x)


def pullback(args, outputs, cotangents):
    """Three times too large, to be told from autodiff."""
    x, (cubes, _), (cubes_bar, sum_bar) = args[0], outputs, cotangents
    return 9 * cubes / x * cubes_bar + 3 * sum_bar, None


def test_reverse_mode_is_the_pull_and_everything_else_is_autodiff():
    """f = sum n x^3 + 5 sum x: gradient 3 n x^2 + 5, second derivative 6 n x."""
    x, n = np.array([1.0, -2.0], np.float32), np.array([1, 2])
    function = with_pullback(power, pullback)

    @jax.jit
    def run(x):
        def f(x):
            cubes, total = function(x, n)
            return jnp.sum(cubes) + 5 * total

        gradient = 3 * n * x**2 + 5
        got = {
            "jvp": jax.jvp(f, (x,), (x,))[1] / jnp.sum(gradient * x),
            "grad": jax.grad(f)(x) / gradient,
            "rows": jax.vmap(jax.grad(f))(x[None] + jnp.zeros((2, 1)))[1] / gradient,
            "jvp of jvp": jax.jvp(
                lambda x: jax.jvp(f, (x,), (jnp.ones(2),))[1], (x,), (jnp.ones(2),)
            )[1],
            "hessian": jnp.diag(jax.hessian(f)(x)) / (6 * n * x),
            "grad of jvp": jax.grad(lambda x: jax.jvp(f, (x,), (jnp.ones(2),))[1])(x) / (6 * n * x),
            "grad of grad": jax.grad(lambda x: jnp.sum(jax.grad(f)(x)))(x) / (6 * n * x),
        }
        return got | {"jvp of jvp": got["jvp of jvp"] / jnp.sum(6 * n * x)}

    for name, ratio in run(x).items():
        np.testing.assert_allclose(
            ratio, 3 if name in ("grad", "rows") else 1, rtol=1e-5, err_msg=name
        )


def test_reverse_only_passes_everything_but_a_tangent():
    f = lambda x: jnp.sum(jnp.square(reverse_only({"x": x, "n": 3}, "give another=")["x"]))  # noqa: E731
    assert f(jnp.ones(2)) == 2
    np.testing.assert_allclose(jax.grad(f)(jnp.ones(2)), 2)
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(jnp.ones((3, 2))), 2)
    for slope in (jax.jit(lambda x: jax.jvp(f, (x,), (x,))), jax.hessian(f), jax.jacfwd(f)):
        with pytest.raises(TypeError, match="give another="):
            slope(jnp.ones(2))
