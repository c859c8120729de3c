"""What a network computes inside, read out and put in, without a change to the network.

A site is the path of a module in the network's params, such as 'blocks/attention/out': what the
module returns. After a colon it is a part of what the module's attention function sees:
'blocks/attention:v'. Functions that flax's `nn.intercept_methods` runs around the calls of these
modules do the work; they travel in the params, so that scans over blocks, jit and derivatives see
them as they see weights.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from jflow._core.arrays import expand_to
from jflow._core.attached import ATTACHED, HIDDEN, attach, heeding, is_leaf
from jflow._core.checks import check_cond, count_rows, like_state, times_of
from jflow._core.linen import check_linen, init_linen
from jflow.types import Field, Params, PyTree

__all__ = ["capture", "inject"]

PARTS = ("attended", "q", "k", "v", "weights")
"""Parts of attention, in the order in which a call of it has to meet what changes them."""


def capture(net: nn.Module, sites: Sequence[str]) -> Field:
    """The velocity of a network together with what it computes inside, at chosen sites.

    Also known as: feature extraction, activation hooks, attention maps.

    A site 'blocks/attention/out' is what the module at this path of the params returns. Where the
    module has an attention function, a colon and a name say a part of its (first) call: ':q', ':k'
    and ':v' are the queries, keys and values [b, n, heads, size] that it is given, ':attended' the
    [b, n, heads, size] that it returns, and ':weights' its weights [b, heads, n, m], which cost
    n m numbers a head. Sites such as 'blocks:v' (`nets.DiT`, `nets.TokenDiT`), 'last_block:v'
    (`nets.MMDiT`), 'single_blocks:attended' (`nets.Flux`) and 'middle_0/attention:weights'
    (`nets.UNet`) are of this kind.

    Args:
        net: an instance of a Linen module that keeps 'params' alone. A scan over blocks of your own
            needs variable_axes={'params': 0, 'hidden': 0}; those of `jflow.nets` have it.
        sites: the sites, at least one.

    Returns:
        Field: `apply(params, x, t, cond=None, *, key=None) -> (v, features)`, where v is shaped
            like x and features is a dict by site. Where blocks are scanned, a feature leads with
            their depth, [depth, b, ...]; elsewhere it is what the network computes, whose first
            axis is b, or b times the tokens for a Dense of jflow's networks. It takes one
            evaluation. It raises a ValueError for a path that is not there, named with the nearest
            ones.

    Raises:
        TypeError: net is not an instance of a Linen module.
        ValueError: there is no site, or a part is none of the five.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets, steering
        >>> net = nets.TokenDiT(width=8, num_layers=3, num_heads=2)
        >>> reader = steering.capture(net, ["blocks:v", "blocks/attention"])
        >>> x = jnp.ones((2, 5, 1))
        >>> params = reader.init(jax.random.key(0), x, 0.0)
        >>> v, features = reader.apply(params, x, 0.0)
        >>> features["blocks:v"].shape, features["blocks/attention"].shape
        ((3, 2, 5, 2, 4), (3, 2, 5, 8))
    """
    check_linen("steering.capture", "net", net)
    parsed = [parse("steering.capture", site) for site in sites]
    if not parsed:
        raise ValueError("steering.capture: expected at least one site, got none")
    name = type(net).__name__

    def inputs(x, t, cond):
        cond, t = check_cond(name, cond, count_rows(name, x)), times_of(name, t, x)
        return (x, t) if cond is None else (x, t, cond)

    def init(key, x, t, cond=None):
        return init_linen(net, key, *inputs(x, t, cond))

    def apply(params, x, t, cond=None, *, key=None):
        for path, part in sorted(parsed, key=_order):
            check_site("steering.capture", params, path)
            params = attach(params, path, _KEEP[part], {})
        rngs = None if key is None else {"dropout": key}
        with heeding(params):
            v, left = net.apply(
                {"params": params}, *inputs(x, t, cond), rngs=rngs, mutable=[HIDDEN]
            )
        found = left.get(HIDDEN, {})
        features = {
            site: _left_at(found, site, path, part)
            for site, (path, part) in zip(sites, parsed, strict=True)
        }
        return like_state(name, v, x), features

    return Field(init, apply)


def inject(
    params: Params,
    features: Mapping[str, PyTree],
    *,
    weight: ArrayLike | None = None,
    combine: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> Params:
    """Params with which a network computes with given features in the place of its own.

    Also known as: feature injection, attention injection, activation patching.

        new = own + weight (combine(own, given) - own)      at each site

    Any velocity of a network that jflow lifted runs with these params, guided ones included, as
    long as the features have its rows. What the network computes before a site still runs; what
    only leads to it is removed by jit.

    Args:
        params: those of the network.
        features: what is given, by site; see `capture`, whose features fit. With combine it may be
            any pytree of arrays, which lead with the depth where the module is scanned.
        weight: how much of it, a number, or an array along the first axis of the features: one for
            each of the scanned blocks, [depth] (zeros leave a block alone), or for each row. None:
            all of it.
        combine: (own, given) -> new, in the shape of own; None: given. Under jit it is traced once;
            outside, pass the same function each time, so that nothing is traced anew.

    Returns:
        Params: with functions beside those of the modules.

    Raises:
        ValueError: a path is not there, named with the nearest ones; while tracing, where a feature
            has another shape than what it replaces, or a module has no attention function.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jflow
        >>> from jflow import nets, steering
        >>> velocity = jflow.velocity(nets.ResidualMLP(width=8, num_blocks=2))
        >>> params = velocity.init(jax.random.key(0), jnp.ones((1, 2)), 0.0)
        >>> steered = steering.inject(params, {"head": jnp.full((1, 2), 3.0)})
        >>> velocity.apply(steered, jnp.ones((1, 2)), 0.0).tolist()
        [[3.0, 3.0]]
    """
    parsed = {site: parse("steering.inject", site) for site in features}
    for site, (path, part) in sorted(parsed.items(), key=lambda item: _order(item[1])):
        given = features[site]
        check_site("steering.inject", params, path)
        first = jnp.shape(jax.tree.leaves(given)[0])[:1]
        own = {"given": given, "combine": Partial(_given if combine is None else combine)}
        if weight is not None:
            if jnp.shape(weight) not in ((), first):
                raise ValueError(
                    f"steering.inject: expected weight to be a number or of shape {list(first)},"
                    f" the first axis of the feature at {site!r}, got {list(jnp.shape(weight))}"
                )
            own["weight"] = jnp.broadcast_to(jnp.asarray(weight, float), first)
        params = attach(params, path, _REPLACE[part], own)
    return params


def parse(name: str, site: str) -> tuple[tuple[str, ...], str | None]:
    """The path of a site and its part, None for what the module returns; checked."""
    path, colon, part = site.partition(":")
    if colon and part not in PARTS:
        raise ValueError(
            f"{name}: expected a site that ends in {', '.join(':' + p for p in PARTS)} or in the"
            f" path of a module, got {site!r}"
        )
    if not path:
        raise ValueError(f"{name}: expected a site with the path of a module, got {site!r}")
    return tuple(path.split("/")), part if colon else None


def check_site(name: str, params: Params, path: Sequence[str]) -> None:
    """Raise unless a module with params is at the path; the message names the nearest."""
    at: Any = params
    for part in path:
        at = at.get(part) if isinstance(at, Mapping) else None
    if isinstance(at, Mapping):
        return
    there = sorted(modules(params))
    near = difflib.get_close_matches("/".join(path), there, n=3, cutoff=0.0)
    raise ValueError(
        f"{name}: expected the path of a module of the network, got {'/'.join(path)!r}; the nearest"
        f" are {', '.join(map(repr, near))}"
    )


def modules(params: Params, path: str = "") -> list[str]:
    """The paths of all modules that have params."""
    found = []
    for name, inner in params.items():
        if isinstance(inner, Mapping) and name != ATTACHED and not is_leaf(inner):
            found += [path + name, *modules(inner, f"{path}{name}/")]
    return found


def _order(site: tuple) -> int:
    return 0 if site[1] is None else PARTS.index(site[1])


def _left_at(found, site: str, path: Sequence[str], part: str | None) -> PyTree:
    for name in path:
        found = found.get(name, {})
    if _name(part) not in found:
        raise ValueError(
            f"steering.capture: expected a site whose module is called, got {site!r}, of which the"
            " network calls other methods, or none, for such inputs: choose a module inside"
        )
    return found[_name(part)]


def _name(part: str | None) -> str:
    return "captured" if part is None else f"captured_{part}"


def _keep(part, params, module, run, *args, **kwargs):
    """The call of a module that leaves a feature, which is as it was."""
    kept = []

    def change(own):
        kept.append(own)
        return own

    out = _changed(part, change, module, run, args, kwargs)
    last = lambda _, new: new  # noqa: E731
    if kept and not module.sow(HIDDEN, _name(part), kept[0], reduce_fn=last, init_fn=lambda: None):
        raise ValueError(
            f"steering.capture: what {'/'.join(module.path)!r} computes does not leave its scan:"
            f" expected nn.scan with variable_axes={{'params': 0, {HIDDEN!r}: 0}}"
        )
    return out


def _replace(part, params, module, run, *args, **kwargs):
    """The call of a module with another feature in the place of its own."""
    where = "/".join(module.path) + ("" if part is None else f":{part}")

    def change(own):
        new = params["combine"](own, params["given"])
        shapes = [jax.tree.map(lambda a: list(jnp.shape(a)), tree) for tree in (own, new)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"steering.inject: expected a feature of shape {shapes[0]} at {where!r}, got"
                f" {shapes[1]}"
            )
        if "weight" in params:
            w = params["weight"]
            new = jax.tree.map(lambda a, b: a + expand_to(w, a).astype(a.dtype) * (b - a), own, new)
        return jax.tree.map(lambda a, b: b.astype(a.dtype), own, new)

    return _changed(part, change, module, run, args, kwargs)


def _given(own, given):
    return given


def _changed(part, change, module, run, args, kwargs):
    """What a module returns after `change` of it, or of a part of its attention."""
    if part is None:
        return change(run(*args, **kwargs))
    attention_fn = getattr(module, "attention_fn", None)
    if not callable(attention_fn):
        raise ValueError(
            f"steering: expected a module with an attention function for ':{part}', got"
            f" {'/'.join(module.path)!r}, a {type(module).__name__}"
        )
    called = []

    def attention(q, k, v, **rest):
        if called:  # a second attention of the block
            return attention_fn(q, k, v, **rest)
        called.append(part)
        if part == "attended":
            return change(attention_fn(q, k, v, **rest))
        if part != "weights":
            given = {"q": q, "k": k, "v": v}
            return attention_fn(**{**given, part: change(given[part])}, **rest)
        m, heads = k.shape[1:3]  # with one-hot values attention returns its weights
        one_hot = jnp.broadcast_to(jnp.eye(m, dtype=v.dtype)[:, None], (k.shape[0], m, heads, m))
        own = jnp.moveaxis(attention_fn(q, k, one_hot, **rest), 2, 1)
        new = change(own)
        if new is own:
            return attention_fn(q, k, v, **rest)
        return jnp.einsum("bhqk,bkhd->bqhd", new, v)

    # The instance lives for this call of the network alone; its user never holds it.
    object.__setattr__(module, "attention_fn", attention)
    try:
        return run(*args, **kwargs)
    finally:
        object.__setattr__(module, "attention_fn", attention_fn)


_KEEP = {part: partial(_keep, part) for part in (None, *PARTS)}
_REPLACE = {part: partial(_replace, part) for part in (None, *PARTS)}
