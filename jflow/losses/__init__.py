"""Losses (params, key, batch, frozen=None) -> (scalar, metrics), and batch transforms.

A loss reads 'x', and takes 'x0' where it regresses on pairs; without it such a loss draws the
source, standard normal. Other pairs, dropped conditions and noise are batch transforms in front of
it, the same for all; see `chain`.

A loss of your own is a function of the same form. What it is made of is public: `draw_pairs` or
`read_batch` reads the batch, `frozen_entry` gives the params of a teacher, `flow_map_residual` is
the identity behind MeanFlow and its relatives, and `mean_event` and `mean_of_rows` make one number
of errors [b, *event].

In formulas sg(a) is a without a gradient (jax.lax.stop_gradient).
"""

from jflow._core.arrays import mean_event
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import frozen_entry
from jflow._core.names import explain_unknown
from jflow.losses._acceleration import constant_acceleration, initial_velocity
from jflow.losses._adversarial import (
    GanObjective,
    Generate,
    adversarial,
    fixed_steps,
    hinge_gan,
    least_squares_gan,
    non_saturating_gan,
    relativistic_gan,
    student_only,
    sum_losses,
    turbo,
)
from jflow.losses._align import eulerian_map_distillation, lagrangian_map_distillation
from jflow.losses._anchoring import anchored_consistency, squared_and_cosine_error
from jflow.losses._any_order import any_order_nll
from jflow.losses._augmented import annealed_source, drop_cond, fresh_source, noised
from jflow.losses._balanced import balanced_matching
from jflow.losses._bayesian import bayesian_flow, bayesian_reconstruction
from jflow.losses._boss import boss
from jflow.losses._c_rectified import (
    ConvexCost,
    c_rectified_flow,
    inner_potential,
    potential_velocity,
    power_cost,
    quadratic_cost,
)
from jflow.losses._causal_matching import causal_matching
from jflow.losses._chain import chain
from jflow.losses._consistency import (
    averaged_target,
    consistency_training,
    count_steps,
    easy_steps,
    euler_step,
    grid_steps,
    heun_step,
    inverse_noise_step,
    inverse_time_step,
    online_target,
)
from jflow.losses._consistency_flow import consistency_flow_matching
from jflow.losses._constrained import constrained
from jflow.losses._continuous_gflownets import (
    continuous_detailed_balance,
    continuous_trajectory_balance,
)
from jflow.losses._control import coupled_flows, coupled_log_ratio, soft_bellman
from jflow.losses._deep_supervision import deep_supervision
from jflow.losses._diffusion_likelihood import diffusion_likelihood, learned_times
from jflow.losses._diffusion_sampler import (
    diffusion_balance,
    diffusion_log_variance,
    diffusion_partial_balance,
)
from jflow.losses._discrete import discrete_kl, discrete_matching
from jflow.losses._distillation import distillation
from jflow.losses._distribution_matching import (
    ScoreWeight,
    distribution_matching,
    inverse_error_weight,
    kl_weight,
    shared_timesteps,
)
from jflow.losses._dream import dream
from jflow.losses._errors import (
    mean_squared_error,
    perceptual_huber,
    pseudo_huber,
    riemannian_error,
)
from jflow.losses._free_form import free_form
from jflow.losses._gflownet_variants import (
    adversarial_trajectory_balance,
    expected_detailed_balance,
    gflownet_em,
    outcome_conditioned,
    outcome_marginalization,
    process_supervision,
)
from jflow.losses._gflownets import (
    detailed_balance,
    forward_looking,
    gfn_flow_matching,
    learned_energy_decomposition,
    log_partition_variance,
    modified_detailed_balance,
    sub_trajectory_balance,
    trajectory_balance,
)
from jflow.losses._hierarchical import HierarchyLevel, hierarchical_matching
from jflow.losses._histories import falling_noise, full_history, path_states
from jflow.losses._importance import (
    Importance,
    draw_times,
    learn_importance,
    likelihood_importance,
    likelihood_weight,
)
from jflow.losses._interpolant import interpolant_matching
from jflow.losses._joint import joint_matching
from jflow.losses._kinetic import kinetic_energy
from jflow.losses._likelihood import negative_elbo, nll
from jflow.losses._matching import flow_matching
from jflow.losses._mean_flow import improved_mean_flow, mean_flow
from jflow.losses._mixture import mixture_matching
from jflow.losses._pairs import Pairs, draw_pairs
from jflow.losses._path_gradient import fast_path_gradient, path_gradient
from jflow.losses._perflow import perflow
from jflow.losses._policy import group_advantages, group_rollouts, grpo, policy_batch, ppo
from jflow.losses._preferences import dpo, preference_reward, reward_weights
from jflow.losses._reconstruction import reconstruction
from jflow.losses._rectified_diffusion import (
    end_error,
    noise_error,
    phased_rectified_diffusion,
    rectified_diffusion,
)
from jflow.losses._refiner import velocity_refiner
from jflow.losses._regularized import regularized_nll
from jflow.losses._residual import (
    adaptive_weight,
    clipped_tangent,
    flow_map_residual,
    normalized_tangent,
)
from jflow.losses._reweighted import forward_kl
from jflow.losses._score_matching import denoising_score_matching, score_matching
from jflow.losses._selected import selected
from jflow.losses._self_corrected import self_corrected, self_correction
from jflow.losses._shortcut import shortcut
from jflow.losses._slim import flow_guided_distillation
from jflow.losses._statistical import bridge_drift
from jflow.losses._steps import step_nll
from jflow.losses._tokens import token_cross_entropy
from jflow.losses._trajectory import trajectory_distillation
from jflow.losses._transfer import transfer
from jflow.losses._transition import transition_matching, transition_pairs
from jflow.losses._trigflow import trigflow_consistency
from jflow.losses._tunable import tunable_distillation
from jflow.losses._variational import reverse_kl
from jflow.losses._variational_noise import noise_encoder, variational_noise
from jflow.losses._velocity_distillation import (
    marginal_transport,
    velocity_distillation,
    velocity_matching,
)

