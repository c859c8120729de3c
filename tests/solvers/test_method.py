"""How an ODE is solved, as a value: what the constructors check, and what an int and None stand
for."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import metrics, solvers
from jflow.types import Velocity

V = Velocity(
    lambda *args: {}, lambda params, x, t, cond=None, *, key=None: jnp.sin(3 * x) + t[:, None]
)
X = jnp.asarray([[0.3, -1.0], [2.0, 0.1]])
HEUN = solvers.fixed(50, diffrax.Heun())


def test_what_an_int_and_none_stand_for():
    """Bit for bit: n is fixed(n), fixed(n) has the function's own solver, and None is the default
    that is documented."""
    same = {
        "a number of steps": (7, solvers.fixed(7), solvers.fixed(7, diffrax.Heun())),
        "of numpy": (np.int64(7), 7),
        "the default": (None, 50, HEUN),
        "a grid": (
            solvers.on_grid(np.linspace(0, 1, 8)),
            solvers.on_grid(list(np.linspace(0, 1, 8)), diffrax.Heun()),
        ),
        "reversed twice": (5, solvers.reverse(solvers.reverse(5))),
    }
    ways = [way for group in same.values() for way in group]
    run = jax.jit(lambda x: [solvers.sample(V, {}, x, method=way)[0] for way in ways])
    found = iter(run(X))
    for group in same.values():
        first, *others = (next(found) for _ in group)
        for other in others:
            np.testing.assert_array_equal(first, other)

    standard = lambda x: -0.5 * jnp.sum(x**2, axis=1)  # noqa: E731
    ways = [None, solvers.adaptive(), solvers.adaptive(diffrax.Tsit5(), rtol=1e-5, atol=1e-5)]
    densities = jax.jit(
        lambda x: [solvers.log_prob(V, {}, x, standard, method=way)[0] for way in ways]
    )(X)
    np.testing.assert_array_equal(densities[0], densities[1])
    np.testing.assert_array_equal(densities[0], densities[2])


def test_a_grid_is_walked_back():
    times = np.asarray([0.0, 0.2, 1.0])
    np.testing.assert_array_equal(solvers.reverse(solvers.on_grid(times)).grid, times[::-1])
    np.testing.assert_array_equal(
        solvers.reverse(solvers.on_grid([0.0, 0.2, 1.0])).grid, times[::-1]
    )
    turned = jax.jit(lambda times: solvers.reverse(solvers.on_grid(times)).grid)(jnp.asarray(times))
    np.testing.assert_allclose(turned, times[::-1], rtol=1e-6)
    for method in (None, 4, HEUN, solvers.adaptive()):
        assert solvers.reverse(method) is method


def test_a_method_is_completed():
    default = solvers.adaptive(diffrax.Tsit5())
    assert solvers.as_method("f", None, default).adjoint == diffrax.RecursiveCheckpointAdjoint()
    assert solvers.as_method("f", 3, default).solver == diffrax.Tsit5()
    direct = solvers.fixed(3, diffrax.Euler(), adjoint=diffrax.DirectAdjoint())
    assert solvers.as_method("f", direct, default) == direct


def test_energies_of_a_path():
    """v = 2 x: |v|^2 = 4 x^2 with x = x1 e^{2 (t - 1)}, |dv/dx|_F^2 = 4 a number."""
    double = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: 2 * x)
    base = lambda x: -0.5 * jnp.sum(x**2, axis=1)  # noqa: E731
    found, kinetic, jacobian, info = solvers.log_prob_with_energies(double, {}, X, base)
    expected, plain = solvers.log_prob(double, {}, X, base)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(kinetic, jnp.sum(X**2, axis=1) * (1 - np.exp(-4)), rtol=1e-4)
    np.testing.assert_allclose(jacobian, [8.0, 8.0], rtol=1e-5)
    assert info.status.tolist() == plain.status.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: solvers.fixed(0),
            "solvers.fixed: expected steps to be a whole number of at least 1, got 0",
        ),
        (lambda: solvers.fixed(2.5), "at least 1, got 2.5"),
        (lambda: solvers.fixed(True), "at least 1, got True"),
        (lambda: solvers.on_grid([0.0, 0.5, 0.5, 1.0]), "solvers.on_grid: .*strictly monotone"),
        (lambda: solvers.on_grid([0.0, 0.7, 0.5, 1.0]), "strictly monotone"),
        (lambda: solvers.on_grid([0.0, float("nan"), 1.0]), "strictly monotone"),
        (lambda: solvers.on_grid([0.0]), r"got shape \[1\]"),
        (lambda: solvers.on_grid([[0.0, 1.0]]), r"got shape \[1, 2\]"),
        (lambda: solvers.on_grid([0.0, 0.5, 1.01]), r"times in \[0, 1\]"),
        (lambda: solvers.on_grid([0.5, -0.1]), r"times in \[0, 1\]"),
        (lambda: solvers.adaptive(rtol=-1.0), "solvers.adaptive: expected rtol, atol >= 0"),
        (lambda: solvers.adaptive(rtol=0.0, atol=0.0), "one above 0"),
        (
            lambda: solvers.adaptive(max_steps=0),
            "max_steps to be a whole number of at least 1, got 0",
        ),
        (lambda: solvers.adaptive(diffrax.Euler()), "Euler has no error estimate"),
        (
            lambda: metrics.straightness(V, {}, X, method=solvers.adaptive()),
            r"straightness: .* solvers.fixed\(...\), got",
        ),
        (
            lambda: metrics.truncation_error(V, {}, X, method=solvers.adaptive()),
            "truncation_error: .* or solvers.on_grid",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solvers.fixed(50, diffrax.Heun), "solver to be a diffrax.AbstractSolver"),
        (
            lambda: solvers.on_grid([0.0, 1.0], adjoint="direct"),
            "adjoint to be a diffrax.AbstractAdjoint",
        ),
        (lambda: solvers.adaptive("tsit5"), "solver to be a diffrax.AbstractSolver"),
        (
            lambda: solvers.sample(V, {}, X, method=diffrax.Heun()),
            r"solvers.sample: expected method .* got Heun",
        ),
        (lambda: solvers.sample(V, {}, X, method="heun"), "got 'heun'"),
        (lambda: solvers.sample(V, {}, X, steps=4), "unexpected keyword argument 'steps'"),
    ],
)
def test_other_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()
