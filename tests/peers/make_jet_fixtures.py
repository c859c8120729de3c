"""Writes an output of the published Jet, so that the tests need no code of its authors.

Run once, with a checkout of https://github.com/google-research/big_vision, and commit the result:

    pip install einops
    python tests/peers/make_jet_fixtures.py BIG_VISION

Written at its commit 0127fb6, with jax 0.10.2 and flax 0.12.8. No weights are kept: every tensor
and the image are drawn from their names (`drawn`), here and in the test. The projections that the
authors draw at random and freeze are those of `jet_splits` here. Kept are the output of 30
couplings (every kind of split), its log-determinant, and how many numbers the two networks for
ImageNet 64 train.
"""

import sys
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jflow.flows._transformers import jet_splits

HERE = Path(__file__).parent
PATCH, WIDTH, HEADS, DEPTH, LAYERS = 2, 8, 2, 30, 1
KINDS = {  # of config imagenet64.py
    "kinds": ("channels",) * 4 + ("spatial",),
    "channels_coupling_projs": ("random",),
    "spatial_coupling_projs": (
        "checkerboard",
        "checkerboard-inv",
        "vstripes",
        "vstripes-inv",
        "hstripes",
        "hstripes-inv",
    ),
}


def drawn(name, shape):
    """The tensor of a name; scales of norms lie around 1."""
    noise = np.random.default_rng(list(name.encode())).standard_normal(shape)
    return (name.endswith("/scale") + 0.15 * noise).astype(np.float32)


def named(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def main(checkout):
    sys.path.insert(0, checkout)
    for name in ("big_vision.utils", "big_vision.models.common"):  # they read checkpoints
        sys.modules[name] = types.ModuleType(name)
    import big_vision
    import big_vision.models

    big_vision.utils = sys.modules["big_vision.utils"]
    big_vision.models.common = sys.modules["big_vision.models.common"]
    from big_vision.models.proj.jet import jet

    x = jnp.asarray(drawn("image", (2, 8, 8, 3)) / 0.15)
    net = jet.Model(DEPTH, LAYERS, WIDTH, HEADS, ps=PATCH, **KINDS)
    init = partial(net.init, method="forward")
    params = jax.jit(init)(jax.random.key(0), x)["params"]
    frozen = [name for name in params if "FREEZE_ME" in name]
    (channels,) = (name for name in frozen if name.startswith("channel"))
    splits = jet_splits(4, 4, 12, DEPTH)
    projections = np.zeros(params[channels].shape, np.float32)
    for i, split in enumerate(splits):
        if i % 5 < 4:
            order = split.reshape(16, 12)[0]  # the channels that pass first
            projections[i, order, np.arange(12)] = 1
    weights = {name: leaf for name, leaf in params.items() if name not in frozen}
    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(drawn(named(path), leaf.shape)), weights
    )
    spatial = {name: params[name] for name in frozen}
    variables = {"params": weights | spatial | {channels: jnp.asarray(projections)}}
    with jax.default_matmul_precision("highest"):
        z, log_det = jax.jit(partial(net.apply, method="forward"))(variables, x)
    counts = []
    for depth, layers in ((32, 2), (64, 5)):
        net = jet.Model(depth, layers, 512, 8, **KINDS)
        init = partial(net.init, method="forward")
        like = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
        flat = jax.tree_util.tree_leaves_with_path(like)
        counts.append(sum(leaf.size for path, leaf in flat if "FREEZE_ME" not in named(path)))
    shapes = {named(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    for item in shapes.items():
        print(*item)
    print(counts, np.std(z), log_det)
    np.savez_compressed(HERE / "jet.npz", z=z, log_det=log_det, counts=counts)


if __name__ == "__main__":
    main(sys.argv[1])
