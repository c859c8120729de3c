"""The methods of run.py: for each a loss, the params that it starts from, and a sampler of n
evaluations.

Networks: `Net`, 3 x 128, for velocities and flow maps alike, so that a student can start from the
teacher's params.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffrax
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

import jflow
from jflow import losses, nets, paths, solvers, times
from jflow.solvers import grids
from jflow.types import Loss, Params

EULER = diffrax.Euler()
WINDOWS = 4


class Net(nn.Module):
    """x, t and r - t (0 for a velocity) side by side, and cond, into SiLU layers: smooth in all of
    them."""

    width: int = 128
    outputs: int = 2

    @nn.compact
    def __call__(self, x, t, cond=None, r=None):
        gap = jnp.zeros_like(t) if r is None else r - t
        inputs = jnp.concatenate([x, t[:, None], gap[:, None]], axis=1)
        return nn.Dense(self.outputs)(nets.MLP((self.width,) * 3, nn.silu)(inputs, cond))


class Job(NamedTuple):
    """One training: init(key, trained) -> params, frozen(trained) -> dict, with trained the params
    of the jobs before it by name; draw(params, x0, n, key) -> (x1, info) by n evaluations, for n in
    counts.

    rows: of 'data', or of the pairs of a flow (`pairs_of`, the name of its job) without the
    `truncate` farthest of them.
    rate_factors: the parts of params that have an optimizer of their own, each with a factor of the
    learning rate.
    memory: the decay of the averaged params. longer: times the updates that the others have.
    """

    loss: Loss
    init: Callable[[Any, Mapping[str, Params]], Params]
    draw: Callable
    counts: tuple[int, ...] = (1, 2, 4, 8)
    pairs_of: str | None = None
    truncate: float = 0.0
    frozen: Callable[[Mapping[str, Params]], dict] = lambda trained: {}
    refresh: Callable | None = None
    rate_factors: Mapping[str, float] | None = None
    memory: float = 0.999
    longer: int = 1


velocity, model = jflow.velocity(Net()), jflow.flow_map(Net())
small = jflow.velocity(Net(64))
critic = jflow.field(Net(outputs=1))
X, T = jnp.zeros((1, 2)), jnp.zeros(1)


def fresh(key, trained):
    return velocity.init(key, X, T)


def from_teacher(key, trained):
    return trained["teacher"]


def taught(trained):
    return {"teacher": trained["teacher"]}


def counted(trained):
    return {"step": jnp.zeros((), jnp.int32)}


def both(trained):
    return taught(trained) | counted(trained)


def with_fake(key, trained):
    return {"student": trained["teacher"], "fake": trained["teacher"]}


def with_critic(key, trained):
    return {"student": trained["teacher"], "discriminator": critic.init(key, X, T)}


def euler(params, x0, n, key):
    return solvers.sample(velocity, params, x0, method=solvers.fixed(n, EULER))


def small_euler(params, x0, n, key):
    return solvers.sample(small, params, x0, method=solvers.fixed(n, EULER))


def jumps(params, x0, n, key):
    return solvers.sample_flow_map(model, params, x0, steps=n)


def to_data(params, x0, n, key):
    return solvers.sample_flow_map(
        solvers.consistency_map(velocity), params, x0, steps=n, renoise=1.0, key=key
    )


def anchored(params, x0, n, key):
    return solvers.sample_flow_map(model, params, x0, steps=n, renoise=1.0, key=key)


def windows(params, x0, n, key):
    return solvers.sample(
        velocity, params, x0, method=solvers.on_grid(grids.windows(WINDOWS, n), EULER)
    )


def of_student(draw):
    return lambda params, x0, n, key: draw(params["student"], x0, n, key)


def jobs(steps: int) -> dict[str, Job]:
    """All of them, in the order of training, `steps` updates each."""
    pairs = times.pairs(equal=0.5)
    warmup, every = steps // 4, max(1, steps // 8)
    cosine = paths.schedules.cosine()
    grid = np.linspace(0, 1, WINDOWS + 1)
    return {
        "teacher": Job(losses.flow_matching(velocity), fresh, euler),
        # from scratch
        "MeanFlow": Job(losses.mean_flow(model, times=pairs, power=0.0), fresh, jumps),
        "MeanFlow, 4 times the updates": Job(
            losses.mean_flow(model, times=pairs, power=0.0), fresh, jumps, longer=4
        ),
        "improved MeanFlow": Job(
            losses.improved_mean_flow(model, times=pairs, power=0.0), fresh, jumps
        ),
        "shortcut": Job(losses.shortcut(model, levels=4), fresh, jumps),
        "consistency training, easy": Job(
            losses.consistency_training(velocity, steps=losses.easy_steps(every)),
            fresh,
            to_data,
            frozen=counted,
            refresh=losses.count_steps,
        ),
        "consistency training, growing grid": Job(
            losses.consistency_training(
                velocity,
                steps=losses.grid_steps(solvers.grids.uniform, (8, 16, 32, 64, 128), steps // 5),
            ),
            fresh,
            to_data,
            frozen=counted,
            refresh=losses.count_steps,
        ),
        "sCM, from scratch": Job(
            losses.trigflow_consistency(
                velocity, warmup=warmup, tangent=losses.clipped_tangent(jnp.inf)
            ),
            fresh,
            to_data,
            frozen=counted,
            refresh=losses.count_steps,
        ),
        "variational noise coupling": variational(every),
        "consistency flow matching": Job(
            losses.consistency_flow_matching(velocity, segments=2, delta=1e-2),
            fresh,
            euler,
            counts=(2, 4, 8),
        ),
        # from the teacher, without pairs
        "MeanFlow of the teacher": Job(
            losses.mean_flow(model, times=pairs, teacher=velocity, power=0.0),
            from_teacher,
            jumps,
            frozen=taught,
        ),
        "consistency distillation": Job(
            losses.consistency_training(
                velocity,
                steps=losses.grid_steps(solvers.grids.uniform, 64),
                teacher=velocity,
                advance=losses.heun_step,
            ),
            from_teacher,
            to_data,
            frozen=taught,
        ),
        "sCM": Job(
            losses.trigflow_consistency(velocity, teacher=velocity, warmup=warmup),
            from_teacher,
            to_data,
            frozen=both,
            refresh=losses.count_steps,
        ),
        "FACM": Job(
            losses.anchored_consistency(model, teacher=velocity),
            from_teacher,
            anchored,
            frozen=taught,
        ),
        "AYF, Eulerian": Job(
            losses.eulerian_map_distillation(model, velocity, warmup=warmup),
            from_teacher,
            jumps,
            frozen=both,
            refresh=losses.count_steps,
        ),
        "AYF, Lagrangian": Job(
            losses.lagrangian_map_distillation(model, velocity, warmup=warmup),
            from_teacher,
            jumps,
            frozen=both,
            refresh=losses.count_steps,
        ),
        "TraFlow": Job(
            losses.trajectory_distillation(model, velocity), from_teacher, jumps, frozen=taught
        ),
        "PeRFlow": Job(
            losses.perflow(
                velocity, velocity, knots=WINDOWS, time=times.sequential(grid, starts=0.75)
            ),
            from_teacher,
            windows,
            counts=(4, 8),
            frozen=taught,
        ),
        "MDT-dist": Job(
            losses.marginal_transport(velocity, velocity), from_teacher, to_data, frozen=taught
        ),
        "distribution matching": Job(
            losses.distribution_matching(losses.fixed_steps(velocity, 1), velocity, velocity),
            with_fake,
            of_student(euler),
            counts=(1,),
            frozen=taught,
            rate_factors={"student": 0.1, "fake": 1.0},
        ),
        "SD3.5-Flash, 4 shared times": Job(
            losses.shared_timesteps(solvers.consistency_map(velocity), velocity, velocity, grid),
            with_fake,
            of_student(to_data),
            counts=(4,),
            frozen=taught,
            rate_factors={"student": 0.1, "fake": 1.0},
        ),
        "self-corrected, adversarial": Job(
            losses.self_corrected(velocity, velocity, critic, reach=0.1, weight=1e-3, r1=0.1),
            with_critic,
            of_student(to_data),
            frozen=taught,
            rate_factors={"student": 1.0, "discriminator": 1.0},
            memory=0.95,
        ),
        # on the teacher's pairs
        "2-rectified": Job(losses.flow_matching(velocity), from_teacher, euler, pairs_of="teacher"),
        "2-rectified, RF++": Job(
            losses.flow_matching(velocity, time=times.u_shaped(), metric=losses.pseudo_huber(0.01)),
            from_teacher,
            euler,
            pairs_of="teacher",
        ),
        "2-rectified, distilled": Job(
            losses.distillation(velocity), from_teacher, euler, counts=(1,), pairs_of="2-rectified"
        ),
        "rectified diffusion, cosine": Job(
            losses.rectified_diffusion(velocity, cosine),
            fresh,
            lambda params, x0, n, key: solvers.sample(
                velocity, params, x0, method=solvers.fixed(n, solvers.ddim(cosine))
            ),
            pairs_of="teacher",
        ),
        "MeanFlow on rectified pairs": Job(
            losses.mean_flow(model, times=times.rectified_pairs(equal=0.5), power=0.0),
            from_teacher,
            jumps,
            pairs_of="teacher",
            truncate=0.1,
        ),
        "SlimFlow, width 64": Job(
            losses.chain(
                losses.annealed_source(optax.linear_schedule(1.0, 0.0, steps // 2)),
                losses.flow_matching(small),
            ),
            lambda key, trained: small.init(key, X, T),
            small_euler,
            pairs_of="teacher",
            frozen=counted,
            refresh=losses.count_steps,
        ),
        "SlimFlow, width 64, distilled": Job(
            losses.flow_guided_distillation(small, small),
            lambda key, trained: trained["SlimFlow, width 64"],
            small_euler,
            counts=(1,),
            pairs_of="teacher",
            frozen=lambda trained: {"teacher": trained["SlimFlow, width 64"]},
        ),
        "constant acceleration": Job(
            accelerating,
            lambda key, trained: {
                "velocity": trained["teacher"],
                "acceleration": velocity.init(key, X, T, solvers.AccelerationCondition(X)),
            },
            accelerated,
            counts=(2, 4, 8),
            pairs_of="teacher",
        ),
        "turbo, 4 steps": Job(
            losses.turbo(
                velocity,
                critic,
                lambda g, x: jnp.mean(jnp.abs(g - x), axis=1),
                method=4,
                reconstruction_weight=1.0,
            ),
            with_critic,
            of_student(euler),
            counts=(4,),
            pairs_of="teacher",
            rate_factors={"student": 0.1, "discriminator": 1.0},
        ),
    }


def variational(every) -> Job:
    encoder = losses.noise_encoder(jflow.velocity(Net(64, 4)))
    inner = losses.consistency_training(velocity, steps=losses.easy_steps(every))

    def init(key, trained):
        return {"model": velocity.init(key, X, T), "encoder": encoder.init(key, X, T)}

    def draw(params, x0, n, key):
        return solvers.sample_variational(velocity, encoder, params, x0, steps=n, key=key)

    loss = losses.variational_noise(inner, encoder, kl=0.1)
    return Job(loss, init, draw, frozen=counted, refresh=losses.count_steps)


def accelerating(params, key, batch, frozen=None):
    """Both networks of a constant acceleration flow at once; the second gets what the first
    says, without gradient."""
    start, _ = losses.initial_velocity(velocity)(params["velocity"], key, batch)
    held = {"velocity": params["velocity"]}
    rest, _ = losses.constant_acceleration(velocity, velocity)(
        params["acceleration"], key, batch, held
    )
    return start + rest, {}


def accelerated(params, x0, n, key):
    return solvers.sample_acceleration(velocity, velocity, params, x0, steps=n - 1)
