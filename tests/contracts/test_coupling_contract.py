"""Every coupling against every promise of `types.Coupling`, and the batch transforms that pair or
make a source against those of `types.BatchTransform`."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled_again
from keys import KEYS, keys_consumed_twice

from jflow import couplings, distributions, losses

N = 12
TENTH = np.float64(0.1)  # options are numbers of numpy's as well


class Row(NamedTuple):
    coupling: Any
    permutation: bool = True  # whether every row of both sides comes once
    needs_key: str | None = None  # who says so
    in_class: bool = False  # whether the pairs are of one class
    together: bool | None = False  # whether pairs stay only if both sides move; None: unsaid
    checks: str | None = None  # who says that the rows or costs are wrong
    in_order: bool = True  # whether costs that are NaN pair in order inside jit


within, near = couplings.within_class(), couplings.near_condition(weight=TENTH)
TABLE = {
    "independent": Row(couplings.independent()),
    "optimal_transport": Row(couplings.optimal_transport(), checks="optimal_transport"),
    "optimal_transport cosine": Row(
        couplings.optimal_transport(couplings.cosine), checks="optimal_transport", together=None
    ),
    "optimal_transport near_condition": Row(
        couplings.optimal_transport(near), checks="optimal_transport"
    ),
    "optimal_transport near_condition, ratio": Row(
        couplings.optimal_transport(couplings.near_condition(ratio=TENTH)),
        checks="optimal_transport",
        together=None,  # a weight found by halving: float32 may end it one half earlier
    ),
    "optimal_transport within_class": Row(
        couplings.optimal_transport(within), checks="optimal_transport", in_class=True
    ),
    "partial_optimal_transport": Row(
        couplings.partial_optimal_transport(np.float64(0.7)),
        permutation=False,
        needs_key="partial_optimal_transport",
        together=True,
        checks="partial_optimal_transport",
        in_order=False,
    ),
    "semidiscrete": Row(
        lambda *args: couplings.semidiscrete(jnp.zeros(args[2].shape[:1], jnp.float32))(*args),
        permutation=False,
        together=True,
        in_order=False,
    ),
    "sinkhorn": Row(
        couplings.sinkhorn(TENTH), needs_key="couplings.sample_permutation", checks="sinkhorn"
    ),
    "sinkhorn most_likely_permutation": Row(
        couplings.sinkhorn(TENTH, draw=couplings.most_likely_permutation), checks="sinkhorn"
    ),
    "sinkhorn sample_with_replacement": Row(
        couplings.sinkhorn(draw=couplings.sample_with_replacement),
        permutation=False,
        needs_key="couplings.sample_with_replacement",
        checks="sinkhorn",
    ),
    "sinkhorn within_class": Row(
        couplings.sinkhorn(TENTH, within),
        needs_key="couplings.sample_permutation",
        checks="sinkhorn",
        in_class=True,
    ),
    "stable_matching": Row(couplings.stable_matching(), checks="stable_matching", together=True),
    "stable_matching within_class": Row(
        couplings.stable_matching(within), checks="stable_matching", in_class=True, together=True
    ),
    "unbalanced": Row(
        couplings.unbalanced(TENTH, np.float64(1.0)),
        permutation=False,
        needs_key="couplings.sample_with_replacement",
        checks="unbalanced",
        together=True,
    ),
}


class Transform(NamedTuple):
    transform: Any
    keeps: tuple[str, ...]  # what it leaves as it is
    reads: tuple[str, ...] = ("cond",)  # what it takes beside x and weight
    own_cond: bool = False  # whether it makes cond


TRANSFORMS = {
    "pair": Transform(couplings.pair(couplings.independent()), ("x", "cond", "weight")),
    "with_source corrupted block_means": Transform(
        couplings.with_source(couplings.corrupted(couplings.block_means(2), TENTH)),
        ("x", "weight"),
        own_cond=True,
    ),
    "with_source drawn_from": Transform(
        couplings.with_source(couplings.drawn_from(distributions.normal((4, 4, 1)))),
        ("x", "cond", "weight"),
    ),
    "with_source inpainting tiles": Transform(
        couplings.with_source(couplings.inpainting(couplings.tiles(2, TENTH))),
        ("x", "weight"),
        own_cond=True,
    ),
    "annealed_source": Transform(
        losses.annealed_source(lambda step: 0.5 + 0 * step), ("x", "weight"), ("x0",)
    ),
    "drop_cond": Transform(losses.drop_cond(0.5, null=3), ("x", "weight")),
    "fresh_source": Transform(losses.fresh_source(), ("x", "weight"), ("x0", "paired")),
    "noised": Transform(losses.noised(TENTH), ("cond", "weight")),
}
OF_LOSSES = {"annealed_source", "drop_cond", "fresh_source", "noised"}
EXCUSED = {
    "entropic_potentials": "what sinkhorn computes, tests/couplings/test_entropic.py",
    "fit_semidiscrete": "learns what semidiscrete takes, tests/couplings/test_semidiscrete.py",
    "hold_known": "a velocity, tests/contracts/test_guidance_contract.py",
    "sample_permutation": "what sinkhorn draws with where nothing is said",
    "squared_euclidean": "the cost where nothing is said",
}


def test_every_public_name_is_in_the_table():
    words = {re.sub(",.*", "", word) for name in [*TABLE, *TRANSFORMS] for word in name.split()}
    assert set(couplings.__all__) == words - OF_LOSSES - {"ratio"} | set(EXCUSED)


def rows(dtype=np.float32):
    """x0, x1 and labels; multiples of 1/64, so that moved by 2^10 they are the same numbers in
    float32."""
    x0, x1 = np.round(64 * np.random.default_rng(0).normal(size=(2, N, 2))) / 64
    return jnp.asarray(x0, dtype), jnp.asarray(x1, dtype), jnp.arange(N) % 3


@functools.cache
def program(name):
    """The gradient of what pairs cost by a factor of the source, and the paired batch with its row
    numbers: one program, and how often it was traced."""
    row, traces = TABLE[name], []
    transform = couplings.pair(row.coupling)

    @jax.jit
    def run(factor, key, x0, x, cond):
        traces.append(1)

        def objective(factor):
            batch = {"x0": factor * x0, "x": x, "weight": 1 + jnp.arange(N)}
            made = transform(key, batch | {"cond": cond})
            return jnp.sum((made["x0"] - made["x"]) ** 2), made

        return jax.value_and_grad(objective, has_aux=True)(factor)

    return run, traces


def indices(made, x0):
    """(i, j) of a paired batch, by its rows of the source, all different, and its weights."""
    i = [int(np.flatnonzero((np.asarray(x0) == row).all(1))[0]) for row in np.asarray(made["x0"])]
    return np.asarray(i), np.asarray(made["weight"]) - 1


@pytest.mark.parametrize("name", TABLE)
def test_pairs(name):
    """Rows of the batch, each once where it is a permutation; cond and weight follow x; the pairs
    are constants of the gradient; the same under jit, in one trace, and without; the key is used
    where one is needed, and else not."""
    row, (run, traces) = TABLE[name], program(name)
    x0, x1, label = rows()
    (_, made), slope = run(1.0, KEYS[0], x0, x1, label)
    i, j = indices(made, x0)
    assert set(made) == {"x0", "x", "cond", "weight"}
    np.testing.assert_array_equal(made["x"], x1[j])
    np.testing.assert_array_equal(made["cond"], label[j])
    assert slope == pytest.approx(float(np.sum(2 * (x0[i] - x1[j]) * x0[i])), rel=1e-4)
    if row.permutation:
        np.testing.assert_array_equal(np.sort(i), np.arange(N))
        np.testing.assert_array_equal(np.sort(j), np.arange(N))
    if row.in_class:
        np.testing.assert_array_equal(label[i], label[j])
    pair_key = jax.random.split(KEYS[0])[1]  # the other part draws a source
    plain = row.coupling(pair_key, x0, x1, label)
    np.testing.assert_array_equal(np.stack(plain), [i, j])
    other = indices(run(1.0, KEYS[1], x0, x1, label)[0][1], x0)
    assert np.array_equal(np.stack(other), [i, j]) == (row.needs_key is None)
    assert len(traces) == 1
    if row.needs_key is None:
        np.testing.assert_array_equal(np.stack(row.coupling(None, x0, x1, label)), [i, j])
    else:
        with pytest.raises(ValueError, match=f"{row.needs_key} is stochastic: it needs a key"):
            row.coupling(None, x0, x1, label)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.together is not None])
def test_an_offset_changes_no_pairs(name):
    row, (run, _) = TABLE[name], program(name)
    x0, x1, label = rows()
    plain = indices(run(1.0, KEYS[0], x0, x1, label)[0][1], x0)
    moved = x0 + 1024 * row.together
    found = run(1.0, KEYS[0], moved, x1 + 1024, label)[0][1]
    np.testing.assert_array_equal(indices(found, moved), plain)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.checks])
def test_costs_that_are_not_numbers_and_rows_that_do_not_fit(name):
    """Errors where values are known; inside jit, where nothing can raise, such a batch is paired in
    order."""
    row, (run, _) = TABLE[name], program(name)
    x0, x1, label = rows()
    spoilt = x0.at[3].set(jnp.nan)
    with pytest.raises(
        ValueError, match=f"{row.checks}: the cost of source row 3 with data row .* is NaN"
    ):
        row.coupling(KEYS[0], spoilt, x1, label)
    if row.in_order:
        made = run(1.0, KEYS[0], spoilt, x1, label)[0][1]
        np.testing.assert_array_equal(made["x0"], spoilt)
        np.testing.assert_array_equal(made["x"], x1)
    with pytest.raises(ValueError, match=rf"{row.checks}: .* \[7, 2\] and \[12, 2\]"):
        jax.eval_shape(row.coupling, KEYS[0], x0[:7], x1, label)
    with pytest.raises(ValueError, match=f"{row.checks}: expected cond to lead with 12 rows"):
        jax.eval_shape(row.coupling, KEYS[0], x0, x1, label[:5])
    with pytest.raises(ValueError, match="pair: expected 'x0' of the shape of 'x'"):
        couplings.pair(row.coupling)(KEYS[0], {"x0": x0[:7], "x": x1})


@pytest.mark.parametrize("name", TABLE)
def test_types_keys_and_no_rows(name):
    """Under strict promotion nothing is promoted, and under x64 no float64 comes into what float32
    rows compute; bfloat16 rows have costs in float32. Without jit a second call compiles nothing.
    """
    coupling = TABLE[name].coupling
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((N, 2), dtype)
        labels = jax.ShapeDtypeStruct((N,), jnp.int32)
        with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
            traced, shapes = jax.make_jaxpr(coupling, return_shape=True)(KEYS[0], x, x, labels)
        assert not re.search(r"f64\[\d", str(traced))  # Python's own numbers are scalars f64[]
        for index in shapes:
            assert jnp.issubdtype(index.dtype, jnp.integer) and index.shape == (N,)
    x0, x1, label = rows()
    assert not compiled_again(pair=lambda: coupling(KEYS[0], x0, x1, label))
    assert not keys_consumed_twice(lambda key: coupling(key, x0, x1, label), KEYS[0])
    if name != "semidiscrete":  # a data set has rows
        none = coupling(KEYS[0], x0[:0], x1[:0], label[:0])
        assert [index.shape for index in none] == [(0,), (0,)]


FROZEN = {"step": jnp.int32(3)}


def batch(row, dtype=np.float32):
    x, x0 = np.random.default_rng(1).normal(size=(2, 4, 4, 4, 1))
    made = {
        "x": jnp.asarray(x, dtype),
        "x0": jnp.asarray(x0, dtype),
        "cond": jnp.arange(4),
        "paired": jnp.arange(4) > 2,
        "weight": jnp.arange(1.0, 5, dtype=np.float32),
    }
    return {what: made[what] for what in ("x", "weight", *row.reads)}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_batch_transforms(name):
    """A new dict that leaves alone what it says, in the types of what came; the same under jit, in
    one trace, and another one for another key; without a key an error in its name."""
    row, traces = TRANSFORMS[name], []
    given, name, frozen = batch(row), name.split()[0], FROZEN

    @jax.jit
    def run(key, given):
        traces.append(1)
        return row.transform(key, given, frozen)

    made, other = run(KEYS[0], given), run(KEYS[1], given)
    assert len(traces) == 1 and made is not given
    for what in row.keeps:
        np.testing.assert_array_equal(made[what], given[what])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        made,
        dict(row.transform(KEYS[0], given, frozen)),
    )
    same = jax.tree.map(np.array_equal, made, other)
    assert not all(jax.tree.leaves(same))
    with pytest.raises(ValueError, match=f"{name} is stochastic: it needs a key"):
        row.transform(None, given, frozen)
    assert not keys_consumed_twice(lambda key: row.transform(key, given, frozen), KEYS[0])
    if row.own_cond:
        np.testing.assert_array_equal(made["cond"].label, given["cond"])
    with pytest.raises(ValueError, match=f"{name}: expected .* got the keys"):
        row.transform(KEYS[0], {"weight": given["weight"]}, frozen)
    with pytest.raises(TypeError, match=f"{name}: expected the batch to be a dict"):
        row.transform(KEYS[0], given["x"], frozen)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_types_of_batch_transforms(name):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float64):
        with jax.enable_x64(True):  # in which float32 stays float32
            row, given = TRANSFORMS[name], batch(TRANSFORMS[name], dtype)
            run = lambda key, row=row, given=given: row.transform(key, given, FROZEN)  # noqa: E731
            made = jax.eval_shape(run, KEYS[0])
            for what in ("x", "x0"):
                if what in made:
                    assert made[what].dtype == dtype and made[what].shape == (4, 4, 4, 1)


def test_bad_options_fail_at_construction():
    for make, said in [
        (
            lambda: couplings.partial_optimal_transport(0.0),
            r"partial_optimal_transport: expected fraction in \(0, 1\], got 0.0",
        ),
        (lambda: couplings.sinkhorn(-1.0), "sinkhorn: expected epsilon > 0, got -1.0"),
        (
            lambda: couplings.sinkhorn(iterations=0),
            "sinkhorn: expected iterations to be a whole number of at least 1, got 0",
        ),
        (lambda: couplings.unbalanced(slack=0), "unbalanced: expected slack > 0, got 0"),
        (lambda: couplings.near_condition(ratio=2), r"near_condition: .*in \(0, 1\], got 2"),
        (lambda: couplings.near_condition(weight=-1.0), "near_condition: .*or None, got -1.0"),
        (
            lambda: couplings.corrupted(couplings.block_means(2), -1.0),
            "corrupted: expected sigma >= 0, got -1.0",
        ),
        (lambda: couplings.tiles(2, 1.5), r"tiles: expected known in \[0, 1\], got 1.5"),
        (lambda: couplings.tiles(1.5), "tiles: expected size to be a whole number of at least 1"),
        (lambda: couplings.block_means(1.5), "block_means: expected factor to be a whole number"),
    ]:
        with pytest.raises(ValueError, match=said):
            make()
    x0, x1, _ = rows()
    for cost, said in [
        (within, r"expected cond .* to be an array \[12, ...\], got NoneType"),
        (near, r"expected cond .* to be an array \[12, ...\], got NoneType"),
        (lambda x0, x1, cond: jnp.zeros(8), r"costs of shape \[12, 12\], got \[8\]"),
        (lambda x0, x1, cond: jnp.full((N, N), jnp.inf), "source row 0 has no pair of finite"),
    ]:
        for coupling in (couplings.optimal_transport, couplings.stable_matching):
            with pytest.raises(ValueError, match=said):
                coupling(cost)(KEYS[0], x0, x1)
