"""Every Transport against its likelihood contribution, and the flows over them against
`types.ElboFlow`."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import called_twice
from jax.random import clone
from keys import KEYS, keys_consumed_twice

from jflow import bijectors as bj
from jflow import distributions, flows, losses, nets
from jflow.distributions import decoders
from jflow.types import ElboFlow, Transport

B = 6


class Row(NamedTuple):
    make: Any  # () -> Transport
    event: tuple[int, ...] = (4,)  # of the data side
    levels: int = 0  # the data's, 0 for reals
    cond: Any = None  # b -> cond
    draws: str = "inverse"  # the direction that needs a key
    wide: bool = True  # forward takes all the reals; else (0, 1)


def conditional(size, onto=None):
    """A Gaussian on [size], or its image under `onto`, of mean and scale given by a network of
    cond."""
    net = nets.MLP((8,), nn.tanh)
    layers = [bj.coupling(bj.univariate.affine(), net, split=0)] + ([onto] if onto else [])
    return flows.flow(bj.chain(*layers), distributions.normal((size,)))


def labels(b):
    return jnp.arange(b) % 3


def vector(b):
    return jax.random.normal(jax.random.key(2), (b, 3))


def well(x, cond=None):
    """A log-density, about a center given by cond where there is one."""
    center = 0.0 if cond is None else cond[:, :1]
    return -0.5 * jnp.sum(jnp.square(x - center), axis=-1)


def dequantized():
    return bj.variational_dequantization(conditional(4, bj.sigmoid()), 5)


def unknown_size():
    return bj.chain(
        bj.lu(3), bj.augment(conditional(1), 1), bj.permute([1, 0]), bj.drop(conditional(1), 1)
    )


def indexed():
    net = nets.MLP((8,), nn.tanh)
    moved = bj.coupling(bj.univariate.affine(), net, split=2)
    return bj.indexed(moved, conditional(2), conditional(2), (2,))


TABLE = {
    "augment": Row(lambda: bj.augment(conditional(2), 2)),
    "augment by a fixed noise": Row(lambda: bj.augment(distributions.diagonal_normal((2,)), 2)),
    "augment on cond": Row(lambda: bj.augment(conditional(2), 2), cond=vector),
    "chain": Row(lambda: bj.chain(bj.lu(6), bj.augment(conditional(2), 2), bj.affine((4,)))),
    "chain of both": Row(unknown_size, event=(3,), draws="both"),
    "conditioned": Row(
        lambda: bj.conditioned(bj.augment(conditional(2), 2), nn.Embed(3, 5)), cond=labels
    ),
    "drop": Row(lambda: bj.drop(conditional(1), 1), draws="forward"),
    "drop on cond": Row(lambda: bj.drop(conditional(3), 3), draws="forward", cond=vector),
    "hamiltonian": Row(lambda: bj.hamiltonian(well, 0.1, num_steps=2), draws="both"),
    "langevin": Row(lambda: bj.langevin(well, 0.1, repeats=2), draws="both"),
    "langevin on cond": Row(lambda: bj.langevin(well, 0.1), draws="both", cond=vector),
    "metropolis": Row(lambda: bj.metropolis(well, 0.1, repeats=2), draws="both"),
    "indexed": Row(indexed, draws="both"),
    "indexed on cond": Row(indexed, draws="both", cond=vector),
    "invert": Row(lambda: bj.invert(bj.drop(conditional(2), 2))),
    "on_part": Row(
        lambda: bj.on_part(bj.uniform_dequantization(3), slice(0, 4)), levels=3, wide=False
    ),
    "scan": Row(
        lambda: bj.scan(
            bj.chain(bj.lu(4), bj.augment(conditional(1), 1), bj.drop(conditional(1), 1)), 3
        ),
        draws="both",
    ),
    "supports.columns": Row(
        lambda: bj.supports.columns(*[bj.supports.integers(0, 4)] * 4), levels=5
    ),
    "supports.integers": Row(lambda: bj.supports.integers(0, 4), levels=5),
    "supports.integers by learned noise": Row(
        lambda: bj.supports.integers(0, 4, noise=conditional(4, bj.sigmoid())),
        levels=5,
        cond=vector,
    ),
    "truncated_normal_dequantization": Row(
        lambda: bj.truncated_normal_dequantization(0.3, 5), levels=5, wide=False
    ),
    "uniform_dequantization": Row(lambda: bj.uniform_dequantization(5), levels=5, wide=False),
    "vae": Row(
        lambda: bj.vae(
            flows.planar((2,), depth=1, hidden=(8,), standardize=False),
            decoders.normal(nn.Dense(4)),
            (2,),
            (4,),
        ),
        draws="both",
    ),
    "variational_dequantization": Row(dequantized, levels=5, wide=False),
    "variational_dequantization on cond": Row(dequantized, levels=5, wide=False, cond=vector),
}
EXACT = ("drop", "drop on cond")  # nothing drawn on the way from the data


@functools.cache
def setup(name, dtype=jnp.float32):
    """(row, transport, params away from their initial values, z, x, cond)"""
    row, rng = TABLE[name], np.random.default_rng(1)
    transport = row.make()
    assert isinstance(transport, Transport)
    cond = None if row.cond is None else row.cond(B)
    x = (
        rng.integers(0, row.levels, size=(B, *row.event))
        if row.levels
        else rng.normal(size=(B, *row.event))
    )
    x = np.asarray(x, dtype)
    initial = jax.eval_shape(lambda key: transport.init(key, x, cond), jax.random.key(0))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(initial))
    params = jax.tree.map(
        lambda leaf: np.asarray(0.3 * rng.normal(size=leaf.shape), dtype), initial
    )
    there = jax.eval_shape(
        lambda key: transport.inverse(params, x, cond, key=key)[0], jax.random.key(0)
    )
    z = np.asarray(
        rng.normal(size=there.shape) if row.wide else rng.uniform(size=there.shape), dtype
    )
    return row, transport, params, z, x, cond


def changed(x, row, to):
    """x with another number in one row."""
    x = np.array(x)
    x[(row, *[0] * (x.ndim - 1))] = to
    return x


@functools.cache
def measured(name):
    """What most tests look at, under strict promotion of types: of one program that jit compiles
    for every input, and of what is called outside jit."""
    row, transport, params, z, x, cond = setup(name)
    traces = []

    def objective(params, x, z, cond, key):
        """Both contributions: what a bound and a sampler's density would differentiate."""
        traces.append(1)
        r = {
            "forward": transport.forward(params, z, cond, key=key),
            "inverse": transport.inverse(params, x, cond, key=clone(key)),
        }
        return sum(jnp.sum(contribution) for _, contribution in r.values()), r

    differentiate = jax.jit(jax.grad(objective, has_aux=True))

    def run(params, z, x, cond, key):
        grads, r = differentiate(params, x, z, cond, key)
        return r | {"grads": grads}

    key = jax.random.key(3)
    with jax.numpy_dtype_promotion("strict"):
        r = run(params, z, x, cond, key)
        r["without jit"], r["compiled again"] = called_twice(
            init=lambda: transport.init(key, x, cond),
            init_from_the_source=lambda: transport.init(key, z, cond, side="source"),
            forward=lambda: transport.forward(params, z, cond, key=key),
            inverse=lambda: transport.inverse(params, x, cond, key=key),
        )
        returned = run(params, r["inverse"][0], r["forward"][0], cond, key)
        r["again"], r["back"] = returned["forward"], returned["inverse"]
        r["other key"] = run(params, z, x, cond, jax.random.key(4))
        r["missing"] = run(params, changed(z, 2, np.nan), changed(x, 2, np.nan), cond, key)
        if cond is not None:
            other = jax.tree.map(lambda c: c[::-1], cond)
            r["other cond"] = run(params, z, x, other, key)["inverse"]
    assert len(traces) == 1
    return jax.device_get(r)


