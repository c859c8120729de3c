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
from jflow.gflownets._local_search import (
    LocalSearch,
    accept_barker,
    accept_improvement,
    accept_metropolis,
    local_search,
    local_search_rollouts,
)
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
from jflow.gflownets._transitions import (
    Transition,
    bridge_transition,
    transition,
    uniform_transition,
)
from jflow.gflownets._types import Environment, Policy, PolicyOutput, Trajectories
from jflow.gflownets._variants import outcome_policy, outcome_rollouts, prefix_log_flow, with_chance

__all__ = [
    "ContinuousPolicy",
    "ContinuousScores",
    "Enumeration",
    "Environment",
    "LocalSearch",
    "Perceptron",
    "Policy",
    "PolicyOutput",
    "Trajectories",
    "TrajectoryTerms",
    "Transition",
    "accept_barker",
    "accept_improvement",
    "accept_metropolis",
    "any_order_sequences",
    "backward_rollout",
    "bit_modes",
    "bit_sequences",
    "bridge_transition",
    "check",
    "continuous_log_prob",
    "continuous_policy",
    "continuous_rollouts",
    "enumerate_states",
    "evaluate",
    "exact_distribution",
    "hypergrid",
    "hypergrid_log_reward",
    "independent_sets",
    "local_search",
    "local_search_rollouts",
    "log_prob",
    "masked_log_softmax",
    "mlp_policy",
    "outcome_policy",
    "outcome_rollouts",
    "phylogenies",
    "policy",
    "prefix_log_flow",
    "reward_distribution",
    "reward_table",
    "rollout",
    "rollouts",
    "sequences",
    "terminal_log_density",
    "total_variation",
    "transition",
    "two_ended_sequences",
    "uniform_transition",
    "with_chance",
]

explain_unknown(__name__)
