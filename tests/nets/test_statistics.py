"""Normalizations by statistics over batches: formulas, gradients of their own, how statistics run
along, and that samples don't depend on their neighbors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jflow
from jflow import losses, nets, train

B, N, WIDTH = 5, 3, 4
RNG = np.random.default_rng(0)
X, G = RNG.normal(size=(2, B, N, WIDTH)) * 1.5 + 0.3
MEAN, SQUARE, SMALL, OTHER = RNG.uniform(0.5, 2.0, size=(4, WIDTH)) * np.array(
    [[1], [1], [0.1], [0.1]]
)
WINDOW = RNG.normal(size=(2, 4, WIDTH)) * 0.1
EPSILON = 1e-5


def run(module, old):
    """In float64, as one program: (y, the gradient in x along G, the statistics after a batch) in
    training, y in evaluation, y of the first two rows in evaluation, and y without statistics."""
    with jax.enable_x64(True):
        old = {name: jnp.asarray(value) for name, value in {**old, "calls": np.zeros(())}.items()}

        @jax.jit
        def program(x, g, old):
            def training(x, old):
                return module.apply({"params": nets.with_statistics({}, old, training=True)}, x)

            y, back = jax.vjp(training, x, old)
            evaluated = {"params": nets.with_statistics({}, old)}
            whole, part = module.apply(evaluated, x), module.apply(evaluated, x[:2])
            _, tangent = jax.jvp(lambda x: module.apply(evaluated, x), (x,), (g,))
            return (y, *back(g)), (whole, part, tangent), module.apply({}, x)

        found = jax.device_get(program(jnp.asarray(X), jnp.asarray(G), old))
    np.testing.assert_allclose(found[1][1], found[1][0][:2], atol=1e-12)
    assert np.isfinite(found[1][2]).all() and float(found[0][2]["calls"]) == 1
    return found


def mean(x):
    return x.mean((0, 1))


def test_batch_norm():
    (y, dx, new), (evaluated, *_), plain = run(
        nets.BatchNorm(affine=False), {"mean": MEAN, "variance": SQUARE}
    )
    z = (X - mean(X)) / np.sqrt(mean((X - mean(X)) ** 2) + EPSILON)
    np.testing.assert_allclose(y, z, atol=1e-12)
    np.testing.assert_allclose(plain, z, atol=1e-12)
    scale = 1 / np.sqrt(mean((X - mean(X)) ** 2) + EPSILON)
    expected = scale * (G - mean(G) - z * mean(G * z))  # the derivative through both moments
    np.testing.assert_allclose(dx, expected, atol=1e-12)
    np.testing.assert_allclose(new["mean"], 0.9 * MEAN + 0.1 * mean(X), atol=1e-12)
    variance = 0.9 * SQUARE + 0.1 * X.reshape(-1, WIDTH).var(0)
    np.testing.assert_allclose(new["variance"], variance, atol=1e-12)
    np.testing.assert_allclose(evaluated, (X - MEAN) / np.sqrt(SQUARE + EPSILON), atol=1e-12)


def test_power_norm_goes_back_by_the_batch_and_forward_by_the_past():
    (y, dx, new), (evaluated, *_), plain = run(
        nets.PowerNorm(groups=None, affine=False), {"square": SQUARE, "gradient": SMALL}
    )
    z = X / np.sqrt(SQUARE + EPSILON)
    np.testing.assert_allclose(y, z, atol=1e-12)
    np.testing.assert_allclose(evaluated, z, atol=1e-12)  # linear in x
    np.testing.assert_allclose(plain, X / np.sqrt(mean(X**2) + EPSILON), atol=1e-12)
    np.testing.assert_allclose(dx, (G - SMALL * z) / np.sqrt(mean(X**2) + EPSILON), atol=1e-12)
    np.testing.assert_allclose(new["square"], 0.9 * SQUARE + 0.1 * mean(X**2), atol=1e-12)
    expected = SMALL * (1 - 0.1 * mean(z**2)) + 0.1 * mean(G * z)
    np.testing.assert_allclose(new["gradient"], expected, atol=1e-12)


def test_power_norm_sees_tokens_whose_groups_have_root_mean_square_one():
    """The gradient is its own one, carried through that scaling."""
    (y, dx, new), (evaluated, *_), _ = run(
        nets.PowerNorm(groups=2, affine=False), {"square": SQUARE, "gradient": SMALL}
    )
    groups = lambda a: a.reshape(B, N, 2, 2)  # noqa: E731
    size = np.sqrt((groups(X) ** 2).mean(-1, keepdims=True) + EPSILON)
    scaled = (groups(X) / size).reshape(X.shape)
    z = scaled / np.sqrt(SQUARE + EPSILON)
    np.testing.assert_allclose(y, z, atol=1e-12)
    np.testing.assert_allclose(evaluated, z, atol=1e-12)
    np.testing.assert_allclose(new["square"], 0.9 * SQUARE + 0.1 * mean(scaled**2), atol=1e-12)
    slope = groups((G - SMALL * z) / np.sqrt(mean(scaled**2) + EPSILON))
    inner = (slope * groups(X)).mean(-1, keepdims=True)
    expected = slope / size - groups(X) * inner / size**3
    np.testing.assert_allclose(dx, expected.reshape(X.shape), atol=1e-12)


@pytest.mark.parametrize("outlier", [1e3, 1 + 1e-9])
def test_unified_norm_is_a_geometric_mean_but_for_outliers(outlier):
    logs, gradients = WINDOW
    (y, dx, new), (evaluated, *_), _ = run(
        nets.UnifiedNorm(outlier=outlier, affine=False),
        {"log_squares": logs, "gradients": gradients},
    )
    own = np.log(mean(X**2) + EPSILON)
    window = np.concatenate([logs[1:], own[None]])
    square = np.exp(window.mean(0)) if outlier > 2 else mean(X**2)
    z = X / np.sqrt(square + EPSILON)
    np.testing.assert_allclose(y, z, atol=1e-12)
    np.testing.assert_allclose(new["log_squares"], window, atol=1e-12)
    held = np.concatenate([gradients[1:], mean(G * z)[None]])
    np.testing.assert_allclose(new["gradients"], held, atol=1e-12)
    held = held.mean(0) if outlier > 2 else held[-1]
    np.testing.assert_allclose(dx, (G - held * z) / np.sqrt(square + EPSILON), atol=1e-12)
    # In evaluation it folds into the linear map that reads it.
    kernel = RNG.normal(size=(WIDTH, 2))
    folded = kernel / np.sqrt(np.exp(logs.mean(0)) + EPSILON)[:, None]
    np.testing.assert_allclose(evaluated @ kernel, X @ folded, atol=1e-12)


def test_online_norm_is_a_loop_over_rows():
    """Forward and backward a row at a time, by the statistics and the errors of the rows before."""
    decay, slow = 0.8, 0.7
    module = nets.OnlineNorm(decay, slow, affine=False)
    (y, dx, new), (evaluated, *_), _ = run(
        module, {"mean": MEAN, "variance": SQUARE, "u": SMALL, "v": OTHER}
    )
    m, s, u, v = MEAN, SQUARE, SMALL, OTHER
    for row, g, out, slope in zip(X, G, y, dx, strict=True):
        scale = 1 / np.sqrt(s + EPSILON)
        z = (row - m) * scale
        size = np.sqrt((z**2).mean(-1, keepdims=True) + EPSILON)
        np.testing.assert_allclose(out, z / size, atol=1e-12)
        g = g / size - z * (g * z).mean(-1, keepdims=True) / size**3  # through the last division
        g = g - (1 - slow) * v * z
        v = v + (g * z).mean(0)
        g = g * scale - (1 - slow) * u
        u = u + g.mean(0)
        np.testing.assert_allclose(slope, g, atol=1e-12)
        own = row.mean(0)
        s = decay * s + (1 - decay) * (row.var(0) + decay * (own - m) ** 2)
        m = decay * m + (1 - decay) * own
    for name, expected in {"mean": m, "variance": s, "u": u, "v": v}.items():
        np.testing.assert_allclose(new[name], expected, atol=1e-12)
    z = (X - MEAN) / np.sqrt(SQUARE + EPSILON)
    np.testing.assert_allclose(
        evaluated, z / np.sqrt((z**2).mean(-1, keepdims=True) + EPSILON), atol=1e-12
    )
    one = module.apply({}, jnp.asarray(X[:1], jnp.float32))  # a batch of one row trains
    assert np.isfinite(one).all()


def test_batch_channel_norm_has_groups_of_mean_zero_and_variance_one():
    x = jnp.asarray(X * np.array([1.0, 10.0, 0.1, 3.0]), jnp.float32)
    y = nets.BatchChannelNorm(groups=2, affine=False).apply({}, x)
    groups = np.asarray(y).reshape(B, N, 2, 2)
    np.testing.assert_allclose(groups.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(np.median(groups.var(-1)), 1, atol=1e-3)  # but for the epsilon
    assert groups.var(-1).max() <= 1


def network(norm):
    net = nets.TokenDiT(width=8, num_layers=2, num_heads=2, norm=norm, remat=True)
    velocity, x = jflow.velocity(net), jnp.asarray(X, jnp.float32)
    params = velocity.init(jax.random.key(0), x, 0.5)
    rng = np.random.default_rng(1)
    draw = lambda p: jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype)  # noqa: E731
    params = jax.tree.map(draw, params)
    return velocity, params, x, nets.init_statistics(net, params, x, jnp.zeros(B))


def test_statistics_of_a_scanned_network_run_along_with_its_training():
    """Three steps of `make_step`; at evaluation rows are independent, there is a forward mode, and
    the network is not the one of the first statistics."""
    velocity, params, x, first = network(nets.PowerNorm)
    loss = losses.flow_matching(velocity)
    optimizer = optax.sgd(0.0)
    step = train.make_step(
        nets.training_statistics(loss), optimizer, refresh=nets.update_statistics(loss)
    )
    state = train.init_state(params, optimizer, jax.random.key(1), frozen={"buffers": first})

    @jax.jit
    def program(state, x):
        state, _ = jax.lax.scan(lambda state, _: (step(state, {"x": x})[0], None), state, length=3)
        params = nets.with_statistics(state.params, state.frozen["buffers"])
        run = lambda x: velocity.apply(params, x, jnp.full(len(x), 0.5))  # noqa: E731
        at_first = velocity.apply(nets.with_statistics(params, first), x, 0.5)
        whole, tangent = jax.jvp(run, (x,), (x,))
        return state, whole, run(x[:2]), tangent, at_first

    state, whole, part, tangent, at_first = jax.device_get(program(state, x))
    np.testing.assert_allclose(part, whole[:2], atol=1e-5)
    assert np.isfinite(tangent).all() and np.abs(whole - at_first).max() > 1e-3
    statistics = state.frozen["buffers"]
    assert jax.tree.map(np.shape, statistics) == jax.tree.map(np.shape, first)
    for old, new in zip(jax.tree.leaves(first), jax.tree.leaves(statistics), strict=True):
        assert np.isfinite(new).all() and (new.ndim < 1 or new.shape == (2,) or (new != old).any())


def test_statistics_are_the_mean_over_the_calls_of_a_loss():
    """A loss that calls the network twice leaves the mean of what one call leaves; the last norm's
    mean is 0.1 times that of the tokens, which are found by the norm itself. None that is not
    called loses what it has."""
    velocity, params, x, first = network(nets.BatchNorm)
    marked = jax.tree.map(lambda a: a + 0.5 if a.ndim else a, first)

    def once(params, key, batch, frozen=None):
        return jnp.mean(velocity.apply(params, batch["x"], 0.5) ** 2), {}

    def twice(params, key, batch, frozen=None):
        other = velocity.apply(params, 2 * batch["x"], 0.5)
        return once(params, key, batch)[0] + jnp.mean(other**2), {}

    def never(params, key, batch, frozen=None):
        return jnp.zeros(()), {}

    @jax.jit
    def program(x):
        frozen, key = {"buffers": marked}, jax.random.key(0)
        after = lambda loss, x: nets.update_statistics(loss)(params, frozen, key, {"x": x})  # noqa: E731
        return [
            after(*pair)["buffers"] for pair in ((once, x), (once, 2 * x), (twice, x), (never, x))
        ]

    one, other, both, none = jax.device_get(program(x))
    halves = jax.tree.map(lambda a, b: (a + b) / 2, one, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both, halves)
    jax.tree.map(np.testing.assert_array_equal, none, jax.device_get(marked))
    assert np.abs(one["norm"]["mean"] - marked["norm"]["mean"]).max() > 1e-2


def test_what_is_missing_is_named():
    loss = nets.training_statistics(losses.flow_matching(network(nets.BatchNorm)[0]))
    with pytest.raises(ValueError, match="training_statistics: expected 'buffers' in frozen"):
        loss({}, jax.random.key(0), {"x": jnp.asarray(X)}, None)
    with pytest.raises(ValueError, match=r"OnlineNorm: expected gradient_decay in \(0, 1\)"):
        nets.OnlineNorm(gradient_decay=2)
