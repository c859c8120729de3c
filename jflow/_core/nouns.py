"""What constructors of several nouns are made with."""

import inspect

import jax
import jax.numpy as jnp

from jflow._core.checks import check_params, check_rows, check_side
from jflow.types import Array, Cond


def compiled(noun):
    """`noun`, a tuple of functions, each of them behind jax.jit, which inside another jit is
    inlined.

    For functions that may hold a loop: outside jit it would be compiled anew at every call. Leaves
    of params and cond have to be arrays or numbers; `jax.disable_jit` shows values instead of
    tracers."""

    def jitted(function):
        if not callable(function):
            return function
        return jax.jit(
            function,
            static_argnames="side" if "side" in inspect.signature(function).parameters else None,
        )

    return type(noun)(*map(jitted, noun))


def no_params(key, x: Array, cond: Cond = None, *, side: str = "data") -> dict:
    """The `init` of a bijector without parameters."""
    check_side(side)
    return {}


def sample_source(base, params, key, n: int, cond: Cond) -> Array:
    """n draws of a flow's base, in the type of the flow's params: those of a base without params
    have JAX's default type."""
    z = base.sample(params["base"], key, n, cond)
    leaves = jax.tree.leaves(params)
    return z.astype(jnp.result_type(*leaves)) if leaves else z


def base_log_prob(name: str, base, params, z: Array, cond: Cond, key) -> Array:
    """[b] nats: the log-density of a flow's base at z; raise where the params have none, or it is
    not a number a row."""
    check_params(name, params, "base")
    log_prob = base.log_prob(params["base"], z, cond, key=key)
    return check_rows(name, "the base's log_prob", log_prob, z.shape[0])
