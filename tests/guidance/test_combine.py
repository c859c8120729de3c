"""What guidance makes of two velocities, on the exact fields of a mixture and on numbers worked out
by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import guidance, oracles, paths, solvers, types

MEANS = [[2.0, 0.0], [-1.0, 1.5], [0.5, -2.0]]
NULL = 3


def exact(schedule=paths.LINEAR):
    return oracles.mixture([0.5, 0.3, 0.2], MEANS, [0.25, 0.1, 0.4], schedule)


def draw(n=32):
    keys = jax.random.split(jax.random.key(0), 3)
    x, t = (
        2 * jax.random.normal(keys[0], (n, 2)),
        jax.random.uniform(keys[1], (n,), minval=0.05, maxval=0.95),
    )
    return x, t, jax.random.randint(keys[2], (n,), 0, NULL)


def both(oracle, x, t, label):
    return oracle.velocity(x, t, label), oracle.velocity(x, t)


def constant(*rows):
    """Two velocities [1, d] that the test wrote down, as a combine meets them."""
    return [jnp.asarray([row], float) for row in rows]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_cfg_is_the_combination_of_scores(x64, scale):
    """(1 - w) score + w score of the class, as a velocity: by the oracle's scores, which cfg does
    not see."""
    schedule = paths.Schedule(lambda t: jnp.sin(jnp.pi * t / 2), lambda t: jnp.cos(jnp.pi * t / 2))
    oracle = exact(schedule)
    x, t, label = draw()
    score = (1 - scale) * oracle.score(x, t) + scale * oracle.score(x, t, label)
    v = guidance.cfg(oracles.as_velocity(oracle), scale, null=NULL).apply({}, x, t, label)
    np.testing.assert_allclose(v, paths.score_to_velocity(score, x, t, schedule), atol=1e-10)


def test_a_negative_condition_row_by_row(x64):
    oracle = exact()
    x, t, label = draw()
    away = (label + 1) % NULL
    v = guidance.negative(oracles.as_velocity(oracle), guidance.scaled(3.0)).apply(
        {}, x, t, (label, away)
    )
    bad, good = oracle.velocity(x, t, away), oracle.velocity(x, t, label)
    np.testing.assert_allclose(v, bad + 3 * (good - bad), atol=1e-12)
    same = jnp.full_like(label, 2)
    one = guidance.guided(oracles.as_velocity(oracle), guidance.scaled(3.0), null=2).apply(
        {}, x, t, label
    )
    pair = guidance.negative(oracles.as_velocity(oracle), guidance.scaled(3.0)).apply(
        {}, x, t, (label, same)
    )
    np.testing.assert_array_equal(one, pair)


def test_interval_is_conditional_outside():
    oracle = exact()
    x, _, label = draw(4)
    t = jnp.asarray([0.2, 0.25, 0.75, 0.8])
    combine = guidance.interval(guidance.scaled(4.0), 0.25, 0.75)
    v = guidance.guided(oracles.as_velocity(oracle), combine, null=NULL).apply({}, x, t, label)
    conditional, unconditional = both(oracle, x, t, label)
    full = unconditional + 4 * (conditional - unconditional)
    np.testing.assert_array_equal(v[jnp.asarray([0, 3])], conditional[jnp.asarray([0, 3])])
    np.testing.assert_allclose(v[1:3], full[1:3], rtol=1e-5, atol=1e-5)  # float32
    assert (
        float(jnp.min(jnp.max(jnp.abs(full - conditional), axis=1))) > 1e-3
    )  # 100 times the tolerance


def test_rescaled_gives_the_deviation_back(x64):
    x, t = jnp.zeros((5, 3, 2)), jnp.full(5, 0.5)
    v, other = jax.random.normal(jax.random.key(1), (2, 5, 3, 2))
    plain = guidance.scaled(6.0)
    std = lambda v: np.std(np.asarray(v).reshape(5, -1), axis=1)  # noqa: E731
    g = plain(v, other, x, t)
    full = guidance.rescaled(plain, 1.0)(v, other, x, t)
    np.testing.assert_allclose(std(full), std(v), rtol=1e-12)
    assert np.all(std(g) > 1.5 * std(v))
    half = guidance.rescaled(plain, 0.5)(v, other, x, t)
    np.testing.assert_allclose(half, (full + g) / 2, atol=1e-12)
    np.testing.assert_array_equal(guidance.rescaled(plain, 0.0)(v, other, x, t), g)


def test_zero_star_projects():
    """By hand: <v, u> / |u|^2 = 2 / 4, so v = (1 - w) u / 2 + w v."""
    v, other = constant([1.0, 3.0], [2.0, 0.0])
    got = guidance.zero_star(3.0)(v, other, v, jnp.asarray([0.5]))
    np.testing.assert_allclose(got, [[-2 * 1.0 + 3 * 1.0, 9.0]], rtol=1e-6)
    np.testing.assert_allclose(
        guidance.zero_star(1.0)(v, other, v, jnp.asarray([0.5])), v, rtol=1e-6
    )
    np.testing.assert_array_equal(guidance.zero_star(3.0)(v, 0 * v, v, jnp.asarray([0.5])), 3 * v)


def test_projected_by_hand():
    """x1 = x + (1 - t) v = (2, 0): the difference (1, 2) has (1, 0) along it."""
    x, v, other = constant([1.0, 0.0], [2.0, 0.0], [1.0, -2.0])
    t = jnp.asarray([0.5])
    np.testing.assert_allclose(guidance.projected(3.0)(v, other, x, t), [[2.0, 4.0]], rtol=1e-6)
    np.testing.assert_allclose(
        guidance.projected(3.0, parallel=0.5)(v, other, x, t), [[3.0, 4.0]], rtol=1e-6
    )
    plain = guidance.projected(3.0, parallel=1.0)(v, other, x, t)
    np.testing.assert_allclose(plain, guidance.scaled(3.0)(v, other, x, t), rtol=1e-6)
    # the predictions of x1 lie (1 - t) |d| = sqrt(5) / 2 apart; no further than half of that, d is
    # halved
    near = guidance.projected(3.0, limit=5**0.5 / 4)(v, other, x, t)
    np.testing.assert_allclose(near, [[2.0, 2.0]], rtol=1e-6)
    far = guidance.projected(3.0, limit=5.0)(v, other, x, t)
    np.testing.assert_allclose(far, [[2.0, 4.0]], rtol=1e-6)


@pytest.mark.parametrize(
    "combine",
    [
        lambda unit: guidance.rescaled(guidance.scaled(3.0)),
        lambda unit: guidance.projected(3.0, limit=0.5 * unit),
        lambda unit: guidance.zero_star(3.0),
    ],
)
def test_the_unit_of_the_data_changes_nothing(combine):
    """In float32 the squares of 1e30 overflow and those of 1e-30 vanish."""
    v, other = jax.random.normal(jax.random.key(1), (2, 4, 3))
    x, t = jnp.ones_like(v), jnp.full(4, 0.5)
    expected = combine(1.0)(v, other, x, t)
    for unit in (1e30, 1e-30):
        got = combine(unit)(v * unit, other * unit, x * unit, t)
        np.testing.assert_allclose(got / unit, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "combine",
    [guidance.projected(2.0), guidance.projected(2.0, limit=0.5), guidance.zero_star(2.0)],
)
def test_gradients_are_finite_where_both_agree(combine):
    v = jnp.zeros((1, 2))
    gradient = jax.grad(
        lambda v: jnp.sum(combine(v, jnp.zeros_like(v), jnp.ones_like(v), jnp.asarray([1.0])))
    )(v)
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_a_tree_is_one_vector(x64):
    """Norms and inner products run over all leaves: what a row cut in two gives, whole."""
    keys = jax.random.split(jax.random.key(2), 3)
    x, v, other = (jax.random.normal(k, (4, 5)) for k in keys)
    t = jnp.full(4, 0.3)
    cut = lambda a: {"a": a[:, :2], "b": a[:, 2:].reshape(4, 3, 1)}  # noqa: E731
    for combine in (
        guidance.scaled(2.0),
        guidance.zero_star(2.0),
        guidance.projected(2.0, limit=0.1),
    ):
        pieces = combine(cut(v), cut(other), cut(x), t)
        np.testing.assert_allclose(
            jnp.concatenate([pieces["a"], pieces["b"][:, :, 0]], axis=1),
            combine(v, other, x, t),
            atol=1e-12,
        )


def test_autoguidance_and_told(x64):
    """Away from a worse field, with params of both; a weak one that is told the null label makes it
    cfg."""
    oracle, worse = exact(), oracles.mixture([1, 1, 1], MEANS, 1.0)
    x, t, label = draw()
    good, bad = oracles.as_velocity(oracle), oracles.as_velocity(worse)
    v = guidance.autoguidance(good, bad, guidance.scaled(2.0)).apply(
        {"velocity": {}, "weak": {}}, x, t, label
    )
    np.testing.assert_allclose(
        v, 2 * oracle.velocity(x, t, label) - worse.velocity(x, t, label), atol=1e-12
    )
    same = guidance.autoguidance(good, guidance.with_cond(good, NULL), guidance.scaled(2.0))
    expected = guidance.cfg(good, 2.0, null=NULL).apply({}, x, t, label)
    np.testing.assert_allclose(
        same.apply({"velocity": {}, "weak": {}}, x, t, label), expected, atol=1e-12
    )


def test_told_nothing():
    seen = []

    def apply(params, x, t, cond=None, *, key=None):
        seen.append(cond)
        return x

    guidance.with_cond(types.Velocity(None, apply)).apply(
        {}, jnp.ones((2, 1)), jnp.zeros(2), jnp.arange(2)
    )
    assert seen == [None]


def test_zero_init_zeroes_the_first_euler_steps():
    """dx/dt = 1 from 0: of 10 Euler steps the first two do nothing."""
    ones = types.Velocity(None, lambda params, x, t, cond=None, *, key=None: jnp.ones_like(x))
    import diffrax

    x1, _ = solvers.sample(
        guidance.zero_init(ones, 0.2 - 1e-6),
        {},
        jnp.zeros((1, 1)),
        method=solvers.fixed(10, diffrax.Euler()),
    )
    np.testing.assert_allclose(x1, 0.8, atol=1e-6)


def test_variants_compose():
    """A guided velocity is a velocity: the whole stack goes through the sampler, jitted, and stays
    finite."""
    velocity = oracles.as_velocity(exact())
    combine = guidance.rescaled(
        guidance.interval(guidance.projected(3.0, limit=2.0), 0.2, 0.8), 0.5
    )
    stack = guidance.zero_init(guidance.guided(velocity, combine, null=NULL), 0.04)
    label = jnp.arange(6) % NULL
    x1, info = jax.jit(lambda x0: solvers.sample(stack, {}, x0, label, method=10))(
        jax.random.normal(jax.random.key(3), (6, 2))
    )
    assert bool(jnp.all(jnp.isfinite(x1))) and not np.any(info.status)


def test_a_null_that_labels_cannot_hold_is_an_error():
    """It would be rounded to the label of a class, or wrap around to one."""
    velocity = oracles.as_velocity(exact())
    x, t, label = draw(4)

    def traced(null, label=label):
        return jax.eval_shape(guidance.cfg(velocity, 2.0, null=null).apply, {}, x, t, label)

    for null in (
        3.7,
        -1,
        2**31,
        True,
        np.nan,
        np.float64(0.5),
        np.int64(2**40),
        jnp.float32(1.5),
        np.True_,
        "3",
    ):
        with pytest.raises(
            ValueError, match=r"cfg: expected null to be a row of cond, which holds labels \(int32"
        ):
            traced(null)
    with pytest.raises(ValueError, match="null .* holds labels"):
        jax.eval_shape(lambda null: traced(null), jnp.float32(3))  # a value that is not known
    for null in (NULL, np.int64(NULL), np.uint8(NULL), float(NULL), jnp.asarray(NULL)):
        assert traced(null).shape == x.shape


def test_trees_of_conditions_and_states():
    x = {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 3, 1))}
    cond = {"label": jnp.arange(4), "vector": jnp.ones((4, 2))}
    null = {"label": 9, "vector": jnp.zeros(2)}
    apply = lambda params, x, t, cond=None, *, key=None: {  # noqa: E731
        "a": x["a"] * cond["vector"],
        "b": x["b"] * cond["label"][:, None, None],
    }
    out = guidance.cfg(types.Velocity(None, apply), 3.0, null=null).apply({}, x, 0.5, cond)
    np.testing.assert_array_equal(out["a"], 3.0 * x["a"])
    np.testing.assert_array_equal(out["b"][:, 0, 0], 9 + 3.0 * (jnp.arange(4) - 9))


def test_errors():
    velocity = oracles.as_velocity(exact())
    x, t, label = draw(4)
    with pytest.raises(TypeError, match="null"):
        guidance.cfg(velocity, 2.0)
    for null, cond, said in [
        (None, label, "cfg: expected null, .* got None"),
        ({"label": 3}, label, "one row of cond"),
        (jnp.zeros(2), jnp.zeros((4, 3)), r"null of shape \(3,\).*got \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            guidance.cfg(velocity, 2.0, null=null).apply({}, x, t, cond)
    with pytest.raises(ValueError, match="pair .*got"):
        guidance.negative(velocity, guidance.scaled(2.0)).apply({}, x, t, label)
    with pytest.raises(ValueError, match="one shape"):
        guidance.negative(velocity, guidance.scaled(2.0)).apply({}, x, t, (label, label[:2]))
