"""Causal networks: whom a slot reads, steps with a cache, padding, conditions, symbols, lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import nets, train
from jflow._core.linen import apply_linen, init_linen
from jflow.types import Condition

B, N, D, KEY = 2, 4, 2, jax.random.key(0)
SMALL = {"features": 3, "width": 4, "num_classes": 3}
NETS = {
    "transformer": nets.CausalTransformer(**SMALL, num_layers=2, num_heads=2),
    "rotary": nets.CausalTransformer(**SMALL, num_layers=2, num_heads=2, rotary_period=10.0),
    "LSTM": nets.CausalLSTM(**SMALL, num_layers=2),
    "with previous": nets.WithPrevious(nets.CausalLSTM(**SMALL)),
}
every_net = pytest.mark.parametrize("name", NETS)
DRAW = np.random.default_rng(0)
X = np.asarray(DRAW.normal(size=(B, N, D)), np.float32)
HOLES = np.array([[True, True, True, False], [True, False, True, True]])


def condition(name, **parts):
    """All parts that the network takes."""
    draw = np.random.default_rng(1)
    normal = lambda *shape: np.asarray(draw.normal(size=shape), np.float32)  # noqa: E731
    context = {}
    if name in ("transformer", "rotary"):
        mask = np.array([[True, True, False], [True, False, False]])
        context = {"context": normal(B, 3, 2), "mask": mask}
    label, aligned = np.array([0, 2]), normal(B, N, 2)
    return Condition(label=label, vector=normal(B, 2), aligned=aligned, **context, **parts)


def random_params(net, x, cond):
    shapes = jax.eval_shape(lambda x, cond: init_linen(net, KEY, x, cond), x, cond)
    draw = np.random.default_rng(2)
    return jax.tree.map(lambda p: np.asarray(0.5 * draw.normal(size=p.shape), p.dtype), shapes)


@every_net
def test_a_slot_depends_on_all_tokens_before_it_and_on_the_condition_up_to_it(name):
    net, cond = NETS[name], condition(name)
    params = random_params(net, X, cond)

    @jax.jit
    def jacobians(x, aligned):
        def row(x, aligned):
            one = jax.tree.map(lambda c: c[:1], cond)._replace(aligned=aligned[None])
            return apply_linen(net, params, x[None], one)[0]

        return jax.jacrev(row, argnums=(0, 1))(x, aligned)  # [n, k, n, d] each

    of_x, of_aligned = jax.device_get(jacobians(X[0], cond.aligned[0]))
    np.testing.assert_array_equal(np.any(of_x != 0, axis=(1, 3)), np.tri(N, k=-1, dtype=bool))
    np.testing.assert_array_equal(np.any(of_aligned != 0, axis=(1, 3)), np.tri(N, dtype=bool))


@every_net
def test_steps_with_a_cache_are_the_parallel_pass_and_padding_changes_nothing(name):
    """Float32; the sums of a softmax come in another order, hence 1e-5."""
    net, cond = NETS[name], condition(name, valid=HOLES)
    params = random_params(net, X, cond)
    spoilt = np.where(HOLES[..., None], X, np.nan)

    @jax.jit
    def run(xs, valid):
        def apply(x_and_valid):
            x, valid = x_and_valid
            return apply_linen(net, params, x, cond._replace(valid=valid))

        def step(cache, tokens_and_first):
            tokens, first = tokens_and_first
            h, cache = apply_linen(net, params, tokens, cond, cache=cache, first=first)
            return cache, h

        def in_parts(x, size):
            before = jnp.roll(x, 1, axis=1).reshape(B, N // size, size, D).swapaxes(0, 1)
            steps = before, jnp.arange(0, N, size)
            _, found = jax.lax.scan(step, net.empty_cache(x, B), steps)
            return found.swapaxes(0, 1).reshape(B, N, -1)

        parts = [in_parts(xs[0], size) for size in (1, 2)]
        gradient = jax.grad(lambda x: jnp.sum(apply((x, HOLES))))(xs[2])
        return *jax.lax.map(apply, (xs, valid)), apply((xs[0], None)), parts, gradient

    xs, valid = np.stack([X, X, spoilt]), np.stack([HOLES, np.ones_like(HOLES), HOLES])
    whole, all_valid, from_spoilt, everyone, parts, gradient = jax.device_get(run(xs, valid))
    for found in parts:
        np.testing.assert_allclose(found, whole, atol=1e-5)
    np.testing.assert_array_equal(from_spoilt, whole)
    slots_after = np.cumsum(HOLES[:, ::-1], axis=1)[:, ::-1] - HOLES
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), HOLES & (slots_after > 0))
    np.testing.assert_allclose(all_valid, everyone, atol=1e-6)
    moved = np.abs(whole - everyone).max(axis=-1) > 1e-4
    after_a_hole = np.cumsum(~HOLES, axis=1) - ~HOLES > 0
    np.testing.assert_array_equal(moved, after_a_hole | ~HOLES)
    assert np.all(whole[~HOLES] == 0)


@every_net
def test_each_part_of_the_condition_has_a_say_and_new_ones_start_at_zero(name):
    """A trained network goes on as it was when it gets aligned vectors and a context."""
    net, cond = NETS[name], condition(name)
    few = cond._replace(aligned=None, context=None, mask=None)
    trained = random_params(net, X, few)
    params = random_params(net, X, cond)

    @jax.jit
    def run(params, trained, cond):
        wide = train.warm_start(init_linen(net, KEY, X, cond), trained)
        changed = {
            part: jax.tree.map(lambda v: v if v.dtype == bool else (v + 1) % 3, value)
            for part, value in cond._asdict().items()
            if value is not None
        }
        if "mask" in changed:
            changed["mask"] = ~cond.mask
        conds = [cond, *(cond._replace(**{part: value}) for part, value in changed.items())]
        conds = jax.tree.map(lambda *parts: jnp.stack(parts), *conds)
        plain, *others = jax.lax.map(lambda cond: apply_linen(net, params, X, cond), conds)
        others = dict(zip(changed, others, strict=True))
        return apply_linen(net, trained, X, few), apply_linen(net, wide, X, cond), plain, others

    before, after, plain, others = jax.device_get(run(params, trained, cond))
    np.testing.assert_allclose(after, before, atol=1e-5)
    for part, other in others.items():
        assert np.all(np.abs(other - plain).max(axis=(1, 2)) > 1e-4), part
    for part in {"aligned", "context"} & set(others):
        with pytest.raises(ValueError, match=f"expected cond.{part}, since its params were made"):
            apply_linen(net, params, X, cond._replace(**{part: None, "mask": None}))


@every_net
def test_a_shorter_sequence_is_the_beginning_of_a_longer_one(name):
    net = NETS[name]
    params = random_params(net, X, None)
    short, whole = (jax.jit(lambda x: apply_linen(net, params, x))(x) for x in (X[:, :3], X))
    np.testing.assert_allclose(short, whole[:, :3], atol=1e-6)
    longer = np.concatenate([X, X], axis=1)
    if name == "transformer":
        with pytest.raises(ValueError, match="at most 4 tokens, as at init, got 8: rotary_period"):
            apply_linen(net, params, longer)
    else:
        assert apply_linen(net, params, longer).shape == (B, 2 * N, whole.shape[-1])


@pytest.mark.parametrize("make", [nets.CausalTransformer, nets.CausalLSTM])
def test_symbols_are_embedded_and_floats_that_are_whole_are_the_same(make):
    heads = {"num_heads": 2} if make is nets.CausalTransformer else {}
    net, x = make(features=3, width=4, vocabulary=5, **heads), np.array([[1, 0, 4, 2]])
    params = random_params(net, x, None)
    assert params["tokens"]["embedding"].shape == (5, 4)
    run = jax.jit(lambda x: apply_linen(net, params, x))
    whole = run(x)
    np.testing.assert_array_equal(run(x.astype(np.float32)), whole)
    other = run(np.array([[1, 0, 3, 2]]))
    np.testing.assert_array_equal(np.abs(other - whole).max((0, 2)) > 1e-4, np.arange(4) > 2)
    first = run(np.array([[0, 0, 4, 2]]))[:, :1]
    np.testing.assert_array_equal(first, whole[:, :1])  # a symbol 0 is not the beginning
    with pytest.raises(ValueError, match=r"expected x of shape \[b, n\], got \[1, 4, 1\]"):
        run(x[..., None])


def test_the_lstm_in_numpy(x64):
    """Two layers written out in float64, with a step that padding leaves out."""
    net, cond = nets.CausalLSTM(features=3, width=4, num_layers=2), Condition(valid=HOLES)
    x = X.astype(np.float64)
    params = random_params(net, x, cond)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    dense = lambda p, v: v @ p["kernel"] + p["bias"]  # noqa: E731
    before = np.concatenate([np.zeros((1, D)), x[1, :-1] * HOLES[1, :-1, None]])
    y = dense(params["tokens"], before)
    for layer in range(2):
        cell = jax.tree.map(lambda leaf, i=layer: leaf[i], params["layers"]["cell"])
        c, h, outputs = np.zeros(4), np.zeros(4), []
        for i in range(N):
            gates = {k: y[i] @ cell[f"i{k}"]["kernel"] + dense(cell[f"h{k}"], h) for k in "ifgo"}
            new = sigmoid(gates["f"]) * c + sigmoid(gates["i"]) * np.tanh(gates["g"])
            out = sigmoid(gates["o"]) * np.tanh(new)
            outputs.append(out)
            if i == 0 or HOLES[1, i - 1]:
                c, h = new, out
        y = np.array(outputs)
    found = jax.jit(lambda x: apply_linen(net, params, x, cond))(x)
    expected = HOLES[1, :, None] * dense(params["head"], y)
    np.testing.assert_allclose(found[1], expected, atol=1e-12)


def test_types():
    """bfloat16 inside, float32 outside; and a state in the type of the computation."""
    for name in ("transformer", "LSTM"):
        net = NETS[name].clone(dtype=jnp.bfloat16)
        params = random_params(net, X, None)
        shape = jax.eval_shape(lambda x, n=net, p=params: apply_linen(n, p, x), X)
        assert shape.dtype == jnp.float32 and net.empty_cache(X, 2)[0].dtype == jnp.bfloat16
        assert all(p.dtype == np.float32 for p in jax.tree.leaves(params))


def test_bad_options_and_bad_input():
    for make, said in (
        (lambda: nets.CausalTransformer(vocabulary=4), "features beside a vocabulary"),
        (lambda: nets.CausalTransformer(width=6, num_heads=2, rotary_period=9.0), "an even width"),
        (lambda: nets.CausalTransformer(rotary_period=1.0), "rotary_period > 1"),
        (lambda: nets.CausalLSTM(num_layers=0), "num_layers to be a whole number of at least 1"),
        (lambda: nets.CausalLSTM(features=-1), "features to be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    with pytest.raises(TypeError, match="expected net to be an instance of flax.linen.Module"):
        nets.WithPrevious(len)
    shapes = lambda net, cond: jax.eval_shape(lambda: init_linen(net, KEY, X, cond))  # noqa: E731
    with pytest.raises(ValueError, match=r"cond.valid of shape \[2, 4\].*got \[2, 3\]"):
        shapes(NETS["LSTM"], Condition(valid=HOLES[:, :3]))
    with pytest.raises(ValueError, match="CausalLSTM: takes no cond.context"):
        shapes(NETS["LSTM"], Condition(context=X))
    with pytest.raises(ValueError, match=r"cond.valid to be truth values \[b, 4\]"):
        shapes(NETS["rotary"], Condition(valid=HOLES.astype(np.float32)))
