"""TokenDiT: padding, times of tokens, positions, and parts of a condition that come later."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import nets, train
from jflow._core import linen
from jflow._core.linen import init_linen
from jflow.types import Condition

apply_linen = jax.jit(linen.apply_linen, static_argnums=0)  # op by op is a program each

KEY = jax.random.key(0)
B, N, D = 2, 5, 3
NET = nets.TokenDiT(8, 2, 2, num_classes=3)
VALID = jnp.arange(N)[None] < jnp.array([[3], [0]])  # the second row is nothing but padding


def inputs():
    """x, t, and a condition with all parts."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    mask = jnp.array([[True, False], [True, True]])
    cond = Condition(
        jnp.array([0, 3]),
        normal(B, 4),
        normal(B, N, 2),
        normal(B, 2, 3),
        mask,
        jnp.ones((B, N), bool),
    )
    return normal(B, N, D), jnp.array([0.2, 0.7]), cond


def random_params(net, *args):
    shapes = jax.eval_shape(partial(init_linen, net), KEY, *args)
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(0.4 * draw.normal(size=p.shape), p.dtype), shapes)


def test_what_stands_in_the_padding_changes_nothing():
    """Values and gradients, whatever is there, NaN too; they are those of the tokens alone, and the
    padding has velocity 0."""
    x, t, cond = inputs()
    cond = cond._replace(valid=VALID)
    times = t[:, None] + jnp.linspace(0.0, 0.2, N)[None]
    params = random_params(NET, x, times, cond)

    @jax.jit
    def run(x, t, aligned):
        def objective(params, x):
            v = apply_linen(NET, params, x, t, cond._replace(aligned=aligned))
            return jnp.sum(jnp.sin(v)), v

        return jax.grad(objective, (0, 1), has_aux=True)(params, x)

    grads, v = run(x, times, cond.aligned)
    spoil = lambda a: jnp.where(VALID.reshape(B, N, *(1,) * (a.ndim - 2)), a, jnp.nan)  # noqa: E731
    other, spoilt = run(*map(spoil, (x, times, cond.aligned)))
    np.testing.assert_array_equal(v, spoilt)
    jax.tree.map(np.testing.assert_array_equal, grads, other)
    np.testing.assert_array_equal(np.any(v != 0, axis=2), VALID)
    np.testing.assert_array_equal(np.any(grads[1] != 0, axis=2), VALID)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))

    alone = Condition(*(a[:1] for a in cond[:-1]))._replace(aligned=cond.aligned[:1, :3])
    short = apply_linen(NET, params, x[:1, :3], times[:1, :3], alone)
    np.testing.assert_allclose(v[:1, :3], short, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(short)) > 0.1
    all_seen = apply_linen(NET, params, x, times, cond._replace(valid=None))
    assert np.max(np.abs(all_seen - v)[0, :3]) > 1e-3


def test_padding_is_padding_for_other_forms_of_attention():
    x, t, _ = inputs()
    cond = Condition(valid=VALID)
    params = random_params(NET, x, t, cond)
    plain = apply_linen(NET, params, x, t, cond)
    for attention_fn in (nets.chunked_attention(block=2), nets.fused_attention()):
        v = apply_linen(NET.clone(attention_fn=attention_fn), params, x, t, cond)
        np.testing.assert_allclose(v, plain, rtol=1e-4, atol=1e-5)
    rotary = NET.clone(attention_fn=nets.rotary_attention())
    v, short = apply_linen(rotary, params, x, t, cond), apply_linen(rotary, params, x[:, :3], t)
    np.testing.assert_allclose(v[0, :3], short[0], rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(v - plain)[0]) > 1e-3


