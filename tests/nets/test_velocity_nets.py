"""The contract of the velocity networks, and what is special to each."""

from functools import cache, partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled_again, equations, program

import jflow
from jflow import nets
from jflow._core import arrays, linen
from jflow.types import Condition, Params, Velocity

init_linen = jax.jit(linen.init_linen, static_argnums=0)
apply_linen = jax.jit(linen.apply_linen, static_argnums=0)
jax_attention = jax.nn.dot_product_attention


class Prompted(nn.Module):
    """A network of texts in the contract of labels: the text of label y is row y of two tables."""

    net: nn.Module

    def __call__(self, x, t, y, r=None):
        rng = np.random.default_rng(0)
        context, vector = (jnp.asarray(rng.normal(size=(11, *k)), x.dtype) for k in ((3, 5), (4,)))
        return self.net(x, t, Condition(context=context[y], vector=vector[y]), r)


def mmdit(**options):
    return Prompted(nets.MMDiT(2, 16, 2, 2, dual_layers=1, qk_norm=True, **options))


def flux(**options):
    return Prompted(nets.Flux(2, 16, 1, 1, 2, rope_axes=(2, 2, 4), guidance=3.5, **options))


class AsTokens(nn.Module):
    """A network of tokens on the pixels of x, and null for no labels."""

    net: nn.Module

    def __call__(self, x, t, y=None, r=None):
        return self.net(x.reshape(x.shape[0], -1, x.shape[-1]), t, y, r).reshape(x.shape)


def token_dit(**options):
    return AsTokens(nets.TokenDiT(16, 2, 2, num_classes=10, **options))


NETS = {
    "TimeMLP": partial(nets.TimeMLP, (16, 16), embed=nn.Embed(11, 8)),
    "ResidualMLP": partial(nets.ResidualMLP, 16, 2, num_classes=10),
    "UNet": partial(nets.UNet, 8, num_classes=10),
    "DiT": partial(nets.DiT, 2, 16, 2, num_heads=2, num_classes=10),
    "TokenDiT": token_dit,
    "LightningDiT": partial(nets.LightningDiT, 2, 16, 2, num_heads=2, num_classes=10, qk_norm=True),
    "UViT": partial(nets.UViT, 2, 16, 2, num_heads=2, num_classes=10),
    "ADM": partial(nets.ADM, 8, (1,), attention=(False,), num_classes=10),
    "DDPMpp": partial(nets.DDPMpp, 8, (1,), attention=(False,), num_classes=10),
    "MMDiT": mmdit,
    "Flux": flux,
}
UNLABELLED = {
    "TimeMLP": partial(nets.TimeMLP, (16, 16)),
    "ResidualMLP": partial(nets.ResidualMLP, 16, 2),
    "UNet": partial(nets.UNet, 8),
    "DiT": partial(nets.DiT, 2, 16, 2, num_heads=2),
}
NULL = "ResidualMLP", "UNet", "DiT", "LightningDiT", "UViT", "ADM", "DDPMpp"  # take no cond, too
every_net = pytest.mark.parametrize("name", NETS)
every_unlabeled = pytest.mark.parametrize("make", UNLABELLED.values(), ids=UNLABELLED.keys())


def inputs(dtype=np.float32):
    x = np.random.default_rng(0).standard_normal((3, 4, 6, 2)).astype(dtype)
    return x, np.asarray([0.1, 0.5, 0.9], dtype), np.asarray([0, 3, 10])  # 10 is the null label


def random_params(net, *args):
    """Params away from their zero initialization, so that every branch is alive."""
    shapes = jax.eval_shape(partial(linen.init_linen, net), jax.random.key(1), *args)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(0.25 * rng.standard_normal(p.shape), p.dtype), shapes)


class Case(NamedTuple):
    """A network as a velocity, with params that are alive; called outside jit, it compiles once."""

    velocity: Velocity
    params: Params

    def __call__(self, *args, **options):
        return jax.device_get(self.velocity.apply(self.params, *args, **options))


@cache
def case(name, **options) -> Case:
    """No option changes the params."""
    net = NETS[name](**options)
    params = case(name).params if options else random_params(net, *inputs())
    return Case(jflow.velocity(net), params)


@every_net
def test_zero_at_initialization_and_shaped_like_x(name):
    x, t, y = inputs()
    velocity = case(name).velocity
    params = velocity.init(jax.random.key(1), x, t, y)
    out = velocity.apply(params, x, t, y)
    np.testing.assert_array_equal(out, np.zeros_like(x))
    assert out.dtype == x.dtype and all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


