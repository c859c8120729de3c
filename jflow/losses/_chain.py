"""What happens to a batch before a loss sees it, as a chain of batch transforms."""

from collections.abc import Callable

from jflow._core.checks import accepts, check_batch, described, signature
from jflow._core.keys import split_key
from jflow.types import BatchTransform, Loss

__all__ = ["chain"]

_FORMS = {
    "BatchTransform": "(key, batch, frozen=None) -> batch",
    "Loss": "(params, key, batch, frozen=None) -> (scalar, metrics)",
}


def chain(*parts: BatchTransform | Loss) -> Loss:
    """The loss of a batch that goes through batch transforms first, in the order given.

        losses.chain(
            couplings.pair(couplings.optimal_transport()),      # which noise goes with which row
            losses.drop_cond(0.1, null=10),                     # train for guidance
            losses.flow_matching(velocity),
        )

    The key is split, one for each transform and one for the loss; frozen is given to all of them,
    params to the loss alone. A transform sees the batch that the loss would: with accumulate, and
    under pmap and shard_map, one part or shard of it (a coupling pairs rows within the part), under
    jit on a mesh the whole batch. What has params of its own is a loss around a loss
    (`losses.variational_noise`), and a chain may be inside or around it.

    Args:
        *parts: The transforms, in the order in which they see the batch, and last the `Loss`.
            Transforms are `couplings.pair`, `couplings.with_source`, `losses.drop_cond`,
            `losses.noised`, `losses.fresh_source`, `losses.annealed_source`, or a function (key,
            batch, frozen=None) -> batch of your own. `pair` comes before `drop_cond`.

    Returns:
        The loss of the batch that the first transform takes, with the metrics of the last argument.

    Raises:
        TypeError: At construction for no Loss at the end, a Loss before it, and a Coupling that is
            not wrapped in `couplings.pair`, as far as the arguments of these functions show; at
            trace time for a transform that returns no dict.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> mean = lambda params, key, batch, frozen=None: (jnp.mean(batch["x"]), {})
        >>> double = lambda key, batch, frozen=None: {**batch, "x": 2 * batch["x"]}
        >>> loss = losses.chain(double, double, mean)
        >>> float(loss({}, jax.random.key(0), {"x": jnp.ones((2, 2))})[0])
        4.0
    """
    if not parts:
        raise TypeError(
            "chain: expected batch transforms and, as the last argument, a Loss, got nothing"
        )
    *transforms, loss = parts
    for place, transform in enumerate(transforms):
        _check("BatchTransform", f"argument {place}", transform)
    _check("Loss", "the last argument", loss)

    def chained(params, key, batch, frozen=None):
        *keys, loss_key = split_key(key, len(parts))
        for place, (transform, own) in enumerate(zip(transforms, keys, strict=True)):
            batch = transform(own, batch, frozen)
            check_batch(f"chain, after argument {place}", batch)
        return loss(params, loss_key, batch, frozen)

    return chained


def _check(wanted: str, where: str, given) -> None:
    found = _noun(given) if callable(given) else None
    if found in (wanted, "unknown"):
        return
    hint = ""
    if found == "Coupling":
        hint = ", a Coupling: couplings.pair(coupling) makes a BatchTransform of it"
    elif found == "Loss":
        hint = ", a Loss: it comes last"
    elif found == "BatchTransform":
        hint = ", a BatchTransform: a chain ends with the Loss"
    elif callable(given):
        hint = ": give what a call of it returns"
    elif isinstance(given, list | tuple) and not hasattr(given, "_fields"):
        hint = ": give them one by one"
    what = described(given) if found is None else f"a function of {signature(given)}"
    raise TypeError(f"chain: expected {where} to be a {wanted}, {_FORMS[wanted]}, got {what}{hint}")


def _noun(function: Callable) -> str | None:
    """What a function is by the arguments that it takes by position; 'unknown' for any number."""
    if accepts(function, 9):
        return "unknown"
    if accepts(function, 2) and accepts(function, 3):
        return "BatchTransform" if not accepts(function, 4) else None
    first = next(iter(getattr(signature(function), "parameters", ())), None)
    if first == "key" and (accepts(function, 3) or accepts(function, 4)):
        return "Coupling"
    return "Loss" if accepts(function, 4) else None
