"""Published weights in, params out; flows as the distributions of other libraries."""

from jflow.convert._inception import inception
from jflow.convert._numpyro import to_numpyro

__all__ = [
    "inception",
    "to_numpyro",
]
