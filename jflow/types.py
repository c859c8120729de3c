"""The nouns of jflow: tuples of pure functions that compose.

Time runs from t=0 (source, noise) to t=1 (data); `forward` goes from the source to the data. Every
array has one leading batch axis, then `*event`. `log_det` and `log_prob` are [b], in nats. `params`
are nested dicts of trainable floats and nothing else. `key=None` means deterministic; a function
that needs randomness and gets no key raises a ValueError. A method is a function that returns one
of these tuples, or a `Loss`.

The tuples are made once, outside jit, and closed over; their functions are pure and may be jitted,
differentiated and sharded. Somebody's own tuple needs no base class and no registration: any
functions with these signatures do.

A key is consumed once: a function splits the key that it gets and hands each part to one consumer,
and never folds a number into a key that it also passes on, because split(key, n)[i] and
fold_in(key, i) are the same bits. `fold_in(state.key, state.step)` is the one exception, at the
root of a training step; `jax.random.clone` says that the same draws are wanted once more.

The tuples can be copied, and pickled where cloudpickle is installed, so that joblib and
multiprocessing take them. Such a pickle holds the code of the functions, for other processes of the
same versions of Python and jflow: what is kept is the params (`jflow.train.checkpoint`), and the
tuple is made anew by the same call.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

# Seeds of numpy are distinguished by purpose: `jflow._core.seeds`.

__all__ = [
    "Adapter",
    "ApplyElementwise",
    "ApplyField",
    "ApplyFlowMap",
    "ApplyMap",
    "Array",
    "BatchTransform",
    "Bijector",
    "Cond",
    "Condition",
    "Coupling",
    "Distribution",
    "Domain",
    "Elbo",
    "ElboFlow",
    "Elementwise",
    "Field",
    "Flow",
    "FlowMap",
    "InitDistribution",
    "InitField",
    "InitFlowMap",
    "InitMap",
    "Key",
    "LogProb",
    "Loss",
    "Manifold",
    "ManifoldFn",
    "Metrics",
    "NumberOrFunction",
    "Params",
    "PartTimes",
    "Path",
    "PathFn",
    "Premetric",
    "PullbackMap",
    "PyTree",
    "Sample",
    "SampleAndLogProb",
    "Step",
    "Time",
    "TimePair",
    "Transport",
    "Velocity",
]

Array = jax.Array
"""An array of JAX's, or a tracer of one."""

Key = jax.Array
"""A key of `jax.random.key`, of shape []."""

PyTree = Any
"""A nesting of dicts, lists and tuples with arrays as leaves; one array is a pytree too."""

Params = Mapping[str, Any]
"""Nested dicts of trainable floats and nothing else; a noun without parameters has {}."""

Cond = Any
"""What a model is conditioned on: None, an array [b, ...], a `Condition`, or a pytree of arrays.

One row, [1, ...], is for all rows.
"""


class Condition(NamedTuple):
    """A condition of several parts, each of which a network takes in by a way of its own.

    A network takes None, this tuple, or a bare array: integers [b] are the label, floats [b, k] the
    vector. A part that it does not take, and a part that its params were made with and that is not
    there, are errors while it is traced. All parts lead with the rows of x, or with 1 for all rows.

    The weights that read `aligned` and `context` start at zero: a trained network goes on as it was
    when it gets one of them, with `train.warm_start(velocity.init(key, x, t, cond), params)`.

    One row without the batch axis is the null of `losses.drop_cond` and `guidance.cfg`. A part that
    is None in such a null is not dropped: `Condition(label=10)` drops the label and keeps the rest;
    `Condition(mask=False)` drops the context.

    Attributes:
        label: integers [b]. The index num_classes of a network is its null label, which None means
            too.
        vector: floats [b, k], such as the pooled embedding of a text.
        aligned: floats [b, *sites, k] at the sites of x [b, *sites, c], such as a mask or a
            low-resolution image resized to x; they join the channels of x.
        context: floats [b, m, k], tokens that the network attends to.
        mask: [b, m] bool, which tokens of the context are valid; None: all. A row without a valid
            token has no context.
        valid: [b, n] bool, which tokens of x [b, n, d] exist; None: all. What stands in the others,
            the padding, changes nothing for those that exist, and is 0 in the output. A row without
            a valid token is 0 throughout.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> from jflow.types import Condition
        >>> x, t, mask = jnp.ones((1, 4, 4, 3)), jnp.zeros(1), jnp.ones((1, 4, 4, 1))
        >>> cond = Condition(label=jnp.array([2]), aligned=mask)
        >>> net = nets.UNet(channels=8, num_classes=10)
        >>> shapes = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)
        >>> shapes["params"]["aligned"]["kernel"].shape  # zeros at first
        (3, 3, 1, 8)
    """

    label: Any = None
    vector: Any = None
    aligned: Any = None
    context: Any = None
    mask: Any = None
    valid: Any = None


