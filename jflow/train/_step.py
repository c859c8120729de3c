"""One update, as a pure function that is not yet jitted."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole, described
from jflow._core.keys import same_draws
from jflow.train import ema as ema_lib
from jflow.train._state import TrainState
from jflow.types import Key, Loss, Metrics, NumberOrFunction, Params, PyTree

Step = Callable[[TrainState, Mapping[str, PyTree]], tuple[TrainState, Metrics]]
Refresh = Callable[[Params, Mapping[str, PyTree], Key, Mapping[str, PyTree]], Mapping[str, PyTree]]


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    ema: NumberOrFunction | None = None,
    refresh: Refresh | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    accumulate: int = 1,
) -> Step:
    """One update as a pure function (state, batch) -> (state, metrics), not yet jitted.

    To be run under jax.jit (donating the state), jax.pmap or jax.shard_map. It is also a body for
    jax.lax.scan: `jax.lax.scan(step, state, batches)`, with a leading axis on every leaf of
    batches, makes that many updates without the host (`fit` does so with inner).

    The loss gets the key fold_in(state.key, state.step), so that nothing random is carried, and
    frozen = state.frozen, with the averaged params as frozen['ema'] when ema is on. metrics are the
    loss's own, 'loss' and 'grad_norm' (the global 2-norm, before the optimizer clips).

    A part or shard counts as much as the sum of batch['weight'] over its rows, all the same where
    there is no 'weight'. One whose weights are all 0 counts nothing, even if its loss or gradient
    is not finite; for a whole batch of weight 0, loss, metrics and gradient are 0.

    The optimizer may search along a line or read the loss: its update is given value, grad and
    value_fn, a function of params that can be differentiated in either mode: the loss of this
    batch, key and frozen (optax.lbfgs, optax.polyak_sgd).

    Args:
        loss: (params, key, batch, frozen) -> (scalar, metrics).
        optimizer: An optax optimizer.
        ema: The decay of the average of the params, in (0, 1), or a callable from the number of
            updates already made to a decay (`ema.warmup`); None keeps no average.
        refresh: (params, frozen, key, batch) -> frozen, run after the update, on the new params and
            state.frozen; the step's key is then split between loss and refresh. It must keep the
            structure, shapes and types of frozen.
        axis_name: The mapped axis of pmap or shard_map. Each shard folds its index into the key,
            and gradients, loss, metrics and the floats that refresh changed are averaged over
            shards. Over a mesh by shardings (jit) no name is needed: the program sees the whole
            batch. Losses that solve an ODE (`losses.perflow`, a student's own steps) want
            check_vma=False of jax.shard_map: diffrax's buffers are not marked as varying. pmap and
            jit take all losses.
        accumulate: The batch is cut into so many parts, one after the other in memory; gradient,
            loss and metrics are the means over parts, each with a key of its own. The update is
            that of the whole batch for a loss that is a mean over rows, weighted or not, and needs
            no key; a coupling sees its part alone. One step stays one update of optimizer, average
            and step count (optax.MultiSteps would count parts as steps).

    Returns:
        The step.

    Raises:
        ValueError: At construction for a bad decay or count; when traced if the state and `ema`
            disagree or a batch does not divide by `accumulate`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jflow import train
        >>> def loss(params, key, batch, frozen=None):
        ...     return jnp.mean((batch["x"] - params["m"]) ** 2), {}
        >>> step = jax.jit(train.make_step(loss, optax.sgd(0.5)))
        >>> state = train.init_state({"m": jnp.zeros(())}, optax.sgd(0.5), jax.random.key(0))
        >>> state, metrics = step(state, {"x": jnp.full(4, 3.0)})
        >>> float(state.params["m"]), float(metrics["loss"])
        (3.0, 9.0)
    """
    check_whole("make_step", accumulate=accumulate)
    if not callable(loss):
        raise TypeError(
            "make_step: expected a loss (params, key, batch, frozen) -> (scalar, metrics), got"
            f" {described(loss)}; losses.nll(flow) makes one of a flow"
        )
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"make_step: expected an optax.GradientTransformation, got {described(optimizer)}"
        )
    decay = ema_lib.as_decay(ema)
    optimizer = optax.with_extra_args_support(optimizer)
    of_rows = jax.value_and_grad(loss, has_aux=True)
    of_rows = of_rows if accumulate == 1 else _in_parts(of_rows, accumulate)

    def gradient(params, key, batch, frozen):
        """((loss, metrics), gradient) of all shards."""
        params = params if axis_name is None else _varying(params, axis_name)
        (value, metrics), grads = of_rows(params, key, batch, frozen)
        return _mean_of_shards(((value, dict(metrics)), grads), batch, axis_name)

    def step(state, batch):
        if (decay is None) != (state.ema is None):
            said = (
                "the state holds an average, the step has no ema"
                if decay is None
                else "the state holds no average"
            )
            raise ValueError(f"make_step and init_state must be given the same ema: {said}")
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        refresh_key = None
        if refresh is not None:
            key, refresh_key = jax.random.split(key)
        frozen = state.frozen if state.ema is None else {**(state.frozen or {}), "ema": state.ema}

        (value, metrics), grads = gradient(state.params, key, batch, frozen)
        metrics = {**metrics, "loss": value, "grad_norm": optax.tree.norm(grads)}

        value_fn = _with_gradient(lambda params: gradient(params, same_draws(key), batch, frozen))
        extra_args = {"value": value, "grad": grads, "value_fn": value_fn}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra_args)
        params = optax.apply_updates(state.params, updates)
        average = None if decay is None else ema_lib.update(state.ema, params, decay(state.step))
        frozen = state.frozen
        if refresh is not None:
            frozen = _same_form(refresh(params, state.frozen, refresh_key, batch), state.frozen)
            if axis_name is not None:
                frozen = _mean_of_changes(frozen, state.frozen, batch, axis_name)
        return TrainState(state.step + 1, params, opt_state, average, frozen, state.key), metrics

    return step


def _in_parts(gradient, n: int):
    """The mean of `gradient` over n parts of the batch, each with a key of its own."""

    def mean(params, key, batch, frozen):
        parts = jax.tree_util.tree_map_with_path(lambda path, x: _cut(path, x, n), batch)
        weights = jnp.ones(n) if _weight(batch) is None else jax.vmap(_weight)(parts)
        whole = _not_zero(jnp.sum(weights))

        def add(total, part):
            own, rows, weight = part
            (value, metrics), grads = gradient(params, own, rows, frozen)
            out, grads = _times(((value, dict(metrics)), grads), weight)
            return jax.tree.map(jnp.add, total, grads), out

        xs = jax.random.split(key, n), parts, weights
        total, out = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)
        value, metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0) / whole.astype(x.dtype), out)
        return (value, metrics), jax.tree.map(lambda g: g / whole.astype(g.dtype), total)

    return mean


def _weight(batch):
    """What a batch counts beside others, the sum of its weights; None where it has none."""
    weight = batch.get("weight") if isinstance(batch, Mapping) else None
    return None if weight is None else jnp.sum(jnp.asarray(weight), dtype=float_dtype(weight))


def _times(tree, weight):
    """`tree` times a weight, and 0 where that is 0, whatever the tree holds."""
    return jax.tree.map(lambda x: jnp.where(weight != 0, _cast(weight, x) * x, 0), tree)


def _cast(weight, x):
    """weight in the type of x, if that is a float."""
    return weight.astype(x.dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else weight


def _not_zero(total):
    """The sum of weights as a divisor: what it divides is 0 where it is."""
    return jnp.where(total != 0, total, 1)


def _mean_of_shards(tree, batch, axis_name):
    """The mean of `tree` over shards by their weight; 0 where no row has any."""
    weight = _weight(batch)
    if weight is None:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
    if axis_name is None:
        return jax.tree.map(lambda x: jnp.where(weight != 0, x, 0), tree)
    share = weight / _not_zero(jax.lax.psum(weight, axis_name))
    return jax.lax.psum(_times(tree, share), axis_name)


def _mean_of_changes(new, old, batch, axis_name):
    """`new` with the mean over shards of the floats that changed: states stay equal."""
    total = None if _weight(batch) is None else jax.lax.psum(_weight(batch), axis_name)

    def mean(new, old):
        if new is old or not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        averaged = _mean_of_shards(new, batch, axis_name)
        return averaged if total is None else jnp.where(total != 0, averaged, old)

    return jax.tree.map(mean, new, old)


def _with_gradient(gradient):
    """The value of params -> ((value, metrics), gradient) as a function with that gradient.

    Differentiated itself it would, on a mapped axis, give each shard the gradient of its own rows,
    and keep the parts of an accumulated batch all in memory.
    """

    @jax.custom_jvp
    def value_fn(params):
        return gradient(params)[0][0]

    @value_fn.defjvp
    def with_tangent(params, tangents):
        (value, _), grads = gradient(*params)
        slopes = jax.tree.map(lambda g, d: jnp.sum(g * d, dtype=value.dtype), grads, *tangents)
        return value, sum(jax.tree.leaves(slopes), jnp.zeros_like(value))

    return value_fn


def _cut(path, x, n: int):
    """[b, ...] -> [n, b / n, ...]: part i has the rows i, i + n ..., so that rows spread over
    devices stay where they are."""
    if jnp.ndim(x) == 0 or x.shape[0] % n:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(
            f"accumulate={n} does not divide the batch: {name!r} has the shape {list(jnp.shape(x))}"
        )
    return jnp.moveaxis(jnp.reshape(x, (x.shape[0] // n, n, *x.shape[1:])), 1, 0)


def _varying(params, axis_name):
    """Params as each shard's own. shard_map would else sum their gradients over shards, and the
    mean would count twice.

    Adding a zero that depends on the shard does it everywhere: jax.lax.pcast is refused under vmap.
    """
    zero = 0 * jax.lax.axis_index(axis_name)
    return jax.tree.map(lambda p: p + zero.astype(p.dtype), params)


def _same_form(new, old):
    """`new`, if it has the structure, shapes and types of `old`: another form would compile the
    step again."""
    form = jax.tree.map(
        lambda x: f"{getattr(x, 'dtype', type(x).__name__)}{list(jnp.shape(x))}", (old, new)
    )
    if form[0] != form[1]:
        raise ValueError(f"refresh must keep the form of frozen: expected {form[0]}, got {form[1]}")
    return new
