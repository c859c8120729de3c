"""What a network gets beside x: the time, labels, vectors."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from jflow._core.conditions import read_parts, with_label
from jflow._core.linen import flatten_event
from jflow._core.positions import time_features
from jflow.types import Array, Cond, Condition


def check_time(
    name: str, x: Array, t: Array, r: Array | None = None, tokens: int | None = None
) -> None:
    """Raise unless t is [b] for x [b, *event], or [b, tokens] where there are such; r, if given,
    like t."""
    rows = list(jnp.shape(x)[:1])
    allowed = [rows] if tokens is None else [rows, [*rows, tokens]]
    if list(jnp.shape(t)) not in allowed:
        hint = "" if tokens is None else f" or {allowed[1]}, a time for each token,"
        raise ValueError(f"{name}: expected t of shape {rows},{hint} got {list(jnp.shape(t))}")
    if r is not None and jnp.shape(r) != jnp.shape(t):
        raise ValueError(
            f"{name}: expected r of shape {list(jnp.shape(t))}, that of t, got {list(jnp.shape(r))}"
        )


def read_cond(name: str, cond: Cond, x: Array, takes: Sequence[str]) -> tuple[Cond, Condition]:
    """(what `TimeCondEmbed` takes of cond, the parts that a network reads in other ways), checked.

    An array that `TimeCondEmbed` would flatten is refused: the sites of an image would be lost.
    """
    if isinstance(cond, Condition):
        cond = read_parts(name, cond, x, takes)
        embedded = Condition(cond.label, cond.vector)
        return embedded, cond._replace(label=None, vector=None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(cond):
        if (shape := list(jnp.shape(leaf)))[2:]:
            raise ValueError(
                f"{name}: expected cond{jax.tree_util.keystr(path)} to be labels [b] or vectors"
                f" [b, k], got {shape}: an image at the sites of x is"
                " jflow.types.Condition(aligned=...), tokens are Condition(context=...)"
            )
    return cond, Condition()


def need_part(module: nn.Module, part: str, name: str, params: Mapping) -> None:
    """Raise where the params of a module have weights, by their name, for a part that is not
    given."""
    if name in params:
        raise ValueError(
            f"{type(module).__name__}: expected cond.{part}, since its params were made with one,"
            " got None"
        )


def need_cond(module: nn.Module, cond: Cond) -> None:
    """Raise where a module whose params were made with a cond is given none, or fewer parts.

    They would be left out in silence.
    """
    names = [name for name in module.variables.get("params", {}) if name.startswith("cond_")]
    made, given = len({name.split("_")[1] for name in names}), len(jax.tree.leaves(cond))
    if made <= given:
        return
    if not given:
        said = "expected cond, since its params were made with one, got None"
    elif isinstance(cond, Condition):
        missing = "label" if cond.label is None else "vector"
        said = f"expected cond.{missing}, since its params were made with one, got None"
    else:
        said = f"expected {made} arrays in cond, as many as its params were made with, got {given}"
    raise ValueError(f"{owner(module)}: {said}")


def owner(module: nn.Module) -> str:
    """The name of the network that an embedding is a part of, or its own."""
    parent = module.parent
    return type(parent if isinstance(parent, nn.Module) else module).__name__


class TimeCondEmbed(nn.Module):
    """The embedding of the time, of each leaf of cond, and of r - t, as one vector a row.

    `module(t [b], cond=None, r=None) -> [b, width]`, their sum; for t [b, n], a time for each of n
    tokens, it is [b, n, width]. What r adds is zero at initialization, so that a flow map that
    starts from the params of a velocity (`train.warm_start`) starts as that velocity, whatever r
    is.

    Integer leaves [b] are labels and need `num_classes`; each gets a table of num_classes + 1 rows,
    of which index `num_classes` is the null label (for classifier-free guidance). With
    `num_classes` set, cond=None means the null label. Float leaves [b, ...] are flattened and go
    through a small MLP, like time. A label above num_classes cannot be seen while tracing: its rows
    come out NaN (a negative one counts from the end of the table).

    Attributes:
        width: of the embedding.
        num_classes: the number of classes where cond has integer labels [b]. Index num_classes is
            the null label, which cond=None then means too.
        features: the number of sinusoidal features of time, before the MLP.
        time_scale: the largest angular frequency of the features of time, in radians per unit of t;
            see `time_features`.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.
        max_period: the ratio that the frequencies fall by; see `time_features`.
    """

    width: int
    num_classes: int | None = None
    features: int = 256
    time_scale: float = 100.0
    dtype: Any = None
    max_period: float = 10_000.0

    @nn.compact
    def __call__(
        self, t: Num[Array, "b *n"], cond: Cond = None, r: Num[Array, "b *n"] | None = None
    ) -> Float[Array, "b *n width"]:
        """Embed.

        Args:
            t: the times, [b] or [b, n].
            cond: None, integer labels [b], floats [b, ...], a pytree of them, or a
                `types.Condition`.
            r: the times that a flow map goes to, shaped like t, or None.

        Returns:
            The embedding [b, width] or [b, n, width].
        """
        cond = with_label(owner(self), cond, t.shape[0], self.num_classes)
        need_cond(self, cond)
        features = partial(
            time_features, dim=self.features, scale=self.time_scale, max_period=self.max_period
        )
        h = self._mlp(features(t), "time")
        for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(cond)):
            part = self._leaf(jnp.asarray(leaf), f"cond_{i}", "cond" + jax.tree_util.keystr(path))
            h = h + part.reshape(part.shape[0], *(1,) * (h.ndim - 2), self.width)
        if r is not None:
            h = h + self._mlp(features(r - t), "gap", nn.initializers.zeros)
        return h

    def _mlp(self, h: Array, name: str, out_init=nn.linear.default_kernel_init) -> Array:
        h = nn.silu(nn.Dense(self.width, dtype=self.dtype, name=f"{name}_in")(h))
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=out_init, name=f"{name}_out")(h)

    def _leaf(self, leaf: Array, name: str, where: str) -> Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return self._mlp(flatten_event(leaf), name)
        if not jnp.issubdtype(leaf.dtype, jnp.integer):
            raise ValueError(f"{where}: expected integer labels or floats, got {leaf.dtype}")
        if self.num_classes is None:
            raise ValueError(
                f"{where} holds integer labels: the network needs num_classes=..., got None"
            )
        if leaf.ndim != 1:
            raise ValueError(f"{where}: expected labels of shape [b], got {list(leaf.shape)}")
        init = nn.initializers.normal(0.02)
        return nn.Embed(
            self.num_classes + 1, self.width, embedding_init=init, dtype=self.dtype, name=name
        )(leaf)
