"""Distribution matching: the student's gradient is that of a KL divergence in closed form, the
fake's is flow matching."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_maps import (
    GAUSSIAN,
    ORACLES,
    at,
    exact_map,
    over_keys,
    random_params,
    same_when_repeated,
    silent_leaves,
    standard_scores,
)

import jflow
from jflow import nets, oracles, train
from jflow.losses import (
    adversarial,
    distribution_matching,
    inverse_error_weight,
    kl_weight,
    shared_timesteps,
    sum_losses,
)
from jflow.solvers import consistency_map, sample_flow_map
from jflow.types import Field, FlowMap, Velocity

KEY = jax.random.key(0)
MEAN, VAR = 1.0, 0.5
ONE = oracles.gaussian([MEAN], [VAR])
TEACHER = oracles.as_velocity(ONE)


def affine(params, x0, cond=None):
    return params["m"] + params["s"] * x0


def gaussian_velocity(params, x, t, cond=None, *, key=None):
    """That of N(m, s^2)."""
    t = t[:, None]
    v = t**2 * params["s"] ** 2 + (1 - t) ** 2
    return params["m"] + (t * params["s"] ** 2 - (1 - t)) / v * (x - t * params["m"])


FAKE = Velocity(lambda *a: {}, gaussian_velocity)
STUDENT = {"m": jnp.asarray(1.6), "s": jnp.asarray(0.5)}
PARAMS = {"student": STUDENT, "fake": STUDENT}


def test_the_gradient_is_that_of_the_divergence():
    """KL of N(t m, V) and N(t MEAN, W), V = t^2 s^2 + (1 - t)^2, W = t^2 VAR + (1 - t)^2, averaged
    over t in [0.02, 0.98]."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    t, weights = 0.02 + 0.96 * (nodes + 1) / 2, weights / 2
    m, s = 1.6, 0.5
    v, w = t**2 * s**2 + (1 - t) ** 2, t**2 * VAR + (1 - t) ** 2
    exact = {
        "m": np.sum(weights * t**2 * (m - MEAN) / w),
        "s": np.sum(weights * t**2 * s * (1 / w - 1 / v)),
    }
    loss = distribution_matching(affine, FAKE, TEACHER, weight=kl_weight)

    def gradient(key):
        grads = jax.grad(lambda p: loss(p, key, {"x": jnp.zeros((1000, 1))}, {"teacher": {}})[0])(
            PARAMS
        )
        off = {name: grads["student"][name] - exact[name] for name in exact}
        return {"off": off, "student": grads["student"], "fake": grads["fake"]}

    scores = standard_scores(gradient)()  # fake m, s; off m, s; student m, s
    assert np.all(np.abs(scores[:4]) < 3), (
        scores
    )  # the exact fake velocity is where its own gradient vanishes
    assert scores[4] > 10 and scores[5] < -10, scores  # down in mean, up in spread


def test_at_the_teachers_own_law_nothing_moves(x64):
    exact = {"m": jnp.asarray(MEAN), "s": jnp.sqrt(VAR)}
    loss = distribution_matching(affine, FAKE, TEACHER)

    def run(student, fake):
        return loss(
            {"student": student, "fake": fake}, KEY, {"x": jnp.zeros((256, 1))}, {"teacher": {}}
        )

    _, metrics = run(exact, exact)
    assert metrics["residual"] < 1e-12 and metrics["student"] < 1e-12
    grads = jax.grad(lambda p: run(p, exact)[0])(exact)
    np.testing.assert_allclose(jax.tree.leaves(grads), 0, atol=1e-9)
    assert run(exact, {"m": exact["m"] + 0.1, "s": exact["s"]})[1]["residual"] > 1e-5


LOSSES = {
    "distribution_matching": lambda model, *rest: distribution_matching(
        lambda p, x0, cond: sample_flow_map(model, p, x0, cond)[0],
        *rest,
        weight=lambda x1, seen, t: t,
    ),
    "shared_timesteps": lambda model, *rest: shared_timesteps(
        model, *rest, (0.0, 0.4, 0.7, 1.0), weight=lambda x1, seen, t: t
    ),
}


