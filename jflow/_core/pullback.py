"""Functions with a transposed derivative of their own, in every mode and order."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jflow._core.keys import hidden, is_key
from jflow.types import Array, PyTree

__all__ = ["reverse_only", "tied", "with_pullback"]


def with_pullback(
    apply: Callable, pullback: Callable, *, reference: Callable | None = None
) -> Callable:
    """`apply`, whose reverse mode is `pullback`: jax.custom_vjp without its ban on forward mode.

    Tangents are pushed forward by autodiff of `reference`, by default `apply` itself, of which
    derivatives of higher order are made, too; reverse mode runs neither. JAX knows one linear
    function with a transpose of its own, the solution of linear equations, and the push P along t
    becomes one: (t, P t) solves [[1, 0], [-P, 1]] (t, s) = (t, 0).

    Args:
        apply: (*args) -> outputs, pytrees of arrays; outputs are floats. It closes over nothing
        that is differentiated.
        pullback: (args, outputs, cotangents of outputs) -> cotangents of args, a tuple; anything
        for what is not a float.
        reference: equal to `apply`, where JAX cannot differentiate `apply` (a Pallas kernel).
    """
    reference = apply if reference is None else reference
    function = jax.custom_jvp(apply)

    @function.defjvp
    def derivative(args, dots):
        outputs = function(*args)
        leaves, tree = jax.tree.flatten(args)
        floats = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
        keys = {i: hidden(leaf) for i, leaf in enumerate(leaves) if is_key(leaf)}
        at_args = tied([leaves[i] for i in floats])

        def whole(moved):
            moved = dict(zip(floats, moved, strict=True))
            moved |= {i: key(data) for i, (data, key) in keys.items()}
            return tree.unflatten([moved.get(i, leaf) for i, leaf in enumerate(leaves)])

        @partial(
            jax.checkpoint, prevent_cse=False
        )  # or JAX would keep what only `push` needs for the way back
        def at(moved):
            return reference(*whole(moved))

        def push(dots):
            return jax.jvp(at, (at_args,), (dots,))[1]

        def pulled(cotangents):
            cotangents = tree.flatten_up_to(pullback(whole(at_args), outputs, cotangents))
            return [cotangents[i] for i in floats]

        dots = tree.flatten_up_to(dots)
        return outputs, _linear(push, pulled, [dots[i] for i in floats], outputs)

    return function


def _linear(push: Callable, pullback: Callable, t: list[Array], like: PyTree) -> PyTree:
    """push(t), shaped like `like`, a function of t whose transpose is `pullback`."""

    def equations(v):
        t, s = tied(v)  # before and behind: their transpose begins where they end
        return tied((t, jax.tree.map(jnp.subtract, s, push(t))))

    def solve(_, v):
        t, s = v
        return t, jax.tree.map(jnp.add, s, push(t))

    def solve_transposed(_, v):
        t, s = v
        return jax.tree.map(jnp.add, t, pullback(s)), s

    right = tied((t, jax.tree.map(jnp.zeros_like, like)))
    return jax.lax.custom_linear_solve(equations, right, solve, solve_transposed)[1]


def tied(tree: PyTree) -> PyTree:
    """`tree`, each float in it a linear function of all floats: JAX transposes a solve only if its
    whole right-hand side is differentiated, and on a mesh all of it has to vary where a part of it
    does."""
    leaves, shape = jax.tree.flatten(tree)
    zero = jnp.asarray(sum(jnp.sum(jnp.ravel(leaf)[:0]) for leaf in leaves if _is_float(leaf)))
    return jax.tree.unflatten(
        shape, [leaf + zero.astype(leaf.dtype) if _is_float(leaf) else leaf for leaf in leaves]
    )


def reverse_only(tree: PyTree, message: str) -> PyTree:
    """`tree`, which reverse mode goes back through; a program that pushes a tangent forward through
    it is refused with TypeError(message) when it is compiled. JAX refuses what has a custom_vjp in
    words that name no argument of ours."""

    @jax.custom_jvp
    def passed(leaf):
        return leaf

    @passed.defjvp
    def derivative(leaf, dot):
        push, pullback = (lambda _, t: _refused.bind(t, message=message)), (lambda _, t: t)
        return passed(*leaf), jax.lax.custom_linear_solve(lambda t: t, *dot, push, pullback)

    return jax.tree.map(
        lambda leaf: passed(leaf) if hasattr(leaf, "dtype") and _is_float(leaf) else leaf, tree
    )


def _refuse(*_, message):
    raise TypeError(message)


_refused = Primitive("refused")
_refused.def_impl(_refuse)
_refused.def_abstract_eval(lambda t, message: t)
batching.defvectorized(_refused)
mlir.register_lowering(_refused, _refuse)


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
