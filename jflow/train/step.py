"""One update, as a pure function that is not yet jitted."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jflow._util import described
from jflow.train import ema as ema_lib
from jflow.train.state import TrainState
from jflow.types import Key, Loss, Metrics, Params, PyTree

Step = Callable[[TrainState, Mapping[str, PyTree]], tuple[TrainState, Metrics]]
Refresh = Callable[[Params, Mapping[str, PyTree], Key, Mapping[str, PyTree]], Mapping[str, PyTree]]


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    ema: float | ema_lib.Decay | None = None,
    refresh: Refresh | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    accumulate: int = 1,
) -> Step:
    """(state, batch) -> (state, metrics), to be run under jax.jit (donating the state), jax.pmap or jax.shard_map.

    It is also a body for jax.lax.scan: `jax.lax.scan(step, state, batches)`, with a leading axis on every leaf of batches,
    makes that many updates without the host (`fit` does so with inner).

    The loss gets the key fold_in(state.key, state.step), so nothing random is carried, and frozen = state.frozen, with
    the averaged params as frozen['ema'] when ema is on. metrics are the loss's own, 'loss' and 'grad_norm' (the global
    2-norm, before the optimizer clips).

    ema: a decay in (0, 1), or a callable from the number of updates already made to a decay (`ema.warmup`).
    refresh(params, frozen, key, batch) -> frozen runs after the update, on the new params and state.frozen; the step's
        key is then split between loss and refresh. It must keep the structure, shapes and types of frozen.
    axis_name: the mapped axis. Each shard folds its index into the key, and gradients, loss, metrics and the floats
        that refresh changed are averaged over shards, each weighing the same. Over a mesh by shardings (jit) no name is
        needed: the program sees the whole batch. Losses that solve an ODE (`fewstep.perflow`, a student's own steps) want
        check_vma=False of jax.shard_map: diffrax's buffers are not marked as varying. pmap and jit take all losses.

    accumulate: the batch is cut into so many parts, one after the other in memory; gradient, loss and metrics are the
        means over parts, part i gets the key fold_in(key, i). The update is that of the whole batch for a loss that is a
        mean over rows and needs no key; a weighted mean or a coupling sees its part alone. One step stays one update of
        optimizer, average and step count (optax.MultiSteps would count parts as steps).

    Raises ValueError at construction for a bad decay or count, and when traced if the state and `ema` disagree or a
    batch does not divide by `accumulate`.
    """
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"expected accumulate to be an int of at least 1, got {accumulate!r}")
    if not callable(loss):
        raise TypeError(
            f"make_step: expected a loss (params, key, batch, frozen) -> (scalar, metrics), got {described(loss)}; "
            "losses.nll(flow) makes one of a flow"
        )
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"make_step: expected an optax.GradientTransformation, got {described(optimizer)}")
    decay = ema_lib.as_decay(ema)
    optimizer = optax.with_extra_args_support(optimizer)
    gradient = jax.value_and_grad(loss, has_aux=True)
    gradient = gradient if accumulate == 1 else _in_parts(gradient, accumulate)

    def step(state, batch):
        if (decay is None) != (state.ema is None):
            said = "the state holds an average, the step has no ema" if decay is None else "the state holds no average"
            raise ValueError(f"make_step and init_state must be given the same ema: {said}")
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        refresh_key = None
        if refresh is not None:
            key, refresh_key = jax.random.split(key)
        frozen = state.frozen if state.ema is None else {**(state.frozen or {}), "ema": state.ema}

        params = state.params if axis_name is None else _varying(state.params, axis_name)
        (value, metrics), grads = gradient(params, key, batch, frozen)
        if axis_name is not None:
            value, metrics, grads = jax.lax.pmean((value, dict(metrics), grads), axis_name)
        metrics = {**metrics, "loss": value, "grad_norm": optax.tree.norm(grads)}

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
        average = None if decay is None else ema_lib.update(state.ema, params, decay(state.step))
        frozen = state.frozen
        if refresh is not None:
            frozen = _same_form(refresh(params, state.frozen, refresh_key, batch), state.frozen)
            if axis_name is not None:
                frozen = jax.tree.map(lambda new, old: _mean(new, old, axis_name), frozen, state.frozen)
        return TrainState(state.step + 1, params, opt_state, average, frozen, state.key), metrics

    return step


def _in_parts(gradient, n: int):
    """The mean of `gradient` over n parts of the batch, each with a key of its own."""

    def mean(params, key, batch, frozen):
        parts = jax.tree_util.tree_map_with_path(lambda path, x: _cut(path, x, n), batch)

        def add(total, part):
            i, rows = part
            (value, metrics), grads = gradient(params, jax.random.fold_in(key, i), rows, frozen)
            return jax.tree.map(jnp.add, total, grads), (value, dict(metrics))

        total, out = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (jnp.arange(n), parts))
        value, metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), out)
        return (value, metrics), jax.tree.map(lambda g: g / n, total)

    return mean


def _cut(path, x, n: int):
    """[b, ...] -> [n, b / n, ...]: part i has the rows i, i + n ..., so that rows spread over devices stay where they
    are."""
    if jnp.ndim(x) == 0 or x.shape[0] % n:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(f"accumulate={n} does not divide the batch: {name!r} has the shape {list(jnp.shape(x))}")
    return jnp.moveaxis(jnp.reshape(x, (x.shape[0] // n, n, *x.shape[1:])), 1, 0)


def _varying(params, axis_name):
    """Params as each shard's own. shard_map would else sum their gradients over shards, and the mean would count twice.

    Adding a zero that depends on the shard does it everywhere: jax.lax.pcast is refused under vmap.
    """
    zero = 0 * jax.lax.axis_index(axis_name)
    return jax.tree.map(lambda p: p + zero.astype(p.dtype), params)


def _mean(new, old, axis_name):
    """The mean over shards of a float that changed: states stay equal on all of them."""
    return jax.lax.pmean(new, axis_name) if new is not old and jnp.issubdtype(new.dtype, jnp.floating) else new


def _same_form(new, old):
    """`new`, if it has the structure, shapes and types of `old`: another form would compile the step again."""
    form = jax.tree.map(lambda x: f"{getattr(x, 'dtype', type(x).__name__)}{list(jnp.shape(x))}", (old, new))
    if form[0] != form[1]:
        raise ValueError(f"refresh must keep the form of frozen: expected {form[0]}, got {form[1]}")
    return new
