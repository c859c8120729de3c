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
    gflownets,
    losses,
    manifolds,
    paths,
    solvers,
    times,
)
from jflow.distributions import mixtures
from jflow.nets import Headed
from jflow.types import Distribution, Field, FlowMap, Velocity

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
    return {"velocity": slope(params, x, t), "first": load, "probability": probability}


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


def of_flow(loss):
    """A loss of a flow's params as one of a number."""

    def of_number(number, key, batch, frozen=None):
        params = {"bijector": {"log_scale": number * jnp.ones(2), "shift": jnp.ones(2)}, "base": {}}
        return loss(params, key, batch)

    return of_number


def nll(number, key, batch, frozen=None):
    return of_flow(losses.nll(FLOW))(number, key, batch)


def kinetic_energy(number, key, batch, frozen=None):
    moving = flows.flow(bijectors.amortized(bijectors.affine((2,))), distributions.normal((2,)))
    leaves = {"log_scale": number * jnp.ones(2), "shift": jnp.ones(2)}
    kernel = jax.tree.map(lambda leaf: leaf[None], leaves)
    params = {"bijector": {"net": {}, "kernel": kernel, "bias": leaves}, "base": {}}
    return losses.kinetic_energy(moving, draws=3)(params, key, batch)


def step_nll(number, key, batch, frozen=None):
    """Rows of two steps of one number."""
    chain = flows.step_chain(bijectors.affine((1,)), 2, distributions.normal((1,)))
    params = {"steps": {"log_scale": number * jnp.ones((2, 1)), "shift": jnp.ones((2, 1))}}
    rows = {**batch, "x": batch["x"][..., None]}
    return losses.step_nll(chain)({**params, "base": {}}, key, rows)


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


def free_form(number, key, batch, frozen=None):
    model = flows.injective(nn.Dense(1), nn.Dense(2), distributions.normal((1,)))
    params = {
        "encoder": {"kernel": jnp.full((2, 1), number), "bias": jnp.full(1, number)},
        "decoder": {"kernel": jnp.full((1, 2), number), "bias": jnp.full(2, number)},
    }
    return losses.free_form(model)({**params, "base": {}}, key, batch)


def affine_params(number, features):
    """Of an amortized affine map of one number."""
    leaf, row = jnp.full(1, number), jnp.full((features, 1), number)
    kernel, bias = ({"log_scale": a, "shift": a} for a in (row, leaf))
    return {"net": {}, "kernel": kernel, "bias": bias}


def soft_bellman(number, key, batch, frozen=None):
    """Actions, states and rewards of the columns of x."""
    linear = bijectors.amortized(bijectors.affine((1,)))
    policy = flows.soft_policy(bijectors.chain(), linear, distributions.normal((1,)), 0.5)
    make = lambda number: {  # noqa: E731
        "bend": {},
        "linear": affine_params(number, 1),
        "base": {},
        "shift": {},
    }
    x, rest = batch["x"], {k: v for k, v in batch.items() if k != "x"}
    rows = {"x": x[:, :1], "cond": x[:, 1:], "next": -x[:, 1:], "reward": x[:, 0]}
    ema = {"ema": make(frozen["ema"])}
    return losses.soft_bellman(policy)(make(number), key, {**rest, **rows}, ema)


def coupled_flows(number, key, batch, frozen=None):
    params = {"bijector": {"log_scale": number * jnp.ones(2), "shift": jnp.ones(2)}, "base": {}}
    loss = losses.coupled_flows(FLOW, distributions.normal((2,)))
    return loss({"agent": params, "expert": {}}, key, {**batch, "expert": 2 * batch["x"]})


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


def constrained(params, key, batch, frozen=None):
    """The same loss as the aim and as the constraint."""
    matching = losses.flow_matching(VELOCITY)
    loss = losses.constrained(matching, {"same": (matching, 0.1)})
    return loss({"model": params, "multipliers": {"same": params}}, key, batch, frozen)


def transfer(number, key, batch, frozen=None):
    square = lambda x: -jnp.sum(jnp.square(x), axis=1)  # noqa: E731
    loss = losses.transfer(bijectors.affine((2,)), square, square)
    params = {"log_scale": number * jnp.ones(2), "shift": number * jnp.ones(2)}
    return loss(params, key, batch)


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


class Same(nn.Module):
    """What it is given."""

    @nn.compact
    def __call__(self, x):
        return x


