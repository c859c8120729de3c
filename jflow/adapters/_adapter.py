"""A model with an adapter, and the loss that trains it alone."""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jflow._core.attached import dequantize, has_attached, is_heeded, is_leaf
from jflow._core.checks import check_params, described
from jflow.types import Adapter, Array, Bijector, Loss, Params

__all__ = ["adapter_loss", "combine", "merge", "wrap"]


Model = TypeVar("Model", bound=tuple)


def wrap(model: Model, adapter: Adapter) -> Model:
    """A model with an adapter: the same noun, over params {'base', 'adapter'}.

    `model.apply(params, ...)` becomes `model.apply(adapter.apply(base, params), ...)`, and so do
    the other functions of the noun. Losses, samplers and guidance take it as any other model. With
    `adapter_loss` the adapter is trained alone.

    Args:
        model: a `Velocity`, `Field`, `FlowMap`, `Flow`, `Bijector`, `Distribution` or any tuple of
            functions with an `init`, whose other functions take params first. The pullback of a
            `Bijector` is left out, so that reversible stacks go through its inverse.
        adapter: what changes its params.

    Returns:
        The model. Its `init` makes a base and an adapter; to adapt a base that is there, take
        `{"base": base, "adapter": adapter.init(key, base)}`.

    Raises:
        TypeError: model is no such tuple, or adapter is no `Adapter`; params are not a dict.
        ValueError: params without 'base' or 'adapter'; an adapter of activations, where the model
            is no network that jflow lifted and would ignore it.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters, nets
        >>> velocity = adapters.wrap(
        ...     nets.velocity(nets.TimeMLP(hidden=(8,))), adapters.lora(2, where="MLP_0*")
        ... )
        >>> shapes = jax.eval_shape(velocity.init, jax.random.key(0), jnp.ones((1, 2)), jnp.ones(1))
        >>> sorted(shapes)
        ['adapter', 'base']
    """
    if not (isinstance(model, tuple) and callable(getattr(model, "init", None))):
        raise TypeError(
            f"wrap: expected a model such as a Velocity or a Flow, got {described(model)}"
        )
    check_adapter("wrap", adapter)
    name = type(model).__name__

    def init(key, *args, **kwargs):
        base_key, own_key = jax.random.split(key)
        base = model.init(base_key, *args, **kwargs)
        return {"base": base, "adapter": adapter.init(own_key, base)}

    def adapted(function):
        @functools.wraps(function)
        def run(params, *args, **kwargs):
            check_params(f"the wrapped {name}", params, "base", "adapter")
            base = adapter.apply(params["base"], params["adapter"])
            out = function(base, *args, **kwargs)
            if has_attached(base) and not is_heeded(base):
                raise ValueError(
                    f"wrap: the {name} ignores the adapter, which acts on the calls of Flax modules"
                    " inside networks that jflow lifted: make it by nets.velocity(module),"
                    " nets.field or nets.flow_map, or take an adapter of weights such as lora"
                )
            return out

        return run

    fields = {
        field: adapted(value) if callable(value) else value
        for field, value in model._asdict().items()  # type: ignore[attr-defined]
    } | {"init": init}
    if isinstance(model, Bijector):
        fields["pullback"] = None
    return type(model)(**fields)


def adapter_loss(loss: Loss) -> Loss:
    """A loss that trains the adapter alone, with the base in frozen['base'].

    The loss of a wrapped model has params {'base', 'adapter'}; this one has those of the adapter:

        adapter_loss(loss)(a, key, batch, frozen)
            = loss({'base': frozen['base'], 'adapter': a}, key, batch, frozen)

    so that gradients, the optimizer's state, the average of the params and the params of a
    checkpoint are of the adapter. frozen['ema'], the average, comes to `loss` with the base beside
    it; what else is frozen (a teacher's params) comes as it is.

    To train the adapter and a part of the base in one tree, take `optax.partition` with
    `optax.set_to_zero()` for the rest: `optax.masked` passes gradients of what it leaves out on
    unchanged, and they are added to the params.

    Args:
        loss: of a wrapped model, (params, key, batch, frozen) -> (scalar, metrics).

    Returns:
        The loss of the adapter's params.

    Raises:
        ValueError: at the call, where frozen has no 'base'.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> def loss(params, key, batch, frozen=None):
        ...     w = params["base"]["w"] + params["adapter"]["shift"]
        ...     return jnp.mean((batch["x"] - w) ** 2), {}
        >>> alone = adapters.adapter_loss(loss)
        >>> frozen = {"base": {"w": 1.0}}
        >>> gradient = jax.grad(alone, has_aux=True)
        >>> gradient({"shift": 0.0}, jax.random.key(0), {"x": jnp.zeros(2)}, frozen)[0]
        {'shift': Array(2., dtype=float32, weak_type=True)}
    """

    def of_adapter(params, key, batch, frozen=None):
        if "base" not in (frozen or {}):
            raise ValueError(
                "adapter_loss: expected the params of the base in frozen['base'], got"
                f" {sorted(frozen or {})}: train.init_state(..., frozen={{'base': base}})"
            )
        base = frozen["base"]
        if "ema" in frozen:
            frozen = {**frozen, "ema": {"base": base, "adapter": frozen["ema"]}}
        return loss({"base": base, "adapter": params}, key, batch, frozen)

    return of_adapter


