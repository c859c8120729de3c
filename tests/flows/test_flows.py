"""What is special to `flow` and to the recipes: fixed draws, checkpoints, depth, narrow data,
supports, errors."""

import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jflow import bijectors as bj
from jflow import distributions, flows
from jflow.types import Bijector, Distribution


def train(flow, params, draw, steps, learning_rate):
    """Adam on the likelihood of fresh batches draw(key), in one compiled scan; the rate falls to
    zero."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def run(params):
        def step(state, key):
            params, moments = state
            loss, grads = jax.value_and_grad(lambda p: -jnp.mean(flow.log_prob(p, draw(key))))(
                params
            )
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), loss

        (params_, _), losses = jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), steps)
        )
        return params_, losses

    return run(params)


def test_permutations_are_the_ones_that_checkpoints_were_trained_with():
    """They are no part of a checkpoint: this golden test is what keeps old ones loading."""
    expected = [[2, 4, 3, 0, 1], [2, 3, 4, 0, 1], [4, 1, 2, 0, 3], [2, 3, 4, 0, 1]]
    np.testing.assert_array_equal(flows.alternating_permutations(5, 4), expected)
    big = flows.alternating_permutations(16, 8)
    assert big.shape == (8, 16) and big.dtype == np.int32
    assert hashlib.sha256(np.ascontiguousarray(big, "<i4")).hexdigest()[:16] == "4380985e62805583"


EVENTS = {
    "glow": (2, 2, 1),
    "inverse_flow": (2, 2, 1),
    "jet": (2, 2, 2),
    "starflow": (2, 2, 2),
    "tarflow": (2, 2, 2),
}
SMALL = {
    "bnaf": lambda: flows.bnaf((2,), depth=1, hidden=2),
    "iaf": lambda: flows.iaf((2,), depth=1, hidden=(4,)),
    "maf": lambda: flows.maf((2,), depth=1, hidden=(4,)),
    "nanoflow": lambda: flows.nanoflow((2,), depth=2, hidden=(4,)),
    "neural_spline": lambda: flows.neural_spline((2,), depth=1, hidden=(4,)),
    "neural_spline_autoregressive": lambda: flows.neural_spline_autoregressive(
        (2,), depth=1, hidden=(4,)
    ),
    "nice": lambda: flows.nice((2,), depth=1, hidden=(4,)),
    "planar": lambda: flows.planar((2,), depth=1),
    "radial": lambda: flows.radial((2,), depth=1),
    "real_nvp": lambda: flows.real_nvp((2,), depth=1, hidden=(4,)),
    "residual_flow": lambda: flows.residual_flow((2,), depth=1, hidden=(4,)),
    "sylvester": lambda: flows.sylvester((2,), depth=1),
    "glow": lambda: flows.glow((2, 2, 1), depth=1, scales=1, hidden=4),
    "inverse_flow": lambda: flows.inverse_flow((2, 2, 1), depth=1, scales=1, hidden=4),
    "jet": lambda: flows.jet((2, 2, 2), patch_size=1, width=4, depth=1, num_layers=1, num_heads=1),
    "starflow": lambda: flows.starflow(
        (2, 2, 2), width=4, num_layers=1, shallow_depth=1, num_shallow_layers=1, num_heads=1
    ),
    "tarflow": lambda: flows.tarflow(
        (2, 2, 2), patch_size=1, width=4, depth=1, num_layers=1, num_heads=1
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_recipes_standardize_the_data_themselves(name):
    shapes = jax.eval_shape(
        SMALL[name]().init, jax.random.key(0), jnp.zeros((3, *EVENTS.get(name, (2,))))
    )
    assert set(shapes["bijector"]["1"]) == {"log_std", "offset"}


@pytest.mark.parametrize("recipe", [flows.real_nvp, flows.neural_spline, flows.maf])
def test_a_change_of_units_changes_the_density_of_a_recipe_by_its_slope_alone(recipe):
    """log p of a x + b is log p of x minus sum log |a|, from the first step on."""
    x, unit, offset = (
        np.random.default_rng(0).normal(size=(64, 2)),
        np.array([100.0, 1e-3]),
        np.array([5000.0, 2.0]),
    )
    flow = recipe((2,), depth=1, hidden=(4,))
    log_prob = jax.jit(lambda x: flow.log_prob(flow.init(jax.random.key(0), x), x))
    plain, moved = log_prob(np.float32(x)), log_prob(np.float32(x * unit + offset))
    np.testing.assert_allclose(
        moved, plain - np.log(unit).sum(), atol=5e-3
    )  # float32 near 5000 and 2


@pytest.mark.parametrize("features", [1, 2, 3, 5, 16])
def test_two_layers_transform_every_number(features):
    permutations = flows.alternating_permutations(features, 8)
    np.testing.assert_array_equal(
        np.sort(permutations), np.broadcast_to(np.arange(features), (8, features))
    )
    order = np.arange(features)
    for first, second in permutations.reshape(4, 2, features):
        order = order[first]
        touched = set(order[features // 2 :])
        order = order[second]
        assert touched | set(order[features // 2 :]) == set(range(features))


@pytest.mark.parametrize(
    "options",
    [{}, {"reversible": 2}, {"embed": nn.Embed(3, 2)}],
    ids=["plain", "reversible", "labels"],
)
def test_params_go_through_a_plain_orbax_checkpoint(options, tmp_path):
    """Nested dicts come back as such, empty ones too, without a template."""
    flow = flows.neural_spline((3, 2), depth=2, hidden=(4,), bins=3, **options)
    x, cond = jnp.ones((3, 3, 2)), jnp.arange(3) if "embed" in options else None
    params = jax.jit(flow.init)(jax.random.key(0), x, cond)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "params")
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_64_layers_keep_a_float32_round_trip():
    """Within 1e-4 at the start and after 100 steps, on data with a narrow side."""
    flow = flows.real_nvp((2,), depth=64, hidden=(16,), reversible=True)
    shear = jnp.array([[1.0, 0.9], [0.0, 0.1]])
    draw = lambda key: jax.random.normal(key, (128, 2)) @ shear  # noqa: E731
    x = draw(jax.random.key(1))
    params = jax.jit(flow.init)(jax.random.key(0), x)
    trained, losses = train(flow, params, draw, 100, 1e-3)
    assert losses[-1] < losses[0] - 0.5

    @jax.jit
    def worst(params):
        z, there = flow.inverse(params, x)
        again, back = flow.forward(params, z)
        return jnp.max(jnp.abs(again - x)), jnp.max(jnp.abs(there + back))

    for p in (params, trained):
        error, log_det_error = worst(p)
        assert error < 1e-4 and log_det_error < 1e-3


@pytest.mark.parametrize("recipe", [flows.real_nvp, flows.neural_spline])
def test_narrow_data_are_learned(recipe):
    """N(0, 0.05^2) from N(0, 1): a scale that only contracts, or saturates, stays nats above the
    entropy."""
    flow = recipe((2,), depth=4, hidden=(16,))
    draw = lambda key: 0.05 * jax.random.normal(key, (256, 2))  # noqa: E731
    params, losses = train(
        flow, jax.jit(flow.init)(jax.random.key(0), jnp.zeros((1, 2))), draw, 300, 1e-2
    )
    entropy = 2 * (0.5 + 0.5 * np.log(2 * np.pi) + np.log(0.05))
    assert losses[0] > entropy + 3
    assert abs(float(losses[-30:].mean()) - entropy) < 0.05
    sample = jax.jit(flow.sample, static_argnums=2)(params, jax.random.key(2), 4000)
    quartiles = np.quantile(sample, [0.25, 0.75], axis=0)
    np.testing.assert_allclose(np.diff(quartiles, axis=0)[0] / 1.349, 0.05, rtol=0.1)


def test_outside_the_support_the_density_is_zero():
    """A sigmoid onto the unit square: log_prob is -inf outside, finite inside, and never NaN in
    value or gradient."""
    bijector = bj.chain(bj.lu(2), bj.sigmoid())
    flow = flows.flow(bijector, distributions.normal((2,)))
    x = np.array([[0.2, 0.7], [1.5, 0.5], [-1e6, 0.5], [0.5, 1.0], [0.0, 0.5]], np.float32)
    params = flow.init(jax.random.key(0), x[:1])
    log_prob, pullback = jax.vjp(jax.jit(lambda p: flow.log_prob(p, x)), params)
    assert np.isfinite(log_prob[0]) and np.all(np.isneginf(log_prob[1:]))
    (grads,) = pullback(np.float32(np.isfinite(log_prob)))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert np.all(flow.sample(params, jax.random.key(1), 100) > 0)


def test_a_zeroed_condition_is_no_condition():
    """With the rows of the first kernel that cond multiplies at zero, the conditional flow is the
    unconditional one."""
    flow = flows.real_nvp((4,), depth=3, hidden=(8,), standardize=False)
    rng = np.random.default_rng(0)
    x, cond = (jnp.asarray(rng.normal(size=(5, d)), jnp.float32) for d in (4, 3))
    shapes = jax.eval_shape(flow.init, jax.random.key(0), x, cond)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)
    net = params["bijector"]["stacked"]["1"]["net"]["Dense_0"]
    assert net["kernel"].shape == (3, 2 + 3, 8)
    full = flow.log_prob(params, x, cond)
    net["kernel"] = net["kernel"].at[:, 2:].set(0.0)
    zeroed = flow.log_prob(params, x, cond)
    net["kernel"] = net["kernel"][:, :2]
    np.testing.assert_allclose(zeroed, flow.log_prob(params, x), rtol=1e-6)
    assert np.all(full != zeroed)


def test_a_flow_is_a_base_for_another():
    """Densities compose: a flow over a flow is the flow over the chain."""
    inner = flows.flow(bj.affine((2,)), distributions.normal((2,)))
    outer = flows.flow(bj.lu(2), inner)
    whole = flows.flow(bj.chain(bj.affine((2,)), bj.lu(2)), distributions.normal((2,)))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
    p = jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), outer.init(jax.random.key(0), x)
    )
    q = {"bijector": {"0": p["base"]["bijector"], "1": p["bijector"]}, "base": {}}
    np.testing.assert_allclose(outer.log_prob(p, x), whole.log_prob(q, x), rtol=1e-5)
    np.testing.assert_allclose(
        outer.sample(p, jax.random.key(1), 3),
        whole.sample(q, jax.random.key(1), 3),
        rtol=1e-5,
        atol=1e-6,
    )


def test_bijector_and_base_get_keys_of_their_own():
    """log_prob's key reaches both, split; without one both see None."""
    seen = {}

    def inverse(params, x, cond=None, *, key=None):
        seen["bijector"] = key
        return x, jnp.zeros(x.shape[0])

    def log_prob(params, x, cond=None, *, key=None):
        seen["base"] = key
        return jnp.zeros(x.shape[0])

    base = Distribution(lambda key, x, cond=None: {}, log_prob, None)
    flow = flows.flow(Bijector(lambda *args, **kwargs: {}, inverse, inverse), base)
    flow.log_prob({"bijector": {}, "base": {}}, jnp.ones((2, 2)), key=jax.random.key(0))
    first, second = (jax.random.key_data(seen[name]).tolist() for name in ("bijector", "base"))
    assert first != second
    flow.log_prob({"bijector": {}, "base": {}}, jnp.ones((2, 2)))
    assert seen == {"bijector": None, "base": None}


