"""Samples of transition matching: a chain of few steps, each of which draws."""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_cond, check_noun, count_rows, need_key
from jflow._core.conditions import as_condition
from jflow._core.positions import time_features
from jflow._core.sites import Headed, check_features, site_rows
from jflow._core.times import Times, rising_times
from jflow.solvers._integrate import Status
from jflow.solvers._method import Method, as_method, fixed
from jflow.solvers._sample import sample
from jflow.types import Array, Cond, Condition, Distribution, Flow, Key, Params

__all__ = ["TransitionInfo", "sample_kernels", "sample_transitions", "transition_condition"]

_DEFAULT = fixed(16, diffrax.Euler())


class TransitionInfo(NamedTuple):
    """What a chain of transitions cost, row by row.

    Attributes:
        backbone: how often the backbone was evaluated, [b] int32: once a step of the chain.
        head: how often the head was, [b] int32, over all steps: of a row the token that took most.
        status: a `Status`, [b] int32, the worst of any solve; 0 is success.
    """

    backbone: Int[Array, " b"]
    head: Int[Array, " b"]
    status: Int[Array, " b"]


def sample_transitions(
    net: Headed,
    params: Params,
    x0: Float[Array, "b *event"],
    key: Key,
    cond: Cond = None,
    *,
    grid: int | Times | ArrayLike = 16,
    method: Method | int | None = None,
) -> tuple[Float[Array, "b *event"], TransitionInfo]:
    """Sample by difference transition matching (DTM): a drawn velocity for each of a few steps.

        x <- x + (t_next - t) Y,      Y drawn by the head on the features of x at t

    The backbone is evaluated once a step, the head as often as `method` says, for all tokens at
    once: a head that is not much smaller than the backbone makes a step as dear as so many steps of
    an ODE.

    Args:
        net: a backbone and a head trained by `losses.transition_matching`.
        params: its params, {'backbone', 'head'}.
        x0: the source, [b, *event].
        key: a key, for the noise of the head.
        cond: the condition, [b, ...] or one row for all.
        grid: the number of equal steps, or rising times [n + 1] from 0 to 1.
        method: how the head's ODE is solved, from noise at s=0 to Y at s=1, as in
            `solvers.sample`; an int is a number of steps. The default is 16 steps, and the default
            solver `diffrax.Euler()`.

    Returns:
        x1: the samples, [b, *event], in the type of x0; the rows of a failed solve are NaN.
        info: how often the backbone and the head were evaluated, and the status of the solves.

    Raises:
        ValueError: the grid or the method is bad, the features have another form, or the key is
            None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets, solvers
        >>> from jflow.types import Field, Velocity
        >>> backbone = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: x)
        >>> def towards(params, y, s, h=None, *, key=None):  # to the data at 3: Y = (3 - x) / (1-t)
        ...     return (3 - y) / (1 - s[:, None])
        >>> net = nets.headed(backbone, Velocity(lambda *_: {}, towards))
        >>> params, x0 = {"backbone": {}, "head": {}}, jnp.zeros((2, 5, 1))
        >>> x1, info = solvers.sample_transitions(net, params, x0, jax.random.key(0), grid=1)
        >>> x1[0, :, 0].tolist(), info.backbone.tolist(), info.head.tolist()
        ([3.0, 3.0, 3.0, 3.0, 3.0], [1, 1], [16, 16])

    References:
        Shaul, Singer, Gat, Lipman, *Transition Matching: Scalable and Flexible Generative
            Modeling*, 2025, arXiv:2506.23589.
    """
    name = "solvers.sample_transitions"
    need_key(name, key)
    check_noun(name, net, Headed)
    how = as_method(name, method, _DEFAULT)
    n = count_rows(name, x0)
    cond = check_cond(name, cond, n)
    dtype = float_dtype(x0)
    ts = jnp.asarray(rising_times(name, grid), dtype)

    def step(carry, ends):
        x, evaluations, status = carry
        t, t_next, key = ends
        h = net.features(params, x, jnp.broadcast_to(t, (n,)), cond)
        sites = check_features(name, x, h).shape[1:-1]
        z = site_rows(jax.random.normal(key, x.shape, x.dtype), sites)
        y, info = sample(net.velocity, params, z, site_rows(h, sites), method=how)
        most = lambda v: jnp.max(v.reshape(n, -1), axis=1)  # noqa: E731
        x = x + (t_next - t) * y.reshape(x.shape)
        evaluations = evaluations + most(info.evaluations)
        return (x, evaluations, jnp.maximum(status, most(info.status))), None

    none = jnp.zeros_like(x0, shape=(n,), dtype=jnp.int32)
    keys = jax.random.split(key, ts.shape[0] - 1)
    ends = (ts[:-1], ts[1:], keys)
    (x, evaluations, status), _ = jax.lax.scan(step, (x0.astype(dtype), none, none), ends)
    x = jnp.where(expand_to(status == Status.OK, x), x, jnp.nan).astype(x0.dtype)
    return x, TransitionInfo(none + len(keys), evaluations, status)


