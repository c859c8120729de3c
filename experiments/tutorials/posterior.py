# %% [markdown]
# # A posterior from a simulator
#
# A simulator draws an observation y given parameters; we want the parameters given y. A conditional
# flow q(parameters | y) is trained on simulated pairs by maximum likelihood, and needs no
# likelihood of the simulator. Here the exact posterior is known, so that we can see whether the
# answer is right.

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jflow import data, flows, losses, train

STEPS = 20 if "--short" in sys.argv else 2000

# %% [markdown]
# The simulator: a standard normal prior of two parameters, seen through a map with noise. In y = A
# theta + noise everything is Gaussian, and the posterior has covariance (1 + A' A / s^2)^-1 and
# mean covariance A' y / s^2.

# %%
A, NOISE = np.array([[1.0, 0.8], [-0.5, 1.0], [0.3, 0.3]]), 0.5


def simulate(key, n):
    parameter_key, noise_key = jax.random.split(key)
    theta = jax.random.normal(parameter_key, (n, 2))
    return theta, theta @ A.T + NOISE * jax.random.normal(noise_key, (n, 3))


theta, y = map(np.asarray, simulate(jax.random.key(0), 20_000))

# %% [markdown]
# The condition is the last argument of every function of a flow. Vectors go in as they are.

# %%
flow = flows.neural_spline((2,), depth=4, hidden=(64, 64))
params = flow.init(jax.random.key(1), theta[:1000], y[:1000])
optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
step = jax.jit(train.make_step(losses.nll(flow), optimizer), donate_argnums=0)
state = train.init_state(params, optimizer, jax.random.key(2))
for _, batch in zip(range(STEPS), data.batches({"x": theta, "cond": y}, 512)):
    state, metrics = step(state, batch)

# %% [markdown]
# One observation, and many draws from its posterior: `sample` takes a condition for each draw.

# %%
observed = np.array([1.0, 0.5, 0.2], np.float32)
sample = jax.jit(flow.sample, static_argnums=2)
draws = np.asarray(sample(state.params, jax.random.key(3), 5000, jnp.tile(observed, (5000, 1))))
covariance = np.linalg.inv(np.eye(2) + A.T @ A / NOISE**2)
mean = covariance @ A.T @ observed / NOISE**2
print("mean:       ", draws.mean(0).round(3), " exact:", mean.round(3))
print("deviations: ", draws.std(0).round(3), " exact:", np.sqrt(np.diag(covariance)).round(3))

# %% [markdown]
# Calibration: for many simulated pairs, the rank of the true parameter among draws given its
# observation is uniform where the posterior is right.

# %%
truth, seen = map(np.asarray, simulate(jax.random.key(4), 500))
among = np.asarray(sample(state.params, jax.random.key(5), 500 * 99, jnp.repeat(seen, 99, axis=0)))
ranks = (among.reshape(500, 99, 2) < truth[:, None]).sum(1)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
axes[0].plot(*draws.T, ".", markersize=1)
angle = np.linspace(0, 2 * np.pi, 100)
circle = np.linalg.cholesky(covariance) @ np.stack([np.cos(angle), np.sin(angle)])
for radius in (1, 2):
    axes[0].plot(*(mean[:, None] + radius * circle), color="black", linewidth=1)
axes[0].set(title="draws, and the exact posterior's ellipses", aspect="equal")
axes[1].hist(ranks, bins=10, range=(0, 100), label=["first", "second"])
axes[1].axhline(50, color="black", linewidth=1)
axes[1].set(title="ranks of the truth among 99 draws")
axes[1].legend()
plt.tight_layout()
plt.show()
