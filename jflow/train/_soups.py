"""Model soups: the mean of the params of several trainings."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow._core.arrays import float_dtype
from jflow.train.checkpoint import restore_params
from jflow.types import Params

__all__ = ["Soup", "greedy_soup", "uniform_soup"]

Candidate = Params | str | os.PathLike


class Soup(NamedTuple):
    """What `greedy_soup` returns.

    Attributes:
        params: The mean over the members.
        members: The indices of the candidates that are in it, in the order of their errors.
        error: That of the mean.
        errors: Those of the candidates by themselves, in their own order.
    """

    params: Params
    members: list[int]
    error: float
    errors: list[float]


def uniform_soup(candidates: Sequence[Candidate]) -> Params:
    """The mean of the params of several trainings from one start.

    Also known as: model soup, weight averaging.

    One network takes the place of an ensemble. Fine-tunings of the same pretrained params lie close
    enough for that; trainings from different random params do not.

    Args:
        candidates: params of one network, or folders of runs, whose newest checkpoint is read, the
            averaged params where the run kept an average. Adapters are merged first: the mean of
            two factors is not a factor of the mean.

    Returns:
        The params, in their types; sums are in float32 or better.

    Raises:
        ValueError: There is no candidate, or two differ in their structure or shapes.
        FileNotFoundError: A folder has no checkpoint.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import train
        >>> train.uniform_soup([{"w": jnp.zeros(1)}, {"w": jnp.ones(1)}])["w"].tolist()
        [0.5]

    References:
        Wortsman, Ilharco, Gadre, Roelofs, Gontijo-Lopes, Morcos, Namkoong, Farhadi, Carmon,
            Kornblith, Schmidt, *Model soups: averaging weights of multiple fine-tuned models
            improves accuracy without increasing inference time*, 2022, arXiv:2203.05482.
    """
    _check(candidates, "uniform_soup")
    first = _read(candidates[0])
    total = _widened(first)
    for i, candidate in enumerate(candidates[1:], 1):
        total = jax.tree.map(jnp.add, total, _widened(_like(first, _read(candidate), i)))
    return _narrowed(total, len(candidates), first)


def greedy_soup(candidates: Sequence[Candidate], error: Callable[[Params], Any]) -> Soup:
    """The mean of those trainings that make it no worse on held-out data.

    The candidates are tried from the best to the worst; one stays in the mean where the error of
    the mean does not rise by it. It is at most the error of the best candidate.

    Args:
        candidates: as in `uniform_soup`. Folders are read when they are needed, twice.
        error: params -> a number, the smaller the better, such as a loss of held-out data under one
            key; jitted, since it runs for every candidate twice.

    Returns:
        Soup: the mean, who is in it, and the errors.

    Raises:
        ValueError: There is no candidate, two differ in their structure or shapes, or no error is
            finite.
        FileNotFoundError: A folder has no checkpoint.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import train
        >>> error = lambda params: abs(params["w"] - 0.4)
        >>> soup = train.greedy_soup([{"w": jnp.asarray(w)} for w in (0.0, 5.0, 1.0)], error)
        >>> float(soup.params["w"]), soup.members
        (0.5, [0, 2])

    References:
        Wortsman, Ilharco, Gadre, Roelofs, Gontijo-Lopes, Morcos, Namkoong, Farhadi, Carmon,
            Kornblith, Schmidt, *Model soups: averaging weights of multiple fine-tuned models
            improves accuracy without increasing inference time*, 2022, arXiv:2203.05482.
    """
    _check(candidates, "greedy_soup")
    errors = [float(error(_read(candidate))) for candidate in candidates]
    order = sorted(range(len(errors)), key=lambda i: (errors[i] != errors[i], errors[i]))
    best = errors[order[0]]
    if not abs(best) < float("inf"):
        raise ValueError(f"greedy_soup: expected a finite error of some candidate, got {errors}")
    first = _read(candidates[order[0]])
    total, params, members = _widened(first), first, [order[0]]
    for i in order[1:]:
        more = jax.tree.map(jnp.add, total, _widened(_like(first, _read(candidates[i]), i)))
        mean = _narrowed(more, len(members) + 1, first)
        found = float(error(mean))
        if found <= best:
            total, params, members, best = more, mean, [*members, i], found
    return Soup(params, members, best, errors)


def _check(candidates: Sequence[Candidate], name: str) -> None:
    if not len(candidates):
        raise ValueError(f"{name}: expected one candidate or more, got none")


def _read(candidate: Candidate) -> Params:
    return restore_params(candidate) if isinstance(candidate, str | os.PathLike) else candidate


def _like(first: Params, other: Params, i: int) -> Params:
    """`other`, if it has the structure and shapes of `first`."""
    have, expected = (
        {jax.tree_util.keystr(p, simple=True, separator="/"): jnp.shape(leaf) for p, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (other, first))
    )
    for path in [*expected, *have]:
        if have.get(path) != expected.get(path):
            raise ValueError(
                f"a soup is of one network: expected {path!r} of shape {expected.get(path)} in"
                f" candidate {i}, got {have.get(path)}"
            )
    return other


def _widened(params: Params) -> Params:
    return jax.tree.map(lambda p: jnp.asarray(p, float_dtype(p)), params)


def _narrowed(total: Params, n: int, like: Params) -> Params:
    return jax.tree.map(lambda t, p: (t / n).astype(jnp.result_type(p)), total, like)
