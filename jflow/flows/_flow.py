"""`flow` and `elbo_flow`: a map and a base distribution."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from jflow._core.checks import (
    check_cond,
    check_draws,
    check_event,
    check_key,
    check_noun,
    check_params,
    check_rows,
    check_whole,
    need_key,
)
from jflow._core.keys import split_key
from jflow._core.nouns import base_log_prob, sample_source
from jflow.types import Bijector, Condition, Distribution, ElboFlow, Flow, Transport

__all__ = ["elbo_flow", "flow", "importance_weighted"]


def flow(
    bijector: Bijector, base: Distribution | Flow, *, event_shape: tuple[int, ...] | None = None
) -> Flow:
    """The distribution of x = forward(z) for z from a base: a normalizing flow.

        log p(x) = log p_base(z) + log |det dz/dx|,    z = inverse(x),

    in nats, [b], and -inf outside the support.

    Args:
        bijector: the map, `forward` from the base to the data.
        base: the distribution of z; a flow may be one.
        event_shape: the shape of one x and of one z alike, where it is known: then an x of another
            shape is refused by name.

    Returns:
        Flow: the flow, with params {'bijector', 'base'}. Its `init` wants a batch x [b, *event] of
            data, because data-dependent layers look at it; zeros of that shape do where no layer
            looks. A cond of one row is for all rows. Its functions raise a TypeError for a key or
            params of another kind, and a ValueError for shapes that do not fit, for a log_det or a
            log_prob that is not [b] and, in `init`, for NaN where the values of x are known and
            for a cond that neither the map nor the base looks at.

    Raises:
        TypeError: bijector is not a `Bijector`, or base not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows
        >>> flow = flows.flow(bijectors.affine((2,)), distributions.normal((2,)))
        >>> x = jnp.zeros((3, 2))
        >>> params = flow.init(jax.random.key(0), x)
        >>> round(float(flow.log_prob(params, x)[0]), 3)  # -log(2 pi)
        -1.838
    """
    check_noun("flow", bijector, Bijector)
    check_noun("flow", base, Distribution, Flow)

    def init(key, x, cond=None):
        check_key("flow.init", key)
        x, cond = batch(x, cond)
        _check_data("flow.init", x)
        key_bijector, key_base = jax.random.split(key)
        params = {"bijector": bijector.init(key_bijector, x, cond, side="data")}
        z, _ = inverse(params, x, cond)
        params["base"] = base.init(key_base, z, cond)
        _check_heard("flow.init", lambda cond: log_prob(params, x, cond, key=key), cond)
        return params

    def batch(x, cond):
        return _check_batch("flow", x, cond, event_shape)

    def forward(params, z, cond=None, *, key=None):
        return _map("flow", bijector.forward, params, *batch(z, cond), key)

    def inverse(params, x, cond=None, *, key=None):
        return _map("flow", bijector.inverse, params, *batch(x, cond), key)

    def log_prob(params, x, cond=None, *, key=None):
        x, cond = batch(x, cond)
        key_bijector, key_base = split_key(key, 2)
        z, log_det = inverse(params, x, cond, key=key_bijector)
        return base_log_prob("flow", base, params, z, cond, key_base) + log_det

    def sample(params, key, n, cond=None):
        z, cond = _sample_source(base, params, key, n, cond)
        return forward(params, z, cond)[0]

    def sample_and_log_prob(params, key, n, cond=None):
        z, cond = _sample_source(base, params, key, n, cond)
        x, log_det = forward(params, z, cond)
        return x, base_log_prob("flow", base, params, z, cond, None) - log_det

    return Flow(init, log_prob, sample, sample_and_log_prob, forward, inverse)


def elbo_flow(transport: Transport | Bijector, base: Distribution | Flow) -> ElboFlow:
    """A stochastic map or a surjection over a base: what `flow` is to a bijector.

        elbo(x) = log p_base(z) + contribution,    (z, contribution) = inverse(x) under a key,

    in nats, [b], is a lower bound of log p(x) in expectation over keys, and log p(x) itself over a
    map that draws nothing.

    Args:
        transport: the map, `forward` from the base to the data; a bijector will do.
        base: the distribution of z; a flow may be one.

    Returns:
        ElboFlow: the model, with params {'bijector', 'base'}. Its `init` wants a batch x [b,
            *event] of data, because data-dependent layers look at it. Its functions raise a
            TypeError for a key or params of another kind, and a ValueError for shapes that do not
            fit and, in `init`, for a cond that neither the map nor the base looks at.

    Raises:
        TypeError: transport is not a `Transport` or a `Bijector`, or base not a `Distribution` or a
            `Flow`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows
        >>> model = flows.elbo_flow(
        ...     bijectors.uniform_dequantization(4), distributions.uniform((2,))
        ... )
        >>> levels = jnp.array([[0.0, 3.0]])
        >>> params = model.init(jax.random.key(0), levels)
        >>> round(float(model.elbo(params, levels, key=jax.random.key(1))[0]), 3)  # -2 log 4
        -2.773

    References:
        Nielsen, Jaini, Hoogeboom, Winther, Welling,
            *SurVAE Flows: Surjections to Bridge the Gap between VAEs and Flows*, 2020,
            arXiv:2007.02731.
    """
    check_noun("elbo_flow", transport, Transport, Bijector)
    check_noun("elbo_flow", base, Distribution, Flow)

    def init(key, x, cond=None):
        check_key("elbo_flow.init", key)
        x, cond = batch(x, cond)
        _check_data("elbo_flow.init", x)
        key_map, key_draw, key_base = jax.random.split(key, 3)
        params = {"bijector": transport.init(key_map, x, cond, side="data")}
        z, _ = inverse(params, x, cond, key=key_draw)
        params["base"] = base.init(key_base, z, cond)
        _check_heard("elbo_flow.init", lambda cond: elbo(params, x, cond, key=key), cond)
        return params

    def batch(x, cond):
        return _check_batch("elbo_flow", x, cond)

    def forward(params, z, cond=None, *, key=None):
        return _map("elbo_flow", transport.forward, params, *batch(z, cond), key)

    def inverse(params, x, cond=None, *, key=None):
        return _map("elbo_flow", transport.inverse, params, *batch(x, cond), key)

    def elbo(params, x, cond=None, *, key=None):
        x, cond = batch(x, cond)
        key_map, key_base = split_key(key, 2)
        z, contribution = inverse(params, x, cond, key=key_map)
        log_prob = base_log_prob("elbo_flow", base, params, z, cond, key_base)
        return check_rows("elbo_flow", "the base's log_prob", log_prob, x.shape[0]) + contribution

    def sample(params, key, n, cond=None):
        key_base, key_map = jax.random.split(key)
        z, cond = _sample_source(base, params, key_base, n, cond)
        return forward(params, z, cond, key=key_map)[0]

    return ElboFlow(init, elbo, sample, forward, inverse)


def importance_weighted(flow: ElboFlow, draws: int) -> ElboFlow:
    """An `ElboFlow` with a tighter bound, by importance weighting over several draws.

        elbo(x) = log mean_k exp(elbo_k(x))    over `draws` keys,

    lies between the plain bound, draws=1, and log p(x), which it reaches as `draws` grows. The
    draws are taken one after another in memory.

    Args:
        flow: the flow whose bound is tightened; its params serve both.
        draws: the number of draws, at least 1.

    Returns:
        ElboFlow: `flow` with another `elbo`, which needs a key.

    Raises:
        TypeError: flow is not an `ElboFlow`.
        ValueError: draws is not a whole number of at least 1, at construction; or there is no key,
            at the call.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors, distributions, flows
        >>> model = flows.elbo_flow(
        ...     bijectors.uniform_dequantization(4), distributions.uniform((2,))
        ... )
        >>> tighter = flows.importance_weighted(model, 8)
        >>> levels = jnp.array([[0.0, 3.0]])
        >>> params = tighter.init(jax.random.key(0), levels)
        >>> round(float(tighter.elbo(params, levels, key=jax.random.key(1))[0]), 3)  # -2 log 4
        -2.773

    References:
        Burda, Grosse, Salakhutdinov, *Importance Weighted Autoencoders*, 2016, arXiv:1509.00519.
    """
    check_noun("importance_weighted", flow, ElboFlow)
    check_whole("importance_weighted", draws=draws)

    def elbo(params, x, cond=None, *, key=None):
        need_key("importance_weighted", key)
        values = jax.lax.map(
            lambda k: flow.elbo(params, x, cond, key=k), jax.random.split(key, draws)
        )
        return jax.nn.logsumexp(values, axis=0) - jnp.log(draws).astype(values.dtype)

    return flow._replace(elbo=jax.jit(elbo))


def _sample_source(base, params, key, n, cond):
    check_params("flow", params, "bijector", "base")
    n, cond = check_draws("sample", key, n, cond)
    return sample_source(base, params, key, n, cond), cond


def _map(name, apply, params, x, cond, key):
    """(y, log_det) of a direction of the map, log_det [b].

    Where an event has b numbers along an axis, a log_det of one number for each of them has that
    shape too: there it is looked at for twice the rows as well, in shapes alone.
    """
    check_params(name, params, "bijector")

    def run(x, cond):
        y, log_det = apply(params["bijector"], x, cond, key=key)
        return y, check_rows(name, "log_det", log_det, x.shape[0])

    found = run(x, cond)
    if x.shape[0] in x.shape[1:]:
        jax.eval_shape(lambda: run(*jax.tree.map(lambda a: jnp.concatenate([a, a]), (x, cond))))
    return found


def _check_heard(name, function, cond):
    """Raise where function(cond), which is traced and not run, does not depend on cond.

    Such a cond would be ignored in silence.
    """
    if not jax.tree.leaves(cond):
        return
    jaxpr = jax.make_jaxpr(function)(cond).jaxpr
    if not any(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]):
        raise ValueError(
            f"{name}: neither the map nor the base looks at cond: leave it out, or take a layer "
            "that does, such as "
            "bijectors.coupling, bijectors.autoregressive or bijectors.amortized"
        )


def _check_data(name, x):
    """That there are rows to look at, finite where their values are known: a layer that is scaled
    by them would make every parameter NaN."""
    if not x.shape[0]:
        raise ValueError(f"{name}: expected at least one row of x, got {list(x.shape)}")
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return
    bad = np.argwhere(~np.isfinite(np.asarray(x)))
    if len(bad):
        raise ValueError(
            f"{name}: expected finite numbers, got {len(bad)} that are not, the first"
            f" {x[tuple(bad[0])]} in row {bad[0][0]} (as {x.dtype}): leave such rows out or fill"
            " them"
        )


def _check_batch(name, x, cond, event_shape=None):
    """x as an array of floats [b, *event], and cond with b rows."""
    if isinstance(x, Mapping):
        raise TypeError(
            f"{name}: expected x to be an array [b, *event], got a dict of {sorted(x)}; losses "
            "take "
            "batches"
        )
    try:
        x = jnp.asarray(x)
    except TypeError as error:
        raise TypeError(
            f"{name}: expected x to be an array of floats, got what JAX takes for none:"
            " numpy.asarray(x, 'float32') makes one of a table of numbers"
        ) from error
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{name}: expected x to be an array [b, *event], got a key; the order is (key, x, cond)"
        )
    if x.ndim == 0:
        raise ValueError(f"{name}: expected x of shape [b, *event], got a scalar")
    if event_shape is not None:
        check_event(name, x, event_shape)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name}: expected x in floats, got {x.dtype}: give x.astype('float32'), and counts or"
            " levels to a map that dequantizes, such as bijectors.supports.integers"
        )
    if isinstance(cond, Condition) and cond.aligned is not None:
        given = jnp.shape(cond.aligned)
        if given[1:-1] != x.shape[1:-1]:
            raise ValueError(
                f"{name}: expected cond.aligned of shape"
                f" [{', '.join(map(str, ['b', *x.shape[1:-1], 'k']))}], at the sites of x, which is"
                f" {list(x.shape)}, got {list(given)}: resize it to x first"
            )
    return x, check_cond(name, cond, x.shape[0])
