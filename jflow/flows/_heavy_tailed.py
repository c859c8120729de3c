"""`heavy_tailed`: any recipe for data with outliers; `tail_adaptive`: columns of either kind."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jflow import bijectors, distributions, nets
from jflow._core.checks import sizes
from jflow.flows._stack import alternating_permutations, vector_flow
from jflow.types import Bijector, Distribution, Flow

__all__ = ["heavy_tailed", "tail_adaptive"]


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


def tail_adaptive(
    event_shape: Sequence[int],
    tail_index: ArrayLike,
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    bins: int = 8,
    bound: float = 5.0,
    linear: bool = True,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    reversible: bool | int = False,
) -> Flow:
    """A spline flow whose light columns keep light tails, and whose heavy ones heavy tails.

    The base is normal where `tail_index` is infinite, and elsewhere Student's t, whose degrees of
    freedom start at the index and are trained. In every layer the light numbers are mapped by what
    is read off other light numbers alone, and the heavy ones by what is read off both: a light
    column is a function of normal numbers, and no heavy one reaches it. Permutations stay within
    the two groups, the linear maps are block triangular, and the splines are those of
    `neural_spline`, which far out are the identity, so that the tails are those of the base.

    The groups are kept apart, not the columns within them: a linear map of two heavy columns gives
    both of them the heavier tail of the two.

    Also known as: mTAF, marginal tail-adaptive flow.

    Args:
        event_shape: the shape of one x, (d,).
        tail_index: the degrees of freedom of each column, [d], and infinity where the tails are
            light; `metrics.tail_index` of the data.
        depth: the number of layers, each of which transforms half of the numbers of each group.
        hidden: the widths of the two MLPs of each layer.
        bins: the number of bins of each spline.
        bound: half the side of the box that the splines act on.
        linear: whether LU maps stand between the couplings.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: of the MLPs.
        remat: whether each layer is computed again in the backward pass; see `bijectors.scan`.
        reversible: whether the backward pass rebuilds the activations by inverting the layers; an
            integer k keeps every k-th one. See `bijectors.scan`.

    Returns:
        Flow: the flow, with params {'bijector', 'base': {'first': {}, 'rest': {'log_df' [heavy]}}},
            or the base of the one group that there is. Data meet `bijectors.robust_standardize`
            first.

    Raises:
        ValueError: event_shape is not (d,), tail_index is not of this shape or not positive, depth
            is below 1, or another option is out of its range.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.tail_adaptive((3,), [2.0, jnp.inf, 4.0], depth=2, hidden=(4,), bins=4)
        >>> params = flow.init(jax.random.key(0), jnp.zeros((5, 3)))
        >>> jnp.exp(params["base"]["rest"]["log_df"]).round(3).tolist()
        [2.0, 4.0]

    References:
        Laszkiewicz, Lederer, Fischer, *Marginal Tail-Adaptive Normalizing Flows*, 2022,
            arXiv:2206.10311. Ours: couplings of the two groups in the place of masks on one
            network, and an LU form of the block triangular maps.
    """
    event_shape = sizes(event_shape)
    index = np.asarray(tail_index, np.float64)
    if len(event_shape) != 1 or index.shape != event_shape or not np.all(index > 0):
        raise ValueError(
            "tail_adaptive: expected an event_shape (d,) and d positive numbers as tail_index, got"
            f" {event_shape} and {index.tolist()}"
        )
    heavy = np.isfinite(index)
    order = np.argsort(heavy, kind="stable").astype(np.int32)  # light first
    light = int(np.sum(~heavy))
    univariate = bijectors.univariate.rational_quadratic(bins, bound)

    def coupling(split):
        return bijectors.coupling(univariate, nets.MLP(tuple(hidden), activation), split=split)

    def layer(features):
        steps = [_block_lu(features, light)] if linear else []
        if light:
            steps.append(bijectors.on_part(coupling(light // 2), slice(0, light)))
        if light < features:
            steps.append(coupling(light + (features - light) // 2))
        return bijectors.chain(*steps)

    def permutations(features, depth):
        within = [np.zeros((depth, 0), np.int32)]
        for start, size in ((0, light), (light, features - light)):
            if size:
                within.append(start + alternating_permutations(size, depth))
        orders = np.concatenate(within, axis=1).astype(np.int32)
        return np.concatenate([order[orders[:1]], orders[1:]])

    base = _groups(light, index[heavy])
    return vector_flow(
        event_shape,
        layer,
        depth,
        embed,
        bijectors.robust_standardize(event_shape),
        base,
        permutations=permutations,
        remat=remat,
        reversible=reversible,
    )


def _groups(light: int, df: np.ndarray) -> Distribution:
    """The base: `light` normal numbers, then Student-t ones that start at df [heavy]."""
    if not len(df):
        return distributions.normal((light,))
    heavy = distributions.student_t((len(df),), df)
    return heavy if not light else distributions.split(distributions.normal((light,)), heavy, light)


def _block_lu(features: int, light: int) -> Bijector:
    """`bijectors.lu` with no way from the numbers after the first `light` ones to these."""
    lu = bijectors.lu(features)
    if light in (0, features):
        return lu
    first = np.arange(features) < light
    kept = ~(first[:, None] & ~first[None])

    def masked(apply):
        def run(params, x, cond=None, *, key=None):
            return apply({**params, "upper": jnp.where(kept, params["upper"], 0)}, x)

        return run

    return Bijector(lu.init, masked(lu.forward), masked(lu.inverse))
