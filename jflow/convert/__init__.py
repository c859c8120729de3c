"""Published weights in, params out."""

from jflow.convert._inception import inception

__all__ = [
    "inception",
]
