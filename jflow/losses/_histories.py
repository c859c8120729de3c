"""Batch transforms that make a sequence of a datum: its states from noise to data, for causal laws.

law = distributions.causal(net, token)
loss = losses.chain(losses.full_history(4), losses.nll(law))        # FHTM
x = law.sample(params, key, rows)[:, -n:]                           # the last state is the data
"""

import math

import jax
import jax.numpy as jnp

from jflow._core.batch import read_as_given
from jflow._core.checks import need_key
from jflow._core.keys import split_key
from jflow._core.times import Times, partition
from jflow.losses._transition import noised_to, without_weight
from jflow.paths import linear
from jflow.types import BatchTransform, Condition, Path

__all__ = ["falling_noise", "full_history", "path_states"]

_LINEAR = linear()


def full_history(grid: int | Times) -> BatchTransform:
    """A batch transform for full-history transition matching (FHTM): all states as one sequence.

        x_k = (1 - t_k) e_k + t_k x,      k = 1 ... T,      e_k standard normal, independent

    The tokens of x_1, then those of x_2, and so on to x_T = x are one sequence of T n tokens. A law
    that is causal over it draws each token given all that came before. x_0 is noise that tells
    nothing of the others, and is left out (ours). The last n tokens of a sample are the data.

    Args:
        grid: T, the number of equal steps, or times that rise from 0 to 1.

    Returns:
        The transform (key, batch, frozen=None) -> batch, of 'x' [b, n, d] to [b, T n, d]. What is
        given along the tokens ('weight' [b, n]; `aligned` and `valid` of a `types.Condition`) is
        repeated T times.

    Raises:
        ValueError: At construction for times that do not rise from 0 to 1; at trace time for an 'x'
            of another form, a batch with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> history = losses.full_history(4)
        >>> x = history(jax.random.key(0), {"x": jnp.ones((2, 3, 1))})["x"]
        >>> x.shape, x[:, -3:].ravel().tolist()
        ((2, 12, 1), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])

    References:
        Shaul, Singer, Gat, Lipman, *Transition Matching: Scalable and Flexible Generative
            Modeling*, 2025, arXiv:2506.23589.
    """
    knots = partition("full_history", grid)
    fall = falling_noise(grid)

    def transform(key, batch, frozen=None):
        x, cond = read_as_given("full_history", without_weight(batch), ("x", "cond"))
        if x.ndim != 3:
            raise ValueError(f"full_history: expected 'x' of shape [b, n, d], got {list(x.shape)}")
        steps = len(knots) - 1
        made = {**batch, "x": jnp.repeat(x[:, None], steps, axis=1)}
        if isinstance(cond, Condition):
            made["cond"] = cond._replace(
                aligned=_repeated(cond.aligned, steps), valid=_repeated(cond.valid, steps)
            )
        if batch.get("weight") is not None and jnp.ndim(batch["weight"]) == 2:
            made["weight"] = _repeated(batch["weight"], steps)
        return fall(key, made, frozen)

    return transform


