"""scan's reversible, remat and unroll: the gradients of plain autodiff, in memory that is flat in
depth."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import bijectors as bj
from jflow import nets
from jflow.bijectors._pullbacks import pullback_at
from jflow.distributions import normal

TRANSFORMERS = {
    "affine": bj.univariate.affine(),
    "spline": bj.univariate.rational_quadratic(8, 5.0),
}


def stack(kind="affine", depth=16, *, features=2, hidden=(32,), **options):
    coupling = bj.coupling(TRANSFORMERS[kind], nets.MLP(hidden, nn.tanh), split=features // 2)
    steps = bj.chain(bj.lu(features), coupling)
    swaps = np.stack([np.roll(np.arange(features), features // 2)] * depth)
    return bj.scan(lambda p: bj.chain(bj.permute(p), steps), depth, xs=swaps, **options)


def moons(n, seed=0):
    """Standardized two moons [n, 2] and which moon [n, 1]."""
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
def trained(kind, depth=16, steps=200):
    """Params of a conditional stack after some Adam steps on moons, with the batch to differentiate
    at."""
    x, cond = moons(1024)
    bijector, optimizer = stack(kind, depth), optax.adam(2e-3)

    @jax.jit
    def train():
        params = bijector.init(jax.random.key(0), x, cond)

        def step(state, key):
            params, moments = state
            rows = jax.random.choice(key, len(x), (128,))
            loss, grads = jax.value_and_grad(lambda p: nll(bijector, p, x[rows], cond[rows]))(
                params
            )
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), loss

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)

    (params, _), losses = train()
    assert losses[-10:].mean() < losses[:10].mean() - 0.4  # trained indeed
    return params, x[:256], cond[:256]


def gradients(bijector, direction, key=None):
    def objective(params, y, cond):
        if direction == "inverse":
            return nll(bijector, params, y, cond, key)
        x, log_det = bijector.forward(params, y, cond, key=key)
        return jnp.mean(jnp.sin(x)) + jnp.mean(log_det)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), allow_int=True))


def worst_relative(tree, expected):
    """The largest difference in a leaf, relative to the leaf's largest entry."""
    worst = lambda a, b: np.max(np.abs(a - b)) / np.max(np.abs(b))  # noqa: E731
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    return max(worst(np.asarray(a), np.asarray(b)) for a, b in pairs if is_float(a))


@pytest.mark.parametrize(("depth", "direction"), [(16, "forward"), (64, "inverse")])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_reversible_gradients_are_those_of_plain_autodiff_on_trained_stacks(kind, depth, direction):
    """In params, x and cond: within 1e-3 of a leaf's largest entry (float32; seen: 4e-4 for the
    deep splines, 3e-6 for the others), on which training on moons has put its expanding and
    contracting scales.

    At a kink the two may take different sides: the slope of a spline's log-slope jumps at its
    knots, and a row rebuilt 1e-5 away can lie beyond one. So for splines one row in a hundred may
    differ in x and cond; the networks here are smooth, and affine stacks agree in every row.
    """
    params, x, cond = trained(kind, depth, 200 if depth == 16 else 60)
    value, expected = gradients(stack(kind, depth), direction)(params, x, cond)
    for reversible in (True, 4) if kind == "affine" else (True,):
        got_value, got = gradients(stack(kind, depth, reversible=reversible), direction)(
            params, x, cond
        )
        np.testing.assert_allclose(got_value, value, rtol=1e-5)
        assert worst_relative(got[0], expected[0]) < 1e-3
        for rows, expected_rows in zip(got[1:], expected[1:], strict=True):
            off = np.max(np.abs(rows - expected_rows), axis=1) / np.max(np.abs(expected_rows))
            assert np.quantile(off, 1.0 if kind == "affine" else 0.99) < 1e-3


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_rebuild_error_of_a_trained_stack_is_small(kind):
    params, x, cond = trained(kind)
    for bijector in (stack(kind), bj.invert(stack(kind))):
        error = jax.jit(functools.partial(bj.rebuild_error, bijector))(params, x, cond)
        assert error.shape == () and 0 < error < 1e-4


def test_remat_unroll_and_reversible_change_no_value():
    params, x, cond = trained("affine")
    params = jax.tree.map(lambda p: p[:3], params)
    value, expected = gradients(stack(depth=3), "inverse")(params, x, cond)
    for options in (
        {"remat": True},
        {"unroll": 2},
        {"unroll": 100},
        {"reversible": True, "unroll": 2},
    ):
        got_value, got = gradients(stack(depth=3, **options), "inverse")(params, x, cond)
        np.testing.assert_allclose(got_value, value, rtol=1e-6)
        assert worst_relative(got, expected) < 1e-5


