"""Metrics: arrays in, scalars out."""

from jflow._core.names import explain_unknown
from jflow.metrics._calibration import (
    expected_coverage,
    sbc_ranks,
    tarp_ranks,
    uniformity_test,
)
from jflow.metrics._classifier import c2st
from jflow.metrics._evaluations import quality_by_evaluations
from jflow.metrics._forecasts import crps
from jflow.metrics._frechet import Moments, frechet_between, frechet_distance, moments
from jflow.metrics._likelihood import bits_per_dim, gaussian_log_prob, log_mean_exp
from jflow.metrics._straightness import straightness, transport_cost, truncation_error
from jflow.metrics._tables import (
    ClassifierTest,
    associations,
    classifier_test,
    column_distances,
    nearest_gower_distances,
)
from jflow.metrics._tails import tail_index
from jflow.metrics._two_sample import (
    energy_distance,
    nearest_distance,
    permutation_test,
    wasserstein,
)

__all__ = [
    "ClassifierTest",
    "Moments",
    "associations",
    "bits_per_dim",
    "c2st",
    "classifier_test",
    "column_distances",
    "crps",
    "energy_distance",
    "expected_coverage",
    "frechet_between",
    "frechet_distance",
    "gaussian_log_prob",
    "log_mean_exp",
    "moments",
    "nearest_distance",
    "nearest_gower_distances",
    "permutation_test",
    "quality_by_evaluations",
    "sbc_ranks",
    "straightness",
    "tail_index",
    "tarp_ranks",
    "transport_cost",
    "truncation_error",
    "uniformity_test",
    "wasserstein",
]

explain_unknown(__name__)
