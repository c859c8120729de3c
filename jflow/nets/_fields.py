"""Networks of (x, t) lifted from Flax Linen into the nouns `Field`, `Velocity` and `FlowMap`."""

import flax.linen as nn

from jflow._core.checks import check_cond, count_rows, like_state, times_of
from jflow._core.linen import apply_linen, check_linen, init_linen
from jflow._core.nouns import compiled
from jflow.types import Field, FlowMap, Velocity

__all__ = ["field", "flow_map", "velocity"]


def field(module: nn.Module) -> Field:
    """Lift a Linen module `module(x, t, cond=None)` into a `Field`.

    The output is whatever the module returns. A key passed to `apply` switches dropout on.

    Args:
        module: an instance of a Linen module that keeps 'params' alone.

    Returns:
        Field: x is an array [b, *event] or a pytree of them; t is [b], where a scalar is given to
            every row, or [b, n] for a module that reads a time for each of n > 1 tokens, or for a
            dict x, of parts, a dict of the times of each; the leaves of cond lead with b, or with 1
            for all rows. Its functions raise a ValueError where t or cond does not have b rows.
            Params are those of the module.

    Raises:
        TypeError: module is not an instance of a Linen module.
    """

    return compiled(_lifted("field", module))


def velocity(module: nn.Module) -> Velocity:
    """Lift a Linen module `module(x, t, cond=None)` into a `Velocity`.

    A velocity is a `field` whose output is shaped like x; it is cast back to the type of x,
    whatever type the network computes in.

    Args:
        module: an instance of a Linen module that keeps 'params' alone.

    Returns:
        Velocity: x is an array [b, *event] or a pytree of them; t is [b], where a scalar is given
            to every row, or [b, n] for a module that reads a time for each of n > 1 tokens, or for
            a dict x, of parts, a dict of the times of each; the leaves of cond lead with b, or with
            1 for all rows. Its functions raise a ValueError
            where t or cond does not have b rows, or the output does not have the structure and
            shapes of x. Params are those of the module.

    Raises:
        TypeError: module is not an instance of a Linen module.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jflow
        >>> from jflow import nets
        >>> v = jflow.velocity(nets.TimeMLP(hidden=(8,)))
        >>> x = jnp.ones((1, 2))
        >>> params = v.init(jax.random.key(0), x, 0.0)
        >>> v.apply(params, x, 0.0)  # zero at initialization
        Array([[0., 0.]], dtype=float32)
    """
    init, apply_field = _lifted("velocity", module)

    def apply(params, x, t, cond=None, *, key=None):
        return like_state(type(module).__name__, apply_field(params, x, t, cond, key=key), x)

    return compiled(Velocity(init, apply))


def flow_map(module: nn.Module) -> FlowMap:
    """Lift a Linen module `module(x, t, cond=None, r=None)` into a `FlowMap`, an average velocity.

    The module is read as u(x, t, r), the average velocity from time t to time r; the output is cast
    back to the type of x. Of the networks of jflow `ResidualMLP`, `UNet`, `ADM`, `DDPMpp`, `DiT`,
    `TokenDiT`, `LightningDiT`, `UViT`, `MMDiT` and `Flux` take r; they read r - t.

    Args:
        module: an instance of a Linen module that keeps 'params' alone.

    Returns:
        FlowMap: x is an array [b, *event] or a pytree of them; t and r are [b], where a scalar is
            given to every row, or [b, n] for a module that reads a time for each of n > 1 tokens;
            the leaves of cond lead with b, or with 1 for all rows. Its functions raise a ValueError
            where t, r or cond does not have b rows, or the output does not have the structure and
            shapes of x. Params are those of the module.

    Raises:
        TypeError: module is not an instance of a Linen module.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jflow
        >>> from jflow import nets
        >>> u = jflow.flow_map(nets.ResidualMLP(width=8, num_blocks=1))
        >>> x = jnp.ones((1, 2))
        >>> params = u.init(jax.random.key(0), x, 0.0, 1.0)
        >>> u.apply(params, x, 0.0, 1.0)  # zero at initialization
        Array([[0., 0.]], dtype=float32)
    """
    check_linen("flow_map", "module", module)
    name = type(module).__name__

    def inputs(x, t, r, cond):
        n = count_rows(name, x)
        cond = check_cond(name, cond, n)
        return x, times_of(name, t, x), cond, times_of(name, r, x)

    def init(key, x, t, r, cond=None):
        return init_linen(module, key, *inputs(x, t, r, cond))

    def apply(params, x, t, r, cond=None, *, key=None):
        return like_state(name, apply_linen(module, params, *inputs(x, t, r, cond), key=key), x)

    return compiled(FlowMap(init, apply))


def _lifted(name: str, module: nn.Module) -> Field:
    check_linen(name, "module", module)

    def init(key, x, t, cond=None):
        return init_linen(module, key, *inputs_of(type(module).__name__, x, t, cond))

    def apply(params, x, t, cond=None, *, key=None):
        return apply_linen(module, params, *inputs_of(type(module).__name__, x, t, cond), key=key)

    return Field(init, apply)


def inputs_of(name, x, t, cond):
    """The arguments of a module for x, t and cond, checked."""
    cond, t = check_cond(name, cond, count_rows(name, x)), times_of(name, t, x)
    return (x, t) if cond is None else (x, t, cond)  # a module without cond may leave it out
