# %% [markdown]
# # From a published file to one step
#
# The weights of a transformer such as SiT become a velocity in three lines, and then guidance,
# densities, stochastic sampling and few-step training are the same calls as for any other. No
# published file is at hand here: we train a tiny SiT on scikit-learn's 8x8 digits and write it in
# the layout of SiT's authors.

# %%
import sys
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.neighbors import KNeighborsClassifier

from jflow import convert, data, guidance, losses, nets, solvers, train

STEPS = 20 if "--short" in sys.argv else 1000
digits = data.digits().train  # {'x': uint8 [n, 8, 8, 1] of 0 .. 16, 'cond': labels [n]}
images = {"x": digits["x"].astype("float32") / 8 - 1, "cond": digits["cond"]}


def trained(loss, params, steps, rate, frozen=None):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    step = jax.jit(train.make_step(loss, optimizer, ema=0.99))
    state = train.init_state(params, optimizer, jax.random.key(1), ema=0.99, frozen=frozen)
    for _, batch in zip(range(steps), data.batches(images, 64)):
        state, metrics = step(state, batch)
    return state.ema


tiny = nets.DiT(2, width=64, num_layers=3, num_heads=4, num_classes=10, time_scale=1.0)
velocity = nets.velocity(tiny)
start = velocity.init(jax.random.key(0), images["x"][:1], jnp.zeros(1), jnp.zeros(1, int))
loss = losses.chain(losses.drop_cond(0.1, null=10), losses.flow_matching(velocity))
path = tempfile.mkdtemp() + "/sit.safetensors"
layout = convert.dit_layout(tiny, channels=1, image_size=8)
convert.save(path, layout, trained(loss, start, STEPS, 2e-3))
print(*list(convert.read_safetensors(path))[:4], "...", sep="\n")

# %% [markdown]
# Three lines. `num_heads` is not in the shapes; for the published widths it is known.

# %%
net, params = convert.dit(path, num_heads=4)
velocity = nets.velocity(net)
guided = guidance.cfg(velocity, 2.0, null=net.num_classes)

# %% [markdown]
# Samples along the ODE, and by the SDE with the same marginals:

# %%
labels = jnp.tile(jnp.arange(10), 20)
noise = jax.random.normal(jax.random.key(2), (200, 8, 8, 1))
judge = KNeighborsClassifier(5).fit(images["x"].reshape(-1, 64), images["cond"])


def agreement(x):
    return np.mean(judge.predict(np.asarray(x).reshape(-1, 64)) == np.asarray(labels))


step = solvers.euler_maruyama(guided, solvers.noises.of_sigma())
grid = solvers.grids.uniform(50)
drawn = {
    "ODE, 20 steps": jax.jit(lambda x: solvers.sample(guided, params, x, labels, method=20)[0])(
        noise
    ),
    "SDE, 50 steps": jax.jit(
        lambda x: solvers.sample_sde(step, params, x, jax.random.key(3), grid, labels)[0]
    )(noise),
}
for name, x in drawn.items():
    print(f"{name}: {agreement(x):.0%} are read as the digit that was asked for")

# %% [markdown]
# The density of images, in nats: with the true label, and with another.

# %%
few = slice(0, 64)
base = lambda x: jax.scipy.stats.norm.logpdf(x).sum((1, 2, 3))
log_prob = jax.jit(
    lambda x, y: solvers.log_prob(
        velocity,
        params,
        x,
        base,
        y,
        method=10,
        divergence=solvers.hutchinson(8),
        key=jax.random.key(4),
    )[0]
)
for name, turn in (("true", 0), ("another", 5)):
    value = log_prob(images["x"][few], (images["cond"][few] + turn) % 10)
    print(f"{name} label: {value.mean():.1f} nats")

# %% [markdown]
# One step: the same network is a flow map u(x, t, r) once it has parts for r, which start at zero,
# so that training goes on from the loaded weights. The guided velocity is the teacher. One step of
# the velocity itself ends near the mean of a class, of which the spread of the samples tells.

# %%
flow_map = nets.flow_map(net)
fresh = flow_map.init(jax.random.key(0), images["x"][:1], jnp.zeros(1), jnp.ones(1), labels[:1])
loss = losses.mean_flow(flow_map, teacher=guided)
short = trained(loss, train.warm_start(fresh, params), STEPS // 2, 5e-4, frozen={"teacher": params})
one, zero = jnp.ones(200), jnp.zeros(200)
drawn["one step"] = noise + flow_map.apply(short, noise, zero, one, labels)
drawn["one step before"] = noise + velocity.apply(params, noise, zero, labels)


def spread(x):  # within a class
    x = np.asarray(x).reshape(20, 10, 64)
    return x.std(axis=0).mean()


chosen = [images["x"][images["cond"] == k][:20] for k in range(10)]
print(f"data: spread {spread(np.stack(chosen, axis=1)):.2f}")
for name, x in drawn.items():
    print(f"{name}: spread {spread(x):.2f}, {agreement(x):.0%} as asked")

figure, axes = plt.subplots(1, 4, figsize=(12, 2))
for axis, (name, x) in zip(axes, drawn.items()):
    x = np.asarray(x)[:30].reshape(3, 10, 8, 8)
    axis.imshow(x.transpose(0, 2, 1, 3).reshape(24, 80), cmap="gray_r", vmin=-1, vmax=1)
    axis.set(title=name, xticks=[], yticks=[])
plt.tight_layout()
plt.show()
