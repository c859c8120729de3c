"""Published weights in, params out."""

from jflow._core.names import explain_unknown
from jflow.convert._inception import inception

__all__ = [
    "inception",
]

explain_unknown(__name__)
