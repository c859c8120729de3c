"""Recipes that the docstrings give, run small: InstaFlow from a guided teacher to one step, the
second round of RF++."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jflow
from jflow import guidance, losses, nets, oracles, solvers, times, train
from jflow.data import generate_reflow_pairs, normal_source, read_shards
from jflow.losses import distillation
from jflow.types import Velocity

KEY = jax.random.key(0)
MIXTURE = oracles.mixture([1.0, 1.0], [[-2.0, 0.5], [1.5, -0.5]], 0.5)


def apply(params, x, t, cond=None, *, key=None):
    return params["scale"] * MIXTURE.velocity(x, t, cond)


TEACHER, PARAMS = Velocity(None, apply), {"scale": jnp.ones(())}


def prompts(key, n):
    noise, label = jax.random.split(key)
    return {**normal_source((2,))(noise, n), "cond": jax.random.randint(label, (n,), 0, 2)}


def test_instaflow(tmp_path):
    guided = guidance.cfg(TEACHER, 2.0, null=2)
    how = {"method": 20, "batch": 512, "progress": False}
    generate_reflow_pairs(
        tmp_path, guided, PARAMS, prompts, 2048, key=KEY, about={"guidance": 2.0}, **how
    )
    rows = {name: np.asarray(value) for name, value in read_shards(tmp_path).items()}
    carry = lambda v, i: solvers.sample(v, PARAMS, rows["x0"][i], rows["cond"][i], method=20)[0]  # noqa: E731
    some = slice(500, 530)  # across two batches
    np.testing.assert_allclose(
        rows["x"][some], carry(guided, some), atol=1e-4
    )  # each row with its own label
    assert np.max(np.abs(rows["x"][some] - carry(TEACHER, some))) > 0.1  # and the guidance
    with pytest.raises(ValueError, match="guidance was 2.0, is 3.0"):
        stronger = guidance.cfg(TEACHER, 3.0, null=2)
        generate_reflow_pairs(
            tmp_path, stronger, PARAMS, prompts, 2048, key=KEY, about={"guidance": 3.0}, **how
        )

    student = jflow.velocity(nets.ResidualMLP(32, 2, num_classes=2))
    train_rows, held = (
        {name: value[part] for name, value in rows.items()}
        for part in (slice(1792), slice(1792, None))
    )
    params = student.init(KEY, rows["x"][:2], jnp.zeros(2), rows["cond"][:2])
    batches = {name: value.reshape(7, 256, *value.shape[1:]) for name, value in train_rows.items()}
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 175))

    def fit(loss, params):
        step = train.make_step(loss, optimizer)

        def epoch(state, _):
            return jax.lax.scan(step, state, batches)

        state = train.init_state(params, optimizer, KEY)
        return jax.jit(lambda state: jax.lax.scan(epoch, state, None, length=25)[0])(state).params

    def one_step(velocity, params):
        x, info = solvers.sample(
            velocity, params, held["x0"], held["cond"], method=solvers.fixed(1, diffrax.Euler())
        )
        assert np.all(np.asarray(info.evaluations) == 1)
        return float(np.sqrt(np.mean((x - held["x"]) ** 2)))

    params = fit(losses.flow_matching(student), params)  # reflow
    reflowed = one_step(student, params)
    params = fit(distillation(student), params)
    distilled = one_step(student, params)
    assert distilled < one_step(guided, PARAMS) / 10
    assert distilled < reflowed


def test_the_second_round_of_rf_plus_plus():
    """At the straight flow of a Gaussian's pairs nothing is left to learn, at any time, under its
    times and error."""
    std = 2.0

    def straight(params, x, t, cond=None, *, key=None):
        return (std - 1 + params) * x / (1 + (std - 1) * t[:, None])

    seen = []

    def time(key, n):
        seen.append(times.u_shaped()(key, n))
        return seen[-1]

    huber = losses.pseudo_huber(0.00054 * np.sqrt(2))
    loss = losses.flow_matching(Velocity(None, straight), time=time, metric=huber)
    x0 = jax.random.normal(KEY, (4000, 2))
    batch = {"x0": x0, "x": std * x0}
    assert loss(0.0, KEY, batch)[0] < 1e-6
    slope = jax.grad(lambda p: loss(p, KEY, batch)[0])
    assert float(slope(0.1)) > 0 > float(slope(-0.1))
    assert (
        np.mean(np.abs(seen[0] - 0.5) > 0.25) > 0.6
    )  # more than half of the times in the outer halves
    # real rows beside the pairs: their noise is drawn anew, so that the error is no longer zero
    mixed = losses.chain(losses.fresh_source(), loss)
    real = jnp.arange(4000) % 2 == 0
    assert mixed(0.0, KEY, {**batch, "paired": jnp.ones(4000, bool)})[0] < 1e-6
    assert mixed(0.0, KEY, {**batch, "paired": ~real})[0] > 0.1
