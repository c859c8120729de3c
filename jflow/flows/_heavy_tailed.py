"""`heavy_tailed`: any recipe for data with outliers."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jflow import bijectors, distributions
from jflow.types import Flow

__all__ = ["heavy_tailed"]


def heavy_tailed(
    recipe: Callable[..., Flow], event_shape: Sequence[int], *, df: float = 5.0, **options: Any
) -> Flow:
    """Any recipe for data with heavy tails: over a Student-t base, behind a robust scale.

    A flow of bounded slope has the tails of its base, so that over a normal one no recipe draws the
    outliers of Cauchy or Student-t data; and a single outlier in the batch of `init` moves the mean
    and the standard deviation, where all other rows end up in a point. This is

        recipe(event_shape, base=distributions.student_t(event_shape, df),
               standardize=bijectors.robust_standardize(event_shape), **options),

    whose degrees of freedom are trained for each number of the event. Clip gradients in training
    (`optax.clip_by_global_norm`): a batch with an outlier has a large one.

    Also known as: heavy tails, outliers, Student-t base, robust flow.

    Args:
        recipe: a recipe of this package that takes `base` and `standardize`, such as
            `flows.real_nvp`.
        event_shape: the shape of one x, such as (2,) or (8, 8, 1).
        df: the degrees of freedom that every number starts at; 1 is a Cauchy base, and above 30
            it is nearly normal.
        **options: of the recipe.

    Returns:
        Flow: the recipe's flow, with params {'bijector', 'base': {'log_df'}}.

    Raises:
        TypeError: recipe takes no base or no standardization, such as a flow that is made already,
            or the options name either.
        ValueError: df is not positive, and what the recipe raises.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.heavy_tailed(flows.maf, (1,), depth=1, hidden=(4,))
        >>> x = jnp.array([[1.0], [2.0], [3.0], [4.0], [1e9]])
        >>> params = flow.init(jax.random.key(0), x)
        >>> z, _ = flow.inverse(params, x)
        >>> [round(float(number), 2) for number in z[:4, 0]]  # the outlier moves none of them
        [-1.35, -0.67, 0.0, 0.67]

    References:
        Jaini, Kobyzev, Yu, Brubaker, *Tails of Lipschitz Triangular Flows*, 2020, arXiv:1907.04481.
        Alexanderson, Henter, *Robust Model Training and Generalisation with Studentising Flows*,
            2020, arXiv:2006.06599.
    """
    given = {"base", "standardize"}
    taken = inspect.signature(recipe).parameters if callable(recipe) else {}
    if not given <= set(taken):
        raise TypeError(
            "heavy_tailed: expected a recipe that takes base= and standardize=, such as"
            f" flows.real_nvp, got {getattr(recipe, '__name__', type(recipe).__name__)}"
        )
    if both := sorted(given & set(options)):
        raise TypeError(
            f"heavy_tailed: {' and '.join(both)} are what it sets; call the recipe itself with them"
        )
    event_shape = tuple(event_shape)
    return recipe(
        event_shape,
        base=distributions.student_t(event_shape, df),
        standardize=bijectors.robust_standardize(event_shape),
        **options,
    )
