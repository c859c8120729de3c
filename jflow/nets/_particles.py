"""A velocity of particles that does not look at their names, place or orientation."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.checks import check_whole
from jflow._core.linen import flatten_cond
from jflow.nets._embed import check_time, time_features
from jflow.types import Array, Cond


class PairVelocity(nn.Module):
    """A velocity of interacting particles: each pair attracts or repels along its connection.

    `module(x [b, n, d], t [b], cond=None) -> [b, n, d]`, zero at initialization.

        v_i = sum over j of (x_i - x_j) phi(|x_i - x_j|, t, cond)

    with a perceptron phi of the distance. It turns and reflects with x, follows a permutation of
    the particles, does not see where they are, and keeps their centroid. A `flows.cnf` of it maps
    an invariant density to an invariant one. Where the centroid has a law of its own in the base,
    as sqrt(n) times it has under a standard normal, it keeps this law, so that log_prob is the
    log-density of the configuration with its centroid at 0 plus that law's.

    Also known as: equivariant graph network of one layer, EGNN, radial flow, kernel dynamics.

    Attributes:
        hidden: the widths of phi, at least one.
        reach: the largest distance that the radial features resolve; beyond it phi takes its last
            value.
        radial_features: the number of Gaussian features of the distance, from 0 to reach.
        time_features: the number of sinusoidal features of t.
        activation: between the layers.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: a number of features is not a whole number of at least 2, reach is not positive,
            or there is no hidden width.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net, x = nets.PairVelocity((8,), reach=6.0), jnp.ones((2, 4, 3))
        >>> v, params = net.init_with_output(jax.random.key(0), x, jnp.zeros(2))
        >>> v.shape, float(jnp.max(jnp.abs(v)))
        ((2, 4, 3), 0.0)

    References:
        Köhler, Klein, Noé, *Equivariant Flows: Exact Likelihood Generative Learning for Symmetric
            Densities*, 2020, arXiv:2006.02425.
        Satorras, Hoogeboom, Welling, *E(n) Equivariant Graph Neural Networks*, 2021,
            arXiv:2102.09844.
    """

    hidden: Sequence[int] = (64, 64)
    reach: float = 5.0
    radial_features: int = 16
    time_features: int = 8
    activation: Callable[[Array], Array] = nn.silu
    dtype: Any = None

    def __post_init__(self):
        if not self.hidden:
            raise ValueError("PairVelocity: expected at least one hidden width, got hidden=()")
        if isinstance(self.reach, bool) or not self.reach > 0:
            raise ValueError(f"PairVelocity: expected reach > 0, got {self.reach!r}")
        check_whole("PairVelocity", 2, radial_features=self.radial_features)
        check_whole("PairVelocity", 2, time_features=self.time_features)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], t: Array, cond: Cond = None
    ) -> Float[Array, "b n d"]:
        """Predict the velocity.

        Args:
            x: the positions, [b, n, d].
            t: the times, [b].
            cond: None, floats [b, ...], or a pytree of them, such as a temperature.

        Returns:
            The velocity, with the shape and type of x.
        """
        check_time("PairVelocity", x, t)
        if x.ndim != 3:
            raise ValueError(f"PairVelocity: expected x of shape [b, n, d], got {list(x.shape)}")
        b, n = x.shape[:2]
        connection = x[:, :, None] - x[:, None]
        square = jnp.sum(jnp.square(connection), axis=-1)
        itself = jnp.eye(n, dtype=bool)[None]
        distance = jnp.sqrt(jnp.where(itself, 1, jnp.maximum(square, 1e-12)))
        centers = jnp.linspace(0, self.reach, self.radial_features, dtype=x.dtype)
        width = self.reach / (self.radial_features - 1)
        near = jnp.minimum(distance, self.reach)[..., None] - centers[None, None, None]
        radial = jnp.exp(-0.5 * jnp.square(near / width))
        known = [time_features(t, self.time_features, scale=10.0).astype(x.dtype)]
        c = flatten_cond("PairVelocity", cond, b)
        known += [] if c is None else [c.astype(x.dtype)]
        row = jnp.concatenate(known, axis=-1)[:, None, None]
        h = jnp.concatenate([radial, jnp.broadcast_to(row, (b, n, n, row.shape[-1]))], axis=-1)
        for size in self.hidden:
            h = self.activation(nn.Dense(size, dtype=self.dtype)(h))
        phi = nn.Dense(1, dtype=self.dtype, kernel_init=nn.initializers.zeros)(h)
        return jnp.sum(connection * phi.astype(x.dtype), axis=2).astype(x.dtype)
