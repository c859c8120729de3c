"""Losses: (params, key, batch, frozen=None) -> (scalar, metrics)."""

from jflow.losses._acceleration import constant_acceleration, initial_velocity
from jflow.losses._adversarial import (
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
from jflow.losses._align import align_eulerian, align_lagrangian
from jflow.losses._anchoring import anchored_consistency, squared_and_cosine
from jflow.losses._augmented import drop_cond, noised
from jflow.losses._boss import boss
from jflow.losses._c_rectified import Cost, c_rectified, inner_potential, potential_velocity, power_cost, quadratic_cost
from jflow.losses._consistency import (
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
from jflow.losses._consistency_flow import consistency_flow_matching
from jflow.losses._deep_supervision import deep_supervision
from jflow.losses._diffusion_likelihood import diffusion_likelihood, learned_times
from jflow.losses._distillation import distillation
from jflow.losses._distribution_matching import (
    ScoreWeight,
    distribution_matching,
    kl_weight,
    per_error,
    shared_timesteps,
)
from jflow.losses._errors import mean_squared, perceptual_huber, pseudo_huber
from jflow.losses._hierarchical import Level, hierarchical_matching
from jflow.losses._importance import Importance, draw_times, learn_importance, likelihood_importance, likelihood_weight
from jflow.losses._interpolant import interpolant_matching
from jflow.losses._likelihood import negative_elbo, nll
from jflow.losses._matching import flow_matching, fresh_source
from jflow.losses._mean_flow import improved_mean_flow, mean_flow
from jflow.losses._mixture import mixture_matching
from jflow.losses._perflow import perflow
from jflow.losses._rectified_diffusion import end_error, noise_error, phased_rectified_diffusion, rectified_diffusion
from jflow.losses._refiner import velocity_refiner
from jflow.losses._regularised import regularised_nll
from jflow.losses._self_corrected import self_corrected, self_correction
from jflow.losses._shortcut import shortcut
from jflow.losses._slim import annealed_source, flow_guided_distillation
from jflow.losses._trajectory import trajectory_distillation
from jflow.losses._trigflow import clipped_tangent, normalised_tangent, trigflow_consistency
from jflow.losses._tunable import tunable_distillation
from jflow.losses._variational import reverse_kl
from jflow.losses._variational_noise import noise_encoder, variational_noise
from jflow.losses._velocity_distillation import marginal_transport, velocity_distillation, velocity_matching

__all__ = [
    "Cost",
    "Game",
    "Generate",
    "Importance",
    "Level",
    "ScoreWeight",
    "adversarial",
    "align_eulerian",
    "align_lagrangian",
    "anchored_consistency",
    "annealed_source",
    "averaged_target",
    "boss",
    "c_rectified",
    "clipped_tangent",
    "consistency_flow_matching",
    "constant_acceleration",
    "count_steps",
    "deep_supervision",
    "diffusion_likelihood",
    "discrete_consistency",
    "distillation",
    "distribution_matching",
    "draw_times",
    "drop_cond",
    "easy_steps",
    "end_error",
    "euler_step",
    "fixed_steps",
    "flow_guided_distillation",
    "flow_matching",
    "fresh_source",
    "grid_steps",
    "heun_step",
    "hierarchical_matching",
    "hinge",
    "improved_mean_flow",
    "initial_velocity",
    "inner_potential",
    "interpolant_matching",
    "kl_weight",
    "learn_importance",
    "learned_times",
    "least_squares",
    "likelihood_importance",
    "likelihood_weight",
    "marginal_transport",
    "mean_flow",
    "mean_squared",
    "mixture_matching",
    "negative_elbo",
    "nll",
    "noise_encoder",
    "noise_error",
    "noised",
    "non_saturating",
    "normalised_tangent",
    "on_student",
    "online_target",
    "per_error",
    "per_noise",
    "per_time",
    "perceptual_huber",
    "perflow",
    "phased_rectified_diffusion",
    "potential_velocity",
    "power_cost",
    "pseudo_huber",
    "quadratic_cost",
    "rectified_diffusion",
    "regularised_nll",
    "relativistic",
    "reverse_kl",
    "self_corrected",
    "self_correction",
    "shared_timesteps",
    "shortcut",
    "squared_and_cosine",
    "summed",
    "trajectory_distillation",
    "trigflow_consistency",
    "tunable_distillation",
    "turbo",
    "variational_noise",
    "velocity_distillation",
    "velocity_matching",
    "velocity_refiner",
]
