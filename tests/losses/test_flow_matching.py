import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import couplings, losses, paths, types

MEAN, STD = 1.5, 0.5


def as_velocity(apply):
    return types.Velocity(lambda *args: {}, apply)


def gaussian_velocity(params, x, t, cond=None, *, key=None):
    """Marginal velocity of the linear path to N(MEAN, STD^2), plus an offset."""
    t = t[:, None]
    slope = (t * STD**2 - (1 - t)) / ((1 - t) ** 2 + (t * STD) ** 2)
    return MEAN + slope * (x - t * MEAN) + params["offset"]


def recorder():
    """A velocity that notes what it was called with (eagerly) and returns zeros."""
    seen = {}

    def apply(params, x, t, cond=None, *, key=None):
        seen.update(x=x, t=t, cond=cond, key=key)
        return jnp.zeros_like(x)

    return as_velocity(apply), seen


def at(time):
    return lambda key, n: jnp.full((n,), time)


def test_irreducible_loss_of_a_gaussian():
    """At the marginal velocity of data of standard deviation c the loss is int c^2 / ((1-t)^2 + c^2
    t^2) dt = pi c / 2."""
    n = 20_000
    x = MEAN + STD * jax.random.normal(jax.random.key(1), (n, 1))
    loss = jax.jit(losses.flow_matching(as_velocity(gaussian_velocity)))
    value, metrics = loss({"offset": jnp.zeros(())}, jax.random.key(0), {"x": x})
    assert metrics == {}
    # 4 standard errors; the squared residual has a standard deviation below 1.6
    np.testing.assert_allclose(value, np.pi * STD / 2, atol=4 * 1.6 / np.sqrt(n))
    # an offset of 1 adds 1, and the gradient of the offset is 2 there, 0 at the optimum, for the
    # same reason
    grad = jax.grad(lambda p: loss(p, jax.random.key(0), {"x": x})[0])
    np.testing.assert_allclose(
        grad({"offset": jnp.zeros(())})["offset"], 0, atol=4 * 2 * 0.9 / np.sqrt(n)
    )
    np.testing.assert_allclose(
        grad({"offset": jnp.ones(())})["offset"], 2, atol=4 * 2 * 0.9 / np.sqrt(n)
    )


def test_value_by_hand():
    x1, x0 = jnp.asarray([[1.0, 2.0], [3.0, 5.0]]), jnp.asarray([[0.0, 1.0], [1.0, 1.0]])
    velocity = as_velocity(lambda params, x, t, cond=None, *, key=None: params * x)
    loss = losses.flow_matching(velocity, time=at(0.25))
    value, _ = loss(jnp.asarray(2.0), jax.random.key(0), {"x": x1, "x0": x0})
    x_t = 0.75 * x0 + 0.25 * x1
    np.testing.assert_allclose(value, np.mean((2 * x_t - (x1 - x0)) ** 2), rtol=1e-6)


def test_tiling_the_event_leaves_the_loss():
    k1, k2 = jax.random.split(jax.random.key(0))
    x, x0 = jax.random.normal(k1, (8, 3)), jax.random.normal(k2, (8, 3))
    velocity = as_velocity(lambda params, x, t, cond=None, *, key=None: jnp.tanh(x))
    loss = losses.flow_matching(velocity)
    one, _ = loss({}, jax.random.key(1), {"x": x, "x0": x0})
    four, _ = loss({}, jax.random.key(1), {"x": jnp.tile(x, (1, 4)), "x0": jnp.tile(x0, (1, 4))})
    np.testing.assert_allclose(one, four, rtol=1e-6)
    image, _ = loss({}, jax.random.key(1), {"x": x.reshape(8, 3, 1), "x0": x0.reshape(8, 3, 1)})
    np.testing.assert_allclose(one, image, rtol=1e-6)


def test_weights_are_a_weighted_mean():
    k1, k2 = jax.random.split(jax.random.key(0))
    x, x0 = jax.random.normal(k1, (6, 3)), jax.random.normal(k2, (6, 3))
    loss = losses.flow_matching(recorder()[0], time=at(0.5))
    weight = jnp.asarray([0.0, 1.0, 2.0, 0.0, 1.0, 4.0])
    value, _ = loss({}, jax.random.key(1), {"x": x, "x0": x0, "weight": weight})
    rows = np.mean((x1_minus_x0 := np.asarray(x - x0)) * x1_minus_x0, axis=1)
    np.testing.assert_allclose(value, np.sum(weight * rows) / np.sum(weight), rtol=1e-6)