def merge(base: Params, adapter: Adapter, params: Params) -> Params:
    """The base with an adapter of weights in it, to run without the adapter from then on.

    Args:
        base: the trained params; int8 is read back to floats.
        adapter: an adapter of weights; several at once by `combine`.
        params: of the adapter.

    Returns:
        Params with the structure, shapes and types of the base. Numbers are rounded once, to the
        type of the base.

    Raises:
        ValueError: the adapter acts on activations, or is for another base.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> base = {"kernel": jnp.zeros((2, 2))}
        >>> params = {"kernel": {"A": jnp.ones((2, 1)), "B": jnp.array([[1.0, 2.0]])}}
        >>> adapters.merge(base, adapters.lora(1), params)["kernel"]
        Array([[1., 2.],
               [1., 2.]], dtype=float32)
    """
    check_adapter("merge", adapter)
    base = jax.tree.map(dequantize, base, is_leaf=is_leaf)
    merged = adapter.apply(base, params)
    _check_weights("merge", merged)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), merged, base)


def combine(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float | Array] | None = None
) -> Adapter:
    """Several adapters of one base as one, with weights or without.

    Without weights they act one after another, in the order of the dict. With weights w they are
    adapters of weights, and their changes of the base W are added:

        W + sum_i w_i (apply_i(W, params_i) - W)

    Args:
        adapters: the adapters by name.
        weights: a number for each name.

    Returns:
        Adapter: its params are a dict of those of the adapters, by name.

    Raises:
        ValueError: no adapter, weights for other names; at the call, weights for adapters of
            activations, or params without one of the names.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> half = adapters.combine({"a": adapters.lora(1)}, {"a": 0.5})
        >>> params = {"a": {"kernel": {"A": jnp.ones((2, 1)), "B": jnp.array([[1.0, 2.0]])}}}
        >>> half.apply({"kernel": jnp.zeros((2, 2))}, params)["kernel"][0]
        Array([0.5, 1. ], dtype=float32)
    """
    if not adapters or weights is not None and set(weights) != set(adapters):
        given = "" if weights is None else f" and weights for {sorted(weights)}"
        raise ValueError(
            f"combine: expected adapters, and weights for each, got {sorted(adapters)}{given}"
        )
    for adapter in adapters.values():
        check_adapter("combine", adapter)

    def init(key, base):
        keys = jax.random.split(key, len(adapters))
        pairs = zip(keys, adapters.items(), strict=True)
        return {name: adapter.init(k, base) for k, (name, adapter) in pairs}

    def apply(base, params):
        check_params("combine", params, *adapters)
        if weights is None:
            for name, adapter in adapters.items():
                base = adapter.apply(base, params[name])
            return base
        base = out = jax.tree.map(dequantize, base, is_leaf=is_leaf)
        for name, adapter in adapters.items():
            new = adapter.apply(base, params[name])
            _check_weights("combine with weights", new)
            out = jax.tree.map(functools.partial(_add, weights[name]), out, new, base)
        return out

    return Adapter(init, apply)


def _add(weight, out, new, old):
    return out if new is old else out + jnp.asarray(weight, new.dtype) * (new - old)


def _check_weights(name: str, params) -> None:
    if has_attached(params):
        raise ValueError(
            f"{name}: expected an adapter of weights, got one that acts on activations, which no"
            " weights can hold"
        )


def check_adapter(name: str, adapter: Any) -> None:
    """Raise unless `adapter` is an `Adapter`."""
    if not isinstance(adapter, Adapter):
        raise TypeError(f"{name}: expected an Adapter, got {described(adapter)}")
