"""Invertible maps and the functions that combine them.

A constructor returns a `types.Bijector`, three pure functions that compose with `chain` and `scan`.
Beside the maps themselves there are maps onto bounded supports (`supports`), the scalar maps that
coupling layers apply (`univariate`, which return an `Elementwise`), and stochastic layers and
surjections, which return a `Transport`.
"""

from jflow._core.names import explain_unknown
from jflow.bijectors import decoding, log_dets, masks, scales, splines, supports, univariate
from jflow.bijectors._amortized import amortized
from jflow.bijectors._autoregressive import (
    InverseInfo,
    autoregressive,
    autoregressive_inverse,
    jacobi,
    sequential,
)
from jflow.bijectors._block_autoregressive import block_autoregressive
from jflow.bijectors._causal_block import causal_block, tokens
from jflow.bijectors._check import check
from jflow.bijectors._combinators import chain, conditioned, indicated, invert, on_part
from jflow.bijectors._conv import masked_conv
from jflow.bijectors._coupling import coupling, masked_coupling
from jflow.bijectors._elementwise import (
    actnorm,
    affine,
    elementwise,
    logit,
    robust_standardize,
    sigmoid,
    softplus,
    standardize,
    tanh,
)
from jflow.bijectors._guide import TokenGuide
from jflow.bijectors._image import checkerboard, haar, squeeze
from jflow.bijectors._linear import (
    householder,
    invertible_conv_1x1,
    linear,
    lu,
    permute,
    qr,
    reshape,
    reverse,
)
from jflow.bijectors._markov import hamiltonian, langevin, metropolis
from jflow.bijectors._planar import planar, radial, sylvester
from jflow.bijectors._projective import (
    given_rest,
    pair_products,
    projective,
    rotation_matrix,
)
from jflow.bijectors._residual import residual
from jflow.bijectors._scan import rebuild_error, scan
from jflow.bijectors._stochastic import indexed, vae
from jflow.bijectors._surjective import (
    augment,
    drop,
    truncated_normal_dequantization,
    uniform_dequantization,
    variational_dequantization,
)
from jflow.bijectors._whiten import whiten

__all__ = [
    "InverseInfo",
    "TokenGuide",
    "actnorm",
    "affine",
    "amortized",
    "augment",
    "autoregressive",
    "autoregressive_inverse",
    "block_autoregressive",
    "causal_block",
    "chain",
    "check",
    "checkerboard",
    "conditioned",
    "coupling",
    "decoding",
    "drop",
    "elementwise",
    "given_rest",
    "haar",
    "hamiltonian",
    "householder",
    "indexed",
    "indicated",
    "invert",
    "invertible_conv_1x1",
    "jacobi",
    "langevin",
    "linear",
    "log_dets",
    "logit",
    "lu",
    "masked_conv",
    "masked_coupling",
    "masks",
    "metropolis",
    "on_part",
    "pair_products",
    "permute",
    "planar",
    "projective",
    "qr",
    "radial",
    "rebuild_error",
    "reshape",
    "residual",
    "reverse",
    "robust_standardize",
    "rotation_matrix",
    "scales",
    "scan",
    "sequential",
    "sigmoid",
    "softplus",
    "splines",
    "squeeze",
    "standardize",
    "supports",
    "sylvester",
    "tanh",
    "tokens",
    "univariate",
    "truncated_normal_dequantization",
    "uniform_dequantization",
    "vae",
    "variational_dequantization",
    "whiten",
]

explain_unknown(__name__)
