"""Normalizations by statistics over batches, which run along beside the params.

    norm=nets.BatchNorm                                         # of a backbone
    statistics = nets.init_statistics(net, params, x, t)        # goes into frozen['buffers']
    step = train.make_step(loss, optimizer, refresh=nets.update_statistics(loss))
    velocity.apply(nets.with_statistics(params, statistics), x, t)  # rows don't depend on others

Without statistics beside its params a normalization takes those of the batch it sees (`OnlineNorm`
starts anew). The params
hold no statistics; those are a tree of their own, nested as the params are, which `with_statistics`
merges with them for a call. What a call makes of them comes out as their cotangent, so that any
loss, and any function of the network, advances them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.attached import HIDDEN
from jflow._core.checks import frozen_entry
from jflow.nets._normalization import check_options, weighted
from jflow.types import Array, Key, Loss, Params, PyTree

_MODES = ("evaluated", "training")  # the names of statistics among the params of a module
_CALLS = "calls"  # how often they were read


class BatchNorm(nn.Module):
    """Batch normalization of each feature, over all rows and tokens of a batch.

        y = (x - mean) / sqrt(variance + epsilon) * scale + bias

    In training, mean and variance are those of the batch, and rows depend on each other; for
    samples and likelihoods they are running means, see `with_statistics`. Tokens of padding count.

    Attributes:
        decay: of the running means, in (0, 1).
        epsilon: what is added to the variance.
        affine: whether there are weights, scale and bias.
        dtype: the type of the result; None is that of the input and the weights.

    Raises:
        ValueError: decay or epsilon is out of its range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> nets.BatchNorm(affine=False).apply({}, jnp.array([[1.0], [3.0]])).round(3).ravel()
        Array([-1.,  1.], dtype=float32)

    References:
        Ioffe, Szegedy, *Batch Normalization: Accelerating Deep Network Training by Reducing
            Internal Covariate Shift*, 2015, arXiv:1502.03167.
    """

    decay: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True
    dtype: Any = None
    of_batch = True

    def __post_init__(self):
        check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """Normalize.

        Args:
            x: the tokens, [..., width].

        Returns:
            The normalized tokens, [..., width].
        """
        wide = x.astype(float_dtype(x))
        width = x.shape[-1]
        zeros = jnp.zeros_like(wide, shape=(width,))
        old, training = statistics_of(self, {"mean": zeros, "variance": zeros + 1})
        if old is None or training:
            mean = _batch_mean(wide)
            variance = _batch_mean((wide - mean) ** 2)
        else:
            mean, variance = _like(old["mean"], wide), _like(old["variance"], wide)
        y = (wide - mean) * jax.lax.rsqrt(variance + self.epsilon)
        if old is not None and training:
            batch = {"mean": mean.reshape(width), "variance": variance.reshape(width)}
            y = leaving(y, old, running(old, batch, self.decay))
        return weighted(self, y, x)


class PowerNorm(nn.Module):
    """Normalization of each feature by a running root mean square.

        y = s / sqrt(p + epsilon) * scale + bias,      p <- decay p + (1 - decay) mean(s^2)

    where s is x with each token at root mean square 1, in each group of its features. With
    statistics the forward pass reads p from before the batch, and the gradient g of z = s / sqrt(p)
    becomes (g - n z) / sqrt(mean(s^2)) in the place of its own, with n a running estimate of
    mean(g z): n <- n (1 - (1 - decay) mean(z^2)) + (1 - decay) mean(g z). Without, for the first
    steps, it divides by the root mean square of the batch.

    Attributes:
        groups: the number of groups, which divides the width; None is s = x, and the normalization
            is linear in x for samples, but fails where tokens grow faster than p follows.
        decay: of the running means, in (0, 1).
        epsilon: what is added to the mean square.
        affine: whether there are weights, scale and bias.
        dtype: the type of the result; None is that of the input and the weights.

    Raises:
        ValueError: groups do not divide the width, or decay or epsilon is out of its range.

    References:
        Shen, Yao, Gholami, Mahoney, Keutzer, *PowerNorm: Rethinking Batch Normalization in
            Transformers*, 2020, arXiv:2003.07845.
    """

    groups: int | None = 1
    decay: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True
    dtype: Any = None
    of_batch = True

    def __post_init__(self):
        check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """Normalize.

        Args:
            x: the tokens, [..., width].

        Returns:
            The normalized tokens, [..., width].
        """
        wide = x.astype(float_dtype(x))
        if self.groups is not None:
            wide = _scaled(_in_groups(self, wide), self.epsilon).reshape(x.shape)
        zeros = jnp.zeros_like(wide, shape=x.shape[-1:])
        old, training = statistics_of(self, {"square": zeros + 1, "gradient": zeros})
        if old is None:
            y = wide * jax.lax.rsqrt(_batch_mean(wide**2) + self.epsilon)
        elif training:
            y = _power(wide, old, self.decay, self.epsilon)
        else:
            y = wide * jax.lax.rsqrt(_like(old["square"], wide) + self.epsilon)
        return weighted(self, y, x)


class UnifiedNorm(nn.Module):
    """Normalization of each feature by a geometric mean over the last batches.

        y = x / sqrt(G + epsilon) * scale + bias,    G = (p_1 ... p_M)^(1/M),    p_i = mean(x^2)

    over the last M batches, this one included. The gradient g of x / sqrt(G) becomes
    (g - n z) / sqrt(G), with n the mean of mean(g z) over them. Where the arithmetic mean of the
    p_i is more than `outlier` times G, the batch has its own p. Without statistics, for the first
    steps, each batch has. For samples it is linear in x, and can be folded into what reads it.

    Attributes:
        window: M, the number of batches.
        outlier: the ratio of means, above 1.
        epsilon: what is added to the mean square.
        affine: whether there are weights, scale and bias.
        dtype: the type of the result; None is that of the input and the weights.

    Raises:
        ValueError: window is below 1, or outlier or epsilon is out of its range.

    References:
        Yang, Zhang, Lan, et al., *Unified Normalization for Accelerating and
            Stabilizing Transformers*, 2022, arXiv:2208.01313. The ratio that tells outliers is
            ours.
    """

    window: int = 4
    outlier: float = 2.0
    epsilon: float = 1e-5
    affine: bool = True
    dtype: Any = None
    of_batch = True

    def __post_init__(self):
        check_options(self)
        if not self.outlier > 1:
            raise ValueError(f"UnifiedNorm: expected outlier > 1, got {self.outlier}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """Normalize.

        Args:
            x: the tokens, [..., width].

        Returns:
            The normalized tokens, [..., width].
        """
        wide = x.astype(float_dtype(x))
        zeros = jnp.zeros_like(wide, shape=(self.window, x.shape[-1]))
        old, training = statistics_of(self, {"log_squares": zeros, "gradients": zeros})
        if old is None:
            y = wide * jax.lax.rsqrt(_batch_mean(wide**2) + self.epsilon)
        elif training:
            y = _unified(wide, old, self.outlier, self.epsilon)
        else:
            square = jnp.exp(jnp.mean(old["log_squares"], axis=0))
            y = wide * jax.lax.rsqrt(_like(square, wide) + self.epsilon)
        return weighted(self, y, x)


class OnlineNorm(nn.Module):
    """Normalization of each feature by statistics that run along from row to row.

        y = (x - mean) / sqrt(variance + epsilon),    then y / rms(y) * scale + bias

    Mean and variance are running ones of the rows before: the result depends on the order of the
    rows, and a batch of one row trains. The gradient is made orthogonal to the constants and to y,
    as far as the rows before tell, by two running errors u and v of its own. Without statistics
    each call starts from mean 0 and variance 1. In training it has no forward mode, and inside an
    MLP each token counts as a row.

    Attributes:
        decay: of the running mean and variance, in (0, 1).
        gradient_decay: of the running errors of the gradient, in (0, 1).
        epsilon: what is added to variance and mean square.
        affine: whether there are weights, scale and bias.
        dtype: the type of the result; None is that of the input and the weights.

    Raises:
        ValueError: a decay or epsilon is out of its range.

    References:
        Chiley, Sharapov, Kosson, Koster, Reece, Samaniego de la Fuente, Subbiah, James, *Online
            Normalization for Training Neural Networks*, 2019, arXiv:1905.05894. The clamp of its
            activations is left out.
    """

    decay: float = 0.999
    gradient_decay: float = 0.99
    epsilon: float = 1e-5
    affine: bool = True
    dtype: Any = None
    of_batch = True

    def __post_init__(self):
        check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b *n width"]) -> Float[Array, "b *n width"]:
        """Normalize.

        Args:
            x: the tokens, [b, ..., width].

        Returns:
            The normalized tokens, [b, ..., width].
        """
        wide = x.astype(float_dtype(x))
        zeros = jnp.zeros_like(wide, shape=x.shape[-1:])
        first = {"mean": zeros, "variance": zeros + 1, "u": zeros, "v": zeros}
        old, training = statistics_of(self, first)
        if old is None or training:
            rows = wide.reshape(x.shape[0], -1, x.shape[-1])
            state = {**first, _CALLS: jnp.zeros_like(zeros[0])} if old is None else old
            y = _online(rows, state, self.decay, self.gradient_decay, self.epsilon)
            y = y.reshape(x.shape)
        else:
            scale = jax.lax.rsqrt(_like(old["variance"], wide) + self.epsilon)
            y = (wide - _like(old["mean"], wide)) * scale
        return weighted(self, _scaled(y, self.epsilon), x)


class BatchChannelNorm(nn.Module):
    """Batch normalization, and after it a normalization of groups of features of each token.

        y = group_norm(batch_norm(x)) * scale + bias

    The kernels of a network that has it may be standardized too; see `standardized_kernels`.

    Attributes:
        groups: the number of groups, which divides the width.
        decay: of the running means of the batches, in (0, 1).
        epsilon: what is added to variances.
        affine: whether there are weights, scale and bias, of each of the two.
        dtype: the type of the result; None is that of the input and the weights.

    Raises:
        ValueError: groups do not divide the width, or decay or epsilon is out of its range.

    References:
        Qiao, Wang, Liu, Shen, Yuille, *Micro-Batch Training with Batch-Channel Normalization and
            Weight Standardization*, 2019, arXiv:1903.10520. Groups of each token by itself are
            ours.
    """

    groups: int = 2
    decay: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True
    dtype: Any = None
    of_batch = True

    def __post_init__(self):
        check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """Normalize.

        Args:
            x: the tokens, [..., width].

        Returns:
            The normalized tokens, [..., width].
        """
        wide = x.astype(float_dtype(x))
        y = BatchNorm(self.decay, self.epsilon, self.affine, name="batch")(wide)
        y = _in_groups(self, y)
        y = _scaled(y - jnp.mean(y, -1, keepdims=True), self.epsilon)
        return weighted(self, y.reshape(x.shape), x)


def init_statistics(net: nn.Module, params: Params, x: PyTree, *args: Any) -> PyTree:
    """The first statistics of a network's normalizations, for frozen['buffers'].

    Args:
        net: the Linen module.
        params: of the module.
        x: a batch, whose values are not read.
        *args: the other arguments of the module's call, such as t and cond.

    Returns:
        The statistics, nested as the params are; an empty dict where no normalization has any.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> net, x = nets.ViT(width=8, num_layers=1, num_heads=1), jnp.ones((1, 2, 3))
        >>> nets.init_statistics(net, net.init(jax.random.key(0), x)["params"], x)
        {}
    """

    def run(params, x, *args):
        return net.apply({"params": params}, x, *args, mutable=[HIDDEN])[1].get(HIDDEN, {})

    return jax.jit(run)(params, x, *args)


def with_statistics(params: Params, statistics: PyTree, *, training: bool = False) -> Params:
    """Params and the statistics of normalizations, for a call of the network.

    Args:
        params: of the network.
        statistics: of `init_statistics`, or as `update_statistics` advanced them.
        training: whether normalizations treat the call as one of training: batch statistics where
            they are the method's, and gradients as the method has them, without a forward mode.

    Returns:
        Both as one tree, that the network's functions take.
    """
    if not isinstance(statistics, Mapping):
        return params
    if _CALLS in statistics:
        return {**params, _MODES[training]: statistics}
    merged = dict(params)
    for name, inner in statistics.items():
        merged[name] = with_statistics(params.get(name, {}), inner, training=training)
    return merged


def training_statistics(loss: Loss) -> Loss:
    """A loss whose network sees the statistics of frozen['buffers'], as in training.

    `BatchNorm` needs it no more than the others do without it: without statistics a normalization
    takes those of the batch. `PowerNorm`, `UnifiedNorm` and `OnlineNorm` have their own gradient by
    it, which has no forward mode.

    Args:
        loss: whose params are those of the network.

    Returns:
        The loss, with frozen = {'buffers': statistics, ...}.
    """

    def of_buffers(params, key, batch, frozen=None):
        statistics = frozen_entry("training_statistics", frozen, "buffers")
        return loss(with_statistics(params, statistics, training=True), key, batch, frozen)

    return of_buffers


def update_statistics(
    loss: Loss,
) -> Callable[[Params, Mapping[str, PyTree], Key, Mapping[str, PyTree]], dict[str, PyTree]]:
    """A refresh for `make_step` that advances the statistics of normalizations by one batch.

    It takes the derivative of the loss once more, since what a normalization makes of a batch, and
    of its gradient, comes out in the place of the derivative in its statistics. Where the loss has
    none, because the network is called inside a `jax.jvp`, another loss of the same network does
    as well. Calls of the network within the loss are averaged.

    Args:
        loss: whose params are those of the network.

    Returns:
        The refresh (params, frozen, key, batch) -> frozen, with frozen['buffers'] advanced.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jflow
        >>> from jflow import losses, nets
        >>> net = nets.TokenDiT(width=8, num_layers=1, num_heads=1, norm=nets.BatchNorm)
        >>> velocity, x = jflow.velocity(net), jnp.ones((2, 3, 2))
        >>> params = velocity.init(jax.random.key(0), x, 0.0)
        >>> statistics = nets.init_statistics(net, params, x, jnp.zeros(2))
        >>> refresh = nets.update_statistics(losses.flow_matching(velocity))
        >>> frozen = refresh(params, {"buffers": statistics}, jax.random.key(1), {"x": x})
        >>> sorted(frozen["buffers"]["norm"])
        ['calls', 'mean', 'variance']
    """

    def refresh(params, frozen, key, batch):
        old = frozen_entry("update_statistics", frozen, "buffers")

        def value(statistics):
            merged = with_statistics(params, statistics, training=True)
            return loss(merged, key, batch, frozen)[0]

        return {**frozen, "buffers": _advanced(old, jax.grad(value)(old))}

    return refresh


def _advanced(old: PyTree, left: PyTree) -> PyTree:
    """The mean of what the calls left, or the old statistics where there was no call."""
    if _CALLS not in old:
        return {name: _advanced(old[name], left[name]) for name in old}
    calls = left[_CALLS]

    def mean(name):
        count = calls.reshape(calls.shape + (1,) * (old[name].ndim - calls.ndim))
        return jnp.where(count > 0, left[name] / jnp.maximum(count, 1), old[name])

    return {name: old[name] if name == _CALLS else mean(name) for name in old}


def statistics_of(
    module: nn.Module, first: dict[str, Array]
) -> tuple[dict[str, Array] | None, bool]:
    """The statistics of a module, None where it is called without, and whether it is in training.

    To be called once inside a compact method. `first` is what they start from.
    """
    if module.is_mutable_collection(HIDDEN) and not module.is_initializing():
        for name, value in first.items():
            module.put_variable(HIDDEN, name, value)
        module.put_variable(HIDDEN, _CALLS, jnp.zeros_like(next(iter(first.values())), shape=()))
    own = module.variables.get("params", {})
    for mode in _MODES:
        if mode in own:
            return own[mode], mode == "training"
    return None, False


@jax.custom_vjp
def leaving(y: Array, old: dict[str, Array], new: dict[str, Array]) -> Array:
    """y; what `update_statistics` finds in the place of the derivative in `old` is `new`."""
    return y


leaving.defvjp(
    lambda y, old, new: (y, (old, new)),
    lambda kept, g: (g, _as_cotangent(*kept), jax.tree.map(jnp.zeros_like, kept[1])),
)


def running(old: dict[str, Array], batch: dict[str, Array], decay: float) -> dict[str, Array]:
    return {name: decay * old[name] + (1 - decay) * batch[name] for name in batch}


def _as_cotangent(old, new):
    new = {**new, _CALLS: jnp.ones_like(old[_CALLS])}
    return {name: new[name].astype(old[name].dtype) for name in old}


def _power(x, old, decay, epsilon):
    """x / sqrt(p), with the gradient of `PowerNorm`."""

    @jax.custom_vjp
    def power(x, old):
        return x * jax.lax.rsqrt(_like(old["square"], x) + epsilon)

    def forward(x, old):
        z = power(x, old)
        return z, (z, _batch_mean(x**2), old)

    def backward(kept, g):
        z, square, old = kept
        held = old["gradient"]
        dx = (g - _like(held, g) * z) * jax.lax.rsqrt(square + epsilon)
        gain, found = (_batch_mean(a).reshape(held.shape) for a in (z**2, g * z))
        new = {
            **running(old, {"square": square.reshape(held.shape)}, decay),
            "gradient": held * (1 - (1 - decay) * gain) + (1 - decay) * found,
        }
        return dx, _as_cotangent(old, new)

    power.defvjp(forward, backward)
    return power(x, old)


def _unified(x, old, outlier, epsilon):
    """x / sqrt(G), with the gradient of `UnifiedNorm`."""

    def of_window(x, old):
        own = _batch_mean(x**2).reshape(x.shape[-1])
        logs = jnp.concatenate([old["log_squares"][1:], jnp.log(own + epsilon)[None]])
        geometric = jnp.exp(jnp.mean(logs, axis=0))
        usual = jnp.mean(jnp.exp(logs), axis=0) <= outlier * geometric
        return logs, usual, jnp.where(usual, geometric, own)

    @jax.custom_vjp
    def unified(x, old):
        return x * jax.lax.rsqrt(_like(of_window(x, old)[2], x) + epsilon)

    def forward(x, old):
        logs, usual, square = of_window(x, old)
        scale = jax.lax.rsqrt(_like(square, x) + epsilon)
        return x * scale, (x * scale, scale, logs, usual, old)

    def backward(kept, g):
        z, scale, logs, usual, old = kept
        own = _batch_mean(g * z).reshape(g.shape[-1])
        gradients = jnp.concatenate([old["gradients"][1:], own[None]])
        held = jnp.where(usual, jnp.mean(gradients, axis=0), own)
        dx = (g - _like(held, g) * z) * scale
        return dx, _as_cotangent(old, {"log_squares": logs, "gradients": gradients})

    unified.defvjp(forward, backward)
    return unified(x, old)


def _online(x, old, decay, gradient_decay, epsilon):
    """Rows x [b, n, width] by the statistics of the rows before, with `OnlineNorm`'s gradient."""

    def before(x, old):
        """(what the statistics were in front of each row, what they are behind the last)."""
        means = jnp.mean(x, axis=1)
        spreads = jnp.mean((x - means[:, None]) ** 2, axis=1)

        def advance(held, row):
            mean, variance = held
            own, spread = row
            variance_next = decay * variance + (1 - decay) * (spread + decay * (own - mean) ** 2)
            return (decay * mean + (1 - decay) * own, variance_next), held

        return jax.lax.scan(advance, (old["mean"], old["variance"]), (means, spreads))

    def normalize(x, old):
        last, (mean, variance) = before(x, old)
        scale = jax.lax.rsqrt(variance + epsilon)[:, None]
        return (x - mean[:, None]) * scale, scale, last

    @jax.custom_vjp
    def online(x, old):
        return normalize(x, old)[0]

    def forward(x, old):
        y, scale, last = normalize(x, old)
        return y, (y, scale, last, old)

    def backward(kept, g):
        y, scale, (mean, variance), old = kept

        def advance(errors, row):
            u, v = errors
            g, y, scale = row
            g = g - (1 - gradient_decay) * v[None] * y
            v = v + jnp.mean(g * y, axis=0)
            g = g * scale - (1 - gradient_decay) * u[None]
            return (u + jnp.mean(g, axis=0), v), g

        (u, v), dx = jax.lax.scan(advance, (old["u"], old["v"]), (g, y, scale))
        new = {"mean": mean, "variance": variance, "u": u, "v": v}
        return dx, _as_cotangent(old, new)

    online.defvjp(forward, backward)
    return online(x, old)


def _in_groups(module: Any, x: Array) -> Array:
    """Tokens [..., width] as [..., groups, width / groups]."""
    if x.shape[-1] % module.groups:
        raise ValueError(
            f"{type(module).__name__}: expected groups to divide the width {x.shape[-1]}, got"
            f" {module.groups}"
        )
    return x.reshape(*x.shape[:-1], module.groups, -1)


def _scaled(x: Array, epsilon: float) -> Array:
    """x at a root mean square of 1 along its last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + epsilon)


def _batch_mean(x: Array) -> Array:
    """The mean over all axes but the last, which stay as ones."""
    return jnp.mean(x, axis=tuple(range(x.ndim - 1)), keepdims=True)


def _like(row: Array, x: Array) -> Array:
    """[width] in the rank and type of x [..., width]."""
    return row.astype(x.dtype).reshape((1,) * (x.ndim - 1) + row.shape)
