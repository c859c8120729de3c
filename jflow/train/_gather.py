"""Fully sharded training: split weights are gathered where they are used, one layer of a scan at a
time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jflow.train._rules import Rule, leaf_shardings
from jflow.types import Loss

_REMAT = ("remat2", "remat", "checkpoint")  # what versions of JAX call it


def gather_params(
    loss: Loss, mesh: Mesh, rules: Sequence[Rule], *, axes: str | Sequence[str] = "data"
) -> Loss:
    """A loss for fully sharded params: weights are gathered where they are used.

    Also known as: ZeRO-3, fully sharded data parallel.

    XLA alone, given rows and weights that are split over one axis, may gather the rows of the whole
    batch instead of the weights. Here a weight is gathered where it is used; one that a
    `jax.lax.scan` slices (`bijectors.scan`, the blocks of a DiT), in each turn of the scan, so that
    one layer at a time is whole. Gradients come back split, and gathered weights are not kept for
    the backward pass but gathered again. Other axes of the rules (tensor sharding) stay split.
    Value and gradients are those of `loss`. Inside a function with derivatives of its own
    (`reversible=True`) all weights are gathered at once.

    Args:
        loss: Any loss.
        mesh: Where the params lie.
        rules: How they are split, as in `shardings`.
        axes: The mesh axes along which the rows of a batch lie, too.

    Returns:
        The loss for split params.

    References:
        Rajbhandari, Rasley, Ruwase, He, *ZeRO: Memory Optimizations Toward Training Trillion
        Parameter Models*, 2019, arXiv:1910.02054.
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)

    def wrapped(params, key, batch, frozen=None):
        splits = leaf_shardings({"params": params}, mesh, rules)
        closed, shape = jax.make_jaxpr(loss, return_shape=True)(params, key, batch, frozen)
        leaves = [
            _Split(leaf, split.spec, mesh, axes) if _has(split.spec, axes) else leaf
            for leaf, split in zip(jax.tree.leaves(params), splits, strict=True)
        ]
        out = _run(closed, [*leaves, *jax.tree.leaves((key, batch, frozen))])
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return wrapped


class _Split(NamedTuple):
    """An array that is split, and how."""

    array: Any
    spec: PartitionSpec
    mesh: Mesh
    axes: tuple[str, ...]

    def whole(self):
        whole = PartitionSpec(*(_without(entry, self.axes) for entry in self.spec))
        # The first of the two is for the way back: a gradient is summed over devices (the second)
        # and split.
        split = jax.lax.with_sharding_constraint(self.array, NamedSharding(self.mesh, self.spec))
        return jax.lax.with_sharding_constraint(split, NamedSharding(self.mesh, whole))


def _run(jaxpr, args):
    """Evaluate a jaxpr, closed or not, on arrays and `_Split`s."""
    jaxpr, consts = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= zip(jaxpr.invars, args, strict=True)

    def raw(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    def read(atom):
        value = raw(atom)
        if isinstance(value, _Split):
            value = env[atom] = value.whole()
        return value

    for eqn in jaxpr.eqns:
        inputs, name = [raw(atom) for atom in eqn.invars], eqn.primitive.name
        split = any(isinstance(x, _Split) for x in inputs)
        if split and name in ("jit", "pjit"):
            out = _run(eqn.params["jaxpr"], inputs)
        elif split and name in _REMAT:
            out = _remat(eqn, inputs)
        else:
            params = eqn.primitive.get_bind_params(eqn.params)
            if split and name == "scan":
                inputs, params = _scan(eqn, inputs, read)
            else:
                inputs = [read(atom) for atom in eqn.invars]
            with eqn.ctx.manager:
                out = eqn.primitive.bind(*inputs, **params)
            out = out if eqn.primitive.multiple_results else [out]
        env |= zip(eqn.outvars, out, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _remat(eqn, inputs):
    """The same jax.checkpoint, gathering inside: what it forgets is gathered again."""
    splits = [x._replace(array=None) if isinstance(x, _Split) else None for x in inputs]

    def body(*arrays):
        return _run(eqn.params["jaxpr"], _join(splits, arrays))

    again = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
    return again(*(x.array if isinstance(x, _Split) else x for x in inputs))


def _scan(eqn, inputs, read):
    """Inputs and parameters of the same scan, whose body gathers its slices."""
    body = eqn.params["jaxpr"]
    splits, arrays = [], []
    for atom, x, inside in zip(eqn.invars, inputs, _avals(body), strict=True):
        sliced = (
            isinstance(x, _Split) and x.array.ndim == len(inside.shape) + 1 and x.spec[0] is None
        )
        splits.append(x._replace(array=None, spec=PartitionSpec(*x.spec[1:])) if sliced else None)
        arrays.append(x.array if sliced else read(atom))

    def turn(*slices):
        return _run(body, _join(splits, slices))

    # A body that forgets by a jax.checkpoint of its own is left to it: one around it would make it
    # remember.
    if not _remats(body):
        turn = jax.checkpoint(turn, policy=_all_but_gathered, prevent_cse=False)
    return arrays, {**eqn.params, "jaxpr": jax.make_jaxpr(turn)(*_avals(body))}


def _remats(jaxpr) -> bool:
    """Whether there is a jax.checkpoint somewhere in it."""
    inner = [value for eqn in jaxpr.eqns for value in eqn.params.values() if hasattr(value, "eqns")]
    return any(eqn.primitive.name in _REMAT for eqn in jaxpr.eqns) or any(map(_remats, inner))


def _avals(closed):
    return [var.aval for var in closed.jaxpr.invars]


def _join(splits, arrays):
    pairs = zip(splits, arrays, strict=True)
    return [array if split is None else split._replace(array=array) for split, array in pairs]


def _all_but_gathered(primitive, *_, **__) -> bool:
    """What a turn of a scan keeps for its backward pass: what it would keep anyway, but for
    gathered weights."""
    return primitive.name != "sharding_constraint"


def _has(spec, axes) -> bool:
    return any(name in axes for entry in spec for name in _names(entry))


def _without(entry, axes):
    left = tuple(name for name in _names(entry) if name not in axes)
    return left[0] if len(left) == 1 else left or None


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
