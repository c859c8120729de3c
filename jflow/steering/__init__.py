"""Steering: a trained velocity and a wish -> samples.

Nothing here trains the velocity; tuning by a reward is in `jflow.losses`.

Inverse problems: `steering.measurements` has what is measured. Velocities that answer a measurement
are made by `pseudoinverse_guidance`, `data_consistency`, `loss_guidance` and `flow_chef`, and
`sample_inverse` samples them and returns the residual; `pnp_flow` and `d_flow` are samplers of
their own.
"""

from jflow._core.names import explain_unknown
from jflow.steering import measurements
from jflow.steering._condition import SteeringCondition
from jflow.steering._inverse import (
    InverseInfo,
    consistent_source,
    data_consistency,
    pseudoinverse_guidance,
    residual_norm,
    sample_inverse,
    squared_residual,
)
from jflow.steering._losses import TargetLoss, flow_chef, loss_guidance
from jflow.steering._restoration import d_flow, pnp_flow
from jflow.steering.measurements import Measurement

__all__ = [
    "InverseInfo",
    "Measurement",
    "SteeringCondition",
    "TargetLoss",
    "consistent_source",
    "d_flow",
    "data_consistency",
    "flow_chef",
    "loss_guidance",
    "measurements",
    "pnp_flow",
    "pseudoinverse_guidance",
    "residual_norm",
    "sample_inverse",
    "squared_residual",
from jflow.steering._anchored import anchored_guidance
from jflow.steering._delta_velocity import approximate_flow, delta_velocity
from jflow.steering._flow_edit import flow_director, flow_edit
from jflow.steering._inversion import (
    edit_by_inversion,
    rf_inversion,
    rf_solver,
    toward_data,
    toward_noise,
)
from jflow.steering._periodic import coherent_motion, motion_variance, periodic_guidance
from jflow.steering._transport import otip, transport_guided

__all__ = [
    "anchored_guidance",
    "approximate_flow",
    "coherent_motion",
    "delta_velocity",
    "edit_by_inversion",
    "flow_director",
    "flow_edit",
    "motion_variance",
    "otip",
    "periodic_guidance",
    "rf_inversion",
    "rf_solver",
    "toward_data",
    "toward_noise",
    "transport_guided",
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
