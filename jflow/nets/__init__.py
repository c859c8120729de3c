"""Linen networks, one backbone a file.

A conditioner is `module(x, cond=None) -> features`; a velocity network is
`module(x, t, cond=None) -> shaped like x`, which `velocity` lifts into the noun. Both keep 'params'
alone; a 'dropout' stream switches dropout on. `dtype` is the type of the computation, params stay
float32 or better.
"""

from jflow._core.names import explain_unknown
from jflow.nets import norms, routers
from jflow.nets._adm import ADM
from jflow.nets._attention import (
    SelfAttention,
    chunked_attention,
    dot_product_attention,
    fused_attention,
    rotary_attention,
    tpu_attention,
)
from jflow.nets._autoencoder_kl import Autoencoder, AutoencoderKL, autoencoder, tiled
from jflow.nets._causal_lstm import CausalLSTM, WithPrevious
from jflow.nets._causal_transformer import CausalTransformer
from jflow.nets._clip import CLIPText, TextFeatures, quick_gelu
from jflow.nets._conv import GatedAttentionNet, GlowNet
from jflow.nets._ddpmpp import DDPMpp
from jflow.nets._deepflow import Branches, DeepFlow, branch_field, last_velocity
from jflow.nets._dit import DiT
from jflow.nets._embed import TimeCondEmbed, time_features
from jflow.nets._encoders import ImageEncoder, Periodic, SetEncoder
from jflow.nets._experts import MixtureOfExperts, routed
from jflow.nets._fields import field, flow_map, velocity
from jflow.nets._flux import Flux
from jflow.nets._headed import Headed, headed
from jflow.nets._hyper_connections import HyperConnections, LadderResidual
from jflow.nets._inception import InceptionFID
from jflow.nets._kernel_features import KernelFeatures
from jflow.nets._kernels import (
    fixup,
    spectral_norm,
    standardized_kernels,
    unit_kernels,
    weight_norm,
)
from jflow.nets._lightning_dit import LightningDiT
from jflow.nets._linear_attention import (
    flow_attention,
    fourier_attention,
    galerkin_attention,
    hybrid_attention,
    sinkhorn_attention,
    transnormer_attention,
)
from jflow.nets._lipschitz import LipschitzConv, LipschitzMLP, lip_swish
from jflow.nets._made import MADE, longest_path
from jflow.nets._mixture_head import MixtureHead
from jflow.nets._mlp import MLP, ResidualMLP, TimeMLP
from jflow.nets._mmdit import MMDiT
from jflow.nets._normalization import (
    CRMSNorm,
    DyT,
    LayerNorm,
    NoNorm,
    Norms,
    RMSNorm,
    UnitNorm,
    ngpt,
    norm_former,
    peri_norm,
    pre_rms_norm,
)
from jflow.nets._parameter_tokens import ParameterAttention, add_parameter_tokens
from jflow.nets._particles import PairVelocity
from jflow.nets._pca import pca_autoencoder
from jflow.nets._product_keys import ProductKeyExperts
from jflow.nets._scanned import scanned
from jflow.nets._statistics import (
    BatchChannelNorm,
    BatchNorm,
    OnlineNorm,
    PowerNorm,
    UnifiedNorm,
    init_statistics,
    training_statistics,
    update_statistics,
    with_statistics,
)
from jflow.nets._t5 import T5Encoder
from jflow.nets._tarflow import TarFlowTransformer
from jflow.nets._text_image import ImageToText, TextImageTransformer, TextToImage
from jflow.nets._time_experts import TimeExperts
from jflow.nets._token_dit import LearnedPositions, TokenDiT, sinusoidal_positions
from jflow.nets._token_logits import TokenLogits
from jflow.nets._unet import UNet
from jflow.nets._uvit import UViT
from jflow.nets._vit import CondEmbed, ViT
from jflow.nets._with_text import Contrasted, OfText, WithText

__all__ = [
    "BatchChannelNorm",
    "BatchNorm",
    "CRMSNorm",
    "DyT",
    "LayerNorm",
    "NoNorm",
    "Norms",
    "OnlineNorm",
    "PowerNorm",
    "RMSNorm",
    "UnifiedNorm",
    "UnitNorm",
    "fixup",
    "flow_attention",
    "fourier_attention",
    "galerkin_attention",
    "hybrid_attention",
    "init_statistics",
    "ngpt",
    "norm_former",
    "peri_norm",
    "pre_rms_norm",
    "sinkhorn_attention",
    "spectral_norm",
    "standardized_kernels",
    "training_statistics",
    "transnormer_attention",
    "unit_kernels",
    "update_statistics",
    "weight_norm",
    "with_statistics",
    "ADM",
    "Autoencoder",
    "AutoencoderKL",
    "Branches",
    "CLIPText",
    "CausalLSTM",
    "CausalTransformer",
    "CondEmbed",
    "Contrasted",
    "DDPMpp",
    "DeepFlow",
    "DiT",
    "Flux",
    "GatedAttentionNet",
    "GlowNet",
    "Headed",
    "HyperConnections",
    "LadderResidual",
    "ImageEncoder",
    "ImageToText",
    "InceptionFID",
    "LearnedPositions",
    "LightningDiT",
    "LipschitzConv",
    "LipschitzMLP",
    "MADE",
    "MLP",
    "MMDiT",
    "MixtureHead",
    "MixtureOfExperts",
    "OfText",
    "ParameterAttention",
    "Periodic",
    "ProductKeyExperts",
    "ResidualMLP",
    "SelfAttention",
    "SetEncoder",
    "T5Encoder",
    "TarFlowTransformer",
    "TextFeatures",
    "TextImageTransformer",
    "TextToImage",
    "TimeCondEmbed",
    "TimeExperts",
    "TimeMLP",
    "TokenDiT",
    "TokenLogits",
    "UNet",
    "UViT",
    "ViT",
    "WithPrevious",
    "WithText",
    "add_parameter_tokens",
    "autoencoder",
    "branch_field",
    "chunked_attention",
    "dot_product_attention",
    "field",
    "flow_map",
    "fused_attention",
    "headed",
    "last_velocity",
    "lip_swish",
    "longest_path",
    "norms",
    "pca_autoencoder",
    "quick_gelu",
    "rotary_attention",
    "scanned",
    "routed",
    "routers",
    "sinusoidal_positions",
    "tiled",
    "time_features",
    "tpu_attention",
    "velocity",
    "PairVelocity",
    "KernelFeatures",
]

explain_unknown(__name__)
