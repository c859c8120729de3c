"""chain, scan (shared params, keys, init), invert, conditioned: what they promise beyond the
contract table."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import flows, nets
from jflow.distributions import normal
from jflow.types import Bijector, Transport

AFFINE = bj.univariate.affine()


def test_shared_params_are_stored_once():
    layer = bj.coupling(AFFINE, nets.MLP((8,)), split=1)
    x = np.ones((5, 2), np.float32)

    def shapes(**options):
        bijector = bj.scan(layer, 3, **options)
        return jax.tree.map(jnp.shape, jax.eval_shape(bijector.init, jax.random.key(0), x))

    plain, shared = shapes(), shapes(shared=("net",))
    assert plain["shared"] == {} and set(plain["stacked"]) == {"net", "head"}
    assert shared["stacked"] == {"head": plain["stacked"]["head"]}
    assert shared["shared"]["net"] == jax.tree.map(
        lambda s: s[1:], plain["stacked"]["net"], is_leaf=lambda s: isinstance(s, tuple)
    )


def test_a_scan_of_scans_shares_a_network_within_each_group():
    """Groups of g layers with one network each: the counts of parameters, the values of the layers
    written out, and the round trip."""
    depth, g, size = 4, 2, 3

    def layer():
        return bj.indicated(bj.coupling(AFFINE, nets.MLP((6,)), split=2), size)

    one = {name: jax.tree.map(lambda leaf: leaf.size, p) for name, p in shapes_of(layer()).items()}
    net, rest = (
        sum(jax.tree.leaves([p for name, p in one.items() if (name == "net") is shared]))
        for shared in (True, False)
    )
    plain = bj.scan(layer(), depth)
    grouped = bj.scan(bj.scan(layer(), g, shared=("net",)), depth // g)
    whole = bj.scan(layer(), depth, shared=("net",))
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(shapes_of(b))) for b in (plain, grouped, whole)
    ]
    assert counts == [depth * (net + rest), depth // g * net + depth * rest, net + depth * rest]
    assert counts[0] > counts[1] > counts[2]

    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda p: draw.normal(size=p.shape).astype(p.dtype), shapes_of(grouped))
    z = draw.normal(size=(5, 4)).astype(np.float32)

    @jax.jit
    def run(params, z):
        x, log_det = grouped.forward(params, z)
        y, total = z, 0.0
        for group in range(depth // g):
            inner = jax.tree.map(lambda p, i=group: p[i], params["stacked"])
            for i in range(g):
                own = jax.tree.map(lambda p, i=i: p[i], inner["stacked"])
                y, more = layer().forward({**own, **inner["shared"]}, y)
                total = total + more
        return (x, log_det), (y, total), grouped.inverse(params, x)

    found, expected, (back, minus) = jax.device_get(run(params, z))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )
    np.testing.assert_allclose(back, z, atol=1e-4)
    np.testing.assert_allclose(minus, -found[1], atol=1e-4)


def shapes_of(bijector):
    return jax.eval_shape(bijector.init, jax.random.key(0), jnp.ones((2, 4)))


def test_scanned_layers_start_from_different_draws():
    layer = bj.coupling(AFFINE, nets.MLP((32,)), split=1)
    params = jax.jit(bj.scan(layer, 8).init)(jax.random.key(0), np.ones((2, 2), np.float32))
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "net" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
    ]
    assert kernels and all(np.all(np.std(kernel, axis=0) > 0) for kernel in kernels)


def test_scan_is_the_chain_of_its_layers_with_a_key_for_each():
    """Against the layers applied one by one: params, xs and keys in order, in both directions."""
    net = nets.MLP((16,), dropout=0.5)
    layer = bj.coupling(AFFINE, net, split=1)
    depth, swaps = 3, np.array([[1, 0], [0, 1], [1, 0]])
    bijector = bj.scan(lambda p: bj.chain(bj.permute(p), layer), depth, xs=swaps)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 2)).astype(np.float32)
    params = jax.eval_shape(bijector.init, jax.random.key(0), z)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), params)

    @jax.jit
    def run(key, other):
        x, log_det = bijector.forward(params, z, key=key)
        y, total, per_layer = z, jnp.zeros(6), []
        for i, key_i in enumerate(jax.random.split(jax.random.clone(key), depth)):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], params["stacked"])
            y, contribution = bj.chain(bj.permute(swaps[i]), layer).forward(p, y, key=key_i)
            total += contribution
            first = jax.tree.map(lambda leaf: leaf[0], params["stacked"])["1"]
            own = jax.random.split(jax.random.clone(key_i), 2)[1]
            per_layer.append(layer.forward(first, z, key=own)[0])
        again = bijector.inverse(params, x, key=jax.random.clone(key))
        return x, log_det, y, total, per_layer, again, bijector.inverse(params, x, key=other)[0]

    x, log_det, y, total, per_layer, again, wrong_key = run(jax.random.key(1), jax.random.key(2))
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_det, total, rtol=1e-5, atol=1e-5)
    assert np.any(per_layer[0] != per_layer[1]) and np.any(per_layer[1] != per_layer[2])
    np.testing.assert_allclose(again[0], z, atol=1e-4)
    np.testing.assert_allclose(again[1], -log_det, atol=1e-4)
    assert np.max(np.abs(wrong_key - z)) > 0.01


def test_chain_gives_each_layer_a_key_and_nesting_changes_nothing_without_one():
    net = nets.MLP((16,), dropout=0.5)
    a, b, c = (bj.coupling(AFFINE, net, split=1) for _ in range(3))
    z = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    p = {
        name: {
            "net": {
                "Dense_0": {"kernel": np.ones((1, 16), np.float32), "bias": np.ones(16, np.float32)}
            },
            "head": {
                "kernel": np.full((16, 2), scale, np.float32),
                "bias": np.zeros(2, np.float32),
            },
        }
        for name, scale in (("a", 0.05), ("b", -0.02), ("c", 0.1))
    }
    flat = bj.chain(a, b, c).forward({"0": p["a"], "1": p["b"], "2": p["c"]}, z)
    nested = bj.chain(bj.chain(a, b), c).forward({"0": {"0": p["a"], "1": p["b"]}, "1": p["c"]}, z)
    np.testing.assert_array_equal(flat[0], nested[0])
    np.testing.assert_allclose(flat[1], nested[1], rtol=1e-6)
    twice = bj.chain(a, a)
    one, two = (
        twice.forward({"0": p["a"], "1": p["a"]}, z, key=jax.random.key(k))[0] for k in (0, 1)
    )
    assert np.any(one != two)
    first = a.forward(p["a"], z, key=jax.random.split(jax.random.key(0), 2)[0])[0]
    np.testing.assert_allclose(
        one, a.forward(p["a"], first, key=jax.random.split(jax.random.key(0), 2)[1])[0], rtol=1e-5
    )


def spread_data(n=512):
    return (3 + 5 * np.random.default_rng(0).normal(size=(n, 2))).astype(np.float32)


@pytest.mark.parametrize("side", ["data", "source"])
@pytest.mark.parametrize("flip", [False, True])
def test_data_dependent_init_standardizes_the_far_side(side, flip):
    """An inverted actnorm initialized as if it were upright would turn deviation 5 into 25."""
    bijector = bj.actnorm(2)
    bijector = bj.invert(bijector) if flip else bijector
    x = spread_data()
    params = bijector.init(jax.random.key(0), x, side=side)
    away = bijector.inverse if side == "data" else bijector.forward
    y, log_det = away(params, x)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(log_det, -np.log(x.std(0)).sum() * np.ones(512), rtol=1e-5)


@pytest.mark.parametrize("side", ["data", "source"])
def test_stacked_actnorms_initialize_one_after_another(side):
    """The layer that meets the batch first takes its deviation; what comes behind meets unit
    deviation."""
    x, order = spread_data(), slice(None, None, -1 if side == "data" else 1)
    sign = 1 if side == "data" else -1
    expected = np.log(x.std(0)) * sign * np.array([[1], [0], [0]])
    chained = bj.chain(*[bj.actnorm(2)] * 3).init(jax.random.key(0), x, side=side)
    scanned = bj.scan(bj.actnorm(2), 3).init(jax.random.key(0), x, side=side)["stacked"]
    np.testing.assert_allclose(
        np.stack([chained[i]["log_scale"] for i in "012"])[order], expected, atol=1e-5
    )
    np.testing.assert_allclose(scanned["log_scale"][order], expected, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"reversible": True}, {"shared": ("0",)}], ids=str)
def test_init_through_a_scan_is_finite_on_zeros_that_only_give_the_shape(options):
    bijector = bj.scan(bj.chain(bj.actnorm(2), bj.lu(2)), 3, **options)
    params = jax.jit(bijector.init)(jax.random.key(0), jnp.zeros((1, 2)))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(params))


def test_conditioned_needs_cond():
    bijector = bj.conditioned(bj.coupling(AFFINE, nets.MLP((4,)), split=1), nn.Embed(3, 2))
    x, labels = jnp.ones((3, 2)), jnp.arange(3)
    params = bijector.init(jax.random.key(0), x, labels)
    for call in (lambda: bijector.init(jax.random.key(0), x), lambda: bijector.forward(params, x)):
        with pytest.raises(ValueError, match="expected cond for Embed, got None"):
            call()


def test_bad_options_fail_at_construction():
    layer = bj.lu(2)
    for options, message in [
        (dict(depth=0), "depth to be a whole number of at least 1, got 0"),
        (dict(depth=6, reversible=4), "reversible=k to divide depth=6, got 4"),
        (dict(depth=6, reversible=1), "reversible=1 would keep every activation"),
        (dict(depth=6, reversible=0), "reversible=k to divide depth=6, got 0"),
        (dict(depth=6, reversible=-2), "reversible=k to divide depth=6, got -2"),
        (dict(depth=6, reversible=True, remat=True), "choose one"),
        (dict(depth=3, xs=np.zeros((2, 4))), r"lead with depth=3, got \[2, 4\]"),
        (dict(depth=3, xs=np.zeros(())), r"lead with depth=3, got \[\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            bj.scan(layer, **options)
    with pytest.raises(ValueError, match=r"no params \['net'\] to share; it has \['log_diagonal'"):
        bj.scan(layer, 2, shared=("net",)).init(jax.random.key(0), jnp.ones((1, 2)))


def test_a_transport_makes_transports_and_is_refused_where_a_density_is_needed():
    transport = Transport(*bj.reverse()[:3])
    for made in (bj.chain(bj.lu(2), transport), bj.invert(transport), bj.scan(transport, 2)):
        assert isinstance(made, Transport)
    assert isinstance(bj.conditioned(transport, nn.Embed(2, 2)), Transport)
    assert isinstance(bj.chain(bj.lu(2)), Bijector)
    with pytest.raises(ValueError, match="reversible needs bijectors"):
        bj.scan(transport, 2, reversible=True)
    with pytest.raises(TypeError, match="expected a Bijector, got a Transport"):
        flows.flow(transport, normal((2,)))