@pytest.mark.parametrize("name", TABLE)
def test_contributions_are_rows_and_follow_the_key(name):
    row, _, _, z, x, _ = setup(name)
    r = measured(name)
    for direction, given, other in (("forward", z, x), ("inverse", x, z)):
        out, contribution = r[direction]
        assert out.shape == other.shape and out.dtype == given.dtype
        assert contribution.shape == (B,) and contribution.dtype == jnp.float32
        assert np.all(np.isfinite(out)) and np.all(np.isfinite(contribution))
        moved = np.any(out != r["other key"][direction][0])
        assert moved == (row.draws in (direction, "both"))


@pytest.mark.parametrize("name", TABLE)
def test_a_missing_number_is_missing_in_its_row_alone(name):
    """What comes out of its row, with what it contributes, has a NaN; where it is off the levels,
    the contribution."""
    r, others = measured(name), np.arange(B) != 2
    for direction in ("forward", "inverse"):
        for got, expected in zip(r["missing"][direction], r[direction], strict=True):
            np.testing.assert_array_equal(got[others], expected[others])
        out, contribution = (np.asarray(value)[2] for value in r["missing"][direction])
        assert np.isnan(np.sum(out) + contribution) and not np.isinf(contribution)
        if TABLE[name].levels and direction == "inverse":
            assert np.isnan(contribution)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.draws != "both"])