Metrics = Mapping[str, Array]
"""What a loss reports beside its value, by name."""

NumberOrFunction = ArrayLike | Callable[..., Any]
"""A number, or a function that gives one where it is needed.

It is a function of the times t [b] -> [b] for a scale of guidance or the noise of a step, of the
condition -> [b] for a share of guidance in training, and of the number of updates -> a number for
the decay of an average.
"""


_Noun = TypeVar("_Noun", bound=type)


def _picklable(noun: _Noun) -> _Noun:
    """Let a tuple of closures be copied and pickled: a copy is the tuple itself."""
    own = {
        "__copy__": lambda self: self,
        "__deepcopy__": lambda self, memo: self,
        "__reduce__": _reduce,
    }
    for name, method in own.items():
        setattr(noun, name, method)
    _NOUNS.append(noun)
    return noun


def _reduce(noun: tuple) -> tuple:
    """How pickle saves a noun: as bytes of cloudpickle, which saves closures by their code."""
    try:
        import cloudpickle
    except ImportError:
        raise TypeError(
            f"{type(noun).__name__}: expected cloudpickle to be installed, because the functions of"
            " a noun are closures, which pickle alone cannot save; or save the params"
            " (jflow.train.checkpoint) and make the noun anew"
        ) from None

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, value):  # nouns within nouns keep their identity
            if type(value) in _NOUNS:
                return type(value), tuple(value)
            return super().reducer_override(value)

    file = io.BytesIO()
    Pickler(file).dump(noun)
    return cloudpickle.loads, (file.getvalue(),)


_NOUNS: list[type] = []


@runtime_checkable
class InitMap(Protocol):
    """The `init` of a `Bijector` or a `Transport`."""

    def __call__(
        self, key: Key, x: Float[Array, "b *event"], cond: Cond = None, *, side: str = "data"
    ) -> Params: ...


@runtime_checkable
class ApplyMap(Protocol):
    """The `forward` or the `inverse` of a `Bijector`, a `Transport` or a `Flow`."""

    def __call__(
        self,
        params: Params,
        x: Float[Array, "b *event"],
        cond: Cond = None,
        *,
        key: Key | None = None,
    ) -> tuple[Float[Array, "b *event"], Float[Array, " b"]]: ...


@runtime_checkable
class PullbackMap(Protocol):
    """The `pullback` of a `Bijector`."""

    def __call__(
        self,
        direction: str,
        params: Params,
        y: Float[Array, "b *event"],
        cotangents: tuple[Float[Array, "b *event"], Float[Array, " b"]],
        cond: Cond = None,
        *,
        key: Key | None = None,
    ) -> tuple[Float[Array, "b *event"], tuple[Params, Float[Array, "b *event"], Cond]]: ...


@_picklable
class Bijector(NamedTuple):
    """An invertible map with a tractable log-determinant; the same fields for all of them.

    The log-determinant that `forward` and `inverse` return is log |det d output / d input| of the
    map just applied, [b], in nats, so that those of the two directions cancel. It is float32 at
    least. Rows do not depend on one another. An output has the type of its input, and may have
    another event shape of as many numbers.

    `bijectors.check` tries a bijector of your own against these promises.

    Attributes:
        init: `init(key, x, cond=None, *, side="data") -> params`. x [b, *event] is a batch as this
            map meets it on that side: 'data' is what `inverse` receives, 'source' is what `forward`
            receives. Data-dependent layers look at its values, the others at its shape and type.
        forward: `forward(params, z, cond=None, *, key=None) -> (x, log_det)`, from the source to
            the data.
        inverse: `inverse(params, x, cond=None, *, key=None) -> (z, log_det)`, from the data to the
            source.
        pullback: the derivative of `forward` or `inverse` from its output alone, for stacks that
            are trained reversibly (`bijectors.scan(..., reversible=True)`); optional.
            `pullback(direction, params, y, cotangents, cond=None, *, key=None) -> (x, (params_bar,
            x_bar, cond_bar))`, where direction is 'forward' or 'inverse', y is the output of that
            direction, cotangents are those of (y, log_det), and x is the input that gave y. None
            means the other direction, then `jax.vjp` at x.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> from jflow.types import Bijector
        >>> def init(key, x, cond=None, *, side="data"):
        ...     return {"shift": jnp.zeros(x.shape[1:])}
        >>> def forward(params, z, cond=None, *, key=None):
        ...     return z + params["shift"], jnp.zeros(z.shape[0])
        >>> def inverse(params, x, cond=None, *, key=None):
        ...     return x - params["shift"], jnp.zeros(x.shape[0])
        >>> shift = Bijector(init, forward, inverse)
        >>> bijectors.check(shift, jax.random.normal(jax.random.key(0), (3, 2)))
    """

    init: InitMap
    forward: ApplyMap
    inverse: ApplyMap
    pullback: PullbackMap | None = None