@every_net
def test_without_jit_a_second_call_compiles_nothing(name):
    velocity, (x, t, y) = case(name).velocity, inputs()
    key = jax.random.key(1)
    assert not compiled_again(
        init=lambda: velocity.init(key, x, t, y), apply=lambda: case(name)(x, t, y)
    )


@every_net
def test_responds_to_x_time_and_label(name):
    x, t, y = inputs()
    f = case(name)
    out = f(x, t, y)
    for other in ((x + 0.3, t, y), (x, t + 0.05, y), (x, t, np.asarray([1, 4, 2]))):
        rows = np.max(np.abs(f(*other) - out), axis=(1, 2, 3))
        assert np.min(rows) > 1e-3  # every row, the one with the null label too


@every_net
def test_rows_do_not_see_each_other(name):
    x, t, y = inputs()
    others = np.arange(3) != 1
    changed = (
        x + 0.3 * others[:, None, None, None],
        (t + 0.05 * others).astype(t.dtype),
        np.where(others, 2, y),
    )
    out, again = case(name)(x, t, y), case(name)(*changed)
    np.testing.assert_allclose(again[1], out[1], rtol=1e-4, atol=1e-5)  # float32 sums
    assert np.max(np.abs(again[others] - out[others])) > 1e-2


@every_net
def test_derivatives(name, x64):
    """Forward mode against finite differences; the gradient of the output's squares and of its
    derivative, reverse over forward, is finite and reaches every parameter."""
    x, t, y = inputs(np.float64)
    net = NETS[name]()
    params = random_params(net, x, t, y)
    dx, dt = np.random.default_rng(3).standard_normal(x.shape), np.ones_like(t)

    @jax.jit
    def derivatives(params, x, t):
        (out, tangent), pullback = jax.vjp(
            lambda p: jax.jvp(lambda x, t: linen.apply_linen(net, p, x, t, y), (x, t), (dx, dt)),
            params,
        )
        return out, tangent, pullback((2 * out, jnp.ones_like(tangent)))[0]

    out, tangent, gradients = jax.device_get(derivatives(params, x, t))
    assert out.dtype == np.float64
    eps = 1e-5
    after, before = (derivatives(params, x + e * dx, t + e * dt)[0] for e in (eps, -eps))
    numeric = (np.asarray(after) - np.asarray(before)) / (2 * eps)
    # Central differences: the error is eps^2 f""" / 6, and f""" in t is of the order time_scale^3 =
    # 1e6 at most.
    np.testing.assert_allclose(tangent, numeric, rtol=1e-4, atol=1e-4)
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        leaf = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.all(np.isfinite(g)), leaf
        # MMDiT's last block, as published, has queries of the text that nobody reads
        assert np.any(g != 0) != leaf.endswith("last_block/context/heads/q_norm/scale"), leaf


@every_net
def test_bfloat16_compute_is_close(name):
    """And outputs are of the type of x, whichever the computation's is."""
    x, t, y = inputs()
    low, full, half = x.astype(jnp.bfloat16), case(name), case(name, dtype=jnp.bfloat16)
    expected, found = full(x, t, y), half(low, t, y)
    assert found.dtype == jnp.bfloat16 and np.any(found != expected.astype(jnp.bfloat16))
    # bfloat16 keeps 8 bits; a few layers lose a few of them.
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    for f, given in ((half, x), (full, low)):
        assert jax.eval_shape(f.velocity.apply, f.params, given, t, y).dtype == given.dtype


@every_net
def test_time_may_be_integer_and_no_cond_is_the_null_label(name):
    """Together: each alone would compile the network once more."""
    x, t, y = inputs()
    f, ones = case(name), np.ones_like(t)
    label, args = (np.full(3, 10), ()) if name in NULL else (y, (y,))
    np.testing.assert_array_equal(f(x, ones.astype(np.int32), *args), f(x, ones, label))
    if name in NULL:
        shapes = jax.eval_shape(f.velocity.init, jax.random.key(1), x, t)
        assert jax.tree.structure(f.params) == jax.tree.structure(shapes)
        assert np.all(np.isnan(f(x, t, np.full(3, 11))))  # outside the table: loud


@every_net
def test_time_may_be_wider_than_x(name, x64):
    x, t, y = inputs()
    velocity, params = case(name)
    assert jax.eval_shape(velocity.apply, params, x, np.float64(t), y).dtype == jnp.float32


@every_net
def test_time_of_another_shape_is_an_error(name):
    x, t, y = inputs()
    for wrong in (t[0], t[:, None], t[:2]):
        with pytest.raises(ValueError, match=r"expected t of shape \[3\]"):
            init_linen(NETS[name](), jax.random.key(0), x, wrong, y)


