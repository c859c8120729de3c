# %% [markdown]
# # From noise to a checkerboard
#
# Flow matching regresses a velocity on straight lines between noise and data; an ODE solver then
# moves noise to data. We train one, watch the samples on their way, and see what the number of
# steps costs.

# %%
import sys

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import jflow
from jflow import couplings, data, losses, metrics, nets, solvers, train

STEPS = 20 if "--short" in sys.argv else 4000
rows = data.checkerboard(20_000, seed=0)["x"]

# %% [markdown]
# A velocity is a network of (x, t). `losses.flow_matching` draws the noise, the times and the
# points between; `losses.chain` puts a pairing before it. Here noise is paired with data by optimal
# transport in each batch, which makes the paths straighter.

# %%
velocity = jflow.velocity(nets.ResidualMLP(width=128, num_blocks=2))
params = velocity.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))
optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


def trained(loss):
    step = jax.jit(train.make_step(loss, optimizer, ema=0.995))
    state = train.init_state(params, optimizer, jax.random.key(1), ema=0.995)
    for _, batch in zip(range(STEPS), data.batches({"x": rows}, 256)):
        state, _ = step(state, batch)
    return state.ema


matching = losses.flow_matching(velocity)
paired = losses.chain(couplings.pair(couplings.optimal_transport()), matching)
learned = {"independent pairs": trained(matching), "optimal transport": trained(paired)}

# %% [markdown]
# On the way: the same noise, solved up to later and later times.

# %%
x0 = jax.random.normal(jax.random.key(2), (4000, 2))


@jax.jit
def until(params, t1):
    return solvers.sample(velocity, params, x0, method=40, t1=t1)[0]


figure, axes = plt.subplots(1, 5, figsize=(12, 2.6), sharex=True, sharey=True)
for axis, t in zip(axes, (0.01, 0.25, 0.5, 0.75, 1.0)):
    axis.plot(*until(learned["optimal transport"], t).T, ".", markersize=1)
    axis.set(title=f"t = {t}", xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal")
plt.tight_layout()
plt.show()

# %% [markdown]
# What the number of steps costs: the Wasserstein distance of 1000 samples to 1000 fresh rows, by
# Euler's method. Two sets of data are as far apart as the last line says.

# %%
fresh = data.checkerboard(2000, seed=1)["x"]


def distance(params, n):
    method = solvers.fixed(n, diffrax.Euler())
    x, _ = jax.jit(lambda x: solvers.sample(velocity, params, x, method=method))(x0[:1000])
    return metrics.wasserstein(x, fresh[:1000])


for name, params in learned.items():
    found = "  ".join(f"{n}: {distance(params, n):.3f}" for n in (1, 2, 4, 16))
    print(f"{name:18s} W2 by steps  {found}")
print(f"two sets of data: {metrics.wasserstein(fresh[:1000], fresh[1000:]):.3f}")
