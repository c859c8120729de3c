"""Solvers: samples and log-densities along a velocity, by diffrax."""

from jflow.solvers import grids, noises
from jflow.solvers._integrate import SolveInfo, Status
from jflow.solvers.divergence import Divergence, exact_divergence, hutch_plus_plus, hutchinson
from jflow.solvers.exponential import ddim, dpm_solver_2, dpm_solver_pp_2s, halfway, halfway_in_log_snr
from jflow.solvers.hierarchical import Outer, sample_hierarchy
from jflow.solvers.likelihood import log_prob, sample_with_log_det
from jflow.solvers.mixture import gm_ode, gm_sde
from jflow.solvers.multistep import adams_bashforth, dpm_solver_pp, fireflow, pseudo_corrector, unipc
from jflow.solvers.sample import sample
from jflow.solvers.stochastic import (
    Trajectory,
    ancestral,
    euler_maruyama,
    overshoot,
    replay,
    step_log_prob,
    walk,
)

__all__ = [
    "Divergence",
    "Outer",
    "SolveInfo",
    "Status",
    "Trajectory",
    "adams_bashforth",
    "ancestral",
    "ddim",
    "dpm_solver_2",
    "dpm_solver_pp",
    "dpm_solver_pp_2s",
    "euler_maruyama",
    "exact_divergence",
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
    "replay",
    "sample",
    "sample_hierarchy",
    "sample_with_log_det",
    "step_log_prob",
    "unipc",
    "walk",
]
