"""What is read inside networks and put back, in every network whose layers are scanned or not."""

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflow
from jflow import nets, oracles, solvers, steering
from jflow.nets._dit import DiTBlock
from jflow.types import Condition, Field

RNG = np.random.default_rng(0)
TEXT = Condition(
    context=RNG.normal(size=(2, 3, 4)).astype(np.float32),
    vector=RNG.normal(size=(2, 2)).astype(np.float32),
)
IMAGE = RNG.normal(size=(2, 4, 4, 1)).astype(np.float32)
TOKENS = RNG.normal(size=(2, 5, 1)).astype(np.float32)
NETWORKS = {
    "DiT": (
        nets.DiT(width=8, num_layers=2, num_heads=2, remat=True),
        IMAGE,
        None,
        ("blocks:weights", "blocks/attention/out"),
    ),
    "TokenDiT": (
        nets.TokenDiT(width=8, num_layers=2, num_heads=2, attention_fn=nets.rotary_attention()),
        TOKENS,
        None,
        ("blocks:k", "blocks:attended"),
    ),
    "MMDiT": (
        nets.MMDiT(width=8, num_layers=3, num_heads=2, dual_layers=1),
        IMAGE,
        TEXT,
        ("dual_blocks:v", "blocks/image/heads"),
    ),
    "Flux": (
        nets.Flux(width=8, num_heads=1, num_single_layers=2, rope_axes=(2, 4, 2)),
        IMAGE,
        TEXT,
        ("double_blocks:q", "single_blocks:v"),
    ),
    "UNet": (
        nets.UNet(channels=8, attention=(False, True)),
        IMAGE,
        None,
        ("middle_0/attention:weights", "up_0_0"),
    ),
}


def random_params(init, *args):
    """Params that are nowhere zero, since those at initialization hide what is inside."""
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(
        lambda leaf: RNG.normal(size=leaf.shape, scale=0.3).astype(np.float32), shapes
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_own_features_change_nothing_and_others_do(name):
    net, x, cond, sites = NETWORKS[name]
    reader, velocity = steering.capture(net, sites), jflow.velocity(net)
    params = random_params(reader.init, x, 0.3, cond)

    read = jax.jit(lambda x: reader.apply(params, x, 0.3, cond))

    @jax.jit
    def told(features, weight):
        given = steering.inject(params, features, weight=weight)
        return velocity.apply(given, x, 0.3, cond)

    plain = np.asarray(velocity.apply(params, x, 0.3, cond))
    (v, own), (_, given) = read(x), read(0.5 * x + 0.3)
    for same in (v, told(own, 1.0), told(given, 0.0)):
        np.testing.assert_allclose(same, plain, atol=1e-5)  # 40 roundings of float32 at 2 to 4
    first, later = sites
    for changed in (told({first: given[first]}, 1.0), told({**own, later: given[later]}, 1.0)):
        assert np.abs(changed - plain).max() > 1e-4


def test_every_depth_of_a_scan_is_read_and_changed():
    """Depth i of what leaves the scan is what the i-th block returns: the block of flax, with the
    params of the next depth, makes the next of it. A weight for the last depth alone leaves the
    tokens before it, and the attention of the last one is what it is given."""
    net = nets.DiT(width=8, num_layers=3, num_heads=2)
    parts = ["blocks:weights", "blocks:v", "blocks:attended"]
    reader = steering.capture(net, ["blocks", "embed", *parts])
    params = random_params(reader.init, IMAGE, 0.3)

    @jax.jit
    def run(params):
        f = reader.apply(params, IMAGE, 0.3)[1]
        made = [
            DiTBlock(2, 4, 0.0, None).apply(
                {"params": jax.tree.map(lambda a, i=i: a[i + 1], params["blocks"])},
                f["blocks"][0][i],
                nn.silu(f["embed"]),
            )[0]
            for i in range(2)
        ]
        given = jnp.ones_like(f["blocks:attended"])
        told = steering.inject(
            params, {"blocks:attended": given}, weight=jnp.array([0.0, 0.0, 1.0])
        )
        return f, made, reader.apply(told, IMAGE, 0.3)[1]

    f, made, changed = jax.device_get(run(params))
    tokens = f["blocks"][0]
    assert tokens.shape == (3, 2, 4, 8)
    np.testing.assert_allclose(np.stack(made), tokens[1:], atol=1e-5)  # float32, of order 3
    weights, v, attended = (f[part] for part in parts)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.einsum("lbhqk,lbkhd->lbqhd", weights, v), attended, atol=1e-6)
    np.testing.assert_array_equal(changed["blocks"][0][:2], tokens[:2])
    assert np.abs(changed["blocks"][0][2] - tokens[2]).max() > 1e-3


