"""Training: a pure step, a loop around it, and checkpoints."""

from jflow.train import checkpoint, ema
from jflow.train.experiment import Experiment, Loaded, load, load_config, run
from jflow.train.gather import gathered
from jflow.train.loop import Best, Fit, fit
from jflow.train.processes import initialize
from jflow.train.rules import bytes_per_device, fsdp, init_sharded, shard, shardings
from jflow.train.sharding import data_mesh, data_sharding, make_mesh, replicated, stack_for_pmap
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
    "bytes_per_device",
    "checkpoint",
    "data_mesh",
    "data_sharding",
    "ema",
    "fit",
    "fsdp",
    "gathered",
    "init_sharded",
    "init_state",
    "initialize",
    "load",
    "load_config",
    "make_mesh",
    "make_step",
    "replicated",
    "run",
    "shard",
    "shardings",
    "stack_for_pmap",
]
