"""Invertible maps, a family per file; every constructor returns a `types.Bijector` (`transformers`: an `Elementwise`)."""

from jflow.bijectors import decoding, log_dets, masks, scales, splines, transformers
from jflow.bijectors.amortized import amortized
from jflow.bijectors.autoregressive import InverseInfo as InverseInfo
from jflow.bijectors.autoregressive import autoregressive, autoregressive_inverse, jacobi, sequential
from jflow.bijectors.block_autoregressive import block_autoregressive
from jflow.bijectors.checking import check
from jflow.bijectors.combinators import chain, conditioned, indicated, invert, on_part
from jflow.bijectors.conv import masked_conv
from jflow.bijectors.coupling import coupling, masked_coupling
from jflow.bijectors.elementwise import actnorm, affine, elementwise, logit, sigmoid, softplus, standardize, tanh
from jflow.bijectors.image import checkerboard, haar, squeeze
from jflow.bijectors.linear import householder, linear, lu, permute, qr, reshape, reverse
from jflow.bijectors.planar import planar, radial, sylvester
from jflow.bijectors.residual import residual
from jflow.bijectors.scan import rebuild_error, scan
from jflow.bijectors.stochastic import vae
from jflow.bijectors.surjective import (
    augment,
    drop,
    truncated_normal_dequantize,
    uniform_dequantize,
    variational_dequantize,
)
from jflow.bijectors.tarflow import causal_block, tokens

__all__ = [
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
    "haar",
    "householder",
    "indicated",
    "invert",
    "jacobi",
    "linear",
    "log_dets",
    "logit",
    "lu",
    "masked_conv",
    "masked_coupling",
    "masks",
    "on_part",
    "permute",
    "planar",
    "qr",
    "radial",
    "rebuild_error",
    "reshape",
    "residual",
    "reverse",
    "scales",
    "scan",
    "sequential",
    "sigmoid",
    "softplus",
    "splines",
    "squeeze",
    "standardize",
    "sylvester",
    "tanh",
    "tokens",
    "transformers",
    "truncated_normal_dequantize",
    "uniform_dequantize",
    "vae",
    "variational_dequantize",
]
