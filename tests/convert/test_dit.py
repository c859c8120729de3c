"""DiT and SiT: the outputs of diffusers from the same weights, both layouts, sizes, bad files."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from peers import dit_weights as published

from jflow import convert, nets, solvers, train
from jflow._core.linen import init_linen

PEERS = np.load(published.HERE / "dit.npz")
TENSORS = published.original()
read = partial(convert.dit, num_heads=published.HEADS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file in each layout, written with no layout of jflow's."""
    folder = tmp_path_factory.mktemp("dit")
    convert.write_safetensors(folder / "original.safetensors", TENSORS)
    theirs = published.of_diffusers(TENSORS)
    convert.write_safetensors(folder / "diffusers.safetensors", theirs)
    return folder


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_outputs_are_those_of_diffusers(folder):
    net, params = read(folder / "original.safetensors")
    velocity, given = nets.velocity(net), published.inputs()
    with jax.default_matmul_precision("highest"):
        for t, expected in zip(given["t"], PEERS["outputs"], strict=True):
            found = velocity.apply(params, given["x"], t, given["y"])
            expected = expected[..., : published.CHANNELS]  # the rest are variances
            assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    other = velocity.apply(params, given["x"], t, np.array([2, 2]))
    assert np.abs(other - expected).max() > 0.1


def test_both_layouts_give_the_same_params_and_come_back(folder, tmp_path):
    net, params = read(folder / "original.safetensors")
    assert net == nets.DiT(2, 48, 2, 4, num_classes=7, time_scale=1.0)
    theirs_net, theirs = read(folder / "diffusers.safetensors")
    assert theirs_net == net
    same(theirs, params)
    original = convert.dit_layout(net, 4, out_channels=8, image_size=8)
    diffusers = convert.dit_diffusers_layout(net, 4, out_channels=8)
    for layout, given in ((original, TENSORS), (diffusers, published.of_diffusers(TENSORS))):
        convert.save(tmp_path / "back.safetensors", layout, params)
        back = convert.read_safetensors(tmp_path / "back.safetensors")
        assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in given.items()}
        for name, tensor in back.items():
            if name.startswith(("final_layer.linear", "proj_out_2")):  # variances are zeros
                tensor, kept = (x.reshape(4, 8, -1) for x in (tensor, given[name]))
                np.testing.assert_array_equal(tensor[:, :4], kept[:, :4])
                assert not tensor[:, 4:].any()
            elif name == "pos_embed":
                np.testing.assert_allclose(tensor, given[name], atol=1e-7)
            else:
                np.testing.assert_array_equal(tensor, given[name])
        same(read(tmp_path / "back.safetensors")[1], params)


def test_a_prefix_leaves_other_models_in_the_file_alone():
    both = {f"model.{name}": tensor for name, tensor in TENSORS.items()} | {"vae.w": np.ones(3)}
    same(read(both, prefix="model.")[1], read(TENSORS)[1])


def test_without_learned_variances(tmp_path):
    """SiT as trained by default: as many channels out as in."""
    net, params = read(TENSORS)
    convert.save(tmp_path / "s.safetensors", convert.dit_layout(net, 4), params)
    tensors = convert.read_safetensors(tmp_path / "s.safetensors")
    assert tensors["final_layer.linear.weight"].shape == (16, 48) and "pos_embed" not in tensors
    same(read(tensors)[1], params)


