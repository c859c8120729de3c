"""Two players: a student that generates in a fixed number of steps, and a discriminator.

    generate = losses.fixed_steps(velocity, 4)                        # or by solvers.sample_flow_map
    loss = losses.adversarial(generate, discriminator)                # one scalar of params {'student', 'discriminator'}
    params = {"student": student_params, "discriminator": discriminator.init(key, x, jnp.ones(len(x)), cond)}
    optimizer = optax.partition(
        {"student": optax.adam(1e-5), "discriminator": optax.adam(1e-4)},
        {"student": "student", "discriminator": "discriminator"},
    )
    ... train.init_state(params, optimizer, key), train.make_step(loss, optimizer) ...

Gradients are stopped so that each player's is that of its own loss, and both move in one step. optax.MultiSteps(student's
optimizer, k) moves the student once for k moves of the other. A loss of the student alone joins by

    losses.sum_losses({"map": losses.student_only(other), "gan": loss})
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp

from jflow import solvers
from jflow._core.arrays import float_dtype, mean_event, sum_event
from jflow._core.batch import mean_of_rows
from jflow._core.checks import check_same_shape, check_weights, like_state, need_key, take_parts
from jflow._core.keys import split_key
from jflow.losses._pairs import draw_pairs
from jflow.solvers import Method
from jflow.types import Array, Cond, Field, Loss, Params, Velocity

__all__ = [
    "GanObjective",
    "Generate",
    "adversarial",
    "fixed_steps",
    "hinge_gan",
    "least_squares_gan",
    "non_saturating_gan",
    "student_only",
    "relativistic_gan",
    "sum_losses",
    "turbo",
]

_EULER = solvers.fixed(4, diffrax.Euler())

Generate = Callable[[Params, Array, Cond], Array]
"""(student's params, x0 [b, *event], cond) -> x1 [b, *event], differentiable."""

Reconstruction = Callable[[Array, Array], Array]
"""(x1 generated, x1 of the data) -> [b]."""


class GanObjective(NamedTuple):
    """What the players pay, number by number: (logits of the data, logits of the student's) -> losses of their shape."""

    discriminator: Callable[[Array, Array], Array]
    generator: Callable[[Array, Array], Array]


def non_saturating_gan() -> GanObjective:
    """softplus(-D(x)) + softplus(D(g)) against softplus(-D(g)).

    Source: Goodfellow et al., "Generative Adversarial Nets", 2014."""
    return GanObjective(
        lambda real, fake: jax.nn.softplus(-real) + jax.nn.softplus(fake),
        lambda real, fake: jax.nn.softplus(-fake),
    )


def hinge_gan() -> GanObjective:
    """max(0, 1 - D(x)) + max(0, 1 + D(g)) against -D(g).

    Source: Lim, Ye, "Geometric GAN", 2017."""
    return GanObjective(
        lambda real, fake: jax.nn.relu(1 - real) + jax.nn.relu(1 + fake), lambda real, fake: -fake
    )


def least_squares_gan() -> GanObjective:
    """(D(x) - 1)^2 + D(g)^2 against (D(g) - 1)^2.

    Source: Mao et al., "Least Squares Generative Adversarial Networks", 2017."""
    return GanObjective(
        lambda real, fake: (real - 1) ** 2 + fake**2, lambda real, fake: (fake - 1) ** 2
    )


def relativistic_gan() -> GanObjective:
    """softplus(D(g) - D(x)) against softplus(D(x) - D(g)), in pairs of rows.

    Source: Jolicoeur-Martineau, "The relativistic discriminator: a key element missing from standard GAN", 2018."""
    return GanObjective(
        lambda real, fake: jax.nn.softplus(fake - real),
        lambda real, fake: jax.nn.softplus(real - fake),
    )


_NON_SATURATING, _LEAST_SQUARES = non_saturating_gan(), least_squares_gan()


def fixed_steps(velocity: Velocity, method: Method | int) -> Generate:
    """The flow's own sampler for training through it, in a number of Euler steps, `solvers.fixed(n, solver)` or
    `solvers.on_grid(times, solver)`: `solvers.sample` with that method does the same."""
    how = solvers.as_method(
        "fixed_steps", method, _EULER, accepts=(solvers.fixed, solvers.on_grid), rising=True
    )

    def generate(params, x0, cond=None):
        return solvers.sample(velocity, params, x0, cond, method=how)[0]

    return generate


def adversarial(
    generate: Generate,
    discriminator: Field,
    *,
    objective: GanObjective = _NON_SATURATING,
    weight: float = 1.0,
    r1: float = 0.0,
    r2: float = 0.0,
    features: Field | None = None,
    feature_weight: float = 2.0,
    reconstruction: Reconstruction | None = None,
    reconstruction_weight: float = 1.0,
) -> Loss:
    """One scalar of params {'student', 'discriminator'}: the discriminator's loss, with no gradient to the student, plus

        weight objective.generator + feature_weight |features(g) - features(x)| + reconstruction_weight reconstruction(g, x)

    of g = generate(student, x0, cond), with no gradient to the discriminator.

    discriminator: (x [b, *event], t = 1, cond) -> logits [b, ...], or a pytree of them, one leaf a head. Losses are means
        over a row's logits of a head, summed over heads.
    r1, r2: gradient penalties on the data and on the student's, r / 2 |grad_x D|^2 of a row, D the mean of a head's logits,
        summed over heads; the square is a sum over the event, as in their paper: it grows with the event.
    features: (x, t, cond) -> a pytree of inner activations, with the discriminator's params; the distance is the mean of
        absolute differences over a leaf's numbers, summed over leaves. None: no such term.
    reconstruction: (g, x) -> [b], of rows whose cond, or x0, determines x; None: no such term.
    batch: 'x'; optionally 'x0' (standard normal when absent), 'cond', 'weight' [b]. frozen is not read.
    metrics: 'discriminator' and 'generator' (the objective's losses), 'gap' (the mean of D(x) - D(g)), and the terms
        that are on: 'penalty', 'features', 'reconstruction'. There is no residual: no identity is enforced.
    Errors: ValueError for weights that are negative or not finite; at trace time for params without both players, a g of
        another shape, logits without b rows, and as `losses.flow_matching`.
    Source of the penalties: Mescheder, Geiger, Nowozin, "Which Training Methods for GANs do actually Converge?", 2018.
    """
    name = "adversarial"
    check_weights(
        name,
        weight=weight,
        r1=r1,
        r2=r2,
        feature_weight=feature_weight,
        reconstruction_weight=reconstruction_weight,
    )

    def loss(params, key, batch, frozen=None):
        student, judge = take_parts(name, params, "student", "discriminator")
        x0, x, cond, row_weight, t, _, _ = draw_pairs(name, key, batch, _at_data)
        g = like_state(name, generate(student, x0, cond), x)
        still, held = jax.lax.stop_gradient((g, judge))

        def mean(rows):
            return mean_of_rows(rows, row_weight)

        real, fake = (discriminator.apply(judge, y, t, cond) for y in (x, still))
        metrics = {
            "discriminator": mean(_paid(name, objective.discriminator, real, fake)),
            "generator": mean(
                _paid(
                    name,
                    objective.generator,
                    jax.lax.stop_gradient(real),
                    discriminator.apply(held, g, t, cond),
                )
            ),
            "gap": mean(_paid(name, jnp.subtract, real, fake)),
        }
        value = metrics["discriminator"] + weight * metrics["generator"]
        if r1 > 0 or r2 > 0:
            steep = [mean(_steepness(name, discriminator, judge, y, t, cond)) for y in (x, still)]
            metrics["penalty"] = r1 / 2 * steep[0] + r2 / 2 * steep[1]
            value = value + metrics["penalty"]
        if features is not None:
            seen, aim = (features.apply(held, y, t, cond) for y in (g, x))
            metrics["features"] = mean(
                _paid(name, lambda a, b: jnp.abs(a - b), seen, jax.lax.stop_gradient(aim))
            )
            value = value + feature_weight * metrics["features"]
        if reconstruction is not None:
            metrics["reconstruction"] = mean(
                check_same_shape(name, "a reconstruction", reconstruction(g, x), t)
            )
            value = value + reconstruction_weight * metrics["reconstruction"]
        return value, metrics

    return loss


def turbo(
    velocity: Velocity,
    discriminator: Field,
    reconstruction: Reconstruction,
    *,
    method: Method | int | None = None,
    objective: GanObjective = _LEAST_SQUARES,
    features: Field | None = None,
    feature_weight: float = 2.0,
    reconstruction_weight: float = 45.0,
) -> Loss:
    """Finetuning of a trained velocity into a generator of a few steps, which it is trained through: `adversarial` with
    `fixed_steps`, whose method this is, by default 4 Euler steps. Sampled by the same method alone: `solvers.sample(velocity,
    params['student'], x0, cond, method=solvers.fixed(4, diffrax.Euler()))`.

    reconstruction: (g, x) -> [b]; the paper's is the mean absolute difference of mel spectrograms at several scales, on
        pairs that share the spectrogram they are conditioned on. Its discriminators are heads of one `discriminator`.
    All else, and errors: as in `adversarial`. The weights are the paper's; its source is narrower noise: give 'x0'.
    Source: Lee, Choi, Lee, "Accelerating High-Fidelity Waveform Generation via Adversarial Flow Matching Optimization", 2024.
    """
    return adversarial(
        fixed_steps(velocity, _EULER if method is None else method),
        discriminator,
        objective=objective,
        features=features,
        feature_weight=feature_weight,
        reconstruction=reconstruction,
        reconstruction_weight=reconstruction_weight,
    )


def student_only(loss: Loss) -> Loss:
    """`loss` of params['student'] alone, whatever else params holds; frozen['ema'], if there, is the student's too."""

    def of_student(params, key, batch, frozen=None):
        (student,) = take_parts("student_only", params, "student")
        if frozen is not None and frozen.get("ema") is not None:
            frozen = {**frozen, "ema": frozen["ema"]["student"]}
        return loss(student, key, batch, frozen)

    return of_student


def sum_losses(losses: Mapping[str, Loss]) -> Loss:
    """The sum of losses of the same params and batch, each with a key of its own; metrics as 'name/metric'.

    Errors: ValueError for no losses, and for key=None."""
    if not losses:
        raise ValueError("sum_losses: expected at least one loss, got none")
    losses = dict(losses)

    def total(params, key, batch, frozen=None):
        need_key("sum_losses", key)
        value, metrics = 0.0, {}
        for (name, loss), own in zip(losses.items(), split_key(key, len(losses)), strict=True):
            part, said = loss(params, own, batch, frozen)
            value = value + part
            metrics |= {f"{name}/{what}": number for what, number in said.items()} | {
                f"{name}/loss": part
            }
        if residuals := [number for what, number in metrics.items() if what.endswith("/residual")]:
            metrics["residual"] = sum(residuals)
        return value, metrics

    return total


def _at_data(key, n):
    return jnp.ones(n)


def _paid(name, paid, *scores) -> Array:
    """[b]: the mean over a row's numbers in every leaf, summed over leaves."""

    def rows(*leaves):
        if leaves[0].ndim == 0 or any(leaf.shape != leaves[0].shape for leaf in leaves):
            shapes = [list(leaf.shape) for leaf in leaves]
            raise ValueError(
                f"{name}: expected outputs of the discriminator that lead with b rows, got {shapes}"
            )
        each = paid(*(leaf.astype(float_dtype(leaf)) for leaf in leaves))
        return mean_event(each)

    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(rows, *scores))))


def _steepness(name, discriminator, params, x, t, cond) -> Array:
    """|grad_x D|^2 [b], the rows of D not looking at each other."""

    def total(x):
        return jnp.sum(_paid(name, lambda score: score, discriminator.apply(params, x, t, cond)))

    return sum_event(jnp.square(jax.grad(total)(x)))