def balance(make):
    """A loss of a continuous GFlowNet, whose trajectories make two moves, to the numbers of x."""
    normal = lambda mean, x: -jnp.sum(jnp.square(x - mean), axis=1)  # noqa: E731
    moved = lambda params, other, x, step: normal(params * x, other)  # noqa: E731
    move = gflownets.Transition(None, moved, None)
    line = manifolds.euclidean(1)
    loss = make(gflownets.continuous_policy(line, move, move, steps=2, flow=Same()))

    def of_points(number, key, batch, frozen=None):
        x = batch["x"]
        params = {"forward": number, "backward": number / 2, "log_z": number}
        params["flow"] = {"net": {}, "kernel": jnp.full_like(x, number, shape=5)}
        more = {"length": np.full(x.shape[0], 2), "log_reward": x[:, 0]}
        return loss(params, key, {**batch, "x": x[..., None], **more}, frozen)

    return of_points


GRID = gflownets.hypergrid(1, 3, lambda position: 0.1 * position[:, 0])
WALK = gflownets.policy(
    GRID,
    Field(
        None,
        lambda params, x, t, cond=None, *, key=None: jnp.tanh(
            params * x.reshape(-1, 3) @ np.float32(np.arange(15).reshape(3, 5) % 4)
        ),
    ),
)
STEPPED = Field(None, lambda params, x, t, cond=None, *, key=None: jnp.tanh(params * x[:, 0, :2]))


def of_trajectories(loss):
    """Walks of 1 to 3 steps along a line, whose log-reward is the first column."""

    def made(number, key, batch, frozen=None):
        steps, b = np.arange(4), batch["x"].shape[0]
        ends = np.array([2, 1, 0])[:b, None]  # where they stop
        rows = {
            "states": {
                "position": np.minimum(steps, ends)[..., None].astype(np.int32),
                "stopped": steps > ends,
            },
            "action": (steps[:3] >= ends).astype(np.int32),
            "backward_action": (steps[:3] >= ends).astype(np.int32),
            "valid": steps[:3] <= ends,
            "log_reward": batch["x"][:, 0],
        }
        params = {"net": number, "log_z": number, "potential": number}
        return loss(params, key, {k: v for k, v in batch.items() if k != "x"} | rows, frozen)

    return made


def fine_tuned(params, key, batch, frozen=None):
    """The sum over outcomes, with a predictor of one number."""
    predictor = Distribution(
        None,
        lambda params, y, cond=None, *, key=None: -params * jnp.square(y - cond[:, 0, 1]),
        None,
    )
    loss = losses.outcome_marginalization(
        GRID, WALK, WALK, predictor, lambda state: jnp.float32(state["position"][:, 0])
    )
    teacher = None if frozen is None else {"net": frozen["teacher"]}
    return loss({"policy": params, "predictor": params["net"]}, key, batch, {"teacher": teacher})


def inferred(params, key, batch, frozen=None):
    """A GFlowNet of latents, with a model of one number."""
    loss = losses.gflownet_em(WALK, lambda model, z, x: model * z["position"][:, 0])
    return loss(params | {"model": params["net"]}, key, batch)


def chance(state):
    """It moves from the second place, one way or the other."""
    turn = (state["position"] == 1) & ~state["stopped"][:, None]
    return jnp.where(turn, jnp.log(jnp.array([[0.3, 0.7]], jnp.float32)), -jnp.inf)


class Row(NamedTuple):
    loss: Any  # of params that are a number
    paired: bool = True  # whether the batch holds 'x0'
    coupled: bool = False  # whether rows are paired by what they hold, those of weight 0 too


