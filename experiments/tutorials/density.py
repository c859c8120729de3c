# %% [markdown]
# # A density in two dimensions
#
# A neural spline flow learns the density of two moons from samples, by maximum likelihood. We look
# at the density that it found, compare it with a kernel density estimate on held-out rows, and draw
# samples.

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy.stats import gaussian_kde

from jflow import data, flows, losses, train

STEPS = 20 if "--short" in sys.argv else 2000

rows = data.moons(12_000, seed=0)["x"]  # float32 [n, 2]
training, held_out = rows[:10_000], rows[10_000:]

# %% [markdown]
# A flow is a tuple of pure functions. `init` returns params, nested dicts of arrays, and
# standardizes: what the coupling layers see has mean 0 and deviation 1, whatever the units of the
# columns.

# %%
flow = flows.neural_spline((2,), depth=4, hidden=(64, 64))
params = flow.init(jax.random.key(0), training[:1000])

# %% [markdown]
# `train.make_step` makes one pure function of a loss and an optimizer; we jit it and loop.

# %%
optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
step = jax.jit(train.make_step(losses.nll(flow), optimizer), donate_argnums=0)
state = train.init_state(params, optimizer, jax.random.key(1))
history = []
for _, batch in zip(range(STEPS), data.batches({"x": training}, 512)):
    state, metrics = step(state, batch)
    history.append(float(metrics["loss"]))
print(f"negative log-likelihood of the last batches: {np.mean(history[-50:]):.3f} nats")

# %% [markdown]
# On rows that it has not seen, beside a kernel density estimate with Scott's bandwidth:

# %%
log_prob = jax.jit(flow.log_prob)
print(f"spline flow: {log_prob(state.params, held_out).mean():.3f} nats a row")
print(
    f"kernel density estimate: {gaussian_kde(training.T).logpdf(held_out.T).mean():.3f} nats a row"
)

# %% [markdown]
# The density on a grid, and samples. `flow.sample` takes params, a key and the number of samples.

# %%
x, y = np.meshgrid(np.linspace(-2, 3, 200), np.linspace(-1.5, 2, 140))
grid = jnp.asarray(np.stack([x.ravel(), y.ravel()], axis=1), jnp.float32)
density = np.exp(log_prob(state.params, grid)).reshape(x.shape)
samples = jax.jit(flow.sample, static_argnums=2)(state.params, jax.random.key(2), 2000)

figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), sharex=True, sharey=True)
axes[0].plot(*held_out.T, ".", markersize=1)
axes[1].contourf(x, y, density, levels=30, cmap="viridis")
axes[2].plot(*samples.T, ".", markersize=1, color="tab:orange")
for axis, title in zip(axes, ("held-out data", "density", "samples")):
    axis.set(title=title, xlim=(-2, 3), ylim=(-1.5, 2), aspect="equal")
plt.tight_layout()
plt.show()

# %% [markdown]
# The density integrates to one: a sum over the grid, times the area of a cell.

# %%
cell = (x[0, 1] - x[0, 0]) * (y[1, 0] - y[0, 0])
print(f"integral over the picture: {density.sum() * cell:.3f}")
