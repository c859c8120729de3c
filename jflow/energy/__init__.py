"""Energies: a log-density without its constant -> samples, densities and evidence.

`Target` is an unnormalized density as a value; whatever takes one reads its fields alone.
"""

from jflow._core.names import explain_unknown
from jflow.energy._target import Target

__all__ = ["Target"]

explain_unknown(__name__)
