"""Guidance: combinators from velocity to velocity."""

from jflow.guidance.cfg import cfg

__all__ = ["cfg"]