@pytest.mark.parametrize(
    ("name", "width", "layers", "heads", "patch", "total"),
    [
        ("S/2", 384, 12, 6, 2, 32_963_360),
        ("B/2", 768, 12, 12, 2, 130_512_416),
        ("L/2", 1024, 24, 16, 2, 458_102_816),
        ("XL/2", 1152, 28, 16, 2, 675_129_632),
        ("XL/4", 1152, 28, 16, 4, 675_074_432),
        ("XL/8", 1152, 28, 16, 8, 675_683_072),
    ],
)
def test_published_sizes_to_the_unit(name, width, layers, heads, patch, total):
    """The published counts have learned variances and the table of 32 x 32 latents."""
    net = nets.DiT(patch, width, layers, heads, num_classes=1000)
    x = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
    like = jax.eval_shape(
        partial(init_linen, net), jax.random.key(0), x, jax.ShapeDtypeStruct((1,), jnp.float32)
    )
    ours = sum(leaf.size for leaf in jax.tree.leaves(like))
    table, variances = (32 // patch) ** 2 * width, (width + 1) * patch**2 * 4
    assert ours + table + variances == total


def test_a_loaded_sit_is_a_start_for_few_steps_densities_and_sdes():
    """The same calls as of any other velocity; what a flow map adds is zero at first."""
    net, params = read(TENSORS)
    velocity, flow_map = nets.velocity(net), nets.flow_map(net)
    given = published.inputs()
    x, t, y = 0.1 * given["x"], given["t"][0], given["y"]
    start = flow_map.init(jax.random.key(0), x, t, 1 - t, y)
    grown = train.warm_start(start, params)
    assert "gap_in" in grown["embed"] and "gap_in" not in params["embed"]
    expected = velocity.apply(params, x, t, y)
    np.testing.assert_allclose(flow_map.apply(grown, x, t, 1 - t, y), expected, atol=1e-5)

    normal = lambda x: jax.scipy.stats.norm.logpdf(x).sum((1, 2, 3))  # noqa: E731
    one_probe = {"divergence": solvers.hutchinson(1), "key": jax.random.key(1)}
    log_prob, _ = solvers.log_prob(velocity, params, x, normal, y, method=1, **one_probe)
    assert log_prob.shape == (2,) and np.isfinite(log_prob).all()
    step = solvers.euler_maruyama(velocity, solvers.noises.of_sigma())
    grid = solvers.grids.uniform(2)
    moved, _ = solvers.sample_sde(step, params, x, jax.random.key(2), grid, y)
    assert moved.shape == x.shape and np.isfinite(moved).all()


def test_half_precision_and_a_mesh(tmp_path):
    """A bfloat16 file, read as float32 and as it is, on one device and in shards."""
    net, params = read(TENSORS)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    layout = convert.dit_layout(net, 4)
    convert.save(tmp_path / "half.safetensors", layout, params, dtype=jnp.bfloat16)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    rules = [("attention/qkv/kernel$", PartitionSpec(None, "data"))]
    _, as_is = read(tmp_path / "half.safetensors", dtype=jnp.bfloat16)
    same(as_is, half)
    one = NamedSharding(mesh, PartitionSpec())
    for sharding in (one, lambda like: train.shardings(like, mesh, rules)):
        _, found = read(tmp_path / "half.safetensors", sharding=sharding)
        same(found, jax.tree.map(lambda p: p.astype(jnp.float32), half))
        spec = found["blocks"]["attention"]["qkv"]["kernel"].sharding.spec
        assert spec == (PartitionSpec() if sharding is one else PartitionSpec(None, None, "data"))


def refused(tensors, match, **changes):
    with pytest.raises(ValueError, match=match):
        read({**tensors, **changes})


def test_other_weights_are_refused_by_name():
    less = {name: tensor for name, tensor in TENSORS.items() if name != "blocks.1.mlp.fc2.bias"}
    refused(less, r"not the weights of this DiT; missing: blocks\.1\.mlp\.fc2\.bias$")
    refused(
        TENSORS,
        r"unknown: blocks\.0\.attn\.q_norm\.weight$",
        **{"blocks.0.attn.q_norm.weight": np.ones(12)},
    )
    refused(
        TENSORS,
        r"expected 'final_layer.adaLN_modulation.1.bias' of shape \[96\], got \[144\]",
        **{"final_layer.adaLN_modulation.1.bias": np.zeros(144)},
    )
    refused(
        {"model.diffusion_model.x_embedder.weight": np.zeros(3)},
        r"expected the weights of DiT or SiT with a tensor 'x_embedder.proj.weight' of 4 axes, got "
        r"1 others: model.diffusion_model.x_embedder.weight",
    )
    refused(
        {f"model.{name}": tensor for name, tensor in TENSORS.items()},
        r"got 'model.x_embedder.proj.weight': give prefix='model.'$",
    )
    refused(
        TENSORS,
        r"channels out, got num_classes=7 and 5",
        **{"final_layer.linear.weight": np.zeros((20, 48))},
    )
    refused(
        TENSORS,
        "'pos_embed' as jflow computes it, got other numbers, off by up to",
        **{
            "pos_embed": np.roll(TENSORS["pos_embed"], 24, axis=2)  # the row first
        },
    )
    refused(
        TENSORS,
        r"expected 'pos_embed' of shape \[1, 16, 48\], got \[1, 15, 48\]",
        pos_embed=TENSORS["pos_embed"][:, :15],
    )
    with pytest.raises(ValueError, match="expected num_heads, which .* of width 48 do not tell"):
        convert.dit(TENSORS)
    theirs = published.of_diffusers(TENSORS)
    copy = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    refused(theirs, "embedding_table.weight' to be equal to", **{copy: theirs[copy] + 1})


def test_a_network_of_other_patches_or_channels_names_both_shapes():
    for net, channels, given in (
        (nets.DiT(4, 48, 2, 4, num_classes=7), 4, r"\[48, 4, 4, 4\], got \[48, 4, 2, 2\]"),
        (nets.DiT(2, 48, 2, 4, num_classes=7), 3, r"\[48, 3, 2, 2\], got \[48, 4, 2, 2\]"),
    ):
        x = jnp.zeros((1, 8, 8, channels))
        like = jax.eval_shape(nets.velocity(net).init, jax.random.key(0), x, jnp.zeros(1))
        with pytest.raises(ValueError, match="expected 'x_embedder.proj.weight' of shape " + given):
            convert.load(TENSORS, convert.dit_layout(net, channels), like)
