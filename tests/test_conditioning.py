"""Conditions of four kinds (vector, label, image, set) on recipes: each changes the density, and a
condition that is zero, or whose weights are, leaves the unconditional flow."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import bijectors as bj
from jflow import flows, nets

B, D, WIDTH = 6, 4, 3
rng = np.random.default_rng(0)


class Kind(NamedTuple):
    cond: Any  # leaves lead with B
    embed: nn.Module | None


KINDS = {
    "vector": Kind(rng.normal(size=(B, WIDTH)).astype(np.float32), None),
    "label": Kind(np.arange(B) % 4, nn.Embed(4, WIDTH)),
    "image": Kind(rng.normal(size=(B, 6, 6, 1)).astype(np.float32), nets.ImageEncoder(WIDTH, (4,))),
    "set": Kind(rng.normal(size=(B, 5, 2)).astype(np.float32), nets.SetEncoder(WIDTH, (4,))),
    "set with padding": Kind(
        {
            "x": rng.normal(size=(B, 5, 2)).astype(np.float32),
            "mask": np.arange(5) < 1 + np.arange(B)[:, None] % 4,
        },
        nets.SetEncoder(WIDTH, (4,)),
    ),
}
RECIPES = {"nice": flows.nice, "real_nvp": flows.real_nvp, "neural_spline": flows.neural_spline}
ROWS = [("real_nvp", kind) for kind in KINDS] + [
    ("nice", "vector"),
    ("neural_spline", "vector"),
    ("nanoflow", "vector"),
]


def make(recipe, embed):
    if recipe == "nanoflow":
        return flows.nanoflow(
            (D,),
            depth=3,
            hidden=(8,),
            indicator=2,
            embed=embed,
            activation=nn.tanh,
            standardize=False,
        )
    return RECIPES[recipe](
        (D,), depth=3, hidden=(8,), embed=embed, activation=nn.tanh, standardize=False
    )


@functools.cache
def setup(recipe, kind):
    cond, embed = KINDS[kind]
    flow, draw = make(recipe, embed), np.random.default_rng(1)
    x = draw.normal(size=(B, D)).astype(np.float32)
    shapes = jax.eval_shape(flow.init, jax.random.key(0), x, cond)
    params = jax.tree.map(lambda p: (0.5 * draw.normal(size=p.shape)).astype(np.float32), shapes)
    return flow, params, x, cond


@pytest.mark.parametrize("recipe, kind", ROWS)
def test_a_condition_changes_the_density_of_its_own_row(recipe, kind):
    flow, params, x, cond = setup(recipe, kind)
    log_prob = jax.jit(flow.log_prob)
    plain = np.asarray(log_prob(params, x, cond))
    other = jax.tree.map(
        lambda c: np.concatenate([c[1:3], c[2:]]), cond
    )  # rows 0 and 1 have another one
    changed = np.asarray(log_prob(params, x, other)) != plain
    np.testing.assert_array_equal(changed, [True, True] + [False] * (B - 2))
    assert np.all(np.abs(np.asarray(log_prob(params, x, other)) - plain)[:2] > 1e-4)


def conditioner(params, recipe):
    """The first kernel [.., inputs, hidden] of the couplings, wherever the recipe keeps it, as
    (parent dict)."""
    found = []

    def walk(node, name=""):
        if isinstance(node, dict):
            if name == "net":
                found.append(node["Dense_0"])
            for key, child in node.items():
                walk(child, key)

    walk(params["bijector"])
    (dense,) = found
    return dense


def copy(params):
    return jax.tree.map(lambda p: p, params)


@pytest.mark.parametrize("recipe, kind", ROWS)
def test_without_its_rows_of_the_first_kernel_a_condition_is_absent(recipe, kind):
    """Drop the rows that read the condition: a flow without one, with equal params, has the density
    of a zero condition; and with those rows at zero any condition has it."""
    flow, params, x, cond = setup(recipe, kind)
    _, embed = KINDS[kind]
    free = make(recipe, None)
    rows = slice(-WIDTH, None)
    if recipe == "nanoflow":  # (x, cond, indicator)
        rows = slice(-WIDTH - 2, -2)

    blind = copy(params)
    kernel = conditioner(blind, recipe)["kernel"].copy()
    kernel[..., rows, :] = 0
    conditioner(blind, recipe)["kernel"] = kernel

    dropped = copy(params)
    if embed is not None:  # {'embed', 'bijector'} inside the direction data -> source
        dropped["bijector"] = dropped["bijector"]["bijector"]
    kernel = conditioner(dropped, recipe)["kernel"]
    inputs = np.delete(np.arange(kernel.shape[-2]), np.arange(kernel.shape[-2])[rows])
    conditioner(dropped, recipe)["kernel"] = kernel[..., inputs, :]

    expected = jax.jit(free.log_prob)(dropped, x)
    np.testing.assert_allclose(
        jax.jit(flow.log_prob)(blind, x, cond), expected, atol=1e-5, rtol=1e-5
    )
    if embed is None:
        zero = jax.tree.map(jnp.zeros_like, cond)
        np.testing.assert_allclose(
            jax.jit(flow.log_prob)(params, x, zero), expected, atol=1e-5, rtol=1e-5
        )
    samples = [
        jax.jit(f.sample, static_argnums=2)(p, jax.random.key(0), B, c)
        for f, p, c in ((flow, blind, cond), (free, dropped, None))
    ]
    np.testing.assert_allclose(*samples, atol=1e-4, rtol=1e-4)


def test_a_condition_of_a_wrong_shape_or_kind_is_an_error():
    flow, params, x, cond = setup("real_nvp", "vector")
    with pytest.raises(ValueError, match="do not fit its params"):
        flow.log_prob(params, x, cond[:, :-1])
    with pytest.raises(ValueError, match="embed labels first"):
        make("real_nvp", None).init(jax.random.key(0), x, np.arange(B))
    flow, params, x, _ = setup("real_nvp", "image")
    with pytest.raises(ValueError, match=r"expected cond of shape \[b, H, W, C\]"):
        flow.log_prob(params, x, np.ones((B, 3), np.float32))
    with pytest.raises(ValueError, match="expected cond for ImageEncoder, got None"):
        flow.log_prob(params, x)


def test_indicators_tell_layers_apart_and_the_network_is_one():
    """NanoFlow: all layers share one network; exchanging the embeddings of two layers changes the
    map."""
    flow, params, x, cond = setup("nanoflow", "vector")
    scanned = params["bijector"]
    assert set(scanned["shared"]) == {"net"} and scanned["stacked"]["indicator"].shape == (3, 2)
    swapped = {**params, "bijector": {**scanned, "stacked": dict(scanned["stacked"])}}
    swapped["bijector"]["stacked"]["indicator"] = scanned["stacked"]["indicator"][::-1]
    log_prob = jax.jit(flow.log_prob)
    assert np.all(np.abs(log_prob(params, x, cond) - log_prob(swapped, x, cond)) > 1e-4)


def test_nanoflow_grows_by_an_embedding_and_a_head_a_layer():
    """Parameters of depth 16 over depth 2: 8 times for real_nvp, 2.9 times here, by the count in
    the docstring."""

    def count(recipe, depth):
        flow = recipe((8,), depth=depth, hidden=(64, 64), standardize=False)
        shapes = jax.eval_shape(flow.init, jax.random.key(0), np.zeros((2, 8), np.float32))
        return sum(np.prod(p.shape) for p in jax.tree.leaves(shapes))

    per_layer = 16 + 65 * 2 * 8
    network = (8 + 16 + 1) * 64 + 65 * 64
    for depth in (2, 16):
        assert count(flows.nanoflow, depth) == network + depth * per_layer
    assert count(flows.real_nvp, 16) == 8 * count(flows.real_nvp, 2)
    assert count(flows.nanoflow, 16) < 2.9 * count(flows.nanoflow, 2)


def test_nice_has_one_log_det_for_all_points():
    """That of its diagonal scaling: the couplings preserve volume."""
    flow, params, x, cond = setup("nice", "vector")
    _, log_det = jax.jit(flow.inverse)(params, x, cond)
    scaling = params["bijector"]["1"]["log_scale"]
    np.testing.assert_allclose(log_det, np.full(B, scaling.sum()), rtol=1e-5)


IMAGE = (4, 4, 1)
OTHERS = {  # () -> flow, and its event
    "maf": (lambda: flows.maf((D,), depth=2, hidden=(8,)), (D,)),
    "iaf": (lambda: flows.iaf((D,), depth=2, hidden=(8,)), (D,)),
    "neural_spline_autoregressive": (
        lambda: flows.neural_spline_autoregressive((D,), depth=2, hidden=(8,), bins=3),
        (D,),
    ),
    "bnaf": (lambda: flows.bnaf((D,), depth=2, hidden=2, num_layers=1), (D,)),
    "residual_flow": (lambda: flows.residual_flow((D,), depth=2, hidden=(8,)), (D,)),
    "glow": (lambda: flows.glow(IMAGE, scales=1, depth=2, hidden=4), IMAGE),
    "flow_plus_plus": (
        lambda: flows.flow_plus_plus(
            IMAGE,
            levels=5,
            depth=(1, 1, 0),
            dequantizer_depth=1,
            width=4,
            num_blocks=1,
            num_heads=2,
            univariate=bj.univariate.affine(),
        ),
        IMAGE,
    ),
    "tarflow": (
        lambda: flows.tarflow(IMAGE, patch_size=2, width=8, depth=2, num_layers=1, num_heads=2),
        IMAGE,
    ),
    "jet": (
        lambda: flows.jet(IMAGE, patch_size=2, width=8, depth=2, num_layers=1, num_heads=2),
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_zero_vector_is_no_condition(name):
    """The params that read the condition taken out (leaves that the unconditional flow lacks, and
    the last rows of kernels that are longer than its own), a flow without condition has the density
    of a condition of zeros; other conditions change every row."""
    make, event = OTHERS[name]
    flow, draw = make(), np.random.default_rng(2)
    x = draw.normal(size=(B, *event)).astype(np.float32)
    x = np.clip(np.round(x + 2), 0, 4) if name == "flow_plus_plus" else x
    cond = draw.normal(size=(B, WIDTH)).astype(np.float32)
    with_cond = jax.eval_shape(flow.init, jax.random.key(0), x, cond)
    without = jax.eval_shape(flow.init, jax.random.key(0), x)
    params = jax.tree.map(lambda p: (0.3 * draw.normal(size=p.shape)).astype(np.float32), with_cond)

    def take(like, own):
        if isinstance(like, dict):
            return {key: take(child, own[key]) for key, child in like.items()}
        return own[tuple(slice(size) for size in like.shape)]

    def density(params, cond):
        score = flow.elbo if name == "flow_plus_plus" else flow.log_prob
        return score(params, x, cond, key=jax.random.key(1) if name == "flow_plus_plus" else None)

    fewer = take(without, params)
    assert sum(p.size for p in jax.tree.leaves(fewer)) < sum(
        p.size for p in jax.tree.leaves(params)
    )
    expected = jax.jit(lambda p: density(p, None))(fewer)
    run = jax.jit(density)
    np.testing.assert_allclose(run(params, np.zeros_like(cond)), expected, atol=2e-4, rtol=2e-5)
    assert np.all(np.abs(run(params, cond) - expected) > 1e-3)
