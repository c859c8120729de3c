"""A flow that decodes features of symbols into what they stand for, as DisCoRD, over `TokenDiT`."""

import jax
import numpy as np
import optax

import jflow
from jflow import losses, nets, solvers, train
from jflow.types import Condition

N, EACH, CLASSES = 6, 2, 3  # tokens, of which a symbol stands for two; symbols of the vocabulary
CODES = np.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], np.float32)


def rows(count, seed):
    """x_i = the code of its symbol plus half of that of the *next* symbol, and noise of 0.1."""
    draw = np.random.default_rng(seed)
    symbols = draw.integers(CLASSES, size=(count, N // EACH))
    codes = np.repeat(CODES[symbols], EACH, axis=1)
    mean = codes + 0.5 * np.roll(codes, -EACH, axis=1)
    x = (mean + 0.1 * draw.normal(size=mean.shape)).astype(np.float32)
    features = np.repeat(np.eye(CLASSES, dtype=np.float32)[symbols], EACH, axis=1)
    return mean, {"x": x, "cond": Condition(aligned=features)}


def test_the_decoder_draws_what_symbols_and_their_neighbors_stand_for():
    """Which nothing but the features tells; without them the samples are 2 away on average, and a
    causal decoder is off by the next code, 1."""
    velocity = jflow.velocity(nets.TokenDiT(width=16, num_layers=2, num_heads=2))
    _, batch = rows(64, 0)
    optimizer = optax.adam(1e-2)
    state = train.init_state(
        velocity.init(jax.random.key(0), batch["x"], np.zeros(64, np.float32), batch["cond"]),
        optimizer,
        jax.random.key(1),
    )
    assert not np.any(state.params["aligned"]["kernel"])
    step = train.make_step(losses.flow_matching(velocity), optimizer)
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: (step(s, batch)[0], None), s, length=300)[0])
    state = run(state)
    mean, other = rows(64, 1)
    noise = jax.random.normal(jax.random.key(2), other["x"].shape)
    x, _ = solvers.sample(velocity, state.params, noise, other["cond"], method=8)
    off = np.linalg.norm(np.asarray(x) - mean, axis=-1)
    assert off.mean() < 0.4  # noise of 0.1 in two numbers alone is 0.125
    shuffled = other["cond"]._replace(aligned=other["cond"].aligned[::-1])
    x, _ = solvers.sample(velocity, state.params, noise, shuffled, method=8)
    assert np.linalg.norm(np.asarray(x) - mean, axis=-1).mean() > 1
