"""Maximum likelihood of injective flows whose networks have any form."""

import jax
import jax.numpy as jnp

from jflow._core.arrays import flat_rows, float_dtype, sum_event
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_noun, check_same_shape, check_weights, check_whole, need_key
from jflow._core.jacobian import columns_of, dot
from jflow._core.keys import split_key
from jflow.flows import InjectiveFlow
from jflow.types import Loss

__all__ = ["free_form"]


def free_form(model: InjectiveFlow, beta: float = 10.0, *, probes: int = 1) -> Loss:
    """The loss of a free-form injective flow: reconstruction, and a likelihood by its gradient.

        beta |x - g(f(x))|^2 - log p_base(f(x)) - (d / K) sum_k v_k^T f'(x) sg(g'(z) v_k),

    with z = f(x) and K random orthonormal v_k in the d numbers of z. Where g inverts f on the
    surface, the gradient of the last term is on average that of log det(f' f'^T) / 2, the volume
    that a likelihood needs, without a determinant: one product with the derivative of each network
    a probe. The *value* of the term is near d whatever the volume, so that the loss is not in nats:
    `manifold_log_prob` of `flows.injective` is.

    The derivative of the encoder is taken at x and not at its reconstruction, where the loss has no
    minimum (curvature grows without end). The data want a little noise, `losses.noised`, of which
    both networks see one draw. A small beta lets the surface leave the data.

    Also known as: FIF loss, FFF loss.

    Args:
        model: The `flows.injective` that is trained.
        beta: The weight of the squared error, summed over the event.
        probes: K, at most d; with d of them the gradient has no noise.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b]}, which needs a key.
        Its metrics are 'error', the squared error summed over the event, 'latent_nll', -log
        p_base(f(x)), nats of z alone, and 'volume_surrogate', the last term, whose value means
        nothing.

    Raises:
        TypeError: At construction for what is no `InjectiveFlow`.
        ValueError: At construction for a negative beta or probes below 1; at trace time for more
            probes than latent numbers, a batch without 'x' or with unknown keys, and a key that is
            None.

    Examples:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import distributions, flows, losses
        >>> model = flows.injective(nn.Dense(1), nn.Dense(3), distributions.normal((1,)))
        >>> batch = {"x": jnp.ones((4, 3))}
        >>> params = model.init(jax.random.key(0), batch["x"])
        >>> value, metrics = losses.free_form(model)(params, jax.random.key(1), batch)
        >>> sorted(metrics)
        ['error', 'latent_nll', 'volume_surrogate']

    References:
        Sorrenson, Draxler, Rousselot, Hummerich, Zimmermann, Köthe, *Lifting Architectural
            Constraints of Injective Flows*, 2023, arXiv:2306.01843.
        Draxler, Sorrenson, Zimmermann, Rousselot, Köthe, *Free-form Flows: Make Any Architecture a
            Normalizing Flow*, 2023, arXiv:2310.16624.
    """
    check_noun("free_form", model, InjectiveFlow)
    check_weights("free_form", beta=beta)
    check_whole("free_form", probes=probes)

    def loss(params, key, batch, frozen=None):
        keys = split_key(need_key("free_form", key), 4)
        x, cond, weight = read_batch("free_form", batch, ("x", "cond", "weight"))

        def encode(x):
            return model.encode(params, x, cond, key=keys[0])

        def decode(z):
            return model.decode(params, z, cond, key=keys[1])

        z, pull = jax.vjp(encode, x)
        size = flat_rows(z).shape[1]
        if probes > size:
            raise ValueError(
                f"free_form: expected at most {size} probes, one a latent number, got {probes}"
            )
        v = _orthonormal(keys[2], z, size, probes)
        seen, w = columns_of(decode, z, v)
        check_same_shape("free_form", "decoder(encoder(x))", seen, x)
        pulled = jax.vmap(lambda v: pull(v)[0])(v)
        surrogate = -size / probes * jnp.sum(dot(pulled, jax.lax.stop_gradient(w)), axis=0)
        error = sum_event(jnp.square(x - seen).astype(float_dtype(x)))
        latent = -model.base_log_prob(params, z, cond, key=keys[3])
        return mean_of_rows(beta * error + latent + surrogate, weight), {
            "error": mean_of_rows(error, weight),
            "latent_nll": mean_of_rows(latent, weight),
            "volume_surrogate": mean_of_rows(surrogate, weight),
        }

    return loss


def _orthonormal(key, z, size, count):
    """`count` orthonormal vectors for each row, [count, *shape of z]."""
    noise = jax.random.normal(key, (len(z), size, count), float_dtype(z))
    columns = jnp.moveaxis(jnp.linalg.qr(noise)[0], 2, 0)
    return columns.reshape(count, *z.shape).astype(z.dtype)