def test_init_looks_at_the_data_through_the_layers():
    """Actnorm on the data side standardizes the batch, and a trainable base meets what comes out of
    the map."""
    x = jnp.asarray(3 + 5 * np.random.default_rng(0).normal(size=(500, 2)), jnp.float32)
    flow = flows.flow(
        bj.invert(bj.chain(bj.actnorm(2), bj.lu(2))), distributions.diagonal_normal((2,))
    )
    params = flow.init(jax.random.key(0), x)
    z, _ = flow.inverse(params, x)
    np.testing.assert_allclose(z.std(0), 1, rtol=1e-4)
    np.testing.assert_allclose(params["base"]["mean"], 0, atol=1e-4)
    np.testing.assert_allclose(params["base"]["log_std"], 0, atol=1e-4)


def test_options_are_checked_at_construction_and_integers_refused():
    for call, message in [
        (lambda: flows.real_nvp((2,), depth=0), "depth >= 1, got 0"),
        (lambda: flows.real_nvp((0,)), r"positive sizes, got \[0\]"),
        (lambda: flows.real_nvp((2,), hidden=()), "at least one hidden width"),
        (lambda: flows.real_nvp((2,), max_log_scale=0.0), "max_log_scale > 0"),
        (lambda: flows.real_nvp((2,), reversible=3), "reversible=k to divide depth=8, got 3"),
        (
            lambda: flows.neural_spline((2,), bins=1),
            "bins to be a whole number of at least 2, got 1",
        ),
        (lambda: flows.neural_spline((2,), bound=0.0), "bound > 0, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for wrong in ((2.5,), 2):
        with pytest.raises(TypeError, match=r"expected an event_shape such as \(3,\), got"):
            flows.real_nvp(wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'layers'"):
        flows.real_nvp((2,), layers=3)

    flow, none = flows.real_nvp((2,), depth=2, hidden=(4,)), {"bijector": {}, "base": {}}
    for call in (
        lambda: flow.init(jax.random.key(0), np.ones((3, 2), int)),
        lambda: flow.log_prob(none, np.ones((3, 2), int)),
        lambda: flow.log_prob(none, np.ones((3, 2), bool)),
    ):
        with pytest.raises(TypeError, match="expected x in floats"):
            call()
    with pytest.raises(ValueError, match="got a scalar"):
        flow.log_prob(none, 1.0)
    with pytest.raises(TypeError, match="an array of floats, .*numpy.asarray"):
        flow.init(jax.random.key(0), np.ones((3, 2), object))
    for bad, message in [
        (np.zeros((0, 2)), "at least one row of x, got \\[0, 2\\]"),
        (np.array([[0.0, 1.0], [2.0, np.nan]]), "got 1 that are not, the first nan in row 1"),
        (np.array([[0.0, 1e300], [2.0, 3.0]]), r"the first inf in row 0 \(as float32\)"),
    ]:
        with pytest.raises(ValueError, match=message), np.errstate(over="ignore"):
            flow.init(jax.random.key(0), bad)
    labeled = flows.real_nvp((2,), depth=2, hidden=(4,), embed=nn.Embed(3, 2))
    with pytest.raises(ValueError, match="expected cond for Embed, got None"):
        labeled.init(jax.random.key(0), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="embed"):  # labels without an embedding
        flow.init(jax.random.key(0), jnp.ones((3, 2)), jnp.arange(3))


def test_samples_take_the_type_of_the_params():
    """Under jax_enable_x64 a base without parameters would draw float64 for a float32 flow."""
    flow = flows.real_nvp((2,), depth=2, hidden=(4,))
    params = jax.eval_shape(flow.init, jax.random.key(0), jnp.ones((1, 2)))
    with jax.enable_x64(True):
        sample = jax.eval_shape(lambda p, key: flow.sample(p, key, 3), params, jax.random.key(0))
    assert sample.dtype == jnp.float32
