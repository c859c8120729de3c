"""Normalizations of tokens, and where they stand in the block of a transformer.

The `norm` of a backbone is a function that makes a module, `norm(affine=..., dtype=..., name=...)`,
whose call takes an array [..., width] to one of its shape: a class of this file, `partial` of one
with options, or one's own. It may also be a `Norms`, which says where several of them stand.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole, described
from jflow.types import Array

Norm = Callable[..., nn.Module]


class LayerNorm(nn.LayerNorm):
    """Layer normalization: the deviation from the mean of a token, in its standard deviations.

        y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias

    It is Flax's, with one switch for both weights. Its variance is the mean square of what deviates
    from the mean, which keeps the digits of rows far from zero.

    Attributes:
        epsilon: what is added to the variance.
        dtype: the type of the result; None is that of the input and the weights.
        use_fast_variance: whether the variance is mean(x^2) - mean(x)^2 instead.
        affine: whether there are weights, scale and bias.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> nets.LayerNorm(affine=False).apply({}, jnp.array([[1.0, 3.0]])).round(3)
        Array([[-1.,  1.]], dtype=float32)

    References:
        Ba, Kiros, Hinton, *Layer Normalization*, 2016, arXiv:1607.06450.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    use_fast_variance: bool = False
    affine: bool = True

    def __post_init__(self):
        if not self.affine:
            self.use_bias = self.use_scale = False
        super().__post_init__()