def test_a_time_for_each_token():
    """The same time for all is that of the row; without attention between tokens, a token's time
    and the time that it goes to are read where it stands."""
    net = NET.clone(num_layers=1, attention_fn=lambda q, k, v: v)
    x, t, cond = inputs()
    v = jflow.flow_map(net)
    params = random_params(net, x, t, cond.label, t)
    apply = jax.jit(lambda t, r: v.apply(params, x, t, r, cond.label))
    each = jnp.repeat(t[:, None], N, axis=1)
    plain = apply(t, t + 0.1)
    np.testing.assert_allclose(apply(each, each + 0.1), plain, rtol=1e-4, atol=1e-5)
    for times in ((each.at[:, 4].add(0.2), each + 0.1), (each, (each + 0.1).at[:, 4].add(0.2))):
        moved = np.max(np.abs(apply(*times) - plain), axis=2)
        assert np.all(moved[:, 4] > 1e-3) and np.max(moved[:, :4]) < 1e-5
    # and where all is on, the time of a token reaches the others
    params = random_params(NET, x, t)
    moved = [apply_linen(NET, params, x, tt) for tt in (each, each.at[:, 4].add(0.2))]
    assert np.all(np.max(np.abs(moved[0] - moved[1]), axis=2) > 1e-4)


def test_a_trained_net_continues_unchanged_when_it_gets_a_part():
    """The new weights start at zero and the gradient reaches them; `valid` has none, and all tokens
    valid is as none said; each part has a say then."""
    x, t, cond = inputs()
    small = Condition(cond.label, cond.vector)
    trained = random_params(NET, x, t, small)
    wide = train.warm_start(init_linen(NET, KEY, x, t, cond), trained)
    before = apply_linen(NET, trained, x, t, small)

    @jax.jit
    def run(params, cond):
        def objective(params):
            v = apply_linen(NET, params, x, t, cond)
            return jnp.sum(v**2), v

        return jax.grad(objective, has_aux=True)(params)

    grads, after = run(wide, cond)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)  # jit and no jit
    assert np.max(np.abs(before)) > 0.1
    for kernel in (grads["aligned"]["kernel"], grads["blocks"]["context"]["out"]["kernel"]):
        assert np.all(np.max(np.abs(kernel), axis=-1) > 0)

    params = random_params(NET, x, t, cond)
    plain = run(params, cond)[1]
    changed = dict(
        label=jnp.array([1, 2]),
        vector=cond.vector + 1,
        aligned=cond.aligned.at[:, 0].add(1.0),
        context=cond.context.at[:, 0].add(1.0),
        mask=jnp.array([[True, True], [False, True]]),
        valid=cond.valid.at[:, 4].set(False),
    )
    for part, value in changed.items():
        other = run(params, cond._replace(**{part: value}))[1]
        assert np.all(np.max(np.abs(other - plain), axis=(1, 2)) > 1e-4), part
    for part in ("aligned", "context"):
        less = cond._replace(**{part: None}, **({"mask": None} if part == "context" else {}))
        with pytest.raises(ValueError, match=f"TokenDiT: expected cond.{part}, since its params"):
            jax.eval_shape(jflow.velocity(NET).apply, params, x, t, less)


def test_positions():
    """With none the tokens are a set; a table is added where a token stands; rotary positions
    count by their differences."""
    x, t, _ = inputs()
    turned = lambda net, params: [  # noqa: E731
        apply_linen(net, params, a, t) for a in (x, jnp.roll(x, 1, axis=1))
    ]
    bare = NET.clone(positions=None)
    params = random_params(bare, x, t)
    assert "positions" not in params
    one, other = turned(bare, params)
    np.testing.assert_allclose(jnp.roll(one, 1, axis=1), other, rtol=1e-4, atol=1e-5)
    learned = NET.clone(positions=nets.LearnedPositions())
    table = random_params(learned, x, t)["positions"]["table"]
    assert table.shape == (N, 8)
    fixed = {**params, "positions": {"table": jnp.asarray(nets.sinusoidal_positions(N, 8))}}
    one, other = turned(NET, params)
    np.testing.assert_allclose(apply_linen(learned, fixed, x, t), one, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(jnp.roll(one, 1, axis=1) - other)) > 1e-3

    rotary = nets.rotary_attention(nets.dot_product_attention, base=100.0)
    q, k, v = (
        jnp.pad(a.reshape(B, N, 1, -1)[..., :2], ((0, 0), (2, 0), (0, 0), (0, 0)))
        for a in (x, x + 1, x - 1)
    )
    seen = (jnp.arange(N + 2) >= 2)[None]
    shifted = rotary(q, k, v, mask=seen)[:, 2:]
    np.testing.assert_allclose(shifted, rotary(q[:, 2:], k[:, 2:], v[:, 2:]), rtol=1e-4, atol=1e-5)
    # by hand: the score of the pair at i of the query and at j of the key, turned by i - j
    angle = np.arange(N)[:, None] - np.arange(N)[None]
    a, b = (np.asarray(h[:, 2:, 0]) for h in (q, k))
    inner = np.einsum("bid,bjd->bij", a, b) * np.cos(angle)
    cross = (a[:, :, None, 1] * b[:, None, :, 0] - a[:, :, None, 0] * b[:, None, :, 1]) * np.sin(
        -angle
    )
    weights = np.asarray(jax.nn.softmax((inner + cross) / np.sqrt(2), axis=-1))
    expected = np.einsum("bij,bjd->bid", weights, v[:, 2:, 0])
    np.testing.assert_allclose(shifted[:, :, 0], expected, rtol=1e-4, atol=1e-5)


