"""A coupling as a step of `losses.chain`."""

from jflow._core.checks import accepts, check_batch, described, need_key
from jflow._core.pairs import paired
from jflow.types import BatchTransform, Coupling


def pair(coupling: Coupling) -> BatchTransform:
    """The batch transform that pairs the rows of a batch by a coupling, in front of any loss.

    With (i, j) = coupling(key, x0, x, cond) the batch becomes 'x0' x0[i] and 'x' x[j], and cond and
    weight follow x by j. Where the batch has no 'x0', it is drawn, standard normal in the shape and
    type of x.

        losses.chain(couplings.pair(couplings.optimal_transport()), losses.flow_matching(velocity))

    Rows of weight 0 take part as they are, except for those that hold infinity or NaN, in whose
    place the coupling sees the rows of another. In accumulate, pmap and shard_map the rows of a
    part or shard are paired among themselves.

    Args:
        coupling: (key, x0, x1, cond=None) -> (i, j).

    Returns:
        BatchTransform: (key, batch, frozen=None) -> batch. It raises a ValueError for a key of
            None, for a batch without 'x', with other keys than 'x', 'x0', 'cond' and 'weight' (they
            would no longer belong to their rows), or with conditions that were dropped already: who
            is paired with whom must not depend on that.

    Raises:
        TypeError: coupling is not a coupling.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import couplings
        >>> transform = couplings.pair(couplings.optimal_transport())
        >>> batch = {"x0": jnp.array([[0.0], [1.0], [2.0]]), "x": jnp.array([[2.5], [0.5], [1.5]])}
        >>> transform(jax.random.key(0), batch)["x0"].ravel().tolist()
        [2.0, 0.0, 1.0]
    """
    if not callable(coupling) or not accepts(coupling, 4):
        hint = ": give what a call of it returns" if callable(coupling) else ""
        raise TypeError(
            "pair: expected a Coupling, (key, x0, x1, cond=None) -> (i, j), got "
            f"{described(coupling)}{hint}"
        )

    def transform(key, batch, frozen=None):
        need_key("pair", key)
        check_batch("pair", batch)
        if batch.get("dropped") is not None:
            raise ValueError(
                "pair: conditions were dropped before rows are paired; put "
                "losses.drop_cond after pair"
            )
        return paired("pair", coupling, key, batch)

    return transform
