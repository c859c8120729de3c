"""Distributions: bases of flows, causal laws of sequences, mixtures, likelihoods of decoders.

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
from jflow.distributions._causal import causal, continuation, token_log_probs
from jflow.distributions._conditional import (
    around_previous,
    categorical,
    conditional_mixture,
    contrasted,
    split,
)
from jflow.distributions._manifolds import uniform_on, wrapped_normal
from jflow.distributions._tokens import tokens
from jflow.distributions._von_mises import von_mises_mixture

__all__ = [
    "around_previous",
    "categorical",
    "causal",
    "conditional_mixture",
    "contrasted",
    "continuation",
    "decoders",
    "diagonal_normal",
    "mixture_of_normals",
    "mixtures",
    "multivariate_normal",
    "normal",
    "scaled",
    "split",
    "student_t",
    "token_log_probs",
    "tokens",
    "uniform",
    "uniform_on",
    "von_mises_mixture",
    "wrapped_normal",
]

explain_unknown(__name__)
