"""Few-step generation: flows made straight (reflow, c-rectified, by segments) and distilled."""

from jflow.fewstep.c_rectified import (
    Cost,
    c_rectified,
    inner_potential,
    potential_velocity,
    power_cost,
    quadratic_cost,
)
from jflow.fewstep.distill import distillation, fixed_times
from jflow.fewstep.flow_maps import (
    as_velocity,
    by_evaluations,
    carry,
    finite_difference,
    grown,
    sample,
    to_data,
    total_derivative,
)
from jflow.fewstep.reflow import Source, generate_pairs, normal_source, rows_source
from jflow.fewstep.sequential import generate_trajectories, sequential_path, sequential_times
from jflow.fewstep.shards import read_shards, write_shards

__all__ = [
    "Cost",
    "Source",
    "as_velocity",
    "by_evaluations",
    "c_rectified",
    "carry",
    "distillation",
    "finite_difference",
    "fixed_times",
    "generate_pairs",
    "generate_trajectories",
    "grown",
    "inner_potential",
    "normal_source",
    "potential_velocity",
    "power_cost",
    "quadratic_cost",
    "read_shards",
    "rows_source",
    "sample",
    "sequential_path",
    "sequential_times",
    "to_data",
    "total_derivative",
    "write_shards",
]