def test_the_direction_that_draws_is_undone_by_the_other(name):
    """The same pair (z, x) both ways: the second map recovers the first's input, and the
    contributions cancel."""
    row, _, _, z, x, _ = setup(name)
    first, second, start = (
        ("inverse", "again", x) if row.draws == "inverse" else ("forward", "back", z)
    )
    r = measured(name)
    recovered, contribution = r[second]
    if row.levels:
        np.testing.assert_array_equal(recovered, start)
    else:
        np.testing.assert_allclose(recovered, start, atol=1e-4)
    # 2e-3: the noise of a cell is recovered to 5 levels' rounding of float32
    np.testing.assert_allclose(contribution, -r[first][1], atol=2e-3)


@pytest.mark.parametrize("name", TABLE)
def test_the_direction_that_draws_needs_a_key(name):
    row, transport, params, z, x, cond = setup(name)
    calls = {
        "inverse": lambda: transport.inverse(params, x, cond),
        "forward": lambda: transport.forward(params, z, cond),
    }
    for direction, call in calls.items():
        if row.draws in (direction, "both"):
            with pytest.raises(ValueError, match="needs a key"):
                call()
        else:
            out, contribution = call()
            np.testing.assert_allclose(out, measured(name)[direction][0], atol=1e-5)
            np.testing.assert_allclose(contribution, measured(name)[direction][1], atol=1e-4)


@pytest.mark.parametrize("name", TABLE)
def test_without_jit_a_second_call_compiles_nothing(name):
    r = measured(name)
    assert not r["compiled again"]
    for direction in ("forward", "inverse"):
        for plain, jitted in zip(r["without jit"][direction], r[direction], strict=True):
            np.testing.assert_allclose(plain, jitted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", TABLE)
def test_init_is_finite_from_both_sides_and_alike_in_shape(name):
    _, transport, params, _, x, cond = setup(name)
    for call in ("init", "init_from_the_source"):
        initial = measured(name)["without jit"][call]
        assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, params)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(initial))
    with pytest.raises(ValueError, match="'data' or 'source'"):
        jax.eval_shape(lambda key: transport.init(key, x, cond, side="left"), jax.random.key(0))


@pytest.mark.parametrize("name", TABLE)
def test_keys_are_consumed_once(name):
    _, transport, params, z, x, cond = setup(name)
    calls = lambda a, b, c, d: (  # noqa: E731
        transport.init(a, x, cond),
        transport.init(b, z, cond, side="source"),
        transport.forward(params, z, cond, key=c),
        transport.inverse(params, x, cond, key=d),
    )
    assert not keys_consumed_twice(calls, *KEYS)


@pytest.mark.parametrize("name", TABLE)
def test_gradients_are_finite_and_reach_every_parameter(name):
    for path, g in jax.tree_util.tree_leaves_with_path(measured(name)["grads"]):
        assert np.all(np.isfinite(g)) and np.any(g != 0), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.cond])
