"""Coupling flows on vectors."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import numpy as np

from jflow import bijectors, nets
from jflow.flows._stack import flattened_flow, vector_flow
from jflow.types import Bijector, Distribution, Elementwise, Flow


def nice(
    event_shape: Sequence[int],
    *,
    depth: int = 4,
    hidden: Sequence[int] = (128, 128),
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    reversible: bool | int = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """NICE: additive coupling layers, which preserve volume, and one diagonal scaling.

    From data to noise, a layer adds an MLP of the first half of the numbers to the second half;
    fixed permutations stand between the layers, and the scaling stands before the base. Both
    directions take one pass. Ours: the scaling has a shift too.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of coupling layers, each of which transforms half of the numbers.
        hidden: the widths of the MLP of each layer.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: of the MLPs; a smooth one keeps the gradients of reversible=True those of plain
            automatic differentiation.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        reversible: whether the backward pass rebuilds the activations by inverting the layers,
            which makes their memory flat in depth; an integer k keeps every k-th one. Not together
            with remat; see `bijectors.scan`.
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
        >>> flow = flows.nice((2,), depth=2, hidden=(8,), standardize=False)
        >>> params = flow.init(jax.random.key(0), jnp.zeros((3, 2)))
        >>> flow.sample(params, jax.random.key(1), 3).shape
        (3, 2)

    References:
        Dinh, Krueger, Bengio, *NICE: Non-linear Independent Components Estimation*, 2014,
            arXiv:1410.8516.
    """

    def layer(features):
        net = nets.MLP(tuple(hidden), activation)
        return bijectors.coupling(bijectors.univariate.shift(), net, split=features // 2)

    def scaling(features):
        return bijectors.affine((features,))

    return vector_flow(
        event_shape,
        layer,
        depth,
        embed,
        standardize,
        base,
        last=scaling,
        remat=remat,
        reversible=reversible,
    )


def real_nvp(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    max_log_scale: float = 3.0,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    reversible: bool | int = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """RealNVP: affine coupling layers between fixed permutations, one pass in both directions.

    Also known as: RealNVP, affine coupling flow.

    From data to noise, a layer maps one half of the numbers, x_2, to x_2 exp(a(x_1)) + m(x_1), with
    a and m read off an MLP of the other half. Ours: the event is flattened, where the paper has
    checkerboard and channel masks on images.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of coupling layers, each of which transforms half of the numbers.
        hidden: the widths of the MLP of each layer.
        max_log_scale: the bound on the log-scale of one layer, which multiplies a number by
            e^-max_log_scale to e^max_log_scale.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: of the MLPs; a smooth one keeps the gradients of reversible=True those of plain
            automatic differentiation.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        reversible: whether the backward pass rebuilds the activations by inverting the layers,
            which makes their memory flat in depth; an integer k keeps every k-th one. Not together
            with remat; see `bijectors.scan`.
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
        >>> flow = flows.real_nvp((2,), depth=2, hidden=(8,), standardize=False)
        >>> x = jnp.zeros((3, 2))
        >>> params = flow.init(jax.random.key(0), x)
        >>> round(float(flow.log_prob(params, x)[0]), 3)  # it starts at its base: -log(2 pi)
        -1.838

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density Estimation Using Real NVP*, 2016, arXiv:1605.08803.
    """
    univariate = bijectors.univariate.affine(max_log_scale)

    def layer(features):
        return bijectors.coupling(
            univariate, nets.MLP(tuple(hidden), activation), split=features // 2
        )

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, remat=remat, reversible=reversible
    )


def kernelized(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    points: int = 32,
    univariate: Elementwise | None = None,
    linear: bool = True,
    embed: nn.Module | None = None,
    remat: bool = False,
    reversible: bool | int = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Kernelized flow: couplings by kernel machines, for tables of a few hundred rows.

    Also known as: Ferumal flow, kernelized normalizing flow.

    From data to noise, a layer maps one half of the numbers, x_2, to x_2 exp(a(x_1)) + m(x_1), with
    a and m sums of Gaussian kernels at learned points, `nets.KernelFeatures`, behind a permutation
    and an LU linear map. The parameters of a layer are `points` rows of half of the numbers, as
    many weights for each of a and m, and the linear map. With `univariate=` the kernel machines
    give the numbers of another map, such as the knots of splines, which holds two modes or a skew
    in one layer. Behind `standardize=bijectors.whiten(event_shape)` it starts at the Gaussian of
    the data, shrunk as few rows want it.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of coupling layers, each of which transforms half of the numbers.
        points: the number of points of each layer; `init` needs as many rows.
        univariate: the elementwise map of the couplings, such as
            `bijectors.univariate.rational_quadratic()`; None is `bijectors.univariate.affine()`.
        linear: whether LU maps stand between the couplings.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        reversible: whether the backward pass rebuilds the activations by inverting the layers,
            which makes their memory flat in depth; an integer k keeps every k-th one. Not together
            with remat; see `bijectors.scan`.
        standardize: whether the data first meet `bijectors.standardize`, which takes its numbers
            from the batch that `init` gets, or another bijector in its place. Density and samples
            are in the units of the data either way.
        base: the base distribution; None is the standard normal.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}.

    Raises:
        ValueError: depth is below 1, a size of event_shape is below 1, or another option is out of
            its range; or `init` gets fewer rows than points.
        TypeError: base is not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.kernelized((2,), depth=2, points=3, standardize=False)
        >>> x = jnp.zeros((3, 2))
        >>> params = flow.init(jax.random.key(0), x)
        >>> round(float(flow.log_prob(params, x)[0]), 3)  # it starts at its base: -log(2 pi)
        -1.838

    References:
        English, Kirchler, Lippert, *Kernelised Normalising Flows*, 2023, arXiv:2307.14839. Ours:
            the linear maps, other maps than affine ones, and where the points and the lengths
            start.
    """
    univariate = bijectors.univariate.affine() if univariate is None else univariate

    def layer(features):
        net = nets.KernelFeatures(points)
        coupling = bijectors.coupling(univariate, net, split=features // 2)
        return bijectors.chain(bijectors.lu(features), coupling) if linear else coupling

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, remat=remat, reversible=reversible
    )


