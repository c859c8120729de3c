"""Flows of maps z + g(z): contractions for densities, low rank for variational inference."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn

from jflow import bijectors, nets
from jflow._core.checks import sizes
from jflow.flows._stack import recipe
from jflow.types import Bijector, Distribution, Flow

__all__ = ["planar", "radial", "residual_flow", "sylvester"]

_ROULETTE = bijectors.log_dets.russian_roulette()


def residual_flow(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    coeff: float = 0.9,
    log_det: bijectors.log_dets.LogDet = _ROULETTE,
    net: nn.Module | None = None,
    embed: nn.Module | None = None,
    activation: Callable | None = None,
    remat: bool = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Residual flow: actnorms and blocks x + g(x), where g is a contraction.

    Densities take the blocks themselves: `log_prob` with a key has an unbiased estimate of the
    log-determinant (`losses.nll` trains on it, by gradients of constant memory), without a key the
    exact one at d products a block. Sampling inverts each block by fixed-point iterations, about
    log(1e-6) / log(coeff) of them at worst. With log_det=bijectors.log_dets.neumann(n) it is the
    i-ResNet.

    Args:
        event_shape: the shape of one x. Images [H, W, C] get convolutions at their own resolution,
            other shapes are flattened.
        depth: the number of blocks.
        hidden: the widths (channels) of the hidden layers of each block.
        coeff: the bound on the Lipschitz constant of g, in (0, 1). Closer to 1 is more expressive,
            slower to invert and, under the roulette, noisier.
        log_det: the estimator for calls with a key, from `bijectors.log_dets`.
        net: another network with a bound, in the place of hidden, coeff and activation; see
            `nets.LipschitzMLP`.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: a function of Lipschitz constant at most 1; None is LipSwish with a learned
            slope, `nets.lip_swish`.
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
        ValueError: depth is below 1, coeff is not in (0, 1), there is no hidden layer, or a size of
            event_shape is below 1.
        TypeError: net has no bound, or base is not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.residual_flow((2,), depth=2, hidden=(8,))
        >>> x = jnp.zeros((3, 2))
        >>> params = jax.eval_shape(flow.init, jax.random.key(0), x)
        >>> jax.eval_shape(flow.log_prob, params, x).shape  # nothing is computed
        (3,)

    References:
        Chen, Behrmann, Duvenaud, Jacobsen, *Residual Flows for Invertible Generative Modeling*,
            2019, arXiv:1906.02735.
        Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, *Invertible Residual Networks*, 2019,
            arXiv:1811.00995.
    """
    event_shape = _shape(event_shape, depth, least=1)
    image = len(event_shape) == 3
    if net is None and image:
        kernels = (3, *(1,) * (len(hidden) - 1), 3)
        net = nets.LipschitzConv(tuple(hidden), kernels, coeff=coeff, activation=activation)
    elif net is None:
        net = nets.LipschitzMLP(tuple(hidden), coeff=coeff, activation=activation)
    channels = event_shape[-1] if image else math.prod(event_shape)
    block = bijectors.chain(bijectors.actnorm(channels), bijectors.residual(net, log_det=log_det))
    bijector = bijectors.scan(block, depth, remat=remat)
    if embed is not None:
        bijector = bijectors.conditioned(bijector, embed)
    if not image:
        bijector = _on_vectors(event_shape, bijector)
    return recipe(event_shape, bijectors.invert(bijector), standardize, base)


