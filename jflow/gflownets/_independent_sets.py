"""Maximal independent sets of a graph."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jflow.gflownets._types import Environment

__all__ = ["independent_sets"]


def independent_sets(adjacency: ArrayLike, *, temperature: float = 1.0) -> Environment:
    """The maximal independent sets of a graph, larger ones more likely: R(S) = exp(|S| / T).

    A state is the set [n, V] bool; action v adds the vertex v, which may be added where it is
    neither in the set nor next to it, and backward action v takes it away. A set to which nothing
    can be added is finished.

    Args:
        adjacency: [V, V], symmetric, of 0 and 1 or truth values, with an empty diagonal.
        temperature: T of the reward, above 0.

    Returns:
        Environment: with observations [n, V, 2], whether a vertex is in the set and whether it may
            be added.

    Raises:
        ValueError: the matrix is not one of a graph without loops, or the temperature is not above
            0.

    Examples:
        >>> import numpy as np
        >>> from jflow import gflownets
        >>> path = gflownets.independent_sets(np.eye(3, k=1) + np.eye(3, k=-1))  # 0 - 1 - 2
        >>> gflownets.enumerate_states(path).terminals.tolist()
        [[False, True, False], [True, False, True]]

    References:
        Zhang, Dai, Malkin, Courville, Bengio, Pan, *Let the Flows Tell: Solving Graph Combinatorial
            Optimization Problems with GFlowNets*, 2023, arXiv:2305.17010.
    """
    matrix = np.asarray(adjacency)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"independent_sets: expected adjacency of shape [V, V], got {list(matrix.shape)}"
        )
    if not np.isin(matrix, (0, 1)).all() or (matrix != matrix.T).any() or matrix.diagonal().any():
        raise ValueError(
            "independent_sets: expected a symmetric adjacency of 0 and 1 with an empty diagonal"
        )
    if not 0 < temperature < np.inf:
        raise ValueError(f"independent_sets: expected a finite temperature > 0, got {temperature}")
    vertices, edges = matrix.shape[0], matrix.astype(np.float32)

    def free(chosen):
        beside = jnp.dot(chosen.astype(jnp.float32), edges) > 0
        return ~chosen & ~beside

    def put(chosen, vertex, value):
        return jnp.where(jnp.arange(vertices)[None] == vertex[:, None], value, chosen)

    return Environment(
        num_actions=vertices,
        num_backward_actions=vertices,
        horizon=vertices,
        reset=lambda n: jnp.zeros((n, vertices), jnp.bool_),
        step=lambda chosen, vertex: put(chosen, vertex, True),
        back=lambda chosen, vertex: put(chosen, vertex, False),
        forward_mask=free,
        backward_mask=lambda chosen: chosen,
        forward_action=lambda chosen, vertex: vertex,
        backward_action=lambda chosen, vertex: vertex,
        observe=lambda chosen: jnp.stack([chosen, free(chosen)], axis=-1).astype(jnp.float32),
        log_reward=lambda chosen: jnp.sum(chosen, axis=1).astype(jnp.float32) / temperature,
    )
