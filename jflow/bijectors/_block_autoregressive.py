"""Block neural autoregressive flow: one masked network that is monotone in each number."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype, sum_event
from jflow._core.checks import check_side, check_whole
from jflow._core.implicit import monotone_root
from jflow._core.linen import flatten_cond
from jflow._core.nouns import compiled
from jflow.bijectors._autoregressive import Solver, solve_causal
from jflow.types import Array, Bijector, Params

__all__ = ["block_autoregressive"]

_FULL = jax.lax.Precision.HIGHEST


def block_autoregressive(
    features: int,
    hidden: int = 8,
    num_layers: int = 2,
    *,
    leak: float = 0.1,
    solver: Solver | None = None,
) -> Bijector:
    """Map vectors by one masked network that is increasing in each number.

    The map is

        x_i = (1 - g_i) z_i + g_i f_i(z_i; z_1 .. z_{i-1}, cond),

    f a network of `num_layers` layers of features * hidden units. The weights between the units of
    one number are exponentials, those from units of earlier numbers are free, those from later ones
    absent; so f is increasing in its own number and the Jacobian is triangular. Its diagonal is a
    product of positive blocks, multiplied in log-space. The gate g = sigmoid(gate_i) starts at
    0.12, near the identity.

    `inverse` is numerical: given the earlier numbers each f_i is a scalar function with a root; all
    are solved at once, and this is repeated as in `autoregressive`, by `solver`. Gradients are
    implicit, and rows without convergence are NaN.

    Ours: the activation is tanh(u) + leak * u, since with the published tanh the image of f is
    bounded, and what lies outside has no preimage; and weight normalization is left out.

    Also known as: BNAF layer.

    Args:
        features: d, the numbers of a vector; x is [b, d].
        hidden: the hidden units of every number.
        num_layers: the hidden layers of this one map.
        leak: the slope of the linear part of the activation, above 0.
        solver: of the inverse, `jacobi()` or `sequential()`; None is `jacobi()`.

    Returns:
        Bijector: the map, with params {'layers', 'gate'}; cond is None, a float array [b, ...] or a
            pytree of them.

    Raises:
        ValueError: features, hidden or num_layers is below 1, leak is not positive, or x is not
            [b, d].

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import bijectors
        >>> bijector = bijectors.block_autoregressive(2, hidden=2, num_layers=1)
        >>> z = jnp.ones((3, 2))
        >>> params = jax.eval_shape(bijector.init, jax.random.key(0), z)
        >>> params["gate"].shape
        (2,)

    References:
        De Cao, Titov, Aziz, *Block Neural Autoregressive Flow*, 2019, arXiv:1904.04676.
    """
    check_whole("block_autoregressive", features=features, hidden=hidden, num_layers=num_layers)
    if not leak > 0:
        raise ValueError(
            f"block_autoregressive: expected leak > 0 (without it the map is not onto), got {leak}"
        )
    leak = float(leak)  # a number of numpy's would bring float64 along
    widths = [1, *[hidden] * num_layers, 1]
    earlier = np.tri(features, k=-1, dtype=bool).T[
        :, None, :, None
    ]  # [from i, its units, to j, its units]: i < j

    def check(x):
        if x.ndim != 2 or x.shape[-1] != features:
            raise ValueError(
                f"block_autoregressive: expected x of shape [b, {features}], got {list(x.shape)}"
            )

    def init(key, x, cond=None, *, side="data"):
        check_side(side)
        check(x)
        c = flatten_cond("block_autoregressive", cond, x.shape[0])
        normal = lambda key, *shape: jax.random.normal(key, shape, float_dtype(x))  # noqa: E731
        layers, keys = {}, jax.random.split(key, num_layers + 2)
        for i, (m, n) in enumerate(zip(widths, widths[1:], strict=False)):
            own, others, bias = jax.random.split(keys[i], 3)
            layers[str(i)] = {
                "own": 0.5 * normal(own, features, m, n),
                "others": normal(others, features, m, features, n) / math.sqrt(features * m),
                "bias": normal(bias, features, n)
                * float(i < num_layers),  # spreads the steps of the first layers' tanh
            }
        if c is not None:
            layers["0"]["cond"] = normal(keys[-1], c.shape[-1], features, hidden) / math.sqrt(
                c.shape[-1] or 1
            )
        return {"layers": layers, "gate": jnp.full_like(layers["0"]["bias"][:, 0], -2.0)}

    def units(layer, i, h, log_slope, context):
        """One layer of each number on its own: h, log_slope [b, d, m] -> [b, d, n].

        context [b, d, n] is the rest.
        """
        log_weight = layer["own"] - math.log(widths[i])
        h = jnp.einsum("bdm,dmn->bdn", h, jnp.exp(log_weight), precision=_FULL) + context
        log_slope = jax.nn.logsumexp(log_slope[..., None] + log_weight[None], axis=-2)
        if i == num_layers:
            return h, log_slope
        steps = jnp.tanh(h)
        return steps + leak * h, log_slope + jnp.log(leak + (1 - steps) * (1 + steps))

    def gated(gate, x, h, log_slope):
        y = x * jax.nn.sigmoid(-gate)[None] + h[..., 0] * jax.nn.sigmoid(gate)[None]
        keep, change = jax.nn.log_sigmoid(-gate)[None], jax.nn.log_sigmoid(gate)[None]
        return y, jnp.logaddexp(jnp.broadcast_to(keep, x.shape), change + log_slope[..., 0])

    def scalar(x, args):
        """What each number goes through, given the contexts."""
        params, contexts = args
        h, log_slope = x[..., None], jnp.zeros_like(x)[..., None]
        for i, context in enumerate(contexts):
            h, log_slope = units(params["layers"][str(i)], i, h, log_slope, context)
        return gated(params["gate"], x, h, log_slope)

    def network(params: Params, x: Array, cond) -> tuple[Array, Array, list[Array]]:
        """(y, log_slope, contexts): contexts [b, d, n] are what comes from earlier numbers."""
        c = flatten_cond("block_autoregressive", cond, x.shape[0])
        if ("cond" in params["layers"]["0"]) != (c is not None):
            said = "cond, as at init, got None" if c is None else "no cond, since init had none"
            raise ValueError(f"block_autoregressive: expected {said}")
        if c is not None and c.shape[-1] != (size := params["layers"]["0"]["cond"].shape[0]):
            raise ValueError(
                f"block_autoregressive: expected cond of {size} numbers a row, as at init, got "
                f"{c.shape[-1]}"
            )
        h, log_slope, contexts = x[..., None], jnp.zeros_like(x)[..., None], []
        for i in range(num_layers + 1):
            layer = params["layers"][str(i)]
            context = (
                jnp.einsum("bim,imjn->bjn", h, jnp.where(earlier, layer["others"], 0))
                + layer["bias"][None]
            )
            if i == 0 and c is not None:
                context += jnp.einsum("bc,cdn->bdn", c, layer["cond"])
            contexts.append(context)
            h, log_slope = units(layer, i, h, log_slope, context)
        return *gated(params["gate"], x, h, log_slope), contexts

    def forward(params, z, cond=None, *, key=None):
        check(z)
        x, log_slope, _ = network(params, z.astype(float_dtype(z)), cond)
        return x.astype(z.dtype), sum_event(log_slope)

    def step(x, args):
        y, params, cond = args
        return monotone_root(scalar, y, (params, network(params, x, cond)[2]))

    def inverse(params, x, cond=None, *, key=None):
        check(x)
        z, _ = solve_causal(step, x, (params, cond), solver, features)
        _, log_slope, _ = network(params, z, cond)
        return z.astype(x.dtype), -sum_event(log_slope)

    return compiled(Bijector(init, forward, inverse))
