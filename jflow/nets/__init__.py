"""Linen networks, one backbone a file.

A conditioner is `module(x, cond=None) -> features`; a velocity network is `module(x, t, cond=None) -> shaped like x`.
Both keep 'params' alone; a 'dropout' stream switches dropout on. `dtype` is the type of the computation, params stay
float32 or better.
"""

from jflow.nets.attention import SelfAttention
from jflow.nets.dit import DiT
from jflow.nets.embed import TimeCondEmbed, time_features
from jflow.nets.mlp import MLP, ResidualMLP, TimeMLP
from jflow.nets.unet import UNet

__all__ = ["MLP", "DiT", "ResidualMLP", "SelfAttention", "TimeCondEmbed", "TimeMLP", "UNet", "time_features"]
