"""Solvers: samples and log-densities along a velocity, by diffrax."""

from jflow.solvers import grids, noises
from jflow.solvers._acceleration import Launch, sample_acceleration
from jflow.solvers._bespoke import bespoke_bound, bespoke_error, bespoke_params, bespoke_sample
from jflow.solvers._boss import bellman, step_costs
from jflow.solvers._divergence import Divergence, exact_divergence, hutch_plus_plus, hutchinson
from jflow.solvers._exponential import ddim, dpm_solver_2, dpm_solver_pp_2s, halfway, halfway_in_log_snr
from jflow.solvers._flow_maps import (
    JVP,
    as_velocity,
    carry,
    expanded_time,
    finite_difference,
    sample_flow_map,
    to_data,
    total_derivative,
)
from jflow.solvers._hierarchical import Outer, sample_hierarchy
from jflow.solvers._integrate import SolveInfo, Status
from jflow.solvers._likelihood import log_prob, sample_with_log_det
from jflow.solvers._mixture import gm_ode, gm_sde
from jflow.solvers._multistep import adams_bashforth, dpm_solver_pp, fireflow, pseudo_corrector, unipc
from jflow.solvers._refiner import refined_sample, refines
from jflow.solvers._sample import sample
from jflow.solvers._stochastic import Trajectory, ancestral, euler_maruyama, overshoot, replay, step_log_prob, walk
from jflow.solvers._tunable import restore
from jflow.solvers._variational import sample_variational

__all__ = [
    "JVP",
    "Divergence",
    "Launch",
    "Outer",
    "SolveInfo",
    "Status",
    "Trajectory",
    "adams_bashforth",
    "ancestral",
    "as_velocity",
    "bellman",
    "bespoke_bound",
    "bespoke_error",
    "bespoke_params",
    "bespoke_sample",
    "carry",
    "ddim",
    "dpm_solver_2",
    "dpm_solver_pp",
    "dpm_solver_pp_2s",
    "euler_maruyama",
    "exact_divergence",
    "expanded_time",
    "finite_difference",
    "fireflow",
    "gm_ode",
    "gm_sde",
    "grids",
    "halfway",
    "halfway_in_log_snr",
    "hutch_plus_plus",
    "hutchinson",
    "log_prob",
    "noises",
    "overshoot",
    "pseudo_corrector",
    "refined_sample",
    "refines",
    "replay",
    "restore",
    "sample",
    "sample_acceleration",
    "sample_flow_map",
    "sample_hierarchy",
    "sample_variational",
    "sample_with_log_det",
    "step_costs",
    "step_log_prob",
    "to_data",
    "total_derivative",
    "unipc",
    "walk",
]
