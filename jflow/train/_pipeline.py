"""Pipelines: the scanned blocks of a network, a group of layers on each device of a mesh axis."""

import dataclasses
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jflow._core.attached import ATTACHED, attach, call_with
from jflow._core.checks import check_noun, check_whole, count_rows
from jflow.train._rules import Spec
from jflow.types import Field, FlowMap, PyTree, Velocity

Network = TypeVar("Network", Velocity, Field, FlowMap)


def stages(axis: str = "stage") -> Spec:
    """The rule of a pipeline: the layers of scanned blocks are split over an axis of the mesh.

    As a rule: `("blocks/", stages())`, in front of the rules for all else. Each device then stores
    the layers of its stage alone, with their moments and averages. It is about storage: `pipelined`
    computes the same without it.

    Args:
        axis: Of the mesh.

    Returns:
        (shape, mesh) -> PartitionSpec.
    """
    return lambda shape, mesh: PartitionSpec(axis, *[None] * (len(shape) - 1))


def pipelined(
    network: Network,
    mesh: Mesh,
    *,
    microbatches: int,
    axis: str = "stage",
    rounds: int = 1,
    remat: bool = True,
) -> Network:
    """The same network, whose scanned blocks run as a pipeline over an axis of a mesh.

    Also known as: pipeline parallelism.

    The rows of a batch are cut into m microbatches. Each of the p devices along the axis holds some
    of the layers, works on one microbatch at a time, and hands it to the next device. In one round
    the first device holds the first depth / p layers, and so on (GPipe). In v rounds a microbatch
    goes around v times and each device holds v groups of depth / (p v) layers, so that devices wait
    less for the first microbatch. The share of time in which a device has nothing to do is

        (p - 1) / (v m + p - 1).

    Params are those of the network, in the same tree, so that a checkpoint of any layout goes on in
    any other; `stages` is the rule that stores them by stage. For v > 1 the layers of a device are
    not neighbors in that tree: XLA moves them at each call. What comes before and after the blocks
    runs on all devices along the axis. Other axes of the mesh (rows of the data, tensor sharding)
    are XLA's as before, for what lies along them.

    The network is applied to whole batches, so that losses that couple rows (optimal transport)
    see them whole. Values and gradients are those of the network; dropout draws other masks, one
    for each microbatch and layer. What routers report (`nets.routed`) does not come out of it.

    Args:
        network: A velocity, another field, or a flow map on Linen modules; each module made by
            `nets.scanned` in it becomes a pipeline.
        mesh: Whose axis holds the stages.
        microbatches: The number m that the rows are cut into.
        axis: Of the mesh; p is its size.
        rounds: The number v of groups of layers a device; more than one needs m >= p.
        remat: Whether the backward pass computes the activations inside a stage again, so that a
            stage keeps what it was handed alone. Without it, several rounds keep a copy of the
            weights for each turn.

    Returns:
        The network, to be called under jax.jit.

    Raises:
        ValueError: At construction for an axis that the mesh lacks or counts that do not fit; when
            traced if the stages and rounds do not divide the layers, the microbatches do not divide
            the rows, a network has no scanned blocks, blocks hand on more than their tokens, or a
            norm is over batches.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import jflow
        >>> from jflow import nets, train
        >>> mesh = train.make_mesh({"stage": 1}, jax.devices()[:1])  # {"stage": 4} on four devices
        >>> velocity = jflow.velocity(nets.ResidualMLP(width=8, num_blocks=2))
        >>> x, t = jnp.ones((4, 2)), jnp.zeros(4)
        >>> params = velocity.init(jax.random.key(0), x, t)
        >>> piped = train.pipelined(velocity, mesh, microbatches=2)
        >>> bool(jnp.allclose(jax.jit(piped.apply)(params, x, t), velocity.apply(params, x, t)))
        True

    References:
        Huang et al., *GPipe: Efficient Training of Giant Neural Networks using Pipeline
            Parallelism*, 2019, arXiv:1811.06965.
        Narayanan et al., *Efficient Large-Scale Language Model Training on GPU Clusters Using
            Megatron-LM*, 2021, arXiv:2104.04473, for groups of layers that are not neighbors.
    """
    check_noun("pipelined", network, Velocity, Field, FlowMap)
    check_whole("pipelined", microbatches=microbatches, rounds=rounds)
    if axis not in mesh.shape:
        raise ValueError(
            f"pipelined: expected an axis of the mesh, {list(mesh.shape)}, got {axis!r}"
        )
    p = mesh.shape[axis]
    if rounds > 1 and microbatches < p:
        raise ValueError(
            f"pipelined: {rounds} rounds expect at least as many microbatches as stages, {p}, got "
            f"{microbatches}"
        )

    pipeline = _Pipeline(mesh, axis, microbatches, rounds, remat)

    def run(_, module, call, *args):
        calls, more = (_calls(module, shapes) for shapes in (args, jax.tree.map(_longer, args)))
        if not calls:
            raise ValueError(
                f"pipelined: expected a network with scanned blocks, {type(module).__name__} has"
                " none (see nets.scanned)"
            )
        by_row = iter([_by_row(*pair) for pair in zip(calls, more, strict=True)])

        def instead(blocks, call, args):
            return pipeline.run(blocks, args, next(by_row)), None

        with nn.intercept_methods(_around_scans(instead)):
            return call(*args)

    def apply(params, x, *args, key=None, **named):
        rows = count_rows("pipelined", x)
        if rows % microbatches:
            raise ValueError(
                f"pipelined: expected the {microbatches} microbatches to divide the rows of x, got"
                f" {rows} rows"
            )
        return network.apply(attach(params, (), run, ()), x, *args, key=key, **named)

    return network._replace(apply=apply)


