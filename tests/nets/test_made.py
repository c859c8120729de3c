"""MADE: who sees whom, equal to FlowJAX's with equal weights, conditions, precision, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import nets
from jflow._core.linen import init_linen

GRAPH = np.array(
    [[0, 0, 1, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0]], bool
)
X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def drawn(module, x, cond=None, seed=1):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_linen(module, jax.random.key(0), x, cond))
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), shapes)


def sees(module, x, cond=None):
    """[d, d]: whether raw i changes with x j, in some row."""
    params = drawn(module, x, cond)
    jacobian = jax.jit(jax.jacrev(lambda x: module.apply({"params": params}, x, cond).sum(0)))(
        x
    )  # [d, size, b, d]
    return np.any(np.asarray(jacobian) != 0, axis=(1, 2))


@pytest.mark.parametrize("residual", [False, True])
def test_outputs_see_what_comes_before_them_and_nothing_else(residual):
    options = {"residual": residual, "activation": nn.tanh}
    np.testing.assert_array_equal(sees(nets.MADE(2, (15, 15), **options), X), np.tri(5, k=-1))
    order = (3, 0, 4, 2, 1)
    seen = sees(nets.MADE(2, (15, 15), order=order, **options), X)
    np.testing.assert_array_equal(seen[np.ix_(order, order)], np.tri(5, k=-1))


def test_a_graph_lets_through_its_edges_and_no_paths():
    """Output 4 sees 1 and 3, although both depend on 2."""
    np.testing.assert_array_equal(sees(nets.MADE(3, (16, 16), adjacency=GRAPH), X), GRAPH)


def test_longest_path():
    split = np.zeros((6, 6), bool)
    split[3:, :3] = True
    assert nets.longest_path(split) == 2  # a coupling
    assert (
        nets.longest_path(np.tri(7, k=-1, dtype=bool))
        == nets.longest_path(np.tri(7, k=-1, dtype=bool).T)
        == 7
    )
    assert nets.longest_path(np.zeros((4, 4), bool)) == 1
    assert nets.longest_path(GRAPH) == 4  # 2 -> 0 -> 1 -> 4
    for cycle in (np.eye(3, dtype=bool), np.roll(np.eye(3, dtype=bool), 1, axis=1)):
        with pytest.raises(ValueError, match="without cycles"):
            nets.longest_path(cycle)


@pytest.fixture
def peer():
    """FlowJAX broadcasts by rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_it_is_flowjaxs_network(x64, peer):
    """Masks by degree, with a condition; weights and units carried over, float64."""
    import paramax
    from flowjax.bijections import Affine, MaskedAutoregressive

    d, c, each = 4, 3, 3
    theirs = MaskedAutoregressive(
        jax.random.key(0),
        transformer=Affine(),
        dim=d,
        cond_dim=c,
        nn_width=d * each,
        nn_depth=2,
        nn_activation=jnp.tanh,
    )
    mlp = paramax.unwrap(theirs.masked_autoregressive_mlp)
    units = (
        np.arange(d * each).reshape(each, d).T.reshape(-1)
    )  # theirs in the order of ours: of the empty set first
    first, second, head = (
        (np.asarray(layer.weight).T, np.asarray(layer.bias)) for layer in mlp.layers
    )
    params = {
        "kernel_0": first[0][:, units],
        "bias_0": first[1][units],
        "kernel_1": second[0][np.ix_(units, units)],
        "bias_1": second[1][units],
        "kernel_head": head[0][units],
        "bias_head": head[1],
    }
    ours = nets.MADE(2, (d * each, d * each), activation=jnp.tanh)
    x, cond = (np.random.default_rng(i).normal(size=(6, n)) for i, n in enumerate((d, c)))
    noise = np.random.default_rng(2).normal(size=params["kernel_0"].shape)
    params["kernel_0"] += np.where(
        params["kernel_0"] == 0, noise, 0
    )  # what the masks hide does not matter
    raw = ours.apply({"params": params}, x, cond)
    expected = jax.vmap(lambda x, c: mlp(jnp.hstack((x, c))))(
        jnp.asarray(x), jnp.asarray(cond)
    ).reshape(6, d, 2)
    np.testing.assert_allclose(raw, expected, atol=1e-12)
    assert np.ptp(expected) > 0.1


