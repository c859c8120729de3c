"""Cross-entropy of the clean tokens at a noisy state of a path of probabilities."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jflow import times
from jflow._core.arrays import filled, float_dtype
from jflow._core.batch import mean_of_tokens, read_tokens, used_rows, without_gaps
from jflow._core.checks import check_noun, check_whole, need_key
from jflow._core.tokens import at_tokens, check_logits, check_tokens, corners
from jflow.paths import dirichlet_source
from jflow.types import Array, Cond, Field, Key, Loss, Path, Time

__all__ = ["token_cross_entropy"]

_UNIFORM = times.uniform()


def token_cross_entropy(
    field: Field,
    path: Path,
    *,
    num_classes: int,
    source: Callable[[Key, Array, Cond], tuple[Array, Cond]] = dirichlet_source,
    time: Time = _UNIFORM,
) -> Loss:
    """Cross-entropy of the tokens, given a state of the path that they are one-hot ends of.

        -log softmax(field(x_t, t, cond))[token],      x_t = path.point(x0, one_hot(token), t)

    It is the loss of Dirichlet flow matching with `paths.dirichlet`, and of the language model on
    the statistical manifold with the path of `paths.statistical_bridge`. At its minimum the field
    is the posterior of the token, of which `paths.dirichlet_velocity` or `solvers.bridge_step`
    make samples. With pairs ('x0' and tokens that a teacher made of it) and
    time=times.fixed((0.0,)) it distills the teacher into one evaluation: the paper's distilled
    Dirichlet flow.

    Args:
        field: The classifier, (params, x_t [b, *sites, ...], t [b], cond) -> logits [b, *sites, K
            or more], of which the first K count.
        path: The path, of which the data end is one-hot.
        num_classes: The number K of tokens.
        source: Where x0 comes from when the batch has none, (key, x1, cond) -> (x0, cond), by
            default uniform on the simplex. A path that draws its own start does not read x0.
        time: The law of the times, (key, n) -> t [n].

    Returns:
        A loss of the batch {'x' integer tokens [b, *sites], optionally 'x0' [b, *sites, K], 'cond',
        'weight' [b] or [b, *sites]}, in nats per token. The mean is weighted, sum(w l) / sum(w). It
        is NaN where a token is outside 0 ... K - 1. Its metric is 'accuracy', the share of tokens
        that the largest logit names.

    Raises:
        TypeError: At construction for what is no `Field`.
        ValueError: At construction for num_classes < 2; at trace time for tokens that are no
            integers or, where they are known, outside, logits of another shape, a batch without
            'x' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses, paths
        >>> from jflow.types import Field
        >>> field = Field(lambda *_: {}, lambda params, x, t, cond=None, *, key=None: 0 * x)
        >>> loss = losses.token_cross_entropy(field, paths.dirichlet(), num_classes=4)
        >>> value, metrics = loss({}, jax.random.key(0), {"x": jnp.zeros((2, 5), jnp.int32)})
        >>> round(float(value), 4)  # log 4
        1.3863

    References:
        Stark, Jing, Wang, Corso, Berger, Barzilay, Jaakkola, *Dirichlet Flow Matching with
            Applications to DNA Sequence Design*, 2024, arXiv:2402.05841.
    """
    name = "token_cross_entropy"
    check_noun(name, field, Field)
    check_whole(name, 2, num_classes=num_classes)

    def loss(params, key, batch, frozen=None):
        need_key(name, key)
        x, x0, cond, weight = _read(name, batch)
        check_tokens(name, x, num_classes)
        time_key, source_key, point_key, dropout_key = jax.random.split(key, 4)
        t = time(time_key, x.shape[0]).astype(float_dtype(x))
        x1 = corners(x, num_classes, t.dtype)
        if x0 is None:
            x0, cond = source(source_key, x1, cond)
        x_t = path.point(x0, x1, t, key=point_key)
        logits = field.apply(params, x_t, t, cond, key=dropout_key)
        logits = check_logits(name, logits, x.shape, num_classes)
        nats = -at_tokens(jax.nn.log_softmax(logits, axis=-1), x)
        right = (jnp.argmax(logits, axis=-1) == x).astype(logits.dtype)
        accuracy = jax.lax.stop_gradient(mean_of_tokens(right, weight))
        return mean_of_tokens(nats, weight), {"accuracy": accuracy}

    return loss


def _read(name, batch):
    """x, x0, cond, weight; x0 has one axis more than the tokens, and is read beside them."""
    x0 = batch.get("x0") if hasattr(batch, "get") else None
    if x0 is not None:
        batch = {key: value for key, value in batch.items() if key != "x0"}
    x, cond, weight = read_tokens(name, batch, ("x", "cond", "weight"))
    if x0 is not None:
        if jnp.shape(x0)[:-1] != x.shape:
            raise ValueError(
                f"{name}: expected 'x0' of shape {[*x.shape, 'K']}, got {list(jnp.shape(x0))}"
            )
        x0 = without_gaps(filled(used_rows(weight), jnp.asarray(x0)), weight)
    return x, x0, cond, weight
