"""Few-step generation: flows made straight (reflow, c-rectified, by segments) and distilled."""

from jflow.fewstep.acceleration import Launch, constant_acceleration, initial_velocity, sample_acceleration
from jflow.fewstep.adversarial import (
    Game,
    Generate,
    adversarial,
    fixed_steps,
    hinge,
    least_squares,
    non_saturating,
    on_student,
    relativistic,
    summed,
    turbo,
)
from jflow.fewstep.align import align_eulerian, align_lagrangian, interval_times
from jflow.fewstep.anchoring import anchored_consistency, expanded_time, squared_and_cosine
from jflow.fewstep.bespoke import bespoke_bound, bespoke_error, bespoke_params, bespoke_sample
from jflow.fewstep.boss import bellman, boss, step_costs
from jflow.fewstep.c_rectified import (
    Cost,
    c_rectified,
    inner_potential,
    potential_velocity,
    power_cost,
    quadratic_cost,
)
from jflow.fewstep.consistency import (
    averaged_target,
    count_steps,
    discrete_consistency,
    easy_steps,
    euler_step,
    grid_steps,
    heun_step,
    online_target,
    per_noise,
    per_time,
)
from jflow.fewstep.consistency_flow import consistency_flow_matching
from jflow.fewstep.distill import distillation, fixed_times
from jflow.fewstep.flow_maps import (
    as_velocity,
    by_evaluations,
    carry,
    finite_difference,
    grown,
    sample,
    to_data,
    total_derivative,
)
from jflow.fewstep.matching_distributions import (
    ScoreWeight,
    distribution_matching,
    kl_weight,
    per_error,
    shared_timesteps,
)
from jflow.fewstep.mean_flow import improved_mean_flow, mean_flow, rectified_times, truncate_pairs
from jflow.fewstep.perflow import perflow, piecewise, window_grid
from jflow.fewstep.rectified_diffusion import (
    end_error,
    noise_error,
    phased_rectified_diffusion,
    rectified_diffusion,
)
from jflow.fewstep.refiner import nearby, refined_sample, refines, velocity_refiner
from jflow.fewstep.reflow import Source, generate_pairs, normal_source, rows_source
from jflow.fewstep.self_corrected import self_corrected, self_correction
from jflow.fewstep.sequential import generate_trajectories, sequential_path, sequential_times
from jflow.fewstep.shards import read_shards, write_shards
from jflow.fewstep.shortcut import shortcut
from jflow.fewstep.slim import annealed_source, flow_guided_distillation
from jflow.fewstep.trajectory import trajectory_distillation
from jflow.fewstep.trigflow import clipped_tangent, normalised_tangent, trigflow_consistency
from jflow.fewstep.tunable import restore, tunable_distillation
from jflow.fewstep.variational import noise_encoder, sample_variational, variational_noise
from jflow.fewstep.velocity_distillation import marginal_transport, velocity_distillation, velocity_matching

__all__ = [
    "Cost",
    "Game",
    "Generate",
    "Launch",
    "ScoreWeight",
    "Source",
    "adversarial",
    "align_eulerian",
    "align_lagrangian",
    "anchored_consistency",
    "annealed_source",
    "as_velocity",
    "averaged_target",
    "bellman",
    "bespoke_bound",
    "bespoke_error",
    "bespoke_params",
    "bespoke_sample",
    "boss",
    "by_evaluations",
    "c_rectified",
    "carry",
    "clipped_tangent",
    "consistency_flow_matching",
    "constant_acceleration",
    "count_steps",
    "discrete_consistency",
    "distillation",
    "distribution_matching",
    "easy_steps",
    "end_error",
    "euler_step",
    "expanded_time",
    "finite_difference",
    "fixed_steps",
    "fixed_times",
    "flow_guided_distillation",
    "generate_pairs",
    "generate_trajectories",
    "grid_steps",
    "grown",
    "heun_step",
    "hinge",
    "improved_mean_flow",
    "initial_velocity",
    "inner_potential",
    "interval_times",
    "kl_weight",
    "least_squares",
    "marginal_transport",
    "mean_flow",
    "nearby",
    "noise_encoder",
    "noise_error",
    "non_saturating",
    "normal_source",
    "normalised_tangent",
    "on_student",
    "online_target",
    "per_error",
    "per_noise",
    "per_time",
    "perflow",
    "phased_rectified_diffusion",
    "piecewise",
    "potential_velocity",
    "power_cost",
    "quadratic_cost",
    "read_shards",
    "rectified_diffusion",
    "rectified_times",
    "refined_sample",
    "refines",
    "relativistic",
    "restore",
    "rows_source",
    "sample",
    "sample_acceleration",
    "sample_variational",
    "self_corrected",
    "self_correction",
    "sequential_path",
    "sequential_times",
    "shared_timesteps",
    "shortcut",
    "squared_and_cosine",
    "step_costs",
    "summed",
    "to_data",
    "total_derivative",
    "trajectory_distillation",
    "trigflow_consistency",
    "truncate_pairs",
    "tunable_distillation",
    "turbo",
    "variational_noise",
    "velocity_distillation",
    "velocity_matching",
    "velocity_refiner",
    "window_grid",
    "write_shards",
]
