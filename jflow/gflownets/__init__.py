"""GFlowNets: environments, policies and jitted rollouts, whose objectives are in `jflow.losses`.

A policy is trained to build objects step by step, so that an object is drawn in proportion to its
reward.
"""

from jflow._core.names import explain_unknown

__all__: list[str] = []

explain_unknown(__name__)
