"""Couplings: which row of the source goes with which row of the data.

A `Coupling` is a function (key, x0, x1, cond=None) -> (i, j) of row indices: pair k is x0[i[k]]
with x1[j[k]], so that labels, conditions and weights follow their rows. Most couplings are
permutations of one side and take a cost: `optimal_transport(within_class())` is optimal transport
inside each class.

`losses.chain` puts couplings in front of a loss: `pair(coupling)` is a coupling as a
`BatchTransform`, and `with_source(source)` makes the source from the data.
"""

from jflow._core.names import explain_unknown
from jflow.couplings._costs import cosine, near_condition, squared_euclidean, within_class
from jflow.couplings._entropic import (
    most_likely_permutation,
    sample_permutation,
    sample_with_replacement,
    sinkhorn,
    unbalanced,
)
from jflow.couplings._matching import (
    independent,
    optimal_transport,
    partial_optimal_transport,
    stable_matching,
)
from jflow.couplings._pair import pair
from jflow.couplings._plans import entropic_potentials
from jflow.couplings._semidiscrete import fit_semidiscrete, semidiscrete
from jflow.couplings._sources import (
    block_means,
    corrupted,
    drawn_from,
    hold_known,
    inpainting,
    tiles,
    with_source,
)

__all__ = [
    "block_means",
    "corrupted",
    "cosine",
    "drawn_from",
    "optimal_transport",
    "fit_semidiscrete",
    "independent",
    "inpainting",
    "hold_known",
    "most_likely_permutation",
    "near_condition",
    "pair",
    "partial_optimal_transport",
    "sample_permutation",
    "entropic_potentials",
    "semidiscrete",
    "sinkhorn",
    "squared_euclidean",
    "stable_matching",
    "tiles",
    "unbalanced",
    "sample_with_replacement",
    "with_source",
    "within_class",
]

explain_unknown(__name__)
