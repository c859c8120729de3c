"""Conditions of several parts in the networks, and a time of each token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import program

import jflow
from jflow import nets, train
from jflow._core import linen
from jflow._core.linen import init_linen
from jflow.types import Condition

apply_linen = jax.jit(linen.apply_linen, static_argnums=0)  # op by op is a program each

KEY = jax.random.key(0)
NETS = {  # and the parts beside label and vector
    "UNet": (nets.UNet(4, (1,), attention=(False,), num_classes=3), ("aligned",)),
    # and DDPMpp, which reads its conditions in the same function
    "ADM": (nets.ADM(4, (1,), attention=(False,), num_classes=3), ("aligned",)),
    "DiT": (nets.DiT(2, 8, 2, 2, num_classes=3), ("aligned", "context", "mask")),
    "ResidualMLP": (nets.ResidualMLP(8, 1, num_classes=3), ("aligned",)),
}
every_net = pytest.mark.parametrize("name", NETS)


def rows(name):
    """x, t, and a condition with all parts that the network takes."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)  # noqa: E731
    x, t = normal(2, 4, 6, 2), np.float32([0.2, 0.7])
    mask = np.array([[True, True, False], [True, False, False]])
    whole = Condition(np.array([0, 3]), normal(2, 5), normal(2, 4, 6, 3), normal(2, 3, 4), mask)
    taken = ("label", "vector", *NETS[name][1])
    return x, t, Condition(**{part: getattr(whole, part) for part in taken})


def random_params(net, *args):
    shapes = jax.eval_shape(partial(init_linen, net), KEY, *args)
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda p: (0.4 * draw.normal(size=p.shape)).astype(p.dtype), shapes)


@every_net
def test_a_trained_net_continues_unchanged_when_it_gets_a_part(name):
    """The new weights start at zero, are reached by the gradient, and each part has a say then."""
    net, more = NETS[name]
    x, t, cond = rows(name)
    small = cond._replace(**dict.fromkeys(more))
    trained = random_params(net, x, t, small)

    @jax.jit
    def start(key, trained):
        wide = train.warm_start(init_linen(net, key, x, t, cond), trained)
        return wide, linen.apply_linen(net, trained, x, t, small)

    @jax.jit
    def run(params, cond):
        def objective(params):
            v = apply_linen(net, params, x, t, cond)
            return jnp.sum(v**2), v

        return jax.grad(objective, has_aux=True)(params)

    wide, before = start(KEY, trained)
    grads, after = run(wide, cond)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(before)) > 0.1
    kernels = {"aligned": grads["aligned"]["kernel"]}
    if "context" in more:
        kernels["context"] = grads["blocks"]["context"]["out"]["kernel"]
    for part, kernel in kernels.items():
        assert np.all(np.max(np.abs(kernel), axis=-1) > 0), part

    params = random_params(net, x, t, cond)
    plain = run(params, cond)[1]
    corner, first = np.zeros((4, 6, 1), np.float32), np.float32([[1], [0], [0]])
    corner[0, 0] = 1
    changed = dict(
        label=np.array([1, 2]),
        vector=cond.vector + 1,
        aligned=cond.aligned + corner,
        context=None if cond.context is None else cond.context + first,
        mask=None if cond.mask is None else np.array([[True] * 3, [True, True, False]]),
    )
    for part in ("label", "vector", *more):
        other = run(params, cond._replace(**{part: changed[part]}))[1]
        assert np.all(np.max(np.abs(other - plain), axis=(1, 2, 3)) > 1e-4), part


@every_net
def test_a_bare_array_is_the_part_of_its_kind(name):
    labeled, unlabeled = NETS[name][0], NETS[name][0].clone(num_classes=None)
    x, t, cond = rows(name)
    for net, bare, same in (
        (labeled, cond.label, Condition(label=cond.label)),
        (unlabeled, cond.vector, Condition(vector=cond.vector)),
    ):
        params = random_params(net, x, t, bare)
        run = partial(linen.apply_linen, net)
        assert program(run, params, x, t, bare) == program(run, params, x, t, same)
    shapes = [
        jax.eval_shape(partial(init_linen, net), KEY, x, t, c) for c in (None, Condition(), bare)
    ]
    assert shapes[0] == shapes[1] != shapes[2]
    # no label is the null label, beside a vector too
    params = random_params(labeled, x, t, Condition(vector=cond.vector))
    out = [
        apply_linen(labeled, params, x, t, Condition(label, cond.vector))
        for label in (None, np.array([3, 3]))
    ]
    np.testing.assert_array_equal(*out)
    assert np.max(np.abs(out[0])) > 0.1


