"""Adapters of weights beside LoRA: reflections, branches before and after a layer, and shifts."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.arrays import float_dtype
from jflow._core.checks import check_whole
from jflow.adapters._activations import second_layers
from jflow.adapters._forms import SCANNED, Where, check_rank, matrix, on_weights, uniform_down
from jflow.types import Adapter, Array

__all__ = ["adapter_bias", "ether", "ether_plus", "hydra", "oft"]


def ether(
    blocks: int = 1,
    *,
    where: Where = "*kernel*",
    layers: Sequence[int] | None = None,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """ETHER: a trained kernel, reflected at a hyperplane of its inputs.

        H W,   H = I - 2 u u^T / |u|^2

    with a u for each of `blocks` equal parts of the inputs, where H is block-diagonal. H is
    orthogonal with determinant -1 a block, and its distance to I is 2 whatever u is: the model is
    changed from the start, and never far from the base. `ether_plus` starts at the identity.

    Args:
        blocks: a number that divides the inputs of every kernel.
        where: which kernels, see `on_weights`.
        layers: which of the scanned layers, by their index; None: all.
        scanned: see `on_weights`.

    Returns:
        Adapter: params {'u': [blocks, in / blocks]} in the place of each kernel.

    Raises:
        ValueError: blocks is below 1; when used, where it does not divide the inputs of a kernel,
            which is named, and as `on_weights`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> params = {"kernel": {"u": jnp.array([[3.0, 0.0]])}}
        >>> adapters.ether().apply({"kernel": jnp.eye(2)}, params)["kernel"].tolist()
        [[-1.0, 0.0], [0.0, 1.0]]

    References:
        Bini, Roth, Akata, Khoreva, *ETHER: Efficient Finetuning of Large-Scale Models with
            Hyperplane Reflections*, 2024, arXiv:2405.20271.
    """
    check_whole("ether", blocks=blocks)

    def init(key, own):
        kernel = own["kernel"]
        size = _part("inputs", math.prod(kernel.shape[:-1]), blocks, kernel)
        return {"u": jax.random.normal(key, (blocks, size), float_dtype(kernel))}

    def apply(own, params):
        kernel, u = own["kernel"], _unit(params["u"])
        rows = _split(matrix(kernel), u)
        return {"kernel": (rows - 2 * _project(u, rows)).reshape(kernel.shape)}

    return on_weights(init, apply, where=where, layers=layers, scanned=scanned)


def ether_plus(
    blocks: int = 1,
    *,
    where: Where = "*kernel*",
    layers: Sequence[int] | None = None,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """ETHER+: a trained kernel between two maps that mix a reflection with its undoing.

        H W G,   H = I - u u^T / |u|^2 + v v^T / |v|^2,   G alike on the outputs

    block-diagonal as in `ether`. At first v = u, so that the model is as it was; the distances of H
    and G to I are at most 2.

    Args:
        blocks: a number that divides the inputs and the outputs of every kernel.
        where: which kernels, see `on_weights`.
        layers: which of the scanned layers, by their index; None: all.
        scanned: see `on_weights`.

    Returns:
        Adapter: params {'in': {'u', 'v'}, 'out': {'u', 'v'}} in the place of each kernel, of shapes
        [blocks, in / blocks] and [blocks, out / blocks].

    Raises:
        ValueError: blocks is below 1; when used, where it divides the inputs or the outputs of a
            kernel not, which is named, and as `on_weights`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> plus = adapters.ether_plus(2)
        >>> base = {"kernel": jnp.arange(24.0).reshape(4, 6)}
        >>> params = plus.init(jax.random.key(0), base)
        >>> bool(jnp.allclose(plus.apply(base, params)["kernel"], base["kernel"]))
        True

    References:
        Bini, Roth, Akata, Khoreva, *ETHER: Efficient Finetuning of Large-Scale Models with
            Hyperplane Reflections*, 2024, arXiv:2405.20271.
    """
    check_whole("ether_plus", blocks=blocks)

    def init(key, own):
        kernel = own["kernel"]
        *inputs, out = kernel.shape
        sizes = {"in": ("inputs", math.prod(inputs)), "out": ("outputs", out)}
        params = {}
        keys = jax.random.split(key, 2)
        for own_key, (side, (what, size)) in zip(keys, sizes.items(), strict=True):
            part = _part(what, size, blocks, kernel)
            u = jax.random.normal(own_key, (blocks, part), float_dtype(kernel))
            params[side] = {"u": u, "v": u}
        return params

    def apply(own, params):
        kernel = own["kernel"]
        changed = _soft_reflection(params["in"], matrix(kernel))
        changed = _soft_reflection(params["out"], changed.T).T
        return {"kernel": changed.reshape(kernel.shape)}

    return on_weights(init, apply, where=where, layers=layers, scanned=scanned)


def oft(
    blocks: int = 1,
    *,
    where: Where = "*kernel*",
    layers: Sequence[int] | None = None,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """Orthogonal finetuning (OFT): a trained kernel whose columns are rotated together.

        R W,   R = (I - S)^-1 (I + S),   S^T = -S

    with an S for each of `blocks` equal parts of the inputs, where R is block-diagonal. R, the
    Cayley transform of S, is a rotation: the lengths of the columns of W in each part, and the
    angles between them, stay. S is zero, so that the model is as it was at first.

    Args:
        blocks: a number that divides the inputs of every kernel, so that at least 2 are in a part.
        where: which kernels, see `on_weights`.
        layers: which of the scanned layers, by their index; None: all.
        scanned: see `on_weights`.

    Returns:
        Adapter: params {'S': [blocks, d (d - 1) / 2]} in the place of each kernel, d = in / blocks:
        the numbers below the diagonal, row by row.

    Raises:
        ValueError: blocks is below 1; when used, where it does not divide the inputs of a kernel
            into parts of 2 or more, which is named, and as `on_weights`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> quarter = {"kernel": {"S": jnp.ones((1, 1))}}
        >>> adapters.oft().apply({"kernel": jnp.eye(2)}, quarter)["kernel"].tolist()
        [[0.0, -1.0], [1.0, 0.0]]

    References:
        Qiu, Liu, Feng, Xue, Feng, Liu, Zhang, Weller, Schölkopf, *Controlling Text-to-Image
            Diffusion by Orthogonal Finetuning*, 2023, arXiv:2306.07280.
    """
    check_whole("oft", blocks=blocks)

    def init(key, own):
        kernel = own["kernel"]
        size = _part("inputs", math.prod(kernel.shape[:-1]), blocks, kernel)
        if size < 2:
            raise ValueError(
                f"expected parts of at least 2 inputs of a kernel {list(kernel.shape)}, got"
                f" blocks={blocks}"
            )
        return {"S": jnp.zeros((blocks, size * (size - 1) // 2), float_dtype(kernel))}

    def apply(own, params):
        kernel, below = own["kernel"], params["S"]
        inputs, parts = math.prod(kernel.shape[:-1]), below.shape[0]
        size = inputs // parts
        if (parts * size, size * (size - 1) // 2) != (inputs, below.shape[1]):
            raise ValueError(
                f"an adapter for another base: 'S' of shape {list(below.shape)} does not fit a"
                f" kernel {list(kernel.shape)}"
            )
        lower = jnp.zeros((parts, size, size), below.dtype)
        lower = lower.at[:, *np.tril_indices(size, -1)].set(below)
        skew, eye = lower - lower.mT, jnp.eye(size, dtype=below.dtype)[None]
        rotation = jnp.linalg.solve(eye - skew, eye + skew)
        rows = matrix(kernel).reshape(parts, size, kernel.shape[-1])
        return {"kernel": (rotation @ rows).reshape(kernel.shape)}

    return on_weights(init, apply, where=where, layers=layers, scanned=scanned)


def hydra(
    rank: int,
    *,
    scale: float = 1.0,
    where: Where = "*kernel*",
    layers: Sequence[int] | None = None,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """Hydra: a branch of low rank beside a layer, and one after it.

    Where a layer has f(x) = x W + b, the adapted one has

        f(x) + s (x A B + f(x) C D + d)
            = x (W + s (A B + W C D)) + b + s (b C D + d)

    A [*in, rank] and C [out, rank] are uniform in +-1 over the root of their first size; B and D
    [rank, out] and d [out] are zero, so that the model is as it was at first. The biases of the two
    branches, of which only the sum has an effect, are the one d.

    Args:
        rank: of each branch, at most that of the kernel.
        scale: s.
        where: which kernels, see `on_weights`.
        layers: which of the scanned layers, by their index; None: all.
        scanned: see `on_weights`.

    Returns:
        Adapter: params {'A', 'B', 'C', 'D'} in the place of each kernel, with 'd' where the layer
        has a bias.

    Raises:
        ValueError: rank is below 1; when used, for a rank above that of a kernel, which is named,
            and as `on_weights`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> base = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
        >>> params = adapters.hydra(1).init(jax.random.key(0), base)
        >>> jax.tree.map(jnp.shape, params["kernel"])
        {'A': (3, 1), 'B': (1, 2), 'C': (2, 1), 'D': (1, 2), 'd': (2,)}

    References:
        Kim, Yang, Kim, Hong, Park, *Hydra: Multi-head Low-rank Adaptation for Parameter Efficient
            Fine-tuning*, 2023, arXiv:2309.06922.
    """
    check_whole("hydra", rank=rank)

    def init(key, own):
        kernel = own["kernel"]
        check_rank(rank, kernel)
        *inputs, out = kernel.shape
        beside, after = jax.random.split(key)
        dtype = float_dtype(kernel)
        zeros = jnp.zeros((rank, out), dtype)
        params = {
            "A": uniform_down(beside, inputs, rank, dtype),
            "B": zeros,
            "C": uniform_down(after, (out,), rank, dtype),
            "D": zeros,
        }
        return params | ({"d": jnp.zeros(out, dtype)} if "bias" in own else {})

    def apply(own, params):
        kernel = matrix(own["kernel"])
        after = lambda x: x @ params["C"] @ params["D"]  # noqa: E731
        change = matrix(params["A"]) @ params["B"] + after(kernel)
        new = {"kernel": (kernel + scale * change).reshape(own["kernel"].shape)}
        if "bias" in own:
            bias = own["bias"]
            new["bias"] = bias + scale * (after(bias) + params["d"])
        return new

    return on_weights(init, apply, where=where, layers=layers, scanned=scanned)


def adapter_bias(
    *,
    where: Where = "*",
    layers: Sequence[int] | None = None,
    scanned: str | Sequence[str] = SCANNED,
) -> Adapter:
    """AdapterBias: a shift of the tokens that leave an MLP, whose size depends on the token.

    Where the second layer of an MLP has h = x W + c, the adapted one has

        h + (h . w + b) v = x (W + (W w) v^T) + c + (c . w + b) v

    with the same direction v for all tokens. v is zero, so that the model is as it was at first.

    Args:
        where: which MLPs, by the paths of their second layers, such as 'blocks/out' in `nets.DiT`
            and 'blocks/image/mlp_out' in `nets.MMDiT`; see `on_modules`. All by default.
        layers: which of the scanned layers, by their index; None: all.
        scanned: see `on_weights`.

    Returns:
        Adapter: params {'v': [width], 'w': [width], 'b': []} in the place of the kernel of each
        second layer.

    Raises:
        ValueError: when used, where a base has no such MLP, or its second layer no bias, and as
            `on_weights`.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import adapters
        >>> kernel = lambda *shape: {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[-1])}
        >>> base = {"mlp": {"in": kernel(2, 3), "out": kernel(3, 2)}}
        >>> params = {"mlp": {"out": {"kernel": {
        ...     "v": jnp.array([1.0, 0.0]), "w": jnp.array([0.0, 2.0]), "b": jnp.array(5.0)
        ... }}}}
        >>> adapters.adapter_bias().apply(base, params)["mlp"]["out"]["bias"].tolist()
        [8.0, 1.0]

    References:
        Fu, Chen, Lee, Lee, *AdapterBias: Parameter-efficient Token-dependent Representation Shift
            for Adapters in NLP Tasks*, 2022, arXiv:2205.00305.
    """

    def init_one(key, own):
        if "bias" not in own:
            raise ValueError("expected a layer with a bias, got one without")
        width, dtype = own["kernel"].shape[-1], float_dtype(own["kernel"])
        w = jax.random.normal(key, (width,), dtype) / math.sqrt(width)
        return {"v": jnp.zeros(width, dtype), "w": w, "b": jnp.zeros((), dtype)}

    def apply_one(own, params):
        v, w, b = (params[name] for name in "vwb")
        kernel, bias = own["kernel"], own["bias"]
        return {"kernel": kernel + jnp.outer(kernel @ w, v), "bias": bias + (bias @ w + b) * v}

    def init(key, base):
        found = second_layers("adapter_bias", base, where, scanned)
        paths = [f"{leaf.path}/kernel" for leaf in found]
        chosen = on_weights(init_one, apply_one, where=paths, layers=layers, scanned=scanned)
        return chosen.init(key, base)

    apply = on_weights(init_one, apply_one, where=where, layers=layers, scanned=scanned).apply
    return Adapter(init, apply)


def _part(what: str, size: int, blocks: int, kernel) -> int:
    if size % blocks:
        raise ValueError(
            f"expected blocks that divide the {size} {what} of a kernel {list(kernel.shape)}, got"
            f" blocks={blocks}"
        )
    return size // blocks


def _unit(u: Array) -> Array:
    """Rows of length 1."""
    return u / jnp.linalg.norm(u, axis=-1, keepdims=True)


def _split(rows: Array, u: Array) -> Array:
    """A matrix [in, out] as blocks [blocks, in / blocks, out]."""
    return rows.reshape(*u.shape, rows.shape[-1])


def _project(u: Array, rows: Array) -> Array:
    """u u^T rows in each block."""
    return u[..., None] * jnp.einsum("bi,bio->bo", u, rows)[:, None]


def _soft_reflection(params, rows: Array) -> Array:
    u, v = _unit(params["u"]), _unit(params["v"])
    blocks = _split(rows, u)
    return (blocks - _project(u, blocks) + _project(v, blocks)).reshape(rows.shape)
