"""Guidance: combinators from velocity to velocity (`cfg`), what causal
blocks of tokens take (`TokenGuide`), and denoising by the score of a density."""

from jflow.guidance.causal import TokenGuide, extrapolate, rising, score_sum
from jflow.guidance.cfg import cfg
from jflow.guidance.denoise import denoise

__all__ = ["TokenGuide", "cfg", "denoise", "extrapolate", "rising", "score_sum"]
