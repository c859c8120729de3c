"""Flows: a map and a base distribution (`flow`, `cnf`), and the named recipes.

A recipe is a function of the shape of one event that returns a `Flow`: `real_nvp`, `maf`, `glow`,
`tarflow` ... `elbo_flow` is what `flow` is to a bijector for maps that are stochastic or lose
information.
"""

from jflow._core.names import explain_unknown
from jflow.flows._any_order import AnyOrder, MixedRows, Within, any_order
from jflow.flows._autoregressive import bnaf, iaf, maf, neural_spline_autoregressive
from jflow.flows._cascade import haar_cascade
from jflow.flows._cnf import cnf
from jflow.flows._coupling import kernelized, nanoflow, neural_spline, nice, real_nvp
from jflow.flows._dequantized import with_dequantization
from jflow.flows._flow import elbo_flow, flow, importance_weighted
from jflow.flows._heavy_tailed import heavy_tailed, tail_adaptive
from jflow.flows._images import dequantization_noise, flow_plus_plus, glow, inverse_flow
from jflow.flows._injective import InjectiveFlow, injective
from jflow.flows._lagrangian import lagrangian_velocity
from jflow.flows._mix_flow import MixFlow, mix_flow
from jflow.flows._paths import path_sampler
from jflow.flows._residual import planar, radial, residual_flow, sylvester
from jflow.flows._rigid import rigid_body, rotations
from jflow.flows._soft_policy import SoftPolicy, soft_policy
from jflow.flows._stack import alternating_permutations
from jflow.flows._step_chain import StepChain, StepTrace, step_chain, updated_log_prob
from jflow.flows._transformed import transformed
from jflow.flows._transformers import jet, jetformer, starflow, tarflow

__all__ = [
    "AnyOrder",
    "MixFlow",
    "InjectiveFlow",
    "MixedRows",
    "SoftPolicy",
    "StepChain",
    "StepTrace",
    "Within",
    "any_order",
    "alternating_permutations",
    "bnaf",
    "cnf",
    "dequantization_noise",
    "with_dequantization",
    "elbo_flow",
    "flow",
    "flow_plus_plus",
    "glow",
    "haar_cascade",
    "heavy_tailed",
    "iaf",
    "importance_weighted",
    "injective",
    "inverse_flow",
    "jet",
    "jetformer",
    "kernelized",
    "lagrangian_velocity",
    "maf",
    "mix_flow",
    "nanoflow",
    "neural_spline",
    "neural_spline_autoregressive",
    "nice",
    "path_sampler",
    "planar",
    "radial",
    "real_nvp",
    "residual_flow",
    "rigid_body",
    "rotations",
    "soft_policy",
    "starflow",
    "step_chain",
    "sylvester",
    "tail_adaptive",
    "tarflow",
    "transformed",
    "updated_log_prob",
]

explain_unknown(__name__)