def transition_condition(
    x: Float[Array, "b n d"], t: Float[Array, " b"], cond: Cond = None
) -> Condition:
    """The condition of a kernel that draws the next state: the tokens of the last, and its time.

    Token i of the next state reads token i of the last (`aligned`) and, by attention, all of them
    (`context`, with sines and cosines of their places behind their numbers); the time, as 16
    features, is behind the `vector`.

    Args:
        x: the last state, [b, n, d].
        t: its time, [b].
        cond: labels [b], a vector [b, k], or a `types.Condition` without a context of its own, of
            which all parts stay; `valid` becomes the mask of the context too.

    Returns:
        Condition: for `nets.CausalTransformer` and other networks of tokens.

    Raises:
        ValueError: x is not [b, n, d], or cond has a context.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import solvers
        >>> cond = solvers.transition_condition(jnp.zeros((2, 5, 3)), jnp.zeros(2), jnp.arange(2))
        >>> cond.label.tolist(), cond.vector.shape, cond.aligned.shape, cond.context.shape
        ([0, 1], (2, 16), (2, 5, 3), (2, 5, 19))
    """
    name = "transition_condition"
    if jnp.ndim(x) != 3:
        raise ValueError(f"{name}: expected x of shape [b, n, d], got {list(jnp.shape(x))}")
    parts = as_condition(name, cond)
    if parts.context is not None:
        raise ValueError(
            f"{name}: expected no cond.context, whose place the last state takes, got one of shape"
            f" {list(jnp.shape(parts.context))}: make the condition by a function of your own"
        )
    b, n, _ = x.shape
    places = time_features(jnp.arange(n, dtype=float_dtype(x)), 16, scale=1.0).astype(x.dtype)
    at = time_features(t, 16, scale=100.0, max_period=1000.0).astype(x.dtype)
    beside = lambda part, more: more if part is None else jnp.concatenate([part, more], -1)  # noqa: E731
    return parts._replace(
        vector=beside(parts.vector, at),
        aligned=beside(parts.aligned, x),
        context=jnp.concatenate([x, jnp.broadcast_to(places[None], (b, n, 16))], -1),
        mask=parts.valid,
    )


def sample_kernels(
    law: Distribution | Flow,
    params: Params,
    x0: Float[Array, "b *event"],
    key: Key,
    cond: Cond = None,
    *,
    grid: int | Times | ArrayLike = 16,
    condition: Callable[..., Cond] = transition_condition,
) -> Float[Array, "b *event"]:
    """Sample a Markov chain whose every state is drawn from a law, given the last one.

        x <- a draw of law(. | condition(x, t, cond))

    With a causal law over tokens (`distributions.causal`), trained on `losses.transition_pairs`,
    this is autoregressive transition matching (ARTM). A kernel that is exact makes samples of the
    data at any number of steps.

    Args:
        law: the law of a state [b, *event] given the condition.
        params: its params.
        x0: the source, [b, *event].
        key: a key.
        cond: the condition of the user, [b, ...] or one row for all.
        grid: the number of equal steps, or rising times [n + 1] from 0 to 1, those of training.
        condition: (x, t [b], cond) -> the condition of the law, that of training.

    Returns:
        The last states, [b, *event], in the type of x0.

    Raises:
        TypeError: law is no `Distribution`.
        ValueError: the grid is bad, or the key is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, solvers
        >>> normal, x0 = distributions.normal((4, 1)), jnp.zeros((2, 4, 1))
        >>> solvers.sample_kernels(normal, {}, x0, jax.random.key(0), grid=2).shape
        (2, 4, 1)

    References:
        Shaul, Singer, Gat, Lipman, *Transition Matching: Scalable and Flexible Generative
            Modeling*, 2025, arXiv:2506.23589.
    """
    name = "solvers.sample_kernels"
    need_key(name, key)
    check_noun(name, law, Distribution, Flow)
    n = count_rows(name, x0)
    cond = check_cond(name, cond, n)
    ts = jnp.asarray(rising_times(name, grid), float_dtype(x0))

    def step(x, at):
        t, key = at
        given = condition(x, jnp.broadcast_to(t, (n,)), cond)
        return law.sample(params, key, n, given).astype(x.dtype), None

    keys = jax.random.split(key, ts.shape[0] - 1)
    return jax.lax.scan(step, x0, (ts[:-1], keys))[0]
