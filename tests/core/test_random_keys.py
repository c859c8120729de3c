"""The reader of keys sees what it is for, and nothing else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from keys import KEYS, keys_consumed_twice

K = jax.random


def draw(key):
    return K.normal(key, (3,))


def fold(k, i):
    return draw(K.fold_in(k, i))


def scan(body, *xs):
    return jax.lax.scan(body, jnp.zeros(3), *xs, length=3)[0]


def mixture_and_noise(key):
    """A base that splits its key, and noise from what the caller folds 1 into the key: they are the
    same numbers."""
    which, noise = K.split(key)
    z = K.categorical(which, jnp.zeros(2)) + draw(noise)
    return z + draw(K.fold_in(key, 1))


TWICE = {
    "passed twice": lambda k: draw(k) + K.gamma(k, 1.0),
    "passed to jit twice": lambda k: jax.jit(draw)(k) + jax.jit(draw)(k),
    "drawn from and split": lambda k: (draw(k), [draw(i) for i in K.split(k)]),
    "split into 2 and into 3": lambda k: draw(K.split(k)[1]) + draw(K.split(k, 3)[1]),
    "child of a split, and folded in": lambda k: draw(K.split(k, 4)[1]) + fold(k, 1),
    "a base's split and what is folded in": mixture_and_noise,
    "one number folded in twice": lambda k: fold(k, 5) + fold(k, 5),
    "one step folded in twice": lambda k: jax.jit(lambda k, i: fold(k, i) + fold(k, i))(k, 2),
    "in every turn of a scan": lambda k: scan(lambda x, _: (x + draw(k), None), None),
    "in every turn of a while": lambda k: jax.lax.fori_loop(
        0, jnp.argmax(draw(k)), lambda i, x: x + fold(k, 1), jnp.zeros(3)
    ),
    "carried on": lambda k: jax.lax.scan(lambda k, _: (k, draw(k)), k, None, length=3)[1],
    "row by row, of one key": lambda k: jax.vmap(draw)(jnp.broadcast_to(k, (3,))),
    "in a branch and after it": lambda k: (
        jax.lax.cond(jnp.array(True), draw, lambda k: jnp.zeros(3), k) + draw(k)
    ),
    "inside a checkpoint and after it": lambda k: jax.checkpoint(draw)(k) + draw(k),
    "a seed twice": lambda k: draw(K.key(3)) + draw(K.key(3)),
}
ONCE = {
    "split": lambda k: sum(draw(i) for i in K.split(k, 3)),
    "split again": lambda k: (lambda a, b: draw(a) + sum(map(draw, K.split(b))))(*K.split(k)),
    "numbers folded in": lambda k: sum(fold(k, i) for i in range(3)),
    "scanned": lambda k: scan(lambda x, i: (x + draw(i), None), K.split(k, 3)),
    "folded in by the turn": lambda k: jax.lax.fori_loop(
        0, 3, lambda i, x: x + fold(k, i), jnp.zeros(3)
    ),
    "split and carried on": lambda k: jax.lax.scan(
        lambda k, _: tuple(K.split(k)), k, None, length=3
    )[0],
    "in either branch": lambda k: jax.lax.cond(jnp.array(True), draw, lambda k: -draw(k), k),
    "cloned": lambda k: draw(k) + draw(K.clone(k)),
    "by Linen": lambda k: nn.Sequential([nn.Dense(2), nn.Dense(2)]).init(k, jnp.zeros((1, 2))),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_second_use_is_found(name):
    assert keys_consumed_twice(TWICE[name], KEYS[0])


@pytest.mark.parametrize("name", ONCE)
def test_a_single_use_is_not(name):
    assert not keys_consumed_twice(ONCE[name], KEYS[0])


def test_a_child_of_a_split_is_the_key_with_its_number_folded_in():
    for n in (2, 5):
        assert (
            K.key_data(K.split(KEYS[0], n)[1]).tolist()
            == K.key_data(K.fold_in(KEYS[0], 1)).tolist()
        )