def nanoflow(
    event_shape: Sequence[int],
    *,
    depth: int = 16,
    hidden: Sequence[int] = (128, 128),
    indicator: int = 16,
    max_log_scale: float = 3.0,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    reversible: bool | int = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """NanoFlow: affine couplings on random masks that share one network.

    Each layer has an embedding of its own, which says to the network where it is, and a head of its
    own. The parameters are those of one network, and for each layer indicator + (hidden[-1] + 1) *
    2 * features numbers. Ours: the flow is on the flattened event, where the flows of the paper are
    of audio and images.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of coupling layers, each of which transforms half of the numbers.
        hidden: the widths of the shared MLP.
        indicator: the size of the embedding of a layer.
        max_log_scale: the bound on the log-scale of one layer, which multiplies a number by
            e^-max_log_scale to e^max_log_scale.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: of the MLPs; a smooth one keeps the gradients of reversible=True those of plain
            automatic differentiation.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        reversible: whether the backward pass rebuilds the activations by inverting the layers,
            which makes their memory flat in depth; an integer k keeps every k-th one. Not together
            with remat; see `bijectors.scan`.
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
        >>> flow = flows.nanoflow((2,), depth=2, hidden=(8,), indicator=2, standardize=False)
        >>> x = jnp.zeros((3, 2))
        >>> params = flow.init(jax.random.key(0), x)
        >>> round(float(flow.log_prob(params, x)[0]), 3)  # it starts at its base: -log(2 pi)
        -1.838

    References:
        Lee, Kim, Yoon, *NanoFlow: Scalable Normalizing Flows with Sublinear Parameter Complexity*,
            2020, arXiv:2006.06280.
    """
    univariate, net = (
        bijectors.univariate.affine(max_log_scale),
        nets.MLP(tuple(hidden), activation),
    )

    def stack(features):
        return bijectors.scan(
            lambda mask: bijectors.indicated(
                bijectors.masked_coupling(univariate, net, mask), indicator
            ),
            depth,
            xs=_random_masks(features, depth),
            shared=("net",),
            remat=remat,
            reversible=reversible,
        )

    return flattened_flow(event_shape, stack, embed, standardize, base)


def _random_masks(features: int, depth: int) -> np.ndarray:
    """[depth, features]: a random half, its complement, another half ..."""
    if depth < 1:
        raise ValueError(f"expected depth >= 1, got {depth}")
    halves = [bijectors.masks.random((features,), seed=i) for i in range((depth + 1) // 2)]
    return np.concatenate([bijectors.masks.alternating(half, 2) for half in halves])[:depth]


def neural_spline(
    event_shape: Sequence[int],
    *,
    depth: int = 8,
    hidden: Sequence[int] = (128, 128),
    bins: int = 8,
    bound: float = 5.0,
    linear: bool = True,
    implementation: str | None = None,
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
    remat: bool = False,
    reversible: bool | int = False,
    standardize: bool | Bijector = True,
    base: Distribution | None = None,
) -> Flow:
    """Neural spline flow, RQ-NSF (C): rational-quadratic couplings, one pass in both directions.

    Also known as: NSF, RQ-NSF, neural spline flow, rational quadratic spline flow.

    A layer maps one half of the numbers by monotone splines whose knots an MLP reads off the other
    half, behind a permutation and an LU linear map. The density pass evaluates the splines
    themselves, sampling their inverse in closed form. Outside [-bound, bound] the splines of a
    layer are the identity.

    Args:
        event_shape: the shape of one x, such as (2,) or (8, 8, 1); the layers see it flattened.
        depth: the number of coupling layers, each of which transforms half of the numbers.
        hidden: the widths of the MLP of each layer.
        bins: the number of bins of each spline, which takes 3 * bins - 1 raw numbers.
        bound: half the side of the box that the splines act on.
        linear: whether LU maps stand between the couplings.
        implementation: of the splines, as in `univariate.rational_quadratic`; 'plain' for losses
            that take second derivatives, such as `losses.score_matching`.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: of the MLPs; a smooth one keeps the gradients of reversible=True those of plain
            automatic differentiation.
        remat: whether each layer is computed again in the backward pass, which saves memory; see
            `bijectors.scan`.
        reversible: whether the backward pass rebuilds the activations by inverting the layers,
            which makes their memory flat in depth; an integer k keeps every k-th one. Not together
            with remat; see `bijectors.scan`.
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
        >>> flow = flows.neural_spline((2,), depth=2, hidden=(8,), bins=4, standardize=False)
        >>> x = jnp.zeros((3, 2))
        >>> params = flow.init(jax.random.key(0), x)
        >>> round(float(flow.log_prob(params, x)[0]), 3)  # it starts at its base: -log(2 pi)
        -1.838

    References:
        Durkan, Bekasov, Murray, Papamakarios, *Neural Spline Flows*, 2019, arXiv:1906.04032.
    """
    univariate = bijectors.univariate.rational_quadratic(bins, bound, implementation=implementation)

    def layer(features):
        coupling = bijectors.coupling(
            univariate, nets.MLP(tuple(hidden), activation), split=features // 2
        )
        return bijectors.chain(bijectors.lu(features), coupling) if linear else coupling

    return vector_flow(
        event_shape, layer, depth, embed, standardize, base, remat=remat, reversible=reversible
    )
