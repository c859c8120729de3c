"""What travels in a network's params and acts on its module calls: functions attached to a module,
and kernels in int8.

It is in the params, so that it is there whenever the network is traced, in a derivative too, and so
that jit tells two of them apart.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import flax.linen as nn
import jax
from jax.tree_util import Partial

from jflow.types import Params, PyTree

ATTACHED = "attached"  # the name beside a module's own params
HIDDEN = "hidden"  # the collection in which they leave tokens to each other, in one call
REPORT = "intermediates"  # that in which routers say what they did; init leaves it out


def is_quantized(x: Any) -> bool:
    """Whether x stands in the place of a leaf that `adapters.quantize` rounded."""
    return isinstance(x, Mapping) and set(x) == {"int8", "scale"}


def is_leaf(x: Any) -> bool:
    """Whether x is one leaf of a base: an array, a quantized one, or a function attached."""
    return is_quantized(x) or isinstance(x, Partial)


def dequantize(x: Any) -> Any:
    """The numbers of a quantized leaf; another leaf as it is."""
    return x["int8"].astype(x["scale"].dtype) * x["scale"] if is_quantized(x) else x


def attach(params: PyTree, path: tuple[str, ...], function: Callable, own: PyTree) -> PyTree:
    """params with `function(own, module, call, *args)` in the place of a module's call.

    Args:
        params: of a Linen network.
        path: of the module.
        function: it may run `call(*args)`, what the module does without it. The same object for
            each call of the model, or it is traced anew.
        own: arrays, which lead with the depth where the module is scanned.
    """
    if path:
        key: Any = path[0] if isinstance(params, Mapping) else int(path[0])
        inner = attach(params[key], path[1:], function, own)
        if isinstance(params, Mapping):
            return {**params, key: inner}
        items = [inner if i == key else item for i, item in enumerate(params)]
        return type(params)(*items) if hasattr(params, "_fields") else type(params)(items)
    return {**params, ATTACHED: (*params.get(ATTACHED, ()), Partial(function, own))}


def has_attached(params: PyTree) -> bool:
    """Whether a function is attached anywhere in params."""
    return any(isinstance(x, Partial) for x in jax.tree.leaves(params, is_leaf=is_leaf))


_heeded: WeakSet[Callable] = WeakSet()
"""The functions that were attached to params of a network that runs them. A program that is traced
once serves many calls, so that a call by itself does not tell."""


def is_heeded(params: PyTree) -> bool:
    """Whether some function that is attached to params ever came to a network that runs it."""
    attached = (x for x in jax.tree.leaves(params, is_leaf=is_leaf) if isinstance(x, Partial))
    return any(x.func in _heeded for x in attached)


def heeding(params: PyTree):
    """The context in which module calls run what is attached to params, and read int8."""
    special = [x for x in jax.tree.leaves(params, is_leaf=is_leaf) if is_leaf(x)]
    _heeded.update(x.func for x in special if isinstance(x, Partial))
    return nn.intercept_methods(_run) if special else contextlib.nullcontext()


def call_with(module: nn.Module, own: Params, *args, **kwargs) -> Any:
    """The call of a module with other params of its own; they are computed again in the backward
    pass where they are computed in front of it under `jax.checkpoint`."""
    return module.clone(parent=None).apply({"params": own}, *args, **kwargs)


def _run(next_function, args, kwargs, context):
    module = context.module
    # What is attached to scanned blocks is split by layer: each layer runs its own.
    if context.method_name != "__call__" or module.scope is None or hasattr(module, "one_layer"):
        return next_function(*args, **kwargs)
    own = dict(module.variables.get("params", {}))
    attached = own.pop(ATTACHED, ())
    call = next_function
    if any(map(is_quantized, own.values())):

        def call(*args, **kwargs):  # int8 is what stays in memory until the backward pass
            def read(own, *args):
                own = {name: dequantize(leaf) for name, leaf in own.items()}
                return call_with(module, own, *args, **kwargs)

            return jax.checkpoint(read)(own, *args)

    for function in attached:
        call = _around(function, module, call)
    return call(*args, **kwargs)


def _around(function, module, call):
    return lambda *args, **kwargs: function(module, call, *args, **kwargs)
