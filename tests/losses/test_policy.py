"""Policy gradients: what rollouts keep, ratios that start at 1, KLs and gradients in closed form,
and the optimum that GRPO finds, beside the law of the reward and a linear-quadratic program."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from subprocesses import run_python

import jflow
from jflow import losses, solvers, train
from jflow.solvers import noises
from jflow.types import Field, Velocity

KEY = jax.random.key(0)
MEAN, STD, WEIGHT, CENTER, BETA = 1.0, 0.8, 1.0, 2.0, 0.5  # of the data, the reward and the KL


# The linear-quadratic problem: data N(MEAN, STD^2), reward -WEIGHT (x - CENTER)^2 / 2, in float64.


def gaussian_velocity(t):
    """(a, b) of v = a x + b of the linear path from N(0, 1) to the data."""
    a = (t * STD**2 - (1 - t)) / ((1 - t) ** 2 + (t * STD) ** 2)
    return a, MEAN * (1 - a * t)


def affine_steps(grid, velocities, w):
    """(A, B, s) of each step, x_next = A x + B + s e: Euler-Maruyama's with w(t), at most
    (1 - t)^2 / (4 h), on the linear path."""
    made = []
    for t, t_next, (a, b) in zip(grid[:-1], grid[1:], velocities, strict=True):
        h = t_next - t
        rate = 0.25 * (1 - t) ** 2 / h
        rate = min(rate, w(t)) if t > 0 else rate
        # the score is -(x - t v) / (1 - t)
        slope = 1 + h * (a - rate * (1 - t * a) / (1 - t))
        made.append((slope, h * b * (1 + rate * t / (1 - t)), np.sqrt(2 * rate * h)))
    return made


def best_steps(steps):
    """The steps of the greatest  E[reward] - BETA sum of KLs to `steps`,  by dynamic programming.

    The value of a state is -Q x^2 / 2 + L x + a constant; a step with the mean m of the reference
    has the best mean  (m BETA / s^2 + L) / (BETA / s^2 + Q)."""
    q, linear, best = WEIGHT, WEIGHT * CENTER, []
    for slope, offset, s in steps[::-1]:
        kept = (BETA / s**2) / (BETA / s**2 + q)
        best.append((slope * kept, offset * kept + linear * kept * s**2 / BETA, s))
        q, linear = q * kept, linear * kept
        q, linear = q * slope**2, slope * (linear - q * offset)
    return best[::-1]


def last_moments(steps):
    """The mean and the variance after the steps, from N(0, 1)."""
    mean, variance = 0.0, 1.0
    for slope, offset, s in steps:
        mean, variance = slope * mean + offset, slope**2 * variance + s**2
    return mean, variance


def affine(grid):
    """A velocity of its own a and b at each time of a uniform grid, and the params of the data."""
    n = len(grid) - 1

    def apply(params, x, t, cond=None, *, key=None):
        at = jnp.round(t * n).astype(int)
        return params["a"][at][:, None] * x + params["b"][at][:, None]

    a, b = np.asarray([gaussian_velocity(t) for t in grid[:-1]], np.float32).T
    return Velocity(None, apply), {"a": jnp.asarray(a), "b": jnp.asarray(b)}


def tuned(noise, n, updates=300):
    """(grid, velocities after GRPO, metrics): one group of 512 rows an update, without a division
    by the standard deviation, Adam with a falling rate."""
    grid = np.linspace(0, 1, n + 1)
    velocity, params = affine(grid)
    step = solvers.euler_maruyama(velocity, noise)
    rollouts = losses.group_rollouts(
        step,
        lambda x, cond: -0.5 * WEIGHT * (x[:, 0] - CENTER) ** 2,
        source=lambda key, n: jax.random.normal(key, (n, 1)),
        grid=grid,
        groups=1,
        group_size=512,
        future_kl=True,
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, updates), b2=0.99)
    update = train.make_step(losses.grpo(step, kl=BETA), optimizer)
    state = train.init_state(params, optimizer, KEY, frozen={"reference": params})

    @jax.jit
    def run(state, keys):
        return jax.lax.scan(lambda state, key: update(state, rollouts(state, key)), state, keys)

    state, metrics = jax.device_get(run(state, jax.random.split(jax.random.key(1), updates)))
    velocities = list(zip(*(state.params[k].astype(float) for k in "ab"), strict=True))
    return grid, velocities, metrics


def test_with_memoryless_noise_the_data_follow_the_law_times_the_exponential_of_the_reward():
    """Within 5% in mean and variance. The moments are exact ones of the policy that was found; 3.4%
    of the variance are those of 40 steps: the optimum on this grid has 0.290, the law 0.2807. The
    optimum itself is reached within 1%, what 300 updates leave."""
    w = lambda t: (1 - t) / t  # noqa: E731  half of sigma(t)^2 = 2 (1 - t) / t
    grid, velocities, metrics = tuned(noises.sbdm(), 40)
    mean, variance = last_moments(affine_steps(grid, velocities, w))
    precision = 1 / STD**2 + WEIGHT / BETA
    tilted = (MEAN / STD**2 + WEIGHT * CENTER / BETA) / precision, 1 / precision
    np.testing.assert_allclose((mean, variance), tilted, rtol=0.05)
    reference = affine_steps(grid, map(gaussian_velocity, grid[:-1]), w)
    np.testing.assert_allclose((mean, variance), last_moments(best_steps(reference)), rtol=0.01)
    assert np.max(metrics["log_ratio"]) <= 1e-5 and np.all(metrics["clipped"] == 0)
    assert metrics["reward"][-20:].mean() > metrics["reward"][0] + 0.4


def test_with_the_noise_of_the_paper_it_is_the_optimum_of_that_process():
    """a = 0.7: the linear-quadratic optimum within 1%, and its steps one by one. The law times the
    exponential of the reward is not reached: the source and the data depend on one another."""
    w = lambda t: 0.7**2 * (1 - t) / (2 * t)  # noqa: E731
    grid, velocities, _ = tuned(noises.grpo(0.7), 20)
    found = affine_steps(grid, velocities, w)
    best = best_steps(affine_steps(grid, map(gaussian_velocity, grid[:-1]), w))
    np.testing.assert_allclose(last_moments(found), last_moments(best), rtol=0.01)
    # slopes and offsets: what 300 noisy updates leave, of offsets of up to 0.3
    np.testing.assert_allclose(np.asarray(found), np.asarray(best), atol=0.03)


def small(params, x, t, cond=None, *, key=None):
    return jnp.tanh(x @ params["w"] + cond @ params["c"] + t[:, None])


def drawn(seed):
    rng = np.random.default_rng(seed)
    made = {"w": rng.normal(size=(3, 3)), "c": rng.normal(size=(2, 3))}
    return {k: jnp.asarray(v, jnp.float32) for k, v in made.items()}


class Reference:
    """A small velocity, two params of it, and rollouts of a step that depends on a condition."""

    velocity = Velocity(None, small)
    params, other = drawn(0), drawn(1)
    step = staticmethod(solvers.euler_maruyama(velocity, noises.grpo(0.7)))
    grid = np.linspace(0, 1, 5)

    @classmethod
    def rollouts(cls, reward=lambda x, cond: jnp.sum(x, axis=1), **options):
        usual = {
            "step": cls.step,
            "source": lambda key, n: jax.random.normal(key, (n, 3)),
            "grid": cls.grid,
            "groups": 3,
            "group_size": 4,
            "conds": lambda key, n: jax.random.normal(key, (n, 2)),
        }
        return losses.group_rollouts(reward=reward, **usual | options)

    @classmethod
    def state(cls, frozen=None):
        return train.init_state(cls.params, optax.sgd(0.1), KEY, frozen=frozen)


@functools.cache
def rolled():
    """A batch with the KL that is still to pay, and at the params of the rollout and at others near
    them: its losses, and the normal laws of its steps."""
    state = Reference.state({"reference": Reference.other})
    batch = Reference.rollouts(future_kl=True)(state, jax.random.key(3))
    held = {"reference": Reference.other}
    plain = {k: v for k, v in batch.items() if k != "future_kl"}
    grpo, ppo = (
        losses.grpo(Reference.step, clip=0.01, kl=0.3),
        losses.ppo(Reference.step, clip=0.02),
    )

    @jax.jit
    def run(params):
        found = {
            "grpo": grpo(params, None, plain, held),
            "future": grpo(params, None, batch, held),
            "ppo": ppo(params, None, plain),
        }

        def rows(p, i):
            at = (batch["x"][:, i], batch["t"][:, i], batch["t_next"][:, i], None, batch["cond"])
            return Reference.step(p, *at)[1:]

        laws = [[rows(p, i) for i in range(4)] for p in (params, Reference.other)]
        return found, laws

    nearby = jax.tree.map(lambda p, q: p + 0.02 * (q - p), Reference.params, Reference.other)
    return jax.device_get((batch, run(Reference.params), run(nearby)))


def stacked(law):
    """Means [b, n, 3] and standard deviations [b, n, 1]."""
    return np.stack([m for m, _ in law], 1), np.stack([s for _, s in law], 1)[..., None]


def test_a_rollout_keeps_its_steps_and_the_ratio_starts_at_one():
    batch, (found, _), _ = rolled()
    assert batch["x"].shape == (12, 4, 3) and batch["std"].shape == (12, 4)
    np.testing.assert_array_equal(batch["x"][:, 1:], batch["x_next"][:, :-1])
    np.testing.assert_array_equal(batch["t"][0], Reference.grid[:-1].astype(np.float32))
    np.testing.assert_allclose(batch["reward"], batch["x_next"][:, -1].sum(-1), rtol=1e-6)
    assert len(np.unique(batch["cond"][:, 0])) == 3  # a condition for each group
    np.testing.assert_array_equal(batch["cond"][0], batch["cond"][3])
    for name in ("grpo", "ppo"):
        value, metrics = found[name]
        assert metrics["log_ratio"] <= 1e-5 and metrics["clipped"] == 0
    # at ratio 1 the value is minus the mean of the advantages, 0, up to rounding, and the KL
    np.testing.assert_allclose(found["ppo"][0], 0, atol=1e-5)
    np.testing.assert_allclose(found["grpo"][0], 0.3 * found["grpo"][1]["kl"], atol=1e-5)


def test_ratios_clips_and_kls_are_those_of_the_normal_laws():
    batch, _, (found, (new, reference)) = rolled()
    (mean, std), (mean_ref, _) = stacked(new), stacked(reference)
    law, old = scipy.stats.norm(mean, std), scipy.stats.norm(batch["mean"], batch["std"][..., None])
    log_ratio = law.logpdf(batch["x_next"]) - old.logpdf(batch["x_next"])
    kl = (mean - mean_ref) ** 2 / (2 * std**2)
    advantage = losses.group_advantages(batch["reward"], 4)

    ratio, a = np.exp(log_ratio.mean(-1)), np.asarray(advantage)[:, None]
    kept, clipped = ratio * a, np.clip(ratio, 0.99, 1.01) * a
    value, metrics = found["grpo"]
    expected = -np.minimum(kept, clipped).mean() + 0.3 * kl.mean()
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], kl.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["log_ratio"], np.abs(log_ratio).max(), rtol=1e-3)
    np.testing.assert_allclose(metrics["clipped"], np.mean(clipped < kept), rtol=1e-6)
    assert 0 < metrics["clipped"] < 1  # both branches were seen

    ratio, a = np.exp(log_ratio.sum((1, 2))), np.asarray(advantage)
    kept, clipped = ratio * a, np.clip(ratio, 0.98, 1.02) * a
    np.testing.assert_allclose(found["ppo"][0], -np.minimum(kept, clipped).mean(), rtol=1e-4)
    entropy = scipy.stats.norm(0, std).entropy().mean()
    np.testing.assert_allclose(found["ppo"][1]["entropy"], entropy, rtol=1e-5)
    assert 0 < found["ppo"][1]["clipped"] < 1


def test_the_kl_that_is_still_to_pay_is_the_sum_over_later_steps_and_the_event():
    batch, (found, (own, reference)), _ = rolled()
    (mean, std), (mean_ref, _) = stacked(own), stacked(reference)
    paid = ((mean - mean_ref) ** 2 / (2 * std**2)).sum(-1)
    later = np.cumsum(paid[:, ::-1], 1)[:, ::-1] - paid
    groups = later.reshape(3, 4, 4)
    others = (groups.sum(1, keepdims=True) - groups) / 3
    np.testing.assert_allclose(batch["future_kl"].reshape(3, 4, 4), groups - others, atol=1e-4)
    # at ratio 1 it changes the gradient and not the value: means over groups are 0
    np.testing.assert_allclose(found["future"][0], found["grpo"][0], atol=1e-5)


def test_group_advantages():
    reward = np.asarray([1.0, 2.0, 6.0, 4.0, 4.0, 4.0], np.float32)
    plain = losses.group_advantages(reward, 3)
    np.testing.assert_allclose(plain, [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0], rtol=1e-6)
    group = losses.group_advantages(reward, 3, divide_by="group")
    np.testing.assert_allclose(group[:3], (reward[:3] - 3) / (reward[:3].std() + 1e-4), rtol=1e-6)
    assert np.all(np.asarray(group[3:]) == 0)
    every = losses.group_advantages(reward, 3, divide_by="all")
    np.testing.assert_allclose(every[:3], (reward[:3] - 3) / (reward.std() + 1e-4), rtol=1e-6)


def test_kept_steps_are_steps_of_the_rollout():
    state = Reference.state()
    every, few = (
        jax.device_get(Reference.rollouts(keep=k)(state, jax.random.key(4))) for k in (None, 2)
    )
    assert few["x"].shape == (12, 2, 3) and few["std"].shape == (12, 2)
    at = np.round(few["t"] * 4).astype(int)
    assert np.all(at[:, 0] != at[:, 1]) and len(np.unique(at, axis=0)) > 3
    for name in ("x", "x_next", "mean", "std", "t_next"):
        np.testing.assert_array_equal(few[name], every[name][np.arange(12)[:, None], at])
    np.testing.assert_array_equal(few["advantage"], np.stack([every["advantage"]] * 2, axis=1))
    with pytest.raises(ValueError, match=r"'advantage' of shape \[12\], got \[12, 2\]: one for"):
        losses.ppo(Reference.step)(Reference.params, None, few)


def test_learned_noise_is_within_its_bounds_and_has_its_density():
    """Also the ratio at the first update, with a standard deviation for each number."""
    noise = Field(None, lambda params, x, t, cond=None, *, key=None: params["n"] * x)
    linear = Velocity(None, lambda params, x, t, cond=None, *, key=None: params["v"] * x)
    step = solvers.noise_injection(linear, noise, low=0.1, high=0.4)
    params = {"velocity": {"v": jnp.float32(0.3)}, "noise": {"n": jnp.float32(2.0)}}
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    loss = losses.ppo(step, entropy=0.1)

    @jax.jit
    def run(params, key):
        grid = solvers.grids.uniform(2)
        _, path = solvers.sample_sde(step, params, x0, key, grid, return_trajectory=True)
        batch = losses.policy_batch(path, jnp.arange(5.0))
        grads, metrics = jax.grad(loss, has_aux=True)(params, None, batch)
        own = losses.ppo(step)(params, None, batch)[0]
        return batch, grads, metrics, own, solvers.trajectory_log_prob(step, params, path)

    batch, grads, metrics, value, density = jax.device_get(run(params, KEY))
    assert np.all(batch["std"] > 0.1) and np.all(batch["std"] < 0.4)
    std = 0.1 * 4 ** (1 / (1 + np.exp(-2 * batch["x"])))
    np.testing.assert_allclose(batch["std"], std, rtol=1e-5)
    np.testing.assert_allclose(batch["mean"], batch["x"] * 1.15, rtol=1e-5)
    assert metrics["log_ratio"] <= 1e-5
    np.testing.assert_allclose(value, -2.0, rtol=1e-5)  # ratio 1
    laws = scipy.stats.norm(batch["mean"], batch["std"])
    np.testing.assert_allclose(density.T, laws.logpdf(batch["x_next"]).sum(-1), rtol=1e-4)
    # by hand: d/dv of -mean(A log p) = -mean over rows of A sum (x' - m) / s^2 x / 2
    z = (batch["x_next"] - batch["mean"]) / batch["std"] ** 2
    by_hand = -np.mean(np.arange(5) * np.sum(z * batch["x"] / 2, axis=(1, 2)))
    np.testing.assert_allclose(grads["velocity"]["v"], by_hand, rtol=1e-4)
    assert grads["noise"]["n"] != 0


def test_a_run_that_is_resumed_ends_as_one_that_never_stopped(tmp_path):
    """With a reward of numpy; `tuned` has one that is traced."""
    loss, optimizer = losses.grpo(Reference.step, kl=0.1), optax.sgd(0.01)
    step, ends = train.make_step(loss, optimizer), []
    reward = lambda x, cond: np.asarray(x)[:, 0] ** 2  # noqa: E731
    for name, counts in (("whole", (4,)), ("parts", (2, 4))):
        for steps in counts:
            done = train.fit(
                Reference.state({"reference": Reference.other}),
                step,
                Reference.rollouts(reward),
                steps=steps,
                workdir=tmp_path / name,
                progress=False,
            )
        ends.append(jax.device_get(done.state.params))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert done.history[-1]["log_ratio"] <= 1e-5


MESH = """
import json, jax, numpy as np, optax
import sys; sys.path.insert(0, sys.argv[1])
from test_policy import Reference, losses, train
mesh = train.data_mesh()
assert mesh.size == 2
step = train.make_step(losses.grpo(Reference.step, kl=0.1), optax.sgd(0.01))
found = []
for sharding in (None, train.data_sharding(mesh)):
    state = Reference.state({"reference": Reference.other})
    if sharding is not None:
        state = train.shard(state, mesh)
    rollouts = Reference.rollouts(sharding=sharding)
    done = train.fit(state, step, rollouts, steps=2, progress=False, sharding=sharding)
    found.append(jax.device_get(done.state.params))
    assert done.history[-1]["log_ratio"] <= 1e-5
apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *found)
print(json.dumps(max(jax.tree.leaves(apart))))
"""


def test_on_a_mesh_of_two_devices_it_is_the_same(tmp_path):
    """Up to the order of sums, 1e-6 of params of order 1."""
    script = tmp_path / "mesh.py"
    script.write_text(MESH)
    done = run_python(script, str(jflow.__path__[0]) + "/../tests/losses", devices=2)
    assert json.loads(done.stdout) < 1e-6


def test_bad_input_is_named():
    state, key = Reference.state(), jax.random.key(0)
    make = Reference.rollouts

    def of_nan(x, cond):
        return np.where(np.arange(len(x)) == 7, np.nan, 1.0)

    batch = dict(rolled()[0])
    narrow = {"reference": {**Reference.params, "w": np.zeros((3, 2), np.float32)}}
    bad_std = {**batch, "std": batch["std"][:, :2]}
    for said, call in [
        ("group_size to be a whole number of at least 2, got 1", lambda: make(group_size=1)),
        ("divide_by None, 'group' or 'all', got 'std'", lambda: make(divide_by="std")),
        (r"expected keep in 1 \.\.\. 4, got 5", lambda: make(keep=5)),
        (r"a reward of shape \[12\], got \[12, 3\]", lambda: make(lambda x, c: x)(state, key)),
        ("finite rewards, got nan at step 0, row 7", lambda: make(of_nan)(state, key)),
        ("expected 'reference' in frozen", lambda: make(future_kl=True)(state, key)),
        ("group_rollouts is stochastic: it needs a key", lambda: make()(state, None)),
        (
            r"a step such as solvers.euler_maruyama\(velocity, noise\), .* got a Velocity",
            lambda: make(step=Reference.velocity),
        ),
        ("grpo: expected a step such as .* a Velocity", lambda: losses.grpo(Reference.velocity)),
        ("ppo: expected a step such as .* function anc", lambda: losses.ppo(solvers.ancestral)),
        (r"reward, a function of \(x, cond\), got 1.0", lambda: make(reward=1.0)),
        (r"source, a function of \(key, n\), got 3", lambda: make(source=3)),
        (r"conds, a function of \(key, n\), got 3", lambda: make(conds=3)),
        (
            r"a source of floats \[12, \*event\], got an array float32\[4, 3\]",
            lambda: make(source=lambda key, n: jnp.ones((4, 3)))(state, key),
        ),
        (
            r"a source of floats \[12, \*event\], got an array int32\[12, 3\]",
            lambda: make(source=lambda key, n: jnp.ones((n, 3), jnp.int32))(state, key),
        ),
        (
            r"group_rollouts: expected cond to lead with 3 rows, got shape \[9, 2\]",
            lambda: make(conds=lambda key, n: jnp.ones((9, 2)))(state, key),
        ),
        (
            r"rewards \[b\] with b a multiple of 3, got \[4\]",
            lambda: losses.group_advantages(np.ones(4), 3),
        ),
        ("grpo: expected clip > 0, got 0", lambda: losses.grpo(Reference.step, clip=0)),
        ("ppo: expected a finite entropy >= 0", lambda: losses.ppo(Reference.step, entropy=-1.0)),
        (
            r"grpo: expected 'std' of shape \[12, 4\]",
            lambda: losses.grpo(Reference.step)(Reference.params, None, bad_std),
        ),
        (
            "grpo: expected 'reference' in frozen",
            lambda: losses.grpo(Reference.step, kl=1.0)(Reference.params, None, batch),
        ),
        (
            "group_rollouts: expected a reference of the form of params",
            lambda: make(future_kl=True)(Reference.state({"reference": {}}), key),
        ),
        (
            r"group_rollouts: expected frozen\['reference'\]\['w'\] of shape \[3, 3\], got",
            lambda: make(future_kl=True)(Reference.state(narrow), key),
        ),
        (
            r"grpo: expected frozen\['reference'\]\['w'\] of shape \[3, 3\], got",
            lambda: losses.grpo(Reference.step, kl=1.0)(Reference.params, None, batch, narrow),
        ),
        (
            "ppo: expected no 'future_kl' in batch",
            lambda: losses.ppo(Reference.step)(Reference.params, None, batch),
        ),
        (
            "ppo: expected the batch of a policy",
            lambda: losses.ppo(Reference.step)(Reference.params, None, {"x": batch["x"]}),
        ),
        (
            "noise_injection: expected 0 < low < high",
            lambda: solvers.noise_injection(Reference.velocity, Field(None, None), low=0, high=1),
        ),
    ]:
        with pytest.raises((ValueError, TypeError), match=said):
            call()
