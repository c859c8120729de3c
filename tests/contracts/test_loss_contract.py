"""Every loss with weights against what weights promise, in small: a batch of three rows, one of
weight 0."""

import functools
from typing import Any, NamedTuple

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import (
    bijectors,
    couplings,
    distributions,
    flows,
    losses,
    manifolds,
    paths,
    solvers,
    times,
)
from jflow.distributions import mixtures
from jflow.nets import Headed
from jflow.types import Field, FlowMap, Velocity

KEY = jax.random.key(0)


def slope(params, x, t):
    t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
    return params * jnp.tanh(x) + t


VELOCITY = Velocity(None, lambda params, x, t, cond=None, *, key=None: slope(params, x, t))
MAP = FlowMap(
    None, lambda params, x, t, r, cond=None, *, key=None: slope(params, x, t) + r[:, None]
)
LATENT = Field(
    None,
    lambda params, x, t, cond=None, *, key=None: {
        "velocity": slope(params, x, t),
        "noise": params * x,
    },
)
BRANCHES = Field(
    None, lambda params, x, t, cond=None, *, key=None: (slope(params, x, t), params * x[:, 1:])
)


def routed(params, x, t, cond=None, *, key=None):
    probability = jax.nn.softmax(params * jnp.stack([x, 2 * x], axis=-1))
    load = (probability > 0.5).astype(x.dtype)
    return {"velocity": slope(params, x, t), "load": load, "probability": probability}


ROUTED = Field(None, routed)
HEADED = Headed(None, lambda params, x, t, cond=None, *, key=None: slope(params, x, t), VELOCITY)
SCALAR = Field(None, lambda params, x, t, cond=None, *, key=None: jnp.sum(params * x**2, axis=1))
TORUS = manifolds.torus(2)
STEPS = losses.grid_steps(lambda n: np.linspace(0, 1, n + 1), 4)


def mixture(params, x, t, cond=None, *, key=None):
    return mixtures.GaussianMixture(
        params * x[:, :1], slope(params, x, t)[:, None], params * x[:, 0]
    )


def bespoke_error(number, key, batch, frozen=None):
    params = jax.tree.map(lambda p: p + number, BESPOKE)
    return solvers.bespoke_error(VELOCITY, solver=diffrax.Euler())(params, key, batch, frozen)


def game(number, key, batch, frozen=None):
    loss = losses.adversarial(lambda params, x0, cond: params * x0, SCALAR, r1=0.1)
    return loss({"student": number, "discriminator": number}, key, batch)


def imitation(number, key, batch, frozen=None):
    loss = losses.distribution_matching(
        lambda params, x0, cond: slope(params, x0, x0[:, 0]), VELOCITY, VELOCITY
    )
    return loss({"student": number, "fake": number}, key, batch, frozen)


def nll(number, key, batch, frozen=None):
    params = {"bijector": {"log_scale": number * jnp.ones(2), "shift": jnp.ones(2)}, "base": {}}
    return losses.nll(FLOW)(params, key, batch)


def regularized_nll(number, key, batch, frozen=None):
    loss = losses.regularized_nll(
        VELOCITY, distributions.normal((2,)), method=solvers.fixed(1, diffrax.Euler())
    )
    return loss({"velocity": number, "base": {}}, key, batch)


class Slope(nn.Module):
    """An autoencoder of one number."""

    def setup(self):
        self.slope = self.param("slope", nn.initializers.ones, ())

    def encode(self, x):
        return self.slope * x, jnp.zeros_like(x)

    def decode(self, z):
        return self.slope * z


def reconstruction(number, key, batch, frozen=None):
    return losses.reconstruction(Slope())({"slope": number}, key, batch)


def in_parts(tree):
    """The two columns of arrays as parts."""
    return jax.tree.map(lambda a: {"a": a[:, :1], "b": a[:, 1:]}, tree)


PARTS = Velocity(
    None,
    lambda params, x, t, cond=None, *, key=None: {p: slope(params, x[p], t[p]) for p in x},
)


def joint_matching(number, key, batch, frozen=None):
    loss = losses.joint_matching(PARTS, time=times.parts(("a", "b"), independent=1, **CORNERS))
    ends = {name: in_parts(batch[name]) for name in ("x", "x0")}
    return loss(number, key, batch | ends, frozen)


CORNERS = dict.fromkeys(("together", "given", "absent"), 0)
BESPOKE = solvers.bespoke_params(1, solver=diffrax.Euler())
FLOW = flows.flow(bijectors.affine((2,)), distributions.normal((2,)))


