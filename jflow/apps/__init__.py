"""Products built on the library: experiments, tables, the command line. Nothing in the library
imports them.

A name is imported when it is first asked for, so that the command line answers --help without JAX.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jflow.apps._experiment import Experiment, Loaded, load, load_config, read_keys, run

__all__ = ["Experiment", "Loaded", "load", "load_config", "read_keys", "run"]


def __getattr__(name: str):
    if name in __all__:
        return getattr(importlib.import_module("jflow.apps._experiment"), name)
    if name.startswith("_") or importlib.util.find_spec(f"jflow.apps.{name}") is None:
        from jflow._core.names import unknown

        raise unknown(__name__, name)
    return importlib.import_module(f"jflow.apps.{name}")
