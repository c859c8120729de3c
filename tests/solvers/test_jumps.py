"""Jumps of tokens, against the chain of all states: two tokens of three symbols, so that no error
is that of sampling."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keys import KEYS, keys_consumed_twice

from jflow import guidance, oracles, paths, solvers
from jflow.paths import schedules

MASK = 3
RNG = np.random.default_rng(0)
SEQUENCES = list(itertools.product(range(3), repeat=2))
WEIGHTS = RNG.dirichlet(np.full(9, 0.7))
ALL_MASKS, FAIR = np.eye(4)[MASK], np.full(3, 1 / 3)
QUADRATIC = schedules.polynomial(2.0)


@functools.cache
def oracle(source, schedule=paths.LINEAR):
    prior = ALL_MASKS if source == "mask" else FAIR
    return oracles.tokens(SEQUENCES, WEIGHTS, source=prior, schedule=schedule)


class Row(NamedTuple):
    make: Any  # field -> Step
    source: str = "mask"
    schedule: Any = paths.LINEAR
    error: float = 0.05  # in total variation, of 32 steps
    order: tuple[float, float] = (0.8, 1.3)


def of_rates(step, corrector=None, schedule=paths.LINEAR):
    """The step of rates, which leaves the last one to the network."""

    def make(field):
        rates = paths.jump_rates(field, schedule, corrector)
        return solvers.ending(step(rates), solvers.jump(field, schedule))

    return make


TABLE = {
    "jump": Row(solvers.jump),
    "jump at another pace": Row(
        lambda field: solvers.jump(field, QUADRATIC), schedule=QUADRATIC, order=(0.6, 1.6)
    ),
    "jump from uniform tokens": Row(solvers.jump, "uniform"),
    "euler_jump": Row(lambda field: solvers.euler_jump(paths.jump_rates(field))),
    "euler_jump remasking": Row(of_rates(solvers.euler_jump, paths.remasking(2.0, MASK))),
    "euler_jump resampling": Row(
        of_rates(solvers.euler_jump, paths.resampling(2.0, FAIR)), "uniform"
    ),
    "euler_jump renoising": Row(
        of_rates(solvers.euler_jump, paths.renoising(0.5)), "uniform", order=(0.6, 1.6)
    ),
    "euler_jump at another pace": Row(
        of_rates(solvers.euler_jump, schedule=QUADRATIC), schedule=QUADRATIC
    ),
    "exponential_jump": Row(of_rates(solvers.exponential_jump)),
    "exponential_jump from uniform tokens": Row(of_rates(solvers.exponential_jump), "uniform"),
}


def states(source):
    """All states of two tokens."""
    size = 4 if source == "mask" else 3
    return np.array(list(itertools.product(range(size), repeat=2))), size


def start(source):
    x, _ = states(source)
    prior = ALL_MASKS if source == "mask" else FAIR
    return prior[x[:, 0]] * prior[x[:, 1]]


def chain(step, source, grid):
    """The exact law of what the step makes of the source on a grid, [states]."""
    x, size = states(source)

    @jax.jit
    def transition(t, t_next):
        p = step({}, jnp.asarray(x), t, t_next, None)[1]
        return jnp.einsum("sy,sz->syz", p[:, 0], p[:, 1]).reshape(len(x), len(x))

    law = start(source)
    for t, t_next in itertools.pairwise(grid):
        law = law @ np.asarray(transition(t, t_next), np.float64)
    return law, size


def far(law, size):
    """The total variation between it and the data."""
    data = np.zeros((size, size))
    data[tuple(np.transpose(SEQUENCES))] = WEIGHTS
    return 0.5 * np.abs(law - data.ravel()).sum()


@pytest.mark.parametrize("name", TABLE)
def test_the_error_falls_with_the_steps(name):
    """With the exact law in total variation, by the order of the step, 1; it is small for 32 steps;
    no mask is left."""
    row = TABLE[name]
    step = row.make(oracle(row.source, row.schedule).field)
    counts = (8, 16, 32)
    errors = []
    for n in counts:
        law, size = chain(step, row.source, solvers.grids.uniform(n))
        np.testing.assert_allclose(law.sum(), 1, rtol=1e-5)
        errors.append(far(law, size))
    assert errors[-1] < row.error
    low, high = row.order
    assert low < -np.polyfit(np.log(counts), np.log(errors), 1)[0] < high


@pytest.mark.parametrize("name", TABLE)
def test_tokens_are_drawn_from_the_mean(name):
    """The probabilities, whose standard deviation is the third; new for every key; the most
    probable one without a key; a time for each row is that of all; integers stay; no callback; one
    trace; a key is consumed once."""
    row, n, traces = TABLE[name], 3000, []
    step = row.make(oracle(row.source, row.schedule).field)
    x, size = states(row.source)
    rows = np.repeat(x, n, axis=0).astype(np.int32)

    @jax.jit
    def run(key, x, t, t_next):
        traces.append(1)
        return step({}, x, t, t_next, key)

    drawn, mean, std = jax.device_get(run(KEYS[0], rows, 0.3, 0.6))
    again = jax.device_get(run(KEYS[1], rows, 0.3, 0.6))[0]
    assert len(traces) == 1 and drawn.dtype == np.int32 and np.any(drawn != again)
    mean, std = (a.reshape(len(x), n, 2, size)[:, 0] for a in (mean, std))
    np.testing.assert_allclose(mean.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(std, np.sqrt(mean * (1 - mean)), atol=1e-3)
    shares = (drawn.reshape(len(x), n, 2, 1) == np.arange(size)).mean(1)
    assert np.all(np.abs(shares - mean) <= 4.5 * np.sqrt(mean * (1 - mean) / n) + 1e-6)
    assert np.all(shares[mean == 0] == 0)
    few = jnp.asarray(x)
    best, same, _ = step({}, few, jnp.full(len(x), 0.3), jnp.full(len(x), 0.6), None)
    np.testing.assert_allclose(same, mean, atol=1e-6)
    np.testing.assert_array_equal(best, mean.argmax(-1))
    walk = lambda key: step({}, few, 0.3, 0.6, key)  # noqa: E731
    assert "callback" not in str(jax.make_jaxpr(walk)(KEYS[0]))
    assert not keys_consumed_twice(walk, KEYS[0])


def test_sampling_is_the_chain_and_its_log_prob_is_known():
    """Samples of `sample_sde` have the frequencies of the exact chain; the log-probability of a
    trajectory is that of its draws, the same from a replay."""
    step, n, grid = solvers.jump(oracle("mask").field), 20000, solvers.grids.uniform(4)
    law, size = chain(step, "mask", grid)

    @jax.jit
    def run(key, x0):
        x, path = solvers.sample_sde(step, {}, x0, key, grid, return_trajectory=True)
        return x, path, solvers.trajectory_log_prob(step, {}, path)

    x0 = jnp.full((n, 2), MASK)
    x, path, replay = jax.device_get(run(KEYS[2], x0))
    assert x.dtype == x0.dtype and path.x.shape == (5, n, 2) and path.mean.shape == (4, n, 2, 4)
    counts = np.bincount(x @ [size, 1], minlength=size**2)
    assert np.all(np.abs(counts / n - law) <= 4.5 * np.sqrt(law * (1 - law) / n) + 1e-9)
    picked = np.take_along_axis(path.mean, path.x[1:][..., None], -1)[..., 0]
    np.testing.assert_allclose(replay, np.log(picked).sum(-1), rtol=1e-5, atol=1e-6)


def test_adaptive_steps_are_as_many_as_the_rates_ask_for():
    """One step of the grid suffices; a smaller limit is nearer to the data; what is at its end
    stays; of at most `most` evaluations."""
    n, calls = 20000, []
    field = oracle("mask").field
    noisy = paths.jump_rates(field, corrector=paths.remasking(1.0, MASK))

    def law(limit, most):
        rates = paths.jump_rates(field)
        counted = rates._replace(
            apply=lambda *args, **more: (
                (jax.debug.callback(lambda: calls.append(1)), 0)[1] + rates.apply(*args, **more)
            )
        )
        step = solvers.adaptive_jump(counted, limit, most)
        x, _ = jax.jit(lambda key: solvers.sample_sde(step, {}, x0, key, [0.0, 1.0]))(KEYS[3])
        jax.effects_barrier()
        return np.bincount(np.asarray(x) @ [4, 1], minlength=16) / n

    x0 = jnp.full((n, 2), MASK)
    coarse = far(law(1.0, 50), 4)
    assert len(calls) == 1  # all at once
    calls.clear()
    fine = far(law(0.1, 50), 4)
    assert fine < 0.03 < coarse and len(calls) == 50
    calls.clear()
    law(0.1, 8)
    assert len(calls) == 8
    step = solvers.adaptive_jump(noisy)
    x_next, mean, std = step({}, jnp.array([[0, MASK]]), 0.5, jnp.array([0.5]), KEYS[0])
    np.testing.assert_array_equal(x_next, [[0, MASK]])
    np.testing.assert_array_equal(mean, jax.nn.one_hot(x_next, 4))
    np.testing.assert_array_equal(std, 0)
    with pytest.raises(ValueError, match="adaptive_jump is stochastic: it needs a key"):
        step({}, x0, 0.0, 1.0, None)


def test_confident_jumps_leave_as_many_known_as_the_schedule_says():
    """And known ones as they are; without noise the token that is most certain comes first."""
    weights = [0.7, 0.2, 0.1]
    data = oracles.tokens([[0, 1, 0], [0, 0, 1], [0, 2, 1]], weights, source=ALL_MASKS)
    step = solvers.confident_jump(data.field, MASK, noise=0.0)
    x0 = jnp.full((50, 3), MASK)
    grid = [0.0, 1 / 3, 2 / 3, 1.0]
    _, path = jax.jit(
        lambda key: solvers.sample_sde(step, {}, x0, key, grid, return_trajectory=True)
    )(KEYS[0])
    x = np.asarray(path.x)
    np.testing.assert_array_equal((x != MASK).sum(2), np.tile([[0], [1], [2], [3]], (1, 50)))
    assert np.all(x[1][:, 0] == 0)  # of which there is no doubt
    for before, after in itertools.pairwise(x):
        np.testing.assert_array_equal(after[before != MASK], before[before != MASK])
    np.testing.assert_array_equal(path.mean[-1], jax.nn.one_hot(x[-1], 4))
    noisy = solvers.confident_jump(data.field, MASK, noise=50.0)
    x_next = noisy({}, x0, 0.0, 1 / 3, KEYS[0])[0]
    assert 2 < np.sum(np.asarray(x_next)[:, 0] != MASK) < 48
    assert not keys_consumed_twice(lambda key: noisy({}, x0, 0.0, 0.5, key), KEYS[0])


def test_known_tokens_are_filled_around_and_temperature_sharpens():
    field = oracle("mask").field
    n, grid = 20000, solvers.grids.uniform(16)
    given = jnp.tile(jnp.array([[1, MASK]]), (n, 1))
    cold = guidance.tempered(field, 0.5)

    @jax.jit
    def run(key):
        one, other = jax.random.split(key)
        fill = lambda law, key: solvers.sample_sde(solvers.jump(law), {}, given, key, grid)[0]  # noqa: E731
        return fill(field, one), fill(cold, other)

    plain, sharp = jax.device_get(run(KEYS[1]))
    row = WEIGHTS.reshape(3, 3)[1] / WEIGHTS.reshape(3, 3)[1].sum()
    for x, power in ((plain, 1), (sharp, 2)):
        law = row**power / np.sum(row**power)
        np.testing.assert_array_equal(x[:, 0], 1)
        shares = np.bincount(x[:, 1], minlength=3) / n
        assert np.all(np.abs(shares - law) <= 4 * np.sqrt(law * (1 - law) / n))


def test_bad_options_and_shapes():
    field = oracle("mask").field
    rates = paths.jump_rates(field)
    x = jnp.array([[MASK, MASK]])
    scalar = field._replace(apply=lambda params, x, t, cond=None, *, key=None: t)
    step = solvers.jump(field)
    for call, said in [
        (lambda: step({}, x * 1.0, 0.0, 0.5, None), "jump: expected x to hold tokens"),
        (lambda: solvers.jump(scalar)({}, x, 0.0, 0.5, None), r"jump: expected logits of shape"),
        (
            lambda: solvers.euler_jump(scalar)({}, x, 0.0, 0.5, None),
            "euler_jump: expected rates of shape .*paths.jump_rates makes them",
        ),
        (lambda: solvers.adaptive_jump(rates, 0.0), r"adaptive_jump: expected limit in \(0, 1\]"),
        (
            lambda: solvers.adaptive_jump(rates, most=0),
            "adaptive_jump: expected most to be a whole",
        ),
        (lambda: solvers.confident_jump(field, MASK, noise=-1.0), "confident_jump: expected a fin"),
        (lambda: guidance.tempered(field, 0.0), "tempered: expected .*temperature > 0, got 0.0"),
        (
            lambda: solvers.sample_sde(step, {}, x, None, [0.0, 1.0]),
            "solvers.sample_sde is stochastic: it needs a key",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
