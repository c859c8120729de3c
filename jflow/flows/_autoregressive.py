"""Autoregressive flows on vectors."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import numpy as np

from jflow import bijectors, nets
from jflow.flows._stack import vector_flow
from jflow.types import Bijector, Distribution, Flow

__all__ = ["bnaf", "iaf", "maf", "neural_spline_autoregressive"]


def maf(
    event_shape: Sequence[int],
    *,
    depth: int = 5,
    hidden: Sequence[int] = (128, 128),
    max_log_scale: float = 3.0,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Masked autoregressive flow: affine layers whose density takes one pass.

    Also known as: MAF, masked autoregressive flow.

    From data to noise, a layer maps x_i to x_i exp(a_i) + m_i, where a_i and m_i are functions of
    the numbers before x_i; the order is reversed from layer to layer. A density is one pass of a
    masked network (`nets.MADE`) a layer. Sampling takes up to as many passes a layer as the event
    has numbers; see `bijectors.jacobi`. The bound on the log-scales is ours.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of layers, each of which transforms all of the numbers.
        hidden: the widths of the MADE of each layer; at least the size of the event, better twice
            that.
        max_log_scale: the bound on the log-scale of one layer, which multiplies a number by
            e^-max_log_scale to e^max_log_scale.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: of the networks; a smooth one keeps the density smooth.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers
            from the batch that `init` gets, or another bijector in its place: heavy tails want
            `bijectors.robust_standardize(event_shape)`. Density and samples are in the units of the
            data either way.
        base: the base distribution; None is the standard normal, and heavy tails want
            `distributions.student_t(event_shape)`.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: depth is below 1, a size of event_shape is below 1, or another option is out of
            its range.
        TypeError: base is not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.maf((2,), depth=2, hidden=(8,), standardize=False)
        >>> x = jnp.zeros((3, 2))
        >>> params = flow.init(jax.random.key(0), x)
        >>> round(float(flow.log_prob(params, x)[0]), 3)  # it starts at its base: -log(2 pi)
        -1.838

    References:
        Papamakarios, Pavlakou, Murray, *Masked Autoregressive Flow for Density Estimation*, 2017,
            arXiv:1705.07057.
    """
    univariate = bijectors.univariate.affine(max_log_scale)

    def layer(features):
        return bijectors.autoregressive(
            univariate, nets.MADE(univariate.size, tuple(hidden), activation=activation)
        )

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, permutations=_reversals, remat=remat
    )


