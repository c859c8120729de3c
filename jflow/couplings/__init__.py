"""Which row of the source goes with which row of the data, as indices, so that labels, conditions and weights follow.

A `Coupling` is (key, x0, x1, cond=None) -> (i, j): pair k is x0[i[k]] with x1[j[k]]. Most are permutations of one side and
take a cost: `exact(within_class())` is optimal transport inside each class. Couplings that build the source from the
data are in `sources`: they act on the batch, not on its order.
"""

from jflow.couplings._costs import cosine, near_condition, squared_euclidean, within_class
from jflow.couplings._entropic import likeliest, permutation, sinkhorn, unbalanced, with_replacement
from jflow.couplings._matching import exact, independent, partial, stable
from jflow.couplings._plans import potentials
from jflow.couplings._semidiscrete import fit_semidiscrete, semidiscrete
from jflow.couplings._sources import block_means, corrupted, inpainting, known_fixed, tiles, with_source

__all__ = [
    "block_means",
    "corrupted",
    "cosine",
    "exact",
    "fit_semidiscrete",
    "independent",
    "inpainting",
    "known_fixed",
    "likeliest",
    "near_condition",
    "partial",
    "permutation",
    "potentials",
    "semidiscrete",
    "sinkhorn",
    "squared_euclidean",
    "stable",
    "tiles",
    "unbalanced",
    "with_replacement",
    "with_source",
    "within_class",
]