class Scale(nn.Module):
    """A causal network of one number: h_i is a multiple of x_{i-1}."""

    @nn.compact
    def __call__(self, x, cond=None):
        return self.param("scale", nn.initializers.ones, ()) * jnp.roll(x, 1, 1).at[:, 0].set(0)


def next_token(number, key, batch, frozen=None):
    """Rows of two tokens of one number."""
    head = Velocity(None, lambda params, x, t, cond=None, *, key=None: slope(params, x, t) + cond)
    loss = losses.causal_matching(Scale(), head, distributions.normal((1,)))
    params = {"net": {"scale": number}, "token": {"velocity": number, "base": {}}}
    return loss(params, key, {**batch, "x": batch["x"][..., None]})


def selected(params, key, batch, frozen=None):
    """The likelihood of one part of the params and the batch."""
    part = losses.selected(
        nll,
        params=lambda p: p["part"],
        batch=lambda b: {k: v for k, v in b.items() if k != "other"},
    )
    return part({"part": params, "other": 0.0}, key, {**batch, "other": batch["x"]})


def policy(make):
    """A policy gradient of two steps between the states that the batch holds, rows x0 and x."""
    loss = make(solvers.euler_maruyama(VELOCITY, 0.5))

    def of_states(params, key, batch, frozen=None):
        more = {k: v for k, v in batch.items() if k not in ("x", "x0", "weight")}
        x, x0 = batch["x"], batch["x0"]
        b = x.shape[0]
        times = lambda t: jnp.broadcast_to(jnp.asarray(t, x.dtype), (b, 2))  # noqa: E731
        steps = {
            "x": jnp.stack([x0, x], 1),
            "x_next": jnp.stack([x, x0], 1),
            "mean": jnp.stack([x, x], 1),
            "std": times([0.5, 0.6]),
            "t": times([0.2, 0.5]),
            "t_next": times([0.5, 0.9]),
            "advantage": x[:, 0],
            "weight": batch["weight"],
        }
        return loss(params, key, steps | more, frozen)

    return of_states


def preferred(make):
    """A loss of pairs, x the better and x0 the worse of two."""
    return lambda params, key, batch, frozen=None: make(
        params, key, {k: v for k, v in batch.items() if k != "x0"} | {"worse": batch["x0"]}, frozen
    )


def of_rewards(params, key, batch, frozen=None):
    """Weighted by a reward."""
    loss = losses.chain(losses.reward_weights(0.5), losses.flow_matching(VELOCITY))
    reward = jnp.where(batch["weight"] != 0, batch["x"][:, 0], 0)
    return loss(params, key, {**batch, "reward": reward}, frozen)


def of_tokens(make):
    """A loss of tokens, 0 or 1, of the numbers of the batch."""
    logits = lambda params, x, t, cond=None, *, key=None: slope(  # noqa: E731
        params, jnp.stack([x, 1 - x], -1).astype(t.dtype), t
    )
    loss = make(Field(None, logits))

    def of_numbers(number, key, batch, frozen=None):
        ends = {name: jnp.nan_to_num(batch[name]) > 0 for name in ("x", "x0")}
        return loss(number, key, batch | jax.tree.map(lambda a: a.astype(int), ends), frozen)

    return of_numbers


SENT = paths.bayesian_continuous(paths.geometric_accuracy(0.1))
CLASSIFIER = Field(None, lambda params, x, t, cond=None, *, key=None: slope(params, x, t))
BRIDGE = paths.statistical_bridge(2, steps=4, draws=8)


def of_classes(loss):
    """Tokens, 1 where x is positive, and where it is given x0 as probabilities."""

    def made(params, key, batch, frozen=None):
        batch = dict(batch)
        if "x" in batch:
            batch["x"] = (batch["x"] > 0).astype(np.int32)
        if "x0" in batch:
            p = jax.nn.sigmoid(batch["x0"])
            batch["x0"] = jnp.stack([p, 1 - p], axis=-1)
        return loss(params, key, batch, frozen)

    return made


class Row(NamedTuple):
    loss: Any  # of params that are a number
    paired: bool = True  # whether the batch holds 'x0'
    coupled: bool = False  # whether rows are paired by what they hold, those of weight 0 too