X, T = jnp.ones((B, N, D)), jnp.zeros(B)
WRONG = {
    r"TokenDiT: expected x of shape \[b, n, d\], got \[2, 5\]": (NET, X[..., 0], T, None),
    r"TokenDiT: .*t of shape \[2\], or \[2, 5\].* got \[2, 4\]": (NET, X, jnp.zeros((B, 4)), None),
    r"valid of shape \[2, 5\], .* each token of x \[2, 5, 3\], got \[2, 4\]": (
        NET,
        X,
        T,
        Condition(valid=jnp.ones((B, 4), bool)),
    ),
    r"valid to be truth values \[b, 5\], got an array float32\[2, 5\]": (
        NET,
        X,
        T,
        Condition(valid=jnp.ones((B, N))),
    ),
    r"aligned of shape \[b, 5, k\].*x, which is \[2, 5, 3\], got \[2, 4, 1\]": (
        NET,
        X,
        T,
        Condition(aligned=jnp.ones((B, 4, 1))),
    ),
    r"positions to return a table \[5, 8\], got \[5, 7\]": (
        NET.clone(positions=lambda n, width: jnp.zeros((n, width - 1))),
        X,
        T,
        None,
    ),
    r"rotary_attention: expected heads of an even size, got 1": (
        NET.clone(num_heads=8, attention_fn=nets.rotary_attention()),
        X,
        T,
        None,
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_does_not_fit_is_an_error_while_tracing(said):
    net, *args = WRONG[said]
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(jflow.velocity(net).init, KEY, *args)


def test_bad_options_and_networks_that_take_no_padding():
    for make, said in (
        (lambda: nets.TokenDiT(10, num_heads=4), "TokenDiT: expected a width divisible by"),
        (lambda: nets.TokenDiT(num_layers=0), "TokenDiT: expected .*num_layers"),
        (lambda: nets.rotary_attention(base=1.0), "rotary_attention: expected a finite base > 1"),
        (lambda: nets.sinusoidal_positions(2, 3), "expected an even width, got 3"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    image = jnp.ones((B, 4, 4, 1))
    for net in (nets.DiT(2, 8, 1, 2), nets.UNet(4, (1,), attention=(False,))):
        with pytest.raises(ValueError, match="takes no cond.valid"):
            jax.eval_shape(net.init, KEY, image, T, Condition(valid=jnp.ones((B, 4, 4), bool)))
    with pytest.raises(ValueError, match="takes no cond.valid"):
        jax.eval_shape(nets.ViT(8, 1, 2).init, KEY, X, Condition(valid=jnp.ones((B, N), bool)))


def test_a_learned_table_fits_the_length_that_it_was_made_for():
    net = NET.clone(positions=nets.LearnedPositions())
    velocity = jflow.velocity(net)
    params = jax.eval_shape(velocity.init, KEY, X, T)
    with pytest.raises(ValueError, match="do not fit its params"):
        jax.eval_shape(velocity.apply, params, X[:, :4], T)
    assert isinstance(net.positions, nn.Module)
