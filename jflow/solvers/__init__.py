"""Solvers: samples and log-densities along a velocity, by diffrax."""

from jflow.solvers._integrate import SolveInfo, Status
from jflow.solvers.likelihood import log_prob, sample_with_log_det
from jflow.solvers.sample import sample

__all__ = ["SolveInfo", "Status", "log_prob", "sample", "sample_with_log_det"]