TABLE = {
    "adversarial": Row(game),
    "eulerian_map_distillation": Row(losses.eulerian_map_distillation(MAP)),
    "lagrangian_map_distillation": Row(losses.lagrangian_map_distillation(MAP, VELOCITY)),
    "anchored_consistency": Row(losses.anchored_consistency(MAP)),
    "balanced_matching": Row(losses.balanced_matching(ROUTED)),
    "bayesian_flow": Row(losses.bayesian_flow(VELOCITY, SENT), paired=False),
    "bayesian_flow of steps": Row(losses.bayesian_flow(VELOCITY, SENT, steps=4), paired=False),
    "bayesian_reconstruction": Row(losses.bayesian_reconstruction(VELOCITY, SENT), paired=False),
    "bespoke_error": Row(bespoke_error),
    "bridge_drift": Row(of_classes(losses.bridge_drift(CLASSIFIER, BRIDGE)), paired=False),
    "c_rectified_flow": Row(losses.c_rectified_flow(SCALAR)),
    "causal_matching": Row(next_token, paired=False),
    "consistency_flow_matching": Row(losses.consistency_flow_matching(VELOCITY)),
    "deep_supervision": Row(losses.deep_supervision(BRANCHES, 3)),
    "diffusion_likelihood": Row(
        losses.diffusion_likelihood(VELOCITY, trace=0.1, jacobian=0.1, probes=None), paired=False
    ),
    "consistency_training": Row(losses.consistency_training(VELOCITY, steps=STEPS)),
    "discrete_kl": Row(of_tokens(losses.discrete_kl)),
    "discrete_matching": Row(of_tokens(losses.discrete_matching)),
    "dpo": Row(preferred(losses.dpo(VELOCITY, 2.0))),
    "distillation": Row(losses.distillation(VELOCITY)),
    "distribution_matching": Row(imitation),
    "flow_guided_distillation": Row(losses.flow_guided_distillation(VELOCITY, VELOCITY)),
    "dream": Row(losses.dream(VELOCITY)),
    "grpo": Row(policy(lambda step: losses.grpo(step, clip=np.inf, kl=0.5))),
    "flow_matching": Row(losses.flow_matching(VELOCITY)),
    "flow_matching of a stable coupling": Row(
        losses.chain(couplings.pair(couplings.stable_matching()), losses.flow_matching(VELOCITY)),
        coupled=True,
    ),
    "flow_matching on a manifold": Row(
        losses.flow_matching(
            manifolds.tangent(VELOCITY, TORUS),
            path=paths.geodesic(TORUS),
            metric=losses.riemannian_error(TORUS),
        )
    ),
    "hierarchical_matching": Row(losses.hierarchical_matching(VELOCITY)),
    "improved_mean_flow": Row(losses.improved_mean_flow(MAP)),
    "initial_velocity": Row(losses.initial_velocity(VELOCITY)),
    "interpolant_matching": Row(
        losses.interpolant_matching(LATENT, paths.schroedinger_bridge(0.5))
    ),
    "joint_matching": Row(joint_matching),
    "mean_flow": Row(losses.mean_flow(MAP)),
    "mixture_matching": Row(losses.mixture_matching(Field(None, mixture)), paired=False),
    "nll": Row(nll, paired=False),
    "noised": Row(losses.chain(losses.noised(0.1), losses.flow_matching(VELOCITY))),
    "path_states": Row(
        losses.chain(losses.path_states(2), losses.flow_matching(VELOCITY)), paired=True
    ),
    "perflow": Row(losses.perflow(VELOCITY, VELOCITY, method=1)),
    "ppo": Row(policy(lambda step: losses.ppo(step, clip=np.inf, entropy=0.1))),
    "preference_reward": Row(preferred(losses.preference_reward(SCALAR))),
    "reconstruction": Row(reconstruction, paired=False),
    "rectified_diffusion": Row(losses.rectified_diffusion(VELOCITY)),
    "regularized_nll": Row(regularized_nll, paired=False),
    "reward_weights": Row(of_rewards),
    "selected": Row(selected, paired=False),
    "self_correction": Row(losses.self_correction(VELOCITY, VELOCITY)),
    "shortcut": Row(losses.shortcut(MAP)),
    "token_cross_entropy": Row(
        of_classes(losses.token_cross_entropy(CLASSIFIER, paths.dirichlet(), num_classes=2))
    ),
    "trajectory_distillation": Row(
        losses.trajectory_distillation(MAP, VELOCITY, method=solvers.fixed(1, diffrax.Euler()))
    ),
    "transition_matching": Row(losses.transition_matching(HEADED)),
    "transition_pairs": Row(
        losses.chain(
            losses.transition_pairs(3, condition=lambda x, t, cond: x),
            losses.flow_matching(VELOCITY),
        ),
        paired=False,
    ),
    "trigflow_consistency": Row(losses.trigflow_consistency(VELOCITY)),
    "tunable_distillation": Row(losses.tunable_distillation(VELOCITY, VELOCITY)),
    "velocity_distillation": Row(losses.velocity_distillation(VELOCITY, VELOCITY)),
    "velocity_matching": Row(losses.velocity_matching(VELOCITY)),
}


