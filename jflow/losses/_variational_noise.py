"""Variational noise coupling (VCT): an encoder learns which noise a row is paired with.

    x0 = mean(x1) + std(x1) eps,  eps standard normal,
    loss + kl mean KL(N(mean, std^2), N(0, 1)).

Paired well, lines between noise and data cross less and the targets vary less; the divergence holds
what all rows together draw near the standard normal that sampling starts from. As kl grows the
encoder is held at mean 0, std 1: independent pairs.

    velocity = jflow.velocity(nets.ResidualMLP(128))
    encoder = losses.noise_encoder(jflow.velocity(nets.ResidualMLP(64)))
    inner = losses.consistency_training(velocity, steps=losses.easy_steps(every=2_000))
    loss = losses.variational_noise(inner, encoder, kl=0.1)
    params = {'model': velocity.init(...), 'encoder': encoder.init(key, x, t)}
    student = solvers.consistency_map(velocity)
    x1, info = solvers.sample_flow_map(student, params['model'], x0)          # one evaluation
    x1, info = solvers.sample_variational(velocity, encoder, params, x0, steps=2, key=key)
"""

import math

import jax
import jax.numpy as jnp

from jflow._core.arrays import halves, joined, mean_event
from jflow._core.batch import mean_of_rows, read_batch
from jflow._core.checks import encode_noise, need_key, take_parts
from jflow.types import Field, Loss, Velocity

__all__ = ["noise_encoder", "variational_noise"]

_UNIT = math.log(math.e - 1)  # softplus of it is 1


def noise_encoder(velocity: Velocity) -> Field:
    """An encoder x1 -> (mean, std) of noise, of any network whose output is shaped like its input.

    The network is given x1 twice, along the last axis of the event (a scalar as [b, 2]), and the
    halves of its output are mean and raw, with std = softplus(raw + log(e - 1)): one that is zero
    at initialization (as jflow's are) starts at mean 0, std 1, the independent coupling (the shift
    is ours). t is handed on; VCT has one time alone, `variational_noise` passes 1.

    Args:
        velocity: The network, any `Velocity`.

    Returns:
        The encoder, a `Field` of (x1 [b, *event], t, cond) that returns (mean, std), both shaped
        like x1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> from jflow.types import Velocity
        >>> still = Velocity(lambda *args: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> mean, std = losses.noise_encoder(still).apply({}, jnp.ones((1, 3)), jnp.ones(1))
        >>> mean.tolist(), std.round(4).tolist()
        ([[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]])
    """

    def init(key, x, t, cond=None):
        return velocity.init(key, joined(x, x), t, cond)

    def apply(params, x, t, cond=None, *, key=None):
        mean, raw = halves(velocity.apply(params, joined(x, x), t, cond, key=key), x)
        return mean, jax.nn.softplus(raw + _UNIT)

    return Field(init, apply)


def variational_noise(loss: Loss, encoder: Field, *, kl: float) -> Loss:
    """A loss on batches whose 'x0' an encoder draws, plus that law's divergence from noise.

    The value is loss + kl KL with

        KL = mean over the event of (mean^2 + std^2 - 1) / 2 - log(std), then the mean over rows.

    The encoder learns from both terms, through x0 = mean + std eps. frozen['ema'], if there, is of
    both, and the loss is given the model's.

    Args:
        loss: Any loss that takes 'x0'.
        encoder: The field (x1, t = 1, cond) -> (mean, std), both shaped like x1; `noise_encoder`
            makes one.
        kl: The weight of the divergence, not negative, for a mean over the event beside a loss that
            is one. VCT sums both, and multiplies its weight (10 to 90 in its scripts) by that of
            the consistency loss at the largest noise level.

    Returns:
        A loss of the batch {'x' [b, *event], optionally 'cond', 'weight' [b]}. Its params are
        {'model', 'encoder'}, and its metrics are the loss's own and 'kl', before its weight.

    Raises:
        ValueError: At construction unless kl >= 0; at trace time for a batch with an 'x0', params
            without 'model' or 'encoder', an encoder whose outputs are not shaped like x, a batch
            without 'x' or with unknown keys, and a key that is None.

    References:
        Silvestri, Ambrogioni, Lai, Takida, Mitsufuji, *Training Consistency Models with Variational
            Noise Coupling*, 2025, arXiv:2502.18197.
    """
    name = "variational_noise"
    if not 0 <= kl < math.inf:
        raise ValueError(f"{name}: expected a finite kl >= 0, got {kl}")

    def coupled(params, key, batch, frozen=None):
        need_key(name, key)
        x1, cond, weight = read_batch(name, batch, ("x", "cond", "weight"))
        model, encoding = take_parts(name, params, "model", "encoder")
        if frozen is not None and frozen.get("ema") is not None:
            frozen = {**frozen, "ema": frozen["ema"]["model"]}
        noise_key, encoder_key, loss_key = jax.random.split(key, 3)
        mean, std = encode_noise(name, encoder, encoding, x1, cond, encoder_key)
        eps = jax.random.normal(noise_key, mean.shape, mean.dtype)
        value, metrics = loss(
            model, loss_key, {**batch, "x0": (mean + std * eps).astype(x1.dtype)}, frozen
        )
        divergence = (jnp.square(mean) + jnp.square(std) - 1) / 2 - jnp.log(std)
        divergence = mean_of_rows(mean_event(divergence), weight)
        return value + kl * divergence, {**metrics, "kl": divergence}

    return coupled