__all__ = [
    # what a loss of your own is made of
    "Pairs",
    "adaptive_weight",
    "any_order_nll",
    "clipped_tangent",
    "draw_pairs",
    "flow_map_residual",
    "frozen_entry",
    "full_history",
    "mean_event",
    "mean_of_rows",
    "normalized_tangent",
    "read_batch",
    # losses, and what is given to them
    "ConvexCost",
    "GanObjective",
    "Generate",
    "HierarchyLevel",
    "Importance",
    "ScoreWeight",
    "adversarial",
    "anchored_consistency",
    "annealed_source",
    "averaged_target",
    "balanced_matching",
    "bayesian_flow",
    "bayesian_reconstruction",
    "boss",
    "bridge_drift",
    "c_rectified_flow",
    "causal_matching",
    "chain",
    "consistency_flow_matching",
    "consistency_training",
    "constant_acceleration",
    "count_steps",
    "deep_supervision",
    "diffusion_likelihood",
    "discrete_kl",
    "discrete_matching",
    "distillation",
    "distribution_matching",
    "dream",
    "dpo",
    "draw_times",
    "drop_cond",
    "easy_steps",
    "end_error",
    "euler_step",
    "eulerian_map_distillation",
    "fixed_steps",
    "flow_guided_distillation",
    "falling_noise",
    "flow_matching",
    "fresh_source",
    "grid_steps",
    "group_advantages",
    "group_rollouts",
    "grpo",
    "heun_step",
    "hierarchical_matching",
    "hinge_gan",
    "improved_mean_flow",
    "initial_velocity",
    "inner_potential",
    "interpolant_matching",
    "inverse_error_weight",
    "inverse_noise_step",
    "inverse_time_step",
    "joint_matching",
    "kl_weight",
    "lagrangian_map_distillation",
    "learn_importance",
    "learned_times",
    "least_squares_gan",
    "likelihood_importance",
    "likelihood_weight",
    "marginal_transport",
    "mean_flow",
    "mean_squared_error",
    "mixture_matching",
    "negative_elbo",
    "nll",
    "noise_encoder",
    "noise_error",
    "noised",
    "non_saturating_gan",
    "online_target",
    "path_states",
    "perceptual_huber",
    "perflow",
    "phased_rectified_diffusion",
    "policy_batch",
    "potential_velocity",
    "power_cost",
    "ppo",
    "preference_reward",
    "pseudo_huber",
    "riemannian_error",
    "quadratic_cost",
    "reconstruction",
    "rectified_diffusion",
    "regularized_nll",
    "relativistic_gan",
    "reverse_kl",
    "reward_weights",
    "self_corrected",
    "selected",
    "self_correction",
    "shared_timesteps",
    "shortcut",
    "squared_and_cosine_error",
    "student_only",
    "sum_losses",
    "token_cross_entropy",
    "trajectory_distillation",
    "transition_matching",
    "transition_pairs",
    "trigflow_consistency",
    "tunable_distillation",
    "turbo",
    "variational_noise",
    "velocity_distillation",
    "velocity_matching",
    "velocity_refiner",
    "adversarial_trajectory_balance",
    "constrained",
    "continuous_detailed_balance",
    "continuous_trajectory_balance",
    "coupled_flows",
    "coupled_log_ratio",
    "denoising_score_matching",
    "detailed_balance",
    "diffusion_balance",
    "diffusion_log_variance",
    "diffusion_partial_balance",
    "expected_detailed_balance",
    "fast_path_gradient",
    "forward_kl",
    "forward_looking",
    "free_form",
    "gflownet_em",
    "gfn_flow_matching",
    "kinetic_energy",
    "learned_energy_decomposition",
    "log_partition_variance",
    "modified_detailed_balance",
    "outcome_conditioned",
    "outcome_marginalization",
    "path_gradient",
    "process_supervision",
    "score_matching",
    "soft_bellman",
    "step_nll",
    "sub_trajectory_balance",
    "trajectory_balance",
    "transfer",
]

explain_unknown(__name__)