@_picklable
class Transport(NamedTuple):
    """A stochastic layer or a surjection, whose `log_det` is a contribution to the likelihood.

    The fields are those of a `Bijector`. What `inverse` returns in the place of a log-determinant
    is its contribution to the likelihood,
    [b], in nats, for the z that it drew: the expectation over keys of log p_source(z) +
    contribution is at most log p_data(x). The contribution of `forward` is minus that of `inverse`
    for the same pair (z, x). A flow over a transport has an `elbo` and no `log_prob`
    (`flows.elbo_flow`).

    Attributes:
        init: `init(key, x, cond=None, *, side="data") -> params`; x [b, *event] is a batch as this
            layer meets it on that side, see `Bijector`.
        forward: `forward(params, z, cond=None, *, key=None) -> (x, contribution)`, from the source
            to the data. A stochastic direction needs the key.
        inverse: `inverse(params, x, cond=None, *, key=None) -> (z, contribution)`, from the data to
            the source. A stochastic direction needs the key.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> dequantize = bijectors.uniform_dequantization(4)
        >>> levels = jnp.array([[0.0, 3.0]])
        >>> z, contribution = dequantize.inverse({}, levels, key=jax.random.key(0))
        >>> (4 * z).astype(int)
        Array([[0, 3]], dtype=int32)
        >>> round(float(contribution[0]), 3)  # -2 log 4
        -2.773
    """

    init: InitMap
    forward: ApplyMap
    inverse: ApplyMap


@runtime_checkable
class ApplyElementwise(Protocol):
    """The `forward` or the `inverse` of an `Elementwise`."""

    def __call__(
        self, x: Float[Array, "*shape"], raw: Float[Array, "*shape size"]
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]: ...


@_picklable
class Elementwise(NamedTuple):
    """A monotone scalar map that a coupling or an autoregressive layer applies to each dimension.

    A network gives `size` raw numbers for each dimension; the map decides what they mean. raw = 0
    is the identity, so that layers whose last kernel starts at zero start as the identity.

    Attributes:
        size: how many raw numbers a dimension takes.
        forward: `forward(x, raw) -> (y, log_slope)` with x, y and log_slope [...] and raw [...,
            size]; log_slope is log dy/dx.
        inverse: `inverse(y, raw) -> (x, log_slope)`, where log_slope is that of the inverse, log
            dx/dy.
        columns: a pair (forward, inverse) of kernels for the d numbers of n rows at once, which
            couplings prefer (`kernels.columns`); optional. Each is (x [d, n], raw [size, d, n]) ->
            (y [d, n], log_slope summed over d [n]).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.types import Elementwise
        >>> scale = Elementwise(
        ...     1,
        ...     lambda x, raw: (x * jnp.exp(raw[..., 0]), raw[..., 0]),
        ...     lambda y, raw: (y * jnp.exp(-raw[..., 0]), -raw[..., 0]),
        ... )
        >>> y, log_slope = scale.forward(jnp.array([3.0]), jnp.log(jnp.array([[2.0]])))
        >>> round(float(y[0]), 3), round(float(log_slope[0]), 3)  # log 2
        (6.0, 0.693)
    """

    size: int
    forward: ApplyElementwise
    inverse: ApplyElementwise
    columns: tuple[ApplyElementwise, ApplyElementwise] | None = None


@runtime_checkable
class InitDistribution(Protocol):
    """The `init` of a `Distribution` or a `Flow`."""

    def __call__(self, key: Key, x: Float[Array, "b *event"], cond: Cond = None) -> Params: ...


