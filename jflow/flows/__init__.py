"""Flows: a map and a base distribution (`flow`, `cnf`), and the named recipes, a family per file."""

from jflow.cnf import cnf
from jflow.flows._stack import alternating_permutations as alternating_permutations
from jflow.flows.core import flow
from jflow.flows.coupling import neural_spline, real_nvp

__all__ = ["cnf", "flow", "neural_spline", "real_nvp"]
