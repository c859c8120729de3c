"""Inception-v3's FID weights, for `nets.InceptionFID`."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jflow._core.files import expand
from jflow.nets import InceptionFID
from jflow.types import Params

EPSILON = 1e-3  # of its batch norms


def inception(weights: str | Path | Mapping[str, np.ndarray]) -> Params:
    r"""The params of `nets.InceptionFID` from the published weights of the FID network.

    The weights are not part of jflow. The release "fid_weights" of pytorch-fid on GitHub
    (mseitzer/pytorch-fid) has the file pt_inception-2015-12-05-6726825d.pth; with torch installed,
    this line makes inception.npz of it:

        python -c "import sys, torch, numpy; numpy.savez('inception.npz', **{k: v.numpy() \
            for k, v in torch.load(sys.argv[1], weights_only=True).items()})" \
            pt_inception-2015-12-05-6726825d.pth

    Each convolution without bias and the batch norm after it become one convolution, with kernel *
    g and bias beta - mean * g for g = gamma / sqrt(var + 0.001), folded in float64. The
    classifier's 'fc' is left out.

    Args:
        weights: the state dict of the network of pytorch-fid, as the path of an npz file or as a
            dict of arrays.

    Returns:
        The params, {name of a convolution: {'kernel' [height, width, in, out], 'bias' [out]}}.

    Raises:
        ValueError: an array is missing or of the wrong shape, which the message names; the file is
            not an npz file; or the weights are torchvision's own (1000 classes), which fit the
            shapes but give other numbers.
    """
    if not isinstance(weights, Mapping):
        try:
            with np.load(expand(weights), allow_pickle=False) as z:
                weights = {name: z[name] for name in z.files}
        except (zipfile.BadZipFile, EOFError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{weights} is not an npz file of arrays ({error}); see jflow.convert.inception"
            ) from error
    classes = np.shape(weights.get("fc.weight", np.empty((1008, 0))))[0]
    if classes != 1008:
        raise ValueError(
            f"inception: expected the FID network of 1008 classes, got weights for {classes}"
        )
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    shapes = jax.eval_shape(InceptionFID().init, jax.random.key(0), image)["params"]
    return {name: _fold(weights, name, like["kernel"].shape) for name, like in shapes.items()}


def _fold(weights: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> dict:
    """One convolution with its batch norm, {'kernel' [*shape], 'bias'}.

    shape is (height, width, in, out).
    """
    height, width, inputs, outputs = shape
    expected: dict[str, tuple[int, ...]] = {"conv.weight": (outputs, inputs, height, width)}
    expected |= {
        f"bn.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")
    }
    parts = []
    for part, size in expected.items():
        key = f"{name}.{part}"
        if key not in weights:
            raise ValueError(
                f"inception: the weights hold no {key!r}; expected the state dict of the FID "
                "network"
            )
        if np.shape(weights[key]) != size:
            raise ValueError(
                f"inception: expected {key!r} of shape {list(size)}, got "
                f"{list(np.shape(weights[key]))}"
            )
        parts.append(np.asarray(weights[key], np.float64))
    kernel, gamma, beta, mean, var = parts
    gain = gamma / np.sqrt(var + EPSILON)
    folded = {"kernel": kernel.transpose(2, 3, 1, 0) * gain, "bias": beta - mean * gain}
    return jax.tree.map(jnp.asarray, folded)
