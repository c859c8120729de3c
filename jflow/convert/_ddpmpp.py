"""Published weights of DDPM++, for `nets.DDPMpp`."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.levels import level_widths
from jflow.convert._adm import conv
from jflow.convert._layouts import (
    Constant,
    Layout,
    Transform,
    Weight,
    count_blocks,
    dense,
    in_one_piece,
    load,
    shapes_of,
)
from jflow.convert._parts import norm, shape_of
from jflow.convert._safetensors import tensors_of
from jflow.nets import DDPMpp
from jflow.types import Params


def ddpmpp(
    files: str | Path | Mapping[str, np.ndarray],
    *,
    prefix: str = "",
    dtype: Any = None,
    sharding: Any = None,
) -> tuple[DDPMpp, Params]:
    """A `nets.DDPMpp` and its params from the published weights of DDPM++.

    The sizes come from the shapes. The network predicts noise at t in [0, 1], of which 0 is data,
    as the continuous models were trained (time_scale=999). No published file was opened when this
    was written: the names are those of the authors' code. Their networks of another kind, NCSN++ or
    with smoothed resampling, are refused where their tensors differ. The files hold a table of
    noise levels too, which these networks do not read; it has to be geometric, between any two.

    Args:
        files: what `read_safetensors` takes, or the tensors that it returned.
        prefix: of the names, "module." in the authors' files; see `load`.
        dtype: of the params; see `load`.
        sharding: where the params go; see `load`.

    Returns:
        The network, which `net.clone(remat=True)` and the like change, and its params.

    Raises:
        ValueError: the weights are not those of such a network: what is missing, unknown or of
            another shape is named.

    Examples:
        >>> import jflow
        >>> from jflow import convert
        >>> net, params = convert.ddpmpp("ddpmpp.safetensors", prefix="module.")  # doctest: +SKIP
        >>> noise = jflow.field(net).apply(params, x, t)  # doctest: +SKIP

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, *Score-Based Generative Modeling through
            Stochastic Differential Equations*, 2020, arXiv:2011.13456.
    """
    tensors = tensors_of(files)
    shape = partial(shape_of, "ddpmpp", "DDPM++", tensors)
    of = prefix + "all_modules."
    channels = shape(of + "0.weight", 2)[1]
    image = shape(of + "2.weight", 4)[1]

    total = count_blocks(tensors, of)
    blocks = [n for n in range(3, total) if f"{of}{n}.Conv_0.weight" in tensors]
    widths, attention, resampling, fresh = [], [], 0, True
    for n in blocks:
        out, into = shape(f"{of}{n}.Conv_0.weight", 4)[:2]
        if out == into and f"{of}{n}.Conv_2.weight" in tensors:  # it changes the size of images
            resampling, fresh = resampling + 1, True
        elif fresh:
            widths.append(out)
            attention.append(f"{of}{n + 1}.NIN_0.W" in tensors)
            fresh = False
    levels = resampling // 2 + 1
    net = DDPMpp(
        channels=channels,
        multipliers=tuple(w // channels if w % channels == 0 else w / channels for w in widths)[
            :levels
        ]
        or (1,),
        num_blocks=max(1, (len(blocks) - 2 - resampling - levels) // (2 * levels)),
        attention=tuple(attention[:levels]) or (False,),
        time_scale=999.0,
    )
    side = 2 ** (len(net.multipliers) - 1)
    x, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, side, side, image), (1,)))
    sigmas = np.reshape(tensors.get(prefix + "sigmas", ()), -1)
    layout = (
        ddpmpp_layout(net, sigmas=(float(sigmas[0]), float(sigmas[-1])))
        if sigmas.size
        else ddpmpp_layout(net)
    )
    return net, load(
        tensors,
        layout,
        shapes_of(net, x, t),
        prefix=prefix,
        dtype=dtype,
        sharding=sharding,
    )


def ddpmpp_layout(net: DDPMpp, *, sigmas: Sequence[float] = (50.0, 0.01)) -> Layout:
    """The names of the weights of DDPM++ in the files of its authors.

    Args:
        net: the network, without num_classes, which the published one does not have.
        sigmas: the first and the last of the 1000 noise levels that the file holds too, and the
            network does not read. Those of the authors' models of CIFAR-10 are the default
            (configs/default_cifar10_configs.py).

    Returns:
        The layout, for `load` and `save`.

    Raises:
        ValueError: the network has num_classes.

    Examples:
        >>> from jflow import convert, nets
        >>> convert.ddpmpp_layout(nets.DDPMpp()).weights[2].keys
        ('all_modules.1.weight',)

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, *Score-Based Generative Modeling through
            Stochastic Differential Equations*, 2020, arXiv:2011.13456.
    """
    if net.num_classes is not None:
        raise ValueError(
            f"ddpmpp_layout: expected a network without labels, got num_classes={net.num_classes}"
        )
    rows: list[Weight] = []
    number = 0

    def key():
        nonlocal number
        number += 1
        return f"all_modules.{number - 1}"

    def block(path, into, out, resample=False):
        of = key()
        rows.extend(norm(f"{of}.GroupNorm_0", f"{path}/in_norm"))
        rows.extend(conv(f"{of}.Conv_0", f"{path}/in"))
        rows.extend(dense(f"{of}.Dense_0", f"{path}/modulation"))
        rows.extend(norm(f"{of}.GroupNorm_1", f"{path}/out_norm"))
        rows.extend(conv(f"{of}.Conv_1", f"{path}/out"))
        if into != out or resample:
            rows.extend(conv(f"{of}.Conv_2", f"{path}/skip"))

    def attend(path):
        of = key()
        rows.extend(norm(f"{of}.GroupNorm_0", f"{path}/norm"))
        names = [f"{of}.NIN_{i}" for i in range(3)]
        kernels, biases = (tuple(f"{name}.{part}" for name in names) for part in "Wb")
        rows.append(Weight(kernels, f"{path}/attention/qkv/kernel", SIDE_BY_SIDE))
        rows.append(Weight(biases, f"{path}/attention/qkv/bias"))
        rows.append(Weight(f"{of}.NIN_3.W", f"{path}/attention/out/kernel"))
        rows.append(Weight(f"{of}.NIN_3.b", f"{path}/attention/out/bias"))

    kernel, bias = dense(key(), "embed/time_in")
    rows += [kernel._replace(transform=SINES_FIRST), bias]
    rows += dense(key(), "embed/time_out")
    rows += conv(key(), "stem")
    widths = level_widths(net.channels, net.multipliers)
    wide = widths[0]  # the channels that a block gets
    skips = [wide]
    for i, width in enumerate(widths):
        for j in range(net.num_blocks):
            block(f"down_{i}_{j}", wide, width)
            if net.attention[i]:
                attend(f"down_{i}_{j}_attention")
            wide = width
            skips.append(width)
        if i < len(widths) - 1:
            block(f"shrink_{i}", width, width, resample=True)
            skips.append(width)
    block("middle_0", wide, wide)
    attend("middle_attention")
    block("middle_1", wide, wide)
    for i, width in reversed(list(enumerate(widths))):
        for j in range(net.num_blocks + 1):
            block(f"up_{i}_{j}", wide + skips.pop(), width)
            wide = width
        if net.attention[i]:
            attend(f"up_{i}_attention")
        if i:
            block(f"grow_{i}", width, width, resample=True)
    rows += norm(key(), "norm")
    rows += conv(key(), "head")
    first, last = np.maximum(sigmas, 1e-30)  # of which there is a logarithm

    def table(shape):
        return in_one_piece(np.geomspace(first, last, shape[0] if len(shape) == 1 else 1))

    return Layout("DDPM++", tuple(rows), (Constant("sigmas", table, (1000,)),))


def _sines_first(w):
    """The weights [out, in] of sines and cosines, of which jflow has the cosines first."""
    half = w.shape[1] // 2
    return w.reshape(-1, 2, half)[:, ::-1].reshape(w.shape)


SINES_FIRST = Transform(lambda w: _sines_first(w).T, lambda w: _sines_first(w.T))
SIDE_BY_SIDE = Transform(  # three matrices [in, out], one below the other in the file
    lambda w: w.reshape(3, w.shape[1], -1).swapaxes(0, 1).reshape(w.shape[1], -1),
    lambda w: w.reshape(w.shape[0], 3, -1).swapaxes(0, 1).reshape(3 * w.shape[0], -1),
)
