"""Guidance by a classifier of noisy data."""

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype, sum_event
from jflow._core.checks import check_cond, described, rows
from jflow._core.conditions import label_of
from jflow._core.keys import split_key
from jflow._core.numbers import number_at
from jflow.paths import LINEAR, Schedule, coefficients
from jflow.types import Field, NumberOrFunction, Velocity

__all__ = ["classifier_guidance", "label_log_prob"]


def classifier_guidance(
    velocity: Velocity,
    classifier: Field,
    scale: NumberOrFunction,
    *,
    schedule: Schedule = LINEAR,
    start: float = 1e-3,
) -> Velocity:
    """Guidance by the gradient of a classifier of noisy data.

    Also known as: classifier guidance.

        v + scale c(t) grad_x log p(cond | x_t = x),      c = D s / a      linear: (1 - t) / t

    a, s are the values of the schedule at t, D = a' s - s' a. It is derived from v = (a' x + D s
    score) / a, so that with the exact unconditional v and classifier, scale 1 is the exact
    conditional velocity, and any scale is that of `cfg`. c diverges where alpha is 0, where the
    gradient vanishes: for t < start the term of the gradient is taken at time start.

    Args:
        velocity: the velocity to guide. It gets cond as well (the gradient on top of a conditional
            model); `with_cond(velocity)` and `with_cond(velocity, null)` make it the unconditional
            one. x is an array.
        classifier: apply(params, x [b, *event], t [b], cond) -> log p(cond | x_t = x) [b] in nats;
            `label_log_prob` makes it of logits.
        scale: a number, or t [b] -> [b].
        schedule: the path of the velocity; the default is the linear one.
        start: the earliest time at which the gradient is taken, in (0, 1).

    Returns:
        Velocity: the guided velocity, params {'velocity', 'classifier'}. It raises a ValueError
            where cond is None, and for a classifier of another shape.

    Raises:
        ValueError: start is outside (0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Field, Velocity
        >>> velocity = Velocity(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> def log_p(params, x, t, cond=None, *, key=None):  # its gradient is cond
        ...     return cond * x[:, 0]
        >>> guided = guidance.classifier_guidance(velocity, Field(lambda *_: {}, log_p), 1.0)
        >>> params = {"velocity": {}, "classifier": {}}
        >>> x, t, cond = jnp.ones((1, 1)), jnp.array([0.25]), jnp.array([2.0])
        >>> guided.apply(params, x, t, cond).tolist()  # c = 3
        [[6.0]]

    References:
        Dhariwal, Nichol, *Diffusion Models Beat GANs on Image Synthesis*, 2021, arXiv:2105.05233.
    """

    def log_prob(params, x, t, cond, key):
        log_p = classifier.apply(params, x, t, cond, key=key)
        if log_p.shape != t.shape:
            raise ValueError(
                "classifier_guidance: expected log p(cond | x) of shape "
                f"{list(t.shape)}, got {list(log_p.shape)}: "
                "label_log_prob makes it of logits"
            )
        return log_p

    fields = {"velocity": velocity, "classifier": classifier}
    guided = by_gradient("classifier_guidance", fields, log_prob, scale, schedule, start)

    def apply(params, x, t, cond=None, *, key=None):
        if cond is None:
            raise ValueError("classifier_guidance: expected cond, what to guide towards, got None")
        return guided.apply(params, x, t, cond, key=key)

    return Velocity(guided.init, apply)


def by_gradient(name, fields, value, scale, schedule, start) -> Velocity:
    """v + scale c(t) grad_x value(params, x, t, cond, key), c as in `classifier_guidance`, with the
    params of the two fields: the velocity, and what the value is of."""
    if not 0 < start < 1:
        raise ValueError(f"{name}: expected start in (0, 1), got {start}")
    (first, velocity), (second, field) = fields.items()

    def init(key, x, t, cond=None):
        keys = jax.random.split(key)
        return {
            first: velocity.init(keys[0], x, t, cond),
            second: field.init(keys[1], x, t, cond),
        }

    def apply(params, x, t, cond=None, *, key=None):
        t, cond = rows(t, x.shape[0]), check_cond(name, cond, x.shape[0])
        velocity_key, value_key = split_key(key, 2)
        v = velocity.apply(params[first], x, t, cond, key=velocity_key)
        later = jnp.maximum(t, start)

        def total(x):  # rows do not interact: the gradient of the sum is that of each
            return jnp.sum(value(params[second], x, later, cond, value_key))

        a, s, da, ds = coefficients(schedule, later)
        w = number_at(name, "scale(t)", scale, t, like=t)
        weight = w * (da * s - ds * a) * s / a
        return (v + expand_to(weight, x) * jax.grad(total)(x)).astype(v.dtype)

    return Velocity(init, apply)


def label_log_prob(classifier: Field) -> Field:
    """A classifier of logits as the log-probability of the labels, for `classifier_guidance`.

        log p(cond | x_t = x) = log softmax(logits)[cond]

    A label outside 0 ... K - 1 has log p = 0, and so no gradient: the null label guides nowhere.

    Args:
        classifier: a field of (x, t), without cond, that returns logits [b, K].

    Returns:
        Field: (params, x, t, cond, *, key=None) -> [b] in nats, with cond [b] the labels, or a
            `types.Condition` with a label, and the
            params of `classifier`. It raises a TypeError for labels that are not integers, and a
            ValueError for logits or labels of another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Field
        >>> logits = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> log_prob = guidance.label_log_prob(logits)
        >>> value = log_prob.apply({}, jnp.ones((1, 4)), jnp.zeros(1), jnp.array([2]))
        >>> round(float(value[0]), 4)  # -log 4
        -1.3863
    """

    def apply(params, x, t, cond=None, *, key=None):
        cond = label_of(cond)
        logits = classifier.apply(params, x, t, key=key)
        if logits.ndim != 2 or jnp.shape(cond) != logits.shape[:1]:
            raise ValueError(
                "label_log_prob: expected logits [b, K] and labels [b], got "
                f"{list(logits.shape)} and {list(jnp.shape(cond))}"
            )
        if not jnp.issubdtype(jnp.result_type(cond), jnp.integer):
            raise TypeError(
                f"label_log_prob: expected labels of an integer type, got {described(cond)}"
            )
        log_p = jax.nn.log_softmax(logits.astype(float_dtype(logits)), axis=1)
        return sum_event(jnp.where(jax.nn.one_hot(cond, logits.shape[1], dtype=bool), log_p, 0.0))

    return Field(lambda key, x, t, cond=None: classifier.init(key, x, t), apply)
