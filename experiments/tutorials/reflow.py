# %% [markdown]
# # Straight paths: reflow and one step
#
# The paths of a flow that was trained on pairs at random are curved, and one Euler step misses.
# Reflow draws pairs from the flow itself and trains again on those: the second flow's paths hardly
# cross, are nearly straight, and one step nearly suffices.

# %%
import sys
import tempfile

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import jflow
from jflow import data, losses, metrics, nets, solvers, train

STEPS, PAIRS = (20, 2000) if "--short" in sys.argv else (3000, 50_000)
rows = data.eight_gaussians(20_000, seed=0)["x"] / 5

velocity = jflow.velocity(nets.ResidualMLP(width=128, num_blocks=2))
optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
step = jax.jit(train.make_step(losses.flow_matching(velocity), optimizer, ema=0.995))


def trained(params, pairs):
    state = train.init_state(params, optimizer, jax.random.key(1), ema=0.995)
    for _, batch in zip(range(STEPS), data.batches(pairs, 512)):
        state, _ = step(state, batch)
    return state.ema


fresh = velocity.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))
first = trained(fresh, {"x": rows})

# %% [markdown]
# Pairs of the first flow go to a folder of shards. A generation that was killed goes on where it
# was.

# %%
folder = tempfile.mkdtemp()
source = data.normal_source((2,))
data.generate_reflow_pairs(
    folder, velocity, first, source, PAIRS, key=jax.random.key(2), method=50, progress=False
)
second = trained(first, data.read_shards(folder))

# %% [markdown]
# One more round would straighten more and drift more. Here we look at how straight both flows are
# (the mean squared distance of the velocity from the displacement; 0 is straight), and at one Euler
# step.

# %%
x0 = jax.random.normal(jax.random.key(3), (1000, 2))
other = data.eight_gaussians(1000, seed=1)["x"] / 5


@jax.jit
def straightness(params):
    return metrics.straightness(velocity, params, x0, method=50).mean()


@jax.jit
def euler(params):
    return solvers.sample(velocity, params, x0, method=solvers.fixed(1, diffrax.Euler()))[0]


@jax.jit
def paths(params):
    ts = jnp.linspace(0.02, 1, 50)
    at = lambda t: solvers.sample(velocity, params, x0[:60], method=20, t1=t)[0]
    return jnp.concatenate([x0[None, :60], jax.lax.map(at, ts)])


figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True)
for axis, (name, params) in zip(axes, {"first flow": first, "after reflow": second}.items()):
    one = euler(params)
    print(
        f"{name:13s} straightness {straightness(params):.4f}, "
        f"W2 of one step {metrics.wasserstein(one, other):.3f}"
    )
    axis.plot(*paths(params).transpose(2, 0, 1), color="tab:gray", linewidth=0.6)
    axis.plot(*one.T, ".", markersize=1.5, color="tab:red")
    axis.set(title=f"{name}: paths, and one Euler step", aspect="equal", xlim=(-2, 2), ylim=(-2, 2))
plt.tight_layout()
plt.show()
