"""Training: a pure step, a loop around it, and checkpoints."""

from jflow._core.names import explain_unknown
from jflow._core.processes import initialize
from jflow.train import checkpoint, ema, schedules
from jflow.train._adamp import adamp
from jflow.train._gather import gather_params
from jflow.train._gradnorm import GradNorm, gradnorm
from jflow.train._interruptions import NonFiniteError
from jflow.train._loop import Best, Fit, fit
from jflow.train._pipeline import pipelined, stages
from jflow.train._rules import Rule, bytes_per_device, fsdp, init_sharded, shard, shardings
from jflow.train._sharding import data_mesh, data_sharding, make_mesh, replicated, stack_for_pmap
from jflow.train._soups import Soup, greedy_soup, uniform_soup
from jflow.train._state import TrainState, init_state, warm_start
from jflow.train._step import Refresh, make_step
from jflow.train._step_law import StepLaw, step_law

__all__ = [
    "Refresh",
    "Rule",
    "Best",
    "Fit",
    "GradNorm",
    "NonFiniteError",
    "Soup",
    "StepLaw",
    "TrainState",
    "adamp",
    "bytes_per_device",
    "checkpoint",
    "data_mesh",
    "data_sharding",
    "ema",
    "fit",
    "fsdp",
    "gather_params",
    "gradnorm",
    "greedy_soup",
    "warm_start",
    "init_sharded",
    "init_state",
    "initialize",
    "make_mesh",
    "make_step",
    "pipelined",
    "replicated",
    "schedules",
    "shard",
    "shardings",
    "stages",
    "stack_for_pmap",
    "step_law",
    "uniform_soup",
]

explain_unknown(__name__)
