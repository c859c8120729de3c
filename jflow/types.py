"""The nouns of jflow: tuples of pure functions that compose.

Time runs from t=0 (source, noise) to t=1 (data); `forward` goes from source to data. Every array has one leading batch
axis, then `*event`. `log_det` and `log_prob` are [b], in nats. `params` are nested dicts of trainable floats and nothing
else. `key=None` means deterministic; a function that needs randomness and gets no key raises. A method is a function
that returns one of these tuples, or a `Loss`.

A key is consumed once: a function splits the key that it gets and hands each part to one consumer, and never folds a number
into a key that it also passes on, for split(key, n)[i] and fold_in(key, i) are the same bits. `fold_in(state.key,
state.step)` is the one exception, at the root of a training step; `jax.random.clone` says that the same draws are wanted
once more. A seed of numpy's is told apart by purpose (`jflow._core.seeds`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jax.typing import ArrayLike

Array = jax.Array
Key = jax.Array  # a jax.random.key
PyTree = Any
Params = Mapping[str, Any]
Cond = Any  # None, an array [b, ...] or a pytree of them; one row, [1, ...], is for all rows
Metrics = Mapping[str, Array]
NumberOrFunction = ArrayLike | Callable[..., Any]
"""A number, or a function that gives one where it is needed.