def batch(row, rows, dtype=np.float32):
    """[3, *event], the last with weight 0, or as many of them as `rows`."""
    x = np.linspace(-1, 1, 3 * 2, dtype=dtype).reshape(3, 2)
    made = {"x": x, "x0": x[::-1] / 2, "weight": np.array([1, 2, 0], dtype)}
    return {name: value[:rows] for name, value in made.items() if row.paired or name != "x0"}


def frozen(number):
    return {"teacher": number, "ema": number, "reference": number + 0.1, "step": jnp.int32(0)}


def gradient(row):
    """By the params, and by what is frozen."""
    loss = lambda params, held, batch, key: row.loss(params, key, batch, frozen(held))  # noqa: E731
    loss = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return lambda number, batch, key: loss(number, number, batch, key)


@functools.cache
def compiled(name):
    """(number, batch, key) -> ((value, metrics), gradients), for several tests."""
    return jax.jit(gradient(TABLE[name]))


@pytest.mark.parametrize("name", TABLE)
def test_what_a_row_of_weight_zero_holds_is_nowhere_in_value_metrics_and_gradient(name):
    """Infinity and NaN, of which 0 times is NaN, as little as numbers. The gradient reaches params,
    and nothing that is frozen."""
    row = TABLE[name]
    whole = batch(row, 3)
    found = lambda rows: compiled(name)(np.float32(0.3), rows, KEY)  # noqa: E731
    spoilt = [
        jax.tree.map(lambda a, bad=bad: np.concatenate([a[:2], np.full_like(a[2:], bad)]), whole)
        | {"weight": whole["weight"]}
        for bad in (np.nan, np.inf)
    ]
    expected = found(spoilt[0] if row.coupled else whole)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(expected))
    slope, held = expected[1]
    assert slope != 0 and held == 0
    for other in spoilt:
        jax.tree.map(np.testing.assert_array_equal, found(other), expected)


@pytest.mark.parametrize("name", TABLE)
def test_types_and_no_rows(name, x64):
    """Under 64 bits float32 stays float32, inside too; a batch without rows is one of the shapes
    that a loss takes."""
    row = TABLE[name]
    for rows in (3, 0):
        made = jax.eval_shape(gradient(row), np.float32(0.3), batch(row, rows), KEY)
        assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype(np.float32)}


KEYLESS = ("bespoke_error", "grpo", "nll", "ppo", "regularized_nll", "selected")


@pytest.mark.parametrize("name", TABLE)
def test_no_key_and_keys_of_the_batch_that_are_unknown(name):
    """Without a key it is an error or the same value."""
    row = TABLE[name]
    run = lambda key, **more: row.loss(  # noqa: E731
        np.float32(0.3), key, batch(row, 3) | more, frozen(np.float32(0.3))
    )
    if name in KEYLESS:
        np.testing.assert_array_equal(run(None)[0], run(KEY)[0])
    else:
        with pytest.raises(ValueError, match="is stochastic: it needs a key"):
            run(None)
    with pytest.raises(ValueError, match=r"\w+: unknown keys in batch: \['y'\]"):
        run(KEY, y=1)


REVERSED = couplings.pair(
    lambda key, x0, x1, cond=None: (np.arange(x1.shape[0])[::-1], np.arange(x1.shape[0]))
)


@pytest.mark.parametrize("name", TABLE)
def test_a_coupling_may_come_before_it(name):
    """With a finite gradient, and with weights in their place; a loss that draws its own noise
    refuses the pairs."""
    row = TABLE[name]
    chained, number = losses.chain(REVERSED, row.loss), np.float32(0.3)
    run = lambda key, rows: chained(number, key, rows, frozen(number))  # noqa: E731
    whole = batch(row, 3)
    if not row.paired:
        with pytest.raises(ValueError, match=r"unknown keys in batch: \['x0'\]"):
            jax.eval_shape(run, KEY, whole)
        return
    # the key of a chain of one transform, and the pairs by hand
    ready, slopes = compiled(name)(
        number, whole | {"x0": whole["x0"][::-1]}, jax.random.split(KEY)[1]
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((ready, slopes)))
    value = jax.jit(run)(KEY, whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), value, ready)


def test_no_rows_and_no_weight_cost_nothing():
    loss = jax.value_and_grad(losses.flow_matching(VELOCITY), has_aux=True)
    for x, weight in (
        (np.zeros((0, 2)), np.zeros(0)),
        (np.zeros((0, 2)), None),
        (np.ones((2, 2)), np.zeros(2)),
    ):
        rows = {"x": x.astype(np.float32)} | ({} if weight is None else {"weight": weight})
        (value, _), slope = jax.jit(loss)(0.3, KEY, rows)
        assert value == slope == 0
