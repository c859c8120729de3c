"""Keys, or None where a function is deterministic."""

import jax
import jax.numpy as jnp


def split_key(key, n: int):
    """n keys, or n times None: deterministic stays deterministic."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def same_draws(key):
    """The key for one more use that is meant to draw the same numbers: a network evaluated again
    under the same dropout. None stays None."""
    return None if key is None else jax.random.clone(key)


def is_key(x) -> bool:
    """Whether x is a typed key, or an array of them."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def hidden(key):
    """(the numbers of a key, data -> the key for the same draws): a program that is evaluated again
    by a rule of derivation draws what it drew before, and JAX's own search for keys that are used
    twice takes no notice."""
    impl = jax.random.key_impl(key)
    return jax.random.key_data(same_draws(key)), lambda data: jax.random.wrap_key_data(
        data, impl=impl
    )
