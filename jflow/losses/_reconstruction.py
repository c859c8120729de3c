"""Autoencoders that sample their latents."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow._core.arrays import flat_rows, mean_event, sum_event
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import check_same_shape, need_key
from jflow._core.linen import apply_linen, check_linen
from jflow.types import Loss


def reconstruction(net: nn.Module, *, sigma: float = 0.1) -> Loss:
    """The loss of an autoencoder whose latents are drawn: squared error and a small KL divergence.

    Also known as: VAE loss, KL-regularized autoencoder, beta-VAE.

        mean over the D numbers of x of (x - decode(z))^2
            + 2 sigma^2 / D  KL(normal(mean, variance) || normal(0, 1)),
        (mean, log_variance) = encode(x),    z = mean + exp(log_variance / 2) noise

    It is 2 sigma^2 / D times the negative evidence lower bound of a decoder with normal noise of
    deviation sigma, up to a constant. A small sigma keeps detail, and leaves latents far from
    standard normal, which `data.standardize_latents` scales; a large one blurs. Published
    autoencoders add a perceptual and an adversarial term, which this loss has not.

    Args:
        net: A Linen module with methods `encode(x) -> (mean, log_variance)` and `decode(z) -> x`,
            such as `nets.AutoencoderKL`.
        sigma: The deviation of the decoder's noise, in the units of x, positive.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'weight' [b], and 'cond', which it does not
        read}. The metrics are 'error', the mean squared error, and 'kl', in nats per row.

    Raises:
        TypeError: At construction for what is no Linen module.
        ValueError: For a sigma that is not positive; at trace time for a batch without 'x' or with
            an unknown key, and for an output that is not shaped like x.

    References:
        Kingma, Welling, *Auto-Encoding Variational Bayes*, 2013, arXiv:1312.6114.
        Rombach, Blattmann, Lorenz, Esser, Ommer, *High-Resolution Image Synthesis with Latent
            Diffusion Models*, 2021, arXiv:2112.10752.
    """
    check_linen("reconstruction", "net", net)
    if not sigma > 0:
        raise ValueError(f"reconstruction: expected sigma > 0, got {sigma}")

    def loss(params, key, batch, frozen=None):
        need_key("reconstruction", key)
        x, _, weight = read_batch("reconstruction", batch, ("x", "cond", "weight"))
        mean, log_variance = apply_linen(net, params, x, method="encode")
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)
        seen = apply_linen(net, params, z, method="decode")
        error = mean_event((check_same_shape("reconstruction", "decode(z)", seen, x) - x) ** 2)
        kl = 0.5 * sum_event(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        value = error + 2 * sigma**2 / flat_rows(x).shape[1] * kl
        return mean_of_rows(value, weight), {
            "error": mean_of_rows(error, weight),
            "kl": mean_of_rows(kl, weight),
        }

    return loss