def test_the_coupling_moves_labels_conditions_and_weights():
    x, x0 = jnp.arange(4.0)[:, None] + 10, jnp.arange(4.0)[:, None]
    cond = {"label": jnp.arange(4), "scale": jnp.arange(8.0).reshape(4, 2)}
    i, j = jnp.asarray([1, 1, 0, 3]), jnp.asarray([3, 2, 1, 0])
    velocity, seen = recorder()
    pair = couplings.pair(lambda key, x0, x1, cond=None: (i, j))
    loss = losses.chain(pair, losses.flow_matching(velocity, time=at(0.5)))
    weight = jnp.asarray([1.0, 3.0, 2.0, 5.0])
    value, _ = loss({}, jax.random.key(0), {"x": x, "x0": x0, "cond": cond, "weight": weight})
    np.testing.assert_array_equal(seen["x"], (x0[i] + x[j]) / 2)
    np.testing.assert_array_equal(seen["cond"]["label"], j)
    np.testing.assert_array_equal(seen["cond"]["scale"], cond["scale"][j])
    np.testing.assert_allclose(value, np.sum(weight[j] * (x[j] - x0[i])[:, 0] ** 2) / 11, rtol=1e-6)


def test_the_independent_coupling_gathers_nothing():
    loss = losses.chain(
        couplings.pair(couplings.independent()),
        losses.flow_matching(as_velocity(gaussian_velocity)),
    )
    batch = {"x": jnp.zeros((4, 1)), "weight": jnp.ones((4,))}
    assert "gather" not in str(
        jax.make_jaxpr(lambda k: loss({"offset": 0.0}, k, batch))(jax.random.key(0))
    )


def test_source_times_and_dropout_have_their_own_keys():
    velocity, seen = recorder()
    x = jnp.zeros((4096, 1))
    losses.flow_matching(velocity, time=at(0.0))({}, jax.random.key(0), {"x": x})
    noise, first = seen["x"], dict(seen)  # at t=0, x_t is the source
    # mean and variance of a standard normal, 4 standard errors
    np.testing.assert_allclose([noise.mean(), noise.var()], [0, 1], atol=4 * np.sqrt(2 / 4096))
    losses.flow_matching(velocity)({}, jax.random.key(0), {"x": x})
    assert abs(np.corrcoef(seen["t"], noise[:, 0])[0, 1]) < 4 / np.sqrt(4096)
    losses.flow_matching(velocity, time=at(0.0))({}, jax.random.key(1), {"x": x})
    assert not np.allclose(noise, seen["x"])
    assert not np.array_equal(jax.random.key_data(first["key"]), jax.random.key_data(seen["key"]))


