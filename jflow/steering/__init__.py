"""Steering: a trained velocity and a wish -> samples.

Nothing here trains the velocity; tuning by a reward is in `jflow.losses`.
"""

from jflow._core.names import explain_unknown
from jflow.steering._attention import (
    EditCondition,
    adapted_weights,
    attention_map,
    fluxspace,
    modulated_overshoot,
    orthogonal_part,
    reflex,
    rf_edit,
)
from jflow.steering._features import capture, inject
from jflow.steering._resolution import (
    GuidedCondition,
    energy,
    hiflow,
    low_pass,
    projected_flow,
    rectified_hr,
    resized,
    rising_scales,
    scaled_positions,
)
from jflow.steering._search import (
    SearchInfo,
    best_of,
    best_of_n,
    particle_search,
    rollover_search,
)
from jflow.steering._tfg import tfg_flow

__all__ = [
    "EditCondition",
    "GuidedCondition",
    "SearchInfo",
    "adapted_weights",
    "attention_map",
    "best_of",
    "best_of_n",
    "capture",
    "energy",
    "fluxspace",
    "hiflow",
    "inject",
    "low_pass",
    "modulated_overshoot",
    "orthogonal_part",
    "particle_search",
    "projected_flow",
    "rectified_hr",
    "reflex",
    "resized",
    "rf_edit",
    "rising_scales",
    "rollover_search",
    "scaled_positions",
    "tfg_flow",
]

explain_unknown(__name__)
