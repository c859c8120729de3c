"""A large network for features and a small one for velocities, which reads a feature a token."""

import jax
import jax.numpy as jnp

from jflow._core.checks import check_key, check_noun, check_params
from jflow._core.sites import Headed, check_features, site_rows
from jflow.types import Field, Velocity

__all__ = ["Headed", "headed"]


def headed(backbone: Field, head: Velocity) -> Headed:
    """A backbone that makes a feature for each token, and a head that makes a velocity of each.

    The head sees one token at a time, and all that it knows of the others is the feature of its
    token. A backbone whose features [b, k] are of the whole event makes a head of the whole event.

    Args:
        backbone: a field from (x [b, *event], t, cond) to features [b, *sites, k], such as
            `jflow.field` of a transformer over tokens.
        head: a velocity of (y [rows, *rest], s [rows], h [rows, k]), such as `jflow.velocity` of
            `nets.ResidualMLP`.

    Returns:
        Headed: for `losses.transition_matching` and `solvers.sample_transitions`.

    Raises:
        TypeError: at construction for what is no `Field` or `Velocity`.
        ValueError: at trace time for features of another form.

    Examples:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jflow
        >>> from jflow import nets
        >>> class Pointwise(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, t, cond=None):
        ...         return nn.Dense(4)(x)
        >>> net = nets.headed(jflow.field(Pointwise()), jflow.velocity(nets.TimeMLP((8,))))
        >>> x, t = jnp.zeros((2, 5, 3)), jnp.zeros(2)
        >>> params = net.init(jax.random.key(0), x, t)
        >>> net.features(params, x, t).shape
        (2, 5, 4)

    References:
        Shaul, Singer, Gat, Lipman, *Transition Matching: Scalable and Flexible Generative
            Modeling*, 2025, arXiv:2506.23589.
        Li, Tian, Li, Deng, He, *Autoregressive Image Generation without Vector Quantization*, 2024,
            arXiv:2406.11838, for a small generative head on the features of a token.
    """
    check_noun("headed", backbone, Field, Velocity)
    check_noun("headed", head, Velocity, Field)

    def init(key, x, t, cond=None):
        check_key("headed.init", key)
        backbone_key, head_key = jax.random.split(key)
        made = backbone.init(backbone_key, x, t, cond)
        h = check_features("headed", x, backbone.apply(made, x, t, cond))
        sites = h.shape[1:-1]
        y = site_rows(jnp.asarray(x), sites)
        s = jnp.zeros_like(y, shape=y.shape[:1])
        return {"backbone": made} | init_head(head_key, y, s, site_rows(h, sites))

    def features(params, x, t, cond=None, *, key=None):
        check_params("headed", params, "backbone", "head")
        return check_features("headed", x, backbone.apply(params["backbone"], x, t, cond, key=key))

    def init_head(key, y, s, cond=None):
        return {"head": head.init(key, y, s, cond)}

    def apply(params, y, s, cond=None, *, key=None):
        return head.apply(params["head"], y, s, cond, key=key)

    return Headed(init, features, Velocity(init_head, apply))
