"""Domains: images and projections are inside, uniform laws are uniform, and folded normals are the
transitions of the reflected Brownian motion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.random import clone
from keys import KEYS

from jflow import domains, paths

ALARM = 1e-3  # the false-alarm rate of each test of a law, were the seed not fixed
HALF_PLANE = domains.convex(lambda x: x - jnp.maximum(x[..., :1] + x[..., 1:], 0) / 2)
TABLE = {  # the domain, and the shape of an event
    "box": (domains.box((2,), np.array([-1.0, 0.0]), [1.0, 0.5]), (2,)),
    "ball": (domains.ball((3,), 2.0), (3,)),
    "ball of an image": (domains.ball((2, 2, 1), np.float64(0.5)), (2, 2, 1)),
    "simplex": (domains.simplex((4,)), (4,)),
    "simplex of two tokens": (domains.simplex((2, 3)), (2, 3)),
    "convex": (HALF_PLANE, (2,)),
}


@functools.cache
def measured(name):
    """Of 200 points far and near: their images, projections and slopes, and of points inside."""
    domain, event = TABLE[name]
    rng = np.random.default_rng(0)
    far = rng.normal(size=(200, *event)) * rng.choice(
        [0.3, 1.0, 10.0], size=(200,) + (1,) * len(event)
    )

    @jax.jit
    def run(x, key):
        inside = domain.project(x[::-1]) if domain.uniform is None else draw(key, len(x))
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(domain.reflect(x))))(x)
        images = domain.reflect(x), domain.project(x)
        again = domain.reflect(inside), domain.project(inside)
        return inside, images, again, slope, [domain.project(image) for image in images]

    draw = domain.uniform and functools.partial(domain.uniform.sample, {})
    x = jnp.asarray(far, jnp.float32)
    return jax.device_get((x, *run(x, KEYS[0])))


@pytest.mark.parametrize("name", TABLE)
def test_images_are_inside_and_what_is_inside_stays(name):
    """Up to rounding, 1e-6; gradients are finite."""
    x, inside, images, again, slope, projected = measured(name)
    for image, nearest in zip(images, projected, strict=True):
        np.testing.assert_allclose(image, nearest, rtol=1e-6, atol=1e-6)
        assert np.abs(image - x).max() > 0.1
    for same in again:
        np.testing.assert_allclose(same, inside, rtol=1e-6, atol=1e-6)
    assert np.all(np.isfinite(slope)) and np.any(slope != 0)


@pytest.mark.parametrize("name", TABLE)
def test_the_projection_is_the_nearest_point(name):
    """<x - P x, y - P x> <= 0 for every y inside: what the nearest point of a convex set is."""
    x, inside, (_, nearest), *_ = measured(name)
    flat = lambda a: np.reshape(a, (len(a), -1)).astype(np.float64)  # noqa: E731
    x, y, p = flat(x), flat(inside), flat(nearest)
    products = (x - p) @ y.T - np.sum((x - p) * p, axis=1)[:, None]
    assert np.max(products / np.maximum(np.linalg.norm(x - p, axis=1), 1)[:, None]) < 1e-5


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float64))
def test_types(dtype):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for domain, event in TABLE.values():
            x = jax.ShapeDtypeStruct((5, *event), dtype)
            for f in (domain.reflect, domain.project):
                assert jax.eval_shape(f, x).dtype == dtype
                assert jax.eval_shape(f, jax.ShapeDtypeStruct(event, dtype)).shape == event


def test_a_box_folds_like_a_triangle_wave(x64):
    """Written out by numpy, with slopes of 1 and -1."""
    x = np.linspace(-6.9, 9, 997)
    box = domains.box((1,), -1.0, 0.5)
    image, slope = jax.jit(lambda x: jax.jvp(box.reflect, (x,), (jnp.ones_like(x),)))(x[:, None])
    expected = np.interp(np.mod(x + 1, 3.0), [0, 1.5, 3.0], [-1, 0.5, -1])
    np.testing.assert_allclose(image[:, 0], expected, atol=1e-12)
    turned = np.mod(x + 1, 3.0) > 1.5
    np.testing.assert_array_equal(slope[:, 0], np.where(turned, -1, 1))


def test_uniform_laws():
    """Kolmogorov-Smirnov for numbers whose law is known, and log-densities: of the volume inside,
    -inf outside, NaN for NaN."""
    n = 4000
    draws = jax.jit(
        lambda: [d.uniform.sample({}, clone(KEYS[1]), n) for d, _ in list(TABLE.values())[:5]]
    )
    box, ball, image, simplex, tokens = (np.asarray(d, np.float64) for d in draws())
    norm = np.sqrt(np.sum(image**2, axis=(1, 2, 3)))
    for u in (
        (box[:, 0] + 1) / 2,
        box[:, 1] / 0.5,
        (np.linalg.norm(ball, axis=1) / 2) ** 3,
        (ball[:, 2] / np.linalg.norm(ball, axis=1) + 1) / 2,  # Archimedes
        (norm / 0.5) ** 4,
        scipy.stats.beta(1, 3).cdf(simplex[:, 2]),
        scipy.stats.beta(1, 2).cdf(tokens[:, 1, 0]),
    ):
        assert scipy.stats.kstest(u, "uniform").pvalue > ALARM
    volumes = {
        "box": np.log(2 * 0.5),
        "ball": np.log(4 / 3 * np.pi * 8),
        "ball of an image": np.log(np.pi**2 / 2 * 0.5**4),
        "simplex": -scipy.stats.dirichlet.logpdf(np.full(4, 0.25), np.ones(4)),
        "simplex of two tokens": -2 * np.log(2),
    }
    for name, volume in volumes.items():
        x, inside, *_ = measured(name)
        law = TABLE[name][0].uniform
        rows = np.concatenate([inside[:2], x[:1] + 50, x[:1] * np.nan])
        expected = [-volume, -volume, -np.inf, np.nan]
        np.testing.assert_allclose(law.log_prob({}, rows), expected, rtol=1e-6)
        assert law.init(KEYS[0], rows) == {}
        with pytest.raises(ValueError, match=r"domains.*: expected x of shape \[b, "):
            law.log_prob({}, rows[..., None])


def series(x, mean, s):
    """The density of a reflected Brownian motion on [0, 1] and its distribution function, by 400
    cosines."""
    k = np.arange(1, 401)[:, None]
    weight = 2 * np.exp(-0.5 * (k * np.pi * s) ** 2) * np.cos(k * np.pi * mean)
    density = 1 + np.sum(weight * np.cos(k * np.pi * x), 0)
    return density, x + np.sum(weight / (k * np.pi) * np.sin(k * np.pi * x), 0)


def test_folded_normals_are_the_transitions_of_reflected_brownian_motion(x64):
    """Against 400 cosines, from steps of a fiftieth of the box to many boxes; -inf outside; and a
    number with std 0 counts nothing."""
    x = np.linspace(0, 1, 101)
    stds, means = [0.02, 0.1, 0.3, 0.499, 0.501, 1.0, 5.0], [0.0, 0.37, 1.0]
    low, w = -2.0, 3.0
    s, m = (a.ravel() for a in np.meshgrid(stds, means))

    @jax.jit
    def run(mean, std):
        rows = jnp.broadcast_to(jnp.asarray(low + w * x)[:, None], (len(x), 1))
        each = lambda mean, std: domains.reflected_normal_log_prob(  # noqa: E731
            rows, jnp.full_like(rows, mean), jnp.full(len(x), std), low, low + w
        )
        return jax.vmap(each)(mean, std)

    found = np.asarray(run(low + w * m, w * s))
    for row, mean, std in zip(found, m, s, strict=True):
        density = series(x, mean, std)[0]
        np.testing.assert_allclose(w * np.exp(row), density, rtol=1e-9, atol=1e-12)
    folded = run(low + w * (2 - m), w * s)  # a mean outside is folded first
    np.testing.assert_allclose(folded, found, rtol=1e-9, atol=1e-9)
    outside = domains.reflected_normal_log_prob(
        jnp.array([[0.5, 1.1], [0.5, 0.5]]), jnp.zeros((2, 2)), jnp.array([[1.0, 1.0], [1.0, 0.0]])
    )
    alone = np.log(series(np.array([0.5]), 0.0, 1.0)[0])
    np.testing.assert_allclose(outside, [-np.inf, alone[0]], rtol=1e-9)


def test_a_folded_draw_has_that_law_and_uniform_stays_uniform():
    """Kolmogorov-Smirnov, 4000 draws: one large step in a box against the series; in a box one
    step, in a ball and on a simplex a hundred small ones that keep the uniform law."""
    n = 4000
    box, ball, simplex = domains.box((1,)), domains.ball((2,)), domains.simplex((3,))

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 8)
        steps = [box.reflect(0.3 + 0.6 * jax.random.normal(keys[0], (n, 1)))]
        start = box.uniform.sample({}, keys[1], n)
        steps.append(box.reflect(start + 0.4 * jax.random.normal(keys[2], (n, 1))))

        def walk(domain, std, keys, size):
            def one(x, key):
                return domain.reflect(x + std * jax.random.normal(key, x.shape)), None

            start = domain.uniform.sample({}, keys[0], n)
            return jax.lax.scan(one, start, jax.random.split(keys[1], 100))[0]

        return [*steps, walk(ball, 0.04, keys[3:5], 2), walk(simplex, 0.02, keys[5:7], 3)]

    jump, box, ball, simplex = (np.asarray(x, np.float64) for x in run(KEYS[2]))
    assert scipy.stats.kstest(jump[:, 0], lambda x: series(x, 0.3, 0.6)[1]).pvalue > ALARM
    for u in (
        box[:, 0],
        np.sum(ball**2, axis=1),
        (np.arctan2(ball[:, 1], ball[:, 0]) / np.pi + 1) / 2,
        scipy.stats.beta(1, 2).cdf(simplex[:, 0]),
        1 - (1 - 3 * simplex.min(1)) ** 2,  # the smallest of three
    ):
        assert scipy.stats.kstest(u, "uniform").pvalue > ALARM


def test_a_row_outside_is_named():
    x = np.array([[0.5, 0.5], [0.2, 0.3], [0.0, 1.5]], np.float32)
    said = r"domains.check: expected x inside the domain, got row 2 at a distance of 0\.5$"
    with pytest.raises(ValueError, match=said):
        domains.check(domains.box((2,)), x)
    said = r"loader: expected x inside .* row 1 at a distance of 0\.354 \(and 1 more rows\)"
    with pytest.raises(ValueError, match=said):
        domains.check(domains.simplex((2,)), x, "loader")
    with pytest.raises(ValueError, match="row 0 at a distance of nan"):
        domains.check(domains.ball((2,)), x * np.nan)
    domains.check(domains.box((2,)), x[:2])
    path = paths.reflected(paths.linear(), domains.box((2,)))
    for function in path:
        with pytest.raises(ValueError, match="paths.reflected: expected x inside .* row 2"):
            function(x, x, np.zeros(3, np.float32))
    traced = jax.eval_shape(lambda x: path.point(x, x, jnp.zeros(3)), x)  # has no values to look at
    assert traced.shape == (3, 2)


def test_a_path_with_a_source_outside_is_folded():
    """Normal noise on a box: inside for every t, and its slope that of the fold."""
    path = paths.reflected(paths.linear(), domains.box((2,)))
    x0, x1 = 3 * jax.random.normal(KEYS[0], (50, 2)), jax.random.uniform(KEYS[1], (50, 2))
    t = jnp.linspace(0, 0.9, 50)
    point, target = jax.jit(lambda: (path.point(x0, x1, t), path.target(x0, x1, t)))()
    assert np.all((point >= 0) & (point <= 1))
    np.testing.assert_allclose(np.abs(target), np.abs(x1 - x0), rtol=1e-6)
    plain = (1 - t[:, None]) * x0 + t[:, None] * x1
    inside = (plain >= 0) & (plain <= 1)
    np.testing.assert_array_equal(np.where(inside, target, 0), np.where(inside, x1 - x0, 0))
    assert np.any(~inside) and np.any(inside)


def test_bad_options_fail_at_construction():
    one = jnp.zeros((1, 1))
    for make, said in [
        (lambda: domains.box((2,), 1.0, 1.0), "domains.box: expected low < high"),
        (lambda: domains.box((2,), 0.0, np.inf), "domains.box: expected a finite high, got inf"),
        (
            lambda: domains.box((2,), np.zeros(3)),
            r"domains.box: expected low to broadcast to \[2\]",
        ),
        (lambda: domains.ball((2,), 0.0), "domains.ball: expected a finite radius > 0, got 0.0"),
        (lambda: domains.ball((0,)), "domains.ball: expected an event with numbers"),
        (lambda: domains.simplex((1,)), "domains.simplex: expected an event whose last axis"),
        (lambda: domains.simplex((3,), rounds=0), "domains.convex: expected rounds"),
        (
            lambda: domains.reflected_normal_log_prob(one, one, jnp.ones(1), 1.0, 0.0),
            "reflected_normal_log_prob: expected low < high",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            make()
