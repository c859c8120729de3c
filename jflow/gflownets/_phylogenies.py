"""Phylogenetic trees, built by joining two trees after another."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jflow.gflownets._types import Environment

__all__ = ["phylogenies"]


def phylogenies(
    alignment: Sequence[str], *, temperature: float = 1.0, offset: float = 0.0
) -> Environment:
    """Rooted binary trees over aligned sequences, those of fewer mutations more likely.

        log R(x) = (offset - parsimony of x) / temperature

    The parsimony is the least number of mutations along the tree (Fitch). An action joins two of
    the trees that there are; a backward action takes the root of one of them away. A node is named
    after the larger of the smallest leaves of its two children, so that each of 1 ... m - 1 is the
    name of one node of a finished tree: a state is the leaves below each node, [n, m, m] bool,
    empty rows where there is no node yet. The reward of a part is that of its trees together, which
    `losses.forward_looking` can use.

    Args:
        alignment: m sequences of equal length, m at least 2. A, C, G and T are known, any other
            letter is any of them.
        temperature: mutations for a nat, above 0.
        offset: C of the paper, mutations, which keeps rewards near 1.

    Returns:
        Environment: with 1 x 3 x 5 x ... x (2 m - 3) objects, and observations [n, m, m].

    Raises:
        ValueError: the sequences differ in length, are fewer than 2 or empty, or the temperature is
            not above 0.

    Examples:
        >>> from jflow import gflownets
        >>> trees = gflownets.phylogenies(["AAC", "AAG", "TTG"])
        >>> states = gflownets.enumerate_states(trees)
        >>> len(states.terminal), states.log_reward.tolist()
        (3, [-3.0, -3.0, -3.0])

    References:
        Zhou, Yan, Layne, Malkin, Zhang, Jain, Blanchette, Bengio, *PhyloGFN: Phylogenetic Inference
            with Generative Flow Networks*, 2023, arXiv:2310.08774. Its states keep Fitch's sets of
            the roots; the names of nodes are ours.
    """
    lengths = {len(sequence) for sequence in alignment}
    if len(alignment) < 2 or len(lengths) > 1 or 0 in lengths:
        raise ValueError(
            f"phylogenies: expected 2 or more sequences of one length, got {len(alignment)} of"
            f" lengths {sorted(lengths)}"
        )
    if not 0 < temperature < np.inf:
        raise ValueError(f"phylogenies: expected a finite temperature > 0, got {temperature}")
    m = len(alignment)
    letters = {"A": 1, "C": 2, "G": 4, "T": 8}
    known = [[letters.get(letter, 15) for letter in sequence.upper()] for sequence in alignment]
    sites, counts = np.unique(np.array(known, np.uint8), axis=1, return_counts=True)
    first, second = np.triu_indices(m, 1)
    pair = np.zeros((m, m), np.int32)
    pair[first, second] = np.arange(len(first))

    def exists(below):
        return jnp.any(below, axis=-1)

    def leaves(below, root):
        """[n, m]: the leaves of the tree whose smallest leaf is `root` [n]."""
        own = jnp.arange(m)[None] == root[:, None]
        joined = jnp.take_along_axis(below, root[:, None, None], axis=2) & below
        return own | jnp.any(joined, axis=1)

    def put(below, node, row):
        at = jnp.arange(m)[None, :, None] == node[:, None, None]
        return jnp.where(at, row[:, None], below)

    def step(below, action):
        a, b = jnp.asarray(first)[action], jnp.asarray(second)[action]
        return put(below, b, leaves(below, a) | leaves(below, b))

    def forward_mask(below):
        free = ~exists(below)
        return free[:, first] & free[:, second]

    def backward_mask(below):
        inside = jnp.all(below[:, :, None] | ~below[:, None], axis=3)  # [n, j, b]: b is within j
        larger = jnp.sum(below, axis=2)[:, :, None] > jnp.sum(below, axis=2)[:, None]
        return exists(below) & ~jnp.any(inside & larger, axis=1)

    def parsimony(below):
        """Of the trees of one state [m, m], from the smallest node to the largest."""
        size = jnp.sum(below, axis=1)

        def node(sets, b):
            inside = jnp.all(below[b][None] | ~below, axis=1) & (size < size[b])

            def child(leaf):
                sizes = jnp.where(inside & below[:, leaf], size, 0)
                largest = jnp.argmax(sizes)
                return sets[jnp.where(sizes[largest] > 0, m + largest, leaf)]

            left, right = child(jnp.argmax(below[b])), child(b)
            common = left & right
            mutations = jnp.sum(jnp.where(common == 0, counts, 0))
            sets = sets.at[m + b].set(jnp.where(common == 0, left | right, common))
            return sets, jnp.where(size[b] > 0, mutations, 0)

        sets = jnp.concatenate([jnp.asarray(sites), jnp.zeros_like(jnp.asarray(sites))])
        return jnp.sum(jax.lax.scan(node, sets, jnp.argsort(size))[1])

    def log_reward(below):
        mutations = jax.vmap(parsimony)(below).astype(jnp.float32)
        return (offset - mutations) / temperature

    return Environment(
        num_actions=len(first),
        num_backward_actions=m,
        horizon=m - 1,
        reset=lambda n: jnp.zeros((n, m, m), jnp.bool_),
        step=step,
        back=lambda below, node: put(below, node, jnp.zeros_like(below[:, 0])),
        forward_mask=forward_mask,
        backward_mask=backward_mask,
        forward_action=lambda below, node: jnp.asarray(pair)[
            jnp.argmax(jnp.take_along_axis(below, node[:, None, None], axis=1)[:, 0], axis=1), node
        ],
        backward_action=lambda below, action: jnp.asarray(second, jnp.int32)[action],
        observe=lambda below: below.astype(jnp.float32),
        log_reward=log_reward,
    )
