"""Guidance: combinators from velocity to velocity, all of them composable.

`cfg`, `guided`, `negative` and `autoguidance` evaluate two velocities, and a `Combine` says what
becomes of them: `scaled`, `interval`, `rescaled`, `projected`, `zero_star`. `classifier_guidance`
follows the gradient of a classifier, `reward_guidance` that of a reward. `density` prescribes the
log-density along the way, `to_quantile` that of the latent. `extrapolate` and `score_sum` guide
causal flows of tokens. `denoise` takes noise out by the score of a density. `given_parts` makes the
velocity of some parts of a joint one where others are given, and `parts` guides parts by one
another. Discrete flows are guided in the law of their tokens (`discrete_cfg`, `tempered`), in the
rates of their jumps (`predictor_rates`, `taylor_rates`), or by a reward of clean data
(`reweighted_jump`).

A guided velocity is that velocity, exactly; the samples that it leads to do not follow the tilted
density p(x) p(y | x)^w.
"""

from jflow._core.names import explain_unknown
from jflow.guidance._causal import extrapolate, linear_ramp, score_sum
from jflow.guidance._cfg import autoguidance, cfg, guided, negative, with_cond, zero_init
from jflow.guidance._classifier import classifier_guidance, label_log_prob
from jflow.guidance._combine import Combine, interval, projected, rescaled, scaled, zero_star
from jflow.guidance._denoise import denoise
from jflow.guidance._density import Excess, constant_rate, density, density_step, quantile
from jflow.guidance._discrete import (
    discrete_cfg,
    predictor_rates,
    reweighted_jump,
    taylor_rates,
    tempered,
)
from jflow.guidance._mixture import probabilistic_guidance
from jflow.guidance._parts import PartsCondition, given_parts, parts, single_part
from jflow.guidance._prior import score_alignment, to_quantile
from jflow.guidance._reward import denoised_reward, reward_guidance
from jflow.guidance._simplex import simplex_cfg, simplex_classifier_guidance

__all__ = [
    "Combine",
    "Excess",
    "PartsCondition",
    "autoguidance",
    "cfg",
    "classifier_guidance",
    "denoise",
    "denoised_reward",
    "density",
    "density_step",
    "discrete_cfg",
    "constant_rate",
    "extrapolate",
    "given_parts",
    "guided",
    "interval",
    "label_log_prob",
    "negative",
    "parts",
    "predictor_rates",
    "probabilistic_guidance",
    "projected",
    "quantile",
    "rescaled",
    "reward_guidance",
    "reweighted_jump",
    "linear_ramp",
    "scaled",
    "score_alignment",
    "score_sum",
    "simplex_cfg",
    "simplex_classifier_guidance",
    "single_part",
    "taylor_rates",
    "tempered",
    "to_quantile",
    "with_cond",
    "zero_init",
    "zero_star",
]

explain_unknown(__name__)