def test_a_features_gradient_and_what_is_wrong():
    net = nets.ResidualMLP(width=8, num_blocks=2)
    reader, velocity = steering.capture(net, ["head"]), jflow.velocity(net)
    x = np.ones((3, 2), np.float32)
    params = random_params(reader.init, x, 0.0)
    loss = lambda f: velocity.apply(steering.inject(params, f), x, 0.0).sum()  # noqa: E731
    slope = jax.grad(loss)({"head": jnp.zeros((3, 2))})["head"]
    np.testing.assert_array_equal(slope, np.ones((3, 2)))
    with pytest.raises(ValueError, match="got 'blocs/in'; the nearest are 'blocks/in'"):
        steering.inject(params, {"blocs/in": x})
    with pytest.raises(ValueError, match="got 'hed'; the nearest are 'head'"):
        jax.eval_shape(steering.capture(net, ["hed"]).apply, params, x, 0.0)
    with pytest.raises(ValueError, match="ends in :attended, :q, :k, :v, :weights"):
        steering.capture(net, ["head:values"])
    with pytest.raises(ValueError, match="at least one site"):
        steering.capture(net, [])
    with pytest.raises(ValueError, match="an attention function for ':v', got 'head', a Dense"):
        jax.eval_shape(steering.capture(net, ["head:v"]).apply, params, x, 0.0)
    with pytest.raises(ValueError, match=r"feature of shape \[3, 2\] at 'head', got \[3, 5\]"):
        velocity.apply(steering.inject(params, {"head": np.ones((3, 5))}), x, 0.0)
    with pytest.raises(ValueError, match=r"a number or of shape \[3\]"):
        steering.inject(params, {"head": x}, weight=np.ones(2))
    mmdit, image, text, _ = NETWORKS["MMDiT"]
    unread = steering.capture(mmdit, ["blocks/image"])
    inside = jax.eval_shape(unread.init, jax.random.key(0), image, 0.3, text)
    with pytest.raises(ValueError, match="of which the network calls other methods"):
        jax.eval_shape(unread.apply, inside, image, 0.3, text)


class Linear(nn.Module):
    """A network of one Dense, whose output is linear in what its only site computes."""

    @nn.compact
    def __call__(self, x, t, cond=None):
        return nn.Dense(x.shape[-1], name="out")(jnp.concatenate([x, cond], -1))


