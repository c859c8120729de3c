"""GFlowNets: environments, policies and jitted rollouts, whose objectives are in `jflow.losses`.

A policy is trained to build objects step by step, so that an object is drawn in proportion to its
reward.
"""

from jflow._core.names import explain_unknown
from jflow.gflownets._continuous import (
    ContinuousPolicy,
    ContinuousScores,
    continuous_log_prob,
    continuous_policy,
    continuous_rollouts,
    terminal_log_density,
)
from jflow.gflownets._kernels import Kernel, bridge_kernel, kernel, uniform_kernel
from jflow.gflownets._types import Environment, Policy, PolicyOutput, Trajectories

__all__ = [
    "ContinuousPolicy",
    "ContinuousScores",
    "Environment",
    "Kernel",
    "Policy",
    "PolicyOutput",
    "Trajectories",
    "bridge_kernel",
    "continuous_log_prob",
    "continuous_policy",
    "continuous_rollouts",
    "kernel",
    "terminal_log_density",
    "uniform_kernel",
]

explain_unknown(__name__)
