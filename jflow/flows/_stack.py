"""What the recipes share: a scanned stack of layers between the data and a base."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import numpy as np
from jaxtyping import Int

from jflow import bijectors, distributions
from jflow._core.checks import sizes
from jflow.flows._flow import flow
from jflow.types import Bijector, Distribution, Flow


def vector_flow(
    event_shape: Sequence[int],
    layer: Callable[[int], Bijector],
    depth: int,
    embed: nn.Module | None,
    standardize: bool | Bijector,
    base: Distribution | None,
    *,
    permutations: Callable[[int, int], np.ndarray] | None = None,
    last: Callable[[int], Bijector] | None = None,
    **scan_options,
) -> Flow:
    """Scanned layers behind fixed permutations, from data to source.

    Densities take the forward maps. permutations: (features, depth) -> [depth, features];
    `alternating_permutations` by default. last: a map between the stack and the base.
    """
    if depth < 1:
        raise ValueError(f"expected depth >= 1, got {depth}")

    def stack(features):
        steps = layer(features)
        orders = (permutations or alternating_permutations)(features, depth)
        bijector = bijectors.scan(
            lambda order: bijectors.chain(bijectors.permute(*order), steps),
            depth,
            xs=with_inverses(orders),
            **scan_options,
        )
        return bijector if last is None else bijectors.chain(bijector, last(features))

    return flattened_flow(event_shape, stack, embed, standardize, base)


def flattened_flow(
    event_shape: Sequence[int],
    make: Callable[[int], Bijector],
    embed: nn.Module | None,
    standardize: bool | Bijector,
    base: Distribution | None,
) -> Flow:
    """The flow of a map on vectors, data -> source, for events of any shape.

    `embed` turns cond into what the map sees.
    """
    event_shape = sizes(event_shape)
    features = int(np.prod(event_shape))
    if features < 1:
        raise ValueError(f"expected an event_shape of positive sizes, got {list(event_shape)}")
    bijector = make(features)
    if embed is not None:
        bijector = bijectors.conditioned(bijector, embed)
    if len(event_shape) != 1:
        flatten = bijectors.reshape(event_shape, (features,))
        bijector = bijectors.chain(flatten, bijector, bijectors.invert(flatten))
    return recipe(event_shape, bijectors.invert(bijector), standardize, base)


def recipe(
    event_shape: tuple[int, ...],
    bijector: Bijector,
    standardize: bool | Bijector,
    base: Distribution | Flow | None,
) -> Flow:
    """The flow of `bijector` behind the standardization of the data; a base of None is normal."""
    if isinstance(standardize, Bijector):
        bijector = bijectors.chain(bijector, standardize)
    elif standardize:
        bijector = bijectors.chain(bijector, bijectors.standardize(event_shape))
    base = distributions.normal(event_shape) if base is None else base
    return flow(bijector, base, event_shape=event_shape)


def with_inverses(permutations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permutations [depth, features] and their inverses, for a scanned `bijectors.permute`."""
    return permutations, np.argsort(permutations, axis=1).astype(permutations.dtype)


def alternating_permutations(
    features: int, depth: int, seed: int = 0
) -> Int[np.ndarray, "depth features"]:
    """Permutations of the numbers of an event for a stack of couplings, one a layer.

    Every second one swaps the halves of a coupling, so that two layers transform every number; the
    others are drawn at random, from a fixed seed because permutations are no part of a checkpoint.

    Args:
        features: the size of the event.
        depth: the number of layers.
        seed: of numpy's generator.

    Returns:
        The permutations, int32.

    Examples:
        >>> from jflow import flows
        >>> flows.alternating_permutations(2, 3)
        array([[1, 0],
               [1, 0],
               [1, 0]], dtype=int32)
    """
    rng = np.random.default_rng(seed)
    swap = np.roll(np.arange(features), -(features // 2))
    drawn = [swap if i % 2 or features <= 2 else rng.permutation(features) for i in range(depth)]
    return np.stack(drawn).astype(np.int32)