@pytest.mark.parametrize("law", ORACLES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_gradients_at_the_exact_map_and_its_velocity_are_zero(name, law):
    """10^5 draws of the samples of the exact map: their velocity is the teacher's, and neither
    player moves."""
    oracle, exact = ORACLES[law], exact_map(law, 4)

    def near(p, x, t, cond=None, *, key=None):
        return oracle.velocity(x, t) + p["a"] * x + p["b"] * t[:, None]

    def pushed(p, x, t, cond=None, *, key=None):
        return exact.apply({}, x, t, jnp.ones_like(t)) + p["a"] * x + p["b"] * (1 - t[:, None])

    loss = LOSSES[name](
        consistency_map(Velocity(None, pushed)), Velocity(None, near), oracles.as_velocity(oracle)
    )

    def gradient(key, fake):
        params, batch = {"student": at(), "fake": fake}, {"x": jnp.zeros((1000, 2))}
        return jax.grad(lambda p: loss(p, key, batch, {"teacher": {}})[0])(params)

    measure = over_keys(gradient, 100, 5)
    mean, error = measure(at())  # of fake and student
    np.testing.assert_array_equal([mean[2:], error[2:]], 0)
    assert np.all(np.abs(mean[:2]) < 3 * error[:2])
    mean, error = measure(at(0.3, 0.3))
    moved = np.abs(mean) > 10 * error
    assert np.any(moved[:2]) and np.any(moved[2:])


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_a_mean_over_events_with_noise(name):
    """Twice the numbers, each with noise of its own: the same within 3 standard errors, where a sum
    would be twice."""
    waves = lambda shift: Velocity(  # noqa: E731
        None, lambda p, x, t, cond=None, *, key=None: p * jnp.sin(x) + shift
    )
    loss = LOSSES[name](consistency_map(waves(0.5)), waves(0.0), waves(1.0))
    params, frozen = {"student": 0.7, "fake": 0.4}, {"teacher": 0.2}
    keys, found = jax.random.split(KEY, 20), {}
    for d in (1, 2):
        batch = {"x": jnp.zeros((1000, d))}
        _, terms = jax.jit(jax.vmap(lambda key, batch=batch: loss(params, key, batch, frozen)))(
            keys
        )
        found[d] = {what: (np.mean(v), np.std(v) / np.sqrt(20)) for what, v in terms.items()}
    for what in ("student", "fake", "residual"):
        (one, first), (two, second) = found[1][what], found[2][what]
        assert abs(one - two) < 3 * np.hypot(first, second) < 0.1 * one, (what, found)


def test_each_players_gradient_is_its_own(x64):
    batch, frozen = {"x": jnp.zeros((32, 1))}, {"teacher": {}}

    def grads(**options):
        loss = distribution_matching(affine, FAKE, TEACHER, **options)
        return jax.grad(lambda p: loss(p, KEY, batch, frozen)[0])(
            {"student": STUDENT, "fake": {"m": 0.2, "s": 1.3}}
        )

    both, alone, other = (
        grads(),
        grads(fake_weight=0.0),
        grads(weight=lambda x1, seen, t: jnp.zeros_like(t)),
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), both["student"], alone["student"]))
    np.testing.assert_array_equal(jax.tree.leaves(alone["fake"]), 0)
    np.testing.assert_allclose(
        jax.tree.leaves(both["fake"]), jax.tree.leaves(other["fake"]), rtol=1e-12
    )
    np.testing.assert_array_equal(jax.tree.leaves(other["student"]), 0)


def test_the_weights():
    x1, seen, t = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[0.0, 4.0]]), jnp.asarray([0.25])
    np.testing.assert_allclose(kl_weight(x1, seen, t), 0.0625 / 0.75)
    np.testing.assert_allclose(inverse_error_weight(x1, seen, t), 0.75 / 1.5)
    assert np.isfinite(inverse_error_weight(x1, x1, t))


def test_a_tiled_event_changes_nothing(x64):
    """At t = 1, where no noise is added."""
    teacher = Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: jnp.cos(x))
    fake = Velocity(lambda *a: {}, lambda p, x, t, cond=None, *, key=None: p * jnp.sin(x))
    loss = distribution_matching(
        affine,
        fake,
        teacher,
        time=lambda key, n: jnp.ones(n),
        weight=lambda x1, seen, t: t,
        fake_weight=0.0,
    )
    x0, params = jax.random.normal(KEY, (8, 3)), {"student": STUDENT, "fake": jnp.asarray(0.4)}
    same_when_repeated(loss, params, x0, 0 * x0, {"teacher": {}}, rtol=1e-9)


