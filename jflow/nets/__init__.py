"""Linen networks, one backbone a file.

A conditioner is `module(x, cond=None) -> features`; a velocity network is `module(x, t, cond=None) -> shaped like x`.
Both keep 'params' alone; a 'dropout' stream switches dropout on. `dtype` is the type of the computation, params stay
float32 or better.
"""

from jflow.nets import norms
from jflow.nets.attention import SelfAttention, dot_product_attention
from jflow.nets.causal_transformer import CausalTransformer
from jflow.nets.conv import GatedAttentionNet, GlowNet
from jflow.nets.deepflow import Branches, DeepFlow, branch_field, last_velocity
from jflow.nets.dit import DiT
from jflow.nets.embed import TimeCondEmbed, time_features
from jflow.nets.encoders import ImageEncoder, Periodic, SetEncoder
from jflow.nets.inception import InceptionFID
from jflow.nets.lipschitz import LipschitzConv, LipschitzMLP, lip_swish
from jflow.nets.made import MADE, longest_path
from jflow.nets.mixture_head import MixtureHead
from jflow.nets.mlp import MLP, ResidualMLP, TimeMLP
from jflow.nets.unet import UNet
from jflow.nets.vit import CondEmbed, ViT

__all__ = [
    "Branches",
    "DeepFlow",
    "MixtureHead",
    "branch_field",
    "dot_product_attention",
    "last_velocity",
    "MADE",
    "MLP",
    "CausalTransformer",
    "CondEmbed",
    "DiT",
    "LipschitzConv",
    "LipschitzMLP",
    "GatedAttentionNet",
    "GlowNet",
    "ImageEncoder",
    "InceptionFID",
    "Periodic",
    "ResidualMLP",
    "SelfAttention",
    "SetEncoder",
    "TimeCondEmbed",
    "TimeMLP",
    "UNet",
    "ViT",
    "lip_swish",
    "norms",
    "longest_path",
    "time_features",
]