def test_cond_changes_the_contribution(name):
    r = measured(name)
    assert np.sum(r["inverse"][1] != r["other cond"][1]) >= 4


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.levels])
def test_off_the_levels_the_mass_is_zero(name):
    row, transport, params, _, x, cond = setup(name)
    for wrong in (-1.0, row.levels, 0.5):
        _, contribution = transport.inverse(
            params, changed(x, 0, wrong), cond, key=jax.random.key(0)
        )
        assert np.isneginf(contribution[0]) and np.all(np.isfinite(contribution[1:]))


def test_transports_are_refused_where_an_inverse_must_be_exact():
    with pytest.raises(
        TypeError, match="expected a Bijector, got a Transport: elbo_flow takes one"
    ):
        flows.flow(bj.uniform_dequantization(), distributions.normal((4,)))
    with pytest.raises(ValueError, match="reversible needs bijectors"):
        bj.scan(bj.uniform_dequantization(), 2, reversible=True)


def flow_plus_plus(**options):
    """With affine couplings: mixtures of logistics are tested as a transformer."""
    sizes = {
        "width": 4,
        "num_blocks": 1,
        "num_heads": 2,
        "dequantizer_depth": 1,
        "univariate": bj.univariate.affine(),
    }
    return flows.flow_plus_plus((2, 4, 1), levels=5, depth=(0, 0, 1), **sizes, **options)


class FlowRow(NamedTuple):
    make: Any  # () -> ElboFlow
    event: tuple[int, ...] = (4,)
    levels: int = 5
    cond: Any = None
    exact: bool = False


FLOWS = {
    "elbo_flow": FlowRow(lambda: flows.elbo_flow(dequantized(), distributions.normal((4,)))),
    "elbo_flow over a bijector": FlowRow(
        lambda: flows.elbo_flow(bj.affine((4,)), distributions.student_t((4,))),
        levels=0,
        exact=True,
    ),
    "elbo_flow over a flow": FlowRow(
        lambda: flows.elbo_flow(
            bj.uniform_dequantization(5),
            flows.real_nvp((4,), depth=2, hidden=(8,), standardize=False),
        ),
        cond=vector,
    ),
    "elbo_flow that drops": FlowRow(
        lambda: flows.elbo_flow(bj.drop(conditional(2), 2), distributions.normal((2,))),
        levels=0,
        exact=True,
    ),
    # of no condition, and of the two stages before: tests/flows/test_image_flows.py
    "flow_plus_plus of labels": FlowRow(
        lambda: flow_plus_plus(embed=nn.Embed(3, 4), dropout=0.5, remat=True),
        event=(2, 4, 1),
        cond=labels,
    ),
    "transformed onto integers": FlowRow(
        lambda: flows.transformed(
            flows.real_nvp((4,), depth=2, hidden=(8,), standardize=False),
            bj.supports.integers(0, 4),
        ),
        cond=vector,
    ),
    "importance_weighted": FlowRow(lambda: flows.importance_weighted(FLOWS["elbo_flow"].make(), 3)),
}


