"""Two players: a student that generates in a fixed number of steps, and a discriminator.

    generate = losses.fixed_steps(velocity, 4)              # or by solvers.sample_flow_map
    loss = losses.adversarial(generate, discriminator)      # params {'student', 'discriminator'}
    params = {
        "student": student_params,
        "discriminator": discriminator.init(key, x, jnp.ones(len(x)), cond),
    }
    optimizer = optax.partition(
        {"student": optax.adam(1e-5), "discriminator": optax.adam(1e-4)},
        {"student": "student", "discriminator": "discriminator"},
    )
    ... train.init_state(params, optimizer, key), train.make_step(loss, optimizer) ...

The loss is one scalar. Gradients are stopped so that each player's is that of its own loss, and
both move in one step. optax.MultiSteps(student's optimizer, k) moves the student once for k moves
of the other. A loss of the student alone joins by

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
    """What the two players of a GAN pay, number by number.

    Both fields are functions (logits of the data, logits of the student's samples) -> losses of
    their shape.

    Attributes:
        discriminator: The loss of the discriminator.
        generator: The loss of the student.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> critic, generator = lambda real, fake: fake - real, lambda real, fake: -fake
        >>> wasserstein = losses.GanObjective(critic, generator)
        >>> float(wasserstein.discriminator(jnp.float32(2.0), jnp.float32(0.5)))
        -1.5
    """

    discriminator: Callable[[Array, Array], Array]
    generator: Callable[[Array, Array], Array]


def non_saturating_gan() -> GanObjective:
    """The non-saturating objective: softplus(-D(x)) + softplus(D(g)) against softplus(-D(g)).

    D(x) are the logits of the data, D(g) those of the student's samples.

    Returns:
        The objective, a `GanObjective`.

    References:
        Goodfellow et al., *Generative Adversarial Nets*, 2014, arXiv:1406.2661.
    """
    return GanObjective(
        lambda real, fake: jax.nn.softplus(-real) + jax.nn.softplus(fake),
        lambda real, fake: jax.nn.softplus(-fake),
    )


def hinge_gan() -> GanObjective:
    """The hinge objective: max(0, 1 - D(x)) + max(0, 1 + D(g)) against -D(g).

    D(x) are the logits of the data, D(g) those of the student's samples.

    Returns:
        The objective, a `GanObjective`.

    References:
        Lim, Ye, *Geometric GAN*, 2017, arXiv:1705.02894.
    """
    return GanObjective(
        lambda real, fake: jax.nn.relu(1 - real) + jax.nn.relu(1 + fake), lambda real, fake: -fake
    )


def least_squares_gan() -> GanObjective:
    """The least-squares objective: (D(x) - 1)^2 + D(g)^2 against (D(g) - 1)^2.

    D(x) are the logits of the data, D(g) those of the student's samples.

    Returns:
        The objective, a `GanObjective`.

    References:
        Mao et al., *Least Squares Generative Adversarial Networks*, 2017, arXiv:1611.04076.
    """
    return GanObjective(
        lambda real, fake: (real - 1) ** 2 + fake**2, lambda real, fake: (fake - 1) ** 2
    )


def relativistic_gan() -> GanObjective:
    """The relativistic objective: softplus(D(g) - D(x)) against softplus(D(x) - D(g)).

    D(x) are the logits of the data, D(g) those of the student's samples.

    Returns:
        The objective, a `GanObjective`.

    References:
        Jolicoeur-Martineau, *The relativistic discriminator: a key element missing from standard
            GAN*, 2018, arXiv:1807.00734.
    """
    return GanObjective(
        lambda real, fake: jax.nn.softplus(fake - real),
        lambda real, fake: jax.nn.softplus(real - fake),
    )


_NON_SATURATING, _LEAST_SQUARES = non_saturating_gan(), least_squares_gan()


def fixed_steps(velocity: Velocity, method: Method | int) -> Generate:
    """The sampler of a flow as a generator for training through it, in a fixed number of steps.

    `solvers.sample` with the same method does the same.

    Args:
        velocity: The velocity that is solved; its params are the student's.
        method: A number of Euler steps, `solvers.fixed(n, solver)` or
            `solvers.on_grid(times, solver)`.

    Returns:
        The generator (params, x0 [b, *event], cond) -> x1 [b, *event], differentiable.

    Raises:
        ValueError: For fewer than one step, and for another method.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> one = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: 0 * x + 1)
        >>> losses.fixed_steps(one, 2)({}, jnp.zeros((1, 3))).tolist()
        [[1.0, 1.0, 1.0]]
    """
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
    """A generator and a discriminator, trained together by one scalar.

    The loss is the discriminator's, with no gradient to the student, plus

        weight objective.generator + feature_weight |features(g) - features(x)|
            + reconstruction_weight reconstruction(g, x)

    of g = generate(student, x0, cond), with no gradient to the discriminator.

    Args:
        generate: The generator (student's params, x0 [b, *event], cond) -> x1 [b, *event], such as
            `fixed_steps`.
        discriminator: The field (x [b, *event], t = 1, cond) -> logits [b, ...], or a pytree of
            them, one leaf a head. Losses are means over a row's logits of a head, summed over
            heads.
        objective: What the players pay, a `GanObjective`.
        weight: The weight of the student's part of the objective, not negative.
        r1: The weight of the gradient penalty on the data, r1 / 2 |grad_x D|^2 of a row, D the mean
            of a head's logits, summed over heads. The square is a sum over the event, as in the
            paper: it grows with the event.
        r2: The weight of the same penalty on the student's samples.
        features: The field (x, t, cond) -> a pytree of inner activations, with the discriminator's
            params. The distance is the mean of absolute differences over a leaf's numbers, summed
            over leaves. None is no such term.
        feature_weight: The weight of the distance of features, not negative.
        reconstruction: The distance (g, x) -> [b], of rows whose cond, or x0, determines x. None is
            no such term.
        reconstruction_weight: The weight of the reconstruction, not negative.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. It does not read frozen. Its metrics are 'discriminator' and 'generator' (the
        losses of the objective), 'gap' (the mean of D(x) - D(g)), and the terms that are on,
        'penalty', 'features' and 'reconstruction'. There is no residual, since no identity is
        enforced.

    Raises:
        ValueError: For weights that are negative or not finite; at trace time for params without
            both players, a g of another shape, logits without b rows, a batch without 'x' or with
            unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Field
        >>> judge = Field(None, lambda params, x, t, cond=None, *, key=None: 0 * x[:, :1])
        >>> loss = losses.adversarial(lambda params, x0, cond: x0, judge)
        >>> players = {"student": {}, "discriminator": {}}
        >>> value, metrics = loss(players, jax.random.key(0), {"x": jnp.ones((4, 2))})
        >>> round(float(value), 4), float(metrics["gap"])
        (2.0794, 0.0)

    References:
        Goodfellow et al., *Generative Adversarial Nets*, 2014, arXiv:1406.2661.
        Mescheder, Geiger, Nowozin, *Which Training Methods for GANs do actually Converge?*, 2018,
            arXiv:1801.04406 (the penalties).
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
    """Adversarial finetuning of a velocity into a generator of a few steps (PeriodWave-Turbo).

    The velocity is trained through its own sampler: the loss is `adversarial` with `fixed_steps`,
    whose method this is. It is sampled by the same method alone, by default
    `solvers.sample(velocity, params['student'], x0, cond, method=solvers.fixed(4,
    diffrax.Euler()))`.

    Args:
        velocity: The velocity, which starts from trained params.
        discriminator: The field (x [b, *event], t = 1, cond) -> logits [b, ...], or a pytree of
            them, one leaf a head. The paper's discriminators are heads of one.
        reconstruction: The distance (g, x) -> [b]. The paper's is the mean absolute difference of
            mel spectrograms at several scales, on pairs that share the spectrogram they are
            conditioned on.
        method: A number of Euler steps, `solvers.fixed(n, solver)` or
            `solvers.on_grid(times, solver)`; by default 4 of Euler.
        objective: What the players pay, a `GanObjective`.
        features: The field (x, t, cond) -> a pytree of inner activations, with the discriminator's
            params, or None.
        feature_weight: The weight of the distance of features; the default is the paper's.
        reconstruction_weight: The weight of the reconstruction; the default is the paper's.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'x0' (standard normal when absent), 'cond',
        'weight' [b]}. The paper's source is narrower noise, which 'x0' gives. Its params are
        {'student', 'discriminator'}, and its metrics are those of `adversarial`.

    Raises:
        ValueError: For weights that are negative or not finite, and for another method; at trace
            time for params without both players, a generated row of another shape, logits without b
            rows, a batch without 'x' or with unknown keys, and a key that is None.

    References:
        Lee, Choi, Lee, *Accelerating High-Fidelity Waveform Generation via Adversarial Flow
            Matching Optimization*, 2024, arXiv:2408.08019.
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
    """A loss of the student's params alone, as a loss of all players' params.

    Args:
        loss: The loss of params['student'].

    Returns:
        The loss of params with 'student', whatever else they hold. It gets params['student'], and
        in frozen['ema'], if there, the student's part too.

    Raises:
        ValueError: At trace time for params without 'student'.
    """

    def of_student(params, key, batch, frozen=None):
        (student,) = take_parts("student_only", params, "student")
        if frozen is not None and frozen.get("ema") is not None:
            frozen = {**frozen, "ema": frozen["ema"]["student"]}
        return loss(student, key, batch, frozen)

    return of_student


def sum_losses(losses: Mapping[str, Loss]) -> Loss:
    """The sum of losses of the same params and batch, each with a key of its own.

    Args:
        losses: The losses by name. For weights, wrap a loss into one that multiplies it.

    Returns:
        The sum, a loss. Its metrics are those of each loss as 'name/metric', its value as
        'name/loss', and 'residual', the sum of all residuals, where there is one.

    Raises:
        ValueError: For no losses, and at trace time for a key that is None.

    Examples:
        >>> import jax
        >>> from jflow import losses
        >>> one = lambda params, key, batch, frozen=None: (params, {"residual": 2 * params})
        >>> total = losses.sum_losses({"a": one, "b": one})
        >>> value, metrics = total(3.0, jax.random.key(0), {})
        >>> value, metrics["a/loss"], metrics["residual"]
        (6.0, 3.0, 12.0)
    """
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
