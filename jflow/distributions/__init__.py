"""Distributions: bases of flows, mixtures as values, the likelihoods of decoders.

A base is a `jflow.types.Distribution`: `init`, `log_prob` [b] in nats, `sample` [n, *event].
"""

from jflow._core.names import explain_unknown
from jflow.distributions import decoders, mixtures
from jflow.distributions._bases import (
    diagonal_normal,
    mixture_of_normals,
    multivariate_normal,
    normal,
    scaled,
    student_t,
    uniform,
)

__all__ = [
    "decoders",
    "diagonal_normal",
    "mixture_of_normals",
    "mixtures",
    "multivariate_normal",
    "normal",
    "scaled",
    "student_t",
    "uniform",
]

explain_unknown(__name__)
