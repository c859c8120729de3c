"""Invertible maps, a family per file; every constructor returns a `types.Bijector` (`transformers`: an `Elementwise`)."""

from jflow.bijectors import splines, transformers
from jflow.bijectors.combinators import chain, conditioned, invert, rebuild_error, scan
from jflow.bijectors.coupling import coupling, masked_coupling
from jflow.bijectors.elementwise import actnorm, affine, elementwise, logit, sigmoid, softplus, tanh
from jflow.bijectors.linear import lu, permute, reshape, reverse

__all__ = [
    "actnorm",
    "affine",
    "chain",
    "conditioned",
    "coupling",
    "elementwise",
    "invert",
    "logit",
    "lu",
    "masked_coupling",
    "permute",
    "rebuild_error",
    "reshape",
    "reverse",
    "scan",
    "sigmoid",
    "softplus",
    "splines",
    "tanh",
    "transformers",
]
