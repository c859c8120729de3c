"""GFlowNets: environments, policies and jitted rollouts, whose objectives are in `jflow.losses`.

A policy is trained to build objects step by step, so that an object is drawn in proportion to its
reward.
"""

from jflow._core.names import explain_unknown
from jflow.gflownets._enumeration import (
    Enumeration,
    check,
    enumerate_states,
    exact_distribution,
    reward_distribution,
    total_variation,
)
from jflow.gflownets._hypergrid import hypergrid, hypergrid_log_reward
from jflow.gflownets._independent_sets import independent_sets
from jflow.gflownets._phylogenies import phylogenies
from jflow.gflownets._policy import Perceptron, masked_log_softmax, mlp_policy, policy
from jflow.gflownets._rollout import (
    TrajectoryTerms,
    backward_rollout,
    evaluate,
    log_prob,
    rollout,
    rollouts,
)
from jflow.gflownets._sequences import (
    any_order_sequences,
    bit_modes,
    bit_sequences,
    reward_table,
    sequences,
    two_ended_sequences,
)
from jflow.gflownets._types import Environment, Policy, PolicyOutput, Trajectories

__all__ = [
    "Enumeration",
    "Environment",
    "Perceptron",
    "Policy",
    "PolicyOutput",
    "Trajectories",
    "TrajectoryTerms",
    "any_order_sequences",
    "backward_rollout",
    "bit_modes",
    "bit_sequences",
    "check",
    "enumerate_states",
    "evaluate",
    "exact_distribution",
    "hypergrid",
    "hypergrid_log_reward",
    "independent_sets",
    "log_prob",
    "masked_log_softmax",
    "mlp_policy",
    "phylogenies",
    "policy",
    "reward_distribution",
    "reward_table",
    "rollout",
    "rollouts",
    "sequences",
    "total_variation",
    "two_ended_sequences",
]

explain_unknown(__name__)