GRID = (0.0, 0.4, 1.0)


def pushed(params, x, t, r, cond=None, *, key=None):
    """The exact map of ONE to r = 1, and (1 - t) c beyond it."""
    return ONE.average_velocity(x, t, jnp.ones_like(t)) + params


def test_shared_timesteps_follow_the_divergence_of_all_steps_together():
    """Two steps of the exact map pushed by c have samples N(m_k, VAR), m_0 = MEAN + c and, since
    the second starts from a mean of 0.4 m_0, m_1 = MEAN + sqrt(VAR / v) 0.4 c + 0.6 c, v the
    variance at 0.4. Both are seen at t = 0.4, and c moves them by 1 and 0.6: the derivative of the
    KL divergence between half of each, noised, and the teacher's law, by quadrature."""
    c, t, v = 0.6, 0.4, 0.4**2 * VAR + 0.6**2
    means, moves = (
        np.asarray([MEAN + c, MEAN + np.sqrt(VAR / v) * 0.4 * c + 0.6 * c]),
        np.asarray([1.0, 0.6]),
    )
    x = np.linspace(-6, 8, 20_001)

    def density(m):
        return np.exp(-((x - t * m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)

    def divergence(e):
        q = sum(density(m) for m in means + e * moves) / 2
        return np.sum(q * np.log(q / density(MEAN))) * (x[1] - x[0])

    exact = (divergence(1e-4) - divergence(-1e-4)) / 2e-4
    fake = oracles.as_velocity(oracles.mixture([0.5, 0.5], means[:, None], VAR))
    loss = shared_timesteps(FlowMap(None, pushed), fake, TEACHER, GRID, weight=kl_weight)

    def gradient(key):
        batch, params = {"x": jnp.zeros((500, 1))}, {"student": jnp.asarray(c), "fake": {}}
        grad = jax.grad(lambda p: loss(p, key, batch, {"teacher": {}})[0])(params)["student"]
        return {"off": grad - exact, "grad": grad}

    grad, off = standard_scores(gradient)()
    assert abs(off) < 3 and grad > 10, (off, grad)


def test_shared_timesteps_rest_at_the_exact_map(x64):
    student = exact_map("gaussian")
    teacher = oracles.as_velocity(GAUSSIAN)
    loss = shared_timesteps(student, teacher, teacher, np.linspace(0, 1, 5))
    value, metrics = loss(
        {"student": {}, "fake": {}}, KEY, {"x": jnp.zeros((64, 2))}, {"teacher": {}}
    )
    assert metrics["residual"] < 1e-12 and metrics["student"] < 1e-12 and metrics["fake"] > 0.1
    x1, _ = sample_flow_map(
        student,
        {},
        jax.random.normal(KEY, (20_000, 2)),
        grid=np.linspace(0, 1, 5),
        renoise=1.0,
        key=KEY,
    )
    np.testing.assert_allclose(jnp.mean(x1, 0), [1.0, -2.0], atol=5 * np.sqrt(0.5 / 20_000))


def test_shared_timesteps_train_the_last_step_and_stop_at_states():
    """Only F at the grid's times but the last is asked for; x1 of a step has no gradient to the
    steps before."""
    asked = []

    def apply(params, x, t, cond=None, *, key=None):
        jax.debug.callback(lambda t: asked.append(float(t[0])), t)
        return params * x

    student = consistency_map(Velocity(None, apply))
    ones = Velocity(None, lambda p, x, t, cond=None, *, key=None: jnp.zeros_like(x))
    loss = shared_timesteps(student, ones, ones, (0.0, 0.5, 0.75, 1.0))
    loss({"student": jnp.asarray(0.1), "fake": {}}, KEY, {"x": jnp.zeros((4, 1))}, {"teacher": {}})
    jax.effects_barrier()
    assert sorted(set(asked)) == [0.0, 0.5, 0.75]


@pytest.mark.parametrize("name", ["distribution_matching", "shared_timesteps"])
def test_gradients_reach_every_param_and_stop_at_the_teacher(name):
    net = nets.ResidualMLP(8, 1, num_classes=2)
    velocity = jflow.velocity(net)
    x, t, cond = GAUSSIAN.sample(KEY, 4), jnp.ones(4), jnp.asarray([0, 1, 2, 2])
    student = random_params(velocity.init, x, t, cond)
    params = {"student": student, "fake": jax.tree.map(lambda p: 0.9 * p, student)}
    if name == "shared_timesteps":
        loss = shared_timesteps(consistency_map(velocity), velocity, velocity, (0.0, 0.4, 0.7, 1.0))
    else:
        generate = lambda p, x0, cond: sample_flow_map(consistency_map(velocity), p, x0, cond)[0]  # noqa: E731
        loss = distribution_matching(generate, velocity, velocity)
    batch, frozen = {"x": x, "cond": cond, "weight": jnp.arange(4.0)}, {"teacher": student}
    assert not silent_leaves(loss, params, batch, frozen)


def test_the_mean_of_a_student_is_learned_with_a_fake_that_keeps_up():
    """From N(-1, 0.49) to the teacher's N(1, 0.5), the fake moving eight times as often, a
    discriminator's penalty beside."""
    judge = Field(None, lambda p, x, t, cond=None, *, key=None: p * x[:, 0])
    matching = distribution_matching(affine, FAKE, TEACHER, weight=kl_weight)
    loss = sum_losses({"match": matching, "gan": adversarial(affine, judge, weight=0.0, r1=1.0)})
    slow = optax.MultiSteps(optax.sgd(0.3), 8).gradient_transformation()
    players = {"student": slow, "fake": optax.sgd(0.1), "discriminator": optax.sgd(0.1)}
    optimizer = optax.partition(players, {name: name for name in players})
    step = train.make_step(loss, optimizer)
    start = {"m": jnp.asarray(-1.0), "s": jnp.asarray(0.7)}
    params = {"student": start, "fake": start, "discriminator": jnp.asarray(0.1)}
    state = train.init_state(params, optimizer, KEY, frozen={"teacher": {}})

    def update(state, key):
        x = ONE.sample(key, 256)
        state, _ = step(state, {"x": x})
        return state, state.params["student"]

    _, path = jax.jit(lambda s: jax.lax.scan(update, s, jax.random.split(jax.random.key(2), 1200)))(
        state
    )
    assert abs(float(jnp.mean(path["m"][-400:])) - MEAN) < 0.1
    assert abs(float(jnp.mean(path["s"][-400:])) - np.sqrt(VAR)) < 0.1


def test_bad_input():
    batch, frozen = {"x": jnp.zeros((2, 1))}, {"teacher": {}}
    loss = distribution_matching(affine, FAKE, TEACHER)
    with pytest.raises(ValueError, match=r"params with \['student', 'fake'\]"):
        loss({"student": STUDENT}, KEY, batch, frozen)
    with pytest.raises(ValueError, match="'teacher' in frozen"):
        loss(PARAMS, KEY, batch)
    with pytest.raises(ValueError, match="finite fake_weight >= 0"):
        distribution_matching(affine, FAKE, TEACHER, fake_weight=-1.0)
    with pytest.raises(ValueError, match=r"weight of shape \[2\]"):
        distribution_matching(affine, FAKE, TEACHER, weight=lambda x1, seen, t: 1.0)(
            PARAMS, KEY, batch, frozen
        )
    with pytest.raises(ValueError, match="shaped like x"):
        distribution_matching(lambda p, x0, cond: x0[:, :0], FAKE, TEACHER)(
            PARAMS, KEY, batch, frozen
        )
    for grid in ((0.0, 1.0), 1):
        with pytest.raises(ValueError, match="three times"):
            shared_timesteps(FlowMap(None, pushed), FAKE, TEACHER, grid)
    for grid in ((0.1, 0.5, 1.0), (0.0, 0.6, 0.9), (0.0, 0.5, 0.4, 1.0)):
        with pytest.raises(ValueError, match="rise strictly from 0 to 1"):
            shared_timesteps(FlowMap(None, pushed), FAKE, TEACHER, grid)