TABLE = {
    "adversarial_trajectory_balance": Row(
        of_trajectories(
            losses.adversarial_trajectory_balance(GRID, WALK, lambda s: s["position"][:, 0] != 1)
        ),
        paired=False,
    ),
    "expected_detailed_balance": Row(
        of_trajectories(losses.expected_detailed_balance(GRID, WALK, chance)), paired=False
    ),
    "gflownet_em": Row(of_trajectories(inferred), paired=False),
    "outcome_conditioned": Row(of_trajectories(losses.outcome_conditioned(WALK)), paired=False),
    "outcome_marginalization": Row(of_trajectories(fine_tuned), paired=False),
    "process_supervision": Row(
        of_trajectories(
            losses.process_supervision(WALK, lambda s: jnp.float32(s["position"][:, 0]))
        ),
        paired=False,
    ),
    "adversarial": Row(game),
    "eulerian_map_distillation": Row(losses.eulerian_map_distillation(MAP)),
    "kinetic_energy": Row(kinetic_energy, paired=False),
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
    "constrained": Row(constrained),
    "deep_supervision": Row(losses.deep_supervision(BRANCHES, 3)),
    "diffusion_likelihood": Row(
        losses.diffusion_likelihood(VELOCITY, trace=0.1, jacobian=0.1, probes=None), paired=False
    ),
    "consistency_training": Row(losses.consistency_training(VELOCITY, steps=STEPS)),
    "continuous_detailed_balance": Row(balance(losses.continuous_detailed_balance), paired=False),
    "continuous_trajectory_balance": Row(
        balance(losses.continuous_trajectory_balance), paired=False
    ),
    "coupled_flows": Row(coupled_flows, paired=False),
    "discrete_kl": Row(of_tokens(losses.discrete_kl)),
    "discrete_matching": Row(of_tokens(losses.discrete_matching)),
    "dpo": Row(preferred(losses.dpo(VELOCITY, 2.0))),
    "distillation": Row(losses.distillation(VELOCITY)),
    "distribution_matching": Row(imitation),
    "flow_guided_distillation": Row(losses.flow_guided_distillation(VELOCITY, VELOCITY)),
    "dream": Row(losses.dream(VELOCITY)),
    "grpo": Row(policy(lambda step: losses.grpo(step, clip=np.inf, kl=0.5))),
    "free_form": Row(free_form, paired=False),
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
    "denoising_score_matching": Row(
        of_flow(losses.denoising_score_matching(FLOW, 0.5)), paired=False
    ),
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
    "score_matching": Row(of_flow(losses.score_matching(FLOW)), paired=False),
    "self_correction": Row(losses.self_correction(VELOCITY, VELOCITY)),
    "shortcut": Row(losses.shortcut(MAP)),
    "soft_bellman": Row(soft_bellman, paired=False),
    "step_nll": Row(step_nll, paired=False),
    "token_cross_entropy": Row(
        of_classes(losses.token_cross_entropy(CLASSIFIER, paths.dirichlet(), num_classes=2))
    ),
    "detailed_balance": Row(of_trajectories(losses.detailed_balance(WALK)), paired=False),
    "forward_looking": Row(
        of_trajectories(losses.forward_looking(WALK, GRID.log_reward)), paired=False
    ),
    "gfn_flow_matching": Row(of_trajectories(losses.gfn_flow_matching(GRID, WALK)), paired=False),
    "learned_energy_decomposition": Row(
        of_trajectories(losses.learned_energy_decomposition(GRID, WALK, STEPPED)), paired=False
    ),
    "log_partition_variance": Row(
        of_trajectories(losses.log_partition_variance(WALK)), paired=False
    ),
    "modified_detailed_balance": Row(
        of_trajectories(losses.modified_detailed_balance(GRID, WALK)), paired=False
    ),
    "sub_trajectory_balance": Row(
        of_trajectories(losses.sub_trajectory_balance(WALK)), paired=False
    ),
    "trajectory_balance": Row(of_trajectories(losses.trajectory_balance(WALK)), paired=False),
    "trajectory_distillation": Row(
        losses.trajectory_distillation(MAP, VELOCITY, method=solvers.fixed(1, diffrax.Euler()))
    ),
    "transfer": Row(transfer, paired=False),
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


KEYLESS = (
    "adversarial_trajectory_balance",
    "bespoke_error",
    "continuous_detailed_balance",
    "continuous_trajectory_balance",
    "coupled_flows",
    "detailed_balance",
    "expected_detailed_balance",
    "forward_looking",
    "gflownet_em",
    "gfn_flow_matching",
    "grpo",
    "log_partition_variance",
    "modified_detailed_balance",
    "nll",
    "outcome_conditioned",
    "outcome_marginalization",
    "ppo",
    "process_supervision",
    "regularized_nll",
    "selected",
    "soft_bellman",
    "step_nll",
    "sub_trajectory_balance",
    "trajectory_balance",
    "transfer",
)


@pytest.mark.parametrize("name", TABLE)
def test_no_key_and_keys_of_the_batch_that_are_unknown(name):
    """Without a key it is an error or the same value."""
    row, number = TABLE[name], np.float32(0.3)
    rows = batch(row, 3)
    run = lambda key, rows: row.loss(number, key, rows, frozen(number))  # noqa: E731
    if name in KEYLESS:
        (expected, _), _ = compiled(name)(number, rows, KEY)
        found, _ = jax.jit(functools.partial(run, None))(rows)
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32, in another program
    else:
        with pytest.raises(ValueError, match="is stochastic: it needs a key"):
            run(None, rows)
    with pytest.raises(ValueError, match=r"\w+: unknown keys in batch: \['y'\]"):
        run(KEY, rows | {"y": 1})


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