@runtime_checkable
class LogProb(Protocol):
    """The `log_prob` of a `Distribution` or a `Flow`."""

    def __call__(
        self,
        params: Params,
        x: Float[Array, "b *event"],
        cond: Cond = None,
        *,
        key: Key | None = None,
    ) -> Float[Array, " b"]: ...


@runtime_checkable
class Sample(Protocol):
    """The `sample` of a `Distribution` or a `Flow`."""

    def __call__(
        self, params: Params, key: Key, n: int, cond: Cond = None
    ) -> Float[Array, "n *event"]: ...


@runtime_checkable
class SampleAndLogProb(Protocol):
    """The `sample_and_log_prob` of a `Flow`."""

    def __call__(
        self, params: Params, key: Key, n: int, cond: Cond = None
    ) -> tuple[Float[Array, "n *event"], Float[Array, " n"]]: ...


@_picklable
class Distribution(NamedTuple):
    """A probability distribution of x [*event], given cond or not.

    Attributes:
        init: `init(key, x, cond=None) -> params`; x [b, *event] is a batch of what is modeled, of
            which some distributions take their first mean and spread.
        log_prob: `log_prob(params, x, cond=None, *, key=None) -> [b]`, log p(x | cond) in nats;
            -inf outside the support.
        sample: `sample(params, key, n, cond=None) -> [n, *event]`; n is a static integer, and the
            leaves of cond lead with n.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow.types import Distribution
        >>> exponential = Distribution(
        ...     lambda key, x, cond=None: {"log_rate": jnp.zeros(x.shape[1:])},
        ...     lambda params, x, cond=None, *, key=None: jnp.sum(
        ...         params["log_rate"] - jnp.exp(params["log_rate"]) * x, axis=-1
        ...     ),
        ...     lambda params, key, n, cond=None: jax.random.exponential(
        ...         key, (n, *params["log_rate"].shape)
        ...     ) * jnp.exp(-params["log_rate"]),
        ... )
        >>> x = jnp.ones((1, 2))
        >>> exponential.log_prob(exponential.init(jax.random.key(0), x), x)
        Array([-2.], dtype=float32)
    """

    init: InitDistribution
    log_prob: LogProb
    sample: Sample


@_picklable
class Flow(NamedTuple):
    """A `Distribution` together with the map that makes it: x = forward(z) for z from a base.

    Params are {'bijector', 'base'}, for a continuous flow {'velocity', 'base'}. `flows.flow` makes
    one of a bijector and a base, `flows.cnf` of a velocity and a base.

    Attributes:
        init: `init(key, x, cond=None) -> params`; x [b, *event] is a batch of data.
        log_prob: `log_prob(params, x, cond=None, *, key=None) -> [b]`, log p(x | cond) in nats. A
            key switches on what is random inside the map, such as dropout or an estimate of the
            log-determinant.
        sample: `sample(params, key, n, cond=None) -> [n, *event]`; n is a static integer, and the
            leaves of cond lead with n.
        sample_and_log_prob: `sample_and_log_prob(params, key, n, cond=None) -> (x [n, *event], log
            p(x | cond) [n])`, in one pass of `forward`.
        forward: `forward(params, z, cond=None, *, key=None) -> (x, log_det)`, from the base to the
            data, as in `Bijector`.
        inverse: `inverse(params, x, cond=None, *, key=None) -> (z, log_det)`, from the data to the
            base, as in `Bijector`.
    """

    init: InitDistribution
    log_prob: LogProb
    sample: Sample
    sample_and_log_prob: SampleAndLogProb
    forward: ApplyMap
    inverse: ApplyMap


@runtime_checkable
class Elbo(Protocol):
    """The `elbo` of an `ElboFlow`."""

    def __call__(
        self,
        params: Params,
        x: Float[Array, "b *event"],
        cond: Cond = None,
        *,
        key: Key | None = None,
    ) -> Float[Array, " b"]: ...