@every_unlabeled
def test_cond_may_be_a_pytree_of_floats(make):
    x, t, _ = inputs()
    cond = {"a": jnp.ones(3), "b": jax.random.normal(jax.random.key(5), (3, 4))}
    params = random_params(make(), x, t, cond)
    out = apply_linen(make(), params, x, t, cond)
    for name in cond:
        changed = apply_linen(make(), params, x, t, {**cond, name: cond[name] + 1})
        assert jnp.max(jnp.abs(changed - out)) > 1e-3, name
    with pytest.raises(ValueError, match=r"cond\['a'\] to lead with 3 rows, got shape \[2\]"):
        apply_linen(make(), params, x, t, {**cond, "a": jnp.ones(2)})


@every_unlabeled
def test_labels_without_an_embedding_are_an_error(make):
    x, t, y = inputs()
    with pytest.raises(ValueError, match="num_classes"):
        init_linen(make(), jax.random.key(0), x, t, y)


@pytest.mark.parametrize(
    "name", sorted(set(NETS) - {"LightningDiT", "UViT", "MMDiT", "Flux"})
)  # which have no dropout
def test_dropout_needs_the_key(name):
    """Without one the program is that of the network without dropout."""
    x, t, y = inputs()
    f, plain = case(name, dropout=0.5), case(name)
    ours, theirs = (program(g.velocity.apply, g.params, x, t, y) for g in (f, plain))
    assert ours == theirs
    a, b = (f(x, t, y, key=jax.random.key(k)) for k in (0, 1))
    assert np.any(a != b) and np.any(a != plain(x, t, y))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: nets.ResidualMLP(16, n),
        lambda n: nets.DiT(2, 16, n, 2),
        lambda n: nets.DiT(2, 16, n, 2, remat=True),
    ],
    ids=["ResidualMLP", "DiT", "DiT with remat"],
)
def test_program_does_not_grow_with_depth(make):
    x, t, _ = inputs()

    def size(depth):
        params = jax.eval_shape(lambda: init_linen(make(depth), jax.random.key(0), x, t))
        return equations(jax.grad(lambda p: jnp.sum(apply_linen(make(depth), p, x, t))), params)

    assert size(12) == size(2) > 100


def test_scanned_blocks_differ():
    """Each layer has its own initial weights and its own dropout mask."""
    x, t, _ = inputs()
    net = nets.ResidualMLP(16, 2, dropout=0.5)
    params = init_linen(net, jax.random.key(0), x, t)
    kernel = params["blocks"]["in"]["kernel"]
    assert kernel.shape == (2, 16, 32) and jnp.all(kernel[0] != kernel[1])

    class Masks(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            mask = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(jnp.ones_like(h))
            return h, mask

    scan = nn.scan(
        Masks,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=2,
    )
    _, masks = scan().apply({}, jnp.ones(64), None, rngs={"dropout": jax.random.key(0)})
    assert jnp.any(masks[0] != masks[1])


def test_dit_matches_published_sizes():
    """Peebles & Xie 2023, table 1: 33, 130, 458 and 675 million parameters for S, B, L and XL."""
    sizes = {33: (384, 12, 6), 130: (768, 12, 12), 458: (1024, 24, 16), 675: (1152, 28, 16)}
    x, t, y = jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    for millions, (width, depth, heads) in sizes.items():
        net = nets.DiT(2, width, depth, heads, num_classes=1000)
        params = jax.eval_shape(lambda net=net: init_linen(net, jax.random.key(0), x, t, y))
        count = sum(p.size for p in jax.tree.leaves(params))
        per_block = (
            18 * width**2 + 15 * width
        )  # modulation 6 w (w + 1), qkv 3 w (w + 1), out w (w + 1), MLP 8 w^2 + 5 w
        ends = (
            17 * width
            + 257 * width
            + width * (width + 1)
            + 1001 * width
            + 2 * width * (width + 1)
            + 16 * (width + 1)
        )
        assert count == depth * per_block + ends
        assert (
            abs(count / 1e6 - millions) < 0.7
        )  # the paper rounds, and its output also holds a variance


def test_dit_patches_and_positions():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    patches = arrays.patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(
        patches[1, 4].reshape(2, 2, 3), x[1, 2:4, 2:4]
    )  # row 1, column 1 of 2 x 3
    np.testing.assert_array_equal(arrays.unpatchify(patches, 2, 3, 2), x)
    positions = nets._dit.sincos_positions(2, 3, 8)
    angles = [2, 0.02], [1, 0.01]  # row 1, column 2; the column first; frequencies 1 and 0.01
    expected = np.concatenate([[np.sin(a), np.cos(a)] for a in angles]).ravel()
    np.testing.assert_allclose(positions[5], expected)


def test_attention_by_hand():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    net = nets.SelfAttention(2)
    params = init_linen(net, jax.random.key(1), x)
    q, k, v = jnp.split(x @ params["qkv"]["kernel"], 3, axis=-1)
    heads = []
    for s in (slice(0, 4), slice(4, 8)):
        weights = jax.nn.softmax(q[..., s] @ k[..., s].swapaxes(1, 2) / 2.0)  # sqrt(4)
        heads.append(weights @ v[..., s])
    expected = jnp.concatenate(heads, axis=-1) @ params["out"]["kernel"]
    np.testing.assert_allclose(
        apply_linen(net, params, x), expected, rtol=1e-4, atol=1e-5
    )  # float32 rounding


def test_attention_is_that_of_jax():
    q_key, k_key, v_key = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(q_key, (2, 5, 3, 4))
    k, v = (jax.random.normal(key, (2, 7, 3, 4)) for key in (k_key, v_key))
    np.testing.assert_allclose(
        nets.dot_product_attention(q, k, v), jax_attention(q, k, v), rtol=1e-5, atol=1e-5
    )


def test_dit_takes_an_attention_function():
    x, t, _ = inputs()
    params = random_params(nets.DiT(2, 16, 2, 2), x, t)
    ours = apply_linen(nets.DiT(2, 16, 2, 2), params, x, t)
    theirs = apply_linen(nets.DiT(2, 16, 2, 2, attention_fn=jax_attention), params, x, t)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)  # float32, in another order
    without = apply_linen(nets.DiT(2, 16, 2, 2, attention_fn=lambda q, k, v: v), params, x, t)
    assert jnp.max(jnp.abs(ours - without)) > 1e-2
    with pytest.raises(ValueError, match=r"attention_fn to return \[3, 6, 2, 8\], got \[3, 6, 2\]"):
        init_linen(
            nets.DiT(2, 16, 2, 2, attention_fn=lambda q, k, v: v[..., 0]), jax.random.key(0), x, t
        )


