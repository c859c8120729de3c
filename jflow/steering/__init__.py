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
]

explain_unknown(__name__)