def test_fluxspace_is_the_linear_edit():
    """On a network that is one site it is the formula; scale 0, equal prompts and times outside the
    window leave the base."""
    base, edit, prior = RNG.normal(size=(3, 4, 2)).astype(np.float32)
    x = RNG.normal(size=(4, 3)).astype(np.float32)
    t = np.array([0.1, 0.4, 0.5, 0.9], np.float32)
    plain = jflow.velocity(Linear())
    edited = steering.fluxspace(Linear(), ["out"], lambda t: 1 + t, window=(0.4, 0.8))
    cond = steering.EditCondition(base, edit, prior)
    params = random_params(edited.init, x, t, cond)
    made, same = (
        np.asarray(edited.apply(params, x, t, c))
        for c in (cond, steering.EditCondition(base, edit, edit))
    )
    of_base, of_edit, of_prior = (
        np.asarray(plain.apply(params, x, t, c), np.float64) for c in (base, edit, prior)
    )
    along = (of_edit * of_prior).sum(-1, keepdims=True) / (of_prior**2).sum(-1, keepdims=True)
    scale = np.where((t >= 0.4) & (t <= 0.8), 1 + t, 0)[:, None]
    np.testing.assert_allclose(made, of_base + scale * (of_edit - along * of_prior), atol=1e-5)
    np.testing.assert_array_equal(made[[0, 3]], of_base[[0, 3]].astype(np.float32))
    np.testing.assert_allclose(same, of_base, atol=1e-5)
    none = steering.fluxspace(Linear(), ["out"], 0.0).apply(params, x, t, cond)
    np.testing.assert_array_equal(none, of_base.astype(np.float32))
    with pytest.raises(ValueError, match="EditCondition"):
        edited.apply(params, x, t, base)
    for window in [(-0.1, 0.5), (0.5, 1.2), (0.6, 0.4)]:
        with pytest.raises(ValueError, match="expected a window"):
            steering.fluxspace(Linear(), ["out"], 1.0, window=window)


def test_overshooting_follows_the_map_of_attention():
    """Where the map is 1 it is `solvers.overshoot`, where it is 0 DDIM; the map is the mean of the
    weights from the image to the chosen words, over its largest."""
    net, x, cond, _ = NETWORKS["MMDiT"]
    field = steering.attention_map(net, ["blocks:weights", "last_block:weights"], [0, 2], patch=2)
    reader = steering.capture(net, ["blocks:weights", "last_block:weights"])
    params = random_params(reader.init, x, 0.3, cond)
    velocity = oracles.as_velocity(oracles.gaussian([0.3, -1.0], 0.5))
    y = RNG.normal(size=(4, 2)).astype(np.float32)

    def known(m):
        return Field(
            velocity.init,
            lambda params, x, t, cond=None, *, key=None: (velocity.apply(params, x, t), m),
        )

    @jax.jit
    def run(params):
        m = field.apply(params, x, 0.25, cond)[1]
        weights = reader.apply(params, x, 0.25, cond)[1]
        steps = (
            steering.modulated_overshoot(known(jnp.zeros((1, 1)))),
            steering.modulated_overshoot(known(jnp.ones((1, 1)))),
            solvers.ancestral(velocity, 0.0),
            solvers.overshoot(velocity),
        )
        steps = [step({}, y, 0.25, 0.5, None) for step in steps]
        return (
            m,
            weights,
            steps,
            steering.modulated_overshoot(field)(params, x, 0.25, 0.5, None, cond),
        )

    m, weights, (still, full, ddim, over), (_, mean, std) = jax.device_get(run(params))
    np.testing.assert_allclose(still[1], ddim[1], atol=1e-6)
    np.testing.assert_allclose(full[1], over[1], atol=1e-6)
    np.testing.assert_allclose(still[2], 0)
    np.testing.assert_allclose(full[2][:, 0], over[2], rtol=1e-6)
    by_hand = np.mean([weights["blocks:weights"][0], weights["last_block:weights"]], axis=0)[
        :, :, 3:, [0, 2]
    ].mean((1, 3))
    by_hand = (by_hand / by_hand.max(1, keepdims=True)).reshape(2, 2, 2)
    np.testing.assert_allclose(m[:, ::2, ::2, 0], by_hand, atol=1e-6)
    np.testing.assert_array_equal(m[:, ::2, ::2], m[:, 1::2, 1::2])
    assert mean.shape == std.shape == x.shape and np.ptp(std) > 0
    with pytest.raises(ValueError, match="scale >= 0"):
        steering.modulated_overshoot(field, -1.0)
    with pytest.raises(ValueError, match="sites that end in ':weights'"):
        steering.attention_map(net, ["blocks:v"], [0], patch=2)
    with pytest.raises(ValueError, match="tokens below 3"):
        far = steering.attention_map(net, ["blocks:weights"], [3], patch=2)
        jax.eval_shape(far.apply, params, x, 0.3, cond)


