"""Transition matching on two unit Gaussians of correlation 0.9, where everything is known."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import losses, solvers, times
from jflow.nets import Headed, headed
from jflow.types import Field, Velocity

RHO = 0.9
COV = np.array([[1.0, RHO], [RHO, 1.0]])
ROOT = np.linalg.cholesky(COV).astype(np.float32)
# variance and correlation at the end of T steps of token-wise kernels, and the variance that
# Euler's method ends with
TOKENWISE = {
    1: (1.0, 0.0),
    2: (0.811, 0.519),
    4: (0.831, 0.796),
    8: (0.902, 0.853),
    16: (0.947, 0.877),
    64: (0.986, 0.895),
}
EULER = {2: 0.219, 4: 0.500, 8: 0.712, 16: 0.844, 64: 0.959}


def moments(t):
    """Y = x1 - x0 given x_t = x: its mean is gain x, its covariance is returned too."""
    cov_y, cross = COV + np.eye(2), t * COV - (1 - t) * np.eye(2)
    gain = cross @ np.linalg.inv(t**2 * COV + (1 - t) ** 2 * np.eye(2))
    return gain, cov_y - gain @ cross.T


def chain(steps, cov_of):
    """The covariance of x after so many steps x <- x + Y / steps, the law of Y having cov_of(its
    covariance given x_t)."""
    cov = np.eye(2)
    for k in range(steps):
        gain, noise = moments(k / steps)
        move = np.eye(2) + gain / steps
        cov = move @ cov @ move.T + cov_of(noise) / steps**2
    return cov


def gains(t):
    """`moments` of t [b] in jnp: (gain [b, 2, 2], cov [b, 2, 2])."""
    cov, eye, t = jnp.asarray(COV, t.dtype), jnp.eye(2, dtype=t.dtype), t[:, None, None]
    cross = t * cov[None] - (1 - t) * eye[None]
    gain = cross @ jnp.linalg.inv(t**2 * cov[None] + (1 - t) ** 2 * eye[None])
    return gain, (cov + eye)[None] - gain @ cross.swapaxes(1, 2)


def to_gaussian(y, s, mean, var):
    """The velocity at s from N(0, 1) to N(mean, var), by number."""
    return mean + (s * var - (1 - s)) / ((1 - s) ** 2 + s**2 * var) * (y - s * mean)


def each_token(params, x, t, cond=None, *, key=None):
    """The mean and the log variance of the two tokens x [b, 2, 1]."""
    gain, cov = gains(t)
    mean = jnp.einsum("bij,bj->bi", gain, x[..., 0])
    h = jnp.stack([mean, jnp.log(jnp.diagonal(cov, axis1=1, axis2=2))], axis=-1)
    return h + params["shift"]


def token_head(params, y, s, h=None, *, key=None):
    return to_gaussian(y, s[:, None], h[:, :1], jnp.exp(h[:, 1:]))


EXACT = headed(Field(None, each_token), Velocity(None, token_head))
PARAMS = {"backbone": {"shift": np.zeros((1, 2, 2), np.float32)}, "head": {}}


def whole(params, x, t, cond=None, *, key=None):
    """One feature [b, 8] of both tokens: mean, and what turns Y into independent numbers."""
    gain, cov = gains(t)
    mean = jnp.einsum("bij,bj->bi", gain, x[..., 0])
    values, vectors = jnp.linalg.eigh(cov)
    return jnp.concatenate([mean, values, vectors.reshape(-1, 4)], axis=1)


def whole_head(params, y, s, h=None, *, key=None):
    mean, values, vectors = h[:, :2], h[:, 2:4], h[:, 4:].reshape(-1, 2, 2)
    turned, center = (jnp.einsum("bij,bi->bj", vectors, v) for v in (y[..., 0], mean))
    v = to_gaussian(turned, s[:, None], center, values)
    return jnp.einsum("bij,bj->bi", vectors, v)[..., None]


JOINT = headed(Field(None, whole), Velocity(None, whole_head))
N, KEY = 100_000, jax.random.key(0)
HEUN = solvers.fixed(8, diffrax.Heun())


def ends_with(net, steps, expected, params=PARAMS):
    """Samples have this variance and this correlation, up to 4 standard errors."""
    n = N if steps < 64 else N // 4
    run = jax.jit(
        lambda x0, key: solvers.sample_transitions(net, params, x0, key, grid=steps, method=HEUN)
    )
    x0 = np.random.default_rng(2).normal(size=(n, 2, 1)).astype(np.float32)
    x, info = jax.device_get(run(x0, jax.random.key(3)))
    assert np.all(info.backbone == steps) and np.all(info.head == steps * 16)
    assert np.all(info.status == 0)
    cov = np.cov(x[..., 0].T)
    found = (cov[0, 0] + cov[1, 1]) / 2, cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1])
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(2 / n))


def test_the_closed_forms_of_token_wise_kernels_and_of_euler():
    """The recursion of covariances gives the numbers that the sampler is held to below."""
    for steps, expected in TOKENWISE.items():
        cov = chain(steps, lambda noise: np.diag(np.diag(noise)))
        np.testing.assert_allclose((cov[0, 0], cov[0, 1] / cov[0, 0]), expected, atol=6e-4)
        np.testing.assert_allclose(chain(steps, lambda noise: noise), COV, atol=1e-9)
    for steps, expected in EULER.items():
        cov = chain(steps, lambda noise: 0 * noise)
        np.testing.assert_allclose(cov[0, 0], expected, atol=6e-4)


@pytest.mark.parametrize("steps", TOKENWISE)
def test_the_exact_head_of_tokens_ends_where_token_wise_kernels_do(steps):
    ends_with(EXACT, steps, TOKENWISE[steps])


@pytest.mark.parametrize("steps", [1, 3])
def test_a_head_of_the_whole_event_is_exact_at_any_number_of_steps(steps):
    ends_with(JOINT, steps, (1, RHO), {"backbone": {}, "head": {}})


def test_the_exact_head_is_the_minimum():
    """Its loss is pi / 2 times the mean standard deviation of Y given x_t; the gradient by a shift
    of its means and log variances vanishes, and a shift either way costs."""
    grid = times.sequential(4, starts=1.0)
    loss = losses.transition_matching(EXACT, time=grid)

    @jax.jit
    def run(shift, key):
        x_key, key = jax.random.split(key)
        x = (jax.random.normal(x_key, (N, 2)) @ ROOT.T)[..., None]
        f = lambda shift: loss({"backbone": {"shift": shift}, "head": {}}, key, {"x": x})[0]  # noqa: E731
        return jax.value_and_grad(f)(shift)

    key, zero = jax.random.key(0), np.zeros((1, 2, 2), np.float32)
    best, slope = jax.device_get(run(zero, key))
    expected = np.pi / 2 * np.mean([moments(k / 4)[1][0, 0] ** 0.5 for k in range(4)])
    np.testing.assert_allclose(best, expected, rtol=0.01)
    np.testing.assert_allclose(slope, 0, atol=0.012)
    for index in np.ndindex(2, 2):
        for size in (-0.3, 0.3):
            moved = zero.copy()
            moved[0][index] = size
            assert run(moved, key)[0] > best + 0.005, (index, size)


def test_tokens_have_a_time_and_a_noise_each_and_their_own_feature():
    """What the networks see: x_t on the line between the pair, and in the rows of the head that of
    their own token."""
    seen = {}

    def features(params, x, t, cond=None, *, key=None):
        seen.update(x=x, t=t, cond=cond)
        return x + cond[:, None, None]

    def head(params, y, s, h=None, *, key=None):
        seen.update(y=y, s=s, h=h)
        return 0 * y

    net = Headed(lambda *_: {}, features, Velocity(lambda *_: {}, head))
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(2, 4, 3, 2)).astype(np.float32)
    at = np.linspace(0.1, 0.7, 4).astype(np.float32)
    loss = losses.transition_matching(net, time=lambda key, n: jnp.asarray(at))
    cond = np.arange(4.0, dtype=np.float32)
    value, _ = loss({}, jax.random.key(0), {"x": x1, "x0": x0, "cond": cond})
    x_t = x0 + at[:, None, None] * (x1 - x0)
    np.testing.assert_allclose(seen["x"], x_t, atol=1e-6)
    np.testing.assert_allclose(seen["h"], (x_t + cond[:, None, None]).reshape(12, 2), atol=1e-6)
    assert len(set(np.asarray(seen["s"]).tolist())) == 12
    y, s = (x1 - x0).reshape(12, 2), np.asarray(seen["s"])[:, None]
    z = (seen["y"] - s * y) / (1 - s)
    np.testing.assert_allclose(value, np.mean((y - z) ** 2), rtol=1e-4)


def test_tokens_of_weight_zero_count_nothing_whatever_they_hold():
    """Weights of tokens: the loss is the mean over those that count, of value and gradient."""
    features = lambda params, x, t, cond=None, *, key=None: jnp.tanh(x)  # noqa: E731
    head = lambda params, y, s, h=None, *, key=None: params * (y + h)  # noqa: E731
    loss = losses.transition_matching(Headed(None, features, Velocity(None, head)))
    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    weight = np.array([[1, 1, 0], [1, 0, 0], [2, 1, 1], [0, 0, 0]], np.float32)
    run = jax.jit(jax.value_and_grad(lambda p, x: loss(p, KEY, {"x": x, "weight": weight})[0]))
    found = run(0.3, x)
    holes = np.where(weight[..., None] == 0, np.nan, x)
    np.testing.assert_allclose(run(0.3, holes), found, rtol=1e-6)
    lone = jax.jit(lambda w: loss(0.3, KEY, {"x": x, "weight": w})[0])
    each = [lone(np.eye(12, dtype=np.float32)[i].reshape(4, 3)) for i in range(12)]
    np.testing.assert_allclose(found[0], np.average(each, weights=weight.ravel()), rtol=1e-5)


def test_trained_networks_start_and_learn():
    """Params of both networks get gradients through `nets.headed`, and init has their shapes."""
    import flax.linen as nn

    import jflow
    from jflow.nets import TimeMLP

    class Pointwise(nn.Module):
        @nn.compact
        def __call__(self, x, t, cond=None):
            return nn.Dense(3)(x) + t[:, None, None]

    net = headed(jflow.field(Pointwise()), jflow.velocity(TimeMLP((4,))))
    loss = losses.transition_matching(net)
    x = np.random.default_rng(0).normal(size=(6, 5, 2)).astype(np.float32)
    params = net.init(jax.random.key(0), x, np.zeros(6, np.float32))
    run = jax.jit(jax.grad(lambda p: loss(p, jax.random.key(1), {"x": x})[0]))
    moved = jax.tree.map(lambda p: p + 0.1, params)
    slopes = jax.device_get(run(moved))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(slopes))
    sampled, info = solvers.sample_transitions(net, params, x, jax.random.key(2), grid=2, method=3)
    assert sampled.shape == x.shape and np.all(info.head == 2 * 3)


def test_a_failed_row_is_nan_alone():
    def features(params, x, t, cond=None, *, key=None):
        return jnp.where(cond[:, None, None] > 0, jnp.inf, x)

    head = Velocity(None, lambda params, y, s, h=None, *, key=None: h - y)
    net = Headed(None, features, head)
    x0, bad = np.ones((3, 2, 1), np.float32), np.array([0.0, 1.0, 0.0])
    x, info = solvers.sample_transitions(net, {}, x0, jax.random.key(0), bad, grid=2, method=2)
    np.testing.assert_array_equal(np.isnan(x).all((1, 2)), [False, True, False])
    np.testing.assert_array_equal(info.status > 0, [False, True, False])


def test_bad_input_says_so():
    x, key = np.zeros((4, 3, 2), np.float32), jax.random.key(0)

    def wrong(*shape):
        features = lambda params, x, t, cond=None, *, key=None: jnp.zeros(shape)  # noqa: E731
        head = lambda params, y, s, h=None, *, key=None: y[:, :1]  # noqa: E731
        return Headed(None, features, Velocity(None, head))

    for shape in ((4, 2, 5), (4,), (3, 5)):
        with pytest.raises(ValueError, match=r"features of shape \[b, \*sites, k\].*\[4, 3, 2\]"):
            losses.transition_matching(wrong(*shape))({}, key, {"x": x})
    with pytest.raises(ValueError, match=r"velocity of shape \[12, 2\], got \[12, 1\]"):
        losses.transition_matching(wrong(4, 3, 5))({}, key, {"x": x})
    with pytest.raises(TypeError, match="transition_matching: expected a Headed"):
        losses.transition_matching(EXACT.velocity)
    with pytest.raises(ValueError, match="sample_transitions is stochastic: it needs a key"):
        solvers.sample_transitions(EXACT, PARAMS, x, None)
    with pytest.raises(ValueError, match="at least 1, or times, got 0"):
        solvers.sample_transitions(EXACT, PARAMS, x, key, grid=0)