def test_drop_replaces_rows_by_null():
    n = 4000
    cond = {"label": jnp.arange(n) % 10, "vector": jnp.ones((n, 3))}
    null = {"label": 10, "vector": jnp.asarray([0.0, -1.0, -2.0])}
    velocity, seen = recorder()
    batch = {"x": jnp.zeros((n, 2)), "cond": cond}
    for drop in (0.0, 0.25, 1.0):
        losses.chain(losses.drop_cond(drop, null=null), losses.flow_matching(velocity))(
            {}, jax.random.key(0), batch
        )
        dropped = np.asarray(seen["cond"]["label"]) == 10
        # 4 standard errors of a frequency
        np.testing.assert_allclose(dropped.mean(), drop, atol=4 * np.sqrt(drop * (1 - drop) / n))
        np.testing.assert_array_equal(seen["cond"]["label"][~dropped], cond["label"][~dropped])
        np.testing.assert_array_equal(seen["cond"]["vector"][~dropped], cond["vector"][~dropped])
        np.testing.assert_array_equal(
            seen["cond"]["vector"], np.where(dropped[:, None], null["vector"], 1.0)
        )
        assert seen["cond"]["label"].dtype == cond["label"].dtype
        if drop == 0.25:  # rows drop one by one, not as a prefix, and not with their times
            np.testing.assert_allclose(
                dropped[: n // 2].mean(), drop, atol=4 * np.sqrt(drop * (1 - drop) * 2 / n)
            )
            assert abs(np.corrcoef(seen["t"], dropped)[0, 1]) < 4 / np.sqrt(n)


def test_bfloat16_data():
    velocity, seen = recorder()
    value, _ = losses.flow_matching(velocity)(
        {}, jax.random.key(0), {"x": jnp.ones((8, 2), jnp.bfloat16)}
    )
    assert (
        seen["x"].dtype == jnp.bfloat16
        and seen["t"].dtype == jnp.float32
        and value.dtype == jnp.float32
    )


def test_float32_data_stay_float32_beside_float64(x64):
    velocity, seen = recorder()
    value, _ = losses.flow_matching(velocity)(
        {}, jax.random.key(0), {"x": jnp.ones((8, 2), jnp.float32)}
    )
    assert (
        seen["x"].dtype == jnp.float32
        and seen["t"].dtype == jnp.float32
        and value.dtype == jnp.float32
    )


def test_a_stochastic_path_sees_one_key_twice():
    keys = []

    def at_key(x0, x1, t, *, key=None):
        keys.append(key)
        return x1

    losses.flow_matching(recorder()[0], path=types.Path(at_key, at_key))(
        {}, jax.random.key(0), {"x": jnp.zeros((2, 1))}
    )
    np.testing.assert_array_equal(*(jax.random.key_data(key) for key in keys))


def test_one_trace():
    traces = []

    def apply(params, x, t, cond=None, *, key=None):
        traces.append(1)
        return x

    loss = jax.jit(losses.flow_matching(as_velocity(apply)))
    loss({}, jax.random.key(0), {"x": jnp.zeros((4, 2))})
    loss({}, jax.random.key(1), {"x": jnp.ones((4, 2))})
    assert len(traces) == 1


def test_errors():
    velocity = recorder()[0]
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"p in \[0, 1\]"):
            losses.drop_cond(p, null=0)
    loss, key, x = losses.flow_matching(velocity), jax.random.key(0), jnp.zeros((4, 2))
    loss = losses.chain(losses.drop_cond(0.5, null=3), loss)
    for batch, message in [
        ({"x": x}, "drop_cond: expected 'cond' in batch"),
        ({"cond": jnp.arange(4)}, "under 'x'"),
        (
            {"x": x, "cond": x, "label": jnp.arange(4)},
            r"unknown keys in batch: \['label'\]; allowed are \['x', 'x0', 'cond'",
        ),
        ({"x": x.astype(jnp.uint8), "cond": x}, "floating type, got uint8"),
        ({"x": x, "cond": x, "x0": x[:3]}, r"\[4, 2\], got \[3, 2\]"),
        (
            {"x": x, "cond": x, "weight": jnp.ones((4, 1))},
            r"'weight' of shape \[4\] or \[4, 2\], got \[4, 1\]",
        ),
        ({"x": x, "cond": jnp.arange(3)}, r"lead with 4 rows, got shape \[3\]"),
        ({"x": x, "cond": jnp.zeros((4, 2))}, None),
        ({"x": x, "cond": {"label": jnp.arange(4)}}, "one row of cond"),
    ]:
        if message is None:  # a number fills a vector condition
            loss({}, key, batch)
            continue
        with pytest.raises(ValueError, match=message):
            loss({}, key, batch)
    wide = as_velocity(lambda params, x, t, cond=None, *, key=None: x[:, :1])
    with pytest.raises(ValueError, match=r"velocity of shape \[4, 2\], got \[4, 1\]"):
        losses.flow_matching(wide)({}, key, {"x": x})


def test_other_paths():
    """A path is a pair of functions: the loss asks nothing else of it."""
    schedule = paths.Schedule(alpha=lambda t: t**2, sigma=lambda t: 1 - t)
    velocity, seen = recorder()
    x, x0 = jnp.ones((2, 3)), jnp.zeros((2, 3))
    value, _ = losses.flow_matching(velocity, path=paths.affine(schedule), time=at(0.5))(
        {}, jax.random.key(0), {"x": x, "x0": x0}
    )
    np.testing.assert_allclose(seen["x"], 0.25 * x)
    np.testing.assert_allclose(value, 1.0)  # alpha' = 2t = 1