@_picklable
class ElboFlow(NamedTuple):
    """A `Transport` over a base: what it knows of log p(x) is a lower bound.

    Params are {'bijector', 'base'}. `flows.elbo_flow` makes one.

    Attributes:
        init: `init(key, x, cond=None) -> params`; x [b, *event] is a batch of data.
        elbo: `elbo(params, x, cond=None, *, key) -> [b]`, in nats, whose expectation over keys is
            at most log p(x | cond).
        sample: `sample(params, key, n, cond=None) -> [n, *event]`; n is a static integer, and the
            leaves of cond lead with n.
        forward: `forward(params, z, cond=None, *, key=None) -> (x, contribution)`, from the base to
            the data, as in `Transport`.
        inverse: `inverse(params, x, cond=None, *, key=None) -> (z, contribution)`, from the data to
            the base, as in `Transport`.
    """

    init: InitDistribution
    elbo: Elbo
    sample: Sample
    forward: ApplyMap
    inverse: ApplyMap


@runtime_checkable
class InitField(Protocol):
    """The `init` of a `Field` or a `Velocity`."""

    def __call__(self, key: Key, x: PyTree, t: PyTree, cond: Cond = None) -> Params: ...


@runtime_checkable
class ApplyField(Protocol):
    """The `apply` of a `Field` or a `Velocity`."""

    def __call__(
        self,
        params: Params,
        x: PyTree,
        t: PyTree,
        cond: Cond = None,
        *,
        key: Key | None = None,
    ) -> PyTree: ...


@_picklable
class Field(NamedTuple):
    """A network of a point and a time, whatever it returns: logits, a mixture, (mean, std) ...

    `field(module)` lifts a Linen module.

    Attributes:
        init: `init(key, x, t, cond=None) -> params`; x [b, *event] or a pytree of such arrays, t
            [b].
        apply: `apply(params, x, t, cond=None, *, key=None) -> pytree` whose leaves lead with b. t
            is [b], or for some networks [b, ...] along the leading axes of x, or a dict of the
            times of each part of a dict x. A key switches dropout on.
    """

    init: InitField
    apply: ApplyField


@_picklable
class Velocity(NamedTuple):
    """A `Field` whose output is shaped like x: dx/dt at (x, t).

    `velocity(module)` lifts a Linen module.

    Attributes:
        init: `init(key, x, t, cond=None) -> params`; x [b, *event] or a pytree of such arrays, t
            [b].
        apply: `apply(params, x, t, cond=None, *, key=None) -> dx/dt`, with the structure, shapes
            and types of x. t is [b], or for some networks [b, n] along their tokens, or a dict of
            the times of each part of a dict x. A key switches dropout on.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> from jflow.types import Velocity
        >>> upwards = Velocity(
        ...     lambda key, x, t, cond=None: {},
        ...     lambda params, x, t, cond=None, *, key=None: jnp.ones_like(x),
        ... )
        >>> x, _ = solvers.sample(upwards, {}, jnp.zeros((1, 2)), method=2)
        >>> x
        Array([[1., 1.]], dtype=float32)
    """

    init: InitField
    apply: ApplyField


@runtime_checkable
class InitFlowMap(Protocol):
    """The `init` of a `FlowMap`."""

    def __call__(
        self,
        key: Key,
        x: PyTree,
        t: Float[Array, " b"],
        r: Float[Array, " b"],
        cond: Cond = None,
    ) -> Params: ...


@runtime_checkable
class ApplyFlowMap(Protocol):
    """The `apply` of a `FlowMap`."""

    def __call__(
        self,
        params: Params,
        x: PyTree,
        t: Float[Array, " b"],
        r: Float[Array, " b"],
        cond: Cond = None,
        *,
        key: Key | None = None,
    ) -> PyTree: ...


@_picklable
class FlowMap(NamedTuple):
    """A network of a point and two times: where the flow goes from t to r, or its mean velocity.

    Which of the two it returns is said by the function that makes or takes it. `flow_map(module)`
    lifts a Linen module, read as the average velocity, (x_r - x_t) / (r - t).

    Attributes:
        init: `init(key, x, t, r, cond=None) -> params`; x [b, *event] or a pytree of such arrays, t
            and r [b].
        apply: `apply(params, x, t, r, cond=None, *, key=None) -> pytree` shaped like x: x carried
            from time t to time r, or the average velocity between the two. A key switches dropout
            on.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles
        >>> carry = oracles.as_flow_map(oracles.gaussian([0.0], 9.0))
        >>> carry.apply({}, jnp.ones((1, 1)), 0.0, 1.0)  # noise of variance 1, data of variance 9
        Array([[3.]], dtype=float32)
    """

    init: InitFlowMap
    apply: ApplyFlowMap


