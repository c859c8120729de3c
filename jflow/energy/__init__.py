"""Energies: a log-density without its constant -> samples, densities and evidence.

`Target` is an unnormalized density as a value; whatever takes one reads its fields alone.
"""

from jflow._core.names import explain_unknown
from jflow.energy._mix_flow import hamiltonian_mix_flow, hamiltonian_shift
from jflow.energy._target import Target

__all__ = ["Target", "hamiltonian_mix_flow", "hamiltonian_shift"]

explain_unknown(__name__)
