"""What is special to autoregressive maps: the triangle, the passes, what the inverse reports, its
gradient, the peers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import bijectors as bj
from jflow import flows, nets
from jflow._core.implicit import fixed_point
from jflow.types import Elementwise

AFFINE = bj.univariate.affine()
SPLINE = bj.univariate.rational_quadratic(4, 3.0)
X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)


def made(transformer, **options):
    return nets.MADE(transformer.size, (18,), activation=jnp.tanh, **options)


def with_noise(bijector, x, cond=None, scale=0.5):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(bijector.init, jax.random.key(0), x, cond)
    return jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(p.dtype), shapes)


def inverse(transformer, net, params, y, solver=None, **options):
    return jax.jit(
        lambda p, y: bj.autoregressive_inverse(transformer, net, p, y, solver=solver, **options)
    )(params, y)


@pytest.mark.parametrize("transformer", [AFFINE, SPLINE], ids=["affine", "spline"])
def test_starts_at_the_identity(transformer):
    bijector = bj.autoregressive(transformer, made(transformer))
    params = bijector.init(jax.random.key(0), X)
    for x, log_det in jax.jit(lambda p, x: (bijector.forward(p, x), bijector.inverse(p, x)))(
        params, X
    ):
        np.testing.assert_allclose(x, X, atol=1e-6)
        np.testing.assert_allclose(log_det, 0, atol=1e-5)


def test_the_jacobian_is_triangular_in_the_order():
    order = (3, 0, 5, 2, 1, 4)
    bijector = bj.autoregressive(AFFINE, made(AFFINE, order=order))
    params = with_noise(bijector, X)

    @jax.jit
    def jacobians(z):
        one = lambda apply: jax.jacrev(lambda x: apply(params, x[None])[0][0])(z)  # noqa: E731
        return one(bijector.forward), one(bijector.inverse)

    for jacobian in jacobians(X[0]):
        np.testing.assert_array_equal(np.asarray(jacobian)[np.ix_(order, order)] != 0, np.tri(6))


def test_the_network_runs_once_in_a_pass():
    """MADE of one hidden layer: 2 products. The inverse: one evaluation in its loop, one for the
    log-det."""
    bijector = bj.autoregressive(AFFINE, made(AFFINE))
    params = with_noise(bijector, X)
    assert str(jax.make_jaxpr(bijector.forward)(params, X)).count("dot_general") == 2
    program = str(jax.make_jaxpr(bijector.inverse)(params, X))
    assert program.count("dot_general") == 4 and program.count("while[") == 1


@pytest.mark.parametrize(
    "solver", [bj.jacobi(), bj.jacobi(tol=0.0), bj.sequential()], ids=["jacobi", "0", "sequential"]
)
def test_every_solver_returns_what_solving_one_number_after_another_does(solver, x64):
    """By hand: number i from the numbers before it, in float64."""
    y = X.astype(float)
    params = with_noise(bj.autoregressive(SPLINE, made(SPLINE)), y)
    apply = jax.jit(
        lambda x: SPLINE.inverse(y, made(SPLINE).apply({"params": params["net"]}, x))[0]
    )
    x = np.zeros_like(y)
    for i in range(6):
        x[:, i] = apply(x)[:, i]
    found, log_det, info = inverse(SPLINE, made(SPLINE), params, y, solver)
    np.testing.assert_allclose(found, x, atol=1e-13)  # 32 units of rounding are 7e-15
    assert np.all(info.converged) and info.passes <= 7 and np.all(info.residual < 1e-14)
    forward = bj.autoregressive(SPLINE, made(SPLINE)).forward(params, found)
    np.testing.assert_allclose(forward[0], y, atol=1e-13)
    np.testing.assert_allclose(forward[1], -log_det, atol=1e-13)


def test_passes_are_those_of_the_graph():
    """A coupling takes two, and a third sees nothing change; so does Jacobi when told nothing."""
    split = np.zeros((6, 6), bool)
    split[3:, :3] = True
    net = made(AFFINE, adjacency=split)
    params = with_noise(bj.autoregressive(AFFINE, net), X)
    x, _, info = inverse(AFFINE, net, params, X, bj.sequential(), passes=nets.longest_path(split))
    assert info.passes == 3 and np.all(info.converged)
    again, _, info = inverse(AFFINE, net, params, X)
    assert info.passes == 3
    np.testing.assert_array_equal(x, again)
    net = made(AFFINE)
    assert (
        inverse(AFFINE, net, with_noise(bj.autoregressive(AFFINE, net), X), X, bj.sequential())[
            2
        ].passes
        == 7
    )


def test_a_row_that_has_settled_stays():
    """Row 0 moves by half the tolerance in every evaluation, row 1 halves its distance to 1; each
    by the rule of its own."""
    tol = 1e-3

    def g(x, args):
        return jnp.stack([x[0] + 0.5 * tol, 0.5 * (x[1] + 1)])

    found = jax.jit(lambda x: fixed_point(g, x, (), tol=tol, max_evaluations=50))(jnp.zeros((2, 1)))
    np.testing.assert_allclose(found.x[0], 0.5 * tol, rtol=1e-6)
    assert found.evaluations == 9  # the first n with 2^-n <= tol (2 - 2^(1 - n))
    np.testing.assert_allclose(found.x[1], 1 - 2.0**-9, rtol=1e-6)
    np.testing.assert_allclose(
        found.change, [0.5 * tol, 2.0**-9 / (2 - 2.0**-8)], rtol=1e-3
    )  # of float32 at 1


class Leaky(nn.Module):
    """Every raw number depends on every input: not causal."""

    @nn.compact
    def __call__(self, x, cond=None):
        return nn.Dense(2 * x.shape[-1])(x).reshape(*x.shape, 2)


def test_rows_that_do_not_converge_are_nan_and_say_so():
    """Too small a budget; numbers without a preimage; weights that are not numbers; a net that is
    not causal. Other rows are not touched."""
    net = made(AFFINE)
    params = with_noise(bj.autoregressive(AFFINE, net), X, scale=2.0)
    good = inverse(AFFINE, net, params, X)
    assert np.all(good[2].converged) and np.all(np.isfinite(good[0]))
    x, log_det, info = inverse(AFFINE, net, params, X, bj.jacobi(max_passes=2))
    assert (
        info.passes == 2
        and not np.any(info.converged)
        and np.all(np.isnan(x))
        and np.all(np.isnan(log_det))
    )
    bad = X.copy()
    bad[1, 2], bad[3, 0] = np.nan, np.inf
    assert (
        inverse(AFFINE, net, params, bad)[2].passes <= good[2].passes
    )  # they do not keep the others waiting
    for x, log_det, info in (
        inverse(AFFINE, net, params, bad),
        inverse(AFFINE, net, params, bad, bj.sequential()),
    ):
        np.testing.assert_array_equal(info.converged, [True, False, True, False, True])
        np.testing.assert_array_equal(np.isnan(log_det), ~info.converged)
        np.testing.assert_array_equal(np.isnan(x).all(1), ~info.converged)
        np.testing.assert_allclose(x[::2], good[0][::2], rtol=1e-5, atol=1e-5)
    broken = jax.tree.map(lambda p: p * np.float32(np.nan), params)
    assert not np.any(inverse(AFFINE, net, broken, X)[2].converged)
    params = with_noise(bj.autoregressive(AFFINE, Leaky()), X, scale=2.0)
    for solver in (bj.jacobi(), bj.sequential()):
        assert not np.all(inverse(AFFINE, Leaky(), params, X, solver)[2].converged)


def test_numbers_that_run_away_before_their_turn_harm_nobody():
    """x_i = exp(x_{i-1}) z_i + ...: the iterates of 30 numbers leave float32 long before they
    settle."""

    def exponential(x, raw):
        return x * jnp.exp(-raw[..., 0]) - raw[..., 1], -raw[..., 0]

    def back(y, raw):
        return (y + raw[..., 1]) * jnp.exp(raw[..., 0]), raw[..., 0]

    class Previous(nn.Module):
        @nn.compact
        def __call__(self, x, cond=None):
            weight = self.param("weight", nn.initializers.ones, (2,))
            mixed = x @ jnp.eye(
                x.shape[-1], k=1, dtype=x.dtype
            )  # a masked product, where 0 * inf would be NaN
            return jnp.stack([mixed * weight[0], mixed * weight[1]], axis=-1)

    transformer = Elementwise(2, exponential, back)
    z = np.concatenate([np.full((3, 1), -2.0), np.full((3, 29), -1.0)], axis=1).astype(np.float32)
    params = {"net": {"weight": jnp.asarray([1.0, 0.3])}}
    y, _ = bj.autoregressive(transformer, Previous()).forward(params, z)
    start = np.where(np.arange(30) == 0, y, 60.0).astype(np.float32)  # all but the first far off

    def solver(step, y, args, passes):
        return bj.jacobi()(step, jnp.asarray(start), args, passes)

    x, _, info = inverse(transformer, Previous(), params, y, solver)
    assert np.all(info.converged) and info.passes > 5
    np.testing.assert_allclose(x, z, rtol=1e-4)
    overflown = jax.jit(
        lambda x: transformer.inverse(y, Previous().apply({"params": params["net"]}, x))[0]
    )(start)
    assert np.max(np.abs(overflown)) > 1e20


def test_the_gradient_of_the_inverse_is_that_of_the_unrolled_one(x64):
    """With respect to y, params and cond; of cotangents as small as those of a mean over a large
    batch."""
    net, y, cond = made(SPLINE), X.astype(float), X[:, :2].astype(float)
    params = with_noise(bj.autoregressive(SPLINE, net), y, cond)

    def unrolled(params, y, cond):
        def again(x, _):
            return SPLINE.inverse(y, net.apply({"params": params["net"]}, x, cond))

        x, log_slopes = jax.lax.scan(again, y, length=6)
        return x, log_slopes[-1].sum(1)

    def scalar(apply, scale):
        def value(*args):
            x, log_det = apply(*args)
            return scale * (jnp.sum(jnp.sin(x)) + jnp.sum(log_det**2))

        return jax.grad(value, argnums=(0, 1, 2))

    expected = jax.jit(scalar(unrolled, 1.0))(params, y, cond)
    for solver in (bj.jacobi(), bj.sequential()):
        ours = bj.autoregressive(SPLINE, net, solver=solver).inverse
        got = jax.jit(scalar(ours, 1e-9))(params, y, cond)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(1e9 * np.asarray(a), b, atol=1e-10, rtol=1e-8)


def test_labels_and_dropout_go_through_the_loop():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, cond=None):
            h = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(
                jnp.tril(jnp.ones((6, 6)), -1)
            )
            return (x @ h.T)[..., None] + nn.Embed(3, 6)(cond)[..., None]

    bijector = bj.autoregressive(bj.univariate.shift(), Net())
    cond, params = np.arange(5) % 3, None
    params = bijector.init(jax.random.key(0), X, cond)

    @jax.jit
    def run(params, key):
        x, _ = bijector.forward(params, X, cond, key=key)
        grads = jax.grad(lambda p: jnp.sum(bijector.inverse(p, X, cond, key=key)[0] ** 2))(params)
        return x, bijector.inverse(params, x, cond, key=key)[0], grads

    (x, back, grads), (other, *_) = run(params, jax.random.key(1)), run(params, jax.random.key(2))
    np.testing.assert_allclose(back, X, atol=1e-4)
    assert np.any(x != other) and np.any(grads["net"]["Embed_0"]["embedding"] != 0)


def test_it_is_flowjaxs_masked_autoregressive_flow(x64):
    """Equal weights and its softplus scale, float64: value, log-det and inverse."""
    import paramax
    from flowjax.bijections import Affine, MaskedAutoregressive

    d, c, each = 4, 3, 2
    x, cond = (np.random.default_rng(i).normal(size=(6, n)) for i, n in enumerate((d, c)))
    with jax.numpy_rank_promotion("allow"):
        options = {
            "dim": d,
            "cond_dim": c,
            "nn_width": d * each,
            "nn_depth": 1,
            "nn_activation": jnp.tanh,
        }
        theirs = MaskedAutoregressive(jax.random.key(0), transformer=Affine(), **options)
        theirs = paramax.unwrap(theirs)
        expected = jax.vmap(theirs.transform_and_log_det)(jnp.asarray(x), jnp.asarray(cond))
        back = jax.vmap(theirs.inverse_and_log_det)(jnp.asarray(x), jnp.asarray(cond))
    units = np.arange(d * each).reshape(each, d).T.reshape(-1)
    first, head = (
        (np.asarray(layer.weight).T, np.asarray(layer.bias))
        for layer in theirs.masked_autoregressive_mlp.layers
    )
    params = {
        "kernel_0": first[0][:, units],
        "bias_0": first[1][units],
        "kernel_head": head[0][units],
        "bias_head": head[1],
    }

    def scale(raw):
        return jax.nn.softplus(raw[..., 1] + np.log(np.expm1(1.0)))

    softplus = Elementwise(
        2,
        lambda x, raw: (x * scale(raw) + raw[..., 0], jnp.log(scale(raw))),
        lambda y, raw: ((y - raw[..., 0]) / scale(raw), -jnp.log(scale(raw))),
    )
    bijector = bj.autoregressive(softplus, nets.MADE(2, (d * each,), activation=jnp.tanh))
    ours = jax.jit(
        lambda: (
            bijector.forward({"net": params}, x, cond),
            bijector.inverse({"net": params}, x, cond),
        )
    )()
    for got, wanted in zip(ours, (expected, back), strict=True):
        np.testing.assert_allclose(got[0], wanted[0], atol=1e-12)
        np.testing.assert_allclose(got[1], wanted[1], atol=1e-12)


def test_a_trained_spline_flow_samples_in_a_fraction_of_the_passes():
    """24 numbers that share 3 causes, 2 layers, 150 steps; experiments/fast_autoregressive_inverse
    has digits."""
    d, depth, hidden = 24, 2, (48,)
    rng = np.random.default_rng(0)
    causes, noise = (
        rng.normal(size=(512, 3)) @ rng.normal(size=(3, d)),
        0.3 * rng.normal(size=(512, d)),
    )
    rows = (np.tanh(causes) + noise).astype(np.float32)
    sizes = {"depth": depth, "hidden": hidden, "bins": 4, "bound": 4.0}
    model = flows.neural_spline_autoregressive((d,), **sizes, linear=False, standardize=False)
    optimizer = optax.adam(5e-3)
    params = model.init(jax.random.key(0), rows[:2])

    def loss(params, x):
        return -jnp.mean(model.log_prob(params, x))

    @jax.jit
    def fit(params):
        def step(carry, start):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(
                params, jax.lax.dynamic_slice_in_dim(rows, start, 64)
            )
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        starts = 64 * (np.arange(150) % 8)
        (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), starts)
        return params, values

    params, values = fit(params)
    assert values[-1] < values[0] - 3  # nats: it has learned to depend on what comes before
    transformer = bj.univariate.rational_quadratic(4, 4.0)
    net = nets.MADE(transformer.size, hidden)
    z = jax.random.normal(jax.random.key(1), (64, d))

    def draw(solver):
        def layer(z, p):
            x, _, info = bj.autoregressive_inverse(transformer, net, p, z, solver=solver)
            return x[:, ::-1], (info.passes, info.converged)

        return jax.lax.scan(layer, z, params["bijector"]["stacked"]["1"], reverse=True)

    @jax.jit
    def run():
        return draw(bj.sequential()), draw(bj.jacobi(1e-5)), model.forward(params, z)[0]

    (slow, (slow_passes, _)), (fast, (passes, converged)), flow = run()
    assert np.all(converged) and np.all(slow_passes == d + 1)
    np.testing.assert_allclose(fast, slow, atol=1e-4)  # ten times the tolerance: 2 layers
    np.testing.assert_allclose(flow, slow, atol=1e-4)
    assert np.sum(passes) <= depth * d / 2


def test_bad_configurations_are_errors():
    with pytest.raises(
        ValueError, match=r"MADE to return raw numbers of shape \[5, 6, 11\], got \[5, 6, 2\]"
    ):
        bj.autoregressive(SPLINE, made(AFFINE)).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="tol >= 0, got -1"):
        bj.jacobi(tol=-1)
    with pytest.raises(ValueError, match="max_passes >= 1, got 0"):
        bj.jacobi(max_passes=0)
    bijector = bj.autoregressive(AFFINE, made(AFFINE), passes=0)
    with pytest.raises(ValueError, match="passes >= 1, got 0"):
        bijector.inverse(bijector.init(jax.random.key(0), X), X)
