"""TarFlow: the outputs of a twin in torch from the same weights, samples, counts, bad files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import tarflow_weights as published

from jflow import convert, guidance, nets

PEERS = np.load(published.HERE / "tarflow.npz")
TENSORS = published.original()
EVENT = published.EVENT


def test_densities_are_those_of_the_twin(tmp_path):
    convert.write_safetensors(tmp_path / "model.safetensors", TENSORS)
    flow, params = convert.tarflow(tmp_path / "model.safetensors", EVENT, head_size=published.HEAD)
    given = published.inputs()
    labels = jnp.where(given["y"] < 0, published.CLASSES, given["y"])
    with jax.default_matmul_precision("highest"):
        z, log_det = flow.inverse(params, given["x"], labels)
        back, back_log_det = flow.forward(params, z, labels)  # token by token, with a cache
    size = np.abs(PEERS["z"]).max()
    np.testing.assert_allclose(z, PEERS["z"], atol=1e-5 * size)
    np.testing.assert_allclose(log_det, PEERS["mean_log_det"] * np.prod(EVENT), rtol=1e-4)
    np.testing.assert_allclose(back, given["x"], atol=1e-5)
    np.testing.assert_allclose(back_log_det, -log_det, rtol=1e-4)
    # no label is the mean of all
    np.testing.assert_allclose(flow.inverse(params, given["x"])[0][1], z[1], atol=1e-5)

    samples = flow.sample(params, jax.random.key(0), 2, labels)
    assert samples.shape == (2, *EVENT) and np.isfinite(samples).all()
    std = np.exp(params["base"]["log_std"])  # [4, 6, 3]; the patch of rows 0-1, columns 2-3 is 1
    variances = TENSORS["var"].reshape(6, 3, 2, 2)[1]
    np.testing.assert_allclose(std[:2, 2:4] ** 2, variances.transpose(1, 2, 0), rtol=1e-5)
    assert not np.any(params["base"]["mean"])

    net = nets.TarFlowTransformer(2, 64, 2, 2, num_classes=3)
    layout = convert.tarflow_layout(net, EVENT, patch_size=2, depth=2)
    convert.save(tmp_path / "back.safetensors", layout, params)
    back = convert.read_safetensors(tmp_path / "back.safetensors")
    assert back.keys() == TENSORS.keys()
    for name, tensor in back.items():
        rtol = 1e-6 if name == "var" else 0
        np.testing.assert_allclose(tensor, TENSORS[name], rtol=rtol, err_msg=name)


def test_samples_are_those_of_the_twin():
    """Token by token with a cache; guided away from no class, at another temperature, ever more."""
    given = published.inputs()
    labels = jnp.where(given["y"] < 0, published.CLASSES, given["y"])
    ramp = guidance.extrapolate(guidance.linear_ramp(1.5), null=3, temperature=2.0)
    for name, guide in (("sample", None), ("guided", ramp)):
        flow, params = convert.tarflow(TENSORS, EVENT, head_size=published.HEAD, guide=guide)
        with jax.default_matmul_precision("highest"):
            x, _ = flow.forward(params, given["z"], labels)
        size = np.abs(PEERS[name]).max()
        np.testing.assert_allclose(x, PEERS[name], atol=1e-5 * size, err_msg=name)
    assert np.abs(PEERS["guided"] - PEERS["sample"]).max() > 1e-2 * size


def test_the_guided_flow_is_invertible():
    guide = guidance.extrapolate(2.0, null=3)
    flow, params = convert.tarflow(TENSORS, EVENT, head_size=published.HEAD, guide=guide)
    x, y = published.inputs()["x"], jnp.array([2, 0])
    z, _ = flow.inverse(params, x, y)
    np.testing.assert_allclose(flow.forward(params, z, y)[0], x, atol=1e-4)
    plain, _ = convert.tarflow(TENSORS, EVENT, head_size=published.HEAD)
    assert np.abs(plain.inverse(params, x, y)[0] - z).max() > 1e-2


@pytest.mark.parametrize(
    ("side", "patch", "width", "classes", "total"),
    [
        (64, 2, 768, None, 460_142_784),
        (64, 2, 768, 1000, 466_286_784),
        (128, 4, 1024, 1000, 823_927_552),
        (256, 8, 768, 3, 463_481_856),
    ],
)
def test_published_sizes_to_the_unit(side, patch, width, classes, total):
    """ImageNet and AFHQ, 8 blocks of 8 layers, without the mean and deviation of the base."""
    from jflow.convert._tarflow import _CACHED, _flow

    net = nets.TarFlowTransformer(2, width, 8, width // 64, num_classes=classes)
    flow = _flow(net, (side, side, 3), patch, 8, _CACHED, None)
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    like = jax.eval_shape(flow.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(like["bijector"])) == total


def test_other_weights_are_refused_by_name():
    def refused(match, event=EVENT, **changes):
        with pytest.raises(ValueError, match=match):
            convert.tarflow({**TENSORS, **changes}, event, head_size=published.HEAD)

    refused("unknown: x", x=np.ones(3))
    refused(r"'var' of shape \[24, 12\], got \[6, 12\]", event=(8, 12, 3))
    refused(
        "'blocks.1.attn_mask' as jflow computes it, got other numbers",
        **{"blocks.1.attn_mask": np.ones((6, 6), np.float32)},
    )
    with pytest.raises(ValueError, match=r"'blocks.0.proj_in.weight' of 2 axes, got 1 others: a"):
        convert.tarflow({"a": np.ones(3)}, EVENT)