def planar(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Planar flow: maps z + u tanh(w . z + b) after a free scale and shift.

    It is made for variational inference: samples with their density take O(d) a map; densities of
    given data take numerical inverses. With cond every parameter becomes a function of it, the
    posterior of an amortized inference; see `bijectors.amortized`.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of maps; 0 leaves the Gaussian of free mean and scales (mean field).
        hidden: the widths of the MLP that reads the parameters off cond; unused without a cond.
        embed: a Linen module that is applied to cond first, such as an encoder or nn.Embed(10, 16)
            for labels; a float cond needs none.
        activation: of that MLP.
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
        ValueError: depth is below 0, or a size of event_shape is below 1.
        TypeError: base is not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> posterior = flows.planar((2,), depth=2, hidden=(8,))
        >>> z, seen = jnp.zeros((3, 2)), jnp.ones((3, 4))
        >>> params = jax.eval_shape(posterior.init, jax.random.key(0), z, seen)
        >>> jax.eval_shape(posterior.log_prob, params, z, seen).shape  # nothing is computed
        (3,)

    References:
        Rezende, Mohamed, *Variational Inference with Normalizing Flows*, 2015, arXiv:1505.05770.
    """
    return _posterior(
        bijectors.planar, event_shape, depth, hidden, embed, activation, remat, standardize, base
    )


def radial(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Radial flow: maps z + beta (z - c) / (alpha + |z - c|) after a free scale and shift.

    It is `planar`, where there is an example, with radial maps, which have an inverse in closed
    form: densities of given data take one pass too. With cond every parameter becomes a function of
    it; see `bijectors.amortized`.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of maps; 0 leaves the Gaussian of free mean and scales (mean field).
        hidden: the widths of the MLP that reads the parameters off cond; unused without a cond.
        embed: a Linen module that is applied to cond first, such as an encoder or nn.Embed(10, 16)
            for labels; a float cond needs none.
        activation: of that MLP.
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
        ValueError: depth is below 0, or a size of event_shape is below 1.
        TypeError: base is not a `Distribution` or a `Flow`.

    References:
        Rezende, Mohamed, *Variational Inference with Normalizing Flows*, 2015, arXiv:1505.05770.
    """
    return _posterior(
        bijectors.radial, event_shape, depth, hidden, embed, activation, remat, standardize, base
    )


def sylvester(
    event_shape: Sequence[int],
    *,
    depth: int = 4,
    rank: int | None = None,
    reflections: int | None = None,
    hidden: Sequence[int] = (128, 128),
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Sylvester flow: maps z + Q R tanh(S Q^T z + b), of many units at once.

    It is `planar`, where there is an example, with maps of `rank` units behind Householder
    reflections; see `bijectors.sylvester`. Samples with their density take one pass, densities of
    given data a numerical inverse. With cond every parameter becomes a function of it; see
    `bijectors.amortized`.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of maps; 0 leaves the Gaussian of free mean and scales (mean field).
        rank: the number of units of a map, from 1 to the size of the event; None is the size of the
            event.
        reflections: the number of Householder reflections; None is rank, which is enough for every
            frame Q up to signs, and 0 leaves the unit vectors.
        hidden: the widths of the MLP that reads the parameters off cond; unused without a cond.
        embed: a Linen module that is applied to cond first, such as an encoder or nn.Embed(10, 16)
            for labels; a float cond needs none.
        activation: of that MLP.
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
        ValueError: depth is below 0, rank or reflections is out of its range, or a size of
            event_shape is below 1.
        TypeError: base is not a `Distribution` or a `Flow`.

    References:
        van den Berg, Hasenclever, Tomczak, Welling,
            *Sylvester Normalizing Flows for Variational Inference*, 2018, arXiv:1803.05649.
    """

    def layer(features):
        return bijectors.sylvester(features, rank, reflections=reflections)

    return _posterior(
        layer, event_shape, depth, hidden, embed, activation, remat, standardize, base
    )


def _posterior(
    layer, event_shape, depth, hidden, embed, activation, remat, standardize, base
) -> Flow:
    event_shape = _shape(event_shape, depth, least=0)
    features = math.prod(event_shape)
    maps = [bijectors.affine((features,))]
    if depth:
        maps.append(bijectors.scan(layer(features), depth, remat=remat))
    bijector = bijectors.amortized(bijectors.chain(*maps), nets.MLP(tuple(hidden), activation))
    if embed is not None:
        bijector = bijectors.conditioned(bijector, embed)
    bijector = _on_vectors(event_shape, bijector)
    return recipe(event_shape, bijector, standardize, base)


def _shape(event_shape, depth: int, least: int) -> tuple[int, ...]:
    event_shape = sizes(event_shape)
    if depth < least:
        raise ValueError(f"expected depth >= {least}, got {depth}")
    if math.prod(event_shape) < 1:
        raise ValueError(f"expected an event_shape of positive sizes, got {list(event_shape)}")
    return event_shape


def _on_vectors(event_shape: tuple[int, ...], bijector: Bijector) -> Bijector:
    if len(event_shape) == 1:
        return bijector
    flatten = bijectors.reshape(event_shape, (math.prod(event_shape),))
    return bijectors.chain(flatten, bijector, bijectors.invert(flatten))
