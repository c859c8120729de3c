"""Guidance: combinators from velocity to velocity, all of them composable.

Two evaluations (`cfg`, `guided`, `negative`, `autoguidance`) and what becomes of them (`scaled`, `interval`, `rescaled`,
`projected`, `zero_star`); the gradient of a classifier; the log-density along the way (`density`) and of the latent
(`to_quantile`); what causal blocks of tokens take (`TokenGuide`); denoising by the score of a density.

A guided field is that field, exactly; the samples that it leads to do not follow the tilted density p(x) p(y | x)^w.
"""

from jflow.guidance._causal import extrapolate, linear_ramp, score_sum
from jflow.guidance._cfg import autoguidance, cfg, guided, negative, with_cond, zero_init
from jflow.guidance._classifier import classifier_guidance, label_log_prob
from jflow.guidance._combine import Combine, interval, projected, rescaled, scaled, zero_star
from jflow.guidance._denoise import denoise
from jflow.guidance._density import Excess, constant_rate, density, density_step, quantile
from jflow.guidance._mixture import probabilistic_guidance
from jflow.guidance._prior import score_alignment, to_quantile

__all__ = [
    "Combine",
    "Excess",
    "autoguidance",
    "cfg",
    "classifier_guidance",
    "denoise",
    "density",
    "density_step",
    "constant_rate",
    "extrapolate",
    "guided",
    "interval",
    "label_log_prob",
    "negative",
    "probabilistic_guidance",
    "projected",
    "quantile",
    "rescaled",
    "linear_ramp",
    "scaled",
    "score_alignment",
    "score_sum",
    "to_quantile",
    "with_cond",
    "zero_init",
    "zero_star",
]
