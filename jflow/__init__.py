"""jflow: flow-based generative models in JAX, as small tuples of pure functions that compose.

The nouns are in `jflow.types`; each method is a function that returns one. t=0 is the source, t=1 is data; `forward`
goes from source to data; arrays lead with one batch axis; densities are in nats.
"""

from jflow import (
    bijectors,
    convert,
    couplings,
    data,
    decoders,
    distributions,
    fewstep,
    flows,
    guidance,
    losses,
    metrics,
    mixtures,
    nets,
    oracles,
    parameterisations,
    paths,
    solvers,
    times,
    train,
    types,
)
from jflow.fields import field, flow_map, velocity
from jflow.train import load

__version__ = "0.1.0"

__all__ = [
    "bijectors",
    "convert",
    "couplings",
    "data",
    "decoders",
    "distributions",
    "fewstep",
    "field",
    "flow_map",
    "flows",
    "guidance",
    "load",
    "losses",
    "metrics",
    "mixtures",
    "nets",
    "oracles",
    "parameterisations",
    "paths",
    "solvers",
    "times",
    "train",
    "types",
    "velocity",
]