@_picklable
class Adapter(NamedTuple):
    """A small change of a trained model's params, with params of its own.

    Both functions are pure. There are two kinds, which no function has to tell apart. An adapter of
    weights returns a base of the same form, with other numbers. An adapter of activations returns
    the base with functions beside the params of modules, which run around the calls of these
    modules (`adapters.on_modules`); every network of Flax that jflow lifted heeds them.

    Attributes:
        init: `init(key, base) -> params`, where base is the trained params, or their shapes.
        apply: `apply(base, params) -> base`, the params with which the model runs adapted.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow.types import Adapter
        >>> shift = Adapter(
        ...     lambda key, base: {"by": jnp.zeros(())},
        ...     lambda base, params: jax.tree.map(lambda w: w + params["by"], base),
        ... )
        >>> shift.apply({"w": jnp.ones(1)}, {"by": 2.0})
        {'w': Array([3.], dtype=float32)}
    """

    init: Callable[[Key, Params], Params]
    apply: Callable[[Params, Params], Params]


@runtime_checkable
class PathFn(Protocol):
    """The `point` or the `target` of a `Path`."""

    def __call__(
        self,
        x0: Float[Array, "b *event"],
        x1: Float[Array, "b *event"],
        t: Float[Array, " b"],
        *,
        key: Key | None = None,
    ) -> Float[Array, "b *event"]: ...


@_picklable
class Path(NamedTuple):
    """An interpolation between a source x0 and data x1, and what a velocity learns on it.

    With the same key `point` and `target` speak of the same draw, where a path has noise of its
    own.

    Attributes:
        point: `point(x0, x1, t, *, key=None) -> x_t` with x0, x1 and x_t [b, *event] and t [b].
        target: `target(x0, x1, t, *, key=None) -> [b, *event]`, what a velocity at x_t regresses
            on, d x_t / dt.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import paths
        >>> path = paths.linear()
        >>> x0, x1, t = jnp.zeros((1, 2)), 4 * jnp.ones((1, 2)), jnp.array([0.25])
        >>> path.point(x0, x1, t), path.target(x0, x1, t)
        (Array([[1., 1.]], dtype=float32), Array([[4., 4.]], dtype=float32))
    """

    point: PathFn
    target: PathFn


ManifoldFn = Callable[..., Array]
"""A function of points and tangent vectors of a `Manifold`, batched over any leading axes."""


@_picklable
class Manifold(NamedTuple):
    """A Riemannian manifold: pure functions of points and of tangent vectors.

    A point is an array [*shape] of coordinates, such as a unit vector, a rotation matrix or a list
    of angles; a tangent vector has the same shape, the derivative of a curve of points. All
    functions but `random` take any leading axes, [..., *shape], and none of them is NaN, in value
    or gradient, where two points coincide. Lengths are in the units of the metric.

    Attributes:
        shape: the shape of a point.
        dim: d, the dimension of the manifold, at most the size of a point.
        exp: `exp(x, v) -> [..., *shape]`, the point that the geodesic from x with velocity v
            reaches at time 1.
        log: `log(x, y) -> [..., *shape]`, the shortest v with exp(x, v) = y. Where several are
            shortest (an antipode) it is one of them.
        dist: `dist(x, y) -> [...]`, the length of the shortest geodesic, with gradient 0 where x =
            y.
        project: `project(x) -> [..., *shape]`, the nearest point to an array of numbers, or the
            nearest in the sense that the constructor says; a point stays as it is.
        to_tangent: `to_tangent(x, v) -> [..., *shape]`, the tangent vector at x that is nearest to
            v.
        inner: `inner(x, u, v) -> [...]`, the metric, of two tangent vectors at x.
        tangent_basis: `tangent_basis(x) -> [..., d, *shape]`, tangent vectors at x that are
            orthonormal in the metric.
        random: `random(key, n) -> [n, *shape]`, points from the uniform law, or, where the volume
            is infinite, from the law that the constructor names.
        log_volume: the logarithm of the volume, in nats; inf where it is infinite.
        log_det_exp: `log_det_exp(x, v) -> [...]`, log |det d exp_x(v) / dv| in orthonormal bases,
            in nats; 0 where the space is flat.
        log_volume_element: `log_volume_element(x) -> [...]`, the logarithm of the volume of the
            metric over that of the coordinates, in nats, up to a constant; 0 for an embedding that
            keeps lengths. The divergence of a tangent field v is sum_i inner(x, e_i, dv(x)[e_i]) +
            d log_volume_element(x)[v], with e_i of `tangent_basis`.
        embed: `embed(x) -> [..., k]` or of another shape, smooth coordinates in which x has one
            value alone, such as the cosines and sines of angles: what networks are shown
            (`manifolds.tangent`).
        injective: where exp(x, .) is one to one up to a null set and reaches every point, as balls
            (size, radius) of successive coordinates in `tangent_basis`, whose product it is; ()
            where it is not of this form.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import manifolds
        >>> sphere = manifolds.sphere(2)
        >>> north, east = jnp.array([0.0, 0.0, 1.0]), jnp.array([1.0, 0.0, 0.0])
        >>> round(float(sphere.dist(north, east)), 4)  # a quarter of a turn
        1.5708
    """

    shape: tuple[int, ...]
    dim: int
    exp: ManifoldFn
    log: ManifoldFn
    dist: ManifoldFn
    project: ManifoldFn
    to_tangent: ManifoldFn
    inner: ManifoldFn
    tangent_basis: ManifoldFn
    random: Callable[[Key, int], Array]
    log_volume: float
    log_det_exp: ManifoldFn
    log_volume_element: ManifoldFn
    embed: ManifoldFn
    injective: tuple[tuple[int, float], ...] = ()


