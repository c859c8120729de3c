"""Functions with a transposed derivative of their own, in every mode and order of differentiation."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jflow.types import Array, PyTree

__all__ = ["with_pullback"]


def with_pullback(apply: Callable, pull: Callable, *, reference: Callable | None = None) -> Callable:
    """`apply`, whose reverse mode is `pull`: jax.custom_vjp without its ban on forward mode.

    Tangents are pushed forward by autodiff of `reference`, by default `apply` itself, of which derivatives of higher
    order are made, too; reverse mode runs neither. JAX knows one linear function with a transpose of its own, the
    solution of linear equations, and the push P along t becomes one: (t, P t) solves [[1, 0], [-P, 1]] (t, s) = (t, 0).

    Args:
        apply: (*args) -> outputs, pytrees of arrays; outputs are floats. It closes over nothing that is differentiated.
        pull: (args, outputs, cotangents of outputs) -> cotangents of args, a tuple; anything for what is not a float.
        reference: equal to `apply`, where JAX cannot differentiate `apply` (a Pallas kernel).
    """
    reference = apply if reference is None else reference
    function = jax.custom_jvp(apply)

    @function.defjvp
    def derivative(args, dots):
        leaves, tree = jax.tree.flatten(args)
        floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        outputs = function(*args)

        @partial(jax.checkpoint, prevent_cse=False)  # or JAX would keep what only `push` needs for the way back
        def at(moved):
            moved = dict(zip(floats, moved, strict=True))
            return reference(*tree.unflatten([moved.get(i, leaf) for i, leaf in enumerate(leaves)]))

        def push(dots):
            return jax.jvp(at, (_tied([leaves[i] for i in floats]),), (dots,))[1]

        def pulled(bars):
            bars = tree.flatten_up_to(pull(args, outputs, bars))
            return [bars[i] for i in floats]

        dots = tree.flatten_up_to(dots)
        return outputs, _linear(push, pulled, [dots[i] for i in floats], outputs)

    return function


def _linear(push: Callable, pull: Callable, t: list[Array], like: PyTree) -> PyTree:
    """push(t), shaped like `like`, a function of t whose transpose is `pull`."""

    def equations(v):
        t, s = v
        return _tied((t, jax.tree.map(jnp.subtract, s, push(t))))

    def solve(_, v):
        t, s = v
        return t, jax.tree.map(jnp.add, s, push(t))

    def solve_transposed(_, v):
        t, s = v
        return jax.tree.map(jnp.add, t, pull(s)), s

    right = _tied((t, jax.tree.map(jnp.zeros_like, like)))
    return jax.lax.custom_linear_solve(equations, right, solve, solve_transposed)[1]


def _tied(tree: PyTree) -> PyTree:
    """`tree`, each leaf a linear function of all leaves: JAX transposes a solve only if its whole right-hand side is
    differentiated, and on a mesh all of it has to vary where a part of it does."""
    zero = sum(jnp.sum(jnp.ravel(leaf)[:0]) for leaf in jax.tree.leaves(tree))
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)
