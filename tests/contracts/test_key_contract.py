"""A key is consumed once: by every loss, law of times, coupling, source, solver, guidance and
update that takes one.

The networks here draw from the key that they get, as dropout does. Distributions, bijectors,
transports and flows are held to it in their own tables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from keys import keys_consumed_twice

from jflow import (
    bijectors,
    couplings,
    data,
    distributions,
    domains,
    energy,
    flows,
    gflownets,
    guidance,
    losses,
    manifolds,
    oracles,
    paths,
    solvers,
    times,
    train,
)
from jflow.distributions import mixtures
from jflow.nets import Headed
from jflow.nets._deepflow import Branches
from jflow.types import Field, FlowMap, Velocity

B, KEY = 4, jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, 2)), jnp.float32)
IMAGES, T, LABELS, GRID = (
    jnp.ones((B, 4, 4, 1)),
    jnp.linspace(0.1, 0.9, B),
    jnp.arange(B) % 3,
    np.linspace(0, 1, 4),
)
ONE = {"scale": jnp.ones(())}
NETWORKS = (
    "student",
    "discriminator",
    "fake",
    "model",
    "encoder",
    "velocity",
    "weak",
    "classifier",
)
PARAMS = {**ONE, **dict.fromkeys(NETWORKS, ONE), "base": {}}
FROZEN = {"teacher": ONE, "reference": ONE, "ema": PARAMS, "velocity": ONE, "step": jnp.int32(3)}
BATCH = {"x": X, "x0": X + 1.0, "cond": LABELS, "weight": T}


def field(kind, out):
    """A network of `kind` that makes out(x), times a parameter, of x with numbers dropped by the
    key."""

    def apply(params, x, *args, key=None):
        kept = 1.0 if key is None else jax.random.bernoulli(key, shape=jax.tree.leaves(x)[0].shape)
        return jax.tree.map(
            lambda v: jax.tree.leaves(params)[0] * v, out(jax.tree.map(lambda v: kept * v, x))
        )

    return kind(lambda key, *args: {"scale": jax.random.normal(key)}, apply)


V, MAP, LOGITS = (
    field(Velocity, lambda x: x),
    field(FlowMap, lambda x: x),
    field(Field, lambda x: x.sum(1)),
)
SAME = field(Field, lambda x: x)
TOKENS = jnp.asarray(np.arange(B * 2).reshape(B, 2) % 3)
TOKENS_FLOW = paths.bayesian_discrete(paths.quadratic_accuracy(3.0), 3)
BOTH = field(Field, lambda x: {"velocity": x, "noise": x})
BRANCHES = field(Field, lambda x: Branches(x, x[:, 1:]))
ROUTED = field(
    Field, lambda x: dict.fromkeys(("first", "probability"), x[:, None]) | {"velocity": x}
)
EXACT = mixtures.exact([0.4, 0.6], [[-1.0, 0.0], [1.0, 0.5]], 0.1)
MIXTURE = field(Field, lambda x: EXACT.apply({}, x, jnp.full(x.shape[:1], 0.5)))
FLOW = flows.flow(bijectors.affine((2,)), distributions.normal((2,)))
FLOW_PARAMS = FLOW.init(KEY, X)
MOVING = flows.flow(bijectors.amortized(bijectors.affine((2,))), distributions.normal((2,)))
MOVING_PARAMS = MOVING.init(KEY, X, T[:, None])


class Thinned(nn.Module):
    """A layer with dropout."""

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(nn.Dense(2)(x))


INJECTIVE = flows.injective(Thinned(), Thinned(), distributions.normal((2,)))
POLICY_FLOW = flows.soft_policy(
    bijectors.chain(),
    bijectors.amortized(bijectors.affine((2,))),
    distributions.normal((2,)),
    0.5,
)
POLICY_FLOW_PARAMS = POLICY_FLOW.init(KEY, X, X)
CHAIN = flows.step_chain(
    bijectors.indexed(bijectors.amortized(bijectors.affine((2,))), MOVING, MOVING, (2,)),
    1,
    distributions.normal((2,)),
)
HEADED = Headed(None, field(Field, lambda x: x).apply, V)
ELBO = flows.elbo_flow(bijectors.augment(distributions.normal((1,)), 1), distributions.normal((3,)))
BRIDGE = paths.interpolant(paths.schroedinger_bridge(0.5))
ORACLE = oracles.gaussian([0.0, 0.0], 1.0)
STEPS = losses.grid_steps(lambda n: np.linspace(0, 1, n + 1), 4)
IMPORTANCE = losses.likelihood_importance(cells=4)


def loss(made, without=(), params=PARAMS, frozen=FROZEN, **more):
    """key -> the loss of one batch."""
    batch = {name: value for name, value in {**BATCH, **more}.items() if name not in without}
    return lambda key: made(params, key, batch, frozen)[0]


STOCHASTIC = solvers.euler_maruyama(V, 0.5)
POLICY = train.init_state(ONE, optax.sgd(0.1), KEY, frozen={"reference": ONE})
WHOLE_WALKS, ROLLOUTS = (
    losses.group_rollouts(
        STOCHASTIC,
        lambda x, cond: x[:, 0],
        source=lambda key, n: jax.random.normal(key, (n, 2)),
        grid=GRID,
        groups=2,
        group_size=2,
        conds=lambda key, n: jax.random.randint(key, (n,), 0, 3),
        **options,
    )
    for options in ({}, {"keep": 2, "future_kl": True})
)


def rollout(made, rollouts=ROLLOUTS):
    """key -> the loss of the batch of a rollout."""
    return lambda key: made(ONE, None, rollouts(POLICY, key), FROZEN)[0]


LINE = gflownets.hypergrid(1, 3, lambda position: 0.1 * position[:, 0])
DRAWING = gflownets.policy(LINE, field(Field, lambda x: jnp.repeat(x[:, 0], 2, axis=1)[:, :5]))
DRAWN = {"net": ONE, "potential": ONE, "log_z": jnp.ones(())}
WALKS = gflownets.rollout(LINE, DRAWING, DRAWN, KEY, 3)


def walked(made):
    """key -> the loss of trajectories."""
    guess = {"logits": jnp.zeros(3), "kernel": jnp.ones((3, 3))}
    params = DRAWN | {"model": ONE, "policy": DRAWN, "predictor": guess}
    return lambda key: made(params, key, WALKS._asdict(), {"teacher": DRAWN})[0]


class Identity(nn.Module):
    """An autoencoder that draws from its posterior."""

    def encode(self, x):
        return x, jnp.zeros_like(x)

    def decode(self, z):
        return z


MATCHING, NOISED = losses.flow_matching(V), losses.noised(0.1)
ROWS = flows.any_order((2, 1), (False, True), width=4, num_blocks=1, bins=2, dropout=0.5)
CODES = np.zeros((len(X), 2), np.int32)
LOGITS_OF_TOKENS = field(Field, lambda x: jnp.stack([x, 1.0 - x], -1))
ROWS_PARAMS = ROWS.init(KEY, flows.MixedRows(CODES, X))


class Features(nn.Module):
    """What it is given."""

    @nn.compact
    def __call__(self, x):
        return x


class Dropped(nn.Module):
    """A causal network with dropout."""

    @nn.compact
    def __call__(self, x, cond=None):
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(
            jnp.roll(x, 1, 1).at[:, 0].set(0)
        )


REALS = manifolds.euclidean(1)
MOVES = gflownets.transition(distributions.conditional_mixture((1,)), Features(), REALS, steps=2)
POINTS = gflownets.continuous_policy(REALS, MOVES, MOVES, steps=2, flow=Features())
TWO_MOVES = {
    "params": POINTS.init(KEY),
    "x": X[:, :, None],
    "length": np.full(B, 2),
    "log_reward": T,
}
LOSSES = {
    "causal_matching": loss(
        losses.causal_matching(Dropped(), V, distributions.normal((2,)), path=BRIDGE, draws=2),
        ("x0",),
        params={"net": {}, "token": {"velocity": ONE, "base": {}}},
        x=X[:, None] * jnp.ones((1, 3, 1)),
    ),
    "continuous_detailed_balance": loss(
        losses.continuous_detailed_balance(POINTS), ("x0", "cond"), **TWO_MOVES
    ),
    "continuous_trajectory_balance": loss(
        losses.continuous_trajectory_balance(POINTS), ("x0", "cond"), **TWO_MOVES
    ),
    "bayesian_flow": loss(
        losses.bayesian_flow(V, paths.bayesian_continuous(paths.geometric_accuracy(0.1))), ("x0",)
    ),
    "bayesian_flow of steps": loss(
        losses.bayesian_flow(SAME, TOKENS_FLOW, steps=3), ("x0",), x=TOKENS
    ),
    "bayesian_reconstruction": loss(
        losses.bayesian_reconstruction(SAME, TOKENS_FLOW), ("x0",), x=TOKENS
    ),
    "bridge_drift": loss(
        losses.bridge_drift(SAME, paths.statistical_bridge(3, mask=0.5, steps=4, draws=8)),
        ("x0",),
        x=TOKENS,
    ),
    "token_cross_entropy": loss(
        losses.token_cross_entropy(SAME, paths.dirichlet(), num_classes=3), ("x0",), x=TOKENS
    ),
    "any_order_nll": loss(
        losses.any_order_nll(ROWS), ("x0", "cond"), params=ROWS_PARAMS, code=CODES
    ),
    "deep_supervision": loss(losses.deep_supervision(BRANCHES, 2), params=ONE),
    "diffusion_likelihood": loss(losses.diffusion_likelihood(V, trace=0.1, jacobian=0.1), ("x0",)),
    "chain": loss(
        losses.chain(couplings.pair(couplings.sinkhorn()), losses.drop_cond(0.5, null=3), MATCHING),
        ("x0",),
    ),
    "drop_cond": loss(losses.chain(losses.drop_cond(0.5, null=3), MATCHING)),
    "falling_noise": loss(
        losses.chain(losses.falling_noise(2), MATCHING),
        ("x0",),
        x=X.reshape(B, 2, 1, 1),
    ),
    "balanced_matching": loss(losses.balanced_matching(ROUTED), ("x0",)),
    "balanced_matching on a bridge": loss(losses.balanced_matching(ROUTED, path=BRIDGE)),
    "flow_matching": loss(MATCHING, ("x0",)),
    "flow_matching on a bridge": loss(losses.flow_matching(V, path=BRIDGE)),
    "flow_matching on a manifold": loss(
        losses.chain(
            couplings.with_source(
                couplings.from_distribution(distributions.uniform_on(manifolds.torus(2)))
            ),
            MATCHING,
        ),
        ("x0",),
    ),
    "fresh_source": loss(losses.chain(losses.fresh_source(), MATCHING), paired=LABELS == 0),
    "full_history": loss(losses.chain(losses.full_history(2), MATCHING), ("x0",), x=X[:, :, None]),
    "hierarchical_matching": loss(
        losses.hierarchical_matching(V, [losses.HierarchyLevel()] * 3), ("x0",)
    ),
    "hierarchical_matching on bridges": loss(
        losses.hierarchical_matching(V, [losses.HierarchyLevel(path=BRIDGE)] * 2)
    ),
    "interpolant_matching": loss(losses.interpolant_matching(BOTH, paths.schroedinger_bridge(0.5))),
    "mixture_matching": loss(losses.mixture_matching(MIXTURE, transition=0.5), ("x0",)),
    "diffusion_balance": loss(
        losses.diffusion_balance(V, lambda x: x.sum(1), (2,), grid=2, draws=3),
        tuple(BATCH),
        params={"drift": ONE, "log_z": 0.0},
    ),
    "diffusion_log_variance": loss(
        losses.diffusion_log_variance(V, lambda x: x.sum(1), (2,), grid=2, draws=3), tuple(BATCH)
    ),
    "diffusion_partial_balance": loss(
        losses.diffusion_partial_balance(V, LOGITS, lambda x: x.sum(1), (2,), grid=2, draws=3),
        tuple(BATCH),
        params={"drift": ONE, "flow": ONE},
    ),
    "negative_elbo": loss(
        losses.negative_elbo(ELBO), ("x0", "cond"), params={"bijector": {}, "base": {}}
    ),
    "denoising_score_matching": loss(
        losses.denoising_score_matching(FLOW, 0.5), ("x0",), params=FLOW_PARAMS
    ),
    "nll": loss(losses.nll(FLOW), ("x0",), params=FLOW_PARAMS),
    "noised": loss(losses.chain(losses.noised(0.1), MATCHING)),
    "score_matching": loss(losses.score_matching(FLOW, probes=2), ("x0",), params=FLOW_PARAMS),
    "selected": loss(losses.selected(MATCHING, params=lambda p: p), ("x0",)),
    "reconstruction": loss(losses.reconstruction(Identity()), ("x0", "cond"), params={}),
    "kinetic_energy": loss(
        losses.kinetic_energy(MOVING, draws=3), ("x0", "cond"), params=MOVING_PARAMS
    ),
    "free_form": loss(losses.free_form(INJECTIVE), ("x0", "cond"), params=INJECTIVE.init(KEY, X)),
    "coupled_flows": loss(
        losses.coupled_flows(FLOW, FLOW),
        ("x0", "cond"),
        params={"agent": FLOW_PARAMS, "expert": FLOW_PARAMS},
        expert=X[::-1],
    ),
    "soft_bellman": loss(
        losses.soft_bellman(POLICY_FLOW),
        ("x0",),
        params=POLICY_FLOW_PARAMS,
        frozen={"ema": POLICY_FLOW_PARAMS},
        cond=X,
        next=-X,
        reward=T,
    ),
    "step_nll": loss(
        losses.step_nll(CHAIN),
        ("x0", "cond"),
        params=CHAIN.init(KEY, X[:, None]),
        x=X[:, None],
    ),
    "regularized_nll": loss(
        losses.regularized_nll(
            V, distributions.normal((2,)), divergence=solvers.hutchinson(), method=2
        ),
        ("x0",),
    ),
    "fast_path_gradient": loss(
        losses.fast_path_gradient(
            bijectors.affine((2,)), distributions.normal((2,)), lambda x: x.sum(1), draws=3
        ),
        tuple(BATCH),
        params=FLOW_PARAMS,
    ),
    "forward_kl": loss(
        losses.forward_kl(FLOW, lambda x: x.sum(1), draws=3), tuple(BATCH), params=FLOW_PARAMS
    ),
    "path_gradient": loss(
        losses.path_gradient(FLOW, lambda x: x.sum(1), draws=3), tuple(BATCH), params=FLOW_PARAMS
    ),
    "reverse_kl": loss(
        losses.reverse_kl(FLOW, lambda x: x.sum(1), draws=3), tuple(BATCH), params=FLOW_PARAMS
    ),
    "with_source": loss(
        losses.chain(couplings.with_source(couplings.corrupted(lambda x: x, 0.1)), MATCHING),
        ("x0", "cond"),
    ),
    "adversarial": loss(
        losses.adversarial(losses.fixed_steps(V, 2), LOGITS, r1=0.1, features=LOGITS)
    ),
    "eulerian_map_distillation": loss(
        losses.eulerian_map_distillation(MAP, V, jvp=solvers.finite_difference())
    ),
    "lagrangian_map_distillation": loss(
        losses.lagrangian_map_distillation(MAP, V, jvp=solvers.finite_difference())
    ),
    "anchored_consistency": loss(losses.anchored_consistency(MAP, teacher=V)),
    "annealed_source": loss(
        losses.chain(losses.annealed_source(lambda step: 0.5 + 0 * step), MATCHING)
    ),
    "bespoke_bound": loss(
        solvers.bespoke_bound(V, GRID),
        ("x0",),
        params=solvers.bespoke_params(2),
        x=X[:, None] * jnp.ones((1, 4, 1)),
    ),
    "bespoke_error": loss(solvers.bespoke_error(V), params=solvers.bespoke_params(2)),
    "boss": loss(losses.boss(V, [0.0, 0.5, 1.0]), ("x0",), x=X[:, None] * jnp.ones((1, 3, 1))),
    "c_rectified_flow": loss(losses.c_rectified_flow(losses.inner_potential(V))),
    "consistency_flow_matching": loss(losses.consistency_flow_matching(V)),
    "constrained": loss(
        losses.constrained(MATCHING, {"same": (MATCHING, 1.0)}),
        ("x0",),
        params={"model": ONE, "multipliers": {"same": 0.0}},
    ),
    "constant_acceleration": loss(losses.constant_acceleration(V, V)),
    "consistency_training": loss(losses.consistency_training(V, steps=STEPS)),
    "discrete_kl": loss(losses.discrete_kl(LOGITS_OF_TOKENS), x=CODES, x0=CODES[::-1]),
    "discrete_matching": loss(losses.discrete_matching(LOGITS_OF_TOKENS), x=CODES, x0=CODES[::-1]),
    "distillation": loss(losses.distillation(V)),
    "dpo": loss(losses.dpo(V, 1.0), params=ONE, worse=X[::-1]),
    "grpo": rollout(losses.grpo(STOCHASTIC, kl=0.1)),
    "group_rollouts": lambda key: ROLLOUTS(POLICY, key),
    "adversarial_trajectory_balance": walked(
        losses.adversarial_trajectory_balance(LINE, DRAWING, lambda s: s["position"][:, 0] != 1)
    ),
    "detailed_balance": walked(losses.detailed_balance(DRAWING)),
    "expected_detailed_balance": walked(
        losses.expected_detailed_balance(
            LINE, DRAWING, lambda s: jnp.full((len(s["stopped"]), 2), -jnp.inf)
        )
    ),
    "gflownet_em": walked(losses.gflownet_em(DRAWING, lambda model, z, x: z["position"][:, 0])),
    "outcome_conditioned": walked(losses.outcome_conditioned(DRAWING)),
    "outcome_marginalization": walked(
        losses.outcome_marginalization(
            LINE,
            DRAWING,
            DRAWING,
            distributions.categorical(3),
            lambda s: s["position"][:, 0],
        )
    ),
    "process_supervision": walked(
        losses.process_supervision(DRAWING, lambda s: jnp.float32(s["position"][:, 0]))
    ),
    "forward_looking": walked(losses.forward_looking(DRAWING, LINE.log_reward)),
    "gfn_flow_matching": walked(losses.gfn_flow_matching(LINE, DRAWING)),
    "learned_energy_decomposition": walked(
        losses.learned_energy_decomposition(LINE, DRAWING, field(Field, lambda x: x[:, 0, :2]))
    ),
    "log_partition_variance": walked(losses.log_partition_variance(DRAWING)),
    "modified_detailed_balance": walked(losses.modified_detailed_balance(LINE, DRAWING)),
    "sub_trajectory_balance": walked(losses.sub_trajectory_balance(DRAWING)),
    "trajectory_balance": walked(losses.trajectory_balance(DRAWING)),
    "ppo": rollout(losses.ppo(STOCHASTIC), WHOLE_WALKS),
    "preference_reward": loss(losses.preference_reward(LOGITS), worse=X[::-1]),
    "reward_weights": loss(losses.chain(losses.reward_weights(1.0), MATCHING), reward=T),
    "distribution_matching": loss(losses.distribution_matching(losses.fixed_steps(V, 2), V, V)),
    "dream": loss(losses.dream(V)),
    "flow_guided_distillation": loss(losses.flow_guided_distillation(V, V)),
    "improved_mean_flow": loss(losses.improved_mean_flow(MAP, omega=1.0, kappa=0.5, null=3)),
    "initial_velocity": loss(losses.initial_velocity(V)),
    "marginal_transport": loss(losses.marginal_transport(V, V)),
    "joint_matching": loss(
        losses.joint_matching(V, time=times.parts(("a", "b")), path=BRIDGE),
        ("x0",),
        x={"a": X, "b": X[:, ::-1]},
    ),
    "mean_flow": loss(losses.mean_flow(MAP, omega=1.0, kappa=0.5, null=3)),
    "student_only": loss(losses.student_only(MATCHING)),
    "perflow": loss(losses.perflow(V, V, method=1)),
    "path_states": loss(losses.chain(losses.path_states(2, BRIDGE), MATCHING), ("x0",)),
    "phased_rectified_diffusion": loss(
        losses.phased_rectified_diffusion(V, V, schedule=paths.schedules.cosine(), method=1)
    ),
    "rectified_diffusion": loss(losses.rectified_diffusion(V)),
    "self_corrected": loss(losses.self_corrected(V, V, LOGITS), frozen={**FROZEN, "ema": PARAMS}),
    "self_correction": loss(losses.self_correction(V, V)),
    "shared_timesteps": loss(losses.shared_timesteps(MAP, V, V, GRID)),
    "shortcut": loss(losses.shortcut(MAP, levels=2, scale=2.0, null=3)),
    "sum_losses": loss(losses.sum_losses({"one": MATCHING, "other": MATCHING})),
    "trajectory_distillation": loss(losses.trajectory_distillation(MAP, V, straight=1.0, method=1)),
    "transfer": loss(
        losses.transfer(bijectors.affine((2,)), lambda x: x.sum(1), lambda x: -x.sum(1)),
        ("x0", "cond"),
        params=FLOW_PARAMS["bijector"],
    ),
    "transition_matching": loss(losses.transition_matching(HEADED), ("x0",)),
    "transition_pairs": loss(
        losses.chain(losses.transition_pairs(2), MATCHING), ("x0",), x=X[:, :, None]
    ),
    "trigflow_consistency": loss(losses.trigflow_consistency(V, jvp=solvers.finite_difference())),
    "tunable_distillation": loss(losses.tunable_distillation(V, V, align=0.1)),
    "turbo": loss(losses.turbo(V, LOGITS, lambda g, x: (g - x).sum(1), method=2)),
    "variational_noise": loss(
        losses.variational_noise(MATCHING, losses.noise_encoder(V), kl=0.1), ("x0",)
    ),
    "velocity_distillation": loss(losses.velocity_distillation(V, V)),
    "velocity_matching": loss(losses.velocity_matching(V)),
    "velocity_refiner": loss(losses.velocity_refiner(field(Field, lambda x: x[0]), V)),
}
NOT_LOSSES = (
    "ConvexCost GanObjective Generate HierarchyLevel Importance Pairs ScoreWeight "
    "adaptive_weight averaged_target clipped_tangent count_steps coupled_log_ratio "
    "draw_pairs draw_times easy_steps end_error euler_step fixed_steps flow_map_residual "
    "frozen_entry grid_steps "
    "group_advantages policy_batch "
    "heun_step hinge_gan inner_potential inverse_error_weight inverse_noise_step "
    "inverse_time_step kl_weight learn_importance learned_times least_squares_gan "
    "likelihood_importance likelihood_weight mean_event mean_of_rows mean_squared_error "
    "noise_encoder noise_error non_saturating_gan normalized_tangent online_target "
    "perceptual_huber potential_velocity power_cost pseudo_huber quadratic_cost read_batch "
    "relativistic_gan riemannian_error squared_and_cosine_error"
).split()


def law(time):
    return lambda key: time(key, B)


def balanced(key):
    """A step of two losses, and of their weights."""
    balance = train.gradnorm({"matching": MATCHING, "noised": losses.chain(NOISED, MATCHING)})
    step = train.make_step(balance.loss, optax.sgd(0.1), refresh=balance.refresh)
    state = train.init_state(ONE, optax.sgd(0.1), key, frozen={"gradnorm": balance.init()})
    return step(state, {"x": X})


def update(accumulate):
    step = train.make_step(
        MATCHING, optax.sgd(0.1), ema=0.9, refresh=losses.count_steps, accumulate=accumulate
    )

    def run(key):
        state = train.init_state(ONE, optax.sgd(0.1), KEY, ema=0.9, frozen={"step": jnp.int32(0)})
        return step(state._replace(key=key), BATCH)

    return run


LOG_STEP = {"log_step": jnp.zeros(())}
OTHERS = {
    "gflownets.rollouts": lambda key: gflownets.rollouts(LINE, DRAWING, 3, epsilon=0.1)(
        train.init_state(DRAWN, optax.sgd(0.1), KEY), key
    ),
    "gflownets.log_prob": lambda key: gflownets.log_prob(
        LINE, DRAWING, DRAWN, key, WALKS.terminal, draws=2
    ),
    "losses.easy_steps": lambda key: losses.easy_steps(2)(key, B, FROZEN),
    "losses.grid_steps": lambda key: STEPS(key, B, FROZEN),
    "losses.draw_pairs": lambda key: losses.draw_pairs("own", key, {"x": X}, times.pairs()),
    "losses.flow_map_residual": lambda key: losses.flow_map_residual(
        "own", MAP, ONE, X, T, T, X, key=key
    ),
    "domains.ball": lambda key: domains.ball((2,)).uniform.sample({}, key, B),
    "data.normal_source": law(data.normal_source((2,))),
    "losses.potential_velocity": lambda key: losses.potential_velocity(
        losses.inner_potential(V)
    ).apply(PARAMS, X, T, LABELS, key=key),
    "energy.run_chains": lambda key: energy.run_chains(
        energy.successive_kernels(
            energy.independence_kernel(FLOW, FLOW_PARAMS), energy.hamiltonian_kernel()
        ),
        energy.banana(),
        X,
        key,
        2,
        thin=2,
    ),
    "flows.path_sampler": lambda key: flows.path_sampler(
        bijectors.chain(
            bijectors.metropolis(lambda x: x.sum(1)), bijectors.hamiltonian(lambda x: x.sum(1))
        ),
        distributions.normal((2,)),
    )({"bijector": {"0": LOG_STEP, "1": LOG_STEP}, "base": {}}, key, B),
    "solvers.diffusion_sampler": lambda key: solvers.diffusion_sampler(V, (2,), grid=2)(
        ONE, key, B
    ),
    "solvers.discrete_bound": lambda key: solvers.discrete_bound(
        LOGITS_OF_TOKENS, ONE, distributions.tokens((2,), [0.5, 0.5]), CODES, key, times=4
    ),
    "paths.dirichlet": lambda key: paths.dirichlet().target(
        jnp.full((B, 2), 0.5), jnp.eye(2)[LABELS % 2], T, key=key
    ),
    "paths.statistical_bridge": lambda key: paths.statistical_bridge(
        3, mask=0.5, steps=4, draws=8
    ).path.target(None, jnp.eye(3)[LABELS], T, key=key),
    "paths.statistical_bridge start": lambda key: paths.statistical_bridge(
        3, mask=0.5, steps=4, draws=8
    ).start(key, (B,)),
    "guidance.simplex_classifier_guidance": lambda key: guidance.simplex_classifier_guidance(
        SAME, LOGITS, 2.0
    ).apply({"field": ONE, "classifier": ONE}, jnp.full((B, 2), 0.5), T, LABELS, key=key),
    "solvers.bridge_step": lambda key: solvers.bridge_step(
        SAME, paths.statistical_bridge(3, mask=0.0, steps=4, draws=8)
    )(ONE, jnp.eye(3)[LABELS], 0.2, 0.4, key),
    "solvers.sample_bayesian": lambda key: solvers.sample_bayesian(
        SAME, TOKENS_FLOW, ONE, key, (B,), grid=2
    ),
    "solvers.sample_hierarchy": lambda key: solvers.sample_hierarchy(
        V, ONE, X, key, grids=(2, 2, 1)
    ),
    "solvers.sample_kernels": lambda key: solvers.sample_kernels(
        distributions.normal((2, 1)), {}, X[:, :, None], key, grid=2
    ),
    "solvers.sample_transitions": lambda key: solvers.sample_transitions(
        HEADED, ONE, X, key, grid=2, method=2
    ),
    "solvers.log_prob": lambda key: solvers.log_prob(
        V, ONE, X, lambda x: x.sum(1), key=key, divergence=solvers.hutch_plus_plus(1), method=2
    ),
    "solvers.sample_flow_map": lambda key: solvers.sample_flow_map(
        MAP, ONE, X, steps=3, renoise=1.0, key=key
    ),
    "solvers.sample_variational": lambda key: solvers.sample_variational(
        V, losses.noise_encoder(V), PARAMS, X, steps=3, key=key
    ),
    "solvers.total_derivative": lambda key: solvers.total_derivative(
        MAP, ONE, X, T, T, X, key=key, jvp=solvers.finite_difference()
    ),
    "losses.learned_times": lambda key: losses.learned_times(V)(
        ONE, {"importance": IMPORTANCE}, key, {"x": X}
    ),
    "distributions.mixtures.sample": lambda key: mixtures.sample(EXACT.apply({}, X, T), key),
    "oracles.gaussian": law(ORACLE.sample),
    "oracles.mixture": law(oracles.mixture([1.0, 1.0], [[0.0, 0.0], [1.0, 1.0]], 1.0).sample),
    "train.gradnorm": balanced,
    "train.make_step": update(1),
    "train.make_step in parts": update(2),
}


def test_every_public_loss_is_in_the_table():
    elsewhere = {"with_source", *solvers.__all__}
    assert {*losses.__all__} == {name.split()[0] for name in LOSSES} - elsewhere | set(NOT_LOSSES)


@pytest.mark.parametrize("name", [*LOSSES, *OTHERS])
def test_keys_are_consumed_once(name):
    assert not keys_consumed_twice({**LOSSES, **OTHERS}[name], KEY)
