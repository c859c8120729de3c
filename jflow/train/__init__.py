"""Training: a pure step, a loop around it, and checkpoints."""

from jflow.train import checkpoint, ema
from jflow.train.experiment import Experiment, Loaded, load, load_config, run
from jflow.train.loop import Best, Fit, fit
from jflow.train.sharding import data_mesh, data_sharding, replicated, stack_for_pmap
from jflow.train.state import TrainState, init_state
from jflow.train.step import make_step
from jflow.train.watch import NonFiniteError

__all__ = [
    "Best",
    "Experiment",
    "Fit",
    "Loaded",
    "NonFiniteError",
    "TrainState",
    "checkpoint",
    "data_mesh",
    "data_sharding",
    "ema",
    "fit",
    "init_state",
    "load",
    "load_config",
    "make_step",
    "replicated",
    "run",
    "stack_for_pmap",
]