class RMSNorm(nn.RMSNorm):
    """Normalization of a token by its root mean square.

        y = x / sqrt(mean(x^2) + epsilon) * scale

    It is `LayerNorm` on tokens whose mean is zero; `pre_rms_norm` keeps them there. It is Flax's,
    with the switch of its weights named as in the others.

    Attributes:
        epsilon: what is added to the mean square.
        dtype: the type of the result; None is that of the input and the weights.
        affine: whether there are weights, scale.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> y = nets.RMSNorm(affine=False).apply({}, jnp.array([1.0, -7.0]))
        >>> [round(float(number), 3) for number in y]
        [0.2, -1.4]

    References:
        Zhang, Sennrich, *Root Mean Square Layer Normalization*, 2019, arXiv:1910.07467.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    affine: bool = True

    def __post_init__(self):
        if not self.affine:
            self.use_scale = False
        super().__post_init__()


class CRMSNorm(nn.Module):
    """Compressed RMS normalization: that of a token of mean zero whose last number is left out.

        y = x / sqrt((sum(x^2) + sum(x)^2) / (width + 1) + epsilon) * scale

    A token of width + 1 numbers that sum to zero is known by all but the last, -sum(x); this is its
    `RMSNorm`, and so its `LayerNorm`, of which the last number is left out too.

    Attributes:
        epsilon: what is added to the mean square.
        affine: whether there are weights, scale.
        dtype: the type of the result; None is that of the input and the weights.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> whole = jnp.array([1.0, 3.0, -4.0])
        >>> y = nets.CRMSNorm(affine=False).apply({}, whole[:-1])
        >>> [round(float(number), 3) for number in y]
        [0.34, 1.019]
        >>> y = nets.LayerNorm(affine=False).apply({}, whole)
        >>> [round(float(number), 3) for number in y]
        [0.34, 1.019, -1.359]

    References:
        Jiang, Gu, Zhu, Pan, *Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient
            Pre-LN Transformers*, 2023, arXiv:2305.14858.
    """

    epsilon: float = 1e-6
    affine: bool = True
    dtype: Any = None

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
        total = jnp.sum(wide**2, -1, keepdims=True) + jnp.sum(wide, -1, keepdims=True) ** 2
        y = wide * jax.lax.rsqrt(total / (x.shape[-1] + 1) + self.epsilon)
        return weighted(self, y, x, bias=False)


class DyT(nn.Module):
    """Dynamic tanh: a saturating function in the place of a normalization.

        y = scale tanh(alpha x) + bias,      alpha one number among the weights

    No mean is taken over anything. Its slope at 0 is scale alpha, and |y - bias| <= |scale|.

    Attributes:
        alpha: the first alpha, above 0.
        affine: whether there are scale and bias; alpha is learned in any case.
        dtype: the type of the result; None is that of the input and the weights.

    Raises:
        ValueError: alpha is not positive.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> x = jnp.array([[0.0, 100.0]])
        >>> nets.DyT().init_with_output(jax.random.key(0), x)[0]
        Array([[0., 1.]], dtype=float32)

    References:
        Zhu, Chen, He, LeCun, Liu, *Transformers without Normalization*, 2025, arXiv:2503.10622.
    """

    alpha: float = 0.5
    affine: bool = True
    dtype: Any = None

    def __post_init__(self):
        check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """Squash.

        Args:
            x: the tokens, [..., width].

        Returns:
            The tokens after it, [..., width].
        """
        alpha = self.param("alpha", nn.initializers.constant(self.alpha), ())
        return weighted(self, jnp.tanh(alpha * x.astype(float_dtype(x))), x)


class UnitNorm(nn.Module):
    """Normalization of a token to length 1.

        y = x / sqrt(sum(x^2) + tiny)

    Attributes:
        affine: whether there are weights, scale.
        dtype: the type of the result; None is that of the input and the weights.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import nets
        >>> nets.UnitNorm(affine=False).apply({}, jnp.array([[3.0, 4.0]]))
        Array([[0.6, 0.8]], dtype=float32)
    """

    affine: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """Normalize.

        Args:
            x: the tokens, [..., width].

        Returns:
            The normalized tokens, [..., width].
        """
        return weighted(self, unit(x), x, bias=False)


class NoNorm(nn.Module):
    """No normalization: the token itself, with one bias for all of its numbers.

    Attributes:
        affine: whether there is the bias [], zero at first.
        dtype: the type of the result; None is that of the input and the weights.

    References:
        Zhang, Dauphin, Ma, *Fixup Initialization: Residual Learning Without Normalization*, 2019,
            arXiv:1901.09321, for the bias; see `fixup`.
    """

    affine: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """Add the bias.

        Args:
            x: the tokens, [..., width].

        Returns:
            The tokens, [..., width].
        """
        if self.affine:
            x = x + self.param("bias", nn.initializers.zeros, ()).astype(x.dtype)
        return x if self.dtype is None else x.astype(self.dtype)


class Norms(NamedTuple):
    """Where normalizations stand in the blocks of a transformer, for its `norm`.

        h <- h + gate after_attention(attention(pre(h))),    h <- h + gate after_mlp(mlp(pre(h)))

    A field is a function that makes a module, as the `norm` of a backbone is, and None is no
    normalization there. Where time and cond modulate what `pre` returns, it has no weights of its
    own; what stands after a branch does, and comes before the gate.

    Attributes:
        pre: in front of each branch, and of the head.
        first: of the tokens in front of the first block.
        queries_keys: of queries and keys [b, n, heads, size], each with weights [size].
        heads: of what the attention returns, [b, n, heads, size], before its last linear map.
        after_attention: of what the attention adds.
        hidden: inside the MLP, behind its nonlinearity.
        after_mlp: of what the MLP adds.
        join: the module of (h, branch, gate) in the place of h + gate branch.
    """

    pre: Norm = LayerNorm
    first: Norm | None = None
    queries_keys: Norm | None = None
    heads: Norm | None = None
    after_attention: Norm | None = None
    hidden: Norm | None = None
    after_mlp: Norm | None = None
    join: Norm | None = None


def peri_norm(norm: Norm = LayerNorm) -> Norms:
    """Normalizations in front of each branch and behind it, and of the first tokens.

    Also known as: Peri-LN, sandwich norm.

        h <- h + gate post(f(pre(h)))

    What a branch adds has a root mean square of at most the largest |scale| of its `post`, whatever
    the weights of the branch, so that the tokens grow at most linearly with depth.

    Args:
        norm: a function that makes a module.

    Returns:
        Where they stand, for the `norm` of a backbone.

    Examples:
        >>> from jflow import nets
        >>> net = nets.DiT(norm=nets.peri_norm(nets.RMSNorm))

    References:
        Kim, Lee, Park, Oh, Kim, Yoo, Shin, Han, Shin, Yoo, *Peri-LN: Revisiting Normalization Layer
            in the Transformer Architecture*, 2025, arXiv:2502.02732. The place before the gate of
            adaLN is ours.
    """
    return Norms(norm, first=norm, after_attention=norm, after_mlp=norm)


def norm_former(norm: Norm = LayerNorm) -> Norms:
    """Normalizations in front of each branch, behind the attention, and inside the MLP.

    Also known as: NormFormer. The attention's heads have a weight each, 1 at first.

    Args:
        norm: a function that makes a module.

    Returns:
        Where they stand, for the `norm` of a backbone.

    Examples:
        >>> from jflow import nets
        >>> net = nets.TokenDiT(norm=nets.norm_former())

    References:
        Shleifer, Weston, Ott, *NormFormer: Improved Transformer Pretraining with Extra
            Normalization*, 2021, arXiv:2110.09456.
    """
    return Norms(norm, heads=HeadScale, after_attention=norm, hidden=norm)


def pre_rms_norm() -> Norms:
    """RMS normalization of tokens that are kept at mean zero: `LayerNorm` in another form.

    Also known as: Pre-RMSNorm.

        h <- h + (y - mean(y)),    y = gate f(pre(h)),    mean(h) = 0 from the first tokens on

    With the same params the network computes the same function as with norm=LayerNorm, where that
    has no weights. Under gates the mean is taken behind them: folded into the last linear map of a
    branch, as without gates, it would not be zero.

    Returns:
        Where they stand, for the `norm` of a backbone.

    Examples:
        >>> from jflow import nets
        >>> net = nets.DiT(norm=nets.pre_rms_norm())

    References:
        Jiang, Gu, Zhu, Pan, *Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient
            Pre-LN Transformers*, 2023, arXiv:2305.14858. The place behind the gate is ours.
    """
    return Norms(RMSNorm, first=Center, join=CenteredSum)


def ngpt(rate: float = 0.05) -> Norms:
    """Tokens on the unit sphere, which each branch moves toward its own direction.

    Also known as: nGPT, the normalized transformer.

        h <- unit(h + a (1 + gate) (unit(f(sqrt(width) h)) - h)),    a = |learned|, `rate` at first

    Queries and keys are normalized too, with weights of their own. The paper also keeps the rows of
    all matrices at length 1 after each update, without weight decay: `unit_kernels` behind the
    optimizer does.

    Args:
        rate: the first a, above 0.

    Returns:
        Where they stand, for the `norm` of a backbone.

    Raises:
        ValueError: rate is not positive.

    Examples:
        >>> from jflow import nets
        >>> net = nets.DiT(norm=nets.ngpt())

    References:
        Loshchilov, Hsieh, Sun, Ginsburg, *nGPT: Normalized Transformer with Representation Learning
            on the Hypersphere*, 2024, arXiv:2410.01131. The gate of adaLN is ours, and the scales
            of the hidden numbers of the MLP are left out.
    """
    _check_positive("ngpt", "rate", rate)
    return Norms(
        RMSNorm, first=on_sphere, queries_keys=RMSNorm, join=partial(UnitStep, rate=float(rate))
    )


def on_sphere(*, affine: bool = True, dtype: Any = None, name: str | None = None) -> nn.Module:
    """`UnitNorm` without weights where others have some."""
    return UnitNorm(False, dtype, name=name)


class HeadScale(nn.Module):
    """A weight for each head of y [b, n, heads, size], 1 at first."""

    affine: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, y: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (y.shape[-2], 1))
        return y * scale.astype(y.dtype).reshape((1,) * (y.ndim - 2) + scale.shape)


class Center(nn.Module):
    """The deviation of a token from its mean."""

    affine: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return centered(x)


class CenteredSum(nn.Module):
    """h + y - mean(y), where y = gate branch."""

    dtype: Any = None

    @nn.compact
    def __call__(self, h: Array, branch: Array, gate: Array | None = None) -> Array:
        return h + centered(branch if gate is None else gate * branch)


class UnitStep(nn.Module):
    """The step of `ngpt` on the unit sphere."""

    rate: float = 0.05
    dtype: Any = None

    @nn.compact
    def __call__(self, h: Array, branch: Array, gate: Array | None = None) -> Array:
        stored = h.shape[-1] ** -0.5  # so that an optimizer moves it as it moves the kernels
        rate = row_param(self, "rate", nn.initializers.constant(stored), h.astype(float_dtype(h)))
        rate = jnp.abs(rate) * (self.rate / stored)
        if gate is not None:
            rate = rate * (1 + gate.astype(rate.dtype))
        return unit(h + rate * (unit(branch) - h.astype(rate.dtype))).astype(h.dtype)


def centered(x: Array) -> Array:
    """The deviation of x from its mean over the last axis, which is taken in float32 or better."""
    wide = x.astype(float_dtype(x))
    return (wide - jnp.mean(wide, -1, keepdims=True)).astype(x.dtype)


def unit(x: Array) -> Array:
    """x over its length along the last axis, in float32 or better; zero stays zero."""
    wide = x.astype(float_dtype(x))
    square = jnp.sum(wide**2, -1, keepdims=True)
    some = (
        square > jnp.finfo(wide.dtype).eps ** 2
    )  # below, zero stays finite in its derivatives too
    return wide * jnp.where(some, jax.lax.rsqrt(jnp.where(some, square, 1)), 1)


def weighted(module: Any, y: Array, x: Array, bias: bool = True) -> Array:
    """y scaled and shifted where the module is affine, in its type, or in that of x.

    To be called inside a compact method.
    """
    if module.affine:
        y = y * row_param(module, "scale", nn.initializers.ones, y)
        if bias:
            y = y + row_param(module, "bias", nn.initializers.zeros, y)
    return y.astype(x.dtype if module.dtype is None else module.dtype)


def row_param(module: Any, name: str, init: Any, y: Array) -> Array:
    """A param [width] of a module, in the rank and type of y [..., width]."""
    row = module.param(name, init, (y.shape[-1],)).astype(y.dtype)
    return row.reshape((1,) * (y.ndim - 1) + row.shape)


def placed(name: str, norm: Norm | Norms, *refused: str, per_token: bool = False) -> Norms:
    """A norm as a `Norms`, checked.

    Args:
        name: of the backbone.
        norm: its option.
        refused: the fields of a `Norms` that the backbone has no place for.
        per_token: whether a token may not depend on others, in the batch or in its own row.
    """
    _check(f"{name}: expected norm", norm)
    norms = norm if isinstance(norm, Norms) else Norms(norm)
    for field, value in zip(Norms._fields, norms, strict=True):
        if value is None and field != "pre":
            continue
        if isinstance(value, Norms):
            raise TypeError(
                f"{name}: expected {field} of norm to be a function that makes a module, got a"
                " nets.Norms"
            )
        _check(f"{name}: expected {field} of norm", value)
        if field in refused:
            allowed = ", ".join(f for f in Norms._fields if f not in refused)
            raise ValueError(f"{name}: expected norms at {allowed} only, got one at {field}")
        kind: Any = value.func if isinstance(value, partial) else value
        if per_token and getattr(kind, "of_batch", False):
            raise ValueError(
                f"{name}: expected a norm of each token by itself, such as nets.LayerNorm,"
                f" nets.RMSNorm or nets.DyT, got {kind.__name__}, which takes means over the batch"
            )
    return norms


def check_options(module: Any) -> None:
    """Raise for an option of a normalization that is out of the range that its name has."""
    name, options = type(module).__name__, vars(module)
    for what in ("decay", "gradient_decay"):
        if what in options and not 0 < options[what] < 1:
            raise ValueError(f"{name}: expected {what} in (0, 1), got {options[what]!r}")
    for what in ("epsilon", "alpha"):
        if what in options:
            _check_positive(name, what, options[what])
    for what in ("groups", "window"):
        if options.get(what) is not None:
            check_whole(name, **{what: options[what]})


def _check_positive(name: str, what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected {what} to be finite and positive, got {value!r}")


def _check(what: str, norm: Any) -> None:
    if isinstance(norm, Norms) or callable(norm) and not isinstance(norm, nn.Module):
        return
    raise TypeError(
        f"{what} to be a function that makes a module, such as nets.LayerNorm, nets.RMSNorm or"
        f" partial(nets.DyT, alpha=1.0), or a nets.Norms, got {described(norm)}"
    )


def normed(norm: Norm | None, h: Array, dtype: Any, name: str | None, affine: bool = True) -> Array:
    """h after a norm where there is one. To be called inside a compact method."""
    return h if norm is None else norm(affine=affine, dtype=dtype, name=name)(h)


def joined(norms: Norms, h: Array, branch: Array, gate: Array | None, dtype, name: str) -> Array:
    """h + gate branch, or what the norms have in its place. To be called inside a compact
    method."""
    if norms.join is None:
        return h + (branch if gate is None else gate * branch)
    return norms.join(dtype=dtype, name=name)(h, branch, gate)