def _around_scans(function):
    """The interceptor that runs function(module, call, args) in place of scanned blocks."""

    def intercept(call, args, kwargs, context):
        if hasattr(context.module, "one_layer") and context.method_name == "__call__":
            return function(context.module, call, args)
        return call(*args, **kwargs)

    return intercept


def _calls(module, inputs) -> list[tuple[str, PyTree]]:
    """The name of each module of scanned blocks, and the shapes of what it is called with."""
    seen = []

    def look(blocks, call, args):
        seen.append((blocks.name, jax.tree.map(jnp.shape, args)))
        carry, rest = call(*args)
        if jax.tree.leaves(rest):
            raise ValueError(
                f"pipelined: expected scanned blocks that hand on their tokens alone, "
                f"{blocks.name!r} returns something from each layer"
            )
        return carry, rest

    own = dict(module.variables["params"])
    own.pop(ATTACHED)
    with nn.intercept_methods(_around_scans(look)):
        jax.eval_shape(lambda args: call_with(module, own, *args), inputs)
    return seen


def _longer(leaf):
    """The shape of an input with a row more."""
    return jax.ShapeDtypeStruct((leaf.shape[0] + 1, *leaf.shape[1:]), leaf.dtype)


def _by_row(call, longer) -> list[bool]:
    """Which arrays of a call lead with the rows of the batch."""
    (name, shapes), (_, others) = call, longer
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)  # noqa: E731
    pairs = zip(*(jax.tree.leaves(x, is_leaf=is_shape) for x in (shapes, others)), strict=True)
    found = []
    for shape, other in pairs:
        found.append(shape != other)
        if found[-1] and (shape[0] + 1, *shape[1:]) != other:
            raise ValueError(
                f"pipelined: expected what {name!r} reads to lead with the rows of the batch, got "
                f"an array of shape {list(shape)}"
            )
    return found


