"""chain, scan (remat, reversible, shared, keys), invert, conditioned: what they promise beyond the contract table."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import quick

from jflow import bijectors as bj
from jflow import flows, nets
from jflow.distributions import normal
from jflow.types import Bijector, Transport

TRANSFORMERS = {"affine": bj.transformers.affine(), "spline": bj.transformers.rational_quadratic(8, 5.0)}
DEPTH = 8


def stack(kind="affine", depth=DEPTH, *, features=2, hidden=(32,), **options):
    coupling = bj.coupling(TRANSFORMERS[kind], nets.MLP(hidden, nn.tanh), split=features // 2)
    steps = bj.chain(bj.lu(features), coupling)
    swaps = np.stack([np.roll(np.arange(features), features // 2)] * depth)
    return bj.scan(lambda p: bj.chain(bj.permute(p), steps), depth, xs=swaps, **options)


def moons(n, seed=0):
    """Standardised two moons [n, 2] and which moon [n, 1]."""
    rng = np.random.default_rng(seed)
    angle, moon = np.pi * rng.random(n), rng.integers(0, 2, n)
    x = np.stack([np.cos(angle), np.sin(angle)], -1)
    x = np.where(moon[:, None] == 1, [1.0, 0.5] - x, x) + 0.05 * rng.normal(size=(n, 2))
    x = (x - x.mean(0)) / x.std(0)
    return jnp.asarray(x, jnp.float32), jnp.asarray(moon[:, None], jnp.float32)


def nll(bijector, params, x, cond, key=None):
    z, log_det = bijector.inverse(params, x, cond, key=key)
    return -jnp.mean(normal((2,)).log_prob({}, z) + log_det)


@functools.cache
def trained(kind):
    """Params of a conditional stack after 200 Adam steps on moons, with the batch to differentiate at."""
    x, cond = moons(1024)
    bijector, optimizer = stack(kind), optax.adam(2e-3)

    @quick
    def train():
        params = bijector.init(jax.random.key(0), x, cond)

        def step(state, key):
            params, moments = state
            rows = jax.random.choice(key, len(x), (256,))
            loss, grads = jax.value_and_grad(lambda p: nll(bijector, p, x[rows], cond[rows]))(params)
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), loss

        keys = jax.random.split(jax.random.key(1), 200)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)

    (params, _), losses = train()
    assert losses[-20:].mean() < losses[:20].mean() - 0.4  # trained indeed
    return params, x[:256], cond[:256]


def gradients(bijector, direction, key=None):
    def objective(params, y, cond):
        if direction == "inverse":
            return nll(bijector, params, y, cond, key)
        x, log_det = bijector.forward(params, y, cond, key=key)
        return jnp.mean(jnp.sin(x)) + jnp.mean(log_det)

    return quick(jax.value_and_grad(objective, argnums=(0, 1, 2), allow_int=True))


def worst_relative(tree, expected):
    """The largest difference in a leaf, relative to the leaf's largest entry."""
    worst = lambda a, b: np.max(np.abs(a - b)) / np.max(np.abs(b))  # noqa: E731
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    return max(worst(np.asarray(a), np.asarray(b)) for a, b in pairs if is_float(a))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_reversible_gradients_are_those_of_plain_autodiff_on_trained_stacks(kind, direction):
    """In params, x and cond: within 1e-4 of a leaf's largest entry (float32; seen: 1e-5), on which training on moons has
    put its expanding and contracting scales.

    At a kink the two may take different sides: the slope of a spline's log-slope jumps at its knots, and a row rebuilt
    1e-5 away can lie beyond one. So for splines one row in a hundred may differ in x and cond; the networks here are
    smooth, and affine stacks agree in every row.
    """
    params, x, cond = trained(kind)
    value, expected = gradients(stack(kind), direction)(params, x, cond)
    for reversible in (True, 4) if kind == "affine" else (True,):
        got_value, got = gradients(stack(kind, reversible=reversible), direction)(params, x, cond)
        np.testing.assert_allclose(got_value, value, rtol=1e-5)
        assert worst_relative(got[0], expected[0]) < 1e-4
        for rows, expected_rows in zip(got[1:], expected[1:], strict=True):
            off = np.max(np.abs(rows - expected_rows), axis=1) / np.max(np.abs(expected_rows))
            assert np.quantile(off, 1.0 if kind == "affine" else 0.99) < 1e-4


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_rebuild_error_of_a_trained_stack_is_small(kind):
    params, x, cond = trained(kind)
    for bijector in (stack(kind), bj.invert(stack(kind))):
        error = quick(functools.partial(bj.rebuild_error, bijector))(params, x, cond)
        assert error.shape == () and 0 < error < 1e-4


