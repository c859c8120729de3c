"""Keys, or None where a function is deterministic."""

import jax


def split_key(key, n: int):
    """n keys, or n times None: deterministic stays deterministic."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def same_draws(key):
    """The key for one more use that is meant to draw the same numbers: a network evaluated again under the same dropout.
    None stays None."""
    return None if key is None else jax.random.clone(key)
