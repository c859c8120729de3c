"""Writes what pytorch-fid's network makes of two random images, with random weights, in float64, to
inception.npz.

    pip install torch pytorch-fid torchvision
    python tests/peers/make_inception_fixtures.py

Written with torch 2.13.0, torchvision 0.28.0, pytorch-fid 0.3.0. No published weights are involved:
`seeded` draws every array from its name and shape, here and in tests/nets/test_inception.py.
"""

import zlib
from pathlib import Path

import numpy as np

EVERY = 8  # of the 2048 features, one in so many is kept
SIZES = ((5, 7), (340, 310))  # of images for the resize: one to enlarge, one to shrink


def seeded(name: str, shape) -> np.ndarray:
    """Weights in float64 that keep activations of the order of 1 through the depth."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("conv.weight"):
        return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
    if name.endswith(("running_var", "bn.weight")):
        return rng.uniform(0.5, 1.5, shape)
    return 0.2 * rng.normal(size=shape)


def images() -> np.ndarray:
    """[2, 107, 139, 3] in [0, 1]: the smallest whose last feature map, 2 x 3, has a border unlike
    its middle."""
    return np.random.default_rng(0).random((2, 107, 139, 3))


def to_resize() -> list[np.ndarray]:
    return [np.random.default_rng(i).random((1, *size, 3)) for i, size in enumerate(SIZES)]


def main():
    import torch

    # torchvision built for another torch lacks its compiled operators, none of which is needed
    # here.
    register, torch.library.register_fake = torch.library.register_fake, lambda *a, **k: lambda f: f
    from pytorch_fid import inception

    torch.library.register_fake = register
    torch.set_default_dtype(torch.float64)

    # torchvision's network has the names and shapes of pytorch-fid's, which asks for its weights by
    # their address.
    shapes = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None).state_dict()
    weights = {
        k: torch.as_tensor(seeded(k, tuple(v.shape)))
        for k, v in shapes.items()
        if "tracked" not in k
    }
    inception.load_state_dict_from_url = lambda *args, **kwargs: weights
    found = {}
    net = inception.InceptionV3([0, 1, 2, 3], resize_input=False).eval()
    with torch.no_grad():
        for i, block in enumerate(net(torch.as_tensor(images().transpose(0, 3, 1, 2)))):
            print(f"block {i}: {list(block.shape)}, deviation {float(block.std()):.3g}")
        found["features"] = block.numpy()[:, ::EVERY, 0, 0]
        for i, x in enumerate(to_resize()):
            y = torch.nn.functional.interpolate(
                torch.as_tensor(x.transpose(0, 3, 1, 2)),
                size=(299, 299),
                mode="bilinear",
                align_corners=False,
            )
            found[f"resized_{i}"] = y.numpy()[0].transpose(1, 2, 0)[::23, ::29]
    np.savez_compressed(Path(__file__).with_name("inception.npz"), **found)


if __name__ == "__main__":
    main()
