"""Networks with a Lipschitz constant below one, for residual flows.

Each has two halves: `weights(x, cond)`, a Linen method that reads the params and scales every
kernel under its bound, and `run(weights, x)`, plain arithmetic. `module(x, cond)` is one after the
other; what evaluates the network again and again on the same params (power series, fixed points)
takes the weights once. Nothing is kept between calls.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.linen import flatten_cond
from jflow.nets.norms import check_order, conv_bound, induced_norm
from jflow.types import Array, Cond, PyTree

__all__ = ["LipschitzConv", "LipschitzMLP", "lip_swish"]


def lip_swish(x: Float[Array, "*shape"], beta: Array | float = 1.0) -> Float[Array, "*shape"]:
    """LipSwish, x sigmoid(beta x) / 1.1, whose slope lies in (-0.1, 1) for every beta > 0.

    Args:
        x: an array of any shape.
        beta: a positive number, or an array that broadcasts to x.

    Returns:
        An array shaped like x.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> round(float(nets.lip_swish(jnp.array(11.0), 10.0)), 3)
        10.0

    References:
        Chen, Behrmann, Duvenaud, Jacobsen, *Residual Flows for Invertible Generative Modeling*,
            2019, arXiv:1906.02735.
    """
    return x * jax.nn.sigmoid(beta * x) / 1.1


class LipschitzMLP(nn.Module):
    """A perceptron with |g(x) - g(x')| <= coeff |x - x'| for all params, x and x'.

    `module(x [b, d], cond=None) -> [b, d]`. Every kernel W becomes W min(1, c / |W|), c =
    coeff^(1/layers), with the norm taken by `nets.norms`. The last one starts at zero. cond is
    flattened and enters the first layer without a bound: the constant is that in x.
    `weights(x, cond)` scales the kernels and `run(weights, x)` evaluates the network; the call is
    one after the other.

    Attributes:
        hidden: the widths, at least one.
        coeff: the bound on the Lipschitz constant, in (0, 1).
        activation: a function of Lipschitz constant at most 1, such as nn.elu; None is `lip_swish`
            with a learned beta > 0 for each layer.
        orders: of the norms on x, on each hidden layer and on the output, the first and the last
            alike. None is 2 everywhere, which is certified; (inf, inf, ...) and (1, 1, ...) are
            too, and mixed norms, as in the paper, where `nets.norms.induced_norm` says so.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: there is no hidden layer, coeff is not in (0, 1), or the orders do not fit.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net = nets.LipschitzMLP(hidden=(4,))
        >>> y, variables = net.init_with_output(jax.random.key(0), jnp.ones((1, 2)))
        >>> y
        Array([[0., 0.]], dtype=float32)

    References:
        Chen, Behrmann, Duvenaud, Jacobsen, *Residual Flows for Invertible Generative Modeling*,
            2019, arXiv:1906.02735.
    """

    hidden: Sequence[int] = (128, 128)
    coeff: float = 0.9
    activation: Callable[[Array], Array] | None = None
    orders: Sequence[float] | None = None
    dtype: Any = None

    def __post_init__(self):
        _check("LipschitzMLP", self.hidden, self.coeff)
        if self.orders is not None:
            for p in self.orders:
                check_order("LipschitzMLP", p)
            if len(self.orders) != len(self.hidden) + 2 or self.orders[0] != self.orders[-1]:
                raise ValueError(
                    f"LipschitzMLP: expected {len(self.hidden) + 2} orders, the last equal to the "
                    "first, "
                    f"got {tuple(self.orders)}"
                )
        super().__post_init__()

    @nn.compact
    def weights(self, x: Array, cond: Cond = None) -> PyTree:
        """The layers under their bounds, for `run`.

        Args:
            x: the inputs, [b, d], of which the size is read.
            cond: None, floats [b, ...], or a pytree of them; labels are to be embedded first.

        Returns:
            A list of (kernel, bias, beta), one a layer.
        """
        if x.ndim != 2:
            raise ValueError(f"LipschitzMLP: expected x of shape [b, d], got {list(x.shape)}")
        sizes = [x.shape[-1], *self.hidden, x.shape[-1]]
        orders = [2] * len(sizes) if self.orders is None else self.orders
        shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
        norms = [
            lambda w, p=p, q=q: induced_norm(w, p, q)
            for p, q in zip(orders[:-1], orders[1:], strict=True)
        ]
        return _layers(self, shapes, norms, flatten_cond("LipschitzMLP", cond, x.shape[0]))

    def run(self, weights: PyTree, x: Array) -> Array:
        """Evaluate the network.

        Args:
            weights: what `weights` returned.
            x: the inputs, [b, d].

        Returns:
            g(x), [b, d].
        """

        def dense(h, kernel, bias):
            return h @ kernel + bias

        return _run(self, dense, weights, x)

    def __call__(self, x: Array, cond: Cond = None) -> Array:
        """Scale the kernels and evaluate the network.

        Args:
            x: the inputs, [b, d].
            cond: None, floats [b, ...], or a pytree of them; labels are to be embedded first.

        Returns:
            g(x), [b, d].
        """
        return self.run(self.weights(x, cond), x)


class LipschitzConv(nn.Module):
    """A convolutional network with |g(x) - g(x')| <= coeff |x - x'| for all params, x and x'.

    `module(x [b, H, W, C], cond=None) -> [b, H, W, C]`: convolutions with zeros around the image,
    each scaled under `nets.norms.conv_bound`, certified in the 2-norm, as in `LipschitzMLP`. cond
    becomes a shift of the channels of the first layer. Bounds cost about 2 H W C^3 products a step
    of the Gram iteration. `weights(x, cond)` scales the kernels and `run(weights, x)` evaluates the
    network; the call is one after the other.

    Attributes:
        channels: of the hidden layers, at least one.
        kernels: the sides of the kernels, odd, one more than the hidden layers.
        coeff: the bound on the Lipschitz constant, in (0, 1).
        activation: a function of Lipschitz constant at most 1, such as nn.elu; None is `lip_swish`
            with a learned beta > 0 for each layer.
        dtype: the type of the computation, such as jnp.bfloat16; params stay float32 or better.
            None is the type of the inputs and params.

    Raises:
        ValueError: there is no hidden layer, coeff is not in (0, 1), or the kernels do not fit.

    References:
        Chen, Behrmann, Duvenaud, Jacobsen, *Residual Flows for Invertible Generative Modeling*,
            2019, arXiv:1906.02735.
    """

    channels: Sequence[int] = (64, 64)
    kernels: Sequence[int] = (3, 1, 3)
    coeff: float = 0.9
    activation: Callable[[Array], Array] | None = None
    dtype: Any = None

    def __post_init__(self):
        _check("LipschitzConv", self.channels, self.coeff)
        if len(self.kernels) != len(self.channels) + 1 or any(
            k < 1 or k % 2 == 0 for k in self.kernels
        ):
            raise ValueError(
                f"LipschitzConv: expected {len(self.channels) + 1} odd kernel sides, got "
                f"{tuple(self.kernels)}"
            )
        super().__post_init__()

    @nn.compact
    def weights(self, x: Array, cond: Cond = None) -> PyTree:
        """The layers under their bounds at the size of x, for `run`.

        Args:
            x: the images, [b, H, W, C], of which the size is read.
            cond: None, floats [b, ...], or a pytree of them; labels are to be embedded first.

        Returns:
            A list of (kernel, bias, beta), one a layer.
        """
        if x.ndim != 4:
            raise ValueError(
                f"LipschitzConv: expected x of shape [b, H, W, C], got {list(x.shape)}"
            )
        sizes = [x.shape[-1], *self.channels, x.shape[-1]]
        shapes = [(k, k, m, n) for k, m, n in zip(self.kernels, sizes[:-1], sizes[1:], strict=True)]
        _, height, width, _ = x.shape
        norms = [lambda w: conv_bound(w, (height, width))] * len(shapes)
        return _layers(self, shapes, norms, flatten_cond("LipschitzConv", cond, x.shape[0]))

    def run(self, weights: PyTree, x: Array) -> Array:
        """Evaluate the network.

        Args:
            weights: what `weights` returned.
            x: the images, [b, H, W, C].

        Returns:
            g(x), [b, H, W, C].
        """

        def conv(h, kernel, bias):
            y = jax.lax.conv_general_dilated(
                h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return y + bias[:, None, None, :]

        return _run(self, conv, weights, x)

    def __call__(self, x: Array, cond: Cond = None) -> Array:
        """Scale the kernels and evaluate the network.

        Args:
            x: the images, [b, H, W, C].
            cond: None, floats [b, ...], or a pytree of them; labels are to be embedded first.

        Returns:
            g(x), [b, H, W, C].
        """
        return self.run(self.weights(x, cond), x)


def _check(name, widths, coeff):
    if not widths:
        raise ValueError(f"{name}: expected at least one hidden layer, got none")
    if not 0 < coeff < 1:
        raise ValueError(
            f"{name}: expected a Lipschitz constant coeff in (0, 1) for an invertible map, got "
            f"{coeff}"
        )


def _layers(module, shapes, norms, cond):
    """(kernel, bias [1 or b, n], beta) for each shape; called from inside a compact method."""
    bound = module.coeff ** (1 / len(shapes))
    layers = []
    for i, (shape, norm) in enumerate(zip(shapes, norms, strict=True)):
        last = i == len(shapes) - 1
        kernel = module.param(
            f"kernel_{i}", nn.initializers.zeros if last else nn.initializers.lecun_normal(), shape
        )
        bias = module.param(f"bias_{i}", nn.initializers.zeros, shape[-1:])[None]
        if i == 0 and cond is not None:
            cond_kernel = module.param(
                "cond", nn.initializers.lecun_normal(), (cond.shape[-1], shape[-1])
            )
            bias = bias + cond.astype(cond_kernel.dtype) @ cond_kernel
        elif i == 0 and module.has_variable("params", "cond"):
            raise ValueError(f"{type(module).__name__}: expected cond as at init, got None")
        beta = None
        if not last and module.activation is None:
            beta = jax.nn.softplus(module.param(f"beta_{i}", nn.initializers.constant(0.5), ()))
        layers.append((kernel * (bound / jnp.maximum(norm(kernel), bound)), bias, beta))
    return layers


def _run(module, linear, weights, x):
    dtype = float_dtype(x) if module.dtype is None else module.dtype
    h = x.astype(dtype)
    for i, (kernel, bias, beta) in enumerate(weights):
        h = linear(h, kernel.astype(dtype), bias.astype(dtype))
        if i < len(weights) - 1:
            h = (
                lip_swish(h, beta.astype(dtype))
                if module.activation is None
                else module.activation(h)
            )
    return h.astype(float_dtype(x))
