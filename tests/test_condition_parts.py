"""A condition of several parts, some of them None, where conditions are handled in general: batch
transforms, guidance, couplings, training steps, samplers, bijectors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jflow
from jflow import bijectors, couplings, data, guidance, losses, nets, solvers, train
from jflow.types import Condition, Velocity

KEY, B = jax.random.key(0), 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, 2, 2, 1)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(1).normal(size=(B, 3, 2)), jnp.float32)
COND = Condition(
    label=jnp.arange(B) % 3,
    aligned=jnp.ones((B, 2, 2, 1)),
    context=TOKENS,
    mask=jnp.arange(3)[None] <= jnp.arange(B)[:, None],
)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def seen(params, key, batch, frozen=None):
    """A loss that returns what it sees."""
    return jnp.zeros(()), batch


@pytest.mark.parametrize(
    "null",
    [
        Condition(label=3),
        Condition(mask=False),
        Condition(label=3, aligned=0.0, context=jnp.zeros(2), mask=False),
    ],
    ids=["label", "context", "all"],
)
def test_parts_of_null_are_dropped_and_the_others_kept(null):
    batch = {"x": X, "cond": COND, "weight": jnp.array([1.0, 0.0, 1.0, 1.0])}
    made = losses.drop_cond(0.5, null=null)(KEY, batch)
    dropped = np.asarray(made["dropped"])
    assert 0 < dropped.sum() < B
    for part in COND._fields:
        before, after = getattr(COND, part), getattr(made["cond"], part)
        value = getattr(null, part)
        if before is None or value is None:
            same(after, before)
            continue
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after[~dropped], before[~dropped])
        np.testing.assert_array_equal(after[dropped], jnp.broadcast_to(value, after.shape)[dropped])

    def apply(params, x, t, cond=None, *, key=None):
        parts = jnp.sum(cond.context * cond.mask[..., None], (1, 2)) + jnp.mean(
            cond.aligned, (1, 2, 3)
        )
        return (cond.label + parts)[:, None, None, None] + 0 * x

    plain = Velocity(lambda *_: {}, apply)
    v = lambda cond: apply({}, X, None, cond)  # noqa: E731
    nulls = losses.drop_cond(1.0, null=null)(KEY, batch)["cond"]
    out = guidance.cfg(plain, 3.0, null=null).apply({}, X, jnp.zeros(B), COND)
    np.testing.assert_allclose(out, v(nulls) + 3 * (v(COND) - v(nulls)), rtol=1e-5, atol=1e-5)
    replaced = guidance.with_cond(plain, null).apply({}, X, jnp.zeros(B), COND)
    np.testing.assert_array_equal(replaced, v(nulls))


def test_a_null_that_is_no_row_of_the_condition_is_an_error():
    for null, said in [
        (3, r"null to be a Condition as cond is, such as Condition\(label=10\), got 3"),
        (
            Condition(),
            r"null to have parts of cond, among \['label', .* 'mask'\], got \[\]",
        ),
        (Condition(vector=0.0), r"null to have parts of cond, among .* got \['vector'\]"),
        (Condition(label=0.5), "null to be a row of cond, which holds labels"),
        (Condition(mask=0), "null to be a row of cond, which holds truth values"),
        (Condition(aligned=jnp.zeros((3, 1))), "null of shape"),
    ]:
        with pytest.raises(ValueError, match=f"drop_cond: expected {said}"):
            losses.drop_cond(0.5, null=null)(KEY, {"x": X, "cond": COND})


def test_rows_follow_their_partners_and_are_filled():
    """Pairs by label; rows of weight 0 are replaced, truth values too; one row is for all."""
    coupling = couplings.optimal_transport(couplings.within_class())
    batch = {"x": X, "x0": X[::-1], "cond": COND, "weight": 1 + jnp.arange(B)}
    made = couplings.pair(coupling)(KEY, batch)
    j = np.asarray(made["weight"]) - 1
    same(made["cond"], jax.tree.map(lambda c: c[j], COND))
    labels = couplings.optimal_transport(couplings.within_class())(KEY, X[::-1], X, COND.label)
    same(coupling(KEY, X[::-1], X, COND), labels)
    near, c = couplings.near_condition(weight=1.0), jnp.arange(B)[:, None] / 2
    np.testing.assert_array_equal(near(X, X, Condition(vector=c)), near(X, X, c))

    weight = jnp.array([0.0, 1.0, 1.0, 0.0])
    _, cond = losses.read_batch(
        "own", {"x": X, "cond": COND, "weight": weight}, ("x", "cond", "weight")
    )[:2]
    same(cond, jax.tree.map(lambda c: c[jnp.array([1, 1, 2, 1])], COND))
    one = jax.tree.map(lambda c: c[:1], COND)
    _, cond = losses.read_batch("own", {"x": X, "cond": one}, ("x", "cond"))
    same(cond, jax.tree.map(lambda c: jnp.broadcast_to(c[:1], c.shape), COND))


def test_training_and_sampling_with_an_aligned_mask_and_a_context():
    """From the labels and tokens of a batch to samples: inpainting, dropped parts, parts of a batch
    one after the other, rows over a mesh, solvers and guidance."""
    net = nets.DiT(1, 4, 1, 1, num_classes=3)
    velocity, inpaint = couplings.hold_known(jflow.velocity(net)), None
    inpaint = couplings.inpainting(lambda key, x1: jax.random.bernoulli(key, 0.5, x1.shape))
    given = COND._replace(aligned=None)
    x0, cond = inpaint(KEY, X, given)
    assert cond.aligned.shape == (B, 2, 2, 1) and cond.vector is None
    loss = losses.chain(
        couplings.with_source(inpaint),
        losses.drop_cond(0.5, null=Condition(label=3, mask=False)),
        losses.flow_matching(velocity),
    )
    optimizer = optax.sgd(0.1)
    params = velocity.init(KEY, x0, jnp.zeros(B), cond)
    step = jax.jit(train.make_step(loss, optimizer, accumulate=2))
    mesh = train.data_mesh()
    batch = data.place({"x": X, "cond": given}, train.data_sharding(mesh))
    assert batch["cond"].mask.sharding.mesh == mesh and batch["cond"].aligned is None
    state, metrics = step(train.init_state(params, optimizer, KEY), batch)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])

    guided = guidance.cfg(velocity, 2.0, null=Condition(label=3, mask=False))
    x1, info = solvers.sample(guided, state.params, x0, cond, method=1)
    assert np.all(np.isfinite(x1))
    known = cond.aligned > 0
    np.testing.assert_allclose(x1[known], X[known], atol=1e-6)  # guidance weighs equal velocities
    assert 0 < known.sum() < known.size


def test_a_bijector_is_conditioned_on_an_encoding_of_the_parts():
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, cond):
            valid = cond.mask[..., None].astype(cond.context.dtype)
            return nn.Embed(3, 2)(cond.label) + jnp.sum(valid * cond.context, axis=1)

    bijector = bijectors.conditioned(bijectors.amortized(bijectors.affine((2,))), Encoder())
    x, cond = X[:, 0, :, 0], COND._replace(aligned=None)
    params = bijector.init(KEY, x, cond)
    params = jax.tree.map(lambda p: p + 0.3, params)
    z, log_det = bijector.inverse(params, x, cond)
    np.testing.assert_allclose(bijector.forward(params, z, cond)[0], x, rtol=1e-4, atol=1e-5)
    other = bijector.inverse(params, x, cond._replace(mask=~cond.mask))[1]
    assert np.all(np.abs(other - log_det) > 1e-4)


def test_a_set_is_a_context_and_a_pair_of_conditions_is_guided_away_from():
    encoder, cond = nets.SetEncoder(2, (4,)), Condition(context=TOKENS, mask=COND.mask)
    params = encoder.init(KEY, cond)
    given = {"x": TOKENS, "mask": COND.mask}
    np.testing.assert_array_equal(encoder.apply(params, cond), encoder.apply(params, given))
    with pytest.raises(ValueError, match="SetEncoder: takes no cond.label"):
        encoder.apply(params, COND._replace(aligned=None))

    v = Velocity(None, lambda params, x, t, cond=None, *, key=None: x + cond.vector)
    towards, away = (Condition(vector=jnp.full((B, 1), c)) for c in (3.0, 1.0))
    guided = guidance.negative(v, guidance.scaled(2.0))
    out = guided.apply({}, jnp.zeros((B, 1)), jnp.zeros(B), (towards, away))
    np.testing.assert_array_equal(out, jnp.full((B, 1), 5.0))


def test_rows_of_data_are_arrays_that_a_transform_makes_a_condition_of():
    x, labels = np.asarray(X), np.asarray(COND.label)
    with pytest.raises(TypeError, match="rows 'cond': .* got a Condition: .*losses.chain"):
        data.batches({"x": x, "cond": Condition(label=labels)}, 2)

    def with_condition(key, batch, frozen=None):
        return {"x": batch["x"], "cond": Condition(label=batch["label"], aligned=batch["x"] ** 2)}

    velocity = jflow.velocity(nets.ResidualMLP(4, 1, num_classes=3))
    made = with_condition(None, {"x": X, "label": COND.label})
    loss = losses.chain(with_condition, losses.flow_matching(velocity))
    params, optimizer = velocity.init(KEY, X, jnp.zeros(B), made["cond"]), optax.sgd(0.1)
    result = train.fit(
        train.init_state(params, optimizer, KEY),
        train.make_step(loss, optimizer),
        data.batches({"x": x, "label": labels}, 2),
        steps=2,
        inner=2,
    )
    moved = jax.tree.map(lambda a, b: np.any(a != b), result.state.params, params)
    assert moved["head"]["kernel"] and result.state.step == 2
    # batches of somebody's own may hold the tuple, with parts that are None
    batches = ({"x": x, "cond": Condition(label=labels, aligned=x)} for _ in range(2))
    result = train.fit(
        train.init_state(params, optimizer, KEY),
        train.make_step(losses.flow_matching(velocity), optimizer),
        batches,
        steps=2,
        inner=2,
    )
    assert result.state.step == 2
