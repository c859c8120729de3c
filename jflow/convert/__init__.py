"""Published weights in, params out; flows as the distributions of other libraries."""

from jflow._core.names import explain_unknown
from jflow.convert._inception import inception
from jflow.convert._numpyro import to_numpyro

__all__ = [
    "inception",
    "to_numpyro",
]

explain_unknown(__name__)