class _Pipeline(NamedTuple):
    mesh: Mesh
    axis: str
    microbatches: int
    rounds: int
    remat: bool

    def run(self, module, args, by_row):
        """The tokens after the layers of a scanned module."""
        params = module.variables["params"]
        norms = (getattr(norm, "func", norm) for norm in getattr(module, "norms", ()))
        if any(getattr(norm, "of_batch", False) for norm in norms):
            raise ValueError(
                "pipelined: expected norms of each token by itself, since a microbatch is not the"
                f" batch, got a norm over batches in {module.name!r}"
            )
        p, m, v = self.mesh.shape[self.axis], self.microbatches, self.rounds
        depth = len(jax.tree.leaves(params)[0])
        if depth % (p * v):
            raise ValueError(
                f"pipelined: expected {p} stages of {v} groups of layers to divide the {depth} "
                f"layers of {module.name!r}"
            )
        fields = [f.name for f in dataclasses.fields(module) if f.init and f.name != "parent"]
        block = module.one_layer(**{f: getattr(module, f) for f in fields}, parent=None)
        leaves, tree = jax.tree.flatten(args)
        tokens = len(jax.tree.leaves(args[0]))  # they come first
        arrays = [  # [m, rows of a microbatch, ...]: each is spread over the data axis as the batch
            jnp.moveaxis(leaf.reshape(-1, m, *leaf.shape[1:]), 1, 0) if row else leaf
            for leaf, row in zip(leaves, by_row, strict=True)
        ]
        key = module.make_rng("dropout") if module.has_rng("dropout") else None

        def layers(params, group, tokens, others, key):
            """One microbatch through the layers of one group."""
            params = jax.tree.map(lambda a: a[0 if v == 1 else group], params)

            def layer(tokens, own):
                params, key = own
                args = jax.tree.unflatten(tree, [*tokens, *others])
                rngs = {} if key is None else {"dropout": key}
                out, _ = block.apply({"params": params}, *args, rngs=rngs)
                return jax.tree.leaves(out), None

            keys = None if key is None else jax.random.split(key, depth // (p * v))
            return jax.lax.scan(layer, tokens, (params, keys))[0]

        layers = jax.checkpoint(layers, prevent_cse=False) if self.remat else layers

        def stage(params, arrays, key):
            here = jax.lax.axis_index(self.axis)
            params = jax.tree.map(lambda a: a[:, 0], params)
            # What the first stage reads at its turns: at first the batch, later what comes around.
            zero = 0 * here
            held = [a + zero.astype(a.dtype) for a in arrays[:tokens]]  # each stage has its own

            def tick(carry, i):
                held, arrived = carry
                slot = (i - p) % m  # of what the first stage sent out p ticks ago
                held = [
                    a.at[slot].set(jnp.where(i >= p, new, a[slot]))
                    for a, new in zip(held, arrived, strict=True)
                ]
                turn = i - here  # below 0, and from v m on, nothing that is read comes of it
                part, group = turn % m, jnp.clip(turn // m, 0, v - 1)
                given = [
                    jnp.where(here == 0, a[i % m], new)
                    for a, new in zip(held, arrived, strict=True)
                ]
                others = [a[part] if row else a for a, row in rest]
                at = None if key is None else jax.random.fold_in(key, turn * p + here)
                done = layers(params, group, given, others, at)
                ring = [(s, (s + 1) % p) for s in range(p)]
                return (held, [jax.lax.ppermute(a, self.axis, ring) for a in done]), None

            rest = list(zip(arrays[tokens:], by_row[tokens:], strict=True))
            # Real tokens stand in for what has not arrived: a layer sees nothing odd.
            start = held, [a[0] for a in held]
            (held, arrived), _ = jax.lax.scan(tick, start, jnp.arange(v * m + p - 1))
            return [a.at[-1].set(last)[None] for a, last in zip(held, arrived, strict=True)]

        groups = jax.tree.map(lambda a: a.reshape(v, p, depth // (p * v), *a.shape[1:]), params)
        split, whole = PartitionSpec(None, self.axis), PartitionSpec()
        program = jax.shard_map(
            stage,
            mesh=self.mesh,
            in_specs=(split, whole, whole),
            out_specs=PartitionSpec(self.axis),
            axis_names={self.axis},
        )
        # The first stage has all that came around.
        out = [jnp.moveaxis(a[0], 0, 1) for a in program(groups, arrays, key)]
        out = [a.reshape(-1, *a.shape[2:]) for a in out]
        return jax.tree.unflatten(jax.tree.structure(args[0]), out)