def test_remat_unroll_and_reversible_change_no_value():
    params, x, cond = trained("affine")
    params = jax.tree.map(lambda p: p[:3], params)
    value, expected = gradients(stack(depth=3), "inverse")(params, x, cond)
    for options in ({"remat": True}, {"unroll": 2}, {"unroll": 100}, {"reversible": True, "unroll": 2}):
        got_value, got = gradients(stack(depth=3, **options), "inverse")(params, x, cond)
        np.testing.assert_allclose(got_value, value, rtol=1e-6)
        assert worst_relative(got, expected) < 1e-5


def test_reversible_carries_labels_shared_params_and_dropout_keys():
    """A label reaches the layers as an integer, which has no gradient; the layers' embedding and the key do their part."""
    net = nets.MLP((16,), nn.tanh, dropout=0.5)
    layer = bj.conditioned(bj.coupling(TRANSFORMERS["affine"], net, split=1), nn.Embed(3, 4))

    def make(**options):
        return bj.scan(bj.chain(bj.reverse(), layer), 4, **options)

    x = np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32)
    labels = jnp.arange(32) % 3
    params = quick(make().init)(jax.random.key(0), x, labels)
    params = jax.tree.map(lambda p: p + 0.3 * np.random.default_rng(1).normal(size=p.shape).astype(np.float32), params)
    key = jax.random.key(5)
    _, expected = gradients(make(), "inverse", key)(params, x, labels)
    _, got = gradients(make(reversible=2), "inverse", key)(params, x, labels)
    assert worst_relative(got, expected) < 1e-4
    assert got[2].dtype == jax.dtypes.float0

    shared = functools.partial(bj.scan, layer, 4, shared=("embed",))
    params = {"shared": {"embed": jax.tree.map(lambda p: p[0], params["stacked"]["1"]["embed"])}, "stacked": {
        "bijector": params["stacked"]["1"]["bijector"]}}  # fmt: skip
    _, expected = gradients(shared(), "forward", key)(params, x, labels)
    _, got = gradients(shared(reversible=True), "forward", key)(params, x, labels)
    assert worst_relative(got, expected) < 1e-4


def compiled_grad(depth, **options):
    bijector = stack(depth=depth, features=4, **options)
    x = jax.ShapeDtypeStruct((512, 4), jnp.float32)
    params = jax.eval_shape(bijector.init, jax.random.key(0), x)

    def objective(params, x):
        z, log_det = bijector.inverse(params, x)
        return jnp.mean(jnp.square(z)) - jnp.mean(log_det)

    return jax.value_and_grad(objective), params, x


@pytest.mark.parametrize("options", [{"reversible": True}, {"remat": True}, {}], ids=str)
def test_activation_memory_is_flat_in_depth_when_reversible(options):
    """Temporary memory of the compiled gradient; outputs, which hold the parameters' gradient, are not in it."""
    memory = {}
    for depth in (4, 32):
        function, *args = compiled_grad(depth, **options)
        memory[depth] = quick(function).lower(*args).compile().memory_analysis().temp_size_in_bytes
    ratio = memory[32] / memory[4]
    assert ratio <= 1.1 if options.get("reversible") else ratio > 1.5, memory


@pytest.mark.parametrize("options", [{}, {"remat": True}, {"reversible": True}, {"reversible": 2}], ids=str)
def test_program_size_is_flat_in_depth(options):
    """In lines, one for each operation, of what goes to the compiler."""
    lines = []
    for depth in (8, 32):
        function, *args = compiled_grad(depth, **options)
        lines.append(jax.jit(function).lower(*args).as_text().count("\n"))
    assert lines[0] == lines[1] > 50


def test_shared_params_are_stored_once():
    layer = bj.coupling(TRANSFORMERS["affine"], nets.MLP((8,)), split=1)
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


def test_scanned_layers_start_from_different_draws():
    params = quick(stack().init)(jax.random.key(0), np.ones((2, 2), np.float32))
    kernels = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "net" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
    ]  # fmt: skip
    assert kernels and all(np.all(np.std(kernel, axis=0) > 0) for kernel in kernels)


