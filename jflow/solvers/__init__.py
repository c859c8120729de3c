"""Solvers: samples and log-densities along a velocity.

`sample` and `log_prob` solve the ODE by diffrax; a `Method` (`fixed`, `on_grid`, `adaptive`) says
how, with any diffrax solver or those made here for affine paths (`ddim`, `dpm_solver_pp`, `unipc`,
...). `sample_sde` takes stochastic steps over a grid, jumps of tokens (`jump`, `euler_jump`, ...)
among them, whose likelihood `discrete_bound` bounds. `reflected` and `reflected_step` keep samples
inside a domain. `sample_flow_map` and its relatives sample few-step models. `solvers.grids` has the
usual grids of times, `solvers.noises` the usual amounts of noise.
"""

from jflow._core.names import explain_unknown
from jflow.solvers import grids, noises
from jflow.solvers._acceleration import AccelerationCondition, sample_acceleration
from jflow.solvers._bayesian import bayesian_update, sample_bayesian
from jflow.solvers._bespoke import bespoke_bound, bespoke_error, bespoke_params, bespoke_sample
from jflow.solvers._boss import bellman, step_costs
from jflow.solvers._controlled import control_log_ratio, diffusion_sampler, sample_controlled
from jflow.solvers._discrete_bound import DiscreteBound, discrete_bound
from jflow.solvers._divergence import (
    Divergence,
    check_divergence,
    exact_divergence,
    hutch_plus_plus,
    hutchinson,
)
from jflow.solvers._exponential import (
    ddim,
    dpm_solver_2,
    dpm_solver_pp_2s,
    midpoint_in_log_snr,
    midpoint_time,
)
from jflow.solvers._flow_maps import (
    JVP,
    apply_flow_map,
    consistency_map,
    expanded_time,
    finite_difference,
    instantaneous_velocity,
    sample_flow_map,
    total_derivative,
)
from jflow.solvers._hierarchical import HierarchyCondition, sample_hierarchy
from jflow.solvers._injected import noise_injection
from jflow.solvers._integrate import SolveInfo, Status
from jflow.solvers._jumps import (
    adaptive_jump,
    confident_jump,
    ending,
    euler_jump,
    exponential_jump,
    jump,
)
from jflow.solvers._likelihood import log_prob, log_prob_with_energies, sample_with_log_det
from jflow.solvers._manifolds import (
    geodesic_euler,
    geodesic_midpoint,
    geodesic_rk4,
    projected,
    riemannian_divergence,
)
from jflow.solvers._method import Method, adaptive, as_method, fixed, on_grid, reverse
from jflow.solvers._mixture import gm_ode, gm_sde
from jflow.solvers._multistep import (
    adams_bashforth,
    dpm_solver_pp,
    fireflow,
    pseudo_corrector,
    unipc,
)
from jflow.solvers._refiner import refiner, sample_refined
from jflow.solvers._reflected import reflected, reflected_step
from jflow.solvers._sample import sample
from jflow.solvers._statistical import bridge_step
from jflow.solvers._stochastic import (
    Trajectory,
    ancestral,
    euler_maruyama,
    overshoot,
    sample_sde,
    step_log_prob,
    trajectory_log_prob,
)
from jflow.solvers._transition import (
    TransitionInfo,
    sample_kernels,
    sample_transitions,
    transition_condition,
)
from jflow.solvers._tunable import restore
from jflow.solvers._variational import sample_variational

__all__ = [
    "JVP",
    "DiscreteBound",
    "Divergence",
    "AccelerationCondition",
    "HierarchyCondition",
    "Method",
    "SolveInfo",
    "Status",
    "Trajectory",
    "TransitionInfo",
    "adams_bashforth",
    "adaptive",
    "adaptive_jump",
    "ancestral",
    "as_method",
    "control_log_ratio",
    "diffusion_sampler",
    "instantaneous_velocity",
    "bayesian_update",
    "bellman",
    "bespoke_bound",
    "bespoke_error",
    "bespoke_params",
    "bespoke_sample",
    "apply_flow_map",
    "bridge_step",
    "check_divergence",
    "confident_jump",
    "ddim",
    "discrete_bound",
    "dpm_solver_2",
    "dpm_solver_pp",
    "dpm_solver_pp_2s",
    "ending",
    "euler_jump",
    "euler_maruyama",
    "exact_divergence",
    "exponential_jump",
    "expanded_time",
    "finite_difference",
    "fireflow",
    "fixed",
    "geodesic_euler",
    "geodesic_midpoint",
    "geodesic_rk4",
    "gm_ode",
    "gm_sde",
    "grids",
    "jump",
    "midpoint_time",
    "midpoint_in_log_snr",
    "hutch_plus_plus",
    "hutchinson",
    "log_prob",
    "log_prob_with_energies",
    "noise_injection",
    "noises",
    "on_grid",
    "overshoot",
    "projected",
    "pseudo_corrector",
    "sample_controlled",
    "sample_refined",
    "refiner",
    "reflected",
    "reflected_step",
    "trajectory_log_prob",
    "restore",
    "riemannian_divergence",
    "reverse",
    "sample",
    "sample_acceleration",
    "sample_bayesian",
    "sample_flow_map",
    "sample_hierarchy",
    "sample_kernels",
    "sample_transitions",
    "sample_variational",
    "sample_with_log_det",
    "step_costs",
    "step_log_prob",
    "consistency_map",
    "total_derivative",
    "transition_condition",
    "unipc",
    "sample_sde",
]

explain_unknown(__name__)
