"""A test of what somebody's own bijector promises."""

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.checks import check_cond, check_key, check_noun
from jflow._core.keys import same_draws
from jflow.types import Array, Bijector, Cond, Key

__all__ = ["check"]

_LARGEST = 64  # numbers in an event whose Jacobian is looked at


def check(
    bijector: Bijector,
    x: Array,
    cond: Cond = None,
    *,
    key: Key | None = None,
    tolerance: float = 1e-3,
) -> None:
    """Raise where a bijector breaks a promise of `types.Bijector`.

    It is for people who write a bijector, in a test of theirs. What is tried, at the params of
    `init`, each of them moved a little (many maps start at the identity, which hides most
    mistakes):

    - `init` gives nested dicts of floats, of one form from the data and from the source side;
    - log_det is [b], for another number of rows too, and outputs have the type of x (float32 in,
      float32 out, also under jax_enable_x64; log_det float32 at least);
    - rows do not depend on one another, and cond, where there is one, changes something;
    - forward(inverse(x)) = x, inverse(forward(z)) = z, and the two log-dets cancel;
    - log_det is log |det| of the Jacobian by automatic differentiation, for events of at most 64
      numbers;
    - gradients are finite and reach every parameter.

    Args:
        bijector: the map to try.
        x: [b, *event], data inside the support of the map, two different rows at least; float32 is
            the type to try.
        cond: as the map takes it, with rows that differ.
        key: for `init`, and for what the params are moved by; None is jax.random.key(0). The maps
            get none.
        tolerance: of outputs, relative to 1 + |x|, and of log-dets, in nats, relative to 1 +
            |log_det|.

    Raises:
        ValueError: a promise is broken; the message names it, and says by how much.
        TypeError: bijector is not a `Bijector`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> from jflow.types import Bijector
        >>> double = Bijector(
        ...     lambda key, x, cond=None, *, side="data": {},
        ...     lambda params, z, cond=None, *, key=None: (2 * z, jnp.full(len(z), jnp.log(2.0))),
        ...     lambda params, x, cond=None, *, key=None: (x / 2, jnp.full(len(x), -jnp.log(2.0))),
        ... )
        >>> x = jax.random.normal(jax.random.key(1), (5, 3))
        >>> bijectors.check(bijectors.lu(3), x)
        >>> try:
        ...     bijectors.check(double, x)
        ... except ValueError as error:
        ...     print(str(error)[:62])
        check: expected log_det of inverse to be log |det| of its Jaco
    """
    check_noun("check", bijector, Bijector)
    key = jax.random.key(0) if key is None else key
    check_key("check", key)
    x = jnp.asarray(x)
    b = x.shape[0] if x.ndim else 0
    if b < 2 or not jnp.issubdtype(x.dtype, jnp.floating) or bool(jnp.all(x == x[:1])):
        raise ValueError(
            "check: expected x [b, *event] of floats, two different rows at least, got "
            f"{x.dtype}{list(x.shape)}"
        )
    cond = jax.tree.map(jnp.asarray, check_cond("check", cond, b))

    params = _moved_params(bijector, key, x, cond)
    _check_forms(bijector, params, x, cond)

    z, log_det, more = _measured(bijector.inverse, params, x, cond)
    _check_direction("inverse", z, log_det, more, cond, tolerance)
    x_again, log_det_back, more = _measured(bijector.forward, params, z, cond)
    _check_direction("forward", x_again, log_det_back, more, cond, tolerance)
    _close("forward(inverse(x)) = x", x_again, x, tolerance)
    z_again, _ = jax.jit(bijector.inverse)(params, x_again, cond)
    _close("inverse(forward(z)) = z", z_again, z, tolerance)
    _close("the log_det of forward to be minus that of inverse", log_det_back, -log_det, tolerance)


def _moved_params(bijector, key, x, cond):
    """The params of `init`, each number moved; of one form from both sides."""
    first, second = jax.random.split(key)
    params = bijector.init(first, x, cond, side="data")
    z, _ = bijector.inverse(params, x, cond)
    other = bijector.init(same_draws(first), z, cond, side="source")
    forms = [jax.tree.map(lambda p: (jnp.shape(p), jnp.result_type(p)), p) for p in (params, other)]
    if forms[0] != forms[1]:
        raise ValueError(
            f"check: expected init to give params of one form from both sides, got {forms[0]} and "
            f"{forms[1]}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        named = all(isinstance(step, jax.tree_util.DictKey) for step in path)
        if not named or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"check: expected params to be nested dicts of floats, got {jnp.result_type(leaf)} "
                "at "
                f"params{jax.tree_util.keystr(path)}"
            )
    keys = jax.random.split(second, len(leaves) or 1)
    moved = [
        p + 0.1 * jax.random.normal(k, jnp.shape(p), p.dtype)
        for (_, p), k in zip(leaves, keys, strict=False)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), moved)