def test_the_context_is_read_where_it_is_valid_and_nowhere_else():
    """What stands in invalid tokens does not matter, NaN neither; a row without a valid token is
    computed as by the network without context, and its gradient is finite."""
    net, _ = NETS["DiT"]
    x, t, cond = rows("DiT")
    cond = cond._replace(aligned=None)
    params = random_params(net, x, t, cond)

    @jax.jit
    def run(cond):
        def objective(params, context):
            v = apply_linen(net, params, x, t, cond._replace(context=context))
            return jnp.sum(v**2), v

        return jax.grad(objective, (0, 1), has_aux=True)(params, cond.context)

    _, plain = run(cond)
    mask = cond.mask[..., None]
    spoilt = cond._replace(context=np.where(mask, cond.context, np.nan))
    grads, out = run(spoilt)
    np.testing.assert_array_equal(out, plain)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(np.any(grads[1] != 0, axis=2), cond.mask)

    none = spoilt._replace(mask=cond.mask & [[True], [False]])
    grads, out = run(none)
    blocks = {name: leaf for name, leaf in params["blocks"].items() if name != "context"}
    bare = Condition(cond.label, cond.vector)
    without = apply_linen(net, {**params, "blocks": blocks}, x, t, bare)
    np.testing.assert_allclose(out[1], without[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[0], plain[0])
    assert np.max(np.abs(plain - without), axis=(1, 2, 3)).min() > 1e-3
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads)) and not np.any(grads[1][1])

    # by hand, one head at a time: the valid tokens alone, as many rows of softmax(q k^T) v
    attend = nets._dit.CrossAttention(2, None)
    h = np.random.default_rng(3).normal(size=(2, 5, 8)).astype(np.float32)
    params = random_params(attend, h, cond.context, cond.mask)
    got = apply_linen(attend, params, h, cond.context, cond.mask)
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    for i, n in enumerate((2, 1)):
        q, kv = dense("q", h[i]), dense("kv", cond.context[i, :n])
        y = []
        for s in (slice(0, 4), slice(4, 8)):
            weights = np.exp(q[:, s] @ kv[:, :8][:, s].T / 2)  # sqrt(4)
            y.append(weights / weights.sum(1, keepdims=True) @ kv[:, 8:][:, s])
        expected = dense("out", np.concatenate(y, axis=1))
        np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-5)


def test_dit_takes_a_time_for_each_token():
    """The same time for all is that of the row; in a net of one block without attention between
    tokens, a token's time is read where it stands, and r too."""
    net = nets.DiT(2, 8, 1, 2, num_classes=3, attention_fn=lambda q, k, v: v)
    x, t, cond = rows("DiT")
    v = jflow.flow_map(net)
    params = random_params(net, x, t, cond.label, t)
    apply = jax.jit(lambda t, r: v.apply(params, x, t, r, cond.label))
    r, each = t + np.float32(0.1), np.repeat(t[:, None], 6, axis=1)
    later, at_4 = each + np.float32(0.1), 0.2 * np.eye(6, dtype=np.float32)[4]
    plain = apply(t, r)
    same = apply(each, later)
    np.testing.assert_allclose(same, plain, rtol=1e-4, atol=1e-5)
    token = slice(2, 4), slice(2, 4)  # row 1, column 1 of 2 x 3 patches: token 4
    for times in ((each + at_4, later), (each, later + at_4)):
        moved = np.abs(apply(*times) - same)
        assert np.all(np.max(moved[:, *token], axis=(1, 2, 3)) > 1e-3)
        moved[:, *token] = 0
        assert np.max(moved) < 1e-5
    with pytest.raises(ValueError, match=r"DiT: .*t of shape \[2\], or \[2, 6\].* got \[2, 5\]"):
        v.init(KEY, x, each[:, :5], each[:, :5], cond.label)
    with pytest.raises(ValueError, match=r"DiT: .*r of shape \[2, 6\], that of t, got \[2\]"):
        v.init(KEY, x, each, t, cond.label)
    with pytest.raises(ValueError, match=r"UNet: expected t of shape \[2\], got \[2, 6\]"):
        jflow.velocity(NETS["UNet"][0]).init(KEY, x, each, cond.label)


