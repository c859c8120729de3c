"""GFlowNets: environments, policies and jitted rollouts, whose objectives are in `jflow.losses`.

A policy is trained to build objects step by step, so that an object is drawn in proportion to its
reward.
"""

from jflow._core.names import explain_unknown
from jflow.gflownets._types import Environment, Policy, PolicyOutput, Trajectories

__all__ = ["Environment", "Policy", "PolicyOutput", "Trajectories"]

explain_unknown(__name__)
