"""Steering: a trained velocity and a wish -> samples.

Nothing here trains the velocity; tuning by a reward is in `jflow.losses`.
"""

from jflow._core.names import explain_unknown

__all__: list[str] = []

explain_unknown(__name__)