@_picklable
class Domain(NamedTuple):
    """A closed convex set, by the maps that bring a point into it.

    Both maps leave a point inside where it is, act on the last axes of x, [..., *event], and have
    an output inside the set up to rounding.

    Attributes:
        reflect: x -> x, the mirror image of a point outside at the boundary, repeated until it is
            inside.
        project: x -> x, the nearest point of the set.
        uniform: the uniform distribution on the set, params {}; None where none is known.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow.types import Domain
        >>> positive = Domain(jnp.abs, lambda x: jnp.maximum(x, 0))
        >>> positive.reflect(jnp.array([-2.0])).tolist()
        [2.0]
    """

    reflect: Callable[[Array], Array]
    project: Callable[[Array], Array]
    uniform: Distribution | None = None


@_picklable
class Premetric(NamedTuple):
    """A distance on a triangle mesh, down along which a path goes (`paths.premetric`).

        d(x, y)^2 = sum_k weights_k (phi_k(x) - phi_k(y))^2

    with the eigenfunctions phi_k of the mesh; see `manifolds.biharmonic`.

    Attributes:
        mesh: the mesh, a `manifolds.Mesh`.
        weights: of the eigenfunctions, [k], at least 0.
        dist: `dist(x, y) -> [...]` of points [..., 3]; its gradient is 0 where x = y.
        descend: `descend(x0, x1, t, steps) -> (x, velocity)`, [b, 3] each, of x0 and x1 [b, 3], t
            [b] and a number of steps.
    """

    mesh: Any
    weights: Any
    dist: Callable[[Array, Array], Array]
    descend: Callable[[Array, Array, Array, int], tuple[Array, Array]]


@runtime_checkable
class Coupling(Protocol):
    """A function that pairs the rows of two batches, as indices, so that labels can follow.

    `couplings.pair` makes it a `BatchTransform`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import couplings
        >>> nearest = couplings.optimal_transport()
        >>> x0, x1 = jnp.array([[0.0], [5.0]]), jnp.array([[6.0], [1.0]])
        >>> i, j = nearest(jax.random.key(0), x0, x1)
        >>> jnp.sort(jnp.abs(x0[i] - x1[j]).ravel())
        Array([1., 1.], dtype=float32)
    """

    def __call__(
        self,
        key: Key,
        x0: Float[Array, "b *event"],
        x1: Float[Array, "b *event"],
        cond: Cond = None,
    ) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
        """Pair the rows.

        Args:
            key: for couplings that draw.
            x0: the source, [b, *event].
            x1: the data, [b, *event].
            cond: the conditions of x1, for couplings that look at them.

        Returns:
            (i, j), each [b]: x0[i[k]] and x1[j[k]] are a pair.
        """
        ...


@runtime_checkable
class Time(Protocol):
    """A law of training times: a function that draws n times in [0, 1]; see `jflow.times`."""

    def __call__(self, key: Key, n: int) -> Float[Array, " n"]:
        """Draw times.

        Args:
            key: what to draw with.
            n: how many; static.

        Returns:
            Times [n] in [0, 1].
        """
        ...