def falling_noise(grid: int | Times) -> BatchTransform:
    """A batch transform for ARFlow: T data of one kind as a sequence from noisy to clean.

        x_k <- (1 - t_k) e_k + t_k x_k,      k = 1 ... T,      e_k standard normal, independent

    A row holds T images of one class, each as n tokens. A law that is causal over the sequence of
    them draws every image given noisier ones, the last of which, x_T, is clean. With T times the
    same image it is `full_history`.

    Args:
        grid: T, the number of equal steps, or times that rise from 0 to 1.

    Returns:
        The transform (key, batch, frozen=None) -> batch, of 'x' [b, T, n, d] to [b, T n, d]; the
        rest of the batch is as a loss of [b, T n, d] takes it.

    Raises:
        ValueError: At construction for times that do not rise from 0 to 1; at trace time for an 'x'
            of another form, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jflow import losses
        >>> images, labels = np.arange(6.0).reshape(6, 1, 1), np.array([0, 1, 0, 1, 0, 1])
        >>> of_a_class = np.stack([images[labels == label] for label in (0, 1)])  # [2, 3, 1, 1]
        >>> batch = {"x": of_a_class, "cond": np.array([0, 1])}
        >>> x = losses.falling_noise(3)(jax.random.key(0), batch)["x"]
        >>> x.shape, x[:, -1].ravel().tolist()
        ((2, 3, 1), [4.0, 5.0])

    References:
        Hui, Zhu, Yang, Zhang, Wang, Zhou, Eshraghian, Xie, *ARFlow: Autogressive Flow with Hybrid
            Linear Attention*, 2025, arXiv:2501.16085 (the levels of the noise are ours).
    """
    knots = partition("falling_noise", grid)

    def transform(key, batch, frozen=None):
        need_key("falling_noise", key)
        x = jnp.asarray(batch["x"])
        if x.ndim != 4 or x.shape[1] != len(knots) - 1:
            raise ValueError(
                f"falling_noise: expected 'x' of shape [b, {len(knots) - 1}, n, d], got"
                f" {list(x.shape)}"
            )
        b, steps, n, d = x.shape
        t = jnp.broadcast_to(jnp.asarray(knots[1:], x.dtype)[None], (b, steps))
        return {**batch, "x": noised_to(key, x, t).reshape(b, steps * n, d)}

    return transform


def path_states(grid: int | Times, path: Path = _LINEAR) -> BatchTransform:
    """A batch transform for CaLMFlow: the states of a path from noise to data, each a token.

        x_k = path.point(x0, x, t_k),      k = 0 ... T

    A law that is causal over the T + 1 states draws each given those before, as a solution of an
    integral equation (Volterra's) rather than of an ODE; the last state of a sample is the data. On
    a path without noise of its own two states determine the rest, and a density of them has no
    bound: put `losses.noised(std)` behind, or take a path with noise, such as `paths.interpolant`
    of a bridge.

    Args:
        grid: T, the number of equal steps, or times that rise from 0 to 1.
        path: the path between source and data; what noise it has is drawn anew at each time.

    Returns:
        The transform (key, batch, frozen=None) -> batch, of 'x' [b, *event], and 'x0' where there
        is one (standard normal when absent), to 'x' [b, T + 1, size of the event].

    Raises:
        ValueError: At construction for times that do not rise from 0 to 1; at trace time for a
            batch without 'x' or with unknown keys, and a key that is None.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jflow import losses
        >>> states = losses.path_states(2)
        >>> batch = {"x0": jnp.zeros((1, 2)), "x": jnp.ones((1, 2))}
        >>> states(jax.random.key(0), batch)["x"].tolist()
        [[[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]]

    References:
        He, Levine, Vrkic, Bressana, Zhang, Rizvi, Zhang, Zappala, van Dijk, *CaLMFlow: Volterra
            Flow Matching using Causal Language Models*, 2024, arXiv:2410.05292 (noise in the place
            of its variational tokens is ours).
    """
    knots = partition("path_states", grid)

    def transform(key, batch, frozen=None):
        need_key("path_states", key)
        x, x0, _ = read_as_given("path_states", without_weight(batch), ("x", "x0", "cond"))
        noise_key, *keys = split_key(key, len(knots) + 1)
        x0 = jax.random.normal(noise_key, x.shape, x.dtype) if x0 is None else x0
        rows, size = x.shape[0], math.prod(x.shape[1:])
        states = [
            path.point(x0, x, jnp.full((rows,), t, x.dtype), key=one).reshape(rows, size)
            for t, one in zip(knots, keys, strict=True)
        ]
        made = {name: value for name, value in batch.items() if name != "x0"}
        return {**made, "x": jnp.stack(states, axis=1).astype(x.dtype)}

    return transform


def _repeated(part, times: int):
    """[b, n, ...] -> [b, times n, ...]."""
    return None if part is None else jnp.concatenate([part] * times, axis=1)