def test_dit_with_all_parts_in_other_types_modes_and_depths(x64):
    """Forward mode against differences in float64, bfloat16 near it, remat, a program that does
    not grow with depth; a time for each token throughout."""
    net, _ = NETS["DiT"]
    x, t, cond = rows("DiT")
    t = t[:, None] + np.linspace(0.0, 0.1, 6, dtype=np.float32)
    wide = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, tree
    )
    params = random_params(net, x, t, cond)
    x2, t2, cond2, params2 = map(wide, (x, t, cond, params))

    @jax.jit
    def f(x, t, context):
        return apply_linen(net, params2, x, t, cond2._replace(context=context))

    tangents = np.cos(x2), np.ones_like(t2), np.sin(cond2.context)
    at, eps = (x2, t2, cond2.context), 1e-6  # the error is eps^2 f''' / 6, of order time_scale^3
    out, slope = jax.jvp(f, at, tangents)
    there, back = (
        f(*(a + s * eps * d for a, d in zip(at, tangents, strict=True))) for s in (1, -1)
    )
    np.testing.assert_allclose(slope, (there - back) / (2 * eps), rtol=1e-4, atol=1e-4)
    assert out.dtype == jnp.float64

    half = apply_linen(net.clone(dtype=jnp.bfloat16), params, x, t, cond)
    assert half.dtype == jnp.float32
    assert 0 < np.linalg.norm(half - out) < 0.1 * np.linalg.norm(out)  # 8 bits
    again = apply_linen(net.clone(remat=True), params2, x2, t2, cond2)
    np.testing.assert_allclose(again, out, rtol=1e-10, atol=1e-10)

    def size(depth):
        deep = net.clone(num_layers=depth)
        shapes = jax.eval_shape(partial(init_linen, deep), KEY, x, t, cond)
        gradient = jax.grad(lambda p: jnp.sum(apply_linen(deep, p, x, t, cond)))
        return str(jax.make_jaxpr(gradient)(shapes)).count(" = ")

    assert size(12) == size(2) > 100


def test_time_mlp_and_conditioners_take_what_they_can_flatten():
    x, t = jnp.ones((2, 3)), jnp.zeros(2)
    net = nets.TimeMLP((4,))
    vector, mask = jnp.ones((2, 2)), jnp.eye(2, 3)
    params = random_params(net, x, t, Condition(vector=vector, aligned=mask))
    run = jax.jit(lambda *cond: apply_linen(net, params, x, t, Condition(None, *cond)))
    same = apply_linen(net, params, x, t, (vector, mask))
    np.testing.assert_allclose(run(vector, mask), same, rtol=1e-6)
    assert np.max(np.abs(run(vector, 1 - mask) - same)) > 1e-3
    with pytest.raises(ValueError, match="TimeMLP: takes no cond.label"):
        net.init(KEY, x, t, Condition(label=jnp.arange(2)))
    for net, said in ((nets.MLP((4,)), "MLP"), (nets.MADE(1, (4,)), "MADE")):
        shapes = [jax.eval_shape(net.init, KEY, x, c) for c in (vector, Condition(vector=vector))]
        assert shapes[0] == shapes[1]
        with pytest.raises(ValueError, match=f"{said}: takes no cond.aligned, got .*: vector"):
            net.init(KEY, x, Condition(aligned=mask))
        with pytest.raises(ValueError, match=f"{said}: expected cond.label to be float.*embed"):
            net.init(KEY, x, Condition(label=jnp.arange(2)))
    tokens = jnp.ones((2, 3, 4))
    vit = nets.ViT(8, 1, 2, num_classes=3)
    shapes = [jax.eval_shape(vit.init, KEY, tokens, c) for c in (None, Condition())]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="ViT: takes no cond.context"):
        vit.init(KEY, tokens, Condition(context=tokens))
    glow, image = nets.GlowNet(4, 2), jnp.ones((2, 4, 4, 1))
    with pytest.raises(ValueError, match="GlowNet: takes no cond.context"):
        glow.init(KEY, image, Condition(context=tokens))


