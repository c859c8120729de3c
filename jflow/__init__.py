"""jflow: flow-based generative models in JAX, as small tuples of pure functions that compose.

The nouns are in `jflow.types`; each method is a function that returns one. t=0 is the source, t=1
is data; `forward` goes from source to data; arrays lead with one batch axis; densities are in nats.

A package is imported when it is first asked for, so that the command line answers --help without
JAX.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jflow import (
        adapters,
        apps,
        bijectors,
        convert,
        couplings,
        data,
        distributions,
        domains,
        energy,
        flows,
        gflownets,
        guidance,
        kernels,
        losses,
        manifolds,
        metrics,
        nets,
        oracles,
        paths,
        solvers,
        steering,
        times,
        train,
        types,
    )
    from jflow.apps import load
    from jflow.nets import field, flow_map, velocity

__version__ = "0.1.0"

__all__ = [
    "adapters",
    "apps",
    "bijectors",
    "convert",
    "couplings",
    "data",
    "distributions",
    "domains",
    "energy",
    "field",
    "flow_map",
    "flows",
    "gflownets",
    "guidance",
    "kernels",
    "load",
    "losses",
    "manifolds",
    "metrics",
    "nets",
    "oracles",
    "paths",
    "solvers",
    "steering",
    "times",
    "train",
    "types",
    "velocity",
]

_FUNCTIONS = {
    "field": "nets",
    "flow_map": "nets",
    "load": "apps",
    "velocity": "nets",
}  # and where they are


def __getattr__(name: str):
    where = f"jflow.{_FUNCTIONS.get(name, name)}"
    if name.startswith("_") or importlib.util.find_spec(where) is None:
        from jflow._core.names import unknown

        raise unknown(__name__, name)
    module = importlib.import_module(where)  # a package becomes an attribute of this one by that
    if name not in _FUNCTIONS:
        return module
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
