import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses
from jflow.losses._deep_supervision import deep_supervision
from jflow.nets._deepflow import Branches, DeepFlow, branch_field
from jflow.types import Field, Velocity


def as_field(function):
    return Field(
        lambda *args: {}, lambda params, x, t, cond=None, *, key=None: function(params, x, t, cond)
    )


def rows(n=16, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, 2))


def wide(t, x):
    return t.reshape(*t.shape, *(1,) * (x.ndim - t.ndim))


def test_the_last_branch_alone_is_flow_matching():
    net = lambda params, x, t: params["w"] * x + wide(t, x)  # noqa: E731
    field = as_field(lambda p, x, t, c: Branches(net(p, x, t), jnp.zeros_like(x[:, 1:])))
    plain = Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: net(p, x, t))
    params, batch, key = (
        {"w": jnp.array(0.4)},
        {"x": rows(), "weight": jnp.linspace(0.1, 1, 16)},
        jax.random.key(1),
    )
    found = deep_supervision(field, 3, early=0.0, acceleration=0.0)(params, key, batch)[0]
    np.testing.assert_allclose(found, losses.flow_matching(plain)(params, key, batch)[0], rtol=1e-6)


def test_branches_lie_on_one_line_within_the_gap():
    seen = {}

    def look(params, x, t, cond):
        seen.update(x=x, t=t)
        return Branches(jnp.zeros_like(x), jnp.zeros_like(x[:, 1:]))

    x1, x0 = rows(256), rows(256, 1)
    value, metrics = deep_supervision(as_field(look), 4, gap=0.05)(
        {}, jax.random.key(0), {"x": x1, "x0": x0}
    )
    t = np.asarray(seen["t"])
    gaps = np.diff(t, axis=1)
    assert t.shape == (256, 4) and np.all((t >= 0) & (t <= 1))
    assert (
        np.all(np.abs(gaps) <= 0.05 + 1e-6)
        and np.abs(gaps).max() > 0.045
        and gaps.min() < 0 < gaps.max()
    )
    expected = (1 - t)[..., None] * np.asarray(x0)[:, None] + t[..., None] * np.asarray(x1)[:, None]
    np.testing.assert_allclose(seen["x"], expected, atol=1e-5)
    # with zero predictions every term is known
    u2 = np.mean((x1 - x0) ** 2)
    missed = np.mean((expected[:, :-1] - np.asarray(x1)[:, None]) ** 2, axis=(0, 2)).sum()
    np.testing.assert_allclose(metrics["branches"], u2, rtol=1e-5)
    np.testing.assert_allclose(metrics["acceleration"], missed, rtol=1e-4)
    np.testing.assert_allclose(value, (1 + 3 * 0.2) * u2 + missed, rtol=1e-4)


def test_constant_acceleration_has_no_acceleration_loss():
    # the line x0 + t u seen by a branch that is off by a term linear in time: v(t) = u - (1 - t) a
    # / 2 misses what (1 - t)^2 a / 2 makes up for, exactly
    x1, x0, a = rows(), rows(seed=1), rows(seed=2)
    u = x1 - x0

    def apply(params, x, t, cond):
        v = u[:, None] - 0.5 * wide(1 - t, x) * a[:, None]
        return Branches(v, jnp.broadcast_to(a[:, None], (16, 2, 2)))

    _, metrics = deep_supervision(as_field(apply), 3)({}, jax.random.key(0), {"x": x1, "x0": x0})
    np.testing.assert_allclose(metrics["acceleration"], 0, atol=1e-10)


def test_second_order_motion_of_constant_acceleration():
    # what the expansion means on a trajectory x(t) = x0 + t v0 + t^2 a / 2: from any t1, v(t2) =
    # v(t1) + (t2 - t1) a and x(1) = x(t1) + h v(t1) + h^2 a / 2; a field that knows v and a has no
    # loss on the pair that the trajectory joins
    x0, v0, a, t1, t2 = rows(), rows(seed=1), rows(seed=2), 0.3, 0.8
    position = lambda t: x0 + t * v0 + t**2 / 2 * a  # noqa: E731
    v = lambda t: jax.jvp(position, (t,), (1.0,))[1]  # noqa: E731
    np.testing.assert_allclose(v(t2), v(t1) + (t2 - t1) * a, atol=1e-5)
    np.testing.assert_allclose(
        position(1.0), position(t1) + (1 - t1) * v(t1) + (1 - t1) ** 2 / 2 * a, atol=1e-5
    )


def test_the_best_acceleration_is_what_the_branch_left():
    # data N(0, 1) in one dimension: E[u | x_t] = (2 t - 1) / (t^2 + (1 - t)^2) x; a branch that
    # predicts half of it leaves a = 2 (E[u | x] - v) / (1 - t), a minimum of the loss in a
    def apply(params, x, t, cond):
        t = wide(t, x)
        best = (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
        left = best / (1 - t)[...]
        return Branches(0.5 * best, ((1 + params["by"]) * left + params["add"])[:, :-1])

    fixed = lambda key, n: jnp.full(n, 0.7)  # noqa: E731
    loss = deep_supervision(as_field(apply), 2, time=fixed, gap=0.1)
    x = jax.random.normal(jax.random.key(5), (100_000, 1))
    both = jax.jit(jax.value_and_grad(lambda p: loss(p, jax.random.key(0), {"x": x})[0]))
    zero = {"by": jnp.zeros(()), "add": jnp.zeros(())}
    value, slope = both(zero)
    for name in zero:
        np.testing.assert_allclose(slope[name], 0, atol=0.002)  # standard error about 3e-4
        for change in (-0.3, 0.3):
            assert both({**zero, name: jnp.array(change)})[0] > value


def test_gradients_reach_every_branch():
    field = branch_field(DeepFlow(patch_size=2, width=8, num_layers=3, branches=3, num_heads=2))
    x = jax.random.normal(jax.random.key(0), (4, 4, 4, 1))
    params = jax.jit(field.init)(jax.random.key(1), x, jnp.zeros(4))
    params = jax.tree.map(
        lambda p: p + 0.2 * np.random.default_rng(p.size).standard_normal(p.shape, np.float32),
        params,
    )
    slope = jax.jit(
        jax.grad(lambda p: deep_supervision(field, 3)(p, jax.random.key(2), {"x": x})[0])
    )(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(slope):
        # stacked leaves of the later branches: each of them
        parts = leaf if "rest" in jax.tree_util.keystr(path) else leaf[None]
        assert all(np.any(part != 0) and np.isfinite(part).all() for part in parts), (
            jax.tree_util.keystr(path)
        )


def test_bad_input_says_so():
    field = as_field(lambda p, x, t, c: Branches(x, x))
    for options, message in (
        ({"branches": 1}, "at least 2 branches, got 1"),
        ({"branches": 2, "gap": 2.0}, r"gap in \[0, 1\], got 2"),
        ({"branches": 2, "early": -1.0}, "weights >= 0, got early=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            deep_supervision(field, **options)
    with pytest.raises(ValueError, match=r"acceleration of shape \[16, 1, 2\], got \[16, 2, 2\]"):
        deep_supervision(field, 2)({}, jax.random.key(0), {"x": rows()})