X, T = jnp.ones((2, 4, 6, 2)), jnp.zeros(2)
TOKENS, VALID = jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool)
WRONG = {  # what is said, network: condition
    r"aligned of shape \[b, 4, 6, k\].*x, which is \[2, 4, 6, 2\], got \[2, 8, 12, 3\]: resize": (
        "UNet DiT ResidualMLP",
        Condition(aligned=jnp.ones((2, 8, 12, 3))),
    ),
    r"aligned to be floats \[b, 4, 6, k\], got an array bool": (
        "UNet DiT",
        Condition(aligned=jnp.ones((2, 4, 6, 1), bool)),
    ),
    r"cond.aligned to lead with 2 rows, got shape \[3, 4, 6, 1\]": (
        "UNet DiT",
        Condition(aligned=jnp.ones((3, 4, 6, 1))),
    ),
    r"label to be integers \[b\], got an array float32\[2\]": (
        "UNet DiT ResidualMLP",
        Condition(label=jnp.ones(2)),
    ),
    r"vector to be floats \[b, k\], got an array int32\[2, 3\]": (
        "UNet DiT ResidualMLP",
        Condition(vector=jnp.ones((2, 3), jnp.int32)),
    ),
    r"takes no cond.context, got .*\[2, 3, 4\]; .*: label, vector, aligned": (
        "UNet ResidualMLP",
        Condition(context=TOKENS),
    ),
    r"context to be floats \[b, n, k\], got an array float32\[2, 4\]": (
        "DiT",
        Condition(context=jnp.ones((2, 4))),
    ),
    r"a token in cond.context, got \[2, 0, 4\]": ("DiT", Condition(context=jnp.ones((2, 0, 4)))),
    r"got no context": ("DiT", Condition(mask=VALID)),
    r"mask to be truth values \[b, n\], got an array float32": (
        "DiT",
        Condition(context=TOKENS, mask=jnp.ones((2, 3))),
    ),
    r"mask of shape \[2, 3\].*context \[2, 3, 4\], got \[2, 2\]": (
        "DiT",
        Condition(context=TOKENS, mask=VALID[:, :2]),
    ),
    r"cond to be labels .* got \[2, 4, 6, 3\]: an image .*Condition\(aligned=...\)": (
        "UNet DiT",
        jnp.ones((2, 4, 6, 3)),
    ),
    r"cond\['a'\] to be labels .* tokens are Condition\(context=...\)": (
        "UNet DiT",
        {"a": TOKENS},
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_condition_that_does_not_fit_is_an_error_while_tracing(said):
    names, cond = WRONG[said]
    for name in names.split():
        velocity = jflow.velocity(NETS[name][0])
        with pytest.raises(ValueError, match=rf"{name}: .*{said}"):
            jax.eval_shape(velocity.init, KEY, X, T, cond)


@every_net
def test_a_part_that_the_params_were_made_with_is_needed(name):
    net, _ = NETS[name]
    x, t, cond = rows(name)
    velocity = jflow.velocity(net)
    params = jax.eval_shape(velocity.init, KEY, x, t, cond)
    without_label = jflow.velocity(net.clone(num_classes=None))
    for part in {"vector", "aligned", "context"} & set(cond._asdict()):
        if getattr(cond, part) is None:
            continue
        less = cond._replace(**{part: None}, **({"mask": None} if part == "context" else {}))
        with pytest.raises(ValueError, match=f"{name}: expected cond.{part}, since its params"):
            jax.eval_shape(velocity.apply, params, x, t, less)
    with pytest.raises(ValueError, match=f"{name}: expected cond.label, since its params"):
        jax.eval_shape(without_label.apply, params, x, t, cond._replace(label=None))


def test_norms_keep_the_digits_of_rows_far_from_zero():
    """Rows N(30, 0.05^2) against float64: squares less the square of the mean lose them."""
    h = 30 + 0.05 * np.random.default_rng(0).normal(size=(2, 2, 2, 64)).astype(np.float32)
    exact = h.astype(np.float64)

    def normal(a, axis):
        a = a - a.mean(axis, keepdims=True)
        return a / np.sqrt((a**2).mean(axis, keepdims=True) + 1e-6)

    for norm in (nets.LayerNorm(affine=False), nets.LayerNorm()):
        out = norm.apply(norm.init(KEY, h), h)
        np.testing.assert_allclose(out, normal(exact, -1), atol=1e-3)
    norm = nets._unet.group_norm(64, None)
    groups = normal(exact.reshape(2, 2, 2, 8, 8), (1, 2, 4)).reshape(h.shape)
    np.testing.assert_allclose(norm.apply(norm.init(KEY, h), h), groups, atol=1e-3)
