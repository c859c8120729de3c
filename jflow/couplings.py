"""Which row of the source goes with which row of the data, as indices, so that labels, conditions and weights follow.

A `Coupling` is (key, x0, x1, cond=None) -> (i, j): pair k is x0[i[k]] with x1[j[k]]. Optimal transport and
data-dependent pairings are further functions of this file that return one.
"""

import numpy as np

from jflow.types import Coupling

__all__ = ["independent"]


def independent() -> Coupling:
    """Row k with row k: the source was drawn independently, or came paired in the batch.

    The indices are numpy arrays, known while tracing, so that a loss can leave the rows where they are: a gather
    would move rows between the devices of a mesh.
    """

    def pair(key, x0, x1, cond=None):
        rows = np.arange(x1.shape[0])
        return rows, rows

    return pair
