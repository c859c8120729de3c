# %% [markdown]
# # One step: MeanFlow, and a teacher
#
# A flow map u(x, t, r) is the average velocity between two times: x_r = x_t + (r - t) u(x_t, t, r).
# One evaluation goes from noise to data. We learn one from data alone by MeanFlow, and one from a
# trained velocity by distillation.

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import jflow
from jflow import data, losses, metrics, nets, solvers, train

STEPS = 20 if "--short" in sys.argv else 3000
rows = data.moons(20_000, seed=0)["x"]
rows = (rows - rows.mean(0)) / rows.std(0)

# %% [markdown]
# One network serves as a velocity of (x, t) and as a flow map of (x, t, r). Several of these losses
# differentiate by time, so that the network should be gentle in it: `time_scale=10`.

# %%
net = nets.ResidualMLP(width=128, num_blocks=2, time_scale=10.0)
velocity, flow_map = jflow.velocity(net), jflow.flow_map(net)
x, t = jnp.zeros((1, 2)), jnp.zeros(1)
optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, STEPS))


def trained(loss, params, frozen=None):
    step = jax.jit(train.make_step(loss, optimizer, ema=0.995))
    state = train.init_state(params, optimizer, jax.random.key(1), ema=0.995, frozen=frozen)
    for _, batch in zip(range(STEPS), data.batches({"x": rows}, 256)):
        state, _ = step(state, batch)
    return state.ema


teacher = trained(losses.flow_matching(velocity), velocity.init(jax.random.key(0), x, t))
scratch = flow_map.init(jax.random.key(0), x, t, t)
mean_flow = trained(losses.mean_flow(flow_map), scratch)

# %% [markdown]
# The teacher's params come in `frozen`: never differentiated, and no constant of the compiled
# program. `train.warm_start` starts the flow map as the teacher.

# %%
distilled = trained(
    losses.eulerian_map_distillation(flow_map, velocity),
    train.warm_start(scratch, teacher),
    {"teacher": teacher},
)

# %%
x0 = jax.random.normal(jax.random.key(2), (1000, 2))
fresh = data.moons(2000, seed=1)["x"]
fresh = (fresh - fresh.mean(0)) / fresh.std(0)

draws = {"teacher, 1 step of Heun": solvers.sample(velocity, teacher, x0, method=1)[0]}
draws["teacher, 50 steps"] = solvers.sample(velocity, teacher, x0, method=50)[0]
draws["MeanFlow, 1 evaluation"] = solvers.sample_flow_map(flow_map, mean_flow, x0, steps=1)[0]
draws["distilled, 1 evaluation"] = solvers.sample_flow_map(flow_map, distilled, x0, steps=1)[0]

figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), sharex=True, sharey=True)
for axis, (name, drawn) in zip(axes, draws.items()):
    print(f"{name:24s} W2 {metrics.wasserstein(drawn, fresh[:1000]):.3f}")
    axis.plot(*drawn.T, ".", markersize=1)
    axis.set(title=name, xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
print(f"{'two sets of data':24s} W2 {metrics.wasserstein(fresh[:1000], fresh[1000:]):.3f}")
plt.tight_layout()
plt.show()
