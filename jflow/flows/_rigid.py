"""Flows of rotations, as quaternions, and of rigid bodies."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from jflow import bijectors, distributions, manifolds, nets
from jflow._core.arrays import float_dtype
from jflow._core.linen import apply_linen, init_linen
from jflow.flows._flow import flow
from jflow.types import Bijector, Flow

__all__ = ["rigid_body", "rotations"]


def rotations(
    *,
    depth: int = 8,
    hidden: Sequence[int] = (64, 64),
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
) -> Flow:
    """A flow of rotations of space, as unit quaternions with p(q) = p(-q).

    Every layer is a projective linear map, a coupling that turns two of the four numbers by an
    angle and a projective map which a network of the products of the other two gives, and a
    rotation of the four. All of them are smooth and odd, f(-q) = -f(q), and the base is uniform:
    the density is even, and thus one of rotations. Both directions take one pass. Ours: the
    coupling and the rotation; the paper's layers are projective maps, conditioned on other bodies.

    `log_prob` is with respect to the surface of the sphere of quaternions, of which q and -q each
    hold half: as a law of rotations with respect to the uniform (Haar) law of total 1 the
    log-density is log(2 pi^2) more. Behind `bijectors.rotation_matrix` (`flows.transformed`) it is
    a flow of matrices, with respect to the volume of `manifolds.so3`.

    Also known as: SO(3) flow, quaternion flow, double Moebius flow.

    Args:
        depth: the number of layers.
        hidden: the widths of the MLP of each layer.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: of the MLPs.

    Returns:
        Flow: the flow of unit quaternions [b, 4], with params {'bijector', 'base'}.

    Raises:
        ValueError: depth is below 1, or there is no hidden width.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import flows
        >>> flow = flows.rotations(depth=1, hidden=(4,))
        >>> q = jnp.array([[0.0, 0.6, 0.0, 0.8], [0.0, -0.6, 0.0, -0.8]])  # one rotation
        >>> params = flow.init(jax.random.key(0), q)
        >>> [round(float(p), 3) for p in flow.log_prob(params, q)]  # -log(2 pi^2), uniform at first
        [-2.983, -2.983]

    References:
        Köhler, Invernizzi, de Haan, Noé, *Rigid Body Flows for Sampling Molecular Crystal
            Structures*, 2023, arXiv:2301.11355.
    """
    net = nets.MLP(tuple(hidden), activation)
    layer = _turn(net, bijectors.pair_products)
    return _stack(layer, depth, embed, distributions.uniform_on(manifolds.sphere(3)), (4,))


def rigid_body(
    *,
    depth: int = 8,
    hidden: Sequence[int] = (64, 64),
    embed: nn.Module | None = None,
    activation: Callable = nn.silu,
) -> Flow:
    """A flow of a rigid body: its orientation, a unit quaternion, and its position, jointly.

    x = (w, x, y, z, p_1, p_2, p_3). Every layer turns the quaternion as in `rotations`, told the
    position too, and then scales and shifts one coordinate of the position, told the products of
    the quaternion and the other coordinates; coordinates take turns. The density is the same for q
    and -q; it is with respect to the surface of the sphere of quaternions times the volume of
    space. Positions first meet `bijectors.standardize`.

    Also known as: SE(3) flow, rigid body flow.

    Args:
        depth: the number of layers; the three coordinates take turns.
        hidden: the widths of the two MLPs of each layer.
        embed: a Linen module that maps cond to a vector, such as nn.Embed(10, 16) for labels; a
            float cond needs none.
        activation: of the MLPs.

    Returns:
        Flow: the flow of [b, 7], with params {'bijector', 'base'}.

    Raises:
        ValueError: depth is below 1, or there is no hidden width.

    Examples:
        >>> import jax
        >>> from jflow import distributions, flows, manifolds
        >>> flow = flows.rigid_body(depth=1, hidden=(4,))
        >>> space = distributions.normal((3,))
        >>> uniform = distributions.uniform_on(manifolds.sphere(3))
        >>> poses = distributions.split(uniform, space, 4)
        >>> x = poses.sample({"first": {}, "rest": {}}, jax.random.key(0), 5)
        >>> params = flow.init(jax.random.key(1), x)
        >>> flow.sample(params, jax.random.key(2), 3).shape
        (3, 7)

    References:
        Köhler, Invernizzi, de Haan, Noé, *Rigid Body Flows for Sampling Molecular Crystal
            Structures*, 2023, arXiv:2301.11355; the layers are ours, see `rotations`.
    """
    net = nets.MLP(tuple(hidden), activation)
    quaternion, position = slice(0, 4), slice(4, 7)

    def even(size):
        """The products of the first numbers, and the others as they are."""
        return lambda rest: jnp.concatenate(
            [bijectors.pair_products(rest[..., :size]), rest[..., size:]], axis=-1
        )

    move = bijectors.amortized(bijectors.affine((1,)), net)
    layer = bijectors.chain(
        _turn(net, even(2), quaternion),
        bijectors.given_rest(move, slice(6, 7), even(4)),
        bijectors.on_part(bijectors.permute([2, 0, 1]), position),
    )
    base = distributions.split(
        distributions.uniform_on(manifolds.sphere(3)), distributions.normal((3,)), 4
    )
    units = bijectors.on_part(bijectors.standardize((3,)), position)
    return _stack(layer, depth, embed, base, (7,), units)


def _turn(net, features, part: slice = slice(0, 4)) -> Bijector:
    """An odd and smooth map of the quaternion in `part`."""
    return bijectors.chain(
        bijectors.on_part(bijectors.projective(4), part),
        bijectors.given_rest(_pair(net), slice(0, 2), features),
        bijectors.on_part(bijectors.householder(4), part),
    )


def _pair(net: nn.Module) -> Bijector:
    """x = R(angle) |z| A z / |A z| of two numbers z, with an angle and A of determinant 1 that a
    network makes of cond. A - I is in proportion to |z|^2: else the density would jump at z = 0."""

    def numbers(params, x, cond, key):
        wide = x.astype(float_dtype(x))
        empty = jnp.zeros_like(wide, shape=(len(x), 0))
        raw = apply_linen(net, params["net"], empty, cond, key=key)
        raw = raw.astype(wide.dtype) @ params["kernel"] + params["bias"][None]
        square = jnp.sum(jnp.square(wide), axis=1)
        angle, (low, up, log_scale) = raw[:, 0], square[None] * raw[:, 1:].T
        scale = jnp.exp(jnp.clip(log_scale, -20, 20))
        return wide, square, angle, (scale, up, low * scale, low * up + 1 / scale)

    def init(key, x, cond=None, *, side="data"):
        empty = jnp.zeros_like(x, shape=(len(x), 0), dtype=float_dtype(x))
        params = init_linen(net, key, empty, cond)
        size = apply_linen(net, params, empty, cond).shape[-1]
        zeros = jnp.zeros_like(empty, shape=(size, 4))
        return {"net": params, "kernel": zeros, "bias": zeros[0]}

    def bend(x, square, a, b, c, d):
        y = jnp.stack([a * x[:, 0] + b * x[:, 1], c * x[:, 0] + d * x[:, 1]], axis=1)
        after = jnp.sum(jnp.square(y), axis=1)
        at_zero = square == 0
        ratio = jnp.where(at_zero, 1, after) / jnp.where(at_zero, 1, square)
        return y / jnp.sqrt(ratio)[:, None], -jnp.log(ratio)

    def spin(x, angle):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], axis=1)

    def forward(params, z, cond=None, *, key=None):
        wide, square, angle, matrix = numbers(params, z, cond, key)
        x, log_det = bend(wide, square, *matrix)
        return spin(x, angle).astype(z.dtype), log_det

    def inverse(params, x, cond=None, *, key=None):
        wide, square, angle, (a, b, c, d) = numbers(params, x, cond, key)
        z, log_det = bend(spin(wide, -angle), square, d, -b, -c, a)
        return z.astype(x.dtype), log_det

    return Bijector(init, forward, inverse)


def _stack(layer, depth, embed, base, event_shape, *last) -> Flow:
    bijector = bijectors.scan(layer, depth)
    if embed is not None:
        bijector = bijectors.conditioned(bijector, embed)
    return flow(bijectors.chain(bijector, *last), base, event_shape=event_shape)