def test_remat_changes_nothing():
    x, t, _ = inputs()
    params = random_params(nets.DiT(2, 16, 2, 2), x, t)
    plain, remat = (
        jax.grad(lambda p, r=r: jnp.sum(apply_linen(nets.DiT(2, 16, 2, 2, remat=r), p, x, t) ** 2))(
            params
        )
        for r in (False, True)
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), plain, remat
    )  # float32, reordered


def test_unet_sizes():
    x, t, _ = inputs()
    for net in (
        nets.UNet(6, (1, 2), num_blocks=2, attention=(True, False)),  # 6 channels: 2 groups
        nets.UNet(8, (1,), attention=(True,)),  # one level, no resampling: any H and W
        nets.UNet(7, (1, 3), attention=(False, False)),
    ):
        params = random_params(net, x, t)
        out = apply_linen(net, params, x, t)
        assert out.shape == x.shape and jnp.all(jnp.isfinite(out))


def test_bad_image_sizes_are_errors():
    t = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"divisible by 4 for 3 levels, got \[2, 6, 8, 1\]"):
        nets.UNet(8, (1, 1, 1), attention=(False,) * 3).init(
            jax.random.key(0), jnp.zeros((2, 6, 8, 1)), t
        )
    with pytest.raises(ValueError, match=r"divisible by 4, got \[2, 8, 6, 1\]"):
        nets.DiT(4).init(jax.random.key(0), jnp.zeros((2, 8, 6, 1)), t)
    for net in (nets.UNet(), nets.DiT()):
        with pytest.raises(ValueError, match=r"shape \[b, H, W, C\]"):
            net.init(jax.random.key(0), jnp.zeros((2, 8)), t)


def test_bad_options_fail_at_construction():
    for make in (
        lambda: nets.DiT(width=10, num_heads=2),
        lambda: nets.DiT(width=16, num_heads=3),
        lambda: nets.DiT(num_layers=0),
        lambda: nets.LightningDiT(width=20, num_heads=2),
        lambda: nets.UViT(num_layers=3),
        lambda: nets.UViT(width=16, num_heads=3),
        lambda: nets.ResidualMLP(num_blocks=0),
        lambda: nets.UNet(attention=(True,)),
        lambda: nets.UNet(num_blocks=0),
        lambda: nets.MLP(hidden=()),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 5)])
@pytest.mark.parametrize("name", ["TimeMLP", "ResidualMLP"])
def test_perceptrons_take_any_event(name, shape):
    x, t = jnp.ones(shape), jnp.asarray([0.0, 0.5, 1.0])
    params = random_params(UNLABELLED[name](), x, t)
    assert apply_linen(UNLABELLED[name](), params, x, t).shape == shape