It is a function of the times t [b] -> [b] for a scale of guidance or the noise of a step, of the
condition -> [b] for a share of guidance in training, and of the number of updates -> a number for
the decay of an average."""


class InitMap(Protocol):
    def __call__(self, key: Key, x: Array, cond: Cond = None, *, side: str = "data") -> Params: ...


class ApplyMap(Protocol):
    def __call__(
        self, params: Params, x: Array, cond: Cond = None, *, key: Key | None = None
    ) -> tuple[Array, Array]: ...


class PullbackMap(Protocol):
    def __call__(
        self,
        direction: str,
        params: Params,
        y: Array,
        cotangents: tuple[Array, Array],
        cond: Cond = None,
        *,
        key: Key | None = None,
    ) -> tuple[Array, tuple[Params, Array, Cond]]: ...


class Bijector(NamedTuple):
    """An invertible map, the same fields for all of them; `bijectors.check` tries one of your own.

    init(key, x, cond=None, *, side='data') -> params; x [b, *event] as this map meets it on that side ('data': what
        `inverse` receives, 'source': what `forward` receives).
    forward(params, z, cond=None, *, key=None) -> (x, log_det): source to data.
    inverse(params, x, cond=None, *, key=None) -> (z, log_det): data to source.
    log_det [b] is log |det d output / d input| of the map just applied, in nats.
    pullback, optional: the derivative of `forward` or `inverse` from its output y alone, for reversible stacks. With
        cotangents the cotangents of (y, log_det): pullback('forward' or 'inverse', params, y, cotangents, cond=None, *,
        key=None) -> (x, (params_bar, x_bar, cond_bar)), x the input that gave y. None: the other direction, then jax.vjp
        at x.
    """

    init: InitMap
    forward: ApplyMap
    inverse: ApplyMap
    pullback: PullbackMap | None = None


class Transport(NamedTuple):
    """A stochastic layer or a surjection: a `Bijector` whose `log_det` is read as a contribution to the likelihood.

    E over keys of [log p_source(z) + inverse's contribution] <= log p_data(x); forward's contribution is minus that of
    the inverse for the same pair (z, x)."""

    init: InitMap
    forward: ApplyMap
    inverse: ApplyMap


class ApplyElementwise(Protocol):
    def __call__(self, x: Array, raw: Array) -> tuple[Array, Array]: ...


class Elementwise(NamedTuple):
    """A monotone scalar map that a coupling or autoregressive layer applies to each dimension.

    forward(x [...], raw [..., size]) -> (y [...], log_slope [...]); inverse likewise, with the slope of the inverse.
    `size` is the count of raw numbers a dimension takes; raw = 0 is the identity.
    columns, optional: (forward, inverse) as kernels, x [d, n], raw [size, d, n] -> (y [d, n], log_slope summed over d [n]),
        the d numbers of n rows; couplings prefer it (`kernels.columns`).
    """

    size: int
    forward: ApplyElementwise
    inverse: ApplyElementwise
    columns: tuple[ApplyElementwise, ApplyElementwise] | None = None


class InitDistribution(Protocol):
    def __call__(self, key: Key, x: Array, cond: Cond = None) -> Params: ...


class LogProb(Protocol):
    def __call__(
        self, params: Params, x: Array, cond: Cond = None, *, key: Key | None = None
    ) -> Array: ...


class Sample(Protocol):
    def __call__(self, params: Params, key: Key, n: int, cond: Cond = None) -> Array: ...


class SampleAndLogProb(Protocol):
    def __call__(
        self, params: Params, key: Key, n: int, cond: Cond = None
    ) -> tuple[Array, Array]: ...


class Distribution(NamedTuple):
    """init(key, x, cond=None) -> params; log_prob(params, x, cond=None, *, key=None) -> [b] nats;
    sample(params, key, n, cond=None) -> [n, *event], n static, the leaves of cond lead with n."""

    init: InitDistribution
    log_prob: LogProb
    sample: Sample


class Flow(NamedTuple):
    """A `Distribution` together with its map; params {'bijector', 'base'}, for a continuous flow {'velocity', 'base'}."""

    init: InitDistribution
    log_prob: LogProb
    sample: Sample
    sample_and_log_prob: SampleAndLogProb
    forward: ApplyMap
    inverse: ApplyMap


class Elbo(Protocol):
    def __call__(
        self, params: Params, x: Array, cond: Cond = None, *, key: Key | None = None
    ) -> Array: ...


class ElboFlow(NamedTuple):
    """A `Transport` over a base: what it knows of log p(x) is a bound, an expectation over keys of

    elbo(params, x, cond=None, *, key) -> [b] nats. `init`, `sample`, `forward` and `inverse` are as in `Flow`, but for
    the key that the stochastic direction needs. Params {'bijector', 'base'}."""

    init: InitDistribution
    elbo: Elbo
    sample: Sample
    forward: ApplyMap
    inverse: ApplyMap


class InitField(Protocol):
    def __call__(self, key: Key, x: PyTree, t: Array, cond: Cond = None) -> Params: ...


class ApplyField(Protocol):
    def __call__(
        self, params: Params, x: PyTree, t: Array, cond: Cond = None, *, key: Key | None = None
    ) -> PyTree: ...


class Field(NamedTuple):
    """A network of (x, t): logits, mixtures, (mean, std) ...

    init(key, x, t, cond=None) -> params; apply(params, x, t, cond=None, *, key=None) -> pytree. t is [b]; a key switches
    dropout on."""

    init: InitField
    apply: ApplyField


class Velocity(NamedTuple):
    """A `Field` whose output is shaped like x: dx/dt at (x, t)."""

    init: InitField
    apply: ApplyField


class InitFlowMap(Protocol):
    def __call__(self, key: Key, x: PyTree, t: Array, r: Array, cond: Cond = None) -> Params: ...


class ApplyFlowMap(Protocol):
    def __call__(
        self,
        params: Params,
        x: PyTree,
        t: Array,
        r: Array,
        cond: Cond = None,
        *,
        key: Key | None = None,
    ) -> PyTree: ...


class FlowMap(NamedTuple):
    """apply(params, x, t, r, cond=None, *, key=None): x carried from time t to time r, or the average velocity between."""

    init: InitFlowMap
    apply: ApplyFlowMap


class PathFn(Protocol):
    def __call__(self, x0: Array, x1: Array, t: Array, *, key: Key | None = None) -> Array: ...


class Path(NamedTuple):
    """point(x0, x1, t, *, key=None) -> x_t; target(x0, x1, t, *, key=None) -> what a velocity at x_t regresses on."""

    point: PathFn
    target: PathFn


class Coupling(Protocol):
    """Pairs rows of two batches, as indices, so that labels and conditions can follow."""

    def __call__(
        self, key: Key, x0: Array, x1: Array, cond: Cond = None
    ) -> tuple[Array, Array]: ...


class Time(Protocol):
    """Draws n times in [0, 1]."""

    def __call__(self, key: Key, n: int) -> Array: ...


class TimePair(Protocol):
    """Draws n pairs of times with 0 <= t <= r <= 1."""

    def __call__(self, key: Key, n: int) -> tuple[Array, Array]: ...


class Step(Protocol):
    """One stochastic step between two times of a grid; returns (x_next, mean, std).

    t and t_next are scalars or [b]; std is [b], or broadcasts to x. With key=None x_next is the mean, where a step allows
    it."""

    def __call__(
        self, params: Params, x: Array, t: Array, t_next: Array, key: Key, cond: Cond = None
    ) -> tuple[Array, Array, Array]: ...


class BatchTransform(Protocol):
    """What is done to a batch before a loss sees it: rows paired, a source made, conditions dropped, noise added.

    (key, batch, frozen=None) -> batch, a new dict that the loss takes; `losses.chain` puts transforms in front of a loss. It
    has no params: what learns is in the loss. 'dropped' [b] bool, which `losses.drop_cond` writes, says which rows were
    told null in place of their cond; guided losses read it and all others accept it."""

    def __call__(
        self, key: Key, batch: Mapping[str, PyTree], frozen: Mapping[str, PyTree] | None = None
    ) -> Mapping[str, PyTree]: ...


class Loss(Protocol):
    """batch is a dict: 'x' data, optionally 'x0' paired source, 'cond', 'weight' [b], 'dropped' [b]. `frozen` is never
    differentiated."""

    def __call__(
        self,
        params: Params,
        key: Key,
        batch: Mapping[str, PyTree],
        frozen: Mapping[str, PyTree] | None = None,
    ) -> tuple[Array, Metrics]: ...
