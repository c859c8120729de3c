"""Steering: a trained velocity and a wish -> samples.

Nothing here trains the velocity; tuning by a reward is in `jflow.losses`.

Inverse problems: `measurements` has what is measured. Velocities that answer a measurement are made
by `pseudoinverse_guidance`, `data_consistency`, `loss_guidance` and `flow_chef`, and
`sample_inverse` samples them and returns the residual; `pnp_flow`, `flower` and `d_flow` are
samplers of their own.

Inversion and editing: `rf_inversion`, `otip` and `edit_by_inversion` go to the noise and back;
`flow_edit`, `delta_velocity`, `approximate_flow` and `flow_director` edit without inversion;
`anchored_guidance` and `periodic_guidance` follow a loss while they sample.

Inside the network: `capture` reads features and attention of a Linen network, `inject` replaces
them; `rf_edit`, `reflex`, `fluxspace` and `modulated_overshoot` are made of these. `word_mask` and
`edit_region` say where an edit acts.

Search: `best_of_n`, `particle_search` and `rollover_search` look for samples of high reward;
`tfg_flow` guides continuous and discrete parts together. Resolution: `hiflow`, `projected_flow`
(I-Max) and `rectified_hr` draw larger than the network was trained for, `scaled_positions` and
`proportional_attention` fit the network to it.
"""

from jflow._core.names import explain_unknown
from jflow.steering import measurements
from jflow.steering._anchored import anchored_guidance
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
from jflow.steering._condition import SteeringCondition
from jflow.steering._delta_velocity import approximate_flow, delta_velocity
from jflow.steering._features import capture, inject
from jflow.steering._flow_edit import flow_director, flow_edit
from jflow.steering._inverse import (
    InverseInfo,
    consistent_source,
    data_consistency,
    pseudoinverse_guidance,
    residual_norm,
    sample_inverse,
    squared_residual,
)
from jflow.steering._inversion import (
    edit_by_inversion,
    rf_inversion,
    rf_solver,
    toward_data,
    toward_noise,
)
from jflow.steering._losses import TargetLoss, flow_chef, loss_guidance
from jflow.steering._masks import edit_region, otsu_threshold, word_attention, word_mask
from jflow.steering._periodic import coherent_motion, motion_variance, periodic_guidance
from jflow.steering._resolution import (
    energy,
    hiflow,
    low_pass,
    projected_flow,
    proportional_attention,
    rectified_hr,
    resized,
    rising_scales,
    scaled_positions,
)
from jflow.steering._restoration import d_flow, flower, pnp_flow
from jflow.steering._search import (
    SearchInfo,
    best_of,
    best_of_n,
    particle_search,
    rollover_search,
)
from jflow.steering._tfg import tfg_flow
from jflow.steering._transport import otip, transport_guided
from jflow.steering.measurements import Measurement

__all__ = [
    "EditCondition",
    "InverseInfo",
    "Measurement",
    "SearchInfo",
    "SteeringCondition",
    "TargetLoss",
    "adapted_weights",
    "anchored_guidance",
    "approximate_flow",
    "attention_map",
    "best_of",
    "best_of_n",
    "capture",
    "coherent_motion",
    "consistent_source",
    "d_flow",
    "data_consistency",
    "delta_velocity",
    "edit_by_inversion",
    "edit_region",
    "energy",
    "flow_chef",
    "flow_director",
    "flow_edit",
    "flower",
    "fluxspace",
    "hiflow",
    "inject",
    "loss_guidance",
    "low_pass",
    "measurements",
    "modulated_overshoot",
    "motion_variance",
    "orthogonal_part",
    "otip",
    "otsu_threshold",
    "particle_search",
    "periodic_guidance",
    "pnp_flow",
    "projected_flow",
    "proportional_attention",
    "pseudoinverse_guidance",
    "rectified_hr",
    "reflex",
    "residual_norm",
    "resized",
    "rf_edit",
    "rf_inversion",
    "rf_solver",
    "rising_scales",
    "rollover_search",
    "sample_inverse",
    "scaled_positions",
    "squared_residual",
    "tfg_flow",
    "toward_data",
    "toward_noise",
    "transport_guided",
    "word_attention",
    "word_mask",
]

explain_unknown(__name__)