def test_edits_by_shared_features():
    """Without sharing both are inversion and sampling, by the solvers of the library. Sharing what
    the network returns, at every time, takes each midpoint step back: RF-Edit then gives the image
    back, whatever the target."""
    tokens, mlp = nets.TokenDiT(width=8, num_layers=2, num_heads=2), nets.ResidualMLP(8, 2)
    source, target = RNG.normal(size=(2, 2, 3)).astype(np.float32)
    x = TOKENS[..., 0]
    of_tokens, of_mlp = (
        random_params(jflow.velocity(net).init, x, 0.3, source)
        for net, x in ((tokens, TOKENS), (mlp, x))
    )

    def there_and_back(net, params, x, solver):
        velocity, method = jflow.velocity(net), solvers.fixed(4, solver)
        noise, _ = solvers.sample(velocity, params, x, source, method=method, t0=1, t1=0)
        return solvers.sample(velocity, params, noise, target, method=method)[0]

    def rf(sites, **more):
        return steering.rf_edit(mlp, of_mlp, x, source, target, sites=sites, steps=4, **more)

    def reflex(until):
        return steering.reflex(
            tokens,
            of_tokens,
            TOKENS,
            source,
            target,
            weights=["blocks:weights"],
            features=["blocks:attended"],
            steps=4,
            until=until,
        )

    @jax.jit
    def run():
        return (
            there_and_back(mlp, of_mlp, x, diffrax.Midpoint()),
            there_and_back(tokens, of_tokens, TOKENS, diffrax.Euler()),
            rf(["blocks"], until=0.6, layers=[0.0, 0.0]),
            rf(["blocks"], until=0.6, layers=[0.0, 1.0]),
            rf(["head"], until=1.0),
            reflex(0.0),
            reflex(1.0),
        )

    midpoint, euler, none, shared, whole, plain, mixed = jax.device_get(run())
    np.testing.assert_allclose(none, midpoint, atol=1e-5)  # 40 roundings of float32 at 2 to 4
    np.testing.assert_allclose(plain, euler, atol=1e-5)
    np.testing.assert_allclose(whole, x, atol=1e-5)
    for edit, unshared in ((shared, midpoint), (mixed, euler), (whole, midpoint)):
        assert np.abs(edit - unshared).max() > 1e-3
    for edit, more in ((steering.rf_edit, "sites"), (steering.reflex, "features")):
        with pytest.raises(ValueError, match=r"until in \[0, 1\]"):
            edit(mlp, of_mlp, x, source, target, **{more: ["blocks"]}, until=1.5)


def test_adapted_weights_by_hand():
    own = np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.4, 0.4, 0.1, 0.1]])
    source = np.array([[0.2, 0.2, 0.3, 0.3], [0.3, 0.4, 0.2, 0.1], [0.1, 0.1, 0.3, 0.5]])
    combine = steering.adapted_weights(1, top=1, scale=3.0, shared=[False])
    new = np.asarray(combine(jnp.array(own[None, None]), jnp.array(source[None, None])))[0, 0]
    np.testing.assert_allclose(new[0], own[0], rtol=1e-6)  # the text is that of the edit
    np.testing.assert_allclose(new[1], [0.3, 0.4, 0.2, 0.1], rtol=1e-6)
    np.testing.assert_allclose(new[2], [1.2, 0.1, 0.3, 0.5], rtol=1e-6)
    shared = steering.adapted_weights(1, top=2, shared=[True])
    new = np.asarray(shared(jnp.array(own[None, None]), jnp.array(source[None, None])))[0, 0]
    np.testing.assert_allclose(new[1], [0.3, 0.6 * 0.4, 0.6 * 0.6, 0.1], rtol=1e-6)
    with pytest.raises(ValueError, match="expected shared for 2 words, got 1"):
        steering.adapted_weights(2, top=1, shared=[True])