@runtime_checkable
class PartTimes(Protocol):
    """A law of times of parts: a function that draws n times in [0, 1] for each part of x."""

    def __call__(self, key: Key, n: int) -> Mapping[str, Float[Array, " n"]]:
        """Draw times.

        Args:
            key: what to draw with.
            n: how many of each; static.

        Returns:
            Times [n] in [0, 1] by the names of the parts.
        """
        ...


@runtime_checkable
class TimePair(Protocol):
    """A law of pairs of times for flow maps: a function that draws n pairs 0 <= t <= r <= 1."""

    def __call__(self, key: Key, n: int) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Draw pairs of times.

        Args:
            key: what to draw with.
            n: how many; static.

        Returns:
            (t, r), each [n], with 0 <= t <= r <= 1.
        """
        ...


@runtime_checkable
class Step(Protocol):
    """One stochastic step between two times of a grid; `solvers.sample_sde` scans it over a grid.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import oracles, solvers
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0], 1.0))
        >>> step = solvers.ancestral(velocity)
        >>> x, mean, std = step({}, jnp.ones((2, 1)), jnp.array(0.0), jnp.array(0.5), None)
        >>> mean.shape, bool(jnp.all(x == mean))
        ((2, 1), True)
    """

    def __call__(
        self, params: Params, x: Array, t: Array, t_next: Array, key: Key, cond: Cond = None
    ) -> tuple[Array, Array, Array]:
        """Take the step.

        Args:
            params: those of the network inside.
            x: the state at t, [b, *event].
            t: a scalar or [b].
            t_next: a scalar or [b].
            key: what the noise of the step is drawn with. With None x_next is the mean, where a
                step allows it.
            cond: as the network takes it.

        Returns:
            (x_next, mean, std): the state at t_next [b, *event], and the mean [b, *event] and the
                standard deviation of the normal law that it was drawn from; std is [b], or
                broadcasts to x. Of tokens both are [b, *event, V], those of the one-hot vectors of
                x_next: the mean holds the probabilities that each token was drawn from.
        """
        ...


@runtime_checkable
class BatchTransform(Protocol):
    """What is done to a batch before a loss sees it: pairing, a source, dropped conditions, noise.

    `losses.chain` puts transforms in front of a loss. A transform has no params: what learns is in
    the loss. 'dropped' [b] bool, which `losses.drop_cond` writes, says which rows were given null
    in the place of their cond; guided losses read it and all others accept it.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, velocity
        >>> from jflow.nets import TimeMLP
        >>> def centered(key, batch, frozen=None):
        ...     return {**batch, "x": batch["x"] - jnp.mean(batch["x"], axis=0)}
        >>> loss = losses.chain(centered, losses.flow_matching(velocity(TimeMLP((4,)))))
    """

    def __call__(
        self, key: Key, batch: Mapping[str, PyTree], frozen: Mapping[str, PyTree] | None = None
    ) -> Mapping[str, PyTree]:
        """Transform the batch.

        Args:
            key: for transforms that draw.
            batch: the batch, a dict as a `Loss` takes it.
            frozen: what the loss gets as `frozen`.

        Returns:
            A new dict, which the loss or the next transform takes; `batch` is left as it is.
        """
        ...


@runtime_checkable
class Loss(Protocol):
    """An objective: a function of params, a key and a batch that returns a scalar and metrics.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, oracles
        >>> velocity = oracles.as_velocity(oracles.gaussian([0.0, 0.0], 1.0))
        >>> loss = losses.flow_matching(velocity)
        >>> value, metrics = loss({}, jax.random.key(0), {"x": jnp.zeros((8, 2))})
        >>> value.shape, metrics
        ((), {})
    """

    def __call__(
        self,
        params: Params,
        key: Key,
        batch: Mapping[str, PyTree],
        frozen: Mapping[str, PyTree] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Evaluate the objective.

        Args:
            params: what is trained.
            key: what times, noise and dropout are drawn with.
            batch: a dict with 'x' [b, *event] data, and optionally 'x0' [b, *event], the source
                that each row is paired with, 'cond', 'weight' [b], with which the mean over rows is
                weighted (a row of weight 0 counts nothing, whatever it holds), and 'dropped' [b],
                see `BatchTransform`.
            frozen: a dict of what is never differentiated, such as 'ema', 'teacher', 'reference'
                and 'buffers'; None for losses that read none of it.

        Returns:
            (value, metrics): a scalar, and a dict of what else is worth recording.
        """
        ...