def test_every_output_sees_cond_and_a_condition_of_zeros_is_none():
    module, cond = nets.MADE(2, (20,)), {"a": np.ones((4, 2), np.float32), "b": X[:, :1]}
    params = drawn(module, X, cond)
    raw, without = (
        module.apply({"params": params}, X, c) for c in (cond, jax.tree.map(np.zeros_like, cond))
    )
    assert np.all(np.any(raw != without, axis=(0, 2)))
    unconditional = {**params, "kernel_0": params["kernel_0"][:5]}
    np.testing.assert_allclose(module.apply({"params": unconditional}, X), without, atol=1e-5)
    with pytest.raises(ValueError, match="embed labels first"):
        module.apply({"params": params}, X, np.arange(4))


def test_starts_at_zero_and_keeps_variance_behind_sparse_masks():
    x = np.random.default_rng(3).normal(size=(512, 40)).astype(np.float32)
    module = nets.MADE(3, (160,), activation=lambda h: h)
    params = init_linen(module, jax.random.key(0), x)
    raw = module.apply({"params": params}, x)
    assert raw.shape == (512, 40, 3) and np.all(np.asarray(raw) == 0)
    hidden = x @ (np.asarray(params["kernel_0"]) * np.tri(40, k=-1)[np.arange(160) // 4].T)
    assert np.all(np.abs(hidden[:, 4:].std(0) - 1) < 0.9) and abs(hidden[:, 4:].std() - 1) < 0.1


def test_widths_below_the_dimension_warn_and_still_reach_the_last_input_allowed():
    with pytest.warns(UserWarning, match=r"hidden=\(2,\) has fewer units .* to depend on, 5"):
        np.testing.assert_array_equal(
            sees(nets.MADE(1, (2,), activation=jnp.tanh), X)[4], [True] * 4 + [False]
        )


@pytest.mark.filterwarnings("ignore:MADE")
def test_narrow_networks_tell_cond_to_the_first_too():
    module, cond = nets.MADE(1, (3, 3), activation=jnp.tanh), X[:, :1]
    params = drawn(module, X, cond)
    raw, without = (module.apply({"params": params}, X, c) for c in (cond, 0 * cond))
    assert np.all(np.any(raw != without, axis=(0, 2)))
    np.testing.assert_array_equal(sees(module, X, cond)[4], [True] * 4 + [False])


def test_computes_in_bfloat16_and_answers_in_float32():
    module = nets.MADE(2, (16,), dtype=jnp.bfloat16)
    params = drawn(module, X)
    raw = module.apply({"params": params}, X)
    exact = nets.MADE(2, (16,)).apply({"params": params}, X)
    assert raw.dtype == jnp.float32
    assert 1e-4 < np.max(np.abs(raw - exact)) / np.max(np.abs(exact)) < 0.05


def test_a_key_switches_dropout_on_and_leaves_the_order():
    module = nets.MADE(2, (32, 32), dropout=0.5)
    params = drawn(module, X)

    def run(x, key=None):
        return module.apply({"params": params}, x, rngs=None if key is None else {"dropout": key})

    np.testing.assert_array_equal(run(X), nets.MADE(2, (32, 32)).apply({"params": params}, X))
    key = jax.random.key(0)
    assert np.all(np.abs(run(X, key) - run(X))[:, -1] > 1e-3)
    later = X + np.array([0, 0, 1, 1, 1], np.float32)
    np.testing.assert_array_equal(run(later, key)[:, :3], run(X, key)[:, :3])


def test_bad_options_are_errors():
    for options, said in (
        ({"size": 0}, "size >= 1, got 0"),
        ({"hidden": ()}, "at least one hidden width"),
        ({"hidden": (8, 4), "residual": True}, "equal widths"),
        ({"order": (0, 2)}, r"permutation of 0..d-1, got \[0, 2\]"),
        ({"order": (0, 1), "adjacency": np.zeros((2, 2), bool)}, "got both"),
        ({"adjacency": np.eye(2, dtype=bool)}, "without cycles"),
        ({"adjacency": np.zeros((2, 3), bool)}, r"square adjacency of booleans, got bool \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=said):
            nets.MADE(**{"size": 2, **options})
    with pytest.raises(ValueError, match=r"\[b, 3\], got \[4, 5\]"):
        nets.MADE(2, order=(0, 1, 2)).init(jax.random.key(0), X)
    assert hash(nets.MADE(2, [8, 8], order=np.array([1, 0]))) == hash(
        nets.MADE(2, (8, 8), order=(1, 0))
    )
