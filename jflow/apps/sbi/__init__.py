"""From a simulator to a posterior: simulation-based inference with flows.

A prior and a simulator go in, a posterior comes out, for one observation or for all of them:

    posterior = sbi.fit(key, prior, simulator, num_simulations=10_000)
    theta = posterior.sample(key, 1000, observation)

Parameters theta are vectors [n, d]; what is simulated, x [n, *event], has any shape. `calibration`
says whether the posterior can be trusted, before anything is observed.
"""

from jflow._core.names import explain_unknown
from jflow.apps.sbi._calibration import Calibration, calibration
from jflow.apps.sbi._estimators import Estimator, fmpe, npe
from jflow.apps.sbi._evidence import evidence
from jflow.apps.sbi._fit import fit, fit_simulations
from jflow.apps.sbi._pictures import pairplot, plot_calibration, to_arviz
from jflow.apps.sbi._posterior import Posterior, load, save
from jflow.apps.sbi._priors import Prior, as_prior, box_uniform
from jflow.apps.sbi._simulations import simulate

__all__ = [
    "Calibration",
    "Estimator",
    "Posterior",
    "Prior",
    "as_prior",
    "box_uniform",
    "calibration",
    "evidence",
    "fit",
    "fit_simulations",
    "fmpe",
    "load",
    "npe",
    "pairplot",
    "plot_calibration",
    "save",
    "simulate",
    "to_arviz",
]

explain_unknown(__name__)
