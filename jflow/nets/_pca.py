"""Principal components as an autoencoder."""

import jax.numpy as jnp

from jflow._core.arrays import flat_rows
from jflow._core.checks import check_whole
from jflow.nets._autoencoder_kl import Autoencoder


def pca_autoencoder(dimensions: int) -> Autoencoder:
    """The autoencoder of principal components, which `init` fits.

    Also known as: PCA, principal component analysis, linear autoencoder.

    It is the linear one of least squared error:

        encode: z = A (x - mean),    decode: x = mean + A^T z

    with A the `dimensions` orthonormal directions in which the rows given to `init` vary most, in
    the order of their variance. A flow on these latents has a distance to the data that splits
    without rest: for latents z that are drawn by any means,

        W2^2(decode(z), x) = mean |x - decode(encode(x))|^2 + W2^2(z, encode(x)),

    with W2 the 2-Wasserstein distance between equally many rows. The first part is the price of the
    autoencoder, the second one that of the flow.

    Args:
        dimensions: How many numbers a latent has.

    Returns:
        Autoencoder: between x [b, *event], floats, and latents [b, dimensions], of params {'mean'
        [*event], 'components' [dimensions, *event]}. It draws nothing: a key is ignored. `init`
        raises a ValueError for fewer rows or numbers than dimensions.

    Raises:
        ValueError: dimensions is not a whole number of at least 1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]])  # on a line
        >>> pca = nets.pca_autoencoder(1)
        >>> params = pca.init(jax.random.key(0), x)
        >>> bool(jnp.allclose(pca.decode(params, pca.encode(params, x)), x, atol=1e-5))
        True

    References:
        Pearson, *On Lines and Planes of Closest Fit to Systems of Points in Space*, 1901.
    """
    check_whole("pca_autoencoder", dimensions=dimensions)

    def init(key, x):
        flat = flat_rows(x)
        if dimensions > min(flat.shape):
            raise ValueError(
                f"pca_autoencoder: expected at least {dimensions} rows and numbers in a row, got x"
                f" {list(x.shape)}"
            )
        mean = jnp.mean(flat, axis=0)
        components = jnp.linalg.svd(flat - mean[None], full_matrices=False)[2][:dimensions]
        at = jnp.argmax(jnp.abs(components), axis=1, keepdims=True)
        sign = jnp.sign(jnp.take_along_axis(components, at, axis=1))  # or it would be arbitrary
        return {
            "mean": mean.reshape(x.shape[1:]),
            "components": (sign * components).reshape(dimensions, *x.shape[1:]),
        }

    def encode(params, x, *, key=None):
        return flat_rows(x - params["mean"][None]) @ flat_rows(params["components"]).T

    def decode(params, z):
        x = z @ flat_rows(params["components"])
        return params["mean"][None] + x.reshape(len(z), *params["mean"].shape)

    return Autoencoder(init, encode, decode)