def test_reversible_carries_labels_shared_params_and_dropout_keys():
    """A label reaches the layers as an integer, which has no gradient; the layers' embedding and
    the key do their part."""
    net = nets.MLP((16,), nn.tanh, dropout=0.5)
    layer = bj.conditioned(bj.coupling(TRANSFORMERS["affine"], net, split=1), nn.Embed(3, 4))

    def make(**options):
        return bj.scan(bj.chain(bj.reverse(), layer), 4, **options)

    x = np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32)
    labels = jnp.arange(32) % 3
    params = jax.jit(make().init)(jax.random.key(0), x, labels)
    params = jax.tree.map(
        lambda p: p + 0.3 * np.random.default_rng(1).normal(size=p.shape).astype(np.float32), params
    )
    key = jax.random.key(5)
    _, expected = gradients(make(), "inverse", key)(params, x, labels)
    _, got = gradients(make(reversible=2), "inverse", key)(params, x, labels)
    assert worst_relative(got, expected) < 1e-4
    assert got[2].dtype == jax.dtypes.float0

    shared = functools.partial(bj.scan, layer, 4, shared=("embed",))
    params = {
        "shared": {"embed": jax.tree.map(lambda p: p[0], params["stacked"]["1"]["embed"])},
        "stacked": {"bijector": params["stacked"]["1"]["bijector"]},
    }
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


@pytest.mark.parametrize(
    "options", [{"reversible": True}, {"reversible": 16}, {"remat": True}, {}], ids=str
)
def test_activation_memory_is_flat_in_depth_when_reversible(options):
    """Temporary memory of the compiled gradient; outputs, which hold the parameters' gradient, are
    not in it."""
    memory = {}
    for depth in (16, 256):
        function, *args = compiled_grad(depth, **options)
        memory[depth] = (
            jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes
        )
    ratio = memory[256] / memory[16]
    assert ratio <= 1.1 if options.get("reversible") is True else ratio > 1.3, memory
    if options.get("reversible") == 16:
        x = 512 * 4 * 4  # bytes of an activation, and of the params of a layer
        layer = sum(4 * leaf.size for leaf in jax.tree.leaves(args[0])) / 256
        assert memory[256] - memory[16] < 2 * (256 // 16) * x + 2 * 256 * layer, memory


@pytest.mark.parametrize(
    "options", [{}, {"remat": True}, {"reversible": True}, {"reversible": 2}], ids=str
)
def test_program_size_is_flat_in_depth(options):
    """In lines, one for each operation, of what goes to the compiler."""
    lines = []
    for depth in (8, 64):
        function, *args = compiled_grad(depth, **options)
        lines.append(jax.jit(function).lower(*args).as_text().count("\n"))
    assert lines[0] == lines[1] > 50


def test_the_way_back_runs_each_conditioner_once():
    """Arithmetic of the compiled gradient, beside that of remat, which rebuilds nothing but
    recomputes each layer once: to invert the layer first and recompute it then took a fourth more.
    """
    flops = {}
    for name in ("remat", "reversible"):
        function, *args = compiled_grad(4, hidden=(128, 128), **{name: True})
        flops[name] = jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
    assert flops["reversible"] < 1.05 * flops["remat"], flops


def several(cond):
    """Maps with and without a `pullback` of their own, one that changes the shape among them; cond
    a label or numbers."""
    coupling = bj.coupling(TRANSFORMERS["affine"], nets.MLP((8,), nn.tanh), split=2)
    if jnp.issubdtype(cond.dtype, jnp.integer):
        coupling = bj.conditioned(coupling, nn.Embed(3, 4))
    flat = bj.reshape((2, 2), (4,))
    inner = bj.chain(
        flat,
        bj.permute([2, 0, 3, 1]),
        coupling,
        bj.invert(bj.chain(bj.lu(4), coupling)),
        bj.invert(flat),
    )
    return bj.chain(inner, bj.chain(), bj.indicated(bj.actnorm(2), 1))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("cond", [np.arange(6) % 3, np.ones((6, 1))], ids=["labels", "numbers"])
def test_a_chain_pulls_back_from_its_output_what_vjp_does_from_its_input(x64, cond, direction):
    """In float64, and the input comes back. Rounding alone differs: 1e-9."""
    rng = np.random.default_rng(0)
    bijector, x, cond = several(cond), jnp.asarray(rng.normal(size=(6, 2, 2))), jnp.asarray(cond)
    params = jax.eval_shape(bijector.init, jax.random.key(0), x, cond)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape)), params)
    cotangents = jnp.asarray(rng.normal(size=x.shape)), jnp.asarray(rng.normal(size=6))

    @jax.jit
    def both(params, x, cond):
        (y, _), pullback = jax.vjp(getattr(bijector, direction), params, x, cond)
        return (x, pullback(cotangents)), pullback_at(
            bijector, direction, params, y, cotangents, cond
        )

    expected, got = both(params, x, cond)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_a_float32_batch_goes_through_float64_params():
    params, x, cond = trained("affine")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        for options in ({}, {"reversible": True}):
            z, log_det = jax.eval_shape(stack(**options).inverse, params, x, cond)
            assert z.dtype == log_det.dtype == jnp.float32
