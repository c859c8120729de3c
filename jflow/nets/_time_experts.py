"""Networks that take turns along time."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import expand_to
from jflow._core.linen import check_linen
from jflow.types import Array, Cond

__all__ = ["TimeExperts"]


class TimeExperts(nn.Module):
    """Networks of which each serves an interval of time.

    `module(x, t, cond=None) = experts[k](x, t, cond)` for edges[k - 1] <= t < edges[k].

    An expert is a whole velocity network, or a group of layers between the first and the last ones
    of a larger module, which all times share. Where all rows are at one time, as in sampling, one
    expert is computed; in training, whose rows are at different times, all of them are, and each
    row takes its own.

    Also known as: timestep experts, layerwise timestep experts.

    Attributes:
        experts: the networks, module(x, t) or module(x, t, cond), with outputs of one shape.
        edges: the times between them, in (0, 1), rising: one fewer than there are experts.

    Raises:
        TypeError: an expert is not a Linen module.
        ValueError: the edges do not rise in (0, 1), or are not one fewer than the experts.

    Examples:
        >>> import jax.numpy as jnp
        >>> import jflow
        >>> from jflow import nets
        >>> net = nets.TimeExperts([nets.TimeMLP((8,)), nets.TimeMLP((8,))], [0.5])
        >>> velocity = jflow.velocity(net)

    References:
        Shen, Xu, Chen, et al., *LaTtE-Flow: Layerwise Timestep-Expert Flow-based Transformer*,
            2025, arXiv:2506.06952. Attention between the groups of layers is not here.
    """

    experts: Sequence[nn.Module]
    edges: Sequence[float]

    def __post_init__(self):
        for i, expert in enumerate(self.experts):
            check_linen("TimeExperts", f"experts[{i}]", expert)
        inner = np.asarray(self.edges, np.float64)
        steps = np.diff(np.concatenate([[0.0], inner, [1.0]]))
        if len(inner) != len(self.experts) - 1 or not np.all(steps > 0):
            raise ValueError(
                f"TimeExperts: expected {len(self.experts) - 1} edges that rise in (0, 1), one"
                f" fewer than there are experts, got {list(self.edges)}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array:
        """What the experts of the times say.

        Args:
            x: the points, [b, *event].
            t: the times, [b].
            cond: as the experts take it.

        Returns:
            The output of the experts, leading with b.
        """
        args = (x, t) if cond is None else (x, t, cond)
        at = jnp.sum(t[:, None] >= jnp.asarray(self.edges, t.dtype)[None], axis=1)

        def every(module):
            outs = [expert(*args) for expert in module.experts]
            return jax.tree.map(
                lambda *leaves: sum(
                    jnp.where(expand_to(at == k, leaf), leaf, jnp.zeros_like(leaf))
                    for k, leaf in enumerate(leaves)
                ),
                *outs,
            )

        if self.is_initializing():
            return every(self)
        branches = [lambda module, k=k: module.experts[k](*args) for k in range(len(self.experts))]
        which = jnp.where(jnp.all(at == at[:1]), at[:1].sum(), len(self.experts))
        return nn.switch(which, [*branches, every], self)
