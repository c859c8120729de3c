"""Steering: a trained velocity and a wish -> samples.

Nothing here trains the velocity; tuning by a reward is in `jflow.losses`.
"""

from jflow._core.names import explain_unknown
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
]

explain_unknown(__name__)
