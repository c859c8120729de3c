"""Energies: a log-density without its constant -> samples, densities and evidence.

`Target` is an unnormalized density as a value; whatever takes one reads its fields alone. The
targets of the literature are here with what is known of them, and `posteriordb` reads posteriors
with reference draws. `annealed_importance_sampling` leads draws of something known to a target;
`annealed_draws` makes what a flow is trained on where `losses.path_gradient` would miss modes. What
their weights say: `estimate_log_z`, `effective_sample_size`.
"""

from jflow._core.names import explain_unknown
from jflow.energy._annealing import Annealed, annealed_importance_sampling, as_target
from jflow.energy._bootstrap import (
    Replay,
    add_draws,
    annealed_draws,
    draw_replay,
    empty_replay,
)
from jflow.energy._chains import (
    independence_kernel,
    pull_back,
    run_chains,
    successive_kernels,
)
from jflow.energy._evidence import Evidence, bridge_log_z, evidence, fit_normal, harmonic_log_z
from jflow.energy._kernels import Kernel, hamiltonian_kernel, metropolis_kernel
from jflow.energy._langevin_drift import langevin_drift
from jflow.energy._mix_flow import hamiltonian_mix_flow, hamiltonian_shift
from jflow.energy._posteriordb import ReferencePosterior, posteriordb
from jflow.energy._target import Target, check_target, posterior
from jflow.energy._targets import (
    banana,
    double_well,
    double_well_particles,
    forty_gaussians,
    funnel,
    lennard_jones,
    log_gaussian_cox,
    many_well,
    phi4,
)
from jflow.energy._transfer import transfer_weights
from jflow.energy._weights import effective_sample_size, estimate_log_z

__all__ = [
    "Annealed",
    "Evidence",
    "Kernel",
    "ReferencePosterior",
    "Replay",
    "Target",
    "add_draws",
    "annealed_draws",
    "annealed_importance_sampling",
    "as_target",
    "banana",
    "bridge_log_z",
    "check_target",
    "double_well",
    "double_well_particles",
    "draw_replay",
    "effective_sample_size",
    "empty_replay",
    "estimate_log_z",
    "evidence",
    "fit_normal",
    "forty_gaussians",
    "funnel",
    "hamiltonian_kernel",
    "hamiltonian_mix_flow",
    "hamiltonian_shift",
    "harmonic_log_z",
    "independence_kernel",
    "langevin_drift",
    "lennard_jones",
    "log_gaussian_cox",
    "many_well",
    "metropolis_kernel",
    "phi4",
    "posterior",
    "posteriordb",
    "pull_back",
    "run_chains",
    "successive_kernels",
    "transfer_weights",
]

explain_unknown(__name__)
