"""Files of tensors: what safetensors and torch write, indexes, folders, and what is refused."""

import json
import pickle
import tracemalloc
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers.dit_weights import HERE
from subprocesses import run_python

from jflow import convert, nets
from jflow._core.linen import init_linen

BYTES = np.load(HERE / "dit.npz")["bytes"].tobytes()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BYTES)
    return path


def test_a_file_of_safetensors_and_torch(file):
    tensors = convert.read_safetensors(file)
    expected = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "brain": np.array([1.0, -2.5, 3e38], jnp.bfloat16),
        "single": np.float32(0.1),
        "double": np.array([[0.1]]),
        "whole": np.array([-1, 2**40]),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "float8": np.array([1.0, -448.0], jnp.float8_e4m3fn),
    }
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert (tensors[name].dtype, tensors[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(tensors[name], value)
        assert not tensors[name].flags.writeable


def test_what_is_written_is_read_again_and_by_safetensors(file, tmp_path):
    """Byte for byte what the safetensors package writes, up to the order of names."""
    again = tmp_path / "again.safetensors"
    given = convert.read_safetensors(file)
    convert.write_safetensors(again, given, {"format": "pt"})
    assert len(again.read_bytes()) == len(BYTES)
    for name, tensor in convert.read_safetensors(again).items():
        assert tensor.dtype == given[name].dtype
        np.testing.assert_array_equal(tensor, given[name])
    strided = {"t": np.arange(6.0).reshape(2, 3).T, "j": jnp.ones((2, 2))[:, 0], "n": 3.0}
    convert.write_safetensors(again, strided)
    for name, tensor in convert.read_safetensors(again).items():
        np.testing.assert_array_equal(tensor, strided[name])
    with pytest.raises(
        ValueError, match="expected 'c' of one of the types BOOL, .*, got complex64"
    ):
        convert.write_safetensors(again, {"c": np.ones(2, np.complex64)})
    assert list(convert.read_safetensors(again)) == ["t", "j", "n"]  # the older file is there
    convert.write_safetensors(again, {})
    assert convert.read_safetensors(again) == {}


def test_a_truncated_file_is_refused_wherever_it_ends(file):
    for size in [*range(0, len(BYTES), 7), len(BYTES) - 1]:
        file.write_bytes(BYTES[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is (truncated|no safetensors)"):
            convert.read_safetensors(file)
    with pytest.raises(ValueError, match=f"expected {len(BYTES)} bytes, got {len(BYTES) - 1}"):
        convert.read_safetensors(file)
    file.write_bytes(BYTES + b"x")
    with pytest.raises(ValueError, match="is not whole: it is longer"):
        convert.read_safetensors(file)


def test_foreign_files_are_refused_by_name(file):
    def refused(content, match, path=file):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            convert.read_safetensors(path)

    def header(text, body=b""):
        return len(text).to_bytes(8, "little") + text + body

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    one = lambda **changes: header(json.dumps({"w": entry | changes}).encode(), bytes(8))  # noqa: E731
    refused(b"version https://git-lfs.github.com/spec/v1\n", "pointer of git-lfs.*git lfs pull")
    refused(b"<!DOCTYPE html><html>", "is no safetensors file")
    refused(header(b"[1, 2]"), "is no safetensors file: expected a header in JSON")
    refused(header(b'{"w": 3}'), "is no safetensors file: expected a header in JSON")
    refused(one(shape=[3]), r"'w' of type F32 and shape \[3\] takes 12 bytes, and has 8")
    refused(one(dtype="F4"), "expected 'w' of one of the types BOOL, .*, got F4")
    refused(one(data_offsets=[8, 16]), "truncated")
    assert one() and file.write_bytes(one()) and convert.read_safetensors(file)["w"].shape == (2,)


def test_pickles_are_refused_with_the_way_to_convert_them(file, tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was read",))

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Evil()))
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Evil()))
    file.write_bytes(pickle.dumps(Evil()))  # whatever its name
    for path in (tmp_path / "a.pt", tmp_path / "b.ckpt", file):
        with pytest.raises(ValueError, match=r"holds a pickle.*(?s:.)*weights_only=True"):
            convert.read_safetensors(path)
    file.unlink()
    with pytest.raises(ValueError, match=r"no file \*.safetensors; it holds a.pt: with torch"):
        convert.read_safetensors(tmp_path)


def test_a_header_as_long_as_pickles_begin(tmp_path):
    """A length of 640 bytes is b"\\x80\\x02", the first bytes of a pickle."""
    for size in (640, 1152):
        name = "x" * (size - len('{"":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'))
        convert.write_safetensors(tmp_path / "file", {name: np.zeros(1)})
        with open(tmp_path / "file", "rb") as stream:
            assert int.from_bytes(stream.read(8), "little") == size
        assert list(convert.read_safetensors(tmp_path / "file")) == [name]


def test_folders_and_indexes(tmp_path):
    where = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}
    index = tmp_path / "model.safetensors.index.json"

    def write(**files):
        for name, tensors in files.items():
            made = {tensor: np.full(2, ord(tensor)) for tensor in tensors}
            convert.write_safetensors(tmp_path / f"{name}.safetensors", made)

    write(one="ac", two="b")
    with pytest.raises(ValueError, match=r"several models \(one.safetensors, two.safetensors\)"):
        convert.read_safetensors(tmp_path)
    (tmp_path / "two.safetensors").rename(tmp_path / "one.fp16.safetensors")
    assert convert.read_safetensors(tmp_path).keys() == {"a", "c"}  # the file without a variant
    (tmp_path / "one.fp16.safetensors").rename(tmp_path / "two.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for path in (tmp_path, index, str(index)):
        assert {k: int(v[0]) for k, v in convert.read_safetensors(path).items()} == {
            "a": 97,
            "b": 98,
            "c": 99,
        }
    with pytest.raises(ValueError, match="its folders .* hold some: give one of them"):
        convert.read_safetensors(tmp_path.parent)
    write(two="a")
    with pytest.raises(ValueError, match="promises 'b'"):
        convert.read_safetensors(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names two.safetensors, which is not in"):
        convert.read_safetensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(ValueError, match="which is not beside it"):
        convert.read_safetensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index"):
        convert.read_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        convert.read_safetensors(tmp_path / "three.safetensors")


def layers(n, size):
    rng = np.random.default_rng(0)
    params = {f"dense_{i}": rng.normal(size=(size, size)).astype(np.float32) for i in range(n)}
    layout = convert.Layout(
        "layers", tuple(convert.Weight(f"{name}.weight", name, convert.LINEAR) for name in params)
    )
    return layout, params


def same_as(params, files, layout):
    jax.tree.map(np.testing.assert_array_equal, convert.load(files, layout, params), params)


def test_large_weights_are_saved_in_shards_with_an_index(tmp_path):
    """The names, the index and the greedy split of huggingface_hub; read again bit for bit."""
    layout, params = layers(5, 8)  # 256 bytes each
    path = tmp_path / "model.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    shard = "model-{:05d}-of-{:05d}.safetensors".format
    convert.save(path, layout, params)  # an older version, which must not be read again
    convert.save(path, layout, params, max_shard_size=600, metadata={"by": "jflow"})
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *(shard(i, 3) for i in (1, 2, 3)),
        index.name,
    ]
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": 5 * 256},
        "weight_map": {f"dense_{i}.weight": shard(i // 2 + 1, 3) for i in range(5)},
    }
    raw = (tmp_path / shard(2, 3)).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt", "by": "jflow"}
    assert list(header) == ["dense_2.weight", "dense_3.weight"]
    for files in (path, index, tmp_path):
        same_as(params, files, layout)
    convert.save(path, layout, params, max_shard_size=1)  # a tensor is never cut
    assert {*json.loads(index.read_text())["weight_map"].values()} == {
        shard(i, 5) for i in (1, 2, 3, 4, 5)
    }
    same_as(params, path, layout)
    convert.save(path, layout, params, max_shard_size=5 * 256)
    assert path.exists() and not index.exists()
    same_as(params, path, layout)
    with pytest.raises(ValueError, match="max_shard_size to be a whole number of at least 1"):
        convert.save(path, layout, params, max_shard_size=0)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        convert.read_safetensors(tmp_path / "other.safetensors")


def peak_memory(f):
    tracemalloc.start()
    try:
        f()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_saving_in_shards_holds_less_than_one(tmp_path):
    layout, params = layers(8, 256)  # 256 kB each
    path, most = tmp_path / "model.safetensors", 2 * 2**18
    assert peak_memory(lambda: convert.save(path, layout, params, max_shard_size=most)) < most
    same_as(params, path, layout)


def test_a_large_constant_is_compared_in_pieces():
    """No array of its size is made; a number that is off anywhere is found, and NaN too."""
    rows, width = 64, 4096  # a table of 1 MB
    table = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    value = lambda shape: ((rows, width), (table[i] for i in range(rows)))  # noqa: E731
    layout, params = layers(1, 2)
    layout = layout._replace(constants=(convert.Constant("table", value),))
    tensors = {"dense_0.weight": params["dense_0"].T, "table": table.copy()}
    assert peak_memory(lambda: same_as(params, tensors, layout)) < table.nbytes / 4
    for number, said in ((7.0, "off by up to 2.6e.05"), (np.nan, "off by up to nan")):
        tensors["table"][-1, -1] = number
        with pytest.raises(ValueError, match=said):
            convert.load(tensors, layout, params)
        tensors["table"][-1, -1] = table[-1, -1]
        tensors["table"][3, 0] = np.nan if np.isnan(number) else -table[-1, -1] + table[3, 0]
        with pytest.raises(ValueError, match=said):
            convert.load(tensors, layout, params)
        tensors["table"][3, 0] = table[3, 0]
    tensors["table"] = table[1:]
    with pytest.raises(ValueError, match=r"'table' of shape \[64, 4096\], got \[63, 4096\]"):
        convert.load(tensors, layout, params)


LOAD = """
import sys, tracemalloc
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec
from jflow import convert, train

net, params = convert.dit(sys.argv[1], num_heads=2)
mesh = train.make_mesh({"data": 4})
rules = [("kernel$", train.fsdp("data"))]
tracemalloc.start()
_, placed = convert.dit(
    sys.argv[1], num_heads=2, sharding=partial(train.shardings, mesh=mesh, rules=rules)
)
print(tracemalloc.get_traced_memory()[1], train.bytes_per_device(placed))
kernel = placed["blocks"]["attention"]["qkv"]["kernel"]
assert [s.data.shape for s in kernel.addressable_shards] == [(8, 128, 96)] * 4
jax.tree.map(np.testing.assert_array_equal, placed, params)
"""


def test_the_host_holds_at_most_two_of_the_largest_leaf_beside_the_params(tmp_path):
    """Numpy's memory at its peak. On one CPU device the params are in it; those on a mesh are
    JAX's, a quarter of them on each of four devices."""
    net = nets.DiT(2, 128, 8, 2, num_classes=4)
    x, t = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    like = jax.eval_shape(partial(init_linen, net), jax.random.key(0), x, t)
    path, rng = tmp_path / "model.safetensors", np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), like)
    convert.save(path, convert.dit_layout(net, 4), params)
    sizes = [leaf.size * 4 for leaf in jax.tree.leaves(like)]
    del params
    tracemalloc.start()
    try:
        found = convert.load(path, convert.dit_layout(net, 4), like)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < sum(sizes) + 0.5 * max(sizes) and jax.tree.leaves(found)

    ran = run_python("-c", LOAD, str(path), devices=4)
    peak, share = map(int, ran.stdout.split())
    assert 0.9 * max(sizes) < peak < 2 * max(sizes) < 0.7 * sum(sizes)
    assert share < 0.3 * sum(sizes)
