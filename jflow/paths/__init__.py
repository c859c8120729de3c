"""Paths from source to data: where x_t is, and what a velocity regresses on there."""

from jflow.paths.affine import (
    LINEAR,
    Schedule,
    affine,
    linear,
    score_to_velocity,
    score_to_x0,
    score_to_x1,
    velocity_to_score,
    velocity_to_x0,
    velocity_to_x1,
    x0_to_score,
    x0_to_velocity,
    x0_to_x1,
    x1_to_score,
    x1_to_velocity,
    x1_to_x0,
)

__all__ = [
    "LINEAR",
    "Schedule",
    "affine",
    "linear",
    "score_to_velocity",
    "score_to_x0",
    "score_to_x1",
    "velocity_to_score",
    "velocity_to_x0",
    "velocity_to_x1",
    "x0_to_score",
    "x0_to_velocity",
    "x0_to_x1",
    "x1_to_score",
    "x1_to_velocity",
    "x1_to_x0",
]