@pytest.mark.parametrize("name", FLOWS)
def test_elbo_flows(name):
    """Shapes, types, finite gradients that reach every parameter, keys, samples on the levels; and
    bad input."""
    row, rng = FLOWS[name], np.random.default_rng(0)
    flow = row.make()
    assert isinstance(flow, ElboFlow)
    cond = None if row.cond is None else row.cond(B)
    x = rng.integers(0, 5, size=(B, *row.event)) if row.levels else rng.normal(size=(B, *row.event))
    x = np.asarray(x, np.float32)

    key = jax.random.key(0)
    shapes = jax.eval_shape(flow.init, key, x, cond)
    params = jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape).astype(np.float32), shapes)

    @jax.jit
    def run(params, key):
        elbo, pullback = jax.vjp(lambda p: flow.elbo(p, x, cond, key=key), params)
        return elbo, pullback(jnp.cos(elbo))[0]

    elbo, grads = jax.device_get(run(params, key))
    other = jax.device_get(run(params, jax.random.key(1))[0])
    found, compiled = called_twice(
        init=lambda: flow.init(key, x, cond),
        elbo=lambda: flow.elbo(params, x, cond, key=key),
        sample=lambda: flow.sample(params, key, B, cond),
        inverse=lambda: flow.inverse(params, x, cond, key=key),
    )
    z = found["inverse"][0]
    back, compiled_by_forward = called_twice(forward=lambda: flow.forward(params, z, cond, key=key))
    assert not compiled | compiled_by_forward
    initial, sample, again = jax.device_get((found["init"], found["sample"], back["forward"][0]))
    np.testing.assert_allclose(found["elbo"], elbo, atol=1e-4, rtol=1e-5)
    assert set(initial) == {"bijector", "base"}
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(initial))
    assert elbo.shape == (B,) and elbo.dtype == jnp.float32 and np.all(np.isfinite(elbo))
    assert np.all(elbo == other) if row.exact else np.all(elbo != other)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(g)) and np.any(g != 0), jax.tree_util.keystr(path)
    assert sample.shape == x.shape and np.all(np.isfinite(sample))
    if row.levels:
        np.testing.assert_array_equal(again, x)
        assert set(np.unique(sample)) <= set(range(row.levels)) and len(np.unique(sample)) > 1

    calls = lambda a, b, c: (  # noqa: E731
        flow.init(a, x, cond),
        flow.elbo(params, x, cond, key=b),
        flow.sample(params, c, B, cond),
    )
    assert not keys_consumed_twice(calls, *KEYS[:3])

    if not row.exact:
        with pytest.raises(ValueError, match="needs a key"):
            flow.elbo(params, x, cond)
    with pytest.raises(TypeError, match="in floats"):
        flow.elbo(params, x.astype(np.int32), cond, key=jax.random.key(0))
    with pytest.raises(ValueError, match="n >= 1"):
        flow.sample(params, jax.random.key(0), 0)
    with pytest.raises(ValueError, match="lead with 6 rows"):
        flow.elbo(params, x, jnp.ones((B - 1, 3)), key=jax.random.key(0))


def test_every_public_name_is_in_the_table():
    public = {"augment", "drop", "uniform_dequantization", "vae", "variational_dequantization"}
    assert public < set(bj.__all__) and public <= {name.split()[0] for name in TABLE}
    assert "supports.integers" in TABLE
    assert {"elbo_flow", "flow_plus_plus", "importance_weighted", "transformed"} == {
        name.split()[0] for name in FLOWS
    }


def test_bad_options_fail_at_construction():
    for levels in (1, 2.5, 2**17):
        with pytest.raises(ValueError, match=f"2 .. 65536 levels, got {levels}"):
            bj.uniform_dequantization(levels)
        with pytest.raises(ValueError, match="2 .. 65536"):
            bj.variational_dequantization(distributions.uniform((4,)), levels)
    with pytest.raises(ValueError, match="size to be a whole number of at least 1, got 0"):
        bj.drop(distributions.normal((4,)), 0)
    with pytest.raises(ValueError, match="draws to be a whole number of at least 1"):
        flows.importance_weighted(FLOWS["elbo_flow"].make(), 0)
    exact = flows.flow(bj.affine((4,)), distributions.normal((4,)))
    for make in (lambda flow: flows.importance_weighted(flow, 2), losses.negative_elbo):
        with pytest.raises(TypeError, match="expected an ElboFlow, got a Flow"):
            make(exact)
    with pytest.raises(TypeError, match="see losses.negative_elbo"):
        losses.nll(FLOWS["elbo_flow"].make())
    with pytest.raises(TypeError, match="expected a Transport or a Bijector, got a Distribution"):
        flows.elbo_flow(distributions.normal((4,)), distributions.normal((4,)))
    augment = bj.augment(distributions.normal((2,)), 3)
    with pytest.raises(ValueError, match=r"expected noise of shape \[6, 3\], got \[6, 2\]"):
        augment.inverse({}, jnp.ones((6, 4)), key=jax.random.key(0))
    with pytest.raises(ValueError, match="more than 3"):
        augment.forward({}, jnp.ones((6, 3)))
