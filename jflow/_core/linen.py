"""Flax Linen modules as pairs of pure functions."""

import inspect
import math

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow._core.attached import HIDDEN, has_attached, heeding
from jflow._core.checks import check_cond, check_key, described
from jflow._core.conditions import refuse_parts
from jflow.types import Array, Cond, Condition, PyTree


def check_linen(name: str, what: str, module) -> None:
    """Raise unless `module` is an instance of flax.linen.Module."""
    if isinstance(module, nn.Module):
        return
    kind = module if isinstance(module, type) else type(module)
    if kind is module and issubclass(kind, nn.Module):
        hint = f"make an instance, {kind.__name__}(...)"
    elif kind.__module__.startswith("flax.nnx") or any(
        c.__module__.startswith("flax.nnx") for c in kind.__mro__
    ):
        hint = "it is a flax.nnx module, whose params live inside: write it as a flax.linen.Module"
    elif what == "module":
        hint = "what is no network is made of its two functions: jflow.types.Velocity(init, apply)"
    else:
        hint = "functions without params and modules of other libraries go inside one"
    raise TypeError(
        f"{name}: expected {what} to be an instance of flax.linen.Module, got {described(module)}:"
        f" {hint}"
    )


def init_linen(module, key, x: PyTree, *args) -> PyTree:
    """The 'params' of a Linen module as a plain dict, in x's precision (float32 at least)."""
    check_key(f"init of {type(module).__name__}", key)
    variables = dict(module.init(key, x, *args))
    params = variables.pop("params", {})
    if variables:
        raise ValueError(
            f"{type(module).__name__} keeps the collections {sorted(variables)}; jflow networks"
            " have 'params' alone: running statistics go into frozen['buffers'] with an explicit"
            " update"
        )
    dtype = float_dtype(*jax.tree.leaves(x))
    return jax.tree.map(
        lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params
    )


def apply_linen(module, params, *args, key=None, method=None, mutable=(), **named):
    """Apply a Linen module (or one of its methods); a key becomes its 'dropout' stream, without one
    it runs deterministically."""
    try:
        rngs = None if key is None else {"dropout": key}
        with heeding(params):
            options = {"rngs": rngs, "method": method, **named}
            if not has_attached(params):
                return module.apply({"params": params}, *args, mutable=mutable or False, **options)
            open_ = [HIDDEN, *mutable]
            out, said = module.apply({"params": params}, *args, mutable=open_, **options)
            return (out, said) if mutable else out
    except flax.errors.ApplyScopeInvalidVariablesStructureError:
        raise ValueError(
            f"{type(module).__name__}: expected params, got a dict that holds them under 'params':"
            " give what is inside"
        ) from None
    except (flax.errors.ScopeParamShapeError, flax.errors.ScopeParamNotFoundError) as error:
        shapes = [list(jnp.shape(leaf)) for leaf in jax.tree.leaves(args)]
        raise ValueError(
            f"{type(module).__name__}: inputs of shapes {shapes} do not fit its params: "
            f"{str(error).split(' (https')[0].rstrip('.')}{_likely_cause(module, args)}"
        ) from None


def _likely_cause(module, args) -> str:
    """What to look at where a module's params are for other inputs: its cond, and the batch axis of
    x."""
    names = list(inspect.signature(type(module).__call__).parameters)[1:]
    if "cond" not in names:
        return ""
    given = dict(zip(names, args, strict=False)).get("cond") is not None
    return (
        "; is x [b, *event] as at `init`, and"
        f" {'had that such a cond' if given else 'should there be a cond'}?"
    )


def flatten_event(x: Array) -> Array:
    """[b, *event] -> [b, size of the event]; a scalar event becomes [b, 1]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def flatten_cond(name: str, cond: Cond, n: int) -> Array | None:
    """The float leaves of cond, each [n, ...], flattened and concatenated to [n, k]; None when
    there are none.

    Raises ValueError for leaves that do not lead with n rows or are not floats: a label is not a
    quantity. Of a `Condition` only the vector is such a leaf.
    """
    if isinstance(cond, Condition) and cond.label is None:  # a label has a message of its own
        refuse_parts(name, cond, ("vector",))
    cond = check_cond(name, cond, n)
    for path, leaf in jax.tree_util.tree_leaves_with_path(cond):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{name}: expected cond{jax.tree_util.keystr(path)} to be float, got"
                f" {jnp.result_type(leaf)}: embed labels first, e.g. embed=nn.Embed(num_classes,"
                " 16), and cast what is a quantity to float"
            )
    leaves = [flatten_event(jnp.asarray(leaf)) for leaf in jax.tree.leaves(cond)]
    return jnp.concatenate(leaves, axis=-1) if leaves else None
