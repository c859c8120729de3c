"""Guidance of classifiers of clean tokens that keeps their probabilities on the simplex."""

import jax
import jax.numpy as jnp

from jflow._core.arrays import expand_to, float_dtype
from jflow._core.checks import check_cond, check_noun, rows
from jflow._core.keys import split_key
from jflow._core.numbers import check_number, number_at
from jflow._core.simplex import project_simplex
from jflow._core.tokens import check_logits
from jflow.guidance._cfg import guided
from jflow.types import Field, NumberOrFunction, PyTree, Velocity

__all__ = ["simplex_cfg", "simplex_classifier_guidance"]


def simplex_cfg(field: Field, scale: NumberOrFunction, *, null: PyTree) -> Field:
    """Classifier-free guidance of a field of logits, in probabilities, on the simplex.

        p = project(p_null + scale (p_cond - p_null))

    On the Dirichlet path the velocity and the score are linear in p, so that before the projection
    this is `cfg` of either; where a number would be negative, the nearest point of the simplex is
    taken (`paths.project_simplex`). Guidance in logits, softmax(l_null + scale (l_cond - l_null)),
    stays on the simplex by itself.

    Args:
        field: logits [b, *sites, K], trained with `losses.drop_cond(p, null=null)`.
        scale: a number, or t [b] -> [b]; 1 is the conditional field.
        null: the condition that stands for none, one row of cond without the batch axis.

    Returns:
        Field: the logits of p, with the params and the init of `field`. It raises a ValueError
            where cond is None or null is not a row of it.

    Raises:
        TypeError: field is no `Field`.
        ValueError: scale is neither a number nor a function.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Field
        >>> def apply(params, x, t, cond=None, *, key=None):  # probabilities 3/4 and 1/4, or 1/2
        ...     return jnp.log(jnp.array([3.0, 1.0])) * cond[:, None]
        >>> guided = guidance.simplex_cfg(Field(lambda *_: {}, apply), 3.0, null=0.0)
        >>> logits = guided.apply({}, jnp.ones((1, 2)) / 2, jnp.zeros(1), jnp.ones(1))
        >>> jnp.exp(logits).round(3).tolist()  # 5/4 and -1/4, projected
        [[1.0, 0.0]]

    References:
        Stark, Jing, Wang, Corso, Berger, Barzilay, Jaakkola, *Dirichlet Flow Matching with
            Applications to DNA Sequence Design*, 2024, arXiv:2402.05841.
    """
    check_noun("simplex_cfg", field, Field)
    check_number("simplex_cfg", "scale", scale, "a number", lambda w: float(w) == w)

    def combine(logits, other, x, t):
        w = expand_to(number_at("simplex_cfg", "scale(t)", scale, t, like=t), logits)
        p, q = (jax.nn.softmax(a.astype(float_dtype(a)), axis=-1) for a in (logits, other))
        return _log(project_simplex(q + w.astype(p.dtype) * (p - q)))

    return Field(*guided(Velocity(*field), combine, null=null))


def simplex_classifier_guidance(
    field: Field,
    classifier: Field,
    scale: NumberOrFunction,
    *,
    end: float = 8.0,
    start: float = 1e-2,
) -> Field:
    """Guidance of a field of logits on the Dirichlet path by a classifier of noisy probabilities.

        p' = project(p + scale x (g - sum_i x_i g_i) / c),      g = grad_x log p(cond | x_t = x)

    with c = end t. The score of the Dirichlet path is c p / x, site by site and up to a constant,
    which makes this exact: with the exact posterior p and classifier, scale 1 gives the posterior
    given cond.

    Args:
        field: logits [b, *sites, K] of the tokens; it gets cond as well.
        classifier: apply(params, x [b, *sites, K], t [b], cond) -> log p(cond | x_t = x) [b] in
            nats; `label_log_prob` makes it of logits.
        scale: a number, or t [b] -> [b].
        end: the concentration at t=1, that of the path.
        start: the earliest time that the gradient is divided by, in (0, 1).

    Returns:
        Field: the logits of p', params {'field', 'classifier'}. It raises a ValueError where cond
            is None, and for a classifier of another shape.

    Raises:
        ValueError: start is outside (0, 1), or scale is neither a number nor a function.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jflow import guidance
        >>> from jflow.types import Field
        >>> flat = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> def log_p(params, x, t, cond=None, *, key=None):
        ...     return cond * jnp.log(x[:, 0])
        >>> both = guidance.simplex_classifier_guidance(flat, Field(lambda *_: {}, log_p), 1.0)
        >>> x, params = jnp.full((1, 2), 0.5), {"field": {}, "classifier": {}}
        >>> logits = both.apply(params, x, jnp.full(1, 0.5), jnp.ones(1))  # c = 4
        >>> [round(float(p), 3) for p in jnp.exp(logits)[0]]
        [0.625, 0.375]

    References:
        Stark, Jing, Wang, Corso, Berger, Barzilay, Jaakkola, *Dirichlet Flow Matching with
            Applications to DNA Sequence Design*, 2024, arXiv:2402.05841.
    """
    name = "simplex_classifier_guidance"
    if not 0 < start < 1:
        raise ValueError(f"{name}: expected start in (0, 1), got {start}")
    check_number(name, "scale", scale, "a number", lambda w: float(w) == w)

    def init(key, x, t, cond=None):
        first, second = jax.random.split(key)
        return {
            "field": field.init(first, x, t, cond),
            "classifier": classifier.init(second, x, t, cond),
        }

    def apply(params, x, t, cond=None, *, key=None):
        if cond is None:
            raise ValueError(f"{name}: expected cond, what to guide towards, got None")
        t, cond = rows(t, x.shape[0]), check_cond(name, cond, x.shape[0])
        field_key, classifier_key = split_key(key, 2)
        logits = field.apply(params["field"], x, t, cond, key=field_key)
        p = jax.nn.softmax(check_logits(name, logits, x.shape[:-1], x.shape[-1]), axis=-1)

        def total(x):
            log_p = classifier.apply(params["classifier"], x, t, cond, key=classifier_key)
            if log_p.shape != t.shape:
                raise ValueError(
                    f"{name}: expected log p(cond | x) of shape {list(t.shape)}, got"
                    f" {list(log_p.shape)}: label_log_prob makes it of logits"
                )
            return jnp.sum(log_p)

        slope = x * jax.grad(total)(x)
        slope = slope - x * jnp.sum(slope, axis=-1, keepdims=True)
        w = number_at(name, "scale(t)", scale, t, like=t) / (float(end) * jnp.maximum(t, start))
        return _log(project_simplex(p + (expand_to(w, x) * slope).astype(p.dtype)))

    return Field(init, apply)


def _log(p):
    return jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))
