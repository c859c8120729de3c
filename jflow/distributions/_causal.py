"""Causal laws of sequences: a network that reads the past, and the law of the next token."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import expand_to, filled, float_dtype
from jflow._core.checks import (
    check_cond,
    check_draws,
    check_key,
    check_noun,
    check_params,
    check_rows,
)
from jflow._core.keys import split_key
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow.types import Array, Cond, Condition, Distribution, Flow

__all__ = ["causal", "continuation", "token_log_probs"]


def causal(
    net: nn.Module, token: Distribution | Flow, event_shape: tuple[int, ...] | None = None
) -> Distribution:
    """A causal law of sequences: each token has a law given the tokens before it.

        log p(x | cond) = sum_i log p_token(x_i | h_i),    h = net(x, cond),

    where h_i depends on x_<i and cond alone. `log_prob` is one parallel pass, in which the token
    law sees the b n tokens as rows; `sample` draws one token after the other, with the cache of the
    network where it has one. With a flow for the law of a token it is an autoregressive flow over
    blocks of d numbers, with `flows.cnf` one whose head is trained by `losses.causal_matching`.

    Sequences of unequal lengths are padded, and `Condition(valid=...)` [b, n] says which tokens
    exist: the sum is over these, whatever stands in the others, samples are zero in the others, and
    a row without any has log-density 0. The network gets cond as it is, so that it has to read
    `valid` (or to be without Condition).

    Also known as: autoregressive model, language model.

    Args:
        net: a causal Linen module, `net(x [b, n, *token], cond) -> h [b, n, k]`, such as
            `nets.CausalTransformer(features=k)` or `nets.CausalLSTM`. With `net(x, cond,
            cache=cache, first=i) -> (h, cache)` of some slots, where x are the tokens before them,
            and `net.empty_cache(x, rows)`, which is not None, samples take n steps of one token;
            without, n parallel passes.
        token: the law of one token given h_i [rows, k], such as `categorical`,
            `conditional_mixture`, `flows.neural_spline((d,))` or `flows.cnf`.
        event_shape: the shape (n, *token) of a sequence, such as (16, 2), or (16,) for symbols,
            which `sample` draws. Densities are of any length that the network takes.

    Returns:
        Distribution: the law of x [b, n, *token], params {'net', 'token'}. Its `init` raises a
            ValueError, which names the tokens, for a network that is not causal: it is tried once,
            while it is traced, on three tokens and random params. A key for `log_prob` switches on
            what is random inside.

    Raises:
        TypeError: net is not a Linen module, or token not a `Distribution` or a `Flow`.
        ValueError: at the call, for shapes that do not fit, and for samples without `event_shape`.

    Examples:
        >>> import jax
        >>> from jflow import distributions, nets
        >>> law = distributions.causal(
        ...     nets.CausalLSTM(width=8), distributions.conditional_mixture((2,)), (5, 2)
        ... )
        >>> x = jax.random.normal(jax.random.key(0), (3, 5, 2))
        >>> params = law.init(jax.random.key(1), x)
        >>> law.log_prob(params, x).shape, law.sample(params, jax.random.key(2), 4).shape
        ((3,), (4, 5, 2))

    References:
        Henter, Alexanderson, Beskow, *MoGlow: Probabilistic and Controllable Motion Synthesis Using
            Normalising Flows*, 2020, arXiv:1905.06598, for a flow as the law of a frame.
        Valle, Shih, Prenger, Catanzaro, *Flowtron: an Autoregressive Flow-based Generative Network
            for Text-to-Speech Synthesis*, 2020, arXiv:2005.05957, which reverses time on every
            other step and so is not causal.
        Liu, Qin, Shi, et al., *Sundial: A Family of Highly Capable Time Series Foundation Models*,
            2025, arXiv:2502.00816, for a flow head on a causal transformer.
    """
    check_linen("causal", "net", net)
    check_noun("causal", token, Distribution, Flow)
    if event_shape is not None:
        event_shape = tuple(event_shape)
        if not event_shape:
            raise ValueError("causal: expected event_shape (n, *token), got ()")
    of_tokens, drawn = token_log_probs(net, token), _drawer("causal.sample", net, token)

    def init(key, x, cond=None):
        check_key("causal.init", key)
        x, cond, valid = _read(x, cond, event_shape)
        _check_causal(net, x, cond)
        net_key, token_key = jax.random.split(key)
        params = init_linen(net, net_key, x, cond)
        h = _check_hidden(apply_linen(net, params, x, cond), x)
        return {"net": params, "token": token.init(token_key, *_folded(x, h, valid))}

    def log_prob(params, x, cond=None, *, key=None):
        if event_shape is not None:
            _read(x, cond, event_shape)
        return jnp.sum(of_tokens(params, x, cond, key=key), axis=1)

    def sample(params, key, n, cond=None):
        n, cond = check_draws("causal.sample", key, n, cond)
        check_params("causal", params, "net", "token")
        if event_shape is None:
            raise ValueError(
                "causal.sample: expected the shape of a sequence,"
                " distributions.causal(net, token, event_shape), got none"
            )
        return drawn(params, key, n, cond, event_shape)

    return Distribution(jax.jit(init), jax.jit(log_prob), sample)


def continuation(
    net: nn.Module, token: Distribution | Flow, event_shape: tuple[int, ...]
) -> Callable[..., Array]:
    """Samples of a causal law given the first tokens of each sequence.

        x_i ~ p_token(. | h_i),    i = m .. n - 1,    h = net(x, cond),    x_0 .. x_{m-1} given.

    The given tokens take one pass of the network, the others one step each, as in the samples of
    `causal`.

    Also known as: forecast, completion, prompt, conditional generation.

    Args:
        net: a causal Linen module, as `causal` takes it.
        token: the law of one token.
        event_shape: the shape (n, *token) of a whole sequence.

    Returns:
        A function (params, key, x [b, m, *token], cond=None) -> [b, n, *token] with the params of
            `causal(net, token)`: the tokens of x, m of at least 1 and below n, and n - m that are
            drawn. `Condition(valid=...)` is [b, n]; tokens that it does not hold are 0.

    Raises:
        TypeError: net is not a Linen module, or token not a `Distribution` or a `Flow`.
        ValueError: at the call, for an x of another shape, or that leaves nothing to draw.

    Examples:
        >>> import jax
        >>> from jflow import distributions, nets
        >>> net, token = nets.CausalLSTM(width=8), distributions.conditional_mixture((2,))
        >>> x = jax.random.normal(jax.random.key(0), (3, 5, 2))
        >>> params = distributions.causal(net, token).init(jax.random.key(1), x)
        >>> forecast = distributions.continuation(net, token, (7, 2))
        >>> forecast(params, jax.random.key(2), x).shape
        (3, 7, 2)

    References:
        Liu, Qin, Shi, et al., *Sundial: A Family of Highly Capable Time Series Foundation Models*,
            2025, arXiv:2502.00816, for forecasts by the patch.
    """
    name, shape = "continuation", tuple(event_shape)
    check_linen(name, "net", net)
    check_noun(name, token, Distribution, Flow)
    if not shape:
        raise ValueError(f"{name}: expected event_shape (n, *token), got ()")
    drawn = _drawer(name, net, token)

    def continued(params, key, x, cond=None):
        x = jnp.asarray(x)
        if x.ndim < 2 or x.shape[2:] != shape[1:] or not 1 <= x.shape[1] < shape[0]:
            expected = ", ".join(map(str, ("b", "m", *shape[1:])))
            raise ValueError(
                f"{name}: expected x of shape [{expected}] with 1 <= m < {shape[0]}, got"
                f" {list(x.shape)}"
            )
        n, cond = check_draws(name, key, x.shape[0], cond)
        check_params("causal", params, "net", "token")
        return drawn(params, key, n, cond, shape, x)

    return continued


def _drawer(name: str, net: nn.Module, token: Distribution | Flow) -> Callable[..., Array]:
    """(params, key, n, cond, shape, given=None) -> n sequences of a shape, from the tokens given
    [n, m, *token] on."""

    def draw(params, key, n, cond, shape, given=None):
        length, *rest = shape
        leaves = jax.tree.leaves(params) or [jnp.zeros(())]
        like = jnp.zeros_like(leaves[0], shape=(n, length, *rest), dtype=float_dtype(*leaves))
        h = jax.eval_shape(lambda: _check_hidden(apply_linen(net, params["net"], like, cond), like))
        one = jax.eval_shape(
            lambda h: token.sample(params["token"], jax.random.key(0), n, h[:, 0]), h
        )
        if one.shape != (n, *rest):
            raise ValueError(
                f"{name}: expected tokens of shape {rest}, as event_shape says, got"
                f" {list(one.shape[1:])}"
            )
        valid = _valid(cond, (n, length))
        first = 0 if given is None else given.shape[1]
        keys = jax.random.split(key, length - first)
        x = jnp.zeros_like(like, dtype=one.dtype)
        if given is not None:
            given = given.astype(one.dtype)
            if valid is not None:
                given = jnp.where(expand_to(valid[:, :first], given), given, 0)
            x = x.at[:, :first].set(given)

        def drawn(h, i, key):
            x = token.sample(params["token"], key, n, h)
            return x if valid is None else jnp.where(expand_to(valid[:, i], x), x, 0)

        def step(carry, slot):
            (before, cache), (i, key) = carry, slot
            h, cache = apply_linen(net, params["net"], before, cond, cache=cache, first=i)
            x = drawn(h[:, 0], i, key)
            return (x[:, None], cache), x

        def pass_over_all(x, slot):
            i, key = slot
            h = apply_linen(net, params["net"], x, cond)
            return x.at[:, i].set(drawn(jnp.take(h, i, axis=1), i, key)), None

        slots = first + jnp.arange(length - first), keys
        cache = net.empty_cache(like, n) if hasattr(net, "empty_cache") else None
        if cache is None:
            return jax.lax.scan(pass_over_all, x, slots)[0]
        before = jnp.roll(x, 1, axis=1)[:, : first + 1]  # before slot 0 stands what is not read
        if first:
            _, cache = apply_linen(
                net, params["net"], before[:, :first], cond, cache=cache, first=0
            )
        carry = before[:, first:], cache
        new = jax.lax.scan(step, carry, slots)[1].swapaxes(0, 1)
        return jnp.concatenate([x[:, :first], new], axis=1)

    return jax.jit(draw, static_argnums=(2, 4))


def token_log_probs(net: nn.Module, token: Distribution | Flow) -> Callable[..., Array]:
    """The log-density of each token of a sequence, whose sum is the `log_prob` of `causal`.

    Args:
        net: a causal Linen module, as `causal` takes it.
        token: the law of one token.

    Returns:
        A function (params, x [b, n, *token], cond=None, *, key=None) -> [b, n], log p(x_i | x_<i,
            cond) in nats, 0 where a token is not valid, with the params of `causal(net, token)`.

    Raises:
        TypeError: net is not a Linen module, or token not a `Distribution` or a `Flow`.

    Examples:
        >>> import jax
        >>> from jflow import distributions, nets
        >>> net, token = nets.CausalLSTM(width=8), distributions.conditional_mixture((2,))
        >>> x = jax.random.normal(jax.random.key(0), (3, 5, 2))
        >>> params = distributions.causal(net, token).init(jax.random.key(1), x)
        >>> distributions.token_log_probs(net, token)(params, x).shape
        (3, 5)
    """
    check_linen("token_log_probs", "net", net)
    check_noun("token_log_probs", token, Distribution, Flow)

    @jax.jit
    def log_probs(params, x, cond=None, *, key=None):
        check_params("causal", params, "net", "token")
        x, cond, valid = _read(x, cond)
        net_key, token_key = split_key(key, 2)
        h = _check_hidden(apply_linen(net, params["net"], x, cond, key=net_key), x)
        rows, given = _folded(x, h, valid)
        found = token.log_prob(params["token"], rows, given, key=token_key)
        found = check_rows("causal", "the log_prob of a token", found, rows.shape[0])
        found = found.reshape(x.shape[:2])
        return found if valid is None else jnp.where(valid, found, 0)

    return log_probs


def _read(x, cond: Cond, event_shape=None) -> tuple[Array, Cond, Array | None]:
    """x [b, n, *token] with zeros in its padding, cond with b rows, and the valid tokens [b, n]."""
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"causal: expected x of shape [b, n, *token], got {list(x.shape)}")
    if event_shape is not None and x.shape[2:] != event_shape[1:]:
        expected = ", ".join(map(str, ("b", "n", *event_shape[1:])))
        raise ValueError(f"causal: expected x of shape [{expected}], got {list(x.shape)}")
    cond = check_cond("causal", cond, x.shape[0])
    valid = _valid(cond, x.shape[:2])
    if valid is not None:
        x = jnp.where(expand_to(valid, x), x, jnp.zeros_like(x))
    return x, cond, valid


def _valid(cond: Cond, shape: tuple[int, int]) -> Array | None:
    """Which tokens of x exist, bool [b, n]; None: all."""
    valid = cond.valid if isinstance(cond, Condition) else None
    if valid is not None and (valid.shape != shape or valid.dtype != jnp.bool_):
        raise ValueError(
            f"causal: expected cond.valid to be truth values {list(shape)}, one for each token, got"
            f" {valid.dtype} {list(valid.shape)}"
        )
    return valid


def _check_hidden(h: Any, x: Array) -> Array:
    """h, after a check that the network gave [b, n, k] for x [b, n, *token]."""
    if jnp.ndim(h) != 3 or h.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"causal: expected the network to give h of shape {[*x.shape[:2], 'k']}, got"
            f" {list(jnp.shape(h))}"
        )
    return h


def _folded(x: Array, h: Array, valid: Array | None) -> tuple[Array, Array]:
    """The tokens and their h as rows [b n, ...]; padding is replaced by a token that counts."""
    count = x.shape[0] * x.shape[1]
    rows = x.reshape(count, *x.shape[2:]), h.reshape(count, h.shape[-1])
    return filled(None if valid is None else valid.reshape(count), rows)


def _check_causal(net: nn.Module, x: Array, cond: Cond) -> None:
    """Raise where h_i of the network depends on x_j for some j >= i.

    It is evaluated while tracing: three tokens at most, random params, and a row for each token in
    which that one is another.
    """
    m, b = min(x.shape[1], 3), min(x.shape[1], 3) + 1
    draws = np.random.default_rng(0)
    event = x.shape[2:]
    if jnp.issubdtype(x.dtype, jnp.floating) and event:
        tokens = draws.normal(size=(1, m, *event))
        others = draws.normal(size=(1, m, *event))
    else:  # symbols
        tokens, others = np.zeros((1, m, *event)), np.ones((1, m, *event))
    changed = (np.arange(b)[:, None] == np.arange(m)[None]).reshape(b, m, *(1 for _ in event))
    tokens = np.where(changed, others, tokens).astype(x.dtype)

    def given(leaf, along=False):
        shape = (b, *((m, *leaf.shape[2:]) if along else leaf.shape[1:]))
        return np.ones(shape, bool) if leaf.dtype == jnp.bool_ else np.zeros(shape, leaf.dtype)

    if isinstance(cond, Condition):
        along = ("aligned", "valid")
        parts = cond._asdict().items()
        cond = Condition(**{k: None if v is None else given(v, k in along) for k, v in parts})
    else:
        cond = jax.tree.map(given, cond)

    shapes = jax.eval_shape(lambda *args: init_linen(net, *args), jax.random.key(0), tokens, cond)
    params = jax.tree.map(
        lambda p: (draws.normal(size=p.shape) / max((*p.shape[-2:-1], 1)) ** 0.5).astype(p.dtype),
        shapes,
    )
    with jax.ensure_compile_time_eval():
        run = jax.jit(lambda p, x, cond: _check_hidden(apply_linen(net, p, x, cond), x))
        h = np.asarray(run(params, tokens, cond), np.float64)
    moves = np.abs(h[:m] - h[m:]).max(axis=-1)  # [j, i]: of h_i by another x_j
    wrong = (moves > 1e-3 * (1 + np.abs(h).max())) & (np.arange(m)[None] <= np.arange(m)[:, None])
    if wrong.any():
        j, i = np.argwhere(wrong)[0]
        raise ValueError(
            f"causal: expected a causal network, whose h_i depends on x_<i alone; h_{i} of"
            f" {type(net).__name__} changes with x_{j}"
        )