def iaf(
    event_shape: Sequence[int],
    *,
    depth: int = 5,
    hidden: Sequence[int] = (128, 128),
    max_log_scale: float = 3.0,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Inverse autoregressive flow: affine layers whose samples, with their density, take one pass.

    Also known as: IAF, inverse autoregressive flow.

    It is `maf` with every layer inverted: from noise to data, a layer maps z_i to z_i exp(a_i) +
    m_i, where a_i and m_i are functions of the numbers before z_i. The density of given data takes
    up to as many passes a layer as the event has numbers; see `bijectors.jacobi`.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of layers, each of which transforms all of the numbers.
        hidden: the widths of the MADE of each layer; at least the size of the event, better twice
            that.
        max_log_scale: the bound on the log-scale of one layer, which multiplies a number by
            e^-max_log_scale to e^max_log_scale.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: of the networks; a smooth one keeps the density smooth.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers
            from the batch that `init` gets, or another bijector in its place: heavy tails want
            `bijectors.robust_standardize(event_shape)`. Density and samples are in the units of the
            data either way.
        base: the base distribution; None is the standard normal, and heavy tails want
            `distributions.student_t(event_shape)`.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: depth is below 1, a size of event_shape is below 1, or another option is out of
            its range.
        TypeError: base is not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.iaf((2,), depth=2, hidden=(8,), standardize=False)
        >>> params = flow.init(jax.random.key(0), jnp.zeros((3, 2)))
        >>> x, log_prob = flow.sample_and_log_prob(params, jax.random.key(1), 3)
        >>> x.shape, log_prob.shape
        ((3, 2), (3,))

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling,
            *Improving Variational Inference with Inverse Autoregressive Flow*, 2016,
            arXiv:1606.04934.
    """
    univariate = bijectors.univariate.affine(max_log_scale)

    def layer(features):
        made = nets.MADE(univariate.size, tuple(hidden), activation=activation)
        return bijectors.invert(bijectors.autoregressive(univariate, made))

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, permutations=_reversals, remat=remat
    )


def neural_spline_autoregressive(
    event_shape: Sequence[int],
    *,
    depth: int = 5,
    hidden: Sequence[int] = (128, 128),
    bins: int = 8,
    bound: float = 5.0,
    linear: bool = True,
    residual: bool = False,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Autoregressive rational-quadratic splines, RQ-NSF (AR), whose density takes one pass.

    A layer maps each number by a monotone spline whose knots are functions of the numbers before
    it, behind a permutation that reverses the order and an LU linear map. A density is one pass of
    a masked network (`nets.MADE`) a layer; sampling takes up to as many passes a layer as the event
    has numbers. Outside [-bound, bound] the splines of a layer are the identity.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of layers, each of which transforms all of the numbers.
        hidden: the widths of the MADE of each layer; at least the size of the event, better twice
            that.
        bins: the number of bins of each spline, which takes 3 * bins - 1 raw numbers.
        bound: half the side of the box that the splines act on.
        linear: whether LU maps stand between the layers.
        residual: whether the networks are residual, with equal widths, as in the paper; see
            `nets.MADE`.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: of the networks; a smooth one keeps the density smooth.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers
            from the batch that `init` gets, or another bijector in its place: heavy tails want
            `bijectors.robust_standardize(event_shape)`. Density and samples are in the units of the
            data either way.
        base: the base distribution; None is the standard normal, and heavy tails want
            `distributions.student_t(event_shape)`.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: depth is below 1, a size of event_shape is below 1, or another option is out of
            its range.
        TypeError: base is not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.neural_spline_autoregressive(
        ...     (2,), depth=2, hidden=(8,), bins=4, standardize=False
        ... )
        >>> x = jnp.zeros((3, 2))
        >>> params = flow.init(jax.random.key(0), x)
        >>> round(float(flow.log_prob(params, x)[0]), 3)  # it starts at its base: -log(2 pi)
        -1.838

    References:
        Durkan, Bekasov, Murray, Papamakarios, *Neural Spline Flows*, 2019, arXiv:1906.04032.
    """
    univariate = bijectors.univariate.rational_quadratic(bins, bound)

    def layer(features):
        made = nets.MADE(univariate.size, tuple(hidden), activation=activation, residual=residual)
        splines = bijectors.autoregressive(univariate, made)
        return bijectors.chain(bijectors.lu(features), splines) if linear else splines

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, permutations=_reversals, remat=remat
    )


def bnaf(
    event_shape: Sequence[int],
    *,
    depth: int = 2,
    hidden: int = 8,
    num_layers: int = 2,
    embed: nn.Module | None = None,
    remat: bool = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Block neural autoregressive flow: monotone masked networks, whose density takes one pass.

    Each of the `depth` maps, between which the order is reversed, is one masked network of
    `num_layers` hidden layers with `hidden` units for every number, increasing in its own number;
    see `bijectors.block_autoregressive`. Sampling inverts the maps numerically.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of maps.
        hidden: the number of hidden units for every number of the event.
        num_layers: the number of hidden layers of one map.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers
            from the batch that `init` gets, or another bijector in its place: heavy tails want
            `bijectors.robust_standardize(event_shape)`. Density and samples are in the units of the
            data either way.
        base: the base distribution; None is the standard normal, and heavy tails want
            `distributions.student_t(event_shape)`.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: depth is below 1, a size of event_shape is below 1, or another option is out of
            its range.
        TypeError: base is not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.bnaf((2,), depth=2, hidden=2)
        >>> x = jnp.zeros((3, 2))
        >>> params = jax.eval_shape(flow.init, jax.random.key(0), x)
        >>> jax.eval_shape(flow.log_prob, params, x).shape  # nothing is computed
        (3,)

    References:
        De Cao, Titov, Aziz, *Block Neural Autoregressive Flow*, 2019, arXiv:1904.04676.
    """

    def layer(features):
        return bijectors.block_autoregressive(features, hidden, num_layers)

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, permutations=_reversals, remat=remat
    )


def _reversals(features: int, depth: int) -> np.ndarray:
    return np.tile(np.arange(features, dtype=np.int32)[::-1], (depth, 1))
