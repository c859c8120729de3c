"""Paths from source to data: where x_t is, and what a velocity regresses on there.

A `Path` has two functions, point and target, of a source row, a data row and a time.
`affine(schedule)` makes one of a `Schedule` (`paths.schedules`), `interpolant` one with noise
between its ends, `discrete(schedule)` one of tokens. The conversions translate what a network
predicts, arrays into arrays; `paths.parameterizations` and the adapters turn networks into
velocities, and `jump_rates` one of logits into rates of jumps.
"""

from jflow._core.names import explain_unknown
from jflow._core.simplex import project_simplex
from jflow._core.tokens import kappa
from jflow.paths import parameterizations, schedules
from jflow.paths._adapters import (
    from_edm,
    from_noise_time,
    from_sigma,
    from_trigonometric,
    matched_time,
    reschedule,
    to_trigonometric,
)
from jflow.paths._affine import (
    LINEAR,
    Schedule,
    affine,
    check_ends,
    coefficients,
    data_to_noise,
    data_to_score,
    data_to_velocity,
    linear,
    noise_to_data,
    noise_to_score,
    noise_to_velocity,
    score_to_data,
    score_to_noise,
    score_to_velocity,
    velocity_to_data,
    velocity_to_noise,
    velocity_to_score,
)
from jflow.paths._bayesian import (
    BayesianFlow,
    bayesian_continuous,
    bayesian_discrete,
    bayesian_discretized,
    discretized_logits,
    entropy_accuracy,
    geometric_accuracy,
    quadratic_accuracy,
)
from jflow.paths._dirichlet import (
    betainc,
    dirichlet,
    dirichlet_source,
    dirichlet_speed,
    dirichlet_velocity,
)
from jflow.paths._discrete import (
    Corrector,
    discrete,
    jump_rates,
    remasking,
    renoising,
    resampling,
    unmasking,
    without_time,
)
from jflow.paths._geodesic import geodesic
from jflow.paths._interpolants import (
    Interpolant,
    denoiser_to_score,
    draw_noise,
    interpolant,
    interpolant_score,
    interpolant_velocity,
    schroedinger_bridge,
    with_noise,
)
from jflow.paths._premetric import premetric
from jflow.paths._reflected import reflected
from jflow.paths._sequential import sequential_path
from jflow.paths._statistical import (
    StatisticalBridge,
    corner_log,
    radial_moments,
    statistical_bridge,
)

__all__ = [
    "BayesianFlow",
    "StatisticalBridge",
    "bayesian_continuous",
    "bayesian_discrete",
    "bayesian_discretized",
    "betainc",
    "corner_log",
    "dirichlet",
    "dirichlet_source",
    "dirichlet_speed",
    "dirichlet_velocity",
    "discretized_logits",
    "entropy_accuracy",
    "geometric_accuracy",
    "project_simplex",
    "quadratic_accuracy",
    "radial_moments",
    "statistical_bridge",
    "draw_noise",
    "coefficients",
    "Corrector",
    "Interpolant",
    "LINEAR",
    "Schedule",
    "affine",
    "check_ends",
    "denoiser_to_score",
    "discrete",
    "from_edm",
    "from_noise_time",
    "from_sigma",
    "from_trigonometric",
    "geodesic",
    "interpolant",
    "interpolant_score",
    "interpolant_velocity",
    "jump_rates",
    "kappa",
    "linear",
    "matched_time",
    "parameterizations",
    "premetric",
    "reflected",
    "remasking",
    "renoising",
    "resampling",
    "reschedule",
    "schedules",
    "schroedinger_bridge",
    "score_to_velocity",
    "score_to_noise",
    "score_to_data",
    "sequential_path",
    "to_trigonometric",
    "unmasking",
    "without_time",
    "velocity_to_score",
    "velocity_to_noise",
    "velocity_to_data",
    "with_noise",
    "noise_to_score",
    "noise_to_velocity",
    "noise_to_data",
    "data_to_score",
    "data_to_velocity",
    "data_to_noise",
]

explain_unknown(__name__)
