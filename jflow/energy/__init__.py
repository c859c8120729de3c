"""Energies: a log-density without its constant -> samples, densities and evidence.

`Target` is an unnormalized density as a value; whatever takes one reads its fields alone.
"""

from jflow._core.names import explain_unknown
from jflow.energy._target import Target, check_target, posterior
from jflow.energy._weights import effective_sample_size, estimate_log_z

__all__ = [
    "Target",
    "check_target",
    "effective_sample_size",
    "estimate_log_z",
    "posterior",
]

explain_unknown(__name__)