def _check_forms(bijector, params, x, cond):
    """Shapes and types of both directions, for b rows and for 2b, in 32 and in 64 bits.

    Nothing is computed.
    """
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x, cond))
    z, _ = jax.eval_shape(bijector.inverse, params, x, cond)
    if np.prod(z.shape[1:]) != np.prod(x.shape[1:]):
        raise ValueError(
            f"check: expected z to have as many numbers as x, got {list(z.shape)} and "
            f"{list(x.shape)}"
        )
    from_z = jnp.zeros(z.shape, z.dtype)
    twice_z = jnp.concatenate([from_z, from_z]), twice[1]
    for wide in (False, True):
        with jax.enable_x64(wide or jax.config.jax_enable_x64):
            for direction, arguments in (
                ("inverse", (x, cond)),
                ("inverse", twice),
                ("forward", (from_z, cond)),
                ("forward", twice_z),
            ):
                start, n = arguments[0], arguments[0].shape[0]
                out, log_det = jax.eval_shape(getattr(bijector, direction), params, *arguments)
                if log_det.shape != (n,):
                    raise ValueError(
                        f"check: expected log_det of {direction} of shape [{n}] for {n} rows, got "
                        f"{list(log_det.shape)}"
                    )
                if out.shape[0] != n:
                    raise ValueError(
                        f"check: expected {n} rows of {direction}, got {list(out.shape)}"
                    )
                if (
                    out.dtype != start.dtype
                    or jnp.promote_types(log_det.dtype, jnp.float32) != log_det.dtype
                ):
                    raise ValueError(
                        f"check: expected {direction} of {start.dtype} to give {start.dtype} and a "
                        "log_det in float32 at "
                        f"least, got {out.dtype} and "
                        f"{log_det.dtype}{' under jax_enable_x64' if wide else ''}"
                    )


def _measured(direction, params, x, cond):
    """(y, log_det, what else is known of them): in one compilation."""
    size = int(np.prod(x.shape[1:]))

    @jax.jit
    def run(params, x, cond):
        y, log_det = direction(params, x, cond)
        weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(
            y.shape
        )  # no two numbers alike, so that none cancel

        def total(params, x):
            y, log_det = direction(params, x, cond)
            return jnp.sum(y * weights) + jnp.sum(log_det * weights.reshape(y.shape[0], -1)[:, 0])

        rest = jax.tree.map(
            lambda a: jnp.concatenate([a, jnp.broadcast_to(a[:1], a.shape)]), (x, cond)
        )
        more = {"beside others": jax.tree.map(lambda a: a[: x.shape[0]], direction(params, *rest))}
        more["gradient"] = jax.grad(total, argnums=(0, 1))(params, x)
        more["other cond"] = direction(
            params, x, jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), cond)
        )
        if size <= _LARGEST:
            flat, pullback = jax.vjp(
                lambda x: direction(params, x, cond)[0].reshape(x.shape[0], -1), x
            )
            basis = jnp.broadcast_to(jnp.eye(size, dtype=flat.dtype)[:, None], (size, *flat.shape))
            rows = jax.vmap(lambda bar: pullback(bar)[0].reshape(x.shape[0], -1))(basis)
            more["jacobian"] = jnp.moveaxis(rows, 0, 1)
        return y, log_det, more

    return run(params, x, cond)


def _check_direction(name, y, log_det, more, cond, tolerance):
    """What can be said of one direction."""
    for what, value in ((name, y), (f"log_det of {name}", log_det)):
        if not bool(jnp.all(jnp.isfinite(value))):
            raise ValueError(
                f"check: expected {what} to be finite, got {_rows_that(~jnp.isfinite(value))}"
            )
    for what, value, other in zip(
        (name, f"log_det of {name}"), (y, log_det), more["beside others"], strict=True
    ):
        _close(f"rows of {what} to be the same beside other rows", other, value, tolerance)
    if jax.tree.leaves(cond) and all(map(jnp.array_equal, more["other cond"], (y, log_det))):
        raise ValueError(
            f"check: expected cond to change {name}, which is the same when its rows change places"
        )
    if "jacobian" in more:
        _, exact = np.linalg.slogdet(np.asarray(more["jacobian"], np.float64))
        if not _near(log_det, exact, tolerance).all():
            i = int(np.argmax(~_near(log_det, exact, tolerance)))
            raise ValueError(
                f"check: expected log_det of {name} to be log |det| of its Jacobian, "
                f"{exact[i]:.3g} in row {i}, "
                f"got {float(log_det[i]):.3g}"
            )
    for path, gradient in jax.tree_util.tree_leaves_with_path(more["gradient"][0]):
        where = "params" + jax.tree_util.keystr(path)
        if not bool(jnp.all(jnp.isfinite(gradient))):
            raise ValueError(
                f"check: expected a finite gradient of {name} for {where}, got {gradient}"
            )
        if gradient.size and not bool(jnp.any(gradient != 0)):
            raise ValueError(f"check: expected {name} to depend on {where}, whose gradient is 0")
    if not bool(jnp.all(jnp.isfinite(more["gradient"][1]))):
        raise ValueError(
            f"check: expected a finite gradient of {name} for its input, got {more['gradient'][1]}"
        )


def _near(value, expected, tolerance):
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return np.abs(value - expected) <= tolerance * (1 + np.abs(expected))


def _close(what, value, expected, tolerance):
    if value.shape != expected.shape:
        raise ValueError(
            f"check: expected {what}, got shape {list(value.shape)} for {list(expected.shape)}"
        )
    if not _near(value, expected, tolerance).all():
        apart = np.abs(np.asarray(value, np.float64) - np.asarray(expected, np.float64))
        raise ValueError(
            f"check: expected {what}, got a difference of up to {np.nanmax(apart):.3g}"
        )


def _rows_that(bad):
    rows = np.unique(np.nonzero(np.asarray(bad))[0])
    return f"something else in {len(rows)} rows, the first of them row {rows[0]}"