def test_scan_is_the_chain_of_its_layers_with_a_key_for_each():
    """Against the layers applied one by one: params, xs and keys in order, in both directions."""
    net = nets.MLP((16,), dropout=0.5)
    layer = bj.coupling(TRANSFORMERS["affine"], net, split=1)
    depth, swaps = 3, np.array([[1, 0], [0, 1], [1, 0]])
    bijector = bj.scan(lambda p: bj.chain(bj.permute(p), layer), depth, xs=swaps)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 2)).astype(np.float32)
    params = jax.eval_shape(bijector.init, jax.random.key(0), z)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), params)

    @quick
    def run(key, other):
        x, log_det = bijector.forward(params, z, key=key)
        y, total, per_layer = z, jnp.zeros(6), []
        for i, key_i in enumerate(jax.random.split(key, depth)):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], params["stacked"])
            y, contribution = bj.chain(bj.permute(swaps[i]), layer).forward(p, y, key=key_i)
            total += contribution
            first = jax.tree.map(lambda leaf: leaf[0], params["stacked"])["1"]
            per_layer.append(layer.forward(first, z, key=jax.random.split(key_i, 2)[1])[0])
        again = bijector.inverse(params, x, key=key)
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
    a, b, c = (bj.coupling(TRANSFORMERS["affine"], net, split=1) for _ in range(3))
    z = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    p = {name: {"net": {"Dense_0": {"kernel": np.ones((1, 16), np.float32), "bias": np.ones(16, np.float32)}},
                "head": {"kernel": np.full((16, 2), scale, np.float32), "bias": np.zeros(2, np.float32)}}
         for name, scale in (("a", 0.05), ("b", -0.02), ("c", 0.1))}  # fmt: skip
    flat = bj.chain(a, b, c).forward({"0": p["a"], "1": p["b"], "2": p["c"]}, z)
    nested = bj.chain(bj.chain(a, b), c).forward({"0": {"0": p["a"], "1": p["b"]}, "1": p["c"]}, z)
    np.testing.assert_array_equal(flat[0], nested[0])
    np.testing.assert_allclose(flat[1], nested[1], rtol=1e-6)
    twice = bj.chain(a, a)
    one, two = (twice.forward({"0": p["a"], "1": p["a"]}, z, key=jax.random.key(k))[0] for k in (0, 1))
    assert np.any(one != two)
    first = a.forward(p["a"], z, key=jax.random.split(jax.random.key(0), 2)[0])[0]
    np.testing.assert_allclose(
        one, a.forward(p["a"], first, key=jax.random.split(jax.random.key(0), 2)[1])[0], rtol=1e-5
    )


def spread_data(n=512):
    return (3 + 5 * np.random.default_rng(0).normal(size=(n, 2))).astype(np.float32)


@pytest.mark.parametrize("side", ["data", "source"])
@pytest.mark.parametrize("flip", [False, True])
def test_data_dependent_init_standardises_the_far_side(side, flip):
    """An inverted actnorm initialised as if it were upright would turn deviation 5 into 25."""
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
def test_stacked_actnorms_initialise_one_after_another(side):
    """The layer that meets the batch first takes its deviation; what comes behind meets unit deviation."""
    x, order = spread_data(), slice(None, None, -1 if side == "data" else 1)
    sign = 1 if side == "data" else -1
    expected = np.log(x.std(0)) * sign * np.array([[1], [0], [0]])
    chained = bj.chain(*[bj.actnorm(2)] * 3).init(jax.random.key(0), x, side=side)
    scanned = bj.scan(bj.actnorm(2), 3).init(jax.random.key(0), x, side=side)["stacked"]
    np.testing.assert_allclose(np.stack([chained[i]["log_scale"] for i in "012"])[order], expected, atol=1e-5)
    np.testing.assert_allclose(scanned["log_scale"][order], expected, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"reversible": True}, {"shared": ("0",)}], ids=str)
def test_init_through_a_scan_is_finite_on_zeros_that_only_give_the_shape(options):
    bijector = bj.scan(bj.chain(bj.actnorm(2), bj.lu(2)), 3, **options)
    params = quick(bijector.init)(jax.random.key(0), jnp.zeros((1, 2)))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(params))


def test_a_float32_batch_goes_through_float64_params():
    params, x, cond = trained("affine")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        for options in ({}, {"reversible": True}):
            z, log_det = jax.eval_shape(stack(**options).inverse, params, x, cond)
            assert z.dtype == log_det.dtype == jnp.float32


def test_conditioned_needs_cond():
    bijector = bj.conditioned(bj.coupling(TRANSFORMERS["affine"], nets.MLP((4,)), split=1), nn.Embed(3, 2))
    x, labels = jnp.ones((3, 2)), jnp.arange(3)
    params = bijector.init(jax.random.key(0), x, labels)
    for call in (lambda: bijector.init(jax.random.key(0), x), lambda: bijector.forward(params, x)):
        with pytest.raises(ValueError, match="expected cond for Embed, got None"):
            call()


def test_bad_options_fail_at_construction():
    layer = bj.lu(2)
    for options, message in [
        (dict(depth=0), "depth >= 1, got 0"),
        (dict(depth=6, reversible=4), "reversible=k to divide depth=6, got 4"),
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
    transport = Transport(*bj.reverse())
    for made in (bj.chain(bj.lu(2), transport), bj.invert(transport), bj.scan(transport, 2)):
        assert isinstance(made, Transport)
    assert isinstance(bj.conditioned(transport, nn.Embed(2, 2)), Transport)
    assert isinstance(bj.chain(bj.lu(2)), Bijector)
    with pytest.raises(ValueError, match="reversible needs bijectors"):
        bj.scan(transport, 2, reversible=True)
    with pytest.raises(TypeError, match="expected a Bijector, got Transport"):
        flows.flow(transport, normal((2,)))
